import math
import subprocess
import sys
from dataclasses import fields, replace
from importlib import resources

import pytest

from medsr_cli.errors import ArgumentsError
from medsr_cli.training.recipe import (
    FOR_THE_RUN,
    Recipe,
    changed,
    presets_of,
    recipe_from_file,
    recipe_named,
    refuse_other_recipe,
)

WANTED = {
    "rdst": ["paper", "quick", "paper-e1", "paper-e1-released", "paper-hrl"],
    "miassr": ["paper", "quick", "transfer", "transfer-quick"],
    "msgan": ["paper", "quick"],
    "msgan-detector": ["paper", "quick"],
    "m2trans": ["paper", "quick", "released"],
    "cohft": ["paper", "quick"],
    "cohft-released": ["released"],
    "segmentation": ["paper", "quick"],
    "uscyclegan": [],
}
EVERY = [(method, preset) for method, presets in WANTED.items() for preset in presets]


# -- the recipes that there are ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", WANTED)
def test_presets_of_a_method(method):
    assert presets_of(method) == WANTED[method]


def test_no_file_is_left_out():
    names = {file.name for file in (resources.files("medsr_cli.training") / "recipes").iterdir()}
    assert names == {f"{method}-{preset}.yaml" for method, preset in EVERY}


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_every_number_says_where_it_comes_from(method, preset):
    recipe = recipe_named(method, preset)
    assert recipe.method == method
    names = {item.name for item in fields(Recipe)} - {"method", "task", "sources", "then"}
    differing = {name for name in names if getattr(recipe, name) != getattr(Recipe(), name)}
    assert differing <= set(recipe.sources), differing - set(recipe.sources)
    assert {"iterations", "losses", "batch", "learning_rate", "betas"} <= set(recipe.sources)
    assert set(recipe.sources) <= names
    for overrides in recipe.then:
        assert set(overrides["sources"]) == set(overrides) - {"sources"}


def test_rdst_paper():
    paper = recipe_named("rdst", "paper")
    assert (paper.iterations, paper.batch, paper.patch, paper.learning_rate) == (100_000, 32, 24, 2e-4)
    assert (paper.betas, paper.augment, paper.skip_loss, paper.losses) == ((0.9, 0.99), False, 1e8, {"l1": 1.0})
    assert {paper.learning_rate_at(step) for step in (0, 1, 50_000, 99_999)} == {2e-4}
    assert replace(paper, sources={}) == Recipe(betas=(0.9, 0.99))


def test_rdst_quick_is_what_it_was():
    expected = Recipe(
        iterations=6000,
        batch=4,
        betas=(0.9, 0.99),
        learning_rate=5e-4,
        outer_rate=0.15,
        schedule="cooldown",
        warmup=100,
        augment=True,
        gain=3.0,
        reduced_share=0.3,
        minimum_deviation=0.004,
        linear_steps=1500,
        clip_norm=1.0,
        average=0.995,
    )
    assert replace(recipe_named("rdst", "quick"), sources={}) == expected


@pytest.mark.parametrize(
    ("preset", "losses", "judge"),
    [
        ("paper-e1", {"l1": 1, "encoder1": 10}, "gain"),
        ("paper-hrl", {"l1": 1, "hrl": 10}, "last"),
        ("paper-e1-released", {"l1": 0.1, "encoder1_mse": 1}, "gain"),
    ],
)
def test_rdst_has_two_stages(preset, losses, judge):
    first, second = recipe_named("rdst", preset).stages
    assert replace(first, sources={}) == replace(recipe_named("rdst", "paper"), sources={})
    assert (second.losses, second.iterations, second.batch, second.judge) == (losses, 20_000, 32, judge)
    rates = [second.learning_rate_at(step) for step in (0, 9_999, 10_000, 15_000, 17_499, 17_500, 19_999)]
    assert rates == [1e-4, 1e-4, 5e-5, 2.5e-5, 2.5e-5, 1.25e-5, 1.25e-5]
    assert second.encoder_batch_statistics == preset.endswith("released")
    assert recipe_named("rdst", preset).total == 120_000


def test_miassr_paper():
    first, second = recipe_named("miassr", "paper").stages
    assert first.scales == tuple(round(1 + tenth / 10, 1) for tenth in range(1, 31))
    assert (first.degradation, first.batch, first.high_patch, first.losses) == ("cubic-blur", 16, 96, {"l1": 1})
    assert second.losses == {"l1": 1, "wgan": 0.001, "vgg22": 0.006}
    assert (second.critic_rate, second.critic_betas, second.penalty) == (1e-5, (0.0, 0.9), 10)
    for stage in (first, second):
        assert stage.iterations == 100_000
        assert [stage.learning_rate_at(step) for step in (49_999, 50_000)] == [1e-4, 5e-5]


def test_miassr_quick_does_not_see_blurred_images_alone():
    for preset in ("quick", "transfer-quick"):
        recipe = recipe_named("miassr", preset)
        assert (recipe.blur_draws, recipe.noise, recipe.losses) == ((0.4, 0.3), 0.015, {"l1": 1})
    text = (resources.files("medsr_cli.training") / "recipes" / "miassr-quick.yaml").read_text()
    assert "dangerous" in text


def test_m2trans_cosine():
    paper = recipe_named("m2trans", "paper")
    assert paper.losses == {"l1": 1, "semantic": 0.01}
    assert recipe_named("m2trans", "released").losses == {"l1": 1}
    assert paper.learning_rate_at(0) == pytest.approx(1e-4)
    assert paper.learning_rate_at(250_000) == pytest.approx((1e-4 + 1e-6) / 2)
    assert paper.learning_rate_at(500_000) == pytest.approx(1e-6)


def test_cohft_rates():
    paper, released = recipe_named("cohft", "paper"), recipe_named("cohft-released", "released")
    assert paper.learning_rate_at(paper.iterations - 1) == pytest.approx(1e-4 / 8)
    assert released.learning_rate_at(released.iterations - 1) == pytest.approx(1e-4 * 0.9**3)
    assert paper.weight_decay == released.weight_decay == 1e-4


def test_segmentation_paper():
    paper = recipe_named("segmentation", "paper")
    assert (paper.task, paper.losses, paper.iterations) == ("segmentation", {"dice": 1}, 100_000)
    assert [paper.learning_rate_at(step) for step in (0, 50_000, 75_000)] == [1e-4, 5e-5, 2.5e-5]


def test_no_such_preset():
    with pytest.raises(ArgumentsError, match="There are: paper, quick"):
        recipe_named("rdst", "slow")
    with pytest.raises(ArgumentsError, match="no recipe at all"):
        recipe_named("bicubic", "paper")


def test_reading_recipes_imports_nothing_heavy():
    program = (
        "import sys; from medsr_cli.training.recipe import recipe_named; recipe_named('rdst', 'paper'); "
        "assert not {'torch', 'numpy', 'accelerate', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- stages ------------------------------------------------------------------------------------------------

STAGED = Recipe(
    iterations=10,
    linear_steps=2,
    then=({"iterations": 5, "losses": {"mse": 1.0}, "batch": 8}, {"learning_rate": 1e-5, "iterations": 3}),
)


def test_stages_build_on_one_another():
    first, second, third = STAGED.stages
    assert [stage.then for stage in STAGED.stages] == [(), (), ()]
    assert (second.losses, second.batch, second.learning_rate) == ({"mse": 1.0}, 8, 2e-4)
    assert (third.losses, third.batch, third.learning_rate) == ({"mse": 1.0}, 8, 1e-5)
    assert (first.linear_steps, second.linear_steps) == (2, 0)
    assert STAGED.total == 18


@pytest.mark.parametrize(
    ("step", "place"), [(0, (0, 0)), (9, (0, 9)), (10, (1, 0)), (14, (1, 4)), (15, (2, 0)), (17, (2, 2)), (18, (2, 3))]
)
def test_stage_of_a_step(step, place):
    index, stage, within = STAGED.stage_at(step)
    assert (index, within) == place
    assert stage == STAGED.stages[index]


def test_settings_are_for_the_first_stage_but_for_shared_ones():
    recipe = changed(STAGED, {"iterations": 20, "batch": 4, "learning_rate": 1e-3})
    assert [stage.iterations for stage in recipe.stages] == [20, 5, 3]
    assert [stage.batch for stage in recipe.stages] == [4, 4, 4]
    assert [stage.learning_rate for stage in recipe.stages] == [1e-3, 1e-3, 1e-5]


@pytest.mark.parametrize("name", [name for name in FOR_THE_RUN if name != "then"])
def test_a_stage_cannot_be_another_run(name):
    value = getattr(Recipe(), name)
    with pytest.raises(ArgumentsError, match=f"Stage 2 sets {name}"):
        changed(Recipe(), {"then": [{name: value}]})


# -- schedules ---------------------------------------------------------------------------------------------


def test_cooldown_warms_up_and_ends_near_zero():
    recipe = Recipe(iterations=100, schedule="cooldown", warmup=10, cooldown=0.5, linear_steps=20, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == 1.0
    assert rates[20] == pytest.approx(0.1)
    assert rates[29] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_schedules_are_pytorchs():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(1))
    stepped = torch.optim.Adam([weight], 0.1)
    falling = torch.optim.Adam([weight], 0.1)
    by_steps = torch.optim.lr_scheduler.MultiStepLR(stepped, [3, 7], 0.3)
    by_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(falling, 20, 0.01)
    milestones = Recipe(schedule="milestones", milestones=(3, 7), decay=0.3, learning_rate=0.1, iterations=20)
    cosine = Recipe(schedule="cosine", final_rate=0.01, learning_rate=0.1, iterations=20)
    for step in range(20):
        assert milestones.learning_rate_at(step) == pytest.approx(stepped.param_groups[0]["lr"])
        assert cosine.learning_rate_at(step) == pytest.approx(falling.param_groups[0]["lr"])
        for part in (stepped, falling, by_steps, by_cosine):
            part.step()


# -- values and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", WANTED["rdst"] + ["miassr"])
def test_json_round_trip(preset):
    recipe = recipe_named("miassr", "paper") if preset == "miassr" else recipe_named("rdst", preset)
    recipe = changed(recipe, {"seed": 3, "betas": (0.8, 0.95)})
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).stages == recipe.stages


def test_json_of_an_older_medsr():
    assert Recipe.from_json('{"batch": 7, "gone": 1}') == Recipe(batch=7)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"iterations": 0}, "iterations"),
        ({"iterations": 2.5}, "iterations is 2.5; it has to be a whole number"),
        ({"iterations": True}, "iterations"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"average": 1.0}, "average"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"critic_betas": (-0.1, 0.9)}, "critic_betas"),
        ({"schedule": "sometimes"}, "schedule is 'sometimes'; it has to be constant or cooldown"),
        ({"precision": "fp8"}, "precision"),
        ({"judge": "best"}, "judge"),
        ({"colour": 1}, "colour"),
        ({"losses": {}}, "losses"),
        ({"losses": {"l1": 0.0}}, "losses"),
        ({"losses": {"l1": -1.0}}, "losses"),
        ({"losses": ["l1"]}, "losses"),
        ({"scales": (1.0, 2.0)}, "scales"),
        ({"scales": ("2",)}, "scales"),
        ({"milestones": (20, 10)}, "milestones"),
        ({"blur_draws": (0.7, 0.7)}, "blur_draws"),
        ({"noise": -0.1}, "noise"),
        ({"penalty": -1.0}, "penalty"),
        ({"critic_steps": 0}, "critic_steps"),
        ({"patience": -1}, "patience"),
        ({"weight_decay": 2.0}, "weight_decay"),
        ({"high_patch": -8}, "high_patch"),
        ({"augment": 1}, "augment"),
        ({"then": [{"batch": 0}]}, "batch"),
        ({"then": [{"colour": 0}]}, "colour"),
        ({"method": "miassr", "linear_steps": 5}, "linear_steps is for rdst"),
    ],
)
def test_impossible_values_are_named(settings, word):
    with pytest.raises(ArgumentsError, match=word):
        changed(Recipe(), settings)


def test_whole_numbers_and_lists_are_taken_for_what_is_meant():
    recipe = changed(Recipe(), {"learning_rate": 1, "betas": [0, 0.5], "losses": {"l1": 1}, "milestones": [1, 2]})
    assert (recipe.learning_rate, recipe.betas, recipe.milestones) == (1.0, (0.0, 0.5), (1, 2))
    assert isinstance(recipe.learning_rate, float)
    assert isinstance(recipe.losses["l1"], float)


def test_a_users_own_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# mine\nmethod: m2trans\nlearning_rate: 3e-4\nlosses: {l1: 1, mse: 5E-1}\nbetas: [0.9, 0.95]\n"
        "then:\n  - iterations: 10\n    milestones: [5]\n"
    )
    expected = Recipe(
        method="m2trans",
        learning_rate=3e-4,
        losses={"l1": 1.0, "mse": 0.5},
        betas=(0.9, 0.95),
        then=({"iterations": 10, "milestones": (5,)},),
    )
    assert recipe_from_file(file) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch: 4\n", ["mine.yaml", "method"]),
        ("method: rdst\ncolour: 4\n", ["mine.yaml", "'colour'"]),
        ("method: rdst\nbatch: four\n", ["mine.yaml", "batch", "a whole number"]),
        ("method: rdst\nbatch: 0\n", ["mine.yaml", "batch is 0"]),
        ("method: rdst\nbatch: 4\nbatch: 5\n", ["mine.yaml", "batch stands there twice", "line"]),
        ("method: rdst\nthen: 3\n", ["mine.yaml", "then", "stages"]),
        ("method: rdst\nthen: [{losses: l1}]\n", ["mine.yaml", "losses", "terms and their weights"]),
        ("method: rdst\nlearning_rate: yes\n", ["mine.yaml", "learning_rate", "a number"]),
        ("method: rdst\nlearning_rate: .nan\n", ["mine.yaml", "learning_rate"]),
        ("method: [\n", ["mine.yaml", "YAML"]),
        ("- method\n", ["mine.yaml", "table"]),
        ("1: 2\n", ["mine.yaml", "table"]),
        ("", ["mine.yaml", "table"]),
        ("method: !!python/object/apply:os.system ['true']\n", ["mine.yaml", "YAML"]),
    ],
)
def test_a_users_mistake_is_told_with_file_and_field(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentsError) as refusal:
        recipe_from_file(file)
    for word in words:
        assert word in str(refusal.value)


def test_a_file_that_is_no_recipe(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\x00\xff\xfe")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    for name in ("none.yaml", "image.yaml", "large.yaml", "."):
        with pytest.raises(ArgumentsError):
            recipe_from_file(tmp_path / name)


def test_a_resumed_run_may_change_only_its_length():
    saved = Recipe()
    refuse_other_recipe(saved, changed(saved, {"iterations": 5, "validate_every": 2}))
    refuse_other_recipe(saved, replace(saved, sources={"batch": "ours"}))
    with pytest.raises(ArgumentsError, match="batch 32, not 4"):
        refuse_other_recipe(saved, changed(saved, {"batch": 4}))
    with pytest.raises(ArgumentsError, match="losses"):
        refuse_other_recipe(saved, changed(saved, {"losses": {"mse": 1.0}}))
