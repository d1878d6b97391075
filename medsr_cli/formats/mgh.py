"""FreeSurfer volumes (.mgz, .mgh): nibabel reads and fills the header, voxels stream past it.

An .mgz that carries tags behind its voxels (command history, talairach transform) keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader, MGHImage

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.compression import Encoding, decoded, encoding_into
from medsr_cli.formats.contract import Derivation, Pixels, Reader, ReadOptions
from medsr_cli.formats.voxel_stream import (
    ByteSource,
    OutputGrid,
    VoxelOrder,
    VoxelSink,
    check_copy,
    chosen_slice_axis,
    output_grid,
    read_exactly,
    read_slices,
    sinking,
    skip_bytes,
    usable_affine,
)
from medsr_cli.volume.geometry import Affine, spacings_mm
from medsr_cli.volume.volume import Volume

_HEADER: Any = MGHHeader  # nibabel has no types
_IMAGE: Any = MGHImage

DATA_OFFSET = 284
TRAILER_BYTES = 16 << 20
"""More than this behind the voxels is not kept."""
_HELD = {"u1": "uint8", "u2": "uint16", "i2": "int16", "i4": "int32", "f4": "float32"}


class MghReader:
    """An opened .mgz or .mgh."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        with refusing(path, "has an MGH header that cannot be understood"):
            with path.open("rb") as file:
                self.encoding: Encoding = "gzip" if file.read(2) == b"\x1f\x8b" else "raw"
            with decoded(path, self.encoding) as source:
                self.header = _HEADER(read_exactly(source, DATA_OFFSET, path))
            i, j, k, volumes = (int(size) for size in self.header["dims"])
            if min(i, j, k, volumes) < 1:
                msg = f"{mention(path.name)} has no voxels."
                raise InputRefused(msg)
            with np.errstate(all="ignore"):  # what overflows is refused in the next line
                affine = np.asarray(self.header.get_affine(), np.float64)
            self.affine: Affine = usable_affine(affine, path)
            axis = chosen_slice_axis(options.axis, (i, j, k), self.affine, spacings_mm(self.affine), path)
            self._order = VoxelOrder((i, j, k), self.header.get_data_dtype(), volumes, 1, axis)
            available = path.stat().st_size - DATA_OFFSET
            self._order.check(path, options.limits, available=available, encoding=self.encoding)
            self.volume = self._volume()

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        return read_slices(self._opened, self._order, self.path)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """What the header says about the file itself."""
        return {"encoding": self.encoding, "volumes": self._order.volumes}

    def trailer(self) -> bytes:
        """Scan parameters and tags behind the voxels; they do not depend on the grid."""
        with refusing(self.path), self._opened() as source:
            skip_bytes(source, self._order.total_bytes, self.path)
            parts: list[bytes] = []
            while (part := source.read(1 << 16)) and len(parts) << 16 < TRAILER_BYTES:
                parts.append(part)
        return b"".join(parts)

    def _volume(self) -> Volume:
        order = self._order
        spacing = spacings_mm(self.affine)
        rows, columns = order.plane_axes
        return Volume(
            format="mgh",
            rows=order.plane_shape[0],
            columns=order.plane_shape[1],
            slices=order.slices,
            dtype=order.dtype.newbyteorder("="),
            array_shape=(*order.shape, order.volumes) if order.volumes > 1 else order.shape,
            slice_axis=order.slice_axis,
            plane_axes=order.plane_axes,
            spacing_mm=(spacing[rows], spacing[columns]),
            slice_spacing_mm=spacing[order.slice_axis],
            affine=self.affine,
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[ByteSource]:
        with decoded(self.path, self.encoding) as source:
            skip_bytes(source, DATA_OFFSET, self.path)
            yield source


def open_reader(path: Path, options: ReadOptions) -> Reader:
    """Open an .mgz or .mgh.

    Raises:
        InputRefused: it is damaged or claims too much.
    """
    return MghReader(path, options)


@contextlib.contextmanager
def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> Iterator[VoxelSink]:
    """Write an .mgz or .mgh. The format has no free text, so that `derivation` is in the report alone.

    Raises:
        ArgumentsError: MGH cannot hold the values, or the image does not say how it lies.
        RunError: writing failed.
    """
    del derivation
    origin = source if isinstance(source, MghReader) else None
    grid = output_grid(result, keep_axes=origin is not None)
    dtype = result.dtype.newbyteorder(">")
    if result.dtype.str[1:] not in _HELD or result.channels != 1:
        msg = f"{mention(target.name)} cannot hold {result.dtype} values in {result.channels} channels."
        raise ArgumentsError(msg, f"MGH holds {', '.join(_HELD.values())}; name the output .nii.gz instead.")
    if grid.affine is None:
        msg = f"{mention(target.name)} needs a place in the patient, which the input does not have."
        raise ArgumentsError(msg, "Choose a picture format with -o.")
    order = VoxelOrder(grid.shape, dtype, grid.volumes, 1, grid.slice_axis)
    head = _header_bytes(origin, grid, grid.affine, dtype)
    trailer = origin.trailer() if origin else b""

    def verify(temporary: Path) -> None:
        check_copy(MghReader(temporary, ReadOptions(axis="2")), order, target)

    packed = target.suffix.lower() != ".mgh"
    with (
        atomic_file(target, overwrite=overwrite, verify=verify) as file,
        encoding_into(file, "gzip" if packed else "raw") as write,
    ):
        write(head)
        with sinking(order, write, target) as sink:
            yield sink
        write(trailer)


def _header_bytes(origin: MghReader | None, grid: OutputGrid, affine: Affine, dtype: np.dtype[np.generic]) -> bytes:
    """The first 284 bytes, filled by nibabel from an image that has the shape and takes no memory."""
    header = _HEADER() if origin is None else origin.header.copy()
    header.set_data_dtype(dtype.newbyteorder("="))
    shape = (*grid.shape, grid.volumes)
    image = _IMAGE(np.broadcast_to(np.zeros((), dtype), shape), affine, header)
    image.update_header()
    buffer = BytesIO()
    image.header.writehdr_to(buffer)
    return buffer.getvalue().ljust(DATA_OFFSET, b"\0")
