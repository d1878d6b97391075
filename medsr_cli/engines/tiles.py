"""Slices too large to be run whole.

Two ways, for two kinds of networks. `run_tiled` lays overlapping tiles on the window grid: they start at multiples
of the network's window, so that windows inside a tile are those of the whole slice; what differs is what a tile's
rim reaches, and a margin of each rim is thrown away, the rest blended. With a fixed plan every tile has the one size
that a network runs at. `halo_boxes` gives each tile as many more pixels as the network can see, to be cut off again:
for convolutional networks that is the whole slice's result exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

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
    margin: int = 0
    """Pixels along every rim inside the slice whose result is thrown away: at most half the overlap."""

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

    def shares(self, length: int, scale: int) -> list[NDArray[np.float32]]:
        """Each tile's share of the result along an axis; those of all tiles add up to 1 at every pixel.

        Nothing in the margin of a rim that lies inside the slice, then rising over what is left of the overlap.
        """
        tile, starts = self.length_of_tile(length), self.starts(length)
        band = max((self.overlap - 2 * self.margin) * scale, 1)
        total = np.zeros(length * scale)
        each = []
        for start in starts:
            end = min(start + tile, length)
            inside = np.arange((end - start) * scale) + 0.5 - self.margin * scale
            up = np.clip(inside / band, 0, 1) if start > 0 else 1.0
            down = np.clip(inside[::-1] / band, 0, 1) if end < length else 1.0
            share = np.ones((end - start) * scale) * up * down
            total[start * scale : end * scale] += share
            each.append(share)
        return [
            (share / total[start * scale : start * scale + share.size]).astype(np.float32)
            for start, share in zip(starts, each, strict=True)
        ]

    def _up(self, length: float) -> int:
        return math.ceil(length / self.multiple) * self.multiple


def run_tiled(run: Run, planes: Planes, plan: TilePlan, scale: int, guide: Planes | None = None) -> Planes:
    """Enlarge planes (n, c, rows, columns) tile by tile, blended; float32.

    Args:
        run: enlarges (n, c, r, k) by `scale`, with the same part of the guide.
        planes: the whole slices.
        plan: where the tiles lie.
        scale: the whole-number factor.
        guide: (n, c, rows·scale, columns·scale), or None.
    """
    n, channels, rows, columns = planes.shape
    total = np.zeros((n, channels, rows * scale, columns * scale), np.float32)
    height, width = plan.length_of_tile(rows), plan.length_of_tile(columns)
    across = list(zip(plan.starts(columns), plan.shares(columns, scale), strict=True))
    for top, of_rows in zip(plan.starts(rows), plan.shares(rows, scale), strict=True):
        for left, of_columns in across:
            box = Box(top, top + height, left, left + width)
            tile = run(box.of(planes), None if guide is None else box.scaled(scale).of(guide))
            # Only where the tile counts: its margin is most of what there is to add.
            r, k = _counted(of_rows), _counted(of_columns)
            part = tile[..., r, k] * of_rows[r, None]
            part *= of_columns[k]
            total[..., _moved(r, top * scale), _moved(k, left * scale)] += part
    return total


def _counted(share: NDArray[np.float32]) -> slice:
    """From the first pixel of a share that is not nothing to the last."""
    (where,) = np.nonzero(share)
    return slice(int(where[0]), int(where[-1]) + 1)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


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


def halo_spans(length: int, side: int, reach: int) -> list[tuple[int, int, int, int]]:
    """Along an axis: first and end of each tile, then of what it has to see.

    As many tiles as sides of `side` pixels need. All see equally many pixels, so that a library meets one size only:
    the first and the last, beyond which there is nothing to see, own `reach` more than those between them. An axis
    of no more than twice the reach is not divided, since the tile in its middle would see all of it.
    """
    n = 1 if length <= max(side, 2 * reach) else -(-length // side)
    seen = -(-(length + 2 * reach * (n - 1)) // n)
    starts = sorted({min(i * (seen - 2 * reach), length - seen) for i in range(n)})
    edges = [0, *(start + reach for start in starts[1:]), length]
    return [(*own, start, start + seen) for own, start in zip(pairwise(edges), starts, strict=True)]


def halo_boxes(rows: int, columns: int, side: int, reach: int) -> Iterator[tuple[Box, Box]]:
    """Tiles that cover a plane without overlap, each with what it has to see."""
    for top, bottom, see_top, see_bottom in halo_spans(rows, side, reach):
        for left, right, see_left, see_right in halo_spans(columns, side, reach):
            yield Box(top, bottom, left, right), Box(see_top, see_bottom, see_left, see_right)
