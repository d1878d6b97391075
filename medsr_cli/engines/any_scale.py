"""MIASSR's engine: one network, any enlargement along each axis, on grids that it works out itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from medsr_cli.engines.engine import Planes, Size
from medsr_cli.engines.tiles import halo_boxes
from medsr_cli.engines.torch_engine import TorchEngine, Traits
from medsr_cli.networks.miassr import AxisGrid, Scale, grid_of, inverse_scale
from medsr_cli.volume.geometry import enlarged_length

NOTICEABLE = 0.05
"""Displacement, in pixels of the result, that is worth a warning."""


class AnyScaleEngine(TorchEngine):
    """A MIASSR on one device.

    Exact rounding (checkpoints of this project): an axis of N pixels becomes round(N·s), and pixel i looks at
    i·N/N' by rational arithmetic, so that the edges of the result are those of the input. Reference rounding
    (the authors' networks): int(s·N) pixels, and pixel i looks at i/s as float32 has it.
    """

    def __init__(
        self,
        net: nn.Module,
        scale: tuple[float, float],
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: int | None = None,
    ) -> None:
        config: Any = net.config
        traits = Traits(1, config.in_channels, "exact")
        super().__init__(net, traits, device=device, precision=precision, tile=tile)
        self._wanted_precision = precision
        self.scale = scale
        self.exact = config.rounding == "exact"

    def size_of(self, rows: int, columns: int) -> Size:
        """N' = round(N·s) with exact rounding, int(s·N) with the authors'."""
        if self.exact:
            return enlarged_length(rows, self.scale[0]), enlarged_length(columns, self.scale[1])
        return int(self.scale[0] * rows), int(self.scale[1] * columns)

    def _grids(self, rows: int, columns: int) -> tuple[AxisGrid, AxisGrid, float]:
        """Where the result's rows and columns look, and the 1/s that the network is told."""
        size = self.size_of(rows, columns)
        steps: tuple[Scale, Scale] = self.scale
        if self.exact:
            steps = Fraction(size[0], rows), Fraction(size[1], columns)
        rounding = self.net.config.rounding
        return grid_of(rows, steps[0], rounding), grid_of(columns, steps[1], rounding), inverse_scale(*steps)

    def _run(self, planes: Planes, guide: Planes | None, side: int) -> Planes:
        n, channels, rows, columns = planes.shape
        self._tell_displacement(rows, columns)
        down, across, inverse = self._grids(rows, columns)
        result = np.empty((n, channels, *self.size_of(rows, columns)), np.float32)
        for own, seen in halo_boxes(rows, columns, max(side, 1), int(self.net.reach)):
            top, bottom = down.span(own.top, own.bottom)
            left, right = across.span(own.left, own.right)
            with torch.inference_mode():
                features = self.net.features(self._tensor(seen.of(planes)))
                tile = self.net.enlarge(
                    features,
                    inverse,
                    down.sliced(top, bottom).shifted(-seen.top),
                    across.sliced(left, right).shifted(-seen.left),
                )
            result[..., top:bottom, left:right] = tile.to("cpu", torch.float32).numpy()
        return result

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
        return AnyScaleEngine(
            self.net,
            (self.scale[1], self.scale[0]),
            device=self.device,
            precision=self._wanted_precision,
            tile=self.tile,
        )
