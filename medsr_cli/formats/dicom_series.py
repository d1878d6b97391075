"""Which files belong together, in which order their frames lie, and where the stack lies in the patient.

Images are grouped by SeriesInstanceUID and ordered along the normal of their slices. What cannot be a stack of
equal slices is refused with the reason; uneven spacing and gantry tilt are not, for upscaling happens in the
plane of each slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.dicom_files import Member, find_members, has_mark, promises_dicom, read_header, refusing
from medsr_cli.formats.dicom_headers import GREY, PALETTE, Instance, Plane, read_instance
from medsr_cli.formats.dicom_refusals import refusal
from medsr_cli.formats.limits import Limits
from medsr_cli.volume.geometry import LPS_FROM_RAS

Vectors = NDArray[np.float64]

SAME_PLACE_MM = 1e-3
"""Slices closer than this along the normal are at the same place."""
SAME_STACK_MM = 0.05
"""Images at the same place further apart than this in the plane belong to different stacks."""
SAME_DIRECTION = 1e-3
"""Largest difference of a direction cosine within a stack (0.06 degrees)."""
UNEVEN_MM, UNEVEN = 0.01, 0.01
"""Steps between slices may differ by this many mm, or this part of a step, and still count as even."""
TILT_DEGREES = 0.1


@dataclass(frozen=True)
class SeriesSummary:
    """One series of an input, for `inspect` and for the message that asks which one is meant."""

    index: int
    """Counted from 1, in the order in which the series were found."""
    uid: str
    images: int
    """Frames of all files."""
    rows: int
    columns: int
    modality: str
    refusal: str | None
    """Why it cannot be upscaled, or None."""

    def line(self) -> str:
        """One line of a list; holds no text that a person wrote."""
        what = f"{self.index}: {self.images} image(s) of {self.rows} x {self.columns}"
        return f"{what}, SeriesInstanceUID {self.uid or '(none)'}"


@dataclass(frozen=True)
class Found:
    """What a path holds: image files by series, and how many files could not be read."""

    path: Path
    series: dict[str, list[Instance]]
    unreadable: int
    members: int
    """DICOM files of any kind."""

    def summaries(self) -> list[SeriesSummary]:
        """One summary for each series that has pixels."""
        return [
            SeriesSummary(
                index=index,
                uid=uid,
                images=sum(instance.frames for instance in instances),
                rows=instances[0].rows,
                columns=instances[0].columns,
                modality=instances[0].modality,
                refusal=next((why for i in instances if (why := refusal(i)) is not None), None),
            )
            for index, (uid, instances) in enumerate(self.series.items(), 1)
        ]


@dataclass(frozen=True, slots=True)
class FrameRef:
    """One frame of one file."""

    instance: Instance
    index: int

    @property
    def plane(self) -> Plane:
        """Where it lies."""
        return self.instance.planes[self.index]


@dataclass(frozen=True)
class Stack:
    """Frames in the order in which they are streamed: slice after slice, time point after time point."""

    frames: tuple[FrameRef, ...]
    points: int = 1
    """Images at each place."""
    affine: NDArray[np.float64] | None = None
    """(column, row, slice) to mm, RAS+."""
    slice_spacing_mm: float | None = None
    tilt_degrees: float = 0.0
    warnings: tuple[str, ...] = ()


# -- finding --------------------------------------------------------------------------------------------------


def find_series(path: Path, limits: Limits) -> Found:
    """Read the headers of all DICOM files that a path stands for.

    Raises:
        InputRefused: there is no DICOM file, or a single file cannot be read.
    """
    members = find_members(path, limits)
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
    return Found(path, series, unreadable, known)


def choose_series(found: Found, wanted: str | None) -> list[Instance]:
    """The images of the one series that is meant.

    Raises:
        InputRefused: there is none, or several and none is named; the sentence lists them.
    """
    name = found.path.name
    if not found.series:
        if found.unreadable:
            raise _unreadable(found)
        msg = f"{mention(name)} holds DICOM files but no image."
        raise InputRefused(msg, "Give the folder that the images are in.")
    summaries = found.summaries()
    if wanted is not None:
        chosen = _matching(found, summaries, wanted)
    else:
        usable = [summary for summary in summaries if summary.refusal is None]
        if len(usable) > 1:
            msg = f"{mention(name)} holds {len(usable)} series: {'; '.join(s.line() for s in usable)}."
            raise InputRefused(msg, "Say which one with --series UID.")
        chosen = usable[0] if usable else summaries[0]
    if chosen.refusal is not None:
        where = "" if len(summaries) == 1 else f" (series {chosen.index})"
        msg = f"{mention(name)}{where} {chosen.refusal}."
        raise InputRefused(msg)
    if found.unreadable:
        raise _unreadable(found)
    return found.series[chosen.uid]


def _single_file(path: Path, member: Member, limits: Limits) -> Found:
    with refusing(path.name, "reading the header"):
        if not has_mark(member):
            msg = f"{mention(path.name)} is not a DICOM file: it lacks the file meta information that starts with DICM."
            raise InputRefused(msg, "Export it as a DICOM file (part 10).")
        instance = read_instance(member, limits.slices)
        if instance.sop_class == "1.2.840.10008.1.3.10" or "DirectoryRecordSequence" in read_header(member):
            msg = f"{mention(path.name)} is a DICOMDIR, a list of files and not an image."
            raise InputRefused(msg, "Give the folder that the images are in.")
    if instance.pixels is None and not instance.mosaic:
        msg = f"{mention(path.name)} has no pixels: it is not an image."
        raise InputRefused(msg)
    return Found(path, {instance.series: [instance]}, 0, 1)


def _try_instance(member: Member, limits: Limits) -> tuple[Instance | None, str]:
    """An image, or None and what else it is: `no image`, `unreadable`, `other`."""
    try:
        with refusing(member.name, "reading the header"):
            if not has_mark(member):
                return None, "unreadable" if promises_dicom(member) else "other"
            instance = read_instance(member, limits.slices)
    except InputRefused:
        return None, "unreadable"
    if instance.pixels is not None or instance.rows > 0:
        return instance, "image"
    # An image whose header is cut short must not pass for a report: it would be a missing slice.
    kind = UID(instance.sop_class)
    return None, "unreadable" if not kind or "Image Storage" in kind.name else "no image"


def _matching(found: Found, summaries: list[SeriesSummary], wanted: str) -> SeriesSummary:
    exact = [s for s in summaries if s.uid == wanted]
    partial = [s for s in summaries if s.uid.startswith(wanted) or s.uid.endswith(wanted)]
    chosen = exact or partial
    if len(chosen) == 1 and wanted:
        return chosen[0]
    why = "matches more than one" if chosen else "matches none"
    msg = f"--series {why} of the series in {mention(found.path.name)}: {'; '.join(s.line() for s in summaries)}."
    raise InputRefused(msg, "Give the whole SeriesInstanceUID.")


def _unreadable(found: Found) -> InputRefused:
    msg = f"{found.unreadable} of the {found.members} DICOM files in {mention(found.path.name)} cannot be read."
    return InputRefused(msg, "A slice would be missing: export the series anew, or take the broken files away.")


# -- arranging ------------------------------------------------------------------------------------------------


def arrange(path: Path, instances: Sequence[Instance]) -> Stack:
    """Put the frames of one series in order.

    Raises:
        InputRefused: they are not equal slices of one stack (or of several complete ones at the same places).
    """
    _check_alike(path, instances)
    frames = [FrameRef(instance, index) for instance in instances for index in range(instance.frames)]
    placed = [frame for frame in frames if frame.plane.position_mm is not None]
    if not placed:
        _check_spacing(path, instances)
        return _unplaced(frames, instances)
    if len(placed) < len(frames):
        raise _no_stack(path, "holds images with and without a position")
    _check_directions(path, placed)
    _check_spacing(path, instances)
    ordered, points = _ordered(path, placed)
    return _located(ordered, points)


def _check_alike(path: Path, instances: Sequence[Instance]) -> None:
    first = instances[0]
    if any((i.rows, i.columns) != (first.rows, first.columns) for i in instances):
        raise _no_stack(path, "holds images of different sizes (a localiser, perhaps)")
    kinds = {(i.photometric if i.photometric in GREY | {PALETTE} else "colour", i.stored_dtype) for i in instances}
    if len(kinds) > 1:
        raise _no_stack(path, "holds pixels of different kinds")
    identities = [i.sop_instance for i in instances if i.sop_instance]
    if len(set(identities)) < len(identities):
        raise _no_stack(path, "holds the same image more than once")
    if not all(i.pixels is not None for i in instances):
        raise _no_stack(path, "holds images without pixels")


def _check_spacing(path: Path, instances: Sequence[Instance]) -> None:
    spacings = [plane.spacing_mm for i in instances for plane in i.planes]
    known = [spacing for spacing in spacings if spacing is not None]
    differs = known and (len(known) < len(spacings) or not np.allclose(known, known[0], rtol=1e-3, atol=0))
    if differs:
        raise _no_stack(path, "holds pixels of different sizes in mm")


def _unplaced(frames: list[FrameRef], instances: Sequence[Instance]) -> Stack:
    ordered = sorted(frames, key=lambda frame: (frame.instance.number or 0, frame.instance.member.name, frame.index))
    warnings: tuple[str, ...] = ()
    if len(instances) > 1:
        warnings = ("The images carry no position; they are taken in the order of their instance numbers.",)
    return Stack(tuple(ordered), warnings=warnings)


def _check_directions(path: Path, frames: list[FrameRef]) -> None:
    first = np.array(frames[0].plane.orientation)
    if any(np.abs(np.array(frame.plane.orientation) - first).max() > SAME_DIRECTION for frame in frames):
        raise _no_stack(path, "holds slices in different directions (a localiser, perhaps)")


def _ordered(path: Path, frames: list[FrameRef]) -> tuple[list[FrameRef], int]:
    """Frames along the normal; where there are several at each place, one complete stack after the other."""
    normal = _normal(frames[0].plane)
    heights = np.array([_position(frame) @ normal for frame in frames])
    places: list[list[FrameRef]] = []
    last = -math.inf
    for at in np.argsort(heights, kind="stable"):
        if heights[at] - last > SAME_PLACE_MM:
            places.append([])
        last = heights[at]
        places[-1].append(frames[at])
    points = len(places[0])
    if any(len(place) != points for place in places):
        raise _no_stack(path, "has more images at some places than at others: slices are missing or doubled")
    for place in places:
        place.sort(key=_acquired)
        here = np.array([_position(frame) for frame in place])
        if np.abs(here - here[0]).max() > SAME_STACK_MM:
            raise _no_stack(path, "holds stacks that lie side by side")
    return [place[point] for point in range(points) for place in places], points


def _acquired(frame: FrameRef) -> tuple[Any, ...]:
    return frame.plane.temporal, frame.instance.number or 0, frame.instance.member.name, frame.index


def _located(frames: list[FrameRef], points: int) -> Stack:
    """The affine of the first stack, if its steps are even."""
    first = frames[0].plane
    stack = frames[: len(frames) // points]
    positions = np.array([_position(frame) for frame in stack])
    normal = _normal(first)
    warnings: list[str] = []
    if points > 1:
        warnings.append(f"There are {points} images at each place; they are taken as {points} time points.")
    step, known_step, even = _step(positions, normal, stack[0].instance.slice_spacing_mm)
    if not even:
        warnings.append("The slices are not evenly spaced (some may be missing); each is upscaled in its own plane.")
    cosine = abs(float(step @ normal)) / (float(np.linalg.norm(step)) or 1.0)
    tilt = math.degrees(math.acos(min(cosine, 1.0)))
    if even and tilt > TILT_DEGREES:
        warnings.append(f"The slices are shifted against each other (gantry tilt of {tilt:.1f} degrees).")
    affine = None
    if even and first.spacing_mm is not None and first.orientation is not None:
        lps = np.eye(4)
        lps[:3, 0] = np.array(first.orientation[:3]) * first.spacing_mm[1]
        lps[:3, 1] = np.array(first.orientation[3:]) * first.spacing_mm[0]
        lps[:3, 2], lps[:3, 3] = step, positions[0]
        affine = LPS_FROM_RAS @ lps
    spacing = float(np.linalg.norm(step)) if even and known_step else None
    return Stack(tuple(frames), points, affine, spacing, tilt if even else 0.0, tuple(warnings))


def _step(positions: Vectors, normal: Vectors, thickness_mm: float | None) -> tuple[Vectors, bool, bool]:
    """The way from slice to slice, whether the file says how long it is, and whether it is always the same."""
    if len(positions) == 1:
        return normal * (thickness_mm or 1.0), thickness_mm is not None, True
    steps = np.diff(positions, axis=0)
    mean: Vectors = (positions[-1] - positions[0]) / (len(positions) - 1)
    allowed = max(UNEVEN_MM, UNEVEN * float(np.linalg.norm(mean)))
    even = bool(np.linalg.norm(steps - mean, axis=1).max() <= allowed)
    return mean, True, even


def _normal(plane: Plane) -> Vectors:
    along, down = np.split(np.array(plane.orientation), 2)
    return np.cross(along, down)


def _position(frame: FrameRef) -> Vectors:
    return np.array(frame.plane.position_mm)


def _no_stack(path: Path, why: str) -> InputRefused:
    return InputRefused(f"{mention(path.name)} {why}.", "Give a series (or a folder) of equal slices.")


def runs(frames: Sequence[FrameRef]) -> Iterator[tuple[Instance, list[int]]]:
    """Neighbouring frames of the same file taken together."""
    start = 0
    for at in range(1, len(frames) + 1):
        if at == len(frames) or frames[at].instance is not frames[start].instance:
            yield frames[start].instance, [frame.index for frame in frames[start:at]]
            start = at
