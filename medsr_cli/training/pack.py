"""Training slices packed into one file: read once from the images, then mapped, never copied whole.

The file is a safetensors file with `pixels` (uint16, every slice row-major after the one before), `shapes`
(slices, 2), `offsets` (slices,), `volumes` (slices,), and metadata that names the volumes. A stored value v
is the intensity v / 65535 of the volume's own [minimum, maximum] scaled to [0, 1].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused

LEVELS = 65535
MAX_HEADER_BYTES = 1 << 27
_ARRAYS = {"pixels": ("U16", "<u2"), "shapes": ("I64", "<i8"), "offsets": ("I64", "<i8"), "volumes": ("I64", "<i8")}


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


class PackedSlices:
    """The slices of a packed file, by index; pixels are read from disk when they are asked for.

    Raises:
        InputRefused: not a packed file, cut short, or its tables point outside it.
    """

    def __init__(self, path: Path) -> None:
        header, start = _read_header(path)
        try:
            self.volumes = [PackedVolume(**v) for v in json.loads(header["__metadata__"]["volumes"])]
            arrays = {name: _mapped(path, start, header[name], *types) for name, types in _ARRAYS.items()}
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
            raise _not_packed(path) from error
        self.pixels = arrays["pixels"]
        self.shapes = np.array(arrays["shapes"])
        self.offsets = np.array(arrays["offsets"])
        self.volume_of = np.array(arrays["volumes"])
        if not self._is_sound():
            raise _not_packed(path)

    def _is_sound(self) -> bool:
        """Whether every slice lies inside the pixels and belongs to a volume."""
        count = len(self.offsets)
        if self.shapes.shape != (count, 2) or self.volume_of.shape != (count,) or self.pixels.ndim != 1:
            return False
        if count == 0:
            return True
        # Sides are bounded before they are multiplied, so that the product cannot wrap around.
        if self.shapes.min() < 1 or self.shapes.max() > 1 << 24 or self.offsets.min() < 0:
            return False
        ends = self.offsets + self.shapes.prod(axis=1)
        inside = self.offsets.max() <= self.pixels.size and ends.max() <= self.pixels.size
        return bool(inside and self.volume_of.min() >= 0 and self.volume_of.max() < len(self.volumes))

    def __len__(self) -> int:
        return len(self.offsets)

    def crop(self, index: int, top: int, left: int, rows: int, columns: int) -> NDArray[np.float32]:
        """A rectangle of one slice, float32 in [0, 1]; what lies outside is the edge repeated."""
        h, w = self.shapes[index]
        whole = self.pixels[self.offsets[index] : self.offsets[index] + h * w].reshape(h, w)
        part = whole[top : top + rows, left : left + columns].astype(np.float32) / np.float32(LEVELS)
        missing = (rows - part.shape[0], columns - part.shape[1])
        if any(missing):
            part = np.pad(part, ((0, missing[0]), (0, missing[1])), mode="edge")
        return part

    def slice(self, index: int) -> NDArray[np.float32]:
        """One whole slice, float32 in [0, 1]."""
        rows, columns = self.shapes[index]
        return self.crop(index, 0, 0, int(rows), int(columns))

    def indices_of(self, subjects: Iterable[str]) -> NDArray[np.int64]:
        """The slices of the named subjects."""
        wanted = set(subjects)
        keep = [i for i, volume in enumerate(self.volumes) if volume.subject in wanted]
        return np.flatnonzero(np.isin(self.volume_of, keep))

    @property
    def subjects(self) -> list[str]:
        """Every subject once, in order."""
        return list(dict.fromkeys(volume.subject for volume in self.volumes))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a safetensors file and where its tensors begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise _not_packed(path)
            header = json.loads(file.read(length))
    except OSError as error:
        msg = f"{path.name} cannot be read ({error.strerror})."
        raise InputRefused(msg) from error
    except (ValueError, RecursionError) as error:
        raise _not_packed(path) from error
    if not isinstance(header, dict):
        raise _not_packed(path)
    return header, 8 + length


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
    msg = f"{path.name} is not a whole file of packed slices."
    return InputRefused(msg, "Give a folder of images, or make the file with medsr finetune --pack-only.")


class PackWriter:
    """Collects the slices of volumes into the bytes of a packed file; pixels go to disk as they come."""

    def __init__(self, pixels: BinaryIO) -> None:
        self._pixels = pixels
        self._shapes: list[tuple[int, int]] = []
        self._volume_of: list[int] = []
        self._volumes: list[PackedVolume] = []

    def add(self, volume: PackedVolume, slices: Iterable[NDArray[np.floating]]) -> int:
        """Append the slices (rows, columns), in [0, 1], of one volume; empty ones are left out.

        Values outside are saturated; NaN becomes 0. If reading the slices fails, none of them is kept.

        Returns the number of slices kept; a volume without any is not added.
        """
        known, place = len(self._shapes), self._pixels.tell()
        try:
            for pixels in slices:
                self._append(pixels)
        except BaseException:
            del self._shapes[known:], self._volume_of[known:]
            self._pixels.seek(place)
            self._pixels.truncate()
            raise
        kept = len(self._shapes) - known
        if kept:
            self._volumes.append(volume)
        return kept

    def _append(self, pixels: NDArray[np.floating]) -> None:
        stored = np.rint(np.clip(np.nan_to_num(pixels, nan=0.0), 0, 1) * LEVELS).astype("<u2")
        if stored.any():
            self._pixels.write(stored.tobytes())
            self._shapes.append((stored.shape[0], stored.shape[1]))
            self._volume_of.append(len(self._volumes))

    def finish(self, target: BinaryIO) -> None:
        """Write the packed file to `target`; the pixels are copied from the file given at the start."""
        shapes = np.array(self._shapes, "<i8").reshape(-1, 2)
        sizes = shapes.prod(axis=1)
        offsets = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype("<i8") if len(sizes) else sizes
        small = {"shapes": shapes, "offsets": offsets, "volumes": np.array(self._volume_of, "<i8")}
        header = _header(int(sizes.sum()), small, self._volumes)
        target.write(len(header).to_bytes(8, "little") + header)
        self._pixels.seek(0)
        while block := self._pixels.read(1 << 22):
            target.write(block)
        for array in small.values():
            target.write(array.tobytes())


def _header(n_pixels: int, small: dict[str, NDArray[np.int64]], volumes: Sequence[PackedVolume]) -> bytes:
    end = 2 * n_pixels
    header: dict[str, object] = {
        "__metadata__": {"medsr.format": "1", "volumes": json.dumps([asdict(v) for v in volumes])},
        "pixels": {"dtype": "U16", "shape": [n_pixels], "data_offsets": [0, end]},
    }
    for name, array in small.items():
        header[name] = {"dtype": "I64", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
