"""What of a study is upscaled, what is left, and in which words."""

import shutil
import subprocess
import zipfile
from collections import Counter

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medsr_cli import formats
from medsr_cli.errors import InputRefused
from medsr_cli.formats import dicom_series
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom import open_reader
from medsr_cli.tasks.inspect import inspect_image
from medsr_cli.tasks.study import Chosen, series_of
from tests.formats.dicom_makers import CANARY, OPTIONS, SHARED, derive, header, save, series

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
AS_IT_IS = (Chosen(None),)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")


def opened(path, plan, options=OPTIONS):
    return [formats.open_image(path, chosen.options(options)).volume for chosen in plan.todo]


def localiser(folder, uid):
    for at, orientation in enumerate((AXIAL, CORONAL, SAGITTAL)):
        series(folder / str(at), 1, series_uid=uid, orientation=orientation)


def capture(ds, at):
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.7", "OT"


@pytest.fixture
def study(tmp_path):
    """A localiser, two series, a segmentation, a saved screen, an own result, and a report without pixels."""
    localiser(tmp_path / "1", "1.2.3.901")
    series(tmp_path / "2", 3, series_uid="1.2.3.902")
    series(tmp_path / "3", 4, series_uid="1.2.3.903", rows=8)
    seg = header(series="1.2.3.904", sop_class="1.2.840.10008.5.1.4.1.1.66.4", modality="SEG")
    save(seg, tmp_path / "4" / "seg.dcm", np.zeros((6, 5), np.uint16))
    series(tmp_path / "5", 1, series_uid="1.2.3.905", change=capture)
    report = header(series="1.2.3.906", sop_class="1.2.840.10008.5.1.4.1.1.88.11", modality="SR")
    del report.Rows
    save(report, tmp_path / "sr.dcm")
    derive(open_reader(tmp_path / "2", OPTIONS), tmp_path / "6")
    return tmp_path


def test_every_series_that_suits_is_done_and_the_others_have_a_reason(study):
    plan = series_of(study, OPTIONS)
    assert plan.several
    assert [(chosen.selector, chosen.folder_name) for chosen in plan.todo] == [("2", "series-02"), ("3", "series-03")]
    assert [volume.slices for volume in opened(study, plan)] == [3, 4]
    said = [left.sentence() for left in plan.left]
    assert [left.selector for left in plan.left] == ["1#1", "1#2", "1#3", "4", "5", "6"]
    assert said[0] == "Series 1, stack 1 is a localiser: name it with --series 1#1 to have it all the same."
    assert "Series 4 is a segmentation" in said[3]
    assert "--series 4" not in said[3]
    assert said[4] == "Series 5 is a screen that was saved: name it with --series 5 to have it all the same."
    assert said[5] == "Series 6 is a result of medsr: name it with --series 6 to have it all the same."
    assert not any(foreign in " ".join(said) for foreign in (CANARY, "1.2.3", "t1 axial"))


@pytest.mark.parametrize(
    ("wanted", "selectors"),
    [
        ("2", ["2"]), ("1.2.3.903", ["3"]), ("1", ["1#1", "1#2", "1#3"]), ("1#2", ["1#2"]), ("5", ["5"]), ("6", ["6"]),
    ],
)  # fmt: skip
def test_a_named_series_is_done_with_all_its_stacks(study, wanted, selectors):
    options = ReadOptions(series=wanted)
    plan = series_of(study, options)
    assert [chosen.selector for chosen in plan.todo] == selectors
    assert plan.left == ()
    assert len(opened(study, plan, options)) == len(selectors)
    if len(selectors) == 3:
        assert [chosen.folder_name for chosen in plan.todo] == [f"series-01-stack-{at}" for at in (1, 2, 3)]
    else:
        assert plan.todo[0].folder_name == ""


@pytest.mark.parametrize("wanted", ["4", "9", "", "1.2.3"])
def test_what_cannot_be_done_is_left_to_the_opening(study, wanted):
    options = ReadOptions(series=wanted)
    plan = series_of(study, options)
    assert plan.todo == (Chosen(wanted),)
    with pytest.raises(InputRefused):
        opened(study, plan, options)


def test_one_series_among_others_is_done_as_if_it_were_alone(study):
    shutil.rmtree(study / "3")
    plan = series_of(study, OPTIONS)
    assert plan.todo == (Chosen("2"),)
    assert len(plan.left) == 6
    assert opened(study, plan)[0] == formats.open_image(study).volume


def test_a_localiser_alone_is_asked_about(tmp_path):
    localiser(tmp_path, "1.2.3.901")
    plan = series_of(tmp_path, OPTIONS)
    assert plan.todo == AS_IT_IS
    with pytest.raises(InputRefused, match="3 stacks of 1 series"):
        opened(tmp_path, plan)


def test_an_archive_of_a_study(study, tmp_path_factory):
    packed = tmp_path_factory.mktemp("zip") / "study.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(study.rglob("*.dcm")):
            archive.write(path, path.relative_to(study))
    assert [len(part) for part in (series_of(packed, OPTIONS).todo, series_of(packed, OPTIONS).left)] == [2, 6]
    assert [volume.slices for volume in opened(packed, series_of(packed, OPTIONS))] == [3, 4]


def test_a_broken_file_stops_all_of_it_once(study):
    (study / "2" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    plan = series_of(study, OPTIONS)
    assert plan.todo == AS_IT_IS
    with pytest.raises(InputRefused, match="cannot be read"):
        opened(study, plan)


def test_paths_that_are_no_study_are_opened_as_they_are(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError

    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    (tmp_path / "text.dcm").write_text("not an image")
    series(tmp_path / "one", 2)
    assert series_of(tmp_path / "one", OPTIONS).todo == AS_IT_IS
    assert series_of(tmp_path / "text.dcm", OPTIONS).todo == AS_IT_IS
    assert series_of(tmp_path / "missing", OPTIONS).todo == AS_IT_IS
    monkeypatch.setattr(dicom_series, "find_series", never)
    assert series_of(tmp_path / "scan.nii.gz", OPTIONS).todo == AS_IT_IS


def test_headers_are_read_once_for_the_plan_and_all_openings(study, monkeypatch):
    read = []
    original = dicom_series.read_instance
    monkeypatch.setattr(dicom_series, "read_instance", lambda member, *rest: read.append(1) or original(member, *rest))
    plan = series_of(study, OPTIONS)
    opened(study, plan)
    assert len(read) == len(list(study.rglob("*.dcm")))


# -- real series ----------------------------------------------------------------------------------------------

TOGETHER = (
    "mixed_orientation_noise_pixels", "series_ct_gantry_tilt_phantom", "ct_variable_slice_increment_noise_pixels",
    "series_mr_t1_isotropic_12slices", "nonsquare_pixels_pmod", "single_ct_coronal",
)  # fmt: skip


def put_together(folder):
    """Several series of the shared data under one study."""
    for name in TOGETHER:
        for path in sorted(path for path in (SHARED / name).iterdir() if path.is_file()):
            ds = pydicom.dcmread(path)
            ds.StudyInstanceUID = "1.2.3.99"
            (folder / name).mkdir(exist_ok=True)
            ds.save_as(folder / name / path.name)
    return folder


@needs_shared
@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
def test_dcm2niix_finds_the_same_stacks_in_a_study(tmp_path):
    source = tmp_path / "study"
    source.mkdir()
    plan = series_of(put_together(source), OPTIONS)
    assert plan.left == ()
    ours = Counter((v.slices, *sorted((v.rows, v.columns))) for v in opened(source, plan))
    (tmp_path / "nifti").mkdir()
    subprocess.run(
        ["dcm2niix", "-b", "n", "-z", "n", "-o", tmp_path / "nifti", source], check=True, capture_output=True
    )
    # Beside a tilted or uneven series it writes one that it resampled.
    found = [p for p in (tmp_path / "nifti").glob("*.nii") if not p.stem.endswith(("_Tilt_1", "_Eq_1"))]
    shapes = [(*nib.load(path).shape, 1)[:3] for path in found]
    assert Counter((depth, *sorted((rows, columns))) for columns, rows, depth in shapes) == ours
    assert sum(ours.values()) == len(TOGETHER) + 1


@needs_shared
@pytest.mark.parametrize("folder", sorted(p.name for p in SHARED.iterdir()) if SHARED.is_dir() else [])
def test_every_plan_of_the_shared_data_can_be_opened_or_says_why(folder):
    path = SHARED / folder
    plan = series_of(path, OPTIONS)
    assert not any("1." in left.sentence() for left in plan.left)
    try:
        volumes = opened(path, plan)
    except InputRefused:
        assert plan.todo == AS_IT_IS
        volumes = []
    found = inspect_image(path)
    assert (found.error is None) == bool(volumes)
    assert [stack.upscaled for stack in found.stacks].count(True) == len(volumes)
    assert all(stack.reason for stack in found.stacks if not stack.upscaled)
    if "mosaic" in folder:
        assert "is a Siemens mosaic" in str(found.error)
