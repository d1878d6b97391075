"""PSNR and SSIM as the RDST and MIASSR papers measure them (data range 1, border removed).

Source: the papers' evaluation (arXiv 2302.11184, section 4.3; dissertation, section 4.4.3): the border of
ceil(scale) pixels is removed on every side, SSIM uses a uniform 7x7 window, the sample covariance, K1 = 0.01
and K2 = 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SSIM_WINDOW = 7
SSIM_K1, SSIM_K2 = 0.01, 0.03
IDENTICAL_DB = 100.0
"""PSNR that is reported for two equal images, whose error has no logarithm."""
DICE_EPSILON = 1e-6

Image = NDArray[np.floating]


def psnr(result: Image, reference: Image, margin: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of two images (rows, columns), peak 1.

    Raises:
        ValueError: nothing is left of the images without their border.
    """
    difference = without_border(result, margin) - without_border(reference, margin)
    if not difference.size:
        msg = f"Nothing is left of {reference.shape} pixels without a border of {margin}."
        raise ValueError(msg)
    return decibels(float(np.mean(np.square(difference, dtype=np.float64))))


def decibels(error: float, peak: float = 1.0) -> float:
    """The PSNR that a mean squared error is, `IDENTICAL_DB` at most."""
    return IDENTICAL_DB if error == 0 else min(10 * math.log10(peak**2 / error), IDENTICAL_DB)


def ssim(result: Image, reference: Image, margin: int = 0) -> float:
    """Mean structural similarity of two images (rows, columns), data range 1.

    Raises:
        ValueError: what is left of the images is smaller than the 7x7 window.
    """
    x = without_border(result, margin).astype(np.float64)
    y = without_border(reference, margin).astype(np.float64)
    if min(x.shape) < SSIM_WINDOW:
        msg = f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {x.shape}."
        raise ValueError(msg)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    n = SSIM_WINDOW**2
    sample = n / (n - 1)
    var_x = sample * (_window_mean(x * x) - mean_x**2)
    var_y = sample * (_window_mean(y * y) - mean_y**2)
    covariance = sample * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scale = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(np.mean(likeness / scale))


def dice(result: NDArray[Any], reference: NDArray[Any], labels: Sequence[int]) -> float:
    """Overlap of label maps of equal shape, from 0 to 1; several labels are counted together, one-hot."""
    shared = sum(int(np.sum((result == label) & (reference == label))) for label in labels)
    either = sum(int(np.sum(result == label)) + int(np.sum(reference == label)) for label in labels)
    return (2 * shared + DICE_EPSILON) / (either + DICE_EPSILON)


def without_border(image: Image, margin: int) -> Image:
    """(rows, columns) less `margin` pixels on every side; empty where there are not so many."""
    rows, columns = image.shape
    return image[margin : max(rows - margin, margin), margin : max(columns - margin, margin)]


def _window_mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over each whole 7x7 window, (rows - 6, columns - 6)."""
    rows, columns = (n - SSIM_WINDOW + 1 for n in image.shape)
    down = np.add.reduce([image[i : i + rows] for i in range(SSIM_WINDOW)])
    across: NDArray[np.float64] = np.add.reduce([down[:, i : i + columns] for i in range(SSIM_WINDOW)])
    return across / SSIM_WINDOW**2
