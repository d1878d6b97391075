"""The pixels behind a written header: frames at known offsets, or one packed codestream after the other.

Frames come from several threads, in any order. Plain ones are written where they belong. Packed ones have no place
before their predecessors have a length: those that come early wait in a temporary file without a name (in memory while
it is small), so that memory does not grow with the number of frames (PS3.5 section A.4).
"""

from __future__ import annotations

import io
import struct
import tempfile
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import pydicom
from pydicom.dataelem import RawDataElement

UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_DATA = (0x7FE0, 0x0010)
_ITEM, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_LARGEST_TABLE = 1 << 30
"""Frames and bytes for which the offset table surely counts in 32 bits, even if packing makes pixels larger."""

WAITING_BYTES = 32 << 20
"""Packed frames that wait in memory for their predecessors; more of them wait on the disk."""

EXTREMES = ("SmallestImagePixelValue", "LargestImagePixelValue")


@dataclass(frozen=True)
class Header:
    """Everything up to the pixels, and where in it their smallest and largest value stand."""

    data: bytes
    extremes: tuple[tuple[int, str], ...] = ()
    """Offset and `struct` format of the smallest and of the largest value; empty where the header has none."""

    @classmethod
    def of(cls, data: bytes, *, open_extremes: bool) -> Header:
        """A header as it was written.

        Args:
            data: a file up to, but without, its pixel data; explicit VR little endian.
            open_extremes: whether smallest and largest value are only known when all frames are.
        """
        if not open_extremes:
            return cls(data)
        ds = pydicom.dcmread(io.BytesIO(data), specific_tags=[*EXTREMES])
        raw: list[Any] = [item for name in EXTREMES if isinstance(item := ds.get_item(name), RawDataElement)]
        if len(raw) != len(EXTREMES):
            return cls(data)
        return cls(data, tuple((element.value_tell, "<h" if element.VR == "SS" else "<H") for element in raw))


class OpenFile(ABC):
    """A derived file whose header is written and whose frames are being filled in, by any thread."""

    def __init__(self, file: BinaryIO, header: Header, frames: int) -> None:
        self.file = file
        self._extremes = header.extremes
        self._total = self._missing = frames
        self._lowest: int | None = None
        self._highest: int | None = None
        self._lock = threading.Lock()
        file.write(header.data)

    def put(self, index: int, pixels: bytes | memoryview, extremes: tuple[int, int] | None = None) -> bool:
        """Write a frame; returns whether it was the last one that was missing.

        Args:
            index: from 0.
            pixels: stored values, little endian, or one codestream.
            extremes: smallest and largest stored value of the frame.
        """
        with self._lock:
            self._put(index, memoryview(pixels))
            if extremes is not None:
                self._lowest = extremes[0] if self._lowest is None else min(self._lowest, extremes[0])
                self._highest = extremes[1] if self._highest is None else max(self._highest, extremes[1])
            self._missing -= 1
            if not self._missing:
                self._end()
                self._write_extremes()
            return not self._missing

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what waits; the file itself belongs to whoever opened it."""

    @abstractmethod
    def _put(self, index: int, pixels: memoryview) -> None: ...

    @abstractmethod
    def _end(self) -> None:
        """After the last frame."""

    def _write_extremes(self) -> None:
        for (offset, form), value in zip(self._extremes, (self._lowest, self._highest), strict=False):
            if value is not None:
                self.file.seek(offset)
                self.file.write(struct.pack(form, value))


class PlainFile(OpenFile):
    """Uncompressed frames."""

    def __init__(self, file: BinaryIO, header: Header, frames: int, frame_bytes: int, vr: bytes) -> None:
        super().__init__(file, header, frames)
        length = frame_bytes * frames
        file.write(struct.pack("<HH2sHL", *_PIXEL_DATA, vr, 0, length + length % 2))
        self._offset = len(header.data) + 12
        self._frame_bytes = frame_bytes

    def _put(self, index: int, pixels: memoryview) -> None:
        self.file.seek(self._offset + index * self._frame_bytes)
        self.file.write(pixels)

    def _end(self) -> None:
        if (self._total * self._frame_bytes) % 2:
            self.file.seek(0, io.SEEK_END)
            self.file.write(b"\0")


class PackedFile(OpenFile):
    """Encapsulated frames, each in one item of its own, behind a table of their offsets where these fit into it.

    Args:
        file: for the result.
        header: everything before the pixels.
        frames: how many will come.
        plain_bytes: of all frames, uncompressed.
        folder: where frames wait that come too early.
    """

    def __init__(self, file: BinaryIO, header: Header, frames: int, plain_bytes: int, folder: Path) -> None:
        super().__init__(file, header, frames)
        self._folder = folder
        self._waiting: dict[int, tuple[int, int]] = {}
        self._spool: IO[bytes] | None = None
        self._next = 0
        self._offsets: list[int] = []
        table = frames if plain_bytes <= _LARGEST_TABLE else 0
        file.write(struct.pack("<HH2sHL", *_PIXEL_DATA, b"OB", 0, UNDEFINED_LENGTH))
        file.write(struct.pack("<HHL", *_ITEM, 4 * table))
        self._table = len(header.data) + 12 + 8
        file.write(b"\0" * (4 * table))
        self._first = self._end_of_items = self._table + 4 * table
        self._has_table = bool(table)

    def close(self) -> None:
        """Drop the frames that wait."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _put(self, index: int, pixels: memoryview) -> None:
        if index != self._next:
            self._wait(index, pixels)
            return
        self._append(pixels)
        while self._spool is not None and self._next in self._waiting:
            offset, length = self._waiting.pop(self._next)
            self._spool.seek(offset)
            self._append(memoryview(self._spool.read(length)))

    def _wait(self, index: int, pixels: memoryview) -> None:
        if self._spool is None:
            self._spool = tempfile.SpooledTemporaryFile(max_size=WAITING_BYTES, dir=str(self._folder))  # noqa: SIM115
        if not self._waiting:
            self._spool.seek(0)
        offset = self._spool.seek(0, io.SEEK_END) if self._waiting else 0
        self._spool.write(pixels)
        self._waiting[index] = offset, len(pixels)

    def _append(self, pixels: memoryview) -> None:
        padding = len(pixels) % 2
        self._offsets.append(self._end_of_items - self._first)
        self.file.seek(self._end_of_items)
        self.file.write(struct.pack("<HHL", *_ITEM, len(pixels) + padding))
        self.file.write(pixels)
        self.file.write(b"\0" * padding)
        self._end_of_items += 8 + len(pixels) + padding
        self._next += 1

    def _end(self) -> None:
        self.file.seek(self._end_of_items)
        self.file.write(struct.pack("<HHL", *_SEQUENCE_END, 0))
        if self._has_table:
            self.file.seek(self._table)
            self.file.write(struct.pack(f"<{self._total}L", *self._offsets))
        self.close()


def pixels_end(file: BinaryIO, frames: int) -> int | None:
    """Where the pixel data ends that a file stands before, without reading it; None where it is not as written here.

    Args:
        file: at the tag of the pixel data, explicit VR little endian.
        frames: items that encapsulated pixels must have.
    """
    head = file.read(12)
    if len(head) < 12:
        return None
    group, element, _, _, length = struct.unpack("<HH2sHL", head)
    if (group, element) != _PIXEL_DATA:
        return None
    if length != UNDEFINED_LENGTH:
        return file.tell() + int(length)
    items = -1  # the first one is the offset table
    while True:
        head = file.read(8)
        if len(head) < 8:
            return None
        group, element, length = struct.unpack("<HHL", head)
        if (group, element) == _SEQUENCE_END:
            return file.tell() if items == frames and not length else None
        if (group, element) != _ITEM or (items >= 0 and not length):
            return None
        items += 1
        file.seek(length, io.SEEK_CUR)
