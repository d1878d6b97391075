"""What a PNG says beside its pixels: chunks that a result keeps, word for word, and the one that is rescaled.

Texts, colour profile, gamma and the like stay true of an enlarged picture. Pillow would re-write some and drop others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT_BYTES = 32 << 20
"""More than this of chunks is not kept."""

_KEPT_BEFORE_PIXELS = {b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"sBIT", b"pHYs", b"eXIf"}
_KEPT_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}

Chunk = tuple[bytes, bytes]


def bit_depth_and_colour(path: Path) -> tuple[int, int]:
    """Bits per sample and colour type, from the first chunk."""
    with path.open("rb") as file:
        head = file.read(26)
    if head[:8] != SIGNATURE or head[12:16] != b"IHDR":
        msg = "no IHDR chunk"
        raise ValueError(msg)
    return head[24], head[25]


def packed_row_bytes(path: Path, columns: int) -> int:
    """Bytes of a row of pixels before compression, its filter's byte left out."""
    depth, colour = bit_depth_and_colour(path)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    return columns * depth * channels // 8


def kept_chunks(path: Path) -> list[Chunk]:
    """The chunks of a PNG that stay true of an enlarged picture; pixels are passed over unread."""
    kept: list[Chunk] = []
    total = 0
    with path.open("rb") as file:
        for kind, length in _chunk_heads(file):
            if kind in _KEPT_BEFORE_PIXELS | _KEPT_TEXTS and total + length <= KEPT_BYTES:
                kept.append((kind, file.read(length)))
                total += length
            else:
                file.seek(length, 1)
            file.seek(4, 1)  # the checksum; it is made anew
    return kept


def _chunk_heads(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, length


def text_chunk(key: str, text: str) -> Chunk:
    """A Latin-1 text chunk."""
    return b"tEXt", key.encode("latin-1", "replace")[:79] + b"\0" + text.encode("latin-1", "replace")


def rescaled(chunk: Chunk, row_factor: float, column_factor: float) -> Chunk:
    """A pHYs chunk for pixels that are smaller by these factors; any other chunk as it is."""
    kind, data = chunk
    if kind != b"pHYs" or len(data) != 9:
        return chunk
    across, down, unit = struct.unpack(">IIB", data)
    limit = (1 << 31) - 1
    across, down = (
        min(round(value * factor), limit) for value, factor in ((across, column_factor), (down, row_factor))
    )
    return kind, struct.pack(">IIB", across, down, unit)


def with_chunks(png: bytes, chunks: list[Chunk]) -> Iterator[bytes]:
    """The bytes of a PNG with chunks put in behind its first one; those of the same kinds in it are left out."""
    given = {kind for kind, _ in chunks}
    end_of_first = len(SIGNATURE) + 25
    yield png[:end_of_first]
    for kind, data in chunks:
        yield struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
    position = end_of_first
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        kind = png[position + 4 : position + 8]
        if kind not in given and kind != b"tIME":
            yield png[position : position + 12 + length]
        position += 12 + length
