"""Whether a low-resolution image shows the same field as its high-resolution partner, pixel by pixel.

A network that learns from pairs of which one side is mirrored or moved learns nonsense without a sign of it. So the
headers have to place the low-resolution grid where the image's own would lie at the scale, edges aligned, and the
pixels may not fit better mirrored, which is all that tells where images have no place, such as PNG.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.antialias import antialiased_resize
from medsr_cli.volume.geometry import is_usable
from medsr_cli.volume.volume import Volume

Stack = NDArray[np.float64]

SAME_PLACE = 0.1
"""How far apart, in voxels of the image, the corners of the two grids may lie."""
BETTER = 1e-3
"""By how much a mirrored image has to correlate better before that is no rounding."""
COMPARED = 16
"""Slices, evenly spread, whose pixels are compared."""
ANOTHER_ORDER = "its voxels run in other directions; save both in one orientation"


def misplaced(image: Volume, low: Volume, scale: int) -> str | None:
    """Why a low-resolution image is not that of an image, by the headers: a clause; None if it is.

    Args:
        image: the high-resolution image.
        low: its partner, with as many slices.
        scale: how many rows and columns of the image lie in one of the partner.
    """
    sizes = [(v.rows, v.columns, v.slices) for v in (image, low)]
    if sizes[0] != (low.rows * scale, low.columns * scale, low.slices):
        words = [" x ".join(str(n) for n in size) for size in sizes]
        return f"it has {words[1]} voxels, which times {scale} in-plane are not {words[0]}"
    if image.affine is None or low.affine is None:
        one_only = (image.affine is None) != (low.affine is None)
        return "only one of the two says where it lies" if one_only and image.slices > 1 else None
    if _depth(image) != _depth(low):
        return "its slices run along another axis"
    return _elsewhere(image, low)


def _elsewhere(image: Volume, low: Volume) -> str | None:
    ours, theirs = _of_planes(image), _of_planes(low.enlarged(image.rows, image.columns))
    if not (is_usable(ours) and is_usable(theirs)):
        return "one of the two says nowhere that it could lie"
    # In rows, columns and slices of the image; the edges of the planes, and the centres of the slices.
    ends = ((-0.5, image.rows - 0.5), (-0.5, image.columns - 0.5), (0.0, float(_depth(image) - 1)))
    corners = np.array([[i, j, k, 1.0] for i in ends[0] for j in ends[1] for k in ends[2]])
    found = corners @ (np.linalg.inv(ours) @ theirs).T
    if np.abs(found - corners).max() <= SAME_PLACE:
        return None
    nearest = np.abs(found[:, None] - corners[None]).max(2).min(1)
    if nearest.max() <= SAME_PLACE:
        return ANOTHER_ORDER
    off = np.abs(found - corners).max()
    return f"it lies in another place, {off:.2g} voxels of the image away; the edges of the two have to be the same"


def _depth(volume: Volume) -> int:
    """Slices of one volume."""
    shape = (*volume.array_shape, 1, 1, 1)
    return int(shape[volume.slice_axis])


def _of_planes(volume: Volume) -> NDArray[np.float64]:
    """From (row, column, slice) to mm, in whatever order the array is stored."""
    assert volume.affine is not None  # noqa: S101 - the caller has looked
    return np.asarray(volume.affine[:, [*volume.plane_axes, volume.slice_axis, 3]], np.float64)


# -- pixels ------------------------------------------------------------------------------------------------


def chosen_slices(count: int) -> list[int]:
    """The slices to compare, from 0: evenly spread, and with each one that which mirrors it."""
    half = np.linspace(0, (count - 1) / 2, min(COMPARED // 2, (count + 1) // 2)).astype(int).tolist()
    return sorted({*half, *(count - 1 - k for k in half)})


def fits_mirrored(high: Stack, low: Stack) -> str | None:
    """How low-resolution slices fit better than as they are, in words; None if they fit best as they are.

    Args:
        high: slices (slices, rows, columns) in any unit, evenly spread about the middle one.
        low: the same ones (slices, rows/s, columns/s).
    """
    small: Stack = np.asarray(antialiased_resize(high, (low.shape[1], low.shape[2])), np.float64)
    own = _correlation(small, low)
    names = {1: "upside down", 2: "left to right", 0: "in the reverse order of slices"}
    axes = [axis for axis in (1, 2, 0) if low.shape[axis] > 1]
    best, how = own + BETTER, None
    for turned, word in _turned(low):
        for flipped in chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)):
            if not (flipped or word):
                continue
            found = _correlation(small, np.flip(turned, flipped))
            if found > best:
                best, how = found, " and ".join([*([word] if word else []), *(names[axis] for axis in flipped)])
    return how


def _turned(low: Stack) -> Iterator[tuple[Stack, str]]:
    yield low, ""
    if low.shape[1] == low.shape[2]:
        yield low.transpose(0, 2, 1), "with rows for columns"


def _correlation(one: Stack, other: Stack) -> float:
    """Pearson's, of all pixels together; 0 where one of them is flat."""
    a, b = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0
