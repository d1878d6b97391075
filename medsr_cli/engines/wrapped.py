"""Engines around engines: colours, eight orientations, back projection, the way down from a larger scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from medsr_cli.engines.engine import Engine, Enlarged, Planes, Size
from medsr_cli.volume.band_limited import shifted
from medsr_cli.volume.degradation import BICUBIC_ANTIALIASED, Degradation
from medsr_cli.volume.geometry import enlarged_length
from medsr_cli.volume.resample import resize

BACK_PROJECTIONS = 10
"""Corrections of each orientation, and again of their median, in the inference of the ultrasound CycleGAN."""
ROWS_AT_ONCE = 64
"""Of the results of an ensemble: what is held in double precision."""
ORIENTATIONS = 8
"""Four quarter turns, each with and without a mirror (Liu et al. 2021, section 3.4; Lim et al. 2017)."""


class Wrapped:
    """What an engine around another one passes on."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.name, self.device, self.precision = inner.name, inner.device, inner.precision
        self.channels, self.guided = inner.channels, inner.guided
        self.warnings = inner.warnings

    def size_of(self, rows: int, columns: int) -> Size:
        """As the inner engine."""
        return self.inner.size_of(rows, columns)

    def batch_of(self, rows: int, columns: int) -> int:
        """As the inner engine."""
        return self.inner.batch_of(rows, columns)


class Colours(Wrapped):
    """Fits images of any number of channels to a network of another number.

    A grey network takes colours one by one, so that none can tint another; a colour network takes grey three
    times over, and its three results are averaged (the decision of the specifications of M2Trans and the
    ultrasound CycleGAN).
    """

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """(n, any channels, rows, columns) in, as many channels out."""
        n, channels, rows, columns = planes.shape
        if self.inner.channels in (0, channels):
            return self.inner.run(planes, guide)
        if self.inner.channels == 1:
            one_by_one = planes.reshape(n * channels, 1, rows, columns)
            guides = None if guide is None else np.repeat(guide, channels, axis=0)
            return _each(self.inner.run(one_by_one, guides), lambda p: p.reshape(n, channels, *p.shape[-2:]))
        if channels == 1:
            repeated = np.repeat(planes, self.inner.channels, axis=1)
            return _each(self.inner.run(repeated, guide), lambda p: p.mean(axis=1, keepdims=True))
        msg = f"a network of {self.inner.channels} channels cannot take {channels}"
        raise ValueError(msg)

    def turned(self) -> Colours:
        """Around the turned engine."""
        return Colours(self.inner.turned())


class Ensemble(Wrapped):
    """The geometric self-ensemble: eight orientations of the input, each result turned back, one result of them.

    `extras["spread"]` is the standard deviation of the eight at each pixel: how far the result depends on which
    way up the slice lay.
    """

    def __init__(self, inner: Engine, reduce: Literal["mean", "median"] = "mean") -> None:
        super().__init__(inner)
        self.reduce = reduce

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Eight runs of the inner engine."""
        upright, on_its_side = self.inner, self.inner.turned()
        # Single precision is what networks compute in; eight results of a large slice are memory enough.
        results: list[Planes] = []
        extras: dict[str, list[Planes]] = {}
        for k in range(ORIENTATIONS):
            engine = on_its_side if k % 2 else upright
            turned_guide = None if guide is None else orient(guide, k)
            result = engine.run(orient(planes, k), turned_guide)
            results.append(np.ascontiguousarray(orient_back(result.planes, k), np.float32))
            for name, extra in result.extras.items():
                if name != "spread":
                    extras.setdefault(name, []).append(orient_back(extra, k))
            self._take_warnings(on_its_side)
        reduced, spread = reduced_by_rows(results, self.reduce)
        means = {name: np.mean(each, axis=0) for name, each in extras.items()}
        return Enlarged(reduced, {**means, "spread": spread})

    def _take_warnings(self, other: Engine) -> None:
        if other.warnings is not self.warnings:
            self.warnings += [sentence for sentence in other.warnings if sentence not in self.warnings]

    def turned(self) -> Ensemble:
        """Around the turned engine."""
        return Ensemble(self.inner.turned(), self.reduce)


class BackProjected(Wrapped):
    """Iterated back projection: S ← S + up(L - down(S)), with the degradation that the checkpoint undoes.

    The result is brought to agree with its input (Liu et al. 2021, section 3.4, after Irani and Peleg 1991);
    detail that the degradation does not see stays as it is.
    """

    def __init__(self, inner: Engine, degradation: Degradation, steps: int, *, clip: bool = False) -> None:
        super().__init__(inner)
        self.degradation, self.steps, self.clip = degradation, steps, clip

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """The inner engine's result after `steps` corrections, float64."""
        enlarged = self.inner.run(planes, guide)
        result = back_project(enlarged.planes, planes, self.degradation, self.steps, clip=self.clip)
        return Enlarged(result, enlarged.extras)

    def turned(self) -> BackProjected:
        """Around the turned engine."""
        return BackProjected(self.inner.turned(), self.degradation, self.steps, clip=self.clip)


class Realigned(Wrapped):
    """For networks trained on images whose first pixels' centres coincide: moves the input to where they expect it.

    The result's edges are those of the input, as everywhere in medsr. Pixel s·j of the result then lies at
    j + 1/(2s) - 1/2 of the input, where such a network takes pixel j to be: without this its result, and above
    all its guide, would be (s - 1)/2 pixels away from the input.
    """

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """The inner engine on the moved input; the guide is on the result's grid already."""
        rows, columns = planes.shape[-2:]
        size = self.size_of(rows, columns)
        by = [(n_new / n - 1) * n / n_new / 2 for n, n_new in zip((rows, columns), size, strict=True)]
        return self.inner.run(shifted(planes, by[0], by[1]), guide)

    def turned(self) -> Realigned:
        """Around the turned engine."""
        return Realigned(self.inner.turned())


def median_of_orientations(inner: Engine) -> Engine:
    """The ultrasound CycleGAN's inference: eight orientations, each back-projected, their median, back-projected.

    Liu et al. 2021, section 3.4, as released: 10 corrections and clipping each time.
    """
    each = BackProjected(inner, BICUBIC_ANTIALIASED, BACK_PROJECTIONS, clip=True)
    return BackProjected(Ensemble(each, "median"), BICUBIC_ANTIALIASED, BACK_PROJECTIONS, clip=True)


class Fitted(Wrapped):
    """A scale that a method has no checkpoint for: enlarged by the next larger one, then shrunken to size.

    J. Zhu's dissertation, section 4.3: single-scale methods are run at the next whole scale and resized down
    with the cubic.
    """

    def __init__(self, inner: Engine, scale: tuple[float, float]) -> None:
        super().__init__(inner)
        self.scale = scale

    def size_of(self, rows: int, columns: int) -> Size:
        """N' = round(N·s) along each axis."""
        return enlarged_length(rows, self.scale[0]), enlarged_length(columns, self.scale[1])

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Up, then down; a guide on the result's grid is enlarged to that of the network first."""
        rows, columns = planes.shape[-2:]
        size, larger = self.size_of(rows, columns), self.inner.size_of(rows, columns)
        fitting_guide = None if guide is None else resize(guide, larger)
        return _each(
            self.inner.run(planes, fitting_guide),
            lambda p: resize(p.astype(np.float64, copy=False), size) if p.shape[-2:] == larger else p,
        )

    def turned(self) -> Fitted:
        """With the scales of rows and columns exchanged."""
        return Fitted(self.inner.turned(), (self.scale[1], self.scale[0]))


def reduced_by_rows(results: Sequence[Planes], reduce: Literal["mean", "median"]) -> tuple[Planes, Planes]:
    """Mean or median of each pixel, and its standard deviation, float32; a block of rows at a time.

    Args:
        results: planes of one shape, (n, channels, rows, columns).
        reduce: which of the two.
    """
    reduced: Planes = np.empty_like(results[0], np.float32)
    spread: Planes = np.empty_like(results[0], np.float32)
    for start in range(0, reduced.shape[-2], ROWS_AT_ONCE):
        rows = (..., slice(start, start + ROWS_AT_ONCE), slice(None))
        stack = np.stack([result[rows] for result in results], dtype=np.float64)
        reduced[rows] = np.median(stack, axis=0) if reduce == "median" else stack.mean(axis=0)
        spread[rows] = stack.std(axis=0)
    return reduced, spread


def back_project(result: Planes, given: Planes, degradation: Degradation, steps: int, *, clip: bool = False) -> Planes:
    """S ← S + up(L - down(S)), `steps` times; with `clip` back into [0, 1] each time.

    Args:
        result: S, (n, channels, rows', columns').
        given: L, (n, channels, rows, columns).
        degradation: what is between them.
        steps: how often.
        clip: whether values beyond [0, 1] cannot be.
    """
    small, large = (given.shape[-2], given.shape[-1]), (result.shape[-2], result.shape[-1])
    result = result.astype(np.float64, copy=True)
    for _ in range(steps):
        result += degradation.up(given - degradation.down(result, small), large)
        if clip:
            np.clip(result, 0, 1, out=result)
    return result


def orient(planes: Planes, k: int) -> Planes:
    """The last two axes turned by 90°·k counter-clockwise, for k of 4 and more then mirrored left to right."""
    turned = np.rot90(planes, k % 4, axes=(-2, -1))
    return turned[..., ::-1] if k >= ORIENTATIONS // 2 else turned


def orient_back(planes: Planes, k: int) -> Planes:
    """The inverse of `orient`."""
    mirrored = planes[..., ::-1] if k >= ORIENTATIONS // 2 else planes
    return np.rot90(mirrored, -(k % 4), axes=(-2, -1))


def _each(enlarged: Enlarged, change: Callable[[Planes], Planes]) -> Enlarged:
    """The result and every extra, changed in the same way."""
    return Enlarged(change(enlarged.planes), {name: change(planes) for name, planes in enlarged.extras.items()})
