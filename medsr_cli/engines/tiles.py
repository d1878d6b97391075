"""Slices too large to be run whole: overlapping tiles on the window grid, blended where they overlap.

Tiles start at multiples of the network's window, so that windows inside a tile are those of the whole slice;
only what reaches a tile's rim differs, and the blend weighs the rim least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.floating]


@dataclass(frozen=True)
class TilePlan:
    """How a slice is cut: tiles of at most `side` pixels that share at least `overlap` with their neighbours.

    `side` and `overlap` are multiples of `multiple`. Along an axis all tiles are equally long, and no longer than
    the number of tiles makes necessary.
    """

    side: int
    overlap: int
    multiple: int = 8

    def count(self, length: int) -> int:
        """Tiles along an axis of so many pixels."""
        return 1 if length <= self.side else -(-(length - self.overlap) // (self.side - self.overlap))

    def length_of_tile(self, length: int) -> int:
        """Pixels of each tile along an axis."""
        n = self.count(length)
        return length if n == 1 else self._up((length + (n - 1) * self.overlap) / n)

    def starts(self, length: int) -> list[int]:
        """First pixels of the tiles along an axis, each a multiple of `multiple`; the last tile reaches the end."""
        tile = self.length_of_tile(length)
        last = self._up(length - tile)
        return [min(i * (tile - self.overlap), last) for i in range(self.count(length))]

    def _up(self, length: float) -> int:
        return math.ceil(length / self.multiple) * self.multiple

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
    height, width = plan.length_of_tile(rows), plan.length_of_tile(columns)
    for top in plan.starts(rows):
        for left in plan.starts(columns):
            tile = run(planes[..., top : top + height, left : left + width])
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
