"""Which files a derived series has: one for each file of the source, or one for each frame of an enhanced object.

Frames of enhanced objects become classic images, which every viewer and every PACS knows, unless `multiframe` is asked
for or there is no classic class (`dicom_classic`). Plain multi-frame objects (ultrasound, X-ray angiography, secondary
capture) stay objects of several frames. Of an object that only part of is upscaled, its result holds that part, in the
object's own order.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from medsr_cli.errors import ArgumentsError, RunError, mention
from medsr_cli.formats.contract import Reader
from medsr_cli.formats.dicom import DicomReader
from medsr_cli.formats.dicom_classic import CLASSIC_CLASSES, classic_class
from medsr_cli.formats.dicom_encode import PLAIN, refuse_syntax
from medsr_cli.formats.dicom_headers import PALETTE, Instance
from medsr_cli.volume.volume import Volume

LARGEST_PIXEL_DATA = (1 << 31) - 2
"""Bytes of pixels in one file, uncompressed. The standard has room for twice as many; many readers count in signed
integers."""


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """One file of the derived series."""

    instance: Instance
    """The file that it is derived from."""
    frames: tuple[int, ...]
    """Of the source, from 0, in the order in which they are stored."""
    classic: bool
    """Whether this is one frame of an enhanced object as an image of its own."""
    at: int
    """Its place in the series, from 1."""
    number: int | None
    """Its InstanceNumber, or None for that of the source."""
    described: Instance
    """The file again, with the planes of these frames alone where others are missing; for making the header."""

    @property
    def frame(self) -> int | None:
        """The frame of a multi-frame source that a single-frame file holds, from 0; None for all other files."""
        return self.frames[0] if self.classic else None

    @property
    def partial(self) -> bool:
        """Whether frames of a multi-frame object are missing in it."""
        return not self.classic and len(self.frames) < self.instance.frames


@dataclass(frozen=True, slots=True)
class Place:
    """Where one slice of the stack goes."""

    output: Output
    index: int
    """Of the frame in its file, from 0."""


def places(source: DicomReader, multiframe: bool) -> list[Place]:
    """Where every frame of the stack goes, in the stack's order."""
    frames = source.stack.frames
    indices: dict[int, list[int]] = {}
    for frame in frames:
        indices.setdefault(id(frame.instance), []).append(frame.index)
    split = {
        id(instance)
        for instance in source.instances
        if not multiframe and classic_class(instance, indices[id(instance)]) is not None
    }
    renumbered = bool(split) or not _tell_apart(source.instances)
    outputs: dict[tuple[int, int], Output] = {}
    found: list[Place] = []
    for frame in frames:
        instance = frame.instance
        classic = id(instance) in split
        key = id(instance), frame.index if classic else -1
        if key not in outputs:
            held = (frame.index,) if classic else tuple(sorted(indices[id(instance)]))
            at = len(outputs) + 1
            number = at if renumbered else None
            outputs[key] = Output(instance, held, classic, at, number, _described(instance, held, classic))
        found.append(Place(outputs[key], bisect_left(outputs[key].frames, frame.index)))
    return found


def _described(instance: Instance, held: tuple[int, ...], classic: bool) -> Instance:
    if classic or len(held) == instance.frames:
        return instance
    return replace(instance, planes=tuple(instance.planes[frame] for frame in held))


def files_written(source: DicomReader, multiframe: bool) -> int:
    """How many files the derived series of `source` has."""
    return len({id(place.output) for place in places(source, multiframe)})


def files_of(reader: Reader, multiframe: bool) -> int:
    """The same for a reader of any kind; what is not DICOM becomes one file."""
    return files_written(reader, multiframe) if isinstance(reader, DicomReader) else 1


def has_enhanced(reader: Reader) -> bool:
    """Whether a reader has an enhanced object among its files."""
    return isinstance(reader, DicomReader) and any(i.sop_class in CLASSIC_CLASSES for i in reader.instances)


def frame_bytes(result: Volume, instance: Instance) -> int:
    """Of one frame of the result, uncompressed."""
    stored = result.dtype if instance.photometric == PALETTE else instance.stored_dtype
    return result.rows * result.columns * result.channels * stored.itemsize


def stored_bits(result: Volume, instance: Instance) -> tuple[int, int]:
    """BitsAllocated and BitsStored of the result."""
    if instance.photometric == PALETTE:
        return result.dtype.itemsize * 8, result.dtype.itemsize * 8
    return instance.stored_dtype.itemsize * 8, instance.bits_stored


def check_outputs(source: DicomReader, result: Volume, found: list[Place], multiframe: bool, syntax: str) -> None:
    """Refuse, before any work, what cannot be written.

    Raises:
        ArgumentsError: one object is asked for where the source is none, a file would be too large, or the transfer
            syntax does not hold the pixels.
        RunError: the result is not that of this source.
    """
    instances = source.instances
    if multiframe and all(i.frames == 1 and i.sop_class not in CLASSIC_CLASSES for i in instances):
        msg = f"{mention(source.path.name)} holds classic images; only an enhanced object can become one again."
        raise ArgumentsError(msg, "Leave --multiframe away.")
    if result.channels != source.volume.channels or result.slices != source.volume.slices:
        msg = f"The result does not have the slices and channels of {mention(source.path.name)}."
        raise RunError(msg)
    for instance in instances:
        allocated, stored = stored_bits(result, instance)
        refuse_syntax(syntax, bits_allocated=allocated, bits_stored=stored, rows=result.rows, columns=result.columns)
    _check_sizes(result, instances, found, multiframe, syntax)


def _check_sizes(result: Volume, instances: list[Instance], found: list[Place], multiframe: bool, syntax: str) -> None:
    """Packed objects may hold more than fits into one piece, for they are read frame by frame."""
    sizes = {id(place.output): frame_bytes(result, place.output.instance) * len(place.output.frames) for place in found}
    largest = max(sizes.values())
    if largest > LARGEST_PIXEL_DATA and (syntax == PLAIN or _one_frame_too_large(result, instances)):
        msg = f"The result would have {largest / (1 << 30):.1f} GiB in one DICOM file, more than 2 GiB."
        multi = any(len(place.output.frames) > 1 for place in found)
        remedy = "Choose a smaller scale, leave --multiframe away, or write NIfTI."
        raise ArgumentsError(msg, remedy if multiframe and multi else "Choose a smaller scale, or write NIfTI.")


def check_one_file(target: Path, source: DicomReader, found: list[Place]) -> None:
    """Refuse a target that is one file where several have to be written.

    Raises:
        ArgumentsError: they do not go into one.
    """
    outputs = {id(place.output): place.output for place in found}
    if len(outputs) == 1:
        return
    if len(source.instances) > 1:
        msg = f"{mention(source.path.name)} has {len(source.instances)} files, which do not go into one: "
        raise ArgumentsError(f"{msg}{mention(target.name)}.", "Give a folder with -o.")
    msg = f"{mention(source.path.name)} has {len(outputs)} frames, which become a file each and do not go into one: "
    raise ArgumentsError(
        f"{msg}{mention(target.name)}.", "Give a folder with -o, or write one object with --multiframe."
    )


def _one_frame_too_large(result: Volume, instances: list[Instance]) -> bool:
    return max(frame_bytes(result, instance) for instance in instances) > LARGEST_PIXEL_DATA


def _tell_apart(instances: list[Instance]) -> bool:
    """Whether the source's instance numbers tell its files apart."""
    numbers = [instance.number for instance in instances]
    return None not in numbers and len(set(numbers)) == len(numbers)
