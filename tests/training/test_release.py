import dataclasses
import json

import pytest
import torch
import yaml

from medsr_cli.errors import ArgumentsError, QualityGateFailed, RunError
from medsr_cli.networks.checkpoint import config_of
from medsr_cli.training.card import (
    Facts,
    contrast_of,
    low_resolution_spacing_mm,
    metadata,
    table_rows,
    write_card,
)
from medsr_cli.training.loop import TrainingState
from medsr_cli.training.pack import PackedVolume
from medsr_cli.training.recipe import PRESETS
from medsr_cli.training.release import best_network, refuse_worse, rounded_to_half
from medsr_cli.training.validation import VolumeScore
from medsr_cli.training.workfolder import Log, RunIdentity, WorkFolder
from tests.training.anatomy import tiny_network


def score(gain, subject="Doe^Jane", name="Doe^Jane/MRN123_T1w.nii.gz"):
    return VolumeScore(subject, name, 3, 30 + gain, 0.91, 30.0, 0.9)


def state(*gains, every=10):
    history = [{"step": float(i * every), "gain_db": gain} for i, gain in enumerate(gains)]
    best = max(range(len(gains)), key=lambda i: (gains[i], -i))
    return TrainingState(
        step=(len(gains) - 1) * every,
        best_gain_db=gains[best],
        best_step=best * every,
        best_weights=tiny_network(seed=5).state_dict(),
        history=history,
    )


# -- the gate ----------------------------------------------------------------------------------------------


def test_better_than_start_and_bicubic_passes():
    refuse_worse(state(-1.0, 0.5, 0.4), [score(0.5), score(-0.1)])


@pytest.mark.parametrize("gains", [(0.5, 0.4), (0.5, 0.5), (0.5,)])
def test_not_better_than_its_start_is_refused(gains):
    with pytest.raises(QualityGateFailed, match="better than the start"):
        refuse_worse(state(*gains), [score(1.0)])


def test_worse_than_bicubic_is_refused():
    with pytest.raises(QualityGateFailed, match=r"-0.20 dB against bicubic"):
        refuse_worse(state(-1.0, 0.1), [score(0.2), score(-0.6)])
    with pytest.raises(QualityGateFailed, match="against bicubic"):
        refuse_worse(state(-1.0, -0.5))
    refuse_worse(state(-1.0, -0.5), least_gain_db=-0.9)


# -- precision ---------------------------------------------------------------------------------------------


def test_the_best_weights_are_taken_and_halved():
    best = best_network(tiny_network(), state(-1.0, 1.0), lambda net: [score(0.995)], half=True)
    assert best.half
    kept = state(0.0).best_weights
    for key, value in best.net.state_dict().items():
        assert torch.equal(value, kept[key].half().float() if "mean" not in key else kept[key])


def test_half_precision_that_costs_too_much_is_not_used():
    best = best_network(tiny_network(), state(-1.0, 1.0), lambda net: [score(0.98)], half=True)
    assert not best.half
    assert "0.020 dB" in best.note


def test_weights_beyond_half_precision_stay_single():
    run = state(-1.0, 1.0)
    run.best_weights["head.weight"][0] = 1e6
    best = best_network(tiny_network(), run, lambda net: pytest.fail("not needed"), half=True)
    assert not best.half
    assert "beyond" in best.note


def test_frozen_tensors_are_not_rounded():
    net = tiny_network()
    with torch.no_grad():
        net.sub_mean.bias.fill_(0.1)
    assert torch.equal(rounded_to_half(net).sub_mean.bias, net.sub_mean.bias)


# -- the card ----------------------------------------------------------------------------------------------


def facts(**changes):
    net = tiny_network(scale=4)
    train = [PackedVolume("Roe^Richard", "Roe^Richard/t1.nii", "a" * 64, 0, 1, spacing_mm=(0.9, 1.0))]
    held = [PackedVolume("Doe^Jane", "Doe^Jane/MRN123_T1w.nii.gz", "b" * 64, 0, 1)]
    given = Facts(
        id="ours-x4",
        method="rdst",
        variant=None,
        config=config_of(net),
        scale=4,
        channels=1,
        parameters=1234567,
        half=True,
        modality="mr",
        body_part="brain",
        spacing_mm=low_resolution_spacing_mm(train, 4),
        licence="CC-BY-4.0",
        data_licence="own",
        recipe=PRESETS["quick"],
        state=state(-1.0, 0.5),
        interrupted=False,
        device="2 CPU threads",
        start="nothing",
        train=train,
        held=held,
        train_slices=90,
        held_slices=30,
        rows=table_rows([score(0.5), score(-0.25, "Poe", "Poe/x_FLAIR.nii")], named=False),
        notes=["A note."],
        command="medsr finetune DIR -m rdst -s 4 -o OUT",
        date="2026-11-21",
        version="0.1.0",
    )
    return dataclasses.replace(given, **changes)


def test_the_card_has_what_was_asked_for():
    card = write_card(facts(), 999, "c" * 64)
    _, front, body = card.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["license"] == "CC-BY-4.0"
    assert said["medsr"]["sha256"] == "c" * 64
    assert said["medsr"]["spacing_mm"] == [3.6, 4.0]
    assert [row["name"] for row in said["medsr"]["validation"]] == ["subject 1", "subject 2"]
    assert "| subject 1 | T1w | 3 | 30.50 | 30.00 | +0.50 | 0.9100 | 0.9000 |" in body
    assert "| subject 2 | FLAIR | 3 | 29.75 | 30.00 | -0.25 |" in body
    assert "1 of these 2 volumes are worse" in body
    for text in ("a" * 64, "b" * 64, "cv2 cubic a=-0.75", "0-1 per-volume min-max", "Research use", "In-plane only"):
        assert text in body
    for field in dataclasses.fields(PRESETS["quick"]):
        assert f"| {field.name} | {getattr(PRESETS['quick'], field.name)} |" in body


def test_card_and_metadata_name_nobody():
    texts = write_card(facts(), 1, "c" * 64) + json.dumps(metadata(facts()))
    for word in ("Doe", "Roe", "Poe", "MRN123", ".nii"):
        assert word not in texts
    named = facts(rows=table_rows([score(0.5)], named=True))
    assert "Doe^Jane" in write_card(named, 1, "c" * 64)


def test_metadata_is_text_that_a_manifest_takes():
    given = metadata(facts())
    assert all(isinstance(value, str) for value in given.values())
    assert not [key for key in given if key.startswith("medsr.")]
    assert json.loads(given["scales"]) == [4]
    assert json.loads(given["validation"])[0]["bicubic_psnr"] == 30.0
    assert given["degradation"] == "cubic"


@pytest.mark.parametrize(
    ("name", "contrast"),
    [("a/sub-01_T1w.nii.gz", "T1w"), ("T1_brain_flair.nii", "FLAIR"), ("smith_john.nii", ""), ("ct.nii.gz", "CT")],
)
def test_contrasts_come_from_a_closed_list(name, contrast):
    assert contrast_of(name) == contrast


# -- the work folder ---------------------------------------------------------------------------------------

IDENTITY = RunIdentity("rdst", 4, "nothing", "f" * 64, ["s1"], {"n_rdstb": 1})


def test_another_run_is_named_by_what_differs(tmp_path):
    work = WorkFolder(tmp_path / "out.safetensors")
    with work.locked():
        work.write_identity(IDENTITY)
        work.refuse_other(IDENTITY)
        with pytest.raises(ArgumentsError, match="other images"):
            work.refuse_other(dataclasses.replace(IDENTITY, pack="0" * 64))
        with pytest.raises(ArgumentsError, match="other scale"):
            work.refuse_other(dataclasses.replace(IDENTITY, scale=2))


def test_only_one_run_at_a_time(tmp_path):
    one, other = WorkFolder(tmp_path / "out.safetensors"), WorkFolder(tmp_path / "out.safetensors")
    with one.locked(), pytest.raises(RunError, match="Another run"), other.locked():
        pytest.fail("two runs")
    with other.locked():
        pass


def test_the_log_drops_what_will_come_again(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in (0, 10, 20):
        log.add(step, None if step == 0 else 0.1, 1.0, [score(step / 10)])
    again = Log(tmp_path / "log.jsonl", 10)
    again.add(20, 0.2, 2.0, [score(5.0)])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["gain_db"]) for line in lines] == [(0, 0.0), (10, 1.0), (20, 5.0)]
