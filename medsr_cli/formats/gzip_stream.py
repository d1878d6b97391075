"""Bytes of a plain or gzip-compressed file, forward only: ISA-L reads and writes them, memory stays flat.

Nothing here seeks in a compressed stream, and nothing reads further than it was asked to, so that a small
file which unpacks to terabytes costs no more than the bytes that its reader wants.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention, reason_of

GZIP_MAGIC = b"\x1f\x8b"
COMPRESSION_LEVEL = 2
"""ISA-L's level 2: within 3 % of the size that nibabel writes, at five times its speed; level 1 is hardly faster."""
CHUNK_BYTES = 1 << 20
_DAMAGED: tuple[type[Exception], ...] = (OSError, zlib.error, cast("type[Exception]", isal_zlib.error))
GZIP_WITH_HEADER = 31
"""zlib's `wbits` for a gzip header and trailer: time 0 and no file name, so equal bytes give equal files."""


class _ReadableInto(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Sink(Protocol):
    """Where the bytes of a result go, one after the other."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take the next bytes."""
        ...


class ForwardStream:
    """The decoded bytes of one file, in order. Whatever is wrong with them is an `InputRefused`."""

    def __init__(self, file: _ReadableInto, name: str) -> None:
        self._file = file
        self._name = name

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end of the file; memory is taken as they come."""
        parts = []
        while count > 0:
            buffer = bytearray(min(count, CHUNK_BYTES))
            got = self._fill(memoryview(buffer))
            parts.append(bytes(buffer[:got]))
            if got < len(buffer):
                break
            count -= got
        return b"".join(parts)

    def read_exactly(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes as a fresh array.

        Raises:
            InputRefused: the file ends before, or is damaged.
        """
        buffer = np.empty(count, np.uint8)
        if self._fill(buffer.data) < count:
            raise _cut_short(self._name)
        return buffer

    def skip(self, count: int) -> None:
        """Leave out the next `count` bytes.

        Raises:
            InputRefused: the file ends before, or is damaged.
        """
        while count:
            step = min(count, CHUNK_BYTES)
            self.read_exactly(step)
            count -= step

    def finish(self) -> None:
        """Read a little beyond the end, so that a checksum that follows there is compared.

        Raises:
            InputRefused: the checksum differs.
        """
        self.read(CHUNK_BYTES)

    def _fill(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            try:
                got = self._file.readinto(buffer[filled:])
            except EOFError as error:
                raise _cut_short(self._name) from error
            except _DAMAGED as error:
                msg = f"{mention(self._name)} is damaged: its compressed data or its checksum is wrong."
                raise InputRefused(msg, "Copy or export it again.") from error
            if not got:
                break
            filled += got
        return filled


@contextmanager
def open_forward(path: Path, name: str | None = None) -> Iterator[ForwardStream]:
    """Open a file for reading forward; whether it is compressed is seen from its first bytes.

    Args:
        path: the file.
        name: what errors call it, if not its own name.

    Raises:
        InputRefused: it cannot be opened.
    """
    name = name or path.name
    try:
        file = path.open("rb")
    except OSError as error:
        msg = f"{mention(name)} cannot be opened: {reason_of(error)}."
        raise InputRefused(msg) from error
    with file:
        packed = file.read(2) == GZIP_MAGIC
        file.seek(0)
        if not packed:
            yield ForwardStream(file, name)
            return
        with igzip.IGzipFile(fileobj=file, mode="rb") as unpacked:  # type: ignore[no-untyped-call]
            yield ForwardStream(unpacked, name)


def is_compressed(path: Path) -> bool:
    """Whether a file starts like gzip.

    Raises:
        InputRefused: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(2) == GZIP_MAGIC
    except OSError as error:
        msg = f"{mention(path.name)} cannot be opened: {reason_of(error)}."
        raise InputRefused(msg) from error


class GzipSink:
    """Compresses what is written to it into an open file; `finish` writes the checksum and the length.

    There is nothing to close: a run that fails half-way drops it together with its temporary file.
    """

    def __init__(self, file: BinaryIO, level: int = COMPRESSION_LEVEL) -> None:
        self._file = file
        self._deflate = isal_zlib.compressobj(level, isal_zlib.DEFLATED, GZIP_WITH_HEADER)

    def write(self, data: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        self._file.write(self._deflate.compress(data))

    def finish(self) -> None:
        """Write what is still held back, and the trailer."""
        self._file.write(self._deflate.flush())


def _cut_short(name: str) -> InputRefused:
    return InputRefused(f"{mention(name)} is cut short: it ends before its last slice.", "Copy or export it again.")
