"""What is in an image, without running anything on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsr_cli import formats
from medsr_cli.errors import InputRefused
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.networks.catalogue import find
from medsr_cli.tasks.weights import list_weights
from medsr_cli.volume.volume import Volume


@dataclass
class Inspected:
    """Facts of one image, or the reason why it is refused."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)
    error: InputRefused | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        refused = str(self.error) if self.error else None
        return {
            "input": str(self.path),
            **self.facts,
            "warnings": self.warnings,
            "usable": self.usable,
            "refused": refused,
        }


def inspect_image(path: Path, axis: str = "auto", series: str | None = None) -> Inspected:
    """Open an image and say what it is; a refusal is in the result, so that the next one can follow."""
    found = Inspected(path)
    try:
        reader = formats.open_image(path, ReadOptions(axis, series))
    except InputRefused as error:
        found.error = error
        return found
    found.facts = facts_of(reader.volume) | dict(reader.details())
    found.warnings = list(reader.volume.warnings)
    found.usable = usable_checkpoints(reader.volume)
    return found


def facts_of(volume: Volume) -> dict[str, Any]:
    """Geometry and type in the words of a report."""
    spacing = volume.spacing_mm
    return {
        "format": volume.format,
        "slices": volume.slices,
        "rows x columns": f"{volume.rows} x {volume.columns}",
        "slice axis": volume.slice_axis,
        "pixel spacing": f"{spacing[0]:.4g} x {spacing[1]:.4g} mm" if spacing else "not stated",
        "slice spacing": f"{volume.slice_spacing_mm:.4g} mm" if volume.slice_spacing_mm else "not stated",
        "type": str(volume.dtype),
        "channels": volume.channels,
        "modality": volume.modality or "not stated",
    }


def usable_checkpoints(volume: Volume) -> list[str]:
    """Checkpoints on this machine that suit the image's modality."""
    lines = []
    for row in list_weights():
        entry = row.entry
        suits = volume.modality in (None, entry.modality) or entry.modality == "any"
        suits = suits and find(entry.method)[0].kind == "network"
        if suits and row.state not in ("missing", "corrupt"):
            scales = ", ".join(f"x{words}" for words in entry.scale_words)
            lines.append(f"{scales} with {entry.id} ({entry.body_part} {entry.modality.upper()})")
    return lines
