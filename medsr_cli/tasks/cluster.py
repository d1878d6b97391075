"""A batch spread over a running Dask cluster: this process keeps order and record, workers do one item at a time.

A worker gets a parcel, the paths of one item and what to do with them, and runs the same function as one machine does;
what it needs for that, models above all, it keeps for the next parcel. Files are not sent: workers see the same files
under the same paths, which is checked. Workers may die at any moment:

- A result appears whole or not at all, as everywhere (`formats.atomic`), and what the dead worker left of it is swept.
- The parcel is given to another worker; when three have died over it, the item has failed.
- A receipt beside the batch's record tells the next worker that the item was finished before the worker died; what has
  a receipt is not done again. A lock keeps two workers from one item, should one that was given up be alive still.

Nothing is raised on a worker and nothing there has a name with a path in it: Dask logs both.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, MedsrError, RunError, mention
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.provenance import discretion
from medsr_cli.tasks.cluster_worker import CHECK, STOP, Parcel, Runner, Task, attempt, introduce, seen_file, sweep
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.request import Item

Client = Any
Future = Any
"""Those of `distributed`, which need not be installed."""

_ADDRESS = re.compile(r"([a-z]+://)?[^/\s]+:[0-9]{1,5}/?|[a-z]+://[^\s]+")
CONNECT_S = 30.0
"""How long the scheduler and the first worker are waited for."""
ALONE_S = 300.0
"""How long a batch goes on without any worker."""
POLL_S = 1.0
LOOK_S = 5.0
"""How often workers are counted."""
ENDING_S = 15.0
"""How long an interrupted batch waits for workers to notice."""


class Work(Protocol):
    """Makes, on a worker and once there, what does the items; it is sent, so that it must be picklable."""

    def __call__(self, taken: Any) -> Runner:
        """What does an item; `taken` is a `cluster_worker.Taken`."""
        ...


def spread(
    address: str,
    parcels: Iterable[Parcel],
    work: Work,
    folder: Path,
    progress: Progress | None = None,
    total: int | None = None,
) -> Iterator[tuple[Parcel, list[Item]]]:
    """Have every parcel done by a worker of a cluster.

    Args:
        address: of a running scheduler, `tcp://host:8786`, or a scheduler file (`.json`).
        parcels: asked for only as far as there are workers, so that the caller can lock and record each as it begins.
        work: what is done with one, see `Work`.
        folder: that all workers see and may write into, such as the one of the results; what is put there under a
            hidden name is gone at the end.
        progress: is told of each item that is done, and its warnings.
        total: how many parcels there are, if it is known.

    Yields:
        Each parcel with its items, in the order in which they were asked for. What failed is in the item; a worker's
        death is after the last attempt, as a `RunError`.

    Raises:
        ArgumentsError: Dask is not installed.
        DeviceUnavailable: there is no such cluster, it has no workers, or they cannot do this; or a worker said so.
        WeightsError: a worker could not load the model.
        RunError: the cluster went away.
    """
    progress = progress or Silent()
    waiting = iter(parcels)
    first = next(waiting, None)
    if first is None:
        return
    with _connected(address) as client:
        workers = _refuse_workers(client)
        progress.say(f"{workers} Dask worker{'s' if workers > 1 else ''} of medsr {__version__}.")
        with _shared_folder(client, folder) as shared:
            yield from _Spread(client, work, shared, progress, total).run(itertools.chain([first], waiting))


class _Spread:
    """One batch on one cluster."""

    def __init__(self, client: Client, work: Work, shared: Path, progress: Progress, total: int | None) -> None:
        self.client, self.work, self.shared, self.progress, self.total = client, work, shared, progress, total
        self.key = f"medsr-{shared.name.rpartition('-')[2]}"
        self._sent = 0
        self._workers, self._looked, self._alone_since = 1, 0.0, time.monotonic()

    def run(self, parcels: Iterable[Parcel]) -> Iterator[tuple[Parcel, list[Item]]]:
        pending: deque[tuple[int, Parcel, Future]] = deque()
        waiting = enumerate(parcels, 1)
        folders: set[Path] = set()
        try:
            while True:
                # Two for each worker, so that none waits for this process; more would only be locked early.
                for number, parcel in itertools.islice(waiting, max(2 * self._count() - len(pending), 0)):
                    pending.append((number, parcel, self._submit(number, parcel)))
                if not pending:
                    break
                number, parcel, future = pending[0]
                if not self._wait(future):
                    continue
                if self._was_killed(future):
                    # Dask gives up what waited for dead workers, too; the next worker knows who had begun it.
                    pending[0] = number, parcel, self._submit(number, parcel)
                    continue
                pending.popleft()
                items = self._taken_in(number, parcel, future)
                folders |= {item.output.absolute().parent for item in items if item.output is not None}
                yield parcel, items
            # What a dead worker left, a living one on its machine removes.
            _asked(self.client, sweep, sorted(folders))
        finally:
            if pending:
                self._stop([future for _, _, future in pending])

    def _submit(self, number: int, parcel: Parcel) -> Future:
        task = Task(number, parcel.absolute(), self.work, self.shared, __version__, seen_file(parcel.paths))
        self._sent += 1
        key = f"{self.key}-{number}-{self._sent}"
        return self.client.submit(attempt, task, key=key, pure=False)

    def _wait(self, future: Future) -> bool:
        """Whether it is done now, after waiting a little; refuses to wait for workers that do not come."""
        with contextlib.suppress(TimeoutError):
            future.exception(timeout=POLL_S)
            return True
        if self.client.status != "running":
            raise _lost()
        return False

    def _count(self) -> int:
        """Workers, counted now and then."""
        now = time.monotonic()
        if now - self._looked > LOOK_S:
            try:
                found = len(self.client.nthreads())
            except (OSError, TimeoutError) as error:
                raise _lost() from error
            self._looked, self._workers = now, max(found, 1)
            self._alone_since = now if found else self._alone_since
            if now - self._alone_since > ALONE_S:
                msg = f"The Dask cluster has had no worker for {ALONE_S:.0f} s."
                raise RunError(msg, "Start workers, and go on with --resume.")
        return self._workers

    def _was_killed(self, future: Future) -> bool:
        return not future.cancelled() and type(future.exception()).__name__ == "KilledWorker"

    def _taken_in(self, number: int, parcel: Parcel, future: Future) -> list[Item]:
        """What a worker returned; an error where it was none."""
        items = self._result(parcel, future)
        future.release()
        discretion.introduce(parcel.paths[0])
        self.progress.item(parcel.paths[0].name, number, self.total or number)
        for sentence in dict.fromkeys(sentence for item in items for sentence in item.warnings):
            self.progress.warn(sentence)
        return items

    def _result(self, parcel: Parcel, future: Future) -> list[Item]:
        if future.cancelled():
            raise _lost()
        error = future.exception()
        if error is not None:
            msg = f"A worker failed on {mention(parcel.paths[0].name)} ({type(error).__name__})."
            return parcel.failed(RunError(msg, "Run it again without --dask for details."))
        outcome = future.result()
        if isinstance(outcome, MedsrError):
            raise outcome  # nothing can be done without the device or the weights, as on one machine
        return parcel.as_named(outcome)

    def _stop(self, futures: Sequence[Future]) -> None:
        """Take back what is queued, and let workers that are at it notice: they leave nothing half-done."""
        with contextlib.suppress(Exception):
            _write(self.shared / STOP, "stop")
            running = [future for future in futures if not future.done()]
            self.client.cancel(running, force=True)
            until = time.monotonic() + ENDING_S
            while time.monotonic() < until and any(self.shared.glob("*.lock")):
                time.sleep(POLL_S / 5)


def _lost() -> RunError:
    return RunError("The connection to the Dask cluster was lost.", "What is done is done; go on with --resume.")


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        import distributed
    except ImportError as error:
        msg = "--dask needs Dask, which is not installed."
        raise ArgumentsError(msg, "Install it here and on the workers: pip install 'medsr[cluster]'.") from error
    if not address.endswith(".json") and not _ADDRESS.fullmatch(address):
        msg = f"{mention(address)} is no address of a Dask scheduler."
        raise ArgumentsError(msg, "Give it as dask scheduler prints it, tcp://HOST:8786, or a scheduler file (.json).")
    where: dict[str, Any] = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    if "scheduler_file" in where and not Path(address).is_file():
        msg = f"There is no scheduler file {mention(address)}."
        raise DeviceUnavailable(msg, "Start the cluster first, or give the scheduler's address.")
    try:
        connect: Any = distributed.Client
        client = connect(**where, timeout=CONNECT_S, set_as_default=False, name="medsr")
    except Exception as error:
        msg = f"No Dask scheduler answers at {mention(address)} ({type(error).__name__})."
        raise DeviceUnavailable(msg, "Give its address as dask scheduler prints it: tcp://HOST:8786.") from error
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=POLL_S)


def _refuse_workers(client: Client) -> int:
    """How many workers there are; refuses those that have another medsr."""
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError as error:
        msg = f"The Dask cluster has no workers (waited {CONNECT_S:.0f} s)."
        raise DeviceUnavailable(msg, "Start some: dask worker ADDRESS --nthreads 1.") from error
    said = _asked(client, introduce)
    others = sorted({version for version in said.values() if version != __version__})
    if others:
        msg = f"Workers of the Dask cluster have medsr {', '.join(others)}; this is {__version__}."
        raise DeviceUnavailable(msg, "Install the same version everywhere.")
    return len(said)


def _asked(client: Client, question: Callable[..., str], *arguments: Any) -> dict[str, str]:
    """What every worker answers."""
    try:
        answers: dict[str, str] = client.run(question, *arguments, on_error="return")
    except Exception as error:
        raise _lost() from error
    wrong = next((answer for answer in answers.values() if not isinstance(answer, str)), None)
    if wrong is not None:
        missing = isinstance(wrong, ImportError)
        msg = (
            "Workers of the Dask cluster have no medsr, or one without --dask."
            if missing
            else f"Workers of the Dask cluster cannot run medsr ({type(wrong).__name__})."
        )
        raise DeviceUnavailable(msg, "Install the same version of medsr everywhere: pip install 'medsr[cluster]'.")
    return answers


@contextlib.contextmanager
def _shared_folder(client: Client, parent: Path) -> Iterator[Path]:
    """A hidden folder for receipts and locks, which every worker sees and may write into."""
    shared = parent.absolute() / f".medsr-cluster-{secrets.token_hex(6)}"
    token = secrets.token_hex(16)
    _write(shared / CHECK, token)
    try:
        blind = [said for said in _asked(client, _look, shared, token).values() if said]
        if blind:
            msg = f"{len(blind)} of the Dask workers do not share the folder of results with this machine ({blind[0]})."
            raise DeviceUnavailable(msg, "Put inputs and results on a file system that all of them see.")
        yield shared
    finally:
        for path in shared.glob("*"):
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            shared.rmdir()


def _look(shared: Path, token: str) -> str:
    """On a worker: empty if the folder is there and can be written into, else why not."""
    path = shared / CHECK
    try:
        if path.read_text() != token:
            return "it is another one there"
        _write(shared / f"check-{secrets.token_hex(8)}", token)
    except FileNotFoundError:
        return "it is not there"
    except (OSError, MedsrError):
        return "it cannot be read or written there"
    return ""


def _write(path: Path, text: str) -> None:
    with atomic_file(path, overwrite=True) as file:
        file.write(text.encode())
