"""What --scale and --spacing mean for an image."""

from __future__ import annotations

import numpy as np
import pytest

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.tasks.magnification import Magnification, in_words
from medsr_cli.volume.volume import Volume

VOLUME = Volume("nifti", 40, 36, 6, np.dtype(np.int16), spacing_mm=(0.9, 0.8))


@pytest.mark.parametrize(
    ("text", "factors", "label"),
    [("4", (4, 4), "x4"), ("2.7", (2.7, 2.7), "x2.7"), ("2x3", (2, 3), "x2x3"), ("1,2.5", (1, 2.5), "x1x2.5")],
)
def test_scales(text, factors, label):
    asked = Magnification.parse(text)
    assert asked.of(VOLUME) == factors
    assert asked.label == label


@pytest.mark.parametrize("text", ["", "four", "1", "0.5", "1x1", "2x", "2x3x4", "nan", "inf", "9", "-2", "0x2"])
def test_no_scales(text):
    with pytest.raises(ArgumentsError, match="--scale"):
        Magnification.parse(text)


def test_spacing_is_for_each_axis_by_itself():
    asked = Magnification.parse("4", 0.4)
    assert asked.of(VOLUME) == pytest.approx((2.25, 2.0))
    assert asked.label == "0.4mm"
    assert Magnification.parse("4", 0.8).of(VOLUME) == pytest.approx((1.125, 1))


@pytest.mark.parametrize(("spacing", "said"), [(0.85, "not all coarser"), (0.9, "not all"), (0.01, "more than 8")])
def test_spacings_that_do_not_enlarge(spacing, said):
    with pytest.raises(InputRefused, match=said):
        Magnification.parse("4", spacing).of(VOLUME)


def test_an_image_without_spacing_cannot_be_brought_to_one():
    plain = Volume("png", 40, 36, 1, np.dtype(np.uint8))
    with pytest.raises(InputRefused, match="does not say"):
        Magnification.parse("4", 0.5).of(plain)
    for spacing in (0.0, -1.0, float("nan")):
        with pytest.raises(ArgumentsError):
            Magnification.parse("4", spacing)


def test_words():
    assert in_words((4, 4)) == "4"
    assert in_words((2, 2.5)) == "2 x 2.5"
