"""Registered images that a network takes together: of one patient, on one grid, as many as it was trained with."""

from __future__ import annotations

import numpy as np

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.contract import Reader
from medsr_cli.tasks.model import Model
from medsr_cli.volume.volume import Volume

SAME_PLACE_MM = 0.01
"""How far the corners of registered images may lie apart."""


def refuse_channels(model: Model, readers: list[Reader]) -> None:
    """A network of registered channels gets as many, a network of one gets one.

    Raises:
        ArgumentsError: it is another number.
        InputRefused: one of them is in colour.
    """
    wanted, given = model.engine.channels, len(readers)
    if given == 1 and wanted in (0, 1, 3):
        return
    if given != wanted:
        takes = f"{wanted} registered channels" if wanted > 1 else "one image at a time"
        msg = f"{model.checkpoint_id or model.method} takes {takes}; {given} were given."
        raise ArgumentsError(msg, "Name them all with --channels A,B,... in the order it was trained for.")
    if any(reader.volume.channels != 1 for reader in readers):
        msg = "Only grey images can be channels."
        raise InputRefused(msg, "Give one grey image for each channel.")


def refuse_other_grid(first: Reader, other: Reader) -> None:
    """Channels lie voxel on voxel.

    Raises:
        InputRefused: these do not.
    """
    a, b = first.volume, other.volume
    same = (a.rows, a.columns, a.slices, a.plane_axes) == (b.rows, b.columns, b.slices, b.plane_axes)
    if same and a.affine is not None and b.affine is not None:
        same = a.array_shape == b.array_shape and bool(_largest_distance_mm(a, b) < SAME_PLACE_MM)
    if not same or (a.affine is None) != (b.affine is None):
        msg = f"{mention(other.path.name)} is not on the grid of {mention(first.path.name)}."
        raise InputRefused(msg, "Channels must be registered and resampled to one grid first.")


def refuse_other_patient(first: Reader, other: Reader) -> None:
    """Every channel's pixels go into every result: those of another patient would be in the wrong record.

    Raises:
        InputRefused: the headers tell two patients.
    """
    from medsr_cli.formats.guide import Identified

    if not (isinstance(first, Identified) and isinstance(other, Identified)):
        return
    if first.identity().same_patient(other.identity()) is False:
        msg = f"{mention(other.path.name)} is of another patient than {mention(first.path.name)}."
        raise InputRefused(msg, "Give channels of one patient.")


def _largest_distance_mm(a: Volume, b: Volume) -> float:
    """Between the corners of two grids of one shape."""
    assert a.affine is not None and b.affine is not None  # noqa: S101, PT018 - the caller has compared them
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    shape = (*a.array_shape, 1, 1)[:3]
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())
