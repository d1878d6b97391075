"""From a folder of images to one packed file: what is found, whose it is, and what is left out and why.

A subject is a BIDS `sub-XX` in the path, else the first folder level, else the file itself; folders that differ
only by a session (`p01_s1`, `p01_s2`) are one. Validation is split by subject, and an image that is there twice is
taken once, so that nothing of what is validated on was trained on.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from medsr_cli.errors import ArgumentsError, InputRefused, RunError, mention, reason_of
from medsr_cli.formats import stem_of_name
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.contract import Reader
from medsr_cli.training.own_results import is_own_result
from medsr_cli.training.pack import PackedVolume, PackWriter
from medsr_cli.training.reading import LabelMap, Measured, PackOptions, Readers, colours, measure_all, planes_bytes
from medsr_cli.training.sessions import in_words, persons_of

MIXED = "Channels are mixed"
WRITTEN_TWICE = 2
"""The pixels lie in a nameless file until all of them are known, and are then copied into the packed file."""
GB = 1e9
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
    labels: Found | None = None
    """Its mask or label map; this and what follows is found by `companions.attach`."""
    guide: Found | None = None
    """Another contrast on the same grid."""
    low: Found | None = None
    """The same field at low resolution."""
    contrasts: tuple[Found, ...] = ()
    """Registered images that are further channels, in order, after this one."""
    caption: str | None = None
    """A text about it."""


@dataclass(frozen=True)
class Tree:
    """What a folder holds."""

    images: list[Found]
    labels: list[Found]
    """Masks and label maps, by their names."""
    others: list[Found] = field(default_factory=list)
    """Images that were not asked for, whose masks are none of those that were."""
    notes: list[str] = field(default_factory=list)
    """What was taken for one subject."""
    results: list[str] = field(default_factory=list)
    """A sentence for each result of `medsr upscale`, which is no image of its own."""


@dataclass
class Gathered:
    """What became of the images that were found."""

    volumes: int = 0
    slices: int = 0
    colour: int = 0
    """Volumes whose colours were averaged to grey."""
    labels: int = 0
    """Volumes with a mask or label map, with a guide, and with a low-resolution image."""
    guides: int = 0
    lows: int = 0
    skipped: list[str] = field(default_factory=list)
    """One sentence for each image that was left out."""


class Audience(Protocol):
    """Is told how the reading goes."""

    def packing(self, done: int, total: int) -> None:
        """So many of the images are read."""

    def note(self, sentence: str) -> None:
        """Something that a user should know."""


def find_tree(
    folder: Path,
    is_image: Callable[[Path], bool],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    series_of: Callable[[Path], Sequence[str]] = lambda path: (),
    results: Sequence[str] | None = None,
) -> Tree:
    """Every image below a folder, and apart from them every mask, for `companions.attach`.

    What `medsr upscale` wrote is left out by its name, unless patterns ask for it.

    Args:
        folder: walked without following links; hidden names are passed over.
        is_image: whether a file is one image by its name, or a folder holds DICOM files directly.
        include: patterns (fnmatch) of names or paths of images; given, no other image is taken. Masks need not match.
        exclude: patterns of what to leave out, masks too.
        series_of: the SeriesInstanceUIDs in a folder or archive; each is an image of its own.
        results: patterns of the results of `medsr upscale` to take; None takes those of `include`.
    """
    wanted = include if results is None else results
    tree = Tree([], [])
    for path in _candidates(folder, is_image):
        name = path.relative_to(folder).as_posix()
        if matches(name, exclude):
            continue
        stem = path.name if path.is_dir() else stem_of_name(path)
        if path != folder and is_own_result(stem) and not matches(name, wanted):
            tree.results.append(f"{mention(name)} was left out: by its name it is a result of medsr upscale.")
            continue
        found = _series_apart(Found(path, subject_of(name), name), series_of)
        if is_label_name(path.name):
            tree.labels.extend(found)
        else:
            (tree.images if not include or matches(name, include) else tree.others).extend(found)
    _join_sessions(tree)
    return tree


def _join_sessions(tree: Tree) -> None:
    """Give the images of one person's sessions one subject."""
    everything = (tree.images, tree.labels, tree.others)
    person = persons_of(image.subject for images in everything for image in images if _is_folder(image))
    for images in everything:
        images[:] = [
            replace(image, subject=person[image.subject]) if _is_folder(image) and image.subject in person else image
            for image in images
        ]
    tree.notes.extend(in_words(person))


def _is_folder(image: Found) -> bool:
    return "/" in image.name or image.path.is_dir()


def left_out_by_name(name: str) -> str:
    """Why a label map is no image to train on."""
    return f"{mention(name)} was left out: by its name it is a mask or a label map."


def _candidates(folder: Path, is_image: Callable[[Path], bool]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if path.exists() and not path.is_file():
                continue  # a pipe would be waited for without end
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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path, or the last part of it, is like one of the patterns (fnmatch)."""
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
        held = [s for s in subjects if matches(s, chosen)]
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
    options: PackOptions | None = None,
) -> Gathered:
    """Read every image, and what belongs to it, and write the packed file.

    A mask that cannot be used is reported and left away; an image whose guide or low-resolution partner cannot be
    used is left out.

    Raises:
        InputRefused: nothing could be used, channels are mixed, or there is not enough room on the disk.
        RunError: the file could not be written.
    """
    options = options or PackOptions()
    _refuse_full_disk(found, open_reader, target, options)
    packing = _Packing(open_reader, audience, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without a name of its own: whatever ends the run, it is gone.
    with tempfile.TemporaryFile(dir=target.parent) as pixels:
        writer = PackWriter(pixels)
        # Those to validate on come first, so that a copy of one of them is not trained on.
        for done, image in enumerate(sorted(found, key=lambda image: not image.validation)):
            audience.packing(done, len(found))
            with _disk_reported(target):
                packing.add(image, writer)
        audience.packing(len(found), len(found))
        packing.tell()
        if not packing.gathered.volumes:
            msg = f"None of the {len(found)} images could be used."
            raise InputRefused(msg, "Run medsr inspect on one of them.")
        with atomic_file(target, overwrite=overwrite) as file:
            writer.finish(file)
    return packing.gathered


@contextmanager
def _disk_reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"Writing {mention(target.name)} failed: {reason_of(error)}."
        raise RunError(msg, "Free some space, or write elsewhere with -o.") from error


class _Packing:
    """Images on their way into the file, and what is told about them at the end."""

    def __init__(self, open_reader: Callable[[Found], Reader], audience: Audience, options: PackOptions) -> None:
        self.gathered = Gathered()
        self._open, self._audience, self._options = open_reader, audience, options
        self._seen: dict[str, str] = {}
        self._channels: set[int] = set()
        self._painted = 0
        self._own_scale = 0

    def add(self, image: Found, writer: PackWriter) -> None:
        """Pack one image, or say why not.

        Raises:
            InputRefused: its channels do not go with those of the others.
        """
        try:
            readers = self._opened(image)
            measured = measure_all(readers, self._options)
            kept = self._write(image, measured, writer)
        except InputRefused as error:
            if error.sentence.startswith(MIXED):
                raise
            self._leave_out(f"{_in_words(image)} was left out: {error.sentence}")
            return
        self.gathered.volumes += 1
        self.gathered.slices += kept
        self.gathered.colour += colours(readers.image[0].volume) > measured.channels
        self.gathered.labels += readers.labels is not None
        self.gathered.guides += measured.guide_span is not None
        self.gathered.lows += measured.low_span is not None
        self._painted += readers.labels is not None and readers.labels.painted
        self._own_scale += measured.low_span is not None and measured.low_span.maximum != measured.spans[0].maximum

    def _leave_out(self, sentence: str) -> None:
        self.gathered.skipped.append(sentence)
        self._audience.note(sentence)

    def _opened(self, image: Found) -> Readers:
        labels = None
        if image.labels is not None:
            try:
                labels = LabelMap(self._open(image.labels))
            except InputRefused as error:
                self._leave_out(f"The mask of {mention(image.name)} is not used: {error.sentence}")
        return Readers(
            image=[self._open(part) for part in (image, *image.contrasts)],
            guide=self._open(image.guide) if image.guide else None,
            labels=labels,
            low=self._open(image.low) if image.low else None,
        )

    def _write(self, image: Found, measured: Measured, writer: PackWriter) -> int:
        self._refuse_mixed(image, measured.channels)
        if measured.pixels_sha256 in self._seen:
            msg = f"it is the same image as {self._seen[measured.pixels_sha256]}."
            raise InputRefused(msg)
        volume = measured.readers.image[0].volume
        record = PackedVolume(
            subject=(VALIDATION_PREFIX if image.validation else "") + image.subject,
            name=image.name,
            sha256=content_sha256(image.path) if image.series is None else measured.pixels_sha256,
            minimum=0.0,
            maximum=1.0,
            validation=image.validation,
            spacing_mm=volume.spacing_mm,
            modality=volume.modality,
            caption=image.caption,
        )
        kept = writer.add(measured.described(record), measured.planes())
        if not kept:
            msg = "it holds nothing but its smallest value."
            raise InputRefused(msg)
        self._seen[measured.pixels_sha256] = _in_words(image)
        self._channels.add(measured.channels)
        return kept

    def _refuse_mixed(self, image: Found, channels: int) -> None:
        """Grey goes with colours, repeated; nothing else goes with another number of channels."""
        if len({*self._channels, channels} - ({1} if self._options.channels > 1 else set())) > 1:
            msg = f"{MIXED}: {mention(image.name)} has {channels}, others have {sorted(self._channels)[0]}."
            raise InputRefused(msg, "Give images of one kind; --include and --exclude take patterns.")

    def tell(self) -> None:
        """The sentences about all of them together."""
        gathered = self.gathered
        sentences = {
            f"The colours of {gathered.colour} volumes were averaged to grey.": gathered.colour,
            f"{gathered.labels} of {gathered.volumes} images have a mask or a label map.": gathered.labels,
            f"The values 0 and 255 of {self._painted} masks became 0 and 1.": self._painted,
            f"{gathered.guides} images have a guide.": gathered.guides,
            f"{gathered.lows} images have a low-resolution partner; none is made for them.": gathered.lows,
            f"{self._own_scale} low-resolution images have other values than their partners; each is scaled by its "
            "own range.": self._own_scale,
        }
        for sentence, count in sentences.items():
            if count:
                self._audience.note(sentence)


def _in_words(image: Found) -> str:
    """The path inside the folder, and in which of two."""
    name = image.path.name if image.name in ("", ".") else image.name
    return f"{mention(name)} (to validate on)" if image.validation else mention(name)


def _refuse_full_disk(
    found: Sequence[Found], open_reader: Callable[[Found], Reader], target: Path, options: PackOptions
) -> None:
    """Before hours are spent, from the headers; what cannot be opened is told of when it is read.

    Raises:
        InputRefused: the disk has not room for the packed file and for its pixels on their way into it.
    """
    wanted = 0
    for image in found:
        with suppress(InputRefused):
            opened = [open_reader(part) for part in (image, *image.contrasts)]
            beside = [open_reader(part) for part in (image.guide, image.labels) if part is not None]
            low = open_reader(image.low) if image.low else None
            wanted += planes_bytes(opened, low, beside, options)
    place = next(folder for folder in (target.parent, *target.parent.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if WRITTEN_TWICE * wanted > free:
        msg = (
            f"Packing these images needs up to {WRITTEN_TWICE * wanted / GB:.1f} GB of disk space, half of it for a "
            f"while only; {free / GB:.1f} GB are free."
        )
        raise InputRefused(msg, "Free some space, write elsewhere with -o, or take fewer images with --include.")


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
        msg = f"it cannot be read ({reason_of(error)})."
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
