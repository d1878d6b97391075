"""Means, bootstrap intervals by subject whose coverage holds on simulated data, and the paired test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medsr_cli.evaluation.statistics import Row, bootstrap_interval, means_by, paired_test, summarise


def rows(values: dict[str, list[float | None]], metric: str = "psnr") -> list[Row]:
    return [
        Row(subject, "t1.nii", number, {metric: value})
        for subject, listed in values.items()
        for number, value in enumerate(listed)
    ]


def test_means_and_deviations():
    found = summarise(rows({"a": [30.0, 32.0, None], "b": [40.0], "c": [math.nan, math.inf]}), "psnr")
    assert (found.slices, found.unmeasured, found.subjects) == (3, 3, 2)
    assert found.mean == pytest.approx(34)
    assert found.deviation == pytest.approx(np.std([30, 32, 40], ddof=1))
    assert found.subject_mean == pytest.approx(35.5)
    assert found.subject_deviation == pytest.approx(np.std([31, 40], ddof=1))
    assert found.interval is not None
    assert (found.interval.unit, found.interval.units) == ("subject", 2)
    assert found.interval.low <= found.mean <= found.interval.high


def test_nothing_and_one_slice():
    nothing = summarise(rows({"a": [None]}), "psnr")
    assert (nothing.slices, nothing.unmeasured, nothing.interval) == (0, 1, None)
    assert math.isnan(nothing.mean)
    assert summarise([], "psnr").slices == 0
    assert summarise(rows({"a": [1.0]}), "ssim").slices == 0, "another metric"
    one = summarise(rows({"a": [30.0]}), "psnr")
    assert (one.mean, one.deviation, one.interval) == (30.0, 0.0, None)


def test_one_subject_goes_by_slice_and_says_so():
    found = summarise(rows({"a": [30.0, 31.0, 33.0]}), "psnr").interval
    assert found is not None
    assert (found.unit, found.units) == ("slice", 3)


def test_means_by_volume_keep_equal_file_names_apart():
    listed = [
        Row("a", "x.nii", 0, {"psnr": 1.0}),
        Row("b", "x.nii", 0, {"psnr": 2.0}),
        Row("a", "x.nii", 1, {"psnr": 3.0}),
        Row("a", "y.nii", 0, {"psnr": 8.0}),
        Row("c", "y.nii", 0, {"psnr": None}),
    ]
    assert means_by(listed, "psnr", "volume") == {"a/x.nii": 2.0, "b/x.nii": 2.0, "a/y.nii": 8.0}
    assert means_by(listed, "psnr", "subject") == {"a": 4.0, "b": 2.0}


def test_intervals_repeat_and_move_with_the_values():
    values, subjects = np.random.default_rng(0).random(40), [f"s{i % 8}" for i in range(40)]
    first = bootstrap_interval(values, subjects, seed=3)
    assert first == bootstrap_interval(values, subjects, seed=3)
    assert first != bootstrap_interval(values, subjects, seed=4)
    moved = bootstrap_interval(values + 5, subjects, seed=3)
    assert (moved.low, moved.high) == pytest.approx((first.low + 5, first.high + 5))
    assert bootstrap_interval(np.ones(9), list("aaabbbccc")).low == 1
    with pytest.raises(ValueError, match="no interval"):
        bootstrap_interval(np.array([1.0, np.nan]), ["a", "b"])
    with pytest.raises(ValueError, match="no interval"):
        bootstrap_interval(np.ones(3), ["a"])


@pytest.mark.parametrize(("subjects", "least"), [(5, 0.90), (8, 0.92), (20, 0.93)])
def test_coverage_of_intervals_by_subject(subjects, least):
    """Subjects differ (deviation 2) more than their slices (deviation 1): the interval holds the true mean of 30."""
    rng, hits, runs = np.random.default_rng(subjects), 0, 400
    names = np.repeat([f"s{i}" for i in range(subjects)], 6).tolist()
    for run in range(runs):
        values = 30 + np.repeat(2 * rng.standard_normal(subjects), 6) + rng.standard_normal(6 * subjects)
        found = bootstrap_interval(values, names, draws=800, seed=run)
        hits += found.low <= 30 <= found.high
    assert least <= hits / runs <= 0.985


def test_intervals_of_few_units_say_that_they_are_too_narrow():
    """A bootstrap never leaves the values it draws from: with two subjects it misses about half of the time."""
    rng, hits = np.random.default_rng(0), 0
    for run in range(200):
        found = bootstrap_interval(rng.standard_normal(2), ["a", "b"], draws=200, seed=run)
        assert not found.reliable
        hits += found.low <= 0 <= found.high
    assert hits / 200 < 0.65
    assert bootstrap_interval(rng.standard_normal(5), list("abcde")).reliable


def test_slices_as_units_would_be_far_too_sure():
    """Why it goes by subject: the same data, each slice taken for a subject of its own."""
    rng, hits = np.random.default_rng(0), 0
    for run in range(200):
        values = 30 + np.repeat(2 * rng.standard_normal(8), 6) + rng.standard_normal(48)
        found = bootstrap_interval(values, [str(i) for i in range(48)], draws=400, seed=run)
        hits += found.low <= 30 <= found.high
    assert hits / 200 < 0.75


def by_subject(differences: list[float], slices: int = 3) -> tuple[list[Row], list[Row]]:
    """Slices around each difference that average to it exactly."""
    method, other = {}, {}
    for i, difference in enumerate(differences):
        base = 30.0 + i
        other[f"s{i}"] = [base] * slices
        method[f"s{i}"] = [base + difference + offset for offset in np.linspace(-0.5, 0.5, slices)]
    return rows(method), rows(other)


def test_the_test_is_wilcoxons_exact_one_by_subject():
    differences = [0.5, 1.2, -0.3, 2.0, 0.9, 1.7, 0.05]
    found = paired_test(*by_subject(differences), "psnr", higher_is_better=True)
    assert found.p == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)
    assert (found.unit, found.pairs, found.better, found.reason) == ("subject", 7, 6, "")
    # All 2^6 signs by hand: the rank sum of the only negative one is the least.
    six = paired_test(*by_subject([1.0, 2.0, 3.0, 4.0, 5.0, 6.5]), "psnr", higher_is_better=True)
    assert six.p == pytest.approx(2 / 2**6)


def test_lower_may_be_better():
    found = paired_test(*by_subject([-1.0, -2.0, -3.0, -4.0, -5.0, 0.5]), "psnr", higher_is_better=False)
    assert found.better == 5


@pytest.mark.parametrize(
    ("differences", "pairs"), [([1.0, 2.0, 3.0, 4.0, 5.0], 5), ([1.0, 2.0, 0.0, 3.0, 4.0, 5.0], 5)]
)
def test_too_few_pairs_mean_nothing(differences, pairs):
    found = paired_test(*by_subject(differences), "psnr", higher_is_better=True)
    assert found.p is None
    assert found.pairs == pairs
    assert "6 are needed" in found.reason


def test_one_subject_is_tested_by_slice_with_a_warning():
    method, other = rows({"a": [30.1, 31.2, 32.3, 33.4, 34.5, 35.6, 36.7]}), rows({"a": [30.0] * 7})
    found = paired_test(method, other, "psnr", higher_is_better=True)
    assert (found.unit, found.pairs) == ("slice", 7)
    assert found.p == pytest.approx(2 / 2**7)
    assert "not independent" in found.reason
    single = paired_test(method[:1], other, "psnr", higher_is_better=True)
    assert single.p is None
    assert single.reason.startswith("1 slice that differ")


def test_only_slices_of_both_are_compared():
    method, other = rows({"a": [31.0, 32.0], "b": [33.0]}), rows({"a": [30.0], "c": [30.0]})
    found = paired_test(method, other, "psnr", higher_is_better=True)
    assert (found.unit, found.pairs) == ("slice", 1)
    assert paired_test([], other, "psnr", higher_is_better=True).pairs == 0
