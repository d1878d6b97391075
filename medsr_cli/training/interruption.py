"""Ctrl-C and a polite kill, taken at a moment when nothing is half-done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A stop that was asked for while nothing was being changed."""


class StopSwitch:
    """While entered, the first SIGINT or SIGTERM only sets `pressed`; a second one stops at once.

    Inside `at_once` the first one already raises. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._at_once = False
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
        again, self.pressed = self.pressed, True
        if self._at_once:
            raise Stopped
        if again:
            raise KeyboardInterrupt
