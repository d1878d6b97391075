"""Work ahead of its turn: in order, bounded, with errors in their place, and gone when it is not wanted."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsr_cli.tasks.ahead import Ahead, in_order


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.integers(0, 3), max_size=25),
    threads=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(1, 6)),
)
def test_it_is_map_however_long_each_takes(items, threads, window):
    def slow(item: int) -> int:
        time.sleep(item / 2000)
        return item * item

    assert list(in_order(slow, items, threads, window)) == [item * item for item in items]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_comes_in_its_place(threads):
    def divide(item: int) -> float:
        return 1 / item

    results = in_order(divide, [1, 2, 0, 4], threads)
    assert [next(results), next(results)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_is_begun_than_there_is_room_for():
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item) or item, range(100), 2, window=3)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 4
    results.close()


def test_threads_really_work_at_the_same_time():
    together = threading.Barrier(3)
    assert list(in_order(lambda item: together.wait(5) is not None, range(6), 3, window=6)) == [True] * 6


def test_without_threads_nothing_happens_before_it_is_asked_for():
    made: list[int] = []
    with Ahead(0) as ahead:
        promised = ahead.submit(lambda: made.append(1))
        assert not made
        promised.result()
    assert made == [1]


def test_the_end_of_the_block_does_not_wait_for_what_is_not_wanted():
    begun = time.monotonic()
    made: list[int] = []
    never = threading.Event()
    with Ahead(1) as ahead:
        ahead.submit(never.wait)
        waiting = ahead.submit(lambda: made.append(1))
        time.sleep(0.05)
    assert time.monotonic() - begun < 3
    never.set()
    assert waiting.is_made
    assert not made


def test_results_that_were_taken_are_not_held():
    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    most = 0
    for _ in in_order(lambda _: Big(), range(30), 2, window=3):
        most = max(most, Big.alive)
    assert most <= 6
