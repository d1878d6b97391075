"""Colours as luminance and chrominance: a network enlarges the first, a cubic the second, so that nothing is tinted.

Networks for grey images know nothing of hues, and one that takes the three colours one by one sharpens an edge
differently in each of them. So only the luminance goes through a network; eyes see detail in it alone, and scanners
store chrominance at half the resolution for that reason (YBR_FULL_422, DICOM PS3.3, C.7.6.3.1.2).

The axes are those of ITU-R BT.601 at full range, as in DICOM's YBR_FULL, with chrominance around 0:

    Y = 0.299 R + 0.587 G + 0.114 B,   Cb = (B - Y) / 1.772,   Cr = (R - Y) / 1.402.

They are written as differences here, so that equal R, G and B have a luminance of exactly that value and a
chrominance of exactly 0, and come back exactly equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.intensity import IntensityRange, blocks_of_rows, store

FloatArray = NDArray[np.floating]
Pixels = NDArray[Any]

COLOURS = 3
RED, GREEN, BLUE = 0.299, 0.587, 0.114
"""Shares of the luminance, ITU-R BT.601."""
OF_RED, OF_BLUE = 2 * (1 - RED), 2 * (1 - BLUE)
"""R - Y = OF_RED Cr and B - Y = OF_BLUE Cb, so that both lie within a half of the range."""


def luminance(rgb: FloatArray) -> FloatArray:
    """Y of (..., 3, rows, columns), as (..., 1, rows, columns), in the units and the float type of the colours."""
    red, green, blue = (rgb[..., channel : channel + 1, :, :] for channel in range(COLOURS))
    value: FloatArray = green + RED * (red - green) + BLUE * (blue - green)
    return value


def chrominance(rgb: FloatArray) -> FloatArray:
    """Cb and Cr of (..., 3, rows, columns), as (..., 2, rows, columns): 0 for greys, a half of the range at most."""
    value = luminance(rgb)
    blue, red = rgb[..., 2:3, :, :] - value, rgb[..., 0:1, :, :] - value
    return np.concatenate((blue / OF_BLUE, red / OF_RED), axis=-3)


def differences(chroma: FloatArray) -> FloatArray:
    """R - Y, G - Y and B - Y of Cb and Cr: (..., 2, rows, columns) to (..., 3, rows, columns)."""
    blue, red = OF_BLUE * chroma[..., 0:1, :, :], OF_RED * chroma[..., 1:2, :, :]
    return np.concatenate((red, -(RED * red + BLUE * blue) / GREEN, blue), axis=-3)


def restored(
    value: FloatArray,
    chroma: FloatArray,
    intensity: IntensityRange,
    dtype: np.dtype[Any],
    lowest: float | None = None,
    highest: float | None = None,
) -> tuple[Pixels, int]:
    """RGB in the stored type: `IntensityRange.restored` for colours, a few rows at a time, rounded once.

    What cannot be stored is made paler, not clipped: see `within`.

    Args:
        value: luminance, (1, rows, columns), values about [0, 1].
        chroma: Cb and Cr, (2, rows, columns), as shares of the same range.
        intensity: the one range of all three colours.
        dtype: the stored type.
        lowest: smallest value that can be stored; None takes that of the type.
        highest: largest value that can be stored; None takes that of the type.

    Returns:
        The pixels, (3, rows, columns), and the number of values that could not be stored.
    """
    limits = _limits(dtype, lowest, highest)
    pixels = np.empty((COLOURS, *value.shape[-2:]), dtype)
    outside = 0
    for rows in blocks_of_rows(pixels.shape):
        grey = intensity.denormalise(value[:, rows])
        apart = differences(chroma[:, rows].astype(np.float64, copy=False)) * intensity.width
        if limits is not None:
            rounded = np.rint(grey + apart)
            outside += int(np.count_nonzero((rounded < limits[0]) | (rounded > limits[1])))
        colours = grey + apart if limits is None else within(grey, apart, *limits)
        pixels[:, rows], _ = store(colours, dtype, lowest, highest)
    return pixels, outside


def within(grey: FloatArray, apart: FloatArray, low: float, high: float) -> NDArray[np.float64]:
    """Colours between two values: where one of the three lies beyond, the pixel moves towards its own grey.

    Clipping one colour of three would change the hue, and the luminance with it. All three differences from the
    luminance shrink by one factor instead, which leaves hue and luminance as they are; a luminance beyond the limits
    becomes black or white.

    Args:
        grey: luminance, (1, rows, columns).
        apart: R - Y, G - Y and B - Y, (3, rows, columns), in the same units.
        low: smallest value of a colour.
        high: largest value of a colour.
    """
    colours: NDArray[np.float64] = np.asarray(grey + apart, np.float64)
    beyond = ((colours < low) | (colours > high)).any(axis=0)
    if not beyond.any():
        return colours
    kept = np.clip(grey[0][beyond], low, high)
    of_pixels = apart[:, beyond]
    room = np.where(of_pixels > 0, high - kept, kept - low)  # not negative
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(of_pixels == 0, 1.0, room / np.abs(of_pixels))
    colours[:, beyond] = kept + of_pixels * np.minimum(share.min(axis=0), 1.0)
    return colours


def _limits(dtype: np.dtype[Any], lowest: float | None, highest: float | None) -> tuple[float, float] | None:
    """What can be stored; None where everything can."""
    if dtype.kind == "f":
        return None
    of_type = np.iinfo(dtype)
    low = of_type.min if lowest is None else max(lowest, of_type.min)
    high = of_type.max if highest is None else min(highest, of_type.max)
    return float(low), float(high)
