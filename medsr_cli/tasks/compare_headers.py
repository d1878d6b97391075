"""What differs between the headers of two images: geometry, types, units and codes; nothing about a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medsr_cli.formats.contract import Reader
from medsr_cli.formats.guide import Identified
from medsr_cli.tasks.compare_grids import Relation
from medsr_cli.volume.geometry import spacings_mm
from medsr_cli.volume.volume import Volume

GRID_FIELDS = frozenset({"rows", "columns", "spacing (mm)", "first voxel (mm)", "stored shape", "dimensions", "shape"})
"""What a finer grid in the same place has to change."""
NOT_COMPARED = frozenset({"series"})
"""Details that are new in every file."""


@dataclass(frozen=True)
class Difference:
    """One field that is not the same."""

    field: str
    before: str
    after: str
    expected: bool = False
    """Whether a change of the in-plane grid brings it about."""


def header_differences(first: Reader, second: Reader, relation: Relation) -> list[Difference]:
    """Every field of A that is otherwise in B, in a fixed order; fields that only one format has are left out."""
    mine, theirs = (
        {**_geometry(reader.volume), **{key: _said(value) for key, value in reader.details().items()}}
        for reader in (first, second)
    )
    if first.volume.format != second.volume.format:
        # Another format has other fields: only what both have says anything about the images.
        shared = set(mine) & set(theirs)
        mine, theirs = ({k: v for k, v in side.items() if k in shared} for side in (mine, theirs))
    finer = "shrunken" in relation.how
    return [
        Difference(name, mine.get(name, ""), theirs.get(name, ""), finer and name in GRID_FIELDS)
        for name in dict.fromkeys((*mine, *theirs))
        if mine.get(name, "") != theirs.get(name, "") and name not in NOT_COMPARED
    ]


def _geometry(volume: Volume) -> dict[str, str]:
    affine = volume.affine
    spacing = volume.spacing_mm
    slope, intercept = volume.value_scale
    return {
        "format": volume.format,
        "stored shape": " x ".join(map(str, volume.array_shape)),
        "slices": str(volume.slices),
        "rows": str(volume.rows),
        "columns": str(volume.columns),
        "channels": str(volume.channels),
        "slice axis": str(volume.slice_axis),
        "spacing (mm)": "not stated" if spacing is None else f"{spacing[0]:.5g} x {spacing[1]:.5g}",
        "slice spacing (mm)": _said(volume.slice_spacing_mm),
        "first voxel (mm)": "not stated" if affine is None else " ".join(f"{v:.2f}" for v in affine[:3, 3] + 0.0),
        "directions": "not stated" if affine is None else _directions(affine),
        "type": str(volume.dtype),
        "slope and intercept": f"{slope:g}, {intercept:g}",
        "padding": _said(volume.padding),
        "modality": volume.modality or "not stated",
    }


def _directions(affine: Any) -> str:
    cosines = affine[:3, :3] / np.array(spacings_mm(affine))
    return "; ".join(" ".join(f"{value + 0.0:.4f}" for value in np.round(column, 4)) for column in cosines.T)


def _said(value: Any) -> str:
    if value is None:
        return "not stated"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def patient_remark(first: Reader, second: Reader) -> list[str]:
    """A sentence where both files say whose images they are, and say otherwise; nobody is named."""
    if not (isinstance(first, Identified) and isinstance(second, Identified)):
        return []
    mine, theirs = first.identity(), second.identity()
    found = []
    if mine.same_patient(theirs) is False:
        found.append("The two images are of different patients.")
    if mine.same_frame(theirs) is False:
        found.append("The two images have different frames of reference: their positions count from other origins.")
    return found
