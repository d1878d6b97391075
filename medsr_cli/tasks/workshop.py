"""One training from its packed slices to the checkpoint, its card, its curve and its log.

Where `accelerate launch` started several processes, all of them train. The first one alone packs the images,
validates, tells the watcher and writes; the others wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, InputRefused, QualityGateFailed, RunError, mention
from medsr_cli.tasks.finetune import (
    FinetuneRequest,
    FinetuneResult,
    Watcher,
    beside,
    command_line,
    is_first_process,
    task_of,
)
from medsr_cli.tasks.training_data import Split, packed_file, split
from medsr_cli.tasks.training_networks import (
    LossNetworks,
    build,
    channels_of,
    loss_networks,
    rebuild,
    recipe_for,
    refuse_missing,
)

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from medsr_cli.evaluation.agreement_map import Limit
    from medsr_cli.training.card import Facts
    from medsr_cli.training.loop import Sampler, Trainer
    from medsr_cli.training.recipe import Recipe
    from medsr_cli.training.release import Candidate
    from medsr_cli.training.state import TrainingState
    from medsr_cli.training.validation import Bicubic, Score, Scorer
    from medsr_cli.training.workfolder import Log, RunIdentity, WorkFolder

REPORT_SLICES = 64
"""Slices of each held-out volume that the figures of the card are measured on, at most."""


@dataclass
class Workshop:
    """Everything a run needs, set up."""

    request: FinetuneRequest
    work: WorkFolder
    watcher: Watcher
    trainer: Trainer
    data: Split
    start: str
    losses: LossNetworks
    accelerator: Accelerator
    bicubic: Bicubic

    @classmethod
    def set_up(cls, request: FinetuneRequest, work: WorkFolder, watcher: Watcher, *, resuming: bool) -> Workshop:
        """Choose the recipe, pack, split, build, and load the state of a run that goes on."""
        from medsr_cli.engines.devices import find_device
        from medsr_cli.training.loop import Trainer
        from medsr_cli.training.processes import accelerator_for

        device = find_device(request.device)
        recipe = recipe_for(request, _saved_recipe(work) if resuming else None)
        refuse_missing(request)
        losses = loss_networks(request, recipe, watcher)
        accelerator = accelerator_for(None if request.device == "auto" else device)
        saved = work.identity() if resuming else None
        if is_first_process():
            packed_file(request, recipe, work, watcher)
        accelerator.wait_for_everyone()
        path = packed_file(request, recipe, work, watcher)
        data = split(request, recipe, path, request.validation_subjects, saved.validation if saved else ())
        begun = rebuild(request, recipe, data.slices, saved) if saved else build(request, recipe, data.slices)
        _refuse_unlike(losses, data)
        identity = _identity(request, begun.net, begun.start, data, losses)
        if saved is not None:
            work.refuse_other(identity)
        elif is_first_process():
            work.write_identity(identity)
        watcher.note(data.in_words)
        bicubic: Bicubic = {}
        trainer = Trainer(
            begun.net.to(device) if accelerator.num_processes == 1 else begun.net,
            recipe,
            _make_sampler(request, data, accelerator),
            _scorer(request, recipe, data, request.validation_slices, bicubic),
            work.state,
            networks=losses.networks,
            accelerator=accelerator,
        )
        if resuming:
            trainer.resume()
            watcher.note(f"Going on from step {trainer.state.step} of {recipe.total}.")
        return cls(request, work, watcher, trainer, data, begun.start, losses, accelerator, bicubic)

    def run(self, began: float) -> FinetuneResult:
        """Train, then write the best network if it is good."""
        from medsr_cli.training.workfolder import Log

        trainer, request = self.trainer, self.request
        log = Log(self.work.log, trainer.state.step, self.data.slices.subjects, named=request.show_names)
        logged = _Logged(self.watcher, log, time.monotonic() - trainer.state.seconds)
        until = float("inf")
        if request.max_minutes is not None:
            until = trainer.state.seconds + max(request.max_minutes * 60 - (time.monotonic() - began), 0.0)
        interrupted = False
        with self._kept():
            try:
                trainer.run(logged, until)
            except KeyboardInterrupt:
                interrupted = True
            if not interrupted and not trainer.finished:
                trainer.validate_now(logged)
            if not self.accelerator.is_main_process:
                return FinetuneResult(None, interrupted=interrupted, steps=trainer.state.step, main=False)
            return self._release(log, interrupted=interrupted)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What stops a run says that the state is kept; several processes part in the end."""
        try:
            yield
        except RunError as error:
            if not self.work.state.is_file():
                raise
            remedy = (
                f"{error.remedy} The last state saved is kept in "
                f"{mention(self.work.folder.name)}: --resume goes on with it."
            )
            raise RunError(error.sentence, remedy.strip()) from error
        finally:
            if self.accelerator.num_processes > 1:
                self.accelerator.end_training()

    # -- the result ----------------------------------------------------------------------------------------

    def _release(self, log: Log, *, interrupted: bool) -> FinetuneResult:
        state, finished = self.trainer.state, self.trainer.finished and not interrupted
        try:
            candidate, scores = self._judged(state, quick=interrupted)
        except QualityGateFailed as error:
            if interrupted:
                note = "The state was saved; nothing was written, for no validation is good enough yet."
                return self._stopped(state, (note, "Go on with --resume."))
            more = f"The run is kept in {mention(self.work.folder.name)}: --resume with more --iterations goes on."
            raise QualityGateFailed(error.sentence, f"{error.remedy} {more}") from error
        notes = self._notes(state, candidate, scores, finished=finished)
        result = self._write(candidate, scores, notes, log, interrupted=interrupted)
        if not finished or self.request.keep_work:
            return dataclasses.replace(result, work_folder=self.work.folder)
        self.work.remove()
        return result

    def _judged(self, state: TrainingState, *, quick: bool) -> tuple[Candidate, Sequence[Score]]:
        """The best network as it would be stored, and its scores.

        Raises:
            QualityGateFailed: it is worse than its start or than the baseline.
        """
        from medsr_cli.training.release import best_network, refuse_worse

        if not state.history:
            msg = "The run was stopped before its first validation."
            raise QualityGateFailed(msg)
        least, judge = self.request.least_gain_db, self.trainer.recipe.stages[-1].judge
        score_class = _score_class(self.request)
        words = {"baseline": score_class.baseline, "unit": score_class.unit}
        refuse_worse(state, (), least, judge=judge, **words)
        candidate = best_network(self.trainer.net, state, self.trainer.score, half=self.request.half)
        score = self.trainer.score
        if not quick and self.request.validation_slices:
            most = max(REPORT_SLICES, self.request.validation_slices)
            score = _scorer(self.request, self.trainer.recipe, self.data, most, self.bicubic)
        scores = score(candidate.net)
        refuse_worse(state, scores, least, judge=judge, **words)
        return candidate, scores

    def _notes(
        self, state: TrainingState, candidate: Candidate, scores: Sequence[Score], *, finished: bool
    ) -> list[str]:
        notes = [candidate.note] if candidate.note else []
        worse = sum(score.gain < 0 for score in scores)
        if worse:
            notes.append(f"{worse} of {len(scores)} held-out volumes are worse than with {scores[0].baseline}.")
        if state.ended_early:
            notes.append(f"Ended at step {state.step}: validations no longer improved.")
        elif not finished:
            notes.append(f"Stopped at step {state.step} of {self.trainer.recipe.total}; go on with --resume.")
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
            start_gain=start,
            unit=_score_class(self.request).unit,
            notes=notes,
        )

    def _write(
        self,
        candidate: Candidate,
        scores: Sequence[Score],
        notes: Sequence[str],
        log: Log,
        *,
        interrupted: bool,
    ) -> FinetuneResult:
        from medsr_cli.formats.atomic import atomic_file
        from medsr_cli.networks.checkpoint import save_network
        from medsr_cli.training.card import metadata, write_card

        request, state = self.request, self.trainer.state
        facts = self._facts(candidate, scores, interrupted=interrupted)
        data = save_network(candidate.net.cpu(), metadata(facts), half=candidate.half)
        sha256 = hashlib.sha256(data).hexdigest()
        card, curve, kept_log = beside(request.output)
        self.work.write_released(sha256)
        with atomic_file(request.output, overwrite=request.overwrite or request.resume, verify=_loads) as file:
            file.write(data)
        texts = {
            card: write_card(facts, len(data), sha256, _named(curve)).encode(),
            curve: self._curve(log),
            kept_log: log.to_keep(named=request.show_names),
        }
        for path, content in texts.items():
            with atomic_file(path, overwrite=True) as file:
                file.write(content)
        return FinetuneResult(
            request.output,
            card,
            interrupted=interrupted,
            steps=state.step,
            best_step=state.best_step,
            gain=facts.gain,
            start_gain=state.history[0]["gain_db"],
            unit=scores[0].unit,
            half=candidate.half,
            sha256=sha256,
            curve=curve,
            log=kept_log,
            scores=tuple(scores),
            notes=tuple(notes),
        )

    def _curve(self, log: Log) -> bytes:
        from medsr_cli.training.curve import curve_png

        state, scores = self.trainer.state, _score_class(self.request)
        losses = [(entry["step"], entry["loss"]) for entry in log.entries if entry["loss"] is not None]
        return curve_png(state.history, losses, unit=scores.unit, baseline=scores.baseline, best_step=state.best_step)

    def _facts(self, candidate: Candidate, scores: Sequence[Score], *, interrupted: bool) -> Facts:
        from medsr_cli.networks.checkpoint import config_of
        from medsr_cli.training import card

        request, config, recipe = self.request, config_of(candidate.net), self.trainer.recipe
        slices, arch = self.data.slices, self.request.arch
        train, held = card.slices_of(slices, self.data.train), card.slices_of(slices, self.data.held)
        modalities = {volume.modality for volume in train} - {None}
        degradation, in_words = card.degradation_of(recipe, given=self.data.given)
        factors = [float(scale) for scale in recipe.scales] or [float(request.scale or 1)]
        names, digests = self.losses.names, self.losses.sha256
        return card.Facts(
            id=_identifier(request.output),
            method=arch.id,
            variant=arch.variant_of(config),
            config=config,
            scale=request.scale,
            scale_range=(arch.scale_range[0], max(factors)) if arch.scale_range else None,
            channels=channels_of(arch, slices),
            parameters=sum(value.numel() for value in candidate.net.parameters()),
            half=candidate.half,
            modality=request.modality or (str(modalities.pop()) if len(modalities) == 1 else "any"),
            body_part=request.body_part,
            spacing_mm=card.low_resolution_spacing_mm(train, factors),
            licence=request.licence,
            data_licence=request.data_licence,
            recipe=recipe,
            state=self.trainer.state,
            interrupted=interrupted or not self.trainer.finished,
            device=_device_in_words(self.trainer.device),
            start=self.start,
            train=train,
            held=held,
            train_slices=len(self.data.train),
            held_slices=len(self.data.held),
            rows=card.table_rows(scores, named=request.show_names),
            notes=[candidate.note] if candidate.note else [],
            command=command_line(request),
            date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            version=__version__,
            degradation=degradation,
            degradation_in_words=in_words,
            normalisation=card.FULL_SCALE if arch.full_scale else card.VALUE_RANGE,
            networks={role: (names[role], digests[role]) for role in names},
            processes=self.accelerator.num_processes,
            limit=self._limit(candidate, degradation) if recipe.task == "super-resolution" else None,
            precision_cost_db=None if interrupted else self._precision_cost_db(candidate, scores),
        )

    def _precision_cost_db(self, candidate: Candidate, scores: Sequence[Score]) -> Mapping[str, float] | None:
        """What bfloat16 costs, where the device computes in it and there is time to measure."""
        from medsr_cli.engines.precision import has_bfloat16
        from medsr_cli.training.release import precision_cost_db

        if not has_bfloat16(self.trainer.device):
            return None
        return precision_cost_db(candidate.net, scores, self.trainer.score)

    def _limit(self, candidate: Candidate, degradation: str) -> Limit:
        from medsr_cli.training.calibration import local_limit
        from medsr_cli.training.validation import conditions_of
        from medsr_cli.volume.degradation import degradation_named

        conditions = conditions_of(self.trainer.recipe, self.request.scale)
        return local_limit(candidate.net, self.data.slices, self.data.held, conditions, degradation_named(degradation))


class _Logged:
    """Passes on what happens, and keeps a line for each validation."""

    def __init__(self, watcher: Watcher, log: Log, started: float) -> None:
        self._watcher, self._log, self._started = watcher, log, started
        self._losses: list[float] = []

    def step(self, done: int, total: int, loss: float) -> None:
        self._losses.append(loss)
        self._watcher.step(done, total, loss)

    def validated(self, done: int, scores: Sequence[Score], best: bool) -> None:
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self._log.add(done, loss, time.monotonic() - self._started, scores)
        self._watcher.validated(done, scores, best)


def _saved_recipe(work: WorkFolder) -> Recipe:
    from medsr_cli.training.recipe import Recipe
    from medsr_cli.training.state import read_state

    return Recipe.from_json(read_state(work.state)["recipe"])


def _refuse_unlike(losses: LossNetworks, data: Split) -> None:
    """A segmentation network has to take the images that are trained on."""
    segmentation = losses.networks.get("segmentation")
    if segmentation is None:
        return
    config: Any = segmentation.config
    if config.in_channels != data.slices.channels:
        msg = f"The segmentation network takes {config.in_channels} channels; these images have {data.slices.channels}."
        raise ArgumentsError(msg, "Give one that was trained on such images with --segmentation.")


def _identity(request: FinetuneRequest, net: nn.Module, start: str, data: Split, losses: LossNetworks) -> RunIdentity:
    from medsr_cli.networks.checkpoint import config_of
    from medsr_cli.training.workfolder import RunIdentity, numbers_of, pack_identity

    return RunIdentity(
        request.arch.id,
        request.scale,
        start,
        pack_identity(data.path),
        numbers_of(data.slices.subjects, data.held_subjects),
        config_of(net),
        dict(losses.sha256),
    )


def _make_sampler(request: FinetuneRequest, data: Split, accelerator: Accelerator) -> Callable[[Recipe], Sampler]:
    from medsr_cli.training.pack import PackedSlices
    from medsr_cli.training.samplers import sampler_for

    # Apart from the slices that are validated on: a colour network is trained on grey three times over.
    slices = PackedSlices(data.path)
    slices.channels = channels_of(request.arch, slices)

    def make(stage: Recipe) -> Sampler:
        return sampler_for(
            stage,
            slices,
            data.train,
            float(request.scale or max(stage.scales, default=1.0)),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )

    return make


def _score_class(request: FinetuneRequest) -> type[Score]:
    from medsr_cli.training.validation import CentreScore, OverlapScore, VolumeScore

    classes: dict[str, type[Score]] = {"segmentation": OverlapScore, "detection": CentreScore}
    return classes.get(task_of(request.arch), VolumeScore)


def _scorer(request: FinetuneRequest, recipe: Recipe, data: Split, per_volume: int, bicubic: Bicubic) -> Scorer:
    """Scores a network on the held-out subjects; it refuses where there is nothing to measure."""
    measure = _measure(request, recipe, data, per_volume, bicubic)

    def score(net: nn.Module) -> Sequence[Score]:
        scores = measure(net)
        if not scores:
            msg = "No slice of the held-out subjects is large enough to validate on."
            raise InputRefused(msg, "Choose other subjects to validate on.")
        return scores

    return score


def _measure(request: FinetuneRequest, recipe: Recipe, data: Split, per_volume: int, bicubic: Bicubic) -> Scorer:
    from medsr_cli.training.labelled import CentreScorer, OverlapScorer
    from medsr_cli.training.validation import conditions_of, validate

    task = task_of(request.arch)
    if task == "segmentation":
        return OverlapScorer(data.slices, data.train, data.held, per_volume)
    if task == "detection":
        return CentreScorer(data.slices, data.train, data.held, per_volume)
    conditions = conditions_of(recipe, request.scale)
    return lambda net: validate(net, data.slices, data.held, conditions, per_volume, bicubic)


# -- words -------------------------------------------------------------------------------------------------


def _named(curve: Path) -> str:
    """The name of the curve as the card may tell it: where it is the checkpoint's id, which the card tells anyway."""
    return curve.name if curve.stem == _identifier(curve) else ""


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
