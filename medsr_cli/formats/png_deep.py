"""Colours of 16 bits as PNG, which Pillow does not write, and ITK only to a path of its own, past the disk's errors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.formats.png_chunks import SIGNATURE

_COLOUR_TYPES = {3: 2, 4: 6}
"""By channels (PNG specification, section 11.2.1)."""

Lines = NDArray[np.uint8]


def encoded(pixels: NDArray[Any]) -> bytes:
    """A PNG of a slice.

    Args:
        pixels: (3 or 4, rows, columns), uint16.
    """
    channels, rows, columns = pixels.shape
    head = struct.pack(">2I5B", columns, rows, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    lines = np.ascontiguousarray(np.moveaxis(pixels, 0, -1), ">u2").view(np.uint8).reshape(rows, -1)
    packer = zlib.compressobj(6)
    packed = b"".join(packer.compress(line) for line in _filtered(lines, 2 * channels)) + packer.flush()
    parts = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def _filtered(lines: Lines, step: int) -> Iterator[bytes]:
    """Each line by the filter (section 9.2) after which its bytes, taken as signed, are smallest in all."""
    above = np.zeros_like(lines[0])
    for line in lines:
        left, corner = _moved(line, step), _moved(above, step)
        candidates = (line, line - left, line - above, line - _paeth(left, above, corner))
        sums = [int(np.abs(candidate.view(np.int8).astype(np.int16)).sum()) for candidate in candidates]
        best = int(np.argmin(sums))
        yield bytes([(0, 1, 2, 4)[best]]) + candidates[best].tobytes()
        above = line


def _moved(line: Lines, step: int) -> Lines:
    """The bytes one pixel to the left of each, zero before the first."""
    moved = np.zeros_like(line)
    moved[step:] = line[:-step]
    return moved


def _paeth(left: Lines, above: Lines, corner: Lines) -> Lines:
    """Whichever of the three is nearest to left + above - corner (section 9.4)."""
    a, b, c = (part.astype(np.int16) for part in (left, above, corner))
    to_left, to_above, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where(to_above <= to_corner, above, corner)
    return np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest).astype(np.uint8)
