"""The queues: order is kept, errors arrive, nobody is left waiting."""

from __future__ import annotations

import threading
import time

import pytest

from medsr_cli.engines.pipeline import Behind, prefetched


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("medsr")}


def test_order_is_kept_and_memory_is_bounded():
    made: list[int] = []

    def source():
        for number in range(50):
            made.append(number)
            yield number

    with prefetched(source(), 3) as items:
        for expected, item in enumerate(items):
            assert item == expected
            assert len(made) <= expected + 6
    assert not threads()


def test_an_error_of_the_producer_arrives_after_what_came_before():
    def source():
        yield 1
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"), prefetched(source(), 2) as items:
        seen.extend(items)
    assert seen == [1]
    assert not threads()


def test_leaving_early_stops_the_producer():
    with prefetched(iter(int, 1), 2) as items:
        next(items)
    assert not threads()


def test_an_error_of_the_taker_comes_back_to_the_putter():
    def take(item: int) -> None:
        if item == 2:
            raise OSError("disk")

    behind: Behind[int] = Behind(take, 1)

    def put_many() -> None:
        for number in range(100):
            behind.put(number)
            time.sleep(0.001)

    with pytest.raises(OSError, match="disk"):
        put_many()
    behind.abandon()
    assert not threads()


def test_finish_waits_for_everything():
    taken: list[int] = []
    behind: Behind[int] = Behind(lambda item: (time.sleep(0.005), taken.append(item))[0], 2)
    for number in range(20):
        behind.put(number)
    behind.finish()
    assert taken == list(range(20))
    assert not threads()
