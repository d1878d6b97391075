"""NIfTI-1, NIfTI-2 and Analyze 7.5: single files, pairs, compressed or not.

Pixels are the *stored* values: slope and intercept stay in the header, so that types and values survive
exactly. Every file is read once, forward, and written so; slices across the stored order pass through a
temporary file (`spool`). A result says nothing about how it was made: NIfTI headers stay clean, so
`Derivation` leaves no trace here.

An Analyze file that is written as `.hdr`/`.img` stays Analyze: turning it into NIfTI would lose fields of
its own and gain a claim about orientation that nobody made.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import ArgumentsError, InputRefused, RunError, mention
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.contract import Derivation, Pixels, Reader, ReadOptions, Writer
from medsr_cli.formats.gzip_stream import ForwardStream, GzipSink, Sink, is_compressed, open_forward
from medsr_cli.formats.limits import DEFLATE_EXPANSION, Limits
from medsr_cli.formats.nifti_header import (
    NiftiHeader,
    RawHeader,
    enlarged_header,
    fresh_header,
    read_header,
    scaling,
    units_of_length,
)
from medsr_cli.formats.spool import SliceSpool, as_bytes, opaque_element
from medsr_cli.volume.geometry import (
    PLANE_NORMALS,
    Affine,
    slice_axis_from_spacing,
    slice_axis_of_plane,
    spacings_mm,
)
from medsr_cli.volume.volume import Volume

PLANE_AXES: dict[int, tuple[int, int]] = {2: (1, 0), 1: (2, 0), 0: (2, 1)}
"""Rows and columns by slice axis: rows along the axis that is stored slower, so that a slice is read in order."""

PAIR_SUFFIXES = {".hdr": ".img", ".img": ".hdr"}


def open_reader(path: Path, options: ReadOptions) -> NiftiReader:
    """Open a NIfTI or Analyze file; its header is read and judged, its pixels are not.

    Args:
        path: a `.nii`, or either half of a pair, each also as `.gz`.
        options: slice axis and limits.

    Raises:
        InputRefused: the file is unreadable, damaged, unsafe, or cannot be upscaled.
        ArgumentsError: the axis is none.
    """
    with _refused(path.name):
        files = _locate(path)
        with open_forward(files.header) as stream:
            header = read_header(stream, files.header.name, paired=files.paired, limits=options.limits)
        _refuse_claims(files, header, options.limits)
        axis = _slice_axis(header, options.axis, path.name)
        volume = _volume(header, axis)
        options.limits.check_size(path, volume.rows, volume.columns, volume.slices, header.voxel_bytes)
        # Whatever the slices are, planes are held as they are stored.
        planes = header.lengths[2] * header.volumes
        options.limits.check_size(path, header.lengths[1], header.lengths[0], planes, header.voxel_bytes)
    return NiftiReader(path, volume, header, files)


@contextmanager
def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool
) -> Iterator[Writer]:
    """Open `target` for the slices of `result`.

    From a NIfTI source comes its header, with what a finer grid changes changed; from any other a fresh
    NIfTI-1 header (NIfTI-2 where a length needs it) with `result`'s place in the patient. The pixels of a
    pair are renamed into place before its header, which is what makes them an image.

    Raises:
        InputRefused: NIfTI cannot hold such an image.
        ArgumentsError: the target exists and `overwrite` is false, or its name is not one of NIfTI's.
        RunError: the disk is full, slices are missing, or the result read back is not what was written.
    """
    del derivation  # see the module's docstring
    paired, packed = _container(target)
    plan = _plan(source, result, paired=paired)
    check = _Check(plan, target.name, packed=packed)
    if not paired:
        with (
            atomic_file(target, overwrite=overwrite, verify=check.single) as file,
            _sink(file, packed) as sink,
            _writing(plan, sink, target) as writer,
        ):
            yield writer
        return
    with _pair_written(target, plan, check, packed=packed, overwrite=overwrite) as writer:
        yield writer


class NiftiReader:
    """An opened NIfTI or Analyze image."""

    def __init__(self, path: Path, volume: Volume, header: NiftiHeader, files: _Files) -> None:
        self.path = path
        self.volume = volume
        self.header = header
        self._files = files

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward, volume after volume: (channels, rows, columns) of stored values.

        Raises:
            InputRefused: the file turns out to be cut short or damaged.
            RunError: there is no room for a temporary file.
        """
        with _refused(self.path.name), open_forward(self._files.pixels) as stream:
            stream.skip(self.header.data_offset)
            yield from self._in_order(stream) if self.volume.slice_axis == 2 else self._across(stream)
            stream.finish()

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """Facts for `medsr inspect`: lengths, types, codes, scaling, units, extensions, compression."""
        header, raw = self.header, self.header.raw
        coded = header.kind != "analyze"
        slope, intercept = scaling(raw)
        names = {"nifti1": "NIfTI-1", "nifti2": "NIfTI-2", "analyze": "Analyze 7.5"}
        return {
            "version": names[header.kind] + (" pair" if header.paired and coded else ""),
            "dimensions": " x ".join(str(n) for n in header.shape),
            "data_type": {3: "RGB24", 4: "RGBA32"}.get(header.channels, self.volume.dtype.name),
            "byte_order": "big-endian" if raw.endianness == ">" else "little-endian",
            "sform_code": int(raw["sform_code"]) if coded else None,
            "qform_code": int(raw["qform_code"]) if coded else None,
            "slope": slope if slope else None,
            "intercept": intercept if slope else None,
            "units": units_of_length(raw, header.kind)[0],
            "extensions": len(raw.extensions) if coded else 0,
            "compression": "gzip" if is_compressed(self._files.pixels) else None,
        }

    def _in_order(self, stream: ForwardStream) -> Iterator[Pixels]:
        for _ in range(self.volume.slices):
            yield self._as_slice(self._planes(stream, 1)[0])

    def _across(self, stream: ForwardStream) -> Iterator[Pixels]:
        with SliceSpool(*_spool_layout(self.header.lengths, self.volume.slice_axis, self.header.voxel_bytes)) as spool:
            for _ in range(self.header.volumes):
                for first, planes in spool.slabs():
                    spool.put_slab(first, self._planes(stream, planes))
                for index in range(spool.slices):
                    yield self._as_slice(spool.take_slice(index))

    def _planes(self, stream: ForwardStream, count: int) -> NDArray[Any]:
        """The next planes as they are stored: (planes, second axis, first axis)."""
        columns, rows, _ = self.header.lengths
        block = stream.read_exactly(count * rows * columns * self.header.voxel_bytes)
        return block.view(opaque_element(self.header.voxel_bytes)).reshape(count, rows, columns)

    def _as_slice(self, stored: NDArray[Any]) -> Pixels:
        """(rows, columns) of opaque voxels to (channels, rows, columns) of numbers."""
        if self.header.channels > 1:
            values = stored.view(np.uint8).reshape(*stored.shape, self.header.channels)
            return np.ascontiguousarray(np.moveaxis(values, -1, 0))
        return stored.view(self.header.value_type).astype(self.volume.dtype, copy=False)[np.newaxis]


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Files:
    header: Path
    pixels: Path
    paired: bool


def _refused(name: str) -> AbstractContextManager[None]:
    """Whatever a damaged file makes a library raise, the user reads one sentence."""
    return refusing(name, "cannot be read as NIfTI", "The file is damaged; export it again.")


def _split(path: Path) -> tuple[str, str, bool]:
    """Name without its suffixes, the suffix in lower case, and whether `.gz` follows it."""
    name = path.name
    packed = name.lower().endswith(".gz")
    inner = Path(name[:-3] if packed else name)
    return inner.stem, inner.suffix.lower(), packed


def _locate(path: Path) -> _Files:
    if not path.is_file():
        msg = f"{mention(path.name)} is not there, or is not a file."
        raise InputRefused(msg)
    _, suffix, _ = _split(path)
    if suffix not in PAIR_SUFFIXES:
        return _Files(path, path, paired=False)
    other = _other_half(path)
    return _Files(path, other, paired=True) if suffix == ".hdr" else _Files(other, path, paired=True)


def _other_half(path: Path) -> Path:
    stem, suffix, packed = _split(path)
    wanted = PAIR_SUFFIXES[suffix]
    endings = [".gz", ""] if packed else ["", ".gz"]
    for ending in endings:
        for candidate in (wanted + ending, (wanted + ending).upper()):
            if (path.parent / (stem + candidate)).is_file():
                return path.parent / (stem + candidate)
    msg = f"{mention(path.name)} is half of a pair, and {stem}{wanted} is missing beside it."
    raise InputRefused(msg, "Put both files into one folder.")


def _refuse_claims(files: _Files, header: NiftiHeader, limits: Limits) -> None:
    """Compare what the header claims with what the file can hold, before memory is taken for it."""
    claimed = header.data_offset + header.data_bytes
    size = files.pixels.stat().st_size
    if is_compressed(files.pixels):
        limits.check_expansion(files.pixels, claimed, size, DEFLATE_EXPANSION)
    elif claimed > size:
        msg = f"{mention(files.pixels.name)} is cut short: its header claims {claimed} bytes, it has {size}."
        raise InputRefused(msg, "Copy or export it again.")


def _slice_axis(header: NiftiHeader, wanted: str, name: str) -> int:
    if wanted == "auto":
        axis = slice_axis_from_spacing(spacings_mm(header.affine), header.lengths) if len(header.shape) > 2 else 2
    elif wanted in PLANE_NORMALS:
        axis = slice_axis_of_plane(header.affine, wanted)
    elif wanted in ("0", "1", "2"):
        axis = int(wanted)
    else:
        msg = f"There is no axis {wanted!r}."
        raise ArgumentsError(msg, "Give auto, axial, sagittal, coronal, 0, 1 or 2.")
    if axis != 2 and len(header.shape) == 2:
        msg = f"{mention(name)} has two axes, and no slices along the one that was asked for."
        raise InputRefused(msg, "Leave --axis out.")
    return axis


def _volume(header: NiftiHeader, axis: int) -> Volume:
    steps = spacings_mm(header.affine)
    rows, columns = PLANE_AXES[axis]
    return Volume(
        format="nifti",
        rows=header.lengths[rows],
        columns=header.lengths[columns],
        slices=header.lengths[axis] * header.volumes,
        dtype=header.value_type.newbyteorder("="),
        channels=header.channels,
        alpha=header.channels == 4,
        array_shape=header.shape,
        slice_axis=axis,
        plane_axes=(rows, columns),
        spacing_mm=(steps[rows], steps[columns]),
        slice_spacing_mm=steps[axis],
        affine=header.affine,
        value_scale=header.value_scale,
        warnings=header.warnings,
    )


def _spool_layout(lengths: tuple[int, int, int], slice_axis: int, voxel_bytes: int) -> tuple[Any, int, int]:
    """Arguments of a spool for slices along the first or second axis of a volume stored first axis fastest."""
    return (lengths[2], lengths[1], lengths[0]), 2 - slice_axis, voxel_bytes


# ------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class _Plan:
    """What is going to be written."""

    result: Volume
    shape: tuple[int, ...]
    header: RawHeader
    header_bytes: bytes
    paired: bool
    value_type: np.dtype[Any]
    """Type of one number, in the byte order of the file."""
    slice_axis: int
    turned: bool
    """Whether the slices' rows and columns have to change places."""

    @property
    def lengths(self) -> tuple[int, int, int]:
        first, second, third = (*self.shape, 1)[:3]
        return first, second, third

    @property
    def data_bytes(self) -> int:
        return self.result.slices * self.result.rows * self.result.columns * self.voxel_bytes

    @property
    def voxel_bytes(self) -> int:
        return self.value_type.itemsize * self.result.channels


def _plan(source: Reader, result: Volume, *, paired: bool) -> _Plan:
    value_type = result.dtype
    slice_axis, plane_axes, shape = result.slice_axis, result.plane_axes, result.array_shape
    if isinstance(source, NiftiReader):
        header = enlarged_header(source.header, shape, value_type, paired=paired)
    else:
        if result.affine is None or not shape:
            # Without a place there is no array order to keep: columns first, as every viewer draws it.
            slice_axis, plane_axes = 2, PLANE_AXES[2]
            shape = (result.columns, result.rows, result.slices)
        header = fresh_header(result, shape, value_type, result.channels, paired=paired)
    written = io.BytesIO()
    header.write_to(written)
    turned = plane_axes != PLANE_AXES[slice_axis]
    order = value_type.newbyteorder(header.endianness)
    plan = _Plan(result, shape, header, written.getvalue(), paired, order, slice_axis, turned)
    if int(np.prod(shape, dtype=object)) != result.rows * result.columns * result.slices:
        msg = "The slices of this image do not fill a NIfTI volume."
        raise InputRefused(msg, "Write the format of the input.")
    return plan


def _container(target: Path) -> tuple[bool, bool]:
    """Whether the target's name is that of a pair, and whether it is compressed."""
    _, suffix, packed = _split(target)
    if suffix not in (".nii", *PAIR_SUFFIXES):
        msg = f"{mention(target.name)} is not a name for NIfTI."
        raise ArgumentsError(msg, "Name it .nii.gz, .nii, .hdr or .img.")
    return suffix in PAIR_SUFFIXES, packed


def _pair(target: Path) -> tuple[Path, Path]:
    """Header and pixels of a pair, from either name."""
    stem, suffix, packed = _split(target)
    # The user's own spelling of the suffix is kept where it was given.
    own = target.name[len(stem) :]
    other = PAIR_SUFFIXES[suffix] + (".gz" if packed else "")
    if own.isupper():
        other = other.upper()
    beside = target.parent / (stem + other)
    return (target, beside) if suffix == ".hdr" else (beside, target)


@contextmanager
def _pair_written(target: Path, plan: _Plan, check: _Check, *, packed: bool, overwrite: bool) -> Iterator[_NiftiWriter]:
    header_path, pixel_path = _pair(target)
    ours: os.stat_result | None = None

    def last_check(temporary: Path) -> None:
        nonlocal ours
        check.pixels(temporary)
        ours = temporary.stat()
        if overwrite:
            # Between the two renames an old header must not stand beside new pixels.
            header_path.unlink(missing_ok=True)

    try:
        with atomic_file(header_path, overwrite=overwrite, verify=check.header) as header_file:
            with _sink(header_file, packed) as sink:
                sink.write(plan.header_bytes)
            header_file.flush()
            with (
                atomic_file(pixel_path, overwrite=overwrite, verify=last_check) as file,
                _sink(file, packed) as sink,
                _writing(plan, sink, target) as writer,
            ):
                yield writer
    except BaseException:
        if ours is not None and not header_path.exists():
            _remove_same(pixel_path, ours)  # pixels without their header are no result
        raise


def _remove_same(path: Path, file: os.stat_result) -> None:
    """Remove a file if it is that one and not somebody else's of the same name."""
    with suppress(OSError):
        if os.path.samestat(path.stat(), file):
            path.unlink()


@contextmanager
def _sink(file: BinaryIO, packed: bool) -> Iterator[Sink]:
    if not packed:
        yield file
        return
    sink = GzipSink(file)
    yield sink
    sink.finish()


@contextmanager
def _writing(plan: _Plan, sink: Sink, target: Path) -> Iterator[_NiftiWriter]:
    with ExitStack() as stack:
        spool: AbstractContextManager[SliceSpool | None] = nullcontext()
        if plan.slice_axis != 2:
            layout = _spool_layout(plan.lengths, plan.slice_axis, plan.voxel_bytes)
            spool = SliceSpool(*layout, folder=target.parent)
        if not plan.paired:
            sink.write(plan.header_bytes)
        writer = _NiftiWriter(plan, sink, stack.enter_context(spool), target.name)
        yield writer
        writer.finish()


class _NiftiWriter:
    """Takes slices and emits them in stored order."""

    clipped = 0
    warnings: tuple[str, ...] = ()

    def __init__(self, plan: _Plan, sink: Sink, spool: SliceSpool | None, name: str) -> None:
        self._plan = plan
        self._sink = sink
        self._spool = spool
        self._name = name
        self._taken = 0

    def write(self, pixels: Pixels) -> None:
        """Take the next slice: (channels, rows, columns) of the volume's type.

        Raises:
            RunError: it is not of that shape or type, or one too many.
        """
        result = self._plan.result
        expected = (result.channels, result.rows, result.columns)
        if pixels.shape != expected or pixels.dtype != result.dtype or self._taken == result.slices:
            msg = (
                f"Slice {self._taken + 1} of {mention(self._name)} is not one that was announced; nothing was written."
            )
            raise RunError(msg, "This is an error of the program; please report it.")
        self._taken += 1
        stored = self._as_stored(pixels)
        if self._spool is None:
            self._sink.write(as_bytes(stored))
            return
        index = (self._taken - 1) % self._spool.slices
        self._spool.put_slice(index, stored)
        if index == self._spool.slices - 1:
            for first, planes in self._spool.slabs():
                self._sink.write(as_bytes(self._spool.take_slab(first, planes)))

    def finish(self) -> None:
        """Check that every slice came.

        Raises:
            RunError: some did not.
        """
        if self._taken != self._plan.result.slices:
            msg = f"Only {self._taken} of {self._plan.result.slices} slices of {mention(self._name)} came."
            raise RunError(msg, "Nothing was written.")

    def _as_stored(self, pixels: Pixels) -> NDArray[Any]:
        """(rows, columns) of opaque voxels in the file's byte order."""
        if self._plan.turned:
            pixels = pixels.swapaxes(1, 2)
        rows, columns = pixels.shape[1:]
        values = np.ascontiguousarray(np.moveaxis(pixels, 0, -1), self._plan.value_type)
        return values.reshape(-1).view(opaque_element(self._plan.voxel_bytes)).reshape(rows, columns)


class _Check:
    """Reads back what lies on the disk before it gets its name."""

    def __init__(self, plan: _Plan, name: str, *, packed: bool) -> None:
        self._plan = plan
        self._name = name
        self._packed = packed

    def single(self, temporary: Path) -> None:
        """Header and pixels of a single file."""
        self._run(temporary, header=True, pixels=True)

    def header(self, temporary: Path) -> None:
        """Header of a pair."""
        self._run(temporary, header=True, pixels=False)

    def pixels(self, temporary: Path) -> None:
        """Pixels of a pair."""
        self._run(temporary, header=False, pixels=True)

    def _run(self, temporary: Path, *, header: bool, pixels: bool) -> None:
        try:
            if header:
                self._compare_header(temporary)
            if pixels:
                self._compare_length(temporary, len(self._plan.header_bytes) if header else 0)
        except InputRefused as error:
            msg = f"{mention(self._name)} could not be read back and was not written: {error.sentence}"
            raise RunError(msg, "Check the disk.") from error

    def _compare_header(self, temporary: Path) -> None:
        with open_forward(temporary, self._name) as stream:
            block = stream.read(len(self._plan.header_bytes))
        with _refused(self._name), open_forward(temporary, self._name) as stream:
            found = read_header(stream, self._name, paired=self._plan.paired)
        affine = self._plan.header.get_best_affine()
        same = (
            block == self._plan.header_bytes
            and found.lengths == self._plan.lengths
            and found.value_type == self._plan.value_type
            and np.array_equal(found.raw.get_best_affine(), affine, equal_nan=True)
            and self._affine_is(found.affine)
        )
        if not same:
            msg = f"{self._name} has another header than the one that was written."
            raise InputRefused(msg)

    def _affine_is(self, affine: Affine) -> bool:
        """Whether the header, rounded to what it can hold, still places the image where it belongs."""
        expected = self._plan.result.affine
        if expected is None:
            return True
        tolerance = 1e-5 * max(float(np.abs(expected).max()), 1.0)
        return bool(np.allclose(affine, expected, rtol=0, atol=tolerance))

    def _compare_length(self, temporary: Path, before: int) -> None:
        expected = before + self._plan.data_bytes
        found = temporary.stat().st_size
        if self._packed:
            with open_forward(temporary, self._name) as stream:
                stream.skip(expected)
                found = expected + len(stream.read(1))
        if found != expected:
            msg = f"{self._name} has {found} bytes instead of {expected}."
            raise InputRefused(msg)
