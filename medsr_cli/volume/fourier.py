"""The centre of k-space: the degradation of Cohf-T, and the intensities that its authors' loader makes.

Source: C. Fang et al., ACM Multimedia 2022, doi 10.1145/3503161.3547804, section 4.1, and the published facts of
the released loader. A slice of N samples along an axis keeps the m lowest of its frequencies, that is the centre
of its shifted transform, and comes back as the magnitude of the inverse transform.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]


def fourier_shrink(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Shrink the last two axes to `size` by keeping the centre of k-space; values keep their level.

    Args:
        image: (..., rows, columns), real; the result is a magnitude, so that nothing in it is negative.
        size: rows and columns of the result, each at least 1 and at most those of the image.

    Returns:
        (..., rows', columns') in the image's float type.

    Raises:
        ValueError: `size` is larger than the image along an axis, or empty.
    """
    kept = _keep_centre(_keep_centre(image, -1, size[1]), -2, size[0])
    result: FloatArray = np.abs(kept).astype(image.dtype, copy=False)
    return result


def _keep_centre(image: NDArray[np.inexact], axis: int, length: int) -> NDArray[np.complexfloating]:
    """The `length` lowest frequencies of one axis, transformed back and scaled by length / N."""
    n = image.shape[axis]
    if not 1 <= length <= n:
        msg = f"An axis of {n} pixels has no {length} lowest frequencies."
        raise ValueError(msg)
    # Frequencies -length//2 ... (length - 1)//2, in the order of an unshifted transform of that length.
    indices = np.fft.ifftshift(np.arange(length) - length // 2) % n
    spectrum = np.take(np.fft.fft(image, axis=axis), indices, axis=axis)
    back: NDArray[np.complexfloating] = np.fft.ifft(spectrum, axis=axis) * (length / n)
    return back


def shrink_as_released(stack: FloatArray, size: tuple[int, int]) -> FloatArray:
    """The released loader's low-resolution slices: `fourier_shrink`, then the whole stack to exactly [0, 1].

    The authors' stack is 4 consecutive slices in training and the whole volume in testing; the high-resolution
    slices are not normalised with it, so that the two differ in scale. A constant stack becomes 0.

    Args:
        stack: (slices, rows, columns) and whatever else shares one range.
        size: rows and columns of the result.
    """
    small = fourier_shrink(stack, size)
    low, high = small.min(), small.max()
    result: FloatArray = (small - low) / (high - low or 1)
    return result


def scale_as_released(t1: FloatArray, t2: FloatArray, low: float, high: float) -> tuple[FloatArray, FloatArray]:
    """The released loader's intensities: (T1 - low) / (high - low) and T2 / (high - low).

    T2 keeps its offset, as it does there.

    Args:
        t1: the guide.
        t2: the image.
        low: smallest value of the volume over all of its channels.
        high: largest value, likewise. A constant volume is divided by 1.
    """
    width = high - low or 1.0
    return (t1 - low) / width, t2 / width
