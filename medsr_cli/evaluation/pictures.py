"""Slices as 8-bit pictures: windowed greys, error maps in colour, histograms' counts. All PNG, nothing smoothed.

A picture holds one pixel of the slice in one pixel of the PNG. Whoever shows it enlarges it by whole multiples
without smoothing, so that what is seen is what is in the file.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]
Levels = NDArray[np.uint8]
Stops = Sequence[tuple[int, int, int]]

DARKEST_PERCENTILE, BRIGHTEST_PERCENTILE = 0.5, 99.5
ERROR_PERCENTILE = 99.5
COLOURS = 63
"""Colours of a map: odd, so that zero has one of its own. More could not be told apart, and cost file size."""
NOT_MEASURED = (110, 110, 110)

DIVERGING: Stops = (
    (158, 202, 255),
    (58, 124, 200),
    (20, 52, 92),
    (12, 12, 14),
    (104, 30, 18),
    (204, 86, 52),
    (255, 205, 170),
)
"""Blue below zero, black at zero, red above: brightness tells the size, and red-green blindness does not matter."""
SEQUENTIAL: Stops = (
    (0, 0, 4),
    (50, 10, 94),
    (120, 28, 109),
    (187, 55, 84),
    (237, 105, 37),
    (251, 180, 26),
    (252, 255, 164),
)
"""From black through violet and orange to pale yellow; brightness rises all the way."""


def window_of(images: Iterable[Pixels]) -> tuple[float, float]:
    """Values to draw black and white: percentiles 0.5 and 99.5 of all finite pixels; never two equal ones."""
    values = np.concatenate([finite(image) for image in images])
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (DARKEST_PERCENTILE, BRIGHTEST_PERCENTILE)))
    if high > low:
        return low, high
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1)


def error_range_of(errors: Iterable[Pixels]) -> float:
    """One range for several error maps: the 99.5th percentile of all absolute errors, rounded up; never 0."""
    values = np.concatenate([np.abs(finite(error)) for error in errors])
    if not values.size or values.max() == 0:
        return 1.0
    return rounded_up(float(np.percentile(values, ERROR_PERCENTILE)) or float(values.max()))


def rounded_up(value: float) -> float:
    """The next number with two significant digits that is not smaller; `value` is positive."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    steps = math.ceil(round(value / unit, 9))
    # Multiplied by a power of ten below one, 13 steps of 0.1 would be 1.3000000000000000444.
    return float(f"{steps * unit:.2g}")


def finite(image: Pixels) -> NDArray[np.float64]:
    """The finite values of an image, flat."""
    values = np.asarray(image, dtype=np.float64).ravel()
    return values[np.isfinite(values)]


def grey_levels(image: Pixels, window: tuple[float, float]) -> Levels:
    """Values to 0 (at or below the window) … 255 (at or above); NaN to 0. The shape stays."""
    low, high = window
    values = np.asarray(image, dtype=np.float64)
    share = np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low), 0, 1)
    return np.rint(share * 255).astype(np.uint8)


def colour_numbers(values: Pixels, ends: tuple[float, float]) -> Levels:
    """Values to 0 … COLOURS - 1 between the two ends, saturated; values that are not numbers to COLOURS."""
    low, high = ends
    share = np.clip((np.nan_to_num(np.asarray(values, np.float64), nan=low) - low) / (high - low), 0, 1)
    numbers = np.rint(share * (COLOURS - 1)).astype(np.uint8)
    return np.where(np.isnan(values), np.uint8(COLOURS), numbers)


def palette(stops: Stops) -> NDArray[np.uint8]:
    """(COLOURS + 1, 3): colours between the stops, and the one for what was not measured."""
    at = np.linspace(0, len(stops) - 1, COLOURS)
    table = np.array(stops, dtype=np.float64)
    colours = np.stack([np.interp(at, np.arange(len(stops)), table[:, i]) for i in range(3)], axis=1)
    return np.concatenate([np.rint(colours), np.array([NOT_MEASURED])]).astype(np.uint8)


def image_png(image: Pixels, window: tuple[float, float]) -> bytes:
    """The PNG of (rows, columns) in grey or (rows, columns, 3) in colour."""
    return _png(Image.fromarray(grey_levels(image, window)))


def map_png(values: Pixels, ends: tuple[float, float], *, diverging: bool) -> bytes:
    """The PNG of a map (rows, columns) in colours; errors take `diverging` and symmetric ends."""
    picture = Image.fromarray(colour_numbers(values, ends), mode="P")
    picture.putpalette(palette(DIVERGING if diverging else SEQUENTIAL).ravel().tolist())
    return _png(picture)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """The bytes as an address that holds them."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def difference(image: Pixels, reference: Pixels) -> NDArray[np.float64]:
    """image - reference, (rows, columns); of colours the channel that differs most. In float64: nothing wraps."""
    error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    if error.ndim == 2:
        return error
    most = np.argmax(np.abs(error), axis=-1)[..., None]
    chosen: NDArray[np.float64] = np.take_along_axis(error, most, axis=-1)[..., 0]
    return chosen


def bin_edges(ends: tuple[float, float], bins: int) -> NDArray[np.float64]:
    """(bins + 1,) from one end to the other."""
    return np.linspace(ends[0], ends[1], bins + 1)


def counts_of(image: Pixels, edges: NDArray[np.floating]) -> NDArray[np.int64]:
    """(bins,) how many finite pixels lie in each bin; those beyond the ends count in the first and last one."""
    values = np.clip(finite(image), edges[0], edges[-1])
    return np.histogram(values, bins=edges)[0].astype(np.int64)
