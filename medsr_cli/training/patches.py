"""Crops of the packed slices and of what belongs to them, drawn at random.

What is drawn depends on the random numbers given alone. A guide, a label map and a low-resolution partner are cut
at the same place as the image and turned with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medsr_cli.training.pack import PackedSlices, Role
from medsr_cli.training.recipe import Recipe

FloatArray = NDArray[np.float32]

DRAWS = 8
"""How often a patch that is too flat is drawn again."""


@dataclass(frozen=True)
class Place:
    """A rectangle of one slice; `reduced`: it is averaged 2x2."""

    index: int
    top: int
    left: int
    rows: int
    columns: int
    reduced: bool = False


@dataclass(frozen=True)
class Patch:
    """What was cut at one place."""

    volume: int
    image: FloatArray
    """(C, H, W)."""
    guide: FloatArray | None = None
    """(1, H, W)."""
    labels: NDArray[np.int64] | None = None
    """(H, W)."""
    low: FloatArray | None = None
    """(C, h, w): the low-resolution partner's."""
    stack: int = 0
    """Patches of neighbouring slices at one place have one number."""

    def turned(self, which: int) -> Patch:
        """All of it in one of the eight symmetries of the square."""
        return replace(
            self,
            image=augmented(self.image, which),
            guide=None if self.guide is None else augmented(self.guide, which),
            labels=None if self.labels is None else augmented(self.labels, which),
            low=None if self.low is None else augmented(self.low, which),
        )

    def brightened(self, gain: np.float32) -> Patch:
        """The image and its partner times a number; the guide stays."""
        return replace(self, image=self.image * gain, low=None if self.low is None else self.low * gain)


class Crops:
    """Draws places in the given slices, every volume equally often, and cuts them out.

    Args:
        slices: the packed slices.
        indices: which of them.
        recipe: for the flips, the gain, and which patches are drawn again.
        roles: what is cut beside the image; each of the slices has it.
        scale: of the low-resolution partner, and what the corners of patches are multiples of where there is one.
    """

    def __init__(
        self,
        slices: PackedSlices,
        indices: NDArray[np.int64],
        recipe: Recipe,
        roles: Collection[Role] = (),
        scale: int = 1,
    ) -> None:
        self.slices, self.recipe, self.roles, self.scale = slices, recipe, roles, scale
        of_volume = slices.volume_of[indices]
        self.by_volume = [indices[of_volume == v] for v in np.unique(of_volume)]

    # -- where ---------------------------------------------------------------------------------------------

    def index(self, rng: np.random.Generator) -> int:
        """A slice."""
        volume = self.by_volume[rng.integers(len(self.by_volume))]
        return int(volume[rng.integers(len(volume))])

    def neighbours(self, rng: np.random.Generator, count: int) -> list[int]:
        """Up to so many consecutive slices of one volume, all of one size."""
        volume = self.by_volume[rng.integers(len(self.by_volume))]
        first = int(rng.integers(max(len(volume) - count, 0) + 1))
        stack = volume[first : first + count]
        same = (self.slices.shapes[stack] == self.slices.shapes[stack[0]]).all(axis=1)
        return [int(index) for index in stack[same]]

    def square(self, rng: np.random.Generator, side: int) -> tuple[Place, FloatArray]:
        """A square anywhere in a slice, and the image there; flat ones are drawn again."""
        place = self._square(rng, side)
        image = self._image(place)
        for _ in range(DRAWS):
            if image.std() >= self.recipe.minimum_deviation:
                break
            place = self._square(rng, side)
            image = self._image(place)
        return place, image

    def _square(self, rng: np.random.Generator, side: int) -> Place:
        index = self.index(rng)
        rows, columns = (int(n) for n in self.slices.shapes[index])
        large = not self.roles and min(rows, columns) >= 2 * side
        reduced = large and bool(rng.random() < self.recipe.reduced_share)
        reach = 2 * side if reduced else side
        top = int(rng.integers(max(rows - reach, 0) + 1))
        left = int(rng.integers(max(columns - reach, 0) + 1))
        return Place(index, self.snapped(top), self.snapped(left), side, side, reduced)

    def snapped(self, pixel: int) -> int:
        """The last pixel up to this one that begins a whole pixel of the low-resolution partner."""
        return pixel - pixel % self.scale if "low" in self.roles else pixel

    # -- what ----------------------------------------------------------------------------------------------

    def _image(self, place: Place) -> FloatArray:
        times = 2 if place.reduced else 1
        rows, columns = place.rows, place.columns
        image = self.slices.crop_of("image", place.index, place.top, place.left, times * rows, times * columns)
        if not place.reduced:
            return image
        # Plane by plane: means over two axes of more would be added up in another order.
        return np.stack([plane.reshape(rows, 2, columns, 2).mean(axis=(1, 3)) for plane in image])

    def cut(self, place: Place, image: FloatArray | None = None, stack: int = 0) -> Patch:
        """The image and its companions at a place; the image can be given if it is there already."""
        i, top, left, rows, columns = place.index, place.top, place.left, place.rows, place.columns
        s, slices = self.scale, self.slices
        low = None
        if "low" in self.roles:
            low = slices.crop_of("low", i, top // s, left // s, rows // s, columns // s)
        return Patch(
            volume=int(slices.volume_of[i]),
            image=self._image(place) if image is None else image,
            guide=slices.crop_of("guide", i, top, left, rows, columns) if "guide" in self.roles else None,
            labels=slices.labels(i, top, left, rows, columns) if "labels" in self.roles else None,
            low=low,
            stack=stack,
        )

    def varied(self, rng: np.random.Generator, patches: Sequence[Patch]) -> list[Patch]:
        """The patches turned and brightened as the recipe asks, all alike; what is not square keeps its sides."""
        result = list(patches)
        if self.recipe.augment:
            which = int(rng.integers(8))
            square = result[0].image.shape[-2] == result[0].image.shape[-1]
            result = [patch.turned(which if square else which & 3) for patch in result]
        if self.recipe.gain > 1:
            gain = np.float32(self.recipe.gain ** rng.random())
            result = [patch.brightened(gain) for patch in result]
        return result


def augmented(patch: NDArray, which: int) -> NDArray:  # type: ignore[type-arg]  # the type that comes in goes out
    """One of the eight symmetries of the square, 0 to 7, in the last two axes."""
    if which & 1:
        patch = patch[..., ::-1, :]
    if which & 2:
        patch = patch[..., ::-1]
    if which & 4:
        patch = patch.swapaxes(-1, -2)
    return patch
