"""Bicubic resampling that smooths before it shrinks: the degradation of M2Trans and of the ultrasound CycleGAN.

Keys' cubic with a = -0.5, half-pixel centres, the kernel widened by the factor when shrinking, weights that add
up to one, and mirrored borders (half-sample symmetric: c b a | a b c) on all sides. It is the bicubic of MATLAB's
imresize and of the Python programs that repeat it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]

CUBIC_A = -0.5
HALF_WIDTH = 2.0
"""Reach of the kernel on either side, in pixels of the coarser grid."""
BAND = 16
"""Pixels of the coarser grid that are resampled together."""


def antialiased_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Rows and columns of an image after resizing by `scale`, where no size is asked for: ceil(size·scale)."""
    rows, columns = size
    return math.ceil(rows * scale), math.ceil(columns * scale)


def antialiased_resize(image: FloatArray, size: tuple[int, int], scale: float | None = None) -> FloatArray:
    """Resample the last two axes (rows, columns) to `size`; computed and returned in the image's float type.

    Args:
        image: (..., rows, columns), any real values.
        size: rows and columns of the result, each at least 1.
        scale: the enlargement of both axes where it is not exactly `size` over the image's size, because that
            was rounded: pixel i of the result lies at (i + 1/2)/scale - 1/2.

    Raises:
        ValueError: a size below 1, or a scale that is not positive.
    """
    *leading, rows, columns = image.shape
    narrow = np.empty((*leading, size[0], columns), image.dtype)
    for band in _bands(rows, size[0], scale, image.dtype):
        np.matmul(band.weights, image[..., band.seen, :], out=narrow[..., band.own, :])
    result = np.empty((*leading, *size), image.dtype)
    for band in _bands(columns, size[1], scale, image.dtype):
        np.matmul(narrow[..., band.seen], band.weights.T, out=result[..., band.own])
    return result


@lru_cache(maxsize=64)
def antialias_weights(n_in: int, n_out: int, scale: float | None = None) -> NDArray[np.float64]:
    """The resampling of one axis as a read-only matrix (n_out, n_in) whose rows add up to one.

    Args:
        n_in: pixels of the image along the axis.
        n_out: pixels of the result.
        scale: as in `antialiased_resize`; None for n_out / n_in.

    Raises:
        ValueError: a size below 1, or a scale that is not positive.
    """
    pixels, weights = _taps(n_in, n_out, scale)
    return _matrix(pixels, weights, n_in)


@dataclass(frozen=True)
class _Band:
    """A few pixels of a result, and the only pixels of the image that they come from."""

    own: slice
    seen: slice
    weights: FloatArray
    """(own, seen), read-only."""


@lru_cache(maxsize=64)
def _bands(n_in: int, n_out: int, scale: float | None, dtype: np.dtype[np.floating]) -> tuple[_Band, ...]:
    """The matrix of one axis, cut into bands: nearly all of it is zero."""
    pixels, weights = _taps(n_in, n_out, scale)
    step = BAND * max(n_out // n_in, 1)
    bands = []
    for start in range(0, n_out, step):
        own = slice(start, min(start + step, n_out))
        first, end = int(pixels[own].min()), int(pixels[own].max()) + 1
        matrix = _matrix(pixels[own] - first, weights[own], end - first).astype(dtype, copy=False)
        matrix.setflags(write=False)
        bands.append(_Band(own, slice(first, end), matrix))
    return tuple(bands)


def _matrix(pixels: NDArray[np.int64], weights: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """The matrix (n_out, n) that has the weights of (n_out, taps) at the pixels of (n_out, taps); read-only."""
    matrix = np.zeros((len(pixels), n))
    np.add.at(matrix, (np.arange(len(pixels))[:, None], pixels), weights)
    matrix.setflags(write=False)
    return matrix


def _taps(n_in: int, n_out: int, scale: float | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The pixels that each pixel of the result comes from, and their weights, both (n_out, taps)."""
    factor = n_out / n_in if scale is None and n_in > 0 else scale
    if n_in < 1 or n_out < 1 or factor is None or not 0 < factor < math.inf:
        msg = f"An axis of {n_in} pixels cannot be resampled to {n_out} at scale {scale}."
        raise ValueError(msg)
    widening = min(factor, 1.0)
    reach = HALF_WIDTH / widening
    centres = (np.arange(n_out) + 0.5) / factor - 0.5
    first = np.floor(centres - reach).astype(np.int64)
    taps = first[:, None] + np.arange(math.ceil(2 * reach) + 2)
    weights = _cubic(np.abs(centres[:, None] - taps) * widening)
    return _mirrored(taps, n_in), weights / weights.sum(axis=1, keepdims=True)


def _mirrored(taps: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Pixel numbers folded back into 0 … n - 1, the edge pixel repeated: -1 is 0, n is n - 1, period 2n."""
    folded = taps % (2 * n)
    return np.minimum(folded, 2 * n - 1 - folded)


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel of |distance| in pixels; 0 from two pixels on."""
    d, a = distance, CUBIC_A
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < HALF_WIDTH, far, 0.0))
