"""Which series and stacks a path holds, what each is, and which one is meant.

Files are grouped by SeriesInstanceUID and separated into stacks (`dicom_stacks`). Everything is numbered in the order
of the files' names, medsr's own results last, and stacks by what they hold, so that a number that was shown once means
the same stack the next time. Headers are read once: what was found is kept for the openings that follow, as long as no
file changes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import UID

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.boundary import refusing as refusing_path
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom_files import (
    FileMember,
    Member,
    find_members,
    has_mark,
    promises_dicom,
    read_header,
    refusing,
)
from medsr_cli.formats.dicom_headers import Instance, read_instance
from medsr_cli.formats.dicom_refusals import OWN_RESULT, SCREEN, aside, needs_header, refusal, refusal_of_header
from medsr_cli.formats.dicom_stacks import FrameGroup, FrameRef, Stack, arrange, runs, separate
from medsr_cli.formats.limits import Limits

__all__ = [
    "Found",
    "FrameGroup",
    "FrameRef",
    "Stack",
    "StackSummary",
    "Study",
    "arrange",
    "choose_series",
    "find_series",
    "list_series",
    "named_stacks",
    "runs",
    "study_of",
]

KEPT_PATHS = 2
"""Paths whose headers are kept; a run works on one after the other."""
SHORTEST_PART = 3
"""Characters of a SeriesInstanceUID that name it; fewer would be met by chance, by a number that no series has."""
LISTED = 20
"""Stacks that a sentence lists."""


@dataclass(frozen=True)
class StackSummary:
    """One stack of an input, for `inspect`, for choosing, and for the message that asks which one is meant."""

    series: int
    """Counted from 1, in the order in which the series were found."""
    stack: int
    """Counted from 1 within the series."""
    stacks: int
    """Stacks of the series."""
    uid: str
    """SeriesInstanceUID; for standard output and for the question which series is meant, nowhere else."""
    images: int
    rows: int
    columns: int
    modality: str
    transfer_syntax: str
    """Its name, or `unknown`."""
    refusal: str | None
    """Why it cannot be upscaled, or None: the predicate of a sentence."""
    aside: str | None
    """Why it is upscaled only when it is named, or None: the predicate of a sentence."""

    @property
    def selector(self) -> str:
        """What `--series` takes for this stack: `2`, or `2#1` where the series has several."""
        return f"{self.series}#{self.stack}" if self.stacks > 1 else f"{self.series}"

    @property
    def title(self) -> str:
        """`Series 2`, or `Series 2, stack 1`."""
        return f"Series {self.series}, stack {self.stack}" if self.stacks > 1 else f"Series {self.series}"

    def line(self) -> str:
        """One line of a list; holds no text that a person wrote."""
        what = f"{self.selector}: {self.images} image(s) of {self.rows} x {self.columns}"
        return f"{what}, SeriesInstanceUID {self.uid or '(none)'}"


@dataclass(frozen=True)
class Study:
    """Everything with pixels that a path holds."""

    path: Path
    stacks: tuple[StackSummary, ...]
    unreadable: int
    """DICOM files that could not be read; nothing is upscaled then, for slices may be missing anywhere."""
    members: int
    """DICOM files of any kind."""


@dataclass(frozen=True)
class Found:
    """What a path holds: stacks by series, and how many files could not be read."""

    path: Path
    series: dict[str, list[FrameGroup]]
    unreadable: int
    members: int
    """DICOM files of any kind."""

    @cached_property
    def study(self) -> Study:
        """A summary of each stack."""
        return Study(self.path, tuple(_summaries(self.series)), self.unreadable, self.members)

    def group(self, stack: StackSummary) -> FrameGroup:
        """The frames of one of the study's stacks."""
        return self.series[stack.uid][stack.stack - 1]

    def summaries(self) -> list[StackSummary]:
        """One summary for each stack."""
        return list(self.study.stacks)


def study_of(path: Path, options: ReadOptions) -> Study:
    """All stacks that a DICOM file, folder or zip archive holds; only headers are read, and kept for what follows.

    Raises:
        InputRefused: there is no DICOM file, or a single file cannot be read.
    """
    with refusing_path(path):
        return find_series(path, options.limits).study


def list_series(path: Path, options: ReadOptions) -> list[StackSummary]:
    """The same as a list, those that cannot be upscaled with their reason.

    Raises:
        InputRefused: there is no DICOM file.
    """
    return list(study_of(path, options).stacks)


# -- finding --------------------------------------------------------------------------------------------------

_kept: OrderedDict[tuple[object, ...], Found] = OrderedDict()
_keeping = threading.Lock()


def find_series(path: Path, limits: Limits) -> Found:
    """Read the headers of all DICOM files that a path stands for, or what was read before if no file has changed.

    Raises:
        InputRefused: there is no DICOM file, or a single file cannot be read.
    """
    members = find_members(path, limits)
    key = (str(path.absolute()), limits, _state(path, members))
    with _keeping:
        found = _kept.get(key)
        if found is not None:
            _kept.move_to_end(key)
            return found if found.path == path else replace(found, path=path)
    found = _read_all(path, members, limits)
    with _keeping:
        for old in [old for old in _kept if old[0] == key[0]]:
            del _kept[old]
        _kept[key] = found
        while len(_kept) > KEPT_PATHS:
            _kept.popitem(last=False)
    return found


def _state(path: Path, members: Sequence[Member]) -> int:
    """Changes when a file does: names, sizes and times of last change of all of them."""
    with refusing(path.name, "looking for files"):
        files = [member.path for member in members if isinstance(member, FileMember)] or [path]
        status = [(str(file), *_times(file)) for file in files]
    return hash((*status, len(members)))


def _times(file: Path) -> tuple[int, ...]:
    try:
        s = file.stat()
    except OSError:
        return ()  # a link to nowhere
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _read_all(path: Path, members: Sequence[Member], limits: Limits) -> Found:
    if len(members) == 1 and path.is_file() and members[0].name == path.name:
        return _single_file(path, members[0], limits)
    series: dict[str, list[Instance]] = {}
    unreadable = known = 0
    for member in members:
        instance, state = _try_instance(member, limits)
        unreadable += state == "unreadable"
        known += state != "other"
        if instance is not None:
            series.setdefault(instance.series, []).append(instance)
    if not known:
        msg = f"{mention(path.name)} holds no DICOM file."
        raise InputRefused(msg, "Give the folder that the images are in.")
    groups = {uid: separate(instances, limits.slices) for uid, instances in series.items()}
    return Found(path, groups, unreadable, known)


def _single_file(path: Path, member: Member, limits: Limits) -> Found:
    with refusing(path.name, "reading the header"):
        if not has_mark(member):
            msg = f"{mention(path.name)} is not a DICOM file: it lacks the file meta information that starts with DICM."
            raise InputRefused(msg, "Export it as a DICOM file (part 10).")
        instance = read_instance(member, limits.slices, limits)
        listing = instance.pixels is None and "DirectoryRecordSequence" in read_header(member, limits)
        if instance.sop_class == "1.2.840.10008.1.3.10" or listing:
            msg = f"{mention(path.name)} is a DICOMDIR, a list of files and not an image."
            raise InputRefused(msg, "Give the folder that the images are in.")
    if instance.pixels is None and not instance.mosaic:
        msg = f"{mention(path.name)} has no pixels: it is not an image."
        raise InputRefused(msg)
    return Found(path, {instance.series: separate([instance], limits.slices)}, 0, 1)


def _try_instance(member: Member, limits: Limits) -> tuple[Instance | None, str]:
    """An image, or None and what else it is: `no image`, `unreadable`, `other`."""
    try:
        with refusing(member.name, "reading the header"):
            if not has_mark(member):
                return None, "unreadable" if promises_dicom(member) else "other"
            instance = read_instance(member, limits.slices, limits)
    except InputRefused:
        return None, "unreadable"
    if instance.pixels is not None or instance.rows > 0:
        return instance, "image"
    # An image whose header is cut short must not pass for a report: it would be a missing slice.
    kind = UID(instance.sop_class)
    return None, "unreadable" if not kind or "Image Storage" in kind.name else "no image"


# -- what each stack is ---------------------------------------------------------------------------------------


def _summaries(series: dict[str, list[FrameGroup]]) -> list[StackSummary]:
    found = [
        [_summary(0, uid, at, len(groups), group) for at, group in enumerate(groups, 1)]
        for uid, groups in series.items()
    ]
    # Results that were put into the study come last: what it had before keeps its numbers.
    found.sort(key=lambda stacks: all(stack.aside == OWN_RESULT for stack in stacks))
    stacks = [replace(stack, series=index) for index, stacks in enumerate(found, 1) for stack in stacks]
    # A screen that was saved is an image for reading where there is no other.
    if not any(stack.refusal is None and stack.aside is None for stack in stacks):
        stacks = [replace(stack, aside=None) if stack.aside == SCREEN else stack for stack in stacks]
    # What is there alone is what is meant.
    return [replace(stack, aside=None) for stack in stacks] if len(stacks) == 1 else stacks


def _summary(index: int, uid: str, at: int, stacks: int, group: FrameGroup) -> StackSummary:
    first = group.first.instance
    syntax = UID(first.transfer_syntax)
    why = group.refusal or next((why for instance in group if (why := refusal(instance)) is not None), None)
    beside = None
    if why is None:
        with contextlib.suppress(InputRefused), refusing(first.member.name, "reading the header"):
            # What cannot be read here is said when the stack is opened.
            header = read_header(first.member) if needs_header(first) else Dataset()
            why = refusal_of_header(header)
            beside = aside(first, header, localiser=group.localiser)
    return StackSummary(
        series=index,
        stack=at,
        stacks=stacks,
        uid=uid,
        images=group.images,
        rows=first.rows,
        columns=first.columns,
        modality=first.modality if first.modality.isalpha() and len(first.modality) <= 8 else "",
        transfer_syntax=syntax.name if syntax.is_transfer_syntax else "unknown",
        refusal=why,
        aside=beside,
    )


# -- choosing -------------------------------------------------------------------------------------------------


def choose_series(found: Found, wanted: str | None) -> FrameGroup:
    """The frames of the one stack that is meant.

    Args:
        found: what the path holds.
        wanted: as `ReadOptions.series`, see `named_stacks`; None is the only stack that suits.

    Raises:
        InputRefused: there is none, or several and none is named; the sentence lists them.
    """
    name, study = mention(found.path.name), found.study
    if not study.stacks and not found.unreadable:
        msg = f"{name} holds DICOM files but no image."
        raise InputRefused(msg, "Give the folder that the images are in.")
    if found.unreadable:
        raise _unreadable(found)
    meant = study.stacks if wanted is None else named_stacks(study, wanted)
    usable = [stack for stack in meant if stack.refusal is None]
    if wanted is None:
        usable = [stack for stack in usable if stack.aside is None] or usable
    if not usable:
        raise _refused(name, meant, alone=len(study.stacks) == 1)
    if len(usable) > 1:
        several = len({stack.uid for stack in usable})
        what = f"{several} series" if several == len(usable) else f"{len(usable)} stacks of {several} series"
        msg = f"{name} holds {what}: {_listed([stack.line() for stack in usable])}."
        raise InputRefused(msg, f"Say which one with --series, for example --series {usable[0].selector}.")
    return found.group(usable[0])


def named_stacks(study: Study, wanted: str) -> tuple[StackSummary, ...]:
    """The stacks that `--series` names: one, or all of one series.

    Args:
        study: what the path holds.
        wanted: the number of a series as `inspect` shows it, its SeriesInstanceUID, or a beginning or end of that which
            no other has, three characters or more; with `#2` after it, the second stack of that series.

    Raises:
        InputRefused: it names no series, or more than one; the sentence lists them.
    """
    text, mark, number = wanted.strip().partition("#")
    series = _named_series(study, text)
    stacks = tuple(stack for stack in study.stacks if stack.series in series)
    listed = _listed([stack.line() for stack in study.stacks])
    if len(series) != 1:
        why = "matches more than one" if series else "matches none"
        msg = f"--series {why} of the series in {mention(study.path.name)}: {listed}."
        raise InputRefused(msg, "Give the number before the colon, or the whole SeriesInstanceUID.")
    if not mark:
        return stacks
    chosen = tuple(stack for stack in stacks if number == str(stack.stack))
    if not chosen:
        msg = f"--series names a stack that is not in {mention(study.path.name)}: {listed}."
        raise InputRefused(msg, "Give the number before the colon.")
    return chosen


def _named_series(study: Study, text: str) -> set[int]:
    """Numbers of the series that a text names: by its number, else by its UID, else by a part of that."""
    if not text:
        return set()
    part = len(text) >= SHORTEST_PART
    for names in (
        lambda stack: str(stack.series) == text,
        lambda stack: stack.uid == text,
        lambda stack: part and (stack.uid.startswith(text) or stack.uid.endswith(text)),
    ):
        found = {stack.series for stack in study.stacks if names(stack)}
        if found:
            return found
    return set()


def _refused(name: str, stacks: Sequence[StackSummary], *, alone: bool) -> InputRefused:
    """No stack can be upscaled: the reason, or each stack's own."""
    reasons = list(dict.fromkeys(stack.refusal for stack in stacks))
    if len(reasons) == 1:
        where = "" if alone else f" (series {stacks[0].selector})" if len(stacks) == 1 else f" ({len(stacks)} stacks)"
        return InputRefused(f"{name}{where} {reasons[0]}.")
    listed = _listed([f"{stack.title} {stack.refusal}" for stack in stacks])
    return InputRefused(f"Nothing in {name} can be upscaled: {listed}.")


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "; ".join([*lines[:LISTED], *more])


def _unreadable(found: Found) -> InputRefused:
    msg = f"{found.unreadable} of the {found.members} DICOM files in {mention(found.path.name)} cannot be read."
    return InputRefused(msg, "A slice would be missing: export the series anew, or take the broken files away.")
