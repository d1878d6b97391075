"""Where DICOM files come from: one file, a folder, or a zip archive, opened one at a time.

A path never comes from a tag or from an archive's entry: files are named by the walk that found them, and
entries are read into memory (or an unnamed spool), never unpacked.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import struct
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import pydicom
import pydicom.config
from isal import isal_zlib
from pydicom.dataset import FileDataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats import boundary
from medsr_cli.formats.bounded import BoundedFile, open_bounded
from medsr_cli.formats.dicom_sequences import check_header
from medsr_cli.formats.limits import MIB, Limits, allowed

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

HARMLESS_BYTES = MIB
"""A file of this size cannot have so many elements that reading them takes long; larger ones are looked through."""

_META_GROUP = 0x0002
_DEFLATED = DeflatedExplicitVRLittleEndian.encode()


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
    """Turn whatever a library raises into `InputRefused`: `name` could not be read, at `stage`; warnings are silent."""
    says = f"is damaged or not DICOM as the standard has it: {stage} failed ({{error}})"
    with boundary.refusing(name, says, "Export it anew from where it came from."), _WITHOUT_WARNINGS:
        yield


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
        return open_bounded(self.path)

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
        with self.archive.open(self.info) as packed:
            if self.info.file_size <= SPOOL_BYTES:
                return io.BytesIO(packed.read())
            spool: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller closes it
            while part := packed.read(MIB):
                spool.write(part)
        spool.seek(0)
        return BoundedFile(spool)

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


class HeaderFile:
    """A file for pydicom to read a header from, which is not read from more often than a header can need."""

    def __init__(self, file: IO[bytes], name: str, reads: int) -> None:
        """Args: the file, at its beginning; what a sentence calls it; how often it may be read from."""
        self.tell, self.seek = file.tell, file.seek
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._read = file.read
        self._name = name
        self._reads_left = reads

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes.

        Raises:
            InputRefused: it was read from too often: there are more elements than is allowed.
        """
        if self._reads_left == 0:
            msg = f"{mention(self._name)} has more header elements than is allowed for its size."
            raise InputRefused(msg, "Check the header.")
        self._reads_left -= 1
        return self._read(size)


def read_header(member: Member, limits: Limits | None = None) -> FileDataset:
    """All tags of one file but its pixels.

    Raises:
        Exception: whatever pydicom raises; call it under `refusing`.
    """
    with opened_header(member, limits) as (file, syntax):
        dataset = pydicom.dcmread(cast("BinaryIO", file), stop_before_pixels=True)
    if syntax == DeflatedExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


@contextlib.contextmanager
def opened_header(member: Member, limits: Limits | None = None) -> Iterator[tuple[HeaderFile, UID]]:
    """A file for pydicom to read a header from, its bytes and elements within the limits, and its transfer syntax.

    What is deflated stands there inflated, as a file in explicit little endian.

    Raises:
        InputRefused: the header has more than is allowed, or nests sequences too deeply.
        Exception: whatever pydicom raises about the file meta information; call it under `refusing`.
    """
    limits = limits or allowed()
    with member.open() as raw:
        file, syntax = inflated(raw, member.name, limits)
        header = HeaderFile(file, member.name, 2 * limits.most_elements(member.size))
        if header.size > HARMLESS_BYTES:
            implicit, big = syntax == ImplicitVRLittleEndian, syntax == ExplicitVRBigEndian
            check_header(file, header.size, member.name, limits, implicit=implicit, big=big)
            file.seek(0)
        yield header, syntax


def inflated(file: IO[bytes], name: str, limits: Limits) -> tuple[IO[bytes], UID]:
    """The file at its beginning, or its inflated copy in memory if it is deflated; and the transfer syntax it names.

    Raises:
        InputRefused: it inflates to more than is allowed.
    """
    file.seek(HEAD_BYTES)
    meta = read_dataset(cast("BinaryIO", file), False, True, stop_when=_after_meta)
    start = file.tell()
    syntax = UID(str(meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian))
    file.seek(0)
    if syntax != DeflatedExplicitVRLittleEndian:
        return file, syntax
    head = file.read(start).replace(_DEFLATED, ExplicitVRLittleEndian.encode().ljust(len(_DEFLATED), b"\0"), 1)
    return io.BytesIO(head + _inflated_bytes(file.read(), name, limits)), syntax


def _after_meta(tag: int, vr: str | None, length: int) -> bool:
    del vr, length
    return tag >> 16 != _META_GROUP


def _inflated_bytes(packed: bytes, name: str, limits: Limits) -> bytes:
    most = min(limits.held_bytes, limits.most_decoded(len(packed)))
    decoder = isal_zlib.decompressobj(-15)
    plain: bytes = decoder.decompress(packed, most + 1)
    if len(plain) > most:
        msg = f"{mention(name)} inflates to more than {most} bytes, more than is allowed for its size."
        raise InputRefused(msg, "It may be a decompression bomb; save it without deflation if it is not.")
    if not decoder.eof:
        msg = f"{mention(name)} is cut short: its deflated part has no end."
        raise InputRefused(msg, "Copy or export it again.")
    return plain


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
    size = path.stat().st_size
    _check_directory(path, size, limits)
    archive = zipfile.ZipFile(path)
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _check_count(path, len(infos), limits)
    limits.check_expansion(path, sum(info.file_size for info in infos), size)
    if sum(info.compress_size for info in infos) > size:
        msg = f"{mention(path.name)} has entries that overlap, as only a decompression bomb has them."
        raise InputRefused(msg, "Unpack it, look at it, and give the folder.")
    if any(info.flag_bits & 1 for info in infos):
        msg = f"{mention(path.name)} is encrypted."
        raise InputRefused(msg, "Unpack it and give the folder.")
    members = [ZipMember(archive, info) for info in infos]
    named = [member for member in members if member.name and not member.name.startswith(".")]
    return [*sorted(named, key=lambda member: member.info.filename)]


def _check_directory(path: Path, size: int, limits: Limits) -> None:
    """Refuse an archive whose list of files is too long to be taken apart in Python.

    The list stands at the end, before a record that tells its length (APPNOTE.TXT 4.3.12 to 4.3.16).
    """
    with path.open("rb") as file:
        file.seek(max(size - limits.metadata_bytes, 0))
        tail = file.read(limits.metadata_bytes)
    end = tail.rfind(b"PK\x05\x06")
    long = tail.rfind(b"PK\x06\x06", 0, max(end, 0))
    listed = 0
    if len(tail) - end >= 22 and end >= 0:
        (listed,) = struct.unpack_from("<L", tail, end + 12)
    if listed == 0xFFFFFFFF and 0 <= long <= len(tail) - 48:
        (listed,) = struct.unpack_from("<Q", tail, long + 40)
    if listed > len(tail) or tail.count(b"PK\x01\x02", max(end - listed, 0)) > limits.files:
        raise _too_many(path, limits)


def _check_count(path: Path, count: int, limits: Limits) -> None:
    if count > limits.files:
        raise _too_many(path, limits)


def _too_many(path: Path, limits: Limits) -> InputRefused:
    msg = f"{mention(path.name)} holds more than {limits.files} files."
    return InputRefused(msg, "Give the folder of one study.")
