"""How the grids of two images lie to each other, and their slices brought onto one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.contract import Pixels, Reader
from medsr_cli.tasks.evaluation_inputs import filled
from medsr_cli.tasks.maps import map_volume
from medsr_cli.volume.degradation import Degradation
from medsr_cli.volume.geometry import Affine
from medsr_cli.volume.intensity import IntensityRange, usable_values
from medsr_cli.volume.volume import Volume

Unit = NDArray[np.float64]
Mask = NDArray[np.bool_]
How = Literal["same", "first shrunken", "second shrunken", "second resampled"]

SAME_PLACE_SHARE = 0.05
"""Share of a voxel that corresponding corners of two grids may lie apart."""
TOUCHED = 1e-6
"""Share of a resampled pixel above which a voxel that is no number makes it none."""
LEAST_COVERAGE = 0.5
"""Share of the first image that a resampled second one has to cover."""


@dataclass(frozen=True)
class Relation:
    """What has to be done to compare two images voxel by voxel."""

    how: How
    factors: tuple[float, float] = (1.0, 1.0)
    """Of the larger image's rows and columns to the smaller one's."""

    def sentence(self, first: str, second: str) -> str:
        """What was done, for a person; empty where nothing had to be."""
        by = " x ".join(f"{factor:g}" for factor in dict.fromkeys(self.factors))
        return {
            "same": "",
            "first shrunken": f"{first} is {by} times finer in plane: it was shrunken to the grid of {second}.",
            "second shrunken": f"{second} is {by} times finer in plane: it was shrunken to the grid of {first}.",
            "second resampled": f"{second} lies on another grid: it was resampled to that of {first}, linearly.",
        }[self.how]


def relation_of(first: Reader, second: Reader, *, resample: bool) -> Relation:
    """How two images can be compared.

    Args:
        first: A.
        second: B.
        resample: whether B may be resampled to A's grid where they lie otherwise.

    Raises:
        InputRefused: their grids differ; the sentence says in what.
    """
    a, b = first.volume, second.volume
    if a.channels - a.alpha != b.channels - b.alpha:
        msg = f"{mention(first.path.name)} has {a.channels} channels, {mention(second.path.name)} has {b.channels}."
        raise InputRefused(msg, "Compare images of one kind.")
    found = _aligned(a, b)
    if found is not None:
        return found
    differing = grid_differences(a, b)
    if not resample:
        msg = f"{mention(first.path.name)} and {mention(second.path.name)} are not on one grid: {'; '.join(differing)}."
        raise InputRefused(msg, "--resample brings the second one onto the grid of the first by their positions.")
    if a.affine is None or b.affine is None or a.channels != 1:
        msg = (
            f"{mention(first.path.name)} and {mention(second.path.name)} cannot be laid over "
            f"each other: {'; '.join(differing)}."
        )
        raise InputRefused(msg, "Only grey images that say where they lie are resampled.")
    return Relation("second resampled")


def _aligned(a: Volume, b: Volume) -> Relation | None:
    if a.slices != b.slices or a.plane_axes != b.plane_axes:
        return None
    if (a.rows, a.columns) == (b.rows, b.columns):
        return Relation("same") if _in_place(a, b) else None
    for how, large, small in (("first shrunken", a, b), ("second shrunken", b, a)):
        factors = large.rows / small.rows, large.columns / small.columns
        whole = all(factor.is_integer() for factor in factors)
        if whole and min(factors) >= 1 and _in_place(small.enlarged(large.rows, large.columns), large):
            return Relation(how, factors)  # type: ignore[arg-type]
    return None


def _in_place(a: Volume, b: Volume) -> bool:
    """Whether two grids of one size lie in one place; those that do not say where they lie are taken to."""
    if a.affine is None or b.affine is None:
        return True
    if a.array_shape[:3] != b.array_shape[:3]:
        return False
    return largest_distance_mm(a, b) <= SAME_PLACE_SHARE * float(np.linalg.norm(b.affine[:3, :3], axis=0).min())


def largest_distance_mm(a: Volume, b: Volume) -> float:
    """Between corresponding corners of two grids of one shape that say where they lie."""
    assert a.affine is not None and b.affine is not None  # noqa: S101, PT018 - the caller has looked
    last = np.array((*a.array_shape, 1, 1)[:3]) - 1
    corners = np.array([[*(np.array(corner) * last), 1] for corner in product((0, 1), repeat=3)], np.float64)
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())


def grid_differences(a: Volume, b: Volume) -> list[str]:
    """What differs between two grids, a phrase each, sizes and places of both stated."""
    found = []
    if (a.rows, a.columns, a.slices) != (b.rows, b.columns, b.slices):
        found.append(
            f"{a.rows} x {a.columns} pixels in {a.slices} slices against "
            f"{b.rows} x {b.columns} pixels in {b.slices} slices"
        )
    if a.plane_axes != b.plane_axes:
        found.append(f"slices along array axis {a.slice_axis} against {b.slice_axis}")
    if (a.affine is None) != (b.affine is None):
        found.append(f"only the {'second' if a.affine is None else 'first'} says where it lies")
    elif a.affine is not None and b.affine is not None and not np.allclose(a.affine, b.affine, atol=1e-3):
        found.append(f"affine {_affine_words(a.affine)} against {_affine_words(b.affine)}")
    return found or ["their corners lie apart"]


def _affine_words(affine: Affine) -> str:
    return "[" + ", ".join(" ".join(f"{value:.4g}" for value in row) for row in affine[:3]) + "]"


@dataclass(frozen=True)
class Seen:
    """Range of an image in its file's own units."""

    low: float
    high: float
    not_numbers: int = 0
    """Pixels that are NaN or infinite, on the file's own grid."""

    @property
    def width(self) -> float:
        """Largest less smallest value."""
        return self.high - self.low


@dataclass(frozen=True)
class Holes:
    """Pixels (rows, columns) of one slice that are no numbers in the first and in the second image."""

    first: Mask
    second: Mask

    @property
    def alone(self) -> Mask:
        """Numbers in one image only."""
        return self.first ^ self.second

    @property
    def either(self) -> Mask:
        """Left out of whatever goes by pixels."""
        return self.first | self.second


def no_numbers(colour: Pixels) -> Mask:
    """(rows, columns) of (colours, rows, columns): where any colour is NaN or infinite."""
    if colour.dtype.kind != "f":
        return np.zeros(colour.shape[-2:], np.bool_)
    return np.asarray(~np.isfinite(colour).all(axis=0), np.bool_)


def in_units(reader: Reader) -> Iterator[tuple[Unit, Mask]]:
    """Slices (colours, rows, columns) in the file's own units, and (rows, columns) of what is no number in them.

    Padding and what is no number take the least value.
    """
    volume = reader.volume
    slope, intercept = volume.value_scale
    for pixels in reader.slices():
        colour = pixels[: volume.channels - volume.alpha]
        yield filled(colour, volume.padding).astype(np.float64) * slope + intercept, no_numbers(colour)


def seen_of(reader: Reader) -> Seen:
    """Read an image once and find its range.

    Raises:
        InputRefused: all its values are equal.
    """
    low, high, odd = np.inf, -np.inf, 0
    volume = reader.volume
    slope, intercept = volume.value_scale
    for pixels in reader.slices():
        colour = pixels[: volume.channels - volume.alpha]
        odd += int(no_numbers(colour).sum())
        usable, _, _ = usable_values(colour, volume.padding)
        if usable.size:
            ends = float(usable.min()) * slope + intercept, float(usable.max()) * slope + intercept
            low, high = min(low, *ends), max(high, *ends)
    if not low < high:
        msg = f"{mention(reader.path.name)} has the same value everywhere: there is nothing to compare."
        raise InputRefused(msg)
    return Seen(low, high, odd)


def slices_on_one_grid(
    first: Reader, second: Reader, relation: Relation, degradation: Degradation
) -> Iterator[tuple[Unit, Unit, Holes]]:
    """Both images slice by slice, (colours, rows, columns) of one size, in their own units, and what is no number.

    A pixel that was shrunken or resampled is no number where any that it covers, or lies between, is none.
    """
    how, a, b = relation.how, first.volume, second.volume
    others = _resampled(first, second) if how == "second resampled" else in_units(second)
    for (one, odd), (other, other_odd) in zip(in_units(first), others, strict=True):
        if how == "first shrunken":
            small = degradation.down(one, (b.rows, b.columns)).astype(np.float64)
            yield small, other, Holes(_shrunken(odd, b), other_odd)
        elif how == "second shrunken":
            small = degradation.down(other, (a.rows, a.columns)).astype(np.float64)
            yield one, small, Holes(odd, _shrunken(other_odd, a))
        else:
            yield one, other, Holes(odd, other_odd)


def _shrunken(mask: Mask, to: Volume) -> Mask:
    """A mask on a grid that is coarser by whole factors: where any of the pixels of a block is set."""
    rows, columns = mask.shape
    blocks = mask.reshape(to.rows, rows // to.rows, to.columns, columns // to.columns)
    return np.asarray(blocks.any(axis=(1, 3)), np.bool_)


def _resampled(first: Reader, second: Reader) -> Iterator[tuple[Unit, Mask]]:
    """The second image at the voxel centres of the first, by their positions; outside of it its least value."""
    from medsr_cli.formats.placed_image import View, load, places_of, slice_affine

    a, b = first.volume, second.volume
    assert a.affine is not None and b.affine is not None  # noqa: S101, PT018 - `relation_of` has looked
    target, own = slice_affine(a, a.affine), slice_affine(b, b.affine)
    grid, size = (a.columns, a.rows, places_of(a)), (b.columns, b.rows, places_of(b))
    if a.slices != grid[2] or b.slices != size[2]:
        msg = "Images of several time points are compared on one grid only."
        raise InputRefused(msg, "Take one time point out of each.")
    view = View(np.linalg.inv(own) @ target, grid, size)
    if view.coverage < LEAST_COVERAGE:
        msg = (
            f"{mention(second.path.name)} covers {view.coverage:.0%} of "
            f"{mention(first.path.name)}: they show different places."
        )
        raise InputRefused(msg, "Check that they are of one patient and in one frame of reference.")
    masks: list[Mask] = []
    placed = load(b, _noting(second, masks), own)
    # Of an image without holes there is no second one to sample.
    odd = load(map_volume(b), (mask[None].astype(np.float32) for mask in masks), own) if np.any(masks) else None
    for at in range(grid[2]):
        plane = view.sample(placed, at).astype(np.float64)
        mask = np.zeros(plane.shape, np.bool_) if odd is None else view.sample(odd, at) > TOUCHED
        yield (plane * (placed.high - placed.low) + placed.low)[None], mask


def _noting(reader: Reader, masks: list[Mask]) -> Iterator[Pixels]:
    """The slices of a grey image as they are read; `masks` is given what is no number in each."""
    for pixels in reader.slices():
        masks.append(no_numbers(pixels[:1]))
        yield pixels


def grid_of(first: Reader, second: Reader, relation: Relation) -> Volume:
    """The grid on which both are compared."""
    return second.volume if relation.how == "first shrunken" else first.volume


def position_mm(volume: Volume, row: float, column: float, slice_number: int) -> list[float] | None:
    """RAS+ position of a place in slice `slice_number` (from 0); None where the image does not say."""
    if volume.affine is None:
        return None
    index = np.zeros(4)
    index[3] = 1
    places = (*volume.array_shape, 1, 1, 1)[volume.slice_axis]
    for axis, at in zip((*volume.plane_axes, volume.slice_axis), (row, column, slice_number % places), strict=True):
        if axis < 3:
            index[axis] = at
    return [round(float(value), 3) for value in (volume.affine @ index)[:3]]


def working_range(seen: Seen) -> IntensityRange:
    """The range that metrics take as [0, 1]."""
    return IntensityRange(seen.low, seen.high)
