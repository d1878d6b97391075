"""The engine of a network: whole slices or tiles, whichever library runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from medsr_cli.engines.engine import Enlarged, Planes, Size
from medsr_cli.engines.memory import is_out_of_memory
from medsr_cli.engines.plan import MINIMUM_TILE, Means, Plan, fewer_pixels, plan_for, slices_that_fill, tiles_of
from medsr_cli.engines.runner import Runner
from medsr_cli.engines.tiles import halo_boxes, run_tiled
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.volume.antialias import antialiased_resize


class NetworkEngine:
    """A network that enlarges by a whole factor, run by a `Runner`.

    Tile and batch follow from the memory that was free when the first slice of a size came, and stay for all
    slices of that size, so that every slice is treated alike. Where memory turns out to be too short, fewer slices
    are run at once, then smaller tiles, and that is kept.
    """

    def __init__(
        self, runner: Runner, traits: Traits, *, tile: int | None = None, limit_bytes: int | None = None
    ) -> None:
        """`tile` is the side that is asked for; `limit_bytes` bounds the working memory, whatever is free."""
        self.runner, self.traits = runner, traits
        self.name, self.device, self.precision = runner.name, runner.device, runner.precision
        self.channels, self.guided = traits.channels, traits.guided
        self.warnings: list[str] = runner.warnings  # one list: a runner learns while it runs, too
        if tile is not None and tile < MINIMUM_TILE:
            msg = f"A tile of {tile} pixels is too small."
            raise ArgumentsError(msg, f"Give --tile auto, or at least {MINIMUM_TILE}.")
        self.tile, self.limit_bytes = tile, limit_bytes
        self._most_pixels: int | None = None
        """Pixels at once after a failure."""
        self._plans: dict[Size, Plan] = {}
        self._told = ""
        """What was said of failures; only the last of them matters."""

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.traits.scale, columns * self.traits.scale

    def batch_of(self, rows: int, columns: int) -> int:
        """Planes that fill the device, if so many fit into its memory; of those that go by tiles, hardly any."""
        return min(self.planned(rows, columns).batch, slices_that_fill(self.device, rows, columns))

    def planned(self, rows: int, columns: int) -> Plan:
        """Tile and batch for slices of this size, as the network gets them.

        Raises:
            ArgumentsError: the memory limit is too low for the smallest tile.
        """
        size = rows, columns
        if size not in self._plans:
            means = Means(self.device, self.runner.usable_bytes(), self.limit_bytes, self._most_pixels)
            self._plans[size] = plan_for(rows, columns, self.traits, means, self.tile)
        return self._plans[size]

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge (n, c, rows, columns); returns float32.

        Raises:
            RunError: the device has too little memory even for the smallest tile.
        """
        while True:
            plan = self.planned(planes.shape[-2], planes.shape[-1])
            try:
                return self._run(planes, guide, plan)
            except Exception as error:
                if not is_out_of_memory(error, self.runner.out_of_memory):
                    raise
            # Not before the exception is gone, which holds what the failed run had in memory.
            self.runner.release()
            self._retreat(planes.shape, plan)

    def _retreat(self, shape: tuple[int, ...], failed: Plan) -> None:
        """Go on with less at once, for all slices to come."""
        n, _, rows, columns = shape
        most = fewer_pixels(rows, columns, self.traits, failed, n)
        if most is None:
            msg = f"The device {self.device} has too little memory for the smallest tile."
            remedy = "Close other programs" + ("." if self.device == "cpu" else ", or use --device cpu.")
            raise RunError(msg, remedy)
        self._most_pixels, self._plans = most, {}
        now = self.planned(rows, columns)
        if self._told in self.warnings:
            self.warnings.remove(self._told)
        self._told = (
            f"{self.device} had too little memory for {min(failed.batch, n)} x {failed.pixels} pixels at once; "
            f"from there on it was {now.batch} x {now.pixels}."
        )
        self._warn(self._told)

    def _run(self, planes: Planes, guide: Planes | None, plan: Plan) -> Enlarged:
        traits = self.traits
        rows, columns = planes.shape[-2:]
        if traits.tiling == "fixed":
            return Enlarged(self._run_fixed(planes, guide, plan))
        if max(rows, columns) <= plan.side:
            return self._named(self._run_whole(planes, guide, plan))
        if traits.tiling == "exact":
            return self._run_exact(planes, guide, plan)
        tiles = tiles_of(plan.side, traits)
        if traits.tiling == "inexact":
            self._warn(
                f"The slices of {rows} x {columns} were cut into tiles of {tiles.side}: this network takes statistics "
                "of the whole image, so the result is not that of the whole image."
            )
        return Enlarged(run_tiled(self._tile_by(plan), planes, tiles, traits.scale, guide))

    def _run_exact(self, planes: Planes, guide: Planes | None, plan: Plan) -> Enlarged:
        """Tiles with all that they can see around them, cut off again: for convolutions the whole's result."""
        n, channels, rows, columns = planes.shape
        factors = (self.traits.first_stage, self.traits.scale)[0 if self.traits.first_stage else 1 :]
        wholes = tuple(np.empty((n, channels, rows * f, columns * f), np.float32) for f in factors)
        for own, seen in halo_boxes(rows, columns, plan.side, self.traits.reach):
            part = None if guide is None else seen.scaled(self.traits.scale).of(guide)
            for tile, whole, factor in zip(self._run_whole(seen.of(planes), part, plan), wholes, factors, strict=True):
                own.scaled(factor).of(whole)[...] = own.within(seen).scaled(factor).of(tile)
        return self._named(wholes)

    def _run_fixed(self, planes: Planes, guide: Planes | None, plan: Plan) -> Planes:
        """A network of one size: tiles of that size, and smaller slices padded to it by repetition."""
        side, scale = self.traits.side, self.traits.scale
        rows, columns = planes.shape[-2:]
        padded = padded_to(planes, side, side)
        padded_guide = None if guide is None else padded_to(guide, side * scale, side * scale)
        result = run_tiled(self._tile_by(plan), padded, tiles_of(side, self.traits), scale, padded_guide)
        return result[..., : rows * scale, : columns * scale]

    def _tile_by(self, plan: Plan) -> Callable[[Planes, Planes | None], Planes]:
        return lambda planes, guide: self._run_whole(planes, guide, plan)[-1]

    def _run_whole(self, planes: Planes, guide: Planes | None, plan: Plan) -> tuple[Planes, ...]:
        """Every result of the network; what is shorter than it takes is padded by repetition and cropped after."""
        rows, columns = planes.shape[-2:]
        smallest, scale = self.traits.smallest, self.traits.scale
        if min(rows, columns) >= smallest:
            return self._run_in_batches(planes, guide, plan.batch)
        padded = padded_to(planes, smallest, smallest)
        guide = None if guide is None else padded_to(guide, smallest * scale, smallest * scale)
        results = self._run_in_batches(padded, guide, plan.batch)
        factors = [result.shape[-1] // padded.shape[-1] for result in results]
        return tuple(result[..., : rows * f, : columns * f] for result, f in zip(results, factors, strict=True))

    def _run_in_batches(self, planes: Planes, guide: Planes | None, batch: int) -> tuple[Planes, ...]:
        """No more planes at once than planned, however many come."""
        if len(planes) <= batch:
            return self.runner.run(planes, guide)
        parts = [
            self.runner.run(planes[i : i + batch], None if guide is None else guide[i : i + batch])
            for i in range(0, len(planes), batch)
        ]
        return tuple(np.concatenate(results) for results in zip(*parts, strict=True))

    def _named(self, results: tuple[Planes, ...]) -> Enlarged:
        return Enlarged(results[-1], {"intermediate": results[0]} if self.traits.first_stage else {})

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def turned(self) -> NetworkEngine:
        """Itself: its factor is that of both axes."""
        return self


class EnlargedFirst(NetworkEngine):
    """The ultrasound CycleGAN's generator, which works on an image that has been enlarged by bicubic."""

    def __init__(
        self, runner: Runner, traits: Traits, *, tile: int | None = None, limit_bytes: int | None = None
    ) -> None:
        # The side of a tile is told in pixels of the input, here as for every network.
        own_tile = None if tile is None or tile < MINIMUM_TILE else tile * traits.scale
        super().__init__(runner, replace(traits, scale=1), tile=own_tile or tile, limit_bytes=limit_bytes)
        self.factor = traits.scale

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.factor, columns * self.factor

    def batch_of(self, rows: int, columns: int) -> int:
        """By the size that the network works at."""
        return super().batch_of(*self.size_of(rows, columns))

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
