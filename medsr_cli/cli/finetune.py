"""`medsr finetune`: the new checkpoint's path on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.cli import options
from medsr_cli.cli.log import LOG
from medsr_cli.tasks.discretion import discreet

if TYPE_CHECKING:
    from rich.progress import Progress

    from medsr_cli.training.validation import Score

INTERRUPTED = 130
"""Exit code where Ctrl-C or a kill stopped the training, as shells count it."""
LINE_EVERY_SECONDS = 60.0
"""Time between two lines of a job's log."""

TRAINING = "Recipe: what a preset has, set anew (any other field of it: --set)"
DATA = "Images"
RUN = "Run"
SAYS = "What the checkpoint says of itself"


def finetune(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Images, a subject's in a folder of its own; or a packed file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write (.safetensors).")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="rdst, rdst-e, miassr, msgan, m2trans, cohft-s, -m or -l, cohft-released [rdst]."
        ),
    ] = None,
    scale: Annotated[
        int | None, typer.Option("--scale", "-s", help="2, 3 or 4 [4]; miassr has all scales at once.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="super-resolution, segmentation (labels) or detection (of a lesion).")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="paper, quick (for two cores), or another of the method's [paper]."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A recipe of your own: a YAML file.")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Go on with this checkpoint: a path or an id.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="Take what fits from a checkpoint of another size.")
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option("--segmentation", help="The segmentation network that a loss compares with: a path or an id."),
    ] = None,
    pack_only: Annotated[
        bool,
        typer.Option("--pack-only", help="Write the slices into one file, to be trained on elsewhere; no training."),
    ] = False,
    validation: Annotated[
        Path | None, typer.Option("--val", help="A folder to validate on.", rich_help_panel=DATA)
    ] = None,
    validation_subjects: Annotated[
        list[str] | None,
        typer.Option("--val-subject", help="Subjects of DIR to validate on (patterns).", rich_help_panel=DATA),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Take only these names (patterns).", rich_help_panel=DATA)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave these out (patterns).", rich_help_panel=DATA)
    ] = None,
    masks: Annotated[
        list[str] | None, typer.Option("--mask", help="Masks to use (patterns) [all].", rich_help_panel=DATA)
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="cohft: images to enlarge (patterns) [T2*, FLAIR*].", rich_help_panel=DATA),
    ] = None,
    guides: Annotated[
        list[str] | None,
        typer.Option(
            "--guide-name", "--guide-pattern", help="cohft: their guides (patterns) [T1*].", rich_help_panel=DATA
        ),
    ] = None,
    low: Annotated[
        Path | None,
        typer.Option("--low", help="Low-resolution images of the same names, not made ones.", rich_help_panel=DATA),
    ] = None,
    contrasts: Annotated[
        list[str] | None,
        typer.Option("--contrast", help="Registered images that are channels, in order.", rich_help_panel=DATA),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", help="m2trans: a text file, a line for each image.", rich_help_panel=DATA),
    ] = None,
    axis: Annotated[str, typer.Option("--axis", help="Slice axis.", rich_help_panel=DATA)] = "auto",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, as YAML.", rich_help_panel=TRAINING),
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of the first stage.", rich_help_panel=TRAINING)] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.", rich_help_panel=TRAINING)] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a low-resolution patch.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Adam's.", rich_help_panel=TRAINING)
    ] = None,
    betas: Annotated[tuple[float, float] | None, typer.Option(help="Adam's.", rich_help_panel=TRAINING)] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, cooldown, milestones or cosine.", rich_help_panel=TRAINING)
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of rising rate.", rich_help_panel=TRAINING)] = None,
    cooldown: Annotated[
        float | None, typer.Option(help="Share of the stage with falling rate.", rich_help_panel=TRAINING)
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help="Flip and transpose patches.", rich_help_panel=TRAINING),
    ] = None,
    gain: Annotated[
        float | None, typer.Option(help="Brighten patches by up to this factor.", rich_help_panel=TRAINING)
    ] = None,
    reduced_share: Annotated[
        float | None, typer.Option(help="Share of patches at half resolution.", rich_help_panel=TRAINING)
    ] = None,
    minimum_deviation: Annotated[
        float | None, typer.Option(help="Draw flatter patches again.", rich_help_panel=TRAINING)
    ] = None,
    linear_steps: Annotated[
        int | None, typer.Option(help="rdst: steps of head and tail alone, first.", rich_help_panel=TRAINING)
    ] = None,
    outer_rate: Annotated[
        float | None,
        typer.Option(help="rdst: share of the rate around the dense blocks.", rich_help_panel=TRAINING),
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Largest gradient norm; 0: none.", rich_help_panel=TRAINING)
    ] = None,
    average: Annotated[
        float | None, typer.Option(help="Decay of the weights' moving average.", rich_help_panel=TRAINING)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without a gain; 0: any.", rich_help_panel=TRAINING)
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.", rich_help_panel=TRAINING)
    ] = None,
    validation_slices: Annotated[
        int, typer.Option(min=0, help="Slices a volume in a validation; 0: all.", rich_help_panel=TRAINING)
    ] = 8,
    seed: Annotated[int | None, typer.Option(help="[0]", rich_help_panel=TRAINING)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=TRAINING)] = None,
    device: Annotated[
        str, typer.Option("--device", "-d", help="auto, cpu, cuda[:N] or mps.", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", rich_help_panel=RUN)] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop training then; --resume goes on.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run.", rich_help_panel=RUN)] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, start anew.", rich_help_panel=RUN)
    ] = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep OUT.work: slices, state, log.", rich_help_panel=RUN)
    ] = False,
    half: Annotated[
        bool, typer.Option("--half/--no-half", help="Write half precision if it costs under 0.01 dB.")
    ] = True,
    modality: Annotated[str | None, typer.Option(help="mr, ct, us or xr.", rich_help_panel=SAYS)] = None,
    body_part: Annotated[str, typer.Option(help="For example brain.", rich_help_panel=SAYS)] = "any",
    licence: Annotated[
        str, typer.Option("--licence", "--license", help="Of the weights.", rich_help_panel=SAYS)
    ] = "not stated",
    data_licence: Annotated[
        str, typer.Option("--data-licence", "--data-license", help="Of the images.", rich_help_panel=SAYS)
    ] = "not stated",
    show_names: Annotated[
        bool, typer.Option("--show-names", help="Name subjects in the card.", rich_help_panel=SAYS)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors on stderr.")] = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Train or fine-tune a network on a folder of images, and write a checkpoint that --weights takes.

    Low-resolution slices are made from the images themselves, by the method's own degradation, unless --low has
    them; subjects are held out to validate on, beside bicubic. A network that is not better than its start and
    than bicubic is not written (exit 7). Ctrl-C saves the state: the same command with --resume goes on exactly.
    Card, curve and log stand beside the checkpoint. Several GPUs: accelerate launch -m medsr_cli finetune ....
    Research use; in-plane only.
    """
    from medsr_cli.tasks.finetune import FinetuneRequest, is_first_process, model_of_task
    from medsr_cli.tasks.finetune import as_json as to_json
    from medsr_cli.tasks.finetune import finetune as train
    from medsr_cli.tasks.training_networks import settings_from

    given: dict[str, Any] = {
        "iterations": iterations,
        "batch": batch,
        "patch": patch,
        "learning_rate": learning_rate,
        "betas": betas,
        "schedule": schedule,
        "warmup": warmup,
        "cooldown": cooldown,
        "augment": augment,
        "gain": gain,
        "reduced_share": reduced_share,
        "minimum_deviation": minimum_deviation,
        "linear_steps": linear_steps,
        "outer_rate": outer_rate,
        "clip_norm": clip_norm,
        "average": average,
        "patience": patience,
        "validate_every": validate_every,
        "seed": seed,
        "precision": precision,
    }
    request = FinetuneRequest(
        folder=folder,
        output=output,
        model=model_of_task(task, model),
        scale=scale,
        validation=validation,
        validation_subjects=tuple(validation_subjects or ()),
        weights=weights,
        start=start,
        preset=preset,
        recipe=recipe,
        settings={
            **settings_from(assignments or ()),
            **{name: value for name, value in given.items() if value is not None},
        },
        segmentation=segmentation,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        masks=tuple(masks or ()),
        targets=tuple(targets or ()),
        guides=tuple(guides or ()),
        low=low,
        contrasts=tuple(contrasts or ()),
        captions=captions,
        axis=axis,
        device=device,
        threads=threads,
        max_minutes=max_minutes,
        resume=resume,
        overwrite=overwrite,
        keep_work=keep_work,
        pack_only=pack_only,
        half=half,
        validation_slices=validation_slices,
        modality=modality,
        body_part=body_part,
        licence=licence,
        data_licence=data_licence,
        show_names=show_names,
    )
    with _watcher(quiet=quiet or not is_first_process(), bar=not no_progress) as watcher:
        result = train(request, watcher)
    # Of several processes the first one tells it.
    if as_json and result.main:
        print(to_json(result))
    elif result.output is not None:
        print(result.output)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


class _Lines:
    """Plain lines for a job's log: notes, validations, and where the training is once a minute."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._loss = 0.0
        self._steps = 0
        self._since = time.monotonic()

    def packing(self, done: int, total: int) -> None:
        if done == total:
            self.note(f"Read {total} images.")

    def note(self, sentence: str) -> None:
        sentence = discreet(sentence)
        LOG.info("%s", sentence)
        if not self._quiet:
            self._show(sentence)

    def _show(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    def step(self, done: int, total: int, loss: float) -> None:
        self._loss += loss
        self._steps += 1
        elapsed = time.monotonic() - self._since
        if elapsed >= LINE_EVERY_SECONDS:
            rate = self._steps / elapsed
            left = _duration((total - done) / rate)
            self.note(f"step {done} of {total}, loss {self._loss / self._steps:.5f}, {rate:.2f} steps/s, {left} left")
            self._loss, self._steps, self._since = 0.0, 0, time.monotonic()

    def validated(self, done: int, scores: Sequence[Score], best: bool) -> None:
        self.note(f"step {done}: {_verdict(scores, best)}")


class _Bar(_Lines):
    """A bar with rate, loss, time left and the last validation; notes are printed above it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(quiet=False)
        self._progress = progress
        self._packing = progress.add_task("reading images", total=None, visible=False, figures="")
        self._training = progress.add_task("training", total=None, visible=False, figures="")
        self._begun: tuple[int, float] | None = None
        self._smooth: float | None = None
        self._last = ""

    def packing(self, done: int, total: int) -> None:
        self._progress.update(self._packing, completed=done, total=total, visible=done < total)

    def _show(self, sentence: str) -> None:
        self._progress.console.print(sentence, markup=False, highlight=False)

    def step(self, done: int, total: int, loss: float) -> None:
        if self._begun is None:
            self._begun = (done - 1, time.monotonic())
        self._smooth = loss if self._smooth is None else 0.98 * self._smooth + 0.02 * loss
        rate = (done - self._begun[0]) / max(time.monotonic() - self._begun[1], 1e-6)
        left = _duration((total - done) / rate)
        figures = f"{rate:.2f}/s  {left} left  loss {self._smooth:.5f}  {self._last}"
        self._progress.update(self._training, completed=done, total=total, visible=True, figures=figures)

    def validated(self, done: int, scores: Sequence[Score], best: bool) -> None:
        self._last = _verdict(scores, best)
        super().validated(done, scores, best)


def _verdict(scores: Sequence[Score], best: bool) -> str:
    """Figure and gain, means over the volumes, for example `31.20 dB, +1.05 dB against bicubic`."""
    gain = sum(score.gain for score in scores) / len(scores)
    figure = sum(score.figure for score in scores) / len(scores)
    unit, baseline = scores[0].unit, scores[0].baseline
    digits = 2 if unit == "dB" else 3
    told = f"{figure:.{digits}f} {unit}, {gain:+.{digits}f} {unit if unit == 'dB' else ''}".rstrip()
    return f"{told} against {baseline}{', the best so far' if best else ''}"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 100:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{hours} h"


@contextlib.contextmanager
def _watcher(*, quiet: bool, bar: bool) -> Iterator[_Lines]:
    if quiet or not bar or not sys.stderr.isatty():
        yield _Lines(quiet=quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)
