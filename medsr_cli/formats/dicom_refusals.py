"""Which images are not upscaled, which only when they are named, and the reason that the user reads."""

from __future__ import annotations

import struct

from pydicom.dataset import Dataset
from pydicom.uid import UID

from medsr_cli.formats.dicom_headers import COLOUR, GREY, PALETTE, Instance
from medsr_cli.formats.dicom_pixels import can_decode

# Storage classes with pixels that are not pictures of the kind the networks were trained on.
_NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "is a segmentation: labels must not be run through a network",
    "1.2.840.10008.5.1.4.1.1.66.7": "is a label map: labels must not be run through a network",
    "1.2.840.10008.5.1.4.1.1.30": "is a parametric map: measured quantities, not an image",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "is a whole-slide image, stored in tiles that would bleed into each other",
    "1.2.840.10008.1.3.10": "is a DICOMDIR, a list of files and not an image",
}
_RADIOTHERAPY = "1.2.840.10008.5.1.4.1.1.481."
_TILED = "its tiles are slices, and would bleed into each other"
_MOSAIC = f"is a Siemens mosaic: {_TILED}"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

LOCALISER = "is a localiser"
OWN_RESULT = "is a result of medsr"
SCREEN = "is a screen that was saved"

_CSA_HEADERS = (0x1010, 0x1110, 0x1210)
"""Elements of group 0029 where Siemens scanners keep the header of an image, by the private block reserved."""
_IMAGES_IN_GRID = (0x0065, 0x1050)
"""Where United Imaging's scanners keep the same number."""
_TILES = b"NumberOfImagesInMosaic"
_CSA_NAME_BYTES, _CSA_TAG_BYTES, _CSA_ITEM_BYTES = 64, 84, 16


def refusal(instance: Instance) -> str | None:
    """Why a file with pixels cannot be upscaled: the predicate of a sentence, or None."""
    for check in (_refused_kind, _refused_pixels, _refused_packing, _refused_bits):
        why = check(instance)
        if why is not None:
            return why
    return None


def needs_header(instance: Instance) -> bool:
    """Whether the whole header may say more of what an image is than the record does."""
    return instance.modality == "MR" or instance.image_type[:1] == ("DERIVED",)


def refusal_of_header(header: Dataset) -> str | None:
    """What only the whole header tells: a mosaic whose other marks were taken away. As `refusal`."""
    for element in _CSA_HEADERS:
        value = header[0x0029, element].value if (0x0029, element) in header else None
        if isinstance(value, bytes) and csa_tiles(value) > 1:
            return _MOSAIC
    for element in (0x100A, 0x110A, 0x120A):  # the same number in the clear; the creator tells whose it is
        if (0x0019, element) not in header or (0x0019, element >> 8) not in header:
            continue
        creator = str(header[0x0019, element >> 8].value).upper()
        if creator.startswith("SIEMENS") and _whole_number(header[0x0019, element].value) > 1:
            return _MOSAIC
    grid = header[_IMAGES_IN_GRID].value if _IMAGES_IN_GRID in header else None
    return f"is a United Imaging mosaic: {_TILED}" if _whole_number(grid) > 1 else None


def csa_tiles(header: bytes) -> int:
    """NumberOfImagesInMosaic of a Siemens image header, in either of its layouts; 0 where it is not stated.

    A tag is a name of 64 bytes, five numbers of 32 bits (multiplicity, type, syngo type, items, mark) and its items:
    four numbers of 32 bits, the first (or second, in the newer layout) of which is the length of the text that follows.
    """
    at = header.find(_TILES + b"\0")
    if at < 0 or len(header) < at + _CSA_TAG_BYTES + _CSA_ITEM_BYTES:
        return 0
    items = struct.unpack_from("<i", header, at + _CSA_NAME_BYTES + 12)[0]
    text = header[at + _CSA_TAG_BYTES + _CSA_ITEM_BYTES :][:16].split(b"\0")[0].strip() if items > 0 else b""
    return int(text) if text.isdigit() else 0


def _whole_number(value: object) -> int:
    if isinstance(value, bytes):
        value = struct.unpack("<H", value)[0] if len(value) == 2 else value.decode("ascii", "replace").strip("\0 ")
    try:
        return int(str(value))
    except ValueError:
        return 0


def aside(instance: Instance, header: Dataset, *, localiser: bool) -> str | None:
    """Why an image is upscaled only when it is named, or is all there is: the predicate of a sentence, or None.

    Args:
        header: all tags of a file of the stack, or none where `needs_header` says that they tell nothing.
        localiser: whether the stack was found to be one.
    """
    made_by = [str(item.get("Manufacturer") or "") for item in header.get("ContributingEquipmentSequence") or []]
    capture = instance.sop_class == _SECONDARY_CAPTURE or instance.sop_class.startswith(f"{_SECONDARY_CAPTURE}.")
    saved = any(part.upper().startswith(("SCREEN", "SECONDARY CAPTURE")) for part in instance.image_type)
    return _first(
        (localiser, LOCALISER),
        ("medsr" in made_by, OWN_RESULT),
        (capture or saved, SCREEN),
    )


def _refused_kind(i: Instance) -> str | None:
    if i.sop_class in _NOT_IMAGES:
        return _NOT_IMAGES[i.sop_class]
    if i.sop_class.startswith(_RADIOTHERAPY) or i.modality in ("RTDOSE", "RTPLAN", "RTSTRUCT"):
        return "is a radiotherapy object, not a diagnostic image"
    if i.modality == "SEG":
        return _NOT_IMAGES["1.2.840.10008.5.1.4.1.1.66.4"]
    return _MOSAIC if i.mosaic else None


def _refused_pixels(i: Instance) -> str | None:
    if i.pixels is None:
        return "has no pixels"
    return _NOT_IMAGES["1.2.840.10008.5.1.4.1.1.30"] if i.pixels.floating else None


def _refused_packing(i: Instance) -> str | None:
    syntax = UID(i.transfer_syntax)
    other = "stores its colours in a way that is not read here"
    return _first(
        (not can_decode(syntax), f"is in a transfer syntax that is not read here ({_syntax_name(syntax)})"),
        (i.photometric not in GREY | COLOUR | {PALETTE}, other),
        (
            i.samples != (3 if i.photometric in COLOUR else 1),
            "does not say consistently whether it is grey or coloured",
        ),
        (
            i.supplemental_palette,
            "mixes grey values and entries of a colour table: colours between two entries mean nothing",
        ),
        (i.photometric == PALETTE and i.signed, other),
        (
            i.photometric == "YBR_FULL_422" and i.columns % 2 == 1 and not i.compressed,
            "stores colours for pairs of pixels but has an odd number of columns",
        ),
    )


def _refused_bits(i: Instance) -> str | None:
    depths = (8, 16, 32) if i.photometric in GREY else (8, 16)
    known = i.pixels.length if i.pixels is not None and not i.compressed else None
    return _first(
        (i.bits_allocated == 1, "is a mask of single bits: labels must not be run through a network"),
        (
            i.bits_allocated not in depths or not 1 <= i.bits_stored <= i.bits_allocated,
            f"stores {i.bits_stored} of {i.bits_allocated} bits, which is not read here",
        ),
        (i.high_bit != i.bits_stored - 1, "keeps its pixels in the upper bits, which is not read here"),
        (i.photometric in COLOUR and i.signed, "stores colours as signed numbers"),
        (
            i.photometric in ("YBR_FULL", "YBR_FULL_422") and i.bits_allocated != 8,
            "stores luminance and colour in more than 8 bits, which is not read here",
        ),
        (known is not None and known < i.frame_bytes * i.frames, "is cut short: pixels are missing"),
    )


def _first(*reasons: tuple[bool, str]) -> str | None:
    return next((why for applies, why in reasons if applies), None)


def _syntax_name(syntax: UID) -> str:
    return syntax.name if syntax.is_transfer_syntax else "unknown"
