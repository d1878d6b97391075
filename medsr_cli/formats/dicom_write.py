"""Writing a derived series: file after file, frame after frame, whole or not at all.

`dicom_outputs` says which files there are, `dicom_classic`, `dicom_frames` and `dicom_derive` make their headers,
`dicom_encode` packs pixels and `dicom_container` lays them into the files.

Values are encoded, written and flushed to the disk by a few threads, each with a frame of its own. Headers are made one
at a time: pydicom is Python, which runs in one thread at once anyway, and switching its warnings off is not safe in
several.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO

from medsr_cli.errors import RunError, mention
from medsr_cli.formats.atomic import atomic_file, atomic_folder, file_within
from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.dicom import DicomReader
from medsr_cli.formats.dicom_classic import classic_header
from medsr_cli.formats.dicom_container import EXTREMES, Header, OpenFile, PackedFile, PlainFile, pixels_end
from medsr_cli.formats.dicom_derive import Lineage, derive_header
from medsr_cli.formats.dicom_encode import PLAIN, encoded
from medsr_cli.formats.dicom_files import SUFFIXES, read_header, refusing
from medsr_cli.formats.dicom_frames import keep_frames
from medsr_cli.formats.dicom_grid import Grid
from medsr_cli.formats.dicom_headers import PALETTE, Instance
from medsr_cli.formats.dicom_outputs import (
    Output,
    Place,
    check_one_file,
    check_outputs,
    frame_bytes,
    places,
    stored_bits,
)
from medsr_cli.formats.dicom_stacks import FrameRef
from medsr_cli.volume.intensity import store
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]

THREADS = 4
"""Threads that write, whatever the number of cores: most of the time they wait for the disk."""
PENDING_BYTES = 64 << 20
"""Pixels of frames that threads are busy with or that wait for one; a single frame may have more."""
KEPT_HEADERS = 2
"""Headers of enhanced objects that are kept while their frames are written: each is read once for all of them."""

_CHECKED_TAGS: list[Any] = ["Rows", "Columns", "NumberOfFrames", "SOPInstanceUID", "SeriesInstanceUID"]


class DicomWriter:
    """Takes the slices of a derived series in the reader's order; `close` ends its threads."""

    def __init__(
        self,
        source: DicomReader,
        result: Volume,
        lineage: Lineage,
        place: Path | BinaryIO,
        found: list[Place],
        folder: Path,
    ) -> None:
        """Start the threads.

        Args:
            source: what the result is made from.
            result: its volume.
            lineage: what all headers share.
            place: an empty folder for the files, or the one file.
            found: where each frame of the stack goes.
            folder: on the disk that is written to, for what has to wait.
        """
        self.clipped = 0
        """Complete when every slice was written."""
        self.warnings: tuple[str, ...] = ()
        """The same."""
        self.written = 0
        self._source = source
        self._result = result
        self._lineage = lineage
        self._syntax = lineage.derivation.dicom.transfer_syntax
        self._place = place
        self._folder = folder
        self._found = found
        self._files_total = len({id(at.output) for at in found})
        self._open: dict[int, OpenFile] = {}
        self._opening = threading.Lock()
        self._headers: OrderedDict[int, Dataset] = OrderedDict()
        self._files = ExitStack()
        self._threads = ThreadPoolExecutor(THREADS, "medsr-dicom")
        self._pending: deque[Future[int]] = deque()
        size = result.rows * result.columns * result.channels * result.dtype.itemsize
        self._most_pending = max(min(THREADS, PENDING_BYTES // size), 1)

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
        self._pending.append(self._threads.submit(self._write, pixels, frames[self.written], self._found[self.written]))
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
        for file in self._open.values():
            file.close()
        self._files.close()

    def _wait(self, most: int) -> None:
        """Until at most so many slices are pending; raises what the earliest of them raised."""
        while len(self._pending) > most:
            self.clipped += self._pending.popleft().result()
        self.warnings = tuple(self._lineage.warnings)

    def _write(self, pixels: Pixels, frame: FrameRef, place: Place) -> int:
        """One frame, from values to the disk; returns how many were saturated."""
        stored, clipped = self._stored(pixels, frame)
        extremes = self._extremes(stored, frame.instance)
        payload = self._payload(stored, frame.instance)
        if self._file_of(place.output, extremes).put(place.index, payload, extremes):
            self._close_full(place.output)
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

    def _extremes(self, stored: Pixels, instance: Instance) -> tuple[int, int] | None:
        """Smallest and largest stored value; None where the header has no room for them, or they mean colours."""
        if self._result.channels != 1:
            return None
        low, high = int(stored.min()), int(stored.max())
        fits = (low >= -0x8000 and high <= 0x7FFF) if instance.signed else high <= 0xFFFF
        return (low, high) if fits else None

    def _payload(self, stored: Pixels, instance: Instance) -> bytes | memoryview:
        """What goes into the file: the values, or one codestream."""
        if self._syntax == PLAIN:
            return stored.reshape(-1).view(np.uint8).data
        try:
            return encoded(
                stored,
                self._syntax,
                bits_stored=stored_bits(self._result, instance)[1],
                signed=instance.signed and instance.photometric != PALETTE,
                photometric="RGB" if self._result.channels == 3 else instance.photometric,
            )
        except Exception as error:
            msg = f"A slice could not be packed with --transfer-syntax {self._syntax} ({type(error).__name__})."
            raise RunError(msg, "Use --transfer-syntax explicit.") from error

    def _file_of(self, output: Output, extremes: tuple[int, int] | None) -> OpenFile:
        key = id(output)
        with self._opening:
            if key not in self._open:
                self._open[key] = self._opened(output, self._header(output, extremes))
            return self._open[key]

    def _opened(self, output: Output, header: Header) -> OpenFile:
        instance, frames = output.instance, len(output.frames)
        file = self._place_for(output)
        size = frame_bytes(self._result, instance)
        if self._syntax == PLAIN:
            vr = b"OB" if stored_bits(self._result, instance)[0] <= 8 else b"OW"
            return PlainFile(file, header, frames, size, vr)
        return PackedFile(file, header, frames, size * frames, self._folder)

    def _close_full(self, output: Output) -> None:
        if not isinstance(self._place, Path):
            return
        file = self._open.pop(id(output)).file
        file.flush()
        os.fsync(file.fileno())  # here, where several files can wait for the disk at once
        file.close()

    def _place_for(self, output: Output) -> BinaryIO:
        if not isinstance(self._place, Path):
            return self._place
        digits = max(4, len(str(self._files_total)))
        file = file_within(self._place, f"{output.at:0{digits}d}.dcm")
        return self._files.enter_context(file)

    def _header(self, output: Output, extremes: tuple[int, int] | None) -> Header:
        """Everything up to the pixel data."""
        several = len(output.frames) > 1
        with refusing(output.instance.member.name, "writing its header anew"):
            ds = self._derived(output, (0, 0) if several and extremes is not None else extremes)
            buffer = DicomBytesIO()
            pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
            return Header.of(bytes(buffer.getvalue()), open_extremes=several and extremes is not None)

    def _derived(self, output: Output, extremes: tuple[int, int] | None) -> Dataset:
        """The data set of a derived file, but for its pixels."""
        instance = output.instance
        ds = self._source_header(output)
        if output.classic:
            ds = classic_header(ds, instance, output.frames[0])
        elif output.partial:
            keep_frames(ds, instance.frames, output.frames)
        told = any(keyword in ds for keyword in EXTREMES)
        derive_header(
            ds, output.described, self._lineage, output.number, frame=output.frame, extremes=extremes if told else None
        )
        return ds

    def _source_header(self, output: Output) -> Dataset:
        """The source's header, to be changed unless the output is classic."""
        if not output.classic:
            return read_header(output.instance.member)
        key = id(output.instance)
        if key not in self._headers:
            while len(self._headers) >= KEPT_HEADERS:
                self._headers.popitem(last=False)
            self._headers[key] = read_header(output.instance.member)
        self._headers.move_to_end(key)
        return self._headers[key]


@contextlib.contextmanager
def derived_series(
    target: Path, source: DicomReader, result: Volume, derivation: Derivation, *, overwrite: bool
) -> Iterator[DicomWriter]:
    """Open `target` for a derived series; it appears when all slices are there and read back.

    Raises:
        ArgumentsError: several files cannot become one, a file would be too large, the transfer syntax does not hold
            the pixels, or one object is asked for where the source is classic.
        RunError: slices are missing, or the disk does not take them.
    """
    single = target.suffix.lower() in SUFFIXES
    choices = derivation.dicom
    found = places(source, choices.multiframe)
    if single:
        check_one_file(target, source, found)
    check_outputs(source, result, found, choices.multiframe, choices.transfer_syntax)
    grid = Grid(source.volume.rows, source.volume.columns, result.rows, result.columns, source.part)
    lineage = Lineage(derivation, grid, result, source.stack.frames, derivation.dicom.ordinal)
    files = len({id(place.output) for place in found})

    def verify(path: Path) -> None:
        _verify([path] if single else sorted(path.iterdir()), files, result, target.name)

    with ExitStack() as stack:
        place: Path | BinaryIO
        if single:
            place = stack.enter_context(atomic_file(target, overwrite=overwrite, verify=verify))
        else:
            place = stack.enter_context(atomic_folder(target, overwrite=overwrite, verify=verify, flushed=True))
        writer = DicomWriter(source, result, lineage, place, found, target.parent)
        stack.callback(writer.close)
        yield writer
        writer.finish()


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
        frames = int(ds.get("NumberOfFrames") or 1)
        end = pixels_end(file, frames)
        length = file.seek(0, io.SEEK_END)
    if (ds.Rows, ds.Columns) != (result.rows, result.columns) or end != length:
        raise _unlike(path.name)
    identities.add(str(ds.SOPInstanceUID))
    return frames


def _unlike(name: str) -> RunError:
    return RunError(f"{mention(name)} did not read back as it was written.", "Nothing was left behind; check the disk.")
