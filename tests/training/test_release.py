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
    degradation_of,
    low_resolution_spacing_mm,
    metadata,
    table_rows,
    write_card,
)
from medsr_cli.training.pack import PackedVolume
from medsr_cli.training.recipe import recipe_named
from medsr_cli.training.release import best_network, precision_cost_db, refuse_worse, rounded_to_half
from medsr_cli.training.state import TrainingState
from medsr_cli.training.validation import CentreScore, ConditionFigures, OverlapScore, VolumeScore
from medsr_cli.training.workfolder import Log, RunIdentity, WorkFolder, numbers_of, subjects_of
from medsr_cli.volume.degradation import DEGRADATIONS
from tests.training.anatomy import tiny_network

QUICK = recipe_named("rdst", "quick")


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
    refuse_worse(state(-1.0, -0.5), least_gain=-0.9)


def test_the_last_weights_need_not_be_better_than_the_start_where_they_are_kept_on_purpose():
    with pytest.raises(QualityGateFailed, match="start"):
        refuse_worse(state(2.0, 1.5), [score(1.5)])
    run = state(2.0, 1.5)
    run.best_step, run.best_gain_db = 10, 1.5
    refuse_worse(run, [score(1.5)], judge="last")
    with pytest.raises(QualityGateFailed, match="against bicubic"):
        refuse_worse(run, [score(-0.1)], judge="last")


def test_the_gate_speaks_of_what_was_measured():
    with pytest.raises(QualityGateFailed, match=r"-0\.100 Dice against the best threshold"):
        refuse_worse(state(-1.0, -0.1), unit="Dice", baseline="the best threshold")


# -- precision ---------------------------------------------------------------------------------------------


def test_the_best_weights_are_taken_and_halved():
    best = best_network(tiny_network(), state(-1.0, 1.0), lambda net: [score(0.995)], half=True)
    assert best.half
    kept = state(0.0).best_weights
    for key, value in best.net.state_dict().items():
        exact = "mean" in key or kept[key].ndim < 2
        assert torch.equal(value, kept[key] if exact else kept[key].half().float())


def test_what_bfloat16_costs_is_measured_with_weights_and_images_rounded():
    net, seen = tiny_network(), []

    def validation(rounded):
        given = torch.rand(1, 1, 8, 8)
        result = rounded(given)
        seen.append((next(rounded.parameters()).dtype, result.dtype))
        return [score(0.9), score(0.5)]

    assert precision_cost_db(net, [score(1.0), score(0.5)], validation) == {"slices": 6, "bfloat16": 0.05}
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_what_bfloat16_costs_is_not_told_where_it_is_no_number():
    net = tiny_network()
    assert precision_cost_db(net, [], lambda net: pytest.fail("not needed")) is None
    assert precision_cost_db(net, [score(1.0)], lambda net: [score(float("nan"))]) is None


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
        spacing_mm=low_resolution_spacing_mm(train, [4.0]),
        licence="CC-BY-4.0",
        data_licence="own",
        recipe=QUICK,
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
    for field in dataclasses.fields(QUICK):
        if field.name not in ("then", "sources"):
            source = QUICK.sources.get(field.name, "")
            assert f"| {field.name} | {getattr(QUICK, field.name)} | {source} |" in body


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


def test_every_stage_and_its_sources_are_told():
    recipe = recipe_named("rdst", "paper-hrl")
    networks = {"segmentation": ("a file", "d" * 64)}
    card = write_card(facts(recipe=recipe, networks=networks), 1, "c" * 64, "ours-x4.png")
    first, second = card.split("Stage 1:")[1].split("Stage 2:")
    assert "| losses | {'l1': 1.0} |" in first
    assert "| losses | {'l1': 1.0, 'hrl': 10.0} | arXiv 2302.11184" in second
    assert f"- segmentation: a file, SHA-256 {'d' * 64}" in second
    assert "(ours-x4.png)" in card
    said = yaml.safe_load(card.split("---\n")[1])["medsr"]
    assert said["networks"]["segmentation"]["sha256"] == "d" * 64


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"degradation": "cubic"}, "cubic", "no blur, no noise"),
        ({"degradation": "cubic-blur"}, "cubic-blur", "3x3 blur of (1/4, 1/2, 1/4), no noise"),
        (
            {"degradation": "cubic-blur", "blur_draws": (0.4, 0.3), "noise": 0.015},
            "cubic",
            "(40% of the patches in full, 30% not at all, the others in between), Gaussian noise of up to 0.015",
        ),
        ({"degradation": "fourier"}, "fourier", "first pixels' centres aligned"),
        ({"task": "segmentation"}, "none", "none"),
    ],
)
def test_the_degradation_is_told_with_kernel_blur_and_noise(changes, name, words):
    recipe = dataclasses.replace(recipe_named("miassr", "paper"), noise=0.0, blur_draws=(1.0, 0.0), blur_share=1.0)
    found, told = degradation_of(dataclasses.replace(recipe, **changes))
    assert found == name
    assert words in told


@pytest.mark.parametrize(
    ("given", "words", "limit"),
    [
        ((0, 0), None, "; the low-resolution images were simulated"),
        ((1, 1), "came with the data; nothing was simulated", None),
        ((1, 0), "came with the data for those trained on; the others were simulated: cv2", "; some of the low-"),
        ((0, 1), "came with the data for those validated on; the others were simulated: cv2", "; some of the low-"),
        ((0.5, 1), "for 50.0% of those trained on and those validated on; the others were", "; some of the low-"),
    ],
)
def test_the_card_tells_which_low_resolution_images_were_simulated(given, words, limit):
    told = degradation_of(dataclasses.replace(QUICK, noise=0.0), given=given)[1]
    assert ("came with the data" in told) is (words is not None)
    assert (words or "") in told
    card = write_card(dataclasses.replace(facts(), degradation_in_words=told), 1, "0" * 64)
    assert told in card
    assert (limit or "") in card
    assert ("may differ" in card) is (limit is not None)


def test_every_degradation_has_its_words():
    for name in DEGRADATIONS:
        recipe = dataclasses.replace(QUICK, method="m2trans", degradation=name)
        assert len(degradation_of(recipe)[1].split()) > 5


def test_scores_without_bicubic_have_their_own_table():
    seg = dataclasses.replace(QUICK, task="segmentation", method="segmentation")
    rows = table_rows([OverlapScore("Doe", "Doe/a.nii", 7, 0.8123, 0.5)], named=False)
    card = write_card(facts(recipe=seg, scale=None, rows=rows, method="segmentation"), 1, "c" * 64)
    assert "| subject 1 | - | 7 | 0.812 | 0.500 | +0.312 |" in card
    assert "bicubic" not in card.split("## Recipe")[0]
    assert "Degradation that it undoes" not in card
    rows = table_rows([CentreScore("Doe", "Doe/a.nii", 7, 0.3, 0.1)], named=False)
    card = write_card(facts(recipe=dataclasses.replace(seg, task="detection"), scale=None, rows=rows), 1, "c" * 64)
    assert "| subject 1 | - | 7 | 0.300 | 0.100 | -0.200 |" in card
    assert "worse than with always answering" in card


def test_any_scale_has_a_line_for_each():
    lines = (ConditionFigures("x2", 40, 0.9, 38, 0.8), ConditionFigures("x3", 30, 0.8, 29, 0.7))
    rows = table_rows([VolumeScore("Doe", "Doe/a.nii", 7, 35, 0.85, 33.5, 0.75, lines)], named=False)
    card = write_card(facts(scale=None, scale_range=(1.0, 4.0), rows=rows, method="miassr"), 1, "c" * 64)
    assert "| x2 | 40.00 | 38.00 | +2.00 | 0.9000 | 0.8000 |" in card
    assert "| x3 | 30.00 | 29.00 | +1.00 |" in card
    assert "above x1 and up to x4" in card


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


def test_the_log_that_is_kept_names_nobody(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.add(0, None, 1.0, [score(0.5), score(0.1, "Poe", "Poe/x.nii")])
    kept = log.to_keep(named=False).decode()
    assert "Doe" not in kept
    assert "Poe" not in kept
    assert [v["subject"] for v in json.loads(kept)["volumes"]] == ["subject 1", "subject 2"]
    assert "Doe" not in (tmp_path / "log.jsonl").read_text()
    named = Log(tmp_path / "named.jsonl", 0, named=True)
    named.add(0, None, 1.0, [score(0.5)])
    assert "Doe^Jane/MRN123_T1w" in named.to_keep(named=True).decode()
    assert "Doe" not in named.to_keep(named=False).decode()


def test_subjects_are_numbered_by_their_place_in_the_packed_file(tmp_path):
    subjects = ["Poe", "Doe^Jane", "Roe"]
    log = Log(tmp_path / "log.jsonl", 0, subjects)
    log.add(0, None, 1.0, [score(0.5)])
    assert log.entries[0]["volumes"][0]["subject"] == "subject 2"
    assert "name" not in log.entries[0]["volumes"][0]
    numbers = numbers_of(subjects, {"Roe", "Poe"})
    assert numbers == ["subject 1", "subject 3"]
    assert subjects_of(subjects, numbers) == ["Poe", "Roe"]
    assert subjects_of(subjects, ["Poe"]) == []
