"""`medsr inspect` on a study: every stack with its number, what becomes of it, and nothing about a person."""

import json

import numpy as np
import pytest

from tests.formats.dicom_makers import CANARY, SHARED, header, save, series

SCOUT = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def later(ds):
    ds.InstanceNumber += 10


@pytest.fixture
def study(tmp_path):
    series(tmp_path / "1", 1, series_uid="1.2.3.901", change=lambda ds, at: setattr(ds, "ImageType", SCOUT))
    series(tmp_path / "2" / "a", 3, series_uid="1.2.3.902")
    series(tmp_path / "2" / "b", 2, series_uid="1.2.3.902", rows=9, change=lambda ds, at: later(ds))
    positions = [np.array([0, 0.2 * z, z]) for z in (0.0, 2.0, 4.0, 8.0)]
    series(tmp_path / "3", 4, series_uid="1.2.3.903", positions=positions, orientation=(1, 0, 0, 0, 1, 0))
    seg = header(series="1.2.3.904", sop_class="1.2.840.10008.5.1.4.1.1.66.4", modality="SEG")
    save(seg, tmp_path / "4" / "seg.dcm", np.zeros((6, 5), np.uint16))
    return tmp_path


def test_every_stack_is_listed(medsr, study):
    ended = medsr("inspect", study, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    listed = [(s["selector"], s["images"], s["rows x columns"], s["upscaled"], s["reason"]) for s in found["stacks"]]
    assert listed == [
        ("1", 1, "6 x 5", False, "is a localiser"),
        ("2#1", 3, "6 x 5", True, None),
        ("2#2", 2, "9 x 5", True, None),
        ("3", 4, "6 x 5", True, None),
        ("4", 1, "6 x 5", False, "is a segmentation: labels must not be run through a network"),
    ]
    uneven = found["stacks"][3]
    assert uneven["gantry_tilt_degrees"] == pytest.approx(11.3, abs=0.02)
    assert uneven["slice spacing"] == "not stated"
    assert any("not evenly spaced, 2 to 4 mm apart" in sentence for sentence in uneven["warnings"])
    assert found["stacks"][1]["pixel spacing"] == "0.7 x 0.5 mm"
    assert found["stacks"][1]["transfer_syntax"] == "Explicit VR Little Endian"
    assert found["stacks"][1]["series_instance_uid"] == "1.2.3.902"
    assert found["usable"]
    assert found["refused"] is None


def test_the_same_for_a_person(medsr, study):
    ended = medsr("inspect", study)
    assert ended.code == 0
    for phrase in ("--series 2#1", "would be upscaled", "is left: it is a localiser", "1.2.3.903", "can be done"):
        assert phrase in ended.out
    for foreign in (CANARY, "CANARYID", "t1 axial"):
        assert foreign not in ended.out + ended.err
    assert "1.2.3" not in ended.err


@pytest.mark.parametrize(("wanted", "images"), [("2#1", 3), ("1", 1), ("1.2.3.903", 4), (".901", 1)])
def test_one_stack_is_told_in_full(medsr, study, wanted, images):
    found = json.loads(medsr("inspect", study, "--series", wanted, "--json").out)
    assert found["slices"] == images
    assert [stack["upscaled"] for stack in found["stacks"]] == [True]


def test_nothing_to_be_done_is_exit_6_with_the_list(medsr, study):
    ended = medsr("inspect", study, "--series", "4", "--json")
    assert ended.code == 6
    assert "segmentation" in json.loads(ended.out)["refused"]
    assert medsr("inspect", study, "--series", "9").code == 6
    (study / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    ended = medsr("inspect", study)
    assert ended.code == 6
    assert "some files cannot be read" in ended.out
    assert "would be upscaled" not in ended.out


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")
@pytest.mark.parametrize("syntax", ["big_endian", "explicit_le", "implicit_le", "rle"])
def test_no_command_takes_a_mosaic(medsr, syntax, tmp_path):
    path = SHARED / f"siemens_mosaic_{syntax}" / "mosaic.dcm"
    for command in (
        ("inspect", path),
        ("inspect", path.parent),
        ("upscale", path, "-m", "bicubic", "-s", "2", "-o", tmp_path / "out.dcm"),
        ("upscale", path.parent, "-m", "bicubic", "-s", "2", "-o", tmp_path / "out"),
        ("compare", path, path, "-o", tmp_path / "page"),
    ):
        ended = medsr(*command)
        assert ended.code == 6, command
        assert ended.err.count("is a Siemens mosaic: its tiles are slices") == 1
        assert len(ended.err.splitlines()) == 1
    assert medsr("evaluate", path.parent, "-m", "bicubic", "-s", "2", "-o", tmp_path / "figures").code == 6
    assert not list(tmp_path.iterdir())
