"""What a JPEG, JPEG-LS or JPEG 2000 codestream says about itself: its size and its true colours.

Only the few markers that answer these are read. A codestream is believed before the DICOM tags that describe
it, for the tags of many colour files are wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_SOF_LS = 0xF7
_NOT_SOF = (0xC4, 0xC8, 0xCC)
_JFIF = 0xE0
_ADOBE = 0xEE


class Claim(NamedTuple):
    """What a codestream says that it decodes to."""

    rows: int
    columns: int
    components: int
    bits: int
    """Of the first component."""


def claim(raw: bytes) -> Claim | None:
    """What a codestream claims; None if it is none of the kinds known here."""
    start = _jpeg2000_start(raw)
    if start is not None:
        x1, y1, x0, y0 = struct.unpack(">4L", raw[start + 8 : start + 24])
        components, depth = struct.unpack(">HB", raw[start + 40 : start + 43])
        return Claim(y1 - y0, x1 - x0, components, (depth & 0x7F) + 1)
    for marker, body in _jpeg_segments(raw):
        if _is_frame_header(marker) and len(body) >= 6:
            bits, rows, columns, components = struct.unpack(">BHHB", body[:6])
            return Claim(rows, columns, components, bits)
    return None


def photometric(raw: bytes, tagged: str) -> str:
    """The colours in which a frame of three components is stored: those of the codestream, if it tells.

    Args:
        raw: one compressed frame.
        tagged: what the DICOM header says.
    """
    start = _jpeg2000_start(raw)
    if start is not None:
        # A component transform turns RGB into something else and back: it tells RGB, whatever the tag.
        return "YBR_RCT" if tagged.startswith("YBR_FULL") and _has_component_transform(raw, start) else tagged
    adobe, jfif, named_rgb, subsampled = None, False, False, False
    for marker, body in _jpeg_segments(raw):
        if marker == _ADOBE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == _JFIF and body[:4] == b"JFIF":
            jfif = True
        elif _is_frame_header(marker) and len(body) >= 15 and body[5] == 3:
            named_rgb = body[6:15:3] in (b"RGB", b"rgb")
            subsampled = body[7] != body[10] or body[7] != body[13]
    if named_rgb or (adobe == 0 and not subsampled):
        return "RGB"
    if jfif or adobe == 1 or subsampled:  # nobody halves red and blue
        return "YBR_FULL"
    return tagged


def _is_frame_header(marker: int) -> bool:
    return (0xC0 <= marker <= 0xCF and marker not in _NOT_SOF) or marker == _SOF_LS


def _jpeg2000_start(raw: bytes) -> int | None:
    """Where a JPEG 2000 codestream begins; boxes may stand before it."""
    start = raw.find(b"\xff\x4f\xff\x51", 0, 256)
    return start if start >= 0 and len(raw) >= start + 43 else None


def _has_component_transform(raw: bytes, start: int) -> bool:
    at = start + 2
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], struct.unpack(">H", raw[at + 2 : at + 4])[0]
        if marker == 0x52:  # COD: style, progression, layers, then the transform
            return len(raw) > at + 8 and raw[at + 8] == 1
        if marker == 0x90 or length < 2:  # first tile
            return False
        at += 2 + length
    return False


def _jpeg_segments(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers before the first scan, with what follows their length."""
    if raw[:2] != b"\xff\xd8":
        return
    at = 2
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = struct.unpack(">H", raw[at + 2 : at + 4])[0]
        if marker == 0xDA or length < 2:
            return
        yield marker, raw[at + 4 : at + 2 + length]
        at += 2 + length
