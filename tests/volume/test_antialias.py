"""The antialiased bicubic against the ultrasound CycleGAN's resizing, its definition, and what it must keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from medsr_cli.volume.antialias import antialias_weights, antialiased_resize, antialiased_size

HERE = Path(__file__).resolve().parents[1] / "golden"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "specs" / "golden"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_released_resizing_with_mirrored_edges(dtype):
    paths = [folder / "uscyclegan_resize.json" for folder in (HERE, SHARED)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        pytest.skip("needs the shared data")
    tensors = load_file(path.with_suffix(".safetensors"))
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) >= 6
    for case in cases:
        image = tensors[case["x"]].transpose(2, 0, 1).astype(dtype)  # (3, rows, columns)
        size, scale = image.shape[1:], case["scale_factor"]
        wanted_size = tuple(case["output_shape"] or antialiased_size(size, scale))[:2]
        found = antialiased_resize(image, wanted_size, scale)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.transpose(1, 2, 0), tensors[case["y_sym"]], atol=2e-6, rtol=0)


def keys(x: float) -> float:
    """Keys' kernel of a = -1/2, from the text-book."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def by_definition(signal: np.ndarray, n_out: int, factor: float) -> np.ndarray:
    """One pixel after the other: every mirrored copy of the signal within reach, weighted."""
    n, narrow = len(signal), min(factor, 1.0)
    result = []
    for i in range(n_out):
        centre = (i + 0.5) / factor - 0.5
        total = weight = 0.0
        for tap in range(int(centre - 2 / narrow) - 3, int(centre + 2 / narrow) + 4):
            k = keys((centre - tap) * narrow)
            period = tap % (2 * n)
            total += k * signal[period if period < n else 2 * n - 1 - period]
            weight += k
        result.append(total / weight)
    return np.array(result)


@settings(deadline=None, max_examples=60)
@given(n_in=st.integers(1, 30), n_out=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_pixel_is_that_of_the_definition(n_in, n_out, seed):
    signal = np.random.default_rng(seed).random(n_in)
    found = antialias_weights(n_in, n_out) @ signal
    np.testing.assert_allclose(found, by_definition(signal, n_out, n_out / n_in), atol=1e-12)


@pytest.mark.parametrize(("n_in", "n_out", "scale"), [(21, 6, 0.25), (6, 21, 4.0), (1, 3, 2.5), (13, 4, 1 / 3)])
def test_a_scale_that_the_sizes_do_not_give_exactly(n_in, n_out, scale):
    signal = np.random.default_rng(1).random(n_in)
    found = antialias_weights(n_in, n_out, scale) @ signal
    np.testing.assert_allclose(found, by_definition(signal, n_out, scale), atol=1e-12)


@pytest.mark.parametrize(
    ("size", "scale", "expected"), [((64, 21), 0.25, (16, 6)), ((13, 18), 4.0, (52, 72)), ((5, 1), 0.5, (3, 1))]
)
def test_sizes_are_rounded_up(size, scale, expected):
    assert antialiased_size(size, scale) == expected


@pytest.mark.parametrize("size", [(7, 9), (40, 3), (10, 31), (1, 1), (300, 400)])
def test_leading_axes_are_kept_and_the_last_two_resized(size):
    image = np.random.default_rng(2).random((2, 3, 10, 31)).astype(np.float32)
    found = antialiased_resize(image, size)
    assert found.shape == (2, 3, *size)
    assert found.dtype == np.float32
    one = antialias_weights(10, size[0]) @ image[1, 2].astype(np.float64) @ antialias_weights(31, size[1]).T
    np.testing.assert_allclose(found[1, 2], one, atol=2e-6)


def test_the_same_size_changes_nothing():
    image = np.random.default_rng(3).random((3, 12, 17))
    np.testing.assert_allclose(antialiased_resize(image, (12, 17)), image, atol=1e-15)


def test_a_constant_stays_and_a_mirror_image_gives_the_mirror_image():
    np.testing.assert_allclose(antialiased_resize(np.full((9, 11), 0.3), (4, 29)), 0.3, atol=1e-14)
    image = np.random.default_rng(4).random((18, 13))
    for size in ((5, 4), (36, 39)):
        mirrored = antialiased_resize(image[::-1, ::-1], size)
        np.testing.assert_allclose(mirrored, antialiased_resize(image, size)[::-1, ::-1], atol=1e-13)


def test_shrinking_smooths_away_what_the_small_image_cannot_hold():
    stripes = np.tile([0.0, 1.0], (64, 32))
    assert np.ptp(antialiased_resize(stripes, (16, 16))[:, 2:-2]) < 0.01


def test_matrices_are_made_once_and_cannot_be_changed():
    weights = antialias_weights(16, 64)
    assert weights is antialias_weights(16, 64)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    with pytest.raises(ValueError, match="read-only"):
        weights[0, 0] = 1


@pytest.mark.parametrize(("n_in", "n_out", "scale"), [(0, 4, None), (4, 0, None), (4, 8, 0.0), (4, 8, float("inf"))])
def test_impossible_axes_are_refused(n_in, n_out, scale):
    with pytest.raises(ValueError, match="cannot be resampled"):
        antialias_weights(n_in, n_out, scale)
