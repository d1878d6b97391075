"""How low-resolution images come about: the degradations that checkpoints are trained to undo, by name.

A checkpoint's card names its degradation. Back projection and the consistency of every run go down by it and
up again, so that a result is compared with its input on that input's own terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.antialias import antialiased_resize
from medsr_cli.volume.band_limited import band_limited_resize
from medsr_cli.volume.resample import blur_3x3, resize

FloatArray = NDArray[np.floating]
Resize = Callable[[FloatArray, tuple[int, int]], FloatArray]


@dataclass(frozen=True)
class Degradation:
    """A way down to a smaller grid, and the enlargement that belongs to it."""

    name: str
    title: str
    down: Resize
    """(..., rows', columns') and the size of the result to (..., rows, columns)."""
    up: Resize
    first_centres: bool = False
    """The networks were trained on images whose first pixel's centre stays where it was, not its edge: pixel j of
    the small image lies at s·j of the large one. Their inputs have to be moved to there."""


def _cubic(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    return resize(image, size, "cubic")


def _cubic_blur(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    return blur_3x3(resize(image, size, "cubic"))


CUBIC = Degradation("cubic", "cubic of a = -0.75, nothing smoothed before (RDST)", _cubic, _cubic)
CUBIC_BLUR = Degradation(
    "cubic-blur", "the same, then a 3x3 blur of (1/4, 1/2, 1/4) (MIASSR, section 4.3)", _cubic_blur, _cubic
)
BICUBIC_ANTIALIASED = Degradation(
    "bicubic-antialiased", "bicubic of a = -0.5, widened by the factor (M2Trans, ultrasound CycleGAN)",
    antialiased_resize, antialiased_resize,
)  # fmt: skip
BAND_LIMITED = Degradation(
    "band-limited", "the centre of k-space, borders mirrored, edges aligned", band_limited_resize, band_limited_resize
)
FOURIER = Degradation(
    "fourier", "the centre of k-space as Cohf-T's authors crop it (section 4.1)",
    band_limited_resize, band_limited_resize, first_centres=True,
)  # fmt: skip

DEGRADATIONS = {item.name: item for item in (CUBIC, CUBIC_BLUR, BICUBIC_ANTIALIASED, BAND_LIMITED, FOURIER)}


def degradation_named(name: str | None) -> Degradation:
    """The degradation of a card; the cubic where a card names none or one that is not known here."""
    return DEGRADATIONS.get(name or "", CUBIC)
