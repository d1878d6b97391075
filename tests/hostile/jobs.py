"""Whole pieces of work, from a source to a result under its name, that disks and kills interrupt."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from medsr_cli.formats import create_image, open_image
from medsr_cli.formats.contract import Derivation
from tests.hostile.seeds import _colour, _enhanced, _filled, _header, _saved

_FileIO = io.FileIO
MADE_BY = Derivation("nearest", (2.0, 2.0), "medsr test")


# -- sources --------------------------------------------------------------------------------------------------


def _nifti(folder: Path, side: int = 24) -> Path:
    pixels = np.random.default_rng(1).integers(-500, 500, (side, side - 3, side - 5)).astype(np.int16)
    nib.save(nib.Nifti1Image(pixels, np.diag([1.0, 1.2, 3.0, 1.0])), folder / "source.nii.gz")
    return folder / "source.nii.gz"


def _sagittal(folder: Path) -> Path:
    """Slices across the stored order: reader and writer pass through temporary files."""
    pixels = np.random.default_rng(1).integers(-500, 500, (6, 20, 22)).astype(np.int16)
    nib.save(nib.Nifti1Image(pixels, np.diag([5.0, 1.0, 1.0, 1.0])), folder / "source.nii.gz")
    return folder / "source.nii.gz"


def _series(folder: Path, count: int = 6, side: int = 40) -> Path:
    (folder / "source").mkdir()
    for at in range(count):
        ds = _filled(_header(rows=side, columns=side - 4))
        ds.SOPInstanceUID, ds.InstanceNumber = f"1.2.3.4.5.{at}", at
        ds.ImagePositionPatient = ["0", "0", str(2 * at)]
        (folder / "source" / f"{at}.dcm").write_bytes(_saved(ds))
    return folder / "source"


def _one(make: Callable[[], Any]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        (folder / "source.dcm").write_bytes(_saved(make()))
        return folder / "source.dcm"

    return written


def _grey(folder: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (90, 80)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "source.png")
    return folder / "source.png"


def _deep_colour(folder: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(folder / "source.png"))
    return folder / "source.png"


def _stack(folder: Path) -> Path:
    pages = [Image.fromarray(np.full((30, 20), 20 * at, np.uint8)) for at in range(5)]
    pages[0].save(folder / "source.tif", save_all=True, append_images=pages[1:])
    return folder / "source.tif"


JOBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NIfTI": (_nifti, "result.nii"),
    "packed NIfTI": (_nifti, "result.nii.gz"),
    "NIfTI across": (_sagittal, "result.nii.gz"),
    "pair": (_nifti, "result.hdr"),
    "NRRD": (_nifti, "result.nrrd"),
    "MetaImage": (_nifti, "result.mha"),
    "MGZ": (_nifti, "result.mgz"),
    "DICOM series": (_series, "result"),
    "DICOM file": (_one(lambda: _filled(_header(rows=30, columns=20))), "result.dcm"),
    "DICOM multi-frame": (_one(_enhanced), "result"),
    "DICOM in colour": (_one(lambda: _colour(30, 20)), "result.dcm"),
    "PNG": (_grey, "result.png"),
    "PNG of 48 bits": (_deep_colour, "result.png"),
    "JPEG": (_grey, "result.jpg"),
    "TIFF": (_stack, "result.tif"),
    "BMP": (_grey, "result.bmp"),
}
"""Source and name of the result, by what is written."""


def convert(source: Path, target: Path) -> None:
    """Enlarge every slice twofold by repeating its pixels."""
    reader = open_image(source)
    volume = reader.volume
    result = volume.enlarged(2 * volume.rows, 2 * volume.columns)
    with create_image(target, reader, result, MADE_BY) as writer:
        for pixels in reader.slices():
            writer.write(pixels.repeat(2, 1).repeat(2, 2))


# -- what is in a folder --------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [f"{p.relative_to(path)} {digest(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_whole(target: Path, slices: int) -> bool:
    """Whether a result can be read from its first slice to its last."""
    return sum(1 for _ in open_image(target).slices()) == slices


def slices_of(source: Path) -> int:
    return open_image(source).volume.slices


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


# -- disks that fail ------------------------------------------------------------------------------------------


class Disk:
    """Counts what is done to the disk, and does something else at the n-th time.

    Every file that medsr opens for writing comes from `Path.open` or from `tempfile`, whatever library then fills it;
    what is flushed, renamed or made passes through `os` and `Path.mkdir`.
    """

    def __init__(self, at: int, instead: Callable[[], None], *, reading: bool = False) -> None:
        self.at, self.instead, self.reading = at, instead, reading
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.at and self.count >= self.at:
            self.instead()

    def _opened(self, path: Any, mode: str, buffering: int = -1) -> Any:
        disk = self

        class File(_FileIO):
            def write(self, data: Any) -> int:
                if not disk.reading:
                    disk.step()
                return super().write(data)

            def readinto(self, buffer: Any) -> int:
                if disk.reading:
                    disk.step()
                return super().readinto(buffer)

            def readall(self) -> bytes:
                if disk.reading:
                    disk.step()
                return super().readall()

            def read(self, size: int = -1) -> bytes:
                if disk.reading and size >= 0:
                    disk.step()
                return super().read(size)

        raw = File(path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        if "+" in mode:
            return io.BufferedRandom(raw)
        return io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[Disk]:
        """Between medsr and the disk."""
        real_open, disk = Path.open, self

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = bool(set(mode) & set("wxa+"))
            if "b" not in mode or (writes == disk.reading):
                return real_open(path, mode, *args, **kwargs)
            if "x" in mode:
                disk.step()
            return disk._opened(path, mode)

        def temporary(mode: str = "w+b", buffering: int = -1, **kwargs: Any) -> Any:
            number, name = tempfile.mkstemp(dir=kwargs.get("dir"))
            os.unlink(name)
            return disk._opened(number, "r+b", buffering)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", opened)
            if self.reading:
                patch.setattr("medsr_cli.formats.bounded.io.FileIO", lambda path: disk._opened(path, "rb", 0))
            else:
                patch.setattr(tempfile, "TemporaryFile", temporary)
                for name in ("fsync", "replace", "rename"):
                    real = getattr(os, name)
                    patch.setattr(os, name, lambda *args, real=real: (disk.step(), real(*args))[1])
                real_mkdir = Path.mkdir
                patch.setattr(
                    Path, "mkdir", lambda path, *args, **kwargs: (disk.step(), real_mkdir(path, *args, **kwargs))[1]
                )
            yield self


def failing(number: int) -> Callable[[], None]:
    """What a full or broken disk says."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


FULL, BROKEN = errno.ENOSPC, errno.EIO
