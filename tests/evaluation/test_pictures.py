"""Slices as pictures: windows, colours, PNGs that hold what they should."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsr_cli.evaluation.pictures import (
    COLOURS,
    DIVERGING,
    NOT_MEASURED,
    SEQUENTIAL,
    bin_edges,
    colour_numbers,
    counts_of,
    data_uri,
    difference,
    error_range_of,
    grey_levels,
    image_png,
    map_png,
    palette,
    rounded_up,
    window_of,
)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def test_a_window_goes_from_black_to_white():
    values = np.array([[-np.inf, -100.0, 0.0], [50.0, 100.0, 1e9], [np.nan, np.inf, 25.0]])
    assert grey_levels(values, (0.0, 100.0)).tolist() == [[0, 0, 0], [128, 255, 255], [0, 255, 64]]
    assert np.asarray(opened(image_png(values, (0.0, 100.0)))).tolist() == grey_levels(values, (0, 100)).tolist()


def test_pictures_are_not_scaled():
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (7, 5)), rng.integers(0, 256, (7, 5, 3))
    assert (np.asarray(opened(image_png(grey, (0, 255)))) == grey).all()
    assert (np.asarray(opened(image_png(colour, (0, 255)))) == colour).all()


def test_zero_error_is_black_and_signs_have_their_colours():
    values = np.array([[-9.0, -5.0, 0.0, 5.0, 9.0, np.nan]])
    shown = np.asarray(opened(map_png(values, (-5, 5), diverging=True)).convert("RGB")).astype(int)[0]
    assert tuple(shown[2]) == DIVERGING[len(DIVERGING) // 2]
    assert tuple(shown[0]) == tuple(shown[1]) == DIVERGING[0]
    assert tuple(shown[3]) == tuple(shown[4]) == DIVERGING[-1]
    assert tuple(shown[5]) == NOT_MEASURED
    assert shown[1][2] > shown[1][0]
    assert shown[3][0] > shown[3][2]


def brightness(colours: np.ndarray) -> np.ndarray:
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_brightness_tells_the_size():
    rising = brightness(palette(SEQUENTIAL)[:COLOURS].astype(float))
    assert (np.diff(rising) > 0).all()
    both = brightness(palette(DIVERGING)[:COLOURS].astype(float))
    middle = COLOURS // 2
    assert (np.diff(both[middle:]) > 0).all()
    assert (np.diff(both[: middle + 1]) < 0).all()
    # As bright on either side, so that neither sign looks like the larger error.
    np.testing.assert_allclose(both[:middle], both[:middle:-1], rtol=0.5, atol=0.03)


def test_equal_errors_of_both_signs_are_equally_far_from_zero():
    numbers = colour_numbers(np.linspace(-3, 3, 13)[None], (-3, 3)).astype(int)[0]
    assert (numbers + numbers[::-1] == COLOURS - 1).all()


def test_windows_leave_out_single_bright_points_and_are_never_empty():
    image = np.linspace(0, 1, 10_000).reshape(100, 100)
    image[5, 5] = 500
    low, high = window_of([image])
    assert 0 < low < 0.01
    assert 0.99 < high < 1
    assert window_of([np.full((4, 4), 7.0)]) == (7.0, 8.0)
    assert window_of([np.full((4, 4), np.nan)]) == (0.0, 1.0)
    # Mostly background: percentiles are equal, the ends are not.
    point = np.zeros((100, 100))
    point[3, 3] = 9
    assert window_of([point]) == (0.0, 9.0)


@given(st.floats(1e-12, 1e12))
def test_rounded_up_has_two_digits_and_is_not_smaller(value: float):
    up = rounded_up(value)
    assert value * (1 - 1e-8) <= up <= value * 1.1 * (1 + 1e-8)
    assert float(f"{up:.1e}") == up


def test_error_ranges():
    assert rounded_up(1.21) == 1.3
    assert rounded_up(0.13) == 0.13
    assert error_range_of([np.array([[-187.3]]), np.array([[3.0]])]) == 190
    assert error_range_of([np.zeros((3, 3))]) == 1
    rare = np.zeros((100, 100))
    rare[0, 0] = -4
    assert error_range_of([rare]) == 4


def test_differences_do_not_wrap():
    a, b = np.array([[3, 250]], np.uint8), np.array([[5, 10]], np.uint8)
    assert difference(a, b).tolist() == [[-2, 240]]
    colour = np.array([[[10, 0, 0]]], np.uint8), np.array([[[0, 90, 5]]], np.uint8)
    assert difference(*colour).tolist() == [[-90]]


def test_every_finite_pixel_is_counted_once():
    edges = bin_edges((0, 10), 5)
    image = np.array([[-5, 0, 1.9, 2], [9.9, 10, 99, np.nan]])
    assert counts_of(image, edges).tolist() == [3, 1, 0, 0, 3]


def test_an_address_holds_the_picture():
    png = image_png(np.eye(3), (0, 1))
    head, _, body = data_uri(png).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == png


@pytest.mark.parametrize("diverging", [True, False])
def test_maps_are_small(diverging):
    rng = np.random.default_rng(0)
    assert len(map_png(rng.normal(0, 0.3, (256, 256)), (-1, 1), diverging=diverging)) < 256 * 256
