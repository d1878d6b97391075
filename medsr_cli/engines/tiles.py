"""Slices too large to be run whole.

Three ways, for three kinds of networks. `run_tiled` blends overlapping tiles on the window grid: they start at
multiples of the network's window, so that windows inside a tile are those of the whole slice; only what reaches
a tile's rim differs, and the blend weighs the rim least. With a fixed plan every tile has the one size that a
network runs at. `run_with_halo` gives each tile as many more pixels as the network can see and cuts them off
again: for convolutional networks that is the whole slice's result exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.floating]
Run = Callable[[Planes, Planes | None], Planes]


@dataclass(frozen=True)
class TilePlan:
    """How a slice is cut: tiles of at most `side` pixels that share at least `overlap` with their neighbours.

    `side` and `overlap` are multiples of `multiple`. Along an axis all tiles are equally long, and no longer than
    the number of tiles makes necessary.
    """

    side: int
    overlap: int
    multiple: int = 8
    fixed: bool = False
    """Every tile has `side` pixels along both axes, never fewer; no axis is shorter than that."""

    def count(self, length: int) -> int:
        """Tiles along an axis of so many pixels."""
        return 1 if length <= self.side else -(-(length - self.overlap) // (self.side - self.overlap))

    def length_of_tile(self, length: int) -> int:
        """Pixels of each tile along an axis."""
        if self.fixed:
            return self.side
        n = self.count(length)
        return length if n == 1 else self._up((length + (n - 1) * self.overlap) / n)

    def starts(self, length: int) -> list[int]:
        """First pixels of the tiles along an axis, each a multiple of `multiple`; the last tile reaches the end."""
        tile = self.length_of_tile(length)
        if self.fixed:
            n = self.count(length)
            return [round(i * (length - tile) / max(n - 1, 1)) for i in range(n)]
        last = self._up(length - tile)
        return [min(i * (tile - self.overlap), last) for i in range(self.count(length))]

    def _up(self, length: float) -> int:
        return math.ceil(length / self.multiple) * self.multiple

    def covers(self, rows: int, columns: int) -> bool:
        """Whether one tile is enough."""
        return rows <= self.side and columns <= self.side


def run_tiled(run: Run, planes: Planes, plan: TilePlan, scale: int, guide: Planes | None = None) -> Planes:
    """Enlarge planes (n, c, rows, columns) tile by tile, blended.

    Args:
        run: enlarges (n, c, r, k) by `scale`, with the same part of the guide.
        planes: the whole slices.
        plan: where the tiles lie.
        scale: the whole-number factor.
        guide: (n, c, rows·scale, columns·scale), or None.
    """
    n, channels, rows, columns = planes.shape
    total = np.zeros((n, channels, rows * scale, columns * scale), np.float32)
    weight = np.zeros((rows * scale, columns * scale), np.float32)
    height, width = plan.length_of_tile(rows), plan.length_of_tile(columns)
    for top in plan.starts(rows):
        for left in plan.starts(columns):
            box = Box(top, top + height, left, left + width)
            tile = run(box.of(planes), None if guide is None else box.scaled(scale).of(guide))
            share = _blend(tile.shape[-2], plan, scale)[:, None] * _blend(tile.shape[-1], plan, scale)[None, :]
            where = (
                slice(top * scale, top * scale + tile.shape[-2]),
                slice(left * scale, left * scale + tile.shape[-1]),
            )
            total[..., where[0], where[1]] += tile * share
            weight[where] += share
    return total / weight


def run_with_halo(run: Run, planes: Planes, side: int, reach: int, scale: int, guide: Planes | None = None) -> Planes:
    """Enlarge planes tile by tile, each with its surroundings; equal to the whole for convolutional networks.

    Args:
        run: enlarges (n, c, r, k) by `scale`.
        planes: (n, c, rows, columns).
        side: pixels of a tile, its surroundings left out.
        reach: pixels beyond its own that a result depends on.
        scale: the whole-number factor.
        guide: (n, c, rows·scale, columns·scale), or None.
    """
    n, _, rows, columns = planes.shape
    result: Planes | None = None
    for own, seen in halo_boxes(rows, columns, side, reach):
        tile = run(seen.of(planes), None if guide is None else seen.scaled(scale).of(guide))
        if result is None:
            result = np.empty((n, tile.shape[1], rows * scale, columns * scale), tile.dtype)
        own.scaled(scale).of(result)[...] = own.within(seen).scaled(scale).of(tile)
    assert result is not None  # noqa: S101 - there is at least one tile
    return result


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels: rows from `top` to before `bottom`, columns from `left` to before `right`."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, planes: Planes) -> Planes:
        """A view of these pixels."""
        return planes[..., self.top : self.bottom, self.left : self.right]

    def scaled(self, scale: int) -> Box:
        """The same rectangle on a grid that is finer by a whole number."""
        return Box(self.top * scale, self.bottom * scale, self.left * scale, self.right * scale)

    def within(self, other: Box) -> Box:
        """In the coordinates of a rectangle around it."""
        return Box(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)


def halo_boxes(rows: int, columns: int, side: int, reach: int) -> Iterator[tuple[Box, Box]]:
    """Tiles that cover a plane without overlap, each with what it has to see, which ends at the plane's borders."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            own = Box(top, min(top + side, rows), left, min(left + side, columns))
            yield (
                own,
                Box(
                    max(own.top - reach, 0),
                    min(own.bottom + reach, rows),
                    max(own.left - reach, 0),
                    min(own.right + reach, columns),
                ),
            )


def _blend(length: int, plan: TilePlan, scale: int) -> NDArray[np.float32]:
    """Weights of one tile along one axis: rising from the rim over the overlap, never zero."""
    distance = np.minimum(np.arange(length) + 1, np.arange(length)[::-1] + 1)
    return np.minimum(distance / (plan.overlap * scale), 1.0).astype(np.float32)
