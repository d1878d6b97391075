"""Values go to [0, 1] and come back as they were; nothing wraps, and what is cut off is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medsr_cli.volume.intensity import IntensityRange, measure, store, usable_values

SMALL = [np.dtype(t) for t in ("i1", "u1", "i2", "u2")]
INTEGERS = [*SMALL, np.dtype("i4"), np.dtype("u4")]


def there_and_back(pixels, found):
    return store(found.denormalise(found.normalise(pixels)), pixels.dtype)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_value_of_a_small_type_comes_back(dtype):
    limits = np.iinfo(dtype)
    pixels = np.arange(limits.min, limits.max + 1).astype(dtype).reshape(1, 1, -1)
    found = measure([pixels], None)
    assert (found.minimum, found.maximum) == (limits.min, limits.max)
    unit = found.normalise(pixels)
    assert unit.dtype == np.float64
    assert (unit.min(), unit.max()) == (0, 1)
    back, clipped = there_and_back(pixels, found)
    assert back.dtype == dtype
    assert clipped == 0
    np.testing.assert_array_equal(back, pixels)


@given(st.sampled_from(INTEGERS), st.data())
@settings(max_examples=120, deadline=None)
def test_identity_for_every_range_of_integers(dtype, data):
    limits = np.iinfo(dtype)
    low = data.draw(st.integers(limits.min, limits.max))
    high = data.draw(st.integers(low, limits.max))
    pixels = data.draw(hnp.arrays(dtype, (1, 4, 5), elements=st.integers(low, high)))
    back, clipped = there_and_back(pixels, measure([pixels], None))
    assert clipped == 0
    np.testing.assert_array_equal(back, pixels)


def test_float32_comes_back_exactly_and_float64_to_its_last_bits():
    pixels = np.random.default_rng(0).normal(0, 300, (1, 30, 30))
    for dtype, slack in ((np.dtype("f4"), 0.0), (np.dtype("f8"), 2.0**-50)):
        given = pixels.astype(dtype)
        found = measure([given], None)
        back, clipped = there_and_back(given, found)
        assert back.dtype == dtype
        assert clipped == 0
        assert np.abs(back - given).max() <= found.width * slack


@pytest.mark.parametrize("dtype", [np.dtype("i8"), np.dtype("u8"), *INTEGERS], ids=str)
def test_nothing_wraps_however_far_outside(dtype):
    limits = np.iinfo(dtype)
    values = np.array([1e30, -1e30, np.inf, -np.inf, np.nan])
    stored, clipped = store(values, dtype)
    assert clipped == 5
    assert stored[0] >= limits.max - 2048
    assert stored[2] >= limits.max - 2048
    assert stored[1] == stored[3] == stored[4] == limits.min


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_saturation_is_counted_and_never_wraps(dtype):
    limits = np.iinfo(dtype)
    values = np.array([limits.min - 1e6, limits.min - 0.6, limits.min, 0.4, limits.max, limits.max + 0.6, 1e12])
    stored, clipped = store(values, dtype)
    assert stored.tolist() == [limits.min] * 3 + [0] + [limits.max] * 3
    assert clipped == 4


def test_halves_round_to_even_and_bounds_narrow_the_type():
    stored, clipped = store(np.array([0.5, 1.5, 2.5, -0.5]), np.dtype("i2"))
    assert stored.tolist() == [0, 2, 2, 0]
    assert clipped == 0
    stored, clipped = store(np.array([-3.0, 17.0, 4095.4, 4096.0]), np.dtype("u2"), 0, 4095)
    assert stored.tolist() == [0, 17, 4095, 4095]
    assert clipped == 2
    stored, _ = store(np.array([-3.0, 300.0]), np.dtype("u1"), -1000, 1000)
    assert stored.tolist() == [0, 255]


def test_constant_volumes_survive():
    pixels = np.full((1, 3, 3), 7, np.int16)
    found = measure([pixels, pixels], None)
    assert found.width == 0
    assert not found.normalise(pixels).any()
    np.testing.assert_array_equal(there_and_back(pixels, found)[0], pixels)


def test_measure_is_per_volume_and_leaves_out_what_is_not_anatomy():
    first = np.array([[[1.0, np.nan], [np.inf, 5.0]]], np.float32)
    second = np.array([[[-9.0, 2.0], [3.0, -9.0]]], np.float32)
    found = measure([first, second], -9.0)
    assert found == IntensityRange(1.0, 5.0, not_finite=2, padded=2, slices=2)
    coloured = np.stack([np.full((2, 2), 10), np.full((2, 2), 20), np.full((2, 2), 30), np.full((2, 2), 255)])
    found = measure([coloured.astype(np.uint8)], None, alpha=True)
    assert (found.minimum, found.maximum) == (10, 30)
    assert measure([], None) == IntensityRange(0.0, 0.0)


def test_usable_values_of_nothing_but_padding():
    values, odd, padded = usable_values(np.full((2, 2), -2000, np.int16), -2000)
    assert (values.size, odd, padded) == (0, 0, 4)
