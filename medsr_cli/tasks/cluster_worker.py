"""What runs on a worker of a Dask cluster, and what goes to and fro: see `cluster`.

No module of Dask is imported here. A worker's process does one item at a time, whatever number of threads Dask gives
it, and keeps what it does it with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medsr_cli import __version__, errors
from medsr_cli.errors import DeviceUnavailable, InputRefused, MedsrError, RunError, WeightsError, mention
from medsr_cli.formats.atomic import atomic_file, sweep_stale
from medsr_cli.tasks.batch_locks import Locks
from medsr_cli.tasks.request import Item

STOP, CHECK = "stop", "check"
TRIES = 3
"""Workers that may die over an item."""
KEPT = 2
"""Runners that a worker keeps: models are heavy."""
STOP_EVERY_S = 1.0
WAIT_S = 86_400.0
"""How long a worker waits for another one that has the same item."""


class Stopped(RunError):
    """The batch ended before the item was done; nobody waits for it."""


@dataclass(frozen=True)
class Parcel:
    """One item of a batch, as the caller names it."""

    paths: tuple[Path, ...]
    """One image, or the registered channels that go through together."""
    what: Any = None
    """Anything that the caller knows it by; it is not sent."""
    roots: tuple[Path, ...] = ()
    """Folders that results are named by, as the caller spells them; items come back spelled the same way."""
    repeat: bool = False
    """Whether a result in the way is of an earlier attempt, and may be replaced."""

    def absolute(self) -> Parcel:
        """What is sent: the same for a process with another working directory."""
        return replace(self, paths=tuple(path.absolute() for path in self.paths), what=None, roots=())

    def as_named(self, items: Sequence[Item]) -> list[Item]:
        """Items with paths spelled as the caller does."""
        spelled = {path.absolute(): path for path in (*self.roots, *self.paths, *(p.parent for p in self.paths))}
        for item in items:
            item.source = _spelled(item.source, spelled)
            item.output = None if item.output is None else _spelled(item.output, spelled)
            item.more_outputs = [_spelled(path, spelled) for path in item.more_outputs]
        return list(items)

    def failed(self, error: MedsrError) -> list[Item]:
        """One error for all of its images."""
        return [Item(path, status="failed", error=error) for path in self.paths]


def _spelled(path: Path, spelled: dict[Path, Path]) -> Path:
    for parent in (path, *path.parents):
        if parent in spelled:
            return spelled[parent] / path.relative_to(parent)
    return path


Runner = Callable[[Parcel, bool, Callable[[], None]], Sequence[Item]]
"""Does a parcel. The truth value says that a result in the way is of this very item and may be replaced; the function
is to be called now and then, and raises when nobody waits any more."""


@dataclass(frozen=True)
class Task:
    """What is sent to a worker; its text names no path, for Dask logs it."""

    number: int
    parcel: Parcel = field(repr=False)
    work: Any = field(repr=False)
    shared: Path = field(repr=False)
    version: str
    seen: tuple[tuple[int, int] | None, ...] = field(repr=False)
    """Size and time of change of the parcel's paths, as the sender sees them."""


def seen_file(paths: Sequence[Path]) -> tuple[tuple[int, int] | None, ...]:
    """Size and time of change in ns of each path; None where there is nothing, or no right to look."""
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((0 if path.is_dir() else about.st_size, about.st_mtime_ns))
    return tuple(found)


def introduce() -> str:
    """The version of medsr on this worker."""
    return __version__


def sweep(folders: Sequence[Path]) -> str:
    """Remove what killed processes of this machine left in folders of results; tells how many."""
    return str(sum(sweep_stale(folder) for folder in folders))


def attempt(task: Task) -> list[Item] | MedsrError:
    """Do a parcel, or say what became of it when another worker did it.

    Returns:
        Its items; or the error without which no other parcel would fare better.
    """
    try:
        with _ONE_AT_A_TIME:
            return _attempt(task)
    except (DeviceUnavailable, WeightsError) as error:
        return error
    except MedsrError as error:
        return task.parcel.failed(error)
    except Exception as error:
        # Whatever Dask would log of it may quote a path or a tag.
        msg = f"Something went wrong inside medsr on a worker ({type(error).__name__})."
        return task.parcel.failed(RunError(msg, "Run it again without --dask, with --debug, for details."))


_ONE_AT_A_TIME = threading.Lock()
_RUNNERS: dict[bytes, Runner] = {}


def _attempt(task: Task) -> list[Item]:
    _refuse(task)
    locks = Locks(task.shared)
    try:
        with locks.wait(f"item-{task.number}", WAIT_S):
            receipt = task.shared / f"item-{task.number}.json"
            if receipt.exists():
                return _read(receipt)
            again = _begun(task)
            stopped = _Stopping(task.shared)
            stopped()
            run = _runner(task)
            items = list(run(task.parcel, task.parcel.repeat, stopped))
            if again is not None and any(_made_since(item, again) for item in items):
                # A worker died after its result was there and before it could say so.
                items = list(run(task.parcel, True, stopped))
            _keep(receipt, items)
            return items
    finally:
        locks.close()


def _refuse(task: Task) -> None:
    if task.version != __version__:
        msg = f"A worker of the Dask cluster has medsr {__version__}; the batch is of {task.version}."
        raise DeviceUnavailable(msg, "Install the same version everywhere.")
    if not task.shared.is_dir():
        # A worker that joined later was not asked; and nobody waits for what is left of an interrupted batch.
        msg = "A worker of the Dask cluster does not see the folder of results."
        raise DeviceUnavailable(msg, "Put inputs and results on a file system that all of them see.")
    for path, there, here in zip(task.parcel.paths, task.seen, seen_file(task.parcel.paths), strict=True):
        if there is not None and here is None:
            msg = f"{mention(path.name)} is not there for a worker of the Dask cluster."
            raise InputRefused(msg, "Put inputs and results on a file system that all of them see.")
        if there != here:
            msg = f"{mention(path.name)} is another file for a worker of the Dask cluster than for this machine."
            raise InputRefused(msg, "Put inputs and results on a file system that all of them see.")


def _begun(task: Task) -> int | None:
    """Leave a mark that the item was begun; the time of the first such mark if there was one, by the files' clock.

    Raises:
        RunError: too many workers have begun and not ended it. Dask counts deaths too, but blames every item that
            waited for the worker.
    """
    marks = [task.shared / f"item-{task.number}.begun-{time}" for time in range(1, TRIES + 1)]
    for mark in marks:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return None if mark == marks[0] else marks[0].stat().st_mtime_ns
    msg = f"{mention(task.parcel.paths[0].name)} was given up: {TRIES} workers died while they had it."
    raise RunError(msg, "Look at the workers' memory; a smaller --tile needs less.")


def _made_since(item: Item, begun_ns: int) -> bool:
    """Whether a result is in the item's way, or was passed over, that was not there when it was first begun."""
    if item.output is None or not (item.status == "skipped" or isinstance(item.error, errors.ArgumentsError)):
        return False
    try:
        return item.output.stat().st_ctime_ns >= begun_ns
    except OSError:
        return False


def _runner(task: Task) -> Runner:
    """The one that this process has for such tasks, or a new one."""
    import pickle  # compared, never loaded

    key = hashlib.sha256(pickle.dumps((task.work, str(task.shared)))).digest()
    if key not in _RUNNERS:
        while len(_RUNNERS) >= KEPT:
            del _RUNNERS[next(iter(_RUNNERS))]
        _RUNNERS[key] = task.work(Taken(task.shared))
    return _RUNNERS[key]


class _Stopping:
    """Raises when the batch has ended."""

    def __init__(self, shared: Path) -> None:
        self._shared, self._looked = shared, 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._looked < STOP_EVERY_S:
            return
        self._looked = now
        if (self._shared / STOP).exists() or not self._shared.is_dir():
            msg = "The batch was ended."
            raise Stopped(msg, "Go on with --resume.")


class Taken(dict[Path, Path]):
    """Which input of the batch a result is of, for all workers: two inputs of one name are not written over each other.

    It is what `Job` takes for the results of a batch so far; only `setdefault` is shared.
    """

    def __init__(self, shared: Path) -> None:
        super().__init__()
        self._shared = shared

    def __reduce__(self) -> tuple[Any, ...]:
        return Taken, (self._shared,)

    def setdefault(self, target: Path, source: Path | None = None) -> Path:
        """The input that has this result: `source` itself unless another had it before."""
        assert source is not None  # noqa: S101 - a result has a source
        name = hashlib.sha256(os.fsencode(target)).hexdigest()[:32]
        whose = hashlib.sha256(os.fsencode(source)).hexdigest()
        path = self._shared / f"result-{name}"
        with contextlib.suppress(MedsrError), atomic_file(path) as file:
            file.write(whose.encode())
        try:
            own = path.read_text() == whose
        except OSError:
            own = True  # the batch has ended
        return super().setdefault(target, source) if own else Path("another input")


# -- receipts -------------------------------------------------------------------------------------------------


def _keep(receipt: Path, items: Sequence[Item]) -> None:
    """Say that an item is done, for a worker that gets it once more."""
    if not receipt.parent.is_dir():
        return  # nobody waits any more
    with atomic_file(receipt, overwrite=True) as file:
        file.write(json.dumps([_facts(item) for item in items], default=str).encode())


def _facts(item: Item) -> dict[str, Any]:
    facts = {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item)}
    facts["source"] = str(item.source)
    facts["output"] = None if item.output is None else str(item.output)
    facts["more_outputs"] = [str(path) for path in item.more_outputs]
    if item.error is not None:
        facts["error"] = [type(item.error).__name__, item.error.sentence, item.error.remedy]
    return facts


def _read(receipt: Path) -> list[Item]:
    items = []
    for facts in json.loads(receipt.read_bytes()):
        facts["source"] = Path(facts["source"])
        facts["output"] = None if facts["output"] is None else Path(facts["output"])
        facts["more_outputs"] = [Path(path) for path in facts["more_outputs"]]
        if facts["error"] is not None:
            name, sentence, remedy = facts["error"]
            kind = getattr(errors, name, RunError)
            facts["error"] = kind(sentence, remedy)
        items.append(Item(**facts))
    return items
