"""Walking the nested data sets of a DICOM header, with limits on how many and how deep they are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from pydicom.dataset import Dataset

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.limits import Limits

UNDEFINED = 0xFFFFFFFF
_ITEM = (0xFFFE, 0xE000)
_PIXELS = frozenset({(0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010)})
_LENGTH_OF_32_BITS = frozenset({
    b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"
})  # fmt: skip
"""Value representations whose length takes 32 bits behind 16 that are reserved (PS3.5, section 7.1.2)."""
_META_BYTES = 132
_WINDOW_BYTES = 1 << 14
_FRAGMENTED = (b"OB", b"OW")
_NESTING = (b"SQ", b"UN", b"")
"""What may hold items; the last stands for an element in implicit VR."""


def nested(ds: Dataset) -> Iterator[tuple[Dataset, bool]]:
    """Data sets one level below `ds`, and whether they are inside a private sequence."""
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                yield item, element.tag.is_private


def check_depth(ds: Dataset, limit: int, name: str) -> None:
    """Refuse sequences that are nested deeper than `limit`.

    Raises:
        InputRefused: they are.
    """
    level = [ds]
    for _ in range(limit):
        level = [item for parent in level for item, _ in nested(parent)]
        if not level:
            return
    raise _too_deep(name, limit)


def check_header(file: IO[bytes], size: int, name: str, limits: Limits, *, implicit: bool, big: bool) -> None:
    """Count what a header has without building any of it, so that a large one is refused before it takes memory.

    Args:
        file: the file, with its file meta information; where it stands afterwards is not defined.
        size: its bytes.
        name: what a sentence calls it.
        limits: the ceilings: depth, elements, bytes of the header and of its private elements.
        implicit: whether the data set is in implicit VR.
        big: whether it is in big endian.

    Raises:
        InputRefused: it has more than is allowed.
    """
    walk = _Walk(file, size, implicit, big)
    most = limits.most_elements(size)
    private = 0
    deepest = 2 * limits.sequence_depth
    for elements, (group, length) in enumerate(walk, 1):
        if group % 2 and not walk.ends:
            private += length
        if elements > most:
            raise _too_large(name, f"has more than {most} header elements")
        if private > limits.private_bytes:
            raise _too_large(name, f"has more than {limits.private_bytes} bytes of private elements")
        if len(walk.ends) > deepest:
            raise _too_deep(name, limits.sequence_depth)
        if walk.at > limits.header_bytes:
            raise _too_large(name, f"has more than {limits.header_bytes} bytes beside its pixels")


class _Walk:
    """Group and length of every element up to the pixels, nested ones too; sequences have length 0."""

    def __init__(self, file: IO[bytes], size: int, implicit: bool, big: bool) -> None:
        self.at = _META_BYTES
        self.ends: list[int] = []
        """Where the open sequences and items end, outermost first."""
        self._file, self._size = file, size
        self._implicit, self._order = implicit, ">" if big else "<"
        self._window, self._window_at = b"", 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Millions of elements may come by, so that there are few calls here.
        starts = {order: struct.Struct(f"{order}HHL") for order in "<>"}
        ends = self.ends
        while True:
            while ends and self.at >= ends[-1]:
                ends.pop()
            head = self._head()
            if len(head) < 8:
                return
            meta = not ends and head[:2] == b"\2\0"
            order = "<" if meta else self._order
            group, element, length = starts[order].unpack(head[:8])
            if group == 0xFFFE:
                self._delimited(element, length)
                continue
            if group == 0x7FE0 and (group, element) in _PIXELS and not ends:
                return
            vr, size = head[4:6], 8
            if (meta or not self._implicit) and vr.isalpha() and vr.isupper():
                if vr in _LENGTH_OF_32_BITS:
                    size = 12
                    length = struct.unpack(f"{order}L", head[8:12].ljust(4, b"\0"))[0]
                else:
                    length = length >> 16 if order == "<" else length & 0xFFFF
            else:
                vr = b""
            self.at += size
            if length == UNDEFINED or (length >= 8 and vr in _NESTING):
                inside = struct.unpack(f"{order}HH", head[size : size + 4].ljust(4, b"\0")) == _ITEM
                length = self._entered(vr, length, inside)
            else:
                self.at += length
            yield group, length

    def _head(self) -> bytes:
        """The next 16 bytes, fewer at the end."""
        start = self.at - self._window_at
        if not 0 <= start <= len(self._window) - 16:
            self._file.seek(self.at)
            self._window, self._window_at, start = self._file.read(_WINDOW_BYTES), self.at, 0
        return self._window[start : start + 16]

    def _entered(self, vr: bytes, length: int, inside: bool) -> int:
        """Go to what follows: the first item of a sequence, or the next element; bytes that were passed over."""
        if length == UNDEFINED and vr in _FRAGMENTED:
            start = self.at
            self._pass_fragments()
            return self.at - start
        if length == UNDEFINED or inside:
            self.ends.append(self._size if length == UNDEFINED else self.at + length)
            return 0
        self.at += length
        return length

    def _delimited(self, element: int, length: int) -> None:
        self.at += 8
        if element == _ITEM[1]:
            self.ends.append(self._size if length == UNDEFINED else self.at + length)
        elif self.ends:
            self.ends.pop()

    def _pass_fragments(self) -> None:
        while True:
            head = self._head()[:8]
            self.at += 8  # of the item, or of the delimiter
            if len(head) < 8 or head[:4] != b"\xfe\xff\x00\xe0":
                return
            self.at += int(struct.unpack("<L", head[4:])[0])


def _too_deep(name: str, limit: int) -> InputRefused:
    return InputRefused(f"{mention(name)} nests sequences more than {limit} deep.")


def _too_large(name: str, why: str) -> InputRefused:
    return InputRefused(f"{mention(name)} {why}, which is more than is allowed.", "Check the header.")
