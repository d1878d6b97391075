"""What was asked of `medsr upscale`, and what became of each input."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from medsr_cli.errors import ArgumentsError, MedsrError
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.networks import catalogue
from medsr_cli.tasks.batch_request import BatchRequest
from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.self_training import PRESET_NAMES, Preset, SelfTraining

__all__ = [
    "REGISTRATIONS",
    "DicomOutput",
    "GuideRequest",
    "Item",
    "Registration",
    "UpscaleRequest",
    "known_preset",
    "known_registration",
    "learns_from_the_image",
    "refuse_contradictions",
]

Word = TypeVar("Word", bound=str)
Registration = Literal["none", "rigid"]
REGISTRATIONS: tuple[Registration, ...] = ("none", "rigid")
AXES = ("auto", "axial", "sagittal", "coronal", "0", "1", "2")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


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
    consistency_map: Path | None = None
    """Also write how far the shrunken result is from the input; beside each result where there are several."""
    axis: str = "auto"
    series: str | None = None
    dicom: DicomOutput = field(default_factory=DicomOutput)
    recursive: bool = False
    tree: Path | None = None
    """Folder, absolute, whose tree the folder of results mirrors: where a list of inputs was made."""
    skip_existing: bool = False
    overwrite: bool = False
    strict: bool = False
    report: Path | None = None
    preview: Path | None = None
    batch: BatchRequest = field(default_factory=BatchRequest)
    cluster: str | None = None
    """Address of a Dask scheduler whose workers do the inputs."""

    @property
    def ending(self) -> str:
        """What a result's name ends with."""
        if self.suffix is not None:
            return self.suffix
        return f"_{self.magnification.label}-{self.model.model}{'-roi' if self.region else ''}"


@dataclass
class Item:
    """What became of one input."""

    source: Path
    output: Path | None = None
    series: str | None = None
    """Which series of a study, by its number in `medsr inspect`, or as it was named."""
    status: str = "done"
    """`done`, `skipped`, `failed` or `not begun`."""
    error: MedsrError | None = None
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    more_outputs: list[Path] = field(default_factory=list)
    """Maps and intermediate results beside the output."""
    seconds: float = 0.0
    """From its turn to its end, with all that went through with it."""


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
    request.batch.refuse_contradictions()
    refuse_unknown_output(request.dicom)
    refuse_unknown_names(request)
    if request.channels and request.inputs:
        msg = "--channels names the images; there are other inputs beside."
        raise ArgumentsError(msg, "Give either an input or --channels.")
    if request.consistency_map and len(request.inputs) > 1 and request.output is None:
        msg = "--consistency-map names one file, but there are several inputs."
        raise ArgumentsError(msg, "Give one input, or a folder with -o: maps are put beside the results.")
    if request.spread and not (request.model.ensemble or learns_from_the_image(request.model)):
        msg = "--spread is how far the orientations of an ensemble differ."
        raise ArgumentsError(msg, "Add --tta.")
    known = _archs(request.model.model)
    if request.intermediate and known and not any(arch.first_stage for arch in known):
        msg = f"{request.model.model} has no intermediate result."
        raise ArgumentsError(msg, "Leave out --intermediate, or use -m msgan.")
    if request.training != SelfTraining() and not learns_from_the_image(request.model):
        msg = "--preset, --seed, --max-minutes and --without are for methods that learn from the image itself."
        raise ArgumentsError(msg, "Leave them out, or use -m uscyclegan.")
    if request.model.backend == "onnx" and learns_from_the_image(request.model):
        msg = f"{request.model.model} trains on the image in PyTorch, and runs there."
        raise ArgumentsError(msg, "Leave out --backend, or give an exported network with --weights.")
    if request.detector and not (request.region or "").startswith("auto"):
        msg = "--detector finds the region that --roi auto asks for."
        raise ArgumentsError(msg, "Add --roi auto.")
    guided = [arch for arch in known if "guide" in arch.needs]
    if guided and request.guide is None:
        msg = f"{request.model.model} needs a second image of the same patient, such as T1 for T2."
        raise ArgumentsError(msg, "Name it with --guide.")
    if request.guide is not None and known and not guided:
        msg = f"{request.model.model} takes no guide."
        raise ArgumentsError(msg, "Leave out --guide, or use -m cohft.")


def refuse_unknown_names(request: UpscaleRequest) -> None:
    """Names that every input would fail by, told once and before anything is opened or loaded.

    Raises:
        ArgumentsError: the sentence lists those that there are.
    """
    if request.axis not in AXES:
        msg = f"There is no axis {request.axis!r}."
        raise ArgumentsError(msg, "Give auto, axial, sagittal, coronal, 0, 1 or 2.")
    if request.model.precision not in PRECISIONS:
        msg = f"There is no precision called {request.model.precision!r}."
        raise ArgumentsError(msg, f"Give {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}.")
    if not re.fullmatch(r"auto|mps|(cpu|gpu|cuda)(:[0-9]{1,3})?", request.model.device.strip().lower()):
        msg = f"There is no device called {request.model.device!r}."
        raise ArgumentsError(msg, "Give auto, cpu, cuda, cuda:N or mps.")
    if request.suffix is not None and re.search(r"[/\\\0]", request.suffix):
        msg = "--suffix is a part of a name, and cannot lead to another folder."
        raise ArgumentsError(msg, "Leave / and \\ out of it; -o names a folder for the results.")


def refuse_unknown_output(dicom: DicomOutput) -> None:
    """Names that no DICOM result can be written by.

    Raises:
        ArgumentsError: the sentence lists those that there are.
    """
    if dicom == DicomOutput():
        return
    from medsr_cli.formats.dicom_encode import known_syntax
    from medsr_cli.formats.dicom_private import check_rule

    known_syntax(dicom.transfer_syntax)
    check_rule(dicom.private_tags)


def _archs(name: str) -> list[catalogue.Arch]:
    try:
        return catalogue.named(name)
    except ArgumentsError:
        return []


def known_registration(name: str) -> Registration:
    """`none` or `rigid`.

    Raises:
        ArgumentsError: it is neither.
    """
    return _one_of(name, REGISTRATIONS, "registration")


def known_preset(name: str) -> Preset:
    """`released` or `paper`.

    Raises:
        ArgumentsError: it is neither.
    """
    return _one_of(name, PRESET_NAMES, "preset")


def _one_of(name: str, known: tuple[Word, ...], what: str) -> Word:
    for word in known:
        if name == word:
            return word
    msg = f"There is no {what} called {name!r}."
    raise ArgumentsError(msg, f"Give {' or '.join(known)}.")
