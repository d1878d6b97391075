"""`medsr compare`: figures on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json
from medsr_cli.errors import ArgumentsError, QualityGateFailed
from medsr_cli.tasks.discretion import discreet_command

if TYPE_CHECKING:
    from medsr_cli.tasks.compare import Comparison

MOST_LINES = 10
"""Flagged patches that are printed; the reports have all."""


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Image, DICOM folder or zip.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Image of the same place; its range is the peak.")],
    reference: Annotated[
        bool, typer.Option("--reference", help="B is the truth: find where A's structures are not those of B.")
    ] = False,
    scale: Annotated[
        float | None,
        typer.Option("-s", "--scale", help="Enlargement that made A, for --reference [4]: coarser structures count."),
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring B onto A's grid by their positions, where the grids differ.")
    ] = False,
    degradation: Annotated[
        str | None,
        typer.Option(
            "--degradation",
            help="How the finer image is shrunken: cubic, cubic-blur, bicubic-antialiased, band-limited [cubic].",
        ),
    ] = None,
    axis: options.Axis = "auto",
    series: Annotated[str | None, typer.Option("--series", help="SeriesInstanceUID of A, of several.")] = None,
    other_series: Annotated[str | None, typer.Option("--other-series", help="SeriesInstanceUID of B.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write comparison.json and comparison.html there."),
    ] = None,
    report: options.ReportFile = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write one page: slider, differences, histograms, headers.")
    ] = None,
    flagged_map: Annotated[
        Path | None, typer.Option("--map", help="With --reference: flagged share of each voxel, as NIfTI.")
    ] = None,
    difference_map: Annotated[
        Path | None, typer.Option("--difference", help="A less B as NIfTI, in the files' units.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 7 where more patches are flagged than --limit allows.")
    ] = False,
    limit: Annotated[
        float | None, typer.Option("--limit", min=0, max=1, help="Share of flagged patches for --strict [0.01].")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Hold image A against image B: metrics, differences in their units, headers, and where structures disagree.

    Both must lie on one grid. Where one is finer by a whole factor, it is shrunken to the other's grid, and that is
    said; other grids are refused unless --resample. With --reference, patches of A whose coarse structure is not that
    of B are listed with slice and position: there A may have invented, moved or lost something.
    """
    from medsr_cli.tasks.compare import FLAGGED_LIMIT, CompareRequest
    from medsr_cli.tasks.compare import compare as run
    from medsr_cli.tasks.compare_outputs import output_files, write_outputs

    if strict and not reference:
        msg = "--strict is about patches that differ from a reference."
        raise ArgumentsError(msg, "Add --reference if B is one.")
    if limit is not None and not strict:
        msg = "--limit is what --strict goes by."
        raise ArgumentsError(msg, "Add --strict.")
    request = CompareRequest(
        first,
        second,
        reference=reference,
        scale=scale,
        resample=resample,
        degradation=degradation,
        axis=axis,
        series=(series, other_series),
        flagged_map=flagged_map,
        difference_map=difference_map,
        overwrite=overwrite,
        command=discreet_command("medsr", sys.argv[1:]),
    )
    files = output_files(request, output, report, page)
    with Terminal(quiet=quiet, bar=not no_progress) as terminal:
        terminal.item(first.name, 1, 1)
        found = run(request, terminal)
        write_outputs(found, *files, overwrite=overwrite)
    _show(found, as_json=as_json)
    allowed = FLAGGED_LIMIT if limit is None else limit
    share = found.flagged_share
    if strict and share is None:
        msg = "No patch could be checked against the reference."
        raise QualityGateFailed(msg, "Compare slices of at least 16 pixels that show something.")
    if strict and share is not None and share > allowed:
        msg = f"{share:.2%} of the patches are flagged, more than the {allowed:.2%} allowed."
        raise QualityGateFailed(msg, "See the listed places; --limit sets another share.")


def _show(found: Comparison, *, as_json: bool) -> None:
    if as_json:
        print_json(found.report(names=True))
        return
    for name, value in found.figures().items():
        if value is not None:
            print(f"{name}\t{value:.6g}")
    if found.sums.in_one_alone:
        print(f"numbers in one image alone\t{found.sums.in_one_alone}")
    for one in found.headers:
        note = " (expected)" if one.expected else ""
        print(f"header {one.field}{note}\t{one.before}\t{one.after}")
    if found.request.reference:
        print(f"flagged patches\t{found.sums.flagged} of {found.sums.patches}")
        for box in sorted(found.flagged, key=lambda box: (box.crossing, box.slice))[:MOST_LINES]:
            place = "" if box.centre_mm is None else " at " + " ".join(f"{v:.1f}" for v in box.centre_mm) + " mm"
            print(f"flagged\t{box.place}{place}\t{box.what}")
