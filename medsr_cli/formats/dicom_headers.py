"""One DICOM image as far as reading and sorting need it: a small record instead of a whole data set.

A series of hundreds of slices is opened by keeping one `Instance` for each file; tags that matter only to the
writer are read again when the slice is written, so that memory does not grow with what scanners put into
private tags.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.dicom_files import HeaderFile, Member, opened_header
from medsr_cli.formats.identity import Identity
from medsr_cli.formats.limits import Limits

Vector = tuple[float, ...]

GREY = frozenset({"MONOCHROME1", "MONOCHROME2"})
COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"})
PALETTE = "PALETTE COLOR"

PIXEL_DATA = 0x7FE00010
UNDEFINED_LENGTH = 0xFFFFFFFF

HEADER_KEYWORDS = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "BodyPartExamined",
    "PatientID", "IssuerOfPatientID", "PatientName",
    "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "TemporalPositionIdentifier", "NumberOfFrames",
    "SliceThickness",
    "SpacingBetweenSlices", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SequenceOfUltrasoundRegions", "ImagePositionPatient",
    "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ModalityLUTSequence", "PixelPresentation", "LossyImageCompression", "DirectoryRecordSequence",
]  # fmt: skip
NUMBER_OF_IMAGES_IN_MOSAIC = 0x0019100A
EXTENDED_OFFSETS = (0x7FE00001, 0x7FE00002)

HEADER_TAGS: list[Any] = [*HEADER_KEYWORDS, NUMBER_OF_IMAGES_IN_MOSAIC, *EXTENDED_OFFSETS]


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one frame lies, and what its stored values mean."""

    position_mm: Vector | None
    """Centre of the first pixel, LPS."""
    orientation: Vector | None
    """Direction along a row, then along a column, LPS, of length one and at right angles."""
    spacing_mm: tuple[float, float] | None
    """Between rows, between columns; None where the file does not say, or says zero."""
    slope: float
    intercept: float
    temporal: int


@dataclass(frozen=True, slots=True)
class PixelSpan:
    """Where the pixels of a file lie."""

    offset: int
    """Of the first byte of the value; in a deflated file, of its inflated copy."""
    length: int | None
    """Bytes, or None for compressed pixels."""
    vr: str
    floating: bool = False
    extended_offsets: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """One DICOM file with pixels."""

    member: Member
    transfer_syntax: str
    sop_class: str
    sop_instance: str
    study: str
    series: str
    modality: str
    body_part: str
    image_type: tuple[str, ...]
    number: int | None
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: int | None
    padding_range: bool
    slice_spacing_mm: float | None
    """Spacing between slices, else the slice thickness."""
    planes: tuple[Plane, ...]
    """One for each frame."""
    pixels: PixelSpan | None
    modality_lut: bool
    mosaic: bool
    supplemental_palette: bool
    detector_spacing: bool
    """Whether the spacing is that at the detector or of the film, not in the patient."""
    lossy: bool
    patient: tuple[str | None, ...] = ()
    """Salted hashes of who is shown, which only tell same from other."""

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.planes)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the stored values, native byte order; bytes for a depth that there is not, which is refused."""
        size = max(self.bits_allocated, 8) // 8
        return np.dtype(f"{'i' if self.signed else 'u'}{size if size in (1, 2, 4, 8) else 1}")

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest value that the stored bits can hold."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    @property
    def compressed(self) -> bool:
        """Whether the pixels are in a compressed transfer syntax."""
        return UID(self.transfer_syntax).is_encapsulated

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame as it is stored."""
        n = self.rows * self.columns * self.samples * self.bits_allocated
        if self.photometric == "YBR_FULL_422" and not self.compressed:
            n = n * 2 // 3  # two colour samples for each two pixels
        return -(-n // 8)


def read_instance(member: Member, max_frames: int, limits: Limits | None = None) -> Instance:
    """Read the header of one file; pixels stay where they are.

    Args:
        member: a file that carries DICOM's mark.
        max_frames: more frames than this are not listed; the size check that follows refuses them.
        limits: what the header may have; None for the limits that hold here.

    Raises:
        InputRefused: the header has more than is allowed, or claims more frames than the file has bytes.
        Exception: whatever pydicom raises; call it under `refusing`.
    """
    with opened_header(member, limits) as (file, syntax):
        dataset = pydicom.dcmread(cast("BinaryIO", file), stop_before_pixels=True, specific_tags=HEADER_TAGS)
        span = _span_in_file(file, dataset, syntax)
        _refuse_frames(dataset, file.size, member.name)
    return _record(member, dataset, syntax, span, max_frames)


def _refuse_frames(ds: Dataset, size: int, name: str) -> None:
    """A frame takes a byte at least, and a compressed one the eight that tell its length."""
    frames = _integer(ds, "NumberOfFrames") or 1
    if frames > size:
        msg = f"{mention(name)} claims {frames} frames, more than it has bytes."
        raise InputRefused(msg, "Export it anew from where it came from.")


def _record(member: Member, ds: Dataset, syntax: UID, span: PixelSpan | None, max_frames: int) -> Instance:
    signed = _integer(ds, "PixelRepresentation") == 1
    allocated = _integer(ds, "BitsAllocated") or 0
    stored = _integer(ds, "BitsStored") or allocated
    high_bit = _integer(ds, "HighBit")
    spacing = _numbers(ds, "SpacingBetweenSlices", 1) or _numbers(ds, "SliceThickness", 1)
    top_level = plane_spacing_mm(ds, "PixelSpacing")
    mosaic_tiles = ds.get(NUMBER_OF_IMAGES_IN_MOSAIC)
    image_type = _texts(ds, "ImageType")
    return Instance(
        member=member,
        transfer_syntax=str(syntax),
        sop_class=_text(ds, "SOPClassUID") or _text(getattr(ds, "file_meta", Dataset()), "MediaStorageSOPClassUID"),
        sop_instance=_text(ds, "SOPInstanceUID")
        or _text(getattr(ds, "file_meta", Dataset()), "MediaStorageSOPInstanceUID"),
        study=_text(ds, "StudyInstanceUID"),
        series=_text(ds, "SeriesInstanceUID"),
        modality=_text(ds, "Modality").upper(),
        body_part=_text(ds, "BodyPartExamined").upper(),
        image_type=image_type,
        number=_integer(ds, "InstanceNumber"),
        rows=_integer(ds, "Rows") or 0,
        columns=_integer(ds, "Columns") or 0,
        samples=_integer(ds, "SamplesPerPixel") or 1,
        photometric=_text(ds, "PhotometricInterpretation").upper(),
        planar=_integer(ds, "PlanarConfiguration") or 0,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else high_bit,
        signed=signed,
        padding=_as_stored(_integer(ds, "PixelPaddingValue"), signed, allocated),
        padding_range=_integer(ds, "PixelPaddingRangeLimit") is not None,
        slice_spacing_mm=abs(spacing[0]) if spacing and spacing[0] else None,
        planes=_planes(ds, max_frames),
        pixels=span,
        modality_lut=bool(_items(ds, "ModalityLUTSequence")),
        mosaic="MOSAIC" in image_type or (mosaic_tiles is not None and _is_mosaic(mosaic_tiles.value)),
        supplemental_palette=_text(ds, "PixelPresentation") in ("COLOR", "MIXED"),
        detector_spacing=top_level is None and _detector_spacing_mm(ds) is not None,
        lossy=_text(ds, "LossyImageCompression") == "01",
        patient=_patient(ds),
    )


def _patient(ds: Dataset) -> tuple[str | None, ...]:
    """By number and who issued it, else by name."""
    number = _text(ds, "PatientID") or _text(ds, "PatientName")
    said = Identity.of({"PatientID": number, "IssuerOfPatientID": _text(ds, "IssuerOfPatientID")})
    return said.patient, said.issuer


def _is_mosaic(value: Any) -> bool:
    if isinstance(value, bytes) and len(value) == 2:
        value = struct.unpack("<H", value)[0]
    try:
        return int(value) > 1
    except (TypeError, ValueError):
        return False


# -- frames ---------------------------------------------------------------------------------------------------


def _planes(ds: Dataset, max_frames: int) -> tuple[Plane, ...]:
    count = _integer(ds, "NumberOfFrames")
    count = 1 if count is None else count
    top = _top_level_plane(ds, single=count == 1)
    if count > max_frames:
        return (top,) * (max_frames + 1)
    per_frame = _items(ds, "PerFrameFunctionalGroupsSequence")
    shared = _items(ds, "SharedFunctionalGroupsSequence")
    if not per_frame and not shared:
        return (top,) * count
    base = shared[0] if shared else Dataset()
    planes = [_group_plane(group, base, top) for group in per_frame[:count]]
    if len(planes) < count:
        planes += [_group_plane(Dataset(), base, top)] * (count - len(planes))
    return tuple(planes)


def _top_level_plane(ds: Dataset, single: bool) -> Plane:
    slope = _numbers(ds, "RescaleSlope", 1)
    intercept = _numbers(ds, "RescaleIntercept", 1)
    spacing = plane_spacing_mm(ds, "PixelSpacing") or _detector_spacing_mm(ds) or region_spacing_mm(ds)
    orientation = unit_orientation(_numbers(ds, "ImageOrientationPatient", 6))
    return Plane(
        # One position for many frames says where the first one lies, not the others.
        position_mm=_numbers(ds, "ImagePositionPatient", 3) if single and orientation else None,
        orientation=orientation,
        spacing_mm=spacing,
        slope=slope[0] if slope else 1.0,
        intercept=intercept[0] if intercept else 0.0,
        temporal=_integer(ds, "TemporalPositionIdentifier") or 0,
    )


def _group_plane(frame: Dataset, shared: Dataset, top: Plane) -> Plane:
    def group(name: str) -> Dataset:
        items = _items(frame, name) or _items(shared, name)
        return items[0] if items else Dataset()

    values = group("PixelValueTransformationSequence")
    slope, intercept = _numbers(values, "RescaleSlope", 1), _numbers(values, "RescaleIntercept", 1)
    orientation = unit_orientation(_numbers(group("PlaneOrientationSequence"), "ImageOrientationPatient", 6))
    orientation = orientation or top.orientation
    position = _numbers(group("PlanePositionSequence"), "ImagePositionPatient", 3)
    return Plane(
        position_mm=(position or top.position_mm) if orientation else None,
        orientation=orientation,
        spacing_mm=plane_spacing_mm(group("PixelMeasuresSequence"), "PixelSpacing")
        or plane_spacing_mm(group("FramePixelDataPropertiesSequence"), "ImagerPixelSpacing")
        or top.spacing_mm,
        slope=slope[0] if slope else top.slope,
        intercept=intercept[0] if intercept else top.intercept,
        temporal=_integer(group("FrameContentSequence"), "TemporalPositionIndex") or top.temporal,
    )


def plane_spacing_mm(ds: Dataset, keyword: str) -> tuple[float, float] | None:
    """Spacing between rows and between columns; None where it is missing, zero, negative or not finite."""
    values = _numbers(ds, keyword, 2)
    if values is None or min(values) <= 0:
        return None
    return values[0], values[1]


def _detector_spacing_mm(ds: Dataset) -> tuple[float, float] | None:
    return plane_spacing_mm(ds, "ImagerPixelSpacing") or plane_spacing_mm(ds, "NominalScannedPixelSpacing")


def region_spacing_mm(ds: Dataset) -> tuple[float, float] | None:
    """Spacing of ultrasound from its calibrated regions, if all tissue regions agree; they are in cm."""
    found = set()
    for region in _items(ds, "SequenceOfUltrasoundRegions"):
        if _integer(region, "RegionSpatialFormat") != 1:  # 1 is a 2D picture; others are curves and spectra
            continue
        units = (_integer(region, "PhysicalUnitsXDirection"), _integer(region, "PhysicalUnitsYDirection"))
        across, down = _numbers(region, "PhysicalDeltaX", 1), _numbers(region, "PhysicalDeltaY", 1)
        if units != (3, 3) or not across or not down:
            return None
        found.add((abs(down[0]) * 10, abs(across[0]) * 10))
    if len(found) != 1:
        return None
    spacing = found.pop()
    return spacing if min(spacing) > 0 else None


def unit_orientation(values: Vector | None) -> Vector | None:
    """Row and column direction made exactly one long and perpendicular; None if they are far from it."""
    if values is None:
        return None
    along, down = np.array(values[:3]), np.array(values[3:])
    lengths = np.linalg.norm(along), np.linalg.norm(down)
    if any(abs(length - 1) > 0.02 for length in lengths):
        return None
    along, down = along / lengths[0], down / lengths[1]
    if abs(float(along @ down)) > 0.02:
        return None
    return tuple(float(v) for v in (*along, *down))


# -- pixels ---------------------------------------------------------------------------------------------------


def _span_in_file(file: HeaderFile, ds: Dataset, syntax: UID) -> PixelSpan | None:
    """What stands where pydicom stopped: the tag of the pixels and the length of their value."""
    order = "<" if syntax.is_little_endian else ">"
    start = file.tell()
    head = file.read(12)
    if len(head) < 8:
        return None
    group, element = struct.unpack(f"{order}HH", head[:4])
    if group != 0x7FE0 or element not in (0x0008, 0x0009, 0x0010):
        return None
    if syntax.is_implicit_VR:
        vr, length, size = "OW", struct.unpack(f"{order}L", head[4:8])[0], 8
    else:
        vr, length, size = head[4:6].decode("ascii"), struct.unpack(f"{order}L", head[8:12])[0], 12
    offsets = [ds.get(tag) for tag in EXTENDED_OFFSETS]
    table = (offsets[0].value, offsets[1].value) if offsets[0] is not None and offsets[1] is not None else None
    defined = None if length == UNDEFINED_LENGTH else min(length, file.seek(0, 2) - start - size)
    return PixelSpan(start + size, defined, vr, element != 0x0010, table)


# -- values that may be missing, empty or nonsense ------------------------------------------------------------


def _value(ds: Dataset, keyword: str) -> Any:
    try:
        return ds.get(keyword)
    except Exception:  # a value that pydicom cannot convert is as good as missing
        return None


def _text(ds: Dataset, keyword: str) -> str:
    value = _value(ds, keyword)
    return "" if value is None else str(value).strip("\0 ")


def _texts(ds: Dataset, keyword: str) -> tuple[str, ...]:
    value = _value(ds, keyword)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(part) for part in value)


def _integer(ds: Dataset, keyword: str) -> int | None:
    value = _value(ds, keyword)
    try:
        return None if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _numbers(ds: Dataset, keyword: str, count: int) -> Vector | None:
    value = _value(ds, keyword)
    try:
        numbers = tuple(float(v) for v in ([value] if count == 1 else value))
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(math.isfinite(v) for v in numbers) else None


def _items(ds: Dataset, keyword: str) -> list[Dataset]:
    value = _value(ds, keyword)
    return list(value) if isinstance(value, pydicom.Sequence) else []


def _as_stored(value: int | None, signed: bool, bits: int) -> int | None:
    """A value written with the wrong sign, read as the pixels are."""
    if value is None or bits not in (8, 16, 32):
        return None
    low = -(1 << (bits - 1)) if signed else 0
    return (value - low) % (1 << bits) + low
