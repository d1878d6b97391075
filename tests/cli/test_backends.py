"""`--backend`: both engines give one result, exports are kept and checked, and `auto` goes by what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsr_cli.tasks import loading, speeds
from tests.makers import anatomy, save_checkpoint, save_nifti

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "scan.nii.gz", anatomy((40, 36, 3)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture(scope="module")
def kept_home(tmp_path_factory) -> Path:
    """A store that has the export already, for the tests that do not make one."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def home(kept_home, monkeypatch) -> Path:
    monkeypatch.setenv("MEDSR_HOME", str(kept_home))
    (kept_home / "speeds.json").unlink(missing_ok=True)
    return kept_home


def run(medsr, scan, checkpoint, target, *more):
    return medsr("upscale", scan, "-m", "rdst", "-s", "2", "--weights", checkpoint, "-o", target, *more)


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(int)


def engine_in(report: Path) -> str:
    return json.loads(report.read_text())["model"]["engine"]


def test_both_engines_give_one_result_and_the_export_is_made_once(medsr, scan, checkpoint, home, tmp_path):
    a, b, c = (tmp_path / f"{name}.nii.gz" for name in "abc")
    assert run(medsr, scan, checkpoint, a, "--backend", "torch").code == 0
    first = run(medsr, scan, checkpoint, b, "--backend", "onnx", "--report", tmp_path / "b.json")
    assert first.code == 0, first.err
    assert "Exporting the network" in first.err
    assert engine_in(tmp_path / "b.json") == "onnx"
    assert np.abs(values(a) - values(b)).max() <= 1
    again = run(medsr, scan, checkpoint, c, "--backend", "onnx")
    assert again.code == 0
    assert "Exporting" not in again.err
    assert c.read_bytes() == b.read_bytes()


def test_a_kept_export_runs_without_pytorch(scan, checkpoint, home, tmp_path):
    program = (
        "import sys\n"
        "from medsr_cli.cli import app\n"
        f"sys.argv = ['medsr', 'upscale', {str(scan)!r}, '-m', 'rdst', '-s', '2', '--weights', {str(checkpoint)!r},"
        f" '-o', {str(tmp_path / 'r.nii.gz')!r}, '--backend', 'onnx', '-q']\n"
        "try:\n    app.run()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'onnxruntime' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEDSR_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_an_exported_file_is_weights_like_any_other(medsr, scan, checkpoint, home, tmp_path):
    file = next((home / "exports").glob("*.onnx"))
    a, b = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    assert run(medsr, scan, checkpoint, a, "--backend", "onnx").code == 0
    assert run(medsr, scan, file, b).code == 0
    assert np.array_equal(values(a), values(b))
    assert run(medsr, scan, file, tmp_path / "c.nii.gz", "--backend", "torch").code == 2
    assert medsr("upscale", scan, "-m", "miassr", "-s", "2", "--weights", file).code == 5
    assert medsr("upscale", scan, "-m", "rdst", "-s", "3", "--weights", file).code == 2


def test_cuda_that_is_not_there_is_4(medsr, scan, checkpoint, home, tmp_path):
    ended = run(medsr, scan, checkpoint, tmp_path / "r.nii.gz", "--backend", "onnx", "-d", "cuda")
    if ended.code == 0:
        pytest.skip("CUDA works here")
    assert ended.code == 4
    assert "CUDA was asked for" in ended.err
    assert not (tmp_path / "r.nii.gz").exists()


def test_what_cannot_be_is_refused(medsr, scan, checkpoint, home, tmp_path):
    target = tmp_path / "r.nii.gz"
    assert run(medsr, scan, checkpoint, target, "--backend", "tensorrt").code == 2
    assert run(medsr, scan, checkpoint, target, "--backend", "onnx", "--precision", "bf16").code == 2
    assert run(medsr, scan, checkpoint, target, "--max-vram", "much").code == 2
    assert medsr("upscale", scan, "-m", "uscyclegan", "-s", "2", "--backend", "onnx", "-o", target).code == 2
    assert not target.exists()


# -- auto ------------------------------------------------------------------------------------------------------


def seconds_by_engine(monkeypatch, **seconds: float) -> None:
    monkeypatch.setattr(loading, "seconds_per_plane", lambda engine, *_, **__: seconds[engine.name])


@pytest.mark.parametrize("faster", ["torch", "onnx"])
def test_auto_measures_once_and_takes_the_faster(medsr, scan, checkpoint, home, tmp_path, monkeypatch, faster):
    slower = {"torch": "onnx", "onnx": "torch"}[faster]
    seconds_by_engine(monkeypatch, **{faster: 100.0, slower: 200.0})
    first = run(medsr, scan, checkpoint, tmp_path / "a.nii.gz", "-v", "--report", tmp_path / "a.json")
    assert first.code == 0, first.err
    assert "Measuring which engine is faster" in first.err
    assert f"Backend: {faster}" in first.err
    assert engine_in(tmp_path / "a.json") == faster
    seconds_by_engine(monkeypatch)
    again = run(medsr, scan, checkpoint, tmp_path / "b.nii.gz", "-v", "--report", tmp_path / "b.json")
    assert again.code == 0, again.err
    assert "measured before" in again.err
    assert engine_in(tmp_path / "b.json") == faster


def test_a_short_run_is_not_worth_an_export(medsr, scan, checkpoint, home, tmp_path, monkeypatch):
    monkeypatch.setattr(loading._Loading, "_stored_export", lambda _: pytest.fail("exported"))
    ended = run(medsr, scan, checkpoint, tmp_path / "a.nii.gz", "-v", "--report", tmp_path / "a.json")
    assert ended.code == 0, ended.err
    assert "too short to probe" in ended.err
    assert engine_in(tmp_path / "a.json") == "torch"
    (networks,) = json.loads((home / "speeds.json").read_text()).values()
    (seconds,) = networks.values()
    assert set(seconds) == {"torch"}


@pytest.mark.parametrize("option", ["--no-probe", "--deterministic"])
def test_nothing_is_measured_where_that_was_asked(medsr, scan, checkpoint, home, tmp_path, monkeypatch, option):
    seconds_by_engine(monkeypatch)
    ended = run(medsr, scan, checkpoint, tmp_path / "a.nii.gz", option, "--report", tmp_path / "a.json")
    assert ended.code == 0, ended.err
    assert engine_in(tmp_path / "a.json") == "torch"
    assert not (home / "speeds.json").exists()


def test_what_is_known_to_be_faster_is_not_exported_for_a_short_job(medsr, scan, tmp_path, monkeypatch):
    """The speeds are those of a network of this size; another checkpoint of it has no export yet."""
    monkeypatch.setenv("MEDSR_HOME", str(tmp_path / "home"))
    other = save_checkpoint(tmp_path / "other.safetensors", notes="another")
    monkeypatch.setattr(loading.Speeds, "known", lambda *_: {"torch": 0.2, "onnx": 0.1})
    monkeypatch.setattr(loading._Loading, "_stored_export", lambda _: pytest.fail("exported"))
    ended = run(medsr, scan, other, tmp_path / "a.nii.gz", "-v", "--report", tmp_path / "a.json")
    assert ended.code == 0, ended.err
    assert "too short for its export" in ended.err
    assert engine_in(tmp_path / "a.json") == "torch"


@pytest.mark.parametrize("scale", ['"abc"', "[4]", "0", "NaN", "1e308", "3"])
def test_a_header_that_lies_about_its_scale_is_5(medsr, scan, home, tmp_path, scale):
    from safetensors.torch import load_file, save_file

    from medsr_cli.weights.headers import read_header

    honest = save_checkpoint(tmp_path / "net.safetensors")
    metadata = dict(read_header(honest).metadata)
    metadata["medsr.config"] = metadata["medsr.config"].replace('"scale": 2', f'"scale": {scale}')
    assert metadata != read_header(honest).metadata
    save_file(load_file(honest), tmp_path / "lie.safetensors", metadata)
    ended = run(medsr, scan, tmp_path / "lie.safetensors", tmp_path / "a.nii.gz")
    assert ended.code == 5, ended.err
    assert "inside medsr" not in ended.err


def test_auto_goes_on_with_pytorch_where_the_export_fails(medsr, scan, checkpoint, home, tmp_path, monkeypatch):
    from medsr_cli.errors import RunError

    def fail(_: object) -> None:
        msg = "The exported model is not the network."
        raise RunError(msg, "Use another.")

    monkeypatch.setattr(loading._Loading, "_stored_export", fail)
    seconds_by_engine(monkeypatch, torch=100.0)
    ended = run(medsr, scan, checkpoint, tmp_path / "a.nii.gz", "-v")
    assert ended.code == 0, ended.err
    assert "Backend: torch (onnx cannot run it: The exported model is not the network." in ended.err
    assert speeds.Speeds(home).path.exists() is False
