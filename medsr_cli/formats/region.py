"""A region of interest: a rectangle of every slice, read and placed like an image of its own.

The reader of a part is of the class of the whole image's reader, since writers keep what a header of their own
format says. What such a header says about the grid is cut beforehand; DICOM's, which is read anew for every file,
is cut when it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from medsr_cli.errors import ArgumentsError, RunError, mention
from medsr_cli.formats.contract import Pixels, Reader
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.formats.nrrd import NrrdHeader, NrrdReader

NO_PLACE = "The header has no orientation: the result cannot say where in the image its region lies."

_FOUR_NUMBERS = re.compile(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", re.ASCII)


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels; rows and columns count from 0, as the reader hands them out."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Region:
        """A region from `x,y,w,h`: first column, first row, columns, rows.

        Raises:
            ArgumentsError: it is not four whole numbers, or empty.
        """
        match = _FOUR_NUMBERS.fullmatch(text)
        if match is None:
            msg = f"A region is not {text[:80]!r}."
            raise ArgumentsError(msg, "Give it as x,y,w,h: first column, first row, columns, rows, in pixels from 0.")
        left, top, width, height = map(int, match.groups())
        if not (width and height):
            msg = f"The region {text.strip()} has no pixels."
            raise ArgumentsError(msg, "Give it as x,y,w,h: first column, first row, columns, rows.")
        return cls(top, left, height, width)

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.width},{self.height}"

    def fits(self, volume: Volume) -> bool:
        """Whether it lies within the slices of a volume and has pixels."""
        return (
            0 <= self.top < self.top + self.height <= volume.rows
            and 0 <= self.left < self.left + self.width <= volume.columns
        )

    def cut(self, pixels: Pixels) -> Pixels:
        """The part of a slice (channels, rows, columns), as an array of its own."""
        part = pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return np.ascontiguousarray(part)


def cropped(reader: Reader, region: Region) -> Reader:
    """The part of an opened image that a region is, with its place; slices are cut while they stream.

    The result can be the `source` of every writer that the image itself can be the source of.

    Raises:
        ArgumentsError: the region is not within the slices.
    """
    whole = reader.volume
    if not region.fits(whole):
        msg = (
            f"The region {region} (x,y,w,h) is not within {mention(reader.path.name)}, "
            f"whose slices have {whole.columns} columns and {whole.rows} rows."
        )
        raise ArgumentsError(msg, "Choose it within the slice; columns and rows count from 0.")
    kind = type(reader)
    if not issubclass(kind, _Part):
        kind = type(f"PartOf{kind.__name__}", (_Part, kind), {})
    part: Any = object.__new__(kind)
    vars(part).update(vars(reader))
    part._whole, part._region = reader, region
    part.volume = whole.cropped(region.top, region.left, region.height, region.width)
    if whole.format in _CUT_HEADERS:
        _CUT_HEADERS[whole.format](part, region)
    return cast("Reader", part)


def centred(centre_x: float, centre_y: float, height: int, width: int, volume: Volume) -> Region:
    """The region of a fixed size around a point, on whole pixels and shifted to stay inside.

    J. Zhu's dissertation, chapter 3, crops so around the lesion that a detector finds; the snapping and the
    shifting are ours (specification of MS-GAN, section 2).

    Args:
        centre_x: 0 at the left edge of the slice, 1 at the right one; what lies beyond counts as the edge.
        centre_y: 0 at the upper edge, 1 at the lower one.
        height: rows of the region; all there are, if there are fewer.
        width: columns of the region.
        volume: the image that is cut.

    Raises:
        RunError: the point is not a number.
    """
    if not (math.isfinite(centre_x) and math.isfinite(centre_y)):
        msg = "The centre of the region is not a number."
        raise RunError(msg, "Give the region with --roi x,y,w,h.")
    top, height = _around(centre_y, height, volume.rows)
    left, width = _around(centre_x, width, volume.columns)
    return Region(top, left, height, width)


def _around(centre: float, length: int, available: int) -> tuple[int, int]:
    """First pixel and length along one axis."""
    length = min(max(length, 1), available)
    first = math.floor(min(max(centre, 0.0), 1.0) * available - length / 2 + 0.5)
    return min(max(first, 0), available - length), length


class _Part:
    """Stands before a reader's class: slices are those of the whole image, cut."""

    _whole: Reader
    _region: Region

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        for pixels in self._whole.slices():
            yield self._region.cut(pixels)


def _first_by_axis(volume: Volume, region: Region) -> dict[int, int]:
    """Array axis to the index that the part begins with."""
    return dict(zip(volume.plane_axes, (region.top, region.left), strict=True))


def _cut_nifti(part: Any, region: Region) -> None:
    from medsr_cli.formats.nifti_header import cropped_header, is_placed  # noqa: PLC0415 - as the reader, on use

    volume: Volume = part.volume
    part.header = cropped_header(part.header, _first_by_axis(volume, region), volume.array_shape)
    if not is_placed(part.header):
        warnings = tuple(dict.fromkeys((*volume.warnings, NO_PLACE)))
        part.volume = replace(volume, affine=part.header.affine, warnings=warnings)


def _cut_dicom(part: Any, region: Region) -> None:
    row, column = part.part or (0, 0)
    part.part = (row + region.top, column + region.left)


def _cut_nrrd(part: NrrdReader, region: Region) -> None:
    first = {part.axes.spatial[axis]: index for axis, index in _first_by_axis(part.volume, region).items()}
    sizes = part.header.sizes
    for axis, length in zip(part.volume.plane_axes, (region.height, region.width), strict=True):
        sizes[part.axes.spatial[axis]] = length
    part.header = replace(part.header, fields=_cut_fields(part.header, first, sizes))


def _cut_fields(header: NrrdHeader, first: Mapping[int, int], sizes: Sequence[int]) -> dict[str, str]:
    """Sizes, and the ends of the axes that are cut; ends are left out where no step says how far they move."""
    fields = {**header.fields, "sizes": " ".join(map(str, sizes))}
    steps = _numbers(fields.get("spacings"), len(sizes))
    for name in ("axis mins", "axis maxs"):
        ends = _numbers(fields.pop(name, None), len(sizes))
        if not ends or not steps:
            continue
        for axis, index in first.items():
            after = header.sizes[axis] - index - sizes[axis]
            ends[axis] += steps[axis] * (index if name == "axis mins" else -after)
        fields[name] = " ".join(map(repr, ends))
    return fields


def _numbers(text: str | None, count: int) -> list[float]:
    """As many numbers as there are axes, or none."""
    try:
        numbers = [float(part) for part in (text or "").split()]
    except ValueError:
        return []
    return numbers if len(numbers) == count else []


_CUT_HEADERS: dict[str, Any] = {"nifti": _cut_nifti, "dicom": _cut_dicom, "nrrd": _cut_nrrd}
"""By format, what the header needs beside the volume; the others' writers place a result by its volume alone."""
