"""The queues: order is kept, bounds hold, the first error stops everything, nobody is left waiting."""

from __future__ import annotations

import _thread
import threading
import time
import weakref

import pytest

from medsr_cli.engines.pipeline import Pipeline, Queue


@pytest.fixture(autouse=True)
def _others():
    """Threads that earlier tests have left behind are none of these."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


OTHERS: set[threading.Thread] = set()


def threads() -> set[str]:
    return {t.name for t in set(threading.enumerate()) - OTHERS if t.name.startswith("medsr")}


def queue(longest: int = 2, limit_bytes: int = 1 << 30) -> Queue:
    return Queue(limit_bytes, longest)


def one(_: object) -> int:
    return 1


def through(items, change, take, longest=2):
    """The four stages of a run: made ahead, changed here, passed on by a thread, taken by another."""
    with Pipeline() as pipeline:
        last = pipeline.behind("write", take, queue(longest))
        middle = pipeline.behind("finish", lambda item: last.put(item, 1), queue(longest))
        for item in pipeline.ahead("decode", items, one, queue(longest)):
            middle.put(change(item), 1)
        pipeline.finish()


def test_everything_arrives_in_order():
    taken: list[int] = []
    through(range(200), lambda n: n * n, taken.append)
    assert taken == [n * n for n in range(200)]
    assert not threads()


def test_the_stages_work_at_the_same_time():
    """Four stages that each wait 4 ms for 40 items: one after the other that would be 0.64 s."""

    def source():
        for number in range(40):
            time.sleep(0.004)
            yield number

    def pause(number: int) -> int:
        time.sleep(0.004)
        return number

    started = time.perf_counter()
    through(source(), pause, pause)
    assert time.perf_counter() - started < 0.4


def test_no_more_items_are_made_than_the_queue_holds():
    made: list[int] = []

    def source():
        for number in range(50):
            made.append(number)
            yield number

    with Pipeline() as pipeline:
        for expected, item in enumerate(pipeline.ahead("decode", source(), one, queue(3))):
            assert item == expected
            time.sleep(0.001)
            # One here, three in the queue, one in the hands of the thread.
            assert len(made) <= expected + 5
        pipeline.finish()
    assert not threads()


@pytest.mark.parametrize(("limit_bytes", "waiting"), [(100, 3), (99, 3), (98, 2), (10, 1)])
def test_bytes_bound_a_queue(limit_bytes, waiting):
    """Of items of 33 bytes as many wait as fit, and always one."""
    bounded = queue(10, limit_bytes)
    put: list[int] = []
    thread = threading.Thread(target=lambda: [(bounded.put(n, 33), put.append(n)) for n in range(6)], daemon=True)
    thread.start()
    time.sleep(0.1)
    assert len(put) == waiting
    assert [bounded.get() for _ in range(6)] == list(range(6))
    thread.join()


def test_what_was_handed_on_is_not_held():
    """A batch can be as large as everything else together: no thread may keep the last one while it waits."""

    class Batch:
        pass

    alive: list[weakref.ref] = []
    go_on = threading.Event()

    def source():
        for _ in range(3):
            batch = Batch()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
        go_on.wait(5)

    with Pipeline() as pipeline:
        behind = pipeline.behind("write", lambda batch: None, queue())
        batches = pipeline.ahead("decode", source(), one, queue())
        for _ in range(3):
            behind.put(next(batches), 1)
        time.sleep(0.1)
        assert [ref() for ref in alive] == [None] * 3
        go_on.set()
        pipeline.finish()


def failing(at: int, message: str):
    def work(number: int) -> int:
        if number == at:
            raise OSError(message)
        return number

    return work


def test_an_error_of_the_reader_is_raised():
    def source():
        yield from range(5)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        through(source(), lambda n: n, lambda n: None)
    assert not threads()


@pytest.mark.parametrize("count", [3, 4, 200])
def test_an_error_of_the_engine_is_raised(count):
    with pytest.raises(OSError, match="engine"):
        through(range(count), failing(2, "engine"), lambda n: None)
    assert not threads()


@pytest.mark.parametrize("at", [0, 2, 49])
def test_an_error_of_the_last_stage_reaches_the_caller(at):
    """Also when it happens while the caller already waits for the end."""
    with pytest.raises(OSError, match="disk"):
        through(range(50), lambda n: n, failing(at, "disk"))
    assert not threads()


def test_an_endless_reader_is_stopped_by_an_error_of_a_writer():
    with pytest.raises(OSError, match="disk"):
        through(iter(int, 1), lambda n: n, failing(0, "disk"))
    assert not threads()


def test_the_first_error_is_the_one_that_is_raised():
    """The engine fails because of what the writer's failure did, or by chance just after it."""
    writer_failed = threading.Event()

    def take(number: int) -> None:
        writer_failed.set()
        raise OSError("disk")

    def change(number: int) -> int:
        if number == 1:
            writer_failed.wait(5)
            time.sleep(0.05)
            raise ValueError("engine")
        return number

    with pytest.raises(OSError, match="disk"):
        through(range(50), change, take)
    assert not threads()


def test_nothing_is_taken_after_an_error():
    taken: list[int] = []

    def take(number: int) -> None:
        time.sleep(0.005)
        taken.append(number)

    with pytest.raises(OSError, match="engine"):
        through(range(50), failing(6, "engine"), take, longest=50)
    at_the_end = list(taken)
    time.sleep(0.05)
    assert taken == at_the_end
    assert taken == list(range(len(taken)))
    assert len(taken) < 6


def test_leaving_early_stops_the_reader_and_closes_it():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with Pipeline() as pipeline:
        next(pipeline.ahead("decode", source(), one, queue()))
    assert closed.is_set()
    assert not threads()


@pytest.mark.parametrize("while_waiting", [True, False])
def test_ctrl_c_stops_everything(while_waiting):
    """While the caller works, and while it waits for a slow reader."""

    def source():
        yield 0
        if while_waiting:
            threading.Timer(0.05, _thread.interrupt_main).start()
            time.sleep(0.4)
        yield 1

    def change(number: int) -> int:
        if not while_waiting:
            _thread.interrupt_main()
            time.sleep(0.2)
        return number

    with pytest.raises(KeyboardInterrupt):
        through(source(), change, lambda n: None)
    assert not threads()
