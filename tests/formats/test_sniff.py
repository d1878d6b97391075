"""What a file is found to be, and what names results get."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.formats import create_image, default_name, format_of_name, is_image_name, open_image, writable_suffixes
from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.sniff import FORMATS, sniff, split_suffix

MADE_BY = Derivation("nearest", (2.0, 2.0), "medsr test")


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10)).save(buffer, kind)
    return buffer.getvalue()


def dicom_head() -> bytes:
    return bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + bytes(400)


def nifti_head(order: str = "<") -> bytes:
    head = bytearray(400)
    struct.pack_into(order + "i", head, 0, 348)
    struct.pack_into(order + "4h", head, 40, 3, 4, 5, 6)
    return bytes(head)


def mgh_head() -> bytes:
    return struct.pack(">7i", 1, 3, 4, 5, 1, 3, 0) + bytes(400)


CONTENTS = {
    "dicom": dicom_head(),
    "png": picture("PNG"),
    "jpeg": picture("JPEG"),
    "bmp": picture("BMP"),
    "tiff": picture("TIFF"),
    "nrrd": b"NRRD0004\ntype: short\n",
    "metaimage": b"ObjectType = Image\nNDims = 3\nComment = long\nDimSize = 2 2 2\n",
    "afni": b"\ntype = string-attribute\nname = DATASET_NAME\ncount = 5\n'none~\n",
    "parrec": b"# === DATA DESCRIPTION FILE ======\n#\n",
    "nifti": nifti_head(),
    "mgh": mgh_head(),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("suffix", ["", ".dcm", ".png", ".nii", ".mha"])
def test_content_counts_whatever_the_name(name, suffix, tmp_path):
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(CONTENTS[name])
    assert sniff(path).name == name


@pytest.mark.parametrize("name", ["nifti", "mgh"])
def test_looks_into_gzip(name, tmp_path):
    path = tmp_path / "scan.gz"
    path.write_bytes(gzip.compress(CONTENTS[name]))
    assert sniff(path).name == name


def test_big_endian_nifti(tmp_path):
    path = tmp_path / "scan"
    path.write_bytes(nifti_head(">"))
    assert sniff(path).name == "nifti"


def test_dicom_without_a_preamble_is_left_to_the_dicom_module(tmp_path):
    path = tmp_path / "IM0001"
    path.write_bytes(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + bytes(100))
    assert sniff(path).name == "dicom"


def test_a_zip_and_a_folder_are_dicom(tmp_path):
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("1.dcm", dicom_head())
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "1").write_bytes(dicom_head())
    assert sniff(tmp_path / "study.zip").name == "dicom"
    assert sniff(tmp_path / "study").name == "dicom"


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("scan.nii.gz", b"not an image at all", "is not NIfTI inside"),
        ("scan.nii.gz", gzip.compress(b"text in gzip" * 50), "is not NIfTI inside"),
        ("scan.png", b"not an image at all", "is not PNG inside"),
        ("scan.mnc", b"CDX", "is not MINC inside"),
        ("scan.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "not an image of a kind"),
        ("scan.gif", b"GIF89a" + bytes(20), "is a GIF"),
        ("scan.png", b"RIFF\x10\0\0\0WEBPVP8 ", "is a WebP"),
        ("notes.txt", b"BM is how this text begins, and it is no bitmap", "not an image of a kind"),
        ("scan.dcm", b"plain text", "not an image of a kind"),
        ("empty.dcm", b"", "is empty"),
        ("voxels.raw", bytes(100), "plain voxels without a header"),
    ],
)
def test_refused_with_the_file_named(name, content, phrase, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=phrase) as refusal:
        sniff(path)
    assert name in refusal.value.sentence
    assert "\n" not in str(refusal.value)


def test_what_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="does not exist"):
        open_image(tmp_path / "nowhere.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "deeper").mkdir()
    with pytest.raises(InputRefused, match="folder without files"):
        open_image(tmp_path / "empty")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("scan.nii.gz", "scan_x4-rdst.nii.gz"),
        ("scan.nii", "scan_x4-rdst.nii"),
        ("name with spaces.and.dots.nii.gz", "name with spaces.and.dots_x4-rdst.nii.gz"),
        ("UPPER.NII.GZ", "UPPER_x4-rdst.NII.GZ"),
        ("pair.hdr", "pair_x4-rdst.hdr"),
        ("pair.img", "pair_x4-rdst.img"),
        ("pair.img.gz", "pair_x4-rdst.img.gz"),
        ("slice.dcm", "slice_x4-rdst.dcm"),
        ("IM0001", "IM0001_x4-rdst.dcm"),
        ("1.2.840.113619.2", "1.2.840.113619.2_x4-rdst.dcm"),
        ("study.zip", "study_x4-rdst"),
        ("a.png", "a_x4-rdst.png"),
        ("a.JPG", "a_x4-rdst.JPG"),
        ("v.nhdr", "v_x4-rdst.nrrd"),
        ("v.mhd", "v_x4-rdst.mha"),
        ("brain.mgz", "brain_x4-rdst.mgz"),
        ("brain+orig.BRIK.gz", "brain+orig_x4-rdst.nii.gz"),
        ("brain+orig.HEAD", "brain+orig_x4-rdst.nii.gz"),
        ("scan.PAR", "scan_x4-rdst.nii.gz"),
        ("scan.mnc", "scan_x4-rdst.nii.gz"),
    ],
)
def test_default_names(given, wanted, tmp_path):
    assert default_name(tmp_path / given, "_x4-rdst") == tmp_path / wanted


@pytest.mark.parametrize(
    ("given", "found", "wanted"),
    [
        ("a.dcm", "png", "a_s.png"),
        ("scan", "nifti", "scan_s.nii.gz"),
        ("1.2.840.7", "dicom", "1.2.840.7_s.dcm"),
        ("pair.img", "nifti", "pair_s.img"),
        ("odd.png", "minc", "odd_s.nii.gz"),
    ],
)
def test_default_name_follows_the_content(given, found, wanted, tmp_path):
    assert default_name(tmp_path / given, "_s", found) == tmp_path / wanted


def test_a_folder_keeps_all_of_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "1.2.840.nii"
    folder.mkdir()
    assert default_name(folder, "_x2-rdst") == tmp_path / "1.2.840.nii_x2-rdst"
    monkeypatch.chdir(folder)
    assert default_name(Path("."), "_x2-rdst") == tmp_path / "1.2.840.nii_x2-rdst"


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_every_suffix_finds_its_format(entry):
    for suffix in (*entry.suffixes, *entry.data_suffixes):
        assert format_of_name(Path(f"a.b{suffix}")) is entry
        assert split_suffix(f"a.b{suffix.upper()}") == ("a.b", suffix.upper(), entry)
    assert format_of_name(Path(entry.suffixes[0])) is None, "a hidden file without a stem has no suffix"


def test_walking_a_tree_meets_each_image_once(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    (series / "IM1").write_bytes(dicom_head())
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture())
    names = [
        "a.nii.gz",
        "p.hdr",
        "p.img",
        "b+orig.HEAD",
        "b+orig.BRIK",
        "c.PAR",
        "c.REC",
        "d.mhd",
        "d.raw",
        "n.txt",
        ".a.nii",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    met = {path.name for path in tmp_path.rglob("*") if is_image_name(path)}
    assert met == {"series", "a.png", "a.nii.gz", "p.hdr", "b+orig.HEAD", "c.PAR", "d.mhd"}


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.mnc", "out.HEAD", "out.zip"])
def test_an_output_that_cannot_be_written_lists_what_can(name, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    source = open_image(tmp_path / "a.png")
    with pytest.raises(ArgumentsError, match=r"\.nii\.gz") as refusal:
        create_image(tmp_path / name, source, source.volume, MADE_BY)
    assert all(suffix in str(refusal.value) for suffix in writable_suffixes())


def test_looking_at_a_file_imports_no_library(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti_head()))
    program = f"""
import sys
from pathlib import Path
import medsr_cli.formats
from medsr_cli.formats.sniff import sniff
assert sniff(Path({str(path)!r})).name == "nifti"
print(sorted({{"nibabel", "pydicom", "SimpleITK", "PIL", "torch", "scipy"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
