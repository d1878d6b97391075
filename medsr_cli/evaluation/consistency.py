"""Does the result, shrunken again, give the input? And is it an image at all?

Every run shrinks its own output with the degradation that the checkpoint was trained to undo, and compares
it with what it was given. Detail that contradicts the input shows here; detail that was invented in
agreement with it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import QualityGateFailed
from medsr_cli.evaluation.agreement_map import Limit, LocalAgreement
from medsr_cli.volume.degradation import CUBIC, Degradation

MEAN_SHIFT_LIMIT = 0.1
"""A slice whose mean moves by more than this share of the volume's range fails the run."""
CORRELATION_WARNING = 0.8
"""Below this correlation of shrunken output and input, over the whole volume, the result is suspect."""
CORRELATION_LIMIT = 0.5
"""Below this one it is not a result of this input, and the run fails."""
OVERSHOOT = 0.5
"""Share of the volume's range beyond its ends at which a value is no sharpened edge any more."""
OVERSHOOT_LIMIT = 0.01
"""Share of a slice's pixels that may lie beyond: more of them fail the run."""

Plane = NDArray[np.floating]


@dataclass
class Agreement:
    """Running comparison of the shrunken output with the input, in units of the volume's range."""

    degradation: Degradation
    pixels: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    largest: float = 0.0
    worst_slice: int = -1
    _sums: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, given: Plane, result: Plane, slice_number: int) -> NDArray[np.float64]:
        """Compare one slice, (channels, rows, columns), values about [0, 1]; returns it shrunken, like `given`."""
        down = self.degradation.down(result.astype(np.float64, copy=False), (given.shape[-2], given.shape[-1]))
        again: NDArray[np.float64] = np.asarray(down, np.float64)
        difference = np.abs(again - given)
        worst = float(difference.max())
        if worst > self.largest:
            self.largest, self.worst_slice = worst, slice_number
        self.pixels += given.size
        self.absolute += float(difference.sum())
        self.squared += float(np.square(difference).sum())
        x, y = given.ravel().astype(np.float64), again.ravel()
        new = (x.sum(), y.sum(), x @ x, y @ y, x @ y)
        self._sums = tuple(a + float(b) for a, b in zip(self._sums, new, strict=True))  # type: ignore[assignment]
        return again

    @property
    def mean_absolute(self) -> float:
        """Mean absolute difference, share of the range."""
        return self.absolute / self.pixels if self.pixels else 0.0

    @property
    def psnr_db(self) -> float | None:
        """PSNR of the shrunken output against the input, peak = range; None for no difference at all."""
        if not self.pixels or self.squared == 0:
            return None
        return -10 * math.log10(self.squared / self.pixels)

    @property
    def correlation(self) -> float:
        """Correlation of the shrunken output with the input over all slices; 1 for constant ones."""
        sx, sy, xx, yy, xy = self._sums
        n = max(self.pixels, 1)
        var_x, var_y = xx - sx * sx / n, yy - sy * sy / n
        if var_x <= 0 or var_y <= 0:
            return 1.0
        return (xy - sx * sy / n) / math.sqrt(var_x * var_y)


class Consistency:
    """The output shrunken twice: by the checkpoint's own degradation, and by the plain cubic.

    A degradation that blurs cannot see what a network wrongly adds at the frequencies that it removes: a network
    that was trained to undo a blur makes a chessboard of an image that was not blurred, and the blur takes that
    chessboard away again. The plain cubic sees it.

    Both look at whole volumes. What goes wrong in one place is looked for in blocks, by the checkpoint's own
    degradation and against a limit from its validation images; see `agreement_map`.
    """

    def __init__(self, degradation: Degradation = CUBIC, limit: Limit | None = None) -> None:
        self.degradation = degradation
        self.local = LocalAgreement(limit or Limit())
        self.own = Agreement(degradation)
        self.plain = self.own if degradation is CUBIC else Agreement(CUBIC)
        self.largest_overshoot = 0.0

    def add(self, given: Plane, result: Plane, slice_number: int) -> NDArray[np.float64]:
        """Compare one slice, (channels, rows, columns), values about [0, 1].

        Returns:
            |shrunken result - input|, shaped like `given`, as a share of the range.

        Raises:
            QualityGateFailed: the result is not finite, constant where the input is not, shifted in mean, or far
                outside of the input's values.
        """
        self._refuse_broken(given, result, slice_number)
        result = result.astype(np.float64, copy=False)  # once for both
        again = self.own.add(given, result, slice_number)
        self.local.add(given, again, slice_number)
        if self.plain is not self.own:
            self.plain.add(given, result, slice_number)
        return np.abs(again - given)

    def _refuse_broken(self, given: Plane, result: Plane, slice_number: int) -> None:
        lowest, highest = float(result.min()), float(result.max())
        # Values that are no numbers go through minimum and maximum, and infinite ones are such.
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            msg = f"The network returned values that are not numbers in slice {slice_number + 1}."
            raise QualityGateFailed(msg, "Use --precision fp32; nothing was written.")
        if lowest == highest and np.ptp(given) > 0:
            msg = f"The network returned a constant image for slice {slice_number + 1}."
            raise QualityGateFailed(msg, "The checkpoint is broken or does not suit; nothing was written.")
        shift = abs(float(result.mean(dtype=np.float64) - given.mean(dtype=np.float64)))
        if shift > MEAN_SHIFT_LIMIT:
            msg = f"The mean of slice {slice_number + 1} moved by {shift:.0%} of the volume's range."
            raise QualityGateFailed(msg, "The checkpoint does not suit this image; nothing was written.")
        self.largest_overshoot = max(self.largest_overshoot, highest - 1, -lowest)
        if lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT:
            return
        beyond = float(np.mean((result < -OVERSHOOT) | (result > 1 + OVERSHOOT)))
        if beyond > OVERSHOOT_LIMIT:
            msg = f"{beyond:.0%} of slice {slice_number + 1} came out far beyond the values of the input."
            raise QualityGateFailed(msg, "The checkpoint does not suit this image; nothing was written.")

    @property
    def correlation(self) -> float:
        """The worse of the two."""
        return min(self.own.correlation, self.plain.correlation)

    def report(self, range_width: float) -> dict[str, Any]:
        """For the run's report; differences also in the image's own units."""
        own = self.own
        return {
            "degradation": self.degradation.name,
            "mean_absolute_share_of_range": own.mean_absolute,
            "mean_absolute_units": own.mean_absolute * range_width,
            "largest_units": own.largest * range_width,
            "worst_slice": own.worst_slice + 1 if own.worst_slice >= 0 else None,
            "psnr_db": own.psnr_db,
            "correlation": own.correlation,
            "correlation_by_cubic": self.plain.correlation,
            "overshoot_share_of_range": self.largest_overshoot,
            "local": self.local.report(),
        }
