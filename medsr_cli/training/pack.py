"""Training slices packed into one file: read once from the images, then mapped, never copied whole.

The file is a safetensors file with `pixels` (uint16), tables of where each slice lies in them, and metadata that
names the volumes. A slice's image, of one or more channels, row-major, begins at its entry of `offsets` and has the
size in `shapes`; `volumes` says whose it is. A stored value v is the intensity v / 65535 of the volume's own
[minimum, maximum] scaled to [0, 1]. Since version 2, `guides`, `labels` and `lows` say where the slice's companions
begin, or -1: a guide of one channel (scaled by its own range), label numbers as they are, and a low-resolution
partner of the size in `low_shapes`. Files of version 1 have images of one channel alone, and are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention, reason_of

VERSION = 2
LEVELS = 65535
MAX_HEADER_BYTES = 1 << 27
MOST_CHANNELS = 64
LONGEST_SIDE = 1 << 24
Role = Literal["image", "guide", "low", "labels"]
_Table = NDArray[np.int64]
_ARRAYS = {"pixels": ("U16", "<u2"), "shapes": ("I64", "<i8"), "offsets": ("I64", "<i8"), "volumes": ("I64", "<i8")}
_COMPANIONS = ("guides", "labels", "lows", "low_shapes")
_OF_ROLE = {"guide": "guides", "labels": "labels", "low": "lows"}


@dataclass(frozen=True)
class PackedVolume:
    """Where the slices of one volume came from; `subject` is what validation is split by."""

    subject: str
    name: str
    sha256: str
    minimum: float
    maximum: float
    validation: bool = False
    """Whether it came from a folder that is for validation alone."""
    spacing_mm: Sequence[float] | None = None
    """Distance between rows and between columns, where the image says."""
    modality: str | None = None
    channels: int = 1
    """Channels that are stored; fewer than `PackedSlices.channels` are repeated on reading."""
    ranges: Sequence[Sequence[float]] = ()
    """Smallest and largest value of each of several registered contrasts; else `minimum` and `maximum` say it."""
    labels: str | None = None
    """Name of the mask or label map, where there is one."""
    label_values: Sequence[int] = ()
    """The numbers in it, in order."""
    guide: str | None = None
    """Name of the other contrast on the same grid."""
    guide_range: Sequence[float] | None = None
    low: str | None = None
    """Name of the low-resolution image of the same field."""
    low_range: Sequence[float] | None = None
    """The range that it was scaled by."""
    caption: str | None = None
    """A text about the image."""


@dataclass(frozen=True)
class Planes:
    """One slice on its way into a packed file: the image in [0, 1] and what belongs to it."""

    image: NDArray[np.floating]
    """(rows, columns) or (channels, rows, columns)."""
    guide: NDArray[np.floating] | None = None
    """(rows, columns), in [0, 1]."""
    labels: NDArray[Any] | None = None
    """(rows, columns), whole numbers from 0 to 65535."""
    low: NDArray[np.floating] | None = None
    """(rows', columns') or (channels, rows', columns'), in [0, 1]."""


class PackedSlices:
    """The slices of a packed file, by index; pixels are read from disk when they are asked for.

    Raises:
        InputRefused: not a packed file, of a later version, cut short, or its tables point outside it.
    """

    def __init__(self, path: Path) -> None:
        header, start = _read_header(path)
        try:
            self.version = _version(header, path)
            self.volumes = [_volume(entry) for entry in json.loads(header["__metadata__"]["volumes"])]
            arrays = {name: _mapped(path, start, header[name], *types) for name, types in _ARRAYS.items()}
            self.pixels = arrays["pixels"]
            self.shapes: _Table = np.array(arrays["shapes"])
            self.offsets: _Table = np.array(arrays["offsets"])
            self.volume_of: _Table = np.array(arrays["volumes"])
            self._companions = self._read_companions(path, header, start)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError, OSError) as error:
            raise _not_packed(path) from error
        self.channels = max((volume.channels for volume in self.volumes), default=1)
        """Of every image that is read."""
        if not self._is_sound():
            raise _not_packed(path)

    def _read_companions(self, path: Path, header: Mapping[str, Any], start: int) -> dict[str, _Table]:
        if self.version == 1:
            none = np.full(len(self.offsets), -1, np.int64)
            return {"guides": none, "labels": none, "lows": none, "low_shapes": np.zeros((len(none), 2), np.int64)}
        return {name: np.array(_mapped(path, start, header[name], "I64", "<i8")) for name in _COMPANIONS}

    def _is_sound(self) -> bool:
        """Whether every slice lies inside the pixels and belongs to a volume, and so its companions."""
        count, tables = len(self.offsets), self._companions
        singles = (self.offsets, self.volume_of, tables["guides"], tables["labels"], tables["lows"])
        doubles = (self.shapes, tables["low_shapes"])
        if (
            self.pixels.ndim != 1
            or {t.shape for t in singles} != {(count,)}
            or {t.shape for t in doubles} != {(count, 2)}
        ):
            return False
        if count == 0:
            return True
        if self.volume_of.min() < 0 or self.volume_of.max() >= len(self.volumes):
            return False
        stored = np.array([volume.channels for volume in self.volumes])[self.volume_of]
        return (
            {volume.channels for volume in self.volumes} <= {1, self.channels}
            and self._inside(self.offsets, self.shapes, stored)
            and self._inside(tables["guides"], self.shapes, None)
            and self._inside(tables["labels"], self.shapes, None)
            and self._inside(tables["lows"], tables["low_shapes"], stored)
        )

    def _inside(self, offsets: _Table, shapes: _Table, channels: _Table | None) -> bool:
        """Whether rectangles lie inside the pixels; an entry of -1 is none, but not where it is an image's."""
        if offsets is not self.offsets:
            there = offsets >= 0
            if offsets.min() < -1:
                return False
            offsets, shapes = offsets[there], shapes[there]
            channels = None if channels is None else channels[there]
            if not len(offsets):
                return True
        # Sides are bounded before they are multiplied, so that the product cannot wrap around.
        if shapes.min() < 1 or shapes.max() > LONGEST_SIDE or offsets.min() < 0:
            return False
        ends = shapes.prod(axis=1) * (1 if channels is None else channels)
        return bool(offsets.max() <= self.pixels.size and (offsets + ends).max() <= self.pixels.size)

    def __len__(self) -> int:
        return len(self.offsets)

    def has(self, role: Role, index: int | None = None) -> bool:
        """Whether a slice, or without an index any slice, has such a companion."""
        if role == "image":
            return len(self) > 0
        offsets = self._companions[_OF_ROLE[role]]
        return bool((offsets >= 0).any() if index is None else offsets[index] >= 0)

    def with_role(self, role: Role, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the slices that have such a companion."""
        return indices if role == "image" else indices[self._companions[_OF_ROLE[role]][indices] >= 0]

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the slices whose label map is not 0 everywhere; reads all of them."""
        kept = [i for i in self.with_role("labels", indices) if self._stored("labels", int(i)).any()]
        return np.array(kept, np.int64)

    def size_of(self, role: Role, index: int) -> tuple[int, int]:
        """Rows and columns of a slice or of its companion."""
        rows, columns = (self._companions["low_shapes"] if role == "low" else self.shapes)[index]
        return int(rows), int(columns)

    def crop(self, index: int, top: int, left: int, rows: int, columns: int) -> NDArray[np.float32]:
        """A rectangle of one slice, float32 in [0, 1]; what lies outside is the edge repeated.

        Returns (rows, columns) where there is one channel, else (channels, rows, columns).
        """
        part = self.crop_of("image", index, top, left, rows, columns)
        return part[0] if self.channels == 1 else part

    def crop_of(
        self, role: Literal["image", "guide", "low"], index: int, top: int, left: int, rows: int, columns: int
    ) -> NDArray[np.float32]:
        """A rectangle of a slice or of its companion, (channels, rows, columns), float32 in [0, 1].

        Args:
            role: a guide has one channel, the others all of `channels`.
            index: of the slice.
            top: in rows of the companion itself, as is all that follows.
            left: first column.
            rows: what lies outside is the edge repeated.
            columns: likewise.

        Raises:
            KeyError: the slice has no such companion.
        """
        part = _window(self._stored(role, index), top, left, rows, columns).astype(np.float32) / np.float32(LEVELS)
        wanted = 1 if role == "guide" else self.channels
        return part if len(part) == wanted else np.repeat(part, wanted, axis=0)

    def labels(self, index: int, top: int, left: int, rows: int, columns: int) -> NDArray[np.int64]:
        """A rectangle of a slice's label map, (rows, columns); what lies outside is the edge repeated.

        Raises:
            KeyError: the slice has none.
        """
        numbers: NDArray[np.int64] = _window(self._stored("labels", index), top, left, rows, columns)[0].astype(
            np.int64
        )
        return numbers

    def _stored(self, role: Role, index: int) -> NDArray[np.uint16]:
        """(channels, rows, columns) as they are in the file."""
        offset = int(self.offsets[index] if role == "image" else self._companions[_OF_ROLE[role]][index])
        if offset < 0:
            raise KeyError(role)
        rows, columns = self.size_of(role, index)
        channels = self.volumes[self.volume_of[index]].channels if role in ("image", "low") else 1
        whole: NDArray[np.uint16] = self.pixels[offset : offset + channels * rows * columns]
        return whole.reshape(channels, rows, columns)

    def slice(self, index: int) -> NDArray[np.float32]:
        """One whole slice as `crop` gives it."""
        return self.crop(index, 0, 0, *self.size_of("image", index))

    def slice_of(self, role: Literal["image", "guide", "low"], index: int) -> NDArray[np.float32]:
        """One whole slice, or its companion, as `crop_of` gives it."""
        return self.crop_of(role, index, 0, 0, *self.size_of(role, index))

    def labels_of(self, index: int) -> NDArray[np.int64]:
        """The whole label map of a slice."""
        return self.labels(index, 0, 0, *self.size_of("labels", index))

    def indices_of(self, subjects: Iterable[str]) -> NDArray[np.int64]:
        """The slices of the named subjects."""
        wanted = set(subjects)
        keep = [i for i, volume in enumerate(self.volumes) if volume.subject in wanted]
        return np.flatnonzero(np.isin(self.volume_of, keep))

    @property
    def subjects(self) -> list[str]:
        """Every subject once, in order."""
        return list(dict.fromkeys(volume.subject for volume in self.volumes))

    @property
    def label_values(self) -> list[int]:
        """Every label number once, in order."""
        return sorted({value for volume in self.volumes for value in volume.label_values})


def _window(whole: NDArray[np.uint16], top: int, left: int, rows: int, columns: int) -> NDArray[np.uint16]:
    part = whole[:, top : top + rows, left : left + columns]
    missing = (rows - part.shape[1], columns - part.shape[2])
    if any(missing):
        part = np.pad(part, ((0, 0), (0, missing[0]), (0, missing[1])), mode="edge")
    return part


# -- reading the header ------------------------------------------------------------------------------------


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a safetensors file and where its tensors begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise _not_packed(path)
            header = json.loads(file.read(length))
    except OSError as error:
        msg = f"{mention(path.name)} cannot be read ({reason_of(error)})."
        raise InputRefused(msg) from error
    except (ValueError, RecursionError) as error:
        raise _not_packed(path) from error
    if not isinstance(header, dict):
        raise _not_packed(path)
    return header, 8 + length


def _version(header: Mapping[str, Any], path: Path) -> int:
    version = int(header["__metadata__"]["medsr.format"])
    if version > VERSION:
        msg = f"{mention(path.name)} was packed by a later medsr."
        raise InputRefused(msg, "Pack the images again.")
    if version < 1:
        raise ValueError(version)
    return version


def _volume(entry: Mapping[str, Any]) -> PackedVolume:
    """A record of the metadata; what is not of its type is a TypeError or a ValueError."""
    volume = PackedVolume(**entry)
    _demand(all(isinstance(text, str) for text in (volume.subject, volume.name, volume.sha256)))
    texts = (volume.modality, volume.labels, volume.guide, volume.low, volume.caption)
    _demand(all(text is None or isinstance(text, str) for text in texts))
    _demand(isinstance(volume.validation, bool))
    _demand(type(volume.channels) is int and 1 <= volume.channels <= MOST_CHANNELS)
    _demand(_are_numbers((volume.minimum, volume.maximum), 2))
    pairs = (volume.spacing_mm, volume.guide_range, volume.low_range, *volume.ranges)
    _demand(all(pair is None or _are_numbers(pair, 2) for pair in pairs))
    values = volume.label_values
    _demand(all(type(value) is int and 0 <= value <= LEVELS for value in values))
    return volume


def _are_numbers(values: Sequence[Any], count: int) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    return isinstance(values, list | tuple) and len(values) == len(numbers) == count


def _demand(holds: bool) -> None:
    if not holds:
        raise ValueError


def _mapped(path: Path, start: int, entry: dict[str, Any], name: str, dtype: str) -> NDArray[Any]:
    """One tensor of the file; a file that is too short is a ValueError."""
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if entry["dtype"] != name or begin < 0:
        raise ValueError(name)
    if 0 in shape:
        return np.zeros(shape, dtype)
    if math.prod(shape) * np.dtype(dtype).itemsize != end - begin:
        raise ValueError(name)
    return np.memmap(path, dtype, mode="r", offset=start + begin, shape=shape)


def _not_packed(path: Path) -> InputRefused:
    msg = f"{mention(path.name)} is not a whole file of packed slices."
    return InputRefused(msg, "Give a folder of images, or make the file with medsr finetune --pack-only.")


# -- writing -----------------------------------------------------------------------------------------------


class PackWriter:
    """Collects the slices of volumes into the bytes of a packed file; pixels go to disk as they come."""

    def __init__(self, pixels: BinaryIO) -> None:
        self._pixels = pixels
        self._written = 0
        self._rows: list[tuple[int, ...]] = []
        self._volumes: list[PackedVolume] = []

    def add(self, volume: PackedVolume, slices: Iterable[NDArray[np.floating] | Planes]) -> int:
        """Append the slices of one volume; those whose image is empty are left out with all that belongs to them.

        Values outside of [0, 1] are saturated; NaN becomes 0. If reading the slices fails, none of them is kept.

        Args:
            volume: what is said about it.
            slices: images (rows, columns) or (channels, rows, columns), or with companions.

        Returns:
            The number of slices kept; a volume without any is not added.
        """
        known, place = len(self._rows), self._written
        try:
            for planes in slices:
                self._append(planes if isinstance(planes, Planes) else Planes(planes), volume.channels)
        except BaseException:
            del self._rows[known:]
            self._written = place
            self._pixels.seek(2 * place)
            self._pixels.truncate()
            raise
        kept = len(self._rows) - known
        if kept:
            self._volumes.append(volume)
        return kept

    def _append(self, planes: Planes, channels: int) -> None:
        image = _levels(planes.image)
        if not image.any():
            return
        rows, columns = image.shape[-2:]
        if image.size != channels * rows * columns:
            msg = f"an image of shape {image.shape} has not {channels} channels"
            raise ValueError(msg)
        low = None if planes.low is None else _levels(planes.low)
        self._rows.append(
            (
                rows,
                columns,
                self._put(image),
                len(self._volumes),
                self._put(None if planes.guide is None else _levels(planes.guide)),
                self._put(None if planes.labels is None else planes.labels.astype("<u2")),
                self._put(low),
                *((0, 0) if low is None else low.shape[-2:]),
            )
        )

    def _put(self, stored: NDArray[np.uint16] | None) -> int:
        """Where an array begins, in pixels; -1 for none."""
        if stored is None:
            return -1
        begin = self._written
        self._pixels.write(np.ascontiguousarray(stored).tobytes())
        self._written += stored.size
        return begin

    def finish(self, target: BinaryIO) -> None:
        """Write the packed file to `target`; the pixels are copied from the file given at the start."""
        table = np.array(self._rows, "<i8").reshape(-1, 9)
        names = ("offsets", "volumes", "guides", "labels", "lows")
        small = {"shapes": table[:, :2], **{name: table[:, 2 + n] for n, name in enumerate(names)}}
        small["low_shapes"] = table[:, 7:]
        header = _header(self._written, small, self._volumes)
        target.write(len(header).to_bytes(8, "little") + header)
        self._pixels.seek(0)
        while block := self._pixels.read(1 << 22):
            target.write(block)
        for array in small.values():
            target.write(np.ascontiguousarray(array).tobytes())


def _levels(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    stored: NDArray[np.uint16] = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * LEVELS).astype("<u2")
    return stored


def _header(n_pixels: int, small: Mapping[str, NDArray[np.int64]], volumes: Sequence[PackedVolume]) -> bytes:
    end = 2 * n_pixels
    header: dict[str, object] = {
        "__metadata__": {"medsr.format": str(VERSION), "volumes": json.dumps([_record(v) for v in volumes])},
        "pixels": {"dtype": "U16", "shape": [n_pixels], "data_offsets": [0, end]},
    }
    for name, array in small.items():
        header[name] = {"dtype": "I64", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _record(volume: PackedVolume) -> dict[str, object]:
    """Its fields, less the later ones that are as they were before there were any."""
    told = asdict(volume)
    plain = {f.name: f.default for f in fields(PackedVolume)}
    early = ("subject", "name", "sha256", "minimum", "maximum", "validation", "spacing_mm", "modality")
    return {name: value for name, value in told.items() if name in early or value != plain[name]}
