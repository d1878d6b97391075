"""How many pages a TIFF has, counted up to a limit: following their chain costs hardly more than reading it."""

from __future__ import annotations

import struct
from pathlib import Path

CLASSIC, BIG = 42, 43


def count_pages(path: Path, most: int) -> int:
    """Pages of a TIFF or BigTIFF (TIFF 6.0, section 2); more than `most` are not counted further.

    A chain that leads back to one of its own pages is as good as endless and gives `most` + 1.

    Raises:
        ValueError: it does not begin like a TIFF.
    """
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = int.from_bytes(head[2:4], "little" if order == "<" else "big")
        if not order or version not in (CLASSIC, BIG) or len(head) < 8:
            msg = "no TIFF header"
            raise ValueError(msg)
        offset_code, count_code, entry_bytes = ("L", "H", 12) if version == CLASSIC else ("Q", "Q", 20)
        following, counting = struct.Struct(order + offset_code), struct.Struct(order + count_code)
        (at,) = following.unpack_from(head.ljust(16, b"\0"), 4 if version == CLASSIC else 8)
        pages, seen = 0, set()
        while at and pages <= most:
            if at in seen or at >= 1 << 63:
                return most + 1
            seen.add(at)
            pages += 1
            file.seek(at)
            count = file.read(counting.size)
            if len(count) < counting.size:
                break
            entries = counting.unpack(count)[0] * entry_bytes
            if entries >= 1 << 62:
                break
            file.seek(entries, 1)
            link = file.read(following.size)
            at = following.unpack(link)[0] if len(link) == following.size else 0
    return pages
