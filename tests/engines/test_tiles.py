"""Tiles: they cover every pixel, lie on the window grid, and add up to what the whole would be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.engines.tiles import TilePlan, halo_boxes, halo_spans, run_tiled


def repeated(part: np.ndarray, scale: int) -> np.ndarray:
    return part.repeat(scale, axis=-2).repeat(scale, axis=-1)


def sums_within(planes: np.ndarray, reach: int) -> np.ndarray:
    """The sum over a square of `reach` pixels around each pixel, zeros outside: a convolution's way of seeing."""
    padded = np.pad(planes, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), axis=(-2, -1))
    return windows.sum(axis=(-1, -2))


@given(length=st.integers(1, 700), side=st.integers(8, 40), overlap=st.integers(1, 8), step=st.sampled_from([8, 30]))
def test_tiles_cover_every_pixel_on_the_grid(length, side, overlap, step):
    plan = TilePlan(step * side, step * overlap if 2 * overlap <= side else step, step)
    starts, tile = plan.starts(length), plan.length_of_tile(length)
    assert tile <= plan.side
    covered = np.zeros(length, bool)
    for start in starts:
        assert start % step == 0
        assert start < length
        covered[start : start + tile] = True
    assert covered.all()
    assert starts == sorted(set(starts))
    assert all(a + tile - b >= plan.overlap for a, b in pairwise(starts))


@given(
    length=st.integers(1, 500), side=st.integers(8, 30), overlap=st.integers(1, 7), data=st.data(),
    scale=st.integers(1, 4),
)  # fmt: skip
def test_shares_add_up_to_one_and_leave_margins_out(length, side, overlap, data, scale):
    plan = TilePlan(8 * side, 8 * overlap, margin=data.draw(st.integers(0, 4 * overlap)))
    total = np.zeros(length * scale)
    tile = plan.length_of_tile(length)
    for start, share in zip(plan.starts(length), plan.shares(length, scale), strict=True):
        end = min(start + tile, length)
        assert share.size == (end - start) * scale
        assert share.min() >= 0
        outer = plan.margin * scale
        assert start == 0 or not share[:outer].any()
        assert end == length or not share[share.size - outer :].any()
        total[start * scale : end * scale] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_shares_rise_in_a_line_over_what_the_margins_leave_of_the_overlap():
    """Two tiles of 24 pixels share 16; the outer 4 of each are left out, so that 8 remain to rise over."""
    first, second = TilePlan(24, 16, margin=4).shares(32, 1)
    rising = [0.0] * 4 + [(i + 0.5) / 8 for i in range(8)] + [1.0] * 12
    np.testing.assert_allclose(second, rising, atol=1e-7)
    np.testing.assert_allclose(first, rising[::-1], atol=1e-7)


@given(
    rows=st.integers(1, 150), columns=st.integers(1, 150), side=st.integers(5, 12), reach=st.integers(0, 12),
    scale=st.integers(1, 3),
)  # fmt: skip
def test_a_margin_as_wide_as_the_reach_makes_overlapping_tiles_exact(rows, columns, side, reach, scale):
    """A tile's rim is wrong as far as the operation sees; what is thrown away is just that."""
    planes = np.random.default_rng(reach).random((1, 2, rows, columns))
    overlap = -(-2 * reach // 8) * 8
    plan = TilePlan(8 * side, overlap or 8, margin=reach)
    result = run_tiled(lambda part, _: repeated(sums_within(part, reach), scale), planes, plan, scale)
    np.testing.assert_allclose(result, repeated(sums_within(planes, reach), scale), rtol=1e-5)


def test_a_margin_narrower_than_the_reach_shows():
    planes = np.random.default_rng(0).random((1, 1, 64, 64))
    result = run_tiled(lambda part, _: sums_within(part, 9), planes, TilePlan(40, 16, margin=8), 1)
    assert np.abs(result - sums_within(planes, 9)).max() > 1


@pytest.mark.parametrize("shape", [(100, 100), (64, 201), (65, 64), (300, 90)])
@pytest.mark.parametrize("margin", [0, 5, 8])
def test_tiles_of_a_local_operation_equal_the_whole(shape, margin):
    """Repeating pixels needs no neighbours: tiled must equal whole but for rounding."""
    planes = np.random.default_rng(0).random((2, 1, *shape))
    result = run_tiled(lambda part, _: repeated(part, 3), planes, TilePlan(64, 16, margin=margin), 3)
    np.testing.assert_allclose(result, repeated(planes, 3), atol=1e-6)


@given(side=st.integers(1, 30), overlap=st.integers(0, 9), length=st.integers(1, 200))
def test_fixed_tiles_all_have_the_one_size(side, overlap, length):
    overlap, length = min(overlap, side - 1), max(length, side)
    plan = TilePlan(side, overlap, 1, fixed=True)
    covered = np.zeros(length, bool)
    starts = plan.starts(length)
    for start in starts:
        assert 0 <= start <= length - side
        covered[start : start + side] = True
    assert covered.all()
    assert plan.length_of_tile(length) == side
    assert all(b - a <= side - overlap for a, b in pairwise(starts))


def test_a_guide_is_cut_with_its_tile():
    planes = np.random.default_rng(1).random((1, 1, 40, 56))

    def difference(part: np.ndarray, own: np.ndarray) -> np.ndarray:
        assert own.shape[-1] == 2 * part.shape[-1]
        return own - repeated(part, 2)

    assert np.abs(run_tiled(difference, planes, TilePlan(24, 8), 2, repeated(planes, 2))).max() < 1e-6


@given(length=st.integers(1, 300), side=st.integers(1, 90), reach=st.integers(0, 40))
def test_tiles_with_a_halo_see_enough_and_all_equally_much(length, side, reach):
    spans = halo_spans(length, side, reach)
    assert [first for first, *_ in spans] + [length] == [0] + [end for _, end, *_ in spans]
    assert len({end - first for *_, first, end in spans}) == 1
    for first, end, see_first, see_end in spans:
        assert first < end
        assert 0 <= see_first <= max(first - reach, 0)
        assert min(end + reach, length) <= see_end <= length
    assert len(spans) <= -(-length // side)
    # Nothing is seen twice that need not be: every cut costs the reach on either side, and rounding up a pixel each.
    assert sum(end - first for *_, first, end in spans) < length + 2 * reach * (len(spans) - 1) + len(spans)


@given(
    rows=st.integers(1, 60), columns=st.integers(1, 60), side=st.integers(7, 40), reach=st.integers(0, 9),
    scale=st.integers(1, 3),
)  # fmt: skip
def test_a_halo_as_wide_as_the_reach_makes_tiles_exact(rows, columns, side, reach, scale):
    planes = np.random.default_rng(2).random((1, 1, rows, columns))
    result = np.full((1, 1, rows * scale, columns * scale), np.nan)
    for own, seen in halo_boxes(rows, columns, side, reach):
        tile = repeated(sums_within(seen.of(planes), reach), scale)
        assert np.isnan(own.scaled(scale).of(result)).all()
        own.scaled(scale).of(result)[...] = own.within(seen).scaled(scale).of(tile)
    np.testing.assert_allclose(result, repeated(sums_within(planes, reach), scale), rtol=1e-12)
