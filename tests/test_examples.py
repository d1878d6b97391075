"""The scripts of examples/ run as they stand, with the checkpoint of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    command = tmp_path / "bin" / "medsr"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m medsr_cli "$@"\n')
    command.chmod(0o755)
    return {
        "PATH": "/usr/bin:/bin",
        "MEDSR": str(command),
        "MEDSR_HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path),
    }


def run(script: str, arguments: list[Path], environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", str(EXAMPLES / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_png_stays_16_bit(environment, tmp_path):
    source = EXAMPLES / "png" / "brain_t2_slice_16bit.png"
    run("png_16bit.sh", [source, tmp_path / "big.png"], environment)
    before, after = np.asarray(Image.open(source)), np.asarray(Image.open(tmp_path / "big.png"))
    assert after.dtype == before.dtype == np.uint16
    assert after.shape == (4 * before.shape[0], 4 * before.shape[1])
    assert after.max() > 256
    assert (tmp_path / "big_preview.png").exists()


def test_nifti_folder_and_a_second_run_that_does_nothing(environment, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(EXAMPLES / "nifti" / "brain_flair_4mm.nii.gz", folder)
    assert "done:" in run("nifti_folder.sh", [folder, output], environment)
    result = output / "brain_flair_4mm_x4-rdst.nii.gz"
    assert nib.load(result).shape == (144, 160, 6)
    written = result.stat().st_mtime_ns
    run("nifti_folder.sh", [folder, output], environment)
    assert result.stat().st_mtime_ns == written


def test_every_example_file_has_a_source_and_a_licence():
    sources = (EXAMPLES / "SOURCES.md").read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*"):
        if path.is_file() and path.suffix not in {".sh", ".md"} and path.parent.name != "container":
            name = path.relative_to(EXAMPLES).as_posix()
            assert name in sources or f"{name.split('/')[0]}/`" in sources, f"{name} has no source"
