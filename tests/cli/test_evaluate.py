"""`medsr evaluate` and `medsr compare` as a shell sees them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.cohft import Cohft, CohftConfig
from tests.makers import anatomy, save_checkpoint, save_nifti

SHAPE = (60, 52, 3)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for at, subject in enumerate(("one", "two")):
        (tmp_path / "data" / subject).mkdir(parents=True)
        save_nifti(tmp_path / "data" / subject / "T2.nii.gz", anatomy(SHAPE, seed=at))
    return tmp_path / "data"


def test_evaluate_prints_a_table_and_writes_all_three(medsr, tree, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    run = (
        "evaluate",
        tree,
        "-m",
        "rdst",
        "--weights",
        checkpoint,
        "-s",
        2,
        "-o",
        tmp_path / "out",
        "--seed",
        1,
        "--log-paths",
    )
    ended = medsr(*run)
    assert ended.code == 0, ended.err
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert lines[0][:4] == ["scale", "model", "metric", "mean"]
    assert [line[1] for line in lines[1:]] == ["bicubic", "rdst", "bicubic", "rdst"]
    assert "is worse by rdst than by bicubic" in ended.err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["seed"] == 1
    assert report["command"].startswith("medsr evaluate")
    assert report["protocol"]["name"] == "rdst"
    assert report["models"][1]["checkpoint"] == "tiny.safetensors"
    assert len(report["models"][1]["sha256"]) == 64
    assert all(len(image["sha256"]) == 64 for image in report["data"]["images"])
    rows = list(csv.DictReader((tmp_path / "out" / "slices.csv").open()))
    mean = np.mean([float(row["psnr"]) for row in rows if row["model"] == "rdst"])
    assert f"{mean:.2f}" == next(line[3] for line in lines if line[1:3] == ["rdst", "psnr"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") or page.lower().startswith("<!doctype html>")
    assert "Not a medical device".lower() in page.lower()
    # A rerun replaces nothing unless it is told to, and finds out before it measures.
    again = medsr(*run)
    assert again.code == 2
    assert "exists" in again.err
    assert medsr(*run, "--overwrite", "-q").err == ""
    repeated = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert repeated["summary"] == report["summary"]


def test_evaluate_as_json_lines(medsr, tree):
    ended = medsr("evaluate", tree, "-m", "lanczos", "-s", "2", "--json", "--slices", 1)
    assert ended.code == 0, ended.err
    records = [json.loads(line) for line in ended.out.splitlines()]
    assert {record["kind"] for record in records} == {"volume", "summary"}
    assert [r["model"] for r in records if r["kind"] == "summary" and r["metric"] == "psnr"] == ["bicubic", "lanczos"]


def test_exit_codes_of_evaluate(medsr, tree, tmp_path):
    (tree / "one" / "broken.nii.gz").write_bytes(b"nothing")
    some = medsr("evaluate", tree, "-m", "bicubic", "-s", 2)
    assert some.code == 3
    assert "psnr" in some.out
    assert "broken.nii.gz" not in some.err
    assert "broken.nii.gz" in medsr("evaluate", tree, "-m", "bicubic", "-s", 2, "--log-paths").err
    only_broken = medsr("evaluate", tree, "-m", "bicubic", "--include", "broken*")
    assert only_broken.code == 6
    assert medsr("evaluate", tree, "--weights", "rdst-x4-oasis-e1", "-s", 4).code == 5
    fid = medsr("evaluate", tree, "-m", "bicubic", "--fid")
    assert fid.code == 5
    assert "medsr weights pull" in fid.err
    for wrong in (("-s", "x"), ("-s", "0.5"), ("-m", "nobody"), ("--protocol", "nobody"), ("--backend", "tensorrt")):
        assert medsr("evaluate", tree, *wrong).code == 2, wrong
    (tmp_path / "file").write_text("")
    assert medsr("evaluate", tree, "-o", tmp_path / "file").code == 2


def guided_network(path: Path) -> Path:
    """An untrained Cohf-T: an evaluation measures also what `upscale` would refuse to write."""
    torch.manual_seed(8)
    tiny = {"stages": 1, "feature_dim": 8, "growth": 4, "rrdb_per_stage": 1, "rdbs": 1, "convs": 2, "heads": 2}
    net = Cohft(CohftConfig(**tiny, scale=2)).eval()
    path.write_bytes(save_network(net, {"degradation": "band-limited"}))
    return path


def test_guides_come_from_the_folder_and_can_be_shuffled(medsr, tree, tmp_path):
    for at, subject in enumerate(("one", "two")):
        save_nifti(tree / subject / "T1.nii.gz", anatomy(SHAPE, seed=7 + at))
    checkpoint = guided_network(tmp_path / "guided.safetensors")
    run = ("evaluate", tree, "-m", f"cohft={checkpoint}", "-s", 2, "--target", "T2*", "--guide-name", "T1*")
    ended = medsr(*run, "--shuffle-guides", "--log-paths", "--report", tmp_path / "r.json")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert {row["volume"] for row in report["slices"]} == {"one/T2.nii.gz", "two/T2.nii.gz"}
    by_model = {
        model: [row["psnr_cohft"] for row in report["slices"] if row["model"] == model]
        for model in ("bicubic", "cohft", "cohft (guides shuffled)")
    }
    assert all(len(figures) == 6 for figures in by_model.values())
    assert by_model["cohft"] != by_model["cohft (guides shuffled)"]
    (tree / "two" / "T1.nii.gz").unlink()
    missing = medsr(*run)
    assert missing.code == 3
    assert "no guide" in missing.err
    assert medsr("evaluate", tree, "-m", f"cohft={checkpoint}", "-s", 2).code == 2


def test_compare_prints_figures_and_flags_with_strict(medsr, tmp_path):
    data = anatomy((96, 96, 2)).astype(np.int16)
    changed = data.copy()
    changed[30:66, 30:66] = np.random.default_rng(0).integers(0, 2000, (36, 36, 2))
    a, b = save_nifti(tmp_path / "a.nii.gz", changed), save_nifti(tmp_path / "b.nii.gz", data)
    ended = medsr("compare", a, b, "--reference", "-o", tmp_path / "out", "--map", tmp_path / "m.nii.gz")
    assert ended.code == 0, ended.err
    assert "flagged\tslice" in ended.out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["structure"]["flagged"] > 0
    assert "<html" in (tmp_path / "out" / "comparison.html").read_text()
    assert nib.load(tmp_path / "m.nii.gz").shape == data.shape
    strict = medsr("compare", a, b, "--reference", "--strict", "--json")
    assert strict.code == 7
    assert json.loads(strict.out)["b_is_reference"] is True
    assert medsr("compare", a, b, "--reference", "--strict", "--limit", 1).code == 0
    assert medsr("compare", b, b, "--reference", "--strict").code == 0
    for wrong in (("--strict",), ("--limit", 0.1), ("--map", tmp_path / "x.nii.gz"), ("--degradation", "none")):
        assert medsr("compare", a, b, *wrong).code == 2, wrong
    assert medsr("compare", a, b, "-o", tmp_path / "out").code == 2
    assert medsr("compare", a, tmp_path / "nothing.nii.gz").code == 6


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_help_is_there(medsr, command):
    ended = medsr(command, "--help")
    assert ended.code == 0
    assert "bicubic" in ended.out or "reference" in ended.out


def test_a_checkpoint_of_the_package_is_above_bicubic_on_shared_data(medsr, shared, tmp_path):
    folder = shared / "data" / "val" / "brain_mr"
    ended = medsr(
        "evaluate", folder, "-m", "rdst", "-s", 4, "--include", "ms_mni_p19/T2.nii.gz", "--slices", 2,
        "--report", tmp_path / "r.json", "--threads", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "r.json").read_text())
    gain = next(s for s in report["summary"] if (s["model"], s["metric"]) == ("rdst", "psnr"))
    assert gain["against_baseline"]["mean_difference"] > 1
    assert report["worse_than_baseline"] == []


def unchanged(medsr, folder: Path, *arguments: object) -> str:
    """What is said by a run that exits with 2 and leaves every file below `folder` as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = medsr(*arguments)
    assert ended.code == 2, (arguments, ended.err)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, arguments
    return ended.err


def test_compare_never_replaces_an_input(medsr, tmp_path):
    (tmp_path / "in").mkdir()
    a, b = (save_nifti(tmp_path / "in" / name, anatomy(SHAPE)) for name in ("a.nii.gz", "b.nii.gz"))
    (tmp_path / "link.nii.gz").symlink_to(b)
    (tmp_path / "hard.nii.gz").hardlink_to(b)
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    run = ("compare", a, b, "--reference", "--overwrite")
    for option in ("--report", "--html", "--map", "--difference"):
        for path in (
            b, a, tmp_path / "in" / ".." / "in" / "b.nii.gz", tmp_path / "link.nii.gz", tmp_path / "hard.nii.gz",
            tmp_path / "folder" / "b.nii.gz",
        ):  # fmt: skip
            assert "is an input" in unchanged(medsr, tmp_path, *run, option, path)
    for suffix in (".hdr", ".img"):
        pair = tmp_path / f"pair{suffix}"
        nib.save(nib.Nifti1Pair(anatomy(SHAPE), np.diag([0.9, 0.8, 4.0, 1.0])), tmp_path / "pair.img")
        said = unchanged(medsr, tmp_path, "compare", tmp_path / "pair.img", b, "--overwrite", "--difference", pair)
        assert "is an input" in said
    # A file that belongs to an input of several files, or any other image, is no report to replace.
    other = save_nifti(tmp_path / "other.nii.gz")
    assert "no report" in unchanged(medsr, tmp_path, *run, "--report", other)


def test_evaluate_never_replaces_an_image_of_its_folder(medsr, tree, tmp_path):
    save_nifti(tree / "one" / "T1.nii.gz")
    save_nifti(tree / "one" / "T2_mask.nii.gz")
    (tree / "two" / "T2.json").write_text('{"EchoTime": 0.1}')
    (tmp_path / "link").symlink_to(tree / "one")
    run = ("evaluate", tree, "-m", "bicubic", "-s", 2, "--include", "T2.nii.gz", "--slices", 1, "--overwrite")
    for option in ("--report", "--csv", "--html"):
        for place in ("T2.nii.gz", "T1.nii.gz", "T2_mask.nii.gz"):
            assert "input folder" in unchanged(medsr, tmp_path, *run, option, tree / "one" / place)
        unchanged(medsr, tmp_path, *run, option, tmp_path / "link" / "T2.nii.gz")
        unchanged(medsr, tmp_path, *run, option, tree / "two" / "T2.json")
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    unchanged(medsr, tmp_path, "evaluate", tree, "-m", f"rdst={checkpoint}", "--report", checkpoint, "--overwrite")
    # Reports may lie there, and be replaced by their like.
    for _ in range(2):
        assert medsr(*run, "-o", tree).code == 0
    assert {path.suffix for path in tree.iterdir() if path.is_file()} == {".json", ".csv", ".html"}


def test_two_results_of_one_name_are_refused_before_the_work(medsr, tree, tmp_path):
    image, x = tree / "one" / "T2.nii.gz", tmp_path / "x.nii.gz"
    (tmp_path / "sub").mkdir()
    again = tmp_path / "sub" / ".." / "x.nii.gz"
    other = tree / "two" / "T2.nii.gz"
    for first, second in (("--difference", "--map"), ("--report", "--html"), ("--report", "--map")):
        said = unchanged(medsr, tmp_path, "compare", image, other, "--reference", first, x, second, again)
        assert "one file" in said
    for first, second in (("--report", "--csv"), ("--csv", "--html"), ("--report", "--html")):
        run = ("evaluate", tree, "-m", "bicubic", "-s", 2, first, x, second, again)
        assert "one file" in unchanged(medsr, tmp_path, *run)
    assert not x.exists()
    unchanged(medsr, tmp_path, "compare", image, other, "--report", tmp_path / "sub", "--overwrite")


def test_the_remedy_for_what_exists_has_the_command_s_own_options(medsr, tree, tmp_path):
    (tmp_path / "r.json").write_text("{}")
    image = tree / "one" / "T2.nii.gz"
    for run in (("compare", image, image), ("evaluate", tree, "-m", "bicubic", "-s", 2)):
        said = unchanged(medsr, tmp_path, *run, "--report", tmp_path / "r.json")
        assert "exists. Give --overwrite" in " ".join(said.split())
        assert "--skip-existing" not in said
        assert "-o" not in said.split()


def test_a_gate_that_measured_nothing_does_not_pass(medsr, tmp_path):
    small = save_nifti(tmp_path / "small.nii.gz", anatomy((14, 40, 2)))
    open_gate = medsr("compare", small, small, "--reference")
    assert open_gate.code == 0
    assert "No patch could be checked" in open_gate.err
    assert "0 of 0" in open_gate.out
    assert medsr("compare", small, small, "--reference", "--strict").code == 7
    assert medsr("compare", small, small, "--reference", "--strict", "--limit", 1).code == 7


def test_strict_sees_slices_without_a_reference_and_holes(medsr, tmp_path):
    data = anatomy((64, 64, 2)).astype(np.float32)
    data[..., 1] = 0
    invented = data.copy()
    invented[20:30, 20:30, 1] = 700
    truth = save_nifti(tmp_path / "truth.nii.gz", data)
    a = save_nifti(tmp_path / "a.nii.gz", invented)
    ended = medsr("compare", a, truth, "--reference", "--strict")
    assert ended.code == 7
    assert "slice 2, all of it" in ended.out
    torn = data.copy()
    torn[:4, :4, 0] = np.nan
    hole = save_nifti(tmp_path / "hole.nii.gz", torn)
    ended = medsr("compare", hole, truth, "--reference", "--strict")
    assert ended.code == 7
    assert "16 pixels that are no numbers" in " ".join(ended.err.split())
    assert "numbers in one image alone\t16" in ended.out
    assert "not a number" in ended.out


def test_compare_refuses_options_without_use(medsr, tree):
    image = tree / "one" / "T2.nii.gz"
    for wrong in (("--scale", 2), ("--degradation", "cubic-blur"), ("--degradation", "cubic")):
        assert medsr("compare", image, image, *wrong).code == 2, wrong
