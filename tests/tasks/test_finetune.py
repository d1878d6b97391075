import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from medsr_cli import formats
from medsr_cli.cli import finetune as cli
from medsr_cli.engines.devices import find_device
from medsr_cli.errors import (
    ArgumentsError,
    DeviceUnavailable,
    InputRefused,
    QualityGateFailed,
    RunError,
    WeightsError,
    unmarked,
)
from medsr_cli.formats import atomic
from medsr_cli.networks import load_network
from medsr_cli.tasks.finetune import FinetuneRequest, as_json, command_line, finetune
from medsr_cli.training import interruption, loop
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.recipe import changed, recipe_named
from medsr_cli.training.state import read_state
from medsr_cli.training.validation import mean_gain, validate
from tests.training.anatomy import packed, phantom, tiny

ROOT = Path(__file__).resolve().parents[2]
FEW = {"iterations": 6, "batch": 2, "patch": 8, "learning_rate": 1e-3, "validate_every": 3}
LINEAR = {
    "iterations": 280,
    "linear_steps": 280,
    "batch": 4,
    "patch": 12,
    "learning_rate": 4e-3,
    "schedule": "cooldown",
    "average": 0.9,
    "validate_every": 70,
}
"""Trains head and tail alone, which is past bicubic in seconds."""


class Ear:
    """Remembers what it is told, and can do something at a step."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.notes, self.steps, self.validations = at, act, [], [], []

    def packing(self, done, total):
        pass

    def note(self, sentence):
        self.notes.append(unmarked(sentence))

    def step(self, done, total, loss):
        self.steps.append(done)
        if done == self.at:
            self.act()

    def validated(self, done, scores, best):
        self.validations.append((done, mean_gain(scores)))


WHOLE = ["out.log.jsonl", "out.md", "out.png", "out.safetensors"]
"""What a finished run leaves."""


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("pack") / "slices.safetensors", subjects=3)


@pytest.fixture
def request_(pack, tmp_path):
    """Anything passes the gate; tests of the gate set it back."""
    return FinetuneRequest(
        pack, tmp_path / "out.safetensors", scale=2, network=tiny(), settings=FEW, least_gain_db=-1e9, device="cpu"
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what comes out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pack, tmp_path_factory):
    """A run that gets past bicubic, with the gate as it is."""
    folder = tmp_path_factory.mktemp("trained")
    ear = Ear()
    request = FinetuneRequest(
        pack,
        folder / "ours",
        scale=2,
        network=tiny(),
        settings=LINEAR,
        device="cpu",
        modality="mr",
        body_part="brain",
        licence="CC0-1.0",
    )
    return request, finetune(request, ear), ear


def test_a_linear_start_gets_past_bicubic_and_is_written(trained):
    request, result, ear = trained
    assert result.gain_db > 0
    assert result.gain_db > result.start_gain_db
    assert names(request.output.parent) == ["ours.log.jsonl", "ours.md", "ours.png", "ours.safetensors"]
    assert result.output == request.output.with_name("ours.safetensors")
    assert not result.interrupted
    assert ear.steps == list(range(1, 281))


def test_the_checkpoint_does_what_its_card_says(trained, pack):
    _, result, _ = trained
    net = load_network(result.output)
    slices = PackedSlices(pack)
    held = {score.subject for score in result.scores}
    assert len(held) == 1
    again = validate(net, slices, slices.indices_of(held), 2)
    assert mean_gain(again) == pytest.approx(result.gain_db, abs=1e-6)
    card = result.card.read_text()
    assert f"{result.gain_db:+.2f} dB" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["medsr"]["sha256"] == result.sha256
    assert front["medsr"]["bytes"] == result.output.stat().st_size
    assert front["medsr"]["body_part"] == "brain"


def test_the_checkpoint_is_in_half_precision_with_metadata(trained):
    _, result, _ = trained
    with safe_open(result.output, "pt") as file:
        said = file.metadata()
        kept = file.get_tensor("head.weight").dtype
    # A phantom is nearly perfect after a minute: half precision may then cost more than is allowed, and says so.
    assert kept == (torch.float16 if result.half else torch.float32)
    assert result.half or any("half precision would cost" in note for note in result.notes)
    assert said["medsr.method"] == "rdst"
    assert json.loads(said["scales"]) == [2]
    assert (said["modality"], said["degradation"], said["id"]) == ("mr", "cubic", "ours")
    assert said["command"].startswith("medsr finetune DIR -m rdst -s 2 -o OUT")


def test_neither_card_nor_metadata_names_a_file_or_a_path(trained, pack):
    request, result, _ = trained
    with safe_open(result.output, "pt") as file:
        texts = result.card.read_text() + json.dumps(file.metadata())
    for word in ("scan0", "s0/", "s1/", "s2/", str(pack.parent), str(request.output.parent)):
        assert word not in texts


def test_the_result_is_one_line_of_json(trained):
    _, result, _ = trained
    line = as_json(result)
    said = json.loads(line)
    assert "\n" not in line
    assert said["path"] == str(result.output)
    assert said["scores"][0]["gain"] == pytest.approx(result.gain_db)


# -- the gate ----------------------------------------------------------------------------------------------


def test_worse_than_bicubic_is_not_written(request_):
    with pytest.raises(QualityGateFailed, match="against bicubic") as caught:
        finetune(replace(request_, least_gain_db=0.0), Ear())
    assert caught.value.exit_code == 7
    assert "out.work" in str(caught.value)
    assert names(request_.output.parent) == ["out.work"]
    assert {"state.pt", "log.jsonl", "run.json"} <= set(names(request_.output.parent / "out.work"))


def test_worse_than_its_start_is_not_written(request_, trained):
    """A good checkpoint, spoilt by a learning rate that is far too high."""
    spoilt = replace(request_, network=None, weights=str(trained[1].output), settings={**FEW, "learning_rate": 0.5})
    with pytest.raises(QualityGateFailed, match="better than the start"):
        finetune(spoilt, Ear())
    assert names(request_.output.parent) == ["out.work"]


def test_a_refused_run_can_be_trained_longer(request_):
    with pytest.raises(QualityGateFailed):
        finetune(replace(request_, least_gain_db=0.0), Ear())
    ear = Ear()
    result = finetune(replace(request_, resume=True, settings={"iterations": 8}), ear)
    assert ear.steps == [7, 8]
    assert result.steps == 8
    assert names(request_.output.parent) == WHOLE


# -- stopping and going on ---------------------------------------------------------------------------------


def weights(path):
    return load_network(path).state_dict()


def test_stopped_and_resumed_gives_the_same_file(request_, tmp_path):
    whole = finetune(request_, Ear())
    stopped_at = tmp_path / "other" / "out.safetensors"
    first = finetune(replace(request_, output=stopped_at), Ear(4, interrupt))
    assert first.interrupted
    assert first.steps == 4
    ear = Ear()
    second = finetune(replace(request_, output=stopped_at, resume=True), ear)
    assert ear.steps == [5, 6]
    assert [step for step, _ in ear.validations] == [6]
    mine, theirs = weights(second.output), weights(whole.output)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert names(stopped_at.parent) == WHOLE


def test_ctrl_c_writes_what_is_good_so_far_and_the_resumed_run_replaces_it(request_):
    first = finetune(request_, Ear(4, interrupt))
    assert first.output == request_.output
    assert first.work_folder == request_.output.with_suffix(".work")
    load_network(first.output)
    assert "stopped before its last step" in first.card.read_text()
    second = finetune(replace(request_, resume=True), Ear())
    assert (second.steps, second.work_folder) == (6, None)
    assert second.card.exists()
    assert "stopped before its last step" not in second.card.read_text()


def test_ctrl_c_before_anything_is_good_writes_nothing(request_):
    result = finetune(replace(request_, least_gain_db=0.0), Ear(1, interrupt))
    assert (result.output, result.interrupted, result.steps) == (None, True, 1)
    assert names(request_.output.parent) == ["out.work"]


def test_a_resumed_run_does_not_replace_a_strangers_file(request_):
    finetune(replace(request_, least_gain_db=0.0), Ear(1, interrupt))
    request_.output.write_bytes(b"mine")
    with pytest.raises(ArgumentsError, match="has not written it"):
        finetune(replace(request_, resume=True), Ear())
    assert request_.output.read_bytes() == b"mine"


def test_resuming_refuses_another_recipe_by_field(request_):
    finetune(request_, Ear(2, interrupt))
    again = replace(request_, resume=True)
    with pytest.raises(ArgumentsError, match="batch 2, not 3"):
        finetune(replace(again, settings={"batch": 3}), Ear())
    with pytest.raises(ArgumentsError, match="-m and -s"):
        finetune(replace(again, scale=4, network=tiny(4)), Ear())
    with pytest.raises(ArgumentsError, match="validation subjects"):
        finetune(replace(again, validation_subjects=["s0", "s1"]), Ear())
    finetune(replace(again, settings={}), Ear())


def test_resuming_refuses_other_images(request_, tmp_path):
    finetune(request_, Ear(2, interrupt))
    other = packed(tmp_path / "other.safetensors", subjects=4)
    with pytest.raises(ArgumentsError, match="other images"):
        finetune(replace(request_, resume=True, folder=other, validation_subjects=["s1"]), Ear())


def test_resuming_nothing_starts_and_says_so(request_):
    ear = Ear()
    assert finetune(replace(request_, resume=True), ear).steps == 6
    assert any("no run to go on with" in note for note in ear.notes)


def test_max_minutes_stops_validates_and_can_go_on(request_, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(ticks) * 1.0)
    ear = Ear()
    first = finetune(replace(request_, max_minutes=0.2), ear)
    monkeypatch.undo()
    assert 0 < first.steps < 6
    assert ear.validations[-1][0] == first.steps
    assert not first.interrupted
    assert first.work_folder is not None
    saved = read_state(first.work_folder / "state.pt")
    assert saved["step"] == first.steps
    second = finetune(replace(request_, resume=True), Ear())
    assert second.steps == 6
    assert second.work_folder is None


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import typer
from medsr_cli.cli.finetune import finetune
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(finetune)
app(sys.argv[1:])
"""


def start_cli(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(root=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_leaves_a_state_and_no_partial_output(pack, tmp_path, number, trained):
    """The real command, with a checkpoint to start from, stopped from outside while it trains."""
    out = tmp_path / "out.safetensors"
    start = trained[1].output
    options = ["--weights", start, "-s", "2", "--batch", "1", "--patch", "8", "--validate-every", "2"]
    process = start_cli(pack, "-o", out, *options, "--lr", "1e-6", "--iterations", "1000000", "--threads", "1")
    work = tmp_path / "out.work"
    deadline = time.monotonic() + 60
    while not (work / "log.jsonl").exists() or (work / "log.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    step = read_state(work / "state.pt")["step"]
    assert step >= 2
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
    if out.exists():
        load_network(out)
        assert said.strip() == str(out)
    left = {name for name in names(tmp_path) if not name.startswith(".medsr-")}
    assert left <= {"out.work", *WHOLE}
    ear = Ear()
    request = FinetuneRequest(
        pack,
        out,
        scale=2,
        resume=True,
        settings={"iterations": step + 2},
        device="cpu",
        least_gain_db=-1e9,
        threads=1,
    )
    with _either():
        finetune(replace(request, keep_work=True), ear)
    assert ear.steps == [step + 1, step + 2]
    if number == signal.SIGKILL:
        given = {"batch": 1, "patch": 8, "validate_every": 2, "learning_rate": 1e-6, "iterations": step + 2}
        whole = replace(request, output=tmp_path / "whole" / "out.safetensors", resume=False, keep_work=True)
        with _either():
            finetune(replace(whole, weights=str(start), settings=given, threads=1), Ear())
        mine, theirs = (read_state(place / "out.work" / "state.pt") for place in (tmp_path, tmp_path / "whole"))
        assert mine["history"] == theirs["history"]
        assert all(torch.equal(mine["weights"][key], theirs["weights"][key]) for key in theirs["weights"])


# -- what stands in the way --------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_before_training(request_):
    request_.output.write_bytes(b"old")
    ear = Ear()
    with pytest.raises(ArgumentsError, match="exists"):
        finetune(request_, ear)
    assert ear.steps == []
    assert finetune(replace(request_, overwrite=True), ear).output == request_.output
    load_network(request_.output)


def test_a_card_that_exists_is_refused_before_training(request_):
    request_.output.with_suffix(".md").write_text("my notes")
    with pytest.raises(ArgumentsError, match=r"out\.md"):
        finetune(request_, Ear())


def test_a_run_that_was_not_finished_is_not_thrown_away(request_):
    finetune(replace(request_, least_gain_db=0.0), Ear(2, interrupt))
    with pytest.raises(ArgumentsError, match="--resume"):
        finetune(request_, Ear())
    ear = Ear()
    finetune(replace(request_, overwrite=True), ear)
    assert ear.steps[0] == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"output": Path("x.pt")}, ArgumentsError, "Call it x.safetensors"),
        ({"output": Path("x.TXT")}, ArgumentsError, "Call it x.safetensors"),
        ({"output": Path("v1.2.nii.gz")}, ArgumentsError, r"Call it v1\.2\.safetensors"),
        ({"output": Path("x.Safetensors")}, ArgumentsError, "Call it x.safetensors"),
        ({"output": Path("/")}, ArgumentsError, "names no file"),
        ({"folder": Path("no/such/folder")}, ArgumentsError, "no/such/folder"),
        ({"model": "bicubic"}, ArgumentsError, "cannot be trained"),
        ({"model": "rdts"}, ArgumentsError, "Did you mean"),
        ({"scale": 5}, ArgumentsError, "scale 5"),
        ({"weights": "a", "start": "b"}, ArgumentsError, "--start"),
        ({"resume": True, "overwrite": True}, ArgumentsError, "--overwrite"),
        ({"max_minutes": 0.0}, ArgumentsError, "minutes"),
        ({"preset": "slow"}, ArgumentsError, "paper, quick"),
        ({"preset": "paper", "recipe": Path("x.yaml")}, ArgumentsError, "--recipe"),
        ({"recipe": Path("gone.yaml")}, ArgumentsError, "gone.yaml"),
        ({"segmentation": "a.safetensors"}, ArgumentsError, "no loss of this recipe"),
        ({"settings": {"losses": {"hrl": 1.0}}, "segmentation": "gone.pt2"}, WeightsError, "gone.pt2"),
        ({"model": "uscyclegan"}, ArgumentsError, "medsr upscale IMAGE -m uscyclegan"),
        ({"model": "miassr"}, ArgumentsError, "every scale at once"),
        ({"model": "segmentation"}, ArgumentsError, "enlarges nothing"),
        ({"settings": {"batch": 0}}, ArgumentsError, "batch"),
        ({"device": "tpu"}, ArgumentsError, "tpu"),
        ({"weights": "gone.safetensors"}, WeightsError, "gone.safetensors"),
        ({"validation_subjects": ["zzz"]}, ArgumentsError, "validate on"),
        ({"validation": Path()}, ArgumentsError, "--val"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(request_, changes, error, words):
    with pytest.raises(error, match=words) as caught:
        finetune(replace(request_, **changes), Ear())
    assert str(caught.value).endswith(".")
    assert names(request_.output.parent) == []


def test_a_folder_of_low_resolution_images_has_to_be_another_folder(request_, folder, tmp_path):
    for low, words in ((tmp_path / "gone", "is no folder"), (folder, "the images itself")):
        with pytest.raises(ArgumentsError, match=words):
            finetune(replace(request_, folder=folder, low=low, pack_only=True), Ear())


def test_a_dot_in_a_name_is_no_suffix_and_the_file_is_told_at_the_start(request_, folder, tmp_path):
    ear = Ear()
    done = finetune(replace(request_, folder=folder, output=tmp_path / "ours-v1.2", pack_only=True), ear)
    assert done.output == tmp_path / "ours-v1.2.safetensors"
    assert ear.notes[0] == "What comes of it is written to ours-v1.2.safetensors."
    ear = Ear()
    finetune(replace(request_, folder=folder, pack_only=True), ear)
    assert not any("is written to" in note for note in ear.notes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda:3"])
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(DeviceUnavailable) as caught:
        find_device(name)
    assert caught.value.exit_code == 4


def test_one_subject_is_refused(request_, tmp_path):
    alone = packed(tmp_path / "alone.safetensors", subjects=1)
    with pytest.raises(InputRefused, match="at least two"):
        finetune(replace(request_, folder=alone), Ear())
    assert names(tmp_path) == ["alone.safetensors"]


def test_images_too_small_to_validate_on_are_refused(request_, tmp_path):
    small = packed(tmp_path / "small.safetensors", side=(16, 10))
    with pytest.raises(InputRefused, match="large enough"):
        finetune(replace(request_, folder=small), Ear())


@pytest.mark.parametrize("name", ["out.safetensors", "state.pt"])
def test_a_full_disk_is_one_sentence_and_the_last_state_goes_on(request_, monkeypatch, name):
    """Once while the checkpoint is written, once at the second state, in the middle of the training."""
    good, written = atomic.atomic_file, []

    @contextlib.contextmanager
    def full(target, **options):
        written.append(target.name)
        if target.name == name and (name == "out.safetensors" or written.count(name) == 2):
            msg = f"The disk is full: {target.name} was not written."
            raise RunError(msg, "Free some space.")
        with good(target, **options) as file:
            yield file

    monkeypatch.setattr("medsr_cli.formats.atomic.atomic_file", full)
    monkeypatch.setattr("medsr_cli.training.state.atomic_file", full)
    with pytest.raises(RunError, match="full") as caught:
        finetune(request_, Ear())
    assert "out.work: --resume" in unmarked(caught.value.remedy)
    monkeypatch.undo()
    assert names(request_.output.parent) == ["out.work"]
    assert read_state(request_.output.parent / "out.work" / "state.pt")["step"] == (6 if name != "state.pt" else 0)
    finetune(replace(request_, resume=True), Ear())
    load_network(request_.output)


def test_too_little_memory_is_one_sentence(request_, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(loop.Trainer, "_step", exhausted)
    with pytest.raises(RunError, match="memory") as caught:
        finetune(request_, Ear())
    assert "--batch" in caught.value.remedy


# -- where to start from -----------------------------------------------------------------------------------


def test_fine_tuning_starts_where_the_checkpoint_is(request_, trained, pack):
    ear = Ear()
    tuned = replace(request_, network=None, weights=str(trained[1].output), settings={**FEW, "learning_rate": 1e-5})
    with _either():
        finetune(tuned, ear)
    slices = PackedSlices(pack)
    held = slices.indices_of({score.subject for score in trained[1].scores})
    expected = mean_gain(validate(load_network(trained[1].output), slices, held, 2))
    assert ear.validations[0] == (0, pytest.approx(expected, abs=1e-6))


def _either():
    """So short a run may or may not find something better; this is not what is tested."""
    return contextlib.suppress(QualityGateFailed)


def test_a_checkpoint_of_another_scale_is_refused(request_, trained):
    with pytest.raises(ArgumentsError, match="enlarges by 2, not by 4"):
        finetune(replace(request_, scale=4, weights=str(trained[1].output)), Ear())


def test_a_checkpoint_that_is_not_the_variant_is_refused(request_, trained):
    with pytest.raises(ArgumentsError, match="not rdst-e"):
        finetune(replace(request_, model="rdst-e", weights=str(trained[1].output)), Ear())


def test_a_larger_network_grows_from_a_smaller_one(request_, trained):
    ear = Ear()
    grown = replace(request_, network=tiny(blocks=2), start=str(trained[1].output))
    with _either():
        finetune(grown, ear)
    # The added block starts as the identity, so that the first figures are the smaller network's.
    assert ear.validations[0][1] == pytest.approx(trained[1].gain_db, abs=1e-2)


def test_the_same_seed_gives_the_same_file_and_another_does_not(request_, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name / "same.safetensors"
        settings = {**FEW, "iterations": 2, "seed": seed}
        files.append(finetune(replace(request_, output=out, settings=settings), Ear()).output.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_seed_of_the_whole_process_is_left_alone(request_):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    finetune(request_, Ear())
    assert torch.equal(torch.rand(1), expected)


# -- folders -----------------------------------------------------------------------------------------------


class ArrayReader:
    def __init__(self, path):
        from medsr_cli.volume.volume import Volume

        self.path, self.array = path, np.load(path)
        n, rows, columns = self.array.shape
        self.volume = Volume("npy", rows, columns, n, self.array.dtype, spacing_mm=(0.5, 0.5), modality="mr")

    def slices(self):
        yield from self.array[:, None]

    def details(self):
        return {}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three subjects with two volumes each, in a format of this test's own."""
    monkeypatch.setattr(formats, "is_image_name", lambda path: path.suffix == ".npy")
    monkeypatch.setattr(formats, "open_image", lambda path, options: ArrayReader(path))
    for s in range(3):
        for v, name in enumerate(("T1w", "FLAIR")):
            path = tmp_path / "data" / f"Smith{s}" / f"Smith{s}_{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, phantom(10 * s + v))
    np.save(tmp_path / "data" / "Smith0" / "Smith0_mask.npy", phantom(0) > 100)
    return tmp_path / "data"


def test_from_a_folder_to_a_checkpoint(request_, folder):
    ear = Ear()
    result = finetune(replace(request_, folder=folder, keep_work=True), ear)
    assert any("Smith0_mask.npy was left out" in note for note in ear.notes)
    slices = PackedSlices(result.work_folder / "slices.safetensors")
    assert sorted(slices.subjects) == ["Smith0", "Smith1", "Smith2"]
    assert len(slices.volumes) == 6
    assert len({score.subject for score in result.scores}) == 1
    card = result.card.read_text()
    assert "Smith" not in card
    assert "| subject 1 | T1w |" in card
    assert "| subject 1 | FLAIR |" in card
    assert "2 subjects, 4 volumes, 12 slices" in card
    assert yaml.safe_load(card.split("---\n")[1])["medsr"]["spacing_mm"] == [1.0, 1.0]
    assert result.half
    assert "mr" in card


def test_packed_here_and_trained_elsewhere_is_the_same(request_, folder, tmp_path):
    here = finetune(replace(request_, folder=folder, output=tmp_path / "a" / "same"), Ear())
    slices = finetune(replace(request_, folder=folder, output=tmp_path / "slices", pack_only=True), Ear()).output
    assert slices.name == "slices.safetensors"
    there = finetune(replace(request_, folder=slices, output=tmp_path / "b" / "same"), Ear())
    assert there.output.read_bytes() == here.output.read_bytes()
    with pytest.raises(ArgumentsError, match="exists"):
        finetune(replace(request_, folder=folder, output=tmp_path / "slices", pack_only=True), Ear())


def test_a_folder_of_its_own_to_validate_on(request_, folder, tmp_path):
    other = tmp_path / "held"
    (other / "Smith1").mkdir(parents=True)
    np.save(other / "Smith1" / "scan.npy", phantom(99))
    ear = Ear()
    result = finetune(replace(request_, folder=folder, validation=other), ear)
    assert {score.subject for score in result.scores} == {"val/Smith1"}
    assert any("1 subjects have the same name in both folders" in note for note in ear.notes)


def test_a_folder_without_images_is_refused(request_, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="No image was found in empty"):
        finetune(replace(request_, folder=tmp_path / "empty"), Ear())
    with pytest.raises(InputRefused, match="No image"):
        finetune(replace(request_, folder=folder, include=["*.png"]), Ear())


def test_from_nifti(request_, tmp_path):
    for s in range(2):
        path = tmp_path / "nifti" / f"sub-0{s}" / "anat" / f"sub-0{s}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        image = np.moveaxis(phantom(s), 0, 2).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.diag([0.5, 0.75, 3.0, 1.0])), path)
    result = finetune(replace(request_, folder=tmp_path / "nifti", keep_work=True), Ear())
    slices = PackedSlices(result.work_folder / "slices.safetensors")
    assert slices.subjects == ["sub-00", "sub-01"]
    assert sorted(slices.slice(0).shape) == [40, 48]
    assert sorted(slices.volumes[0].spacing_mm) == [0.5, 0.75]
    load_network(result.output)


# -- the command line --------------------------------------------------------------------------------------

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(cli.finetune)


def run_cli(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=True)


def test_the_path_alone_on_stdout(pack, tmp_path, trained, monkeypatch):
    monkeypatch.setattr("medsr_cli.tasks.training_networks.named_config", lambda request, slices: tiny(request.scale))
    out = tmp_path / "ours.safetensors"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in LINEAR.items()]
    done = run_cli(pack, "-o", out, "-s", 2, "-d", "cpu", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert "against bicubic" in done.stderr
    assert "to validate on" in done.stderr
    mine, theirs = weights(out), weights(trained[1].output)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_the_gate_is_told_to_the_caller(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("medsr_cli.tasks.training_networks.named_config", lambda request, slices: tiny(request.scale))
    done = run_cli(pack, "-o", tmp_path / "o", "-s", 2, "--iterations", 2, "--batch", 1, "--patch", 8, "-q")
    assert isinstance(done.exception, QualityGateFailed)
    assert done.output == ""


def test_options_reach_the_recipe(monkeypatch, pack, tmp_path):
    seen = []
    monkeypatch.setattr("medsr_cli.tasks.finetune.finetune", lambda request, watcher: seen.append(request) or _result())
    options = ["--preset", "quick", "--augment", "--betas", "0.8", "0.9", "--exclude", "*_x*", "--exclude", "y"]
    done = run_cli(pack, "-o", tmp_path / "o", "-m", "rdst-e", "--no-half", *options, "--json")
    assert done.exit_code == 0, done.output
    (request,) = seen
    assert request.settings == {"augment": True, "betas": (0.8, 0.9)}
    assert (request.model, request.half, request.preset, request.exclude) == ("rdst-e", False, "quick", ("*_x*", "y"))
    assert json.loads(done.stdout)["path"] == "somewhere"
    assert command_line(request) == (
        "medsr finetune DIR -m rdst-e -o OUT --exclude PATTERN --preset quick --no-half "
        "--set 'betas=[0.8, 0.9]' --set augment=true"
    )


def _result():
    from medsr_cli.tasks.finetune import FinetuneResult

    return FinetuneResult(Path("somewhere"))


def test_every_field_of_the_recipe_can_be_set(monkeypatch, pack, tmp_path):
    """By an option of its own or by --set; values are YAML, of which the brackets may be left away."""
    seen = []
    monkeypatch.setattr("medsr_cli.tasks.finetune.finetune", lambda request, watcher: seen.append(request) or _result())
    given = ("weight_decay=1e-4", "scales=2,3.5", "losses=l1: 1, encoder1: 1e1", "schedule=cosine", "critic-steps=2")
    done = run_cli(pack, "-o", tmp_path / "o", "--batch", 3, *(word for text in given for word in ("--set", text)))
    assert done.exit_code == 0, done.output
    wanted = {"weight_decay": 1e-4, "scales": [2, 3.5], "losses": {"l1": 1, "encoder1": 10.0}, "schedule": "cosine"}
    assert seen[0].settings == {**wanted, "critic_steps": 2, "batch": 3}
    recipe = changed(recipe_named("rdst", "paper"), seen[0].settings)
    assert (recipe.scales, recipe.losses, recipe.batch) == ((2.0, 3.5), {"l1": 1.0, "encoder1": 10.0}, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [("batch", "no field"), ("no_such=1", "no_such"), ("batch=[1", "cannot be read"), ("batch=x", "batch")],
)
def test_what_cannot_be_set_is_refused(pack, tmp_path, text, words):
    done = run_cli(pack, "-o", tmp_path / "o", "--set", text)
    assert isinstance(done.exception, ArgumentsError)
    assert words in str(done.exception)


def test_what_the_card_says_of_its_command_repeats_it(pack, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("medsr_cli.tasks.finetune.finetune", lambda request, watcher: seen.append(request) or _result())
    run_cli(pack, "-o", "OUT", "-m", "miassr", "--set", "losses={l1: 1, vgg22: 0.001}", "--augment", "--lr", "3e-5")
    words = shlex.split(command_line(seen[0]))[2:]
    run_cli(pack, *words[1:])
    assert seen[1].settings == seen[0].settings
    assert seen[1].model == "miassr"


def test_the_command_imports_nothing_heavy():
    heavy = ("torch", "numpy", "safetensors", "rich.progress")
    code = f"import sys; import medsr_cli.cli.finetune; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
