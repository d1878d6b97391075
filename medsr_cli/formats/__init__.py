"""Bytes to volumes and back: one module per format, one way to write. Never torch.

`open_image` and `create_image` are the door of this room. Importing it imports no library of any format.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.contract import Derivation, DicomOutput, Reader, ReadOptions, Writer
from medsr_cli.formats.sniff import BY_NAME, FORMATS, FormatEntry, sniff, split_suffix
from medsr_cli.volume.volume import Volume

__all__ = [
    "create_image",
    "default_name",
    "format_of_name",
    "is_enhanced",
    "is_image_name",
    "open_image",
    "series_name",
    "stem_of_name",
    "writable_suffixes",
]

_NO_FOLDER_NAMES = (".zip", ".gif", ".webp", ".jp2", ".pdf", ".json", ".txt", ".csv", ".npy", ".raw", ".gz")
"""Suffixes that mean a file, so that no DICOM folder is made under such a name by mistake."""

_ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
"""Headers with a separate data file are read; their results are one file."""

_PEEKED_FILES = 16
"""Files of a folder that are looked into before it counts as holding no DICOM."""


def open_image(path: Path, options: ReadOptions | None = None) -> Reader:
    """Open an image file, a DICOM folder or a zip archive of one; no pixel is read.

    Raises:
        InputRefused: it is missing, damaged, too large, or nothing that is read here.
    """
    with refusing(path):
        return sniff(path).load().open_reader(path, options or ReadOptions())


def create_image(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> AbstractContextManager[Writer]:
    """Open `target` for the slices of `result`, in the format that its name asks for.

    A name without a known suffix is a folder when the source is DICOM.

    Raises:
        ArgumentsError: the name asks for nothing that is written, the format cannot hold the image, or it exists.
    """
    entry = format_of_name(target)
    if entry is None and source.volume.format == "dicom" and _may_be_folder(target):
        entry = BY_NAME["dicom"]
    if entry is None or not entry.writable:
        what = f"would be {entry.title}, which is only read" if entry else "has no suffix of a format that is written"
        msg = f"The output {mention(target.name)} {what}."
        raise ArgumentsError(msg, f"Give it one of {', '.join(writable_suffixes())}.")
    if entry.name not in ("nifti", source.volume.format) and source.volume.value_scale != (1.0, 0.0):
        whose = mention(source.path.name)
        msg = f"The values of {whose} carry a slope and an intercept, which {entry.title} cannot hold."
        raise ArgumentsError(msg, "Write NIfTI (.nii.gz), or the input's own format.")
    return entry.load().open_writer(target, source, result, derivation, overwrite=overwrite)


def format_of_name(path: Path) -> FormatEntry | None:
    """The format that a file's name asks for, or None."""
    return split_suffix(path.name)[2]


def stem_of_name(path: Path) -> str:
    """A file's name without the suffix of its format, which may be two (`.nii.gz`)."""
    return split_suffix(path.name)[0]


def writable_suffixes() -> list[str]:
    """Suffixes of all formats that are written."""
    return [
        suffix
        for entry in FORMATS
        if entry.writable
        for suffix in entry.suffixes
        if suffix not in _ONE_FILE and suffix != ".hdr.gz"
    ]


def default_name(path: Path, suffix: str, format_name: str | None = None) -> Path:
    """Where the result of an input stands when nothing else is said: beside it, in its format.

    Args:
        path: the input: a file, a DICOM folder or a zip archive.
        suffix: goes between stem and extension, for example `_x4-rdst`.
        format_name: what the input was found to be (`Volume.format`), if its name does not tell.

    Returns:
        `scan.nii.gz` becomes `scan_x4-rdst.nii.gz`; a folder or an archive becomes the folder `NAME_x4-rdst`; a DICOM
        file without an extension gets `.dcm`; what is only read becomes `.nii.gz`.
    """
    if path.is_dir():
        name = path.name or path.resolve().name
        return path.with_name(name + suffix) if path.name else path.resolve().with_name(name + suffix)
    stem, extension, entry = split_suffix(path.name)
    if path.suffix.lower() == ".zip":
        return path.with_name(path.name[: -len(".zip")] + suffix)
    if format_name is not None and (entry is None or entry.name != format_name) and format_name in BY_NAME:
        entry = BY_NAME[format_name]
        # Names of DICOM files are often numbers with dots: all of it is the stem.
        stem = stem if extension or format_name == "dicom" else path.stem
        extension = entry.suffixes[0]
    elif entry is None:
        entry, extension = BY_NAME["dicom"], ".dcm"
    if not entry.writable:
        extension = ".nii.gz"
    return path.with_name(stem + suffix + _ONE_FILE.get(extension.lower(), extension))


def is_enhanced(reader: Reader) -> bool:
    """Whether an opened image is an enhanced DICOM object, which can be written as one object again."""
    if reader.volume.format != "dicom":
        return False
    from medsr_cli.formats.dicom_outputs import has_enhanced  # noqa: PLC0415 - needs pydicom

    return has_enhanced(reader)


def series_name(target: Path, reader: Reader, dicom: DicomOutput) -> Path:
    """A derived name as it is, or without its suffix where one DICOM file becomes a series of several."""
    if reader.volume.format != "dicom" or target.suffix.lower() != ".dcm" or reader.volume.slices == 1:
        return target
    from medsr_cli.formats.dicom_outputs import files_of  # noqa: PLC0415 - needs pydicom

    return target.with_suffix("") if files_of(reader, dicom.multiframe) > 1 else target


def is_image_name(path: Path) -> bool:
    """Whether a path met while walking a tree is an input of its own.

    A file is one by its suffix; the data half of a pair (.img, .REC, .BRIK) is not, its header is. A folder is one
    when DICOM files lie directly in it.
    """
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return _holds_dicom(path)
    _, extension, entry = split_suffix(path.name)
    if path.suffix.lower() == ".zip":
        return True
    return entry is not None and extension.lower() in entry.suffixes


def _holds_dicom(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            files = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    except OSError:
        return False
    unnamed = [name for name in files if (split_suffix(name)[2] or BY_NAME["dicom"]).name == "dicom"]
    for name in unnamed[:_PEEKED_FILES]:
        try:
            if sniff(folder / name).name == "dicom" and not name.lower().endswith(".zip"):
                return True
        except InputRefused:
            continue
    return False


def _may_be_folder(target: Path) -> bool:
    return not target.is_file() and not target.name.lower().endswith(_NO_FOLDER_NAMES)
