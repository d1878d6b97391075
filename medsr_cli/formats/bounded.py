"""Files of which never more is read than they have.

A file of Python takes the memory that a read asks for before it looks whether there is as much to read. Readers that
believe the lengths in a file would let a few bytes claim gigabytes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path


class BoundedFile(io.BufferedReader):
    """A file opened for reading; a read takes memory for what is there, whatever it asks for."""

    raw: io.FileIO

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes; all that are left where it is negative or None."""
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(self._size - self.tell(), 0))
        return super().read(size)


def open_bounded(path: Path) -> BoundedFile:
    """Open a file for reading in binary."""
    return BoundedFile(io.FileIO(path))
