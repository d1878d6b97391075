"""What `medsr finetune` does: images to slices, slices to a network, and the network to a checkpoint with a card."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, InputRefused, QualityGateFailed, RunError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.training.recipe import PRESETS, Recipe, changed, refuse_other_recipe

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from medsr_cli.networks.rdst import Rdst, RdstConfig
    from medsr_cli.training.card import Facts
    from medsr_cli.training.loop import Trainer, TrainingState
    from medsr_cli.training.pack import PackedSlices
    from medsr_cli.training.release import Candidate, Score
    from medsr_cli.training.validation import VolumeScore
    from medsr_cli.training.workfolder import Log, RunIdentity, WorkFolder

WEIGHTS_SUFFIX = ".safetensors"
FOREIGN_SUFFIXES = (".pt", ".pth", ".tar", ".onnx")
REPORT_SLICES = 64
"""Slices of each held-out volume that the figures of the card are measured on, at most."""
SKIPPED_SHOWN = 3
"""Label maps that are named one by one; masks come by the hundred."""


class Watcher(Protocol):
    """Is told how things go."""

    def packing(self, done: int, total: int) -> None:
        """So many of the images are read."""

    def note(self, sentence: str) -> None:
        """Something that a user should know."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step is done; `loss` is its mean absolute error."""

    def validated(self, done: int, scores: list[VolumeScore], best: bool) -> None:
        """A validation is done; `best` says that its weights are now the ones kept."""


@dataclass(frozen=True)
class FinetuneRequest:
    """What to train, on what, and how."""

    folder: Path
    """Images, or a file that was packed before."""
    output: Path
    """The checkpoint; its card and its work folder stand beside it."""
    model: str = "rdst"
    scale: int = 4
    validation: Path | None = None
    """A folder of images to validate on; None takes some of the subjects."""
    validation_subjects: Sequence[str] = ()
    """Patterns of the subjects to validate on."""
    weights: str | None = None
    """A checkpoint to go on from: an id or a path."""
    start: str | None = None
    """A checkpoint, of another size or scale, to take what fits from."""
    preset: str | None = None
    """`paper` or `quick`; None is `paper`, or what the run that is resumed has."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that differ from the preset."""
    network: RdstConfig | None = None
    """Sizes of a network that is neither of the paper's."""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
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
    """The mean gain over bicubic that a checkpoint has to exceed to be written."""


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
    gain_db: float | None = None
    start_gain_db: float | None = None
    half: bool = False
    sha256: str | None = None
    scores: Sequence[VolumeScore] = ()
    notes: Sequence[str] = ()


def finetune(request: FinetuneRequest, watcher: Watcher) -> FinetuneResult:
    """Train a network on a folder's images and write the checkpoint and its card.

    Stopped by SIGINT or SIGTERM, it saves the state, writes the best network so far if that is good, and
    returns with `interrupted`. Stopped by `max_minutes`, it validates once more and does the same.

    Raises:
        ArgumentsError: the request contradicts itself, the run that is resumed, or a file that is there.
        InputRefused: no usable image, or fewer than two subjects.
        WeightsError: the checkpoint to start from does not load.
        DeviceUnavailable: the device is not there.
        QualityGateFailed: the network is worse than its start or than bicubic; the work folder is kept.
        RunError: the disk is full, memory ran out, or the loss is not a number; the last state is kept.
    """
    from medsr_cli.training.workfolder import WorkFolder

    began = time.monotonic()
    request = dataclasses.replace(request, output=_output_path(request.output))
    if not request.folder.exists():
        msg = f"There is no {request.folder}."
        raise ArgumentsError(msg, "Give a folder of images, or a packed file.")
    if request.pack_only:
        return _pack_only(request, watcher)
    _refuse_contradictions(request)
    work = WorkFolder(request.output)
    resuming = _decide_resume(request, work, watcher)
    with _threads(request.threads), _work_in(work, keep=not work.empty):
        if not resuming:
            work.clear()
        workshop = _Workshop.set_up(request, work, watcher, resuming=resuming)
        with _memory_reported():
            return workshop.run(began)


def _output_path(output: Path) -> Path:
    if output.suffix in FOREIGN_SUFFIXES:
        msg = f"{output.name} would not be what its name says: checkpoints are written as safetensors."
        raise ArgumentsError(msg, f"Call it {output.stem}{WEIGHTS_SUFFIX}.")
    return output if output.suffix == WEIGHTS_SUFFIX else output.with_name(output.name + WEIGHTS_SUFFIX)


def _refuse_contradictions(request: FinetuneRequest) -> None:
    if request.weights and request.start:
        msg = "Both --weights and --start were given."
        raise ArgumentsError(msg, "--weights goes on with a checkpoint, --start takes what fits into another size.")
    if request.resume and request.overwrite:
        msg = "Both --resume and --overwrite were given."
        raise ArgumentsError(msg, "--resume goes on with a run, --overwrite starts it anew.")
    arch, _ = catalogue.find(request.model)
    if not arch.trainable:
        msg = f"{request.model} cannot be trained here."
        raise ArgumentsError(msg, "Give -m rdst or -m rdst-e.")
    if request.scale not in arch.scales:
        msg = f"{arch.id} is not built for scale {request.scale}."
        raise ArgumentsError(msg, f"It is for {', '.join(str(scale) for scale in arch.scales)}.")
    if request.max_minutes is not None and request.max_minutes <= 0:
        msg = f"{request.max_minutes:g} minutes are no time to train."
        raise ArgumentsError(msg)
    _refuse_existing(request)


def _refuse_existing(request: FinetuneRequest) -> None:
    """Before hours are spent, not after."""
    if request.overwrite or request.resume:
        return
    for path in (request.output, _card_path(request.output)):
        if path.exists():
            msg = f"{path} exists."
            raise ArgumentsError(msg, "Give --overwrite to replace it, or another -o.")


def _card_path(output: Path) -> Path:
    return output.with_suffix(".md")


def _decide_resume(request: FinetuneRequest, work: WorkFolder, watcher: Watcher) -> bool:
    """Whether to go on with a run; what stands in the way of either is refused."""
    if request.resume:
        _refuse_foreign_output(request, work)
        if not work.started:
            watcher.note("There is no run to go on with, so one is started.")
        return work.started
    if not work.empty and not request.overwrite:
        msg = f"{work.folder.name} holds a run that was not finished."
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
        msg = f"{output} exists, and the run to go on with has not written it."
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
    """The work folder, locked; if nothing worth keeping came about in it, it goes again."""
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


# -- images ------------------------------------------------------------------------------------------------


def _pack_only(request: FinetuneRequest, watcher: Watcher) -> FinetuneResult:
    if request.output.exists() and not request.overwrite:
        msg = f"{request.output} exists."
        raise ArgumentsError(msg, "Give --overwrite to replace it, or another -o.")
    if request.folder.is_file():
        msg = f"{request.folder.name} is one file already."
        raise ArgumentsError(msg, "Give a folder of images to pack.")
    notes = _pack(request, request.output, watcher)
    return FinetuneResult(request.output, notes=notes)


def _pack(request: FinetuneRequest, target: Path, watcher: Watcher) -> list[str]:
    """Read the folders into a packed file; returns why images were left out."""
    from medsr_cli import formats
    from medsr_cli.formats.contract import Reader, ReadOptions
    from medsr_cli.training.gather import Found, find_images, pack_images

    def search(folder: Path) -> tuple[list[Found], list[str]]:
        return find_images(folder, formats.is_image_name, request.include, request.exclude, _series_of)

    def read(image: Found) -> Reader:
        return formats.open_image(image.path, ReadOptions(axis=request.axis, series=image.series))

    found, skipped = search(request.folder)
    if request.validation is not None:
        if not request.validation.is_dir():
            msg = f"{request.validation} is no folder."
            raise ArgumentsError(msg, "Give a folder of images to validate on.")
        held, more = search(request.validation)
        skipped += more
        _note_shared_names({f.subject for f in found} & {f.subject for f in held}, watcher)
        found += [dataclasses.replace(image, validation=True) for image in held]
    for sentence in skipped[:SKIPPED_SHOWN]:
        watcher.note(sentence)
    if len(skipped) > SKIPPED_SHOWN:
        watcher.note(f"So were {len(skipped) - SKIPPED_SHOWN} others; --include takes what it names.")
    if not found:
        msg = f"No image was found in {request.folder.name}."
        raise InputRefused(msg, "Give a folder with NIfTI, DICOM, NRRD or PNG images; --include takes patterns.")
    gathered = pack_images(found, read, target, watcher, overwrite=request.overwrite)
    return [*skipped, *gathered.skipped]


def _series_of(path: Path) -> list[str]:
    """The DICOM series of a folder or archive that are images."""
    from medsr_cli.formats import dicom
    from medsr_cli.formats.contract import ReadOptions

    return [series.uid for series in dicom.list_series(path, ReadOptions()) if series.refusal is None and series.uid]


def _note_shared_names(shared: set[str], watcher: Watcher) -> None:
    if shared:
        watcher.note(
            f"{len(shared)} subjects have the same name in both folders; make sure that they are different people."
        )


# -- the run -----------------------------------------------------------------------------------------------


@dataclass
class _Workshop:
    """Everything a run needs, set up."""

    request: FinetuneRequest
    work: WorkFolder
    watcher: Watcher
    trainer: Trainer
    slices: PackedSlices
    train: NDArray[Any]
    held: NDArray[Any]
    config: RdstConfig
    start: str
    bicubic: dict[int, tuple[float, float]]

    @classmethod
    def set_up(cls, request: FinetuneRequest, work: WorkFolder, watcher: Watcher, *, resuming: bool) -> _Workshop:
        """Pack, split, build, and load the state of a run that goes on."""
        from medsr_cli.engines.torch_engine import find_device
        from medsr_cli.training.gather import split_subjects
        from medsr_cli.training.loop import Trainer
        from medsr_cli.training.pack import PackedSlices
        from medsr_cli.training.patches import PatchSampler

        device = find_device(request.device)
        recipe = _recipe_of(request, work if resuming else None)
        saved = work.identity() if resuming else None
        net, start = _rebuilt(request, saved) if saved else _build(request, recipe)
        slices = PackedSlices(_packed_file(request, work, watcher))
        chosen = request.validation_subjects or (saved.validation if saved else ())
        subjects, held_subjects = split_subjects(slices.subjects, chosen)
        train, held = slices.indices_of(subjects), slices.indices_of(held_subjects)
        _settle_identity(request, work, net, start, held_subjects, resuming=resuming)
        _describe(slices, train, held, len(subjects), len(held_subjects), watcher)
        bicubic: dict[int, tuple[float, float]] = {}
        score = _scorer(slices, held, request.scale, request.validation_slices, bicubic)
        trainer = Trainer(net.to(device), recipe, PatchSampler(slices, train, recipe, request.scale), score, work.state)
        if resuming:
            trainer.resume()
            watcher.note(f"Going on from step {trainer.state.step} of {recipe.iterations}.")
        return cls(request, work, watcher, trainer, slices, train, held, net.config, start, bicubic)

    def run(self, began: float) -> FinetuneResult:
        """Train, then write the best network if it is good."""
        from medsr_cli.training.workfolder import Log

        trainer, request = self.trainer, self.request
        logged = _Logged(self.watcher, Log(self.work.log, trainer.state.step), time.monotonic() - trainer.state.seconds)
        until = float("inf")
        if request.max_minutes is not None:
            until = trainer.state.seconds + max(request.max_minutes * 60 - (time.monotonic() - began), 0.0)
        interrupted = False
        try:
            state = trainer.run(logged, until)
        except KeyboardInterrupt:
            state, interrupted = trainer.state, True
        if not interrupted and state.step < trainer.recipe.iterations:
            trainer.validate_now(logged)
        return self._release(state, interrupted=interrupted)

    def _release(self, state: TrainingState, *, interrupted: bool) -> FinetuneResult:
        finished = not interrupted and state.step >= self.trainer.recipe.iterations
        try:
            candidate, scores = self._judged(state, quick=interrupted)
        except QualityGateFailed as error:
            if interrupted:
                note = "The state was saved; nothing was written, for no validation is good enough yet."
                return self._stopped(state, (note, "Go on with --resume."))
            remedy = (
                f"{error.remedy} The run is kept in {self.work.folder.name}: --resume with more --iterations goes on."
            )
            raise QualityGateFailed(error.sentence, remedy) from error
        notes = self._notes(state, candidate, scores, finished=finished)
        result = self._write(state, candidate, scores, notes, interrupted=interrupted)
        if not finished or self.request.keep_work:
            return dataclasses.replace(result, work_folder=self.work.folder)
        self.work.remove()
        return result

    def _judged(self, state: TrainingState, *, quick: bool) -> tuple[Candidate, list[VolumeScore]]:
        """The best network as it would be stored, and its scores.

        Raises:
            QualityGateFailed: it is worse than its start or than bicubic.
        """
        from medsr_cli.training.release import best_network, refuse_worse

        if not state.history:
            msg = "The run was stopped before its first validation."
            raise QualityGateFailed(msg)
        refuse_worse(state, least_gain_db=self.request.least_gain_db)
        candidate = best_network(self.trainer.net, state, self.trainer.score, half=self.request.half)
        score = self.trainer.score
        if not quick and self.request.validation_slices:
            most = max(REPORT_SLICES, self.request.validation_slices)
            score = _scorer(self.slices, self.held, self.request.scale, most, self.bicubic)
        scores = score(candidate.net)
        refuse_worse(state, scores, self.request.least_gain_db)
        return candidate, scores

    def _notes(
        self, state: TrainingState, candidate: Candidate, scores: Sequence[VolumeScore], *, finished: bool
    ) -> list[str]:
        notes = [candidate.note] if candidate.note else []
        worse = sum(score.gain_db < 0 for score in scores)
        if worse:
            notes.append(f"{worse} of {len(scores)} held-out volumes are worse than with bicubic.")
        if not finished:
            notes.append(f"Stopped at step {state.step} of {self.trainer.recipe.iterations}; go on with --resume.")
        for note in notes:
            self.watcher.note(note)
        return notes

    def _stopped(self, state: TrainingState, notes: Sequence[str]) -> FinetuneResult:
        for note in notes:
            self.watcher.note(note)
        start = state.history[0]["gain_db"] if state.history else None
        return FinetuneResult(
            None,
            work_folder=self.work.folder,
            interrupted=True,
            steps=state.step,
            best_step=state.best_step,
            start_gain_db=start,
            notes=notes,
        )

    def _write(
        self,
        state: TrainingState,
        candidate: Candidate,
        scores: Sequence[VolumeScore],
        notes: Sequence[str],
        *,
        interrupted: bool,
    ) -> FinetuneResult:
        from medsr_cli.formats.atomic import atomic_file
        from medsr_cli.networks.checkpoint import save_network
        from medsr_cli.training.card import metadata, write_card

        request = self.request
        facts = self._facts(state, candidate, scores, interrupted=interrupted)
        data = save_network(candidate.net.cpu(), metadata(facts), half=candidate.half)
        sha256 = hashlib.sha256(data).hexdigest()
        card = _card_path(request.output)
        self.work.write_released(sha256)
        with atomic_file(request.output, overwrite=request.overwrite or request.resume, verify=_loads) as file:
            file.write(data)
        with atomic_file(card, overwrite=True) as file:
            file.write(write_card(facts, len(data), sha256).encode())
        return FinetuneResult(
            request.output,
            card,
            interrupted=interrupted,
            steps=state.step,
            best_step=state.best_step,
            gain_db=facts.gain_db,
            start_gain_db=state.history[0]["gain_db"],
            half=candidate.half,
            sha256=sha256,
            scores=tuple(scores),
            notes=tuple(notes),
        )

    def _facts(
        self, state: TrainingState, candidate: Candidate, scores: Sequence[VolumeScore], *, interrupted: bool
    ) -> Facts:
        from medsr_cli.networks.checkpoint import config_of
        from medsr_cli.training.card import Facts, low_resolution_spacing_mm, slices_of, table_rows

        request, config = self.request, config_of(candidate.net)
        train, held = slices_of(self.slices, self.train), slices_of(self.slices, self.held)
        modalities = {volume.modality for volume in train} - {None}
        return Facts(
            id=_identifier(request.output),
            method="rdst",
            variant=catalogue.RDST.variant_of(config),
            config=config,
            scale=request.scale,
            channels=self.config.in_channels,
            parameters=sum(value.numel() for value in candidate.net.parameters()),
            half=candidate.half,
            modality=request.modality or (str(modalities.pop()) if len(modalities) == 1 else "any"),
            body_part=request.body_part,
            spacing_mm=low_resolution_spacing_mm(train, request.scale),
            licence=request.licence,
            data_licence=request.data_licence,
            recipe=self.trainer.recipe,
            state=state,
            interrupted=interrupted or state.step < self.trainer.recipe.iterations,
            device=_device_in_words(self.trainer.device),
            start=self.start,
            train=train,
            held=held,
            train_slices=len(self.train),
            held_slices=len(self.held),
            rows=table_rows(scores, named=request.show_names),
            notes=[candidate.note] if candidate.note else [],
            command=command_line(request),
            date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            version=__version__,
        )


class _Logged:
    """Passes on what happens, and keeps a line for each validation."""

    def __init__(self, watcher: Watcher, log: Log, started: float) -> None:
        self._watcher, self._log, self._started = watcher, log, started
        self._losses: list[float] = []

    def step(self, done: int, total: int, loss: float) -> None:
        self._losses.append(loss)
        self._watcher.step(done, total, loss)

    def validated(self, done: int, scores: list[VolumeScore], best: bool) -> None:
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self._log.add(done, loss, time.monotonic() - self._started, scores)
        self._watcher.validated(done, scores, best)


def _recipe_of(request: FinetuneRequest, resumed: WorkFolder | None) -> Recipe:
    """The preset or the saved recipe, with what the request sets."""
    from medsr_cli.training.loop import read_state

    if request.preset is not None and request.preset not in PRESETS:
        msg = f"There is no preset {request.preset!r}."
        raise ArgumentsError(msg, f"There are: {', '.join(PRESETS)}.")
    saved = Recipe.from_json(read_state(resumed.state)["recipe"]) if resumed else None
    if saved is not None and request.preset is None:
        wanted = changed(saved, request.settings)
    else:
        recipe = PRESETS[request.preset or "paper"]
        if (request.weights or request.start) and "linear_steps" not in request.settings:
            # A network that can already do more than enlarge linearly would have to unlearn it.
            recipe = dataclasses.replace(recipe, linear_steps=0)
        wanted = changed(recipe, request.settings)
    if saved is not None:
        refuse_other_recipe(saved, wanted)
    return wanted


def _build(request: FinetuneRequest, recipe: Recipe) -> tuple[Rdst, str]:
    """The network to train, and what it starts from, in words."""
    import torch

    from medsr_cli.networks.rdst import Rdst
    from medsr_cli.training.loop import grow, start_from_linear

    if request.weights:
        return _continued(request, request.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = Rdst(request.network or _named_config(request))
    if request.start:
        other, digest = _checkpoint(request.start)
        fresh = grow(net, other.state_dict())
        return net, f"what fits of the checkpoint with SHA-256 {digest} ({len(fresh)} tensors did not)"
    if recipe.linear_steps:
        start_from_linear(net)
    return net, "nothing"


def _rebuilt(request: FinetuneRequest, saved: RunIdentity) -> tuple[Rdst, str]:
    """The network of a run that goes on, whose weights are in its state: what it began with need not be there."""
    from medsr_cli.networks.rdst import Rdst, RdstConfig

    if request.weights or request.start:
        return _build(request, Recipe())
    config = RdstConfig(**saved.config)  # type: ignore[arg-type]  # JSON keeps whole numbers whole
    if saved.start == "nothing" and config != (request.network or _named_config(request)):
        variant = catalogue.RDST.variant_of(saved.config)
        msg = f"The run to go on with is of {variant or 'another network'} x{config.scale}."
        raise ArgumentsError(msg, "Give the same -m and -s, or --overwrite instead of --resume to start anew.")
    return Rdst(config), saved.start


def _named_config(request: FinetuneRequest) -> RdstConfig:
    from medsr_cli.networks.rdst import RdstConfig

    arch, variant = catalogue.find(request.model)
    blocks = arch.variants[variant or arch.id]["n_rdstb"]
    return RdstConfig(n_rdstb=int(blocks), scale=request.scale)


def _continued(request: FinetuneRequest, name: str) -> tuple[Rdst, str]:
    net, digest = _checkpoint(name)
    config = dataclasses.asdict(net.config)
    _, variant = catalogue.find(request.model)
    if net.config.scale != request.scale:
        msg = f"That checkpoint enlarges by {net.config.scale}, not by {request.scale}."
        raise ArgumentsError(msg, f"Give -s {net.config.scale}, or --start instead of --weights to take what fits.")
    if net.config.in_channels != 1:
        msg = f"That checkpoint needs {net.config.in_channels} registered channels; this command has one."
        raise ArgumentsError(msg, "Start from a checkpoint of one channel.")
    if variant is not None and catalogue.RDST.variant_of(config) != variant:
        msg = f"That checkpoint is {catalogue.RDST.variant_of(config) or 'an RDST of other sizes'}, not {variant}."
        raise ArgumentsError(msg, "Give -m rdst, or --start instead of --weights to take what fits.")
    return net, f"the checkpoint with SHA-256 {digest}"


def _checkpoint(name: str) -> tuple[Rdst, str]:
    """An RDST of a path or an id, and the SHA-256 of its file."""
    from medsr_cli.networks import load_network
    from medsr_cli.networks.rdst import Rdst

    path = Path(name)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            msg = f"There is no checkpoint {name}."
            raise WeightsError(msg, "Check the path.")
        from medsr_cli.tasks.weights import open_shelf

        shelf = open_shelf()
        path = shelf.store.verified_path(shelf.manifest.entry(name))
    net = load_network(path)
    if not isinstance(net, Rdst):
        msg = f"{path.name} is not an RDST."
        raise WeightsError(msg, "Give a checkpoint of RDST or RDST-E.")
    with path.open("rb") as file:
        return net, hashlib.file_digest(file, "sha256").hexdigest()


def _packed_file(request: FinetuneRequest, work: WorkFolder, watcher: Watcher) -> Path:
    """The packed slices: the file that was given, the one of the run that goes on, or a new one."""
    if request.folder.is_file():
        if request.validation is not None:
            msg = "A packed file holds its validation images already."
            raise ArgumentsError(msg, "Leave --val away; --val-subject chooses among its subjects.")
        return request.folder
    if not work.pack.exists():
        _pack(request, work.pack, watcher)
    return work.pack


def _settle_identity(
    request: FinetuneRequest, work: WorkFolder, net: Rdst, start: str, held: Sequence[str], *, resuming: bool
) -> None:
    from medsr_cli.networks.checkpoint import config_of
    from medsr_cli.training.workfolder import RunIdentity, pack_identity

    pack = request.folder if request.folder.is_file() else work.pack
    identity = RunIdentity("rdst", request.scale, start, pack_identity(pack), list(held), config_of(net))
    if resuming:
        work.refuse_other(identity)
    else:
        work.write_identity(identity)


def _describe(
    slices: PackedSlices, train: NDArray[Any], held: NDArray[Any], n_train: int, n_held: int, watcher: Watcher
) -> None:
    watcher.note(
        f"{len(slices.volumes)} volumes, {len(slices)} slices: {len(train)} of {n_train} subjects to train on, "
        f"{len(held)} of {n_held} to validate on."
    )


def _scorer(
    slices: PackedSlices, held: NDArray[Any], scale: int, per_volume: int, bicubic: dict[int, tuple[float, float]]
) -> Score:
    from medsr_cli.training.validation import validate

    def score(net: torch.nn.Module) -> list[VolumeScore]:
        scores = validate(net, slices, held, scale, per_volume, bicubic)
        if not scores:
            msg = "No slice of the held-out subjects is large enough to validate on."
            raise InputRefused(msg, "Choose other subjects to validate on.")
        return scores

    return score


# -- words -------------------------------------------------------------------------------------------------


def command_line(request: FinetuneRequest) -> str:
    """The command that repeats a run, with placeholders for what might name a person."""
    words = ["medsr finetune", "DIR", f"-m {request.model}", f"-s {request.scale}", "-o OUT"]
    for given, text in (
        (request.validation, "--val VAL"),
        (request.validation_subjects, "--val-subject PATTERN"),
        (request.include, "--include PATTERN"),
        (request.exclude, "--exclude PATTERN"),
        (request.weights, "--weights CHECKPOINT"),
        (request.start, "--start CHECKPOINT"),
        (request.axis != "auto", f"--axis {request.axis}"),
        (request.preset, f"--preset {request.preset}"),
        (request.max_minutes, f"--max-minutes {request.max_minutes or 0:g}"),
        (not request.half, "--no-half"),
    ):
        if given:
            words.append(text)
    for name, value in request.settings.items():
        words.append(_option(name, value))
    return " ".join(words)


def _option(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"--no-{name.replace('_', '-')}"
    if isinstance(value, tuple):
        return f"{flag} {' '.join(f'{part:g}' for part in value)}"
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def _identifier(output: Path) -> str:
    """The output's name as an id of the manifest takes it."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in output.stem.lower())
    return kept.strip(".-")[:64] or "finetuned"


def _loads(path: Path) -> None:
    from medsr_cli.networks import load_network

    load_network(path)


def _device_in_words(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def as_json(result: FinetuneResult) -> str:
    """The result as one line of JSON."""
    facts = dataclasses.asdict(result)
    for name in ("output", "card", "work_folder"):
        facts[name] = str(facts[name]) if facts[name] else None
    for row, score in zip(facts["scores"], result.scores, strict=True):
        row["gain_db"] = score.gain_db
    return json.dumps({"path": facts.pop("output"), **facts})
