"""The pairs of one image at one scale: what every model is given, and what its result is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention
from medsr_cli.tasks.evaluation_inputs import Opened, guide_slice, other_slices
from medsr_cli.tasks.magnification import Factors
from medsr_cli.volume.intensity import IntensityRange
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.evaluation.protocols import Protocol

Unit = NDArray[np.float64]

BATCH_SLICES = 8
WHOLE = 1e-9
"""How far sizes may be from a scale that they are an exact multiple by."""


@dataclass
class Pair:
    """A slice; all planes are (channels, rows, columns), in [0, 1] of one range."""

    number: int
    """Of the slice, from 0."""
    low: Unit
    target: Unit
    guides: dict[bool, NDArray[np.float32]] = field(default_factory=dict)
    """Guide (rows', columns') of the slice itself (False) and of another one (True)."""


class Pairs:
    """Makes the pairs of an image as they are asked for; slices stream, also where they are asked for again."""

    def __init__(self, opened: Opened, protocol: Protocol, scale: float, most: int, *, guided: bool) -> None:
        self.opened, self.protocol, self.scale, self.guided = opened, protocol, scale, guided
        self.working: IntensityRange = opened.working(whole_type=protocol.intensity == "full-scale")
        self.chosen = opened.chosen(most)
        self.others = other_slices(opened, self.chosen) if guided else {}
        volume = opened.reader.volume
        try:
            self.low_size, self.size = protocol.sizes(volume.rows, volume.columns, scale)
        except ValueError as error:
            msg = f"{mention(opened.name)} is too small for scale {scale:g}."
            raise InputRefused(msg, "Leave it out with --exclude, or measure a smaller scale.") from error
        self._stack: tuple[float, float] | None = self._stack_range() if protocol.stack_range else None

    @property
    def factors(self) -> Factors:
        """By which the target is larger, along rows and columns; the scale where sizes are multiples of it."""
        rows, columns = (n / small for n, small in zip(self.size, self.low_size, strict=True))
        if max(abs(rows - self.scale), abs(columns - self.scale)) < WHOLE:
            return self.scale, self.scale
        return rows, columns

    @property
    def low_volume(self) -> Volume:
        """What the low-resolution slices would be as an image of [0, 1]."""
        return replace(
            self.opened.reader.volume.enlarged(*self.low_size),
            dtype=np.dtype(np.float64), channels=self.opened.colours, alpha=False, padding=None,
            lowest=None, highest=None, value_scale=(1.0, 0.0), slices=len(self.chosen),
        )  # fmt: skip

    def batches(self) -> Iterator[list[Pair]]:
        """Pairs that are worth measuring; where the protocol measures chunks of slices, a chunk each."""
        chunked = self.protocol.average == "chunk"
        made = (self._pair(number, high) for number, high in self.opened.slices(self.chosen, self.working))
        worthy = (pair for pair in made if chunked or self.protocol.worth_measuring(pair.target, self.scale))
        while batch := list(islice(worthy, self.protocol.chunk_slices if chunked else BATCH_SLICES)):
            yield batch

    def lows(self) -> Sequence[Unit]:
        """The low-resolution slices, made when they are asked for."""
        return _Lows(self)

    def on_target(self, planes: Unit) -> Unit:
        """(1, rows, columns) on the image's grid on that of the target, which the protocol may cut or resample."""
        return np.asarray(self.protocol.pair(planes, self.scale)[1], np.float64)

    def _pair(self, number: int, high: Unit) -> Pair:
        low, target = self.protocol.pair(high, self.scale)
        if self._stack is not None:
            low = self._stacked(high)
        pair = Pair(number, np.asarray(low, np.float64), np.asarray(target, np.float64))
        if self.guided:
            for shuffled, at in ((False, number), (True, self.others.get(number, number))):
                own = guide_slice(self.opened, at).astype(np.float64)[None]
                pair.guides[shuffled] = self.on_target(own).astype(np.float32)[0]
        return pair

    def _shrunken(self, high: Unit) -> Unit:
        target = high.astype(np.float32)[..., : self.size[0], : self.size[1]]
        return np.asarray(self.protocol.degrade(target, self.low_size), np.float64)

    def _stacked(self, high: Unit) -> Unit:
        assert self._stack is not None  # noqa: S101 - the caller has looked
        low, top = self._stack
        return (self._shrunken(high) - low) / ((top - low) or 1.0)

    def _stack_range(self) -> tuple[float, float]:
        """Of all low-resolution slices of the volume together, by one more reading."""
        ends = [(small.min(), small.max()) for _, high in self._every() for small in (self._shrunken(high),)]
        return float(min(low for low, _ in ends)), float(max(high for _, high in ends))

    def _every(self) -> Iterator[tuple[int, Unit]]:
        return self.opened.slices(self.chosen, self.working)


class _Lows(Sequence[Unit]):
    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[Unit]:
        for batch in self._pairs.batches():
            for pair in batch:
                yield pair.low

    def __len__(self) -> int:
        return len(self._pairs.chosen)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]
