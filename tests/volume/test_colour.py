"""Luminance and chrominance: the axes of BT.601, exact greys, and hues that survive what cannot be stored."""

import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medsr_cli.volume.colour import chrominance, differences, luminance, restored, within
from medsr_cli.volume.intensity import IntensityRange
from medsr_cli.volume.resample import resize

FULL = IntensityRange(0.0, 255.0)
U8 = np.dtype(np.uint8)


def random_colours(seed, shape=(3, 20, 24)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def angle_deg(rgb):
    """Hue as an angle around the grey axis, by another formula than the one under test."""
    r, g, b = (plane.astype(float) for plane in rgb)
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))


def apart_deg(a, b):
    return np.abs((a - b + 180) % 360 - 180)


def test_the_axes_are_those_of_dicoms_ybr_full():
    """The matrix as PS3.3, C.7.6.3.1.2 prints it, to the four decimals that it has."""
    rgb = random_colours(0).astype(float)
    printed = np.array([[0.2990, 0.5870, 0.1140], [-0.1687, -0.3313, 0.5000], [0.5000, -0.4187, -0.0813]])
    expected = np.einsum("ij,jrc->irc", printed, rgb)
    np.testing.assert_allclose(luminance(rgb), expected[:1], atol=1e-9)
    np.testing.assert_allclose(chrominance(rgb), expected[1:], atol=0.02)


def test_pydicom_agrees_with_the_axes():
    from pydicom.pixels.processing import convert_color_space

    rgb = np.moveaxis(random_colours(1), 0, -1)
    theirs = convert_color_space(rgb, "RGB", "YBR_FULL").astype(float)
    planes = np.moveaxis(rgb, -1, 0).astype(float)
    ours = np.concatenate((luminance(planes), chrominance(planes) + 128))
    assert np.abs(np.moveaxis(theirs, -1, 0) - ours).max() <= 0.51


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4"])
def test_there_and_back_is_exact(dtype):
    kind = np.dtype(dtype)
    limits = np.iinfo(kind)
    rgb = np.random.default_rng(2).integers(limits.min, limits.max, (3, 30, 31), kind, endpoint=True)
    intensity = IntensityRange(float(rgb.min()), float(rgb.max()))
    unit = intensity.normalise(rgb)
    back, outside = restored(luminance(unit), chrominance(unit), intensity, kind)
    np.testing.assert_array_equal(back, rgb)
    assert outside == 0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_greys_are_grey_to_the_last_bit(kind):
    grey = np.random.default_rng(3).random((1, 17, 19)).astype(kind)
    unit = np.repeat(grey, 3, axis=0)
    np.testing.assert_array_equal(luminance(unit), grey)
    assert not chrominance(unit).any()
    larger = resize(chrominance(unit), (34, 50))
    pixels, _ = restored(resize(grey, (34, 50)) * 1.1 - 0.05, larger, FULL, U8)
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[2], pixels[1])


def test_real_numbers_have_no_limits():
    unit = np.random.default_rng(4).random((3, 8, 9)) * 3 - 1
    pixels, outside = restored(luminance(unit), chrominance(unit), IntensityRange(-5.0, 20.0), np.dtype(np.float32))
    np.testing.assert_allclose(pixels, unit * 25 - 5, rtol=1e-6, atol=1e-6)
    assert outside == 0


unit_colours = arrays(np.float64, (3, 4, 5), elements=st.floats(-0.5, 1.5, width=32))


@settings(deadline=None, max_examples=200)
@given(unit_colours)
def test_what_cannot_be_stored_gets_paler_and_keeps_hue_and_luminance(rgb):
    grey, apart = luminance(rgb), rgb - luminance(rgb)
    inside = within(grey, apart, 0.0, 1.0)
    assert inside.min() >= -1e-12
    assert inside.max() <= 1 + 1e-12
    fits = ((rgb >= 0) & (rgb <= 1)).all(axis=0)
    np.testing.assert_allclose(inside[:, fits], rgb[:, fits], atol=1e-12)
    np.testing.assert_allclose(luminance(inside), np.clip(grey, 0, 1), atol=1e-9)
    # The direction from grey is the same, and no longer: hue stays, saturation does not grow.
    kept, before = inside - luminance(inside), apart
    np.testing.assert_allclose(np.cross(kept, before, axis=0), 0, atol=1e-9)
    assert (np.abs(kept) <= np.abs(before) + 1e-9).all()
    assert ((kept * before).sum(axis=0) >= -1e-12).all()


def test_clipping_each_colour_would_have_changed_the_hue():
    """An orange that a network made brighter: HSV hue by Python's own module."""
    orange = np.array([1.0, 0.5, 0.0]).reshape(3, 1, 1)
    apart = orange - luminance(orange)
    brighter = luminance(orange) + 0.15
    before = colorsys.rgb_to_hsv(*orange.ravel())[0] * 360
    ours = colorsys.rgb_to_hsv(*within(brighter, apart, 0, 1).ravel())[0] * 360
    clipped = colorsys.rgb_to_hsv(*np.clip(brighter + apart, 0, 1).ravel())[0] * 360
    assert ours == pytest.approx(before, abs=1e-9)
    assert abs(clipped - before) > 3


def test_black_and_white_beyond_the_limits():
    apart = np.array([0.2, -0.1, -0.05]).reshape(3, 1, 1) * np.ones((1, 1, 2))
    grey = np.array([-0.3, 1.4]).reshape(1, 1, 2)
    np.testing.assert_array_equal(within(grey, apart, 0.0, 1.0)[:, 0, 0], [0, 0, 0])
    np.testing.assert_array_equal(within(grey, apart, 0.0, 1.0)[:, 0, 1], [1, 1, 1])


def test_limits_of_the_file_hold_and_are_counted():
    """Ten bits in sixteen; what rounding brings back inside was not outside."""
    unit = np.array([[[0.5, 1.2, 1.0004]], [[0.5, 0.9, 1.0]], [[0.5, 0.9, 1.0]]])
    intensity = IntensityRange(0.0, 1023.0)
    pixels, outside = restored(luminance(unit), chrominance(unit), intensity, np.dtype("u2"), 0, 1023)
    assert pixels.max() == 1023
    assert outside == 1
    assert pixels[:, 0, 0].tolist() == [512, 512, 512]
    assert pixels[1, 0, 1] > 0.9 * 1023  # red gave way, the others came up to meet it


def test_differences_are_the_inverse_of_chrominance():
    rgb = random_colours(6).astype(float)
    np.testing.assert_allclose(luminance(rgb) + differences(chrominance(rgb)), rgb, atol=1e-10)


def test_hues_inside_an_area_do_not_move():
    """A saturated field whose luminance a network changes by a tenth keeps its hue but for rounding."""
    rgb = np.zeros((3, 24, 24), np.uint8)
    rgb[0], rgb[1] = 200, np.linspace(0, 120, 24).astype(np.uint8)
    unit = FULL.normalise(rgb)
    for factor in (0.9, 1.0, 1.1):
        value = resize(luminance(unit), (48, 48)) * factor
        pixels, _ = restored(value, resize(chrominance(unit), (48, 48)), FULL, U8)
        expected = np.clip(resize(unit, (48, 48)), 0, 1)
        assert apart_deg(angle_deg(pixels[:, 8:-8, 8:-8]), angle_deg(expected[:, 8:-8, 8:-8])).max() < 0.6
