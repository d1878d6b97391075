"""The `medsr` command: its sub-commands, and the one place where errors become sentences and exit codes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from medsr_cli import __version__
from medsr_cli.cli import compare, demo, doctor, evaluate, export, finetune, inspect, models, upscale, weights
from medsr_cli.errors import MedsrError

LOG = logging.getLogger("medsr")
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
    debug = "--debug" in sys.argv
    keep_log()
    try:
        code = app(standalone_mode=False)
    except MedsrError as error:
        _explain(str(error), debug)
        code = error.exit_code
    except KeyboardInterrupt:
        _explain("Interrupted; nothing half-done was left behind.", debug)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: there is nobody to tell.
        with contextlib.suppress(OSError):
            sys.stdout.close()
        code = 1
    except Exception as error:
        code = _usage_or_crash(error, debug)
    sys.exit(code or 0)


def _usage_or_crash(error: Exception, debug: bool) -> int:
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    # Usage errors know how to show themselves; their class has moved between releases of typer.
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if isinstance(error, MemoryError):
        _explain("There is not enough memory. Use a smaller --tile, or close other programs.", debug)
        return 1
    _explain(
        f"Something went wrong inside medsr ({type(error).__name__}). Run it again with --debug for details.", debug
    )
    return 1


def keep_log() -> None:
    """With `--log-file FILE`, everything that is said goes there too, and tracebacks always."""
    path = next((after for word, after in itertools.pairwise(sys.argv) if word == "--log-file"), None)
    LOG.handlers.clear()
    LOG.propagate = False
    LOG.setLevel(logging.INFO)
    LOG.addHandler(logging.FileHandler(path, delay=True) if path else logging.NullHandler())
    for handler in LOG.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))


def _explain(sentence: str, debug: bool) -> None:
    LOG.error(sentence, exc_info=True)
    if debug:
        traceback.print_exc()
    typer.echo(f"medsr: {sentence}", err=True)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    # Raised in the main thread, so that every temporary file is removed on the way out.
    raise SystemExit(TERMINATED)
