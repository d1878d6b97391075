"""Which format a file is: by its first bytes, and by its name only where bytes cannot tell.

The table of formats is here as well. Modules are named as strings and imported when they are needed, so that a look
at a file costs no library.
"""

from __future__ import annotations

import importlib
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from medsr_cli.errors import InputRefused, mention, reason_of
from medsr_cli.formats.contract import Format

HEAD_BYTES = 4096
"""What of a file is looked at."""


@dataclass(frozen=True)
class FormatEntry:
    """One line of the table of formats."""

    name: str
    """As in `Volume.format`."""
    title: str
    suffixes: tuple[str, ...]
    """Lower case; the first one names results."""
    module: str
    writable: bool = True
    data_suffixes: tuple[str, ...] = ()
    """Files that belong to a header of this format: opened through it, passed over when a tree is walked."""

    def load(self) -> Format:
        """The module that reads and writes this format."""
        return cast("Format", importlib.import_module(f"medsr_cli.formats.{self.module}"))


FORMATS = (
    FormatEntry("nifti", "NIfTI", (".nii.gz", ".nii", ".hdr", ".hdr.gz"), "nifti", data_suffixes=(".img", ".img.gz")),
    FormatEntry("dicom", "DICOM", (".dcm", ".dicom", ".ima"), "dicom"),
    FormatEntry("png", "PNG", (".png",), "raster"),
    FormatEntry("jpeg", "JPEG", (".jpg", ".jpeg", ".jpe"), "raster"),
    FormatEntry("tiff", "TIFF", (".tif", ".tiff"), "raster"),
    FormatEntry("bmp", "BMP", (".bmp",), "raster"),
    FormatEntry("nrrd", "NRRD", (".nrrd", ".nhdr"), "nrrd"),
    FormatEntry("metaimage", "MetaImage", (".mha", ".mhd"), "metaimage"),
    FormatEntry("mgh", "FreeSurfer MGZ", (".mgz", ".mgh"), "mgh"),
    FormatEntry("minc", "MINC", (".mnc",), "neuro", writable=False),
    FormatEntry("afni", "AFNI", (".head",), "neuro", writable=False, data_suffixes=(".brik", ".brik.gz", ".brik.bz2")),
    FormatEntry("parrec", "Philips PAR/REC", (".par",), "neuro", writable=False, data_suffixes=(".rec",)),
)
BY_NAME = {entry.name: entry for entry in FORMATS}

_SUFFIXES = sorted(
    ((suffix, entry) for entry in FORMATS for suffix in (*entry.suffixes, *entry.data_suffixes)),
    key=lambda pair: -len(pair[0]),
)
_HEADERS_OF_RAW = (".mhd", ".nhdr", ".mha", ".nrrd")
_METAIMAGE_LINE = re.compile(r"^\s*NDims\s*=\s*\d", re.MULTILINE)
_BITMAP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_MGH_TYPES = (0, 1, 3, 4, 10)

_MAGIC = {
    b"PK\x03\x04": "dicom",
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
    b"NRRD000": "nrrd",
}
_MINC_MAGIC = (b"CDF\x01", b"CDF\x02", b"\x89HDF")
"""NetCDF and HDF5, which hold much else: the name has to say MINC as well."""

_REFUSED = {
    b"GIF8": "is a GIF, whose colours are a palette of 256",
    b"RIFF": "is a WebP or another RIFF file, which is not read",
    b"\x00\x00\x00\x0cjP  ": "is a JPEG 2000 picture outside DICOM, which is not read",
    b"%PDF": "is a PDF document, not an image",
    b"<svg": "is a drawing, not an image",
}


def split_suffix(name: str) -> tuple[str, str, FormatEntry | None]:
    """A file name as stem, suffix (as written, `.nii.gz` in one piece) and the format that the suffix names."""
    lower = name.lower()
    for suffix, entry in _SUFFIXES:
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :], entry
    return name, "", None


def sniff(path: Path) -> FormatEntry:
    """The format of an input.

    Raises:
        InputRefused: it is not there, empty, a folder without files, or nothing that is read here.
    """
    if path.is_dir():
        if not _has_a_file(path):
            msg = f"{mention(path.name)} is a folder without files."
            raise InputRefused(msg)
        return BY_NAME["dicom"]
    head = _head(path)
    by_name = split_suffix(path.name)[2]
    found = _by_content(head, by_name)
    if found is not None:
        return BY_NAME[found]
    _refuse_known(head, path)
    _refuse_data_file(path)
    if by_name is not None and split_suffix(path.name)[1].lower() in by_name.data_suffixes:
        return by_name  # plain voxels: the header beside them says what they are
    if by_name is not None and by_name.name != "dicom":
        msg = f"{mention(path.name)} is not {by_name.title} inside, whatever its name says."
        raise InputRefused(msg, "Export it again, or give it the name of what it is.")
    msg = f"{mention(path.name)} is not an image of a kind that is read here."
    raise InputRefused(msg, f"What is read: {', '.join(entry.title for entry in FORMATS)}.")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        msg = f"{mention(path)} does not exist."
        raise InputRefused(msg) from error
    except OSError as error:
        msg = f"{mention(path.name)} cannot be read: {reason_of(error)}."
        raise InputRefused(msg) from error
    if not head:
        msg = f"{mention(path.name)} is empty."
        raise InputRefused(msg)
    return head


def _has_a_file(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder))


def _by_content(head: bytes, by_name: FormatEntry | None) -> str | None:
    """Name of the format that the first bytes are of."""
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(b"\x1f\x8b"):
        return _in_gzip(head, by_name)
    if by_name is not None and by_name.name == "minc" and head.startswith(_MINC_MAGIC):
        return "minc"
    return _by_magic(head) or _by_header_text(head) or _by_numbers(head, by_name)


def _by_magic(head: bytes) -> str | None:
    if head.startswith(b"BM"):
        # Two letters are little to go by; the length of the second header is one of few.
        return "bmp" if len(head) > 18 and struct.unpack_from("<I", head, 14)[0] in _BITMAP_HEADERS else None
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def _by_header_text(head: bytes) -> str | None:
    """Formats whose headers are plain text."""
    text = head.decode("latin-1").lstrip()
    first = text.split("\n", 1)[0].replace(" ", "")
    if _METAIMAGE_LINE.search(text):
        return "metaimage"
    if text.startswith("# === DATA DESCRIPTION FILE"):
        return "parrec"
    if first.startswith("type=") and "name" in text and "count" in text:
        return "afni"
    return None


def _by_numbers(head: bytes, by_name: FormatEntry | None) -> str | None:
    """Formats that begin with nothing but a number."""
    if len(head) >= 348:
        size = {struct.unpack_from(order + "i", head)[0] for order in "<>"}
        # 348 alone is little to go by: it is NIfTI's and Analyze's length of the header.
        if (348 in size or 540 in size) and _has_dimensions(head, 540 in size):
            return "nifti"
    if len(head) >= 284 and _is_mgh(head):
        return "mgh"
    if _is_bare_dicom(head) and (by_name is None or by_name.name == "dicom"):
        return "dicom"
    return None


def _has_dimensions(head: bytes, second: bool) -> bool:
    for order in "<>":
        count = struct.unpack_from(order + ("q" if second else "h"), head, 16 if second else 40)[0]
        if 1 <= count <= 7:
            return True
    return False


def _is_mgh(head: bytes) -> bool:
    version, i, j, k, volumes, kind = struct.unpack_from(">6i", head)
    return version == 1 and min(i, j, k, volumes) > 0 and kind in _MGH_TYPES


def _is_bare_dicom(head: bytes) -> bool:
    """DICOM without preamble: a first element of group 2 or 8 with a plausible value representation or length."""
    if len(head) < 8:
        return False
    group, element = struct.unpack_from("<HH", head)
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return group in (2, 8) and element < 0x100 and (explicit or struct.unpack_from("<I", head, 4)[0] < 1024)


def _in_gzip(head: bytes, by_name: FormatEntry | None) -> str | None:
    decoder = zlib.decompressobj(31)
    try:
        inside = decoder.decompress(head, HEAD_BYTES)
    except zlib.error:
        inside = b""
    found = _by_numbers(inside, None) if inside else None
    if found in ("nifti", "mgh"):
        return found
    # A file of which nothing can be unpacked is still what its name says: damaged, as its module will tell.
    return by_name.name if by_name is not None and not inside and by_name.name in ("nifti", "mgh") else None


def _refuse_known(head: bytes, path: Path) -> None:
    for magic, says in _REFUSED.items():
        if head.startswith(magic):
            msg = f"{mention(path.name)} {says}."
            raise InputRefused(msg, "Save it as PNG or TIFF.")


def _refuse_data_file(path: Path) -> None:
    """Voxels without a header: say which file to open."""
    stem = path.name.split(".raw", 1)[0].split(".zraw", 1)[0]
    if stem == path.name:
        return
    for suffix in _HEADERS_OF_RAW:
        header = path.with_name(stem + suffix)
        if header.exists():
            msg = f"{mention(path.name)} holds the voxels of {mention(header.name)}."
            raise InputRefused(msg, f"Open {mention(header.name)} instead.")
    msg = f"{mention(path.name)} holds plain voxels without a header."
    raise InputRefused(msg, "Open the .mhd or .nhdr file that describes them.")
