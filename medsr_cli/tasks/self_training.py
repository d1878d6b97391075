"""A network that learns from the image it is to enlarge: the ultrasound CycleGAN, trained before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medsr_cli.engines.engine import Engine
from medsr_cli.engines.wrapped import Colours, median_of_orientations
from medsr_cli.errors import ArgumentsError, InputRefused, WeightsError, mention
from medsr_cli.formats.contract import Reader
from medsr_cli.networks.catalogue import USCYCLEGAN
from medsr_cli.tasks.magnification import Factors, in_words
from medsr_cli.tasks.model import MEDIAN_FACTS, Card, Model, ModelRequest, fitted
from medsr_cli.tasks.progress import Progress
from medsr_cli.volume.intensity import IntensityRange, full_scale, usable_values

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from medsr_cli.training.self_supervised import Trained

MOST_SLICES = 32
"""Slices that are held in memory to learn from; of longer stacks every so many."""
PERCEPTUAL_NETWORK = "vgg19"


Preset = Literal["released", "paper"]
PRESET_NAMES: tuple[Preset, ...] = ("released", "paper")


@dataclass(frozen=True)
class SelfTraining:
    """How the network learns from the image."""

    preset: Preset = "released"
    perceptual: bool = True
    """Whether the loss has its perceptual term, which needs VGG-19."""
    max_minutes: float | None = None
    seed: int = 0


def train_on(
    reader: Reader,
    intensity: IntensityRange,
    scale: Factors,
    request: ModelRequest,
    how: SelfTraining,
    target: Path,
    progress: Progress,
) -> Model:
    """Train on the image of `reader`, and make the engine that enlarges it.

    Args:
        reader: the image, or the part of it that is to be enlarged.
        intensity: the range of the whole image.
        scale: enlargement along rows and columns: 2, 3 or 4, and with `--fit` whatever is below.
        request: device, threads and how the result is to be used.
        how: preset, seed, time.
        target: the result; an unfinished training is kept beside it and taken up by the next run.
        progress: is told loss and time left.

    Raises:
        ArgumentsError: a scale that the method does not have.
        InputRefused: an image too small, or without contrast.
        WeightsError: VGG-19 is not on this machine.
    """
    import torch

    from medsr_cli.engines.devices import find_device
    from medsr_cli.engines.torch_runner import TorchSettings, engine_for

    factor = _factor(scale, request)
    device = find_device(request.device)
    if request.threads:
        torch.set_num_threads(request.threads)
    images = slices_to_learn_from(reader, intensity)
    trained = _train(images, factor, how, device, unfinished_training(target), progress)
    progress.say(f"Trained for {trained.iterations} iterations (stopped by {trained.stop_reason}); enlarging.")
    own_scale = (float(factor), float(factor))
    inner = engine_for(
        trained.network,
        USCYCLEGAN,
        own_scale,
        device=str(device),
        precision=request.precision,
        tile=request.tile,
        settings=TorchSettings(deterministic=request.deterministic, max_bytes=request.max_vram),
    )
    engine: Engine = median_of_orientations(Colours(inner))
    engine.warnings += _doubts(trained)
    facts = {
        "trained_on_the_image": {
            "preset": how.preset,
            "seed": how.seed,
            "perceptual_term": how.perceptual,
            "iterations": trained.iterations,
            "stopped_by": trained.stop_reason,
            "seconds": round(trained.seconds, 1),
            "slices": len(images),
            "reconstruction_error": trained.error,
            "reconstruction_error_of_bicubic": trained.bicubic_error,
        },
        **MEDIAN_FACTS,
    }
    card = Card(degradation=USCYCLEGAN.degradation)
    model = Model(USCYCLEGAN.id, engine, USCYCLEGAN, own_scale, card=card, facts=facts)
    return model if model.scale == scale else fitted(model, scale)


def _train(
    images: list[np.ndarray], factor: int, how: SelfTraining, device: torch.device, state: Path, progress: Progress
) -> Trained:
    from medsr_cli.training.self_supervised import PRESETS, train_on_image

    perceptual = _perceptual(str(device)) if how.perceptual else None
    progress.say(
        f"Training on the image itself (preset {how.preset}, seed {how.seed}"
        f"{'' if perceptual else ', without the perceptual term'})."
    )
    try:
        return train_on_image(
            images,
            factor,
            PRESETS[how.preset],
            seed=how.seed,
            device=device,
            perceptual=perceptual,
            max_seconds=None if how.max_minutes is None else how.max_minutes * 60,
            state_path=state,
            progress=_teller(progress),
        )
    except KeyboardInterrupt:
        progress.say(f"The training is kept in {mention(state.name)}; the same command goes on with it.")
        raise


def _doubts(trained: Trained) -> list[str]:
    """What a user of such a training must know before trusting the result."""
    found = []
    if trained.stop_reason == "time":
        found.append(
            f"Training was stopped by --max-minutes after {trained.iterations} iterations, before its own rule was met."
        )
    if trained.error > trained.bicubic_error:
        found.append(
            "The network brings this image back from a shrunken copy less well than bicubic does "
            f"(mean squared error {trained.error:.3g} against {trained.bicubic_error:.3g})."
        )
    return found


def unfinished_training(target: Path) -> Path:
    """Where the state of a training is kept until the result is whole."""
    return target.with_name(target.name + ".training")


def _factor(scale: Factors, request: ModelRequest) -> int:
    """The whole number that the network is trained for; with `--fit` the next larger one."""
    if scale[0] == scale[1] and scale[0] in USCYCLEGAN.scales:
        return int(scale[0])
    larger = [factor for factor in USCYCLEGAN.scales if factor >= max(scale)]
    if request.fit and larger:
        return larger[0]
    msg = f"{USCYCLEGAN.id} does not enlarge by {in_words(scale)}."
    raise ArgumentsError(msg, f"It is for {', '.join(map(str, USCYCLEGAN.scales))}; scales below go with --fit.")


def slices_to_learn_from(reader: Reader, intensity: IntensityRange) -> list[np.ndarray]:
    """Slices (3, rows, columns) in [0, 1], float32; of long stacks evenly spread ones.

    Args:
        reader: the image.
        intensity: the range that its values are scaled by; 8-bit images are divided by 255.

    Raises:
        InputRefused: an image without contrast.
    """
    volume = reader.volume
    working = full_scale(intensity, volume.dtype)
    step = -(-volume.slices // MOST_SLICES)
    chosen = []
    for number, pixels in enumerate(reader.slices()):
        colour = pixels[: len(pixels) - volume.alpha]
        usable, _, _ = usable_values(colour, volume.padding)
        if number % step == 0 and usable.size and usable.min() != usable.max():
            unit = np.clip(np.nan_to_num(working.normalise(colour)), 0, 1).astype(np.float32)
            chosen.append(np.repeat(unit, 3, axis=0) if len(unit) == 1 else unit)
    if not chosen:
        msg = f"{mention(reader.path.name)} is constant: there is nothing to learn from it."
        raise InputRefused(msg, "Use another image.")
    return chosen


def _perceptual(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual term, from VGG-19 in the store.

    Raises:
        WeightsError: it is not there.
    """
    from medsr_cli.networks import load_network
    from medsr_cli.networks.perceptual import cyclegan_loss
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    entry = shelf.first_present(PERCEPTUAL_NETWORK)
    if entry is None:
        listed = [entry.id for entry in shelf.manifest.entries if entry.method == PERCEPTUAL_NETWORK]
        known = listed[0] if listed else PERCEPTUAL_NETWORK
        msg = "The perceptual term of the loss needs VGG-19, which is not on this machine."
        raise WeightsError(msg, f"Run: medsr weights pull {known}, or train without it: --without perceptual.")
    network = load_network(shelf.store.verified_path(entry, allow_unpinned=True))
    return cyclegan_loss(network.to(device))


def _teller(progress: Progress) -> Callable[[int, int, float, float | None, float | None], None]:
    def tell(iteration: int, limit: int, loss: float, error: float | None, eta_s: float | None) -> None:
        progress.training(iteration, limit, loss, eta_s)

    return tell


def refuse_unknown_terms(without: Sequence[str]) -> None:
    """Terms of the loss that are to be left out.

    Raises:
        ArgumentsError: there is no such term.
    """
    for word in without:
        if word != "perceptual":
            msg = f"There is no term called {word!r} to leave out."
            raise ArgumentsError(msg, "Give --without perceptual.")
