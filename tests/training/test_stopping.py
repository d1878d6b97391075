import numpy as np
import pytest

from medsr_cli.training.cyclegan import PAPER, RELEASED
from medsr_cli.training.stopping import Record, StoppingRule, line_through


def rule_of(preset):
    return StoppingRule(preset.rate, preset.minimum_rate)


def played(rule, error_at, iterations=3000):
    """The iteration after which the rule ends the training, or None."""
    for i in range(iterations):
        if rule.record_is_due(i):
            rule.record(i, error_at(i))
        rule.check(i)
        if rule.finished:
            return i
    return None


def worse(i):
    """Never falls, so that every check that may reduce does."""
    return 0.5 + i / 3000


def test_released_ends_at_iteration_899_at_the_earliest():
    rule = rule_of(RELEASED)
    assert played(rule, worse) == 899
    assert rule.reductions == [299, 599, 899]
    assert [r.iteration for r in rule.records] == list(range(0, 899, 60))


def test_paper_goes_on_to_below_its_last_rate():
    rule = rule_of(PAPER)
    assert played(rule, worse) == 1199
    assert rule.rate == pytest.approx(1e-7)
    three = StoppingRule(1e-3, 1e-6, reductions=[1, 2, 3])
    assert three.rate == pytest.approx(1e-6)
    assert not three.finished


@pytest.mark.parametrize("error_at", [lambda i: 1 - i / 3000, lambda i: 0.25], ids=["falling", "constant"])
def test_a_straight_line_never_reduces(error_at):
    """A constant error has slope 0 and deviation 0, which is not less: the rule as it is."""
    rule = rule_of(RELEASED)
    assert played(rule, error_at) is None
    assert rule.reductions == []
    assert rule.rate == RELEASED.rate


def test_falling_first_then_not_any_more():
    """At 1379 the last of the fall is still in the four records, 0.05, 0, 0, 0: 1.5·2.5e-4 is above σ, 1.44e-4."""
    rule = rule_of(RELEASED)
    assert played(rule, lambda i: 1 - i / 1200 if i < 1200 else 1e-6 * (i - 1200)) == 2039
    assert rule.reductions == [1439, 1739, 2039]


@pytest.mark.parametrize(("fall", "reduces"), [(6.6e-5, True), (6.7e-5, False)])
def test_threshold_by_hand(fall, reduces):
    """Four records 60 apart, residuals r(1, -1, -1, 1): σ = √(4r²/2 / 18000), here 1e-4; 1.5·6.6e-5 is below it."""
    r = 1e-4 * np.sqrt(9000)
    rule = rule_of(RELEASED)
    rule.records = [Record(60 * k, 9.0 - k) for k in range(1)]
    rule.records += [
        Record(60 * k, 1 - fall * 60 * k + r * s) for k, s in zip(range(1, 5), (1, -1, -1, 1), strict=True)
    ]
    assert rule.check(299) == reduces


def test_line_is_that_of_polyfit():
    rng = np.random.default_rng(3)
    records = [Record(60 * k, float(rng.random())) for k in range(7)]
    fit, covariance = np.polyfit([r.iteration for r in records], [r.error for r in records], 1, cov=True)
    assert line_through(records) == pytest.approx((fit[0], np.sqrt(covariance[0, 0])))


def test_asking_twice_reduces_once():
    rule = rule_of(RELEASED)
    for i in range(300):
        if rule.record_is_due(i):
            rule.record(i, worse(i))
            assert not rule.record_is_due(i)
    assert rule.check(299)
    assert not rule.check(299)
    assert rule.reductions == [299]
