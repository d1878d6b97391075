"""Images through an engine: measured once, then streamed slice by slice.

Nothing here knows formats or networks: slices come from readers, planes go to an engine, results to writers,
and at most a few batches are in memory. Most runs have one image; registered images that a network takes
together go through side by side, each with its own range, result and writers.

Four kinds of threads work at once: one decodes and normalises batches, the caller's does nothing but run the engine,
one turns results into stored pixels and checks them, and one for each result encodes, compresses and writes.

Colours are never tinted. A network of one channel enlarges the luminance of an RGB image, and the cubic its
chrominance (`volume.colour`): the hues of the result are those of the input between its own pixels, and greys stay
grey to the last bit. A network of three channels gets RGB as in its paper, but only the luminance of what it makes is
taken; its colours are the cubic's, too. The baselines are linear and act on each colour. Checks, ensembles' spreads
and intermediate results are of the luminance wherever a network ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli.engines.engine import Engine, Enlarged, Interpolation
from medsr_cli.engines.pipeline import Behind, Pipeline, Queue
from medsr_cli.evaluation.agreement_map import Limit
from medsr_cli.evaluation.consistency import Consistency
from medsr_cli.formats.contract import Reader, Writer
from medsr_cli.tasks.progress import Progress
from medsr_cli.volume import colour
from medsr_cli.volume.degradation import CUBIC, Degradation
from medsr_cli.volume.intensity import IntensityRange, store
from medsr_cli.volume.resample import resize
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]
Unit = NDArray[np.floating]

MIB = 1 << 20
AHEAD_BYTES = 32 * MIB
"""Prepared batches that wait for the engine."""
RESULT_BYTES = 64 * MIB
"""Results of the engine that wait to be finished: one slice of 2048 x 2048 in float64, three in float32."""
STORED_BYTES = 32 * MIB
"""Finished slices that wait for each writer. Where a single item is larger, one waits."""
QUEUE_BATCHES = 2
"""Batches in each of the first two queues, however small they are."""
QUEUE_SLICES = 8
"""Finished slices before each writer, however small they are."""
LONGEST_BATCH = 4
"""Slices of a batch, however little the engine has to do with them."""

SPREAD = "spread"
"""The extra of an ensemble that is a deviation, not an image."""
CONSISTENCY = "consistency"
"""The extra that is no engine's: how far the shrunken result is from the input, on the input's grid."""


class GuideSlices(Protocol):
    """A second image on the grid of the result."""

    def slices(self) -> Iterator[Unit]:
        """(rows', columns') in [0, 1] for every slice of the result."""
        ...


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
    spread: tuple[float, float] | None = None
    """Mean and largest deviation of an ensemble, in the image's units."""


@dataclass
class Stream:
    """One image on its way: where it comes from, what it becomes, and where that goes."""

    reader: Reader
    result: Volume
    intensity: IntensityRange
    writer: Writer
    degradation: Degradation = CUBIC
    """What the network undoes; the result is shrunken by it again and compared with the input."""
    extras: Mapping[str, tuple[Volume, Writer]] = field(default_factory=dict)
    """Name of an engine's extra, or CONSISTENCY, to the grid and the writer that it goes to."""
    limit: Limit = field(default_factory=Limit)
    """How far a block of the shrunken result may be from the input."""
    measured: Measured = field(init=False)

    def __post_init__(self) -> None:
        self.measured = Measured(self.intensity, Consistency(self.degradation, self.limit))
        n = self.reader.volume.slices
        self.to_show = {n // 4, n // 2, (3 * n) // 4}

    @property
    def volume(self) -> Volume:
        """That of the input."""
        return self.reader.volume


@dataclass
class _Part:
    """A slice of one image: what the engine gets, and what must be put back afterwards."""

    stream: Stream
    number: int
    pixels: Pixels
    unit: Unit | None = None
    """What the engine gets, in [0, 1], (planes, rows, columns): grey, luminance or colours; None without contrast."""
    chroma: Unit | None = None
    """Cb and Cr of colours whose luminance alone the engine decides, (2, rows, columns)."""
    masked: NDArray[np.bool_] | None = None
    """Pixels that are not anatomy: padding and values that are not numbers."""

    @property
    def colours(self) -> int:
        return len(self.pixels) - self.stream.volume.alpha

    @property
    def width(self) -> int:
        """Planes that the engine gets of it."""
        return self.colours if self.unit is None else len(self.unit)

    def planes(self) -> Unit:
        """For the engine; a slice without contrast beside others that have some is flat."""
        if self.unit is not None:
            return self.unit
        value = self.stream.intensity.normalise(self.pixels[: self.colours])
        return np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass
class _Slice:
    """The same slice of every image, and of the guide."""

    parts: list[_Part]
    guide: Unit | None = None

    @property
    def empty(self) -> bool:
        return all(part.unit is None for part in self.parts)


@dataclass
class _Batch:
    """Slices that the engine gets at once, and what it made of them."""

    slices: list[_Slice]
    planes: Unit | None = None
    """(n, channels, rows, columns) of the slices that are not empty; None if all are."""
    guides: Unit | None = None
    """(n, 1, rows', columns')."""
    results: dict[str, Unit] = field(default_factory=dict)
    """The engine's planes under an empty name, and its extras: (n, channels, rows', columns')."""

    @classmethod
    def of(cls, slices: list[_Slice]) -> _Batch:
        """The slices with their planes side by side, of which the parts' own become views."""
        full = [item for item in slices if not item.empty]
        if not full:
            return cls(slices)
        planes = np.stack([np.concatenate([part.planes() for part in item.parts]) for item in full])
        for item, together in zip(full, planes, strict=True):
            first = 0
            for part in item.parts:
                if part.unit is not None:
                    part.unit = together[first : first + part.width]
                first += part.width
        guides = [item.guide for item in full if item.guide is not None]
        for item in full:
            item.guide = None
        return cls(slices, planes, np.stack(guides)[:, None] if guides else None)

    def held_bytes(self) -> int:
        """What it keeps in memory."""
        parts = [part for item in self.slices for part in item.parts]
        pixels = sum(part.pixels.nbytes + (0 if part.chroma is None else part.chroma.nbytes) for part in parts)
        made = [planes for planes in (self.planes, self.guides, *self.results.values()) if planes is not None]
        return pixels + sum(planes.nbytes for planes in made)

    def results_of_slices(self) -> Iterator[tuple[_Slice, dict[str, Unit]]]:
        """Each slice with the planes (channels, rows', columns') that the engine made of it; none if it was empty."""
        position = 0
        for item in self.slices:
            if item.empty:
                yield item, {}
            else:
                yield item, {name: planes[position] for name, planes in self.results.items()}
                position += 1


class Enlarger:
    """Carries the slices of one image, or of registered images, through an engine."""

    def __init__(self, streams: Sequence[Stream], engine: Engine, guide: GuideSlices | None = None) -> None:
        self.streams, self.engine, self.guide = list(streams), engine, guide
        self.volume = self.streams[0].volume
        self.engine_seconds = 0.0
        # Baselines, which numpy computes, are linear: whatever axes colours have, the result is the same.
        self.linear = engine.channels == 0 or engine.name == Interpolation.name

    def run(self, progress: Progress) -> None:
        """Stream every slice from the readers to the writers.

        Raises:
            BaseException: the first that any of the threads met; none of them runs any more then.
        """
        with Pipeline() as pipeline:
            outlets = [_Outlet(stream, pipeline) for stream in self.streams]
            finishing = pipeline.behind("finish", lambda batch: self._finish(batch, outlets), _queue(RESULT_BYTES))
            batches = pipeline.ahead("decode", self._batches(), _Batch.held_bytes, _queue(AHEAD_BYTES))
            for batch in batches:
                self._enlarge(batch)
                finishing.put(batch, batch.held_bytes())
                del batch  # while the next one is waited for, this one must not be held
                progress.slices(min(outlet.written for outlet in outlets), self.volume.slices)
            pipeline.finish()
            progress.slices(min(outlet.written for outlet in outlets), self.volume.slices)
        for stream in self.streams:
            stream.measured.engine_seconds = self.engine_seconds
            stream.measured.clipped += stream.writer.clipped

    def _prepared(self) -> Iterator[_Slice]:
        guides = self.guide.slices() if self.guide else None
        readers = [stream.reader.slices() for stream in self.streams]
        for number, together in enumerate(zip(*readers, strict=True)):
            parts = [
                self._prepare(_Part(stream, number, pixels))
                for stream, pixels in zip(self.streams, together, strict=True)
            ]
            yield _Slice(parts, None if guides is None else next(guides))

    def _prepare(self, part: _Part) -> _Part:
        """What the engine gets of a slice, and beside it what it has no say in: masked pixels, hues."""
        volume = part.stream.volume
        values = part.pixels[: part.colours]
        masked = np.zeros(values.shape, np.bool_)
        if volume.padding is not None:
            masked |= values == volume.padding
        if values.dtype.kind == "f":
            masked |= ~np.isfinite(values)
        part.masked = masked if masked.any() else None
        usable = values if part.masked is None else values[~masked]
        if not usable.size or usable.min() == usable.max():
            return part
        filled = values if part.masked is None else np.where(masked, usable.min(), values)
        part.unit = part.stream.intensity.normalise(filled)
        if part.colours == colour.COLOURS and not self.linear:
            part.chroma = colour.chrominance(part.unit)
            if self.engine.channels != colour.COLOURS:
                part.unit = colour.luminance(part.unit)
        return part

    def _batches(self) -> Iterator[_Batch]:
        size = self.engine.batch_of(self.volume.rows, self.volume.columns)
        batch: list[_Slice] = []
        for item in self._prepared():
            batch.append(item)
            planes = sum(part.width for s in batch if not s.empty for part in s.parts)
            # Slices without contrast cost the engine nothing, but they must not pile up in memory.
            if planes >= size or len(batch) >= max(size, LONGEST_BATCH):
                yield _Batch.of(batch)
                batch = []
        if batch:
            yield _Batch.of(batch)

    def _enlarge(self, batch: _Batch) -> None:
        """Run the engine; this is all that the caller's thread does."""
        if batch.planes is None:
            return
        started = time.perf_counter()
        enlarged: Enlarged = self.engine.run(batch.planes, batch.guides)
        batch.results = {"": enlarged.planes, **enlarged.extras}
        batch.guides = None
        self.engine_seconds += time.perf_counter() - started

    def _finish(self, batch: _Batch, outlets: list[_Outlet]) -> None:
        for item, enlarged in batch.results_of_slices():
            first = 0
            for part, outlet in zip(item.parts, outlets, strict=True):
                own = slice(first, first + part.width)
                outlet.take(part, {name: planes[own] for name, planes in enlarged.items()})
                first += part.width


def _queue(limit_bytes: int) -> Queue[_Batch]:
    return Queue(limit_bytes, QUEUE_BATCHES)


class _Outlet:
    """Turns planes of one image back into its own values and hands them to its writers, behind the engine."""

    def __init__(self, stream: Stream, pipeline: Pipeline) -> None:
        self.stream, self.measured = stream, stream.measured
        self.written = 0
        """Slices that the writer has taken."""
        self.main = _writing(pipeline, self._write)
        self.others = {name: _writing(pipeline, writer.write) for name, (_, writer) in stream.extras.items()}
        self._spread_sum, self._spread_pixels = 0.0, 0

    def _write(self, pixels: Pixels) -> None:
        self.stream.writer.write(pixels)
        self.written += 1

    def take(self, part: _Part, enlarged: dict[str, Unit]) -> None:
        """Finish one slice; without planes it is repeated pixel by pixel, exactly."""
        disagreement: Unit | None = None
        if part.unit is None or not enlarged:
            self.measured.constant_slices += 1
            pixels = np.ascontiguousarray(_repeated(part.pixels, self.stream.result))
        else:
            given = part.unit
            if part.chroma is not None and len(given) == colour.COLOURS:
                # Of a colour network's result the luminance. Of its three deviations the same sum: the deviation of
                # the luminance is not larger, and as large where the colours change together.
                given = colour.luminance(given)
                enlarged = {name: colour.luminance(planes) for name, planes in enlarged.items()}
            disagreement = self.measured.consistency.add(given, enlarged[""], part.number)
            pixels = self._finish(part, enlarged[""], self.stream.result)
        if part.number in self.stream.to_show:
            self.measured.shown.append((part.number, part.pixels, pixels))
        self.main.put(pixels, pixels.nbytes)
        for name, outlet in self.others.items():
            extra = self._extra(name, part, disagreement if name == CONSISTENCY else enlarged.get(name))
            outlet.put(extra, extra.nbytes)

    def _finish(self, part: _Part, unit: Unit, result: Volume) -> Pixels:
        volume = self.stream.volume
        if part.chroma is None:
            pixels, clipped = self.stream.intensity.restored(unit, volume.dtype, volume.lowest, volume.highest)
        else:
            chroma = resize(part.chroma, (unit.shape[-2], unit.shape[-1]))
            stored = self.stream.intensity, volume.dtype, volume.lowest, volume.highest
            pixels, clipped = colour.restored(unit, chroma, *stored)
        if result is self.stream.result:
            self.measured.clipped += clipped
        if part.masked is not None:
            # Padding and NaN stand where they stood, as they were: a network has no say in them.
            np.copyto(pixels, _repeated(part.pixels[: len(pixels)], result), where=_repeated(part.masked, result))
        if not volume.alpha:
            return pixels
        alpha, _ = store(resize(part.pixels[-1:].astype(np.float64), (result.rows, result.columns)), volume.dtype)
        return np.concatenate((pixels, alpha))

    def _extra(self, name: str, part: _Part, unit: Unit | None) -> Pixels:
        result, _ = self.stream.extras[name]
        if name == CONSISTENCY:
            return self._in_units(part, unit, result)
        if name == SPREAD:
            return self._spread(part, unit, result)
        if part.unit is None or unit is None:
            return np.ascontiguousarray(_repeated(part.pixels, result))
        return self._finish(part, unit, result)

    def _spread(self, part: _Part, unit: Unit | None, result: Volume) -> Pixels:
        """The ensemble's deviation in the image's units, measured on the way."""
        deviation = self._in_units(part, unit, result)
        if part.unit is not None and unit is not None:
            self._spread_sum += float(deviation.sum(dtype=np.float64))
            self._spread_pixels += deviation.size
            largest = max(float(deviation.max()), self.measured.spread[1] if self.measured.spread else 0.0)
            self.measured.spread = (self._spread_sum / self._spread_pixels, largest)
        return deviation

    def _in_units(self, part: _Part, unit: Unit | None, result: Volume) -> Pixels:
        """A map of shares of the range in the image's units; nothing where there was nothing to enlarge."""
        if part.unit is None or unit is None:
            return np.zeros((result.channels, result.rows, result.columns), np.float32)
        in_units = self.stream.intensity.width * abs(self.stream.volume.value_scale[0])
        # Of colours the one that differs most: the map is for looking where not to trust.
        values: Pixels = (unit.max(axis=0, keepdims=True) * in_units).astype(np.float32)
        if part.masked is not None:
            masked = _repeated(np.logical_or.reduce(part.masked, axis=0, keepdims=True), result)
            values = np.where(masked, np.float32(0), values)
        return values


def _writing(pipeline: Pipeline, write: Callable[[Pixels], None]) -> Behind[Pixels]:
    return pipeline.behind("write", write, Queue(STORED_BYTES, QUEUE_SLICES))


def _repeated(planes: Pixels, result: Volume) -> Pixels:
    """Every pixel of (channels, rows, columns) repeated on the result's grid."""
    rows = nearest_indices(planes.shape[-2], result.rows)
    columns = nearest_indices(planes.shape[-1], result.columns)
    return planes[:, rows][:, :, columns]


def nearest_indices(n: int, n_new: int) -> NDArray[np.int64]:
    """The old pixel that covers the centre of each new one."""
    indices = np.floor((np.arange(n_new) + 0.5) * n / n_new).astype(np.int64)
    return np.minimum(indices, n - 1)
