"""Where the reports and maps of `evaluate` and `compare` may go: never over an input, nor two under one name."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.formats.atomic import ANY_REMEDY, refuse_existing

_LOOKED_AT_BYTES = 1 << 16
_PAIRED = (".hdr", ".img")
"""Endings of the two files of one NIfTI or Analyze image."""
_CSV_HEADING = "subject,volume,slice,scale,model,"


def refuse_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Sequence[Path],
    *,
    maps: Mapping[str, Path | None] | None = None,
    overwrite: bool,
) -> None:
    """Tell before the work that its results have no place of their own.

    Args:
        outputs: text files by the option that names them, such as `--report`.
        inputs: files, and folders of images in which nothing is replaced but former reports.
        maps: images by the option that names them.
        overwrite: whether what exists may be replaced.

    Raises:
        ArgumentsError: two are one file, one is an input, is in the place of something that is no report, or exists
            and may not be replaced.
        RunError: a name is too long, or its folder may not be looked into.
    """
    texts = {option: path for option, path in outputs.items() if path is not None}
    images = {option: path for option, path in (maps or {}).items() if path is not None}
    named = {**texts, **images}
    _refuse_twice(named)
    for option, path in named.items():
        for source in inputs:
            _refuse_input(option, path, source)
        if path.is_dir():
            msg = f"{option} {mention(path)} is a folder."
            raise ArgumentsError(msg, "Name a file.")
        refuse_existing(path, overwrite, ANY_REMEDY)
    for option, path in texts.items():
        if path.is_file() and _beginning(path) is None:
            msg = f"{option} {mention(path)} is there already and is no report."
            raise ArgumentsError(msg, "Give another name: only texts are replaced by a report.")


def _refuse_twice(named: Mapping[str, Path]) -> None:
    options = list(named)
    for at, option in enumerate(options):
        for other in options[:at]:
            if _is_same(named[option], named[other]):
                msg = f"{other} and {option} name one file, {mention(named[option].name)}."
                raise ArgumentsError(msg, "Give each a name of its own.")


def _refuse_input(option: str, path: Path, source: Path) -> None:
    if _is_same(path, source):
        msg = f"{option} {mention(path.name)} is an input."
        raise ArgumentsError(msg, "Give another name; an input is never changed.")
    below = source.is_dir() and Path(os.path.realpath(source)) in Path(os.path.realpath(path)).parents
    # Not only what is measured: masks, guides and images that patterns leave out lie there too.
    if below and path.is_file() and not is_former_report(path):
        msg = f"{option} {mention(path.name)} is a file of the input folder {mention(source.name or source)}."
        raise ArgumentsError(msg, "Give another name; nothing in an input folder is replaced but former reports.")


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, however they are spelt and through whatever links."""
    if {os.path.realpath(path) for path in _files_of(one)} & {os.path.realpath(path) for path in _files_of(other)}:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _files_of(path: Path) -> list[Path]:
    if path.suffix.lower() not in _PAIRED:
        return [path]
    return [path, *(path.with_suffix(ending) for ending in _PAIRED)]


def is_former_report(path: Path) -> bool:
    """Whether a file begins as what medsr writes under --report, --csv or --html."""
    text = _beginning(path)
    if text is None:
        return False
    if text.lstrip().startswith("{"):
        return '"notice"' in text[:200]
    return text.startswith(_CSV_HEADING) or (text.lower().startswith("<!doctype html") and "medsr" in text)


def _beginning(path: Path) -> str | None:
    """The first characters of a text file; None for any other, and for one that cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_LOOKED_AT_BYTES)
        # A character may be cut in two at the end of what was read.
        return None if b"\0" in head else codecs.getincrementaldecoder("utf-8")().decode(head)
    except (OSError, UnicodeDecodeError):
        return None
