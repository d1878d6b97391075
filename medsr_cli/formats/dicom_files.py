"""Where DICOM files come from: one file, a folder, or a zip archive, opened one at a time.

A path never comes from a tag or from an archive's entry: files are named by the walk that found them, and
entries are read into memory (or an unnamed spool), never unpacked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import pydicom
import pydicom.config
from pydicom.dataset import FileDataset

from medsr_cli.errors import InputRefused, MedsrError, mention
from medsr_cli.formats.limits import MIB, Limits

# Messages of pydicom quote tag values, which may be a patient's: none may reach a log or a terminal.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
# Values that break a rule of the standard are carried as they are; what matters here is checked here.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
"""Names that promise DICOM: such a file that is not one is reported, others are passed over."""

HEAD_BYTES = 132

SPOOL_BYTES = 64 * MIB
"""Entries of an archive up to this size stay in memory, larger ones go to an unnamed temporary file."""


class _WithoutWarnings:
    """Python's warnings off while any thread is inside.

    `warnings.catch_warnings` saves and restores for the whole process: of two threads the second would save what
    the first had silenced, and leave it so, or the first would let the second's warnings out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._kept.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._kept.close()


_WITHOUT_WARNINGS = _WithoutWarnings()


@contextlib.contextmanager
def refusing(name: str, stage: str) -> Iterator[None]:
    """Turn whatever a library raises into `InputRefused`: `name` could not be read, at `stage`.

    The library's own words are left out, for they may quote a tag's value.
    """
    try:
        with _WITHOUT_WARNINGS:
            yield
    except MedsrError:
        raise
    except RecursionError as error:
        msg = f"{mention(name)} nests sequences too deeply to be an image."
        raise InputRefused(msg) from error
    except FileNotFoundError as error:
        msg = f"{mention(name)} is not there."
        raise InputRefused(msg, "Check the path.") from error
    except PermissionError as error:
        msg = f"{mention(name)} may not be read."
        raise InputRefused(msg, "Check its permissions.") from error
    except MemoryError as error:
        msg = f"{mention(name)} needs more memory than there is, while {stage}."
        raise InputRefused(msg) from error
    except Exception as error:
        msg = (
            f"{mention(name)} is damaged or not DICOM as the standard has it: {stage} failed ({type(error).__name__})."
        )
        raise InputRefused(msg, "Export it anew from where it came from.") from error


class Member(Protocol):
    """One file among the input's files."""

    @property
    def name(self) -> str:
        """A name to tell it by, without a folder."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def open(self) -> IO[bytes]:
        """Open for reading, seekable."""
        ...

    def head(self) -> bytes:
        """The first 132 bytes: preamble and mark."""
        ...


@dataclass(frozen=True)
class FileMember:
    """A file of its own."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def open(self) -> IO[bytes]:
        """Open for reading."""
        return self.path.open("rb")

    def head(self) -> bytes:
        """Preamble and mark."""
        with self.path.open("rb") as file:
            return file.read(HEAD_BYTES)


@dataclass(frozen=True)
class ZipMember:
    """An entry of an archive, which stays open as long as one of its entries is known."""

    archive: zipfile.ZipFile = field(repr=False)
    info: zipfile.ZipInfo = field(repr=False)

    @property
    def name(self) -> str:
        """The entry's last part; told to the user, never used as a path."""
        return self.info.filename.replace("\\", "/").rsplit("/", 1)[-1]

    @property
    def size(self) -> int:
        """Bytes, unpacked."""
        return self.info.file_size

    def open(self) -> IO[bytes]:
        """Unpack into memory, or an unnamed temporary file where it is large."""
        spool: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the caller closes it
        with self.archive.open(self.info) as packed:
            shutil.copyfileobj(packed, spool, MIB)
        spool.seek(0)
        return spool

    def head(self) -> bytes:
        """Preamble and mark, without unpacking the rest."""
        with self.archive.open(self.info) as packed:
            return packed.read(HEAD_BYTES)


def find_members(path: Path, limits: Limits) -> list[Member]:
    """The files that `path` stands for, in the order of their names.

    Raises:
        InputRefused: it is not there, is no folder, file or readable zip, or holds too much.
    """
    with refusing(path.name, "looking for files"):
        if path.is_dir():
            return _folder_members(path, limits)
        if not path.is_file():
            msg = f"{mention(path.name)} is not there."
            raise InputRefused(msg, "Check the path.")
        if is_zip(path):
            return _zip_members(path, limits)
        return [FileMember(path, path.stat().st_size)]


def is_zip(path: Path) -> bool:
    """Whether a file starts as a zip archive does."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def has_mark(member: Member) -> bool:
    """Whether a file carries DICOM's mark after the preamble."""
    return member.size >= HEAD_BYTES and member.head()[128:] == b"DICM"


def promises_dicom(member: Member) -> bool:
    """Whether the name alone says DICOM."""
    return os.path.splitext(member.name)[1].lower() in SUFFIXES


def read_header(member: Member) -> FileDataset:
    """All tags of one file but its pixels.

    Raises:
        Exception: whatever pydicom raises; call it under `refusing`.
    """
    with member.open() as file:
        return pydicom.dcmread(file, stop_before_pixels=True)


def _folder_members(path: Path, limits: Limits) -> list[Member]:
    members: list[Member] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue  # .DS_Store, AppleDouble twins, temporaries of a run that goes on
            size = _regular_size(Path(folder, name))
            if size is not None:
                members.append(FileMember(Path(folder, name), size))
            _check_count(path, len(members), limits)
    return members


def _regular_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError:
        return 0  # a link to nowhere: its name decides whether a slice is missing
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _zip_members(path: Path, limits: Limits) -> list[Member]:
    archive = zipfile.ZipFile(path)
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _check_count(path, len(infos), limits)
    unpacked = sum(info.file_size for info in infos)
    allowed = max(limits.expansion_floor_bytes, limits.expansion * path.stat().st_size)
    if unpacked > min(allowed, limits.decoded_bytes):
        msg = f"{mention(path.name)} unpacks to {unpacked} bytes, more than is allowed for its size."
        raise InputRefused(msg, "Unpack it, look at it, and give the folder.")
    if any(info.flag_bits & 1 for info in infos):
        msg = f"{mention(path.name)} is encrypted."
        raise InputRefused(msg, "Unpack it and give the folder.")
    members = [ZipMember(archive, info) for info in infos]
    named = [member for member in members if member.name and not member.name.startswith(".")]
    return [*sorted(named, key=lambda member: member.info.filename)]


def _check_count(path: Path, count: int, limits: Limits) -> None:
    if count > limits.files:
        msg = f"{mention(path.name)} holds more than {limits.files} files."
        raise InputRefused(msg, "Give the folder of one study.")
