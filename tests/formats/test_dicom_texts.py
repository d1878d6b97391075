"""Texts keep their bytes, in every character set and in none."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_texts import LONG_STRING, hold_texts, put_before, put_behind, text_of
from tests.formats.dicom_makers import OPTIONS, derive, header, place, save

JAPANESE = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"  # PS3.5 section H.3
HALF_WIDTH = b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J"
KOREAN = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"  # section I.2
CHINESE = "王^小东".encode("gb18030")  # section J.3
GREEK = "Διονυσιος".encode("iso8859_7")
GERMAN = "Äneas^Rüdiger".encode("latin1")
WIDE = "Люкceмбypг^山田".encode()

SETS = {
    "japanese": ("\\ISO 2022 IR 87", JAPANESE),
    "half-width": ("ISO 2022 IR 13\\ISO 2022 IR 87", HALF_WIDTH),
    "korean": ("\\ISO 2022 IR 149", KOREAN),
    "chinese": ("GB18030", CHINESE),
    "backslash in a second byte": ("GB18030", "誠^乗".encode("gb18030")),
    "greek": ("ISO_IR 126", GREEK),
    "german": ("ISO_IR 100", GERMAN),
    "utf-8": ("ISO_IR 192", WIDE),
    "does not decode": ("ISO_IR 192", b"caf\xe9^\xff\xfe"),
    "no set": (None, b"caf\xe9^\xff\xfe"),
    "unknown set": ("ISO_IR 999", b"caf\xe9^\xff\xfe"),
}
VALUES = {0x00100010: "PN", 0x00102000: "LO", 0x00104000: "LT", 0x00081010: "SH", 0x00080081: "ST", 0x00081030: "LO"}


def padded(value):
    return value + b" " * (len(value) % 2)


def element(tag, vr, value):
    """An element with exactly these bytes."""
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode()
    long = vr in ("SQ", "UC", "UT", "OB", "OW")
    return head + (b"\0\0" + len(value).to_bytes(4, "little") if long else len(value).to_bytes(2, "little")) + value


def written(tmp_path, character_set, value, description=b"t1"):
    """A file whose texts have exactly these bytes, one of them in a sequence."""
    ds = place(header(), (0, 0, 0))
    for keyword in ("PatientName", "SeriesDescription"):
        delattr(ds, keyword)
    path = save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    plain = path.read_bytes()
    found = pydicom.dcmread(path)
    tags = {int(e.tag): None for e in found}
    texts = dict(VALUES) | {0x0008103E: "LO"}
    elements = {tag: element(tag, vr, padded(description if tag == 0x0008103E else value)) for tag, vr in texts.items()}
    inner = element(0x00081030, "LO", padded(value))
    item = b"\xfe\xff\x00\xe0" + len(inner).to_bytes(4, "little") + inner
    elements[0x00400275] = element(0x00400275, "SQ", item)
    if character_set is not None:
        elements[0x00080005] = element(0x00080005, "CS", padded(character_set.encode()))
    for tag in tags:
        if tag not in elements:
            start, end = span(plain, found, tag)
            elements[tag] = plain[start:end]
    meta = plain[: 132 + 12 + int.from_bytes(plain[140:144], "little")]
    path.write_bytes(meta + b"".join(elements[tag] for tag in sorted(elements)))
    return path


def span(data, ds, tag):
    """Where an element of explicit little endian begins and ends."""
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    start = data.index(head + ds[tag].VR.encode(), 132)
    if ds[tag].VR in ("OB", "OW", "SQ", "UN", "UT", "UC"):
        return start, start + 12 + int.from_bytes(data[start + 8 : start + 12], "little")
    return start, start + 8 + int.from_bytes(data[start + 6 : start + 8], "little")


def raw(path, tag):
    ds = pydicom.dcmread(path)
    return ds.get_item(tag).value


@pytest.mark.parametrize("name", SETS)
def test_texts_of_every_set_are_the_same_bytes_afterwards(tmp_path, name):
    character_set, value = SETS[name]
    path = written(tmp_path, character_set, value)
    derive(open_reader(path, OPTIONS), tmp_path / "b.dcm")
    for tag in VALUES:
        assert raw(tmp_path / "b.dcm", tag) == raw(path, tag) == padded(value), hex(tag)
    inner = pydicom.dcmread(tmp_path / "b.dcm").RequestAttributesSequence[0]
    assert inner.get_item(0x00081030).value == padded(value)
    assert pydicom.dcmread(tmp_path / "b.dcm").get(0x00080005) == pydicom.dcmread(path).get(0x00080005)
    assert raw(tmp_path / "b.dcm", 0x0008103E).strip() == b"t1 x2 rdst-e"


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2"])
def test_texts_of_other_transfer_syntaxes_too(tmp_path, syntax):
    ds = place(header(), (0, 0, 0))
    ds.SpecificCharacterSet = "ISO_IR 192"
    hold = Dataset()
    hold.add_new(0x00104000, "LT", b"caf\xe9 \xff")
    ds.update(hold)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = np.zeros((6, 5), np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "a.dcm", ds, enforce_file_format=True)
    derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / "b.dcm")
    assert raw(tmp_path / "b.dcm", 0x00104000) == b"caf\xe9 \xff"


@pytest.mark.parametrize(
    ("character_set", "encoding", "letter"),
    [("ISO_IR 192", "utf-8", "山"), ("GB18030", "gb18030", "东"), ("ISO_IR 100", "latin1", "ü"),
     ("\\ISO 2022 IR 87", "iso2022_jp", "山"), ("ISO_IR 126", "iso8859_7", "Δ")],
)  # fmt: skip
@pytest.mark.parametrize("letters", [3, 54, 55, 64])
def test_descriptions_have_64_characters_and_not_bytes(tmp_path, character_set, encoding, letter, letters):
    value = (letter * letters).encode(encoding)
    path = written(tmp_path, character_set, b"x", value)
    derive(open_reader(path, OPTIONS), tmp_path / "b.dcm")
    made = pydicom.dcmread(tmp_path / "b.dcm").SeriesDescription
    assert made == letter * min(letters, 54) + " x2 rdst-e"
    assert len(made) <= LONG_STRING
    if letters <= 54:
        assert raw(tmp_path / "b.dcm", 0x0008103E).startswith(value)


@pytest.mark.parametrize(
    ("value", "made"),
    [
        (b"\x1b$B;3ED", b"\x1b$B;3ED\x1b(B x2"),  # has not returned to ASCII
        (b"\x1b$B;3ED\x1b(B", b"\x1b$B;3ED\x1b(B x2"),
        (b"\x1b$)C\xfb\xf3", b"\x1b$)C\xfb\xf3 x2"),  # in G1, ASCII stays in G0
        (b"", b"x2"),
        (b"\xff" * 63, b"x2"),  # too long to say how many characters
        (b"T1 \xff" + b"\xff" * 63, b"T1  x2"),
    ],
)
def test_ascii_goes_behind_any_bytes(value, made):
    ds = Dataset()
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 87", "ISO 2022 IR 149"] if b"\x1b" in value else "ISO_IR 192"
    ds.add_new("SeriesDescription", "LO", value)
    put_behind(ds, "SeriesDescription", " x2")
    assert ds.SeriesDescription == made


def test_ascii_goes_before_any_bytes():
    ds = Dataset()
    ds.add_new("ImageComments", "LT", b"caf\xe9 ")
    put_before(ds, "ImageComments", "ours", 10240)
    assert ds.ImageComments == b"ours\r\ncaf\xe9"
    put_before(ds, "ImageComments", "longer", 12)
    assert ds.ImageComments == b"longer\r\nours"


def test_texts_already_decoded_are_taken_as_they_are():
    ds = Dataset()
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientComments = "ISO_IR 192", "Ä^B", "ü"
    hold_texts(ds)
    assert ds.PatientComments == "ü"
    assert text_of(ds, "PatientComments") == "ü".encode()
    assert text_of(ds, "StudyDescription") == b""


def test_as_much_of_an_earlier_text_stays_as_there_is_room_for():
    ds = Dataset()
    ds.SpecificCharacterSet = "GB18030"
    ds.add_new("DerivationDescription", "ST", ("磁" * 1000).encode("gb18030"))
    put_before(ds, "DerivationDescription", "o" * 99, 1024, between=" ")
    assert ds.DerivationDescription == b"o" * 99 + b" " + ("磁" * 924).encode("gb18030")
    put_before(ds, "DerivationDescription", "n" * 1024, 1024, between=" ")
    assert ds.DerivationDescription == b"n" * 1024


@pytest.mark.parametrize("kept", range(50, 60))
def test_utf_8_that_nobody_declared_is_cut_between_letters(kept):
    ds = Dataset()
    ds.add_new("SeriesDescription", "LO", "é€".encode() * 12)
    put_behind(ds, "SeriesDescription", "x" * (LONG_STRING - kept))
    text = ds.SeriesDescription.decode()
    assert len(ds.SeriesDescription) <= LONG_STRING
    assert ("é€" * 12).startswith(text.rstrip("x"))
