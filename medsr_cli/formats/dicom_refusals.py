"""Which images are not upscaled, and the reason that the user reads."""

from __future__ import annotations

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


def refusal(instance: Instance) -> str | None:
    """Why a file with pixels cannot be upscaled: the predicate of a sentence, or None."""
    for check in (_refused_kind, _refused_packing, _refused_bits):
        why = check(instance)
        if why is not None:
            return why
    return None


def _refused_kind(i: Instance) -> str | None:
    if i.sop_class in _NOT_IMAGES:
        return _NOT_IMAGES[i.sop_class]
    if i.sop_class.startswith(_RADIOTHERAPY) or i.modality in ("RTDOSE", "RTPLAN", "RTSTRUCT"):
        return "is a radiotherapy object, not a diagnostic image"
    if i.modality == "SEG":
        return _NOT_IMAGES["1.2.840.10008.5.1.4.1.1.66.4"]
    if i.mosaic:
        return "is a Siemens mosaic: its tiles are slices, and would bleed into each other"
    if i.pixels is not None and i.pixels.floating:
        return _NOT_IMAGES["1.2.840.10008.5.1.4.1.1.30"]
    return None


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
