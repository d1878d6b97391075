"""Where a result contradicts its input: a map of the disagreement, and a limit for its blocks.

The result is shrunken by the degradation that its checkpoint undoes, and compared with the input in every block of
8 x 8 pixels. A block's score is

    score = RMS(shrunken - input) / (FLOOR + standard deviation of the input in the block),

both in shares of the volume's range. A network errs most where the image has most contrast, at the skull, so an
error is held against the contrast around it; FLOOR keeps noise in flat background from counting. About 1 means that
what changed is as large as what there was to see.

The limit of a checkpoint comes from its validation images (`calibrate`). One slice in a hundred that is flagged for
nothing would stop every volume with `--strict`: so the limit is not a percentile of blocks, of which a volume has
thousands, but lies a margin above the worst block of nearly all validation slices. Their 99.9th percentile, with a
few hundred slices at hand, is all but the largest score that was seen.

What was invented in agreement with the input has no score here: shrinking takes it away. See ring correlation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.degradation import CUBIC, Degradation

BLOCK = 8
"""Side of a block in pixels of the input; images that are smaller are one block."""
FLOOR = 0.05
"""Share of the range that counts as no contrast at all. Of 0.02, 0.05 and 0.1 the one that best kept noise that a
network smoothed (MIASSR on images that were not blurred) apart from inserted discs of a tenth of the range."""
PERCENTILE = 99.9
MARGIN = 1.25
"""The limit over the percentile: a validation set of a few subjects does not hold every anatomy and artefact."""
DEFAULT_LIMIT = 1.0
"""For checkpoints that were not calibrated: errors as large as the contrast around them."""
LOWEST_LIMIT = 0.15
"""No limit is lower: half precision (bfloat16 rounds to 0.4 %) and other anatomy must not be flagged, and a disc of a
tenth of the range scores twice as much in every block that was tried."""
HIGHEST_LIMIT = 10.0
"""A limit above would flag nothing that another gate does not refuse."""
MOST_NAMED = 50
"""Flagged slices that a report lists; the rest is counted."""

Plane = NDArray[np.floating]


@dataclass(frozen=True)
class Limit:
    """Largest score that a block may have, and what that rests on."""

    value: float = DEFAULT_LIMIT
    slices: int = 0
    """Validation slices that it was calibrated on; 0 for the default."""
    largest_seen: float | None = None
    """Largest score on them."""

    def to_json(self) -> str:
        """For a checkpoint's metadata; `limit_of_json` reads it back."""
        return json.dumps({"limit": self.value, "slices": self.slices, "largest_seen": self.largest_seen})


def limit_of_json(text: str | None) -> Limit:
    """The limit that a checkpoint's metadata tell; the default where they tell none, or none that makes sense."""
    try:
        found = json.loads(text or "null")
        value, slices = float(found["limit"]), int(found["slices"])
        seen = found.get("largest_seen")
        seen = None if seen is None else float(seen)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return Limit()
    # NaN is not above anything: a limit that is none would let everything pass.
    return Limit(value, slices, seen) if 0 < value <= HIGHEST_LIMIT and slices > 0 else Limit()


@dataclass
class LocalAgreement:
    """Running search for blocks of a result that contradict the input."""

    limit: Limit = field(default_factory=Limit)
    largest: float = 0.0
    """Largest score so far."""
    worst: tuple[int, int, int] | None = None
    """Slice, row and column, from 0, of the middle of that block."""
    slices: int = 0
    flagged: list[int] = field(default_factory=list)
    """The first slices, from 0, with a block above the limit."""
    n_flagged: int = 0

    def add(self, given: Plane, again: Plane, slice_number: int) -> float:
        """Look at one slice; returns its largest score.

        Args:
            given: the input, (channels, rows, columns), values about [0, 1].
            again: the shrunken result, of the same shape.
            slice_number: counted from 0.
        """
        scores = block_scores(given, again)
        row, column = np.unravel_index(int(np.argmax(scores)), scores.shape)
        score = float(scores[row, column])
        self.slices += 1
        if self.worst is None or score > self.largest:
            height, width = (min(BLOCK, n) for n in given.shape[-2:])
            self.largest, self.worst = score, (slice_number, int(row) + height // 2, int(column) + width // 2)
        # A comparison that NaN, too, does not pass.
        if not score <= self.limit.value:
            self.n_flagged += 1
            if len(self.flagged) < MOST_NAMED:
                self.flagged.append(slice_number)
        return score

    @property
    def sentence(self) -> str:
        """What is wrong, or an empty text."""
        if not self.n_flagged or self.worst is None:
            return ""
        slice_number, row, column = (n + 1 for n in self.worst)
        known = "than in any validation image" if self.limit.slices else "than the contrast around it explains"
        return (
            f"The shrunken result differs from the input by more {known} in {self.n_flagged} of {self.slices} slices, "
            f"most in slice {slice_number} around row {row}, column {column}."
        )

    def report(self) -> dict[str, Any]:
        """For the run's report; slices, rows and columns count from 1."""
        place = (
            None
            if self.worst is None
            else dict(zip(("slice", "row", "column"), (n + 1 for n in self.worst), strict=True))
        )
        return {
            "block_pixels": BLOCK,
            "limit": self.limit.value,
            "limit_from_slices": self.limit.slices or None,
            "largest": self.largest,
            "worst": place,
            "flagged_slices": self.n_flagged,
            "flagged": [number + 1 for number in self.flagged],
        }


def block_scores(given: Plane, again: Plane) -> NDArray[np.float64]:
    """The score of every block, (rows - 7, columns - 7); of colours that of all together.

    Args:
        given: the input, (channels, rows, columns), values about [0, 1].
        again: the shrunken result, of the same shape.
    """
    x = np.asarray(given, np.float64)
    squared_error = np.square(np.asarray(again, np.float64) - x)
    # About the mean of the slice, whose square would otherwise swallow the digits of a small variance.
    x = x - x.mean()
    size = tuple(min(BLOCK, n) for n in x.shape[-2:])
    mean, square, error = (_block_means(values, size) for values in (x, np.square(x), squared_error))
    contrast = np.sqrt(np.maximum(square - np.square(mean), 0).mean(axis=0))
    scores: NDArray[np.float64] = np.sqrt(np.maximum(error, 0).mean(axis=0)) / (FLOOR + contrast)
    return scores


def _block_means(values: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean over each whole block, (channels, rows - height + 1, columns - width + 1)."""
    for axis, length in zip((-2, -1), size, strict=True):
        sums = np.cumsum(values, axis=axis)
        first = np.take(sums, [length - 1], axis=axis)
        n = values.shape[axis]
        rest = np.take(sums, range(length, n), axis=axis) - np.take(sums, range(n - length), axis=axis)
        values = np.concatenate([first, rest], axis=axis) / length
    return values


def calibrate(pairs: Iterable[tuple[Plane, Plane]], degradation: Degradation = CUBIC) -> Limit:
    """The limit of a checkpoint, from its results on validation images.

    Args:
        pairs: slices as the network got them, both validation images that were shrunken first and some as they are
            (the images that it will meet were not shrunken, and neither was their noise), (channels, rows, columns)
            or (rows, columns) in [0, 1], and its results, (channels, rows', columns') or (rows', columns').
            Constant slices are left out.
        degradation: what the checkpoint undoes.

    Returns:
        MARGIN times the 99.9th percentile of the slices' largest scores, at least LOWEST_LIMIT; the default where
        there is no slice, or a result that is not a number.
    """
    largest = []
    for given, result in pairs:
        if np.ptp(given) == 0:
            continue
        x = np.asarray(given, np.float64)
        again = degradation.down(np.asarray(result, np.float64), (x.shape[-2], x.shape[-1]))
        scores = block_scores(x, again) if x.ndim == 3 else block_scores(x[None], again[None])
        largest.append(float(scores.max()))
    if not largest or not all(math.isfinite(score) for score in largest):
        return Limit()
    value = min(max(MARGIN * float(np.percentile(largest, PERCENTILE)), LOWEST_LIMIT), HIGHEST_LIMIT)
    return Limit(round(value, 4), len(largest), round(max(largest), 4))
