"""What dicom3tools hold against a derived object or series that they do not hold against its source."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom

_ITEM = re.compile(r"\[\d+\]")
_VALUE = re.compile(r"(= |for file |versus |attribute |from |got |expected )<[^<>]*>")
_SAME_WORDS = r"\1<>"
_NUMBER = re.compile(r"(?<![\w(,])\d+(\.\d+)*(?![\w,)])")


def _kind(line: str, whole_paths: bool = True) -> str:
    """A complaint without what differs between two images that have the same fault: values, UIDs, items, counts.

    Elements, modules and what is wrong with them stay.
    """
    severity, _, rest = line.partition(" - ")
    path, _, words = rest.partition(" - ")
    path = _NUMBER.sub("#", _ITEM.sub("[]", path))
    if not whole_paths:
        path = "</" + path.removesuffix("[]>").removesuffix(">").rpartition("/")[2] + ">"
    return f"{severity} - {path} - {_NUMBER.sub('#', _VALUE.sub(_SAME_WORDS, words))}".strip()


def _files(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def _complaints(command: list[str], paths: list[Path], whole_paths: bool = True) -> set[str]:
    done = subprocess.run([*command, *paths], capture_output=True, text=True, errors="replace", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return {_kind(line, whole_paths) for line in lines if line.startswith(("Error", "Warning"))}


def complaints(path: Path, whole_paths: bool = True) -> set[str]:
    """Kinds of errors and warnings of dciodvfy about a file, or about any file of a folder.

    Args:
        whole_paths: whether the same fault in another sequence is another.
    """
    return set().union(*(_complaints(["dciodvfy", "-new"], [file], whole_paths) for file in _files(path)))


@contextmanager
def _judged(source: Path, result: Path) -> Iterator[Path]:
    """The source as dicom3tools can judge it: inflated, and of the class that its result has where it names none.

    They know no deflated files, and check a file without a class against no definition.
    """
    sop_class = pydicom.dcmread(_files(result)[0], stop_before_pixels=True).SOPClassUID
    with tempfile.TemporaryDirectory() as folder:
        for at, file in enumerate(_files(source)):
            ds = pydicom.dcmread(file)
            if ds.file_meta.TransferSyntaxUID != pydicom.uid.DeflatedExplicitVRLittleEndian and ds.get("SOPClassUID"):
                Path(folder, f"{at}.dcm").write_bytes(file.read_bytes())
                continue
            ds.SOPClassUID = ds.get("SOPClassUID") or sop_class
            ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
            if ds.file_meta.TransferSyntaxUID.is_deflated:
                ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            ds.save_as(Path(folder, f"{at}.dcm"))
        yield Path(folder)


def new_complaints(source: Path, result: Path) -> list[str]:
    """Kinds of dciodvfy's errors and warnings about a result (file or folder) that no file of its source has.

    Where the result is of another class than its source, classic instead of enhanced, elements have left the sequences
    they were in; a fault that moved with its element is not new.
    """
    with _judged(source, result) as judged:
        same_class = _classes(judged) >= _classes(result)
        return sorted(complaints(result, same_class) - complaints(judged, same_class))


def _classes(path: Path) -> set[str]:
    headers = (pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SOPClassUID"]) for file in _files(path))
    return {str(header.get("SOPClassUID")) for header in headers}


def new_entity_complaints(source: Path, result: Path) -> list[str]:
    """Kinds of dcentvfy's about the result alone, and with its source, that the source alone has not."""
    with _judged(source, result) as judged:
        olds, news = _files(judged), _files(result)
        found = _complaints(["dcentvfy"], news) | _complaints(["dcentvfy"], [*olds, *news])
        return sorted(found - _complaints(["dcentvfy"], olds))
