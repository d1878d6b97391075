"""Gradient magnitude similarity deviation: how unevenly a result's gradients depart from those of its reference.

W. Xue, L. Zhang, X. Mou, A. C. Bovik, "Gradient magnitude similarity deviation: a highly efficient perceptual image
quality index", IEEE Trans. Image Processing 23(2), 2014, in the form that M2Trans' tables use: luminance of YIQ in
[0, 1], 2x2 means, Prewitt gradients with zeros beyond the border. 0 for equal images; lower is better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medsr_cli.evaluation.fsim import gradient_magnitude, luminance_chrominance, similarity

CONSTANT = 170 / 255**2
"""The paper's c = 170 for images up to 255."""
SMALLEST_SIDE = 2
PREWITT = (1 / 3, 1 / 3, 1 / 3)

Image = NDArray[np.floating]


def gmsd(result: Image, reference: Image) -> float:
    """GMSD of two images in [0, 1], (rows, columns) or (C, rows, columns) with one or three channels.

    Constant images have equal gradients but for the border, where zeros follow.

    Raises:
        ValueError: shapes differ, other channels, or sides shorter than 2 pixels.
    """
    if min(result.shape[-2:]) < SMALLEST_SIDE:
        msg = f"GMSD needs images of at least {SMALLEST_SIDE} pixels a side, got {result.shape[-2:]}."
        raise ValueError(msg)
    x, y = (_halved(image[0]) for image in luminance_chrominance(result, reference))
    alike = similarity(gradient_magnitude(x, PREWITT), gradient_magnitude(y, PREWITT), CONSTANT)
    return float(np.std(alike))


def _halved(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """2x2 means; one row and one column of zeros are added where either side is odd, as in piq 0.8.0."""
    extra = max(image.shape[0] % 2, image.shape[1] % 2)
    padded = np.pad(image, ((0, extra), (0, extra)))
    rows, columns = (n // 2 * 2 for n in padded.shape)
    whole = padded[:rows, :columns]
    mean: NDArray[np.float64] = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
    return mean
