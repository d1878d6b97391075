"""From a name and a scale to an engine that is ready to run, and the facts about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from medsr_cli.engines.engine import Engine, Interpolation
from medsr_cli.engines.wrapped import (
    BACK_PROJECTIONS,
    BackProjected,
    Colours,
    Ensemble,
    Fitted,
    Realigned,
    median_of_orientations,
)
from medsr_cli.errors import ArgumentsError, WeightsError, mention
from medsr_cli.evaluation.agreement_map import Limit, limit_of_json
from medsr_cli.networks import catalogue
from medsr_cli.tasks.loading import Checkpoint, load_checkpoint
from medsr_cli.tasks.magnification import Factors, in_words
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.speeds import Workload
from medsr_cli.volume.degradation import Degradation, degradation_named
from medsr_cli.volume.resample import Kernel
from medsr_cli.weights.manifest import Entry, precision_cost_of_json

if TYPE_CHECKING:
    from medsr_cli.tasks.weights import Shelf

MEDIAN_FACTS: dict[str, Any] = {
    "ensemble": "median of eight orientations",
    "back_projection": [BACK_PROJECTIONS, BACK_PROJECTIONS],
}
"""For the report of the ultrasound CycleGAN's inference."""
FILES = (".safetensors", ".onnx")
"""Endings of files that hold a checkpoint as medsr writes it."""
STEPS_OF_FIT = range(2, 9)
"""Whole scales that `--fit` tries, from the next larger one up."""
PERCEPTUAL_TERMS = ("wgan", "vgg")
"""How the names of losses begin that reward what looks right."""
PERCEPTUAL_WARNING = (
    "This network was trained to look right, by a critic or by activations of another network: of its fine detail, "
    "more may be invented than of others'."
)


@dataclass(frozen=True)
class ModelRequest:
    """Which network, and how it is to run."""

    model: str = "rdst"
    weights: str | None = None
    """A checkpoint's id, a path, or None for the manifest's choice."""
    modality: str | None = None
    device: str = "auto"
    precision: str = "auto"
    tile: int | None = None
    threads: int | None = None
    backend: str = "auto"
    """`torch`, `onnx`, or `auto` for the one that is faster here."""
    probe: bool = True
    """Whether `auto` may measure what it does not know yet."""
    max_vram: int | None = None
    """Most bytes of the device that a run may take."""
    deterministic: bool = False
    """The same bits each time, at the price of speed; `auto` is PyTorch then."""
    offline: bool = False
    allow_unpinned: bool = False
    fit: bool = False
    """Reach scales without a checkpoint by the next larger one, shrunken to size."""
    ensemble: bool = False
    """Average eight orientations."""
    back_projection: int = 0
    """Corrections of the result by its own difference from the input."""


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of the images it was trained for; None where it does not say."""

    modality: str | None = None
    spacing_mm: tuple[float, float] | None = None
    """Smallest and largest pixel of the low-resolution images."""
    degradation: str | None = None
    notes: str = ""
    limit: Limit = field(default_factory=Limit)
    """How far its shrunken results may be from the input."""
    perceptual: bool = False
    """Whether it was trained to look right, by a critic or activations of a network, not only to be near."""

    precision_cost_db: Mapping[str, float] = field(default_factory=dict)
    """What arithmetic narrower than float32 was measured to lose, by its name."""

    @classmethod
    def of_entry(cls, entry: Entry) -> Card:
        """That of an entry of the manifest."""
        known = entry.consistency
        limit = Limit(known.limit, known.slices, known.largest_seen) if known else Limit()
        costs = entry.precision_cost_db.by_name if entry.precision_cost_db else {}
        return cls(entry.modality, entry.spacing_mm, entry.degradation, entry.notes, limit, precision_cost_db=costs)

    @classmethod
    def of_file(cls, path: Path) -> Card:
        """That of a checkpoint file, from its metadata; what is missing or unreadable there is not known."""
        return cls.of_metadata(metadata_of(path))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Card:
        """That of a file's metadata."""
        try:
            low, high = (float(text) for text in json.loads(metadata.get("spacing_mm", "null")))
            spacing_mm = (low, high)
        except (TypeError, ValueError):
            spacing_mm = None
        costs = precision_cost_of_json(metadata.get("precision_cost_db"))
        return cls(
            metadata.get("modality"),
            spacing_mm,
            metadata.get("degradation"),
            metadata.get("notes", ""),
            limit_of_json(metadata.get("consistency")),
            is_perceptual(metadata),
            costs.by_name if costs else {},
        )


def metadata_of(path: Path) -> Mapping[str, str]:
    """What a checkpoint file says of itself.

    Raises:
        WeightsError: it is not whole, or not a file that medsr writes.
    """
    if path.suffix == ".onnx":
        from medsr_cli.engines.onnx_file import read_onnx

        return read_onnx(path).metadata
    from medsr_cli.weights.headers import read_header

    return read_header(path).metadata


def is_perceptual(metadata: Mapping[str, str]) -> bool:
    """Whether the losses that a checkpoint's metadata name have a critic or compare activations."""
    try:
        losses = json.loads(metadata.get("losses", "[]"))
    except ValueError:
        return False
    return isinstance(losses, list) and any(str(term).startswith(PERCEPTUAL_TERMS) for term in losses)


@dataclass(frozen=True)
class Model:
    """An engine and what is known of its weights."""

    method: str
    engine: Engine
    arch: catalogue.Arch
    scale: Factors
    checkpoint_id: str | None = None
    checkpoint_sha256: str | None = None
    card: Card = field(default_factory=Card)
    facts: dict[str, Any] = field(default_factory=dict)
    """For the report, beside what every model has: an ensemble, a training on the image, a scale fitted."""

    @property
    def degradation(self) -> str | None:
        """What the checkpoint was trained to undo."""
        return self.card.degradation

    def doubts(self, modality: str | None, spacing_mm: tuple[float, float] | None) -> list[str]:
        """Why this checkpoint may not suit an image, a sentence each."""
        card, found = self.card, []
        if modality is not None and card.modality not in (None, modality, "any"):
            found.append(
                f"The checkpoint {self.checkpoint_id} was trained on {card.modality.upper()} images; "
                f"this is {modality.upper()}."
            )
        if spacing_mm is not None and card.spacing_mm is not None:
            low, high = card.spacing_mm
            if not (low * 0.95 <= min(spacing_mm) and max(spacing_mm) <= high * 1.05):
                found.append(
                    f"The checkpoint {self.checkpoint_id} was trained for pixels of {low:.3g} to {high:.3g} mm; "
                    f"these are {spacing_mm[0]:.3g} x {spacing_mm[1]:.3g} mm."
                )
        if self.arch.warning:
            found.append(self.arch.warning)
        return found

    @property
    def perceptual(self) -> bool:
        """Whether it was trained to look right: the CycleGAN always is."""
        return self.card.perceptual or self.arch.id == catalogue.USCYCLEGAN.id


@dataclass(frozen=True)
class Run:
    """What is to be enlarged, and who is told."""

    progress: Progress
    workload: Workload | None = None


def load_model(
    request: ModelRequest,
    scale: Factors,
    modality: str | None,
    progress: Progress,
    workload: Workload | None = None,
) -> Model:
    """The engine for a request.

    Args:
        request: what was asked for.
        scale: enlargement along rows and columns.
        modality: that of the image, if known; it chooses among checkpoints of one method.
        progress: is told which checkpoint was taken.
        workload: what is to be enlarged, which decides whether measuring engines is worth the time.

    Raises:
        ArgumentsError: no such method, or a scale it does not have.
        WeightsError: the checkpoint is missing or fails its checksum.
        DeviceUnavailable: the device is not there.
    """
    arch = _method(request)
    run = Run(progress, workload)
    if arch is not None and arch.kind == "baseline":
        model = _baseline(arch, request, scale)
    elif arch is not None and arch.kind != "network":
        msg = f"{arch.id} does not enlarge images."
        raise ArgumentsError(msg, "See medsr models for the methods that do.")
    elif request.weights is not None and is_path(request.weights):
        model = _from_file(request, Path(request.weights), arch, scale, run)
    else:
        model = _from_manifest(request, scale, modality or request.modality, run)
    return finished(model, request)


def finished(model: Model, request: ModelRequest) -> Model:
    """The model with what a request puts around its engine."""
    engine: Engine = Colours(model.engine)
    facts = dict(model.facts)
    if request.ensemble:
        engine = Ensemble(engine)
        facts["ensemble"] = "mean of eight orientations"
    if request.back_projection:
        engine = BackProjected(engine, degradation_of(model), request.back_projection)
        facts["back_projection"] = request.back_projection
    return replace(model, engine=engine, facts=facts)


def degradation_of(model: Model) -> Degradation:
    """What the model's checkpoint undoes; that of the method where the checkpoint does not say."""
    return degradation_named(model.degradation or model.arch.degradation)


def _method(request: ModelRequest) -> catalogue.Arch | None:
    try:
        return catalogue.find(request.model)[0]
    except ArgumentsError:
        # `-m` also takes the id of a checkpoint; the manifest says what there is if it is neither.
        if request.weights is not None:
            raise
        return None


def is_path(name: str) -> bool:
    """Whether `--weights` names a file, not a checkpoint's id."""
    return Path(name).suffix in (*FILES, ".pt", ".pth", ".tar") or Path(name).exists()


def _baseline(arch: catalogue.Arch, request: ModelRequest, scale: Factors) -> Model:
    if request.weights is not None:
        msg = f"{arch.id} has no weights."
        raise ArgumentsError(msg, "Leave out --weights.")
    if not 1 < max(scale) <= max(arch.scales):
        msg = f"{arch.id} does not enlarge by {in_words(scale)}."
        raise ArgumentsError(msg, f"Give a scale above 1 and up to {max(arch.scales)}.")
    kernel: Kernel = "lanczos" if arch.id == "lanczos" else "cubic"
    return Model(arch.id, Interpolation(kernel, scale), arch, scale)


def _from_manifest(request: ModelRequest, scale: Factors, modality: str | None, run: Run) -> Model:
    from medsr_cli.provenance.record import sha256_of
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    name = request.weights or request.model
    entry, own_scale = _select(shelf, request.fit, name, scale, modality)
    path = shelf.store.verified_path(entry, request.allow_unpinned)
    run.progress.say(f"Using {entry.id}.")
    card = Card.of_entry(entry)
    checkpoint = Checkpoint(path, entry.id, sha256_of(path) or "", card.precision_cost_db)
    model = _load(request, checkpoint, entry.variant or entry.method, card, own_scale, run)
    return fitted(model, scale) if own_scale != scale else model


def _select(shelf: Shelf, fit: bool, name: str, scale: Factors, modality: str | None) -> tuple[Entry, Factors]:
    """The checkpoint to use, and the scale that it is used at, which with `--fit` may be a larger one."""
    from medsr_cli.weights.selection import select

    try:
        return select(shelf.manifest, name, scale, modality, shelf.store.present), scale
    except ArgumentsError:
        if not fit:
            raise
        for larger in STEPS_OF_FIT:
            if larger >= max(scale):
                try:
                    entry = select(shelf.manifest, name, float(larger), modality, shelf.store.present)
                except ArgumentsError:
                    continue
                return entry, (float(larger), float(larger))
        raise


def fitted(model: Model, scale: Factors) -> Model:
    """The model at a scale that it does not have itself."""
    facts = {**model.facts, "fitted": f"enlarged by {in_words(model.scale)}, then shrunken to {in_words(scale)}"}
    return replace(model, engine=Fitted(model.engine, scale), scale=scale, facts=facts)


def _from_file(request: ModelRequest, path: Path, arch: catalogue.Arch | None, scale: Factors, run: Run) -> Model:
    from medsr_cli.provenance.record import sha256_of

    if not path.is_file():
        msg = f"There is no checkpoint {mention(path)}."
        raise WeightsError(msg, "Check the path given with --weights.")
    if path.suffix not in FILES:
        msg = f"{mention(path.name)} is not a safetensors file."
        method = arch.id if arch else "METHOD"
        raise WeightsError(
            msg, f"Convert it first: medsr weights import {mention(path.name)} -m {method} -o OUT.safetensors."
        )
    card = Card.of_file(path)
    checkpoint = Checkpoint(path, path.name, sha256_of(path) or "", card.precision_cost_db)
    return _load(request, checkpoint, "", card, scale, run, arch)


def _load(
    request: ModelRequest,
    checkpoint: Checkpoint,
    method: str,
    card: Card,
    scale: Factors,
    run: Run,
    wanted: catalogue.Arch | None = None,
) -> Model:
    """A checkpoint's engine with what every run of it has around it."""
    loaded = load_checkpoint(request, checkpoint, scale, wanted, run.workload, run.progress)
    arch, engine, facts = loaded.arch, cast("Engine", loaded.engine), dict[str, Any]()
    if degradation_named(card.degradation or arch.degradation).first_centres:
        engine = Realigned(engine)
        facts["input_moved"] = "by (s - 1) / (2 s) of a pixel: the checkpoint's training pairs share first centres"
    if arch.enlarged_first:
        engine, facts = median_of_orientations(Colours(engine)), dict(MEDIAN_FACTS)
    method = method or loaded.variant
    model = Model(method, engine, arch, loaded.scale, checkpoint.id, checkpoint.sha256, card, facts)
    return fitted(model, scale) if loaded.scale != scale else model
