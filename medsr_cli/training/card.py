"""The model card: what a checkpoint is, what it was trained on, and how it does beside bicubic.

A card goes where the weights go. It names no path and no file, for those may hold a patient's name: subjects
and volumes are numbered, and the images are named by their SHA-256. A contrast is told only where the file's
name ends in a word of a closed list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from medsr_cli.training.loop import TrainingState
from medsr_cli.training.pack import PackedSlices, PackedVolume
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.validation import VolumeScore, mean_gain_db

DEGRADATION = "cubic"
"""The manifest's word for `DEGRADATION_IN_WORDS`."""
DEGRADATION_IN_WORDS = "cv2 cubic a=-0.75 without antialiasing, no blur, no noise"
VALUE_RANGE = "0-1 per-volume min-max"
CONTRASTS = (
    *("T1w", "T2w", "PDw", "T1", "T2", "PD", "T1c", "T1ce", "T1gd", "T1post", "FLAIR", "T2star", "SWI", "DWI"),
    *("ADC", "BOLD", "ASL", "MRA", "TOF", "STIR", "CT", "CTA", "PET", "US", "CXR", "axial", "sagittal", "coronal"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a held-out volume, named or numbered."""

    subject: str
    contrast: str
    score: VolumeScore


@dataclass(frozen=True)
class Facts:
    """Everything that a card and a checkpoint's metadata tell."""

    id: str
    method: str
    variant: str | None
    config: Mapping[str, Any]
    scale: int
    channels: int
    parameters: int
    half: bool
    modality: str
    body_part: str
    spacing_mm: tuple[float, float] | None
    """Smallest and largest in-plane spacing of the low-resolution images."""
    licence: str
    data_licence: str
    recipe: Recipe
    state: TrainingState
    interrupted: bool
    device: str
    start: str
    """What training began with, in words."""
    train: Sequence[PackedVolume]
    held: Sequence[PackedVolume]
    train_slices: int
    held_slices: int
    rows: Sequence[Row]
    notes: Sequence[str]
    command: str
    date: str
    version: str

    @property
    def trained_on(self) -> str:
        """The training data in a sentence."""
        subjects = len({volume.subject for volume in self.train})
        return f"{subjects} subjects, {len(self.train)} volumes, {self.train_slices} slices; split by subject"

    @property
    def gain_db(self) -> float:
        """Mean gain over bicubic on the held-out volumes."""
        return mean_gain_db(row.score for row in self.rows)


def contrast_of(name: str) -> str:
    """The contrast that a file's name ends in, spelled as in `CONTRASTS`, or an empty text."""
    known = {word.lower(): word for word in CONTRASTS}
    stem = name.rsplit("/", 1)[-1].split(".", maxsplit=1)[0]
    words = [known.get(word.lower()) for word in re.split(r"[^A-Za-z0-9]+", stem)]
    return next((word for word in reversed(words) if word), "")


def table_rows(scores: Sequence[VolumeScore], *, named: bool) -> list[Row]:
    """Scores with their subjects numbered in order, or named."""
    numbers = {subject: i + 1 for i, subject in enumerate(dict.fromkeys(s.subject for s in scores))}
    return [
        Row(s.subject if named else f"subject {numbers[s.subject]}", contrast_of(s.name), s)
        for s in sorted(scores, key=lambda s: numbers[s.subject])
    ]


def low_resolution_spacing_mm(volumes: Sequence[PackedVolume], scale: int) -> tuple[float, float] | None:
    """In-plane spacings of the shrunken images, smallest and largest, to a micrometre; None where unknown."""
    known = [float(s) * scale for volume in volumes for s in volume.spacing_mm or ()]
    return (round(min(known), 3), round(max(known), 3)) if known else None


def slices_of(slices: PackedSlices, indices: NDArray[np.int64]) -> list[PackedVolume]:
    """The volumes that these slices are of."""
    return [slices.volumes[int(v)] for v in np.unique(slices.volume_of[indices])]


def metadata(facts: Facts) -> dict[str, str]:
    """What the checkpoint says about itself, in texts."""
    return {
        "id": facts.id,
        "variant": facts.variant or "",
        "scales": json.dumps([facts.scale]),
        "channels": str(facts.channels),
        "modality": facts.modality,
        "body_part": facts.body_part,
        "value_range": "[0.0, 1.0]",
        "normalisation": VALUE_RANGE,
        "degradation": DEGRADATION,
        "degradation_in_words": DEGRADATION_IN_WORDS,
        "spacing_mm": json.dumps(facts.spacing_mm),
        "licence_of_weights": facts.licence,
        "licence_of_data": facts.data_licence,
        "trained_on": facts.trained_on,
        "validation": json.dumps(_validation(facts.rows)),
        "recipe": facts.recipe.to_json(),
        "steps": str(facts.state.best_step),
        "command": facts.command,
        "date": facts.date,
        "medsr_version": facts.version,
    }


def _validation(rows: Sequence[Row]) -> list[dict[str, Any]]:
    figures = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
    return [
        {"name": row.subject, "contrast": row.contrast} | {f: round(getattr(row.score, f), 4) for f in figures}
        for row in rows
    ]


def write_card(facts: Facts, n_bytes: int, sha256: str) -> str:
    """The card as Markdown with a YAML block in front; `n_bytes` and `sha256` are the checkpoint's."""
    front = {
        "library_name": "medsr",
        "pipeline_tag": "image-to-image",
        "license": facts.licence,
        "tags": ["super-resolution", "medical-imaging", facts.method],
        "medsr": {
            **{k: v for k, v in metadata(facts).items() if k not in ("validation", "scales", "spacing_mm", "recipe")},
            "method": facts.method,
            "scales": [facts.scale],
            "spacing_mm": list(facts.spacing_mm) if facts.spacing_mm else None,
            "bytes": n_bytes,
            "sha256": sha256,
            "validation": _validation(facts.rows),
        },
    }
    block = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    sections = (_title, _results, _data, _recipe, _limits, _inputs)
    return f"---\n{block}---\n\n" + "\n\n".join(section(facts) for section in sections) + "\n"


def _title(facts: Facts) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in facts.config.items())
    ended = ", stopped before its last step" if facts.interrupted else ""
    return "\n".join(
        (
            f"# {facts.id}",
            "",
            f"{facts.variant or facts.method} x{facts.scale}, {facts.parameters:,} parameters"
            f"{' in half precision' if facts.half else ''}; {facts.modality}, {facts.body_part}.",
            "",
            f"- Network: {sizes}.",
            f"- Input: one channel, {VALUE_RANGE}. Output: the same slice, {facts.scale} times as many rows and "
            "columns.",
            f"- Degradation that it undoes: {DEGRADATION_IN_WORDS}.",
            f"- Trained {facts.date} with medsr {facts.version} on {facts.device}, from {facts.start}; "
            f"step {facts.state.best_step} of {facts.recipe.iterations}{ended}, "
            f"{facts.state.seconds / 60:.0f} minutes.",
            f"- Licence of the weights: {facts.licence}. Licence of the data: {facts.data_licence}.",
        )
    )


def _results(facts: Facts) -> str:
    lines = [
        "## Beside bicubic, on subjects that were not trained on",
        "",
        f"Mean gain {facts.gain_db:+.2f} dB. PSNR in dB and SSIM (7x7), data range 1, border of {facts.scale} pixels "
        "removed, means over slices.",
        "",
        "| volume | contrast | slices | PSNR | bicubic | gain | SSIM | bicubic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in facts.rows:
        s = row.score
        lines.append(
            f"| {row.subject} | {row.contrast or '-'} | {s.slices} | {s.psnr:.2f} | {s.bicubic_psnr:.2f} | "
            f"{s.gain_db:+.2f} | {s.ssim:.4f} | {s.bicubic_ssim:.4f} |"
        )
    worse = sum(row.score.gain_db < 0 for row in facts.rows)
    if worse:
        lines += ["", f"**{worse} of these {len(facts.rows)} volumes are worse than with bicubic.**"]
    return "\n".join(lines + [line for note in facts.notes for line in ("", note)])


def _data(facts: Facts) -> str:
    held = len({volume.subject for volume in facts.held})
    return "\n".join(
        (
            "## Data",
            "",
            f"- Trained on {facts.trained_on}.",
            f"- Validated on {held} other subjects, {len(facts.held)} volumes, {facts.held_slices} slices "
            f"(measured: {sum(row.score.slices for row in facts.rows)}).",
            f"- In-plane spacing of the low-resolution images: {_spacing(facts)}.",
        )
    )


def _spacing(facts: Facts) -> str:
    return "not known" if facts.spacing_mm is None else f"{facts.spacing_mm[0]:g} to {facts.spacing_mm[1]:g} mm"


def _recipe(facts: Facts) -> str:
    given = asdict(facts.recipe)
    rows = [f"| {field.name} | {given[field.name]} |" for field in fields(Recipe)]
    table = "\n".join(("| field | value |", "|---|---|", *rows))
    return (
        f"## Recipe\n\nL1 on pairs of patches, Adam. Fields as in `medsr_cli/training/recipe.py`:\n\n{table}\n\n"
        f"Command, less its paths:\n\n    {facts.command}"
    )


def _limits(facts: Facts) -> str:
    return (
        "## Limits\n\n"
        "- Research use; not a medical device.\n"
        "- In-plane only: slices do not become thinner.\n"
        f"- For images like those above ({facts.modality}, {facts.body_part}) and scale {facts.scale} alone; the "
        "low-resolution images were simulated, and a scanner's own may differ.\n"
        "- What is finer than the input's grid is inferred from the training images and may not be there."
    )


def _inputs(facts: Facts) -> str:
    lines = ["## SHA-256 of the images", "", "Training:", ""]
    lines += [f"- {volume.sha256}" for volume in facts.train]
    lines += ["", "Validation:", ""]
    lines += [f"- {volume.sha256}" for volume in facts.held]
    return "\n".join(lines)
