"""Separable resampling of slices: the cubic of the papers' degradation, and the baselines built on it.

Half-pixel centres and replicated borders throughout: sample i of n' over n pixels lies at
(i + 1/2)·n/n' - 1/2. Nothing is smoothed before shrinking unless a blur is asked for, as in the recipes of
RDST and MIASSR (dissertation, sections 4.3 and 5.3), whose cubic is that of OpenCV (a = -0.75).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kernel = Literal["cubic", "lanczos"]
FloatArray = NDArray[np.floating]

CUBIC_A = -0.75
LANCZOS_LOBES = 3
MANY_WEIGHTS = 1 << 16
"""Weights of an axis from which on the product is taken band by band."""
BAND_SAMPLES = 64
"""Samples of a band, on the longer of its two sides."""


def resize(image: FloatArray, size: tuple[int, int], kernel: Kernel = "cubic") -> FloatArray:
    """Resample the last two axes (rows, columns) to `size`; computed and returned in the image's float type.

    Args:
        image: (..., rows, columns), any real values.
        size: rows and columns of the result, each at least 1.
        kernel: `cubic` (a = -0.75, four taps) or `lanczos` (three lobes).
    """
    rows, columns = image.shape[-2:]
    if image.dtype == np.float64 and max(rows * size[0], columns * size[1]) >= MANY_WEIGHTS:
        return _resized_in_bands(image, size, kernel)
    down = axis_weights(rows, size[0], kernel).astype(image.dtype, copy=False)
    across = axis_weights(columns, size[1], kernel).astype(image.dtype, copy=False)
    result: FloatArray = np.matmul(np.matmul(down, image), across.T)
    return result


def _resized_in_bands(image: FloatArray, size: tuple[int, int], kernel: Kernel) -> FloatArray:
    """The same without the multiplications by zero, of which a large matrix mostly consists.

    BLAS splits long sums, and differently for different numbers of threads; a band is short enough to be one sum, so
    that this has the same last bit on every machine. It is that of the whole product but for some 1 in 100 pixels.
    """
    rows, columns = image.shape[-2:]
    down, across = axis_weights(rows, size[0], kernel), axis_weights(columns, size[1], kernel)
    between = np.empty((*image.shape[:-2], size[0], columns))
    for new, old in _bands(rows, size[0], kernel):
        np.matmul(down[new, old], image[..., old, :], out=between[..., new, :])
    result = np.empty((*image.shape[:-2], *size))
    for new, old in _bands(columns, size[1], kernel):
        np.matmul(between[..., old], across[new, old].T, out=result[..., new])
    return result


@lru_cache(maxsize=64)
def _bands(n_in: int, n_out: int, kernel: Kernel) -> list[tuple[slice, slice]]:
    """New samples of one axis in groups, and the old samples that each group is made of."""
    weights = axis_weights(n_in, n_out, kernel)
    step = max(BAND_SAMPLES * n_out // max(n_in, n_out), 1)
    bands = []
    for first in range(0, n_out, step):
        new = slice(first, min(first + step, n_out))
        used = np.flatnonzero(weights[new].any(axis=0))
        bands.append((new, slice(int(used[0]), int(used[-1]) + 1)))
    return bands


@lru_cache(maxsize=64)
def axis_weights(n_in: int, n_out: int, kernel: Kernel) -> NDArray[np.float64]:
    """The resampling of one axis as a matrix (n_out, n_in) whose rows add up to one."""
    centres = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    reach = 2 if kernel == "cubic" else LANCZOS_LOBES
    first = np.floor(centres).astype(np.int64) - reach + 1
    taps = first[:, None] + np.arange(2 * reach)  # (n_out, taps)
    weights = _kernel_value(np.abs(centres[:, None] - taps), kernel)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out)[:, None], np.clip(taps, 0, n_in - 1)), weights)
    matrix.setflags(write=False)
    return matrix


def _kernel_value(distance: NDArray[np.float64], kernel: Kernel) -> NDArray[np.float64]:
    d = distance
    if kernel == "lanczos":
        return np.where(d < LANCZOS_LOBES, np.sinc(d) * np.sinc(d / LANCZOS_LOBES), 0.0)
    a = CUBIC_A
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def blur_3x3(image: FloatArray) -> FloatArray:
    """Separable (1/4, 1/2, 1/4) blur with mirrored borders, edge pixel not repeated (MIASSR's degradation)."""
    for axis in (-2, -1):
        if image.shape[axis] == 1:
            continue
        width = [(0, 0)] * image.ndim
        width[axis] = (1, 1)
        padded = np.moveaxis(np.pad(image, width, mode="reflect"), axis, -1)
        blurred = 0.25 * padded[..., :-2] + 0.5 * padded[..., 1:-1] + 0.25 * padded[..., 2:]
        image = np.moveaxis(blurred, -1, axis)
    return image


def shrink(image: FloatArray, size: tuple[int, int], *, blur: bool = False) -> FloatArray:
    """The degradation that the networks are trained to undo: cubic down-sampling, then the optional blur."""
    small = resize(image, size, "cubic")
    return blur_3x3(small) if blur else small
