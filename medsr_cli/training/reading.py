"""One image and what belongs to it, as planes for a packed file: values checked, measured, scaled to [0, 1].

Every image is scaled by the smallest and largest value of its own volume. A low-resolution partner is scaled by the
range of its high-resolution image, as one that was made from it would be, unless its values are on another scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.contract import Reader
from medsr_cli.training.pack import LEVELS, PackedVolume, Planes
from medsr_cli.training.partners import chosen_slices, fits_mirrored
from medsr_cli.volume.intensity import IntensityRange, full_scale, measure
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]

FEWEST_VALUES = 16
"""An image with fewer distinct values is a label map or a drawing."""
MOST_LABELS = 200
"""A label map with more distinct values is an image."""
SMALLEST_SIDE = 16
SAME_SCALE = 0.25
"""How far, as a share of the high-resolution range, a low-resolution image's values may go beyond it."""


@dataclass(frozen=True)
class PackOptions:
    """How images become planes."""

    channels: int = 1
    """3 keeps colours, for networks that take them; 1 averages them to grey."""
    full_scale: bool = False
    """8-bit images are divided by 255, not scaled by their own range."""


def stored_channels(readers: Sequence[Reader], options: PackOptions) -> int:
    """Channels that an image has in the packed file.

    Raises:
        InputRefused: contrasts and colours are mixed, or it has a number that no network takes.
    """
    if len(readers) > 1:
        for reader in readers:
            if colours(reader.volume) != 1:
                msg = f"Channels are mixed: {mention(reader.path.name)} is in colour and one of several contrasts."
                raise InputRefused(msg, "Give grey volumes as contrasts.")
        return len(readers)
    found = colours(readers[0].volume)
    if options.channels == 1 or found == 1:
        return 1
    if found != options.channels:
        msg = f"Channels are mixed: {mention(readers[0].path.name)} has {found}, and {options.channels} are asked for."
        raise InputRefused(msg, "Leave it out with --exclude, or convert it.")
    return found


def colours(volume: Volume) -> int:
    """Channels less opacity."""
    return max(volume.channels - volume.alpha, 1)


def planes_bytes(image: Sequence[Reader], low: Reader | None, beside: Sequence[Reader], options: PackOptions) -> int:
    """What an image, its partner, and guide and labels beside it take in the packed file at most, by the headers."""
    pixels = _pixels(image[0].volume) * stored_channels(image, options)
    pixels += _pixels(low.volume) * stored_channels([low], options) if low is not None else 0
    return 2 * (pixels + sum(_pixels(reader.volume) for reader in beside))


def _pixels(volume: Volume) -> int:
    return volume.rows * volume.columns * volume.slices


# -- images ------------------------------------------------------------------------------------------------


def image_planes(readers: Sequence[Reader], channels: int) -> Iterator[Pixels]:
    """Slices (channels, rows, columns) in the images' own values; opacity left out, colours averaged for one."""
    for parts in zip(*(reader.slices() for reader in readers), strict=True):
        planes = [
            _coloured(pixels, colours(reader.volume), channels) for pixels, reader in zip(parts, readers, strict=True)
        ]
        yield planes[0] if len(planes) == 1 else np.concatenate(planes)


def _coloured(pixels: Pixels, found: int, wanted: int) -> Pixels:
    planes = pixels[:found]
    return planes if found in (1, wanted) else planes.mean(axis=0, keepdims=True)


def measured(reader: Reader, channels: int, options: PackOptions) -> tuple[IntensityRange, str]:
    """The range that a volume is scaled by, and the SHA-256 of its pixels.

    Raises:
        InputRefused: it is constant, or has so few values that it is a mask.
    """
    values: Pixels = np.empty(0)
    digest = hashlib.sha256()

    def watched() -> Iterator[Pixels]:
        nonlocal values
        for pixels in image_planes([reader], channels):
            digest.update(pixels.tobytes())
            if len(values) < FEWEST_VALUES:
                values = np.union1d(values, pixels)
            yield pixels

    span = measure(watched(), reader.volume.padding)
    if span.width == 0:
        msg = "all its pixels are equal."
        raise InputRefused(msg)
    if len(values) < FEWEST_VALUES:
        msg = f"with {len(values)} distinct values it is a mask or a label map."
        raise InputRefused(msg)
    return full_scale(span, reader.volume.dtype) if options.full_scale else span, digest.hexdigest()


def low_span(low: IntensityRange, high: IntensityRange) -> IntensityRange:
    """The range for a low-resolution image: that of the high-resolution one, if both are on one scale of values."""
    room = SAME_SCALE * high.width
    inside = low.minimum >= high.minimum - room and low.maximum <= high.maximum + room
    return replace(low, minimum=high.minimum, maximum=high.maximum) if inside and low.width >= high.width / 2 else low


def normalised(pixels: Pixels, spans: Sequence[IntensityRange]) -> NDArray[np.float64]:
    """Each channel by its range; one range is for all."""
    if len(spans) == 1:
        return spans[0].normalise(pixels)
    return np.stack([span.normalise(plane) for plane, span in zip(pixels, spans, strict=True)])


# -- label maps --------------------------------------------------------------------------------------------


class LabelMap:
    """A mask or label map, checked: whole numbers from 0 up, as (rows, columns) planes.

    Raises:
        InputRefused: it has other values, or so many that it is an image.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        values: Pixels = np.empty(0)
        for plane in self._raw():
            if plane.dtype.kind == "f" and not np.isfinite(plane).all():
                raise _no_labels(reader, "it holds NaN or infinity")
            values = np.union1d(values, plane)
            if len(values) > MOST_LABELS:
                raise _no_labels(reader, f"it has more than {MOST_LABELS} distinct values")
        if len(values) and (values[0] < 0 or values[-1] > LEVELS or (values != np.rint(values)).any()):
            raise _no_labels(reader, f"its values are not whole numbers from 0 to {LEVELS}")
        self.painted = reader.volume.dtype == np.uint8 and set(values.tolist()) in ({255.0}, {0.0, 255.0})
        """Whether it is an 8-bit picture of 0 and 255, which become 0 and 1."""
        self.values = [1 if self.painted and v else int(v) for v in values]

    def _raw(self) -> Iterator[Pixels]:
        volume = self.reader.volume
        slope, intercept = volume.value_scale
        for pixels in self.reader.slices():
            planes = pixels[: colours(volume)]
            if len(planes) > 1 and (planes != planes[:1]).any():
                raise _no_labels(self.reader, "it is in colour")
            yield planes[0] if (slope, intercept) == (1.0, 0.0) else planes[0] * slope + intercept

    def planes(self) -> Iterator[NDArray[np.uint16]]:
        """Every slice, (rows, columns)."""
        for plane in self._raw():
            yield (plane > 0 if self.painted else np.rint(plane)).astype(np.uint16)


def _no_labels(reader: Reader, why: str) -> InputRefused:
    return InputRefused(f"{mention(reader.path.name)} is no label map: {why}.")


# -- all of one image --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readers:
    """An image opened, with what belongs to it."""

    image: Sequence[Reader]
    """One, or several registered contrasts."""
    guide: Reader | None = None
    labels: LabelMap | None = None
    low: Reader | None = None


@dataclass(frozen=True)
class Measured:
    """What has to be known before the planes of an image are written; its readers have been read once."""

    readers: Readers
    channels: int
    spans: Sequence[IntensityRange]
    pixels_sha256: str
    guide_span: IntensityRange | None = None
    low_span: IntensityRange | None = None

    def described(self, record: PackedVolume) -> PackedVolume:
        """The record with what was measured."""
        first = self.spans[0]
        record = replace(record, minimum=first.minimum, maximum=first.maximum, channels=self.channels)
        if len(self.spans) > 1:
            record = replace(record, ranges=[(span.minimum, span.maximum) for span in self.spans])
        readers = self.readers
        if readers.labels is not None:
            record = replace(record, labels=readers.labels.reader.path.name, label_values=readers.labels.values)
        if readers.guide is not None and self.guide_span is not None:
            record = replace(record, guide=readers.guide.path.name, guide_range=_ends(self.guide_span))
        if readers.low is not None and self.low_span is not None:
            record = replace(record, low=readers.low.path.name, low_range=_ends(self.low_span))
        return record

    def planes(self) -> Iterator[Planes]:
        """Every slice with what belongs to it."""
        readers = self.readers
        labels = readers.labels.planes() if readers.labels is not None else None
        guides = image_planes([readers.guide], 1) if readers.guide is not None else None
        lows = image_planes([readers.low], self.channels) if readers.low is not None else None
        for pixels in image_planes(readers.image, self.channels):
            guide = low = None
            if guides is not None and self.guide_span is not None:
                guide = self.guide_span.normalise(next(guides))[0]
            if lows is not None and self.low_span is not None:
                low = self.low_span.normalise(next(lows))
            yield Planes(normalised(pixels, self.spans), guide, next(labels) if labels is not None else None, low)


def _ends(span: IntensityRange) -> tuple[float, float]:
    return span.minimum, span.maximum


def measure_all(readers: Readers, options: PackOptions) -> Measured:
    """Read an image and its companions once.

    Raises:
        InputRefused: one of them cannot be used; the sentence says which where it is not the image itself.
    """
    first = readers.image[0].volume
    if min(first.rows, first.columns) < SMALLEST_SIDE:
        msg = f"its slices have {first.rows} x {first.columns} pixels, fewer than {SMALLEST_SIDE} a side."
        raise InputRefused(msg)
    beside = [readers.guide, readers.labels.reader if readers.labels is not None else None]
    for companion in [*readers.image[1:], *(reader for reader in beside if reader is not None)]:
        if _size(companion.volume) != _size(first):
            msg = f"{mention(companion.path.name)} has another size."
            raise InputRefused(msg)
    channels = stored_channels(readers.image, options)
    spans, digests = zip(*(measured(r, min(channels, colours(r.volume)), options) for r in readers.image), strict=True)
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    guide = _of_companion(readers.guide, 1, options) if readers.guide is not None else None
    low = _of_companion(readers.low, channels, options) if readers.low is not None else None
    if readers.low is not None and (
        readers.low.volume.slices != first.slices or _misses(readers.low, channels, options)
    ):
        msg = f"{mention(readers.low.path.name)} has not the slices and channels of its high-resolution image."
        raise InputRefused(msg)
    found = Measured(
        readers=readers,
        channels=channels,
        spans=spans,
        pixels_sha256=sha256,
        guide_span=guide,
        low_span=low_span(low, spans[0]) if low is not None else None,
    )
    if readers.low is not None:
        _refuse_mirrored(found, readers.low)
    return found


def _refuse_mirrored(measured: Measured, low: Reader) -> None:
    wanted = set(chosen_slices(low.volume.slices))
    pair = replace(measured, readers=replace(measured.readers, guide=None, labels=None))
    planes = [part for number, part in enumerate(pair.planes()) if number in wanted]
    high, small = (
        np.stack([np.asarray(plane, np.float64).mean(0) for plane in stack if plane is not None])
        for stack in ([part.image for part in planes], [part.low for part in planes])
    )
    how = fits_mirrored(high, small)
    if how is not None:
        msg = (
            f"its low-resolution partner {mention(low.path.name)} fits better {how}, so the two "
            "are not of one orientation."
        )
        raise InputRefused(msg)


def _of_companion(reader: Reader, channels: int, options: PackOptions) -> IntensityRange:
    try:
        return measured(reader, channels, options)[0]
    except InputRefused as error:
        if error.sentence.startswith(mention(reader.path.name)):
            raise
        msg = f"{mention(reader.path.name)} cannot be used: {error.sentence}"
        raise InputRefused(msg) from error


def _misses(low: Reader, channels: int, options: PackOptions) -> bool:
    return stored_channels([low], options) != channels


def _size(volume: Volume) -> tuple[int, int, int]:
    return volume.rows, volume.columns, volume.slices
