"""Resampling that keeps the centre of k-space and nothing else, with mirrored borders.

A slice that is continued by its mirror image has cosines alone in its spectrum. Keeping the lowest n of them is
cropping k-space, as a scanner does that measures less of it; evaluating them anywhere is sinc interpolation.
Edges align as everywhere in medsr: sample i of n lies at (i + 1/2)/n of the axis.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


def band_limited_resize(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resample the last two axes to `size`: what the smaller of the two grids can hold, no more.

    Args:
        image: (..., rows, columns), any real values.
        size: rows and columns of the result.
    """
    rows, columns = image.shape[-2:]
    down, across = _resize_weights(rows, size[0]), _resize_weights(columns, size[1])
    return _applied(image, down, across)


def shifted(image: FloatArray, rows: float, columns: float) -> FloatArray:
    """The image as it is so many pixels further up and to the left: result[i] = image[i - rows], band-limited.

    Args:
        image: (..., rows, columns).
        rows: shift along rows, in pixels, of any sign.
        columns: the same along columns.
    """
    return _applied(image, _shift_weights(image.shape[-2], rows), _shift_weights(image.shape[-1], columns))


def _applied(image: FloatArray, down: NDArray[np.float64], across: NDArray[np.float64]) -> FloatArray:
    result: FloatArray = np.matmul(np.matmul(down.astype(image.dtype), image), across.astype(image.dtype).T)
    return result


@lru_cache(maxsize=64)
def _resize_weights(n_in: int, n_out: int) -> NDArray[np.float64]:
    return _weights(n_in, (np.arange(n_out) + 0.5) / n_out, min(n_in, n_out))


@lru_cache(maxsize=64)
def _shift_weights(n: int, by: float) -> NDArray[np.float64]:
    return _weights(n, (np.arange(n) + 0.5 - by) / n, n)


def _weights(n: int, positions: NDArray[np.float64], kept: int) -> NDArray[np.float64]:
    """Matrix (positions, n): the first `kept` cosines of n samples, evaluated at shares of the axis."""
    frequencies = np.arange(kept)
    analysis = np.cos(np.pi * frequencies[:, None] * (np.arange(n) + 0.5) / n) * (2 / n)  # (kept, n)
    analysis[0] /= 2
    matrix: NDArray[np.float64] = np.cos(np.pi * frequencies * positions[:, None]) @ analysis
    matrix.setflags(write=False)
    return matrix
