"""Which private elements a derived image keeps.

Scanners write the grid of their image a second time into elements of their own, and some programs believe these more
than the standard's: dcm2niix takes Siemens' CSA header before anything else. On a new grid they are wrong, and
nobody could tell.

| rule | keeps |
|---|---|
| `safe` (the default) | what can be read here and says nothing about the grid of the pixels |
| `all` | also what cannot be read: vendors' binary headers, values of unknown type |
| `none` | nothing, down into every sequence |

What says something about the grid, and goes under every rule:

- Siemens: the CSA image header (0029,xx10), and under any creator every value that begins as one does (`SV10`); the
  count of mosaic tiles (0019,xx0A); the slice's position (0019,xx15); the bandwidth per pixel along the phase
  (0019,xx28), and (0021,xx53) of XA, from which dcm2niix computes echo spacing and read-out time for the pixels that
  it finds.
- GE: effective echo spacing (0043,xx2C), of the same use; centres, corners and sizes of the image in (0027,xx42) to
  (0027,xx44), (0027,xx48) to (0027,xx4D), (0027,xx60) and (0027,xx61).
- Philips: water-fat shift in pixels (2001,xx22).
- Any element that pydicom's dictionary of private elements knows under a name that speaks of pixels, rows, columns,
  image dimensions, positions, corners, overlays or mosaics.
- Any number or text that repeats the source's ImagePositionPatient or PixelSpacing.
- Rows, Columns, spacings and positions inside private sequences (`dicom_grid` takes these out).

Creators that were renamed when the image was de-identified are in no dictionary: the elements above are then told by
their number alone, as dcm2niix tells them. What cannot be read is what has the type OB, OD, OF, OL, OV, OW or UN,
unless its bytes are plain text or its creator's dictionary gives it another type. A reserved block that nothing is
left of goes, too.

Diffusion weighting, slice times, Philips' and PET's scale factors, protocol names and the like stay, and with them
most of the private elements that PS3.15 section E.3.10 lists as safe. The rules are about the grid, not about who
the patient is: nothing here is a de-identification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from pydicom.datadict import private_dictionary_description
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from medsr_cli.errors import ArgumentsError
from medsr_cli.formats.dicom_headers import Plane

_Keep = Callable[[DataElement, str], bool]

RULES: Final = ("safe", "all", "none")
"""What `--private-tags` takes."""

_UNREADABLE = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN", "OB or OW"})
_CSA = b"SV10"
_PLAIN_TEXT = re.compile(rb"[\x20-\x7e\t\r\n\f]+[\x00 ]?")

_ABOUT_THE_GRID = frozenset({
    ("SIEMENS", 0x0019, 0x0A), ("SIEMENS", 0x0019, 0x15), ("SIEMENS", 0x0019, 0x28), ("SIEMENS", 0x0021, 0x53),
    ("SIEMENS", 0x0029, 0x10), ("GEMS", 0x0043, 0x2C), ("Philips", 0x2001, 0x22),
    *(("GEMS", 0x0027, element) for element in (*range(0x42, 0x45), *range(0x48, 0x4E), 0x60, 0x61)),
})  # fmt: skip
"""First letters of the creator, group, last byte of the element."""
_MAKERS = tuple({maker.upper() for maker, *_ in _ABOUT_THE_GRID})
_MAKERS_OF = {
    (group, element): tuple(maker.upper() for maker, *number in _ABOUT_THE_GRID if number == [group, element])
    for _, group, element in _ABOUT_THE_GRID
}
_SAID_IN_CSA = re.compile(rb"ImagePositionPatient|PixelSpacing\x00|NumberOfImagesInMosaic")
"""Fields of a CSA image header; that of the series holds the protocol alone."""
_SAID_OF_THE_GRID = re.compile(
    r"pixel|mosaic|overlay|image dimension|image position|image matrix|image (rows|columns)|corner|"
    r"recon(struction)? (resolution|columns|rows|matrix)|number of (rows|columns)|slice position|"
    r"water.?fat.?shift|effective.?echo.?spacing",
    re.IGNORECASE,
)
_LONGEST_TEXT = 256
"""Bytes of a text that is looked through for numbers."""
_NOT_SMALL_MM = 10
_NEAR_MM = 5e-4
"""How far a repeated position or spacing may be from the source's: they are often rounded."""


def check_rule(rule: str) -> None:
    """Refuse a rule that there is not.

    Raises:
        ArgumentsError: it is none of `RULES`.
    """
    if rule not in RULES:
        msg = f"There is no rule for private tags called {rule}."
        raise ArgumentsError(msg, f"Choose one of: {', '.join(RULES)}.")


def prune_private(ds: Dataset, rule: str, planes: Iterable[Plane]) -> None:
    """Take out the private elements that a rule does not keep, at every level, in place.

    Args:
        ds: a data set as the source has it, its grid included.
        rule: one of `RULES`.
        planes: where the source's frames lie; a value that repeats one of them goes.
    """
    repeated = _repeated(planes)

    def keep(element: DataElement, creator: str) -> bool:
        if rule == "none" or _is_about_the_grid(element, creator):
            return False
        if any(_repeats(element, numbers) for numbers in repeated):
            return False
        return rule == "all" or str(element.VR) not in _UNREADABLE or _is_plain_text(element.value)

    _prune(ds, keep, keeps_creators=rule != "none")


def _prune(ds: Dataset, keep: _Keep, keeps_creators: bool) -> None:
    creators: dict[tuple[int, int], str] = {}
    for tag in _private_tags(ds):
        block = tag.group, tag.element >> 8
        if block not in creators:
            creators[block] = _creator_of(ds, tag)
        if not keep(ds[tag], creators[block]):
            del ds[tag]
    used = {(tag.group, tag.element >> 8) for tag in _private_tags(ds)}
    for tag in [tag for tag in ds.keys() if tag.is_private and 0x10 <= tag.element <= 0xFF]:  # noqa: SIM118
        if not keeps_creators or (tag.group, tag.element) not in used:
            del ds[tag]
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                _prune(item, keep, keeps_creators)


def _private_tags(ds: Dataset) -> list[BaseTag]:
    """All but the creators."""
    return [tag for tag in ds.keys() if tag.is_private and not 0x10 <= tag.element <= 0xFF]  # noqa: SIM118


def _creator_of(ds: Dataset, tag: BaseTag) -> str:
    creator = ds.get(Tag(tag.group, tag.element >> 8))
    value = None if creator is None else creator.value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return str(value or "").strip()


def _is_about_the_grid(element: DataElement, creator: str) -> bool:
    value = element.value
    if isinstance(value, bytes) and value.startswith(_CSA) and _SAID_IN_CSA.search(value):
        return True
    name = _name(element.tag, creator)
    if name is not None and _SAID_OF_THE_GRID.search(name):
        return True
    makers = _MAKERS_OF.get((element.tag.group, element.tag.element & 0xFF))
    if makers is None:
        return False
    renamed = name is None and not creator.upper().startswith(_MAKERS)
    return renamed or creator.upper().startswith(makers)


def _name(tag: BaseTag, creator: str) -> str | None:
    """What pydicom's dictionary calls an element; None where it does not know the creator."""
    try:
        return private_dictionary_description(tag, creator)
    except KeyError:
        return None


def _repeated(planes: Iterable[Plane]) -> list[tuple[float, ...]]:
    """Numbers in a row that nothing but a copy of the grid would have."""
    found: dict[tuple[float, ...], None] = {}
    for plane in planes:
        if plane.position_mm is not None and _is_telling(plane.position_mm):
            found[plane.position_mm] = None
        if plane.spacing_mm is not None and all(value != round(value) for value in plane.spacing_mm):
            found[plane.spacing_mm] = None
    return list(found)


def _is_telling(position_mm: tuple[float, ...]) -> bool:
    """Whether nobody would write these three numbers for something else: two with decimals, or unlike and not small."""
    if sum(value != round(value) for value in position_mm) >= 2:
        return True
    sizes = {abs(value) for value in position_mm}
    return len(sizes) == 3 and sorted(sizes)[1] >= _NOT_SMALL_MM and 0 not in sizes


def _repeats(element: DataElement, numbers: tuple[float, ...]) -> bool:
    values = list(_numbers(element))
    length = len(numbers)
    return any(
        all(abs(a - b) <= _NEAR_MM for a, b in zip(values[at : at + length], numbers, strict=True))
        for at in range(len(values) - length + 1)
    )


def _numbers(element: DataElement) -> Iterator[float]:
    """Numbers of an element, and of a text between separators; none of a long one."""
    value = element.value
    if element.VR == "SQ":
        return
    if isinstance(value, bytes):
        if len(value) > _LONGEST_TEXT or not _is_plain_text(value):
            return
        value = value.decode("ascii")
    if isinstance(value, str):
        value = re.split(r"[\\\s,*/]+", value)
    for part in value if isinstance(value, Iterable) else [value]:
        try:
            yield float(part)
        except (TypeError, ValueError, OverflowError):
            continue


def _is_plain_text(value: object) -> bool:
    return isinstance(value, bytes) and _PLAIN_TEXT.fullmatch(value) is not None
