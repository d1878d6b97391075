"""The only place that writes results: a result appears under its name when it is whole, or not at all.

A file or folder is written beside its target under a hidden temporary name, flushed to the disk, verified,
and renamed. Whatever stops a run leaves the target as it was; what a killed run left under a temporary name
is removed by `sweep_stale` of the next run that writes into the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from medsr_cli.errors import ArgumentsError, RunError, mention, reason_of

Verify = Callable[[Path], None]

UPSCALE_REMEDY = "Give --overwrite to replace it, --skip-existing to keep it, or another -o."
ANY_REMEDY = "Give --overwrite to replace it, or another name."
"""For commands without --skip-existing, and where the writer does not know whose result it is."""

_TEMPORARY = re.compile(r"^\.medsr-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}\.(part|lock)$")


@contextlib.contextmanager
def atomic_file(target: Path, *, overwrite: bool = False, verify: Verify | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `target` when the block ends without an error.

    Args:
        target: the final name; its folder is made if it is missing.
        overwrite: whether an existing target may be replaced.
        verify: called with the temporary path after it is on the disk; what it raises keeps the target away.

    Raises:
        RunError: the target exists, its folder cannot be written, or the disk is full.
    """
    with (
        atomic_path(target, overwrite=overwrite, verify=verify) as temporary,
        _opened(temporary, target) as file,
    ):
        yield file
        _flush(file)


@contextlib.contextmanager
def atomic_path(target: Path, *, overwrite: bool = False, verify: Verify | None = None) -> Iterator[Path]:
    """Like `atomic_file`, for writers that want a path (an empty file stands there already)."""
    refuse_existing(target, overwrite, ANY_REMEDY)
    _make_folder(target)
    sweep_stale(target.parent)
    temporary = temporary_beside(target)
    try:
        with _reported(target):
            lock = _locked(temporary)
            try:
                yield temporary
                _fsync_path(temporary)
                if verify is not None:
                    verify(temporary)
                refuse_existing(target, overwrite, ANY_REMEDY)
                os.replace(temporary, target)
            finally:
                lock.close()
            _fsync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool = False, verify: Verify | None = None, flushed: bool = False
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, whole, when the block ends without an error.

    `flushed` says that whoever filled it has brought every file to the disk already.
    """
    refuse_existing(target, overwrite, ANY_REMEDY)
    _make_folder(target)
    sweep_stale(target.parent)
    temporary = temporary_beside(target)
    guard = temporary.with_suffix(".lock")
    try:
        with _reported(target):
            lock = _locked(guard)
            try:
                temporary.mkdir()
                yield temporary
                for path in () if flushed else temporary.rglob("*"):
                    _fsync_path(path)
                _fsync_folder(temporary)
                if verify is not None:
                    verify(temporary)
                refuse_existing(target, overwrite, ANY_REMEDY)
                _swap_folder(temporary, target)
            finally:
                lock.close()
            _fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            guard.unlink()


def file_within(folder: Path, name: str) -> BinaryIO:
    """A new file in a folder that `atomic_folder` yielded; it becomes whole together with that folder."""
    return (folder / name).open("xb")


def temporary_beside(target: Path) -> Path:
    """A fresh hidden name in the target's folder; it tells host and process, never the target's name."""
    return target.parent / f".medsr-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.part"


def sweep_stale(folder: Path) -> int:
    """Remove what killed runs of this host left in `folder`; returns how many were removed.

    A temporary of a live process, of another host, or one whose lock is held, is left alone.
    """
    removed = 0
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return 0
    for name in names:
        match = _TEMPORARY.match(name)
        if match is None or match["host"] != _host() or _alive(int(match["pid"])):
            continue
        path = folder / name
        if path.is_dir():
            guard = path.with_suffix(".lock")
            if not guard.exists() or _unlocked(guard):
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        elif _unlocked(path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def _host() -> str:
    # A hash: a machine's name may hold a person's or a department's.
    import hashlib  # noqa: PLC0415 - only writers pay for it

    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _locked(path: Path) -> IO[bytes]:
    file = path.open("xb")
    if sys.platform != "win32":
        import fcntl  # noqa: PLC0415 - not on Windows

        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _unlocked(path: Path) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl  # noqa: PLC0415 - not on Windows

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _opened(temporary: Path, target: Path) -> Iterator[BinaryIO]:
    with _reported(target), temporary.open("r+b") as file:
        yield file


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into sentences."""
    try:
        yield
    except OSError as error:
        raise _write_error(target, error) from error


def _write_error(target: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"The disk is full: {mention(target.name)} was not written.", "Free some space, or write elsewhere with -o."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(f"{mention(target.parent)} cannot be written to.", "Choose another place with -o.")
    if error.errno == errno.ENAMETOOLONG:
        return RunError("The name of the output is too long.", "Choose a shorter one with -o.")
    return RunError(f"Writing {mention(target.name)} failed: {reason_of(error)}.", "Nothing was left behind.")


def _make_folder(target: Path) -> None:
    with _reported(target):
        target.parent.mkdir(parents=True, exist_ok=True)


def refuse_existing(target: Path, overwrite: bool, remedy: str = UPSCALE_REMEDY) -> None:
    """Tell before the work that its result could not be written.

    Args:
        target: the final name.
        overwrite: whether it may be replaced.
        remedy: what to do about it, in terms of the options that the command has.

    Raises:
        ArgumentsError: the target exists and may not be replaced.
        RunError: the name is too long, or its folder may not be looked into.
    """
    with _reported(target):  # a name may be too long, or lie in a folder that may not be looked into
        exists = target.exists() or target.is_symlink()
    if exists and not overwrite:
        msg = f"{mention(target)} exists."
        raise ArgumentsError(msg, remedy)


def _swap_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    # A folder cannot be replaced in one step everywhere: the old one steps aside under a swept name.
    old = temporary_beside(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_path(path: Path) -> None:
    if path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
