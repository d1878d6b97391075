"""MIASSR's engine: one network, any enlargement along each axis, in tiles that equal the whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medsr_cli.engines.engine import Enlarged, Planes, Size
from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.engines.plan import Plan
from medsr_cli.engines.runner import Place, Runner
from medsr_cli.engines.tiles import halo_boxes
from medsr_cli.engines.traits import Traits
from medsr_cli.volume.geometry import enlarged_length

NOTICEABLE = 0.05
"""Displacement, in pixels of the result, that is worth a warning."""


class AnyScaleEngine(NetworkEngine):
    """A MIASSR, run by a `Runner`.

    Exact rounding (checkpoints of this project): an axis of N pixels becomes round(N·s), and pixel i looks at
    i·N/N' by rational arithmetic, so that the edges of the result are those of the input. Reference rounding
    (the authors' networks): int(s·N) pixels, and pixel i looks at i/s as float32 has it.
    """

    def __init__(
        self,
        runner: Runner,
        traits: Traits,
        scale: tuple[float, float],
        *,
        tile: int | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        super().__init__(runner, traits, tile=tile, limit_bytes=limit_bytes)
        self.scale = scale
        self.exact = traits.rounding == "exact"

    def size_of(self, rows: int, columns: int) -> Size:
        """N' = round(N·s) with exact rounding, int(s·N) with the authors'."""
        if self.exact:
            return enlarged_length(rows, self.scale[0]), enlarged_length(columns, self.scale[1])
        return int(self.scale[0] * rows), int(self.scale[1] * columns)

    def _run(self, planes: Planes, guide: Planes | None, plan: Plan) -> Enlarged:
        n, channels, rows, columns = planes.shape
        self._tell_displacement(rows, columns)
        size = self.size_of(rows, columns)
        down, across = (self._sources(*axis) for axis in zip((rows, columns), size, self.scale, strict=True))
        result = np.empty((n, channels, *size), np.float32)
        for own, seen in halo_boxes(rows, columns, plan.side, self.traits.reach):
            top, bottom = np.searchsorted(down, (own.top, own.bottom)).tolist()
            left, right = np.searchsorted(across, (own.left, own.right)).tolist()
            places = (
                Place(rows, seen.top, top, bottom - top),
                Place(columns, seen.left, left, right - left),
            )
            for first in range(0, n, plan.batch):
                some = slice(first, first + plan.batch)
                enlarged = self.runner.run_scaled(seen.of(planes)[some], self.scale, places)
                result[some, :, top:bottom, left:right] = enlarged
        return Enlarged(result)

    def _sources(self, length: int, size: int, scale: float) -> NDArray[np.int64]:
        """The input's pixel that each of the result's looks at, along one axis."""
        if self.exact:
            sources: NDArray[np.int64] = np.arange(size, dtype=np.int64) * length // size
            return sources
        position = np.arange(size, dtype=np.float32) * np.float32(1 / scale)
        rounded: NDArray[np.int64] = np.floor(position).astype(np.int64)
        return rounded

    def _tell_displacement(self, rows: int, columns: int) -> None:
        """The authors place pixel i at i/s and cut the last fraction off; the header spreads what is left."""
        size = self.size_of(rows, columns)
        missing = max(s * n - m for s, n, m in zip(self.scale, (rows, columns), size, strict=True))
        if not self.exact and missing > NOTICEABLE:
            self._warn(
                "With the rounding of the authors' weights, pixels at the far edges of this result are up to "
                f"{missing:.1f} of a pixel from where its header places them."
            )

    def turned(self) -> AnyScaleEngine:
        """With the scales of rows and columns exchanged; the network is the same one."""
        if self.scale[0] == self.scale[1]:
            return self
        scale = self.scale[1], self.scale[0]
        return AnyScaleEngine(self.runner, self.traits, scale, tile=self.tile, limit_bytes=self.limit_bytes)
