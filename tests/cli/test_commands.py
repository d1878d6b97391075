"""`models`, `inspect`, `demo` and the promises that hold for every command."""

from __future__ import annotations

import json
import re

import pytest
import torch

from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.tasks.models import SIZES
from tests.makers import save_nifti


def test_models_lists_every_method_and_what_is_here(medsr):
    ended = medsr("models", "--json")
    methods = [json.loads(line) for line in ended.out.splitlines()]
    assert [m["id"] for m in methods] == ["rdst", "bicubic", "lanczos"]
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


@pytest.mark.parametrize(("variant", "blocks"), [("rdst", 8), ("rdst-e", 4)])
def test_stated_sizes_are_those_of_the_networks(variant, blocks):
    with torch.device("meta"):
        count = sum(p.numel() for p in Rdst(RdstConfig(n_rdstb=blocks)).parameters())
    assert SIZES[variant].startswith(f"{count:,}")


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
