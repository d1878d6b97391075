"""NRRD files (.nrrd, and .nhdr with its data beside it): read and written slice by slice.

The header is parsed here rather than by ITK, which can only hand out whole images of this format. What ITK makes of
the same files is the measure (tests/formats/test_itk.py): `space directions` and `space origin` count as ITK counts
them, and so does an unnamed space.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

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
    skip_bytes,
    usable_affine,
)
from medsr_cli.volume.geometry import Affine, spacings_mm
from medsr_cli.volume.volume import Volume

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}  # fmt: skip
_CODES = {name: code for code, names in _TYPES.items() for name in names}
_NAMES = {
    "i1": "int8", "u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "u4": "uint32",
    "i8": "int64", "u8": "uint64", "f4": "float", "f8": "double",
}  # fmt: skip

_SIGNS = {
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0),
    "lps": (-1.0, -1.0, 1.0),
}
"""Factors from a space's coordinates to RAS+."""

_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_ALIASES = {
    "centers": "centerings", "axismins": "axis mins", "axismaxs": "axis maxs", "datafile": "data file",
    "lineskip": "line skip", "byteskip": "byte skip", "sampleunits": "sample units",
}  # fmt: skip
_REPLACED = {
    "type", "dimension", "sizes", "encoding", "endian", "space directions", "space origin", "spacings", "thicknesses",
    "axis mins", "axis maxs", "data file", "line skip", "byte skip", "min", "max", "number",
}  # fmt: skip
"""Fields that a finer grid or another encoding changes; all others are copied."""

_COLOUR_KINDS = {
    "rgb-color", "rgba-color", "3-color", "4-color", "vector", "3-vector", "4-vector", "list", "none", "???",
}  # fmt: skip
_SPATIAL_KINDS = {"domain", "space"}
_GROUP = re.compile(r"\(([^()]*)\)|(none)")


@dataclass
class NrrdHeader:
    """The lines of a header, taken apart."""

    magic: str
    fields: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Keys and values of the user, as written."""
    comments: list[str] = field(default_factory=list)
    data_offset: int = 0

    @property
    def sizes(self) -> list[int]:
        """Samples along each axis of the file."""
        return [int(text) for text in self.fields["sizes"].split()]


@dataclass(frozen=True)
class _Axes:
    """Which axis of the file is what."""

    spatial: tuple[int, ...]
    channel: int | None
    volume: int | None


class NrrdReader:
    """An opened NRRD file."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        with refusing(path, "has an NRRD header that cannot be understood"):
            self.header = read_header(path, options.limits)
            self.axes = _axes(self.header, path)
            self.affine = _affine(self.header, self.axes, path)
            self._encoding = _encoding(self.header, path)
            self._data_path, self._offset = _data_place(self.header, path)
            self._order = self._voxel_order(options)
            self.volume = self._volume()

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        return read_slices(self._opened, self._order, self.path)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """What the header says about the file itself."""
        return {
            "version": self.header.magic,
            "encoding": self._encoding,
            "space": self.header.fields.get("space"),
            "detached": self._data_path != self.path,
            "volumes": self._order.volumes,
        }

    def _voxel_order(self, options: ReadOptions) -> VoxelOrder:
        header, axes = self.header, self.axes
        sizes = header.sizes
        shape = tuple([sizes[axis] for axis in axes.spatial] + [1])[:3]
        i, j, k = shape
        channels = 1 if axes.channel is None else sizes[axes.channel]
        volumes = 1 if axes.volume is None else sizes[axes.volume]
        spacing = _spacings(header, axes, self.affine)
        flat = len(axes.spatial) == 2
        axis = 2 if flat else chosen_slice_axis(options.axis, (i, j, k), self.affine, spacing, self.path)
        order = VoxelOrder((i, j, k), _dtype(header, self.path), volumes, channels, axis)
        available = self._data_path.stat().st_size - self._offset
        order.check(self.path, options.limits, available=available, encoding=self._encoding)
        return order

    def _volume(self) -> Volume:
        order, axes = self._order, self.axes
        spacing = _spacings(self.header, axes, self.affine)
        flat = len(axes.spatial) == 2
        shape = order.shape[: len(axes.spatial)] + ((order.volumes,) if order.volumes > 1 else ())
        rows, columns = order.plane_axes
        return Volume(
            format="nrrd",
            rows=order.plane_shape[0],
            columns=order.plane_shape[1],
            slices=order.slices,
            dtype=order.dtype.newbyteorder("="),
            channels=order.channels,
            alpha=order.channels == 4,
            array_shape=shape,
            slice_axis=order.slice_axis,
            plane_axes=order.plane_axes,
            spacing_mm=None if spacing is None else (spacing[rows], spacing[columns]),
            slice_spacing_mm=None if spacing is None or flat else spacing[order.slice_axis],
            affine=self.affine,
            warnings=tuple(_warnings(self.header, self.affine, self._data_path != self.path)),
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[ByteSource]:
        line_skip = int(self.header.fields.get("line skip", "0"))
        byte_skip = int(self.header.fields.get("byte skip", "0"))
        offset = self._offset
        with self._data_path.open("rb") as file:
            file.seek(offset)
            for _ in range(line_skip):
                file.readline(1 << 16)
            offset = file.tell()
        if byte_skip == -1:
            offset, byte_skip = self._data_path.stat().st_size - self._order.total_bytes, 0
        with decoded(self._data_path, self._encoding, offset) as source:
            skip_bytes(source, byte_skip, self.path)
            yield source


def open_reader(path: Path, options: ReadOptions) -> Reader:
    """Open an NRRD file.

    Raises:
        InputRefused: it is damaged, claims too much, or is of a kind that is not read.
    """
    return NrrdReader(path, options)


@contextlib.contextmanager
def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> Iterator[VoxelSink]:
    """Write an NRRD file of one piece; what a source NRRD says beyond its grid is kept.

    Raises:
        ArgumentsError: the target is to be a detached header, or exists.
        RunError: writing failed.
    """
    if target.suffix.lower() == ".nhdr":
        msg = f"{mention(target.name)} would be two files, which cannot appear at once."
        raise ArgumentsError(msg, "Name the output .nrrd: header and data in one file.")
    origin = source if isinstance(source, NrrdReader) else None
    grid = output_grid(result, keep_axes=origin is not None)
    dtype = result.dtype.newbyteorder("<")
    if dtype.str[1:] not in _NAMES:
        msg = f"NRRD does not hold {result.dtype} values."
        raise ArgumentsError(msg, "Choose another format with -o.")
    order = VoxelOrder(grid.shape, dtype, grid.volumes, result.channels, grid.slice_axis)
    packed = origin is None or origin.details()["encoding"] != "raw"
    lines = _kept_header(origin, grid) if origin else _fresh_header(grid, result.channels)
    lines[1:1] = _storage_lines(dtype, packed)
    lines += [f"{name}:={_escaped(text)}" for name, text in derivation.fields().items()]

    def verify(temporary: Path) -> None:
        check_copy(NrrdReader(temporary, ReadOptions(axis="2")), order, target)

    with atomic_file(target, overwrite=overwrite, verify=verify) as file:
        file.write("\n".join([*lines, "", ""]).encode("latin-1", "replace"))
        with encoding_into(file, "gzip" if packed else "raw") as write, sinking(order, write, target) as sink:
            yield sink


def read_header(path: Path, limits: Limits | None = None) -> NrrdHeader:
    """The header of an .nrrd or .nhdr file, as long as the limits allow.

    Raises:
        InputRefused: a line is neither a field, a comment nor a key with its value, or there is no end to them.
    """
    limits = limits or allowed()
    most = limits.text_bytes
    with path.open("rb") as file:
        header = NrrdHeader(_line(file, path, most))
        if not re.fullmatch(r"NRRD000[1-9]", header.magic):
            msg = f"{mention(path.name)} is not an NRRD file."
            raise InputRefused(msg)
        lines = 0
        while line := _line(file, path, most if lines < limits.text_lines else 0):
            _take_line(header, line, path)
            lines += 1
        header.data_offset = file.tell()
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in header.fields:
            msg = f"{mention(path.name)} has no {name} in its NRRD header."
            raise InputRefused(msg)
    sizes = header.sizes
    if len(sizes) != int(header.fields["dimension"]) or min(sizes, default=0) < 1:
        msg = f"{mention(path.name)} has sizes in its NRRD header that contradict its dimension."
        raise InputRefused(msg)
    return header


def _line(file: BinaryIO, path: Path, most: int) -> str:
    line = file.readline(most)
    if file.tell() > most or len(line) >= most:
        msg = f"{mention(path.name)} has an NRRD header without an end."
        raise InputRefused(msg)
    return line.decode("latin-1").rstrip("\r\n")


def _take_line(header: NrrdHeader, line: str, path: Path) -> None:
    if line.startswith("#"):
        header.comments.append(line)
        return
    pair, plain = line.find(":="), line.find(": ")
    if pair >= 0 and (plain < 0 or pair < plain):
        header.pairs.append((line[:pair], line[pair + 2 :]))
    elif plain > 0:
        name = line[:plain].strip().lower()
        header.fields[_ALIASES.get(name, name)] = line[plain + 2 :].strip()
    elif not line.endswith(":"):  # a field without a value says nothing
        msg = f"{mention(path.name)} has a line in its NRRD header that is no field."
        raise InputRefused(msg)


def _encoding(header: NrrdHeader, path: Path) -> Encoding:
    encoding = _ENCODINGS.get(header.fields["encoding"].lower())
    if encoding is None:
        msg = f"{mention(path.name)} holds its voxels as text, which is not read."
        raise InputRefused(msg, "Save it with raw or gzip encoding.")
    return encoding


def _dtype(header: NrrdHeader, path: Path) -> np.dtype[Any]:
    code = _CODES.get(" ".join(header.fields["type"].lower().split()))
    endian = header.fields.get("endian", "").lower()
    if code is None or (code[1] != "1" and endian not in ("little", "big")):
        msg = f"{mention(path.name)} has a type of voxels, or an order of their bytes, that is not read."
        raise InputRefused(msg)
    return np.dtype((">" if endian == "big" else "<") + code)


def _data_place(header: NrrdHeader, path: Path) -> tuple[Path, int]:
    """The file that holds the voxels, and where in it they (or the lines to be skipped) begin."""
    skips = int(header.fields.get("line skip", "0")), int(header.fields.get("byte skip", "0"))
    if skips[0] < 0 or skips[1] < -1 or (skips[1] == -1 and _encoding(header, path) != "raw"):
        msg = f"{mention(path.name)} skips a number of lines or bytes that cannot be."
        raise InputRefused(msg)
    name = header.fields.get("data file")
    if name is None:
        return path, header.data_offset
    if name.split()[0] == "LIST" or "%" in name:
        msg = f"{mention(path.name)} spreads its voxels over several files, which is not read."
        raise InputRefused(msg, "Save it as one .nrrd file.")
    return beside(path, name), 0


def _kinds(header: NrrdHeader) -> list[str]:
    kinds = header.fields.get("kinds", "").lower().split()
    return kinds if len(kinds) == len(header.sizes) else []


def _axes(header: NrrdHeader, path: Path) -> _Axes:
    n = len(header.sizes)
    kinds, directions = _kinds(header), _directions(header)
    if directions:
        spatial = [axis for axis in range(n) if directions[axis] is not None]
    elif kinds:
        spatial = [axis for axis in range(n) if kinds[axis] in _SPATIAL_KINDS]
    else:
        spatial = list(range(n))
    others = [axis for axis in range(n) if axis not in spatial]
    channel = 0 if 0 in others else None
    volume = n - 1 if n - 1 in others else None
    if len(spatial) not in (2, 3) or len(others) > (channel is not None) + (volume is not None):
        msg = f"{mention(path.name)} is not a picture, a volume or a series of volumes."
        raise InputRefused(msg)
    if channel is not None and (
        _CODES.get(header.fields["type"].lower()) not in ("u1", "u2")
        or header.sizes[0] not in (3, 4)
        or (kinds and kinds[0] not in _COLOUR_KINDS)
    ):
        msg = f"{mention(path.name)} holds {header.sizes[0]} components per voxel that are not colours."
        raise InputRefused(msg, "Split it into single volumes.")
    return _Axes(tuple(spatial), channel, volume)


def _directions(header: NrrdHeader) -> list[list[float] | None]:
    """One vector, or None, for each axis; empty where the header has none."""
    text = header.fields.get("space directions")
    if text is None:
        return []
    return [None if none else [float(part) for part in group.split(",")] for group, none in _GROUP.findall(text)]


def _numbers(header: NrrdHeader, name: str) -> list[float] | None:
    text = header.fields.get(name)
    return None if text is None else [float(part) for part in text.split()]


def _signs(header: NrrdHeader) -> tuple[float, float, float]:
    # ITK takes an unnamed space for its own, left-posterior-superior.
    name = header.fields.get("space", "").lower().removesuffix("-time")
    return _SIGNS.get(name, (-1.0, -1.0, 1.0))


def _affine(header: NrrdHeader, axes: _Axes, path: Path) -> Affine | None:
    vectors = [vector for vector in _directions(header) if vector is not None]
    if not vectors:
        return None
    if len({len(vector) for vector in vectors}) != 1 or len(vectors[0]) not in (2, 3):
        msg = f"{mention(path.name)} has space directions of the wrong length."
        raise InputRefused(msg)
    matrix = np.eye(4)
    matrix[: len(vectors[0]), : len(vectors)] = np.transpose(vectors)
    if len(vectors) == 2:
        across = np.cross(matrix[:3, 0], matrix[:3, 1])
        matrix[:3, 2] = across / (np.linalg.norm(across) or 1.0)
    origin = _GROUP.findall(header.fields.get("space origin", ""))
    if origin:
        position = [float(part) for part in origin[0][0].split(",")]
        matrix[: len(position), 3] = position
    return usable_affine(np.diag([*_signs(header), 1.0]) @ matrix, path)


def _spacings(header: NrrdHeader, axes: _Axes, affine: Affine | None) -> tuple[float, float, float] | None:
    if affine is not None:
        return spacings_mm(affine)
    steps = _numbers(header, "spacings")
    if steps is None or len(steps) != len(header.sizes):
        return None
    i, j, k = ([abs(steps[axis]) for axis in axes.spatial] + [1.0])[:3]
    return (i, j, k) if np.isfinite([i, j, k]).all() and min(i, j, k) > 0 else None


def _warnings(header: NrrdHeader, affine: Affine | None, detached: bool) -> Iterator[str]:
    if affine is None:
        yield "The NRRD header does not say how the image lies in the patient."
    elif header.fields.get("space", "").lower().removesuffix("-time") not in _SIGNS:
        yield "The NRRD header does not name its space; left-posterior-superior is assumed, as ITK does."
    if detached:
        yield "The result is one .nrrd file, although the input is a header with a data file."


def _storage_lines(dtype: np.dtype[Any], packed: bool) -> list[str]:
    return [f"type: {_NAMES[dtype.str[1:]]}", f"encoding: {'gzip' if packed else 'raw'}", "endian: little"]


def _fresh_header(grid: OutputGrid, channels: int) -> list[str]:
    """A header for an image that was no NRRD: as ITK writes it."""
    sizes = [str(size) for size in grid.shape[: min(grid.dimensions, 3)]]
    kinds = ["domain"] * len(sizes)
    groups: list[str] = []
    spacing: list[str] = []
    if grid.affine is not None:
        # A single picture in a volume's space stays a volume of one slice: its place needs three axes.
        sizes, kinds = [str(size) for size in grid.shape], ["domain"] * 3
        groups = _vectors(grid.affine, _SIGNS["lps"], 3)[:3]
    elif grid.spacing_mm is not None:
        spacing = [_text(step) for step in grid.spacing_mm[: len(sizes)]]
    if channels > 1:
        sizes.insert(0, str(channels))
        kinds.insert(0, {3: "RGB-color", 4: "RGBA-color"}.get(channels, "vector"))
        groups[:0] = ["none"] if groups else []
        spacing[:0] = ["nan"] if spacing else []
    if grid.volumes > 1:
        sizes.append(str(grid.volumes))
        kinds.append("list")
        groups += ["none"] if groups else []
        spacing += ["nan"] if spacing else []
    lines = ["NRRD0004", f"dimension: {len(sizes)}"]
    if grid.affine is not None:
        lines.append("space: left-posterior-superior")
        lines.append(f"space directions: {' '.join(groups)}")
        lines.append(f"space origin: {_vectors(grid.affine, _SIGNS['lps'], 3)[3]}")
    if spacing:
        lines.append(f"spacings: {' '.join(spacing)}")
    return [*lines, f"sizes: {' '.join(sizes)}", f"kinds: {' '.join(kinds)}"]


def _kept_header(origin: NrrdReader, grid: OutputGrid) -> list[str]:
    """The source's header, with what the finer grid changes."""
    header, axes = origin.header, origin.axes
    old = header.sizes
    new = list(old)
    for axis, size in zip(axes.spatial, grid.shape, strict=False):
        new[axis] = size
    lines = [header.magic, *header.comments]
    lines.append(f"dimension: {len(old)}")
    lines += [f"{name}: {text}" for name, text in header.fields.items() if name not in _REPLACED]
    lines.append(f"sizes: {' '.join(map(str, new))}")
    if grid.affine is not None:
        lines += _placed(header, axes, grid.affine)
    lines += _scaled_fields(header, old, new)
    lines += [f"{key}:={value}" for key, value in header.pairs if not is_stale(key)]
    return lines


def _placed(header: NrrdHeader, axes: _Axes, affine: Affine) -> list[str]:
    directions = _directions(header)
    length = next(len(vector) for vector in directions if vector is not None)
    *vectors, position = _vectors(affine, _signs(header), length)
    groups = ["none"] * len(directions)
    for axis, vector in zip(axes.spatial, vectors, strict=False):
        groups[axis] = vector
    return [f"space directions: {' '.join(groups)}", f"space origin: {position}"]


def _scaled_fields(header: NrrdHeader, old: Sequence[int], new: Sequence[int]) -> Iterator[str]:
    """Steps and ends along each axis. Ends between voxels stay; ends at voxel centres (`node`) move with them."""
    for name in ("spacings", "thicknesses"):
        steps = _numbers(header, name)
        if steps is not None and len(steps) == len(old):
            yield f"{name}: {' '.join(_text(d * a / b) for d, a, b in zip(steps, old, new, strict=True))}"
    centerings = header.fields.get("centerings", "").lower().split()
    low, high = _numbers(header, "axis mins"), _numbers(header, "axis maxs")
    steps = _numbers(header, "spacings")
    if low is not None and len(low) == len(old):
        if len(centerings) == len(old) and steps is not None and len(steps) == len(old):
            for axis, centering in enumerate(centerings):
                if centering == "node" and old[axis] != new[axis]:
                    low[axis] += steps[axis] * (old[axis] / new[axis] - 1) / 2
        yield f"axis mins: {' '.join(map(_text, low))}"
    if high is not None and len(high) == len(old) and "node" not in centerings:
        yield f"axis maxs: {' '.join(map(_text, high))}"


def _vectors(affine: Affine, signs: Sequence[float], length: int) -> list[str]:
    """The columns of an affine (three directions, then the origin) in a space's own coordinates."""
    own = np.diag([*signs, 1.0]) @ affine
    return [f"({','.join(_text(value) for value in own[:length, column])})" for column in range(4)]


def _text(value: float) -> str:
    return f"{float(value) + 0.0!r}".removesuffix(".0")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
