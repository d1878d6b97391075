"""Tiles: they cover every pixel, lie on the window grid, and blend to what the whole would be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.engines.tiles import TilePlan, run_tiled


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

    def repeat(part: np.ndarray) -> np.ndarray:
        return part.repeat(3, axis=-2).repeat(3, axis=-1)

    result = run_tiled(repeat, planes, TilePlan(64, 16), 3)
    np.testing.assert_allclose(result, repeat(planes), atol=1e-6)
