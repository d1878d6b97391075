"""DICOM in and out: a file, a folder or a zip archive of one series, streamed frame by frame.

Stored values are handed out as they are stored, with their own type, unless the slices of a series are scaled
differently: then real values are handed out and the writer scales each slice back. MONOCHROME1 is not turned
around. Results are derived series, written by `dicom_write`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.contract import Derivation, Reader, ReadOptions, Writer
from medsr_cli.formats.dicom_files import read_header, refusing
from medsr_cli.formats.dicom_headers import COLOUR, GREY, PALETTE, Instance
from medsr_cli.formats.dicom_pixels import LOSSY, decode_frames, palette_is_deep
from medsr_cli.formats.dicom_sequences import check_depth
from medsr_cli.formats.dicom_series import (
    Stack,
    arrange,
    choose_series,
    find_series,
    runs,
)
from medsr_cli.formats.identity import IDENTITY_KEYWORDS, Identity
from medsr_cli.formats.limits import Limits
from medsr_cli.volume.volume import Modality, Volume

Pixels = NDArray[Any]

MODALITIES: dict[str, Modality] = {
    "MR": "mr", "CT": "ct", "US": "us", "IVUS": "us", "CR": "xr", "DX": "xr", "XA": "xr", "RF": "xr", "MG": "xr",
}  # fmt: skip

_BODY_PARTS_TEXT = """
abdomen abdomenpelvis ankle aorta arm bladder brain breast calcaneus carotid cervix chest chestabdomen
chestabdpelvis clavicle coccyx colon cspine elbow extremity eye finger foot forearm gallbladder hand head headneck
heart hip humerus iac jaw joint kidney knee larynx leg liver lspine lung mandible maxilla mediastinum neck neckchest
neckchestabdomen neckchestabdpelv orbit ovary pancreas parotid pelvis prostate rectum rib scapula shoulder skull spine
spleen sspine sternum stomach testis thigh thorax thymus thyroid tibia toe tongue tspine uterus wholebody wrist zygoma
"""
BODY_PARTS = frozenset(_BODY_PARTS_TEXT.split())
"""What BodyPartExamined may say to be believed (PS3.16 annex L, spaces taken out); all else may be free text."""

NO_SPACING = "The file does not say how large a pixel is."
NO_STUDY = "The file names no study; a PACS will hardly take a DICOM result."

_AXES = frozenset({"auto", "2"})
"""DICOM stays on its own slices, which are axis 2 of the array."""


class DicomReader:
    """One opened series."""

    def __init__(self, path: Path, stack: Stack, volume: Volume, real_values: bool) -> None:
        self.path = path
        self.volume = volume
        self.stack = stack
        self.real_values = real_values
        """Whether slices are handed out as slope·stored + intercept, because these differ between slices."""
        self.part: tuple[int, int] | None = None
        """Row and column that the handed out part of each slice begins with; None for whole slices (see `region`)."""

    @property
    def instances(self) -> list[Instance]:
        """The files of the series, in the order in which they first appear in the stack."""
        return list({id(frame.instance): frame.instance for frame in self.stack.frames}.values())

    def slices(self) -> Iterator[Pixels]:
        """Every frame in order, (channels, rows, columns), native byte order.

        Raises:
            InputRefused: pixels are cut short or cannot be decoded.
        """
        for instance, indices in runs(self.stack.frames):
            for index, pixels in zip(indices, decode_frames(instance, indices), strict=True):
                planar = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
                if self.real_values:
                    plane = instance.planes[index]
                    planar = planar.astype(np.float64) * plane.slope + plane.intercept
                yield np.ascontiguousarray(planar, dtype=self.volume.dtype)

    def identity(self) -> Identity:
        """Whose image this is and where its positions count from, as hashes that only tell same from other.

        Raises:
            InputRefused: the header can no longer be read.
        """
        with refusing(self.path.name, "reading the header"):
            header = read_header(self.stack.frames[0].instance.member)
            return Identity.of({keyword: str(header.get(keyword) or "") for keyword in IDENTITY_KEYWORDS})

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """Facts of the encoding and of the geometry; nothing about a person."""
        first = self.stack.frames[0].instance
        syntax, sop_class = UID(first.transfer_syntax), UID(first.sop_class)
        plane = self.stack.frames[0].plane
        return {
            "series": first.series or None,
            "sop_class": sop_class.name if not sop_class.is_private and sop_class.name != sop_class else None,
            "transfer_syntax": syntax.name if syntax.is_transfer_syntax else None,
            "lossy_compression": any(i.lossy or UID(i.transfer_syntax) in LOSSY for i in self.instances),
            "modality": first.modality if first.modality.isalpha() and len(first.modality) <= 8 else None,
            "photometric_interpretation": first.photometric,
            "bits_allocated": first.bits_allocated,
            "bits_stored": first.bits_stored,
            "signed": first.signed,
            "files": len(self.instances),
            "frames": len(self.stack.frames),
            "time_points": self.stack.points,
            "rescale": "differs between slices" if self.real_values else f"{plane.slope:g} x + {plane.intercept:g}",
            "gantry_tilt_degrees": round(self.stack.tilt_degrees, 2),
            "smallest_step_mm": self.stack.smallest_step_mm,
            "largest_step_mm": self.stack.largest_step_mm,
            "spacing_at_detector": first.detector_spacing,
        }


def open_reader(path: Path, options: ReadOptions) -> DicomReader:
    """Open a DICOM file, folder or zip archive; only headers are read.

    Raises:
        InputRefused: it is not one series of equal slices that can be upscaled; the sentence says why.
    """
    if options.axis not in _AXES:
        msg = f"DICOM stays on its own slices: {mention(path.name)} cannot be upscaled along --axis {options.axis}."
        raise InputRefused(msg, "Leave --axis away, or convert to NIfTI first.")
    with refusing(path.name, "reading the headers"):
        found = find_series(path, options.limits)
        instances = choose_series(found, options.series)
        _check_limits(path, instances, options.limits)
        stack = arrange(path, instances)
        first = stack.frames[0].instance
        header = read_header(first.member, options.limits)
        check_depth(header, options.limits.sequence_depth, path.name)
        deep = first.photometric == PALETTE and palette_is_deep(header)
        real_values = _rescale_differs(path, stack)
        return DicomReader(path, stack, _volume(stack, real_values, deep), real_values)


def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool
) -> AbstractContextManager[Writer]:
    """Write a derived series: a folder, or one `.dcm` file where the source is one file.

    Raises:
        ArgumentsError: the source is not DICOM, or does not fit the target.
    """
    from medsr_cli.formats.dicom_write import derived_series  # noqa: PLC0415 - it needs the reader's class

    if not isinstance(source, DicomReader):
        msg = f"DICOM can only be written from DICOM, and {mention(source.path.name)} is not."
        raise ArgumentsError(msg, "Choose the format of the input, for example .nii.gz.")
    return derived_series(target, source, result, derivation, overwrite=overwrite)


# -- the volume -----------------------------------------------------------------------------------------------


def _volume(stack: Stack, real_values: bool, deep_palette: bool) -> Volume:
    first, plane = stack.frames[0].instance, stack.frames[0].plane
    slices = len(stack.frames)
    places = slices // stack.points
    shape = (first.columns, first.rows, places) + ((stack.points,) if stack.points > 1 else ())
    dtype, lowest, highest = _values(stack, real_values, deep_palette)
    body_part = first.body_part.replace(" ", "").lower()
    return Volume(
        format="dicom",
        rows=first.rows,
        columns=first.columns,
        slices=slices,
        dtype=dtype,
        channels=1 if first.photometric in GREY else 3,
        array_shape=shape,
        slice_axis=2,
        plane_axes=(1, 0),
        spacing_mm=plane.spacing_mm,
        slice_spacing_mm=stack.slice_spacing_mm,
        affine=stack.affine,
        lowest=lowest,
        highest=highest,
        padding=float(first.padding) if first.padding is not None and _padded(first, real_values) else None,
        value_scale=(1.0, 0.0) if real_values else (stack.frames[0].plane.slope, stack.frames[0].plane.intercept),
        modality=MODALITIES.get(first.modality),
        body_part=body_part if body_part in BODY_PARTS else None,
        warnings=(*stack.warnings, *_warnings(stack, real_values)),
    )


def _padded(first: Instance, real_values: bool) -> bool:
    return first.photometric in GREY and not real_values


def _values(stack: Stack, real_values: bool, deep_palette: bool) -> tuple[np.dtype[Any], float | None, float | None]:
    first = stack.frames[0].instance
    if first.photometric == PALETTE:
        return (np.dtype(np.uint16), 0.0, 65535.0) if deep_palette else (np.dtype(np.uint8), 0.0, 255.0)
    if not real_values:
        ranges = [frame.instance.stored_range for frame in stack.frames]
        return first.stored_dtype, float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
    # float32 must hold a stored value, scaled and scaled back, to less than half a step.
    largest = max(
        (1 << frame.instance.bits_stored) + abs(frame.plane.intercept / frame.plane.slope) for frame in stack.frames
    )
    return np.dtype(np.float32 if largest < 1 << 21 else np.float64), None, None


def _rescale_differs(path: Path, stack: Stack) -> bool:
    if stack.frames[0].instance.photometric not in GREY:
        return False
    scales = {(frame.plane.slope, frame.plane.intercept) for frame in stack.frames}
    if len(scales) > 1 and any(slope == 0 for slope, _ in scales):
        msg = f"{mention(path.name)} says that all values of a slice mean the same (a rescale slope of zero)."
        raise InputRefused(msg, "Correct the header.")
    return len(scales) > 1


def _warnings(stack: Stack, real_values: bool) -> list[str]:
    first = stack.frames[0].instance
    said: list[str] = []
    if stack.frames[0].plane.spacing_mm is None:
        said.append(NO_SPACING)
    if not first.study:
        said.append(NO_STUDY)
    if real_values:
        said.append("The slices are scaled differently; real values are upscaled and scaled back slice by slice.")
    if first.photometric == PALETTE:
        said.append("The palette is applied: the result has true colours instead of palette entries.")
    if first.padding_range and first.photometric in GREY:
        said.append("The file marks a range of values as padding; only the first of them is treated as such.")
    if first.modality_lut:
        said.append("The stored values mean something only through a table; they are upscaled as they are stored.")
    return said


def _check_limits(path: Path, instances: Sequence[Instance], limits: Limits) -> None:
    first = instances[0]
    frames = sum(instance.frames for instance in instances)
    per_pixel = max(i.bits_allocated // 8 for i in instances) * (3 if first.photometric in COLOUR | {PALETTE} else 1)
    for rows, columns in {(i.rows, i.columns) for i in instances}:
        limits.check_size(path, rows, columns, frames, per_pixel)
    packed = sum(i.member.size for i in instances)
    decoded = sum(i.rows * i.columns * i.frames * per_pixel for i in instances)
    limits.check_expansion(path, decoded, packed)
