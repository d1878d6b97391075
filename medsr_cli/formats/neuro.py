"""Formats of brain imaging that are read but not written: MINC, AFNI and Philips PAR/REC, with nibabel's headers.

Where a file scales its stored values, real values are handed out (float32): there is no place in another format for
a scale per slice. Without scaling, the stored type stays. MINC-1 files are held in memory whole, as nibabel reads
them; the others stream.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.compression import Encoding, decoded
from medsr_cli.formats.contract import Derivation, Pixels, Reader, ReadOptions, Writer
from medsr_cli.formats.limits import Limits
from medsr_cli.formats.voxel_stream import (
    VoxelOrder,
    chosen_slice_axis,
    read_exactly,
    read_slices,
    usable_affine,
)
from medsr_cli.volume.geometry import Affine, spacings_mm
from medsr_cli.volume.volume import Volume

TITLES = {"minc": "MINC", "afni": "AFNI", "parrec": "PAR/REC"}

_load: Any = nibabel.load  # without types
_MINC1: Any = nibabel.Minc1Image

Planes = Callable[[], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class _Stored:
    """A file taken apart: an array (i, j, k, volumes) whose planes (j, i) come one after the other."""

    format: str
    shape: tuple[int, int, int]
    volumes: int
    dtype: np.dtype[Any]
    """Of the planes as they are handed out."""
    affine: Affine
    planes: Planes
    scaled: bool


class PlaneReader:
    """An opened MINC, AFNI or PAR/REC image."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        with refusing(path, "is damaged, or lacks a file that belongs to it"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._stored = _taken_apart(path, options.limits)
            stored = self._stored
            usable_affine(stored.affine, path)
            axis = chosen_slice_axis(options.axis, stored.shape, stored.affine, spacings_mm(stored.affine), path)
        self._order = VoxelOrder(stored.shape, stored.dtype, stored.volumes, 1, axis)
        rows, columns = self._order.plane_shape
        options.limits.check_size(path, rows, columns, self._order.slices, stored.dtype.itemsize)
        self.volume = self._volume()

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        return read_slices(self._opened, self._order, self.path)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """What the header says about the file itself."""
        return {"values": "real" if self._stored.scaled else "stored", "volumes": self._stored.volumes}

    def _volume(self) -> Volume:
        order, affine, name = self._order, self._stored.affine, self._stored.format
        spacing = spacings_mm(affine)
        rows, columns = order.plane_axes
        notes = [f"{TITLES[name]} is read but not written: the result is NIfTI, or what -o names."]
        if self._stored.scaled:
            notes.append("The stored values are scaled; the result holds the real values as float32.")
        return Volume(
            format=name,
            rows=order.plane_shape[0],
            columns=order.plane_shape[1],
            slices=order.slices,
            dtype=order.dtype.newbyteorder("="),
            array_shape=(*order.shape, order.volumes) if order.volumes > 1 else order.shape,
            slice_axis=order.slice_axis,
            plane_axes=order.plane_axes,
            spacing_mm=(spacing[rows], spacing[columns]),
            slice_spacing_mm=spacing[order.slice_axis],
            affine=affine,
            warnings=tuple(notes),
        )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[_PlaneBytes]:
        yield _PlaneBytes(self._stored.planes())


class _PlaneBytes:
    """Planes as a stream of bytes."""

    def __init__(self, planes: Iterator[NDArray[Any]]) -> None:
        self._planes = planes
        self._left = b""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._left:
            plane = next(self._planes, None)
            self._left = b"" if plane is None else plane.tobytes()
        part, self._left = self._left[:size], self._left[size:]
        return part


def open_reader(path: Path, options: ReadOptions) -> Reader:
    """Open a MINC, AFNI or PAR/REC image by either of its files.

    Raises:
        InputRefused: it is damaged or claims too much, or MINC-2 cannot be read without h5py.
    """
    return PlaneReader(path, options)


def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> contextlib.AbstractContextManager[Writer]:
    """Refuse: nothing here is written.

    Raises:
        ArgumentsError: always.
    """
    del source, result, derivation, overwrite
    msg = f"{mention(target.name)} is of a format that is read but not written."
    raise ArgumentsError(msg, "Name the output .nii.gz instead.")


def _taken_apart(path: Path, limits: Limits) -> _Stored:
    name = path.name.lower()
    if name.endswith(".mnc"):
        return _minc(path, limits)
    _check_text(path, limits)
    if name.endswith((".par", ".rec")):
        return _parrec(path)
    return _afni(path, limits)


def _check_text(path: Path, limits: Limits) -> None:
    """Refuse a header that is too long to be taken apart; the other file holds voxels, whose size is no claim."""
    suffix = path.suffix.lower()
    header = {".brik": ".HEAD", ".rec": ".PAR"}.get(suffix, path.suffix)
    text = path.with_suffix(header) if suffix not in (".gz", ".bz2") else path.with_suffix("").with_suffix(".HEAD")
    if text.is_file() and text.stat().st_size > limits.text_bytes:
        msg = f"{mention(text.name)} is longer than a header may be."
        raise InputRefused(msg, "Check that the file is what its name says.")


def _minc(path: Path, limits: Limits) -> _Stored:
    with path.open("rb") as file:
        is_hdf5 = file.read(4) == b"\x89HDF"
    if is_hdf5:
        try:
            import h5py  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401, PLC0415
        except ImportError as error:
            msg = f"{mention(path.name)} is a MINC-2 file, which needs the package h5py."
            raise InputRefused(msg, "Install it with: pip install h5py") from error
    image = _load(path) if is_hdf5 else _load_minc1(path, limits)
    if len(image.shape) != 3:
        msg = f"{mention(path.name)} is not a single MINC volume."
        raise InputRefused(msg, "Convert it to NIfTI first.")
    k, j, i = (int(size) for size in image.shape)
    stored = image.get_data_dtype()
    if is_hdf5:
        limits.check_expansion(path, i * j * k * int(stored.itemsize), path.stat().st_size)
    dtype = np.dtype(np.float64) if stored == np.dtype(np.float64) else np.dtype(np.float32)

    def planes() -> Iterator[NDArray[Any]]:
        for index in range(k):
            yield np.asarray(image.dataobj[index], dtype)

    # MINC counts its slowest axis first.
    affine = np.asarray(image.affine, np.float64)[:, [2, 1, 0, 3]]
    return _Stored("minc", (i, j, k), 1, dtype, affine, planes, stored.kind != "f")


def _load_minc1(path: Path, limits: Limits) -> Any:
    """The image from a copy of its file in memory, which a length in the file cannot make longer."""
    if path.stat().st_size > limits.held_bytes:
        msg = f"{mention(path.name)} is larger than a MINC-1 file may be."
        raise InputRefused(msg, "Convert it to NIfTI first.")
    holder = nibabel.FileHolder(fileobj=BytesIO(path.read_bytes()))
    return _MINC1.from_file_map({"image": holder})


def _afni(path: Path, limits: Limits) -> _Stored:
    image = _load(path)
    i, j, k, volumes = (*(int(size) for size in image.shape), 1)[:4]
    stored = np.dtype(image.dataobj.dtype)
    scales = image.dataobj.scaling
    data = Path(image.file_map["image"].filename)
    encoding: Encoding = "gzip" if data.name.endswith(".gz") else "bzip2" if data.name.endswith(".bz2") else "raw"
    order = VoxelOrder((i, j, k), stored, volumes)
    order.check(path, limits, available=data.stat().st_size, encoding=encoding)
    dtype = stored if scales is None else np.dtype(np.float32)
    factors = np.ones(volumes) if scales is None else np.broadcast_to(np.ravel(scales), volumes)

    def planes() -> Iterator[NDArray[Any]]:
        with decoded(data, encoding) as source:
            for factor in factors:
                for _ in range(k):
                    plane = np.frombuffer(read_exactly(source, order.plane_bytes, path), stored).reshape(j, i)
                    yield plane if scales is None else (plane * float(factor)).astype(dtype)

    affine = np.asarray(image.affine, np.float64)
    return _Stored("afni", (i, j, k), volumes, dtype, affine, planes, scales is not None)


def _parrec(path: Path) -> _Stored:
    image = _load(path)
    header = image.header
    i, j, k, volumes = (*(int(size) for size in image.shape), 1)[:4]
    stored = np.dtype(header.get_data_dtype())
    places = [int(place) for place in header.get_sorted_slice_indices()]  # of planes in the .REC
    slopes, shifts = (
        np.broadcast_to(part, image.shape)[0, 0].ravel(order="F") for part in header.get_data_scaling("dv")
    )
    scaled = bool((slopes != 1).any() or (shifts != 0).any())
    dtype = np.dtype(np.float32) if scaled else stored
    data = Path(image.file_map["image"].filename)
    plane_bytes = i * j * stored.itemsize
    if data.stat().st_size < (max(places) + 1) * plane_bytes:
        msg = f"{mention(data.name)} is cut short: it has fewer slices than its .PAR says."
        raise InputRefused(msg)

    def planes() -> Iterator[NDArray[Any]]:
        with data.open("rb") as file:
            for place, slope, shift in zip(places, slopes, shifts, strict=True):
                file.seek(place * plane_bytes)
                plane = np.frombuffer(read_exactly(file, plane_bytes, data), stored).reshape(j, i)
                yield (plane * float(slope) + float(shift)).astype(dtype) if scaled else plane

    affine = np.asarray(image.affine, np.float64)
    return _Stored("parrec", (i, j, k), volumes, dtype, affine, planes, scaled)
