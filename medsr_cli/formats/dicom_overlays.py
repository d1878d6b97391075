"""Overlays (60xx): planes of bits over the image, enlarged with it so that a drawn line stays where it was drawn.

A new pixel shows an overlay where the old pixel that its centre lies in did: nearest neighbour, on edges that align
(the grid of `dicom_grid`). What lies outside the image, or outside the part of it that was enlarged, is cut off.
Counts and statistics of the region (ROI area, mean and deviation) go: they are of the source's pixels. Overlays of
the old kind, in the unused upper bits of the pixels, are dropped: those bits are not read.

Curves (50xx, retired) that are drawn in pixels are dropped; others, an ECG for instance, have no grid and stay.

All of what is dropped or cut is said. PS3.3 sections C.9.2 and C.9.3; bits are packed as PS3.5 section 8.1.2 has it:
the first pixel in the lowest bit of the first byte, rows and frames without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medsr_cli.formats.dicom_grid import Grid

Bits = NDArray[np.uint8]

IN_PIXELS = "An overlay that the source keeps in the upper bits of its pixels is left out of the result."
UNREADABLE = "An overlay of the source that does not fit its own size is left out of the result."
CUT = "What the source's overlays draw outside the enlarged part is left out of the result."
CURVES = "Curves that the source draws in its own pixels are left out of the result."

_DATA, _ROWS, _COLUMNS, _FRAMES, _ORIGIN, _FIRST_FRAME = 0x3000, 0x10, 0x11, 0x15, 0x50, 0x51
_KIND, _UNITS = 0x0020, 0x0030
_OF_THE_SOURCE = (0x1301, 0x1302, 0x1303)
_DRAWN_IN_PIXELS = ("ROI", "PROF", "HIST", "POLY", "TABL")


def rewrite_overlays(ds: Dataset, grid: Grid, frame: int | None) -> list[str]:
    """Bring all overlays and curves onto the new grid, in place; returns what was lost, a sentence each.

    Args:
        frame: the frame of a multi-frame source that the data set is to hold alone, counted from 0; None for all.
    """
    said: list[str] = []
    for group in sorted({tag.group for tag in ds.keys() if 0x6000 <= tag.group <= 0x60FF}):  # noqa: SIM118
        said.extend(_rewrite(ds, group, grid, frame))
    if _drop_curves(ds):
        said.append(CURVES)
    return list(dict.fromkeys(said))


def keep_overlay_frames(ds: Dataset, frames: Sequence[int]) -> None:
    """Bring overlays of several frames down to those of some frames of the image, in place.

    An overlay's frames lie on consecutive frames of the image; one of the kept frames that had none gets an empty one.

    Args:
        frames: of the image, from 0, in their new order.
    """
    for group in sorted({tag.group for tag in ds.keys() if 0x6000 <= tag.group <= 0x60FF}):  # noqa: SIM118
        if _value(ds, group, _FRAMES) is None and _value(ds, group, _FIRST_FRAME) is None:
            continue  # one that lies on every frame
        drawn = _bits(ds, group)
        if drawn is None:
            continue  # said and dropped with the other unreadable ones
        chosen = [_of_frame(ds, group, len(drawn), frame) for frame in frames]
        if all(at is None for at in chosen):
            _drop(ds, group)
            continue
        kept = np.stack([np.zeros_like(drawn[0]) if at is None else drawn[at] for at in chosen])
        ds.add_new(Tag(group, _FRAMES), "IS", len(frames))
        ds.add_new(Tag(group, _FIRST_FRAME), "US", 1)
        ds.add_new(Tag(group, _DATA), "OW", _packed(kept))


def _rewrite(ds: Dataset, group: int, grid: Grid, frame: int | None) -> list[str]:
    if Tag(group, _DATA) not in ds:
        _drop(ds, group)
        return [IN_PIXELS]
    frames = _bits(ds, group)
    if frames is None:
        _drop(ds, group)
        return [UNREADABLE]
    if frame is not None:
        chosen = _of_frame(ds, group, len(frames), frame)
        if chosen is None:
            _drop(ds, group)
            return []
        frames = frames[chosen : chosen + 1]
        for element in (_FRAMES, _FIRST_FRAME):
            ds.pop(Tag(group, element), None)
    origin = _value(ds, group, _ORIGIN)
    top, left = (int(value) - 1 for value in origin) if origin else (0, 0)
    rows = _covered(grid.rows, grid.new_rows, grid.first[0] - top, frames.shape[1])
    columns = _covered(grid.columns, grid.new_columns, grid.first[1] - left, frames.shape[2])
    said = [CUT] if _loses(frames, rows[1], columns[1]) else []
    if not len(rows[1]) or not len(columns[1]):
        _drop(ds, group)
        return said
    enlarged = frames[:, rows[1]][:, :, columns[1]]
    _store(ds, group, enlarged, rows[0], columns[0])
    return said


def _bits(ds: Dataset, group: int) -> Bits | None:
    """(frames, rows, columns) of zeros and ones; None where the element is shorter than it says."""
    try:
        rows, columns = int(_value(ds, group, _ROWS)), int(_value(ds, group, _COLUMNS))
        shape = (int(_value(ds, group, _FRAMES) or 1), rows, columns)
        data = np.frombuffer(_value(ds, group, _DATA), np.uint8)
    except (TypeError, ValueError):
        return None
    needed = shape[0] * rows * columns
    if min(shape) < 1 or len(data) * 8 < needed:
        return None
    return np.unpackbits(data, count=needed, bitorder="little").reshape(shape)


def _covered(length: int, new_length: int, start: int, overlay: int) -> tuple[int, NDArray[np.intp]]:
    """First new pixel that an overlay covers along one axis, and the overlay's own pixel for each that it covers.

    Args:
        length: old pixels of the enlarged part.
        new_length: new ones.
        start: the first of the old ones, counted from the overlay's first.
        overlay: pixels of the overlay.
    """
    # The centre of new pixel k lies at (k + 1/2) length / new_length, counted from the edge, in old pixels.
    old = ((2 * np.arange(new_length, dtype=np.int64) + 1) * length) // (2 * new_length) + start
    inside = np.flatnonzero((old >= 0) & (old < overlay))
    return (int(inside[0]) if len(inside) else 0), old[inside].astype(np.intp)


def _loses(frames: Bits, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> bool:
    """Whether a bit is set that no new pixel shows."""
    kept = np.zeros(frames.shape[1:], np.bool_)
    kept[np.ix_(np.unique(rows), np.unique(columns))] = True
    return bool((frames.astype(np.bool_) & ~kept).any())


def _of_frame(ds: Dataset, group: int, frames: int, frame: int) -> int | None:
    """Which frame of the overlay belongs to one frame of the image; one that is on all of them belongs to each."""
    count, first = _value(ds, group, _FRAMES), _value(ds, group, _FIRST_FRAME)
    if count is None and first is None:
        return 0
    at = frame - (int(first or 1) - 1)
    return at if 0 <= at < frames else None


def _store(ds: Dataset, group: int, frames: Bits, top: int, left: int) -> None:
    values: dict[int, Any] = {
        _ROWS: frames.shape[1],
        _COLUMNS: frames.shape[2],
        _ORIGIN: [top + 1, left + 1],
        0x0100: 1,
        0x0102: 0,
    }
    vrs = {_ORIGIN: "SS"}
    for element, value in values.items():
        ds.add_new(Tag(group, element), vrs.get(element, "US"), value)
    ds.add_new(Tag(group, _DATA), "OW", _packed(frames))
    for element in _OF_THE_SOURCE:
        ds.pop(Tag(group, element), None)


def _packed(frames: Bits) -> bytes:
    packed = np.packbits(frames.reshape(-1), bitorder="little").tobytes()
    return packed + b"\0" * (len(packed) % 2)


def _drop_curves(ds: Dataset) -> bool:
    """Take out the curves drawn in pixels; whether there were any."""
    dropped = False
    for group in sorted({tag.group for tag in ds.keys() if 0x5000 <= tag.group <= 0x50FF}):  # noqa: SIM118
        if _value(ds, group, _KIND) in _DRAWN_IN_PIXELS or "PIXL" in (_value(ds, group, _UNITS) or ()):
            _drop(ds, group)
            dropped = True
    return dropped


def _value(ds: Dataset, group: int, element: int) -> Any:
    return ds[Tag(group, element)].value if Tag(group, element) in ds else None


def _drop(ds: Dataset, group: int) -> None:
    for tag in [tag for tag in ds.keys() if tag.group == group]:  # noqa: SIM118
        del ds[tag]
