"""How a network is trained, as data; the defaults are the first stage of the RDST paper.

Source: arXiv 2302.11184, section 4.2 and the released configuration (see each field).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from medsr_cli.errors import ArgumentsError

Schedule = Literal["constant", "cooldown"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """Every number of a training run; two runs with equal recipes, data and machine give equal weights."""

    iterations: int = 100_000
    """Optimiser steps (paper: 100,000 in stage 1)."""
    batch: int = 32
    """Patches per step, each from a different random slice (paper: 32)."""
    patch: int = 24
    """Side of the low-resolution patch in pixels; the target's is scale times that (paper: 24)."""
    learning_rate: float = 2e-4
    """Adam's step size (paper: 2e-4)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's momenta (released configuration)."""
    schedule: Schedule = "constant"
    """`constant` (paper), or `cooldown`: a warm-up, a plateau and a linear fall to zero."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly, counted from the end of `linear_steps`."""
    cooldown: float = 0.2
    """Share of the run over which it falls to zero, with the `cooldown` schedule."""
    augment: bool = False
    """Flip and transpose patches at random (paper: no)."""
    gain: float = 1.0
    """Largest factor by which a patch is brightened, drawn log-uniformly from 1 up (paper: 1, none)."""
    reduced_share: float = 0.0
    """Share of patches taken from slices averaged 2x2 first, where they are large enough (paper: none)."""
    minimum_deviation: float = 0.0
    """Patches flatter than this are drawn again, up to eight times (paper: no)."""
    linear_steps: int = 0
    """Steps that train only the head and the tail first, with the body left out (paper: none)."""
    skip_loss: float = 1e8
    """A step whose loss reaches this is skipped (released configuration)."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip (paper: no clipping)."""
    outer_rate: float = 1.0
    """Share of the learning rate for all that stands around the dense blocks (paper: 1)."""
    average: float = 0.0
    """Decay of the moving average of the weights that is validated and kept; 0 keeps the weights themselves."""
    validate_every: int = 500
    """Steps between validations."""
    seed: int = 0
    """Seed of the initial weights and of every patch."""
    precision: Precision = "fp32"
    """Type of the network's arithmetic in training; weights and optimiser are fp32 either way (paper: fp32)."""

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        rate = self.learning_rate
        since_linear = step - self.linear_steps
        if 0 <= since_linear < self.warmup:
            rate *= (since_linear + 1) / self.warmup
        if self.schedule == "cooldown" and self.cooldown > 0:
            length = max(round(self.cooldown * self.iterations), 1)
            rate *= min(1.0, (self.iterations - step) / length)
        return rate

    def to_json(self) -> str:
        """Every field, as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """A recipe that `to_json` wrote; fields that an older medsr did not have take their defaults."""
        known = {field.name for field in fields(cls)}
        saved = {name: value for name, value in json.loads(text).items() if name in known}
        if "betas" in saved:
            saved["betas"] = tuple(saved["betas"])
        return cls(**saved)


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(),
    "quick": Recipe(
        iterations=6000,
        batch=4,
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
    ),
}
"""`paper` is stage 1 of the RDST paper; `quick` is what gets past bicubic in an evening on two cores."""

MAY_CHANGE = ("iterations", "validate_every")
"""Fields that a resumed run may set anew; any other would make its history that of two recipes."""

_RANGES: dict[str, tuple[float, float]] = {
    "iterations": (1, 1e8),
    "batch": (1, 4096),
    "patch": (8, 512),
    "learning_rate": (1e-9, 1.0),
    "warmup": (0, 1e8),
    "cooldown": (0.0, 1.0),
    "gain": (1.0, 100.0),
    "reduced_share": (0.0, 1.0),
    "minimum_deviation": (0.0, 1.0),
    "linear_steps": (0, 1e8),
    "clip_norm": (0.0, 1e6),
    "outer_rate": (0.0, 10.0),
    "average": (0.0, 0.999999),
    "validate_every": (1, 1e8),
    "seed": (0, 2**63 - 1),
}
_WORDS = {"schedule": get_args(Schedule), "precision": get_args(Precision)}


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields set anew.

    Raises:
        ArgumentsError: there is no such field, or its value is outside what it can be.
    """
    known = {field.name for field in fields(Recipe)}
    for name, value in settings.items():
        if name not in known:
            msg = f"A recipe has no {name}."
            raise ArgumentsError(msg, f"It has: {', '.join(sorted(known))}.")
        if name in _WORDS and value not in _WORDS[name]:
            msg = f"{name} is {value!r}; it can be {' or '.join(_WORDS[name])}."
            raise ArgumentsError(msg)
        low, high = _RANGES.get(name, (float("-inf"), float("inf")))
        if name in _RANGES and not low <= value <= high:
            msg = f"{name} is {value}; it can be from {low:g} to {high:g}."
            raise ArgumentsError(msg)
    result = replace(recipe, **settings)
    if not all(0 <= beta < 1 for beta in result.betas):
        msg = f"betas are {result.betas}; each can be from 0 to less than 1."
        raise ArgumentsError(msg)
    return result


def refuse_other_recipe(saved: Recipe, wanted: Recipe) -> None:
    """Refuse to go on with a recipe that differs in more than `MAY_CHANGE`.

    Raises:
        ArgumentsError: the sentence names the first field that differs.
    """
    for field in fields(Recipe):
        before, now = getattr(saved, field.name), getattr(wanted, field.name)
        if field.name not in MAY_CHANGE and before != now:
            msg = f"The run to go on with has {field.name} {before}, not {now}."
            raise ArgumentsError(msg, "Leave that option away, or start anew with --overwrite instead of --resume.")
