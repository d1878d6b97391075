"""Whether a trained network may leave the workshop, and in which precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medsr_cli.errors import QualityGateFailed
from medsr_cli.training.recipe import Judge
from medsr_cli.training.state import TrainingState
from medsr_cli.training.validation import Score, Scorer, mean_gain

HALF_COSTS = {"dB": 0.01}
"""Half precision is kept where it costs less than this in the validation, by the unit of its scores."""
HALF_COSTS_SHARE = 0.001
"""The same for Dice and for shares of the image."""


@dataclass(frozen=True)
class Candidate:
    """The best network of a run, as it would be stored."""

    net: nn.Module
    half: bool
    note: str = ""
    """Why it is not in half precision although that was asked for."""


def best_network(net: nn.Module, state: TrainingState, score: Scorer, *, half: bool) -> Candidate:
    """The network with the best weights, rounded to half precision if that does not hurt."""
    best = copy.deepcopy(net)
    best.load_state_dict(state.best_weights)
    best.eval()
    if not half:
        return Candidate(best, half=False)
    rounded = rounded_to_half(best)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded.state_dict().values()):
        return Candidate(best, half=False, note="Kept in single precision: a weight is beyond half precision.")
    scores = score(rounded)
    cost = state.best_gain_db - mean_gain(scores)
    unit = scores[0].unit
    if not cost < HALF_COSTS.get(unit, HALF_COSTS_SHARE):
        note = f"Kept in single precision: half precision would cost {cost:.3f} {unit}."
        return Candidate(best, half=False, note=note)
    return Candidate(rounded, half=True)


def rounded_to_half(net: nn.Module) -> nn.Module:
    """A copy whose tensors are those that a half-precision file would give back, see `save_network`."""
    rounded = copy.deepcopy(net)
    frozen = {name for name, parameter in rounded.named_parameters() if not parameter.requires_grad}
    with torch.no_grad():
        for name, tensor in rounded.state_dict().items():
            if name not in frozen and tensor.is_floating_point() and tensor.ndim > 1:
                tensor.copy_(tensor.half())
    return rounded.eval()


def precision_cost_db(net: nn.Module, scores: Sequence[Score], score: Scorer) -> dict[str, float] | None:
    """What the network loses in bfloat16, weights and activations: for its card, see `PrecisionCost` of the manifest.

    Worth it where the device computes in bfloat16; others take ten times as long as the validation itself.

    Args:
        net: as it will be stored.
        scores: its validation in float32.
        score: the same validation, of another network.

    Returns:
        `bfloat16` in dB and the number of `slices`; None for what is not measured in dB, or is no number.
    """
    if not scores or scores[0].unit != "dB":
        return None
    rounded = copy.deepcopy(net).to(torch.bfloat16).eval()
    rounded.register_forward_pre_hook(lambda _, given: tuple(map(_in_bfloat16, given)))
    cost = mean_gain(scores) - mean_gain(score(rounded))
    return {"slices": sum(one.slices for one in scores), "bfloat16": round(cost, 4)} if math.isfinite(cost) else None


def _in_bfloat16(given: object) -> object:
    return given.to(torch.bfloat16) if isinstance(given, torch.Tensor) else given


def refuse_worse(
    state: TrainingState,
    scores: Sequence[Score] = (),
    least_gain: float = 0.0,
    *,
    judge: Judge = "gain",
    baseline: str = "bicubic",
    unit: str = "dB",
) -> None:
    """Let only a network pass that is better than what it started from and than the baseline.

    Args:
        state: of the run; its history begins with the validation before the first step.
        scores: of the network as it would be stored.
        least_gain: the mean gain over the baseline that it has to exceed.
        judge: of the last stage; where the last weights are kept on purpose, they need not be better than the start.
        baseline: what the gain is over, in words.
        unit: of the gain.

    Raises:
        QualityGateFailed: the sentence says which of the two it is, and by how much.
    """
    start = state.history[0]["gain_db"]
    if state.best_step == 0 or (judge == "gain" and not state.best_gain_db > start):
        latest = state.history[-1]["gain_db"]
        msg = (
            f"After {state.step} steps no validation was better than the start "
            f"({_told(latest, unit)} against {baseline}, {_told(start, unit)} at the start), so nothing was written."
        )
        raise QualityGateFailed(msg, "Train longer, or lower the learning rate.")
    gain = mean_gain(scores) if scores else state.best_gain_db
    if not gain > least_gain:
        msg = (
            f"The best network is {_told(gain, unit)} against {baseline} on the held-out subjects, so it was not "
            "written."
        )
        raise QualityGateFailed(msg, "Train longer, give more subjects, or start from a checkpoint with --weights.")


def _told(gain: float, unit: str) -> str:
    return f"{gain:+.2f} {unit}" if unit == "dB" else f"{gain:+.3f} {unit}"
