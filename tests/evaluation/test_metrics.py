import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.evaluation.metrics import IDENTICAL_DB, dice, psnr, ssim

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "specs" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the shared fixtures")


@needs_golden
@pytest.mark.parametrize("margin", [0, 2, 4])
def test_equals_the_authors_figures(margin):
    arrays = load_file(GOLDEN / "rdst_miassr_metrics.safetensors")
    stated = json.loads((GOLDEN / "rdst_miassr_metrics.json").read_text())["values"][f"margin_{margin}"]
    assert psnr(arrays["pred"], arrays["gt"], margin) == pytest.approx(stated["psnr"], abs=1e-6)
    assert ssim(arrays["pred"], arrays["gt"], margin) == pytest.approx(stated["ssim"], abs=1e-6)


@needs_golden
def test_dice_equals_the_authors_figures():
    arrays = load_file(GOLDEN / "rdst_miassr_metrics.safetensors")
    stated = json.loads((GOLDEN / "rdst_miassr_metrics.json").read_text())["dice"]
    for label in (1, 2, 3):
        found = dice(arrays["label_pred"], arrays["label_gt"], [label])
        assert found == pytest.approx(stated[f"class_{label}"], abs=1e-9)
    whole = dice(arrays["label_pred"], arrays["label_gt"], [1, 2, 3])
    assert whole == pytest.approx(stated["total_one_hot_1_to_3"], abs=1e-9)


@pytest.mark.parametrize("shape", [(7, 7), (31, 20), (64, 65)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_scikit_image(shape, dtype):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = rng.random(shape).astype(dtype)
    b = (a + 0.1 * rng.standard_normal(shape)).astype(dtype)
    theirs = metrics.structural_similarity(a.astype(np.float64), b.astype(np.float64), data_range=1.0)
    assert ssim(a, b) == pytest.approx(theirs, abs=1e-9)
    theirs = metrics.peak_signal_noise_ratio(a.astype(np.float64), b.astype(np.float64), data_range=1.0)
    assert psnr(a, b) == pytest.approx(theirs, abs=1e-6)


def test_margin_leaves_the_border_out():
    a = np.zeros((20, 20))
    b = a.copy()
    b[:2] = b[:, -2:] = 1
    assert psnr(a, b, 2) == IDENTICAL_DB
    assert psnr(a, b, 1) < 20


def test_equal_images():
    a = np.random.default_rng(0).random((16, 16))
    assert psnr(a, a) == IDENTICAL_DB
    assert ssim(a, a) == pytest.approx(1)


def test_ssim_refuses_what_is_smaller_than_its_window():
    with pytest.raises(ValueError, match="7 pixels"):
        ssim(np.zeros((10, 12)), np.zeros((10, 12)), margin=2)
