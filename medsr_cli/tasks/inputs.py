"""What a command line's paths stand for, and where the result of each goes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from medsr_cli import formats
from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.formats.contract import Reader


class Places(Protocol):
    """The part of a request that says where things are and go."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """As they were named."""
        ...

    @property
    def output(self) -> Path | None:
        """File for one input, folder for several; None puts each result beside its input."""
        ...

    @property
    def ending(self) -> str:
        """What a result's name ends with."""
        ...

    @property
    def recursive(self) -> bool:
        """Whether folders are trees."""
        ...

    @property
    def tree(self) -> Path | None:
        """A folder, absolute, whose tree a folder of results mirrors beside those that are named; None for none."""
        ...


def found_inputs(request: Places) -> Iterator[Path]:
    """The inputs as they were named; folders of images, and trees with `recursive`, are walked in order.

    DICOM files of one folder are one input, the folder; all other images are inputs of their own. A folder with
    nothing in it that looks like an image is handed on, to be refused with its reason, and so is one that cannot be
    looked into. Linked folders of a tree are walked like others, but none twice.
    """
    for path in request.inputs:
        if not path.is_dir():
            yield path
            continue
        folders, closed = _tree_of(path, request) if request.recursive else ([path], [])
        found: list[Path] = []
        for folder in folders:
            try:
                found += images_in(folder)
            except OSError:
                closed.append(folder)
        # What an earlier run put beside its inputs is not an input of the next one.
        images = [image for image in found if not is_own_result(image, request, path)]
        yield from without_results(images, request, path) or [path]
        yield from (folder for folder in closed if folder != path or found)


def _tree_of(root: Path, request: Places) -> tuple[list[Path], list[Path]]:
    """The folders of a tree in order without those of results, and those that cannot be looked into."""
    seen: set[str] = set()
    folders: list[Path] = []
    closed: list[Path] = []
    roots = [root]
    while roots:
        links: list[Path] = []
        for top in roots:
            for place, names, _ in os.walk(top, onerror=lambda error: closed.append(Path(error.filename))):
                real = os.path.realpath(place)
                if real in seen:
                    names.clear()
                    continue
                seen.add(real)
                folder = Path(place)
                folders.append(folder)
                inner = [folder / name for name in names]
                links += [path for path in inner if path.is_symlink() and not _leads_up(path, root)]
                names[:] = [path.name for path in inner if not _is_folder_of_results(path, request, root)]
        # A link may lead to what is met by its own name too: that one counts, so links come last.
        roots = sorted(links)
    return sorted(folders), sorted(set(closed))


def _leads_up(link: Path, root: Path) -> bool:
    """Whether a link leads out of a tree to a folder that holds it, and so to what nobody named."""
    return os.path.realpath(root).startswith(os.path.join(os.path.realpath(link), ""))


def distinct(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file once, however its path is spelled; the first spelling is kept."""
    seen: set[str] = set()
    for path in paths:
        spelled = os.path.abspath(path)
        if spelled not in seen:
            seen.add(spelled)
            yield path


def is_own_result(path: Path, request: Places, root: Path) -> bool:
    """Whether an image met below `root` is a result of this request, or a map beside one, of an earlier run.

    Results that stand among the inputs are told by their names; a folder of results within the tree holds nothing else.
    """
    if _is_folder_of_results(path, request, root):
        return True
    return _stands_among_inputs(request, root) and source_stem(path, request) is not None


def source_stem(path: Path, request: Places) -> str | None:
    """The stem of the input that a result of this name would be of; None for other names."""
    if not request.ending:
        return None
    stem = _stem(path)
    for extra in ("_spread", "_intermediate", "_consistency"):
        stem = stem.removesuffix(extra)
    return stem.removesuffix(request.ending) if stem.endswith(request.ending) else None


def without_results(listed: Sequence[Path], request: Places, root: Path) -> list[Path]:
    """Images without what an earlier run made of them, beside them or in its folder: `find` lists it with the rest."""
    sources = {(path.parent, _stem(path)) for path in listed}
    return [
        path
        for path in listed
        if (path.parent, source_stem(path, request)) not in sources and not _is_folder_of_results(path, request, root)
    ]


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else formats.stem_of_name(path)


def _stands_among_inputs(request: Places, root: Path) -> bool:
    """Whether results stand where the inputs below a folder do."""
    return request.output is None or _is_within(root, request.output)


def _is_folder_of_results(path: Path, request: Places, root: Path) -> bool:
    """Whether a path is the folder of results, or in it, where that is a folder within `root`."""
    return request.output is not None and _is_within(path, request.output) and not _is_within(root, request.output)


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, as far as their names tell."""
    outer, inner = os.path.abspath(folder), os.path.abspath(path)
    return inner == outer or inner.startswith(os.path.join(outer, ""))


def images_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a DICOM series, and every image in it that is not DICOM."""
    series = [folder] if formats.is_image_name(folder) else []
    return series + [p for p in sorted(folder.iterdir()) if is_plain_image(p)]


def is_plain_image(path: Path) -> bool:
    """Whether a path is, by its name, an image file of its own rather than a slice of a DICOM series."""
    entry = formats.format_of_name(path)
    return path.is_file() and formats.is_image_name(path) and entry is not None and entry.name != "dicom"


def target_of(request: Places, ending: str, reader: Reader, several: bool) -> Path:
    """Where the result of one input goes; `ending` is what its name ends with."""
    output = request.output
    beside_input = formats.default_name(reader.path, ending, reader.volume.format)
    if output is None:
        return beside_input
    if several or (output.is_dir() and not reader.path.is_dir()):
        # A folder of results: each keeps its input's name, and trees keep their folders.
        return output / folder_within(request, reader.path) / beside_input.name
    return output


def clashing(request: Places, sources: Iterable[Path]) -> dict[Path, Path]:
    """Inputs whose results would have the name of an earlier one's, and that one: of two, the first has the name.

    By names alone, so that it is the same however many threads, processes and runs share the inputs. An image whose
    name does not tell its format may be found out later.
    """
    first: dict[Path, Path] = {}
    found: dict[Path, Path] = {}
    for source in sources:
        name = formats.default_name(source, request.ending).name
        folder = source.parent if request.output is None else request.output / folder_within(request, source)
        winner = first.setdefault(folder / name, source)
        if winner != source:
            found[source] = winner
    return found


def refuse_one_file(output: Path | None, study: Path) -> None:
    """Several results of a study go into a folder.

    Raises:
        ArgumentsError: the output is named like a file.
    """
    if output is not None and formats.format_of_name(output) is not None:
        msg = f"The series of {mention(study.name)} do not go into one file, {mention(output.name)}."
        raise ArgumentsError(msg, "Give a folder with -o, or one series with --series.")


def refuse_file_for_several(output: Path | None) -> None:
    """Results of several inputs go into a folder.

    Raises:
        ArgumentsError: the output is a file, or named like one.
    """
    if output is None or output.is_dir():
        return
    if output.exists() or formats.format_of_name(output) is not None:
        msg = f"There are several inputs, or a folder of images, but {mention(output.name)} is one file."
        raise ArgumentsError(msg, "Give a folder with -o.")


def place_in_study(target: Path, folder_name: str) -> Path:
    """Where one of several results of a study goes: a folder of its own within that of the study."""
    is_file = formats.format_of_name(target) is not None
    return (target.with_name(formats.stem_of_name(target)) if is_file else target) / folder_name


def folder_within(request: Places, path: Path) -> Path:
    """The folders between a named tree and an image in it; never one outside of the tree."""
    absolute = Path(os.path.abspath(path))
    if request.tree is not None and request.tree in absolute.parents:
        return absolute.relative_to(request.tree).parent
    if request.recursive:
        named = _as_set(request.inputs)
        for folder in reversed(path.parents):
            if folder in named and ".." not in (within := path.relative_to(folder).parent).parts:
                return within
    return Path()


_named: tuple[tuple[Path, ...], frozenset[Path]] = ((), frozenset())
"""The inputs of the request that was asked about last, and the set of them: a list may hold thousands."""


def _as_set(inputs: tuple[Path, ...]) -> frozenset[Path]:
    global _named  # noqa: PLW0603 - one assignment, of what can be made again at any time
    known = _named
    if known[0] is not inputs:
        known = _named = (inputs, frozenset(inputs))
    return known[1]


def refuse_same(source: Path, target: Path) -> None:
    """An input is never changed.

    Raises:
        ArgumentsError: the target is the input, or lies inside an input folder, or the other way round.
    """
    a, b = source.resolve(), target.resolve()
    if a == b:
        msg = f"{mention(target.name)} is the input itself."
        raise ArgumentsError(msg, "Give another name with -o; an input is never changed.")
    if source.is_dir() and a in b.parents and b.parent == a and not target.suffix:
        return
    if b in a.parents:
        msg = f"The output folder {mention(target.name)} holds the input."
        raise ArgumentsError(msg, "Give another place with -o; an input is never changed.")


def beside(output: Path | None, ending: str) -> Path | None:
    """The name of a side file of a result."""
    return None if output is None else output.with_name(output.name + ending)
