"""`medsr upscale`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json
from medsr_cli.errors import ArgumentsError, SomeInputsFailed

if TYPE_CHECKING:
    from medsr_cli.tasks.upscale import Item, UpscaleRequest


def upscale(
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="INPUT...", help="Images, DICOM folders or zips.")
    ] = None,
    more_inputs: Annotated[list[Path] | None, typer.Option("-i", "--input", help="The same as INPUT.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File, or folder for several inputs.")] = None,
    model: options.Model = "rdst",
    scale: options.Scale = 4,
    weights: options.Weights = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="mr, ct, us or xr; else read from the file.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="auto or torch.")] = "auto",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    tile: Annotated[str, typer.Option("-t", "--tile", help="auto, or the side of a tile in pixels.")] = "auto",
    threads: options.Threads = None,
    axis: options.Axis = "auto",
    series: Annotated[str | None, typer.Option("--series", help="SeriesInstanceUID, of a folder with several.")] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="Added to a result's name [_x4-rdst].")] = None,
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Walk folders for images.")] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Do only what is missing.")] = False,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Write a PNG: bicubic beside the result, three slices.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what would otherwise be a warning.")] = False,
    offline: options.Offline = False,
    allow_unpinned: Annotated[
        bool, typer.Option("--allow-unpinned", help="Use weights whose hash is not known.")
    ] = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    log_file: options.LogFile = None,
    debug: options.Debug = False,
) -> None:
    """Upscale images in plane; each result stands beside its input unless -o says where.

    The result keeps type, units, header and place: scan.nii.gz becomes scan_x4-rdst.nii.gz, a DICOM folder
    NAME becomes NAME_x4-rdst/, a new series of the same study. The paths of the results are printed.
    """
    from medsr_cli.tasks.model import ModelRequest
    from medsr_cli.tasks.upscale import UpscaleRequest
    from medsr_cli.tasks.upscale import upscale as run

    refuse_backend(backend)
    request = UpscaleRequest(
        inputs=(*(inputs or ()), *(more_inputs or ())),
        model=ModelRequest(
            model=model,
            scale=scale,
            weights=weights,
            modality=known_modality(modality),
            device=device,
            precision=precision,
            tile=tile_side(tile),
            threads=threads,
            offline=offline,
            allow_unpinned=allow_unpinned,
        ),
        output=output,
        suffix=suffix,
        axis=axis,
        series=series,
        recursive=recursive,
        skip_existing=skip_existing,
        overwrite=overwrite,
        strict=strict,
        report=report,
        preview=preview,
    )
    refuse_contradictions(request)
    with Terminal(quiet=quiet, bar=not no_progress) as terminal:
        items = []
        for item in run(request, terminal):
            show(item, as_json=as_json, verbose=verbose)
            items.append(item)
    conclude(items)


def show(item: Item, *, as_json: bool, verbose: bool) -> None:
    """One result on stdout; a failure's sentence on stderr."""
    if as_json:
        print_json(
            {
                "input": str(item.source),
                "output": str(item.output) if item.output else None,
                "status": item.status,
                "error": str(item.error) if item.error else None,
                "exit_code": item.error.exit_code if item.error else 0,
                "warnings": item.warnings,
                **({"report": item.report} if verbose else {}),
            }
        )
    elif item.error is None:
        print(item.output, flush=True)


def conclude(items: list[Item]) -> None:
    """End with the right exit code: that of the only input, or 3 with a list of what failed."""
    failed = [item for item in items if item.error is not None]
    if not failed:
        return
    if len(items) == 1:
        assert failed[0].error is not None  # noqa: S101 - it is in the list for that
        raise failed[0].error
    for item in failed:
        print(f"medsr: {item.source.name}: {item.error}", file=sys.stderr)
    msg = f"{len(failed)} of {len(items)} inputs failed; the others are done."
    raise SomeInputsFailed(msg, "The failures are listed above.")


def tile_side(text: str) -> int | None:
    """`auto` or a number of pixels."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        msg = f"--tile {text} is neither auto nor a number of pixels."
        raise ArgumentsError(msg) from error


def known_modality(name: str | None) -> str | None:
    """One of the four, or None."""
    if name is not None and name.lower() not in ("mr", "ct", "us", "xr"):
        msg = f"There is no modality called {name!r}."
        raise ArgumentsError(msg, "Give mr, ct, us or xr.")
    return name.lower() if name else None


def refuse_backend(name: str) -> None:
    """This version runs PyTorch."""
    if name not in ("auto", "torch"):
        msg = f"This version of medsr does not run the backend {name!r}."
        raise ArgumentsError(msg, "Use --backend auto or torch.")


def refuse_contradictions(request: UpscaleRequest) -> None:
    """Options that cannot both be meant."""
    if request.skip_existing and request.overwrite:
        msg = "--skip-existing and --overwrite contradict each other."
        raise ArgumentsError(msg, "Give one of them.")
