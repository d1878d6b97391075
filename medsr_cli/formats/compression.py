"""Streams through gzip, zlib and bzip2, at the speed of ISA-L and with bounded memory."""

from __future__ import annotations

import bz2
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from isal import igzip, isal_zlib

from medsr_cli.formats.voxel_stream import ByteSource

Encoding = Literal["raw", "gzip", "zlib", "bzip2"]

_IGZIP_FILE: Any = igzip.IGzipFile  # without types

LEVEL = 1
"""ISA-L's level 1 makes files as small as zlib's default does, ten times as fast."""


_WINDOW = {"gzip": 31, "zlib": 15}
"""zlib's `wbits`; its gzip header holds neither a name nor a time."""


class _Inflating:
    """A zlib stream as something to read from."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = isal_zlib.decompressobj()

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self._decoder.eof:
            packed = self._decoder.unconsumed_tail or self._file.read(1 << 18)
            # The decoder may hold back output beyond `size` when all input is taken: ask it once more.
            data: bytes = self._decoder.decompress(packed, size)
            if data:
                return data
            if not packed:
                break
        return b""


@contextlib.contextmanager
def decoded(path: Path, encoding: Encoding, offset: int = 0) -> Iterator[ByteSource]:
    """Read a file from `offset` on, decoded."""
    with path.open("rb") as file:
        file.seek(offset)
        if encoding == "gzip":
            with _IGZIP_FILE(fileobj=file, mode="rb") as unpacked:
                yield unpacked
        elif encoding == "bzip2":
            with bz2.BZ2File(file) as unpacked:
                yield unpacked
        elif encoding == "zlib":
            yield _Inflating(file)
        else:
            yield file


@contextlib.contextmanager
def encoding_into(file: BinaryIO, encoding: Literal["raw", "gzip", "zlib"]) -> Iterator[Callable[[bytes], object]]:
    """Yield a function that takes bytes and writes them, encoded, to `file`; the same bytes give the same file."""
    if encoding == "raw":
        yield file.write
        return
    encoder = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, _WINDOW[encoding])
    yield lambda data: file.write(encoder.compress(data))
    file.write(encoder.flush())
