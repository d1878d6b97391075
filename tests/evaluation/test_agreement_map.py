"""Blocks of a result that contradict the input: scores against brute force, broken results, calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from medsr_cli.evaluation.agreement_map import (
    BLOCK,
    DEFAULT_LIMIT,
    FLOOR,
    LOWEST_LIMIT,
    MARGIN,
    MOST_NAMED,
    Limit,
    LocalAgreement,
    block_scores,
    calibrate,
    limit_of_json,
)
from medsr_cli.evaluation.consistency import Consistency
from medsr_cli.volume.degradation import BICUBIC_ANTIALIASED, CUBIC, CUBIC_BLUR, DEGRADATIONS
from medsr_cli.volume.resample import resize

SCALE = 4


def anatomy(seed: int, n: int = 40, noise: float = 0.01) -> np.ndarray:
    """(1, n, n) in [0, 1]: a head of smooth tissue in a dark, noisy background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:n, :n] / n - 0.5
    inside = (y / 0.42) ** 2 + (x / 0.36) ** 2 < 1
    tissue = 0.35 + 0.5 * resize(rng.random((9, 9)), (n, n))
    return np.clip(inside * tissue + rng.normal(0, noise, (n, n)), 0, 1)[None]


def faithful(given: np.ndarray) -> np.ndarray:
    return resize(given, (given.shape[1] * SCALE, given.shape[2] * SCALE))


@settings(max_examples=30, deadline=None)
@drawn(
    rows=st.integers(1, 14), columns=st.integers(1, 14), channels=st.sampled_from([1, 3]), seed=st.integers(0, 10_000)
)
def test_scores_are_what_the_formula_says(rows: int, columns: int, channels: int, seed: int):
    rng = np.random.default_rng(seed)
    x, again = rng.random((2, channels, rows, columns))
    scores = block_scores(x, again)
    high, wide = min(BLOCK, rows), min(BLOCK, columns)
    assert scores.shape == (rows - high + 1, columns - wide + 1)
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            a, b = (v[:, row : row + high, column : column + wide] for v in (x, again))
            deviation = math.sqrt(np.mean([channel.var() for channel in a]))
            expected = math.sqrt(np.mean((a - b) ** 2)) / (FLOOR + deviation)
            assert scores[row, column] == pytest.approx(expected, abs=1e-9)


def test_bright_flat_blocks_keep_their_digits():
    """Variances come from differences of means: about zero they must not become 1e-8 of a large square."""
    x = np.full((1, 400, 400), 0.9999999)
    assert block_scores(x, x + 1e-6).max() == pytest.approx(1e-6 / FLOOR, rel=1e-4)


def calibrated() -> Limit:
    return calibrate((anatomy(seed), faithful(anatomy(seed))) for seed in range(20))


def disc(result: np.ndarray, row: int, column: int, radius: float, size: float) -> np.ndarray:
    y, x = np.mgrid[: result.shape[1], : result.shape[2]]
    return result + size * ((y - row) ** 2 + (x - column) ** 2 < (radius * SCALE) ** 2)


def chessboard(result: np.ndarray, size: float) -> np.ndarray:
    y, x = np.mgrid[: result.shape[1], : result.shape[2]] // SCALE
    return result + size * np.where((x + y) % 2, 1, -1)


BROKEN = {
    "an invented disc": lambda r: disc(r, 80, 90, 2.5, 0.15),
    "a missing disc": lambda r: disc(r, 60, 70, 2.5, -0.15),
    "shifted by a pixel": lambda r: np.roll(r, SCALE, axis=2),
    "shifted down": lambda r: np.roll(r, SCALE, axis=1),
    "mirrored": lambda r: r[:, :, ::-1],
    "upside down": lambda r: r[:, ::-1],
    "a chessboard": lambda r: chessboard(r, 0.05),
    "one bad tile": lambda r: np.concatenate([r[:, :, :120], r[:, :, 120:] + 0.05], axis=2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_slices_are_flagged_and_others_are_not(name: str):
    limit = calibrated()
    seen = LocalAgreement(limit)
    for number in range(12):
        given = anatomy(100 + number)
        result = faithful(given)
        if number == 7:
            result = BROKEN[name](result)
        seen.add(given, CUBIC.down(result, (40, 40)), number)
    assert seen.flagged == [7], seen.report()
    assert "in 1 of 12 slices, most in slice 8 " in seen.sentence


def test_the_place_is_that_of_the_disc():
    given = anatomy(3)
    seen = LocalAgreement(calibrated())
    seen.add(given, CUBIC.down(disc(faithful(given), 100, 60, 2, 0.3), (40, 40)), 0)
    assert seen.worst is not None
    _, row, column = seen.worst
    assert abs(row - 25) <= BLOCK / 2
    assert abs(column - 15) <= BLOCK / 2
    assert seen.report()["worst"] == {"slice": 1, "row": row + 1, "column": column + 1}


def test_good_slices_of_other_images_pass():
    limit = calibrated()
    seen = LocalAgreement(limit)
    for number in range(60):
        given = anatomy(500 + number, noise=0.02)
        seen.add(given, CUBIC.down(faithful(given), (40, 40)), number)
    assert seen.n_flagged == 0
    assert seen.sentence == ""


def test_the_limit_is_a_margin_above_what_was_seen():
    pairs = [(anatomy(seed), disc(faithful(anatomy(seed)), 80, 80, 3, 0.3)) for seed in range(10)]
    largest = [block_scores(given, CUBIC.down(result, (40, 40))).max() for given, result in pairs]
    limit = calibrate(pairs)
    assert limit.value == pytest.approx(MARGIN * np.percentile(largest, 99.9), abs=1e-4)
    assert (limit.slices, limit.largest_seen) == (10, pytest.approx(max(largest), abs=1e-4))
    flat = [(given[0], result[0]) for given, result in pairs]
    assert calibrate([*flat, (np.zeros((9, 9)), np.ones((36, 36)))]) == limit
    assert calibrated().value >= LOWEST_LIMIT


@pytest.mark.parametrize("degradation", [CUBIC_BLUR, BICUBIC_ANTIALIASED, DEGRADATIONS["band-limited"]])
def test_calibration_goes_down_as_the_checkpoint_does(degradation):
    given, result = anatomy(1), disc(faithful(anatomy(1)), 80, 80, 3, 0.3)
    expected = block_scores(given, degradation.down(result, (40, 40))).max()
    assert calibrate([(given, result)], degradation).largest_seen == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_calibrated_has_the_default():
    assert calibrate([]) == Limit()
    assert calibrate([(anatomy(1), faithful(anatomy(1)) * np.nan)]).value == DEFAULT_LIMIT


@pytest.mark.parametrize(
    "text",
    [None, "", "null", "[]", "3", '"limit"', "{", '{"limit": 0.2}', '{"limit": NaN, "slices": 3}',
     '{"limit": 0, "slices": 3}', '{"limit": 1e9, "slices": 3}', '{"limit": 0.2, "slices": 0}',
     '{"limit": [1], "slices": 3}', '{"limit": 0.2, "slices": 1e999}',
     '{"limit": 0.2, "slices": 3, "largest_seen": {}}'],
)  # fmt: skip
def test_a_damaged_limit_is_the_default(text):
    assert limit_of_json(text) == Limit()


def test_a_limit_survives_a_checkpoints_metadata():
    limit = Limit(0.3125, 232, 0.25)
    assert limit_of_json(limit.to_json()) == limit


def test_a_result_that_is_not_a_number_is_flagged():
    seen = LocalAgreement(Limit())
    seen.add(anatomy(1), anatomy(1) * np.nan, 0)
    assert seen.n_flagged == 1


def test_a_report_stays_short():
    seen = LocalAgreement(Limit(0.2, 5))
    for number in range(200):
        seen.add(anatomy(1), anatomy(1) + 0.3, number)
    assert len(seen.report()["flagged"]) == MOST_NAMED
    assert seen.report()["flagged_slices"] == 200
    assert "than in any validation image in 200 of 200 slices" in seen.sentence


def test_consistency_hands_out_the_map_and_keeps_the_limit():
    given = anatomy(2)
    result = disc(faithful(given), 100, 60, 2, 0.3)
    seen = Consistency(CUBIC_BLUR, Limit(0.2, 9, 0.1))
    shown = seen.add(given, result, 4)
    np.testing.assert_allclose(shown, np.abs(CUBIC_BLUR.down(result, (40, 40)) - given))
    local = seen.report(100.0)["local"]
    assert (local["limit"], local["limit_from_slices"], local["flagged"]) == (0.2, 9, [5])
