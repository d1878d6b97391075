"""`medsr demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")] = Path("medsr-demo.png"),
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Make a first picture: three real brain slices, shrunken four times and brought back.

    Needs no data, network or GPU. Left to right: bicubic, RDST-E, the original.
    """
    from medsr_cli.tasks.demo import run_demo

    with Terminal(quiet=quiet) as terminal:
        result = run_demo(output, terminal, overwrite=overwrite, threads=threads)
    if as_json:
        print_json(result.to_json())
    else:
        terminal.say(
            f"RDST-E {result.psnr_db:.2f} dB, bicubic {result.bicubic_psnr_db:.2f} dB "
            f"against the original ({result.slices} slices of a subject that was not trained on)."
        )
        typer.echo(str(output))
