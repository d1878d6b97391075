"""What the numbers mean to a network, and back: one linear map for a whole volume, undone exactly.

The networks were trained on volumes scaled to [0, 1] by their own minimum and maximum (RDST, section 4.1).
Values that come back are rounded and saturated to the stored type, never wrapped, and what was saturated is
counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]

BLOCK_VALUES = 1 << 17


@dataclass(frozen=True)
class IntensityRange:
    """Smallest and largest finite value of a volume, padding left out, and what was found on the way."""

    minimum: float
    maximum: float
    not_finite: int = 0
    """Voxels that are NaN or infinite."""
    padded: int = 0
    """Voxels that carry the padding value."""
    slices: int = 0

    @property
    def width(self) -> float:
        """Largest less smallest value; 0 for a constant volume."""
        return self.maximum - self.minimum

    def normalise(self, pixels: Pixels) -> NDArray[np.float64]:
        """Values to [0, 1], in float64 so that 32-bit integers survive the way there and back; constant ones to 0."""
        return (pixels.astype(np.float64) - self.minimum) / (self.width or 1.0)

    def denormalise(self, unit: NDArray[np.floating]) -> NDArray[np.float64]:
        """The inverse of `normalise`."""
        return unit.astype(np.float64) * self.width + self.minimum

    def restored(
        self,
        unit: NDArray[np.floating],
        dtype: np.dtype[Any],
        lowest: float | None = None,
        highest: float | None = None,
    ) -> tuple[Pixels, int]:
        """`store(denormalise(unit), ...)`, a few rows at a time: the same values, without float64 copies of all.

        Args:
            unit: (..., rows, columns), values about [0, 1].
            dtype: the stored type.
            lowest: smallest value that can be stored; None takes that of the type.
            highest: largest value that can be stored; None takes that of the type.

        Returns:
            The pixels and the number of values that had to be saturated.
        """
        pixels = np.empty(unit.shape, dtype)
        clipped = 0
        for rows in blocks_of_rows(unit.shape):
            block, outside = store(self.denormalise(unit[..., rows, :]), dtype, lowest, highest)
            pixels[..., rows, :] = block
            clipped += outside
        return pixels, clipped


def blocks_of_rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of (..., rows, columns) that make up about BLOCK_VALUES: few enough to stay in a cache as float64."""
    rows = shape[-2]
    step = max(BLOCK_VALUES * rows // max(math.prod(shape), 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def full_scale(intensity: IntensityRange, dtype: np.dtype[Any]) -> IntensityRange:
    """The range of an 8-bit image's type, for networks that were trained on images divided by 255."""
    return replace(intensity, minimum=0.0, maximum=255.0) if dtype == np.uint8 else intensity


def measure(slices: Iterable[Pixels], padding: float | None, alpha: bool = False) -> IntensityRange:
    """Read a volume once, forward, and find its range.

    Args:
        slices: (channels, rows, columns) each.
        padding: a value that marks pixels outside the scanned field, or None.
        alpha: whether the last channel is opacity, which does not count.
    """
    low, high, odd, padded, count = np.inf, -np.inf, 0, 0, 0
    for pixels in slices:
        count += 1
        values = pixels[:-1] if alpha else pixels
        usable, n_odd, n_padded = usable_values(values, padding)
        odd += n_odd
        padded += n_padded
        if usable.size:
            low, high = min(low, float(usable.min())), max(high, float(usable.max()))
    if low > high:
        low = high = 0.0
    return IntensityRange(low, high, odd, padded, count)


def usable_values(values: Pixels, padding: float | None) -> tuple[Pixels, int, int]:
    """The finite values that are not padding, and how many of either were left out."""
    n_padded = 0
    if padding is not None:
        is_padding = values == padding
        n_padded = int(is_padding.sum())
        if n_padded:
            values = values[~is_padding]
    if values.dtype.kind != "f":
        return values, 0, n_padded
    finite = np.isfinite(values)
    n_odd = int(values.size - finite.sum())
    return (values[finite] if n_odd else values), n_odd, n_padded


def store(
    values: NDArray[np.floating], dtype: np.dtype[Any], lowest: float | None = None, highest: float | None = None
) -> tuple[Pixels, int]:
    """Values as the stored type: integers rounded (halves to even) and saturated, floats cast.

    Returns:
        The pixels and the number of values that had to be saturated.
    """
    if dtype.kind == "f":
        return values.astype(dtype), 0
    limits = np.iinfo(dtype)
    low = limits.min if lowest is None else max(int(lowest), limits.min)
    high = limits.max if highest is None else min(int(highest), limits.max)
    if values.dtype.kind in "iu" and (not values.size or (int(values.min()) >= low and int(values.max()) <= high)):
        return values.astype(dtype), 0  # nothing to round, nothing to saturate
    rounded = np.rint(values)
    # 64-bit limits are no float64 numbers: the comparison takes the nearest ones that do not wrap.
    top = np.float64(high) if int(np.float64(high)) <= high else np.nextafter(np.float64(high), 0)
    n_outside = rounded.size - int(np.count_nonzero((rounded >= low) & (rounded <= top)))
    if n_outside:
        rounded = np.clip(np.nan_to_num(rounded, nan=low, posinf=top, neginf=low), low, top)
    return rounded.astype(dtype), n_outside
