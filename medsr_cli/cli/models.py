"""`medsr models`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.models import MethodFacts

COLUMNS = ("method", "scales", "checkpoint", "for", "here", "dB over bicubic")


def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, in detail.")] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """List methods, scales, checkpoints and licences, and what is on this machine."""
    from medsr_cli.tasks.models import describe_models

    facts = describe_models(name)
    if as_json:
        for method in facts:
            print_json(method.to_json())
        return
    _table(facts)
    if name is not None:
        for method in facts:
            _detail(method)


def _table(facts: list[MethodFacts]) -> None:
    rows = [row for method in facts for row in _rows(method)]
    if not sys.stdout.isatty():
        # In a pipe: one line a checkpoint, never wrapped, and no library to load for drawing.
        for row in (COLUMNS, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == "checkpoint")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _rows(method: MethodFacts) -> list[tuple[str, ...]]:
    if not method.learned:
        return [(method.id, "1 to 8", "none needed", "any image", "yes", "")]
    return [
        (
            method.id,
            ", ".join(f"{scale:g}" for scale in row["scales"]),
            row["id"],
            row["for"],
            row["state"],
            _gain(row["gain_db"]),
        )
        for row in method.checkpoints
    ] or [(method.id, ", ".join(f"{scale:g}" for scale in method.scales), "none", "", "", "")]


def _gain(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _detail(method: MethodFacts) -> None:
    typer.echo(f"\n{method.title}\n  paper: {method.paper}\n  licence of the code: {method.licence}")
    for name, parameters in method.parameters.items():
        typer.echo(f"  {name}: {parameters}")
    for row in method.checkpoints:
        typer.echo(f"\n  {row['id']}: {row['notes']}" if row["notes"] else f"\n  {row['id']}")
        typer.echo(f"    trained on: {row['trained_on']}")
        typer.echo(f"    degradation: {row['degradation']}")
        licence = row["licence"]
        typer.echo(f"    licences: code {licence['code']}; weights {licence['weights']}; data {licence['data']}")
        for score in row["validation"]:
            typer.echo(
                f"    {score['name']} {score['contrast']}: {score['psnr']:.2f} dB / {score['ssim']:.4f} "
                f"(bicubic {score['bicubic_psnr']:.2f} / {score['bicubic_ssim']:.4f})"
            )
