"""Texts of a DICOM header as the bytes that they are: kept to the last one, whatever their character set.

pydicom decodes a text when it is looked at and encodes it anew when it is written. What does not decode comes back as
question marks, and escape sequences of ISO 2022 come back differently. So every text of a source is held as bytes from
the moment its header is read, and what medsr adds is plain ASCII, joined at a place where every character set of PS3.3
section C.12.1.1.2 reads ASCII as itself: before a text, or behind one that has returned to its first code elements as
PS3.5 section 6.1.2.5.3 demands, which is put right where it has not.
"""

from __future__ import annotations

import re
from typing import Any

from pydicom.charset import convert_encodings, decode_bytes, encode_string
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.valuerep import PersonName

TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
"""Value representations that SpecificCharacterSet is about (PS3.5 section 6.1.2.3)."""

LONG_STRING = 64
"""Characters of a LO value."""

_ESCAPE_TO_G0 = re.compile(rb"\x1b(\([A-Z]|\$[@AB]|\$\([A-Z])")
_SINGLE_BYTE = (b"(B", b"(J")
_TO_ASCII = b"\x1b(B"
_DELIMITERS = {ord(character) for character in "\t\n\f\r\\"}
"""Behind one of these a text is in its first code elements again."""
_LEADING_ASCII = re.compile(rb"[\x20-\x7e]*")


def hold_texts(ds: Dataset) -> None:
    """Replace every text that nobody has decoded yet by its bytes, at every level, in place.

    Afterwards the values are `bytes` (several of them a list, names `PersonName`s of these bytes) and are written as
    they were read but for the padding. Creators of private blocks stay texts, for pydicom looks them up.
    """
    _hold(ds, _encodings(ds))


def _hold(ds: Dataset, encodings: list[str]) -> None:
    if "SpecificCharacterSet" in ds:
        encodings = _encodings(ds)
    for tag in list(ds.keys()):
        read = ds.get_item(tag)
        held: Any = read.value if read.is_raw else None
        element = ds[tag]
        if element.VR == "SQ":
            for item in element.value:
                _hold(item, encodings)
        elif held and str(element.VR) in TEXT_VRS and not _is_creator(tag):
            _set_bytes(element, held, encodings)


def _set_bytes(element: DataElement, value: bytes, encodings: list[str]) -> None:
    if element.VR != "PN":
        element.value = value
        return
    names = [PersonName(part, encodings) for part in value.split(b"\\")]
    element.value = names[0] if len(names) == 1 else names


def _is_creator(tag: BaseTag) -> bool:
    return tag.is_private and 0x10 <= tag.element <= 0xFF


def text_of(ds: Dataset, keyword: str) -> bytes:
    """A text's bytes without padding; those of several values with their separators; none where there is no text."""
    value = ds.get(keyword)
    parts = list(value) if hasattr(value, "append") else [value]
    encodings = _encodings(ds)
    held = [_encoded(part, encodings) for part in parts if part is not None]
    return b"\\".join(held).strip(b" \0")


def put_before(ds: Dataset, keyword: str, text: str, longest: int, between: str = "\r\n") -> None:
    """Put ASCII before what an element says, which loses characters at its end where both are too long together."""
    ours = text[:longest] + between
    earlier = _shortened(text_of(ds, keyword), _encodings(ds), max(longest - len(ours), 0))
    setattr(ds, keyword, (ours if earlier else text[:longest]).encode("ascii", "replace") + earlier)


def put_behind(ds: Dataset, keyword: str, text: str) -> None:
    """Put ASCII behind what a long string says, which loses characters at its end where both are too long together."""
    encodings = _encodings(ds)
    earlier = _shortened(text_of(ds, keyword), encodings, LONG_STRING - len(text))
    setattr(ds, keyword, (_returned(earlier) + text.encode("ascii", "replace")).strip())


def _shortened(value: bytes, encodings: list[str], longest: int) -> bytes:
    """At most so many characters: escape sequences and the bytes of one character are none of their own."""
    text = decode_bytes(value, encodings, _DELIMITERS)
    if len(text) <= longest:
        return value
    if not value.isascii() and encodings == _encodings(Dataset()) and _is_utf_8(value):
        return value[:longest].decode("utf-8", "ignore").encode()  # said to be ASCII: each byte counts
    cut = text[:longest]
    shorter = encode_string(cut, encodings)
    if decode_bytes(shorter, encodings, _DELIMITERS) == cut and "\ufffd" not in cut:
        return shorter
    return _LEADING_ASCII.match(value)[0][:longest]  # type: ignore[index]


def _is_utf_8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _returned(value: bytes) -> bytes:
    """The value, with the way back to ASCII where it ends in a set of two bytes a character."""
    escapes = _ESCAPE_TO_G0.findall(value)
    return value if not escapes or escapes[-1] in _SINGLE_BYTE else value + _TO_ASCII


def _encodings(ds: Dataset) -> list[str]:
    return convert_encodings(ds.get("SpecificCharacterSet") or "ISO_IR 6")


def _encoded(part: object, encodings: list[str]) -> bytes:
    return part if isinstance(part, bytes) else encode_string(str(part), encodings)
