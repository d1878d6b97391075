"""When a training stops: Ctrl-C and a polite kill, taken at a moment when nothing is half-done, and the time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A stop that was asked for while nothing was being changed."""


class StopSwitch:
    """While entered, the first SIGINT or SIGTERM only sets `pressed`; the same one again stops at once.

    One after the other is no second wish: a launcher that is interrupted ends its processes. Inside `at_once` the
    first one already raises. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._at_once = False
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSwitch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that may be dropped at any point.

        Raises:
            Stopped: the switch was or is pressed.
        """
        self._at_once = True
        try:
            if self.pressed:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        again, self.pressed = number in self._seen, True
        self._seen.add(number)
        if self._at_once:
            raise Stopped
        if again:
            raise KeyboardInterrupt


class Clock:
    """Time since the first start of a run, and since its state was saved.

    Args:
        seconds_before: spent on the run before.
        until_seconds: of the run, after which it is over.
    """

    def __init__(self, seconds_before: float, until_seconds: float) -> None:
        self._started = time.monotonic() - seconds_before
        self._until = until_seconds
        self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on the run, over all its starts."""
        return time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.seconds >= self._until

    @property
    def since_save(self) -> float:
        """Seconds since `saved` was called, or since the start."""
        return time.monotonic() - self._saved

    def saved(self) -> None:
        """The state is on the disk."""
        self._saved = time.monotonic()
