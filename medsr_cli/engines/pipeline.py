"""Decoding, running, finishing and writing at the same time, in threads that hand items on in order.

Between two threads lies a short queue, bounded in bytes as well as in items, so that memory depends neither on how
many items there are nor much on how large they are. The first error, wherever it happens, stops all threads and is the
one that is raised; no thread outlives the block, and what is still queued then is dropped.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

POLL_S = 0.1
"""How long a thread waits at once: where waiting for a lock cannot be interrupted, Ctrl-C is seen this much later."""


class Stopped(Exception):
    """The other end of a queue has gone, without an error."""


class _Ended(Exception):
    """Nothing more will come."""


class Queue(Generic[T]):
    """First in, first out, between two threads.

    Args:
        limit_bytes: what the waiting items may hold together; a single item may be larger.
        longest: how many items may wait.
    """

    def __init__(self, limit_bytes: int, longest: int) -> None:
        self._limit_bytes, self._longest = limit_bytes, longest
        self._waiting: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()

    def put(self, item: T, n_bytes: int) -> None:
        """Wait for room and add an item; raises what the queue was stopped with."""
        with self._changed:
            while self._error is None and self._is_full(n_bytes):
                self._changed.wait(POLL_S)
            if self._error is not None:
                raise self._error
            self._waiting.append((item, n_bytes))
            self._bytes += n_bytes
            self._changed.notify_all()

    def end(self) -> None:
        """Say that nothing more will be put."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Drop what waits and wake both ends, which raise `error`; only the first call counts."""
        with self._changed:
            self._error = self._error or error
            self._waiting.clear()
            self._changed.notify_all()

    def get(self) -> T:
        """Wait for the next item; raises what the queue was stopped with, or `_Ended` after the last one."""
        with self._changed:
            while self._error is None and not self._waiting:
                if self._ended:
                    raise _Ended
                self._changed.wait(POLL_S)
            if self._error is not None:
                raise self._error
            item, n_bytes = self._waiting.popleft()
            self._bytes -= n_bytes
            self._changed.notify_all()
            return item

    def _is_full(self, n_bytes: int) -> bool:
        if not self._waiting:
            return False
        return len(self._waiting) >= self._longest or self._bytes + n_bytes > self._limit_bytes


class Pipeline:
    """Threads around the one that made it: some make items ahead of it, others take what it hands on.

    To be used as a context. A block that ends without an error has to call `finish` first; otherwise what is still
    queued is dropped.
    """

    def __init__(self) -> None:
        self._behind: list[Behind[Any]] = []
        self._queues: list[Queue[Any]] = []
        self._threads: list[threading.Thread] = []
        self._first_error: BaseException | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(error or Stopped())
        _join_all(self._threads)
        first = self._first_error
        if first is not None and not isinstance(first, Stopped) and first is not error:
            raise first

    def ahead(self, name: str, items: Iterable[T], weigh: Callable[[T], int], queue: Queue[T]) -> Iterator[T]:
        """The items in order, made in a thread of their own.

        Args:
            name: what the thread does, in a word.
            items: made one after the other.
            weigh: the bytes that an item holds.
            queue: what lies between the thread and the caller.
        """

        def make() -> None:
            try:
                for item in items:
                    queue.put(item, weigh(item))
                    del item  # while the next one is made, this one must not be held
                queue.end()
            finally:
                # A reader that is stopped half-way closes its file here, not when someone collects garbage.
                if hasattr(items, "close"):
                    items.close()

        self._start(name, make, queue)
        return _until_the_end(queue)

    def behind(self, name: str, take: Callable[[T], None], queue: Queue[T]) -> Behind[T]:
        """A thread that takes the items which are put; those that others put into have to be made before these."""

        def work() -> None:
            for item in _until_the_end(queue):
                take(item)
                del item  # nor while the next one is waited for

        self._start(name, work, queue)
        stage = Behind(queue, self._threads[-1])
        self._behind.append(stage)
        return stage

    def finish(self) -> None:
        """Wait until everything that was put is taken; raises what went wrong, wherever."""
        # From the last one made, nearest to this thread, to those that it puts into.
        for stage in reversed(self._behind):
            stage.end_and_wait()
            if self._first_error is not None:
                raise self._first_error

    def _start(self, name: str, work: Callable[[], None], queue: Queue[T]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._stop(error)

        with self._lock:
            self._queues.append(queue)
            if self._first_error is not None:
                queue.stop(self._first_error)
        thread = threading.Thread(target=guarded, name=f"medsr-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._first_error = self._first_error or error
            for queue in self._queues:
                queue.stop(self._first_error)


class Behind(Generic[T]):
    """A thread that takes items, and the queue before it."""

    def __init__(self, queue: Queue[T], thread: threading.Thread) -> None:
        self._queue, self._thread = queue, thread

    def put(self, item: T, n_bytes: int) -> None:
        """Hand on one item that holds so many bytes; raises what has gone wrong anywhere in the meantime."""
        self._queue.put(item, n_bytes)

    def end_and_wait(self) -> None:
        """Put nothing more, and wait until all is taken or something went wrong."""
        self._queue.end()
        while self._thread.is_alive():
            self._thread.join(POLL_S)


def _until_the_end(queue: Queue[T]) -> Iterator[T]:
    # Nothing here may keep an item: the next one can be long in coming.
    with contextlib.suppress(_Ended):
        while True:
            yield queue.get()


def _join_all(threads: list[threading.Thread]) -> None:
    """Wait for threads that have been told to stop, each within an item; a second Ctrl-C waits for them, too."""
    interrupted: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join(POLL_S)
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
