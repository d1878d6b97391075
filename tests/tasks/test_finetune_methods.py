"""Every method through `finetune()` on synthetic anatomy, and its checkpoint through `upscale` as it is."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from medsr_cli.errors import ArgumentsError, InputRefused, QualityGateFailed, WeightsError
from medsr_cli.networks import load_network
from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.cohft import CohftConfig
from medsr_cli.networks.cohft_released import ReleasedCohftConfig
from medsr_cli.networks.m2trans import M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGanConfig
from medsr_cli.networks.msgan_detector import LesionDetectorConfig
from medsr_cli.networks.seg_unet import SegUnet, SegUnetConfig
from medsr_cli.networks.vgg import Vgg19Features, VggConfig
from medsr_cli.tasks.finetune import FinetuneRequest, finetune
from medsr_cli.tasks.model import ModelRequest, load_model
from medsr_cli.tasks.progress import Silent
from medsr_cli.tasks.training_data import pack
from medsr_cli.tasks.weights import ImportRequest, import_weights
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.state import read_state
from medsr_cli.training.whole_slices import WholeSlices
from tests.cli.conftest import medsr  # noqa: F401  # a fixture
from tests.tasks.test_finetune import ROOT, Ear, interrupt
from tests.training.anatomy import phantom, tiny

SIDE = (66, 60)
SUBJECTS = 3
LOW_PLACE = (0.25, 0.375, 0.0)
"""Where the first voxel of an image at half the resolution lies, edges aligned."""
FEW = {"iterations": 3, "batch": 2, "validate_every": 1, "start": "random", "then": [], "warmup": 0, "average": 0.0}
"""Untrained weights are far enough off that a step or two improves them."""
SMALL = {"patch": 8, "minimum_deviation": 0.0}
SEGMENTATION = SegUnetConfig(classes=2, width=4, blocks="1,1,1,1", decoder="8,8,4,4,4")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three subjects with T1, T2 and a mask of one bright ellipse, all on one grid."""
    root = tmp_path_factory.mktemp("methods") / "data"
    for s in range(SUBJECTS):
        shape = phantom(40 + s, 2, *SIDE)
        y, x = np.mgrid[: SIDE[0], : SIDE[1]]
        lesion = np.hypot(y - 25 - 6 * s, x - 22 - 5 * s) < 8
        place = root / f"s{s}"
        place.mkdir(parents=True)
        for name, image in (
            ("T1", (shape.max() - shape).astype(np.int16)),
            ("T2", (shape + 400 * lesion).astype(np.int16)),
            ("lesion_mask", np.repeat(lesion[None], 2, axis=0).astype(np.uint8)),
        ):
            nib.save(
                nib.Nifti1Image(np.moveaxis(image, 0, 2), np.diag([0.5, 0.75, 3.0, 1.0])), place / f"{name}.nii.gz"
            )
    return root


@pytest.fixture
def asked(folder, tmp_path):
    """A request for which anything passes the gate."""

    def make(model, **changes):
        settings = {**FEW, **SMALL, **changes.pop("settings", {})}
        return FinetuneRequest(
            folder,
            tmp_path / f"{model}.safetensors",
            model=model,
            include=("T2*",),
            settings=settings,
            least_gain_db=-math.inf,
            device="cpu",
            validation_slices=1,
            **changes,
        )

    return make


METHODS = {
    "miassr": (MiassrConfig(n_feats=8, n_blocks=1, hidden=8), {"settings": {"high_patch": 24, "scales": [1.5, 2.0]}}),
    "msgan": (
        MsGanConfig(n_blocks=1, n_feats=8),
        {"settings": {"losses": {"mse": 1.0, "mse_x2": 1.0}, "region": "lesion", "high_patch": 24}},
    ),
    "m2trans": (M2TransConfig(n_feats=8, n_blocks=1, scale=2), {"scale": 2, "settings": {"losses": {"l1": 1.0}}}),
    "cohft": (
        CohftConfig(
            2, stages=1, feature_dim=4, growth=3, rrdb_per_stage=1, rdbs=1, convs=2, heads=2, window=2, patch=3
        ),
        {"scale": 2, "settings": {"patch": 12}, "include": ()},
    ),
    "cohft-released": (
        ReleasedCohftConfig(
            2, side=12, stages=3, feature_dim=4, growth=3, rrdbs=4, rdbs=1, convs=2, heads=2, window=3, patch=2
        ),
        {"scale": 2, "include": ()},
    ),
    "rdst": (tiny(2), {"scale": 2, "settings": {"linear_steps": 0}}),
}


def request_of(asked, model):
    network, changes = METHODS[model]
    changes = dict(changes)
    include = changes.pop("include", ("T2*",))
    if model == "rdst":
        changes["preset"] = "quick"
    return replace(asked(model, network=network, **changes), include=include)


@pytest.mark.parametrize("model", METHODS)
def test_every_method_trains_and_upscale_takes_its_checkpoint(model, asked, folder, tmp_path, medsr):  # noqa: F811
    request = request_of(asked, model)
    ear = Ear()
    result = finetune(request, ear)
    assert result.steps == 3
    assert ear.steps == [1, 2, 3]
    front = yaml.safe_load(result.card.read_text().split("---\n")[1])
    assert front["medsr"]["method"] == model
    assert front["medsr"]["sha256"] == result.sha256
    assert result.curve.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    low, guide = low_image(folder, tmp_path, 2, guided="cohft" in model)
    big, scale = tmp_path / "big.nii.gz", 4 if model == "msgan" else 2
    done = medsr("upscale", low, "-m", model, "-s", scale, "--weights", result.output, *guide, "-o", big, "--quiet")
    # Trained for three steps, most fail the gate of every result; what does not load ends otherwise.
    assert done.code in (0, 7), done.err
    assert big.exists() == (done.code == 0)


def low_image(folder, tmp_path, scale, *, guided):
    """T2 of a subject at low resolution, and the option that names its guide."""
    image = nib.load(folder / "s0" / "T2.nii.gz")
    low = tmp_path / "low.nii.gz"
    affine = image.affine @ np.diag([scale, scale, 1, 1])
    affine[:2, 3] += image.affine[[0, 1], [0, 1]] * (scale - 1) / 2
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::scale, ::scale].astype(np.int16), affine), low)
    return low, (["--guide", folder / "s0" / "T1.nii.gz"] if guided else [])


@pytest.mark.parametrize("model", METHODS)
def test_a_network_is_validated_as_the_engine_runs_it(model, asked, tmp_path):
    request = request_of(asked, model)
    torch.manual_seed(5)
    arch, scale = request.arch, request.scale or (2 if model == "miassr" else 4)
    net = getattr(importlib.import_module(arch.module), arch.network)(request.network).eval()
    path = tmp_path / "net.safetensors"
    path.write_bytes(save_network(net, {"degradation": "cubic"}))
    loaded = load_model(ModelRequest(model, str(path), device="cpu"), (float(scale), float(scale)), None, Silent())
    rng = np.random.default_rng(0)
    rows, columns = (12, 12) if model == "cohft-released" else (24, 20)  # one tile: theirs overlap otherwise
    low, guide = (rng.random(size, np.float32) for size in ((1, rows, columns), (rows * scale, columns * scale)))
    given = guide if "cohft" in model else None
    theirs = loaded.engine.run(low[None], None if given is None else given[None, None]).planes[0]
    ours = WholeSlices(net, torch.device("cpu"))(low, (rows * scale, columns * scale), given)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * np.ptp(theirs)


def test_the_card_of_any_scale_has_a_line_for_each(asked):
    result = finetune(request_of(asked, "miassr"), Ear())
    card = result.card.read_text()
    for line in ("| x1.5, blur 1 |", "| x2, blur 1 |", "above x1 and up to x2", "then a 3x3 blur"):
        assert line in card
    with safe_open(result.output, "pt") as file:
        said = file.metadata()
    assert json.loads(said["scales"]) == []
    assert json.loads(said["scale_range"]) == [1.0, 2.0]
    assert said["degradation"] == "cubic-blur"
    score = result.scores[0]
    assert score.psnr == pytest.approx(np.mean([row.psnr for row in score.conditions]))
    imported = import_weights(ImportRequest(result.output, result.output.with_name("again.safetensors"), "miassr"))
    assert imported.path.read_bytes() == result.output.read_bytes()
    assert load_network(imported.path).config.rounding == "exact"


def test_the_released_form_trains_at_its_own_size_and_says_its_degradation(asked):
    result = finetune(request_of(asked, "cohft-released"), Ear())
    with safe_open(result.output, "pt") as file:
        said = file.metadata()
    assert said["degradation"] == "fourier"
    assert "Cohf-T's authors crop it" in said["degradation_in_words"]
    assert json.loads(said["recipe"])["patch"] == 12
    assert "have a guide of another contrast" in result.card.read_text()


# -- segmentation and detection ----------------------------------------------------------------------------


@pytest.fixture
def segmentation(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "seg.safetensors"
    path.write_bytes(save_network(SegUnet(SEGMENTATION)))
    return path


def test_a_segmentation_network_is_trained_and_a_loss_takes_it(asked, tmp_path):
    settings = {"patch": 32, "iterations": 60, "batch": 4, "validate_every": 20, "learning_rate": 1e-2}
    learnt = finetune(asked("segmentation", network=SEGMENTATION, settings=settings), Ear())
    score = learnt.scores[0]
    assert learnt.unit == "Dice"
    assert 0 <= score.dice <= 1
    assert score.threshold_dice > 0.1  # the lesion is among the brightest pixels
    card = learnt.card.read_text()
    assert "| Dice | threshold | gain |" in card
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == "image-segmentation"
    assert load_network(learnt.output).config == SEGMENTATION
    by_loss = asked(
        "rdst",
        scale=2,
        network=tiny(2),
        settings={"patch": 16, "losses": {"l1": 1.0, "encoder1": 1.0, "hrl": 0.1}},
        segmentation=str(learnt.output),
    )
    result = finetune(by_loss, Ear())
    assert learnt.sha256 in result.card.read_text()
    with safe_open(result.output, "pt") as file:
        assert json.loads(file.metadata()["networks"]) == {"segmentation": learnt.sha256}


def test_a_detector_is_trained(asked):
    small = LesionDetectorConfig(widths="4,4", hidden="8", side=16)
    result = finetune(asked("msgan-detector", network=small, settings={"learning_rate": 1e-2}), Ear())
    assert result.unit == "of the image"
    assert result.scores[0].mean_distance > 0
    assert load_network(result.output).config == small


def test_the_gate_of_a_segmentation_speaks_of_dice(asked):
    request = replace(asked("segmentation", network=SEGMENTATION, settings={"patch": 32}), least_gain_db=0.0)
    with pytest.raises(QualityGateFailed, match=r"Dice (against the best threshold|at the start)"):
        finetune(request, Ear())


def test_the_networks_classes_are_those_of_the_labels(asked, folder):
    from medsr_cli.tasks.training_networks import named_config

    slices = PackedSlices(finetune(replace(asked("segmentation"), pack_only=True), Ear()).output)
    assert named_config(asked("segmentation"), slices).classes == 2
    assert named_config(replace(asked("m2trans"), scale=3), slices).in_channels == 3
    assert named_config(replace(asked("cohft-l"), scale=4), slices).stages == 4
    assert named_config(replace(asked("cohft"), scale=4), slices).stages == 3
    assert named_config(replace(asked("cohft-released"), scale=3), slices).side == 80


# -- what is missing ---------------------------------------------------------------------------------------


@pytest.fixture
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("model", "losses", "words"),
    [
        ("miassr", {"l1": 1.0, "vgg22": 1e-3}, "medsr weights pull vgg19-imagenet"),
        ("m2trans", {"l1": 1.0, "semantic": 0.01}, "medsr weights pull medclip-vit"),
        ("rdst", {"l1": 1.0, "hrl": 1.0}, "--task segmentation"),
    ],
)
def test_a_network_that_a_loss_needs_is_never_left_out_silently(asked, empty_store, model, losses, words):
    request = request_of(asked, model)
    request = replace(request, settings={**request.settings, "losses": losses})
    with pytest.raises(WeightsError, match=words) as caught:
        finetune(request, Ear())
    assert caught.value.exit_code == 5
    assert not request.output.with_suffix(".work").exists()


def test_what_a_later_stage_needs_is_missed_at_once(asked, empty_store):
    request = request_of(asked, "miassr")
    later = [{"losses": {"vgg22": 1.0}, "iterations": 2}]
    with pytest.raises(WeightsError, match="vgg19-imagenet"):
        finetune(replace(request, settings={**request.settings, "then": later}), Ear())


def test_vgg_in_the_store_is_used_and_named(asked, monkeypatch, tmp_path):
    path = tmp_path / "vgg.safetensors"
    torch.manual_seed(0)
    path.write_bytes(save_network(Vgg19Features(VggConfig(width=2))))
    monkeypatch.setattr("medsr_cli.tasks.training_networks._in_store", lambda *_: (path, "vgg19-imagenet"))
    request = request_of(asked, "miassr")
    request = replace(request, settings={**request.settings, "losses": {"l1": 1.0, "vgg22": 1e-4}})
    card = finetune(request, Ear()).card.read_text()
    assert "- vgg: vgg19-imagenet, SHA-256" in card


def test_a_checkpoint_of_another_method_is_refused(asked, segmentation):
    with pytest.raises(WeightsError, match="checkpoint of segmentation, not of rdst"):
        finetune(replace(request_of(asked, "rdst"), weights=str(segmentation)), Ear())


# -- images ------------------------------------------------------------------------------------------------


def copied(folder, tmp_path, keep):
    target = tmp_path / "some"
    for path in sorted(folder.rglob("*.nii.gz")):
        if keep(path):
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


def test_a_guide_without_its_partner_is_refused(asked, folder, tmp_path):
    alone = copied(folder, tmp_path, lambda path: path.name == "T2.nii.gz")
    with pytest.raises(InputRefused, match="without its partner") as caught:
        finetune(replace(request_of(asked, "cohft"), folder=alone), Ear())
    assert caught.value.exit_code == 6
    assert not list(tmp_path.glob("*.work"))


def test_captions_and_low_images_are_those_of_the_training_folder(folder, tmp_path, asked):
    lows, held, captions = tmp_path / "low", tmp_path / "held", tmp_path / "captions.txt"

    def save(path, values, step, place=(0.0, 0.0, 0.0)):
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.diag([*step, 1.0])
        affine[:3, 3] = place
        nib.save(nib.Nifti1Image(values, affine), path)

    for k in range(SUBJECTS):
        image = nib.load(folder / f"s{k}" / "T2.nii.gz")
        save(lows / f"s{k}" / "T2.nii.gz", np.asarray(image.dataobj)[::2, ::2], (1.0, 1.5, 3.0), LOW_PLACE)
    captions.write_text("".join(f"A brain, number {k}.\n" for k in range(SUBJECTS)))
    other = np.moveaxis(phantom(77, 2, *SIDE), 0, 2).astype(np.int16)
    save(held / "v0" / "T2.nii.gz", other, (0.5, 0.75, 3.0))
    asked_for = {"model": "rdst", "include": ("T2*",), "scale": 2, "low": lows, "captions": captions}
    request = FinetuneRequest(folder, tmp_path / "x", validation=held, **asked_for)

    def packed():
        target = tmp_path / "packed.safetensors"
        pack(replace(request, overwrite=True), target, Ear(), labels=False)
        volumes = PackedSlices(target).volumes
        return {volume.subject: (volume.low is not None, volume.caption) for volume in volumes}

    training = {f"s{k}": (True, f"A brain, number {k}.") for k in range(SUBJECTS)}
    assert packed() == {"val/v0": (False, None), **training}
    own = {name: value for name, value in asked_for.items() if name != "include"}
    ear = Ear()
    result = finetune(replace(asked(**own, network=tiny(), validation=held), folder=folder), ear)
    assert "Low-resolution images are made for those to validate on; the others have their own." in ear.notes
    told = "low-resolution images came with the data for those trained on; the others were simulated: cv2 cubic"
    assert told in result.card.read_text()
    # One beside the image to validate on is used.
    save(held / "v0" / "T2_lr.nii.gz", other[::2, ::2], (1.0, 1.5, 3.0), LOW_PLACE)
    assert packed() == {"val/v0": (True, None), **training}


def test_nothing_labelled_is_refused(asked, folder, tmp_path):
    alone = copied(folder, tmp_path, lambda path: path.name == "T2.nii.gz")
    with pytest.raises(InputRefused, match="mask"):
        finetune(replace(asked("segmentation", network=SEGMENTATION), folder=alone), Ear())


def test_one_subject_constant_images_and_mixed_channels_are_refused(asked, folder, tmp_path):
    one = copied(folder, tmp_path / "one", lambda path: path.parent.name == "s0")
    with pytest.raises(InputRefused, match="at least two"):
        finetune(replace(request_of(asked, "rdst"), folder=one), Ear())
    flat = copied(folder, tmp_path / "flat", lambda path: path.name == "T2.nii.gz")
    for path in flat.rglob("*.nii.gz"):
        nib.save(nib.Nifti1Image(np.full((30, 30, 2), 7, np.int16), np.eye(4)), path)
    with pytest.raises(InputRefused, match="could be used"):
        finetune(replace(request_of(asked, "rdst"), folder=flat), Ear())
    mixed = replace(request_of(asked, "rdst"), contrasts=("T1", "T2"), include=())
    broken = copied(folder, tmp_path / "mixed", lambda path: path.parent.name != "s0" or path.name == "T2.nii.gz")
    with pytest.raises(InputRefused, match="mixed"):
        finetune(replace(mixed, folder=broken), Ear())
    with pytest.raises(InputRefused, match="1 or 4 channels; these have 2"):
        finetune(replace(mixed, network=None), Ear())


# -- going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["miassr", "msgan"])
def test_stopped_and_resumed_gives_the_same_bytes(asked, tmp_path, model):
    request = request_of(asked, model)
    whole = finetune(replace(request, output=tmp_path / "a" / "same"), Ear())
    stopped = replace(request, output=tmp_path / "b" / "same")
    assert finetune(stopped, Ear(2, interrupt)).interrupted
    again = finetune(replace(stopped, resume=True), Ear())
    assert again.output.read_bytes() == whole.output.read_bytes()


def test_a_network_of_another_size_starts_from_what_fits(asked, tmp_path):
    first = finetune(request_of(asked, "miassr"), Ear())
    larger = replace(
        request_of(asked, "miassr"),
        output=tmp_path / "larger",
        network=MiassrConfig(n_feats=8, n_blocks=2, hidden=8),
        start=str(first.output),
    )
    result = finetune(larger, Ear())
    assert "what fits of the checkpoint" in result.card.read_text()


def test_resuming_as_another_method_is_refused(asked):
    request = request_of(asked, "miassr")
    finetune(request, Ear(1, interrupt))
    other = replace(request_of(asked, "rdst"), output=request.output, resume=True)
    with pytest.raises(ArgumentsError, match=r"-m and -s|method"):
        finetune(other, Ear())


# -- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "network"),
    [
        (("-m", "miassr", "--set", "scales=2", "--set", "high_patch=24"), METHODS["miassr"][0]),
        (("--task", "segmentation", "--patch", 32), SEGMENTATION),
    ],
)
def test_two_methods_by_the_command_line(folder, tmp_path, medsr, monkeypatch, arguments, network):  # noqa: F811
    monkeypatch.setattr("medsr_cli.tasks.training_networks.named_config", lambda request, slices: network)
    monkeypatch.setattr("medsr_cli.training.release.refuse_worse", lambda *_, **__: None)
    out = tmp_path / "ours.safetensors"
    few = ("--set", "iterations=2", "--batch", 2, "--validate-every", 2, "--set", "then=[]", "-d", "cpu")
    done = medsr("finetune", folder, "-o", out, "--preset", "quick", "--include", "T2*", *few, *arguments)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out)
    assert "against" in done.err
    assert load_network(out).config == network


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--preset", "nice"), 2, "There are: paper, quick"),
        (("-m", "m2trans", "--preset", "nice"), 2, "paper"),
        (("--task", "segmentation", "-m", "rdst"), 2, "not for segmentation"),
        (("--task", "painting"), 2, "super-resolution, segmentation, detection"),
        (("-m", "uscyclegan"), 2, "medsr upscale"),
        (("-m", "miassr", "-s", 2), 2, "Leave -s away"),
        (("-m", "miassr", "--preset", "paper"), 5, "medsr weights pull vgg19-imagenet"),
        (("--preset", "paper-e1"), 5, "--segmentation"),
    ],
)
def test_refusals_have_their_exit_codes(folder, tmp_path, medsr, empty_store, arguments, code, words):  # noqa: F811
    done = medsr("finetune", folder, "-o", tmp_path / "o", *arguments)
    assert done.code == code, done.err
    assert words in done.err
    assert not list(Path(tmp_path).glob("o*"))


def test_two_processes_train_one_network_and_the_first_tells_it(folder, tmp_path):
    """`accelerate launch` on two CPU processes; the network is given by a checkpoint, since there are no tiny names."""
    start = tmp_path / "start.safetensors"
    torch.manual_seed(0)
    start.write_bytes(save_network(Miassr(METHODS["miassr"][0])))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "{method: miassr, iterations: 3, batch: 2, high_patch: 24, scales: [2.0], degradation: cubic, "
        "validate_every: 3, learning_rate: 1e-2}"
    )
    out = tmp_path / "ours.safetensors"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    ask = ["finetune", folder, "-o", out, "-m", "miassr", "--recipe", recipe, "--weights", start, "--include", "T2*"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "-m",
            "medsr_cli",
            *map(str, ask),
            "-d",
            "cpu",
            "--keep-work",
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    work = tmp_path / "ours.work"
    assert read_state(work / "state.pt")["step"] == 3, done.stderr
    assert done.stderr.count("to validate on.") == 1
    # So short a run may or may not get past bicubic; the gate is told once as well.
    if out.exists():
        assert done.stdout.split() == [str(out)]
        assert "in 2 processes" in out.with_suffix(".md").read_text()
    else:
        assert done.stderr.count("so it was not written") == 1
