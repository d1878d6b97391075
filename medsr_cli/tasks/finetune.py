"""What `medsr finetune` does: images to slices, slices to a network, and the network to a checkpoint with a card.

Here are the request, the result, and what is refused before any work is done. `training_data` makes the packed
slices, `training_networks` the network and those that its losses need, and `workshop` trains and writes.

When a run is done, three files stay beside the checkpoint `OUT.safetensors`: the card `OUT.md`, the curve
`OUT.png`, and `OUT.log.jsonl` with one JSON line for each validation. The work folder `OUT.work` goes, unless
the run was stopped or `keep_work` is set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medsr_cli.errors import ArgumentsError, RunError, mention
from medsr_cli.networks import catalogue

if TYPE_CHECKING:
    from medsr_cli.training.validation import Score
    from medsr_cli.training.workfolder import WorkFolder

WEIGHTS_SUFFIX = ".safetensors"
FOREIGN_SUFFIXES = frozenset(
    (
        *(".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".h5", ".hdf5", ".onnx", ".npy", ".npz"),
        *(".tar", ".gz", ".zip", ".txt", ".md", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".log"),
        *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
        *(".nii", ".dcm", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh"),
    )
)
"""What no checkpoint is called, since none is such a file; any other dot is part of the name (`ours-v1.2`)."""
TASKS = {"super-resolution": "rdst", "segmentation": "segmentation", "detection": "msgan-detector"}
"""What can be learnt, and the network that is taken where none is named."""
DEFAULT_SCALE = 4


class Watcher(Protocol):
    """Is told how things go."""

    def packing(self, done: int, total: int) -> None:
        """So many of the images are read."""

    def note(self, sentence: str) -> None:
        """Something that a user should know."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step is done; `loss` is the weighted sum of its terms."""

    def validated(self, done: int, scores: Sequence[Score], best: bool) -> None:
        """A validation is done; `best` says that its weights are now the ones kept."""


@dataclass(frozen=True)
class FinetuneRequest:
    """What to train, on what, and how."""

    folder: Path
    """Images, or a file that was packed before."""
    output: Path
    """The checkpoint; its card and its work folder stand beside it."""
    model: str = "rdst"
    """A method or variant of the catalogue, `segmentation` and `msgan-detector` among them."""
    scale: int | None = None
    """Enlargement; None is 4, or every scale for a method that takes any, or none for one that enlarges nothing."""
    validation: Path | None = None
    """A folder of images to validate on; None takes some of the subjects."""
    validation_subjects: Sequence[str] = ()
    """Patterns of the subjects to validate on."""
    weights: str | None = None
    """A checkpoint to go on from: an id or a path."""
    start: str | None = None
    """A checkpoint, of another size or scale, to take what fits from."""
    preset: str | None = None
    """A recipe of the method by name; None is `paper`, or what the run that is resumed has."""
    recipe: Path | None = None
    """A recipe of one's own, a YAML file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ from the preset or file."""
    segmentation: str | None = None
    """The segmentation network that a loss compares with: an id or a path."""
    network: Any = None
    """A configuration of the method's network, for sizes that have no name."""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    masks: Sequence[str] = ()
    """Patterns of the masks and label maps to use; none takes all."""
    targets: Sequence[str] = ()
    """Patterns of the images to enlarge, for a method with a guide; none takes T2 and FLAIR."""
    guides: Sequence[str] = ()
    """Patterns of the guides; none takes T1 without contrast agent."""
    low: Path | None = None
    """A folder of low-resolution images with the same relative names; None makes them."""
    contrasts: Sequence[str] = ()
    """Patterns of registered images of one folder that are the channels of one image, in this order."""
    captions: Path | None = None
    """A text file with a line for each image, for the image-text loss."""
    axis: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_minutes: float | None = None
    """When to stop training, from the start of this call."""
    resume: bool = False
    overwrite: bool = False
    keep_work: bool = False
    pack_only: bool = False
    half: bool = True
    validation_slices: int = 8
    """Slices of each held-out volume that are validated on while training; 0 takes all."""
    modality: str | None = None
    body_part: str = "any"
    licence: str = "not stated"
    data_licence: str = "not stated"
    show_names: bool = False
    """Whether the card names subjects instead of numbering them."""
    least_gain_db: float = 0.0
    """The mean gain over the baseline, in the unit of the scores, that a checkpoint has to exceed to be written."""

    @property
    def arch(self) -> catalogue.Arch:
        """The catalogue's entry of `model`."""
        return catalogue.find(self.model)[0]


@dataclass(frozen=True)
class FinetuneResult:
    """What came of it; `output` is None where a stopped run had nothing worth writing yet."""

    output: Path | None
    card: Path | None = None
    work_folder: Path | None = None
    """Where a run that is not finished goes on from."""
    interrupted: bool = False
    """Whether a signal stopped it."""
    steps: int = 0
    best_step: int = 0
    gain: float | None = None
    """Mean over the held-out volumes above the baseline, in `unit`."""
    start_gain: float | None = None
    unit: str = "dB"
    half: bool = False
    sha256: str | None = None
    curve: Path | None = None
    log: Path | None = None
    scores: Sequence[Score] = ()
    notes: Sequence[str] = ()
    main: bool = True
    """False in every process of `accelerate launch` but the first: what they return is not to be told again."""

    @property
    def gain_db(self) -> float | None:
        """The gain of a network that enlarges."""
        return self.gain

    @property
    def start_gain_db(self) -> float | None:
        """The same before the first step."""
        return self.start_gain


def finetune(request: FinetuneRequest, watcher: Watcher) -> FinetuneResult:
    """Train a network on a folder's images and write the checkpoint and its card.

    Stopped by SIGINT or SIGTERM, it saves the state, writes the best network so far if that is good, and
    returns with `interrupted`. Stopped by `max_minutes`, it validates once more and does the same.

    Raises:
        ArgumentsError: the request contradicts itself, the run that is resumed, or a file that is there.
        InputRefused: no usable image, fewer than two subjects, or no guides or labels for what needs them.
        WeightsError: a checkpoint to start from, or a network that a loss needs, is not there or does not load.
        DeviceUnavailable: the device is not there.
        QualityGateFailed: the network is worse than its start or than the baseline; the work folder is kept.
        RunError: the disk is full, memory ran out, or the loss is not a number; the last state is kept.
    """
    from medsr_cli.training.workfolder import WorkFolder

    began = time.monotonic()
    asked, request = request.output, dataclasses.replace(request, output=_output_path(request.output))
    if not request.folder.exists():
        msg = f"There is no {mention(request.folder)}."
        raise ArgumentsError(msg, "Give a folder of images, or a packed file.")
    request = _with_scale(request)
    if request.output != asked and is_first_process():
        watcher.note(f"What comes of it is written to {mention(request.output.name)}.")
    if request.pack_only:
        from medsr_cli.tasks.training_data import pack_only

        return pack_only(request, watcher) if is_first_process() else FinetuneResult(None, main=False)
    _refuse_contradictions(request)
    work = WorkFolder(request.output)
    resuming = _decide_resume(request, work, watcher)
    from medsr_cli.tasks.workshop import Workshop

    with _threads(request.threads), _work_in(work, keep=not work.empty):
        if not resuming and is_first_process():
            work.clear()
        workshop = Workshop.set_up(request, work, watcher, resuming=resuming)
        with _memory_reported():
            return workshop.run(began)


def is_first_process() -> bool:
    """Whether this is the process of `accelerate launch` that reads, writes and prints; true without it."""
    return int(os.environ.get("RANK", "0")) == 0


def model_of_task(task: str | None, model: str | None) -> str:
    """The network to train, from `--task` and `-m`.

    Raises:
        ArgumentsError: there is no such task, or the network named is for another one.
    """
    if task is None:
        return model or TASKS["super-resolution"]
    if task not in TASKS:
        msg = f"There is no task called {task!r}."
        raise ArgumentsError(msg, f"There are: {', '.join(TASKS)}.")
    if model is None:
        return TASKS[task]
    arch, _ = catalogue.find(model)
    if task_of(arch) != task:
        msg = f"{model} is not for {task}."
        raise ArgumentsError(msg, f"Leave --task away, or give -m {TASKS[task]}.")
    return model


def task_of(arch: catalogue.Arch) -> str:
    """What a method's network learns, in the words of `TASKS`."""
    return {"segmentation": "segmentation", "detector": "detection"}.get(arch.kind, "super-resolution")


def _output_path(output: Path) -> Path:
    bare = output
    while bare.suffix.lower() in FOREIGN_SUFFIXES:
        bare = bare.with_suffix("")
    if bare != output or (output.suffix != WEIGHTS_SUFFIX and output.suffix.lower() == WEIGHTS_SUFFIX):
        msg = f"{mention(output.name)} would not be what its name says: checkpoints are written as safetensors."
        raise ArgumentsError(msg, f"Call it {bare.name.removesuffix(output.suffix)}{WEIGHTS_SUFFIX}.")
    if not output.name or output.name == "..":
        msg = "-o names no file."
        raise ArgumentsError(msg, f"Such as -o ours-x4{WEIGHTS_SUFFIX}.")
    return output if output.suffix == WEIGHTS_SUFFIX else output.with_name(output.name + WEIGHTS_SUFFIX)


def _with_scale(request: FinetuneRequest) -> FinetuneRequest:
    """The request with the scale that it means.

    Raises:
        ArgumentsError: a scale that the method is not built for, or one where it has none.
    """
    arch = request.arch
    if task_of(arch) != "super-resolution":
        if request.scale is not None:
            msg = f"{arch.id} enlarges nothing, so it has no scale."
            raise ArgumentsError(msg, "Leave -s away.")
        return request
    if arch.scale_range is not None:
        if request.scale is not None:
            msg = f"{arch.id} is trained for every scale at once."
            raise ArgumentsError(msg, "Leave -s away; --set scales=[2,3,4] names those to train on.")
        return request
    if request.scale is None and arch.scales:
        scale = DEFAULT_SCALE if DEFAULT_SCALE in arch.scales else arch.scales[0]
        return dataclasses.replace(request, scale=scale)
    if arch.scales and request.scale not in arch.scales:
        msg = f"{arch.id} is not built for scale {request.scale}."
        raise ArgumentsError(msg, f"It is for {', '.join(str(scale) for scale in arch.scales)}.")
    return request


def _refuse_contradictions(request: FinetuneRequest) -> None:
    if request.weights and request.start:
        msg = "Both --weights and --start were given."
        raise ArgumentsError(msg, "--weights goes on with a checkpoint, --start takes what fits into another size.")
    if request.preset and request.recipe:
        msg = "Both --preset and --recipe were given."
        raise ArgumentsError(msg, "A recipe of one's own takes the place of a preset.")
    if request.resume and request.overwrite:
        msg = "Both --resume and --overwrite were given."
        raise ArgumentsError(msg, "--resume goes on with a run, --overwrite starts it anew.")
    _refuse_untrainable(request)
    if request.max_minutes is not None and request.max_minutes <= 0:
        msg = f"{request.max_minutes:g} minutes are no time to train."
        raise ArgumentsError(msg)
    if is_first_process():
        _refuse_existing(request)


def _refuse_untrainable(request: FinetuneRequest) -> None:
    arch = request.arch
    if arch.trainable:
        return
    if "training on the image" in arch.needs:
        msg = f"{arch.id} is trained on each image by itself, while that is enlarged."
        raise ArgumentsError(msg, f"Run: medsr upscale IMAGE -m {arch.id} -s SCALE.")
    known = [other.id for other in catalogue.CATALOGUE if other.trainable]
    msg = f"{request.model} cannot be trained here."
    raise ArgumentsError(msg, f"Give -m with one of: {', '.join(known)}.")


def _refuse_existing(request: FinetuneRequest) -> None:
    """Before hours are spent, not after."""
    if request.overwrite or request.resume:
        return
    for path in (request.output, *beside(request.output)):
        if path.exists():
            msg = f"{mention(path)} exists."
            raise ArgumentsError(msg, "Give --overwrite to replace it, or another -o.")


def beside(output: Path) -> tuple[Path, Path, Path]:
    """Card, curve and log of a checkpoint."""
    return output.with_suffix(".md"), output.with_suffix(".png"), output.with_suffix(".log.jsonl")


def _decide_resume(request: FinetuneRequest, work: WorkFolder, watcher: Watcher) -> bool:
    """Whether to go on with a run; what stands in the way of either is refused."""
    if request.resume:
        if is_first_process():
            _refuse_foreign_output(request, work)
        if not work.started:
            watcher.note("There is no run to go on with, so one is started.")
        return work.started
    if not work.empty and not request.overwrite and is_first_process():
        msg = f"{mention(work.folder.name)} holds a run that was not finished."
        raise ArgumentsError(msg, "Give --resume to go on with it, or --overwrite to start anew.")
    return False


def _refuse_foreign_output(request: FinetuneRequest, work: WorkFolder) -> None:
    """A resumed run may replace the checkpoint that it wrote when it was stopped, and no other."""
    output = request.output
    if not output.exists():
        return
    with output.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest() == work.released()
    if not own:
        msg = f"{mention(output)} exists, and the run to go on with has not written it."
        raise ArgumentsError(msg, "Move it away, or give another -o.")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _work_in(work: WorkFolder, *, keep: bool) -> Iterator[None]:
    """The work folder, locked by the first process; if nothing worth keeping came about in it, it goes again."""
    if not is_first_process():
        yield
        return
    try:
        with work.locked():
            yield
    finally:
        if work.folder.exists() and not work.started and (work.empty or not keep):
            work.remove()


@contextmanager
def _memory_reported() -> Iterator[None]:
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        msg = "There is not enough memory for this batch."
        raise RunError(msg, "Give a smaller --batch; the last state saved is kept.") from error


# -- words -------------------------------------------------------------------------------------------------


def command_line(request: FinetuneRequest) -> str:
    """The command that repeats a run, with placeholders for what might name a person."""
    words = ["medsr finetune", "DIR", f"-m {request.model}"]
    words += [f"-s {request.scale}"] if request.scale is not None else []
    words.append("-o OUT")
    for given, text in (
        (request.validation, "--val VAL"),
        (request.validation_subjects, "--val-subject PATTERN"),
        (request.include, "--include PATTERN"),
        (request.exclude, "--exclude PATTERN"),
        (request.masks, "--mask PATTERN"),
        (request.targets, "--target PATTERN"),
        (request.guides, "--guide-name PATTERN"),
        (request.low, "--low DIR"),
        (request.contrasts, "".join(f" --contrast {c}" for c in request.contrasts).strip()),
        (request.captions, "--captions FILE"),
        (request.weights, "--weights CHECKPOINT"),
        (request.start, "--start CHECKPOINT"),
        (request.segmentation, "--segmentation CHECKPOINT"),
        (request.axis != "auto", f"--axis {request.axis}"),
        (request.preset, f"--preset {request.preset}"),
        (request.recipe, "--recipe FILE"),
        (request.max_minutes, f"--max-minutes {request.max_minutes or 0:g}"),
        (not request.half, "--no-half"),
    ):
        if given:
            words.append(text)
    for name, value in request.settings.items():
        words.append(f"--set {shlex.quote(f'{name}={_as_yaml(value)}')}")
    return " ".join(words)


def _as_yaml(value: object) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def as_json(result: FinetuneResult) -> str:
    """The result as one line of JSON."""
    facts = {item.name: getattr(result, item.name) for item in dataclasses.fields(result) if item.name != "main"}
    for name in ("output", "card", "work_folder", "curve", "log"):
        facts[name] = str(facts[name]) if facts[name] else None
    facts["scores"] = [
        {**dataclasses.asdict(score), "gain": score.gain}  # type: ignore[call-overload]  # every score is a dataclass
        for score in result.scores
    ]
    facts["notes"] = list(result.notes)
    return json.dumps({"path": facts.pop("output"), **facts})
