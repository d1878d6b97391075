"""Slices too large to be run whole: overlapping tiles on the window grid, blended where they overlap.

Tiles start at multiples of the network's window, so that windows inside a tile are those of the whole slice;
only what reaches a tile's rim differs, and the blend weighs the rim least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.floating]


@dataclass(frozen=True)
class TilePlan:
    """How a slice is cut: tiles of `side` pixels that share `overlap` with their neighbours."""

    side: int
    overlap: int
    multiple: int = 8

    def starts(self, length: int) -> list[int]:
        """First pixels of the tiles along an axis, each a multiple of `multiple`; the last reaches the end."""
        if length <= self.side:
            return [0]
        step = max((self.side - self.overlap) // self.multiple, 1) * self.multiple
        starts = list(range(0, length - self.side, step))
        # The last tile is moved to the next multiple that still covers the end.
        last = -(-(length - self.side) // self.multiple) * self.multiple
        return [*starts, last]

    def covers(self, rows: int, columns: int) -> bool:
        """Whether one tile is enough."""
        return rows <= self.side and columns <= self.side


def run_tiled(run: Callable[[Planes], Planes], planes: Planes, plan: TilePlan, scale: int) -> Planes:
    """Enlarge planes (n, c, rows, columns) tile by tile.

    Args:
        run: enlarges (n, c, r, k) by `scale`.
        planes: the whole slices.
        plan: where the tiles lie.
        scale: the whole-number factor.
    """
    n, channels, rows, columns = planes.shape
    total = np.zeros((n, channels, rows * scale, columns * scale), np.float32)
    weight = np.zeros((rows * scale, columns * scale), np.float32)
    for top in plan.starts(rows):
        for left in plan.starts(columns):
            tile = run(planes[..., top : top + plan.side, left : left + plan.side])
            share = _blend(tile.shape[-2], plan, scale)[:, None] * _blend(tile.shape[-1], plan, scale)[None, :]
            where = (
                slice(top * scale, top * scale + tile.shape[-2]),
                slice(left * scale, left * scale + tile.shape[-1]),
            )
            total[..., where[0], where[1]] += tile * share
            weight[where] += share
    return total / weight


def _blend(length: int, plan: TilePlan, scale: int) -> NDArray[np.float32]:
    """Weights of one tile along one axis: rising from the rim over the overlap, never zero."""
    distance = np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1)
    return np.minimum(distance / (plan.overlap * scale), 1.0).astype(np.float32)
