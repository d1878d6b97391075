"""Images that name a patient wherever an image can: every name is a canary that must turn up nowhere else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin, TiffImagePlugin
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.formats.dicom_makers import header, place
from tests.makers import anatomy, save_checkpoint

TAGS = {
    "PatientName": "Qzaa^Qzab",
    "PatientID": "QZAC7781",
    "PatientBirthDate": "18770319",
    "PatientBirthName": "Qzad^Born",
    "PatientMotherBirthName": "Qzae^Mother",
    "PatientAddress": "Qzaf Street 7",
    "PatientTelephoneNumbers": "Qzag0815",
    "PatientComments": "Qzah comments",
    "OtherPatientNames": "Qzai^Other",
    "OtherPatientIDs": "QZAJ99",
    "AccessionNumber": "QZAK123",
    "StudyID": "QZAL",
    "StudyDescription": "Qzam study",
    "SeriesDescription": "Qzan series",
    "ProtocolName": "Qzao protocol",
    "InstitutionName": "Qzap hospital",
    "InstitutionAddress": "Qzaq Road",
    "InstitutionalDepartmentName": "Qzar ward",
    "ReferringPhysicianName": "Qzas^Referrer",
    "PerformingPhysicianName": "Qzat^Performer",
    "OperatorsName": "Qzau^Operator",
    "NameOfPhysiciansReadingStudy": "Qzav^Reader",
    "StationName": "QZAW1",
    "DeviceSerialNumber": "Qzax555",
    "RequestingPhysician": "Qzay^Requester",
    "RequestedProcedureDescription": "Qzaz procedure",
    "AdditionalPatientHistory": "Qzba history",
    "ImageComments": "../../Qzbb",
    "ContentLabel": "QZBC_LABEL",
    "StudyInstanceUID": "1.2.826.77.90001",
    "FrameOfReferenceUID": "1.2.826.77.90002",
    "ContributionDateTime": "18780101",
}
"""DICOM keyword to what it holds; one of them would lead out of any folder."""
SERIES_UID, INSTANCE_UID = "1.2.826.77.90003", "1.2.826.77.90004"
OWNER, PRIVATE, NESTED, TITLE, PREAMBLE = "QZBD OWNER", "Qzbe private", "Qzbf nested", "QZBG_AET", b"Qzbh preamble"
TAG_CANARIES = (
    *("Qzaa", "Qzab", "Qzac", "18770319", "Qzad", "Qzae", "Qzaf", "Qzag", "Qzah", "Qzai", "Qzaj", "Qzak", "Qzal"),
    *("Qzam", "Qzan", "Qzao", "Qzap", "Qzaq", "Qzar", "Qzas", "Qzat", "Qzau", "Qzav", "Qzaw", "Qzax", "Qzay"),
    *("Qzaz", "Qzba", "Qzbb", "Qzbc", "77.90001", "77.90002", "77.90003", "77.90004", "18780101"),
    *("Qzbd", "Qzbe", "Qzbf", "Qzbg", "Qzbh"),
)
"""Forty, within files."""
TEXT_CANARIES = (
    *("Qzca", "Qzcb", "Qzcc", "Qzcd", "Qzce", "Qzcf", "Qzcg", "Qzch"),
    *("Qzci", "Qzcj"),
)
"""In headers of NIfTI, PNG, TIFF and NRRD files; what a library says of a file; the text of a recipe."""
NAME_CANARIES = ("Qzda", "Qzdb", "Qzdc", "Qzdd", "Qzde", "Qzdf", "Qzdg", "Qzdh", "Qzdi", "Qzdj")
"""In names: folder, file, member of an archive, checkpoint, recipe, listed file, subject, missing file, option."""
ALL = (*TAG_CANARIES, *TEXT_CANARIES, *NAME_CANARIES)
SUBJECTS = ("Qzdg^One", "Qzdg^Two", "Qzdg^Three")


def dicom(folder: Path, count: int = 3) -> Path:
    """A series with a canary in every tag that may tell who or where."""
    folder.mkdir(parents=True)
    for at in range(count):
        ds = header(rows=36, columns=40, series=SERIES_UID, number=at + 1)
        place(ds, (0.0, 0.0, 3.0 * at), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        for keyword, value in TAGS.items():
            setattr(ds, keyword, value)
        ds.SOPInstanceUID = f"{INSTANCE_UID}.{at}"
        ds.private_block(0x0029, OWNER, create=True).add_new(1, "LO", PRIVATE)
        inner = Dataset()
        inner.PatientID, inner.RequestedProcedureDescription = "Qzbf", NESTED
        ds.RequestAttributesSequence = Sequence([inner])
        ds.file_meta.SourceApplicationEntityTitle = TITLE
        ds.preamble = PREAMBLE.ljust(128, b"\0")
        pixels = anatomy((36, 40, count), seed=at)[..., at].astype(np.uint16)
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
        pydicom.dcmwrite(folder / f"Qzdb{at}.dcm", ds, enforce_file_format=True)
    return folder


def nifti(path: Path, seed: int = 0, size: tuple[int, int, int] = (40, 36, 3)) -> Path:
    """A canary in every free text of a NIfTI header, and in an extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(anatomy(size, seed), np.diag([0.9, 0.8, 4.0, 1.0]))
    image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = b"Qzca", b"Qzcb", b"Qzcc"
    image.header["db_name"] = b"Qzcd"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Qzce"))
    nib.save(image, path)
    return path


def pictures(folder: Path) -> dict[str, Path]:
    """A PNG, a TIFF and an NRRD with canaries in their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    plane = (anatomy((40, 36, 1))[..., 0] // 8).astype(np.uint8)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", "Qzcf")
    texts.add_itxt("Comment", "Qzcf")
    found = {name: folder / f"Qzdb_picture.{name}" for name in ("png", "tiff", "nrrd")}
    Image.fromarray(plane).save(found["png"], pnginfo=texts)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[315] = "Qzcg", "Qzcg"
    Image.fromarray(plane).save(found["tiff"], tiffinfo=tags)
    lines = ["NRRD0004", "# Qzch", "type: uchar", "dimension: 2", "sizes: 36 40", "encoding: raw", "patient:=Qzch"]
    found["nrrd"].write_bytes("\n".join(lines).encode() + b"\n\n" + plane.tobytes())
    return found


def archive(path: Path, series: Path) -> Path:
    """The series in a zip, under a canary's name."""
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(series.iterdir()):
            packed.write(file, f"Qzdc/{file.name}")
    return path


def checkpoint(path: Path) -> Path:
    """A network that nearly repeats pixels, under a canary's name."""
    return save_checkpoint(path, 2)


def tree(folder: Path) -> Path:
    """Three subjects with an image each."""
    for number, subject in enumerate(SUBJECTS):
        nifti(folder / subject / "Qzdb_T2w.nii.gz", number, (72, 64, 2))
    return folder
