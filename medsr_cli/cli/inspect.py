"""`medsr inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.inspect import Inspected


def inspect(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, DICOM folders or zips.")],
    axis: options.Axis = "auto",
    series: Annotated[str | None, typer.Option("--series", help="SeriesInstanceUID, of a folder with several.")] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Show what is in an image: series, geometry, transfer syntax, and what can be done with it."""
    from medsr_cli.tasks.inspect import inspect_image

    first_error = None
    for path in inputs:
        found = inspect_image(path, axis, series)
        if as_json:
            print_json(found.to_json())
        else:
            _print(found)
        first_error = first_error or found.error
    if first_error is not None:
        raise first_error


def _print(found: Inspected) -> None:
    typer.echo(f"{found.path}")
    for name, value in found.facts.items():
        typer.echo(f"  {name:<20} {value}")
    for sentence in found.warnings:
        typer.echo(f"  warning              {sentence}")
    for name in found.usable:
        typer.echo(f"  can be done          {name}")
