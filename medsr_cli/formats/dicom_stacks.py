"""Which frames of a series make up one stack, in which order they lie, and where the stack lies in the patient.

A series may hold more than slices of one block: the three planes of a localiser, a summary picture after the slices,
another matrix. Frames of one direction, size, spacing and kind of pixels are one stack (PS3.3 C.7.6.2 and, frame by
frame, C.7.6.16.2), but never those of two patients or studies that share a SeriesInstanceUID by mistake. Stacks and
their order follow from what the files hold and not from their names, so that a second export gives the same ones.
Upscaling happens in the plane of each slice, so that a stack need not be even or complete: what is missing, doubled or
tilted is said, and every slice keeps the place that its own header gives.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.dicom_files import Member, refusing
from medsr_cli.formats.dicom_headers import GREY, PALETTE, Instance, Plane
from medsr_cli.formats.limits import MIB
from medsr_cli.volume.geometry import LPS_FROM_RAS

Vectors = NDArray[np.float64]

SAME_PLACE_MM = 1e-3
"""Slices closer than this along the normal are at the same place."""
SAME_STACK_MM = 0.05
"""Images at the same place further apart than this in the plane lie side by side."""
SAME_DIRECTION = 1e-3
"""Largest difference of a direction cosine within a stack (0.06 degrees)."""
SAME_SPACING = 1e-3
"""Largest relative difference of pixel spacing within a stack."""
UNEVEN_MM, UNEVEN = 0.01, 0.01
"""Steps between slices may differ by this many mm, or this part of a step, and still count as even."""
TILT_DEGREES = 0.1
FAR_MM = 1e6
"""No image lies a kilometre away; arithmetic with such places would lose the millimetres."""
MOST_STACKS = 200
"""Stacks of one series; one that falls into more pieces is none that can be sorted out."""

LOCALIZER = frozenset({"LOCALIZER", "SCOUT", "SURVEY"})
"""ImageType of planning images; the first is the standard's (PS3.3 C.8.2.1.1.1 for CT), the others are scanners'."""
LOCALISER_IMAGES = 30
"""Stacks of three planes with more images than this are reformatted volumes, not localisers."""
THREE_PLANES = 0.5
"""Volume that the three normals of a localiser span at least: 1 where they are perpendicular, 0 within a plane."""


@dataclass(frozen=True, slots=True)
class FrameRef:
    """One frame of one file."""

    instance: Instance
    index: int

    @property
    def plane(self) -> Plane:
        """Where it lies."""
        return self.instance.planes[self.index]


@dataclass(frozen=True, eq=False)
class FrameGroup(Sequence[Instance]):
    """Frames of one series that make up a stack, in the order in which they were found; a sequence of their files."""

    parts: tuple[tuple[Instance, Sequence[int]], ...]
    """Files, and which of their frames belong here."""
    copies: int = 0
    """Files that are there once more, byte for byte, and were left out."""
    localiser: bool = False
    refusal: str | None = None
    """Why the frames cannot be taken together: the predicate of a sentence, or None."""

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, at: Any) -> Any:
        return self.parts[at][0] if isinstance(at, int) else [instance for instance, _ in self.parts[at]]

    @cached_property
    def images(self) -> int:
        """How many frames there are."""
        return sum(len(indices) for _, indices in self.parts)

    @property
    def frames(self) -> list[FrameRef]:
        """All frames."""
        return [FrameRef(instance, index) for instance, indices in self.parts for index in indices]

    @property
    def first(self) -> FrameRef:
        """The frame that was found first."""
        instance, indices = self.parts[0]
        return FrameRef(instance, indices[0])


@dataclass(frozen=True)
class Stack:
    """Frames in the order in which they are streamed: slice after slice, time point after time point."""

    frames: tuple[FrameRef, ...]
    points: int = 1
    """Images at each place."""
    affine: NDArray[np.float64] | None = None
    """(column, row, slice) to mm, RAS+; None where no single grid holds the slices."""
    slice_spacing_mm: float | None = None
    """Between slices, along the way from one to the next; None where it is not known or not always the same."""
    tilt_degrees: float = 0.0
    """Between the way from slice to slice and the normal of the slices: the gantry tilt of sheared CT."""
    smallest_step_mm: float | None = None
    """Between neighbouring slices along their normal; None for one slice or unknown places."""
    largest_step_mm: float | None = None
    warnings: tuple[str, ...] = ()


# -- separating -----------------------------------------------------------------------------------------------


def separate(instances: Sequence[Instance], most_frames: int) -> list[FrameGroup]:
    """The stacks of one series, in the order of their first images by InstanceNumber.

    Args:
        instances: the files of a series.
        most_frames: a series that claims more frames is one group, refused for that by the size check that follows.

    Raises:
        InputRefused: two files that say they are the same image cannot be compared.
    """
    taken, copies, clash = _taken_once(sorted(instances, key=_by_number))
    if sum(instance.frames for instance in taken) > most_frames:
        return [_whole(taken)]
    parts = _Sorter()
    for instance in taken:
        parts.add(instance)
    if parts.overflow:
        why = f"holds images of more than {MOST_STACKS} different directions or sizes"
        return [replace(_whole(taken), refusal=why)]
    groups = [FrameGroup(tuple(found), localiser=_says_localiser(found[0][0])) for found in parts.groups]
    if _three_planes(groups):
        groups = [replace(g, localiser=g.localiser or g.images <= LOCALISER_IMAGES) for g in groups]
    return [_checked(group, copies, clash) for group in groups]


def _whole(instances: Sequence[Instance]) -> FrameGroup:
    return FrameGroup(tuple((instance, range(instance.frames)) for instance in instances))


class _Sorter:
    """Puts frames into groups; a group's first frame says what belongs to it."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Instance, Sequence[int]]]] = []
        self.overflow = False
        self._exact: dict[tuple[Any, ...], int] = {}
        self._kinds: dict[tuple[Any, ...], list[int]] = {}
        self._planes: list[Plane] = []

    def add(self, instance: Instance) -> None:
        """All frames of a file."""
        kind = _kind(instance)
        found: dict[int, list[int]] = {}
        whole = len({id(plane) for plane in instance.planes}) <= 1
        for index, plane in enumerate(instance.planes[:1] if whole else instance.planes):
            at = self._group_of(kind, plane)
            if at is None:
                self.overflow = True
                return
            found.setdefault(at, []).append(index)
        for at, indices in found.items():
            self.groups[at].append((instance, range(instance.frames) if whole else indices))

    def _group_of(self, kind: tuple[Any, ...], plane: Plane) -> int | None:
        key = (kind, plane.orientation, plane.spacing_mm, plane.position_mm is None)
        at = self._exact.get(key)
        if at is None:
            known = self._kinds.setdefault(kind, [])
            at = next((at for at in known if _alike(self._planes[at], plane)), None)
            if at is None:
                if len(self.groups) == MOST_STACKS:
                    return None
                at = len(self.groups)
                self.groups.append([])
                self._planes.append(plane)
                known.append(at)
            self._exact[key] = at
        return at


def _kind(i: Instance) -> tuple[Any, ...]:
    """What a file's pixels are, and of whom; files that differ in it are different stacks."""
    colours = i.photometric if i.photometric in GREY | {PALETTE} else "colour"
    return i.rows, i.columns, colours, i.stored_dtype.str, _says_localiser(i), i.study, i.patient


def _says_localiser(instance: Instance) -> bool:
    return any(part.strip().upper() in LOCALIZER for part in instance.image_type)


def _alike(a: Plane, b: Plane) -> bool:
    if (a.position_mm is None) != (b.position_mm is None):
        return False
    return _near(a.orientation, b.orientation, SAME_DIRECTION, 0) and _near(a.spacing_mm, b.spacing_mm, 0, SAME_SPACING)


def _near(a: Sequence[float] | None, b: Sequence[float] | None, absolute: float, relative: float) -> bool:
    if a is None or b is None:
        return a is b
    return all(abs(x - y) <= absolute + relative * abs(x) for x, y in zip(a, b, strict=True))


def _three_planes(groups: Sequence[FrameGroup]) -> bool:
    """Whether three of the stacks are about perpendicular to each other, as the planes of a localiser are.

    Radial slices turn about one axis: all their normals lie in one plane and span no volume.
    """
    planes = [group.first.plane for group in groups if group.first.plane.position_mm is not None]
    if len(planes) < 3:
        return False
    normals = np.array([_normal(plane) for plane in planes])
    second = normals[np.argmax(np.linalg.norm(np.cross(normals[0], normals), axis=1))]
    return bool(np.abs(normals @ np.cross(normals[0], second)).max() > THREE_PLANES)


# -- the same image twice -------------------------------------------------------------------------------------


def _taken_once(instances: Sequence[Instance]) -> tuple[list[Instance], Counter[str], set[str]]:
    """Files without copies of others, byte for byte; how many copies by identity; identities of unlike images."""
    taken: list[Instance] = []
    first: dict[str, Instance] = {}
    copies: Counter[str] = Counter()
    clash: set[str] = set()
    for instance in instances:
        name = instance.sop_instance
        twin = first.setdefault(name, instance) if name else instance
        if twin is not instance and _same_bytes(twin.member, instance.member):
            copies[name] += 1
            continue
        taken.append(instance)
        if twin is not instance:
            clash.add(name)
    return taken, copies, clash


def _same_bytes(a: Member, b: Member) -> bool:
    if a.size != b.size:
        return False
    with refusing(b.name, "comparing it with its copy"), a.open() as one, b.open() as other:
        while True:
            block = one.read(MIB)
            if block != other.read(MIB):
                return False
            if not block:
                return True


def _checked(group: FrameGroup, copies: Counter[str], clash: set[str]) -> FrameGroup:
    names = {instance.sop_instance for instance in group}
    why = "holds two different images under one SOPInstanceUID" if names & clash else None
    return replace(group, copies=sum(copies[name] for name in names), refusal=why)


# -- arranging ------------------------------------------------------------------------------------------------


def arrange(path: Path, group: FrameGroup) -> Stack:
    """Put the frames of one stack in order.

    Returns:
        The stack, with what is uneven, missing, doubled or tilted about it in its warnings.

    Raises:
        InputRefused: slices lie impossibly far away.
    """
    frames = group.frames
    said: list[str] = []
    if group.copies:
        said.append(f"{group.copies} file(s) are copies of others, byte for byte; each image is taken once.")
    if frames[0].plane.position_mm is None:
        return _unplaced(frames, said)
    positions = np.array([frame.plane.position_mm for frame in frames])
    if np.abs(positions).max() > FAR_MM:
        msg = f"{mention(path.name)} places its slices more than a kilometre away."
        raise InputRefused(msg, "Check the header.")
    places = _places(frames, positions @ _normal(frames[0].plane))
    points = len(places[0])
    regular = all(len(place) == points for place in places)
    beside = any(_apart_mm(place) > SAME_STACK_MM for place in places)
    # The first image of each place, then the second of each: time points, where all of them are there.
    ordered = [place[at] for at in range(max(map(len, places))) for place in places if at < len(place)]
    if not regular:
        few, many = min(map(len, places)), max(map(len, places))
        said.append(
            f"There are {few} to {many} images at a place (a time series with gaps, or several echoes); "
            "each is upscaled in its own plane."
        )
    elif beside:
        said.append("Images lie side by side at the same height; each is upscaled in its own plane.")
    elif points > 1:
        said.append(f"There are {points} images at each place; they are taken as {points} time points.")
    if not regular or beside:
        low, high = _extreme_steps([place[0] for place in places])
        return Stack(tuple(ordered), smallest_step_mm=low, largest_step_mm=high, warnings=tuple(said))
    return _located(ordered, points, said)


def _unplaced(frames: list[FrameRef], said: list[str]) -> Stack:
    ordered = sorted(frames, key=lambda frame: (*_by_number(frame.instance), frame.index))
    if len({id(frame.instance) for frame in frames}) > 1:
        said.append("The images carry no position; they are taken in the order of their instance numbers.")
    return Stack(tuple(ordered), warnings=tuple(said))


def _places(frames: list[FrameRef], heights: Vectors) -> list[list[FrameRef]]:
    """Frames by their height along the normal; those of one height in the order in which they were acquired."""
    places: list[list[FrameRef]] = []
    last = -math.inf
    for at in np.argsort(heights, kind="stable"):
        if heights[at] - last > SAME_PLACE_MM:
            places.append([])
        last = heights[at]
        places[-1].append(frames[at])
    for place in places:
        place.sort(key=_acquired)
    return places


def _acquired(frame: FrameRef) -> tuple[Any, ...]:
    return frame.plane.temporal, *_by_number(frame.instance), frame.index


def _by_number(instance: Instance) -> tuple[Any, ...]:
    """InstanceNumber; where that is the same, the SOPInstanceUID, part by part; names only where there is no number."""
    uid = tuple((len(part), part) for part in instance.sop_instance.split("."))
    name = instance.member.name
    return instance.number or 0, name if instance.number is None else "", uid, name


def _apart_mm(place: list[FrameRef]) -> float:
    here = np.array([_position(frame) for frame in place])
    return float(np.abs(here - here[0]).max())


def _located(frames: list[FrameRef], points: int, said: list[str]) -> Stack:
    """The affine of the first time point, if its steps are even; what is uneven or tilted is said."""
    first = frames[0].plane
    stack = frames[: len(frames) // points]
    positions = np.array([_position(frame) for frame in stack])
    normal = _normal(first)
    step, known_step, even = _step(positions, normal, stack[0].instance.slice_spacing_mm)
    low, high = _extreme_steps(stack)
    if not even:
        said.append(_uneven_sentence(low, high))
    tilt = _tilt_degrees(positions, step, normal)
    if tilt > TILT_DEGREES:
        said.append(f"The slices are shifted against each other (gantry tilt of {tilt:.1f} degrees).")
    affine = None
    if even and first.spacing_mm is not None and first.orientation is not None:
        lps = np.eye(4)
        lps[:3, 0] = np.array(first.orientation[:3]) * first.spacing_mm[1]
        lps[:3, 1] = np.array(first.orientation[3:]) * first.spacing_mm[0]
        lps[:3, 2], lps[:3, 3] = step, positions[0]
        affine = LPS_FROM_RAS @ lps
    spacing = float(np.linalg.norm(step)) if even and known_step else None
    return Stack(tuple(frames), points, affine, spacing, tilt, low, high, tuple(said))


def _step(positions: Vectors, normal: Vectors, thickness_mm: float | None) -> tuple[Vectors, bool, bool]:
    """The way from slice to slice, whether the file says how long it is, and whether it is always the same."""
    if len(positions) == 1:
        return normal * (thickness_mm or 1.0), thickness_mm is not None, True
    steps = np.diff(positions, axis=0)
    mean: Vectors = (positions[-1] - positions[0]) / (len(positions) - 1)
    allowed = max(UNEVEN_MM, UNEVEN * float(np.linalg.norm(mean)))
    even = bool(np.linalg.norm(steps - mean, axis=1).max() <= allowed)
    return mean, True, even


def _extreme_steps(stack: Sequence[FrameRef]) -> tuple[float | None, float | None]:
    """Smallest and largest step along the normal, mm."""
    if len(stack) < 2:
        return None, None
    steps = np.diff([float(_position(frame) @ _normal(stack[0].plane)) for frame in stack])
    return float(steps.min()), float(steps.max())


def _uneven_sentence(low: float | None, high: float | None) -> str:
    size = "" if low is None or high is None or high - low < 1e-3 else f", {low:.4g} to {high:.4g} mm apart"
    return f"The slices are not evenly spaced{size} (some may be missing); each is upscaled in its own plane."


def _tilt_degrees(positions: Vectors, step: Vectors, normal: Vectors) -> float:
    """Angle between the line on which all slices lie and their normal; 0 where they lie on no line."""
    if len(positions) < 2:
        return 0.0
    along = step / (float(np.linalg.norm(step)) or 1.0)
    offsets = positions - positions[0]
    off_line = np.linalg.norm(offsets - np.outer(offsets @ along, along), axis=1).max()
    if off_line > max(UNEVEN_MM, UNEVEN * float(np.linalg.norm(step))):
        return 0.0
    return math.degrees(math.acos(min(abs(float(along @ normal)), 1.0)))


def _normal(plane: Plane) -> Vectors:
    along, down = np.split(np.array(plane.orientation), 2)
    normal = np.cross(along, down)
    length = float(np.linalg.norm(normal))
    return normal / length if length else normal


def _position(frame: FrameRef) -> Vectors:
    return np.array(frame.plane.position_mm)


def runs(frames: Sequence[FrameRef]) -> Iterator[tuple[Instance, list[int]]]:
    """Neighbouring frames of the same file taken together."""
    for _, together in itertools.groupby(frames, key=lambda frame: id(frame.instance)):
        neighbours = list(together)
        yield neighbours[0].instance, [frame.index for frame in neighbours]
