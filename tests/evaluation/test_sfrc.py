"""sFRC: a curve by definition, nothing flagged in equal images, a false lesion flagged where it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medsr_cli.evaluation.sfrc import NYQUIST, cut_for, patch_for, ring_correlation, sfrc


def texture(shape: tuple[int, int] = (160, 144), seed: int = 0) -> np.ndarray:
    """Structure at all scales, in [0, 1]."""
    rng = np.random.default_rng(seed)
    mixed = sum(s * gaussian_filter(rng.standard_normal(shape), s) for s in (1, 2, 4, 8))
    return (mixed - mixed.min()) / np.ptp(mixed)


def blob(shape: tuple[int, int], row: int, column: int, deviation: float, height: float) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return height * np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * deviation**2))


def test_the_curve_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 16, 16))
    b = 0.5 * a + 0.5 * b
    hann = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    window = np.outer(hann, hann)
    fa, fb = (np.fft.fft2((x - (x * window).sum() / window.sum()) * window) for x in (a, b))
    frequencies, found = ring_correlation(b, a)
    for k in range(1, 9):
        cross = power_a = power_b = 0.0
        for i in range(16):
            for j in range(16):
                u, v = (n - 16 if n >= 8 else n for n in (i, j))
                if round(np.hypot(u, v)) == k:
                    cross += (fa[i, j] * np.conj(fb[i, j])).real
                    power_a += abs(fa[i, j]) ** 2
                    power_b += abs(fb[i, j]) ** 2
        assert frequencies[k - 1] == k / 16
        assert found[k - 1] == pytest.approx(cross / np.sqrt(power_a * power_b), abs=1e-9)
    with pytest.raises(ValueError, match="square"):
        ring_correlation(a[:, :8], a[:, :8])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 4095.0])
def test_equal_images_have_no_flags(dtype, scale):
    image = (scale * texture()).astype(dtype)
    found = sfrc(image, image)
    assert found.share == 0
    assert (found.crossing == NYQUIST).all()
    assert found.boxes == []


@pytest.mark.parametrize("change", [lambda x: 0.4 * x + 0.3, lambda x: gaussian_filter(x, 1.0)], ids=["level", "blur"])
def test_contrast_level_and_a_slight_blur_are_not_flagged(change):
    assert sfrc(change(texture()), texture()).share == 0


def test_small_noise_is_not_flagged_and_strong_noise_is():
    image = texture()
    noise = np.random.default_rng(1).standard_normal(image.shape)
    assert sfrc(image + 0.01 * noise, image).share == 0
    assert sfrc(image + 0.5 * noise, image).share > 0.5


@pytest.mark.parametrize(("row", "column"), [(40, 50), (120, 100), (80, 20)])
def test_a_false_lesion_is_flagged_where_it_is(row, column):
    reference = texture()
    result = gaussian_filter(reference, 1.0) + blob(reference.shape, row, column, 3, 0.5)
    found = sfrc(result, reference)
    assert found.boxes
    for box in found.boxes:
        assert box.row <= row < box.row + box.side
        assert box.column <= column < box.column + box.side
        assert box.crossing < found.cut
    assert np.mean([box.added for box in found.boxes]) > 0.5
    assert found.heat(reference.shape)[row, column] > 0.1
    assert found.share < 0.15
    assert found.heat(reference.shape)[(row + 80) % 160, (column + 72) % 144] == 0


def test_a_lost_lesion_is_flagged_as_lost():
    result = texture()
    reference = result + blob(result.shape, 80, 70, 3, 0.5)
    boxes = sfrc(result, reference).boxes
    assert boxes
    assert np.mean([box.added for box in boxes]) < 0.5


def test_a_lesion_in_flat_surroundings_and_noise_below_the_floor():
    flat = np.full((64, 64), 0.2)
    flat[0, 0] = 1  # a range to compare with
    result = flat + blob(flat.shape, 40, 24, 3, 0.1)
    found = sfrc(result, flat)
    assert found.heat(flat.shape)[40, 24] > 0.5
    noise = 0.002 * np.random.default_rng(0).standard_normal(flat.shape)
    assert sfrc(flat + noise, flat).share == 0
    assert sfrc(flat + noise, flat, noise_floor=0).share > 0.5


def test_structures_moved_are_flagged():
    image = texture()
    assert sfrc(np.roll(image, 3, 1), image).share > 0.5


def test_the_cut_is_the_inputs_highest_frequency():
    assert (cut_for(4), cut_for(2), cut_for((2.0, 4.0)), cut_for(None)) == (0.125, 0.25, 0.125, 0.125)
    image = texture()
    result = gaussian_filter(image, 2.5) + gaussian_filter(texture(seed=9), 1) - gaussian_filter(texture(seed=9), 2.5)
    assert sfrc(result, image, cut=0.125).share <= sfrc(result, image, cut=0.25).share


def test_patches_cover_the_image_to_its_last_pixel():
    found = sfrc(texture((70, 101)), texture((70, 101)))
    assert found.side == 32
    assert (found.rows[0], found.rows[-1] + 32, found.columns[-1] + 32) == (0, 70, 101)
    assert found.crossing.shape == (len(found.rows), len(found.columns))
    assert [patch_for(shape) for shape in ((512, 600), (3, 256, 300), (320, 320), (31, 40))] == [64, 32, 40, 30]


def test_channels_are_averaged_and_constants_have_no_flags():
    image = texture((64, 64))
    rgb = np.stack([image, image[::-1], image.T])
    np.testing.assert_array_equal(sfrc(rgb, rgb).crossing, sfrc(rgb.mean(0), rgb.mean(0)).crossing)
    flat = np.full((40, 40), 7.0)
    assert sfrc(flat, flat).share == 0
    assert sfrc(flat + 1, flat).share == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"result": np.zeros((40, 41))}, "cannot be compared"),
        ({"result": np.full((40, 40), np.nan)}, "finite"),
        ({"threshold": 1.0}, "threshold"),
        ({"cut": 0.6}, "cut"),
        ({"patch": 64}, "even patches"),
        ({"patch": 33}, "even patches"),
        ({"result": np.zeros((12, 40)), "reference": np.zeros((12, 40))}, "at least 16"),
    ],
)
def test_what_cannot_be_is_refused(arguments, sentence):
    given = {"result": np.zeros((40, 40)), "reference": np.zeros((40, 40)), **arguments}
    with pytest.raises(ValueError, match=sentence):
        sfrc(given.pop("result"), given.pop("reference"), **given)
