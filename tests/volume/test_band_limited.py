"""Band-limited resampling: exact for what a grid can hold, and at the right place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.volume.band_limited import band_limited_resize, shifted


def wave(n: int, k: int, at: np.ndarray | None = None) -> np.ndarray:
    """A cosine of k half periods over the axis, sampled at n pixel centres or at shares of the axis."""
    return np.cos(np.pi * k * ((np.arange(n) + 0.5) / n if at is None else at))


@given(n=st.integers(2, 40), m=st.integers(2, 40), k=st.integers(0, 39))
def test_what_both_grids_hold_is_resampled_exactly(n, m, k):
    k = min(k, n - 1, m - 1)
    image = np.outer(wave(n, k), np.ones(5))
    np.testing.assert_allclose(band_limited_resize(image, (m, 5)), np.outer(wave(m, k), np.ones(5)), atol=1e-10)


@given(n=st.integers(2, 30), factor=st.integers(1, 5))
def test_up_and_down_again_is_nothing(n, factor):
    image = np.random.default_rng(n).random((3, n, n + 1))
    larger = band_limited_resize(image, (n * factor, (n + 1) * factor))
    np.testing.assert_allclose(band_limited_resize(larger, (n, n + 1)), image, atol=1e-10)


def test_what_the_smaller_grid_cannot_hold_is_gone():
    image = np.outer(wave(40, 25), wave(40, 3))
    assert np.abs(band_limited_resize(image, (20, 40))).max() < 1e-10


def test_the_mean_is_kept_and_so_is_the_type():
    image = np.random.default_rng(0).random((24, 30)).astype(np.float32)
    small = band_limited_resize(image, (8, 10))
    assert small.dtype == np.float32
    assert small.mean() == pytest.approx(image.mean(), rel=1e-5)


@pytest.mark.parametrize("by", [0.375, -0.25, 1.0])
def test_a_shift_moves_by_so_many_pixels(by):
    n, k = 32, 5
    moved = shifted(np.outer(wave(n, k), wave(n, 2)), by, 0.0)
    expected = np.outer(wave(n, k, (np.arange(n) + 0.5 - by) / n), wave(n, 2))
    np.testing.assert_allclose(moved, expected, atol=1e-10)
    assert np.abs(shifted(shifted(moved, -by, 0), by, 0) - moved).max() < 1e-8 or by != 1.0


def test_cropping_kspace_leaves_samples_at_every_sth_pixel():
    """The published degradation of Cohf-T keeps the first pixel's centre, not its edge: pixel j is at s·j."""
    n, s = 48, 4
    at = np.arange(n)
    image = 1 + np.cos(2 * np.pi * 3 * at / n) + 0.5 * np.sin(2 * np.pi * 5 * at / n)
    spectrum = np.fft.fftshift(np.fft.fft(image))
    middle, half = n // 2, n // s // 2
    small = np.abs(np.fft.ifft(np.fft.ifftshift(spectrum[middle - half : middle + half]))) / s
    np.testing.assert_allclose(small, np.abs(image[::s]), atol=1e-9)
