"""When the training on one image is over: a line through the last reconstruction errors.

Source: the release of H. Liu et al. 2021 (doi 10.1007/s00521-020-05687-9), which has the rule of A. Shocher et al.,
"Zero-shot super-resolution using deep internal learning", CVPR 2018, section 3.3: the learning rate falls when the
slope of a line through the last errors is small beside its own uncertainty, and training ends when it is tiny.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RECORD_EVERY = 60
"""Iterations between two records of the error, from iteration 0 on (release)."""
CHECK_EVERY = 60
"""Iterations i are checked where i + 1 is a multiple of this (release)."""
AT_LEAST = 256
"""A reduction comes more than so many iterations after the one before, or after iteration 0 (release)."""
RECORDS_IN_LINE = 4
"""Records that the line goes through (release)."""
SLOPE_FACTOR = 1.5
"""The slope, going down, has to be steeper than its standard error divided by this (release)."""
REDUCTION = 10.0
"""What the rate is divided by (release)."""


@dataclass(frozen=True)
class Record:
    """The reconstruction error, a mean squared difference of values in [0, 1], after an iteration."""

    iteration: int
    error: float


@dataclass
class StoppingRule:
    """The schedule of the learning rate; whether the optimisers follow it is the preset's choice.

    Iterations are counted from 0. `check` may be repeated for the same iteration: it reduces once.
    """

    first_rate: float
    minimum_rate: float
    """Training ends when the rate is below this."""
    records: list[Record] = field(default_factory=list)
    reductions: list[int] = field(default_factory=list)
    """Iterations after which the rate was reduced."""

    @property
    def rate(self) -> float:
        """The learning rate after the reductions so far."""
        return self.first_rate / REDUCTION ** len(self.reductions)

    @property
    def finished(self) -> bool:
        """Whether the rate is below the minimum; one that equals it up to rounding is not."""
        return self.rate < self.minimum_rate * (1 - 1e-9)

    def record_is_due(self, iteration: int) -> bool:
        """Whether the error after this iteration is to be recorded, and was not yet."""
        return iteration % RECORD_EVERY == 0 and (not self.records or self.records[-1].iteration < iteration)

    def record(self, iteration: int, error: float) -> None:
        """Remember the error after an iteration."""
        self.records.append(Record(iteration, error))

    def check(self, iteration: int) -> bool:
        """Reduce the rate if the error has stopped falling; returns whether it was reduced."""
        since = iteration - (self.reductions[-1] if self.reductions else 0)
        if (iteration + 1) % CHECK_EVERY or since <= AT_LEAST or len(self.records) < RECORDS_IN_LINE:
            return False
        slope, deviation = line_through(self.records[-RECORDS_IN_LINE:])
        reduced = -SLOPE_FACTOR * slope < deviation
        if reduced:
            self.reductions.append(iteration)
        return reduced


def line_through(records: list[Record]) -> tuple[float, float]:
    """Slope of the least-squares line of error over iteration, and the standard error of the slope.

    The residuals' variance is their sum of squares divided by n - 2; at least three records.
    """
    x = np.array([record.iteration for record in records], dtype=np.float64)
    y = np.array([record.error for record in records], dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    residuals = y - slope * x
    return slope, float(np.sqrt(residuals @ residuals / (len(records) - 2) / spread))
