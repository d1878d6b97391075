"""Which series a routing hub's flat folder holds, and which of them are to be enlarged.

The input is only read, and links to it, one folder for each series, are what is enlarged: a file that cannot be read
spoils the series that its name belongs to and no other, and no name of the hub's gets into a sentence.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from medsr_cli.errors import InputRefused, MedsrError, mention
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom import MODALITIES
from medsr_cli.formats.dicom_files import FileMember, has_mark, promises_dicom, read_header, refusing
from medsr_cli.formats.dicom_series import StackSummary, study_of
from medsr_cli.tasks.module_outcome import SOFTWARE, Outcome, SeriesFate, plain
from medsr_cli.tasks.module_settings import ModuleSettings

SEPARATOR = "#"
"""Between the series' UID and the file's, in names of a hub's files."""
NO_SERIES = "none"
"""What images without a SeriesInstanceUID are grouped under."""


def sorted_input(folder: Path, links: Path, settings: ModuleSettings, outcome: Outcome) -> list[SeriesFate]:
    """Sort a hub's folder by series.

    Args:
        folder: only read.
        links: where a folder is made for each series, with a link to each of its files.
        outcome: gets a fate for each series, and counts and warnings.

    Returns:
        The series that are to be enlarged.
    """
    images: dict[str, list[Path]] = {}
    lost: Counter[str] = Counter()
    for path in files_of(folder):
        if not is_dicom(path):
            continue
        outcome.files_in += 1
        uid = _series_of(path)
        if uid:
            images.setdefault(uid, []).append(path)
        elif uid is None:
            whose, sign, _ = path.name.partition(SEPARATOR)
            lost[whose if sign else ""] += 1
    if lost:
        outcome.warnings.append(f"{lost.total()} of {outcome.files_in} DICOM files cannot be read.")
    for number, uid in enumerate(sorted(images), 1):
        fate = SeriesFate(number, images[uid])
        outcome.fates.append(fate)
        fate.reason = _unset(uid, settings) or _incomplete(uid, lost)
        if fate.reason is None:
            _look_at(fate, _linked(links, fate), settings)
    return [fate for fate in outcome.fates if fate.reason is None]


def _series_of(path: Path) -> str | None:
    """SeriesInstanceUID of an image; empty for an object that is no image, None for a file that is not readable."""
    try:
        with refusing(path.name, "reading the header"):
            member = FileMember(path, path.stat().st_size)
            if not has_mark(member):
                return None
            header = read_header(member)
            kind = header.get("SOPClassUID")
            # An image whose header is cut short must not pass for a report: it would be a missing slice.
            if not int(header.get("Rows") or 0):
                return None if kind is None or "Image Storage" in kind.name else ""
            return str(header.get("SeriesInstanceUID") or NO_SERIES)
    except InputRefused:
        return None


def _unset(uid: str, settings: ModuleSettings) -> str | None:
    if settings.series is not None and uid not in settings.series:
        return "is not among the series that are set"
    return None


def _incomplete(uid: str, lost: Mapping[str, int]) -> str | None:
    if uid in lost:
        return f"lacks slices: {lost[uid]} of its files cannot be read"
    if "" in lost:
        return "may lack slices: of files that cannot be read, the name does not say whose they are"
    return None


def _look_at(fate: SeriesFate, folder: Path, settings: ModuleSettings) -> None:
    """Settle what a series is, and why it is left alone if it is."""
    fate.folder = folder
    try:
        stacks = study_of(folder, ReadOptions()).stacks
        fate.images = sum(stack.images for stack in stacks)
        fate.modality = next((stack.modality for stack in stacks if stack.modality in MODALITIES), "")
        own = _is_own_result(fate.files[0])
        if own and not settings.again:
            fate.reason = "was made by medsr"
            return
        # What is otherwise kept aside (localisers, results of medsr) was asked for by name here.
        named = own or settings.series is not None
        fate.reason = _unsuitable(stacks, settings, named=named)
    except InputRefused as error:
        fate.reason = predicate(error, folder)


def _unsuitable(stacks: Sequence[StackSummary], settings: ModuleSettings, *, named: bool) -> str | None:
    """Why the rule of the settings, or the format, leaves a series alone; the predicate of a sentence."""
    modalities = settings.only_modalities
    if modalities is not None and not any(stack.modality in modalities for stack in stacks):
        return "is of a modality that is not set"
    if sum(stack.images for stack in stacks) < settings.min_images:
        return f"has fewer than {settings.min_images} images"
    largest = max(max(stack.rows, stack.columns) for stack in stacks)
    if settings.largest_matrix is not None and largest > settings.largest_matrix:
        return f"has more than {settings.largest_matrix} rows or columns"
    reasons = [stack.refusal or (None if named else stack.aside) for stack in stacks]
    return None if None in reasons else reasons[0]


def _is_own_result(path: Path) -> bool:
    """Whether a file says that medsr took part in making it (PS3.3 section C.12.1, Contributing Equipment)."""
    with refusing(path.name, "reading the header"):
        header = read_header(FileMember(path, path.stat().st_size))
        return any(item.get("Manufacturer") == SOFTWARE for item in header.get("ContributingEquipmentSequence") or [])


def predicate(error: MedsrError, folder: Path) -> str:
    """A refusal's sentence without its subject, the name of a series' folder of links."""
    return plain(error.sentence.removeprefix(mention(folder.name))).strip().rstrip(".")


def files_of(folder: Path) -> Iterator[Path]:
    """Every file that the hub put there; hidden ones are marks of its own."""
    for inner, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(inner, name) for name in sorted(names) if not name.startswith("."))


def is_dicom(path: Path) -> bool:
    """Whether a file carries DICOM's mark, or a name that promises it."""
    try:
        member = FileMember(path, path.stat().st_size)
        return path.is_file() and (promises_dicom(member) or has_mark(member))
    except OSError:
        # A link to nowhere, or a file that may not be read: its name decides whether a slice is missing.
        return path.suffix.lower() == ".dcm"


def _linked(folder: Path, fate: SeriesFate) -> Path:
    """A folder with a link to each file of a series; copies where the file system has no links."""
    own = folder / f"series-{fate.number:04d}"
    own.mkdir(parents=True)
    for at, path in enumerate(fate.files, 1):
        link = own / f"{at:06d}.dcm"
        try:
            link.symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, link)
    return own
