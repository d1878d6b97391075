"""`medsr export` as a shell sees it."""

from __future__ import annotations

import json

import onnx
import pytest

from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from tests.engines.test_onnx_export import stages_form
from tests.makers import save_checkpoint


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("medsr_cli.networks.msgan.graph_form", stages_form, raising=False)
    path = tmp_path / "small.safetensors"
    path.write_bytes(save_network(MsGan(MsGanConfig(n_blocks=1, n_feats=8)), {"id": "small", "modality": "mr"}))
    return path


def test_writes_a_file_and_prints_its_path(medsr, tmp_path, checkpoint):
    output = tmp_path / "small.onnx"
    ended = medsr("export", "-m", "msgan", "--weights", checkpoint, "-o", output, "--log-paths")
    assert (ended.code, ended.out) == (0, f"{output}\n"), ended.err
    for word in ("small.safetensors", "opset 20", "x4", "image to intermediate, enlarged", "Largest difference"):
        assert word in ended.err
    onnx.checker.check_model(output, full_check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]
    again = medsr("export", "-m", "msgan", "--weights", checkpoint, "-o", output)
    assert (again.code, again.out) == (2, "")
    assert "--overwrite" in again.err


def test_one_json_line(medsr, tmp_path, checkpoint):
    output = tmp_path / "small.onnx"
    asked = ("--opset", 18, "--no-check", "--json", "--quiet")
    ended = medsr("export", "-m", "msgan", "--weights", checkpoint, "-o", output, *asked)
    facts = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert (facts["path"], facts["opset"], facts["largest_difference"]) == (str(output), 18, None)
    assert facts["bytes"] == output.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-o", "a.onnx", "--opset", "12"), 2, "opset 12"),
        (("-o", "a.pt"), 2, ".onnx"),
        (("-o", "a.onnx", "--precision", "bf16"), 2, "bf16"),
        (("-o", "a.onnx", "-m", "nonsense"), 2, "There is no method called"),
        (("-o", "a.onnx", "-m", "uscyclegan"), 5, "--weights"),
        (("-o", "a.onnx", "--modality", "pet"), 2, "mr, ct, us or xr"),
        ((), 2, "--output"),
    ],
)
def test_what_cannot_be(medsr, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    ended = medsr("export", *arguments)
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_exit_5(medsr, tmp_path):
    path = save_checkpoint(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    ended = medsr("export", "--weights", path, "-o", tmp_path / "a.onnx")
    assert ended.code == 5, ended.err
    assert not (tmp_path / "a.onnx").exists()
