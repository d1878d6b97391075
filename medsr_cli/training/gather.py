"""From a folder of images to one packed file: what is found, whose it is, and what is left out and why.

A subject is a BIDS `sub-XX` in the path, else the first folder level, else the file itself. Validation is
split by subject, and an image that is there twice is taken once, so that nothing of what is validated on was
trained on.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.contract import Reader
from medsr_cli.training.pack import PackedVolume, PackWriter
from medsr_cli.volume.intensity import IntensityRange, measure
from medsr_cli.volume.volume import Volume

FEWEST_VALUES = 16
"""An image with fewer distinct values is a label map or a drawing."""
SMALLEST_SIDE = 16
VALIDATION_SHARE = 0.15
VALIDATION_PREFIX = "val/"
"""Put before the subjects of a folder that is for validation alone, whose names may be those of others."""

_LABEL_WORD = re.compile(r"(.*mask|.*seg|segmentations?|.*labels?|.*parc)", re.IGNORECASE)
_BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(_|$)")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_SEVERAL_SUFFIXES = (".zip",)
_HEADER_SUFFIXES = (".hdr", ".nhdr", ".mhd", ".head", ".par")
"""Files whose pixels lie in another file of the same stem."""


@dataclass(frozen=True)
class Found:
    """An image to read: a file, or a DICOM series of a folder or an archive."""

    path: Path
    subject: str
    name: str
    """Path inside the folder that was searched."""
    validation: bool = False
    series: str | None = None
    """SeriesInstanceUID, where the path holds several."""


@dataclass
class Gathered:
    """What became of the images that were found."""

    volumes: int = 0
    slices: int = 0
    colour: int = 0
    """Volumes whose colours were averaged to grey."""
    skipped: list[str] = field(default_factory=list)
    """One sentence for each image that was left out."""


class Audience(Protocol):
    """Is told how the reading goes."""

    def packing(self, done: int, total: int) -> None:
        """So many of the images are read."""

    def note(self, sentence: str) -> None:
        """Something that a user should know."""


def find_images(
    folder: Path,
    is_image: Callable[[Path], bool],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    series_of: Callable[[Path], Sequence[str]] = lambda path: (),
) -> tuple[list[Found], list[str]]:
    """Every image below a folder, in a fixed order, and a sentence for each label map that was passed over.

    Args:
        folder: walked without following links; hidden names are passed over.
        is_image: whether a file is one image by its name, or a folder holds DICOM files directly.
        include: patterns (fnmatch) of names or paths; given, nothing else is taken, label maps neither refused.
        exclude: patterns of what to leave out.
        series_of: the SeriesInstanceUIDs in a folder or archive; each is an image of its own.
    """
    found: list[Found] = []
    skipped: list[str] = []
    for path in _candidates(folder, is_image):
        name = path.relative_to(folder).as_posix()
        if _matches(name, exclude) or (include and not _matches(name, include)):
            continue
        if not include and is_label_name(path.name):
            skipped.append(f"{path.name} was left out: by its name it is a mask or a label map.")
            continue
        found += _series_apart(Found(path, subject_of(name), name), series_of)
    return found, skipped


def _candidates(folder: Path, is_image: Callable[[Path], bool]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            # Files of a series are taken with their folder, not one by one.
            if not name.startswith(".") and not name.lower().endswith(_DICOM_SUFFIXES) and is_image(path):
                yield path
        if is_image(Path(place)):
            yield Path(place)


def _series_apart(image: Found, series_of: Callable[[Path], Sequence[str]]) -> list[Found]:
    if not (image.path.is_dir() or image.path.name.lower().endswith(_SEVERAL_SUFFIXES)):
        return [image]
    try:
        series = series_of(image.path)
    except InputRefused:
        return [image]  # the reason is told when it is read
    if len(series) < 2:
        return [image]
    return [replace(image, name=f"{image.name}#{n}", series=uid) for n, uid in enumerate(series, 1)]


def is_label_name(name: str) -> bool:
    """Whether a file's name has a word for masks and label maps; OASIS's `masked` is an image."""
    return any(_LABEL_WORD.fullmatch(word) for word in re.split(r"[^A-Za-z0-9]+", name))


def subject_of(name: str) -> str:
    """Whose image it is, from its path inside the folder."""
    parts = PurePosixPath(name).parts
    for part in parts:
        match = _BIDS_SUBJECT.match(part)
        if match:
            return match[1]
    if len(parts) > 1:
        return parts[0]
    return name.split(".", maxsplit=1)[0] or name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(last, pattern) for pattern in patterns)


def split_subjects(subjects: Sequence[str], chosen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Subjects to train on and to validate on, the same ones whenever they are the same.

    Args:
        subjects: all of them, each once.
        chosen: patterns of those to validate on; none takes those of a validation folder, else about 15 %.

    Raises:
        InputRefused: there are fewer than two.
        ArgumentsError: the patterns leave no subject on one of the sides.
    """
    if len(subjects) < 2:
        msg = f"Images of {len(subjects)} subject were found; at least two are needed, one of them to validate on."
        raise InputRefused(msg, "Put the images of each subject into a folder of their own, or give --val DIR.")
    if chosen:
        held = [s for s in subjects if _matches(s, chosen)]
    elif any(s.startswith(VALIDATION_PREFIX) for s in subjects):
        held = [s for s in subjects if s.startswith(VALIDATION_PREFIX)]
    else:
        # By hash, so that neither the order nor an added subject moves the others across.
        order = sorted(subjects, key=lambda s: hashlib.sha256(s.encode()).digest())
        held = order[: max(round(VALIDATION_SHARE * len(subjects)), 1)]
    train = [s for s in subjects if s not in set(held)]
    if not held or not train:
        msg = f"That split leaves {len(train)} subjects to train on and {len(held)} to validate on."
        raise ArgumentsError(msg, "Name other subjects to validate on.")
    return train, held


def pack_images(
    found: Sequence[Found],
    open_reader: Callable[[Found], Reader],
    target: Path,
    audience: Audience,
    *,
    overwrite: bool = False,
) -> Gathered:
    """Read every image and write the packed file.

    Raises:
        InputRefused: nothing could be used.
        RunError: the file could not be written.
    """
    gathered = Gathered()
    seen: dict[str, str] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without a name of its own: whatever ends the run, it is gone.
    with tempfile.TemporaryFile(dir=target.parent) as pixels:
        writer = PackWriter(pixels)
        # Those to validate on come first, so that a copy of one of them is not trained on.
        for done, image in enumerate(sorted(found, key=lambda image: not image.validation)):
            audience.packing(done, len(found))
            try:
                reader = open_reader(image)
                kept = _pack_one(image, reader, writer, seen)
            except InputRefused as error:
                sentence = f"{image.path.name or image.name} was left out: {error.sentence}"
                gathered.skipped.append(sentence)
                audience.note(sentence)
                continue
            gathered.volumes += 1
            gathered.slices += kept
            gathered.colour += _colours(reader.volume) > 1
        audience.packing(len(found), len(found))
        if gathered.colour:
            audience.note(f"The colours of {gathered.colour} volumes were averaged to grey.")
        if not gathered.volumes:
            msg = f"None of the {len(found)} images could be used."
            raise InputRefused(msg, "Run medsr inspect on one of them.")
        with atomic_file(target, overwrite=overwrite) as file:
            writer.finish(file)
    return gathered


def _pack_one(image: Found, reader: Reader, writer: PackWriter, seen: dict[str, str]) -> int:
    volume = reader.volume
    if min(volume.rows, volume.columns) < SMALLEST_SIDE:
        msg = f"its slices have {volume.rows} x {volume.columns} pixels, fewer than {SMALLEST_SIDE} a side."
        raise InputRefused(msg)
    span, pixels_sha256 = _measured(reader)
    if pixels_sha256 in seen:
        msg = f"it is the same image as {seen[pixels_sha256]}."
        raise InputRefused(msg)
    record = PackedVolume(
        subject=(VALIDATION_PREFIX if image.validation else "") + image.subject,
        name=image.name,
        sha256=content_sha256(image.path) if image.series is None else pixels_sha256,
        minimum=span.minimum,
        maximum=span.maximum,
        validation=image.validation,
        spacing_mm=volume.spacing_mm,
        modality=volume.modality,
    )
    kept = writer.add(record, (span.normalise(pixels)[0] for pixels in _grey(reader)))
    if not kept:
        msg = "it holds nothing but its smallest value."
        raise InputRefused(msg)
    seen[pixels_sha256] = image.path.name
    return kept


def _measured(reader: Reader) -> tuple[IntensityRange, str]:
    """The range of a volume that can be trained on, and the SHA-256 of its pixels."""
    values: NDArray[Any] = np.empty(0)
    digest = hashlib.sha256()

    def watched() -> Iterator[NDArray[Any]]:
        nonlocal values
        for pixels in _grey(reader):
            digest.update(pixels.tobytes())
            if len(values) < FEWEST_VALUES:
                values = np.union1d(values, pixels)
            yield pixels

    span = measure(watched(), reader.volume.padding)
    if span.width == 0:
        msg = "all its pixels are equal."
        raise InputRefused(msg)
    if len(values) < FEWEST_VALUES:
        msg = f"with {len(values)} distinct values it is a mask or a label map."
        raise InputRefused(msg)
    return span, digest.hexdigest()


def _grey(reader: Reader) -> Iterator[NDArray[Any]]:
    """Slices (1, rows, columns): of colours the mean, opacity left out."""
    for pixels in reader.slices():
        colours = pixels[: _colours(reader.volume)]
        yield colours if len(colours) == 1 else colours.mean(axis=0, keepdims=True)


def _colours(volume: Volume) -> int:
    return max(volume.channels - volume.alpha, 1)


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, or a header whose pixels lie apart, that of the files' SHA-256.

    Raises:
        InputRefused: it cannot be read.
    """
    try:
        files = _files_of(path)
        digests = []
        for part in files:
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256"))
    except OSError as error:
        msg = f"it cannot be read ({error.strerror})."
        raise InputRefused(msg) from error
    if files == [path]:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file())
    if path.suffix.lower() in _HEADER_SUFFIXES:
        return sorted(p for p in path.parent.iterdir() if p.stem == path.stem and p.is_file())
    return [path]
