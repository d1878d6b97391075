"""Lists of paths from a file or from standard input: what `find`, a database or a Windows machine wrote."""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from medsr_cli.errors import ArgumentsError, InputRefused, mention, reason_of

STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 16
LONGEST_PATH_BYTES = 1 << 16
"""Far above what any system takes (Linux 4096, Windows 32767 characters): a longer one is not a path."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def paths_from(name: str, *, nul: bool = False, say: Callable[[str], None] | None = None) -> Iterator[Path]:
    """The paths of a list, in its order, each once, read block by block as they are asked for.

    Bytes that are not UTF-8 come through as they are, as names on disk may hold them. A million paths cost what the
    16 bytes cost by which each is known again, about 100 MB, however long they are.

    Args:
        name: a file, or `-` for standard input.
        nul: paths end with a NUL byte, as of `find -print0`, and hold whatever else. Otherwise one stands on each
            line; blank lines, a carriage return at the end of a line and a byte order mark in front are passed over.
        say: is told at the end how many paths stood there more than once.

    Raises:
        InputRefused: the list cannot be read.
        ArgumentsError: it is UTF-16, or not a list of paths of this kind.
    """
    seen: set[bytes] = set()
    repeated = 0
    for record in _records(name, nul):
        path = _path_of(record)
        mark = hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
        if mark in seen:
            repeated += 1
            continue
        seen.add(mark)
        yield path
    if repeated and say is not None:
        lines = "line repeats a path" if repeated == 1 else "lines repeat paths"
        say(f"{repeated} {lines} that the list had before; each path is taken once.")


def _records(name: str, nul: bool) -> Iterator[bytes]:
    """What stands between the separators, without empty ones."""
    shown = "standard input" if name == STANDARD_INPUT else mention(Path(name).name)
    separator = b"\0" if nul else b"\n"
    rest, first = b"", True
    try:
        with _opened(name) as file:
            while block := file.read(BLOCK_BYTES):
                if first:
                    block, first = _without_mark(block, shown, nul), False
                *whole, rest = (rest + block).split(separator)
                for record in whole:
                    yield from _checked(record, shown, nul)
                if len(rest) > LONGEST_PATH_BYTES:
                    yield from _checked(rest, shown, nul)
    except OSError as error:
        msg = f"The list of inputs in {shown} cannot be read: {reason_of(error)}."
        raise InputRefused(msg, "Check what --files-from names.") from error
    yield from _checked(rest, shown, nul)


def _opened(name: str) -> nullcontext[BinaryIO] | BinaryIO:
    # Standard input stays open: it is not ours to close.
    return nullcontext(sys.stdin.buffer) if name == STANDARD_INPUT else Path(name).open("rb")


def _without_mark(block: bytes, shown: str, nul: bool) -> bytes:
    """The first block without a byte order mark, which Windows puts in front of text."""
    if nul:
        return block
    if block.startswith(_UTF16):
        msg = f"The list of inputs in {shown} is UTF-16."
        raise ArgumentsError(msg, "Save it as UTF-8 (in PowerShell: Out-File -Encoding utf8).")
    return block.removeprefix(codecs.BOM_UTF8)


def _checked(record: bytes, shown: str, nul: bool) -> Iterator[bytes]:
    if not nul:
        record = record.removesuffix(b"\r")
        if b"\0" in record:
            msg = f"The list of inputs in {shown} holds NUL bytes."
            raise ArgumentsError(msg, "Add -0 if they separate its paths, as those of find -print0 do.")
    if len(record) > LONGEST_PATH_BYTES:
        msg = f"The list of inputs in {shown} has an entry of more than {LONGEST_PATH_BYTES} bytes."
        ended = "Leave -0 away if its paths stand on lines." if nul else "Give a list with one path on each line."
        raise ArgumentsError(msg, ended)
    if record if nul else record.strip():
        yield record


def _path_of(record: bytes) -> Path:
    """The file system's own reading of the bytes: UTF-8 with surrogate escapes on POSIX, so that all come through."""
    try:
        return Path(os.fsdecode(record))
    except UnicodeDecodeError:
        return Path(record.decode("utf-8", "surrogateescape"))  # Windows, whose names cannot hold such bytes
