"""SSIM variants, luma, FSIM and GMSD: the authors' figures, scikit-image, and formulas written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.evaluation import structure as s
from medsr_cli.evaluation.fsim import fsim, luminance_chrominance, phase_congruency
from medsr_cli.evaluation.gmsd import gmsd
from medsr_cli.evaluation.metrics import IDENTICAL_DB, psnr

HERE = Path(__file__).resolve().parents[1] / "golden" / "m2trans_cohft_metrics_cut"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "specs" / "golden" / "m2trans_cohft_metrics"


def golden() -> list:
    found = []
    for path in (HERE, SHARED):
        if path.with_suffix(".json").exists():
            arrays = load_file(path.with_suffix(".safetensors"))
            for case in json.loads(path.with_suffix(".json").read_text())["cases"]:
                name = f"{case['method']}.{{}}{case['index']}"
                pair = arrays[name.format("sr")], arrays[name.format("hr")]
                found.append(pytest.param(case, *pair, id=f"{path.name}-{case['method']}-{case['index']}"))
    return found


@pytest.mark.parametrize(("case", "result", "target"), golden())
def test_equals_the_released_test_programs(case, result, target):
    if case["method"] == "cohft":
        assert s.cohft_psnr(result, target) == pytest.approx(case["psnr"], abs=1e-3)
        assert s.cohft_ssim(result, target) == pytest.approx(case["ssim"], abs=1e-5)
        return
    result, target, margin = result[0], target[0], case["scale"]
    assert fsim(result, target) == pytest.approx(case["fsim"], abs=2e-5)
    assert gmsd(result, target) == pytest.approx(case["gmsd"], abs=1e-6)
    assert s.psnr_y(result, target, margin) == pytest.approx(case["psnr_y"], abs=1e-3)
    assert s.ssim_y(result, target, margin) == pytest.approx(case["ssim_y_float64"], abs=5e-5)
    assert s.ssim_y(result, target, margin) == pytest.approx(case["ssim_y"], abs=1e-3)
    conventional = s.ssim_y_conventional(result, target, margin)
    assert conventional == pytest.approx(case["ssim_y_conventional_0_255"], abs=1e-5)


def noisy(shape: tuple[int, ...], deviation: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.random(shape)
    return reference + deviation * rng.standard_normal(shape), reference


@pytest.mark.parametrize("shape", [(11, 11), (40, 31)])
def test_gaussian_ssim_equals_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    result, reference = noisy(shape)
    theirs, _ = metrics.structural_similarity(
        result, reference, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    # scikit-image crops its map by the reach of its Gaussian, 5 pixels, as `valid` does.
    assert s.gaussian_ssim(result, reference) == pytest.approx(theirs, abs=1e-9)


def test_cohft_ssim_is_zero_padded():
    result, reference = noisy((14, 13))
    padded = [np.pad(image, 5) for image in (result, reference)]
    assert s.cohft_ssim(result, reference) == pytest.approx(s.gaussian_ssim(*padded), abs=1e-12)
    assert s.cohft_ssim(result[:3, :2], reference[:3, :2]) < 1, "any size"


def test_a_chunk_is_measured_as_one():
    result, reference = noisy((3, 20, 20))
    result[1] = reference[1]
    errors = [np.mean((result[i] - reference[i]) ** 2) for i in range(3)]
    assert s.cohft_psnr(result, reference) == pytest.approx(-10 * np.log10(np.mean(errors)))
    each = [s.cohft_ssim(result[i], reference[i]) for i in range(3)]
    assert s.cohft_ssim(result, reference) == pytest.approx(np.mean(each))
    assert [c.stop - c.start for c in s.chunks(155)] == [20] * 7 + [15]
    assert s.chunks(0) == []


def test_luma_is_that_of_bt601():
    assert s.luma(np.ones((3, 2, 2)))[0, 0] == pytest.approx(219)
    assert np.array_equal(s.luma(np.zeros((3, 1, 1))), [[0]])
    grey = np.random.default_rng(0).random((1, 4, 5))
    np.testing.assert_allclose(s.luma(grey), s.luma(np.repeat(grey, 3, 0)))
    with pytest.raises(ValueError, match="one or three"):
        s.luma(np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="one or three"):
        s.luma(np.zeros((4, 4)))


def test_psnr_of_luma_is_that_of_grey_but_for_its_range():
    result, reference = noisy((1, 20, 20))
    expected = psnr(result[0], reference[0], 3) + 20 * np.log10(255 / 219)
    assert s.psnr_y(result, reference, 3) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [s.ssim_y, s.ssim_y_conventional, s.psnr_y])
def test_margins_that_leave_nothing_are_refused(metric):
    image = np.zeros((1, 12, 12))
    with pytest.raises(ValueError, match=r"11 pixels|Nothing is left"):
        metric(image, image, 6)
    with pytest.raises(ValueError, match="cannot be compared"):
        metric(image, np.zeros((1, 12, 13)))


ALL = {
    "psnr_y": (s.psnr_y, IDENTICAL_DB),
    "ssim_y": (s.ssim_y, 1),
    "ssim_y_conventional": (s.ssim_y_conventional, 1),
    "cohft_ssim": (s.cohft_ssim, 1),
    "cohft_psnr": (s.cohft_psnr, IDENTICAL_DB),
    "fsim": (fsim, 1),
    "gmsd": (gmsd, 0),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_images_have_the_best_value_and_noise_makes_it_worse(name, channels, dtype):
    metric, best = ALL[name]
    shape = (channels, 33, 40)
    _, reference = noisy(shape)
    reference = reference.astype(dtype)
    assert metric(reference, reference) == pytest.approx(best, abs=1e-6)
    values = [metric(noisy(shape, d)[0].astype(dtype), reference) for d in (0.02, 0.1, 0.4)]
    assert values == sorted(values, reverse=name != "gmsd")
    assert abs(values[0] - best) > 1e-5


@pytest.mark.parametrize("name", ALL)
def test_constant_images(name):
    metric, best = ALL[name]
    flat = np.full((1, 24, 24), 0.5)
    if name == "fsim":
        assert np.isnan(metric(flat, flat)), "no phase congruency anywhere"
        assert metric(noisy((1, 24, 24))[0], flat) < 0.9
    else:
        assert metric(flat, flat) == pytest.approx(best, abs=1e-6)
    assert np.isfinite(metric(flat, noisy((1, 24, 24))[1]))


def test_small_and_odd_images_are_refused():
    for metric, side in ((fsim, 8), (gmsd, 2)):
        with pytest.raises(ValueError, match=f"at least {side} pixels"):
            metric(np.zeros((side - 1, 30)), np.zeros((side - 1, 30)))
        with pytest.raises(ValueError, match="no pair"):
            metric(np.zeros((2, 30, 30)), np.zeros((2, 30, 30)))
        with pytest.raises(ValueError, match="no pair"):
            metric(np.zeros((30, 30)), np.zeros((30, 31)))


def test_grey_is_three_equal_channels():
    result, reference = noisy((24, 26))
    for metric in (fsim, gmsd):
        once = metric(result, reference)
        assert metric(result[None], reference[None]) == once
        thrice = metric(np.stack([result] * 3), np.stack([reference] * 3))
        assert thrice == pytest.approx(once, abs=1e-9)


def test_colour_counts_in_fsim_only():
    _, reference = noisy((3, 30, 30))
    other = reference[[1, 0, 2]]
    same_luminance = np.tensordot(np.array([0.299, 0.587, 0.114]), other, 1)
    grey = np.tensordot(np.array([0.299, 0.587, 0.114]), reference, 1)
    assert fsim(other, reference) < fsim(same_luminance, grey)
    y, _ = luminance_chrominance(reference, reference)
    np.testing.assert_allclose(y[0], grey)


def test_gmsd_is_that_of_its_formula():
    result, reference = noisy((12, 14))
    maps = []
    for image in (result, reference):
        half = np.pad(image.reshape(6, 2, 7, 2).mean(axis=(1, 3)), 1)
        gradient = np.zeros((6, 7))
        for i in range(6):
            for j in range(7):
                window = half[i : i + 3, j : j + 3]
                across, down = window[:, 2] - window[:, 0], window[2] - window[0]
                gradient[i, j] = np.hypot(across.sum() / 3, down.sum() / 3)
        maps.append(gradient)
    a, b = maps
    c = 170 / 255**2
    assert gmsd(result, reference) == pytest.approx(np.std((2 * a * b + c) / (a * a + b * b + c)), abs=1e-12)


def test_phase_congruency_is_high_on_a_step_and_does_not_see_its_height():
    image = np.zeros((64, 64))
    image[:, 32:] = 100
    congruency = phase_congruency(image)
    assert 0 <= congruency.min() <= congruency.max() <= 1
    assert congruency[32, 31:33].min() > 0.75
    assert congruency[32, 36:42].max() < 0.3, "between the step and its mirror"
    np.testing.assert_allclose(phase_congruency(0.5 * image), congruency, atol=1e-6)


def test_large_images_are_reduced():
    _, reference = noisy((512, 520))
    blocks = reference.reshape(256, 2, 260, 2).mean(axis=(1, 3))
    result, _ = noisy((512, 520), 0.3)
    small = result.reshape(256, 2, 260, 2).mean(axis=(1, 3))
    assert fsim(result, reference) == pytest.approx(fsim(small, blocks), abs=1e-12)
