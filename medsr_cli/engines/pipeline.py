"""Decoding, running and writing at the same time, through short queues, in order.

An error anywhere stops everything: the producer is told to stop, the consumer's error is raised where the
next item is handed to it, and no thread outlives the block.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_S = 0.1


class _End:
    """Marks the end of a queue, with the error that caused it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@contextlib.contextmanager
def prefetched(items: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Yield the items in order while the next `depth` of them are made in another thread."""
    ahead: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                if not _put(ahead, item, stop):
                    return
        except BaseException as error:
            _put(ahead, _End(error), stop)
        else:
            _put(ahead, _End(), stop)

    def consume() -> Iterator[T]:
        while True:
            item = ahead.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item

    thread = threading.Thread(target=produce, name="medsr-decode", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()


class Behind(Generic[T]):
    """Hands items to `take` in another thread, at most `depth` behind; errors come back on the next call."""

    def __init__(self, take: Callable[[T], None], depth: int) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._take = take
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="medsr-write", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Queue one item; raises what an earlier one raised."""
        if not _put(self._queue, item, self._failed):
            self._raise()

    def finish(self) -> None:
        """Wait until everything is taken; raises what went wrong."""
        _put(self._queue, _End(), self._failed)
        self._thread.join()
        self._raise()

    def abandon(self) -> None:
        """Stop without taking what is still queued."""
        self._failed.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(_End())
        self._thread.join()

    def _work(self) -> None:
        while not self._failed.is_set():
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                return
            try:
                self._take(item)
            except BaseException as error:
                self._error = error
                self._failed.set()
                return

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _put(target: queue.Queue[T | _End], item: T | _End, stop: threading.Event) -> bool:
    """Put an item unless told to stop; returns whether it was put."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            target.put(item, timeout=POLL_S)
            return True
    return False
