"""Whether a trained network may leave the workshop, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medsr_cli.errors import QualityGateFailed
from medsr_cli.networks.rdst import Rdst
from medsr_cli.training.loop import TrainingState
from medsr_cli.training.validation import VolumeScore, mean_gain_db

HALF_COSTS_DB = 0.01
"""Half precision is kept where it costs less than this in the validation."""

Score = Callable[[nn.Module], list[VolumeScore]]


@dataclass(frozen=True)
class Candidate:
    """The best network of a run, as it would be stored."""

    net: Rdst
    half: bool
    note: str = ""
    """Why it is not in half precision although that was asked for."""


def best_network(net: Rdst, state: TrainingState, score: Score, *, half: bool) -> Candidate:
    """The network with the best weights, rounded to half precision if that does not hurt."""
    best = copy.deepcopy(net)
    best.load_state_dict(state.best_weights)
    best.eval()
    if not half:
        return Candidate(best, half=False)
    rounded = rounded_to_half(best)
    if not all(bool(torch.isfinite(p).all()) for p in rounded.parameters()):
        return Candidate(best, half=False, note="Kept in single precision: a weight is beyond half precision.")
    cost = state.best_gain_db - mean_gain_db(score(rounded))
    if not cost < HALF_COSTS_DB:
        return Candidate(best, half=False, note=f"Kept in single precision: half precision would cost {cost:.3f} dB.")
    return Candidate(rounded, half=True)


def rounded_to_half(net: Rdst) -> Rdst:
    """A copy whose trained weights are those that a half-precision file would give back."""
    rounded = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())
    return rounded.eval()


def refuse_worse(state: TrainingState, scores: Sequence[VolumeScore] = (), least_gain_db: float = 0.0) -> None:
    """Let only a network pass that is better than what it started from and than bicubic.

    Args:
        state: of the run; its history begins with the validation before the first step.
        scores: of the network as it would be stored.
        least_gain_db: the mean gain over bicubic that it has to exceed.

    Raises:
        QualityGateFailed: the sentence says which of the two it is, and by how much.
    """
    start = state.history[0]["gain_db"]
    if state.best_step == 0 or not state.best_gain_db > start:
        latest = state.history[-1]["gain_db"]
        msg = (
            f"After {state.step} steps no validation was better than the start "
            f"({latest:+.2f} dB against bicubic, {start:+.2f} dB at the start), so nothing was written."
        )
        raise QualityGateFailed(msg, "Train longer, or lower the learning rate.")
    gain = mean_gain_db(scores) if scores else state.best_gain_db
    if not gain > least_gain_db:
        msg = f"The best network is {gain:+.2f} dB against bicubic on the held-out subjects, so it was not written."
        raise QualityGateFailed(msg, "Train longer, give more subjects, or start from a checkpoint with --weights.")
