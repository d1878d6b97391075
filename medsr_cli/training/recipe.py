"""How a network is trained, as data: one YAML file in `recipes/` for each method and preset.

A recipe describes one stage; `then` holds what later stages change. Every file says for each number where it
comes from. Two runs with equal recipes, data and machine give equal weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medsr_cli.errors import ArgumentsError, mention

Task = Literal["super-resolution", "segmentation", "detection"]
Schedule = Literal["constant", "cooldown", "milestones", "cosine"]
Precision = Literal["fp32", "bf16", "fp16"]
Region = Literal["patch", "slice", "lesion"]
Start = Literal["random", "interpolation"]
Judge = Literal["gain", "last"]


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run, or of its first stage where `then` is given."""

    method: str = "rdst"
    """Id of the catalogue, or `segmentation`."""
    task: Task = "super-resolution"
    iterations: int = 100_000
    """Optimiser steps of this stage."""
    losses: Mapping[str, float] = field(default_factory=lambda: {"l1": 1.0})
    """Terms of the loss by name, and their weights; `training.losses.TERMS` has the names."""
    batch: int = 32
    """Images per step, over all processes; each from a different random slice."""
    region: Region = "patch"
    """`patch`: random crops; `slice`: whole slices, cut to the smallest of the batch; `lesion`: around lesions."""
    patch: int = 24
    """Side of the low-resolution patch in pixels, unless `high_patch` is given."""
    high_patch: int = 0
    """Side of the target's crop in pixels, for random scales and lesions; 0: scale times `patch`."""
    scales: tuple[float, ...] = ()
    """Enlargements that a step draws one of, for methods that take any; empty: the one that was asked for."""
    degradation: str = "cubic"
    """A name of `volume.degradation`; ignored where low-resolution images are given."""
    blur_share: float = 1.0
    """How much of a blurring degradation (`cubic-blur`) is blended in: the largest of what is drawn."""
    blur_draws: tuple[float, float] = (1.0, 0.0)
    """Shares of the patches that are blurred by `blur_share` in full and not at all; the rest lies between."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise on the low-resolution patch, share of the range, drawn
    uniformly from 0 up."""
    learning_rate: float = 2e-4
    """Adam's step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's momenta."""
    weight_decay: float = 0.0
    """Adam's L2 term."""
    schedule: Schedule = "constant"
    """`cooldown`: a warm-up, a plateau and a linear fall to zero; `milestones`: times `decay` at each of them;
    `cosine`: from `learning_rate` to `final_rate` over the stage."""
    milestones: tuple[int, ...] = ()
    """Steps of this stage at which the rate is multiplied by `decay`."""
    decay: float = 0.5
    final_rate: float = 0.0
    """Where `cosine` ends."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly, counted from the end of `linear_steps`."""
    cooldown: float = 0.2
    """Share of the stage over which the rate falls to zero, with the `cooldown` schedule."""
    critic_rate: float = 1e-5
    """Adam's step size of the critic, where the loss has the term `wgan`."""
    critic_betas: tuple[float, float] = (0.0, 0.9)
    critic_steps: int = 1
    """Steps of the critic before each step of the generator."""
    penalty: float = 10.0
    """Weight of the critic's gradient penalty."""
    augment: bool = False
    """Flip and transpose patches at random."""
    gain: float = 1.0
    """Largest factor by which a patch is brightened, drawn log-uniformly from 1 up."""
    reduced_share: float = 0.0
    """Share of patches taken from slices averaged 2x2 first, where they are large enough."""
    minimum_deviation: float = 0.0
    """Patches flatter than this are drawn again, up to eight times."""
    start: Start = "random"
    """`interpolation`: the untrained network is set to enlarge as linear interpolation does."""
    linear_steps: int = 0
    """Steps that train only the head and the tail first, with the body left out (RDST)."""
    skip_loss: float = 1e8
    """A step whose loss reaches this is skipped."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    outer_rate: float = 1.0
    """Share of the learning rate for all that stands around the dense blocks (RDST)."""
    average: float = 0.0
    """Decay of the moving average of the weights that is validated and kept; 0 keeps the weights themselves."""
    patience: int = 0
    """Validations without an improvement after which the training ends; 0 never."""
    judge: Judge = "gain"
    """Which weights are kept: `gain`, those of the best validation; `last`, the newest that are not below the
    baseline, for losses that give up some PSNR on purpose."""
    semantic_patches: int = 3
    """K of M2Trans' semantic loss."""
    encoder_batch_statistics: bool = False
    """Whether the segmentation U-Net's batch norms use the batch, as in RDST's released fine-tuning."""
    validate_every: int = 500
    """Steps between validations."""
    seed: int = 0
    """Seed of the initial weights and of every patch."""
    precision: Precision = "fp32"
    """Type of the network's arithmetic in training; weights and optimiser are fp32 either way."""
    then: tuple[Mapping[str, Any], ...] = ()
    """Later stages: the fields that each changes against the stage before it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where the numbers of this stage come from, by field."""

    def rate_factor_at(self, step: int) -> float:
        """What the learning rates are multiplied by in a step of this stage, counted from zero."""
        factor = 1.0
        since_linear = step - self.linear_steps
        if 0 <= since_linear < self.warmup:
            factor *= (since_linear + 1) / self.warmup
        if self.schedule == "cooldown" and self.cooldown > 0:
            length = max(round(self.cooldown * self.iterations), 1)
            factor *= min(1.0, max(self.iterations - step, 0) / length)
        elif self.schedule == "milestones":
            factor *= self.decay ** sum(step >= milestone for milestone in self.milestones)
        elif self.schedule == "cosine":
            end = self.final_rate / self.learning_rate
            done = min(step / self.iterations, 1.0)
            factor *= end + (1 - end) * (1 + math.cos(math.pi * done)) / 2
        return factor

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step of this stage, counted from zero."""
        return self.learning_rate * self.rate_factor_at(step)

    @cached_property
    def stages(self) -> list[Recipe]:
        """One recipe for each stage, each with what the stages before it changed.

        Only the first one trains a linear part first, unless a later one says so itself.
        """
        found = [replace(self, then=())]
        for overrides in self.then:
            found.append(replace(found[-1], **{"linear_steps": 0, **overrides}))
        return found

    @property
    def total(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.iterations for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, Recipe, int]:
        """Number and recipe of the stage that a step of the run is in, and the step counted from its start.

        Steps count from zero; those from `total` on are counted as the last stage's.
        """
        stages, start = self.stages, 0
        for index, stage in enumerate(stages[:-1]):
            if step < start + stage.iterations:
                return index, stage, step - start
            start += stage.iterations
        return len(stages) - 1, stages[-1], step - start

    def to_json(self) -> str:
        """Every field, as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """A recipe that `to_json` wrote; fields that an older medsr did not have take their defaults."""
        known = {item.name for item in fields(cls)}
        saved = {name: value for name, value in json.loads(text).items() if name in known}
        return cls(**_typed_fields(saved))


MAY_CHANGE = ("iterations", "validate_every")
"""Fields that a resumed run may set anew; any other would make its history that of two recipes."""
FOR_THE_RUN = ("method", "task", "seed", "start", "then")
"""Fields that no later stage can change."""
SHARED = ("precision", "batch", "region", "patch", "high_patch", "scales", "degradation", "validate_every")
"""Fields that, set anew, are set for every stage; others are for the first, and for those that do not set them."""

_RANGES: dict[str, tuple[float, float]] = {
    "iterations": (1, 1e8),
    "batch": (1, 4096),
    "patch": (8, 512),
    "high_patch": (0, 4096),
    "blur_share": (0.0, 1.0),
    "noise": (0.0, 1.0),
    "learning_rate": (1e-9, 1.0),
    "weight_decay": (0.0, 1.0),
    "decay": (1e-6, 1.0),
    "final_rate": (0.0, 1.0),
    "warmup": (0, 1e8),
    "cooldown": (0.0, 1.0),
    "critic_rate": (1e-9, 1.0),
    "critic_steps": (1, 100),
    "penalty": (0.0, 1e6),
    "gain": (1.0, 100.0),
    "reduced_share": (0.0, 1.0),
    "minimum_deviation": (0.0, 1.0),
    "linear_steps": (0, 1e8),
    "skip_loss": (1e-9, float("inf")),
    "clip_norm": (0.0, 1e6),
    "outer_rate": (0.0, 10.0),
    "average": (0.0, 0.999999),
    "patience": (0, 1e6),
    "semantic_patches": (1, 64),
    "validate_every": (1, 1e8),
    "seed": (0, 2**63 - 1),
}
_EACH: dict[str, tuple[float, float]] = {
    "scales": (1.0, 8.0),
    "milestones": (1, 1e8),
    "blur_draws": (0.0, 1.0),
    "losses": (0.0, 1e9),
}
"""Ranges of the parts of a field."""


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields set anew, for its first stage and the later ones that do not set them.

    Fields of `SHARED` are set for all stages.

    Raises:
        ArgumentsError: there is no such field, or its value is not one that it can have.
    """
    typed = _typed_fields(settings)
    for name, value in typed.items():
        if name in SHARED:
            kept = tuple({key: old for key, old in stage.items() if key != name} for stage in recipe.then)
            recipe = replace(recipe, then=kept)
        recipe = replace(recipe, **{name: value})
    refuse_impossible(recipe)
    return recipe


def refuse_other_recipe(saved: Recipe, wanted: Recipe) -> None:
    """Refuse to go on with a recipe that differs in more than `MAY_CHANGE`.

    Raises:
        ArgumentsError: the sentence names the first field that differs.
    """
    for name in (item.name for item in fields(Recipe)):
        before, now = getattr(saved, name), getattr(wanted, name)
        if name not in (*MAY_CHANGE, "sources") and before != now:
            msg = f"The run to go on with has {name} {before}, not {now}."
            raise ArgumentsError(msg, "Leave that option away, or start anew with --overwrite instead of --resume.")


# -- what is possible --------------------------------------------------------------------------------------


def refuse_impossible(recipe: Recipe) -> None:
    """Refuse values that are of the right type but that no training can have, in any stage.

    Raises:
        ArgumentsError: the sentence names the field and what it can be.
    """
    for number, overrides in enumerate(recipe.then, start=2):
        for name in overrides:
            if name in FOR_THE_RUN:
                msg = f"Stage {number} sets {name}, which is one for the whole run."
                raise ArgumentsError(msg)
    for stage in recipe.stages:
        _refuse_outside(stage)
        _refuse_contradiction(stage)


def _refuse_outside(stage: Recipe) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(stage, name)
        if not low <= value <= high:
            msg = f"{name} is {value}; it can be from {low:g} to {high:g}."
            raise ArgumentsError(msg)
    for name, (low, high) in _EACH.items():
        value = getattr(stage, name)
        parts = value.values() if isinstance(value, Mapping) else value
        if not all(low <= part <= high for part in parts):
            msg = f"{name} is {_shown(value)}; each can be from {low:g} to {high:g}."
            raise ArgumentsError(msg)
    for name in ("betas", "critic_betas"):
        value = getattr(stage, name)
        if not all(0 <= beta < 1 for beta in value):
            msg = f"{name} are {value}; each can be from 0 to less than 1."
            raise ArgumentsError(msg)


def _refuse_contradiction(stage: Recipe) -> None:
    if not any(weight > 0 for weight in stage.losses.values()):
        msg = "losses names no term with a weight above 0."
        raise ArgumentsError(msg, "For example: losses: {l1: 1.0}.")
    if sum(stage.blur_draws) > 1:
        msg = f"blur_draws are {stage.blur_draws}; together they can be at most 1."
        raise ArgumentsError(msg)
    if any(a >= b for a, b in pairwise(stage.milestones)):
        msg = f"milestones are {stage.milestones}; each has to be above the one before it."
        raise ArgumentsError(msg)
    if any(scale <= 1 for scale in stage.scales):
        msg = f"scales are {_shown(stage.scales)}; each has to be above 1."
        raise ArgumentsError(msg)
    if stage.method != "rdst" and (stage.linear_steps or stage.outer_rate != 1):
        name = "linear_steps" if stage.linear_steps else "outer_rate"
        msg = f"{name} is for rdst, and the method is {stage.method}."
        raise ArgumentsError(msg)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _typed_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with lists as tuples and whole numbers as floats where floats are meant.

    Raises:
        ArgumentsError: a field that a recipe does not have, or a value of another type.
    """
    kinds = _kinds()
    for name in given:
        if name not in kinds:
            msg = f"A recipe has no {_shown(name)}."
            raise ArgumentsError(msg, f"It has: {', '.join(sorted(kinds))}.")
    return {name: _typed(name, kinds[name], value) for name, value in given.items()}


def _typed(name: str, kind: Any, value: Any) -> Any:
    """One value as the field's type has it, or a refusal that names the field."""
    if name == "then" and isinstance(value, (list, tuple)) and all(isinstance(part, Mapping) for part in value):
        return tuple(_typed_fields(part) for part in value)
    result = _as_kind(kind, value)
    if result is None:
        msg = f"{name} is {_shown(value)}; it has to be {_in_words(name, kind)}."
        raise ArgumentsError(msg)
    return result


def _as_kind(kind: Any, value: Any) -> Any:
    """The value, or None where it is of another type."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else None
    if get_origin(kind) is tuple:
        return _as_tuple(get_args(kind), value)
    if get_origin(kind) is not None:  # a mapping of texts to numbers or texts
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return None
        inner = {key: _as_kind(get_args(kind)[1], part) for key, part in value.items()}
        return None if None in inner.values() else inner
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return value if right else None


def _as_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, (list, tuple)) or (Ellipsis not in kinds and len(value) != len(kinds)):
        return None
    parts = tuple(_as_kind(kinds[0], part) for part in value)
    return None if None in parts else parts


def _in_words(name: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        number = {int: "whole numbers", float: "numbers"}.get(get_args(kind)[0], "stages, each a table of fields")
        return f"a list of {number}" if Ellipsis in get_args(kind) else f"two {number}"
    if get_origin(kind) is not None:
        return "a table of texts" if name == "sources" else "a table of terms and their weights"
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "a text")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- files -------------------------------------------------------------------------------------------------

SUFFIX = ".yaml"
FIRST = ("paper", "quick")
"""Presets that a list begins with."""


def presets_of(method: str) -> list[str]:
    """The presets that a method has, `paper` and `quick` first; none for a method that is not trained here."""
    return sorted(_recipes(method), key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def recipe_named(method: str, preset: str) -> Recipe:
    """The recipe of a method and a preset, from `recipes/METHOD-PRESET.yaml`.

    Raises:
        ArgumentsError: there is none; the remedy lists what there is.
    """
    there = _recipes(method)
    if preset not in there:
        msg = f"There is no preset {preset!r} of {method}."
        remedy = f"There are: {', '.join(presets_of(method))}." if there else f"{method} has no recipe at all."
        raise ArgumentsError(msg, remedy)
    return there[preset]


def recipe_from_file(path: Path) -> Recipe:
    """A user's own recipe: a YAML table of the fields of `Recipe`; what it leaves out has its default.

    Raises:
        ArgumentsError: the file cannot be read, names a field that a recipe does not have or names one twice, or
            a value cannot be; the sentence names the file and the field.
    """
    return _recipe_of(path)


@cache
def _recipes(method: str) -> dict[str, Recipe]:
    """Preset to recipe; of cohft-released-paper.yaml, what it says tells whether it is one of cohft."""
    files = (resources.files("medsr_cli.training") / "recipes").iterdir()
    own = {file.name[len(method) + 1 : -len(SUFFIX)]: file for file in files if file.name.startswith(f"{method}-")}
    found = {preset: _recipe_of(file) for preset, file in own.items() if file.name.endswith(SUFFIX)}
    return {preset: recipe for preset, recipe in found.items() if recipe.method == method}


def _recipe_of(file: Traversable) -> Recipe:
    from medsr_cli.training.recipe_yaml import read_table  # noqa: PLC0415 - PyYAML only where a file is read

    content = read_table(file)
    try:
        if "method" not in content:
            msg = "It does not say which method it is for."
            raise ArgumentsError(msg, "Begin it with method: rdst, for example.")
        recipe = Recipe(**_typed_fields(content))
        refuse_impossible(recipe)
    except ArgumentsError as error:
        msg = f"The recipe {mention(file.name)} cannot be used. {error.sentence}"
        raise ArgumentsError(msg, error.remedy) from error
    return recipe
