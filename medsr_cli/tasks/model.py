"""From a name and a scale to an engine that is ready to run, and the facts about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from medsr_cli.engines.engine import Engine, Interpolation
from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.tasks.progress import Progress
from medsr_cli.volume.resample import Kernel
from medsr_cli.weights.manifest import Entry


@dataclass(frozen=True)
class ModelRequest:
    """Which network, and where it is to run."""

    model: str = "rdst"
    scale: float = 4
    weights: str | None = None
    """A checkpoint's id, a path, or None for the manifest's choice."""
    modality: str | None = None
    device: str = "auto"
    precision: str = "auto"
    tile: int | None = None
    threads: int | None = None
    offline: bool = False
    allow_unpinned: bool = False


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of the images it was trained for; None where it does not say."""

    modality: str | None = None
    spacing_mm: tuple[float, float] | None = None
    """Smallest and largest pixel of the low-resolution images."""
    degradation: str | None = None

    @classmethod
    def of_entry(cls, entry: Entry) -> Card:
        """That of an entry of the manifest."""
        return cls(entry.modality, entry.spacing_mm, entry.degradation)

    @classmethod
    def of_file(cls, path: Path) -> Card:
        """That of a checkpoint file, from its metadata; what is missing or unreadable there is not known."""
        from medsr_cli.weights.headers import read_header

        metadata = read_header(path).metadata
        try:
            low, high = (float(text) for text in json.loads(metadata.get("spacing_mm", "null")))
            spacing_mm = (low, high)
        except (TypeError, ValueError):
            spacing_mm = None
        return cls(metadata.get("modality"), spacing_mm, metadata.get("degradation"))


@dataclass(frozen=True)
class Model:
    """An engine and what is known of its weights."""

    method: str
    engine: Engine
    scale: float
    checkpoint_id: str | None = None
    checkpoint_sha256: str | None = None
    card: Card = field(default_factory=Card)

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
        return found


def load_model(request: ModelRequest, modality: str | None, progress: Progress) -> Model:
    """The engine for a request.

    Args:
        request: what was asked for.
        modality: that of the image, if known; it chooses among checkpoints of one method.
        progress: is told which checkpoint was taken.

    Raises:
        ArgumentsError: no such method, or a scale it does not have.
        WeightsError: the checkpoint is missing or fails its checksum.
        DeviceUnavailable: the device is not there.
    """
    arch, variant = _method(request)
    if arch is not None and arch.kind == "baseline":
        return _baseline(arch, request)
    if request.weights is not None and _is_path(request.weights):
        return _from_file(request, Path(request.weights), arch)
    name = request.weights or variant or (arch.id if arch else request.model)
    return _from_manifest(request, name, modality or request.modality, progress)


def _method(request: ModelRequest) -> tuple[catalogue.Arch | None, str | None]:
    try:
        return catalogue.find(request.model)
    except ArgumentsError:
        # `-m` also takes the id of a checkpoint; the manifest says what there is if it is neither.
        if request.weights is not None:
            raise
        return None, None


def _is_path(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".pt", ".pth", ".tar") or Path(name).exists()


def _baseline(arch: catalogue.Arch, request: ModelRequest) -> Model:
    if request.weights is not None:
        msg = f"{arch.id} has no weights."
        raise ArgumentsError(msg, "Leave out --weights.")
    if not 1 < request.scale <= max(arch.scales):
        msg = f"{arch.id} does not enlarge by {request.scale:g}."
        raise ArgumentsError(msg, f"Give a scale above 1 and up to {max(arch.scales)}.")
    kernel: Kernel = "lanczos" if arch.id == "lanczos" else "cubic"
    return Model(arch.id, Interpolation(kernel, request.scale), request.scale)


def _from_manifest(request: ModelRequest, name: str, modality: str | None, progress: Progress) -> Model:
    from medsr_cli.tasks.weights import open_shelf
    from medsr_cli.weights.manifest import select

    shelf = open_shelf()
    entry = select(shelf.manifest, name, request.scale, modality, shelf.store.present)
    path = shelf.store.verified_path(entry, request.allow_unpinned)
    progress.say(f"Using {entry.id}.")
    return _load(request, path, entry.variant or entry.method, entry.id, Card.of_entry(entry))


def _from_file(request: ModelRequest, path: Path, arch: catalogue.Arch | None) -> Model:
    if not path.is_file():
        msg = f"There is no checkpoint {path}."
        raise WeightsError(msg, "Check the path given with --weights.")
    if path.suffix != ".safetensors":
        msg = f"{path.name} is not a safetensors file."
        raise WeightsError(msg, f"Convert it first: medsr weights import {path.name} -m rdst -o OUT.safetensors.")
    return _load(request, path, arch.id if arch else "", path.name, Card.of_file(path))


def _load(request: ModelRequest, path: Path, method: str, checkpoint_id: str, card: Card) -> Model:
    import torch

    from medsr_cli.engines.torch_engine import TorchEngine
    from medsr_cli.networks import load_network
    from medsr_cli.provenance.record import sha256_of

    if request.threads:
        torch.set_num_threads(request.threads)
    net = load_network(path)
    config = getattr(net, "config", None)
    scale, channels = int(getattr(config, "scale", 0)), int(getattr(config, "in_channels", 1))
    if scale != request.scale:
        msg = f"{checkpoint_id} enlarges by {scale}, not by {request.scale:g}."
        raise ArgumentsError(msg, f"Use --scale {scale}, or other weights.")
    if channels != 1:
        msg = f"{checkpoint_id} needs {channels} registered channels; this command has one."
        raise ArgumentsError(msg, "Use a checkpoint of one channel.")
    engine = TorchEngine(net, scale, channels, device=request.device, precision=request.precision, tile=request.tile)
    return Model(method, engine, scale, checkpoint_id, sha256_of(path), card)
