"""A derived series in a picture archive: taken, found in its study, given back whole, not doubled by a rerun."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medsr_cli.errors import MedsrError
from medsr_cli.formats.contract import DicomOutput
from tests.interop.archive import NEEDED, PROPOSALS, running_archive
from tests.interop.sources import FOLDERS, SHARED, upscaled

pytestmark = [NEEDED, pytest.mark.skipif(not FOLDERS, reason="the shared data are not here")]

STABLE = DicomOutput(stable_uids=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    with running_archive(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


def files_of(path):
    return sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def headers(path):
    return [pydicom.dcmread(file) for file in files_of(path)]


def results(source, folder, **more):
    """DICOM results of a folder of the shared data, or of each file in it; none where all are refused."""
    for inputs in ([source], sorted(source.iterdir())):
        made = []
        for at, path in enumerate(inputs):
            with contextlib.suppress(MedsrError):
                made += [item.output for item in upscaled(path, folder / f"{at}", **more)]
        if made:
            return made
    return []


@pytest.mark.parametrize("name", FOLDERS)
def test_the_archive_takes_every_result_and_gives_it_back(archive, tmp_path, name):
    made = [path for output in results(SHARED / name, tmp_path / "out") for path in files_of(output)]
    made = [path for path in made if path.suffix == ".dcm"]
    if not made:
        pytest.skip("nothing in it can be upscaled")
    archive.send(tmp_path / "out")
    stored = archive.instances()
    for path in made:
        sent = pydicom.dcmread(path)
        back = archive.fetch(f"/instances/{stored[sent.SOPInstanceUID]}/file")
        assert back == path.read_bytes() or same_content(sent, back)
    if not sent.get("StudyInstanceUID"):
        return
    answers = archive.find("SERIES", StudyInstanceUID=sent.StudyInstanceUID, SeriesInstanceUID="")
    assert any(str(sent.SeriesInstanceUID) in answer for answer in answers)


def same_content(sent, back):
    """Whether the data set is what was sent; an archive writes a file meta group of its own."""
    received = pydicom.dcmread(io.BytesIO(back))
    return received.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID and received == sent


@pytest.mark.parametrize("name", ["series_ct_gantry_tilt_phantom", "series_mr_t1_isotropic_12slices"])
def test_source_and_result_are_two_series_of_one_study(archive, tmp_path, name):
    (output,) = results(SHARED / name, tmp_path / "out")
    source, derived = headers(SHARED / name), headers(output)
    archive.send(SHARED / name, str(source[0].file_meta.TransferSyntaxUID))
    archive.send(output)
    (patient,) = {ds.PatientID for ds in derived}
    (study,) = {ds.StudyInstanceUID for ds in derived}
    answers = "".join(archive.find("SERIES", StudyInstanceUID=str(study), SeriesInstanceUID=""))
    assert str(source[0].SeriesInstanceUID) in answers
    assert str(derived[0].SeriesInstanceUID) in answers
    assert len(archive.find("STUDY", PatientID=str(patient), StudyInstanceUID=str(study))) == 1
    assert archive.series()[derived[0].SeriesInstanceUID] == sorted(ds.SOPInstanceUID for ds in derived)


@pytest.mark.parametrize("name", ["series_mr_t1_isotropic_12slices", "secondary_capture_rgb", "enhanced_multiframe"])
def test_a_rerun_with_stable_uids_adds_nothing(archive, tmp_path, name):
    first = results(SHARED / name, tmp_path / "first", dicom=STABLE)
    results(SHARED / name, tmp_path / "second", dicom=STABLE)
    assert first
    archive.send(tmp_path / "first")
    before = archive.series()
    archive.send(tmp_path / "second")
    assert archive.series() == before
    pairs = zip(files_of(tmp_path / "first"), files_of(tmp_path / "second"), strict=True)
    for one, other in pairs:
        assert one.read_bytes() == other.read_bytes()
    # Other settings make other objects.
    changed = results(SHARED / name, tmp_path / "larger", scale="3", dicom=STABLE)
    known = {uid for uids in before.values() for uid in uids}
    assert not known & {ds.SOPInstanceUID for path in changed for ds in headers(path)}


@pytest.mark.parametrize("syntax", ["rle", "jpeg2000-lossless"])
def test_compressed_series_arrive_with_the_same_pixels(archive, tmp_path, syntax):
    name = "series_mr_t1_isotropic_12slices"
    (plain,) = results(SHARED / name, tmp_path / "plain")
    (packed,) = results(SHARED / name, tmp_path / "packed", dicom=DicomOutput(transfer_syntax=syntax))
    uid = str(headers(packed)[0].file_meta.TransferSyntaxUID)
    assert uid in PROPOSALS
    assert uid != "1.2.840.10008.1.2.1"
    archive.send(packed, uid)
    stored = archive.instances()
    for one, other in zip(headers(plain), headers(packed), strict=True):
        back = archive.fetch(f"/instances/{stored[other.SOPInstanceUID]}/file")
        Path(tmp_path / "back.dcm").write_bytes(back)
        np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "back.dcm").pixel_array, one.pixel_array)
