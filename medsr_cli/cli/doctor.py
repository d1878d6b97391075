"""`medsr doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.doctor import Check

MARKS = {"ok": "ok   ", "note": "-    ", "fault": "FAULT"}


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the runs of every method and engine.")] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Find out what works here: versions, devices, codecs, the store, and every method through every engine.

    A tiny volume goes through each method by PyTorch and by ONNX Runtime on every device; the largest difference
    from PyTorch on the CPU is told. The first time takes a few minutes, for the ONNX files that it makes and keeps.
    Ends with 1 where something is broken; what is only absent, such as a GPU, is no fault.
    """
    from medsr_cli.tasks.doctor import examine

    faults, group = 0, ""
    with Terminal(quiet=quiet, bar=not no_progress) as terminal:
        for check in examine(terminal, quick=quick, threads=threads):
            faults += check.state == "fault"
            if as_json:
                print_json(asdict(check))
                continue
            if check.group != group:
                group = check.group
                print(group, flush=True)
            show(check)
    if faults:
        raise typer.Exit(1)


def show(check: Check) -> None:
    """A line for what was found, and one for what to do."""
    print(f"  {MARKS[check.state]} {check.name}: {check.found}", flush=True)
    if check.remedy:
        print(f"        {check.remedy}", flush=True)
