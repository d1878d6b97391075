"""One image through an engine: measured once, then streamed slice by slice.

Nothing here knows formats or networks: slices come from a reader, planes go to an engine, results to a
writer, and at most a few batches are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.engines.engine import Engine
from medsr_cli.engines.pipeline import Behind, prefetched
from medsr_cli.evaluation.consistency import Consistency
from medsr_cli.formats.contract import Reader, Writer
from medsr_cli.tasks.progress import Progress
from medsr_cli.volume.intensity import IntensityRange, store
from medsr_cli.volume.resample import resize
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]

QUEUE_SLICES = 4
"""Slices decoded ahead and written behind; more only cost memory."""


LONGEST_BATCH = 8
"""Slices of a batch, however little the engine has to do with them."""


@dataclass
class Measured:
    """What was seen while an image was enlarged."""

    intensity: IntensityRange
    consistency: Consistency = field(default_factory=Consistency)
    clipped: int = 0
    constant_slices: int = 0
    shown: list[tuple[int, Pixels, Pixels]] = field(default_factory=list)
    """Slices kept for the preview: number, input and result (channels, rows, columns)."""
    engine_seconds: float = 0.0


@dataclass
class _Slice:
    """A slice on its way: what the engine gets, and what must be put back afterwards."""

    number: int
    pixels: Pixels
    unit: NDArray[np.float64] | None = None
    """Colour planes in [0, 1], (channels, rows, columns); None for a slice without contrast."""
    masked: NDArray[np.bool_] | None = None
    """Pixels that are not anatomy: padding and values that are not numbers."""


class Enlarger:
    """Carries the slices of one image through an engine."""

    def __init__(self, reader: Reader, result: Volume, engine: Engine, intensity: IntensityRange) -> None:
        self.reader, self.result, self.engine = reader, result, engine
        self.volume = reader.volume
        self.intensity = intensity
        self.measured = Measured(intensity)
        n = self.volume.slices
        self._to_show = {n // 4, n // 2, (3 * n) // 4}

    def run(self, writer: Writer, progress: Progress) -> Measured:
        """Stream every slice from the reader to the writer."""
        done = 0
        behind: Behind[Pixels] = Behind(writer.write, QUEUE_SLICES)
        try:
            with prefetched(self._prepared(), QUEUE_SLICES) as slices:
                for batch in self._batches(slices):
                    for finished in self._finished(batch):
                        behind.put(finished)
                        done += 1
                    progress.slices(done, self.volume.slices)
            behind.finish()
        except BaseException:
            behind.abandon()
            raise
        self.measured.clipped += writer.clipped
        return self.measured

    def _prepared(self) -> Iterator[_Slice]:
        for number, pixels in enumerate(self.reader.slices()):
            yield self._prepare(_Slice(number, pixels))

    def _prepare(self, item: _Slice) -> _Slice:
        colour = item.pixels[:-1] if self.volume.alpha else item.pixels
        masked = np.zeros(colour.shape, np.bool_)
        if self.volume.padding is not None:
            masked |= colour == self.volume.padding
        if colour.dtype.kind == "f":
            masked |= ~np.isfinite(colour)
        item.masked = masked if masked.any() else None
        usable = colour if item.masked is None else colour[~masked]
        if usable.size and usable.min() != usable.max():
            filled = colour if item.masked is None else np.where(masked, usable.min(), colour)
            item.unit = self.intensity.normalise(filled)
        return item

    def _batches(self, slices: Iterator[_Slice]) -> Iterator[list[_Slice]]:
        size = self.engine.batch_of(self.volume.rows, self.volume.columns)
        batch: list[_Slice] = []
        for item in slices:
            batch.append(item)
            planes = sum(s.unit.shape[0] for s in batch if s.unit is not None)
            # Slices without contrast cost the engine nothing, but they must not pile up in memory.
            if planes >= size or len(batch) >= max(size, LONGEST_BATCH):
                yield batch
                batch = []
        if batch:
            yield batch

    def _finished(self, batch: list[_Slice]) -> Iterator[Pixels]:
        planes = [item.unit for item in batch if item.unit is not None]
        if planes:
            started = time.perf_counter()
            # Colours go through one by one as grey planes, so that none can tint another.
            enlarged = self.engine.run(np.concatenate(planes)[:, None])[:, 0]
            self.measured.engine_seconds += time.perf_counter() - started
        first = 0
        for item in batch:
            if item.unit is None:
                self.measured.constant_slices += 1
                yield self._repeat(item)
                continue
            count = item.unit.shape[0]
            yield self._finish(item, enlarged[first : first + count])
            first += count

    def _finish(self, item: _Slice, unit: NDArray[np.floating]) -> Pixels:
        assert item.unit is not None  # noqa: S101 - only slices with contrast come here
        self.measured.consistency.add(item.unit, unit, item.number)
        values = self.intensity.denormalise(unit)
        pixels, clipped = store(values, self.volume.dtype, self.volume.lowest, self.volume.highest)
        self.measured.clipped += clipped
        if item.masked is not None:
            # Padding and NaN stand where they stood, as they were: a network has no say in them.
            pixels = np.where(self._repeated(item.masked), self._repeated(item.pixels[: len(pixels)]), pixels)
        pixels = self._with_alpha(item, pixels)
        self._show(item, pixels)
        return pixels

    def _repeat(self, item: _Slice) -> Pixels:
        """A slice without contrast: every pixel repeated, exactly."""
        pixels = np.ascontiguousarray(self._repeated(item.pixels))
        self._show(item, pixels)
        return pixels

    def _repeated(self, planes: Pixels) -> Pixels:
        rows = nearest_indices(self.volume.rows, self.result.rows)
        columns = nearest_indices(self.volume.columns, self.result.columns)
        return planes[:, rows][:, :, columns]

    def _show(self, item: _Slice, pixels: Pixels) -> None:
        if item.number in self._to_show:
            self.measured.shown.append((item.number, item.pixels, pixels))

    def _with_alpha(self, item: _Slice, pixels: Pixels) -> Pixels:
        if not self.volume.alpha:
            return pixels
        size = (self.result.rows, self.result.columns)
        alpha, _ = store(resize(item.pixels[-1:].astype(np.float64), size), self.volume.dtype)
        return np.concatenate((pixels, alpha))


def nearest_indices(n: int, n_new: int) -> NDArray[np.int64]:
    """The old pixel that covers the centre of each new one."""
    indices = np.floor((np.arange(n_new) + 0.5) * n / n_new).astype(np.int64)
    return np.minimum(indices, n - 1)
