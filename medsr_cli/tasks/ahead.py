"""Work done ahead of the one who needs it, by a few threads, handed on in order.

What is asked for in order comes back in order; an error comes back in its place, when its result is asked for. Only so
many results wait as there is room for. The threads are daemons: a Ctrl-C does not have to wait for a file that is
just being read.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.1
"""Where waiting for a lock cannot be interrupted, Ctrl-C is seen this much later."""
PATIENCE_S = 1.0
"""How long the end waits for threads that are in the middle of something."""


class Promised(Generic[R]):
    """A result that a thread is making, or that is made when it is asked for."""

    def __init__(self, make: Callable[[], R]) -> None:
        self._make: Callable[[], R] | None = make
        self._result: list[R] = []
        self._error: BaseException | None = None
        self._begun = threading.Lock()
        self._made = threading.Event()

    def work(self) -> None:
        """Make it, unless someone has begun to."""
        if self._begun.acquire(blocking=False):
            self._do()

    def result(self) -> R:
        """The result, which is handed over: once; made here if no thread has begun with it.

        Raises:
            Exception: whatever making it raised.
        """
        self.work()
        while not self._made.wait(POLL_S):
            pass
        if self._error is not None:
            raise self._error
        return self._result.pop()

    @property
    def is_made(self) -> bool:
        """Whether the result, or the error, is there."""
        return self._made.is_set()

    def cancel(self) -> None:
        """Nobody will ask for it."""
        if self._begun.acquire(blocking=False):
            self._make = None
            self._made.set()

    def _do(self) -> None:
        make, self._make = self._make, None
        try:
            assert make is not None  # noqa: S101 - only who has begun gets here, once
            self._result.append(make())
        except BaseException as error:
            self._error = error  # raised where the result is asked for
        finally:
            self._made.set()


class Ahead:
    """Threads that work ahead; to be used as a context.

    Args:
        threads: how many; with 0 everything is made when it is asked for.
        name: what they do, in a word.
    """

    def __init__(self, threads: int, name: str = "ahead") -> None:
        self._waiting: queue.SimpleQueue[Promised[Any] | None] = queue.SimpleQueue()
        self._promised: list[Promised[Any]] = []
        self._threads = [
            threading.Thread(target=self._work, name=f"medsr {name} {number}", daemon=True) for number in range(threads)
        ]
        self._ended = False

    def __enter__(self) -> Ahead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        for promised in self._promised:
            promised.cancel()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(PATIENCE_S / len(self._threads))

    @property
    def room(self) -> int:
        """How many results may wait so that no thread is idle: one for each thread and the next one."""
        return len(self._threads) + 1

    def submit(self, make: Callable[[], R]) -> Promised[R]:
        """Have something made by the next thread that is free."""
        promised = Promised(make)
        if self._threads:
            self._promised = [old for old in self._promised if not old.is_made]
            self._promised.append(promised)
            self._waiting.put(promised)
        return promised

    def _work(self) -> None:
        while not self._ended and (promised := self._waiting.get()) is not None:
            promised.work()
            del promised  # while the next one is waited for, this result must not be held


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, window: int | None = None) -> Iterator[R]:
    """`map` in threads: results in the order of the items, at most `window` items begun and not yet taken.

    Args:
        function: called in several threads at once.
        items: asked for in the caller's thread.
        threads: how many; 0 is `map`.
        window: bounds what is held: this many results at most; None takes one more than there are threads.

    Raises:
        Exception: what `function` raised for an item, in that item's place.
    """
    with Ahead(threads) as ahead:
        room = ahead.room if window is None else max(window, 1)
        pending: list[Promised[R]] = []
        for item in items:
            pending.append(ahead.submit(functools.partial(function, item)))
            if len(pending) >= room:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
