"""The engine of a network: whole slices or tiles, whichever library runs it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from medsr_cli.engines.engine import Enlarged, Planes, Size
from medsr_cli.engines.runner import Runner
from medsr_cli.engines.tiles import TilePlan, halo_boxes, run_tiled
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.volume.antialias import antialiased_resize

WHOLE_PIXELS = {"blended": 256 * 256, "exact": 768 * 768}
"""Largest slice that is run whole unless a tile size is given: below 1 GB of activations for every network."""
TILE_OVERLAP = 32
"""Pixels that neighbouring tiles share; twice the reach of one dense block's windows."""
MINIMUM_TILE = 64
BATCH_PIXELS = {"cpu": 64 * 64, "cuda": 64 * 64 * 32, "mps": 64 * 64 * 8}
"""Pixels given at once: enough to fill the device, few enough to stay in its caches or memory."""


class NetworkEngine:
    """A network that enlarges by a whole factor, run by a `Runner`."""

    def __init__(self, runner: Runner, traits: Traits, *, tile: int | None = None) -> None:
        self.runner, self.traits = runner, traits
        self.name, self.device, self.precision = runner.name, runner.device, runner.precision
        self.channels, self.guided = traits.channels, traits.guided
        self.warnings: list[str] = list(runner.warnings)
        if tile is not None and tile < MINIMUM_TILE:
            msg = f"A tile of {tile} pixels is too small."
            raise ArgumentsError(msg, f"Give --tile auto, or at least {MINIMUM_TILE}.")
        self.tile = tile

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.traits.scale, columns * self.traits.scale

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge (n, c, rows, columns); returns float32.

        Raises:
            RunError: the device has too little memory even for the smallest tile.
        """
        rows, columns = planes.shape[-2:]
        side = self.tile or self._affordable_side(rows, columns)
        while True:
            try:
                return self._run(planes, guide, side)
            except self.runner.out_of_memory as error:
                side = min(side, max(rows, columns)) // 2 // 8 * 8
                self.runner.release()
                if side < MINIMUM_TILE or self.traits.tiling == "fixed":
                    msg = f"The device {self.device} has too little memory for a tile of {MINIMUM_TILE} pixels."
                    raise RunError(msg, "Close other programs, or use --device cpu.") from error
                self.tile = side

    def _affordable_side(self, rows: int, columns: int) -> int:
        """The side of the largest tile that fits into memory; that of the whole slice where it fits."""
        whole = max(rows, columns)
        if self.traits.tiling == "inexact":
            pixels = self.runner.usable_bytes() // max(self.traits.bytes_per_pixel, 1)
        else:
            pixels = WHOLE_PIXELS.get(self.traits.tiling, rows * columns)
        if rows * columns <= pixels:
            return whole
        return max(min(math.isqrt(pixels), whole) // 8 * 8, MINIMUM_TILE)

    def _run(self, planes: Planes, guide: Planes | None, side: int) -> Enlarged:
        traits = self.traits
        rows, columns = planes.shape[-2:]
        if traits.tiling == "fixed":
            return Enlarged(self._run_fixed(planes, guide))
        if max(rows, columns) <= side:
            return self._named(self._run_whole(planes, guide))
        if traits.tiling == "exact":
            return self._run_exact(planes, guide, side)
        if traits.tiling == "inexact":
            self._warn(
                f"The slices of {rows} x {columns} were cut into tiles of {side}: this network takes statistics "
                "of the whole image, so the result is not that of the whole image."
            )
        plan = TilePlan(-(-side // 8) * 8, min(TILE_OVERLAP, side // 2 // 8 * 8))
        return Enlarged(run_tiled(self._run_tile, planes, plan, traits.scale, guide))

    def _run_exact(self, planes: Planes, guide: Planes | None, side: int) -> Enlarged:
        """Tiles with all that they can see around them, cut off again: for convolutions the whole's result."""
        n, channels, rows, columns = planes.shape
        factors = (self.traits.first_stage, self.traits.scale)[0 if self.traits.first_stage else 1 :]
        wholes = tuple(np.empty((n, channels, rows * f, columns * f), np.float32) for f in factors)
        for own, seen in halo_boxes(rows, columns, side, self.traits.reach):
            part = None if guide is None else seen.scaled(self.traits.scale).of(guide)
            for tile, whole, factor in zip(self._run_whole(seen.of(planes), part), wholes, factors, strict=True):
                own.scaled(factor).of(whole)[...] = own.within(seen).scaled(factor).of(tile)
        return self._named(wholes)

    def _run_fixed(self, planes: Planes, guide: Planes | None) -> Planes:
        """A network of one size: tiles of that size, and smaller slices padded to it by repetition."""
        side, scale = self.traits.side, self.traits.scale
        rows, columns = planes.shape[-2:]
        padded = padded_to(planes, side, side)
        padded_guide = None if guide is None else padded_to(guide, side * scale, side * scale)
        plan = TilePlan(side, side // 4, 1, fixed=True)
        result = run_tiled(self._run_tile, padded, plan, scale, padded_guide)
        return result[..., : rows * scale, : columns * scale]

    def _run_tile(self, planes: Planes, guide: Planes | None = None) -> Planes:
        return self._run_whole(planes, guide)[-1]

    def _run_whole(self, planes: Planes, guide: Planes | None = None) -> tuple[Planes, ...]:
        """Every result of the network; what is shorter than it takes is padded by repetition and cropped after."""
        rows, columns = planes.shape[-2:]
        smallest, scale = self.traits.smallest, self.traits.scale
        if min(rows, columns) >= smallest:
            return self.runner.run(planes, guide)
        padded = padded_to(planes, smallest, smallest)
        guide = None if guide is None else padded_to(guide, smallest * scale, smallest * scale)
        results = self.runner.run(padded, guide)
        factors = [result.shape[-1] // padded.shape[-1] for result in results]
        return tuple(result[..., : rows * f, : columns * f] for result, f in zip(results, factors, strict=True))

    def _named(self, results: tuple[Planes, ...]) -> Enlarged:
        return Enlarged(results[-1], {"intermediate": results[0]} if self.traits.first_stage else {})

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def batch_of(self, rows: int, columns: int) -> int:
        """Planes that make up `BATCH_PIXELS` of this device."""
        return max(BATCH_PIXELS.get(self.device.split(":")[0], 1) // (rows * columns), 1)

    def turned(self) -> NetworkEngine:
        """Itself: its factor is that of both axes."""
        return self


class EnlargedFirst(NetworkEngine):
    """The ultrasound CycleGAN's generator, which works on an image that has been enlarged by bicubic."""

    def __init__(self, runner: Runner, traits: Traits, *, tile: int | None = None) -> None:
        super().__init__(runner, replace(traits, scale=1), tile=tile)
        self.factor = traits.scale

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.factor, columns * self.factor

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Bicubic to the size of the result, then the network."""
        return super().run(antialiased_resize(planes, self.size_of(planes.shape[-2], planes.shape[-1])))


def padded_to(planes: Planes, rows: int, columns: int) -> Planes:
    """At least so many rows and columns: what is missing at the bottom and right repeats the edge."""
    missing = [(0, 0)] * (planes.ndim - 2) + [
        (0, max(rows - planes.shape[-2], 0)),
        (0, max(columns - planes.shape[-1], 0)),
    ]
    return np.pad(planes, missing, mode="edge") if any(after for _, after in missing) else planes
