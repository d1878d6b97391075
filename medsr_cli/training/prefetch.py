"""Batches made in the background, in order, so that neither the network nor the disk waits for the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

DEPTH = 4
"""Batches that may wait."""


class Prefetcher(Generic[Batch]):
    """Calls `make(first)`, `make(first + 1)`, ... in one thread and hands the results out in that order.

    What is made depends on the step alone, so that the same batches come with and without it.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, end: int) -> None:
        self._make, self._first, self._end = make, first, end
        self._queue: queue.Queue[tuple[int, Batch | BaseException]] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Prefetcher[Batch]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def get(self, step: int) -> Batch:
        """The batch of a step; steps are asked for one after the other. What making it raised is raised."""
        made, batch = self._queue.get()
        if isinstance(batch, BaseException):
            raise batch
        if made != step:
            msg = f"batch {made} came for step {step}"
            raise ValueError(msg)
        return batch

    def _work(self) -> None:
        for step in range(self._first, self._end):
            try:
                item: tuple[int, Batch | BaseException] = (step, self._make(step))
            except BaseException as error:
                item = (step, error)
            if not self._put(item) or isinstance(item[1], BaseException):
                return

    def _put(self, item: tuple[int, Batch | BaseException]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
