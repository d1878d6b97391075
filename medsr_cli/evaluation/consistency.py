"""Does the result, shrunken again, give the input? And is it an image at all?

Every run shrinks its own output with the degradation that the checkpoint was trained to undo, and compares
it with what it was given. Detail that contradicts the input shows here; detail that was invented in
agreement with it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import QualityGateFailed
from medsr_cli.volume.degradation import CUBIC, Degradation

MEAN_SHIFT_LIMIT = 0.1
"""A slice whose mean moves by more than this share of the volume's range fails the run."""
CORRELATION_WARNING = 0.8
"""Below this correlation of shrunken output and input, over the whole volume, the result is suspect."""

Plane = NDArray[np.floating]


@dataclass
class Consistency:
    """Running comparison of the shrunken output with the input, in units of the volume's range."""

    degradation: Degradation = CUBIC
    pixels: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    largest: float = 0.0
    worst_slice: int = -1
    _sums: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, given: Plane, result: Plane, slice_number: int) -> None:
        """Compare one slice, (channels, rows, columns), values about [0, 1].

        Raises:
            QualityGateFailed: the result is not finite, constant where the input is not, or shifted in mean.
        """
        self._refuse_broken(given, result, slice_number)
        size = (given.shape[-2], given.shape[-1])
        again = self.degradation.down(result.astype(np.float64, copy=False), size)
        difference = np.abs(again - given)
        shift = abs(float(again.mean() - given.mean()))
        if shift > MEAN_SHIFT_LIMIT:
            msg = f"The mean of slice {slice_number + 1} moved by {shift:.0%} of the volume's range."
            raise QualityGateFailed(msg, "The checkpoint does not suit this image; nothing was written.")
        worst = float(difference.max())
        if worst > self.largest:
            self.largest, self.worst_slice = worst, slice_number
        self.pixels += given.size
        self.absolute += float(difference.sum())
        self.squared += float(np.square(difference).sum())
        x, y = given.ravel().astype(np.float64), again.ravel()
        new = (x.sum(), y.sum(), x @ x, y @ y, x @ y)
        self._sums = tuple(a + float(b) for a, b in zip(self._sums, new, strict=True))  # type: ignore[assignment]

    @staticmethod
    def _refuse_broken(given: Plane, result: Plane, slice_number: int) -> None:
        if not np.isfinite(result).all():
            msg = f"The network returned values that are not numbers in slice {slice_number + 1}."
            raise QualityGateFailed(msg, "Use --precision fp32; nothing was written.")
        if np.ptp(result) == 0 and np.ptp(given) > 0:
            msg = f"The network returned a constant image for slice {slice_number + 1}."
            raise QualityGateFailed(msg, "The checkpoint is broken or does not suit; nothing was written.")

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

    def report(self, range_width: float) -> dict[str, float | int | None]:
        """For the run's report; differences also in the image's own units."""
        return {
            "mean_absolute_share_of_range": self.mean_absolute,
            "mean_absolute_units": self.mean_absolute * range_width,
            "largest_units": self.largest * range_width,
            "worst_slice": self.worst_slice + 1 if self.worst_slice >= 0 else None,
            "psnr_db": self.psnr_db,
            "correlation": self.correlation,
        }
