"""`--consistency-map`, and the limit of a checkpoint as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medsr_cli.engines.engine import Enlarged, Interpolation
from medsr_cli.evaluation.agreement_map import Limit
from medsr_cli.volume.resample import resize
from tests.makers import save_checkpoint, save_nifti


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "scan.nii.gz")


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith(".medsr")]


@pytest.fixture
def invents(monkeypatch):
    """Bicubic that adds a bright square to every slice."""
    honest = Interpolation.run

    def run(self, planes, guide=None):
        enlarged = honest(self, planes, guide)
        worse = np.array(enlarged.planes)
        worse[..., 20:32, 20:32] += 0.9
        return Enlarged(worse, enlarged.extras)

    monkeypatch.setattr(Interpolation, "run", run)


def test_the_map_is_the_difference_on_the_inputs_grid(medsr, scan, tmp_path):
    where, report = tmp_path / "map.nii.gz", tmp_path / "r.json"
    ended = medsr(
        "upscale", scan, "-m", "bicubic", "-s", 2.5, "--consistency-map", where, "--report", report, "--log-paths"
    )
    assert ended.code == 0, ended.err
    before, after, shown = nib.load(scan), nib.load(ended.out.splitlines()[0]), nib.load(where)
    assert ended.out.splitlines()[1] == str(where)
    assert shown.shape == before.shape
    assert shown.get_data_dtype() == np.float32
    np.testing.assert_allclose(shown.affine, before.affine, atol=1e-6)
    given, result = (np.asarray(image.dataobj, np.float64) for image in (before, after))
    again = np.moveaxis(resize(np.moveaxis(result, 2, 0), given.shape[:2]), 0, 2)
    # The result is rounded to whole numbers, the map was made before.
    np.testing.assert_allclose(np.asarray(shown.dataobj), np.abs(again - given), atol=2)
    consistency = json.loads(report.read_text())["consistency"]
    assert consistency["largest_units"] == pytest.approx(float(np.asarray(shown.dataobj).max()), rel=1e-5)
    assert json.loads(report.read_text())["output"]["beside"] == ["map.nii.gz"]


def test_a_slope_counts_and_padding_does_not(medsr, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 900, (24, 20, 3)).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1]))
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "a.nii.gz")
    plain = nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1]))
    nib.save(plain, tmp_path / "b.nii.gz")
    for name in "ab":
        ended = medsr(
            "upscale", tmp_path / f"{name}.nii.gz", "-m", "bicubic", "-s", 1.5, "-o", tmp_path / f"{name}2.nii.gz",
            "--consistency-map", tmp_path / f"{name}_map.nii.gz",
        )  # fmt: skip
        assert ended.code == 0, ended.err
    a, b = (np.asarray(nib.load(tmp_path / f"{name}_map.nii.gz").dataobj) for name in "ab")
    np.testing.assert_allclose(a, 0.5 * b, rtol=1e-4, atol=1e-3)


def test_pictures_have_tiff_maps(medsr, tmp_path):
    picture = tmp_path / "a.png"
    grey = (128 + 90 * np.sin(np.arange(900).reshape(30, 30) / 7)).astype(np.uint8)
    Image.fromarray(grey).save(picture)
    ended = medsr("upscale", picture, "-m", "bicubic", "-s", 2, "--consistency-map", tmp_path / "map.tiff")
    assert ended.code == 0, ended.err
    shown = np.asarray(Image.open(tmp_path / "map.tiff"))
    assert shown.shape == (30, 30)
    assert shown.dtype == np.float32
    refused = medsr(
        "upscale", picture, "-m", "bicubic", "-s", 2, "--overwrite", "--consistency-map", tmp_path / "map.png"
    )
    assert refused.code == 2
    assert "real numbers" in refused.err


def test_maps_of_a_batch_stand_beside_the_results(medsr, scan, tmp_path):
    other = save_nifti(tmp_path / "other.nii.gz")
    out = tmp_path / "out"
    refused = medsr("upscale", scan, other, "-m", "bicubic", "-s", 2, "--consistency-map", tmp_path / "m.nii.gz")
    assert refused.code == 2
    assert "several inputs" in refused.err
    ended = medsr("upscale", scan, other, "-m", "bicubic", "-s", 2, "-o", out, "--consistency-map", "m.nii.gz")
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "other_x2-bicubic.nii.gz", "other_x2-bicubic_consistency.nii.gz",
        "scan_x2-bicubic.nii.gz", "scan_x2-bicubic_consistency.nii.gz",
    ]  # fmt: skip


def test_a_map_is_not_written_over_the_input_or_the_result(medsr, scan, tmp_path):
    content = scan.read_bytes()
    for name in (scan, scan.with_name("scan_x2-bicubic.nii.gz")):
        refused = medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--overwrite", "--consistency-map", name)
        assert refused.code == 2, refused.err
    assert scan.read_bytes() == content
    there = tmp_path / "there.nii.gz"
    there.write_bytes(b"mine")
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--consistency-map", there).code == 2
    assert there.read_bytes() == b"mine"


def test_an_invention_is_flagged(medsr, scan, tmp_path, invents):
    report = tmp_path / "r.json"
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--report", report)
    assert ended.code == 0, ended.err
    assert "The shrunken result differs from the input by more than" in ended.err
    facts = json.loads(report.read_text())
    local = facts["consistency"]["local"]
    assert local["flagged"] == [1, 2, 3, 4, 5, 6]
    assert local["limit_from_slices"] is None
    assert any("in 6 of 6 slices" in said for said in facts["warnings"])


def test_strict_refuses_it_with_nothing_written(medsr, scan, tmp_path, invents):
    before = sorted(tmp_path.iterdir())
    ended = medsr(
        "upscale", scan, "-m", "bicubic", "-s", 2, "--strict", "--consistency-map", tmp_path / "m.nii.gz",
        "--report", tmp_path / "r.json",
    )  # fmt: skip
    assert ended.code == 7
    assert "Nothing was written" in ended.err
    assert sorted(tmp_path.iterdir()) == before
    assert not leftovers(tmp_path)


def test_good_results_pass_strict(medsr, scan):
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--strict")
    assert ended.code == 0, ended.err


def test_the_limit_comes_with_the_checkpoint(medsr, scan, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    plain = save_checkpoint(tmp_path / "plain.safetensors")
    with safe_open(plain, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # So low a limit that the result must be beyond it.
    metadata["consistency"] = Limit(1e-6, 41, 1e-7).to_json()
    save_file(tensors, tmp_path / "marked.safetensors", metadata)
    seen = {}
    for name in ("plain", "marked"):
        report = tmp_path / f"{name}.json"
        ended = medsr(
            "upscale", scan, "-s", 2, "--weights", tmp_path / f"{name}.safetensors", "--report", report,
            "-o", tmp_path / f"{name}.nii.gz",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        seen[name] = json.loads(report.read_text())["consistency"]["local"]
    assert seen["plain"]["limit_from_slices"] is None
    assert seen["plain"]["flagged_slices"] == 0
    assert (seen["marked"]["limit"], seen["marked"]["limit_from_slices"]) == (1e-6, 41)
    assert seen["marked"]["flagged_slices"] == 6
    ended = medsr("upscale", scan, "-s", 2, "--weights", tmp_path / "marked.safetensors", "--strict")
    assert ended.code == 7


def test_bundled_checkpoints_are_calibrated(medsr, scan, tmp_path):
    report = tmp_path / "r.json"
    ended = medsr("upscale", scan, "-s", 4, "-m", "rdst", "--modality", "mr", "--report", report, "--roi", "4,4,16,16")
    assert ended.code == 0, ended.err
    local = json.loads(report.read_text())["consistency"]["local"]
    assert local["limit_from_slices"] > 100


def test_the_manifest_keeps_limits_and_refuses_senseless_ones():
    from medsr_cli.errors import WeightsError
    from medsr_cli.weights.manifest import load_manifest, parse_entry

    entry = load_manifest().entry("rdst-e-x4-brain-mr")
    assert entry.consistency is not None
    assert parse_entry(entry.to_json(), "again") == entry
    without = {key: value for key, value in entry.to_json().items() if key != "consistency"}
    assert parse_entry(without, "earlier").consistency is None
    for wrong in ({"limit": 0, "slices": 3}, {"limit": 0.2}, {"limit": 0.2, "slices": 3, "more": 1}, 0.2):
        with pytest.raises(WeightsError, match="consistency"):
            parse_entry({**without, "consistency": wrong}, "wrong")
