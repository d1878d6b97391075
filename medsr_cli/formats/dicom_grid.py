"""Tags that count in pixels or millimetres per pixel, rewritten for a finer grid, or one of a part of the slices.

The arithmetic is that of `volume.geometry`: edges align. Lengths and positions in the patient stay where they
are; whatever is counted in pixels is counted anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.dicom_headers import Instance, Plane, Vector, plane_spacing_mm, unit_orientation
from medsr_cli.formats.dicom_sequences import nested
from medsr_cli.volume.geometry import enlarged_spacing, first_voxel_shift

_Change = Callable[[Vector], list[int]]

SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")

# Edges and centres in pixels, counted from 1: display shutters and collimators.
_COLUMN_EDGES = ("ShutterLeftVerticalEdge", "ShutterRightVerticalEdge",
                 "CollimatorLeftVerticalEdge", "CollimatorRightVerticalEdge")  # fmt: skip
_ROW_EDGES = ("ShutterUpperHorizontalEdge", "ShutterLowerHorizontalEdge",
              "CollimatorUpperHorizontalEdge", "CollimatorLowerHorizontalEdge")  # fmt: skip
_ROW_COLUMN_LISTS = ("CenterOfCircularShutter", "VerticesOfThePolygonalShutter",
                     "CenterOfCircularCollimator", "VerticesOfThePolygonalCollimator")  # fmt: skip
_RADII = ("RadiusOfCircularShutter", "RadiusOfCircularCollimator")

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
    """Bring every tag that depends on the grid up to date, in place."""
    ds.Rows, ds.Columns = grid.new_rows, grid.new_columns
    _rewrite_level(ds, instance.planes[0], grid)
    _rewrite_aspect(ds, grid)
    _rewrite_shutters(ds, grid)
    _cut_regions(ds, grid)
    for region in ds.get("SequenceOfUltrasoundRegions") or []:
        _rewrite_region(region, grid)
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
    shift = _numbers(ds, "MaskSubPixelShift")
    if shift is not None and len(shift) == 2:
        ds.MaskSubPixelShift = [shift[0] * grid.new_rows / grid.rows, shift[1] * grid.new_columns / grid.columns]


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


def _rewrite_shutters(ds: Dataset, grid: Grid) -> None:
    for keyword in _COLUMN_EDGES:
        _replace(ds, keyword, lambda values: [grid.column(v) for v in values])
    for keyword in _ROW_EDGES:
        _replace(ds, keyword, lambda values: [grid.row(v) for v in values])
    for keyword in _ROW_COLUMN_LISTS:
        _replace(ds, keyword, lambda values: [(grid.column, grid.row)[i % 2 == 0](v) for i, v in enumerate(values)])
    for keyword in _RADII:
        _replace(ds, keyword, lambda values: [round(v * grid.new_columns / grid.columns) for v in values])


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
    """A calibrated region of ultrasound: bounds and lines in pixels from 0, deltas in units per pixel."""
    across, down = grid.new_columns / grid.columns, grid.new_rows / grid.rows
    for keyword, scale in (("RegionLocationMinX0", across), ("RegionLocationMinY0", down)):
        _replace(region, keyword, lambda v, s=scale: [round(v[0] * s)])  # type: ignore[misc]
    for keyword, scale in (("RegionLocationMaxX1", across), ("RegionLocationMaxY1", down)):
        _replace(region, keyword, lambda v, s=scale: [round((v[0] + 1) * s) - 1])  # type: ignore[misc]
    for axis, scale in (("X", across), ("Y", down)):
        _rewrite_reference(region, axis, scale)
        for keyword in (f"DopplerSampleVolume{axis}Position", f"TMLinePosition{axis}0", f"TMLinePosition{axis}1"):
            _replace(region, keyword, lambda v, s=scale: [_centre(v[0], s)])  # type: ignore[misc]


def _rewrite_reference(region: Dataset, axis: str, scale: float) -> None:
    """The reference pixel moves to the nearest new pixel, and its physical value by what that rounds off."""
    delta = _numbers(region, f"PhysicalDelta{axis}")
    if delta is None:
        return
    new_delta = delta[0] / scale
    reference, value = (
        _numbers(region, f"ReferencePixel{axis}0"),
        _numbers(region, f"ReferencePixelPhysicalValue{axis}"),
    )
    if reference is not None:
        exact = (reference[0] + 0.5) * scale - 0.5
        setattr(region, f"ReferencePixel{axis}0", math.floor(exact + 0.5))
        if value is not None:
            moved = value[0] + (math.floor(exact + 0.5) - exact) * new_delta
            setattr(region, f"ReferencePixelPhysicalValue{axis}", moved)
    setattr(region, f"PhysicalDelta{axis}", new_delta)


def _centre(pixel: float, scale: float) -> int:
    return math.floor((pixel + 0.5) * scale)


def _forget_private_grid(ds: Dataset, inside_private: bool = False) -> None:
    for item, private in nested(ds):
        if inside_private or private:
            for keyword in _STALE_IN_PRIVATE:
                if keyword in item:
                    delattr(item, keyword)
        _forget_private_grid(item, inside_private or private)


def _replace(ds: Dataset, keyword: str, change: _Change) -> None:
    values = _numbers(ds, keyword)
    if values:
        changed = change(values)
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
