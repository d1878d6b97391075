"""The models that an evaluation sets beside each other, through the engines that `medsr upscale` runs."""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.engines.engine import Engine, Enlarged, Planes, Size
from medsr_cli.engines.wrapped import Realigned, Wrapped
from medsr_cli.errors import ArgumentsError, QualityGateFailed, RunError, mention, unmarked
from medsr_cli.evaluation.results import BASELINE
from medsr_cli.formats.contract import Pixels
from medsr_cli.networks import catalogue
from medsr_cli.provenance.discretion import named_checkpoint
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.model import Model, ModelRequest, finished, load_model
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.request import learns_from_the_image
from medsr_cli.tasks.self_training import SelfTraining, train_on
from medsr_cli.volume.band_limited import shifted
from medsr_cli.volume.geometry import enlarged_length
from medsr_cli.volume.intensity import IntensityRange, full_scale
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.evaluation.protocols import Protocol

Unit = NDArray[np.float64]

MOST_LOADED = 16
"""Engines kept at once: any-scale networks have one for each scale, images of odd sizes scales of their own."""
SHUFFLED = "guides shuffled"
GUIDED_FAMILY = "cohft"


@dataclass(frozen=True)
class Contender:
    """One model of the table."""

    label: str
    """What the table calls it; different from all others'."""
    request: ModelRequest
    shuffled: bool = False
    """Whether its guides are taken from other slices: a control."""

    @property
    def guided(self) -> bool:
        """Whether the method needs a second image."""
        try:
            return any("guide" in arch.needs for arch in catalogue.named(self.request.model))
        except ArgumentsError:
            # A checkpoint's id: it begins with the name of its method.
            return self.request.model.startswith(GUIDED_FAMILY)

    @property
    def learned(self) -> bool:
        """Whether there is more to it than a formula."""
        return self.arch is None or self.arch.kind != "baseline"

    @property
    def is_baseline(self) -> bool:
        """Whether it is what the others are held against: by its method, whatever it is called."""
        return self.arch is not None and self.arch.id == BASELINE

    @property
    def arch(self) -> catalogue.Arch | None:
        """The method; None where the name is a checkpoint's."""
        try:
            return catalogue.find(self.request.model)[0]
        except ArgumentsError:
            return None


def contenders_of(text: str, weights: str | None, base: ModelRequest, *, shuffle_guides: bool) -> list[Contender]:
    """From `rdst,miassr=FILE,bicubic` to models; bicubic is always among them, and the first.

    Args:
        text: methods, variants or checkpoint ids, commas between; `METHOD=WEIGHTS` names a checkpoint.
        weights: a checkpoint for the only learned model among them.
        base: device, precision and the like.
        shuffle_guides: adds every guided model once more, with guides of other slices.

    Raises:
        ArgumentsError: no names, two of one name, or weights that could be anybody's.
    """
    named = [part.strip() for part in text.split(",") if part.strip()]
    if not named:
        msg = "-m names no model."
        raise ArgumentsError(msg, "Give methods with commas between, such as rdst,miassr.")
    found = [_contender(name, base) for name in named]
    if weights is not None:
        found = _with_weights(found, weights)
    found = _told_apart(found)
    if not any(contender.is_baseline for contender in found):
        found.append(Contender(BASELINE, replace(base, model=BASELINE, weights=None)))
    # The measure of the others stands first.
    found.sort(key=lambda contender: not contender.is_baseline)
    guided = [contender for contender in found if contender.guided]
    if shuffle_guides and not guided:
        msg = "--shuffle-guides is for models that take a guide; none is named."
        raise ArgumentsError(msg, "Leave it out, or add cohft to -m.")
    if shuffle_guides:
        found += [replace(one, label=f"{one.label} ({SHUFFLED})", shuffled=True) for one in guided]
    return found


def _contender(name: str, base: ModelRequest) -> Contender:
    method, has_weights, weights = name.partition("=")
    if has_weights and not weights:
        msg = f"-m {mention(name)} names no weights."
        raise ArgumentsError(msg, "Give METHOD=CHECKPOINT, an id or a .safetensors file.")
    found = Contender(method, replace(base, model=method, weights=weights or None))
    if has_weights and not found.learned:
        msg = f"{method} is a formula and takes no weights."
        raise ArgumentsError(msg, "Give -m METHOD=CHECKPOINT with the method that the checkpoint is of.")
    # The results know the baseline by its name.
    return replace(found, label=BASELINE) if found.is_baseline else found


def _with_weights(found: list[Contender], weights: str) -> list[Contender]:
    free = [contender for contender in found if contender.learned and contender.request.weights is None]
    if len(free) != 1:
        msg = f"--weights names one checkpoint, but {len(free)} of the models could take it."
        raise ArgumentsError(msg, "Name it with its model: -m METHOD=CHECKPOINT,...")
    given = replace(free[0], request=replace(free[0].request, weights=weights))
    return [given if contender is free[0] else contender for contender in found]


def _told_apart(found: list[Contender]) -> list[Contender]:
    """Models of one name are called by their checkpoints, none of them by the baseline's name."""
    labels = [contender.label for contender in found]
    apart = [
        replace(
            one,
            label=mention(Path(one.request.weights).stem)
            if Path(one.request.weights).exists()
            else one.request.weights,
        )
        if labels.count(one.label) > 1 and one.request.weights
        else one
        for one in found
    ]
    apart = [
        replace(one, label=f"{one.label} ({one.request.model})")
        if unmarked(one.label).strip().lower() == BASELINE and not one.is_baseline
        else one
        for one in apart
    ]
    taken = [contender.label for contender in apart]
    for label in taken:
        if taken.count(label) > 1:
            msg = f"-m names {label} twice."
            raise ArgumentsError(msg, "Name each model once; two checkpoints of one method need different names.")
    return apart


@dataclass
class Lows:
    """The low-resolution slices of an image, for a method that learns from them: values in [0, 1]."""

    volume: Volume
    path: Path
    planes: Sequence[Unit]

    def slices(self) -> Iterator[Pixels]:
        """(channels, rows, columns) each."""
        return iter(self.planes)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """None: it was never a file."""
        return {}


class PaperBicubic:
    """The baseline: the bicubic of the paper that the protocol is of, as an engine."""

    name, device, precision = "numpy", "cpu", "float64"
    channels, guided = 0, False

    def __init__(self, protocol: Protocol, factors: Factors) -> None:
        self.protocol, self.factors = protocol, factors
        self.warnings: list[str] = []

    def size_of(self, rows: int, columns: int) -> Size:
        """N' = round(N·s) along each axis."""
        return enlarged_length(rows, self.factors[0]), enlarged_length(columns, self.factors[1])

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge, values not clipped."""
        return Enlarged(self.protocol.enlarge(planes, self.size_of(*planes.shape[-2:])))

    def batch_of(self, rows: int, columns: int) -> int:
        """One at a time: there is nothing to gain."""
        return 1

    def turned(self) -> PaperBicubic:
        """With the scales of rows and columns exchanged."""
        return PaperBicubic(self.protocol, (self.factors[1], self.factors[0]))


class EdgesAligned(Wrapped):
    """For pairs whose first pixels' centres coincide: moves the input to where other networks expect it."""

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """The inner engine on the moved input."""
        rows, columns = planes.shape[-2:]
        size = self.size_of(rows, columns)
        by = [(new / old - 1) * old / new / 2 for old, new in zip((rows, columns), size, strict=True)]
        return self.inner.run(shifted(planes, -by[0], -by[1]), guide)

    def turned(self) -> EdgesAligned:
        """Around the turned engine."""
        return EdgesAligned(self.inner.turned())


def for_first_centres(engine: Engine) -> Engine:
    """An engine for pairs whose first pixels' centres coincide, instead of edges: what was put in for edges goes."""
    stripped = _unmoved(engine)
    return EdgesAligned(engine) if stripped is engine else stripped


def _unmoved(engine: Engine) -> Engine:
    if isinstance(engine, Realigned):
        return engine.inner
    inner: Engine | None = getattr(engine, "inner", None)
    if inner is None or (stripped := _unmoved(inner)) is inner:
        return engine
    changed: Any = copy.copy(engine)
    changed.inner = stripped
    return changed  # type: ignore[no-any-return]


@dataclass
class Running:
    """A contender's engine for one shape of slices, and the values that it takes."""

    contender: Contender
    model: Model

    def enlarge(self, low: Unit, given: IntensityRange, dtype: np.dtype[Any], guide: Planes | None) -> Unit:
        """(n, colours, rows', columns') from (n, colours, rows, columns), both in [0, 1] of `given`.

        Raises:
            QualityGateFailed: the result has values that are not numbers.
        """
        own = full_scale(given, dtype) if self.model.arch.full_scale else given
        engine = self.model.engine
        planes = moved(low, given, own)
        size = max(engine.batch_of(*low.shape[-2:]), 1)
        parts = [
            engine.run(planes[at : at + size], None if guide is None else guide[at : at + size]).planes
            for at in range(0, len(planes), size)
        ]
        result = moved(np.concatenate(parts).astype(np.float64, copy=False), own, given)
        if not np.isfinite(result).all():
            msg = f"{self.contender.label} returned values that are not numbers."
            raise QualityGateFailed(msg, "Use --precision fp32.")
        return result


def moved(unit: Unit, given: IntensityRange, wanted: IntensityRange) -> Unit:
    """Values in [0, 1] of one range, in [0, 1] of another."""
    if (given.minimum, given.maximum) == (wanted.minimum, wanted.maximum):
        return unit
    return wanted.normalise(given.denormalise(unit))


@dataclass
class Stable:
    """Loads the models that are needed, keeps the last few, and remembers what each was."""

    protocol: Protocol
    progress: Progress
    seed: int = 0
    training: SelfTraining = field(default_factory=SelfTraining)
    records: dict[tuple[str, str | None], dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _loaded: OrderedDict[tuple[str, str | None, Factors, str | None], Running] = field(default_factory=OrderedDict)

    def running(self, contender: Contender, factors: Factors, low: Lows) -> Running:
        """The engine of a contender for an image.

        Args:
            contender: which.
            factors: of the pair of slices, along rows and columns.
            low: the slices to enlarge; methods without a checkpoint learn from them.

        Raises:
            WeightsError: it has no weights here.
            ArgumentsError: it has no such scale.
        """
        modality = contender.request.modality or low.volume.modality
        if learns_from_the_image(contender.request):
            return self._told(Running(contender, self._trained(contender, factors, low)), low)
        # By what is loaded, not by its label: a model with shuffled guides is the same one.
        key = contender.request.model, contender.request.weights, factors, modality
        if key not in self._loaded:
            self._loaded[key] = Running(contender, self._load(contender, factors, modality))
            while len(self._loaded) > MOST_LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._told(replace(self._loaded[key], contender=contender), low)

    def _load(self, contender: Contender, factors: Factors, modality: str | None) -> Model:
        if contender.is_baseline:
            arch = catalogue.find(BASELINE)[0]
            facts = {"kernel": "the bicubic of the protocol's paper"}
            return Model(BASELINE, PaperBicubic(self.protocol, factors), arch, factors, facts=facts)
        model = load_model(contender.request, factors, modality, Silent())
        if self.protocol.first_centres:
            model = replace(model, engine=for_first_centres(model.engine))
        return model

    def _trained(self, contender: Contender, factors: Factors, low: Lows) -> Model:
        how = replace(self.training, seed=self.seed)
        with tempfile.TemporaryDirectory() as folder:
            unit = IntensityRange(0.0, 1.0)
            place = Path(folder, "state")
            return finished(
                train_on(low, unit, factors, contender.request, how, place, self.progress), contender.request
            )

    def _told(self, running: Running, low: Lows) -> Running:
        model, label = running.model, running.contender.label
        refuse_channels(model.engine, model.checkpoint_id or model.method)
        if model.engine.guided != running.contender.guided:
            needs = "needs" if model.engine.guided else "takes no"
            msg = f"{label} {needs} guide images."
            raise ArgumentsError(msg, "Name it by its method: -m METHOD=CHECKPOINT.")
        key = label, model.checkpoint_id
        if key not in self.records:
            if model.checkpoint_id is not None:
                self.progress.say(f"Using {named_checkpoint(model.checkpoint_id)} for {label}.")
            self.records[key] = {
                "label": label,
                "method": model.method,
                "checkpoint": named_checkpoint(model.checkpoint_id),
                "sha256": model.checkpoint_sha256,
                "degradation": model.degradation or model.arch.degradation,
                "engine": model.engine.name,
                "device": model.engine.device,
                "precision": model.engine.precision,
                **({"guides": "of other slices of the same image"} if running.contender.shuffled else {}),
                **model.facts,
            }
        doubts = model.doubts(running.contender.request.modality or low.volume.modality, low.volume.spacing_mm)
        for sentence in (*doubts, *model.engine.warnings):
            if sentence not in self.warnings:
                self.warnings.append(sentence)
        return running


def refuse_channels(engine: Engine, name: str) -> None:
    """Networks of several registered channels have no single images to be measured on.

    Raises:
        ArgumentsError: it is one.
    """
    if engine.channels not in (0, 1, 3):
        msg = f"{name} takes {engine.channels} registered channels together; single images are measured here."
        raise ArgumentsError(msg, "Use weights for one channel.")


def refuse_size(running: Running, low: Size, target: Size) -> None:
    """Every model is measured on the same target.

    Raises:
        RunError: this one makes images of another size.
    """
    size = running.model.engine.size_of(*low)
    if tuple(size) != tuple(target):
        msg = (
            f"{running.contender.label} makes {size[0]} x {size[1]} pixels of {low[0]} x {low[1]}, "
            f"where the target has {target[0]} x {target[1]}."
        )
        raise RunError(msg, "Measure it alone, or at a whole scale.")
