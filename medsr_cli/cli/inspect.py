"""`medsr inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import print_json
from medsr_cli.errors import unmarked

if TYPE_CHECKING:
    from medsr_cli.tasks.inspect import Inspected, InspectedStack


def inspect(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, DICOM folders or zips.")],
    axis: options.Axis = "auto",
    series: Annotated[
        str | None, typer.Option("--series", help="Number, SeriesInstanceUID or a part of it; 2#1 for one stack.")
    ] = None,
    as_json: options.AsJson = False,
    log_paths: options.LogPaths = False,
    log_file: options.LogFile = None,
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
    if len(found.stacks) > 1:
        for stack in found.stacks:
            _print_stack(stack)
    for name, value in found.facts.items():
        typer.echo(f"  {name:<20} {value}")
    for sentence in found.warnings:
        typer.echo(f"  warning              {unmarked(sentence)}")
    for name in found.usable:
        typer.echo(f"  can be done          {name}")


def _print_stack(stack: InspectedStack) -> None:
    """A line of figures, one that says what becomes of it, and one for each warning."""
    facts = stack.facts
    parts = [
        f"{facts['images']} image(s) of {facts['rows x columns']}",
        facts["modality"],
        f"pixels {facts['pixel spacing']}" if "pixel spacing" in facts else "",
        f"slices {facts['slice spacing']}" if "slice spacing" in facts else "",
        facts["transfer_syntax"],
    ]
    typer.echo(f"  --series {stack.selector:<11} {', '.join(part for part in parts if part)}")
    typer.echo(f"{'':23}SeriesInstanceUID {stack.uid or '(none)'}")
    if stack.reason is None:
        says = "would be upscaled" if stack.upscaled else "is left"
    elif stack.upscaled:
        says = f"would be upscaled, for it was named: {stack.reason}"
    else:
        says = f"is left: it {unmarked(stack.reason)}"
    typer.echo(f"{'':23}{says}")
    for sentence in stack.warnings:
        typer.echo(f"{'':23}warning: {unmarked(sentence)}")
