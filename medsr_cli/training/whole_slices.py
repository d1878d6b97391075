"""Networks on whole slices while they are trained, as `upscale` runs the finished checkpoint.

Each network of the catalogue pads by itself what its layers need. What is left is told here: fractions for a
network of any scale, grey to three channels and back, tiles for a network of one size, and how much of a slice
fits into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medsr_cli.networks import catalogue
from medsr_cli.networks.cohft_released import ReleasedCohft
from medsr_cli.networks.miassr import Miassr

Image = NDArray[np.float32]

WORKING_BYTES = 4_000_000_000
"""Activations that one slice may take; of larger slices the middle is measured."""


class WholeSlices:
    """A network as a function of a low-resolution slice.

    Args:
        net: in evaluation mode; what is no network of the catalogue is called with (1, C, h, w) alone.
        device: where it is.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.net, self.device = net, device
        arch = arch_of(net)
        config: Any = getattr(net, "config", None)
        self.any_scale = isinstance(net, Miassr)
        self.guided = arch is not None and "guide" in arch.needs
        self.channels = int(getattr(config, "in_channels", 0))
        self.scale = int(getattr(config, "scale", 0))
        per_pixel = arch.bytes_per_pixel if arch is not None else 0
        self.most_pixels = WORKING_BYTES // per_pixel if per_pixel else None
        """Pixels of the largest low-resolution slice that is run."""

    def measured(self, rows: int, columns: int, scale: float) -> tuple[int, int]:
        """Rows and columns of the part of a target that is measured.

        A network of one scale needs multiples of it; one that takes much memory gets the middle of large slices.
        """
        if self.most_pixels is not None and rows * columns > self.most_pixels * scale**2:
            shrink = math.sqrt(self.most_pixels * scale**2 / (rows * columns))
            rows, columns = int(rows * shrink), int(columns * shrink)
        if self.any_scale:
            return rows, columns
        whole = round(scale)
        return rows // whole * whole, columns // whole * whole

    def __call__(self, low: Image, high_size: tuple[int, int], guide: Image | None = None) -> Image:
        """(C, h, w) in about [0, 1] to (C, H, W), float32.

        Args:
            low: the low-resolution slice.
            high_size: H and W.
            guide: (H, W), for a network that needs one.
        """
        channels = len(low)
        if self.channels in (0, channels):
            return self._run(low, high_size, guide)
        if channels == 1:
            repeated = np.repeat(low, self.channels, axis=0)
            mean: Image = self._run(repeated, high_size, guide).mean(axis=0, keepdims=True)
            return mean
        if self.channels == 1:
            return np.concatenate([self._run(plane[None], high_size, guide) for plane in low])
        msg = f"a network of {self.channels} channels cannot take {channels}"
        raise ValueError(msg)

    def _run(self, low: Image, high_size: tuple[int, int], guide: Image | None) -> Image:
        if isinstance(self.net, ReleasedCohft):
            return self._run_tiles(low, guide)
        given: list[object] = [self._tensor(low)]
        if self.any_scale:
            given.append((Fraction(high_size[0], low.shape[-2]), Fraction(high_size[1], low.shape[-1])))
        if guide is not None and self.guided:
            given.append(self._tensor(guide[None]))
        return self._result(given)

    def _run_tiles(self, low: Image, guide: Image | None) -> Image:
        """For a network of one size: tiles of it, the mean where they overlap; the slice is padded to one at least."""
        side, s = int(self.net.config.side), self.scale  # type: ignore[union-attr,arg-type]  # of the catalogue
        rows, columns = low.shape[-2:]
        if guide is None:
            msg = "a guided network was given no guide"
            raise ValueError(msg)
        padded, padded_guide = padded_to(low, side), padded_to(guide[None], side * s)
        height, width = padded.shape[-2:]
        total = np.zeros((1, height * s, width * s), np.float32)
        count = np.zeros((height * s, width * s), np.float32)
        for top in _starts(height, side):
            for left in _starts(width, side):
                tile = padded[:, top : top + side, left : left + side]
                place = (slice(top * s, (top + side) * s), slice(left * s, (left + side) * s))
                total[:, *place] += self._result([self._tensor(tile), self._tensor(padded_guide[:, *place])])
                count[place] += 1
        return np.divide(total, count, dtype=np.float32)[:, : rows * s, : columns * s]

    def _tensor(self, planes: Image) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32))[None].to(self.device)

    def _result(self, given: list[object]) -> Image:
        with torch.no_grad():
            out: Image = self.net(*given)[0].float().cpu().numpy()
        return out


def arch_of(net: nn.Module) -> catalogue.Arch | None:
    """The catalogue's entry of a network, or None."""
    for arch in catalogue.CATALOGUE:
        if (arch.module, arch.network) == (type(net).__module__, type(net).__name__):
            return arch
    return None


def padded_to(planes: Image, side: int) -> Image:
    """At least `side` rows and columns: what is missing at the bottom and right repeats the edge."""
    missing = ((0, 0), (0, max(side - planes.shape[-2], 0)), (0, max(side - planes.shape[-1], 0)))
    return np.pad(planes, missing, mode="edge")


def _starts(length: int, side: int) -> Iterator[int]:
    """Where tiles of an axis begin: one after another, the last one at the end."""
    yield from range(0, length - side, side)
    yield length - side
