"""What a training needs to go on exactly, and its file: tensors, numbers and texts, nothing that runs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsr_cli.errors import WeightsError, mention
from medsr_cli.formats.atomic import atomic_file

FORMAT = 2
"""Of the file. 1, which did not say so, was of one network, one loss and one stage."""


@dataclass
class TrainingState:
    """How far a run is, its best weights and its history; gains are in the unit of its scores (dB or Dice)."""

    step: int = 0
    """Optimiser steps done, over all stages."""
    stage: int = 0
    """The stage that the optimisers belong to."""
    best_gain_db: float = float("-inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Those kept so far, see `Recipe.judge`."""
    history: list[dict[str, float]] = field(default_factory=list)
    """`step`, `stage` and `gain_db` of each validation."""
    seconds: float = 0.0
    """Spent on the run, over all its starts."""
    ended_early: bool = False
    """Whether `patience` ended it."""


def write_state(path: Path, state: TrainingState, parts: Mapping[str, Any]) -> None:
    """Save the state with what belongs to it; the file before it stays until this one is whole.

    Args:
        path: the state's file.
        state: how far the run is.
        parts: state_dicts of networks and optimisers and the recipe, by name.

    Raises:
        RunError: it could not be written, for example since the disk is full; the file before it is whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **vars(state), **parts}, buffer)
    with atomic_file(path, overwrite=True) as file:
        file.write(buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """A saved state with all its parts, by name.

    Raises:
        WeightsError: there is none, it is not whole, or an older or newer medsr wrote it.
    """
    record = read_record(path)
    if "step" not in record or "weights" not in record:
        raise not_a_state(path)
    if record.get("format", 1) != FORMAT:
        msg = f"{mention(path.name)} is the training state of another version of medsr."
        raise WeightsError(msg, "Give --overwrite instead of --resume to start anew, or go on with that version.")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A file of tensors, numbers and texts by name, nothing that runs.

    Raises:
        WeightsError: there is none, or it is not whole.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise not_a_state(path) from error
    if not isinstance(record, dict):
        raise not_a_state(path)
    return record


def state_of(record: Mapping[str, Any]) -> TrainingState:
    """How far the run of a record is.

    Raises:
        KeyError: something is missing.
    """
    return TrainingState(**{name: record[name] for name in vars(TrainingState())})


def not_a_state(path: Path) -> WeightsError:
    """The refusal of a file that is damaged or of something else."""
    msg = f"{mention(path.name)} is not a training state of this network."
    return WeightsError(msg, "Give --overwrite instead of --resume to start anew.")
