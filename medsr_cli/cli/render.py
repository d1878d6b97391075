"""What a person sees while a task runs: a bar on a terminal, plain lines in a job log, all of it on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from medsr_cli.cli.log import LOG
from medsr_cli.errors import mention, unmarked
from medsr_cli.tasks.discretion import discreet, discreet_facts

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_EVERY_S = 15.0
"""How often a job log is told about a long volume."""


class Terminal:
    """Draws a task's progress; a context manager so that the bar is always taken down."""

    def __init__(self, *, quiet: bool = False, bar: bool = True, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._wants_bar = bar and not quiet and sys.stderr.isatty()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._name = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> Terminal:
        if self._wants_bar:
            self._bar = make_bar()
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def item(self, name: str, number: int, of: int) -> None:
        """Begin a line or a bar for an input, told by its stand-in unless names are shown."""
        name = discreet(mention(unmarked(name)))
        self._name = name if of == 1 else f"[{number}/{of}] {name}"
        self._last_line = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(self._name, total=None)
        elif of > 1:
            self.say(self._name)

    def slices(self, done: int, total: int) -> None:
        """Move the bar, or write a line now and then."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=self._name)
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{self._name}: {done} of {total} slices")

    def training(self, done: int, limit: int, loss: float, left_s: float | None) -> None:
        """Loss and time left, on the bar or in a line now and then."""
        left = "" if left_s is None else f", at most {_minutes(left_s)} left"
        figures = f"iteration {done} of at most {limit}, loss {loss:.4f}{left}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=limit, description=f"{self._name}: loss {loss:.4f}")
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{self._name}: {figures}")

    def say(self, sentence: str) -> None:
        """A remark on stderr."""
        sentence = discreet(sentence)
        LOG.info("%s", sentence)
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        else:
            _on_stderr(sentence)

    def detail(self, sentence: str) -> None:
        """A remark on stderr with `-v`, in a log file always."""
        if self.verbose:
            self.say(sentence)
        else:
            LOG.info("%s", discreet(sentence))

    def warn(self, sentence: str) -> None:
        """A warning on stderr."""
        self.say(f"warning: {sentence}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def make_bar() -> Bar:
    """A Rich bar on stderr with slices done and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def print_json(facts: Mapping[str, Any]) -> None:
    """One JSON line on standard output: paths as they are, stand-ins in the sentences that mention any."""
    print(json.dumps(discreet_facts(facts), default=str), flush=True)


def print_path(path: Path) -> None:
    """A line on standard output; a name that its encoding lacks comes through as the bytes that it has on the disk."""
    try:
        print(path, flush=True)
    except UnicodeEncodeError:
        sys.stdout.buffer.write(os.fsencode(path) + os.fsencode(os.linesep))
        sys.stdout.flush()


def complain(sentence: str, about: Path | None = None) -> None:
    """What went wrong with one of several inputs, on stderr and in the log."""
    sentence = discreet(sentence, about)
    LOG.error("%s", sentence)
    _on_stderr(f"medsr: {sentence}")


def _on_stderr(sentence: str) -> None:
    """A line for whoever watches; that the disk of a job's log is full is no reason to stop the job."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(sentence, file=sys.stderr, flush=True)
