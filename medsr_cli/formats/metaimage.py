"""MetaImage files (.mha, and .mhd with its data beside it): read and written slice by slice.

Parsed here rather than by ITK, so that compressed files stream too; ITK's reading of the same files is the measure
(tests/formats/test_itk.py).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.compression import Encoding, decoded, encoding_into
from medsr_cli.formats.contract import Derivation, Pixels, Reader, ReadOptions
from medsr_cli.formats.detached import beside
from medsr_cli.formats.limits import Limits, allowed
from medsr_cli.formats.stale_keys import is_stale
from medsr_cli.formats.voxel_stream import (
    ByteSource,
    OutputGrid,
    VoxelOrder,
    VoxelSink,
    check_copy,
    chosen_slice_axis,
    output_grid,
    read_slices,
    sinking,
    usable_affine,
)
from medsr_cli.volume.geometry import LPS_FROM_RAS, Affine, spacings_mm
from medsr_cli.volume.volume import Volume

LINE_BYTES = 1 << 20

_CODES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items() if name not in ("MET_LONG", "MET_ULONG")}

_ALIASES = {
    "Rotation": "TransformMatrix", "Orientation": "TransformMatrix",
    "Position": "Offset", "Origin": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip
_REPLACED = {
    "ObjectType", "NDims", "BinaryData", "BinaryDataByteOrderMSB", "CompressedData", "CompressedDataSize", "DimSize",
    "TransformMatrix", "Offset", "ElementSpacing", "ElementSize", "ElementType", "ElementNumberOfChannels",
    "ElementDataFile", "HeaderSize", "ElementMin", "ElementMax",
}  # fmt: skip
"""Keys that a finer grid or another way of storing changes; all others are copied."""

_SIZE_DIGITS = 15
"""Room in the header for the number of compressed bytes, which is known only after they are written."""


class MetaImageReader:
    """An opened MetaImage."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        with refusing(path, "has a MetaImage header that cannot be understood"):
            self.keys, self._header_bytes = read_header(path, options.limits)
            self.sizes = [int(text) for text in self.keys["DimSize"].split()]
            _check_kind(self.keys, self.sizes, path)
            self.affine = _affine(self.keys, path)
            self.encoding: Encoding = "zlib" if _is_true(self.keys.get("CompressedData", "False")) else "raw"
            name = self.keys["ElementDataFile"]
            self._data_path = path if name.upper() == "LOCAL" else beside(path, name)
            self._order = self._voxel_order(options)
            self._offset = self._data_offset()
            available = self._data_path.stat().st_size - self._offset
            self._order.check(path, options.limits, available=available, encoding=self.encoding)
            self.volume = self._volume()

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        return read_slices(self._opened, self._order, self.path)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """What the header says about the file itself."""
        return {
            "encoding": self.encoding,
            "detached": self._data_path != self.path,
            "volumes": self._order.volumes,
        }

    def _voxel_order(self, options: ReadOptions) -> VoxelOrder:
        i, j, k, volumes = [*self.sizes, 1, 1][:4]
        spacing = spacings_mm(self.affine)
        flat = len(self.sizes) == 2
        axis = 2 if flat else chosen_slice_axis(options.axis, (i, j, k), self.affine, spacing, self.path)
        big = _is_true(self.keys.get("BinaryDataByteOrderMSB", "False"))
        dtype = np.dtype((">" if big else "<") + _code(self.keys))
        return VoxelOrder((i, j, k), dtype, volumes, int(self.keys.get("ElementNumberOfChannels", "1")), axis)

    def _data_offset(self) -> int:
        header_size = int(self.keys.get("HeaderSize", "0"))
        if header_size == -1 and self.encoding == "raw":
            return max(self._data_path.stat().st_size - self._order.total_bytes, 0)
        if header_size < 0:
            msg = f"{mention(self.path.name)} has a HeaderSize that cannot be."
            raise InputRefused(msg)
        return header_size or (self._header_bytes if self._data_path == self.path else 0)

    def _volume(self) -> Volume:
        order = self._order
        spacing = spacings_mm(self.affine)
        rows, columns = order.plane_axes
        detached = self._data_path != self.path
        return Volume(
            format="metaimage",
            rows=order.plane_shape[0],
            columns=order.plane_shape[1],
            slices=order.slices,
            dtype=order.dtype.newbyteorder("="),
            channels=order.channels,
            alpha=order.channels == 4,
            array_shape=tuple(self.sizes),
            slice_axis=order.slice_axis,
            plane_axes=order.plane_axes,
            spacing_mm=(spacing[rows], spacing[columns]),
            slice_spacing_mm=None if len(self.sizes) == 2 else spacing[order.slice_axis],
            affine=self.affine,
            warnings=("The result is one .mha file, although the input is a header with a data file.",)
            if detached
            else (),
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[ByteSource]:
        with decoded(self._data_path, self.encoding, self._offset) as source:
            yield source


def open_reader(path: Path, options: ReadOptions) -> Reader:
    """Open a MetaImage.

    Raises:
        InputRefused: it is damaged, claims too much, or is of a kind that is not read.
    """
    return MetaImageReader(path, options)


@contextlib.contextmanager
def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> Iterator[VoxelSink]:
    """Write a MetaImage of one file; what a source MetaImage says beyond its grid is kept.

    Raises:
        ArgumentsError: the target is to be a header with a data file, or exists.
        RunError: writing failed.
    """
    if target.suffix.lower() == ".mhd":
        msg = f"{mention(target.name)} would be two files, which cannot appear at once."
        raise ArgumentsError(msg, "Name the output .mha: header and data in one file.")
    origin = source if isinstance(source, MetaImageReader) else None
    grid = output_grid(result, keep_axes=origin is not None)
    dtype = result.dtype.newbyteorder("<")
    if dtype.str[1:] not in _NAMES:
        msg = f"MetaImage does not hold {result.dtype} values."
        raise ArgumentsError(msg, "Choose another format with -o.")
    order = VoxelOrder(grid.shape, dtype, grid.volumes, result.channels, grid.slice_axis)
    packed = origin is None or origin.encoding == "zlib"
    lines = _header_lines(origin, grid, order, packed, derivation)

    def verify(temporary: Path) -> None:
        check_copy(MetaImageReader(temporary, ReadOptions(axis="2")), order, target)

    with atomic_file(target, overwrite=overwrite, verify=verify) as file:
        header = "\n".join([*lines, ""]).encode("latin-1", "replace")
        file.write(header)
        with encoding_into(file, "zlib" if packed else "raw") as write, sinking(order, write, target) as sink:
            yield sink
        if packed:
            _write_size(file, header)


def _write_size(file: BinaryIO, header: bytes) -> None:
    size = file.tell() - len(header)
    file.seek(header.index(b"CompressedDataSize = ") + len(b"CompressedDataSize = "))
    file.write(f"{size:0{_SIZE_DIGITS}d}".encode("ascii"))
    file.seek(0, 2)


def read_header(path: Path, limits: Limits | None = None) -> tuple[dict[str, str], int]:
    """Keys and values of a MetaImage header, in its order, and the bytes that it takes.

    Args:
        path: the .mha or .mhd file.
        limits: how long a header may be; None for the limits that hold here.

    Raises:
        InputRefused: a line is no key with a value, there is no end to them, or a necessary one is missing.
    """
    keys: dict[str, str] = {}
    limits = limits or allowed()
    lines = 0
    with path.open("rb") as file:
        while "ElementDataFile" not in keys:
            line = file.readline(LINE_BYTES)
            name, equals, value = line.decode("latin-1").partition("=")
            lines += 1
            endless = len(line) == LINE_BYTES or lines > limits.text_lines or file.tell() > limits.text_bytes
            if not equals or endless:
                msg = f"{mention(path.name)} has a MetaImage header that is cut short, or a line in it that is no key."
                raise InputRefused(msg)
            name = name.strip()
            keys[_ALIASES.get(name, name)] = value.strip()
        for name in ("NDims", "DimSize", "ElementType"):
            if name not in keys:
                msg = f"{mention(path.name)} has no {name} in its MetaImage header."
                raise InputRefused(msg)
        return keys, file.tell()


def _check_kind(keys: Mapping[str, str], sizes: Sequence[int], path: Path) -> None:
    if keys.get("ObjectType", "Image") != "Image":
        msg = f"{mention(path.name)} holds a shape or a transform, not an image."
        raise InputRefused(msg)
    if len(sizes) != int(keys["NDims"]) or len(sizes) not in (2, 3, 4) or min(sizes) < 1:
        msg = f"{mention(path.name)} is not a picture, a volume or a series of volumes."
        raise InputRefused(msg)
    if not _is_true(keys.get("BinaryData", "True")):
        msg = f"{mention(path.name)} holds its voxels as text, which is not read."
        raise InputRefused(msg, "Save it in binary.")
    name = keys["ElementDataFile"]
    if name.split()[:1] in ([], ["LIST"]) or "%" in name:
        msg = f"{mention(path.name)} spreads its voxels over several files, which is not read."
        raise InputRefused(msg, "Save it as one .mha file.")
    channels = int(keys.get("ElementNumberOfChannels", "1"))
    if channels != 1 and (channels not in (3, 4) or _code(keys) not in ("u1", "u2")):
        msg = f"{mention(path.name)} holds {channels} components per voxel that are not colours."
        raise InputRefused(msg, "Split it into single volumes.")


def _code(keys: Mapping[str, str]) -> str:
    return _CODES[keys["ElementType"].removesuffix("_ARRAY")]


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _affine(keys: Mapping[str, str], path: Path) -> Affine:
    """Array index to RAS+ millimetres. Rows of TransformMatrix are the directions of the axes, in LPS."""
    n = int(keys["NDims"])
    directions = _numbers(keys, "TransformMatrix", n * n, np.eye(n).ravel()).reshape(n, n)
    steps = _numbers(keys, "ElementSpacing", n, _numbers(keys, "ElementSize", n, np.ones(n)))
    offset = _numbers(keys, "Offset", n, np.zeros(n))
    if n == 4 and (directions[3, :3].any() or directions[:3, 3].any()):
        msg = f"{mention(path.name)} has directions in which time and space are mixed."
        raise InputRefused(msg)
    m = min(n, 3)
    matrix = np.eye(4)
    matrix[:m, :m] = directions[:m, :m].T * steps[:m]
    matrix[:m, 3] = offset[:m]
    return usable_affine(LPS_FROM_RAS @ matrix, path)


def _numbers(keys: Mapping[str, str], name: str, count: int, default: NDArray[np.float64]) -> NDArray[np.float64]:
    if name not in keys:
        return default
    values = np.array([float(text) for text in keys[name].split()])
    if len(values) != count:
        raise ValueError(name)
    return values


def _header_lines(
    origin: MetaImageReader | None, grid: OutputGrid, order: VoxelOrder, packed: bool, derivation: Derivation
) -> list[str]:
    keys: dict[str, str] = dict(origin.keys) if origin else {}
    n = len(origin.sizes) if origin else grid.dimensions
    if origin is None and n == 2 and grid.affine is not None:
        n = 3  # its place in the patient needs three axes
    lines = ["ObjectType = Image", f"NDims = {n}", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    lines.append(f"CompressedData = {packed}")
    if packed:
        lines.append(f"CompressedDataSize = {'0' * _SIZE_DIGITS}")
    lines += _placed(keys, grid, n)
    lines += [f"{key} = {value}" for key, value in keys.items() if key not in _REPLACED and not is_stale(key)]
    lines += [f"{name} = {text}" for name, text in derivation.fields().items()]
    lines.append("DimSize = " + " ".join(map(str, (*grid.shape, grid.volumes)[:n])))
    if order.channels > 1:
        lines.append(f"ElementNumberOfChannels = {order.channels}")
    lines.append(f"ElementType = {_NAMES[order.dtype.str[1:]]}")
    lines.append("ElementDataFile = LOCAL")
    return lines


def _placed(keys: Mapping[str, str], grid: OutputGrid, n: int) -> Iterator[str]:
    """Where the voxels lie; the fourth axis is copied."""
    m = min(n, 3)
    step = _numbers(keys, "ElementSpacing", n, _numbers(keys, "ElementSize", n, np.ones(n))).copy()
    if grid.affine is not None:
        own = LPS_FROM_RAS @ grid.affine
        step[:m] = np.linalg.norm(own[:3, :m], axis=0)
        directions = np.eye(n)
        directions[:m, :m] = (own[:m, :m] / step[:m]).T
        offset = _numbers(keys, "Offset", n, np.zeros(n)).copy()
        offset[:m] = own[:m, 3]
        yield f"TransformMatrix = {_text(directions.ravel())}"
        yield f"Offset = {_text(offset)}"
    elif grid.spacing_mm is not None:
        step[:m] = grid.spacing_mm[:m]
    yield f"ElementSpacing = {_text(step)}"
    if "ElementSize" in keys:
        sizes = _numbers(keys, "ElementSize", n, step)
        before = _numbers(keys, "ElementSpacing", n, sizes)
        yield f"ElementSize = {_text(sizes * step / before)}"


def _text(values: NDArray[np.float64]) -> str:
    return " ".join(re.sub(r"\.0$", "", repr(float(value) + 0.0)) for value in values)
