"""The exports that `--backend onnx` keeps: made once, proved before each use, never a reason to fail."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from medsr_cli.engines import onnx_export
from medsr_cli.engines.onnx_file import checked_onnx
from medsr_cli.errors import ArgumentsError, RunError, WeightsError
from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.msgan_detector import LesionDetector, LesionDetectorConfig
from medsr_cli.tasks import export as task
from medsr_cli.tasks.export import ExportRequest, export, stored_export
from medsr_cli.tasks.progress import Silent
from medsr_cli.weights.store import Store
from tests.engines.onnx_models import nearest
from tests.makers import save_checkpoint


class Told(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def warn(self, sentence: str) -> None:
        self.warned.append(sentence)


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Which exports were made; each takes no time and is a network that repeats every pixel."""
    calls: list[str] = []

    def make(source: Any, net: Any, opset: int, precision: str, *, check: bool) -> Any:
        calls.append(precision)
        data = nearest(**{"id": source.metadata.get("id", "")}).SerializeToString()
        return checked_onnx(data, "made"), onnx_export.Agreement(1e-7, ((1, 2, 3),)) if check else None

    monkeypatch.setattr(task, "_made", make)
    return calls


@pytest.fixture
def checkpoint(tmp_path) -> tuple[Path, str]:
    path = save_checkpoint(tmp_path / "tiny.safetensors", id="tiny", modality="ct")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def files(home: Path) -> list[str]:
    return sorted(path.suffix for path in (home / "exports").iterdir())


def test_made_once_then_found(made, checkpoint, home):
    told = Told()
    first = stored_export(*checkpoint, "auto", told)
    assert told.said == ["Exporting the network for ONNX Runtime; this takes up to a minute, once for each checkpoint."]
    again = stored_export(*checkpoint, "fp32", told)
    assert (first.data, first.metadata["id"]) == (again.data, "tiny")
    assert (len(made), len(told.said), told.warned) == (1, 1, [])
    assert files(home) == [".json", ".onnx"]


def test_what_is_found_needs_no_pytorch(made, checkpoint, home):
    import subprocess
    import sys

    stored_export(*checkpoint, "auto", Silent())
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from medsr_cli.tasks.export import stored_export\nfrom medsr_cli.tasks.progress import Silent\n"
        f"assert stored_export(Path({str(checkpoint[0])!r}), {checkpoint[1]!r}, 'auto', Silent()).traits.scale == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\0" + data[1:], lambda _: b""])
def test_a_damaged_one_is_made_anew_and_said(made, checkpoint, home, damage):
    whole = stored_export(*checkpoint, "auto", Silent()).data
    (path,) = (home / "exports").glob("*.onnx")
    path.write_bytes(damage(whole))
    told = Told()
    assert stored_export(*checkpoint, "auto", told).data == whole
    assert path.read_bytes() == whole
    assert len(made) == 2
    assert len(told.warned) == 1
    assert "damaged and is made anew" in told.warned[0]


def test_whole_bytes_that_are_no_export_are_made_anew(made, checkpoint, home):
    place = task.export_of(Store(), checkpoint[1], "float32", task.OPSET)
    place.folder.mkdir()
    place.path.write_bytes(b"something else")
    place.record_path.write_bytes(place.record(b"something else"))
    assert stored_export(*checkpoint, "auto", Silent()).traits.scale == 2
    assert len(made) == 1


def test_older_ones_make_room_but_half_precision_stays(made, checkpoint, home):
    half = task.export_of(Store(), checkpoint[1], "float16", task.OPSET)
    older = half.folder / half.stem.replace("float16", "float32")
    half.folder.mkdir()
    for path in (half.path, Path(f"{older}0000.onnx"), Path(f"{older}0000.json")):
        path.write_bytes(b"x")
    stored_export(*checkpoint, "auto", Silent())
    assert half.path.exists()
    assert files(home) == [".json", ".onnx", ".onnx"]


def test_a_store_that_cannot_be_written_is_no_failure(made, checkpoint, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    told = Told()
    file = stored_export(*checkpoint, "auto", told, Store(tmp_path / "file" / "home"))
    assert file.traits.scale == 2
    assert len(told.warned) == 1
    assert "for this run alone" in told.warned[0]


def test_a_full_disk_is_no_failure(made, checkpoint, monkeypatch, home):
    def full(*_: Any, **__: Any) -> Any:
        raise RunError("The disk is full: x.onnx was not written.")

    monkeypatch.setattr(task, "atomic_file", full)
    told = Told()
    assert stored_export(*checkpoint, "auto", told).traits.scale == 2
    assert told.warned == [
        "The ONNX file could not be kept for the next run: The disk is full: x.onnx was not written."
    ]


def test_two_jobs_at_once_make_it_once(made, checkpoint, home):
    found: list[bytes] = []
    jobs = [
        threading.Thread(target=lambda: found.append(stored_export(*checkpoint, "auto", Silent()).data))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(set(found)) == 1
    assert (len(found), len(made)) == (3, 1)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precisions_that_cannot_be(made, checkpoint, precision):
    with pytest.raises(ArgumentsError):
        stored_export(*checkpoint, precision, Silent())
    assert made == []


def test_half_precision_is_another_file(made, checkpoint):
    stored_export(*checkpoint, "fp16", Silent())
    assert made == ["float16"]


# -- medsr export ------------------------------------------------------------------------------------------------------


def test_refused_before_any_work(made, tmp_path, checkpoint):
    (tmp_path / "there.onnx").write_bytes(b"x")
    (tmp_path / "folder.onnx").mkdir()
    for output, words in [("a.pt", "does not end in .onnx"), ("there.onnx", "exists"), ("folder.onnx", "is a folder")]:
        with pytest.raises(ArgumentsError, match=words):
            export(ExportRequest(tmp_path / output, weights=str(checkpoint[0])), Silent())
    assert made == []
    assert (tmp_path / "there.onnx").read_bytes() == b"x"


def test_a_file_of_ones_own(made, tmp_path, checkpoint):
    done = export(ExportRequest(tmp_path / "a.onnx", weights=str(checkpoint[0])), Silent())
    assert (done.path.stat().st_size, done.scale, done.checkpoint) == (done.bytes, 2.0, "tiny.safetensors")
    assert hashlib.sha256(done.path.read_bytes()).hexdigest() == done.sha256
    assert (done.largest_difference, done.sizes) == (1e-7, ((1, 2, 3),))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scale": 3.0}, ArgumentsError, "enlarges by 2, not by 3"),
        ({"model": "miassr"}, WeightsError, "a checkpoint of rdst, not of miassr"),
        ({"weights": "missing.safetensors"}, WeightsError, "no checkpoint missing.safetensors"),
        ({"weights": None, "model": "cohft"}, WeightsError, "No checkpoint of cohft"),
        ({"weights": None, "model": "bicubic"}, ArgumentsError, "computed, not learned"),
        ({"weights": None, "scale": 7.0}, ArgumentsError, "no checkpoint for scale 7"),
        ({"precision": "bf16"}, ArgumentsError, "bf16"),
    ],
)
def test_checkpoints_that_do_not_fit(made, tmp_path, checkpoint, changes, error, words):
    request = ExportRequest(**{"output": tmp_path / "a.onnx", "weights": str(checkpoint[0]), **changes})
    with pytest.raises(error, match=words):
        export(request, Silent())
    assert made == []
    assert not (tmp_path / "a.onnx").exists()


def test_networks_that_enlarge_nothing_are_refused(tmp_path):
    path = tmp_path / "detector.safetensors"
    path.write_bytes(save_network(LesionDetector(LesionDetectorConfig())))
    with pytest.raises(WeightsError, match="does not enlarge images"):
        export(ExportRequest(tmp_path / "a.onnx", weights=str(path), model="msgan-detector"), Silent())


def test_the_manifest_says_what_a_header_does_not(monkeypatch, tmp_path):
    seen: dict[str, str] = {}

    def make(source: Any, *_: Any, **__: Any) -> Any:
        seen.update(source.metadata)
        raise RunError("enough")

    monkeypatch.setattr(task, "_made", make)
    with pytest.raises(RunError, match="enough"):
        export(ExportRequest(tmp_path / "a.onnx", model="rdst-e", modality="mr"), Silent())
    assert seen["medsr.method"] == "rdst"
    assert {"id", "modality", "degradation", "licence_of_weights", "trained_on", "medsr.config", "scales"} <= set(seen)


def test_a_failure_of_the_exporter_is_a_sentence(monkeypatch, tmp_path, checkpoint):
    def fail(*_: Any, **__: Any) -> bytes:
        raise TypeError("\x1b[96mstep 1\nof 3")

    monkeypatch.setattr(onnx_export, "exported_network", fail)
    with pytest.raises(RunError, match=r"could not export tiny.safetensors with opset 20 \(TypeError\)"):
        export(ExportRequest(tmp_path / "a.onnx", weights=str(checkpoint[0])), Silent())
