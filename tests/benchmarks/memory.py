"""Peak memory of a whole `medsr upscale`: for 600 slices against 60, and for a CT volume at x4.

    python tests/benchmarks/memory.py           # 600 slices against 60
    python tests/benchmarks/memory.py --large   # 512 x 512 x 300 at x4 (2.5 GB out: disk, and a few minutes), too

A network's activations depend on the slice and not on their number, so its peak at 512 x 512 is taken from a few
slices; how much of it is the engine's is what the engine alone takes on one such plane in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

TARGET_MB = 64
TARGET_CT_MB = 1500
CT_SIDE = 512
CT_SLICES = {"bicubic": 300, "miassr": 3, "rdst-e": 3}
"""Slices by method."""
PEAK = """
# Not ru_maxrss, which a child inherits from its parent.
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""
COMMAND = f"""
import sys
from medsr_cli.__main__ import main
sys.argv = ["medsr", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
{PEAK}"""
ENGINE = f"""
import sys
import numpy as np
from medsr_cli.tasks.model import ModelRequest, load_model
from medsr_cli.tasks.progress import Silent
method, side, runs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = load_model(ModelRequest(method, modality="ct"), (4.0, 4.0), "ct", Silent()).engine
planes = np.random.default_rng(0).random((1, 1, side, side))
for _ in range(runs):
    result = engine.run(planes)
{PEAK}"""


def peak_mb(program: str, arguments: list[str]) -> float:
    """Peak resident memory of a program in a process of its own, in MB."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]) / 1024


def of_upscale(path: Path, method: str, *options: str) -> float:
    """That of upscaling a file by 4."""
    return peak_mb(COMMAND, ["upscale", str(path), "-m", method, "-s", "4", *options, "--overwrite", "-q"])


def many_against_few(folder: Path) -> None:
    """Print the difference for slices along the last and the first array axis, and for RDST-E."""
    rng = np.random.default_rng(0)
    for axis, method, side in (("2", "bicubic", 128), ("0", "bicubic", 128), ("2", "rdst-e", 24)):
        peaks = []
        for count in (60, 600):
            shape = [side, side, side]
            shape[int(axis)] = count
            path = folder / f"{count}.nii.gz"
            nib.save(nib.Nifti1Image(rng.integers(0, 900, shape).astype(np.int16), np.eye(4)), path)
            peaks.append(of_upscale(path, method, "--axis", axis, "--modality", "mr"))
        more = peaks[1] - peaks[0]
        print(
            f"{method}, slices along axis {axis}: 60 slices {peaks[0]:.0f} MB, 600 slices {peaks[1]:.0f} MB, "
            f"{more:+.0f} MB (target {TARGET_MB})"
        )


def ct(folder: Path, slices: int) -> Path:
    """A disc of tissue in air with noise, in Hounsfield units."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:CT_SIDE, :CT_SIDE] - CT_SIDE / 2
    body = np.where(np.hypot(row, column) < 0.45 * CT_SIDE, 40, -1000)
    image = np.empty((CT_SIDE, CT_SIDE, slices), np.int16, order="F")
    for number in range(slices):
        image[..., number] = body + 300 * np.sin(row / 9 + number) * (body > 0) + rng.normal(0, 15, body.shape)
    path = folder / f"ct{slices}.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag([0.8, 0.8, 1, 1])), path)
    return path


def of_ct(folder: Path, method: str) -> None:
    """Print the peak for 512 x 512 slices to 2048 x 2048, and that of the engine alone."""
    slices = CT_SLICES[method]
    path = ct(folder, slices)
    whole = of_upscale(path, method, "--modality", "ct", "-o", str(folder / "out.nii.gz"))
    alone = peak_mb(ENGINE, [method, str(CT_SIDE), "1"])
    print(
        f"{method}, {CT_SIDE} x {CT_SIDE} x {slices} to 2048 x 2048: {whole:.0f} MB (target {TARGET_CT_MB}); "
        f"the engine alone on one plane {alone:.0f} MB, of which {peak_mb(ENGINE, [method, '64', '0']):.0f} MB are "
        "imports and weights",
        flush=True,
    )


def main() -> None:
    """Print a line for each case."""
    ask = argparse.ArgumentParser()
    ask.add_argument("--large", action="store_true", help="also 512 x 512 x 300 at x4")
    ask.add_argument("--only", choices=sorted(CT_SLICES), help="only this method's CT case")
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if not asked.only:
            many_against_few(Path(name))
        for method in [asked.only] if asked.only else CT_SLICES if asked.large else []:
            of_ct(Path(name), method)


if __name__ == "__main__":
    main()
