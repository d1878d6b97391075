"""How much larger: a factor, one for each in-plane axis, or the spacing that is wanted in millimetres."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.volume.volume import Volume

LARGEST = 8.0
Factors = tuple[float, float]


@dataclass(frozen=True)
class Magnification:
    """What was asked for; `of` says what that is for one image."""

    factors: Factors = (4.0, 4.0)
    """Along rows and columns."""
    spacing_mm: float | None = None
    """Wanted distance of rows and of columns, instead of factors."""

    @classmethod
    def parse(cls, text: str, spacing_mm: float | None = None) -> Magnification:
        """From `4`, `2.7` or, rows before columns, `2x3`.

        Raises:
            ArgumentsError: no numbers, or none that enlarge.
        """
        if spacing_mm is not None:
            if not (math.isfinite(spacing_mm) and spacing_mm > 0):
                msg = f"A spacing of {spacing_mm:g} mm cannot be."
                raise ArgumentsError(msg, "Give --spacing in millimetres, such as 0.5.")
            return cls(spacing_mm=spacing_mm)
        try:
            factors = [float(part) for part in re.split("[x,]", text.strip().lower())]
        except ValueError as error:
            msg = f"--scale {text} is no number."
            raise ArgumentsError(msg, "Give a factor such as 4, or one for rows and one for columns: 2x3.") from error
        if len(factors) > 2 or not all(1 <= f <= LARGEST for f in factors) or max(factors) <= 1:
            msg = f"--scale {text} does not enlarge by a factor above 1 and up to {LARGEST:g}."
            raise ArgumentsError(msg, "Give a factor such as 4, or one for rows and one for columns: 2x3.")
        return cls((factors[0], factors[-1]))

    @property
    def label(self) -> str:
        """For file names: `x4`, `x2x3`, `0.5mm`."""
        if self.spacing_mm is not None:
            return f"{self.spacing_mm:g}mm"
        return "x" + "x".join(f"{f:g}" for f in dict.fromkeys(self.factors))

    def of(self, volume: Volume, name: str = "The image") -> Factors:
        """The factors for one image; `name` is what a refusal calls it.

        Raises:
            InputRefused: a spacing was asked for, and the image does not say its own or is as fine already.
        """
        if self.spacing_mm is None:
            return self.factors
        if volume.spacing_mm is None:
            msg = f"{mention(name)} does not say how far apart its pixels are."
            raise InputRefused(msg, "Use --scale instead of --spacing.")
        rows, columns = (spacing / self.spacing_mm for spacing in volume.spacing_mm)
        if max(rows, columns) <= 1 or min(rows, columns) < 1:
            found = " x ".join(f"{spacing:.4g}" for spacing in volume.spacing_mm)
            msg = (
                f"{mention(name)} has pixels of {found} mm, not all coarser than the {self.spacing_mm:g} mm asked for."
            )
            raise InputRefused(msg, "medsr enlarges; give a smaller --spacing.")
        if max(rows, columns) > LARGEST:
            msg = (
                f"From {max(volume.spacing_mm):.4g} mm to {self.spacing_mm:g} mm is more than {LARGEST:g} times finer."
            )
            raise InputRefused(msg, "Give a larger --spacing.")
        return rows, columns


def in_words(factors: Factors) -> str:
    """`4`, or `2 x 3` for rows and columns."""
    return " x ".join(f"{f:.6g}" for f in dict.fromkeys(factors))
