import pytest

from medsr_cli.errors import ArgumentsError
from medsr_cli.training.recipe import PRESETS, Recipe, changed, refuse_other_recipe


def test_defaults_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.iterations, paper.batch, paper.patch, paper.learning_rate) == (100_000, 32, 24, 2e-4)
    assert (paper.betas, paper.augment, paper.skip_loss) == ((0.9, 0.99), False, 1e8)
    assert {paper.learning_rate_at(step) for step in (0, 1, 50_000, 99_999)} == {2e-4}


def test_json_round_trip():
    recipe = changed(PRESETS["quick"], {"seed": 3, "betas": (0.8, 0.95)})
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_json_of_an_older_medsr():
    assert Recipe.from_json('{"batch": 7, "gone": 1}') == Recipe(batch=7)


def test_cooldown_warms_up_and_ends_near_zero():
    recipe = Recipe(iterations=100, schedule="cooldown", warmup=10, cooldown=0.5, linear_steps=20, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == 1.0
    assert rates[20] == pytest.approx(0.1)
    assert rates[29] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"iterations": 0}, "iterations"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"average": 1.0}, "average"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"schedule": "sometimes"}, "schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"colour": 1}, "colour"),
    ],
)
def test_impossible_values_are_named(settings, word):
    with pytest.raises(ArgumentsError, match=word):
        changed(Recipe(), settings)


def test_a_resumed_run_may_change_only_its_length():
    saved = Recipe()
    refuse_other_recipe(saved, changed(saved, {"iterations": 5, "validate_every": 2}))
    with pytest.raises(ArgumentsError, match="batch 32, not 4"):
        refuse_other_recipe(saved, changed(saved, {"batch": 4}))
