"""The gate that every result passes: broken ones fail, also those that their own degradation cannot see."""

from __future__ import annotations

import numpy as np
import pytest

from medsr_cli.errors import QualityGateFailed
from medsr_cli.evaluation.consistency import CORRELATION_LIMIT, Consistency
from medsr_cli.volume.degradation import CUBIC, CUBIC_BLUR
from medsr_cli.volume.resample import resize


def image(seed: int = 0) -> np.ndarray:
    return np.clip(resize(np.random.default_rng(seed).random((1, 9, 9)), (32, 32)), 0, 1)


def chessboard(n: int) -> np.ndarray:
    """Highest frequency of the input, on a grid twice as fine."""
    signs = np.where((np.arange(n) // 2) % 2 == 0, 1.0, -1.0)
    return signs[:, None] * signs[None, :]


def test_a_faithful_result_agrees():
    seen = Consistency(CUBIC_BLUR)
    given = image()
    seen.add(given, resize(given, (64, 64)), 0)
    assert seen.correlation > 0.98
    report = seen.report(100.0)
    assert report["degradation"] == "cubic-blur"
    assert report["overshoot_share_of_range"] < 0.2
    assert Consistency(CUBIC).plain is not None


def test_what_a_blur_takes_away_again_is_seen_by_the_cubic():
    """A network trained to undo a blur, on an image that was not blurred: seen once, in a picture."""
    given = image()
    result = resize(given, (64, 64)) + 0.4 * chessboard(64)
    seen = Consistency(CUBIC_BLUR)
    seen.add(given, result, 0)
    assert seen.own.correlation > 0.9
    assert seen.correlation < CORRELATION_LIMIT


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r: r + 3 * chessboard(64), "far beyond"),
        (lambda r: r * np.nan, "not numbers"),
        (lambda r: r * 0 + r.mean(), "constant"),
        (lambda r: r + 0.2, "moved by 20%"),
    ],
)
def test_broken_results_fail(spoil, said):
    given = image()
    with pytest.raises(QualityGateFailed, match=said):
        Consistency().add(given, spoil(resize(given, (64, 64))), 3)


def test_single_bright_points_may_overshoot():
    given = image()
    result = resize(given, (64, 64))
    result[0, 5, 5] = 2.5
    seen = Consistency()
    seen.add(given, result, 0)
    assert seen.largest_overshoot == pytest.approx(1.5)
