"""What a command line's paths stand for, and where the result of each goes."""

from __future__ import annotations

from collections.abc import Iterator
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


def found_inputs(request: Places) -> Iterator[Path]:
    """The inputs as they were named; folders of images, and trees with `recursive`, are walked in order.

    DICOM files of one folder are one input, the folder; all other images are inputs of their own. A folder with
    nothing in it that looks like an image is handed on, to be refused with its reason.
    """
    for path in request.inputs:
        if not path.is_dir():
            yield path
            continue
        folders = [path]
        if request.recursive:
            folders += [p for p in sorted(path.rglob("*")) if p.is_dir()]
        found = [image for folder in folders for image in images_in(folder)]
        # What an earlier run put beside its inputs is not an input of the next one.
        yield from [image for image in found if not is_own_result(image, request)] or [path]


def is_own_result(path: Path, request: Places) -> bool:
    """Whether an image met in a folder has the name of a result of this request, or of a map beside one."""
    if request.output is not None or not request.ending:
        return False
    stem = path.name if path.is_dir() else formats.stem_of_name(path)
    for extra in ("_spread", "_intermediate", "_consistency"):
        stem = stem.removesuffix(extra)
    return stem.endswith(request.ending)


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


def folder_within(request: Places, path: Path) -> Path:
    """The folders between a named tree and an image in it."""
    for named in request.inputs:
        if request.recursive and named in path.parents:
            return path.relative_to(named).parent
    return Path()


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
