"""Where checkpoints lie on this machine, and the proof before every use that they are the right bytes.

Layout under `MEDSR_HOME` (default: the platform's folder for application data):

    weights/ID.safetensors     what is loaded
    weights/ID.json            record of how it got there: hashes of the source and of the file itself
    weights/ID.entry.json      manifest entry, for checkpoints that a bundle brought and the manifest lacks
    sources/FILE               an author's file before its conversion (removed afterwards)
    locks/ID.lock              one job at a time fetches a checkpoint

This module writes by itself rather than through `formats.atomic`, because a download must outlive the
process that began it: bytes go to a part file beside the target, which is kept when the connection breaks,
taken up by the next attempt, and renamed onto the target only when it is whole and on disk.

Some network file systems grant every caller the lock. Therefore the lock only saves work: each writer has a
part file of its own name (host, process, random), takes over another's only by renaming it, which one
caller alone can win, and only if its owner is dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import BinaryIO, Literal

from medsr_cli.errors import WeightsError, reason_of
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.manifest import Entry, parse_entry

CHUNK_BYTES = 1 << 20
LOCK_TIMEOUT_S = 3600.0
FOREIGN_PART_AGE_S = 600.0
"""A part file of another host is taken for abandoned when nobody has written to it for this long."""
STALE_PART_AGE_S = 7 * 86400.0

State = Literal["bundled", "present", "missing"]


@dataclass(frozen=True)
class Record:
    """How a file of the store came there; hashes are SHA-256, in hex."""

    id: str
    bytes: int
    sha256: str
    source_bytes: int
    source_sha256: str
    source_git_blob: str
    url: str = ""


@dataclass(frozen=True)
class Digest:
    """Size and both kinds of hash of a file; `git_blob` is git's id of it."""

    bytes: int
    sha256: str
    git_blob: str


def parse_record(data: object) -> Record | None:
    """A record read from JSON; None if it is not one."""
    kinds = {item.name: {"str": str, "int": int}[str(item.type)] for item in fields(Record)}
    if not isinstance(data, dict) or set(data) != set(kinds):
        return None
    if any(type(data[name]) is not kind for name, kind in kinds.items()):
        return None
    return Record(**data)


class KeepPart(Exception):
    """Mixed into an exception that leaves `Store.receiving`: the bytes received so far are worth keeping."""


def default_home() -> Path:
    """`MEDSR_HOME`, else the platform's folder for application data."""
    chosen = os.environ.get("MEDSR_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "medsr"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "medsr"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "medsr"


def bundled_folder() -> Path:
    """The checkpoints that travel inside the package."""
    return Path(str(resources.files("medsr_cli"))) / "checkpoints"


class Store:
    """The checkpoints of one `MEDSR_HOME`; nothing is created before something is written."""

    def __init__(self, home: Path | None = None, bundled: Path | None = None) -> None:
        self.home = home or default_home()
        self.bundled = bundled or bundled_folder()

    def path(self, entry: Entry) -> Path:
        """Where the checkpoint is, or would be; bundled ones are read in place."""
        if entry.bundled_file and (self.bundled / entry.bundled_file).is_file():
            return self.bundled / entry.bundled_file
        return self.home / "weights" / f"{entry.id}.safetensors"

    def source_path(self, entry: Entry) -> Path:
        """Where the file that the sources give goes: for a safetensors entry, the checkpoint itself."""
        if entry.format == "safetensors":
            return self.home / "weights" / f"{entry.id}.safetensors"
        return self.home / "sources" / f"{entry.id}.pt"

    def state(self, entry: Entry) -> State:
        """Whether a file is there under its name; whether it is whole, `verified_path` says."""
        path = self.path(entry)
        if not path.is_file():
            return "missing"
        return "bundled" if path.parent == self.bundled else "present"

    def present(self, entry: Entry) -> bool:
        """Whether it can be used without fetching anything."""
        return self.state(entry) != "missing"

    def verified_path(self, entry: Entry, allow_unpinned: bool = False) -> Path:
        """The checkpoint's file after its hash was computed and compared; call it before every load.

        Raises:
            WeightsError: missing; not the bytes that the manifest or the store's record says; not
                safetensors; or unpinned and `allow_unpinned` is false.
        """
        path = self.path(entry)
        if not path.is_file():
            msg = f"The checkpoint {entry.id} is not on this machine."
            remedy = f"Run medsr weights pull {entry.id}, or copy it to {path}." if entry.sources else entry.how_to_get
            raise WeightsError(msg, remedy)
        if not entry.pinned and not allow_unpinned:
            msg = f"The manifest does not say which bytes {entry.id} is, so {path} cannot be checked."
            raise WeightsError(msg, "Pass --allow-unpinned if you trust the file.")
        digest = digest_file(path)
        record = self.record(entry)
        if entry.format == "safetensors":
            self.refuse_mismatch(entry, digest, path)
        elif record is None:
            if entry.pinned:
                msg = f"{path} was not converted by medsr weights pull, so it cannot be traced to its pinned source."
                raise WeightsError(msg, f"Remove it and run medsr weights pull {entry.id}.")
        else:
            source = Digest(record.source_bytes, record.source_sha256, record.source_git_blob)
            self.refuse_mismatch(entry, source, path)
        if record is not None and path.parent != self.bundled and record.sha256 != digest.sha256:
            _refuse_corrupt(entry, path, f"sha256 {record.sha256}", f"sha256 {digest.sha256}")
        read_header(path)
        return path

    def refuse_mismatch(self, entry: Entry, digest: Digest, path: Path) -> None:
        """Compare a file's size and hash with the manifest.

        Raises:
            WeightsError: they differ.
        """
        if entry.bytes is not None and digest.bytes != entry.bytes:
            _refuse_corrupt(entry, path, f"{entry.bytes} bytes", f"{digest.bytes} bytes")
        if entry.sha256 and digest.sha256 != entry.sha256:
            _refuse_corrupt(entry, path, f"sha256 {entry.sha256}", f"sha256 {digest.sha256}")
        if entry.sha256_prefix and not digest.sha256.startswith(entry.sha256_prefix):
            _refuse_corrupt(entry, path, f"sha256 {entry.sha256_prefix}...", f"sha256 {digest.sha256}")
        if entry.git_blob and digest.git_blob != entry.git_blob:
            _refuse_corrupt(entry, path, f"git blob {entry.git_blob}", f"git blob {digest.git_blob}")

    def record(self, entry: Entry) -> Record | None:
        """How the checkpoint got here; None where that is not written down.

        Raises:
            WeightsError: the record is damaged.
        """
        path = self.home / "weights" / f"{entry.id}.json"
        data = _read_json(path)
        if data is None:
            return None
        record = parse_record(data)
        if record is None or record.id != entry.id:
            msg = f"{path} is damaged."
            raise WeightsError(msg, f"Remove it and run medsr weights pull {entry.id}.")
        return record

    def write_record(self, record: Record) -> None:
        """Write down how a checkpoint got here."""
        self.write(self.home / "weights" / f"{record.id}.json", _json_bytes(asdict(record)))

    def write_entry(self, entry: Entry) -> None:
        """Remember the manifest entry of a checkpoint that the manifest does not list."""
        self.write(self.home / "weights" / f"{entry.id}.entry.json", _json_bytes(entry.to_json()))

    def entries(self) -> tuple[Entry, ...]:
        """The entries that bundles brought, by id.

        Raises:
            WeightsError: one is damaged.
        """
        found = []
        for path in sorted(self.home.glob("weights/*.entry.json")):
            entry = parse_entry(_read_json(path), path.name)
            if path.name != f"{entry.id}.entry.json":
                msg = f"{path} is the entry of another checkpoint, {entry.id}."
                raise WeightsError(msg, "Remove it and import the bundle again.")
            found.append(entry)
        return tuple(found)

    def write(self, target: Path, data: bytes) -> None:
        """Put a small file in the store, whole or not at all."""
        with self.receiving(target) as file:
            file.write(data)

    @contextlib.contextmanager
    def lock(self, entry_id: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Let one job at a time fetch a checkpoint; the others wait and find it there.

        Raises:
            WeightsError: another job held it for longer than `timeout_s`, or the store cannot be written.
        """
        from filelock import FileLock, Timeout  # noqa: PLC0415 -- a listing needs no lock

        lock = FileLock(_made(self.home / "locks") / f"{entry_id}.lock")
        try:
            lock.acquire(timeout=timeout_s, poll_interval=0.05)
        except Timeout as error:
            msg = f"Another job has been fetching {entry_id} for more than {timeout_s:.0f} s."
            raise WeightsError(msg, f"Wait for it, or remove {lock.lock_file} if it is dead.") from error
        except (OSError, NotImplementedError) as error:
            msg = f"{self.home} cannot be locked ({error})."
            raise WeightsError(msg, "Set MEDSR_HOME to a folder on a local disk.") from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def receiving(self, target: Path, *, resume: bool = False) -> Iterator[BinaryIO]:
        """A file that becomes `target` when the block ends well: flushed, on disk, then renamed.

        Args:
            target: a path inside the store.
            resume: start with what an earlier attempt left; the caller reads it, or truncates it.

        If the block raises `KeepPart` or is interrupted and `resume` is set, the bytes are kept for the next
        attempt; otherwise they are removed.

        Raises:
            WeightsError: the disk is full or the folder cannot be written.
        """
        folder = _made(target.parent)
        part = folder / f"{target.name}.{_owner()}.{secrets.token_hex(4)}.part"
        if resume:
            _take_over(target, part)
        try:
            file = part.open("r+b" if part.exists() else "w+b")
        except OSError as error:
            msg = f"{folder} cannot be written ({reason_of(error)})."
            raise WeightsError(msg, "Set MEDSR_HOME to a folder that you may write.") from error
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            _sync_folder(folder)
        except BaseException as error:
            worth_keeping = resume and isinstance(error, (KeepPart, KeyboardInterrupt))
            _leave(part, folder / f"{target.name}.part" if worth_keeping else None)
            if isinstance(error, OSError):
                msg = f"{target} cannot be written ({reason_of(error)})."
                raise WeightsError(msg, "Make room on the disk, or set MEDSR_HOME to another one.") from error
            raise

    def sweep(self, age_s: float = STALE_PART_AGE_S) -> list[Path]:
        """Remove part files that nobody has written to for `age_s` seconds; returns what was removed."""
        removed = []
        for folder in (self.home / "weights", self.home / "sources"):
            for part in folder.glob("*.part"):
                if _age_s(part) > age_s and not _owner_lives(part):
                    with contextlib.suppress(OSError):
                        part.unlink()
                        removed.append(part)
        return removed


def digest_file(path: Path) -> Digest:
    """Size, SHA-256 and git blob id of a file.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256, git_blob = hashlib.sha256(), new_git_blob(size)
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                git_blob.update(chunk)
    except OSError as error:
        msg = f"{path} cannot be read ({reason_of(error)})."
        raise WeightsError(msg, "Check the disk and the permissions.") from error
    return Digest(size, sha256.hexdigest(), git_blob.hexdigest())


def new_git_blob(size: int) -> hashlib._Hash:
    """The hash that git gives a file of `size` bytes, ready for its content."""
    # SHA-1 because git's ids are: an author's repository pins its files by them.
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _refuse_corrupt(entry: Entry, path: Path, expected: str, found: str) -> None:
    msg = f"{path} is not the checkpoint {entry.id}: expected {expected}, found {found}."
    remedy = (
        "Install medsr again."
        if path.parent.name == "checkpoints"
        else f"Remove it and run medsr weights pull {entry.id}."
    )
    raise WeightsError(msg, remedy)


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        msg = f"{path} is damaged."
        raise WeightsError(msg, "Remove it.")
    return data


def _json_bytes(data: object) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{folder} cannot be made ({reason_of(error)})."
        raise WeightsError(msg, "Set MEDSR_HOME to a folder that you may write.") from error
    return folder


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40] or "host"


def _owner() -> str:
    return f"{_host()}.{os.getpid()}"


def _owner_lives(part: Path) -> bool:
    """Whether a part file's writer may still be writing; a part without an owner's name has none."""
    match = re.search(r"\.([A-Za-z0-9-]+)\.(\d+)\.[0-9a-f]{8}\.part$", part.name)
    if match is None:
        return False
    if match[1] != _host():
        return _age_s(part) < FOREIGN_PART_AGE_S
    return _process_lives(int(match[2]))


def _process_lives(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end it there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _take_over(target: Path, part: Path) -> None:
    """Rename the longest abandoned part of `target` to ours; drop the others."""
    abandoned = [
        other
        for other in target.parent.glob(f"{target.name}.*part")
        if other.suffix == ".part" and not _owner_lives(other)
    ]
    for other in sorted(abandoned, key=_size, reverse=True):
        with contextlib.suppress(OSError):  # another job was quicker
            if part.exists():
                other.unlink()
            else:
                other.rename(part)


def _leave(part: Path, orphan: Path | None) -> None:
    with contextlib.suppress(OSError):
        if orphan is not None and _size(part) > 0:
            part.replace(orphan)
        else:
            part.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
