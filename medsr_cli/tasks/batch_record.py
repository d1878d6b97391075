"""The record of a batch: JSON lines that are only ever added, one for each thing that happened.

The first line says what the file is and carries a random salt; each run adds a line of its own, then two for each
item, when it begins and when it ends. Names hold patients' names: an item is known by a salted hash of its path.
Each line is one write, flushed to the disk, under a lock. What a kill or a loss of power leaves of a last line is
ended by the next run and not read.

    {"medsr_batch": 1, "salt": ..., "begun": UTC, "medsr": version, "settings": digest, "parts": {name: hash}}
    {"run": id, "at": UTC, "medsr": version, "settings": digest, "parts": {name: hash}}
    {"item": id, "run": id, "settings": digest, "at": UTC, "status": "begun" | "done" | "skipped" | "failed",
     "attempt": n, "exit_code": n, "seconds": s, "input": {"files": n, "bytes": n, "state": hash},
     "outputs": [{"name": "*7*_x4-rdst.nii.gz", "files": n, "bytes": n, "sha256": ...}]}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, RunError, mention, reason_of
from medsr_cli.tasks.batch_locks import Lock, Locks

VERSION = 1
NAME = ".medsr-batch.jsonl"
"""Hidden: whoever walks a folder of results, medsr itself included, passes it over."""
LOCKS = ".medsr-locks"
_BEGINNING = b'{"medsr_batch":'
ANOTHER = "Name another file with --batch-record."


@dataclass(frozen=True)
class Output:
    """A result: where it stands in terms of its source (see `batch_places`), and how large it is."""

    name: str | None
    files: int
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """The last that is known of an item."""

    run: str
    status: str
    """`begun`, `done`, `skipped` or `failed`."""
    exit_code: int
    attempt: int
    state: str
    """Of the input's files: names, sizes and times, as a hash."""
    outputs: tuple[Output, ...]


class BatchRecord:
    """An open record; a context manager.

    Args:
        path: the file; it and its folder are made if they are missing. Locks are in `.medsr-locks` beside it.
        settings: what decides the results, by name; recorded as hashes.
        resume: refuse to go on with other settings than any run before had.

    Raises:
        ArgumentsError: the file is something else or of a later version, or `resume` with other settings.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], *, resume: bool = False) -> None:
        self.path = path
        self.run = secrets.token_hex(6)
        self.locks = Locks(path.parent / LOCKS)
        self.torn = 0
        """Lines that cannot be read: what kills left."""
        self.versions: set[str] = set()
        """Of medsr, in the runs before, but for this one."""
        self._index: dict[bytes, int] = {}
        self._runs: dict[str, str] = {}
        self._parts: dict[str, Mapping[str, str]] = {}
        self._beside: set[str] = set()
        self._read_to = 0
        self._descriptor, self._reading = self._open()
        try:
            self.salt = self._salt(settings)
            self._first_look(settings, resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BatchRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the locks and close the file."""
        self.locks.close()
        self._reading.close()
        os.close(self._descriptor)

    def hidden(self, text: str) -> str:
        """A salted hash of a text, 32 hexadecimal digits; the same text has another one in another record."""
        data = text.encode("utf-8", "surrogateescape")
        return hashlib.blake2b(data, key=bytes.fromhex(self.salt), digest_size=16).hexdigest()

    def lock_of(self, item: str) -> Lock | None:
        """The lock of an item under these settings, or None while another process works on it."""
        return self.locks.claim(self.hidden(f"{item} {self.settings}"))

    def last(self, item: str) -> Entry | None:
        """The last that any run with these settings recorded of an item."""
        self.refresh()
        offset = self._index.get(self._key(item, self.settings))
        if offset is None:
            return None
        self._reading.seek(offset)
        facts = _parsed(self._reading.readline())
        return None if facts is None else _entry(facts)

    def is_current(self, run: str) -> bool:
        """Whether a run goes on beside this one, or did when this one began: its results are nobody's leftovers."""
        return run == self.run or run in self._beside

    def item(self, item: str, status: str, entry: Mapping[str, Any]) -> None:
        """Add a line about an item.

        Raises:
            RunError: it could not be written.
        """
        known = {"item": item, "run": self.run, "settings": self.settings, "at": now(), "status": status}
        self._append({**known, **entry})

    def refresh(self) -> None:
        """Take in what was added since, by this process or another."""
        self._reading.seek(self._read_to)
        while (line := self._reading.readline()).endswith(b"\n"):
            self._take(_parsed(line), self._read_to, blank=not line.strip())
            self._read_to += len(line)

    def _open(self) -> tuple[int, BinaryIO]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            return descriptor, self.path.open("rb")
        except OSError as error:
            raise self._write_error(error) from error

    def _salt(self, settings: Mapping[str, str]) -> str:
        """That of the first line, which is written if there is none."""
        with self.locks.wait("record"):
            head = self._reading.read(1 << 16)
            # A loss of power may leave a first line torn: then the first whole one counts.
            for line in head.split(b"\n"):
                facts = _parsed(line)
                if facts is None:
                    continue
                if facts.get("medsr_batch") != VERSION or not isinstance(facts.get("salt"), str):
                    whose = "a later medsr's" if isinstance(facts.get("medsr_batch"), int) else "no medsr's"
                    msg = f"{mention(self.path.name)} is {whose} record of a batch."
                    raise ArgumentsError(msg, ANOTHER)
                return str(facts["salt"])
            begun = head.strip(b"\0\n")[: len(_BEGINNING)]
            if not _BEGINNING.startswith(begun):
                msg = f"{mention(self.path.name)} is something else than a record of a batch."
                raise ArgumentsError(msg, ANOTHER)
            self.salt = secrets.token_hex(16)
            self._write({"medsr_batch": VERSION, "salt": self.salt, "begun": now(), **self._described(settings)})
        _flush_folder(self.path.parent)
        return self.salt

    def _described(self, settings: Mapping[str, str]) -> dict[str, Any]:
        parts = {name: self.hidden(f"{name}={value}")[:12] for name, value in sorted(settings.items())}
        return {"medsr": __version__, "settings": self.hidden(json.dumps(parts))[:16], "parts": parts}

    def _first_look(self, settings: Mapping[str, str], resume: bool) -> None:
        """Read what was before, and add this run's line."""
        described = self._described(settings)
        self.settings: str = described["settings"]
        self.refresh()
        known = dict(self._parts)
        if resume and self._index and self.settings not in known:
            latest = next(reversed(known.values()))
            names = sorted(name for name in {*latest, *settings} if latest.get(name) != described["parts"].get(name))
            msg = f"--resume goes on as a batch was begun, but here these differ: {', '.join(names)}."
            raise ArgumentsError(msg, f"Give the same options, leave --resume out, or begin anew. {ANOTHER}")
        self.locks.wait(f"run-{self.run}")  # held until the end: the sign that this run is alive
        self._append({"run": self.run, "at": now(), **described})
        self.refresh()
        # Whoever begins later is beside this run; of those whose lines stand before its own, who is alive.
        before = [run for run in self._runs if run != self.run]
        self._beside.update(run for run in before if self.locks.is_held(f"run-{run}"))
        self.versions.discard(__version__)

    def _take(self, facts: Mapping[str, Any] | None, offset: int, *, blank: bool = False) -> None:
        if facts is None:
            self.torn += not blank
            return
        item, run, settings = facts.get("item"), facts.get("run"), facts.get("settings")
        if isinstance(item, str) and isinstance(settings, str) and _entry(facts) is not None:
            self._index[self._key(item, settings)] = offset
        elif isinstance(settings, str) and isinstance(facts.get("parts"), dict):
            self._parts.pop(settings, None)
            self._parts[settings] = facts["parts"]
            self.versions.add(str(facts.get("medsr")))
            if isinstance(run, str):
                if self.run in self._runs:
                    self._beside.add(run)
                self._runs[run] = settings

    @staticmethod
    def _key(item: str, settings: str) -> bytes:
        return hashlib.blake2b(f"{item} {settings}".encode(), digest_size=16).digest()

    def _append(self, facts: Mapping[str, Any]) -> None:
        with self.locks.wait("record"):
            self._write(facts)

    def _write(self, facts: Mapping[str, Any]) -> None:
        """One line in one write, on the disk when this returns; the caller has the lock."""
        line = json.dumps(facts, separators=(",", ":")).encode() + b"\n"
        try:
            there, ours = os.stat(self.path), os.fstat(self._descriptor)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                msg = f"The batch's record {mention(self.path.name)} was moved away while it was written."
                raise RunError(msg, "Start again with --resume and the record at its place.")
            end = self._reading.seek(0, os.SEEK_END)
            if end and (self._reading.seek(end - 1), self._reading.read(1))[1] != b"\n":
                line = b"\n" + line  # a torn line stays as it is, on a line of its own
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> RunError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else reason_of(error)
        msg = f"The batch's record {mention(self.path.name)} cannot be written: {reason}."
        remedy = "Free some space, or name" if full else "Check -o, or name"
        return RunError(msg, f"{remedy} a --batch-record elsewhere.")


def now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object, or None if it is torn."""
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _entry(facts: Mapping[str, Any]) -> Entry | None:
    """What a line says of an item; None if it does not say it."""
    try:
        outputs = tuple(
            Output(output.get("name"), int(output["files"]), int(output["bytes"]), output.get("sha256"))
            for output in facts.get("outputs", ())
        )
        return Entry(
            run=str(facts["run"]),
            status=str(facts["status"]),
            exit_code=int(facts.get("exit_code", 0)),
            attempt=int(facts.get("attempt", 1)),
            state=str(facts["input"]["state"]),
            outputs=outputs,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _flush_folder(folder: Path) -> None:
    """Bring the name of a new file to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows does not open folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
