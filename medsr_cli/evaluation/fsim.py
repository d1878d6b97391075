"""Feature similarity: phase congruency and gradients of a result against those of its reference.

L. Zhang, L. Zhang, X. Mou, D. Zhang, "FSIM: a feature similarity index for image quality assessment", IEEE Trans.
Image Processing 20(8), 2011. Phase congruency after P. Kovesi, "Image features from phase congruency", Videre 1(3),
1999: log-Gabor filters at four scales and four orientations, energy above an estimated noise threshold. The numbers
are those with which M2Trans' tables were made. 1 for equal images; higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import correlate1d

SCALES = 4
ORIENTATIONS = 4
SHORTEST_WAVE = 6.0
"""Wavelength in pixels of the finest filter; each further one has twice that of the one before."""
SCALE_FACTOR = 2.0
BANDWIDTH = 0.55
"""Deviation of the log-Gabor's transfer function over its centre frequency, σ_f."""
ANGLE_RATIO = 1.2
"""Angle between neighbouring orientations over the angular deviation of the filters."""
NOISE_DEVIATIONS = 2.0
"""Deviations of the noise's energy above its mean up to which energy is taken for noise, k."""
NOISE_CORRECTION = 1.7
"""Empirical divisor of that threshold, from Kovesi's program."""
PHASE_CONSTANT, GRADIENT_CONSTANT, COLOUR_CONSTANT = 0.85, 160.0, 200.0
"""T1, T2 and T3 = T4, for images from 0 to 255."""
COLOUR_POWER = 0.03
"""λ, the weight of the chrominance."""
SCHARR = (3 / 16, 10 / 16, 3 / 16)
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
SMALLEST_SIDE = 8

Image = NDArray[np.floating]
Doubles = NDArray[np.float64]


def fsim(result: Image, reference: Image) -> float:
    """FSIM of two images in [0, 1], (rows, columns) or (C, rows, columns); with three channels FSIM_C of RGB.

    Images whose shorter side is 384 pixels or more are reduced first, to about 256, by means of whole blocks.

    Returns:
        From 0 to 1; NaN where neither image has any phase congruency, as constant ones.

    Raises:
        ValueError: shapes differ, neither one nor three channels, or sides shorter than 8 pixels.
    """
    if min(result.shape[-2:]) < SMALLEST_SIDE:
        msg = f"FSIM needs images of at least {SMALLEST_SIDE} pixels a side, got {result.shape[-2:]}."
        raise ValueError(msg)
    x, y = (_reduced(255 * image) for image in luminance_chrominance(result, reference))
    phase_x, phase_y = phase_congruency(x[0]), phase_congruency(y[0])
    alike = similarity(phase_x, phase_y, PHASE_CONSTANT)
    alike *= similarity(gradient_magnitude(x[0], SCHARR), gradient_magnitude(y[0], SCHARR), GRADIENT_CONSTANT)
    if len(x) == 3:
        colour = similarity(x[1], y[1], COLOUR_CONSTANT) * similarity(x[2], y[2], COLOUR_CONSTANT)
        alike *= np.abs(colour) ** COLOUR_POWER
    weight = np.maximum(phase_x, phase_y)
    total = float(weight.sum())
    return float((alike * weight).sum()) / total if total > 0 else math.nan


def similarity(a: Doubles, b: Doubles, constant: float) -> Doubles:
    """(2ab + c) / (a² + b² + c) at every pixel: 1 where both are equal."""
    alike: Doubles = (2 * a * b + constant) / (a * a + b * b + constant)
    return alike


def gradient_magnitude(image: Doubles, smoothing: Sequence[float]) -> Doubles:
    """Magnitude of the central differences, smoothed across by three weights; zeros beyond the border.

    Differences are x(i + 1) - x(i - 1), not halved.
    """
    difference = (-1.0, 0.0, 1.0)
    across = correlate1d(correlate1d(image, difference, -1, mode="constant"), smoothing, -2, mode="constant")
    down = correlate1d(correlate1d(image, difference, -2, mode="constant"), smoothing, -1, mode="constant")
    magnitude: Doubles = np.hypot(across, down)
    return magnitude


def luminance_chrominance(result: Image, reference: Image) -> tuple[Doubles, Doubles]:
    """Both images as YIQ (3, rows, columns) of RGB, or as (1, rows, columns) of grey ones.

    Raises:
        ValueError: shapes differ, or neither one nor three channels.
    """
    if result.shape != reference.shape or result.ndim not in (2, 3) or (result.ndim == 3 and len(result) not in (1, 3)):
        msg = f"Images of shapes {result.shape} and {reference.shape} are no pair of grey or RGB images."
        raise ValueError(msg)
    pair = [image.astype(np.float64).reshape(-1, *image.shape[-2:]) for image in (result, reference)]
    if len(pair[0]) == 3:
        pair = [np.tensordot(YIQ, image, 1) for image in pair]
    return pair[0], pair[1]


def phase_congruency(image: Doubles) -> Doubles:
    """Phase congruency of (rows, columns) in [0, 255]: from 0, where waves of all phases meet, to 1 on features.

    At each orientation the filters' complex responses are added up; what lies along their mean direction, less what
    lies across it and less the noise threshold, is energy. It is divided by the sum of all amplitudes (Kovesi).
    """
    rows, columns = image.shape
    bank = _filter_bank(rows, columns)
    spectrum = fft.fft2(image)
    energy, amplitudes = np.zeros(image.shape), np.zeros(image.shape)
    for filters, noise in zip(bank.filters, bank.noise, strict=True):
        responses = fft.ifft2(spectrum * filters)  # (scales, rows, columns), complex
        amplitude = np.abs(responses)
        amplitudes += amplitude.sum(axis=0)
        total = responses.sum(axis=0)
        mean = total / (np.abs(total) + 1e-12)
        turned = responses * np.conj(mean)
        above = (turned.real - np.abs(turned.imag)).sum(axis=0)
        # Rayleigh-distributed noise: its mean power follows from the median of the finest filter's response.
        power = float(np.median(amplitude[0] ** 2)) / math.log(2) * noise
        tau = math.sqrt(power / 2)
        threshold = tau * (math.sqrt(math.pi / 2) + NOISE_DEVIATIONS * math.sqrt(2 - math.pi / 2)) / NOISE_CORRECTION
        energy += np.maximum(above - threshold, 0)
    congruency: Doubles = energy / (amplitudes + 1e-12)
    return congruency


@dataclass(frozen=True)
class _FilterBank:
    """Transfer functions for one image size."""

    filters: tuple[Doubles, ...]
    """(scales, rows, columns) for each orientation, zero frequency first."""
    noise: tuple[float, ...]
    """For each orientation the energy of the sum of all filters' responses to noise whose response of the finest
    filter has mean power 1."""


@lru_cache(maxsize=8)
def _filter_bank(rows: int, columns: int) -> _FilterBank:
    radius, angle = _frequencies(rows, columns)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    radial = []
    for scale in range(SCALES):
        centre = 1 / (SHORTEST_WAVE * SCALE_FACTOR**scale)
        log_gabor = np.exp(-(np.log(radius / centre) ** 2) / (2 * math.log(BANDWIDTH) ** 2)) * low_pass
        log_gabor[0, 0] = 0
        radial.append(log_gabor)
    filters, noise = [], []
    for orientation in range(ORIENTATIONS):
        filters.append(np.stack(radial) * _spread(angle, orientation * math.pi / ORIENTATIONS))
        noise.append(_noise_energy(filters[-1]))
    return _FilterBank(tuple(filters), tuple(noise))


def _frequencies(rows: int, columns: int) -> tuple[Doubles, Doubles]:
    """Radius in cycles per pixel, 1 at zero frequency instead of 0, and angle, each (rows, columns)."""
    # Kovesi's grid: steps of 1/N for even and 1/(N - 1) for odd lengths, so that odd ones reach 1/2 too.
    axes = [
        np.arange(-(n // 2), (n + 1) // 2) / n if n % 2 == 0 else np.arange(-(n // 2), n // 2 + 1) / (n - 1)
        for n in (rows, columns)
    ]
    y, x = np.meshgrid(*axes, indexing="ij")
    radius, angle = fft.ifftshift(np.hypot(x, y)), fft.ifftshift(np.arctan2(-y, x))
    radius[0, 0] = 1
    return radius, angle


def _spread(angle: Doubles, towards: float) -> Doubles:
    """Gaussian of the angular distance to an orientation."""
    deviation = math.pi / ORIENTATIONS / ANGLE_RATIO
    distance = np.abs(np.angle(np.exp(1j * (angle - towards))))
    spread: Doubles = np.exp(-(distance**2) / (2 * deviation**2))
    return spread


def _noise_energy(filters: Doubles) -> float:
    """2 Σ a_i² + 4 Σ a_i·a_j over pairs of scales, a the real impulse responses, over the finest filter's energy."""
    impulse = fft.ifft2(filters).real * math.sqrt(filters[0].size)
    products = np.tensordot(impulse, impulse, ([1, 2], [1, 2]))  # (scales, scales)
    # All products but those on the diagonal stand there twice.
    return float(2 * products.sum() / np.square(filters[0]).sum())


def _reduced(image: Doubles) -> Doubles:
    """Means of k x k blocks, k the shorter side over 256, rounded; what does not fill a block is left out."""
    k = max(1, round(min(image.shape[-2:]) / 256))
    if k == 1:
        return image
    channels, rows, columns = image.shape[0], image.shape[1] // k, image.shape[2] // k
    blocks = image[:, : rows * k, : columns * k].reshape(channels, rows, k, columns, k)
    mean: Doubles = blocks.mean(axis=(2, 4))
    return mean
