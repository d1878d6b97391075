"""A batch that can be left alone: it goes on where it was killed, shares its work, and says what became of each input.

`Batch` decides what is to be done of each input, from the record of this and of earlier runs and from who works beside
it, has it done, and records it. What doing it means is not known here: see `Work`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medsr_cli.errors import (
    ArgumentsError,
    DeviceUnavailable,
    InputRefused,
    MedsrError,
    QualityGateFailed,
    RunError,
    WeightsError,
    mention,
)
from medsr_cli.provenance.discretion import introduce
from medsr_cli.tasks.ahead import Ahead, Promised
from medsr_cli.tasks.batch_locks import Lock
from medsr_cli.tasks.batch_outcome import NOT_BEGUN, Finished, Tally, item_line
from medsr_cli.tasks.batch_places import (
    InputState,
    key_of,
    name_for_record,
    place_of,
    size_of,
    state_of,
)
from medsr_cli.tasks.batch_record import BatchRecord, Entry, Output
from medsr_cli.tasks.batch_request import BatchRequest
from medsr_cli.tasks.batch_settings import open_record
from medsr_cli.tasks.inputs import Places
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.request import Item
from medsr_cli.tasks.study import selector_of

__all__ = ["Batch", "Claim", "Finished", "Tally", "Work", "item_line", "open_record", "spread_over"]

POLL_S = 0.1
STAYS = (InputRefused.exit_code, QualityGateFailed.exit_code)
"""Failures that come again as long as the input is the same."""
_ERRORS = {error.exit_code: error for error in (ArgumentsError, DeviceUnavailable, WeightsError, InputRefused)} | {
    QualityGateFailed.exit_code: QualityGateFailed
}

Unit = tuple[Path, ...]
"""What goes through together: one input, or the registered channels of one patient."""


class Work(Protocol):
    """One run of the main job."""

    @property
    def items(self) -> list[Item]:
        """What became of each input."""
        ...

    def prepare(self) -> None:
        """Open and measure; in another thread, while the engine has an earlier one."""
        ...

    def run(self) -> None:
        """Enlarge and write."""
        ...


@dataclass
class Claim:
    """An input that is this run's to do; no other run does it until it is ended or dropped."""

    sources: Unit
    id: str
    """Salted hash of its path."""
    number: int
    """Which of the batch, from 1."""
    attempt: int = 1
    repeat: bool = False
    """What stands at the place of its results is of an earlier attempt, and may be replaced."""
    state: InputState | None = None
    lock: Lock | None = None
    began: float = field(default_factory=time.perf_counter)


class Batch:
    """One run of a batch.

    Args:
        request: its options.
        places: where inputs and results are.
        record: what earlier runs and those beside did, and where this one is told; None keeps nothing.
        progress: is told which input is worked on.
        total: how many inputs there are.
    """

    def __init__(
        self,
        request: BatchRequest,
        places: Places,
        record: BatchRecord | None = None,
        *,
        progress: Progress | None = None,
        total: int = 1,
    ) -> None:
        self.request, self.places, self.record = request, places, record
        self.progress, self.total = progress or Silent(), total
        self.failures = 0
        """Of this run; what failed before and was not tried again is not among them."""

    @property
    def stopped(self) -> bool:
        """Whether so much failed that nothing more is begun."""
        most = self.request.most_failures
        return most is not None and self.failures >= most

    def run(self, units: Iterable[Unit], make: Callable[[Claim], Work]) -> Generator[Finished, None, None]:
        """Do what is to be done, and tell what became of every input, in their order but for those others hold.

        Args:
            units: the inputs.
            make: the work for one; with `claim.repeat` it has to replace what an earlier attempt left.

        Raises:
            DeviceUnavailable: no input would fare better.
            WeightsError: no input would fare better.
            RunError: the record cannot be written.
        """
        steps = self.steps(units)
        pending: deque[tuple[Claim, Work, Promised[None]] | Finished] = deque()
        ended = False
        with Ahead(self.request.jobs, "read") as ahead:
            try:
                while True:
                    while not ended and len(pending) < ahead.room:
                        try:
                            step = next(steps)
                        except StopIteration:
                            ended = True
                            break
                        if step is None:
                            break
                        if isinstance(step, Claim):
                            work = make(step)
                            pending.append((step, work, ahead.submit(work.prepare)))
                        else:
                            pending.append(step)
                    if pending:
                        yield from self._next(pending.popleft())
                    elif ended:
                        return
                    else:
                        time.sleep(POLL_S)
            finally:
                for waiting in pending:
                    if isinstance(waiting, tuple):
                        self.drop(waiting[0])

    def steps(self, units: Iterable[Unit]) -> Iterator[Claim | Finished | None]:
        """What is to be done, or is done already; None where nothing can be said just now, because others work on it.

        Whoever asks on after None without having ended all claims would wait for those who wait for these.
        """
        held: deque[tuple[int, Unit]] = deque()
        for number, unit in enumerate(units, 1):
            step = self._step(number, unit)
            if step is None:
                held.append((number, unit))
            else:
                yield from step
        while held:
            number, unit = held.popleft()
            step = self._step(number, unit)
            if step is None:
                held.append((number, unit))
                yield None
            else:
                yield from step

    def begin(self, claim: Claim, items: Sequence[Item] = ()) -> None:
        """Record that results may appear from now on, so that a run after a kill knows whose they are."""
        if self.record is not None:
            self.record.item(claim.id, "begun", self._facts(claim, items))

    def end(self, claim: Claim, items: Sequence[Item]) -> list[Finished]:
        """Record what became of a claim, and give it back."""
        seconds = round(time.perf_counter() - claim.began, 3)
        failed = [item.error for item in items if item.error is not None]
        self.failures += bool(failed)
        skipped = all(item.status == "skipped" for item in items)
        status = "failed" if failed else "skipped" if skipped else "done"
        try:
            if self.record is not None:
                told: dict[str, Any] = {"exit_code": failed[0].exit_code if failed else 0, "seconds": seconds}
                if self.request.log_paths and failed:
                    told["reason"] = str(failed[0])
                self.record.item(claim.id, status, {**told, **self._facts(claim, items)})
        finally:
            self.drop(claim)
        return [Finished(item, claim.id, seconds) for item in items]

    def drop(self, claim: Claim) -> None:
        """Give a claim back as it is."""
        lock, claim.lock = claim.lock, None
        if lock is not None:
            lock.release()

    def _next(self, waiting: tuple[Claim, Work, Promised[None]] | Finished) -> Iterator[Finished]:
        if isinstance(waiting, Finished):
            yield waiting
            return
        claim, work, prepared = waiting
        if self.stopped:
            prepared.cancel()
            self.drop(claim)
            yield from self._not_begun(claim.sources, claim.id)
            return
        introduce(claim.sources[0])
        self.progress.item(claim.sources[0].name, claim.number, self.total)
        claim.began = time.perf_counter()
        try:
            prepared.result()
            if any(item.status == "done" for item in work.items):
                self.begin(claim, work.items)
                work.run()
        except (DeviceUnavailable, WeightsError) as error:
            self.end(claim, _failed(work, claim, error))
            raise
        except MedsrError as error:
            yield from self.end(claim, _failed(work, claim, error))
            return
        except BaseException:
            self.drop(claim)
            raise
        yield from self.end(claim, work.items)

    def _step(self, number: int, unit: Unit) -> list[Claim | Finished] | None:
        """What is to be done with an input; None if another process is at it."""
        if self.record is None:
            return list(self._not_begun(unit)) if self.stopped else [Claim(unit, "", number)]
        ident = self.record.hidden(key_of(self.places, unit))
        known = self._known(unit, ident)
        if known is not None:
            return list(known)
        if self.stopped:
            return list(self._not_begun(unit, ident))
        lock = self.record.lock_of(ident)
        if lock is None:
            return None
        # It may have been done between the look and the lock.
        known = self._known(unit, ident)
        if known is not None:
            lock.release()
            return list(known)
        state = self._state(unit)
        claim = Claim(unit, ident, number, lock=lock, state=state)
        entry = self.record.last(ident)
        if entry is not None:
            claim.attempt = entry.attempt + 1
            goes_on = self.request.resume or self.record.is_current(entry.run)
            claim.repeat = goes_on and entry.state == state.state and self._is_ours(entry, unit)
        return [claim]

    def _known(self, unit: Unit, ident: str) -> list[Finished] | None:
        """What became of an input, if nothing is to be done about it any more."""
        assert self.record is not None  # noqa: S101 - the caller has looked
        entry = self.record.last(ident)
        if entry is None or entry.status not in ("done", "failed"):
            return None
        beside = self.record.is_current(entry.run)
        if not (beside or self.request.resume):
            return None
        if entry.status == "failed":
            return self._known_failure(entry, unit, ident, beside)
        if entry.state != self._state(unit).state or not self._stands(entry, unit):
            return None
        outputs = [place for output in entry.outputs if (place := self._place(unit, output)) is not None]
        return [Finished(item, ident) for item in _skipped(unit, outputs)]

    def _known_failure(self, entry: Entry, unit: Unit, ident: str, beside: bool) -> list[Finished] | None:
        stays = entry.exit_code in STAYS and not self.request.retry_failed and entry.state == self._state(unit).state
        if not (beside or stays):
            return None
        kind = _ERRORS.get(entry.exit_code, RunError)
        if beside:
            error = kind(f"{mention(unit[0].name)} failed in another run on these inputs.", "See what it said.")
        else:
            msg = f"{mention(unit[0].name)} was refused by an earlier run, and has not changed since."
            error = kind(msg, "Add --retry-failed to try it again.")
        return [Finished(Item(source, status="failed", error=error), ident) for source in unit]

    def _not_begun(self, unit: Unit, ident: str | None = None) -> Iterator[Finished]:
        for source in unit:
            yield Finished(Item(source, status=NOT_BEGUN), ident)

    def _state(self, unit: Unit) -> InputState:
        assert self.record is not None  # noqa: S101 - without a record nobody asks
        return state_of(self.places, unit, self.record.hidden)

    def _place(self, unit: Unit, output: Output) -> Path | None:
        source, name = unit[0], output.name
        if name is None:
            return None
        number, _, rest = name.rpartition(":")
        return place_of(self.places, unit[int(number)] if number else source, rest)

    def _stands(self, entry: Entry, unit: Unit) -> bool:
        """Whether every result that was recorded is still there, as large as it was."""
        places = [(self._place(unit, output), output) for output in entry.outputs]
        return bool(places) and all(
            place is not None and size_of(place) == (output.files, output.bytes) for place, output in places
        )

    def _is_ours(self, entry: Entry, unit: Unit) -> bool:
        """Whether what stands at the places of the results was made by an earlier attempt, as far as can be told."""
        if entry.status == "begun":
            return True  # it began when nothing stood there, or when it might be replaced
        if entry.status not in ("done", "failed"):
            return False
        for output in entry.outputs:
            place = self._place(unit, output)
            there = None if place is None else size_of(place)
            if there is not None and there != (output.files, output.bytes) and not there[0] < output.files:
                return False  # someone has changed it: it is theirs now; a series that lacks files is nobody's
        return bool(entry.outputs)

    def _facts(self, claim: Claim, items: Sequence[Item]) -> dict[str, Any]:
        """What the record is told of an input; nothing in it names a file unless that is asked for."""
        facts: dict[str, Any] = {"attempt": claim.attempt}
        if claim.state is not None:
            facts["input"] = claim.state.facts()
        facts["outputs"] = [told for item in items if item.error is None for told in self._told(claim.sources, item)]
        if self.request.log_paths:
            facts["paths"] = [str(source) for source in claim.sources]
        return facts

    def _told(self, unit: Unit, item: Item) -> Iterator[dict[str, Any]]:
        number = unit.index(item.source) if item.source in unit else 0
        for path in (item.output, *item.more_outputs):
            if path is None:
                continue
            name = name_for_record(self.places, item.source, path)
            files, size = size_of(path) or (0, 0)
            told = {
                "name": name if name is None or not number else f"{number}:{name}",
                "files": files,
                "bytes": size,
            }
            sha256 = (item.report.get("output") or {}).get("sha256") if path == item.output else None
            yield {**told, **({"sha256": sha256} if sha256 else {})}


def _skipped(unit: Unit, outputs: Sequence[Path]) -> list[Item]:
    """Items of an input that is done: one for each channel, for each series of a study, or one with all outputs."""
    if len(unit) == len(outputs):
        return [Item(source, place, status="skipped") for source, place in zip(unit, outputs, strict=True)]
    items: list[Item] = []
    for place in outputs:
        series = selector_of(place.name)
        if series is not None or not items:
            items.append(Item(unit[0], place, series=series, status="skipped"))
        else:
            items[-1].more_outputs.append(place)
    others = unit[1:] if items else unit
    return [*items, *(Item(source, outputs[0] if outputs else None, status="skipped") for source in others)]


def _failed(work: Work, claim: Claim, error: MedsrError) -> Sequence[Item]:
    """The items of a work that was stopped by an error; what of it was done before stays done."""
    items = work.items or [Item(source) for source in claim.sources]
    _fail([item for item in items if not item.report], error)
    return items


def _fail(items: Iterable[Item], error: MedsrError) -> None:
    for item in items:
        item.status, item.error = "failed", error


def spread_over(
    batch: Batch, units: Iterable[Unit], spread: Callable[[Iterator[Claim]], Iterable[tuple[Claim, Sequence[Item]]]]
) -> Generator[Finished, None, None]:
    """`Batch.run` for work that is done elsewhere: `spread` gets the claims, and yields each with what became of it.

    Inputs that another batch holds are asked for again when all of these are done, so that no two batches wait for
    each other.
    """
    steps = batch.steps(units)
    known: deque[Finished] = deque()
    ended = False

    def claims() -> Iterator[Claim]:
        nonlocal ended
        for step in steps:
            if step is None:
                return
            if isinstance(step, Finished):
                known.append(step)
                continue
            if batch.stopped:
                batch.drop(step)
                known.extend(Finished(Item(source, status=NOT_BEGUN), step.id) for source in step.sources)
                continue
            batch.begin(step)
            yield step
        ended = True

    while not ended:
        for claim, items in spread(claims()):
            yield from batch.end(claim, items)
            while known:
                yield known.popleft()
        while known:
            yield known.popleft()
        if not ended:
            time.sleep(POLL_S)
