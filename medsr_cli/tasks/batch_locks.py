"""Locks by which processes share a batch: on one machine, on several, on file systems that do not lock.

A lock is a file that only one process can have made: it is written under a name of its own and linked to the lock's.
Who made it is alive as long as they hold `flock` on it, which the system drops when a process dies; a machine without
sight of that (another one, NFS) goes by the file's time, which the holder renews every HEARTBEAT_S.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from pathlib import Path

from medsr_cli.errors import RunError, mention, reason_of

HEARTBEAT_S = 20.0
STALE_S = 180.0
"""A lock of another machine that was not renewed for so long is of a dead process."""
SHORTEST_POLL_S = 0.001
LONGEST_POLL_S = 0.1
LEFT_OVER_S = 3600.0
"""Files that a process made on the way to a lock, and did not live to remove, are older than this."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EMLINK)


class Lock:
    """A lock that is held; `release` gives it back."""

    def __init__(self, locks: Locks, path: Path, descriptor: int) -> None:
        self._locks, self.path, self.descriptor = locks, path, descriptor
        self._released = False

    def release(self) -> None:
        """Give it back; its file goes away, unless another process has taken it for dead meanwhile."""
        self._locks.forget(self)
        if self._released:
            return  # its descriptor may be another file's by now
        self._released = True
        ours = _identity(self.descriptor)
        if sys.platform == "win32":
            os.close(self.descriptor)  # an open file cannot be removed there
        with contextlib.suppress(OSError):
            if _identity(self.path) == ours:
                self.path.unlink()
        if sys.platform != "win32":
            os.close(self.descriptor)  # only now, so that no other process has it before its name is gone

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Locks:
    """The locks in one folder.

    Args:
        folder: made when the first lock is taken.
        flock: whether `flock` may tell who is alive; None finds out whether it does on this file system.
        stale_s: after how many seconds without a sign a lock of another machine counts as dead.
    """

    def __init__(self, folder: Path, *, flock: bool | None = None, stale_s: float = STALE_S) -> None:
        self.folder, self.stale_s = folder, stale_s
        self._flock = flock
        self._machine = _machine()
        self._held: list[Lock] = []
        self._guard = threading.Lock()
        self._heart: threading.Thread | None = None
        self._ended = threading.Event()

    def claim(self, name: str) -> Lock | None:
        """The lock, or None while another process (or this one) holds it.

        Raises:
            RunError: the folder cannot be written.
        """
        path = self.folder / f"{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._made(path) or self._taken_over(path)
        except FileNotFoundError:
            return None  # the folder has just been removed by a run that ended: the next attempt makes it anew
        except OSError as error:
            msg = f"{mention(self.folder)} cannot be locked: {reason_of(error)}."
            raise RunError(msg, "Name a --batch-record in a folder that can be written.") from error
        if lock is not None:
            with self._guard:
                self._held.append(lock)
                self._beat()
        return lock

    def wait(self, name: str, timeout_s: float = 600.0) -> Lock:
        """The lock, as soon as nobody else holds it.

        Raises:
            RunError: the folder cannot be written, or it took longer than `timeout_s`.
        """
        pause, latest = SHORTEST_POLL_S, time.monotonic() + timeout_s
        while (lock := self.claim(name)) is None:
            if time.monotonic() > latest:
                msg = f"Another run has held a lock in {mention(self.folder.name)} for {timeout_s:.0f} s."
                raise RunError(msg, "End it, or remove that folder if nothing runs.")
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_POLL_S)
        return lock

    def is_held(self, name: str) -> bool:
        """Whether a process that is alive holds it."""
        if not (self.folder / f"{name}.lock").exists():
            return False
        lock = self.claim(name)
        if lock is None:
            return (self.folder / f"{name}.lock").exists()
        lock.release()
        return False

    def forget(self, lock: Lock) -> None:
        """A lock that was given back needs no sign of life."""
        with self._guard:
            self._held = [held for held in self._held if held is not lock]

    def close(self) -> None:
        """Give everything back, and remove the folder if nobody else has a lock in it."""
        self._ended.set()
        with self._guard:
            held = list(self._held)
        for lock in held:
            lock.release()
        with contextlib.suppress(OSError, RunError):
            self._sweep()
            self.folder.rmdir()

    def _sweep(self) -> None:
        """Remove what killed runs left: their locks, and files that never became one."""
        for path in self.folder.iterdir():
            if path.suffix == ".lock":
                lock = self.claim(path.stem)
                if lock is not None:
                    lock.release()
            elif path.suffix in (".new", ".old") and self._is_left_over(path):
                path.unlink()

    def _own_name(self) -> Path:
        """A fresh name on the way to a lock, which tells whose it is."""
        return self.folder / f"{self._machine}-{os.getpid()}-{uuid.uuid4().hex}.new"

    def _is_left_over(self, path: Path) -> bool:
        """Whether whoever made a file on the way to a lock is gone: seen on this machine, else guessed by its age."""
        machine, _, rest = path.name.partition("-")
        process = rest.partition("-")[0]
        if machine == self._machine and process.isdecimal() and not _is_alive(int(process)):
            return True
        return time.time() - path.stat().st_mtime > LEFT_OVER_S

    def _made(self, path: Path) -> Lock | None:
        """A lock whose file did not exist; it stands there only when it is whole and flocked."""
        own = self._own_name()
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, self._content())
            self._try_flock(descriptor)
            os.link(own, path)
        except FileExistsError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LINKS:
                return self._made_without_links(path)
            raise
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
        return Lock(self, path, descriptor)

    def _made_without_links(self, path: Path) -> Lock | None:
        """The same where files have one name only: empty for a moment, in which its age protects it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        self._try_flock(descriptor)
        os.write(descriptor, self._content())
        return Lock(self, path, descriptor)

    def _taken_over(self, path: Path) -> Lock | None:
        """The lock of a dead process, if it is that."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None  # given back just now: the next attempt makes it
        kept = False
        try:
            if self._machine_of(descriptor) == self._machine and self._sees_flock():
                # One machine: the system knows whether the holder is alive, and lets one successor in.
                kept = _flock(descriptor) and _identity(descriptor) == _identity(path)
                if kept:
                    os.utime(path)  # to other machines it is as fresh as its new holder
                return Lock(self, path, descriptor) if kept else None
            dead = _identity(descriptor) if self._age_s(descriptor) > self.stale_s else None
        finally:
            if not kept:
                os.close(descriptor)
        if dead is not None:
            self._set_aside(path, dead)
        return None  # the next attempt makes it

    def _set_aside(self, path: Path, dead: tuple[int, int]) -> None:
        """Remove a dead lock; of several who try, one gets the file, and puts back one that is not the dead one."""
        aside = self.folder / f"{uuid.uuid4().hex}.old"
        with contextlib.suppress(OSError):
            if _identity(path) != dead:
                return
            os.rename(path, aside)
            if _identity(aside) != dead:
                os.link(aside, path)
            aside.unlink()

    def _content(self) -> bytes:
        about = {"machine": self._machine, "process": os.getpid(), "token": uuid.uuid4().hex}
        return json.dumps(about).encode() + b"\n"

    def _machine_of(self, descriptor: int) -> str | None:
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            about = json.loads(os.read(descriptor, 1024))
            return str(about["machine"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _age_s(self, descriptor: int) -> float:
        """Seconds since the last sign of life, by the clock of whoever keeps the files."""
        probe = self._own_name()
        try:
            now = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.utime(probe)
                return os.stat(probe).st_mtime - os.fstat(descriptor).st_mtime
            finally:
                os.close(now)
                probe.unlink()
        except OSError:
            return 0.0

    def _sees_flock(self) -> bool:
        """Whether `flock` keeps others out here: on some network file systems it says yes to everyone."""
        if self._flock is None:
            self._flock = _flock_works(self._own_name())
        return self._flock

    def _try_flock(self, descriptor: int) -> bool:
        return self._sees_flock() and _flock(descriptor)

    def _beat(self) -> None:
        """Begin to give signs of life; the caller has the guard."""
        if self._heart is None:
            self._heart = threading.Thread(target=self._renew, name="medsr locks", daemon=True)
            self._heart.start()

    def _renew(self) -> None:
        while not self._ended.wait(min(HEARTBEAT_S, self.stale_s / 4)):
            with self._guard:
                for lock in self._held:
                    with contextlib.suppress(OSError):
                        os.utime(lock.descriptor if os.utime in os.supports_fd else lock.path)


def _machine() -> str:
    """Hash of what tells this system from others while it runs: containers on one machine are on the same."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except (OSError, ValueError):
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_alive(process: int) -> bool:
    """Whether there is a process of this number; another container's is not seen, and only has to try again."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flock(descriptor: int) -> bool:
    """Whether an exclusive `flock` was had without waiting."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flock_works(probe: Path) -> bool:
    """Whether one who has opened a file keeps out another who opens it: NFS lets the same process in twice."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        first = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(_removed, probe)
        stack.callback(os.close, first)
        second = os.open(probe, os.O_RDWR)
        stack.callback(os.close, second)
        return _flock(first) and not _flock(second)
    return False


def _removed(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _identity(file: int | Path) -> tuple[int, int] | None:
    """Which file a descriptor or a path is; None if it is gone."""
    try:
        about = os.stat(file)
    except OSError:
        return None
    return about.st_dev, about.st_ino
