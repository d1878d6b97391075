"""The files that a comparison leaves: report and page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.evaluation.results import json_text
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.tasks.evaluation_outputs import refuse_outputs

if TYPE_CHECKING:
    from medsr_cli.tasks.compare import CompareRequest, Comparison

REPORT, PAGE = "comparison.json", "comparison.html"
"""Names in a folder of results."""


def output_files(
    request: CompareRequest, folder: Path | None, report: Path | None, page: Path | None
) -> tuple[Path | None, Path | None]:
    """Where report and page go: as named, else into the folder, else nowhere.

    Raises:
        ArgumentsError: the folder is a file, two results have one name, one is an input, or something that must not
            be replaced is there.
    """
    if folder is not None:
        if folder.is_file():
            msg = f"-o {mention(folder)} is a file."
            raise ArgumentsError(msg, "Name a folder, or use --report and --html for single files.")
        report, page = report or folder / REPORT, page or folder / PAGE
    refuse_outputs(
        {"--report": report, "--html": page},
        (request.first, request.second),
        maps={"--map": request.flagged_map, "--difference": request.difference_map},
        overwrite=request.overwrite,
    )
    return report, page


def write_outputs(comparison: Comparison, report: Path | None, page: Path | None, *, overwrite: bool) -> None:
    """The JSON report and the HTML page, each whole or not at all.

    Raises:
        ArgumentsError: one exists and may not be replaced.
        RunError: it cannot be written.
    """
    if report is not None:
        with atomic_file(report, overwrite=overwrite) as file:
            file.write(json_text(comparison.report()).encode())
    if page is not None:
        from medsr_cli.evaluation.page import page_html
        from medsr_cli.tasks.compare_page import page_of

        with atomic_file(page, overwrite=overwrite) as file:
            file.write(page_html(page_of(comparison)).encode())
