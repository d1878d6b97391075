"""SSIM with a Gaussian window as M2Trans and Cohf-T measure it, and the luma that M2Trans measures it on.

Sources: Z. Wang et al., IEEE Trans. Image Processing 13(4), 2004 (Gaussian 11x11, deviation 1.5); Z. Ni et al.,
IEEE J-BHI 29(5), 2025, and C. Fang et al., ACM Multimedia 2022, with the published facts of their test programs.
The uniform 7x7 window of RDST and MIASSR is in `metrics`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from medsr_cli.evaluation.metrics import decibels, without_border

WINDOW = 11
DEVIATION_PIXELS = 1.5
K1, K2 = 0.01, 0.03
LUMA_WEIGHTS = (65.481, 128.553, 24.966)
"""ITU-R BT.601, studio range, of RGB in [0, 1]: black 16, white 235 with the offset below."""
LUMA_OFFSET = 16.0
LUMA_OFFSET_AS_RELEASED = 4080.0
"""16 · 255: M2Trans' test program divides by 255 what is in [0, 1] already, adds 16 and multiplies by 255."""
WINDOW_SUM_AS_RELEASED = 1 - 6e-8
"""The authors' window is in single precision and does not quite add up to one. With the offset above, squares of
about 1.7e7 are subtracted from each other, so that this alone moves their SSIM by up to 1e-3."""
COHFT_CHUNK_SLICES = 20
"""Slices that the released Cohf-T test measures together: 155 of them go as seven times 20 and 15."""

Image = NDArray[np.floating]
Doubles = NDArray[np.float64]
Border = Literal["valid", "zero"]


def luma(image: Image) -> Doubles:
    """Y without its offset, (rows, columns) from 0 to 219, of (3, rows, columns) or grey (1, rows, columns) in [0, 1].

    Raises:
        ValueError: neither one nor three channels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        msg = f"Luma needs one or three channels, (C, rows, columns), not {image.shape}."
        raise ValueError(msg)
    weights = np.array(LUMA_WEIGHTS)
    if image.shape[0] == 1:
        grey: Doubles = image[0].astype(np.float64) * weights.sum()
        return grey
    mixed: Doubles = np.tensordot(weights, image.astype(np.float64), 1)
    return mixed


def gaussian_ssim(
    result: Image,
    reference: Image,
    *,
    c1: float = K1**2,
    c2: float = K2**2,
    border: Border = "valid",
    window_sum: float = 1.0,
) -> float:
    """Mean structural similarity of (..., rows, columns) with a Gaussian window, covariances not corrected.

    Args:
        result: any real values.
        reference: of the same shape.
        c1: (K1·range)².
        c2: (K2·range)².
        border: `valid` takes whole windows only; `zero` takes every pixel and zeros beyond the border.
        window_sum: what the weights of the window add up to; other than 1 only to repeat a figure.

    Raises:
        ValueError: shapes differ, or `valid` images are smaller than the window.
    """
    _refuse_shapes(result, reference)
    if border == "valid" and min(result.shape[-2:]) < WINDOW:
        msg = f"SSIM needs images of at least {WINDOW} pixels a side, got {result.shape[-2:]}."
        raise ValueError(msg)
    x, y = result.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y, square_x, square_y, product = (
        window_sum * _window_mean(image, border) for image in (x, y, x * x, y * y, x * y)
    )
    var_x, var_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    scale = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(np.mean(likeness / scale))


def psnr_y(result: Image, reference: Image, margin: int = 0) -> float:
    """PSNR in dB of the luma of (C, rows, columns) in [0, 1], peak 255, `margin` pixels removed (M2Trans)."""
    _refuse_shapes(result, reference)
    difference = without_border(luma(result) - luma(reference), margin)
    if not difference.size:
        msg = f"Nothing is left of {result.shape[-2:]} pixels without a border of {margin}."
        raise ValueError(msg)
    return decibels(float(np.mean(np.square(difference))), peak=255.0)


def ssim_y(result: Image, reference: Image, margin: int = 0) -> float:
    """SSIM of the luma as the tables of M2Trans have it: with an offset of 4080, range 255, border removed.

    The offset makes the luminance term of SSIM practically 1, and lets the rounding of the authors' window into
    the variances, so that values are slightly higher than with `ssim_y_conventional`. Computed in double precision;
    their single precision adds noise of up to 1e-3.

    Args:
        result: (C, rows, columns) in [0, 1], C one or three.
        reference: of the same shape.
        margin: pixels removed on every side.

    Raises:
        ValueError: other channels, or less than the 11x11 window is left.
    """
    return _ssim_of_luma(result, reference, margin, LUMA_OFFSET_AS_RELEASED, WINDOW_SUM_AS_RELEASED)


def ssim_y_conventional(result: Image, reference: Image, margin: int = 0) -> float:
    """SSIM of the luma from 16 to 235, as everybody else measures it; else as `ssim_y`."""
    return _ssim_of_luma(result, reference, margin, LUMA_OFFSET)


def cohft_ssim(result: Image, reference: Image) -> float:
    """SSIM as Cohf-T's loss and test have it: zeros beyond the border, C1 = 1e-4, C2 = 9e-4, mean over all pixels.

    Args:
        result: (..., rows, columns) in about [0, 1], of any size; several slices are a chunk and are averaged.
        reference: of the same shape.
    """
    return gaussian_ssim(result, reference, c1=1e-4, c2=9e-4, border="zero")


def cohft_psnr(result: Image, reference: Image) -> float:
    """PSNR in dB, peak 1, of the squared error of everything that is given at once: a slice, or a chunk of slices."""
    _refuse_shapes(result, reference)
    return decibels(float(np.mean(np.square(result.astype(np.float64) - reference.astype(np.float64)))))


def chunks(slices: int, most: int = COHFT_CHUNK_SLICES) -> list[slice]:
    """The chunks of a volume of so many slices, in order, all of them of `most` slices but the last."""
    return [slice(start, min(start + most, slices)) for start in range(0, slices, most)]


def _ssim_of_luma(result: Image, reference: Image, margin: int, offset: float, window_sum: float = 1.0) -> float:
    _refuse_shapes(result, reference)
    x, y = (without_border(luma(image) + offset, margin) for image in (result, reference))
    return gaussian_ssim(x, y, c1=(K1 * 255) ** 2, c2=(K2 * 255) ** 2, window_sum=window_sum)


def _refuse_shapes(result: Image, reference: Image) -> None:
    if result.shape != reference.shape or result.ndim < 2:
        msg = f"Images of shapes {result.shape} and {reference.shape} cannot be compared."
        raise ValueError(msg)


@lru_cache(maxsize=1)
def _gaussian() -> Doubles:
    """The 11 weights of one axis; they add up to one."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION_PIXELS**2))
    normalised: Doubles = weights / weights.sum()
    normalised.setflags(write=False)
    return normalised


def _window_mean(image: Doubles, border: Border) -> Doubles:
    """Weighted mean around each pixel: (..., rows, columns), or 10 fewer of each with `valid`."""
    across = correlate1d(image, _gaussian(), axis=-1, mode="constant")
    mean: Doubles = correlate1d(across, _gaussian(), axis=-2, mode="constant")
    reach = WINDOW // 2
    return mean if border == "zero" else mean[..., reach:-reach, reach:-reach]
