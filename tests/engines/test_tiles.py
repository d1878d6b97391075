"""Tiles: they cover every pixel, lie on the window grid, and blend to what the whole would be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.engines.tiles import TilePlan, halo_boxes, run_tiled, run_with_halo


@given(length=st.integers(1, 700), side=st.integers(8, 40), overlap=st.integers(1, 8))
def test_tiles_cover_every_pixel_on_the_grid(length, side, overlap):
    plan = TilePlan(8 * side, 8 * overlap if 2 * overlap <= side else 8)
    starts, tile = plan.starts(length), plan.length_of_tile(length)
    assert tile <= plan.side
    covered = np.zeros(length, bool)
    for start in starts:
        assert start % 8 == 0
        assert start < length
        covered[start : start + tile] = True
    assert covered.all()
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("shape", [(100, 100), (64, 201), (65, 64), (300, 90)])
def test_tiles_of_a_local_operation_equal_the_whole(shape):
    """Repeating pixels needs no neighbours: tiled must equal whole but for rounding."""
    planes = np.random.default_rng(0).random((2, 1, *shape))

    def repeat(part: np.ndarray, guide: np.ndarray | None = None) -> np.ndarray:
        return part.repeat(3, axis=-2).repeat(3, axis=-1)

    result = run_tiled(repeat, planes, TilePlan(64, 16), 3)
    np.testing.assert_allclose(result, repeat(planes), atol=1e-6)


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
    guide = planes.repeat(2, axis=-2).repeat(2, axis=-1)

    def difference(part: np.ndarray, own: np.ndarray) -> np.ndarray:
        assert own.shape[-1] == 2 * part.shape[-1]
        return own - part.repeat(2, axis=-2).repeat(2, axis=-1)

    assert np.abs(run_tiled(difference, planes, TilePlan(24, 8), 2, guide)).max() < 1e-6
    assert np.abs(run_with_halo(difference, planes, 16, 5, 2, guide)).max() == 0


@given(
    rows=st.integers(1, 60), columns=st.integers(1, 60), side=st.integers(7, 40), reach=st.integers(0, 9),
    scale=st.integers(1, 3),
)  # fmt: skip
def test_a_halo_as_wide_as_the_reach_makes_tiles_exact(rows, columns, side, reach, scale):
    """A zero-padded sum over a square of `reach` pixels around each pixel, cut into tiles and whole."""
    planes = np.random.default_rng(2).random((1, 1, rows, columns))

    def sums(part: np.ndarray, guide: np.ndarray | None = None) -> np.ndarray:
        padded = np.pad(part, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), axis=(-2, -1))
        return windows.sum(axis=(-1, -2)).repeat(scale, axis=-2).repeat(scale, axis=-1)

    np.testing.assert_allclose(run_with_halo(sums, planes, side, reach, scale), sums(planes), rtol=1e-12)
    owned = sum((own.bottom - own.top) * (own.right - own.left) for own, _ in halo_boxes(rows, columns, side, reach))
    assert owned == rows * columns
