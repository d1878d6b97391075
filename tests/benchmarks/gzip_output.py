"""Writing a .nii.gz through medsr against nibabel's own: rate and size."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

from medsr_cli import formats
from medsr_cli.formats.contract import Derivation

RUNS = 3
FALLBACK_SHAPE = (240, 280, 160)


def volume() -> np.ndarray:
    """A T1 twice as fine in plane where the shared data is present, else noise with structure."""
    path = Path(__file__).resolve().parents[2].parent / "shared/data/train/brain_mr/studyforrest_02/T1.nii.gz"
    if path.exists():
        return zoom(np.asarray(nib.load(path).dataobj), (2, 2, 1), order=1).astype(np.int16)
    rng = np.random.default_rng(0)
    return (rng.gamma(2, 60, FALLBACK_SHAPE)).astype(np.int16)


def main() -> None:
    """Print both rates, their ratio and the ratio of sizes."""
    data = volume()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.nii"
        nib.save(nib.Nifti1Image(data, np.diag([0.35, 0.35, 0.7, 1])), source)
        ours, theirs = [], []
        for _ in range(RUNS):
            started = time.perf_counter()
            nib.save(nib.Nifti1Image(data, np.eye(4)), folder / "theirs.nii.gz")
            theirs.append(time.perf_counter() - started)
            reader = formats.open_image(source)
            slices = list(reader.slices())
            started = time.perf_counter()
            derivation = Derivation("copy", (1, 1), "benchmark")
            target = folder / "ours.nii.gz"
            with formats.create_image(target, reader, reader.volume, derivation, overwrite=True) as writer:
                for pixels in slices:
                    writer.write(pixels)
            ours.append(time.perf_counter() - started)
        a, b = statistics.median(ours), statistics.median(theirs)
        size = (folder / "ours.nii.gz").stat().st_size / (folder / "theirs.nii.gz").stat().st_size
        rate = data.nbytes / 1e6
        print(f"{rate:.0f} MB int16: medsr {rate / a:.0f} MB/s (verified and on the disk), nibabel {rate / b:.0f} MB/s")
        print(f"ratio {b / a:.1f} (target 5); size {100 * (size - 1):+.1f} % (target within 5 %)")


if __name__ == "__main__":
    main()
