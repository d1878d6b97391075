"""IFC: its pyramid is tight, its definition is that of the paper, and it falls with noise and blur."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medsr_cli.evaluation import ifc as m
from medsr_cli.evaluation.ifc import ifc


def image(shape: tuple[int, ...] = (72, 64), seed: int = 0) -> np.ndarray:
    """Structure at several scales in [0, 1]."""
    rng = np.random.default_rng(seed)
    mixed = sum(s * gaussian_filter(rng.standard_normal(shape), s) for s in (0.7, 2, 5))
    return (mixed - mixed.min()) / np.ptp(mixed)


@pytest.mark.parametrize("size", [(64, 48), (40, 56)])
def test_the_bands_are_a_tight_frame(size):
    """Squares of all six orientations add up to one where no other level reaches (between the octaves' ends)."""
    for level in range(m.LEVELS):
        total = sum(np.abs(m.band_transfer(size, level, k)) ** 2 for k in range(m.ORIENTATIONS))
        factor = 2**level
        rows, columns = (2 * np.pi * np.fft.fftfreq(n // factor) / factor for n in size)
        octave = np.log2(np.maximum(np.hypot(rows[:, None], columns), 1e-9) / np.pi) + level
        radial = np.cos(np.pi / 2 * np.clip(octave + 1, -1, 0)) ** 2 * np.sin(np.pi / 2 * np.clip(-octave, 0, 1)) ** 2
        np.testing.assert_allclose(total, radial, atol=1e-12)


def test_the_taken_orientations_are_edges_across_rows_and_columns():
    stripes = np.zeros((64, 64))
    stripes[:, ::8] = 1
    bands = m.subbands(stripes)
    energy = np.array([np.sum(band**2) for band in bands]).reshape(m.LEVELS, 2)
    assert energy[:, 0].sum() > 1e3 * energy[:, 1].sum()
    turned = np.array([np.sum(band**2) for band in m.subbands(stripes.T)]).reshape(m.LEVELS, 2)
    np.testing.assert_allclose(turned, energy[:, ::-1], rtol=1e-6, atol=1e-9)


def test_sizes_halve_and_are_rounded_up():
    sizes = [band.shape for band in m.subbands(np.random.default_rng(0).random((50, 47)))]
    assert sizes[::2] == sizes[1::2] == [(50, 47), (25, 24), (13, 12), (7, 6)]


def test_is_the_papers_sum():
    reference, result = image(), image() + 0.03 * np.random.default_rng(1).standard_normal((72, 64))
    bits = 0.0
    pairs = zip(m.subbands(255 * reference), m.subbands(255 * result), strict=True)
    for number, (c, d) in enumerate(pairs):
        reach = (17, 9, 5, 3)[number // 2] // 2
        for i in range(reach, c.shape[0] - reach):
            for j in range(reach, c.shape[1] - reach):
                x = c[i - reach : i + reach + 1, j - reach : j + reach + 1].ravel()
                y = d[i - reach : i + reach + 1, j - reach : j + reach + 1].ravel()
                covariance = np.cov(x, y, bias=True)
                g = max(covariance[0, 1], 0) / covariance[0, 0]
                noise = max(covariance[1, 1] - g * covariance[0, 1], 1e-10)
                s2 = np.mean(c[i - 1 : i + 2, j - 1 : j + 2] ** 2)
                bits += 0.5 * np.log2(1 + g**2 * s2 / noise)
    assert ifc(result, reference) == pytest.approx(bits / reference.size, rel=1e-6)


def test_equal_images_are_high_and_finite():
    reference = image()
    assert 20 < ifc(reference, reference) < 60
    assert ifc(0.5 * reference, reference) > 20, "contrast is no loss of information"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, amount: x + 0.02 * amount * np.random.default_rng(3).standard_normal(x.shape),
        lambda x, amount: gaussian_filter(x, 0.4 * amount) + 1e-3 * np.random.default_rng(3).standard_normal(x.shape),
    ],
    ids=["noise", "blur"],
)
def test_falls_with_noise_and_blur(spoil):
    reference = image()
    values = [ifc(spoil(reference, amount), reference) for amount in (1, 2, 4, 8)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[-1] > 0


def test_other_images_carry_little():
    assert ifc(image(seed=5), image()) < 0.2
    assert ifc(1 - image(), image()) == pytest.approx(0, abs=1e-9), "the negative of an image counts as noise"


def test_constant_images_and_types():
    flat = np.full((40, 40), 0.3)
    assert ifc(flat, flat) == ifc(image((40, 40)), flat) == 0
    assert ifc(flat, image((40, 40))) == pytest.approx(0, abs=1e-9)
    reference, result = image((40, 40)), image((40, 40)) + 0.05 * np.random.default_rng(0).random((40, 40))
    grey = ifc(result, reference)
    assert ifc(result.astype(np.float32), reference.astype(np.float32)) == pytest.approx(grey, rel=1e-3)
    assert ifc(result[None], reference[None]) == grey
    rgb = ifc(np.stack([result] * 3), np.stack([reference] * 3))
    assert rgb == pytest.approx(grey, rel=1e-3), "scale-free but for the least noise"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at least 32"):
        ifc(np.zeros((31, 40)), np.zeros((31, 40)))
    with pytest.raises(ValueError, match="equally large"):
        ifc(np.zeros((40, 40)), np.zeros((40, 41)))
    with pytest.raises(ValueError, match="one or three"):
        ifc(np.zeros((2, 40, 40)), np.zeros((2, 40, 40)))
