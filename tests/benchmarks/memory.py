"""Peak memory of a whole `medsr upscale` for 600 slices against 60."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

TARGET_MB = 64
PROGRAM = """
import sys
from medsr_cli.__main__ import main
sys.argv = ["medsr", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
# Not ru_maxrss, which a child inherits from its parent.
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def peak_mb(path: Path, axis: str, method: list[str]) -> float:
    """Peak resident memory of upscaling a file, in MB."""
    command = [sys.executable, "-c", PROGRAM, "upscale", str(path), *method, "--axis", axis, "--overwrite", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) / 1024


def main() -> None:
    """Print the difference for slices along the last and the first array axis, and for RDST-E."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for axis, method in (("2", ["-m", "bicubic"]), ("0", ["-m", "bicubic"]), ("2", ["-m", "rdst"])):
            peaks = []
            for count in (60, 600):
                side = 24 if "rdst" in method else 128
                shape = [side, side, side]
                shape[int(axis)] = count
                path = Path(name) / f"{count}.nii.gz"
                nib.save(nib.Nifti1Image(rng.integers(0, 900, shape).astype(np.int16), np.eye(4)), path)
                peaks.append(peak_mb(path, axis, method))
            more = peaks[1] - peaks[0]
            print(
                f"{method[1]}, slices along axis {axis}: 60 slices {peaks[0]:.0f} MB, 600 slices {peaks[1]:.0f} MB, "
                f"{more:+.0f} MB (target {TARGET_MB})"
            )


if __name__ == "__main__":
    main()
