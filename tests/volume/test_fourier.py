"""The k-space degradation of Cohf-T: what it keeps, what it removes, and the authors' loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.volume.fourier import fourier_shrink, scale_as_released, shrink_as_released

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
PREPROCESS = SHARED / "specs" / "golden" / "cohft_preprocess.safetensors"


@pytest.mark.skipif(not PREPROCESS.exists(), reason="needs the shared data")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_the_released_loader(scale):
    tensors = load_file(PREPROCESS)
    slices = tensors["x0"]
    found = shrink_as_released(slices, (240 // scale, 240 // scale))
    assert np.abs(found - tensors[f"lr_x{scale}"]).max() <= 1e-5


def wave(n: int, cycles: float, level: float = 10.0) -> np.ndarray:
    """`level` plus a cosine sampled at the left edges of n pixels, in which k-space cropping keeps its phase."""
    return level + np.cos(2 * np.pi * cycles * np.arange(n) / n)


@pytest.mark.parametrize(("n", "m"), [(240, 60), (240, 80), (41, 20), (41, 19), (40, 19), (7, 7), (6, 1)])
def test_a_constant_keeps_its_level(n, m):
    found = fourier_shrink(np.full((2, n, n + 3), 3.5), (m, m))
    assert found.shape == (2, m, m)
    np.testing.assert_allclose(found, 3.5, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(48, 24), (48, 16), (45, 20), (45, 19), (44, 19)])
def test_low_waves_stay_as_they_are_and_high_ones_vanish(n, m):
    highest = (m - 1) // 2
    kept = np.outer(wave(n, highest), wave(n, 1))
    np.testing.assert_allclose(fourier_shrink(kept, (m, m)), np.outer(wave(m, highest), wave(m, 1)), rtol=1e-10)
    lost = np.outer(wave(n, m // 2 + 1), np.ones(n))
    np.testing.assert_allclose(fourier_shrink(lost, (m, m)), 10.0, rtol=1e-10)


def test_is_the_centre_of_the_shifted_plane():
    """The definition, written as the paper has it, for even and odd sizes and both axes different."""
    rng = np.random.default_rng(4)
    for (rows, columns), (r, c) in [((24, 30), (12, 10)), ((25, 31), (12, 9)), ((24, 31), (7, 8))]:
        image = rng.random((rows, columns))
        plane = np.fft.fftshift(np.fft.fft2(image))
        top, left = rows // 2 - r // 2, columns // 2 - c // 2
        centre = plane[top : top + r, left : left + c]
        expected = np.abs(np.fft.ifft2(np.fft.ifftshift(centre))) * (r * c) / (rows * columns)
        np.testing.assert_allclose(fourier_shrink(image, (r, c)), expected, rtol=1e-9)


def test_each_slice_stands_for_itself_and_keeps_its_type():
    stack = np.random.default_rng(5).random((3, 2, 20, 24)).astype(np.float32)
    found = fourier_shrink(stack, (10, 8))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[2, 1], fourier_shrink(stack[2, 1], (10, 8)), rtol=1e-5)
    np.testing.assert_allclose(fourier_shrink(stack, (20, 24)), stack, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(11, 5), (5, 11), (0, 5)])
def test_more_frequencies_than_there_are_is_refused(size):
    with pytest.raises(ValueError, match="lowest frequencies"):
        fourier_shrink(np.ones((10, 10)), size)


def test_a_stack_is_normalised_as_one():
    stack = np.stack([np.outer(wave(24, 1), wave(24, 2)), 3 * np.outer(wave(24, 2), wave(24, 1))])
    found = shrink_as_released(stack, (12, 12))
    assert (found.min(), found.max()) == (0.0, 1.0)
    assert found[0].max() < 0.35
    assert not shrink_as_released(np.full((2, 8, 8), 7.0), (1, 1)).any()


def test_released_intensities_keep_the_offset_of_t2():
    t1, t2 = scale_as_released(np.array([10.0, 30.0]), np.array([10.0, 20.0]), low=10.0, high=50.0)
    assert t1.tolist() == [0.0, 0.5]
    assert t2.tolist() == [0.25, 0.5]
    assert scale_as_released(np.array([3.0]), np.array([3.0]), 3.0, 3.0)[0].tolist() == [0.0]
