"""What a batch's record knows of files without naming them: which input, in what state, and where its results are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medsr_cli import formats
from medsr_cli.tasks.inputs import Places, folder_within, is_own_result

_NAMELESS = re.compile(r"(series-)?[0-9]+(-stack-[0-9]+)?(\.[0-9]+)*(\.[a-z]+)*")
"""Parts of a result's path that can hold no name: numbers, the series of a study."""
_DATA_SUFFIXES = (".raw", ".raw.gz", ".zraw", ".img", ".img.gz")
"""Beside the ones of the table of formats: what a header's voxels lie in."""
ITSELF = "-"
"""In the place of a result's name: the one that -o names."""


@dataclass(frozen=True)
class InputState:
    """The files of an input, as far as can be seen without opening them."""

    files: int
    bytes: int
    state: str
    """Hash of their names, sizes and times of change."""

    def facts(self) -> dict[str, int | str]:
        """For the record."""
        return {"files": self.files, "bytes": self.bytes, "state": self.state}


def key_of(places: Places, sources: Sequence[Path]) -> str:
    """What an input is known by: its path within the tree that results mirror, or that was named; else its own.

    So the same tree is the same batch under another mount point, or from another working directory.
    """
    tree = places.tree
    if tree is None and len(places.inputs) == 1 and places.inputs[0].is_dir():
        tree = Path(os.path.abspath(places.inputs[0]))
    return "\0".join(_key(tree, Path(os.path.abspath(source))) for source in sources)


def _key(tree: Path | None, source: Path) -> str:
    if tree is not None and (source == tree or tree in source.parents):
        return source.relative_to(tree).as_posix()
    return str(source)


def state_of(places: Places, sources: Sequence[Path], hidden: Callable[[str], str]) -> InputState:
    """How the files of an input are now; results of ours that stand within an input folder are not of it.

    Args:
        places: where things are and go.
        sources: a file, a folder or an archive; several for registered channels.
        hidden: a hash that does not give away what it was made of.
    """
    lines, total = [], 0
    for number, source in enumerate(sources):
        for file in _files_of(places, source):
            try:
                about = file.stat()
            except OSError:
                continue  # not there: one file less is another state
            total += about.st_size
            name = file.relative_to(source).as_posix() if file != source and source in file.parents else file.suffix
            lines.append(f"{number} {name} {about.st_size} {about.st_mtime_ns}")
    return InputState(len(lines), total, hidden("\n".join(lines)))


def _files_of(places: Places, source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        yield from _detached(source)
        return
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if _is_of_the_input(places, Path(folder, name), source))
        yield from (file for name in sorted(names) if _is_of_the_input(places, file := Path(folder, name), source))


def _is_of_the_input(places: Places, path: Path, source: Path) -> bool:
    """Neither hidden nor a result that an earlier run put there."""
    return not path.name.startswith(".") and not is_own_result(path, places, source)


def _detached(source: Path) -> Iterator[Path]:
    """The files that may hold the voxels of a header."""
    entry = formats.format_of_name(source)
    if entry is None or source.suffix.lower() not in (".hdr", ".nhdr", ".mhd", ".par", ".head"):
        return
    stem = formats.stem_of_name(source)
    for suffix in dict.fromkeys((*entry.data_suffixes, *_DATA_SUFFIXES)):
        for spelled in (suffix, suffix.upper()):
            path = source.with_name(stem + spelled)
            if path.exists():
                yield path
                break


def folder_of_results(places: Places, source: Path) -> Path:
    """Where the results of an input of several stand."""
    if places.output is not None:
        return places.output / folder_within(places, source)
    return (source if source.name else source.resolve()).parent


def name_for_record(places: Places, source: Path, output: Path) -> str | None:
    """A result's path relative to where results stand, with `*N*` for the source's name less its last N characters.

    None where the result's name is not made of the source's.

    Whoever has the source can tell where the result is; whoever has the record alone learns no name from it.
    """
    if output == places.output:
        return ITSELF
    try:
        parts = output.relative_to(folder_of_results(places, source)).parts
    except ValueError:
        return None
    shown = [_shown(part, source) for part in parts]
    return "/".join(part for part in shown if part) if all(shown) and parts else None


def _shown(part: str, source: Path) -> str | None:
    stem = next((stem for stem in _stems(source) if part.startswith(stem)), None)
    if stem is not None:
        return f"*{len(_name(source)) - len(stem)}*{part[len(stem) :]}"
    return part if _NAMELESS.fullmatch(part) else None


def _stems(source: Path) -> list[str]:
    """What a result's name may begin with, the longest first."""
    name = _name(source)
    short = name[: -len(".zip")] if name.lower().endswith(".zip") else name
    return sorted({name, short, Path(name).stem, formats.stem_of_name(Path(name))} - {""}, key=lambda s: -len(s))


def _name(source: Path) -> str:
    return source.name or source.resolve().name


def place_of(places: Places, source: Path, shown: str) -> Path | None:
    """Where the result stands whose path in the record is `shown`; None if that is not a path of a result."""
    if shown == ITSELF:
        return places.output
    name = _name(source)
    parts = []
    for part in shown.split("/"):
        found = re.fullmatch(r"\*([0-9]+)\*(.*)", part, re.DOTALL)
        if found is None and not _NAMELESS.fullmatch(part):
            return None
        parts.append(part if found is None else name[: len(name) - int(found[1])] + found[2])
    path = folder_of_results(places, source).joinpath(*parts)
    return None if ".." in path.parts[-len(parts) :] else path


def size_of(path: Path) -> tuple[int, int] | None:
    """Files and bytes of a result, a file or a folder; None if it is not there."""
    try:
        if not path.is_dir():
            return 1, path.stat().st_size
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    except OSError:
        return None
    return len(sizes), sum(sizes)
