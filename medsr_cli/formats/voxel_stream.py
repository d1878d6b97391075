"""Slices out of, and into, a plain run of voxels: what NRRD, MetaImage, MGH and AFNI files are behind a header.

The first array axis runs fastest, channels are innermost, volumes of a 4D image follow each other. Slices along
the last spatial axis pass straight through; slices along another axis go, one volume at a time, through a temporary
file (`spool`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, RunError, mention
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.contract import Pixels, Reader
from medsr_cli.formats.limits import DEFLATE_EXPANSION, Limits
from medsr_cli.formats.spool import SliceSpool
from medsr_cli.volume.geometry import (
    Affine,
    is_usable,
    slice_axis_from_spacing,
    slice_axis_of_plane,
    spacings_mm,
)
from medsr_cli.volume.volume import Volume

_PLANE_AXES = {0: (2, 1), 1: (2, 0), 2: (1, 0)}
"""Array axes of rows and columns for each slice axis."""


class ByteSource(Protocol):
    """What is read from: a file, or a decoder over one."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@dataclass(frozen=True)
class VoxelOrder:
    """How voxels follow each other, and which way they are cut into slices."""

    shape: tuple[int, int, int]
    """Voxels along the array axes i, j, k; i runs fastest."""
    dtype: np.dtype[Any]
    """As stored, byte order included."""
    volumes: int = 1
    channels: int = 1
    slice_axis: int = 2

    @property
    def plane_axes(self) -> tuple[int, int]:
        """Array axes that rows and columns run along."""
        return _PLANE_AXES[self.slice_axis]

    @property
    def plane_shape(self) -> tuple[int, int]:
        """Rows and columns of a slice."""
        rows, columns = self.plane_axes
        return self.shape[rows], self.shape[columns]

    @property
    def slices(self) -> int:
        """Slices of all volumes."""
        return self.shape[self.slice_axis] * self.volumes

    @property
    def plane_bytes(self) -> int:
        """Bytes of one step along k."""
        return self.shape[0] * self.shape[1] * self.channels * self.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all voxels."""
        return self.plane_bytes * self.shape[2] * self.volumes

    def spool(self, folder: Path | None) -> SliceSpool:
        """A temporary file in which the slices of one volume that lie across the order are whole."""
        i, j, k = self.shape
        return SliceSpool((k, j, i), 2 - self.slice_axis, self.channels * self.dtype.itemsize, folder)

    def check(self, path: Path, limits: Limits, *, available: int, encoding: str) -> None:
        """Compare what is claimed with the limits and with the bytes that are there.

        Args:
            path: the file that makes the claim.
            limits: the ceilings.
            available: bytes of the file that holds the voxels, from the first voxel on.
            encoding: how those bytes are compressed: `raw`, `gzip`, `zlib` or `bzip2`.

        Raises:
            InputRefused: the claim is over a limit, or the file is too short for it.
        """
        rows, columns = self.plane_shape
        limits.check_size(path, rows, columns, self.slices, self.channels * self.dtype.itemsize)
        if encoding != "raw":
            most = DEFLATE_EXPANSION if encoding in ("gzip", "zlib") else None
            limits.check_expansion(path, self.total_bytes, max(available, 0), most)
        elif available < self.total_bytes:
            msg = f"{mention(path.name)} is cut short: it has fewer voxels than its header says."
            raise InputRefused(msg)


@dataclass(frozen=True)
class OutputGrid:
    """The array that a result becomes in a file of plain voxels."""

    shape: tuple[int, int, int]
    volumes: int
    slice_axis: int
    affine: Affine | None
    spacing_mm: tuple[float, float, float] | None
    dimensions: int
    """2 for a single picture, 3 for a volume, 4 for several volumes."""


def output_grid(result: Volume, *, keep_axes: bool) -> OutputGrid:
    """Where the slices of `result` go.

    Args:
        result: what is written.
        keep_axes: whether `result.array_shape` is in this room's own order (i, j, k, volumes). Otherwise the array
            becomes (columns, rows, slices), and the affine's columns follow, so that every voxel keeps its place.
    """
    volumes = int(np.prod(result.array_shape[3:], dtype=np.int64)) if len(result.array_shape) > 3 else 1
    if keep_axes:
        i, j, k = (*result.array_shape, 1)[:3]
        shape = (i, j, k)
        axes = (0, 1, 2)
        slice_axis = result.slice_axis
    else:
        shape = (result.columns, result.rows, result.slices // volumes)
        axes = (result.plane_axes[1], result.plane_axes[0], result.slice_axis)
        slice_axis = 2
    affine = None if result.affine is None else result.affine[:, [*axes, 3]]
    dimensions = 4 if volumes > 1 else 2 if len(result.array_shape) == 2 else 3
    return OutputGrid(shape, volumes, slice_axis, affine, _spacing_by_axis(result, slice_axis, affine), dimensions)


def _spacing_by_axis(result: Volume, slice_axis: int, affine: Affine | None) -> tuple[float, float, float] | None:
    if affine is not None:
        return spacings_mm(affine)
    if result.spacing_mm is None:
        return None
    spacing = [result.slice_spacing_mm or 1.0] * 3
    for axis, step in zip(_PLANE_AXES[slice_axis], result.spacing_mm, strict=True):
        spacing[axis] = step
    return spacing[0], spacing[1], spacing[2]


def chosen_slice_axis(
    axis: str,
    shape: tuple[int, int, int],
    affine: Affine | None,
    spacing_mm: tuple[float, float, float] | None,
    path: Path,
) -> int:
    """The array axis that `--axis` means for this image.

    Args:
        axis: `auto`, `0`, `1`, `2` or the name of an anatomical plane.
        shape: of the array.
        affine: array index to RAS+ millimetres, or None.
        spacing_mm: along the array axes, or None.
        path: for the sentence.

    Raises:
        InputRefused: a plane is named and the image does not say how it lies.
    """
    if axis in ("0", "1", "2"):
        return int(axis)
    if axis == "auto":
        return slice_axis_from_spacing(spacing_mm or (1.0, 1.0, 1.0), shape)
    if axis not in ("axial", "sagittal", "coronal"):
        msg = f"There is no slice axis {axis}."
        raise InputRefused(msg, "Give auto, axial, sagittal, coronal, 0, 1 or 2.")
    if affine is None:
        msg = f"{mention(path.name)} does not say how it lies in the patient."
        raise InputRefused(msg, "Give --axis 0, 1 or 2 in place of a plane.")
    return slice_axis_of_plane(affine, axis)  # type: ignore[arg-type]  # checked above


def usable_affine(affine: Affine, path: Path) -> Affine:
    """The affine itself.

    Raises:
        InputRefused: it is not finite, or maps the array to a plane or a point.
    """
    if not is_usable(affine):
        msg = f"{mention(path.name)} has directions or spacings that do not span a volume."
        raise InputRefused(msg, "Correct its header first.")
    return affine


def read_exactly(source: ByteSource, size: int, path: Path) -> bytes:
    """`size` bytes.

    Raises:
        InputRefused: the source ends before.
    """
    parts: list[bytes] = []
    missing = size
    while missing:
        part = source.read(missing)
        if not part:
            msg = f"{mention(path.name)} is cut short: it has fewer voxels than its header says."
            raise InputRefused(msg)
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def skip_bytes(source: ByteSource, size: int, path: Path) -> None:
    """Read and forget `size` bytes."""
    while size:
        size -= len(read_exactly(source, min(size, 1 << 20), path))


def read_slices(
    open_bytes: Callable[[], AbstractContextManager[ByteSource]], order: VoxelOrder, path: Path
) -> Iterator[Pixels]:
    """Every slice, (channels, rows, columns) in native byte order.

    Args:
        open_bytes: opens the source at the first voxel.
        order: how the voxels follow.
        path: the file that sentences name.

    Raises:
        InputRefused: the source is damaged or ends early.
    """
    with refusing(path), open_bytes() as source:
        for _ in range(order.volumes):
            yield from _along(source, order, path) if order.slice_axis == 2 else _across(source, order, path)
        source.read(1)  # beyond the last voxel a compressed file compares its checksum


def _along(source: ByteSource, order: VoxelOrder, path: Path) -> Iterator[Pixels]:
    for _ in range(order.shape[2]):
        yield _channels_first(_planes(read_exactly(source, order.plane_bytes, path), order)[0])


def _across(source: ByteSource, order: VoxelOrder, path: Path) -> Iterator[Pixels]:
    with order.spool(None) as spool:
        for first, planes in spool.slabs():
            data = read_exactly(source, planes * order.plane_bytes, path)
            spool.put_slab(first, np.frombuffer(data, spool.element).reshape(planes, order.shape[1], order.shape[0]))
        for index in range(spool.slices):
            data = spool.take_slice(index).tobytes()
            yield _channels_first(np.frombuffer(data, order.dtype).reshape(*order.plane_shape, order.channels))


def _planes(data: bytes, order: VoxelOrder) -> NDArray[Any]:
    """(k, j, i, channels)."""
    return np.frombuffer(data, order.dtype).reshape(-1, order.shape[1], order.shape[0], order.channels)


def _channels_first(plane: NDArray[Any]) -> Pixels:
    """A slice of its own, in native byte order."""
    moved = np.moveaxis(plane, -1, 0)
    return np.array(moved, dtype=plane.dtype.newbyteorder("="), order="C")


def check_copy(copy: Reader, order: VoxelOrder, target: Path) -> None:
    """Read what was written, opened with slices along the last axis, from its first byte to its last.

    Raises:
        RunError: it is not the image that was to be written.
    """
    try:
        ok = copy.volume.slices == order.shape[2] * order.volumes == sum(1 for _ in copy.slices())
    except InputRefused:
        ok = False
    volume = copy.volume
    found = (volume.columns, volume.rows, volume.channels, volume.dtype)
    if not ok or found != (*order.shape[:2], order.channels, order.dtype.newbyteorder("=")):
        msg = f"{mention(target.name)} could not be read back as it was written, and was discarded."
        raise RunError(msg, "Check the disk, and run it again.")


class VoxelSink:
    """Takes slices, gives out voxels in file order; memory does not grow with the number of slices."""

    clipped = 0
    warnings: tuple[str, ...] = ()

    def __init__(self, order: VoxelOrder, write: Callable[[bytes], object], scratch_folder: Path) -> None:
        """Args: the order to write in; where bytes go; a folder with room for one volume, if slices lie across."""
        self._order = order
        self._write = write
        self._taken = 0
        self._spool = None if order.slice_axis == 2 else order.spool(scratch_folder)

    def write(self, pixels: Pixels) -> None:
        """Take the next slice, (channels, rows, columns).

        Raises:
            RunError: it is not of the promised shape or type, or there is one too many.
        """
        order = self._order
        expected = (order.channels, *order.plane_shape)
        native = order.dtype.newbyteorder("=")
        if pixels.shape != expected or pixels.dtype != native or self._taken == order.slices:
            msg = f"A slice of {pixels.shape} {pixels.dtype} does not belong into this image of {expected} {native}."
            raise RunError(msg)
        data = np.moveaxis(pixels, 0, -1).astype(order.dtype).tobytes()
        index = self._taken % order.shape[order.slice_axis]
        self._taken += 1
        if self._spool is None:
            self._write(data)
            return
        self._spool.put_slice(index, np.frombuffer(data, self._spool.element))
        if index == self._spool.slices - 1:
            for first, planes in self._spool.slabs():
                self._write(self._spool.take_slab(first, planes).tobytes())

    def finish(self) -> None:
        """Check that all slices came.

        Raises:
            RunError: some are missing.
        """
        if self._taken != self._order.slices:
            msg = f"Only {self._taken} of {self._order.slices} slices were written."
            raise RunError(msg)

    def close(self) -> None:
        """Give the temporary file back."""
        if self._spool is not None:
            self._spool.__exit__(None, None, None)


@contextlib.contextmanager
def sinking(order: VoxelOrder, write: Callable[[bytes], object], target: Path) -> Iterator[VoxelSink]:
    """A sink for the slices of `target`, checked to be complete when the block ends without an error."""
    sink = VoxelSink(order, write, target.parent)
    try:
        yield sink
        sink.finish()
    finally:
        sink.close()
