"""What leaves medsr beside its results: the log file, and nothing of what libraries say by themselves.

Libraries quote tags and paths in warnings, in their logs, and in C++ straight to the terminal. None of that is for a
log that others read: with `--log-paths` it is let through, without it is held back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

STDERR = 2


class OwnLog(logging.Logger):
    """medsr's own log, which speaks where those of libraries are held back."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name that logging has
        """Whether a record of this level is kept; `logging.disable` is for the others."""
        return level >= self.getEffectiveLevel()


LOG = OwnLog("medsr", logging.INFO)
"""Goes to the file of `--log-file` and nowhere else; what is said to it has to be discreet already."""
LOG.addHandler(logging.NullHandler())


def keep_log(path: Path | None) -> None:
    """Write everything that is said to a file too, or to none."""
    for handler in tuple(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, delay=True, encoding="utf-8") if path else logging.NullHandler()
    # A full disk or a folder that is not there is no reason to stop, nor to print a traceback for each line.
    handler.handleError = _ignored  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(_Forgiving(handler) if path else handler)


class _Forgiving(logging.Handler):
    """Passes on to a handler whose file may turn out not to be writable."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; a file that cannot be opened is left alone."""
        with contextlib.suppress(OSError):
            self._handler.handle(record)

    def close(self) -> None:
        """Close the file, whatever became of its last lines."""
        with contextlib.suppress(OSError):
            self._handler.close()
        super().close()


def _ignored(record: logging.LogRecord) -> None:
    """What a handler does about a line that it cannot write: nothing."""


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """The value behind `option` or joined to it by `=`, from a command line that is not parsed yet."""
    for number, word in enumerate(arguments):
        if word == "--":
            break
        if word == option and number + 1 < len(arguments):
            return arguments[number + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Whether a flag stands on a command line that is not parsed yet."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return option in before


@contextlib.contextmanager
def libraries_held_back() -> Iterator[None]:
    """Neither warnings nor logs of libraries, nor what falls out of threads and destructors, while this is open."""
    shown, disabled = warnings.showwarning, logging.root.manager.disable
    hooks = threading.excepthook, sys.unraisablehook
    warnings.showwarning = _no_warning
    logging.disable(logging.CRITICAL)
    threading.excepthook, sys.unraisablehook = _no_hook, _no_hook
    try:
        yield
    finally:
        warnings.showwarning = shown
        logging.disable(disabled)
        threading.excepthook, sys.unraisablehook = hooks


def _no_warning(*_: Any, **__: Any) -> None:
    """A warning of a library may quote a tag."""


def _no_hook(_: Any) -> None:
    """So may an exception that nobody catches."""


def own_stderr() -> None:
    """Keep the terminal to medsr alone: what C++ writes to the process's error output goes nowhere.

    `sys.stderr` goes on where it went. Child processes inherit the silence. For the `medsr` program itself, once.
    """
    try:
        if sys.stderr.fileno() != STDERR:
            return
        sys.stderr.flush()
        kept = os.dup(STDERR)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STDERR)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        return  # no error output at all: there is nothing to keep apart
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    sys.excepthook = _last_words


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(f"medsr: something went wrong while it ended ({kind.__name__}).", file=sys.stderr)
