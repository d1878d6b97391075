"""`medsr models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.models import MethodFacts


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
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("method", "scales", "checkpoint", "for", "here", "dB over bicubic"):
        table.add_column(column, overflow="fold")
    for method in facts:
        rows: list[dict[str, Any]] = method.checkpoints or [{}]
        for i, row in enumerate(rows):
            table.add_row(
                method.id if i == 0 else "",
                ", ".join(f"{s:g}" for s in row.get("scales", method.scales)),
                row.get("id", "computed, no weights" if not method.learned else "none"),
                row.get("for", "any image" if not method.learned else ""),
                row.get("state", "yes" if not method.learned else ""),
                _gain(row.get("gain_db")),
            )
    Console().print(table)


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
