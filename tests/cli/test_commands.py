"""`models`, `inspect`, `demo` and the promises that hold for every command."""

from __future__ import annotations

import json
import re

import pytest

from medsr_cli.networks.catalogue import CATALOGUE
from medsr_cli.networks.cost import cost_of
from tests.makers import save_nifti


def test_models_lists_every_method_and_what_is_here(medsr):
    ended = medsr("models", "--json")
    methods = [json.loads(line) for line in ended.out.splitlines()]
    assert [m["id"] for m in methods] == [arch.id for arch in CATALOGUE]
    bundled = [c for c in methods[0]["checkpoints"] if c["state"] == "bundled"]
    assert bundled, "a checkpoint travels inside the package"
    for checkpoint in bundled:
        assert checkpoint["licence"]["data"]
        for score in checkpoint["validation"]:
            assert score["psnr"] > score["bicubic_psnr"], "nothing is shipped that is worse than bicubic"


def test_models_of_one_method_tells_paper_and_licences(medsr):
    ended = medsr("models", "rdst")
    assert "2302.11184" in ended.out
    assert "licences" in ended.out
    assert medsr("models", "nonsense").code == 2


NETWORKS = [arch for arch in CATALOGUE if arch.kind == "network"]


@pytest.mark.parametrize("arch", NETWORKS, ids=lambda arch: arch.id)
def test_every_method_tells_what_it_is_and_what_can_be_shown(medsr, arch):
    ended = medsr("models", arch.id)
    assert ended.code == 0, ended.err
    assert arch.paper.split(",")[0] in ended.out
    for told in ("what it computes", "claim:", "of the authors:", "parameters", "tiles:", "scales:"):
        assert told in ended.out, told
    if arch.id in ("uscyclegan", "cohft"):
        assert "licence" in arch.authors
        assert "not stated" in arch.authors or "no licence" in arch.authors


@pytest.mark.parametrize("arch", NETWORKS, ids=lambda arch: arch.id)
def test_stated_sizes_are_those_of_the_networks(arch):
    """Counted on networks without memory, at x4, on a small slice."""
    for variant in arch.variants:
        cost = cost_of(arch, variant, 4, 60, 60)
        assert cost.parameters == arch.parameters[variant]
        assert cost.macs > 0


def test_costs_are_counted_when_asked_for(medsr):
    facts = json.loads(medsr("models", "rdst-e", "--size", "64x64", "--json").out)
    row = next(row for row in facts["cost"] if (row["variant"], row["scale"]) == ("rdst-e", 4))
    assert row["parameters"] == 2_379_245
    assert row["gflops"] == pytest.approx(2 * row["gmacs"])
    assert medsr("models", "rdst", "--size", "64").code == 2
    assert "GFLOPs" in medsr("models", "rdst", "--size", "64x64").out


def test_a_family_is_told_together(medsr):
    told = [json.loads(line)["id"] for line in medsr("models", "cohft", "--json").out.splitlines()]
    assert told == ["cohft", "cohft-released"]


def test_inspect_tells_geometry_and_what_can_be_done(medsr, tmp_path):
    scan = save_nifti(tmp_path / "scan.nii.gz")
    facts = json.loads(medsr("inspect", scan, "--json").out)
    assert facts["slices"] == 6
    assert facts["pixel spacing"] in ("0.9 x 0.8 mm", "0.8 x 0.9 mm")
    assert facts["usable"]
    text = medsr("inspect", scan)
    assert "can be done" in text.out
    bad = tmp_path / "bad.nii.gz"
    bad.write_text("nothing")
    assert medsr("inspect", bad).code == 6


def test_demo_makes_a_picture_and_beats_bicubic(medsr, tmp_path):
    ended = medsr("demo", "-o", tmp_path / "demo.png", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert facts["psnr_db"] > facts["bicubic_psnr_db"] + 0.3
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert medsr("demo", "-o", tmp_path / "demo.png").code == 2


def test_version_and_help(medsr):
    assert re.fullmatch(r"medsr \d+\.\d+\.\d+\n", medsr("--version").out)
    shown = medsr("--help").out
    assert "Research use" in shown
    assert "not a medical device" in shown
