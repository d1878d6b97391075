"""The main job: images in, larger images out, in the right place and in the right units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medsr_cli.errors import ArgumentsError, DeviceUnavailable, InputRefused, MedsrError, WeightsError
from medsr_cli.formats.contract import Reader
from medsr_cli.networks import catalogue
from medsr_cli.tasks.inputs import found_inputs
from medsr_cli.tasks.job import Item, Job
from medsr_cli.tasks.magnification import Factors, Magnification
from medsr_cli.tasks.model import Model, ModelRequest, finished, load_model
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.self_training import SelfTraining, unfinished_training

Registration = Literal["none", "rigid"]
REGISTRATIONS: tuple[Registration, ...] = ("none", "rigid")


@dataclass(frozen=True)
class GuideRequest:
    """A second image of the same place, and how far it may be trusted to be one."""

    path: Path
    register: Registration = "none"
    allow_mismatch: bool = False
    """Whether it may be of another patient or frame of reference."""
    series: str | None = None
    """SeriesInstanceUID in a folder with several."""


@dataclass(frozen=True)
class UpscaleRequest:
    """What to upscale, with what, and where to put it."""

    inputs: tuple[Path, ...]
    model: ModelRequest
    magnification: Magnification = field(default_factory=Magnification)
    channels: tuple[Path, ...] = ()
    """Registered images that a network takes together, instead of `inputs`; each has its own result."""
    guide: GuideRequest | None = None
    region: str | None = None
    """`x,y,w,h` in pixels of a slice, or `auto`: only this rectangle is upscaled, into its own volume."""
    detector: str | None = None
    """Checkpoint that finds the region for `auto`."""
    training: SelfTraining = field(default_factory=SelfTraining)
    """How a method without checkpoints learns from the image itself."""
    output: Path | None = None
    """File for one input, folder for several; None puts each result beside its input."""
    suffix: str | None = None
    """Added to the name of a result without `output`; None is `_x4-rdst`."""
    intermediate: bool = False
    """Also write the result of a network's first stage."""
    spread: bool = False
    """Also write how far the orientations of an ensemble differ."""
    axis: str = "auto"
    series: str | None = None
    recursive: bool = False
    skip_existing: bool = False
    overwrite: bool = False
    strict: bool = False
    report: Path | None = None
    preview: Path | None = None

    @property
    def ending(self) -> str:
        """What a result's name ends with."""
        if self.suffix is not None:
            return self.suffix
        return f"_{self.magnification.label}-{self.model.model}{'-roi' if self.region else ''}"


def upscale(request: UpscaleRequest, progress: Progress | None = None) -> Iterator[Item]:
    """Upscale every input in turn; the model is loaded once.

    Yields one item for each input. One input's failure is in its item and does not stop the rest.

    Raises:
        ArgumentsError: the request itself cannot be.
        WeightsError: the model cannot be loaded; nothing has been done then.
        DeviceUnavailable: the device is not there; nothing has been done then.
    """
    refuse_contradictions(request)
    return Upscaler(request, progress or Silent()).run()


class Upscaler:
    """Keeps the models that a batch needs."""

    def __init__(self, request: UpscaleRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self._models: dict[tuple[str | None, Factors], Model] = {}

    def run(self) -> Iterator[Item]:
        """Every input in turn; see `upscale`."""
        if self.request.channels:
            yield from self._together(self.request.channels, several=True)
            return
        sources = list(found_inputs(self.request))
        if not sources:
            msg = "There is nothing to upscale."
            raise InputRefused(msg, "Name a file, a DICOM folder, or a tree with --recursive.")
        # A folder that stands for the images in it is a batch, also where there is only one.
        several = len(sources) > 1 or sources != list(self.request.inputs)
        if several and (self.request.report or self.request.preview) and self.request.output is None:
            msg = "--report and --preview write one file, but there are several inputs."
            raise ArgumentsError(msg, "Give one input, or a folder with -o: reports are put beside the results.")
        if several and self.request.guide is not None:
            msg = "--guide names one image, but there are several inputs."
            raise ArgumentsError(msg, "Give one input at a time.")
        for number, source in enumerate(sources, start=1):
            self.progress.item(source.name, number, len(sources))
            yield from self._together((source,), several)

    def _together(self, sources: tuple[Path, ...], several: bool) -> Iterator[Item]:
        """Images that go through one run: one, or the registered channels of one patient."""
        job = Job(self.request, sources, several, self.progress, self._model)
        try:
            job.run()
            for item in job.items:
                if item.output is not None and item.status == "done":
                    unfinished_training(item.output).unlink(missing_ok=True)
        except (DeviceUnavailable, WeightsError):
            # No other input would fare better: nothing can be run without them.
            raise
        except MedsrError as error:
            for item in job.items:
                item.status, item.error = "failed", error
        yield from job.items

    def _model(self, reader: Reader, scale: Factors, target: Path) -> Model:
        """The model for an image; those that learn from the image itself are made anew for each."""
        modality = self.request.model.modality or reader.volume.modality
        if learns_from_the_image(self.request.model):
            from medsr_cli.tasks.self_training import train_on

            model = train_on(reader, scale, self.request.model, self.request.training, target, self.progress)
            return finished(model, self.request.model)
        key = (modality, scale)
        if key not in self._models:
            self._models[key] = load_model(self.request.model, scale, modality, self.progress)
        return self._models[key]


def learns_from_the_image(request: ModelRequest) -> bool:
    """Whether the method has no checkpoint by its nature, and none is given."""
    if request.weights is not None:
        return False
    try:
        return "training on the image" in catalogue.find(request.model)[0].needs
    except ArgumentsError:
        return False


def refuse_contradictions(request: UpscaleRequest) -> None:
    """Options that cannot both be meant.

    Raises:
        ArgumentsError: the sentence names them.
    """
    if request.skip_existing and request.overwrite:
        msg = "--skip-existing and --overwrite contradict each other."
        raise ArgumentsError(msg, "Give one of them.")
    if request.channels and request.inputs:
        msg = "--channels names the images; there are other inputs beside."
        raise ArgumentsError(msg, "Give either an input or --channels.")
    if request.spread and not (request.model.ensemble or learns_from_the_image(request.model)):
        msg = "--spread is how far the orientations of an ensemble differ."
        raise ArgumentsError(msg, "Add --tta.")
    if request.detector and not (request.region or "").startswith("auto"):
        msg = "--detector finds the region that --roi auto asks for."
        raise ArgumentsError(msg, "Add --roi auto.")
    guided = [arch for arch in _archs(request.model.model) if "guide" in arch.needs]
    if guided and request.guide is None:
        msg = f"{request.model.model} needs a second image of the same patient, such as T1 for T2."
        raise ArgumentsError(msg, "Name it with --guide.")
    if request.guide is not None and _archs(request.model.model) and not guided:
        msg = f"{request.model.model} takes no guide."
        raise ArgumentsError(msg, "Leave out --guide, or use -m cohft.")


def _archs(name: str) -> list[catalogue.Arch]:
    try:
        return catalogue.named(name)
    except ArgumentsError:
        return []


def known_registration(name: str) -> Registration:
    """One of the two.

    Raises:
        ArgumentsError: it is neither.
    """
    for known in REGISTRATIONS:
        if name == known:
            return known
    msg = f"There is no registration called {name!r}."
    raise ArgumentsError(msg, "Give --register none or rigid.")
