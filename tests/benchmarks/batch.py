"""Fifty small files in one `medsr upscale` against fifty runs of one file each.

Of the separate runs a sample is taken, spread over the files, and multiplied; both are whole processes from start to
end, and take turns.

    python tests/benchmarks/batch.py [-m METHOD] [--kind nifti|png] [--files N] [--sample N] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

TARGET = 5


def make_files(folder: Path, kind: str, count: int) -> list[Path]:
    """Small images: 3 slices of 24 x 24, or one grey picture of 32 x 32."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"{number:02d}{'.nii.gz' if kind == 'nifti' else '.png'}"
        if kind == "nifti":
            nib.save(nib.Nifti1Image(rng.integers(0, 900, (24, 24, 3)).astype(np.int16), np.eye(4)), path)
        else:
            Image.fromarray(rng.integers(0, 256, (32, 32)).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def seconds(inputs: list[Path], method: str, target: Path) -> float:
    """A whole command, from the start of its process to its end."""
    command = [sys.executable, "-m", "medsr_cli", "upscale", *map(str, inputs), "-m", method, "-s", "4"]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--modality", "mr", "-o", str(target), "--overwrite", "-q"], check=True, capture_output=True
    )
    return time.perf_counter() - started


def main() -> None:
    """Print both times and their ratio."""
    ask = argparse.ArgumentParser()
    ask.add_argument("-m", "--method", default="rdst-e")
    ask.add_argument("--kind", choices=("nifti", "png"), default="nifti")
    ask.add_argument("--files", type=int, default=50)
    ask.add_argument("--sample", type=int, default=5)
    ask.add_argument("--rounds", type=int, default=3)
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        paths = make_files(folder, asked.kind, asked.files)
        sample = paths[:: max(asked.files // asked.sample, 1)][: asked.sample]
        together, apart = [], []
        for _ in range(asked.rounds):
            together.append(seconds(paths, asked.method, folder / "out"))
            for path in sample:
                apart.append(seconds([path], asked.method, folder / "out" / f"single_{path.name}"))
    a, b = statistics.median(together), statistics.median(apart) * asked.files
    print(
        f"{asked.method}, {asked.files} small {asked.kind} files: one command {a:.1f} s, {asked.files} apart {b:.1f} s"
        f" ({asked.sample} of them measured, {asked.rounds} times)"
    )
    print(f"ratio {b / a:.1f} (target {TARGET})")


if __name__ == "__main__":
    main()
