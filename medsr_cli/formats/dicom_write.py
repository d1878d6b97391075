"""Writing a derived series: one file for each source file, frame after frame, whole or not at all.

Values are encoded, written and flushed to the disk by a few threads, each with a frame of its own. Headers are made one
at a time: pydicom is Python, which runs in one thread at once anyway, and switching its warnings off is not safe in
several.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.filebase import DicomBytesIO

from medsr_cli.errors import ArgumentsError, RunError, mention
from medsr_cli.formats.atomic import atomic_file, atomic_folder, file_within
from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.dicom import DicomReader
from medsr_cli.formats.dicom_derive import Lineage, derive_header
from medsr_cli.formats.dicom_files import SUFFIXES, read_header, refusing
from medsr_cli.formats.dicom_grid import Grid
from medsr_cli.formats.dicom_headers import PALETTE, Instance
from medsr_cli.formats.dicom_series import FrameRef
from medsr_cli.volume.intensity import store
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]

LARGEST_PIXEL_DATA = (1 << 31) - 2
"""Bytes of pixels in one file. The standard has room for twice as many; many readers count in signed integers."""

THREADS = 4
"""Threads that write, whatever the number of cores: most of the time they wait for the disk."""
PENDING_BYTES = 64 << 20
"""Pixels of frames that threads are busy with or that wait for one; a single frame may have more."""

_CHECKED_TAGS: list[Any] = ["Rows", "Columns", "NumberOfFrames", "SOPInstanceUID", "SeriesInstanceUID"]


class _OpenFile:
    """A derived file whose header is written and whose frames are being filled in, by any thread."""

    def __init__(self, file: BinaryIO, header: bytes, frame_bytes: int, frames: int) -> None:
        self.file = file
        self.offset = len(header)
        self.frame_bytes = frame_bytes
        self.missing = frames
        self.total = frames
        self._lock = threading.Lock()
        file.write(header)

    def put(self, index: int, pixels: memoryview) -> bool:
        """Write a frame; returns whether it was the last one that was missing."""
        with self._lock:
            self.file.seek(self.offset + index * self.frame_bytes)
            self.file.write(pixels)
            self.missing -= 1
            if not self.missing and (self.total * self.frame_bytes) % 2:
                self.file.seek(0, io.SEEK_END)
                self.file.write(b"\0")
            return not self.missing


class DicomWriter:
    """Takes the slices of a derived series in the reader's order; `close` ends its threads."""

    def __init__(self, source: DicomReader, result: Volume, lineage: Lineage, place: Path | BinaryIO) -> None:
        self.clipped = 0
        """Complete when every slice was written."""
        self.warnings: tuple[str, ...] = ()
        self.written = 0
        self._source = source
        self._result = result
        self._lineage = lineage
        self._place = place
        self._open: dict[int, _OpenFile] = {}
        self._opening = threading.Lock()
        self._files = ExitStack()
        self._numbers = _instance_numbers(source.instances)
        self._names = {id(instance): at for at, instance in enumerate(source.instances, 1)}
        self._threads = ThreadPoolExecutor(THREADS, "medsr-dicom")
        self._pending: deque[Future[int]] = deque()
        frame_bytes = result.rows * result.columns * result.channels * result.dtype.itemsize
        self._most_pending = max(min(THREADS, PENDING_BYTES // frame_bytes), 1)

    def write(self, pixels: Pixels) -> None:
        """Take the next slice, (channels, rows', columns') in the volume's type, which must not be changed after.

        What goes wrong with a slice is raised by this call or a later one, in the order of the slices; the last call
        waits for all of them.

        Raises:
            RunError: it has another shape or type, holds NaN, or there are too many.
            InputRefused: the header of the source cannot be read again.
        """
        frames = self._source.stack.frames
        shape = (self._result.channels, self._result.rows, self._result.columns)
        if self.written >= len(frames) or pixels.shape != shape or pixels.dtype != self._result.dtype:
            self._wait(0)
        if self.written >= len(frames):
            msg = f"More than {len(frames)} slices were made."
            raise RunError(msg)
        if pixels.shape != shape or pixels.dtype != self._result.dtype:
            msg = f"A slice of {pixels.shape} {pixels.dtype} was made where {shape} {self._result.dtype} belongs."
            raise RunError(msg)
        self._wait(self._most_pending - 1)
        self._pending.append(self._threads.submit(self._write, pixels, frames[self.written]))
        self.written += 1
        if self.written == len(frames):
            self._wait(0)

    def finish(self) -> None:
        """Check that every slice came.

        Raises:
            RunError: slices are missing.
        """
        self._wait(0)
        missing = len(self._source.stack.frames) - self.written
        if missing:
            msg = f"{missing} slices are missing from the result."
            raise RunError(msg, "Nothing was written.")

    def close(self) -> None:
        """End the threads, frames that none of them has begun with left out, and close the files."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def _wait(self, most: int) -> None:
        """Until at most so many slices are pending; raises what the earliest of them raised."""
        while len(self._pending) > most:
            self.clipped += self._pending.popleft().result()

    def _write(self, pixels: Pixels, frame: FrameRef) -> int:
        """One frame, from values to the disk; returns how many were saturated."""
        stored, clipped = self._stored(pixels, frame)
        if self._file_of(frame.instance).put(frame.index, stored.reshape(-1).view(np.uint8).data):
            self._close_full(frame.instance)
        return clipped

    def _stored(self, pixels: Pixels, frame: FrameRef) -> tuple[Pixels, int]:
        """Little-endian stored values, (rows', columns') or (rows', columns', 3), and how many were saturated."""
        instance = frame.instance
        clipped = 0
        if self._source.real_values:
            if not np.isfinite(pixels).all():
                msg = "The result holds values that are not numbers."
                raise RunError(msg, "Nothing was written.")
            plane = frame.plane
            pixels = (pixels.astype(np.float64) - plane.intercept) / plane.slope
        if instance.photometric != PALETTE:
            low, high = instance.stored_range
            pixels, clipped = store(pixels, instance.stored_dtype, low, high)
        arranged = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
        return np.ascontiguousarray(arranged, dtype=arranged.dtype.newbyteorder("<")), clipped

    def _file_of(self, instance: Instance) -> _OpenFile:
        key = id(instance)
        with self._opening:
            if key not in self._open:
                header = self._header(instance)
                frame_bytes = _frame_bytes(self._result, instance)
                self._open[key] = _OpenFile(self._place_for(instance), header, frame_bytes, instance.frames)
            return self._open[key]

    def _close_full(self, instance: Instance) -> None:
        if not isinstance(self._place, Path):
            return
        file = self._open.pop(id(instance)).file
        file.flush()
        os.fsync(file.fileno())  # here, where several files can wait for the disk at once
        file.close()

    def _place_for(self, instance: Instance) -> BinaryIO:
        if not isinstance(self._place, Path):
            return self._place
        digits = max(4, len(str(len(self._names))))
        file = file_within(self._place, f"{self._names[id(instance)]:0{digits}d}.dcm")
        return self._files.enter_context(file)

    def _header(self, instance: Instance) -> bytes:
        """Everything up to the first byte of the pixels."""
        with refusing(instance.member.name, "writing its header anew"):
            ds = read_header(instance.member)
            derive_header(ds, instance, self._lineage, self._numbers.get(id(instance)))
            buffer = DicomBytesIO()
            pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
            length = _frame_bytes(self._result, instance) * instance.frames
            vr = b"OB" if ds.BitsAllocated <= 8 else b"OW"
            element = struct.pack("<HH2sHL", 0x7FE0, 0x0010, vr, 0, length + length % 2)
            return bytes(buffer.getvalue()) + element


@contextlib.contextmanager
def derived_series(
    target: Path, source: DicomReader, result: Volume, derivation: Derivation, *, overwrite: bool
) -> Iterator[DicomWriter]:
    """Open `target` for a derived series; it appears when all slices are there and read back.

    Raises:
        ArgumentsError: several files cannot become one, or a file would be too large.
        RunError: slices are missing, or the disk does not take them.
    """
    instances = source.instances
    single = target.suffix.lower() in SUFFIXES
    _check_target(target, source, result, single)
    grid = Grid(source.volume.rows, source.volume.columns, result.rows, result.columns, source.part)
    lineage = Lineage(derivation, grid, result)

    def verify(path: Path) -> None:
        _verify([path] if single else sorted(path.iterdir()), len(instances), result, target.name)

    with ExitStack() as stack:
        place: Path | BinaryIO
        if single:
            place = stack.enter_context(atomic_file(target, overwrite=overwrite, verify=verify))
        else:
            place = stack.enter_context(atomic_folder(target, overwrite=overwrite, verify=verify, flushed=True))
        writer = DicomWriter(source, result, lineage, place)
        stack.callback(writer.close)
        yield writer
        writer.finish()


def _check_target(target: Path, source: DicomReader, result: Volume, single: bool) -> None:
    instances = source.instances
    if single and len(instances) > 1:
        msg = (
            f"{mention(source.path.name)} has {len(instances)} files, which do not go into one: {mention(target.name)}."
        )
        raise ArgumentsError(msg, "Give a folder with -o.")
    if result.channels != source.volume.channels or result.slices != source.volume.slices:
        msg = f"The result does not have the slices and channels of {mention(source.path.name)}."
        raise RunError(msg)
    largest = max(_frame_bytes(result, instance) * instance.frames for instance in instances)
    if largest > LARGEST_PIXEL_DATA:
        msg = f"The result would have {largest / (1 << 30):.1f} GiB in one DICOM file, more than 2 GiB."
        raise ArgumentsError(msg, "Choose a smaller scale, or write NIfTI.")


def _frame_bytes(result: Volume, instance: Instance) -> int:
    stored = result.dtype if instance.photometric == PALETTE else instance.stored_dtype
    return result.rows * result.columns * result.channels * stored.itemsize


def _instance_numbers(instances: list[Instance]) -> dict[int, int]:
    """New instance numbers by identity: none where the source's tell its files apart."""
    numbers = [instance.number for instance in instances]
    if None not in numbers and len(set(numbers)) == len(numbers):
        return {}
    return {id(instance): at for at, instance in enumerate(instances, 1)}


def _verify(paths: list[Path], files: int, result: Volume, name: str) -> None:
    """Read every header back, and compare the pixels' length with the file's.

    Raises:
        RunError: something differs.
    """
    identities: set[str] = set()
    frames = 0
    for path in paths:
        try:
            frames += _verified_frames(path, result, identities)
        except RunError:
            raise
        except Exception as error:
            raise _unlike(name) from error
    if len(paths) != files or len(identities) != files or frames != result.slices:
        raise _unlike(name)


def _verified_frames(path: Path, result: Volume, identities: set[str]) -> int:
    with path.open("rb") as file:
        ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_CHECKED_TAGS)
        start = file.tell()
        length = struct.unpack("<HH2sHL", file.read(12))[4]
        end = file.seek(0, io.SEEK_END)
    if (ds.Rows, ds.Columns) != (result.rows, result.columns) or end != start + 12 + length:
        raise _unlike(path.name)
    identities.add(str(ds.SOPInstanceUID))
    return int(ds.get("NumberOfFrames") or 1)


def _unlike(name: str) -> RunError:
    return RunError(f"{mention(name)} did not read back as it was written.", "Nothing was left behind; check the disk.")
