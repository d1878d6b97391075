"""`medsr module`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json


def module(
    input_folder: Annotated[
        Path | None,
        typer.Option("-i", "--in", "--input", metavar="DIR", help="DICOM files, flat [MERCURE_IN_DIR]."),
    ] = None,
    output_folder: Annotated[
        Path | None,
        typer.Option("-o", "--out", "--output", metavar="DIR", help="Where results go, flat [MERCURE_OUT_DIR]."),
    ] = None,
    task: Annotated[
        Path | None, typer.Option("--task", metavar="FILE", help="Task file, instead of DIR/task.json.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting; counts more than that of the task file."),
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            "--name", envvar="MEDSR_MODULE_NAME", help="The module's name in the hub, where a task has several steps."
        ),
    ] = "medsr",
    offline: options.Offline = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Run as the processing container of a routing hub (mercure and others): folders in, folders out.

    Every suitable series of the input becomes a derived series; files, named SERIES_UID#FILE_UID.dcm, and then
    result.json appear in the output folder when all of it is done. The path of result.json is printed.
    """
    from medsr_cli.tasks.module import RESULT, ModuleOrder, module_folders, run_module
    from medsr_cli.tasks.module_settings import setting_of_text

    source, target = module_folders(input_folder, output_folder, dict(os.environ))
    overrides = dict(setting_of_text(text) for text in settings or ())
    order = ModuleOrder(source, target, task, name, overrides, offline)
    with Terminal(quiet=quiet, bar=False, verbose=verbose) as terminal:
        outcome = run_module(order, terminal)
        terminal.say(outcome.notification)
    if as_json:
        print_json(outcome.to_json())
    else:
        print(target / RESULT, flush=True)
