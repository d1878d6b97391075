"""`medsr evaluate`: the table, or JSON lines, on stdout; everything else on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, complain, print_json
from medsr_cli.cli.upscale import device_bytes, known_backend, known_modality, tile_side
from medsr_cli.errors import ArgumentsError, SomeInputsFailed, mention, unmarked
from medsr_cli.tasks.discretion import discreet_command

if TYPE_CHECKING:
    from medsr_cli.evaluation.results import Summary
    from medsr_cli.tasks.evaluate import Evaluation

DATA = "Images"
MEASURES = "Measures"
RUN = "Run"
COLUMNS = (
    "scale", "model", "metric", "mean", "deviation", "95 % interval", "slices of subjects",
    "over bicubic", "better in", "p",
)  # fmt: skip


def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="High-resolution images, a subject's in a folder of its own.")
    ],
    model: Annotated[
        str,
        typer.Option("-m", "--model", help="Methods or checkpoint ids, commas between; METHOD=FILE.safetensors too."),
    ] = "rdst",
    scale: Annotated[
        str | None,
        typer.Option("-s", "--scale", metavar="S[,S...]", help="Enlargements [4; those of the protocol's paper]."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Scales without a checkpoint: the next larger one, then shrunken to size.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Checkpoint id or .safetensors file for the only learned model.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="mr, ct, us or xr; else read from each file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write evaluation.json, slices.csv and report.html there."),
    ] = None,
    report: options.ReportFile = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write a line for each slice and model.")] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write one page with tables, slices and error maps.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Only these names (patterns).", rich_help_panel=DATA)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Not these names (patterns).", rich_help_panel=DATA)
    ] = None,
    subject: Annotated[
        list[str] | None, typer.Option("--subject", help="Only these subjects (patterns).", rich_help_panel=DATA)
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Images to enlarge, such as 'T2*', where others guide.", rich_help_panel=DATA),
    ] = None,
    guide_name: Annotated[
        list[str] | None,
        typer.Option("--guide-name", help="Images that guide, such as 'T1*', for cohft.", rich_help_panel=DATA),
    ] = None,
    shuffle_guides: Annotated[
        bool,
        typer.Option(
            "--shuffle-guides",
            help="Also run cohft with guides of other slices: what a guide gives.",
            rich_help_panel=DATA,
        ),
    ] = False,
    slices: Annotated[
        int, typer.Option("--slices", min=0, help="Of each volume, evenly spread; 0: all.", rich_help_panel=DATA)
    ] = 0,
    axis: options.Axis = "auto",
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="rdst, miassr, m2trans, cohft, cohft-released, uscyclegan or msgan; else by the first learned model.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option(
            "--segmentation",
            help="Checkpoint of a segmentation network: also Dice of its labels.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    fid: Annotated[
        bool, typer.Option("--fid", help="Also the Frechet distance of Inception features.", rich_help_panel=MEASURES)
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Of the bootstrap: the same seed, the same intervals.", rich_help_panel=MEASURES
        ),
    ] = 0,
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    tile: Annotated[
        str, typer.Option("-t", "--tile", help="auto, or the side of a tile.", rich_help_panel=RUN)
    ] = "auto",
    max_vram: options.MaxVram = None,
    threads: options.Threads = None,
    deterministic: options.Deterministic = False,
    preset: Annotated[
        str, typer.Option("--preset", help="uscyclegan: released or paper.", rich_help_panel=RUN)
    ] = "released",
    without: Annotated[
        list[str] | None, typer.Option("--without", help="uscyclegan: train without: perceptual.", rich_help_panel=RUN)
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", min=0.01, help="uscyclegan: training for each image.", rich_help_panel=RUN),
    ] = None,
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
    allow_unpinned: options.AllowUnpinned = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Measure models on a folder's own images: shrunken as in a paper, enlarged, compared, always beside bicubic.

    All models get the same low-resolution slices through the engines of `medsr upscale`. The table gives means
    over slices with bootstrap intervals and a paired test against bicubic that go by subject; volumes that came out
    worse than by bicubic are named. Masks are left out by their names. Exit 3: some images could not be measured.
    """
    from medsr_cli.tasks.evaluate import EvaluateRequest, output_files, write_outputs
    from medsr_cli.tasks.evaluate import evaluate as run
    from medsr_cli.tasks.evaluation_inputs import Choice
    from medsr_cli.tasks.model import ModelRequest
    from medsr_cli.tasks.request import known_preset
    from medsr_cli.tasks.self_training import SelfTraining, refuse_unknown_terms

    refuse_unknown_terms(without or [])
    files = output_files(output, report, table, page, data=folder, overwrite=overwrite)
    request = EvaluateRequest(
        choice=Choice(
            folder,
            tuple(include or ()),
            tuple(exclude or ()),
            tuple(subject or ()),
            tuple(target or ()),
            tuple(guide_name or ()),
            axis,
        ),
        models=model,
        weights=weights,
        scales=scales_of(scale),
        protocol=protocol,
        base=ModelRequest(
            modality=known_modality(modality),
            backend=known_backend(backend),
            device=device,
            precision=precision,
            tile=tile_side(tile),
            max_vram=device_bytes(max_vram),
            threads=threads,
            deterministic=deterministic,
            offline=offline,
            allow_unpinned=allow_unpinned,
            fit=fit,
        ),
        training=SelfTraining(known_preset(preset), "perceptual" not in (without or []), max_minutes, seed),
        slices=slices,
        shuffle_guides=shuffle_guides,
        segmentation=segmentation,
        fid=fid,
        seed=seed,
        command=discreet_command("medsr", sys.argv[1:]),
    )
    with Terminal(quiet=quiet, bar=not no_progress) as terminal:
        evaluation = run(request, terminal)
        write_outputs(evaluation, *files, overwrite=overwrite)
        for worse in evaluation.results.worse_than_baseline():
            terminal.warn(worse.sentence())
    show(evaluation, as_json=as_json)
    if evaluation.failed:
        for name, error in evaluation.failed:
            complain(f"{mention(name)}: {error.marked}")
        measured = len({row.volume for row in evaluation.results.rows})
        msg = f"{len(evaluation.failed)} of {len(evaluation.failed) + measured} images could not be measured."
        raise SomeInputsFailed(msg, "The figures are of the others.")


def scales_of(text: str | None) -> tuple[float, ...]:
    """`1.5,2,4` as numbers; none where nothing is asked for.

    Raises:
        ArgumentsError: something in it is no number.
    """
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        msg = f"--scale {mention(text)} is no list of numbers."
        raise ArgumentsError(msg, "Give a factor such as 4, or several with commas: 1.5,2,4.") from error


def show(evaluation: Evaluation, *, as_json: bool) -> None:
    """The result on stdout."""
    summaries = evaluation.results.summaries(evaluation.request.seed)
    if as_json:
        for record in evaluation.lines():
            # On stdout files have their names.
            print_json({key: unmarked(value) if isinstance(value, str) else value for key, value in record.items()})
        return
    rows = [_cells(summary) for summary in summaries]
    if not sys.stdout.isatty():
        # In a pipe: one line a figure, never wrapped, and no library to load for drawing.
        for row in (COLUMNS, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, title=f"protocol {evaluation.protocol}", title_justify="left")
    for column in COLUMNS:
        drawn.add_column(column, no_wrap=column in ("model", "mean"))
    last: Any = None
    for summary, row in zip(summaries, rows, strict=True):
        group = summary.scale, summary.metric
        if last is not None and group != last:
            drawn.add_section()
        last = group
        drawn.add_row(*row, style="bold" if summary.best else "")
    Console().print(drawn)


def _cells(summary: Summary) -> tuple[str, ...]:
    digits = 2 if summary.metric.startswith(("psnr", "fid")) else 4
    over, test = summary.over, summary.test
    slices = str(over.slices)
    return (
        "mean" if summary.scale is None else f"x{summary.scale:g}",
        unmarked(summary.model),
        summary.metric,
        f"{over.mean:.{digits}f}",
        f"{over.deviation:.{digits}f}",
        f"{over.interval.low:.{digits}f} to {over.interval.high:.{digits}f}" if over.interval else "",
        f"{slices} of {over.subjects}" if summary.metric != "fid" else f"{over.subjects} subjects",
        "" if summary.gain is None else f"{summary.gain:+.{digits}f}",
        "" if test is None else f"{test.better} of {test.pairs} {test.unit}s",
        "" if test is None or test.p is None else f"{test.p:.3g}",
    )
