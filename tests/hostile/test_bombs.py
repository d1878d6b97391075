"""Small files that claim, or unpack to, enormous ones: refused within a second and a gigabyte, each made here.

Every bomb is opened in a process of its own whose memory is capped, after its libraries are loaded. It must be refused
for what is wrong with it: a sentence about memory that ran out means that the bomb was believed.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.formats.dicom_files import FileMember, read_header
from medsr_cli.formats.limits import Limits, allowed
from tests.hostile.seeds import _encoded, _enhanced, _filled, _header, _packed, _saved, chunk, png

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1.0
"""Of processor time, which does not depend on what else the machine does."""

PROGRAM = textwrap.dedent(
    """
    import json, resource, sys, time
    from pathlib import Path
    from medsr_cli.errors import MedsrError
    from medsr_cli.formats import open_image

    def attempt(path):
        try:
            for _ in open_image(path).slices():
                pass
        except MedsrError as error:
            return error.exit_code, str(error)
        return 0, "was read"

    attempt(Path(sys.argv[2]))  # loads what the format needs
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    def peak():  # `getrusage` would tell that of the process which started this one, too
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    before = peak()
    start = time.process_time()
    code, says = attempt(Path(sys.argv[1]))
    seconds = time.process_time() - start
    grown = peak() - before
    print(json.dumps({"code": code, "says": says, "seconds": seconds, "grown_mib": grown >> 10}))
    """
)


# -- NIfTI ----------------------------------------------------------------------------------------------------


def nifti(folder: Path, name: str, shape: tuple[int, ...], affine: np.ndarray | None = None, **fields: object) -> Path:
    """A NIfTI header that claims a shape, with a few bytes behind it."""
    header = nib.Nifti1Header()
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["pixdim"][1:4] = 1
    header["datatype"], header["bitpix"] = 4, 16
    if affine is not None:
        header.set_sform(affine, 1)
    for field, value in fields.items():
        header[field] = value
    header["magic"], header["vox_offset"] = b"n+1", 352
    data = header.binaryblock + bytes(4) + bytes(64)
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def packed_zeros(before: bytes, window: int, blocks: int) -> bytes:
    """`before` and so many times 4 MiB of zeros, packed; the checksum at the end is that of `before` alone.

    A block is packed once: behind a full flush the same bytes mean the same again.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    head = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = block.compress(bytes(1 << 22)) + block.flush(zlib.Z_FULL_FLUSH)
    return head + zeros * blocks + packer.flush()


def a_thousand_to_one(folder: Path) -> Path:
    """Two gigabytes of zeros, as the header says, in two megabytes."""
    data = nifti(folder, "a.nii", (1024, 1024, 1024)).read_bytes()[:352]
    (folder / "bomb.nii.gz").write_bytes(packed_zeros(data, 31, 512))
    return folder / "bomb.nii.gz"


def a_hidden_thousand_to_one(folder: Path) -> Path:
    """The same, in which the header tells of little and the pixels begin behind it all."""
    path = nifti(folder, "a.nii", (2, 2, 2), vox_offset=float(1 << 31))
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 108, float(1 << 31))
    (folder / "bomb.nii.gz").write_bytes(packed_zeros(bytes(data[:352]), 31, 512))
    return folder / "bomb.nii.gz"


def many_members(folder: Path) -> Path:
    """A gzip file of a million empty members."""
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(b"", mtime=0) * 1_000_000)
    return folder / "bomb.nii.gz"


# -- DICOM ----------------------------------------------------------------------------------------------------


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An element in explicit little endian."""
    length = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    long = vr in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    return head + (struct.pack("<HL", 0, length) if long else struct.pack("<H", length)) + value


def with_element(data: bytes, extra: bytes, before: bytes = b"\xe0\x7f\x10\x00") -> bytes:
    """A DICOM file with bytes put in before its pixels."""
    at = data.rindex(before)
    return data[:at] + extra + data[at:]


def dicom(folder: Path, ds: Dataset, change: Callable[[bytes], bytes] | None = None) -> Path:
    data = _saved(ds)
    (folder / "bomb.dcm").write_bytes(data if change is None else change(data))
    return folder / "bomb.dcm"


def huge_frames(folder: Path) -> Path:
    ds = _filled(_header())
    ds.Rows = ds.Columns = 65535
    ds.NumberOfFrames = 1_000_000
    return dicom(folder, ds)


def huge_packed_frames(folder: Path) -> Path:
    """The same with fragments, whose number says nothing about the pixels in them."""
    ds = _packed(_header(), [bytes(64)] * 100_000, RLELossless)
    ds.Rows = ds.Columns = 65535
    return dicom(folder, ds)


def nested(depth: int, defined: bool) -> bytes:
    """Sequences in sequences."""
    tag = 0x00081140  # ReferencedImageSequence
    if not defined:
        start = element(tag, b"SQ", b"", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
        end = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
        return start * depth + end * depth
    # From the outermost inwards: what is inside takes 20 bytes for each level.
    parts = []
    for left in range(depth - 1, -1, -1):
        inside = 20 * left
        parts.append(element(tag, b"SQ", b"", inside + 8) + struct.pack("<HHL", 0xFFFE, 0xE000, inside))
    return b"".join(parts)


def nested_sequences(depth: int, defined: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return dicom(
            folder, _filled(_header()), lambda data: with_element(data, nested(depth, defined), b"\x10\0\x10\0")
        )

    return make


def overlapping_extended(folder: Path) -> Path:
    """All frames are the same bytes, by the extended offset table."""
    ds = _rle_frames(1000)
    ds.ExtendedOffsetTable = bytes(8 * 1000)
    ds.ExtendedOffsetTableLengths = struct.pack("<Q", 200) * 1000
    return dicom(folder, ds)


def overlapping_basic(folder: Path) -> Path:
    """The basic offset table leads back to where it has been."""
    ds = _rle_frames(1000)
    offsets = [0, 200] * 500
    table = struct.pack("<1000L", *offsets)
    start = ds.PixelData.index(b"\xfe\xff\x00\xe0", 4)
    ds.PixelData = struct.pack("<HHL", 0xFFFE, 0xE000, len(table)) + table + ds.PixelData[start:]
    return dicom(folder, ds)


def _rle_frames(count: int) -> Dataset:
    """An object of so many frames, whose pixels are those of one."""
    flat = _header(rows=256, columns=256)
    flat.PixelData = bytes(256 * 256 * 2)
    frame = _encoded(flat, RLELossless, "pydicom")
    ds = _packed(_header(rows=256, columns=256), [frame] * 8, RLELossless)
    ds.NumberOfFrames = count
    return ds


def private_claim(folder: Path) -> Path:
    """A private element that claims all of four gigabytes."""
    extra = element(0x00091001, b"UN", b"", 0xFFFFFFF0)
    return dicom(folder, _filled(_header()), lambda data: with_element(data, extra, b"\x10\0\x10\0"))


def private_bulk(folder: Path) -> Path:
    """A private element that is there: a hole in the file, which takes no room on the disk."""
    path = dicom(folder, _filled(_header()))
    data = path.read_bytes()
    at, size = data.rindex(b"\x10\0\x10\0"), 3 << 30
    with path.open("wb") as file:
        file.write(data[:at] + element(0x00091001, b"UN", b"", size))
        file.seek(size, 1)
        file.write(data[at:])
    return path


def a_million_elements(folder: Path) -> Path:
    extra = b"".join(element(0x00090000 + n, b"LO", b"") for n in range(1 << 11)) * (1 << 10)
    return dicom(folder, _filled(_header()), lambda data: with_element(data, extra, b"\x10\0\x10\0"))


def a_million_hidden_elements(folder: Path) -> Path:
    """In a sequence of defined length, which pydicom takes apart at a time when nobody counts."""
    inside = b"".join(element(0x00090000 + n, b"LO", b"") for n in range(1 << 11)) * (1 << 10)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, len(inside)) + inside
    extra = element(0x52009229, b"SQ", item)
    return dicom(folder, _filled(_header()), lambda data: with_element(data, extra))


def million_frames_of_groups(folder: Path) -> Path:
    """Frames without pixels, with functional groups to be made for each."""
    ds = _enhanced()
    ds.NumberOfFrames = 99_999_999
    return dicom(folder, ds)


def huge_codestream(folder: Path) -> Path:
    """A JPEG 2000 codestream that claims 2^31 x 2^31, in a file whose tags are modest."""
    sides = {"rows": 40, "columns": 36}
    frame = _encoded(_filled(_header(**sides)), JPEG2000Lossless, "pylibjpeg")
    start = frame.index(b"\xff\x4f\xff\x51")
    huge = frame[: start + 8] + struct.pack(">2L", 1 << 31, 1 << 31) + frame[start + 16 :]
    return dicom(folder, _packed(_header(**sides), [huge], JPEG2000Lossless))


def huge_tiles(folder: Path) -> Path:
    """The same in the size of its tiles, which the tags cannot tell."""
    sides = {"rows": 40, "columns": 36}
    frame = _encoded(_filled(_header(**sides)), JPEG2000Lossless, "pylibjpeg")
    start = frame.index(b"\xff\x4f\xff\x51")
    tiny = frame[: start + 24] + struct.pack(">2L", 1, 1) + frame[start + 32 :]
    return dicom(folder, _packed(_header(**sides), [tiny], JPEG2000Lossless))


def deflated_bomb(folder: Path) -> Path:
    """Two gigabytes of zeros behind a header."""
    ds = _filled(_header(DeflatedExplicitVRLittleEndian))
    data = _saved(ds)
    start = 144 + struct.unpack_from("<L", data, 140)[0]
    plain = zlib.decompress(data[start:], -15)
    at = plain.rindex(b"\xe0\x7f\x10\x00")
    plain = plain[:at] + element(0x7FE00010, b"OW", b"", 2 << 30)
    (folder / "bomb.dcm").write_bytes(data[:start] + packed_zeros(plain, -15, 512))
    return folder / "bomb.dcm"


# -- archives -------------------------------------------------------------------------------------------------


def zip_of_zeros(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bomb.zip", "w") as archive:
        for number in range(8):
            archive.writestr(f"{number}.dcm", packed_zeros(b"", -15, 64))
    # What was stored as it is becomes what was packed: method 8, and the size of the zeros.
    data = bytearray((folder / "bomb.zip").read_bytes())
    for mark, method, size in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            struct.pack_into("<H", data, at + method, 8)
            struct.pack_into("<L", data, at + size, 64 << 22)
    (folder / "bomb.zip").write_bytes(data)
    return folder / "bomb.zip"


def zip_in_zip(folder: Path) -> Path:
    """Archives in an archive: none is opened, for what is inside is no image."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.dcm", bytes(1 << 26))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(100):
            archive.writestr(f"{number}.zip", inner.getvalue())
    return folder / "bomb.zip"


def zip_that_overlaps(folder: Path) -> Path:
    """Thousands of entries that are one and the same compressed block."""
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.dcm", bytes(range(256)) * 4096)
    data = (folder / "a.zip").read_bytes()
    end = data.rindex(b"PK\x05\x06")
    (size, start) = struct.unpack_from("<LL", data, end + 12)
    entry = data[start : start + size]
    many = b"".join(entry.replace(b"0.dcm", b"%05d" % at) for at in range(20_000))
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 20_000, 20_000, len(many), start, 0)
    (folder / "bomb.zip").write_bytes(data[:start] + many + tail)
    return folder / "bomb.zip"


def zip_of_a_million(folder: Path) -> Path:
    """A list of two million files, none of which is there."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    many = entry * 1_000_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(many), 4, 0)
    (folder / "bomb.zip").write_bytes(b"PK\x03\x04" + many + tail)
    return folder / "bomb.zip"


# -- pictures and the rest ------------------------------------------------------------------------------------


def huge_png(folder: Path) -> Path:
    path = folder / "bomb.png"
    data = png(7, 9, 8, 0)
    head = chunk(b"IHDR", struct.pack(">2I5B", (1 << 31) - 1, (1 << 31) - 1, 8, 0, 0, 0, 0))
    path.write_bytes(data[:8] + head + data[33:])
    return path


def large_png(folder: Path) -> Path:
    """Under every limit, but more than its bytes can hold."""
    path = folder / "bomb.png"
    data = png(7, 9, 8, 0)
    path.write_bytes(data[:8] + chunk(b"IHDR", struct.pack(">2I5B", 8192, 8192, 8, 0, 0, 0, 0)) + data[33:])
    return path


def text_png(folder: Path) -> Path:
    """A gigabyte of text in a megabyte, which nobody asked for."""
    packed = packed_zeros(b"", 15, 256)
    (folder / "bomb.png").write_bytes(png(7, 9, 8, 0, extra=chunk(b"zTXt", b"Comment\0\0" + packed)))
    return folder / "bomb.png"


def profile_png(folder: Path) -> Path:
    packed = packed_zeros(b"", 15, 256)
    (folder / "bomb.png").write_bytes(png(7, 9, 8, 0, extra=chunk(b"iCCP", b"profile\0\0" + packed)))
    return folder / "bomb.png"


def tiff_pages(count: int, loop: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, 16)]
        entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
        size = 2 + len(entries) + 4
        pages = []
        for at in range(count):
            following = 24 + size * (at + 1) if at + 1 < count else 24 if loop else 0
            pages.append(struct.pack("<H", len(tags)) + entries + struct.pack("<L", following))
        (folder / "bomb.tif").write_bytes(b"II*\0" + struct.pack("<L", 24) + bytes(16) + b"".join(pages))
        return folder / "bomb.tif"

    return make


def long_nrrd(folder: Path) -> Path:
    """A header of half a gigabyte, of which most is a hole."""
    with (folder / "bomb.nrrd").open("wb") as file:
        file.write(b"NRRD0004\ntype: int16\ndimension: 3\n" + b"key:=value\n" * 1000)
        file.truncate(1 << 29)
    return folder / "bomb.nrrd"


def many_lines_nrrd(folder: Path) -> Path:
    (folder / "bomb.nrrd").write_bytes(b"NRRD0004\n" + b"a: b\n" * 10_000_000)
    return folder / "bomb.nrrd"


def long_afni(folder: Path) -> Path:
    text = b"type  = string-attribute\nname  = A\ncount = 3\n'ab~\n\n"
    (folder / "bomb+orig.HEAD").write_bytes(text * 400_000)
    (folder / "bomb+orig.BRIK").write_bytes(bytes(100))
    return folder / "bomb+orig.HEAD"


def huge_mgz(folder: Path) -> Path:
    data = bytearray(nib.MGHImage(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes())
    struct.pack_into(">4i", data, 4, 30000, 30000, 30000, 30)
    (folder / "bomb.mgz").write_bytes(gzip.compress(bytes(data)))
    return folder / "bomb.mgz"


AFFINE = np.eye(4)
NAN = np.where(AFFINE == 1, np.nan, AFFINE)

BOMBS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "gzip of a thousand to one": ("more than is allowed", a_thousand_to_one),
    "gzip of a thousand to one before the pixels": ("more than is allowed", a_hidden_thousand_to_one),
    "gzip of a million members": ("is not|cut short|damaged", many_members),
    "NIfTI of 30000^3": ("cut short", lambda f: nifti(f, "bomb.nii", (30000, 30000, 30000))),
    "packed NIfTI of 30000^3": ("can hold", lambda f: nifti(f, "bomb.nii.gz", (30000, 30000, 30000))),
    "NIfTI with NaN for a place": ("orientation", lambda f: nifti(f, "bomb.nii", (2, 2, 2), NAN)),
    "NIfTI with endless places": ("orientation", lambda f: nifti(f, "bomb.nii", (2, 2, 2), np.full((4, 4), np.inf))),
    "NIfTI of negative size": ("without voxels", lambda f: nifti(f, "bomb.nii", (2, -2, 2))),
    "NIfTI of negative axes": ("axes|not NIfTI", lambda f: nifti(f, "bomb.nii", (2, 2), dim=[-3, 2, 2, 2, 1, 1, 1, 1])),
    "NIfTI with a scale of NaN": ("not a number", lambda f: nifti(f, "bomb.nii", (2, 2, 2), scl_slope=np.nan)),
    "DICOM of 65535^2 in a million frames": ("frames|cut short", huge_frames),
    "DICOM of 65535^2 in fragments": ("more than is allowed", huge_packed_frames),
    "DICOM with a hundred million groups": ("frames", million_frames_of_groups),
    "300 sequences in each other": ("deep", nested_sequences(300, defined=False)),
    "300 sequences in each other, of defined length": ("deep", nested_sequences(300, defined=True)),
    "100000 sequences in each other": ("deep", nested_sequences(100_000, defined=False)),
    "100000 sequences in each other, of defined length": ("deep", nested_sequences(100_000, defined=True)),
    "frames that are one, by the extended table": ("overlap", overlapping_extended),
    "frames that are one, by the basic table": ("overlap", overlapping_basic),
    "private element of 4 GB that is not there": ("no pixels|damaged|cut short", private_claim),
    "private element of 3 GB": ("private", private_bulk),
    "two million elements": ("elements", a_million_elements),
    "two million elements in a sequence": ("elements", a_million_hidden_elements),
    "JPEG 2000 of 2^31": ("another size", huge_codestream),
    "JPEG 2000 in tiles of one pixel": ("", huge_tiles),
    "deflated DICOM": ("inflates to more", deflated_bomb),
    "zip of a thousand to one": ("more than is allowed", zip_of_zeros),
    "zip in zip": ("no DICOM", zip_in_zip),
    "zip whose entries overlap": ("overlap|expand", zip_that_overlaps),
    "zip of a million entries": ("more than 100000 files", zip_of_a_million),
    "PNG of 2^31": ("more pixels|more than is allowed", huge_png),
    "PNG that its bytes cannot hold": ("can hold", large_png),
    "PNG with a gigabyte of text": ("", text_png),
    "PNG with a gigabyte of profile": ("", profile_png),
    "TIFF of a million pages": ("more than 100000 pages", tiff_pages(1_000_000)),
    "TIFF whose pages go round": ("back to another", tiff_pages(3, loop=True)),
    "NRRD with an endless line": ("without an end", long_nrrd),
    "NRRD with ten million lines": ("without an end|no field", many_lines_nrrd),
    "AFNI with a header of 20 MB": ("longer than a header", long_afni),
    "MGZ of 30000^3": ("allowed|can hold", huge_mgz),
}
HARMLESS = {"PNG with a gigabyte of profile", "JPEG 2000 in tiles of one pixel"}
"""What may be read as well as refused, since nobody needs to unpack the bomb for it."""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_a_second_and_a_gigabyte(name: str, tmp_path: Path) -> None:
    why, make = BOMBS[name]
    bomb = make(tmp_path)
    harmless = tmp_path / "empty" / bomb.name
    harmless.parent.mkdir()
    with bomb.open("rb") as file:
        harmless.write_bytes(file.read(200))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bomb), str(harmless)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if name in HARMLESS and found["code"] == 0:
        found |= {"code": 6, "says": why}
    assert found["code"] == 6, found
    assert re.search(why, found["says"]), found
    assert "more memory" not in found["says"]
    assert found["seconds"] < SECONDS, found
    assert found["grown_mib"] < 1024, found


# -- limits ---------------------------------------------------------------------------------------------------


def test_limits_can_be_raised_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDSR_LIMITS", "slices=200000, header_bytes=1G;elements=7")
    assert allowed() == Limits(slices=200_000, header_bytes=1 << 30, elements=7)
    monkeypatch.delenv("MEDSR_LIMITS")
    assert allowed() == Limits()


@pytest.mark.parametrize("text", ["slice=3", "slices", "slices=-1", "slices=0", "slices=1.5", "slices=3X", "slices=٣"])
def test_a_limit_that_says_nothing_is_an_argument_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSR_LIMITS", text)
    with pytest.raises(ArgumentsError, match="MEDSR_LIMITS"):
        allowed()


def test_what_is_under_the_limits_is_read(tmp_path: Path) -> None:
    """60 sequences in each other, 150,000 elements and 100 MB of private bytes: nobody is refused for them."""
    (tmp_path / "deep").mkdir()
    read_header(_member(nested_sequences(60, defined=False)(tmp_path / "deep")))
    read_header(_member(nested_sequences(60, defined=True)(tmp_path / "deep")))
    extra = b"".join(element(0x00090000 + (n & 0xFFFF), b"LO", b"ab") for n in range(150_000))
    read_header(_member(dicom(tmp_path, _filled(_header()), lambda data: with_element(data, extra, b"\x10\0\x10\0"))))
    extra = element(0x00091001, b"UN", bytes(100 << 20))
    header = read_header(
        _member(dicom(tmp_path, _filled(_header()), lambda data: with_element(data, extra, b"\x10\0\x10\0")))
    )
    assert len(header[0x00091001].value) == 100 << 20


def test_lower_limits_are_kept(tmp_path: Path) -> None:
    path = dicom(
        tmp_path,
        _filled(_header()),
        lambda data: with_element(data, element(0x00091001, b"UN", bytes(2 << 20)), b"\x10\0\x10\0"),
    )
    read_header(_member(path))
    with pytest.raises(InputRefused, match="private"):
        read_header(_member(path), Limits(private_bytes=1 << 20))
    with pytest.raises(InputRefused, match="beside its pixels"):
        read_header(_member(path), Limits(header_bytes=1 << 20))
    with pytest.raises(InputRefused, match="elements"):
        read_header(_member(path), Limits(elements=5, element_bytes=1 << 30))


def _member(path: Path) -> FileMember:
    return FileMember(path, path.stat().st_size)


def test_the_limit_on_elements_grows_with_the_file() -> None:
    assert Limits().most_elements(0) == 200_000
    assert Limits().most_elements(64 << 20) == 200_000 + (1 << 20)
