"""What a training run keeps beside its output until it is done: packed slices, state, and a log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medsr_cli.errors import ArgumentsError, RunError, mention, reason_of
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.training.validation import Score, mean_gain

_IN_WORDS = {
    "pack": "images",
    "validation": "validation subjects",
    "config": "network sizes",
    "start": "starting weights",
    "networks": "networks for its losses",
}


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run the same one when it is resumed, beside its recipe."""

    method: str
    scale: int | None
    start: str
    """`nothing`, or how training started and the SHA-256 of the checkpoint that it started from."""
    pack: str
    """SHA-256 of the packed file's header, which lists every image and its SHA-256."""
    validation: list[str]
    """Subjects to validate on, by their `numbers_of`: names stay in the packed file alone."""
    config: dict[str, int | float | bool | str]
    networks: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the networks that the losses compare with, by role."""


def numbers_of(subjects: Sequence[str], chosen: Collection[str]) -> list[str]:
    """The chosen ones of a packed file's subjects, as the run writes them down: `subject 3` for the third."""
    return [f"subject {number}" for number, subject in enumerate(subjects, 1) if subject in chosen]


def subjects_of(subjects: Sequence[str], numbers: Collection[str]) -> list[str]:
    """The reverse of `numbers_of`."""
    return [subject for number, subject in enumerate(subjects, 1) if f"subject {number}" in numbers]


class WorkFolder:
    """The folder `OUT.work` and the files in it."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_suffix(".work")
        self.pack = self.folder / "slices.safetensors"
        self.state = self.folder / "state.pt"
        self.log = self.folder / "log.jsonl"
        self._identity = self.folder / "run.json"
        self._released = self.folder / "released.json"
        self._lock = self.folder / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            RunError: one is in it, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{mention(self.folder)} cannot be made ({reason_of(error)})."
            raise RunError(msg, "Choose another place with -o.") from error
        try:
            with FileLock(self._lock, timeout=0):
                yield
        except Timeout as error:
            msg = f"Another run is training in {mention(self.folder.name)}."
            raise RunError(msg, "Wait for it, or choose another -o.") from error

    @property
    def started(self) -> bool:
        """Whether a run got as far as its first state."""
        return self._identity.is_file() and self.state.is_file()

    @property
    def empty(self) -> bool:
        """Whether nothing of a run is there."""
        return not any(p.exists() for p in (self.pack, self.state, self._identity))

    def clear(self) -> None:
        """Remove what an earlier run left, but not the lock."""
        for path in (self.pack, self.state, self.log, self._identity, self._released):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder; what cannot be removed stays."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_identity(self, identity: RunIdentity) -> None:
        """Write down what the run is."""
        _write_json(self._identity, asdict(identity))

    def identity(self) -> RunIdentity:
        """What the run is.

        Raises:
            RunError: it was not written down.
        """
        try:
            return RunIdentity(**json.loads(self._identity.read_text()))
        except (OSError, ValueError, TypeError) as error:
            msg = f"{self._identity.name} in {mention(self.folder.name)} cannot be read."
            raise RunError(msg, "Give --overwrite instead of --resume to start anew.") from error

    def refuse_other(self, identity: RunIdentity) -> None:
        """Refuse to go on with a run that is another one.

        Raises:
            ArgumentsError: the sentence names what differs.
        """
        saved = self.identity()
        for name, now in asdict(identity).items():
            if getattr(saved, name) != now:
                msg = f"The run in {mention(self.folder.name)} was started with other {_IN_WORDS.get(name, name)}."
                raise ArgumentsError(msg, "Give the same options, or --overwrite instead of --resume to start anew.")

    def released(self) -> str | None:
        """SHA-256 of the checkpoint that this run itself wrote before it was resumed."""
        try:
            saved = json.loads(self._released.read_text())
        except (OSError, ValueError):
            return None
        return str(saved.get("sha256")) if isinstance(saved, dict) else None

    def write_released(self, sha256: str) -> None:
        """Remember the checkpoint that is being written, so that a resumed run may replace it."""
        _write_json(self._released, {"sha256": sha256})


class Log:
    """One JSON line for each validation; the file is replaced as a whole, so that a line is never torn."""

    def __init__(self, path: Path, until_step: int, subjects: Sequence[str] = (), *, named: bool = False) -> None:
        """Go on with a log.

        Args:
            path: the file.
            until_step: the step that the run goes on from.
            subjects: those of the packed file, in order; they are written as `subject 3`, and volumes not at all.
            named: write names, which the card is to tell.
        """
        self._path, self._named = path, named
        self._numbers = {subject: f"subject {number}" for number, subject in enumerate(subjects, 1)}
        # What came after the state that is gone on from will come again.
        self._lines = [line for line in _read_lines(path) if json.loads(line)["step"] <= until_step]

    def add(self, step: int, loss: float | None, seconds: float, scores: Sequence[Score]) -> None:
        """Append a validation; `loss` is the mean over the steps since the one before.

        `gain_db` is in the unit of the scores: dB, Dice, or shares of the image.
        """
        volumes = [self._told({**_table(score), "gain": score.gain}) for score in scores]
        entry = {"step": step, "loss": loss, "seconds": round(seconds, 1), "gain_db": mean_gain(scores)}
        self._lines = [line for line in self._lines if json.loads(line)["step"] != step]
        self._lines.append(json.dumps({**entry, "volumes": volumes}))
        with atomic_file(self._path, overwrite=True) as file:
            file.write(("\n".join(self._lines) + "\n").encode())

    def _told(self, volume: dict[str, Any]) -> dict[str, Any]:
        if self._named:
            return volume
        subject = volume["subject"]
        plain = {name: value for name, value in volume.items() if name != "name"}
        return {**plain, "subject": self._numbers.setdefault(subject, f"subject {len(self._numbers) + 1}")}

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Every validation so far."""
        return [json.loads(line) for line in self._lines]

    def to_keep(self, *, named: bool) -> bytes:
        """The log as it stays beside the checkpoint: unless `named`, subjects are numbered as in the card."""
        numbers: dict[str, str] = {}
        kept = []
        for entry in self.entries:
            for volume in () if named else entry["volumes"]:
                volume["subject"] = numbers.setdefault(volume["subject"], f"subject {len(numbers) + 1}")
                volume.pop("name", None)
            kept.append(json.dumps(entry))
        return ("\n".join(kept) + "\n").encode()


def _table(score: Score) -> dict[str, Any]:
    return asdict(score)  # type: ignore[call-overload,no-any-return]  # every score is a dataclass


def pack_identity(path: Path) -> str:
    """SHA-256 of a packed file's header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(length)).hexdigest()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _write_json(path: Path, content: object) -> None:
    with atomic_file(path, overwrite=True) as file:
        file.write(json.dumps(content).encode())
