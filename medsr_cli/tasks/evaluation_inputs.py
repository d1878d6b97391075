"""The images of a folder that an evaluation measures, each with its guide, its mask and its usable slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli import formats
from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.contract import Pixels, Reader, ReadOptions
from medsr_cli.volume.intensity import IntensityRange, full_scale, usable_values

if TYPE_CHECKING:
    from medsr_cli.training.gather import Found

Unit = NDArray[np.float64]

FEWEST_VALUES = 16
"""An image with fewer distinct values is a label map or a drawing."""
SMALLEST_SIDE = 32
"""Shorter slices leave no window of a metric once a border is taken off."""


@dataclass(frozen=True)
class Choice:
    """Which images of a folder are measured."""

    folder: Path
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    """Patterns of the images that are enlarged; none takes all but the guides, or T2 and FLAIR for a guided model."""
    guides: tuple[str, ...] = ()
    """Patterns of the images that guide them."""
    axis: str = "auto"


@dataclass(frozen=True)
class Chosen:
    """The images of a folder that are measured, not opened yet, each with its guide and its mask."""

    images: list[Found]
    notes: list[str]
    """Which image guides which, and what was taken for one subject."""
    left_out: list[str]
    """A sentence for each file that is not measured or not used."""
    unguided: dict[str, str]
    """Why an image has no guide, where guides are needed, by the image's name."""


def images_of(choice: Choice, *, guided: bool = False, labels: bool = False) -> Chosen:
    """The images of a folder in a fixed order, with what belongs to them as `medsr finetune` finds it.

    Args:
        choice: which of them.
        guided: whether each is a target that needs a guide; of those without one `unguided` says why.
        labels: whether masks are looked for.

    Raises:
        InputRefused: there is no such folder, no image in it, or not one pair of a target and a guide.
    """
    from medsr_cli.training.companions import TARGETS, Rules, attach, is_called
    from medsr_cli.training.gather import find_tree, matches, subject_of

    if not choice.folder.is_dir():
        msg = f"There is no folder {mention(choice.folder)}."
        raise InputRefused(msg, "Name a folder of images, those of each subject in a folder of its own.")

    def of_subject(image: Found) -> bool:
        return not choice.subjects or any(matches(s, choice.subjects) for s in (image.subject, subject_of(image.name)))

    def measured(image: Found) -> bool:
        return (
            (not choice.include or matches(image.name, choice.include))
            and (not choice.targets or is_called(image, choice.targets))
            and not (choice.guides and is_called(image, choice.guides))
        )

    # Patterns that choose images are for those that are measured: guides need not be included by name, and a mask
    # belongs to the image it is named after, whether that is measured or not.
    tree = find_tree(choice.folder, formats.is_image_name, (), choice.exclude, series_of, choice.include)
    tree.images[:], tree.labels[:] = filter(of_subject, tree.images), filter(of_subject, tree.labels)
    if not any(map(measured, tree.images)):
        msg = f"No image to measure was found in {mention(choice.folder)}."
        raise InputRefused(msg, "Check --include, --exclude, --subject and --target; medsr inspect shows what is read.")
    rules = Rules(labels=labels, guided=guided, targets=choice.targets or TARGETS, guides=choice.guides)
    attached = attach(tree, rules, lambda image: _opened(image, choice.axis))
    found = {image.name: image for image in attached.images}
    images = [
        found.get(image.name, image)
        for image in tree.images
        if measured(image) and (image.name in found or image.name in attached.unguided)
    ]
    left_out = [sentence for sentence in attached.skipped if sentence not in attached.unguided.values()]
    return Chosen(images, attached.notes, left_out, attached.unguided)


def series_of(path: Path) -> list[str]:
    """The DICOM series of a folder or archive that are images, by the numbers that `medsr inspect` shows."""
    from medsr_cli.formats.dicom_series import study_of

    stacks = study_of(path, ReadOptions()).stacks
    return [stack.selector for stack in stacks if stack.refusal is None and stack.aside is None]


def _opened(image: Found, axis: str) -> Reader:
    return formats.open_image(image.path, ReadOptions(axis, image.series))


@dataclass
class Opened:
    """An image that can be measured."""

    name: str
    subject: str
    reader: Reader
    intensity: IntensityRange
    """Of the whole volume, padding left out."""
    usable: list[int]
    """Slices that show something, from 0."""
    guide: Any = None
    """The opened `formats.guide.Guide` on the image's own grid, where one is needed."""
    notes: list[str] = field(default_factory=list)

    @property
    def colours(self) -> int:
        """Channels without opacity."""
        return self.reader.volume.channels - self.reader.volume.alpha

    def working(self, *, whole_type: bool) -> IntensityRange:
        """The range that is scaled to [0, 1]; `whole_type` takes 0 to 255 for images of 8 bits."""
        return full_scale(self.intensity, self.reader.volume.dtype) if whole_type else self.intensity

    def chosen(self, most: int) -> list[int]:
        """At most `most` of the usable slices, evenly spread, always the same; 0 takes all."""
        if not most or len(self.usable) <= most:
            return list(self.usable)
        return [self.usable[i] for i in np.linspace(0, len(self.usable) - 1, most).round().astype(int)]

    def slices(self, chosen: Sequence[int], working: IntensityRange) -> Iterator[tuple[int, Unit]]:
        """Number from 0 and planes (colours, rows, columns) about [0, 1], in order."""
        wanted = set(chosen)
        for number, pixels in enumerate(self.reader.slices()):
            if number in wanted:
                yield number, working.normalise(filled(pixels[: self.colours], self.reader.volume.padding))
                wanted.discard(number)
                if not wanted:
                    return


def filled(colour: Pixels, padding: float | None) -> Pixels:
    """The smallest usable value where there is padding or no number, as `upscale` hands slices to an engine."""
    masked = np.zeros(colour.shape, np.bool_)
    if padding is not None:
        masked |= colour == padding
    if colour.dtype.kind == "f":
        masked |= ~np.isfinite(colour)
    if not masked.any():
        return colour
    usable = colour[~masked]
    return np.where(masked, usable.min() if usable.size else colour.dtype.type(0), colour)


def open_target(found: Found, axis: str) -> Opened:
    """Open an image and read it once: its range, and which of its slices show anything.

    Raises:
        InputRefused: it cannot be read, is too small, constant, or a label map.
    """
    reader = _opened(found, axis)
    volume = reader.volume
    if min(volume.rows, volume.columns) < SMALLEST_SIDE:
        msg = f"{mention(found.name)} has slices of {volume.rows} x {volume.columns} pixels, too small to measure."
        raise InputRefused(msg, f"Images of at least {SMALLEST_SIDE} pixels a side are measured.")
    low, high, odd, padded, count = np.inf, -np.inf, 0, 0, 0
    usable: list[int] = []
    distinct: NDArray[Any] = np.empty(0)
    for number, pixels in enumerate(reader.slices()):
        values, n_odd, n_padded = usable_values(pixels[:-1] if volume.alpha else pixels, volume.padding)
        odd, padded, count = odd + n_odd, padded + n_padded, count + 1
        if not values.size:
            continue
        smallest, largest = float(values.min()), float(values.max())
        low, high = min(low, smallest), max(high, largest)
        if smallest < largest:
            usable.append(number)
        if len(distinct) < FEWEST_VALUES:
            distinct = np.union1d(distinct, values)
    if not usable:
        msg = f"{mention(found.name)} has the same value everywhere in each slice."
        raise InputRefused(msg)
    if len(distinct) < FEWEST_VALUES:
        msg = f"{mention(found.name)} has {len(distinct)} distinct values: it is a mask or a label map."
        raise InputRefused(msg)
    return Opened(found.name, found.subject, reader, IntensityRange(low, high, odd, padded, count), usable)


def add_guide(opened: Opened, found: Found) -> None:
    """Open a guide on the image's own grid.

    Raises:
        InputRefused: it does not show the same place.
    """
    from medsr_cli.formats.guide import open_guide

    volume = opened.reader.volume
    opened.guide = open_guide(found.path, opened.reader, volume, options=ReadOptions(series=found.series))
    opened.notes += opened.guide.warnings


def guide_slice(opened: Opened, number: int) -> NDArray[np.float32]:
    """(rows, columns) of the guide in [0, 1] at slice `number` of the image."""
    view = opened.guide.view
    plane: NDArray[np.float32] = view.sample(opened.guide.placed, number % view.grid[2])
    return plane


def other_slices(opened: Opened, chosen: Sequence[int]) -> dict[int, int]:
    """For each chosen slice another one, as far away as the stack allows: half its usable slices further on.

    Empty where the image has one usable slice only.
    """
    usable = opened.usable
    if len(usable) < 2:
        return {}
    half = len(usable) // 2
    position = {number: i for i, number in enumerate(usable)}
    return {number: usable[(position[number] + half) % len(usable)] for number in chosen}
