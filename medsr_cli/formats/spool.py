"""Slices across the order in which a file stores them, through a temporary file instead of memory.

A stored volume runs plane after plane. Slices along another of its axes take a little from every plane, so
the volume passes once through a nameless temporary file in which every such slice lies in one piece. Memory
is bounded by a few planes, whatever their number; the file has no name, so nothing is left behind even by a
run that is killed.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import RunError, reason_of

SLAB_BYTES = 8 << 20
"""Planes that are turned at a time; there are two copies of them while they are."""


class SliceSpool:
    """One volume (planes, lines, elements) in a temporary file, slice after slice along its second or third axis.

    Args:
        shape: planes, lines, elements: the stored volume, slowest axis first.
        axis: the axis of `shape` that slices are counted along, 1 or 2; the other two are rows and columns.
        item_bytes: bytes of one element.
        folder: where the temporary file lies; None is the system's folder for them ($TMPDIR).

    Raises:
        RunError: the temporary file cannot be written (the sentence says why), here and in every method.
    """

    def __init__(self, shape: tuple[int, int, int], axis: int, item_bytes: int, folder: Path | None = None) -> None:
        self._shape = shape
        self._axis = axis
        self.element = opaque_element(item_bytes)
        self.slices = shape[axis]
        self.rows = shape[0]
        self.columns = shape[3 - axis]
        self._slice_bytes = self.rows * self.columns * item_bytes
        plane_bytes = shape[1] * shape[2] * item_bytes
        self.slab_planes = min(max(SLAB_BYTES // plane_bytes, 1), shape[0])
        with _reported():
            # Unbuffered, and closed by `__exit__`.
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __enter__(self) -> SliceSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def slabs(self) -> Iterator[tuple[int, int]]:
        """First plane and number of planes of each piece that the volume is handled in."""
        for first in range(0, self._shape[0], self.slab_planes):
            yield first, min(self.slab_planes, self._shape[0] - first)

    def put_slab(self, first: int, slab: NDArray[Any]) -> None:
        """Store planes `first` and following, (planes, lines, elements)."""
        by_slice = np.ascontiguousarray(np.moveaxis(slab, self._axis, 0))
        for index, part in enumerate(by_slice):
            self._write(self._offset(index, first), part)

    def take_slab(self, first: int, planes: int) -> NDArray[Any]:
        """Planes `first` and following, (planes, lines, elements), from the slices that were put."""
        by_slice = np.empty((self.slices, planes, self.columns), self.element)
        for index, part in enumerate(by_slice):
            self._read(self._offset(index, first), part)
        return np.ascontiguousarray(np.moveaxis(by_slice, 0, self._axis))

    def put_slice(self, index: int, pixels: NDArray[Any]) -> None:
        """Store a whole slice, (rows, columns)."""
        self._write(self._offset(index, 0), np.ascontiguousarray(pixels))

    def take_slice(self, index: int) -> NDArray[Any]:
        """A whole slice, (rows, columns), as a fresh array."""
        pixels = np.empty((self.rows, self.columns), self.element)
        self._read(self._offset(index, 0), pixels)
        return pixels

    def _offset(self, index: int, row: int) -> int:
        return index * self._slice_bytes + row * self.columns * self.element.itemsize

    def _write(self, offset: int, pixels: NDArray[Any]) -> None:
        left = as_bytes(pixels)
        with _reported():
            self._file.seek(offset)
            while left:
                left = left[self._file.write(left) :]

    def _read(self, offset: int, pixels: NDArray[Any]) -> None:
        left = as_bytes(pixels)
        with _reported():
            self._file.seek(offset)
            while left:
                got = self._file.readinto(left)  # type: ignore[attr-defined]
                if not got:
                    raise OSError(errno.EIO, "the temporary file is shorter than what was written")
                left = left[got:]


def opaque_element(item_bytes: int) -> np.dtype[Any]:
    """A type of that many bytes which numpy moves as a whole; what it means does not matter here."""
    return np.dtype(f"u{item_bytes}") if item_bytes in (1, 2, 4, 8) else np.dtype(f"V{item_bytes}")


def as_bytes(pixels: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return pixels.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            msg = "The disk is full: there is no room for the temporary file of this volume."
            raise RunError(msg, "Free some space, or set TMPDIR to a larger disk.") from error
        msg = f"The temporary file of this volume failed: {reason_of(error)}."
        raise RunError(msg, "Set TMPDIR to a folder that can be written to.") from error
