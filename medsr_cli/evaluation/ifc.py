"""Information fidelity criterion: how much of a reference's information a result still carries, bits per pixel.

H. R. Sheikh, A. C. Bovik, G. de Veciana, "An information fidelity criterion for image quality assessment using
natural scene statistics", IEEE Trans. Image Processing 14(12), 2005, scalar model. The coefficients of a wavelet
subband of the reference are C = S·U (U Gaussian, S the local deviation); those of the result D = g·C + V (V Gaussian
noise). The information that D gives about C where S is known is

    IFC = Σ over subbands and coefficients of ½ log2(1 + g² s² / σ_V²),   (paper, equation 10)

here divided by the number of pixels. Subbands: vertical and horizontal ones of a steerable pyramid (J. Portilla,
E. Simoncelli, Int. J. Computer Vision 40(1), 2000) of six orientations and four scales. s² is the mean square of 3x3
reference coefficients; g and σ_V come from a linear regression in a window of 17, 9, 5 and 3 coefficients, finest
scale first, about the same part of the image at every scale.

What the paper leaves open (the pyramid in the frequency domain, the windows, the border) is chosen here [ours] and
changes the values, and the program that other papers measure with has a vector model. Compare values of this function
with each other only.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import uniform_filter

from medsr_cli.evaluation.structure import LUMA_OFFSET, luma

LEVELS = 4
ORIENTATIONS = 6
TAKEN = (0, 3)
"""Numbers of the two orientations that are taken: gradients across rows and across columns."""
WINDOWS = (17, 9, 5, 3)
"""Side of the regression's window at each level, finest first, in coefficients."""
NEIGHBOURHOOD = 3
"""Side of the window that s² is taken over."""
LEAST_NOISE = 1e-10
"""Smallest σ_V², for images from 0 to 255: what makes the IFC of two equal images finite, about 40."""
PADDING = 16
"""Mirrored pixels around the image, a multiple of 2^(LEVELS - 1)."""
SMALLEST_SIDE = 32

Image = NDArray[np.floating]
Doubles = NDArray[np.float64]


def ifc(result: Image, reference: Image) -> float:
    """IFC in bits per pixel of a result against its reference, each (rows, columns) or (C, rows, columns) in [0, 1].

    Colour images are compared in luma. 0 where the reference is constant, or where nothing of it is left; it has no
    upper end, and that of two equal images depends on the image.

    Raises:
        ValueError: shapes differ, neither one nor three channels, or sides shorter than 32 pixels.
    """
    if result.shape != reference.shape or min(result.shape[-2:]) < SMALLEST_SIDE:
        msg = f"IFC needs two equally large images of at least {SMALLEST_SIDE} pixels a side, got {result.shape}."
        raise ValueError(msg)
    x, y = (_full_range(image) for image in (reference, result))
    bits = 0.0
    for window, band_x, band_y in zip(_band_windows(), subbands(x), subbands(y), strict=True):
        bits += _information(band_x, band_y, window)
    return bits / x.size


def subbands(image: Doubles) -> list[Doubles]:
    """The taken subbands of (rows, columns), finest level first: (rows / 2^l, columns / 2^l), rounded up.

    Mirrored at the borders, half-sample symmetric.
    """
    rows, columns = image.shape
    step = 2 ** (LEVELS - 1)
    padded = np.pad(image, [(PADDING, PADDING + -n % step) for n in (rows, columns)], mode="symmetric")
    spectrum = fft.fft2(padded)
    found = []
    for level in range(LEVELS):
        factor, start = 2**level, PADDING >> level
        inside = tuple(slice(start, start + math.ceil(n / factor)) for n in (rows, columns))
        small = _centre(spectrum, factor)
        for orientation in TAKEN:
            transfer = band_transfer(padded.shape, level, orientation)
            # Imaginary and odd, so that the coefficients are real: six orientations are fifth derivatives.
            band = fft.ifft2(small * transfer).real / factor**2
            found.append(band[inside])
    return found


@lru_cache(maxsize=32)
def band_transfer(size: tuple[int, int], level: int, orientation: int) -> NDArray[np.complex128]:
    """Transfer function of one subband, zero frequency first, on the grid of its level (size / 2^level).

    A band-pass of one octave around π / 2^(level + 1), raised cosine of the octave's logarithm on both sides, times
    α·(i cos(θ - πk/6))^5. The squares of all bands and of the residues add up to one.
    """
    factor = 2**level
    rows, columns = (2 * np.pi * fft.fftfreq(n // factor) / factor for n in size)
    radius, angle = np.hypot(rows[:, None], columns), np.arctan2(rows[:, None], columns)
    radius[0, 0] = 1e-9
    octave = np.log2(radius / np.pi) + level
    order = ORIENTATIONS - 1
    scale = 2**order * math.factorial(order) / math.sqrt(ORIENTATIONS * math.factorial(2 * order))
    along = np.cos(angle - np.pi * orientation / ORIENTATIONS)
    transfer: NDArray[np.complex128] = 1j**order * scale * along**order * _high(octave + 1) * _low(octave)
    transfer.setflags(write=False)
    return transfer


def _high(octave: Doubles) -> Doubles:
    """0 one octave below and further, 1 at octave 0 and above, cosine of the octave between."""
    high: Doubles = np.cos(np.pi / 2 * np.clip(octave, -1, 0))
    return high


def _low(octave: Doubles) -> Doubles:
    """What is left beside `_high`: the squares of both add up to one."""
    low: Doubles = np.sqrt(np.clip(1 - _high(octave) ** 2, 0, None))
    return low


def _centre(spectrum: NDArray[np.complex128], factor: int) -> NDArray[np.complex128]:
    """The lowest frequencies of a spectrum whose sides are multiples of the factor, zero frequency first."""
    kept: NDArray[np.complex128] = spectrum
    for axis, n in enumerate(spectrum.shape):
        length = n // factor
        kept = np.take(kept, fft.ifftshift(np.arange(length) - length // 2) % n, axis=axis)
    return kept


def _band_windows() -> list[int]:
    return [window for window in WINDOWS for _ in TAKEN]


def _information(x: Doubles, y: Doubles, window: int) -> float:
    """Σ ½ log2(1 + g² s² / σ_V²) over the coefficients of a band whose window lies inside it."""
    square_x, square_y, product = (_inside(values, window, window) for values in (x * x, y * y, x * y))
    mean_x, mean_y = (_inside(values, window, window) for values in (x, y))
    var_x, var_y = np.maximum(square_x - mean_x**2, 0), np.maximum(square_y - mean_y**2, 0)
    covariance = product - mean_x * mean_y
    # A window whose result runs against its reference carries nothing of it: all of it is noise.
    gain = np.where(var_x > LEAST_NOISE, np.maximum(covariance, 0) / np.maximum(var_x, LEAST_NOISE), 0)
    noise = np.maximum(var_y - gain * covariance, LEAST_NOISE)
    local = _inside(x * x, NEIGHBOURHOOD, window)
    return float(0.5 * np.log2(1 + gain**2 * local / noise).sum())


def _inside(values: Doubles, side: int, window: int) -> Doubles:
    """Means over side x side coefficients, where the larger `window` fits into the band."""
    reach = window // 2
    mean: Doubles = uniform_filter(values, side)[reach : values.shape[0] - reach, reach : values.shape[1] - reach]
    return mean


def _full_range(image: Image) -> Doubles:
    """Grey values times 255, or luma of colour: (rows, columns)."""
    if image.ndim == 3 and image.shape[0] == 3:
        return luma(image) + LUMA_OFFSET
    if image.ndim == 3 and image.shape[0] != 1:
        msg = f"IFC needs one or three channels, (C, rows, columns), not {image.shape}."
        raise ValueError(msg)
    return 255.0 * image.reshape(image.shape[-2:]).astype(np.float64)
