"""The `medsr` command: its sub-commands, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from medsr_cli import __version__
from medsr_cli.cli import compare, demo, doctor, evaluate, export, finetune, inspect, models, module, upscale, weights
from medsr_cli.cli.log import LOG, has_option, keep_log, libraries_held_back, option_value
from medsr_cli.errors import MedsrError
from medsr_cli.tasks.discretion import begin, discreet, discreet_traceback, discreet_usage

INTERRUPTED = 130
TERMINATED = 143

HELP = """Super-resolution for medical images: DICOM, NIfTI, NRRD, MetaImage, MGZ, PNG, JPEG and TIFF, in the
right place and in the right units.

Research use; not a medical device. In-plane only: slices are not made thinner.
"""

EPILOG = (
    "Exit codes: 0 done · 1 run error · 2 arguments · 3 some inputs of a batch failed · 4 device not there · "
    "5 weights missing or failing their checksum · 6 input refused · 7 quality gate failed."
)

app = typer.Typer(
    name="medsr",
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    # Local variables hold pixels and tags: they are never shown, not even in a crash.
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("upscale", short_help="Upscale images in plane: the main job.")(upscale.upscale)
app.command("finetune", short_help="Train or fine-tune on a local folder.")(finetune.finetune)
app.command("evaluate", short_help="Measure models on a local folder, beside bicubic.")(evaluate.evaluate)
app.command("compare", short_help="Hold one image against another.")(compare.compare)
app.command("export", short_help="Write a network as one ONNX file.")(export.export)
app.command("inspect", short_help="Show what is in an image.")(inspect.inspect)
app.command("models", short_help="List methods, checkpoints, figures and licences.")(models.models)
app.add_typer(weights.app, name="weights", short_help="List, fetch, verify, convert, send and carry checkpoints.")
app.command("doctor", short_help="Find out what works here, and what to do about what does not.")(doctor.doctor)
app.command("module", short_help="Run as the processing container of a routing hub.")(module.module)
app.command("demo", short_help="Make a first picture; needs no data or network.")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medsr {__version__}")
        raise typer.Exit


@app.callback()
def medsr(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Nothing but `--version` stands before a command."""


def run() -> NoReturn:
    """Parse the arguments, run the command, end the process."""
    signal.signal(signal.SIGTERM, _stop)
    arguments = sys.argv[1:]
    debug, shown = has_option(arguments, "--debug"), has_option(arguments, "--log-paths")
    begin(arguments, shown=shown, words=_option_names)
    path = option_value(arguments, "--log-file")
    keep_log(Path(path) if path else None)
    with contextlib.nullcontext() if shown else libraries_held_back():
        code = _ended(debug)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        # The disk that keeps what was said is full: that is not the work's fault, nor its exit code.
        sys.stderr = io.StringIO()
    sys.exit(code)


def _ended(debug: bool) -> int:
    """Run the command; the exit code that it ends with."""
    try:
        return int(app(standalone_mode=False) or 0)
    except MedsrError as error:
        _explain(error.marked, error, debug)
        return error.exit_code
    except KeyboardInterrupt as error:
        _explain("Interrupted; nothing half-done was left behind.", error, debug)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: there is nobody to tell, nor is there at the flush before the end.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()
        return 1
    except Exception as error:
        return _usage_or_crash(error, debug)


def _usage_or_crash(error: Exception, debug: bool) -> int:
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    # Usage errors know how to show themselves; their class has moved between releases of typer.
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        shown = io.StringIO()
        error.show(file=shown)
        # The first lines say how the command is called; what is wrong follows, and quotes what was given.
        usage, found, wrong = shown.getvalue().partition("Error: ")
        typer.echo(usage + found + discreet_usage(wrong) if found else discreet_usage(usage), err=True, nl=False)
        LOG.error(discreet_usage(wrong or usage).strip())
        return int(error.exit_code)
    if isinstance(error, MemoryError):
        _explain("There is not enough memory. Use a smaller --tile, or close other programs.", error, debug)
        return 1
    _explain(
        f"Something went wrong inside medsr ({type(error).__name__}). Run it again with --debug for details.",
        error,
        debug,
    )
    return 1


def _explain(sentence: str, error: BaseException, debug: bool) -> None:
    """One sentence on stderr, with frames before it where they are asked for; in the log file both."""
    sentence, trace = discreet(sentence), discreet_traceback(error)
    LOG.error("%s\n%s", sentence, trace.rstrip())
    if debug:
        typer.echo(trace, err=True, nl=False)
    typer.echo(f"medsr: {sentence}", err=True)


def _option_names() -> set[str]:
    """Names of commands and options: what a command line may hold that says nothing of an image."""
    found: set[str] = set()
    waiting: list[Any] = [typer.main.get_command(app)]
    while waiting:
        command = waiting.pop()
        for name, inner in getattr(command, "commands", {}).items():
            found.add(name)
            waiting.append(inner)
        for parameter in command.params:
            found |= {*getattr(parameter, "opts", ()), *getattr(parameter, "secondary_opts", ())}
    return found | {"--help", "-h"}


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    # Raised in the main thread, so that every temporary file is removed on the way out.
    raise SystemExit(TERMINATED)
