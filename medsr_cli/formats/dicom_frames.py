"""The header of a multi-frame object that keeps only some of its frames.

What is listed frame by frame keeps the entries of these frames; what points to frames by their numbers points to the
new ones; what counts frames or durations of all is counted anew, or goes. Sources: PS3.3 C.7.6.16 (functional groups,
dimensions, concatenations), C.7.6.5 (cine), C.7.6.6 (multi-frame), C.7.6.10 (mask), C.8.6.3 (vectors of secondary
captures).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.dicom_overlays import keep_overlay_frames

_OF_ALL_FRAMES = (
    "ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber", "ConcatenationFrameOffsetNumber",
    "EffectiveDuration",
)  # fmt: skip
"""True of the whole object only: a part of a concatenation that lost frames is an object of its own."""

_FRAME_TIME, _FRAME_TIME_VECTOR = Tag("FrameTime"), Tag("FrameTimeVector")


def keep_frames(ds: Dataset, count: int, frames: Sequence[int]) -> None:
    """Bring a header down to some of its frames, in place.

    Args:
        ds: of a multi-frame object.
        count: its frames.
        frames: those to keep, from 0, ascending.
    """
    ds.NumberOfFrames = len(frames)
    if len(frames) == count:
        return
    for keyword in _OF_ALL_FRAMES:
        ds.pop(keyword, None)
    _keep_times(ds, count, frames)
    _keep_vectors(ds, count, frames)
    _point_anew(ds, frames)
    keep_overlay_frames(ds, frames)
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    if groups:
        kept = [groups[frame] for frame in frames if frame < len(groups)]
        ds.PerFrameFunctionalGroupsSequence = Items(kept)
        _count_anew(kept)


def _keep_times(ds: Dataset, count: int, frames: Sequence[int]) -> None:
    """Frame times: a frame's time is that since the frame before it, and the first one's is 0 (C.7.6.5.1.2)."""
    vector = _numbers(ds.get("FrameTimeVector"))
    if len(vector) == count:
        ends = [sum(vector[: frame + 1]) for frame in frames]
        _set_vector(ds, ends)
        return
    single = _numbers(ds.get("FrameTime"))
    steps = {b - a for a, b in itertools.pairwise(frames)}
    if not single or len(steps) == 0:
        return
    if len(steps) == 1:
        ds.FrameTime = format_number_as_ds(single[0] * steps.pop())
        return
    del ds.FrameTime
    _set_vector(ds, [frame * single[0] for frame in frames])
    pointer = ds.get("FrameIncrementPointer")
    if pointer == _FRAME_TIME:
        ds.FrameIncrementPointer = _FRAME_TIME_VECTOR


def _set_vector(ds: Dataset, ends: Sequence[float]) -> None:
    steps = [0.0, *(b - a for a, b in itertools.pairwise(ends))]
    ds.FrameTimeVector = [format_number_as_ds(step) for step in steps]


def _keep_vectors(ds: Dataset, count: int, frames: Sequence[int]) -> None:
    """Whatever else has one value for each frame, by name and by number (C.8.6.3, C.8.7.4, C.8.7.5, C.8.4.8)."""
    for element in ds:
        name = element.keyword
        if not name.endswith(("Vector", "Increment")) or name == "FrameTimeVector":
            continue
        values = element.value
        if isinstance(values, (list, MultiValue)) and len(values) == count:
            element.value = [values[frame] for frame in frames]


def _point_anew(ds: Dataset, frames: Sequence[int]) -> None:
    """Numbers of frames, from 1, in what is told of single frames; what is said of missing ones goes."""
    new = {frame + 1: at for at, frame in enumerate(frames, 1)}
    for keyword in ("RepresentativeFrameNumber", "StartTrim", "StopTrim"):
        old = _numbers(ds.get(keyword))
        if old and int(old[0]) in new:
            setattr(ds, keyword, new[int(old[0])])
        else:
            ds.pop(keyword, None)
    interesting = [int(value) for value in _numbers(ds.get("FrameNumbersOfInterest"))]
    if interesting:
        kept = [at for at, frame in enumerate(interesting) if frame in new]
        _keep_entries(ds, "FrameNumbersOfInterest", kept, lambda value: new[int(value)])
        for keyword in ("FrameOfInterestDescription", "FrameOfInterestType"):
            _keep_entries(ds, keyword, kept, lambda value: value)
    if any(_numbers(mask.get("MaskFrameNumbers")) for mask in ds.get("MaskSubtractionSequence") or []):
        del ds.MaskSubtractionSequence  # its mask may be gone, and its ranges are of other frames


def _keep_entries(ds: Dataset, keyword: str, kept: Sequence[int], change: Callable[[Any], Any]) -> None:
    value = ds.get(keyword)
    if value is None:
        return
    values = list(value) if isinstance(value, (list, MultiValue)) else [value]
    entries = [change(values[at]) for at in kept if at < len(values)]
    if entries:
        setattr(ds, keyword, entries)
    else:
        delattr(ds, keyword)


def _count_anew(groups: Sequence[Dataset]) -> None:
    """Ordinals of C.7.6.16.2.2 and C.7.6.17, which run from 1 without gaps: in each dimension, stack and time."""
    contents = [(group.get("FrameContentSequence") or [Dataset()])[0] for group in groups]
    values = [_numbers(content.get("DimensionIndexValues")) for content in contents]
    dimensions = {len(value) for value in values}
    if len(dimensions) == 1 and dimensions != {0}:
        ranks = [_ranks(column) for column in zip(*values, strict=True)]
        for content, value in zip(contents, values, strict=True):
            content.DimensionIndexValues = [rank[v] for rank, v in zip(ranks, value, strict=True)]
    _count_within(contents, "InStackPositionNumber", lambda content: content.get("StackID"))
    _count_within(contents, "TemporalPositionIndex", lambda content: None)


def _count_within(contents: Sequence[Dataset], keyword: str, part: Callable[[Dataset], Any]) -> None:
    for name in {part(content) for content in contents}:
        having = [content for content in contents if part(content) == name and content.get(keyword) is not None]
        ranks = _ranks(content[keyword].value for content in having)
        for content in having:
            setattr(content, keyword, ranks[content[keyword].value])


def _ranks(values: Iterable[Any]) -> dict[Any, int]:
    return {value: at for at, value in enumerate(sorted(set(values)), 1)}


def _numbers(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    try:
        return [float(v) for v in (value if isinstance(value, (list, MultiValue)) else [value])]
    except (TypeError, ValueError):
        return []
