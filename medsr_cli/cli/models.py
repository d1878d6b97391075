"""`medsr models`."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.models import MethodFacts

COLUMNS = ("method", "scales", "checkpoint", "for", "here", "dB over bicubic")
WIDTH = 96


def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, in detail.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="RxC", help="With NAME: count operations for a slice of this size.")
    ] = None,
    as_json: options.AsJson = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """List methods, scales, checkpoints and licences, and what is on this machine."""
    from medsr_cli.tasks.models import describe_models, parse_size

    facts = describe_models(name, parse_size(size))
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
    if method.kind == "baseline":
        return [(method.id, "1 to 8", "none needed", "any image", "yes", "")]
    if "training on the image" in method.needs:
        return [(method.id, _scales(method.scales, None), "none: trains on the image", "ultrasound", "yes", "")]
    return [
        (
            method.id,
            _scales(row["scales"], row["scale_range"]),
            row["id"],
            row["for"],
            row["state"],
            "" if row["gain_db"] is None else f"{row['gain_db']:+.2f}",
        )
        for row in method.checkpoints
    ] or [(method.id, _scales(method.scales, method.scale_range), "none", "", "", "")]


def _scales(scales: Any, bounds: Any) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g}" if bounds else ", ".join(f"{scale:g}" for scale in scales)


def _detail(method: MethodFacts) -> None:
    typer.echo(f"\n{method.title}")
    _field("paper", method.paper)
    if method.summary:
        typer.echo("  what it computes:")
        summary = " ".join(method.summary.split())
        typer.echo(textwrap.fill(summary, WIDTH, initial_indent="    ", subsequent_indent="    "))
    if method.kind == "network":
        _field("scales", _scales(method.scales, method.scale_range) + _per_axis(method))
        _field("channels", ", ".join(map(str, method.channels)))
        _field("needs", ", ".join(method.needs) or "the image alone")
        _field("sizes", _sizes(method))
        _field("tiles", method.tiling)
        _field("precision", ", ".join(method.precision))
        _field("degradation it undoes", method.degradation)
    for variant, count in method.parameters.items():
        _field(variant, f"{count:,} parameters")
    for row in method.cost:
        typer.echo(
            f"  {row['variant']} x{row['scale']} on {row['rows']}x{row['columns']}: "
            f"{row['parameters']:,} parameters, {row['gmacs']:.2f} G multiply-accumulates, {row['gflops']:.2f} GFLOPs"
        )
    _field("licence of the code", method.licence)
    if method.authors:
        _field("of the authors", method.authors)
    for claim in method.claims:
        _field("claim", claim)
    if method.warning:
        _field("warning", method.warning)
    for row in method.checkpoints:
        _checkpoint(row)


def _per_axis(method: MethodFacts) -> str:
    return ", also different for rows and columns" if method.scale_range else ""


def _sizes(method: MethodFacts) -> str:
    smallest = f"sides of {method.smallest} and more; shorter ones are padded" if method.smallest > 1 else "any"
    padded = f"; padded inside to multiples of {method.size_multiple}" if method.size_multiple > 1 else ""
    return smallest + padded


def _field(name: str, text: str) -> None:
    typer.echo(textwrap.fill(f"{name}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    "))


def _checkpoint(row: dict[str, Any]) -> None:
    typer.echo(f"\n  {row['id']} ({row['state']})")
    if row["notes"]:
        typer.echo(textwrap.fill(row["notes"], WIDTH, initial_indent="    ", subsequent_indent="    "))
    typer.echo(
        textwrap.fill(f"trained on: {row['trained_on']}", WIDTH, initial_indent="    ", subsequent_indent="    ")
    )
    typer.echo(f"    degradation: {row['degradation']}")
    licence = row["licence"]
    typer.echo(f"    licences: code {licence['code']}; weights {licence['weights']}; data {licence['data']}")
    for score in row["validation"]:
        typer.echo(
            f"    {score['name']} {score['contrast']}: {score['psnr']:.2f} dB / {score['ssim']:.4f} "
            f"(bicubic {score['bicubic_psnr']:.2f} / {score['bicubic_ssim']:.4f})"
        )
