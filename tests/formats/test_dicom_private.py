"""Private elements: what says something of the old grid goes, and dcm2niix is not misled by what stays."""

import json
import shutil
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medsr_cli.errors import ArgumentsError
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_headers import Plane
from medsr_cli.formats.dicom_private import RULES, check_rule, prune_private
from tests.formats.dicom_makers import DERIVATION, OPTIONS, SHARED, derive, header, place, save, series

PLANE = Plane((-20.25, 31.5, 7.125), (1, 0, 0, 0, 1, 0), (0.703, 0.512), 1.0, 0.0, 0)

GONE_ALWAYS = [
    ("SIEMENS CSA HEADER", 0x00291010, "OB", b"SV10\4\3\2\1" + b"\0" * 80),
    ("SIEMENS MR HEADER", 0x0019100A, "US", 36),
    ("SIEMENS MR HEADER", 0x00191028, "FD", 12.5),
    ("SIEMENS MR HEADER", 0x00191015, "FD", [1.0, 2.0, 3.0]),
    ("SIEMENS MR SDI 02", 0x00211053, "FD", 12.5),
    ("Anon", 0x00191028, "FD", 12.5),  # a creator that was renamed; dcm2niix reads it all the same
    ("Anon", 0x00291010, "OB", b"SV10\4\3\2\1" + b"\0" * 80),
    ("Anon", 0x00431010, "OB", b"SV10\4\3\2\1 PixelSpacing\0" + b"\0" * 80),
    ("GEMS_IMAG_01", 0x00271060, "FL", 256.0),
    ("GEMS_PARM_01", 0x0043102C, "SS", 640),
    ("Philips Imaging DD 001", 0x20011022, "FL", 1.1),
    ("NOBODY", 0x00991001, "DS", ["1", "-20.25", "31.5", "7.125"]),  # the source's position
    ("NOBODY", 0x00991002, "LO", "0.703\\0.512"),
    ("NOBODY", 0x00991003, "FL", [0.703, 0.512]),
    ("NOBODY", 0x00991004, "UN", b"0.703\\0.512"),
]
UNREADABLE = [
    ("SIEMENS CSA HEADER", 0x00291020, "OB", b"SV10\4\3\2\1MrPhoenixProtocol" + b"\0" * 80),
    ("GEMS_SERS_01", 0x0025101B, "OB", b"\x1f\x8b\x08\0\1\2"),
    ("NOBODY", 0x00991001, "UN", b"\1\2\3\4"),
]
KEPT = [
    ("SIEMENS MR HEADER", 0x0019100C, "IS", "1000"),  # b value
    ("SIEMENS MR HEADER", 0x0019100E, "FD", [0.1, 0.2, 0.3]),
    ("SIEMENS MR HEADER", 0x0051100C, "LO", "FoV 220*220"),
    ("Philips Imaging DD 001", 0x20011003, "FL", 800.0),
    ("Philips MR Imaging DD 001", 0x2005100E, "FL", 4.2),
    ("GEMS_PARM_01", 0x00431039, "IS", [1000, 8, 0, 0]),
    ("NOBODY", 0x00991001, "LO", "free text"),
    ("NOBODY", 0x00991002, "UN", b"plain text "),
    ("NOBODY", 0x00991003, "DS", ["-20.25", "31.5", "8"]),
    ("NOBODY", 0x00991004, "FL", [256.0, 256.0]),
]


def with_element(creator, tag, vr, value):
    ds = Dataset()
    ds.add_new((tag & 0xFFFF0000) | (tag & 0xFFFF) >> 8, "LO", creator)
    ds.add_new(tag, vr, value)
    return ds


def kept(rule, ds):
    """Whether the element is left, at the top and in a sequence of either kind."""
    tag = max(ds.keys())
    outer = Dataset()
    outer.RequestAttributesSequence = [pydicom.dataset.Dataset(ds)]
    deep = Dataset()
    deep.add_new(0x00170010, "LO", "OUTER")
    deep.add_new(0x00171001, "SQ", [pydicom.dataset.Dataset(ds)])
    for data_set in (ds, outer, deep):
        prune_private(data_set, rule, [PLANE])
    inner = outer.RequestAttributesSequence[0]
    found = [tag in ds, tag in inner]
    found.append(0x00171001 in deep and tag in deep[0x00171001].value[0])
    assert len(set(found)) == 1
    if not found[0]:
        assert not len(ds)  # nor the block
        assert not len(inner)
    return found[0]


@pytest.mark.parametrize("element", GONE_ALWAYS, ids=lambda e: f"{e[0]} {e[1]:08x}")
def test_what_is_of_the_old_grid_goes_under_every_rule(element):
    assert not any(kept(rule, with_element(*element)) for rule in RULES)


@pytest.mark.parametrize("element", UNREADABLE, ids=lambda e: f"{e[0]} {e[1]:08x}")
def test_what_nobody_here_can_read_stays_only_when_all_is_asked_for(element):
    assert [kept(rule, with_element(*element)) for rule in RULES] == [False, True, False]


@pytest.mark.parametrize("element", KEPT, ids=lambda e: f"{e[0]} {e[1]:08x}")
def test_what_is_still_true_stays(element):
    assert [kept(rule, with_element(*element)) for rule in RULES] == [True, True, False]


def test_a_grid_of_round_numbers_is_nobodys_copy():
    plane = Plane((0.0, 0.0, 7.5), PLANE.orientation, (1.0, 1.0), 1.0, 0.0, 0)
    ds = with_element("NOBODY", 0x00991001, "FL", [0.0, 0.0, 7.5, 1.0, 1.0])
    prune_private(ds, "safe", [plane])
    assert 0x00991001 in ds


@pytest.mark.parametrize(
    ("position", "left"),
    [((-20.0, 31.0, 7.0), 0), ((0.0, 31.0, 45.0), 1), ((1.0, 2.0, 3.0), 1), ((16.0, 16.0, 40.0), 1)],
)
def test_a_position_of_round_numbers_that_nothing_else_would_have_is_a_copy(position, left):
    ds = with_element("NOBODY", 0x00991001, "FD", list(position))
    prune_private(ds, "safe", [replace(PLANE, position_mm=position)])
    assert len(ds) == 2 * left


def test_rules_that_there_are_not():
    check_rule("safe")
    with pytest.raises(ArgumentsError, match="some"):
        check_rule("some")


def test_no_private_element_is_left_in_a_real_file_when_none_is_asked_for(tmp_path):
    path = SHARED / "plain_small" / "CT_small.dcm"
    if not path.is_file():
        pytest.skip("the shared fixtures are not here")
    for rule in RULES:
        derivation = replace(DERIVATION, dicom=DicomOutput(private_tags=rule))
        derive(open_reader(path, OPTIONS), tmp_path / f"{rule}.dcm", derivation=derivation)
    private = {rule: {e.tag for e in pydicom.dcmread(tmp_path / f"{rule}.dcm") if e.tag.is_private} for rule in RULES}
    source = {e.tag for e in pydicom.dcmread(path) if e.tag.is_private}
    assert not private["none"]
    assert private["safe"] < private["all"] < source
    assert 0x00271048 in source - private["all"]  # GE's corner of the image
    assert 0x00271045 in private["safe"]  # and its normal


# -- dcm2niix -------------------------------------------------------------------------------------------------


def csa(fields):
    """A CSA image header, version 2, of texts: PS-less, as dcm2niix and nibabel read it."""
    made = b"SV10\4\3\2\1" + struct.pack("<II", len(fields), 77)
    for name, vr, values in fields:
        made += name.encode().ljust(64, b"\0") + struct.pack("<I4sIII", len(values), vr.encode(), 0, 6, 77)
        for value in (*values, *[""] * (6 - len(values))):
            data = value.encode() + b"\0" if value else b""
            made += struct.pack("<4I", len(data), len(data), 77, len(data)) + data + b"\0" * (-len(data) % 4)
    return made


def siemens(folder):
    """A Siemens series of EPI, with all that dcm2niix looks for."""

    def change(ds, at):
        ds.Manufacturer, ds.ManufacturerModelName, ds.MagneticFieldStrength = "SIEMENS", "Skyra", "3"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        ds.ScanningSequence, ds.SequenceVariant, ds.MRAcquisitionType = "EP", "SK", "2D"
        ds.EchoTime, ds.RepetitionTime, ds.AcquisitionTime = "30", "2000", "101010"
        ds.InPlanePhaseEncodingDirection, ds.AcquisitionMatrix = "COL", [0, 32, 32, 0]
        ds.ProtocolName = "epi"
        ds.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        ds.add_new(0x00191028, "FD", 31.25)
        ds.add_new(0x0019100C, "IS", "1000")
        ds.add_new(0x0019100E, "FD", [1.0, 0.0, 0.0])
        ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
        ds.add_new(0x00291008, "CS", "IMAGE NUM 4")
        fields = [
            ("NumberOfImagesInMosaic", "US", []),
            ("BandwidthPerPixelPhaseEncode", "FD", ["31.25"]),
            ("PhaseEncodingDirectionPositive", "IS", ["1"]),
            ("B_value", "IS", ["1000"]),
            ("SliceNormalVector", "FD", ["0.0", "0.0", "1.0"]),
            ("ImagePositionPatient", "DS", ["-1.0", "-2.0", "-3.0"]),
        ]
        packed = csa(fields)
        ds.add_new(0x00291010, "OB", packed + b"\0" * (len(packed) % 2))

    series(folder, 4, change=change, rows=32, columns=32)


def converted(folder, target):
    target.mkdir()
    command = ["dcm2niix", "-b", "y", "-z", "n", "-f", "x", "-o", target, folder]
    subprocess.run(command, capture_output=True, check=True)
    (sidecar,) = target.glob("*.json")
    return json.loads(sidecar.read_text())


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
@pytest.mark.parametrize("rule", ["safe", "all"])
def test_dcm2niix_says_nothing_of_the_result_that_is_no_longer_true(tmp_path, rule):
    siemens(tmp_path / "in")
    derivation = replace(DERIVATION, dicom=DicomOutput(private_tags=rule))
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out", derivation=derivation)
    before, after = (converted(tmp_path / name, tmp_path / f"nii_{name}") for name in ("in", "out"))
    # Distortion in pixels: right for the source's pixels, wrong by the scale for smaller ones.
    misleading = {"BandwidthPerPixelPhaseEncode", "EffectiveEchoSpacing", "DerivedVendorReportedEchoSpacing",
                  "TotalReadoutTime"}  # fmt: skip
    assert misleading <= set(before)
    assert not misleading & set(after)
    assert after["EchoTime"] == before["EchoTime"] == 0.03
    assert list((tmp_path / "nii_in").glob("*.bval"))
    assert (tmp_path / "nii_out" / "x.bval").read_text() == (tmp_path / "nii_in" / "x.bval").read_text()


def test_implicit_vr_gives_known_elements_their_types(tmp_path):
    ds = place(header(), (0, 0, 0))
    ds.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
    ds.add_new(0x0019100C, "IS", "1000")
    ds.add_new(0x00191028, "FD", 31.25)
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / "b.dcm")
    new = pydicom.dcmread(tmp_path / "b.dcm")
    assert new[0x0019100C].value == 1000
    assert 0x00191028 not in new
