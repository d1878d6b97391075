"""Patches of one slice whose structure is not that of the reference, with those that correlation cannot judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from medsr_cli.evaluation.sfrc import NOISE_FLOOR, SMALLEST_PATCH, Box, Correlations, cut_for, sfrc
from medsr_cli.tasks.compare_grids import Holes

Unit = NDArray[np.float64]
Mask = NDArray[np.bool_]
Why = Literal["structure", "constant reference", "not a number"]

CONSTANT_SHARE = 1e-9
"""Of the reference's range: what rounding leaves of a slice that is the same everywhere."""


@dataclass(frozen=True)
class Flagged:
    """A patch whose coarse structure is not that of the reference."""

    slice: int
    """Counted from 1."""
    row: int
    column: int
    side: int
    crossing: float
    """Cycles per pixel from which on the structures differ; 0 where they cannot be correlated."""
    added: bool
    """Whether A has more there than the reference: perhaps invented; else perhaps lost."""
    centre_mm: list[float] | None
    """RAS+."""
    why: Why = "structure"
    """`constant reference`: the reference is the same everywhere in the slice and A is not; all patches of the slice
    are counted, and the one in which A varies most is listed. `not a number`: a voxel is a number in one image only."""

    @property
    def place(self) -> str:
        """Slice and pixels, for a person."""
        if self.why == "constant reference":
            return f"slice {self.slice}, all of it, most at row {self.row}, column {self.column}"
        return f"slice {self.slice}, row {self.row}, column {self.column}"

    @property
    def what(self) -> str:
        """`added` or `missing`, and why it could not be correlated."""
        return ("added" if self.added else "missing") + ("" if self.why == "structure" else f" ({self.why})")


@dataclass(frozen=True)
class Structure:
    """What became of one slice's patches."""

    correlations: Correlations
    boxes: list[tuple[Box, Why]]
    """What is listed of the flagged ones."""


def structure_of(one: Unit, other: Unit, holes: Holes, width: float, scale: float | None) -> Structure | None:
    """Judge one slice.

    Args:
        one: A's (colours, rows, columns), finite; `holes` tells what is filled in.
        other: the reference's.
        holes: pixels that are no numbers.
        width: range of the whole reference, in the same units.
        scale: enlargement that made A.

    Returns:
        None where slices are too small, or neither image has anything to agree or disagree on.
    """
    if min(one.shape[-2:]) < SMALLEST_PATCH:
        return None
    found = sfrc(one, other, cut=cut_for(scale))
    why: Why = "structure"
    most: tuple[int, int] | None = None
    if np.ptp(other) <= CONSTANT_SHARE * width:
        why = "constant reference"
        deviations = _deviations(one.mean(axis=0), found)
        # sFRC's floor is a share of its slice's range, which is 0 here: that of the volume stands for it.
        differs = bool(deviations.max() > NOISE_FLOOR * width)
        if not differs and not holes.alone.any():
            return None
        row, column = np.unravel_index(deviations.argmax(), deviations.shape)
        most = (int(row), int(column)) if differs else None
        found = _with_all(found, flagged=differs)
    listed: list[tuple[Box, Why]] = [(box, why) for box in found.boxes]
    if most is not None:
        first_row, first_column = int(found.rows[most[0]]), int(found.columns[most[1]])
        listed = [(box, why) for box, why in listed if (box.row, box.column) == (first_row, first_column)]
    lost, unknown = (_touched(mask, found) for mask in (holes.first & ~holes.second, holes.second & ~holes.first))
    torn = lost | unknown
    if torn.any():
        places = {(int(found.rows[i]), int(found.columns[j])) for i, j in np.argwhere(torn)}
        only_torn = replace(found, flagged=torn, crossing=np.where(torn, 0.0, found.crossing), added=unknown & ~lost)
        kept = [(box, why) for box, why in listed if most is not None or (box.row, box.column) not in places]
        listed = [*kept, *((box, "not a number") for box in only_torn.boxes)]
        found = replace(only_torn, flagged=found.flagged | torn, added=np.where(torn, only_torn.added, found.added))
    return Structure(found, listed)


def _with_all(found: Correlations, *, flagged: bool) -> Correlations:
    return replace(
        found,
        flagged=np.full_like(found.flagged, flagged),
        crossing=np.full_like(found.crossing, 0.0 if flagged else 0.5),
        added=np.full_like(found.added, flagged),
    )


def _deviations(grey: Unit, found: Correlations) -> Unit:
    """(patch rows, patch columns): standard deviation of the pixels of each patch."""
    windows = sliding_window_view(grey, (found.side, found.side))
    return np.stack([windows[row, found.columns].std(axis=(1, 2)) for row in found.rows])


def _touched(mask: Mask, found: Correlations) -> Mask:
    """(patch rows, patch columns): whether any pixel of a patch is in the mask."""
    windows = sliding_window_view(mask, (found.side, found.side))
    return np.stack([windows[row, found.columns].any(axis=(1, 2)) for row in found.rows])
