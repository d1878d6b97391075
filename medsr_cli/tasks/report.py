"""What a run tells about itself: everything that somebody needs to trust, question or repeat it."""

from __future__ import annotations

from typing import Any

import numpy as np

from medsr_cli.errors import mention
from medsr_cli.formats.contract import Reader
from medsr_cli.provenance.discretion import discreet_facts, discreet_text, id_of, introduce, named_checkpoint
from medsr_cli.provenance.record import IN_PLANE, NOTICE, sha256_of, software
from medsr_cli.tasks.enlarge import Measured
from medsr_cli.tasks.model import Model
from medsr_cli.tasks.request import Item
from medsr_cli.volume.intensity import IntensityRange
from medsr_cli.volume.volume import Volume

UNEVEN = ("gantry_tilt_degrees", "smallest_step_mm", "largest_step_mm", "time_points")
"""Facts of a reader that say how its slices lie to each other."""


def told_checkpoint(checkpoint_id: str | None) -> str | None:
    """A checkpoint as headers of results tell it: its id, or what stands in for the name of a file."""
    named = named_checkpoint(checkpoint_id)
    return None if named is None else discreet_text(named)


def remarks(intensity: IntensityRange) -> list[str]:
    """What is odd about the values of an image."""
    found = []
    if intensity.width == 0:
        found.append("The image is constant; it was enlarged without the network.")
    if intensity.not_finite:
        found.append(f"{intensity.not_finite} voxels are not numbers; they stay so, at their places.")
    return found


def report_of(
    item: Item, reader: Reader, result: Volume, model: Model, measured: Measured, facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything about one result; `facts` is what the run knows beside: region, guide.

    Stand-ins are there for the names of files, and the digits of input and output beside, unless names are shown.
    """
    intensity = measured.intensity
    found: dict[str, Any] = discreet_facts(_told(item, reader, result, model, measured, facts, intensity))
    return found


def _told(
    item: Item,
    reader: Reader,
    result: Volume,
    model: Model,
    measured: Measured,
    facts: dict[str, Any],
    intensity: IntensityRange,
) -> dict[str, Any]:
    introduce(item.source)
    for path in (item.output, *item.more_outputs):
        if path is not None:
            introduce(path)
    return {
        "notice": NOTICE,
        "limits": IN_PLANE,
        "software": software(),
        "model": {
            "method": model.method,
            "scale": model.scale[0] if model.scale[0] == model.scale[1] else list(model.scale),
            "checkpoint": named_checkpoint(model.checkpoint_id),
            "sha256": model.checkpoint_sha256,
            "engine": model.engine.name,
            "device": model.engine.device,
            "precision": model.engine.precision,
            "perceptual": model.perceptual,
            **model.facts,
        },
        "input": {
            "name": mention(item.source.name),
            "id": id_of(item.source),
            "sha256": sha256_of(item.source),
            **geometry(reader.volume),
            **{name: value for name, value in reader.details().items() if name in UNEVEN and value},
        },
        "output": {
            "name": mention(item.output.name) if item.output else None,
            "id": id_of(item.output) if item.output else None,
            "sha256": sha256_of(item.output) if item.output else None,
            "beside": [mention(path.name) for path in item.more_outputs],
            **geometry(result),
        },
        "intensity": {
            "minimum": intensity.minimum,
            "maximum": intensity.maximum,
            "not_finite": intensity.not_finite,
            "padded": intensity.padded,
            "clipped": measured.clipped,
            "constant_slices": measured.constant_slices,
        },
        "consistency": measured.consistency.report(intensity.width),
        **({"spread": {"mean": measured.spread[0], "largest": measured.spread[1]}} if measured.spread else {}),
        **facts,
        "warnings": item.warnings,
    }


def geometry(volume: Volume) -> dict[str, Any]:
    """Size, spacing and place of a volume, for the report."""
    return {
        "format": volume.format,
        "shape": list(volume.array_shape),
        "slices": volume.slices,
        "rows": volume.rows,
        "columns": volume.columns,
        "channels": volume.channels,
        "dtype": str(volume.dtype),
        "slice_axis": volume.slice_axis,
        "spacing_mm": volume.spacing_mm,
        "slice_spacing_mm": volume.slice_spacing_mm,
        "affine": None if volume.affine is None else np.asarray(volume.affine).tolist(),
    }
