"""Tags that count in pixels or millimetres per pixel, rewritten for a finer grid, or one of a part of the slices.

The arithmetic is that of `volume.geometry`: edges align. Lengths and positions in the patient stay where they
are; whatever is counted in pixels is counted anew (sections of DICOM PS3.3):

| what | where it is defined |
|---|---|
| spacings and positions of planes, also of groups of frames and of NM detectors | C.7.6.2, C.7.6.16.2, C.8.4.11 |
| spacings at the detector, of the film, in the beam's centre, of RT and presentation | C.8.7, C.8.6, C.8.8.2, C.10.4 |
| aspect ratio | C.7.6.3 |
| shutters, collimators, sensing regions of the exposure control; also of single frames | C.7.6.11, C.8.7.3, C.8.19.6 |
| shifts of a mask, and the regions that have their own | C.7.6.10, C.7.6.16.2 |
| calibrated regions of ultrasound | C.8.5.5 |
| annotations and displayed areas that a vendor put into an image; subjects of photographs | C.10.4, C.10.5, C.8.12 |

What tells how the image was acquired stays, for it was: AcquisitionMatrix, ReconstructionPixelSpacing, ZoomFactor,
DetectorBinning, DetectorElementSpacing, DetectorActiveOrigin and FieldOfViewOrigin (in pixels of the detector),
EstimatedRadiographicMagnificationFactor, and what is in millimetres or counts frames, times or beats. So do values
before a change (OriginalAttributesSequence). Curves that were drawn in pixels (groups 50xx) go as overlays do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.dicom_headers import PALETTE, Instance, Plane, Vector, plane_spacing_mm, unit_orientation
from medsr_cli.formats.dicom_sequences import nested
from medsr_cli.volume.geometry import enlarged_spacing, first_voxel_shift

_Change = Callable[[Vector], list[int]] | Callable[[Vector], list[float]]

SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

# Edges and centres in pixels, counted from 1: display shutters, collimators, sensing regions of the exposure control.
_COLUMN_EDGES = ("ShutterLeftVerticalEdge", "ShutterRightVerticalEdge",
                 "CollimatorLeftVerticalEdge", "CollimatorRightVerticalEdge",
                 "ExposureControlSensingRegionLeftVerticalEdge",
                 "ExposureControlSensingRegionRightVerticalEdge")  # fmt: skip
_ROW_EDGES = ("ShutterUpperHorizontalEdge", "ShutterLowerHorizontalEdge",
              "CollimatorUpperHorizontalEdge", "CollimatorLowerHorizontalEdge",
              "ExposureControlSensingRegionUpperHorizontalEdge",
              "ExposureControlSensingRegionLowerHorizontalEdge")  # fmt: skip
_ROW_COLUMN_LISTS = ("CenterOfCircularShutter", "VerticesOfThePolygonalShutter",
                     "CenterOfCircularCollimator", "VerticesOfThePolygonalCollimator",
                     "CenterOfCircularExposureControlSensingRegion",
                     "VerticesOfThePolygonalExposureControlSensingRegion", "VerticesOfTheRegion")  # fmt: skip
_RADII = ("RadiusOfCircularShutter", "RadiusOfCircularCollimator", "RadiusOfCircularExposureControlSensingRegion")

_MM_PER_PIXEL = ("ObjectPixelSpacingInCenterOfBeam", "PresentationPixelSpacing", "ImagePlanePixelSpacing")
"""Between rows, between columns; beside `SPACINGS`."""
_ANNOTATED = {
    "GraphicAnnotationUnits": ("GraphicData",),
    "CompoundGraphicUnits": ("GraphicData", "RotationPoint"),
    "BoundingBoxAnnotationUnits": ("BoundingBoxTopLeftHandCorner", "BoundingBoxBottomRightHandCorner"),
    "AnchorPointAnnotationUnits": ("AnchorPoint",),
}
"""Units, and the (column, row) pairs that are in them: PIXEL counts from the corner of the first one, 0.0, 0.0."""
_OF_BEFORE = frozenset({"OriginalAttributesSequence"})
"""Sequences that tell what another image, or this one earlier, was like."""
_IN_PIXELS = frozenset({"PIXL"})
_DRAWN = frozenset({"ROI", "POLY"})
"""Axis units and types of curves that lie on the image (C.10.2, retired)."""

_RECODED = frozenset({PALETTE, "YBR_FULL", "YBR_FULL_422"})
"""Photometric interpretations that become RGB: codes of a pixel's components are others then."""
_LOOKED_UP = 2
"""From this PixelComponentOrganization on, values are found in a table; one in between means nothing (C.8.5.5.1.12)."""
_PIXEL_COMPONENTS = (
    "PixelComponentOrganization", "PixelComponentMask", "PixelComponentRangeStart", "PixelComponentRangeStop",
    "PixelComponentPhysicalUnits", "PixelComponentDataType", "NumberOfTableBreakPoints", "TableOfXBreakPoints",
    "TableOfYBreakPoints", "NumberOfTableEntries", "TableOfPixelValues", "TableOfParameterValues",
    "PixelValueMappingCodeSequence",
)  # fmt: skip
_FROM_REFERENCE = {
    "X": ("DopplerSampleVolumeXPosition", "TMLinePositionX0", "TMLinePositionX1"),
    "Y": ("DopplerSampleVolumeYPosition", "TMLinePositionY0", "TMLinePositionY1"),
}
"""Displacements from a region's reference pixel (C.8.5.5.1.9 and .10); the retired ones of the same names, too."""
_LARGEST = {"SS": (1 << 15) - 1, "US": (1 << 16) - 1, "UL": (1 << 32) - 1}

_STALE_IN_PRIVATE = (*SPACINGS, "Rows", "Columns", "ImagePositionPatient")
"""What a scanner's private copy of the header says about the grid; it is no longer true, and nobody could tell."""


@dataclass(frozen=True)
class Grid:
    """Pixels of a slice before and after."""

    rows: int
    """Of the slice, or of the part of it that is enlarged."""
    columns: int
    new_rows: int
    new_columns: int
    part: tuple[int, int] | None = None
    """Row and column of the slice, from 0, that the part begins with; None for whole slices."""

    @property
    def first(self) -> tuple[int, int]:
        """Row and column of the slice, from 0, that become the first ones."""
        return self.part or (0, 0)

    def spacing_mm(self, spacing: tuple[float, float]) -> tuple[float, float]:
        """Spacing between rows and between columns, afterwards."""
        return (
            enlarged_spacing(spacing[0], self.rows, self.new_rows),
            enlarged_spacing(spacing[1], self.columns, self.new_columns),
        )

    def position_mm(self, position: Vector, orientation: Vector, spacing: tuple[float, float]) -> Vector:
        """Centre of the first pixel, afterwards, LPS."""
        along, down = np.split(np.array(orientation), 2)
        moved = np.array(position)
        moved = moved + along * spacing[1] * (self.first[1] + first_voxel_shift(self.columns, self.new_columns))
        moved = moved + down * spacing[0] * (self.first[0] + first_voxel_shift(self.rows, self.new_rows))
        return tuple(float(v) for v in moved)

    def row(self, row: float) -> int:
        """A pixel's row, counted from 1."""
        return math.floor((row - self.first[0] - 0.5) * self.new_rows / self.rows + 1)

    def column(self, column: float) -> int:
        """A pixel's column, counted from 1."""
        return math.floor((column - self.first[1] - 0.5) * self.new_columns / self.columns + 1)


def rewrite_grid(ds: Dataset, instance: Instance, grid: Grid) -> None:
    """Bring every tag that depends on the grid up to date, in place.

    Args:
        ds: the header of the source; pixels, overlays, icons and histograms are not looked at.
        instance: what was read of it.
        grid: pixels of its slices before and after.
    """
    ds.Rows, ds.Columns = grid.new_rows, grid.new_columns
    _rewrite_level(ds, instance.planes[0], grid)
    _rewrite_aspect(ds, grid)
    _rewrite_marks(ds, grid)
    _rewrite_rt_position(ds, grid)
    _forget_curves(ds)
    _cut_regions(ds, grid)
    for region in ds.get("SequenceOfUltrasoundRegions") or []:
        _rewrite_region(region, grid)
        _check_components(region, instance)
    for detector in ds.get("DetectorInformationSequence") or []:
        orientation = unit_orientation(_numbers(detector, "ImageOrientationPatient"))
        plane = Plane(None, orientation, instance.planes[0].spacing_mm, 1.0, 0.0, 0)
        _rewrite_level(detector, plane, grid)
    _rewrite_groups(ds, instance, grid)
    _forget_private_grid(ds)


def _rewrite_level(ds: Dataset, plane: Plane, grid: Grid) -> None:
    """Spacings and position that stand directly in one data set."""
    position = _numbers(ds, "ImagePositionPatient")
    if position is not None and len(position) == 3 and plane.orientation and plane.spacing_mm:
        ds.ImagePositionPatient = _strings(grid.position_mm(position, plane.orientation, plane.spacing_mm))
    for keyword in SPACINGS:
        spacing = plane_spacing_mm(ds, keyword)
        if spacing is not None:  # zero means unknown and stays zero
            setattr(ds, keyword, _strings(grid.spacing_mm(spacing)))


def _rewrite_groups(ds: Dataset, instance: Instance, grid: Grid) -> None:
    shared = list(ds.get("SharedFunctionalGroupsSequence") or [])
    frames = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
    planes = [*[instance.planes[0]] * len(shared), *instance.planes]
    for group, plane in zip([*shared, *frames], planes, strict=False):
        for item, private in nested(group):
            if not private:
                _rewrite_level(item, plane, grid)


def _rewrite_aspect(ds: Dataset, grid: Grid) -> None:
    """Height to width of a pixel; it changes only where rows and columns are enlarged differently."""
    aspect = _numbers(ds, "PixelAspectRatio")
    change = Fraction(grid.rows * grid.new_columns, grid.new_rows * grid.columns)
    if aspect is None or len(aspect) != 2 or min(aspect) <= 0 or change == 1:
        return
    ratio = (Fraction(aspect[0]) / Fraction(aspect[1]) * change).limit_denominator(100_000)
    ds.PixelAspectRatio = [ratio.numerator, ratio.denominator]


def _rewrite_marks(ds: Dataset, grid: Grid) -> None:
    """Places, lengths and spacings in pixels, wherever they stand: for all frames or for one."""
    _rewrite_shutters(ds, grid)
    _rewrite_annotations(ds, grid)
    for keyword in _MM_PER_PIXEL:
        _replace(ds, keyword, lambda v: list(grid.spacing_mm((v[0], v[1]))), count=2)
    down, across = grid.new_rows / grid.rows, grid.new_columns / grid.columns
    _replace(ds, "MaskSubPixelShift", lambda v: [v[0] * down, v[1] * across], count=2)
    _replace(ds, "StereoHorizontalPixelOffset", lambda v: [v[0] * across], count=1)
    _replace(ds, "StereoVerticalPixelOffset", lambda v: [v[0] * down], count=1)
    for element in ds:
        if element.VR == "SQ" and not element.tag.is_private and element.keyword not in _OF_BEFORE:
            for item in element.value:
                _rewrite_marks(item, grid)


def _rewrite_shutters(ds: Dataset, grid: Grid) -> None:
    for keyword in _COLUMN_EDGES:
        _replace(ds, keyword, lambda values: [grid.column(v) for v in values])
    for keyword in _ROW_EDGES:
        _replace(ds, keyword, lambda values: [grid.row(v) for v in values])
    for keyword in _ROW_COLUMN_LISTS:
        _replace(ds, keyword, lambda values: [(grid.column, grid.row)[i % 2 == 0](v) for i, v in enumerate(values)])
    for keyword in _RADII:
        _replace(ds, keyword, lambda values: [round(v * grid.new_columns / grid.columns) for v in values])


def _rewrite_annotations(ds: Dataset, grid: Grid) -> None:
    """What is drawn over an image, and which part of it is shown."""
    scales = grid.new_columns / grid.columns, grid.new_rows / grid.rows
    first = grid.first[1], grid.first[0]
    for units, keywords in _ANNOTATED.items():
        if ds.get(units) == "PIXEL":
            for keyword in keywords:
                _replace(ds, keyword, lambda v: [(at - first[i % 2]) * scales[i % 2] for i, at in enumerate(v)])
    # Corners of what is shown: pixels, counted from 1, that still belong to it.
    _replace(
        ds,
        "DisplayedAreaTopLeftHandCorner",
        lambda v: [math.floor((v[i] - 1 - first[i]) * scales[i] + 0.5) + 1 for i in (0, 1)],
        count=2,
    )
    _replace(
        ds,
        "DisplayedAreaBottomRightHandCorner",
        lambda v: [math.floor((v[i] - first[i]) * scales[i] + 0.5) for i in (0, 1)],
        count=2,
    )
    # Column and row of the subject's middle; then its diameter, or its width and height.
    _replace(
        ds,
        "SubjectArea",
        lambda v: [round((at - first[i] if i < 2 else at) * scales[i % 2]) for i, at in enumerate(v)],
    )


def _rewrite_rt_position(ds: Dataset, grid: Grid) -> None:
    """RTImagePosition: x and y of the first pixel's centre on the receptor, in mm; y runs up (C.8.8.2)."""
    spacing = _numbers(ds, "ImagePlanePixelSpacing")
    position = _numbers(ds, "RTImagePosition")
    if spacing is None or position is None or len(spacing) != 2 or len(position) != 2 or min(spacing) <= 0:
        return
    # Spacings have been rewritten by now: the first pixel moves by half of what they lost.
    old = spacing[0] * grid.new_rows / grid.rows, spacing[1] * grid.new_columns / grid.columns
    turned = _numbers(ds, "RTImageOrientation") or (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    lifted = (*position, 0.0)
    x, y, _ = grid.position_mm(lifted, turned, old)
    ds.RTImagePosition = _strings((x, y))


def _forget_curves(ds: Dataset) -> None:
    """Curves whose points are pixels of the source; what was recorded in time, such as an ECG, stays."""
    groups = {tag.group for tag in ds.keys() if 0x5000 <= tag.group <= 0x50FF and tag.group % 2 == 0}  # noqa: SIM118
    for group in groups:
        kind, units = ds.get((group, 0x0020)), ds.get((group, 0x0030))
        axes = {text.strip() for text in _texts(units)}
        if axes & _IN_PIXELS or {text.strip() for text in _texts(kind)} & _DRAWN:
            for tag in [tag for tag in ds.keys() if tag.group == group]:  # noqa: SIM118
                del ds[tag]


def _cut_regions(ds: Dataset, grid: Grid) -> None:
    """Calibrated regions within the part, counted from its first pixel; those outside of it are left out."""
    regions = ds.get("SequenceOfUltrasoundRegions")
    if grid.part is None or not regions:
        return
    row, column = grid.part
    axes = (("MinX0", "MaxX1", "X", column, grid.columns), ("MinY0", "MaxY1", "Y", row, grid.rows))
    kept = [region for region in regions if all(_cut_region(region, *axis) for axis in axes)]
    if kept:
        ds.SequenceOfUltrasoundRegions = Sequence(kept)
    else:
        del ds.SequenceOfUltrasoundRegions


def _cut_region(region: Dataset, low: str, high: str, axis: str, first: int, length: int) -> bool:
    """Clip a region along one axis; whether anything of it is left. Its reference pixel counts from its own corner."""
    ends = _numbers(region, f"RegionLocation{low}"), _numbers(region, f"RegionLocation{high}")
    if ends[0] is None or ends[1] is None:
        return True
    start, stop = int(ends[0][0]) - first, int(ends[1][0]) - first
    setattr(region, f"RegionLocation{low}", min(max(start, 0), length - 1))
    setattr(region, f"RegionLocation{high}", min(max(stop, 0), length - 1))
    _replace(region, f"ReferencePixel{axis}0", lambda v: [round(v[0]) + min(start, 0)])
    return start < length and stop >= 0


def _rewrite_region(region: Dataset, grid: Grid) -> None:
    """A calibrated region of ultrasound: bounds in pixels from 0, deltas in units per pixel."""
    for axis, high, scale in (
        ("X", "MaxX1", grid.new_columns / grid.columns),
        ("Y", "MaxY1", grid.new_rows / grid.rows),
    ):
        low = f"RegionLocationMin{axis}0"
        corner = _numbers(region, low)
        start = corner[0] if corner else 0.0
        _replace(region, low, lambda v, s=scale: [round(v[0] * s)])
        _replace(region, f"RegionLocation{high}", lambda v, s=scale: [round((v[0] + 1) * s) - 1])
        moved = round(start * scale) - start * scale
        _rewrite_reference(region, axis, scale, moved)
    if "ActiveImageAreaOverlayGroup" in region:
        del region.ActiveImageAreaOverlayGroup  # the overlay is gone


def _rewrite_reference(region: Dataset, axis: str, scale: float, moved: float) -> None:
    """The reference pixel, and what is counted from it.

    It counts from the region's first pixel, whose edge rounding has moved. The nearest new pixel is taken, and its
    physical value is that of its own place: every pixel keeps its physical position (C.8.5.5.1.16).

    Args:
        region: an item of SequenceOfUltrasoundRegions.
        axis: X or Y.
        scale: new pixels for each old one.
        moved: by how many new pixels the region's first edge lies further than before.
    """
    reference, delta = _numbers(region, f"ReferencePixel{axis}0"), _numbers(region, f"PhysicalDelta{axis}")
    value, off = _numbers(region, f"ReferencePixelPhysicalValue{axis}"), 0.0
    if reference is not None:
        exact = (reference[0] + 0.5) * scale - 0.5 - moved
        off = math.floor(exact + 0.5) - exact
        setattr(region, f"ReferencePixel{axis}0", math.floor(exact + 0.5))
    if delta is not None:
        setattr(region, f"PhysicalDelta{axis}", delta[0] / scale)
        if reference is not None and value is not None:
            setattr(region, f"ReferencePixelPhysicalValue{axis}", value[0] + off * delta[0] / scale)
    for keyword in _FROM_REFERENCE[axis]:
        _replace(region, keyword, lambda v: [math.floor(v[0] * scale - off + 0.5)])
        _replace(region, f"{keyword}Retired", lambda v: [max(math.floor(v[0] * scale - off + 0.5), 0)])


def _check_components(region: Dataset, instance: Instance) -> None:
    """What values of pixels mean in a region is forgotten where they are coded anew, or where only exact ones count."""
    how = _numbers(region, "PixelComponentOrganization")
    if instance.photometric in _RECODED or (how is not None and how[0] >= _LOOKED_UP):
        for keyword in _PIXEL_COMPONENTS:
            if keyword in region:
                delattr(region, keyword)


def _forget_private_grid(ds: Dataset, inside_private: bool = False) -> None:
    for item, private in nested(ds):
        if inside_private or private:
            for keyword in _STALE_IN_PRIVATE:
                if keyword in item:
                    delattr(item, keyword)
        _forget_private_grid(item, inside_private or private)


def _replace(ds: Dataset, keyword: str, change: _Change, count: int | None = None) -> None:
    """Put new numbers in the place of old ones, if there are some, of that count; what a type cannot hold saturates."""
    values = _numbers(ds, keyword)
    if not values or (count is not None and len(values) != count):
        return
    vr = dictionary_VR(keyword)
    numbers = change(values)
    changed: list[Any] = list(numbers)
    if vr == "DS":
        changed = _strings(numbers)
    elif vr in _LARGEST:
        low = -_LARGEST[vr] - 1 if vr == "SS" else 0
        changed = [min(max(int(v), low), _LARGEST[vr]) for v in numbers]
    setattr(ds, keyword, changed[0] if len(changed) == 1 else changed)


def _numbers(ds: Dataset, keyword: str) -> Vector | None:
    value = ds.get(keyword)
    if value is None or isinstance(value, Sequence):
        return None
    try:
        return tuple(float(v) for v in (value if isinstance(value, Iterable) else [value]))
    except (TypeError, ValueError):
        return None


def _strings(values: Iterable[float]) -> list[str]:
    return [format_number_as_ds(float(value)) for value in values]


def _texts(element: object) -> list[str]:
    value = getattr(element, "value", None)
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        return value.split("\\")
    return [str(text) for text in value] if isinstance(value, Iterable) else []
