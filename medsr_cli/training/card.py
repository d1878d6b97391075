"""The model card: what a checkpoint is, what it was trained on, and how it does beside what it has to beat.

A card goes where the weights go. It names no path and no file, for those may hold a patient's name: subjects
and volumes are numbered, and the images are named by their SHA-256. A contrast is told only where the file's
name ends in a word of a closed list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from medsr_cli.evaluation.agreement_map import Limit
from medsr_cli.training.pack import PackedSlices, PackedVolume
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.state import TrainingState
from medsr_cli.training.validation import CentreScore, OverlapScore, Score, VolumeScore, mean_gain
from medsr_cli.volume.degradation import BAND_LIMITED, BICUBIC_ANTIALIASED, CUBIC, CUBIC_BLUR, FOURIER

IN_WORDS = {
    CUBIC.name: "cv2 cubic a=-0.75 without antialiasing, no blur",
    CUBIC_BLUR.name: "cv2 cubic a=-0.75 without antialiasing, then a 3x3 blur of (1/4, 1/2, 1/4)",
    BICUBIC_ANTIALIASED.name: "bicubic a=-0.5 with antialiasing, no blur",
    BAND_LIMITED.name: "the centre of k-space, borders mirrored, edges aligned, no blur",
    FOURIER.name: "the centre of k-space as Cohf-T's authors crop it, first pixels' centres aligned, no blur",
}
"""What each degradation does, for a reader who has no medsr at hand."""
GIVEN = "low-resolution images came with the data"
VALUE_RANGE = "0-1 per-volume min-max"
FULL_SCALE = "8-bit images divided by 255, others 0-1 per-volume min-max"
PIPELINES = {
    "super-resolution": "image-to-image",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
}
CONTRASTS = (
    *("T1w", "T2w", "PDw", "T1", "T2", "PD", "T1c", "T1ce", "T1gd", "T1post", "FLAIR", "T2star", "SWI", "DWI"),
    *("ADC", "BOLD", "ASL", "MRA", "TOF", "STIR", "CT", "CTA", "PET", "US", "CXR", "axial", "sagittal", "coronal"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a held-out volume, named or numbered."""

    subject: str
    contrast: str
    score: Score


@dataclass(frozen=True)
class Facts:
    """Everything that a card and a checkpoint's metadata tell."""

    id: str
    method: str
    variant: str | None
    config: Mapping[str, Any]
    scale: int | None
    """None where the network takes any, or enlarges nothing."""
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
    scale_range: tuple[float, float] | None = None
    """Of a network for any scale."""
    degradation: str = CUBIC.name
    """The name in `volume.degradation`; `none` where nothing is made small."""
    degradation_in_words: str = IN_WORDS[CUBIC.name] + ", no noise"
    normalisation: str = VALUE_RANGE
    networks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Name and SHA-256 of the networks that the losses compared with, by role."""
    processes: int = 1
    limit: Limit | None = None
    """How far its shrunken results may be from the input; None for what enlarges nothing."""
    precision_cost_db: Mapping[str, float] | None = None
    """What bfloat16 costs, see `release.precision_cost_db`; None: not measured."""

    @property
    def trained_on(self) -> str:
        """The training data in a sentence."""
        subjects = len({volume.subject for volume in self.train})
        return f"{subjects} subjects, {len(self.train)} volumes, {self.train_slices} slices; split by subject"

    @property
    def gain(self) -> float:
        """Mean over the held-out volumes above the baseline."""
        return mean_gain(row.score for row in self.rows)

    @property
    def enlarges(self) -> bool:
        """Whether it makes images larger."""
        return self.recipe.task == "super-resolution"

    @property
    def factor(self) -> str:
        """The enlargement, or enlargements, in words; empty where there is none."""
        if self.scale_range is not None:
            return f"above x{self.scale_range[0]:g} and up to x{self.scale_range[1]:g}"
        return f"x{self.scale}" if self.scale else ""


def degradation_of(recipe: Recipe, *, given: tuple[float, float] = (0.0, 0.0)) -> tuple[str, str]:
    """Name of the degradation that a network undoes, and what was done in words.

    A network that was trained on images of which some were not blurred goes by the name of the unblurred one:
    `upscale` takes its results back by it and compares them with an input that nobody blurred.

    Args:
        recipe: of the training.
        given: shares of the slices trained and validated on whose low-resolution images came with the data instead
            of being made.
    """
    if recipe.task != "super-resolution":
        return "none", "none"
    if min(given) == 1:
        return recipe.degradation, f"{GIVEN}; nothing was simulated"
    words, name = IN_WORDS.get(recipe.degradation, recipe.degradation), recipe.degradation
    if name == CUBIC_BLUR.name:
        full, none = recipe.blur_draws
        words += f", blended in by {recipe.blur_share:g}" if recipe.blur_share != 1 else ""
        if full < 1:
            words += f" ({full:.0%} of the patches in full, {none:.0%} not at all, the others in between)"
            name = CUBIC.name
    noise = f"Gaussian noise of up to {recipe.noise:g} of the range" if recipe.noise else "no noise"
    if max(given) == 0:
        return name, f"{words}, {noise}"
    train, held = (f"{share:.1%} of " if 0 < share < 1 else "" for share in given)
    both = [f"{train}those trained on" if given[0] else "", f"{held}those validated on" if given[1] else ""]
    return name, f"{GIVEN} for {' and '.join(filter(None, both))}; the others were simulated: {words}, {noise}"


def contrast_of(name: str) -> str:
    """The contrast that a file's name ends in, spelled as in `CONTRASTS`, or an empty text."""
    known = {word.lower(): word for word in CONTRASTS}
    stem = name.rsplit("/", 1)[-1].split(".", maxsplit=1)[0]
    words = [known.get(word.lower()) for word in re.split(r"[^A-Za-z0-9]+", stem)]
    return next((word for word in reversed(words) if word), "")


def table_rows(scores: Sequence[Score], *, named: bool) -> list[Row]:
    """Scores with their subjects numbered in order, or named."""
    numbers = {subject: i + 1 for i, subject in enumerate(dict.fromkeys(s.subject for s in scores))}
    return [
        Row(s.subject if named else f"subject {numbers[s.subject]}", contrast_of(s.name), s)
        for s in sorted(scores, key=lambda s: numbers[s.subject])
    ]


def low_resolution_spacing_mm(volumes: Sequence[PackedVolume], factors: Sequence[float]) -> tuple[float, float] | None:
    """In-plane spacings of the shrunken images, smallest and largest, to a micrometre; None where unknown.

    Args:
        volumes: those trained on.
        factors: by how much they were shrunken: one number, or the smallest and the largest.
    """
    known = [float(s) for volume in volumes for s in volume.spacing_mm or ()]
    return (round(min(known) * min(factors), 3), round(max(known) * max(factors), 3)) if known else None


def slices_of(slices: PackedSlices, indices: NDArray[np.int64]) -> list[PackedVolume]:
    """The volumes that these slices are of."""
    return [slices.volumes[int(v)] for v in np.unique(slices.volume_of[indices])]


def metadata(facts: Facts) -> dict[str, str]:
    """What the checkpoint says about itself, in texts."""
    ranged = {"scale_range": json.dumps(facts.scale_range)} if facts.scale_range else {}
    networks = {role: sha256 for role, (_, sha256) in facts.networks.items()}
    return {
        "id": facts.id,
        "variant": facts.variant or "",
        "scales": json.dumps(_scales(facts)),
        **ranged,
        "channels": str(facts.channels),
        "modality": facts.modality,
        "body_part": facts.body_part,
        "value_range": "[0.0, 1.0]",
        "normalisation": facts.normalisation,
        "degradation": facts.degradation,
        "degradation_in_words": facts.degradation_in_words,
        "spacing_mm": json.dumps(facts.spacing_mm),
        "licence_of_weights": facts.licence,
        "licence_of_data": facts.data_licence,
        "trained_on": facts.trained_on,
        "validation": json.dumps(_validation(facts.rows)),
        "recipe": facts.recipe.to_json(),
        **({"networks": json.dumps(networks)} if networks else {}),
        **({"consistency": facts.limit.to_json()} if facts.limit is not None else {}),
        **({"precision_cost_db": json.dumps(dict(facts.precision_cost_db))} if facts.precision_cost_db else {}),
        "losses": json.dumps(sorted({term for stage in facts.recipe.stages for term in stage.losses})),
        "steps": str(facts.state.best_step),
        "command": facts.command,
        "date": facts.date,
        "medsr_version": facts.version,
    }


def _scales(facts: Facts) -> list[int]:
    return [facts.scale] if facts.scale else []


def _validation(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"name": row.subject, "contrast": row.contrast} | _figures(row.score) for row in rows]


def _figures(score: Score) -> dict[str, float]:
    """The numbers of a score, rounded."""
    names: tuple[str, ...] = ("figure", "gain")
    if isinstance(score, VolumeScore):
        names = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
    elif isinstance(score, OverlapScore):
        names = ("dice", "threshold_dice")
    elif isinstance(score, CentreScore):
        names = ("distance", "mean_distance")
    return {name: round(float(getattr(score, name)), 4) for name in names}


def write_card(facts: Facts, n_bytes: int, sha256: str, curve: str = "") -> str:
    """The card as Markdown with a YAML block in front.

    Args:
        facts: everything that it tells.
        n_bytes: of the checkpoint.
        sha256: of the checkpoint.
        curve: name of the picture of the training curve, where there is one.
    """
    said = metadata(facts)
    own = ("validation", "scales", "scale_range", "spacing_mm", "recipe", "networks")
    front = {
        "library_name": "medsr",
        "pipeline_tag": PIPELINES[facts.recipe.task],
        "license": facts.licence,
        "tags": [facts.recipe.task, "medical-imaging", facts.method],
        "medsr": {
            **{k: v for k, v in said.items() if k not in own},
            "method": facts.method,
            "scales": _scales(facts),
            "scale_range": list(facts.scale_range) if facts.scale_range else None,
            "spacing_mm": list(facts.spacing_mm) if facts.spacing_mm else None,
            "bytes": n_bytes,
            "sha256": sha256,
            "networks": {role: {"name": name, "sha256": own} for role, (name, own) in facts.networks.items()},
            "validation": _validation(facts.rows),
        },
    }
    block = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    sections = [section(facts) for section in (_title, _results, _data, _recipe, _limits, _inputs)]
    if curve:
        sections.insert(2, f"![gain and loss over the steps]({curve})")
    return f"---\n{block}---\n\n" + "\n\n".join(sections) + "\n"


def _title(facts: Facts) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in facts.config.items())
    ended = ", stopped before its last step" if facts.interrupted else ""
    name = " ".join(part for part in (facts.variant or facts.method, facts.factor) if part)
    together = f" in {facts.processes} processes" if facts.processes > 1 else ""
    lines = [
        f"# {facts.id}",
        "",
        f"{name}, {facts.parameters:,} parameters"
        f"{' in half precision' if facts.half else ''}; {facts.modality}, {facts.body_part}.",
        "",
        f"- Network: {sizes}.",
        f"- {_takes(facts)}",
    ]
    if facts.enlarges:
        lines.append(f"- Degradation that it undoes: {facts.degradation_in_words}.")
    lines += [
        f"- Trained {facts.date} with medsr {facts.version} on {facts.device}{together}, from {facts.start}; "
        f"step {facts.state.best_step} of {facts.recipe.total}{ended}, "
        f"{facts.state.seconds / 60:.0f} minutes.",
        f"- Licence of the weights: {facts.licence}. Licence of the data: {facts.data_licence}.",
    ]
    return "\n".join(lines)


def _takes(facts: Facts) -> str:
    """What goes in and what comes out."""
    channels = "one channel" if facts.channels == 1 else f"{facts.channels} channels"
    given = f"Input: {channels}, {facts.normalisation}."
    if facts.recipe.task == "segmentation":
        return f"{given} Output: a label for each pixel, 0 to {facts.config.get('classes', 2) - 1}, 0 the background."
    if facts.recipe.task == "detection":
        return f"{given} Output: the centre (x, y) of the lesion, from 0 to 1 along each side."
    if facts.scale is None:
        return f"{given} Output: the same slice, larger by any factor {facts.factor}, also another along each axis."
    return f"{given} Output: the same slice, {facts.scale} times as many rows and columns."


def _results(facts: Facts) -> str:
    return "\n".join([*_table(facts), *(line for note in facts.notes for line in ("", note))])


def _table(facts: Facts) -> list[str]:
    scores = [row.score for row in facts.rows]
    first = scores[0] if scores else None
    title, columns, said = _headings(facts, first)
    lines = [f"## {title}", "", said, "", f"| volume | contrast | slices | {' | '.join(columns)} |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for row in facts.rows:
        cells = (row.subject, row.contrast or "-", str(row.score.slices), *_cells(row.score))
        lines.append(f"| {' | '.join(cells)} |")
    worse = sum(score.gain < 0 for score in scores)
    if worse and first is not None:
        lines += ["", f"**{worse} of these {len(scores)} volumes are worse than with {first.baseline}.**"]
    return lines + _by_condition(scores)


def _headings(facts: Facts, score: Score | None) -> tuple[str, tuple[str, ...], str]:
    """Title of the table, its own columns, and what its figures are."""
    if isinstance(score, OverlapScore):
        said = f"Mean gain {facts.gain:+.3f}. Dice of all labels together, one-hot, over the slices of a volume."
        said += " Threshold: for each label the one intensity threshold that overlaps best on the training subjects."
        return "Beside thresholds, on subjects that were not trained on", ("Dice", "threshold", "gain"), said
    if isinstance(score, CentreScore):
        said = (
            f"Mean gain {facts.gain:+.3f}. Distances of the centre in shares of the image's sides, means over slices."
        )
        said += " Mean centre: always answering that of the training subjects."
        title = "Beside the mean centre, on subjects that were not trained on"
        return title, ("distance", "mean centre", "gain"), said
    border = f"{facts.scale} pixels" if facts.scale else "as many pixels as the factor, rounded up,"
    said = f"Mean gain {facts.gain:+.2f} dB. PSNR in dB and SSIM (7x7), data range 1, border of {border} "
    said += "removed, means over slices."
    columns = ("PSNR", "bicubic", "gain", "SSIM", "bicubic")
    return "Beside bicubic, on subjects that were not trained on", columns, said


def _cells(score: Score) -> tuple[str, ...]:
    if isinstance(score, VolumeScore):
        psnr = (f"{score.psnr:.2f}", f"{score.bicubic_psnr:.2f}", f"{score.gain:+.2f}")
        return (*psnr, f"{score.ssim:.4f}", f"{score.bicubic_ssim:.4f}")
    if isinstance(score, OverlapScore):
        return f"{score.dice:.3f}", f"{score.threshold_dice:.3f}", f"{score.gain:+.3f}"
    if isinstance(score, CentreScore):
        return f"{score.distance:.3f}", f"{score.mean_distance:.3f}", f"{score.gain:+.3f}"
    return f"{score.figure:.3f}", "-", f"{score.gain:+.3f}"


def _by_condition(scores: Sequence[Score]) -> list[str]:
    """The means over the volumes for each enlargement and blur, where there is more than one."""
    tables: dict[str, list[tuple[float, float, float, float]]] = {}
    for score in scores:
        for row in score.conditions if isinstance(score, VolumeScore) else ():
            figures = (row.psnr, row.bicubic_psnr, row.ssim, row.bicubic_ssim)
            tables.setdefault(row.condition, []).append(figures)
    if not tables:
        return []
    lines = ["", "Means over the volumes:", "", "| low-resolution image | PSNR | bicubic | gain | SSIM | bicubic |"]
    lines.append("|" + "---|" * 6)
    for condition, rows in tables.items():
        psnr, cubic, ssim, cubic_ssim = (float(value) for value in np.mean(rows, axis=0))
        lines.append(
            f"| {condition} | {psnr:.2f} | {cubic:.2f} | {psnr - cubic:+.2f} | {ssim:.4f} | {cubic_ssim:.4f} |"
        )
    return lines


def _data(facts: Facts) -> str:
    held = len({volume.subject for volume in facts.held})
    lines = [
        "## Data",
        "",
        f"- Trained on {facts.trained_on}.",
        f"- Validated on {held} other subjects, {len(facts.held)} volumes, {facts.held_slices} slices "
        f"(measured: {sum(row.score.slices for row in facts.rows)}).",
    ]
    if facts.enlarges:
        lines.append(f"- In-plane spacing of the low-resolution images: {_spacing(facts)}.")
    guided = sum(volume.guide is not None for volume in facts.train)
    labelled = sum(volume.labels is not None for volume in facts.train)
    lines += [f"- {guided} of the training volumes have a guide of another contrast."] if guided else []
    lines += [f"- {labelled} of the training volumes have a mask or a label map."] if labelled else []
    return "\n".join(lines)


def _spacing(facts: Facts) -> str:
    return "not known" if facts.spacing_mm is None else f"{facts.spacing_mm[0]:g} to {facts.spacing_mm[1]:g} mm"


def _recipe(facts: Facts) -> str:
    stages = facts.recipe.stages
    parts = ["## Recipe", "", "Adam. Fields as in `medsr_cli/training/recipe.py`."]
    for number, stage in enumerate(stages, start=1):
        parts += ["", *([f"Stage {number}:", ""] if len(stages) > 1 else []), *_stage_table(stage)]
    if facts.networks:
        parts += ["", "Networks that the losses compare with:", ""]
        parts += [f"- {role}: {name}, SHA-256 {sha256}" for role, (name, sha256) in facts.networks.items()]
    parts += ["", "Command, less its paths:", "", f"    {facts.command}"]
    return "\n".join(parts)


def _stage_table(stage: Recipe) -> list[str]:
    names = [item.name for item in fields(Recipe) if item.name not in ("then", "sources")]
    rows = [f"| {name} | {getattr(stage, name)} | {stage.sources.get(name, '')} |" for name in names]
    return ["| field | value | source |", "|---|---|---|", *rows]


def _limits(facts: Facts) -> str:
    lines = ["## Limits", "", "- Research use; not a medical device."]
    if facts.enlarges:
        some = "some of the" if facts.degradation_in_words.startswith(GIVEN) else "the"
        given = "nothing was simulated" in facts.degradation_in_words
        simulated = "" if given else f"; {some} low-resolution images were simulated, and a scanner's own may differ"
        scales = f"scale {facts.scale}" if facts.scale else f"scales {facts.factor}"
        lines += [
            "- In-plane only: slices do not become thinner.",
            f"- For images like those above ({facts.modality}, {facts.body_part}) and {scales} alone{simulated}.",
            "- What is finer than the input's grid is inferred from the training images and may not be there.",
        ]
    else:
        lines += [
            f"- For images like those above ({facts.modality}, {facts.body_part}) alone.",
            "- It is part of a training or a search for regions, and no finding.",
        ]
    return "\n".join(lines)


def _inputs(facts: Facts) -> str:
    lines = ["## SHA-256 of the images", "", "Training:", ""]
    lines += [f"- {volume.sha256}" for volume in facts.train]
    lines += ["", "Validation:", ""]
    lines += [f"- {volume.sha256}" for volume in facts.held]
    return "\n".join(lines)
