"""Derived DICOM: the same place, the same values, a new series of the same study, and no new conformance error."""

import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import JPEGBaseline8Bit

from medsr_cli.errors import ArgumentsError, InputRefused, RunError
from medsr_cli.formats import dicom_write
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.dicom import open_reader, open_writer
from medsr_cli.volume.geometry import voxel_centres_mm
from tests.formats.dicom_makers import (
    CANARY,
    DERIVATION,
    OPTIONS,
    SHARED,
    TILTED,
    compressed,
    derive,
    enhanced,
    enlarge,
    header,
    place,
    save,
    series,
)
from tests.formats.test_dicom_pixels import jpeg

ONE_OBJECT = replace(DERIVATION, dicom=DicomOutput(multiframe=True))

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")


def first(folder):
    return pydicom.dcmread(sorted(folder.iterdir())[0])


def simpleitk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


# -- place ----------------------------------------------------------------------------------------------------


def check_same_place(source, result, scale):
    """Old voxel centres lie in the middle of their scale x scale new voxels, through SimpleITK alone."""
    old, new = simpleitk_series(source), simpleitk_series(result)
    columns, rows, slices = old.GetSize()
    assert new.GetSize() == (columns * scale, rows * scale, slices)
    for k in range(slices):
        for i, j in ((0, 0), (columns - 1, rows - 1), (columns // 2, 1)):
            middle = ((i + 0.5) * scale - 0.5, (j + 0.5) * scale - 0.5, k)
            there = new.TransformContinuousIndexToPhysicalPoint(middle)
            assert np.allclose(there, old.TransformIndexToPhysicalPoint((i, j, k)), atol=1e-3)
    a, b = sitk.GetArrayFromImage(old), sitk.GetArrayFromImage(new)
    assert np.array_equal(a.repeat(scale, 1).repeat(scale, 2), b)


@given(turn=st.tuples(*[st.floats(-3, 3)] * 2), flip=st.sampled_from((1, -1)), scale=st.integers(2, 4))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_oblique_series_stay_in_place(tmp_path_factory, turn, flip, scale):
    a, b = turn
    along = np.array([np.cos(a), np.sin(a), 0]) * flip
    down = np.array([-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b)])
    folder = tmp_path_factory.mktemp("oblique")
    series(folder / "in", 3, orientation=(*along, *down))
    derive(open_reader(folder / "in", OPTIONS), folder / "out", scale)
    check_same_place(folder / "in", folder / "out", scale)


@needs_shared
@pytest.mark.parametrize("name", ["series_mr_t1_isotropic_12slices", "series_ct_gantry_tilt_phantom"])
def test_real_series_stay_in_place(tmp_path, name):
    source = tmp_path / "in"
    source.mkdir()
    for path in sorted((SHARED / name).iterdir())[:3]:
        shutil.copy(path, source)
    derive(open_reader(source, OPTIONS), tmp_path / "out")
    check_same_place(source, tmp_path / "out", 2)


def test_the_result_lies_where_the_volume_says(tmp_path):
    series(tmp_path / "in", 4)
    source = open_reader(tmp_path / "in", OPTIONS)
    result = source.volume.enlarged(17, 11)
    with open_writer(tmp_path / "out", source, result, DERIVATION, overwrite=False) as writer:
        for _ in source.slices():
            writer.write(np.zeros((1, 17, 11), np.uint16))
    back = open_reader(tmp_path / "out", OPTIONS).volume
    corners = np.array([[0, 0, 0], [10, 16, 3], [5, 2, 1]], float)
    ours, theirs = (voxel_centres_mm(v.affine, corners) for v in (result, back))
    assert np.allclose(ours, theirs, atol=1e-6)
    assert back.spacing_mm == pytest.approx(result.spacing_mm)
    assert back.spacing_mm == pytest.approx((0.7 * 6 / 17, 0.5 * 5 / 11))


def test_frames_of_an_enhanced_object_go_back_to_their_places(tmp_path):
    pixels = enhanced(tmp_path / "e.dcm", 4, order=[2, 0, 3, 1], slopes=[1, 2, 0.5, 1.25])
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    assert source.real_values
    writer = derive(source, tmp_path / "out.dcm", derivation=ONE_OBJECT)
    old, new = pydicom.dcmread(tmp_path / "e.dcm"), pydicom.dcmread(tmp_path / "out.dcm")
    assert writer.clipped == 0
    assert np.array_equal(new.pixel_array, enlarge(pixels))
    assert new.NumberOfFrames == 4
    along, down = np.split(np.array(TILTED), 2)
    for a, b in zip(old.PerFrameFunctionalGroupsSequence, new.PerFrameFunctionalGroupsSequence, strict=True):
        before = np.array(a.PlanePositionSequence[0].ImagePositionPatient, float)
        after = np.array(b.PlanePositionSequence[0].ImagePositionPatient, float)
        assert np.allclose(after, before - along * 0.5 / 4 - down * 0.7 / 4, atol=1e-6)
        assert [float(v) for v in b.PixelMeasuresSequence[0].PixelSpacing] == [0.35, 0.25]
        assert b.PixelValueTransformationSequence == a.PixelValueTransformationSequence
        private = b[0x2005100F].value[0]
        assert "PixelSpacing" not in private  # a copy that would no longer be true
        assert private.EchoTime == 12
    assert new.SharedFunctionalGroupsSequence[0].DerivationImageSequence
    assert list(new.ImageType)[:2] == ["DERIVED", "PRIMARY"]


# -- values ---------------------------------------------------------------------------------------------------


def test_slices_scaled_differently_come_back_exactly_and_saturate(tmp_path):
    def change(ds, at):
        ds.RescaleSlope, ds.RescaleIntercept = str(0.25 * (at + 1)), str(33.9 * at)

    stored = series(tmp_path / "in", 3, change=change)
    source = open_reader(tmp_path / "in", OPTIONS)
    assert derive(source, tmp_path / "same").clipped == 0
    back = open_reader(tmp_path / "same", OPTIONS)
    written = [pydicom.dcmread(frame.instance.member.path).pixel_array for frame in back.stack.frames]
    assert np.array_equal(written, enlarge(stored))
    writer = derive(source, tmp_path / "bright", change=lambda large: large + np.float32(1e5))
    assert writer.clipped == 3 * 12 * 10
    assert first(tmp_path / "bright").pixel_array.max() == 4095


def test_values_beyond_the_stored_bits_saturate_and_are_counted(tmp_path):
    series(tmp_path / "in", 2)
    source = open_reader(tmp_path / "in", OPTIONS)
    writer = derive(source, tmp_path / "out", change=lambda large: np.full_like(large, 5000))
    assert writer.clipped == 2 * 12 * 10
    assert (first(tmp_path / "out").pixel_array == 4095).all()


def test_not_a_number_is_never_stored(tmp_path):
    series(tmp_path / "in", 2, change=lambda ds, at: setattr(ds, "RescaleSlope", str(1 + at)))
    source = open_reader(tmp_path / "in", OPTIONS)
    with pytest.raises(RunError, match="not numbers"):
        derive(source, tmp_path / "out", change=lambda large: large * np.nan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "big_endian/MR_small_bigendian.dcm", "implicit_vr/MR_small_implicit.dcm", "rle/MR_small_RLE.dcm",
        "secondary_capture_rgb/SC_rgb_16bit.dcm", "us_colour_no_pixel_spacing/US1_J2KR.dcm",
        "palette_colour/OBXXXX1A_rle_2frame.dcm", "deflated/image_dfl.dcm", "voi_lut/vlut_04.dcm",
        "nonsquare_pixels_pmod", "plain_small/CT_small.dcm",
    ],
)  # fmt: skip
def test_values_that_come_out_are_the_values_that_went_in(tmp_path, name):
    source = open_reader(SHARED / name, OPTIONS)
    assert derive(source, tmp_path / "out").clipped == 0
    back = open_reader(tmp_path / "out", OPTIONS)
    assert back.volume.dtype == source.volume.dtype
    for old, new in zip(source.slices(), back.slices(), strict=True):
        assert np.array_equal(enlarge(old), new)
    result = first(tmp_path / "out")
    assert result.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert result.SamplesPerPixel == source.volume.channels
    if source.volume.channels == 3:
        assert (result.PhotometricInterpretation, result.PlanarConfiguration) == ("RGB", 0)
        assert "RedPaletteColorLookupTableData" not in result


# -- tags -----------------------------------------------------------------------------------------------------


def test_a_new_series_of_the_same_study(tmp_path):
    series(tmp_path / "in", 3)
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out")
    olds = {ds.SOPInstanceUID: ds for ds in (pydicom.dcmread(path) for path in (tmp_path / "in").iterdir())}
    news = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["0001.dcm", "0002.dcm", "0003.dcm"]
    assert len({ds.SOPInstanceUID for ds in news} | set(olds)) == 6
    assert len({ds.SeriesInstanceUID for ds in news}) == 1
    for new in news:
        reference = new.SourceImageSequence[0]
        old = olds[reference.ReferencedSOPInstanceUID]
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert new.SeriesInstanceUID != old.SeriesInstanceUID
        assert new.InstanceNumber == old.InstanceNumber
        assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID
        for same in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientName", "PatientID", "AccessionNumber",
                     "StudyID", "SOPClassUID", "ImageOrientationPatient", "SliceThickness", "BitsStored"):  # fmt: skip
            assert new[same] == old[same]
        assert list(new.ImageType) == ["DERIVED", "SECONDARY", "M"]
        assert new.SeriesNumber == 1007
        assert new.SeriesDescription == "t1 axial x2 rdst-e"
        assert "not for primary diagnosis" in new.DerivationDescription
        assert "rdst-e-x2-brain" in new.DerivationDescription
        assert new.DerivationCodeSequence[0].CodeValue == "113085"
        equipment = new.ContributingEquipmentSequence[0]
        assert equipment.SoftwareVersions == "medsr 0.1.0"
        assert "ab" * 32 in equipment.ContributionDescription
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109103"


def test_what_is_no_longer_true_goes_and_what_is_stays(tmp_path):
    ds = place(header(), (0, 0, 0))
    ds.preamble = b"SECRET".ljust(128, b"\0")
    ds.add_new(0x60000010, "US", 6)
    ds.add_new(0x60003000, "OW", b"\0" * 8)
    ds.SmallestImagePixelValue, ds.LargestImagePixelValue = 0, 9
    icon = Dataset()
    icon.Rows = icon.Columns = 1
    ds.IconImageSequence = [icon]
    ds.ShutterLeftVerticalEdge, ds.ShutterRightVerticalEdge = 1, 5
    ds.WindowCenter, ds.WindowWidth, ds.BurnedInAnnotation = "40", "400", "NO"
    ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", "7"
    ds.add_new(0x00290010, "LO", "VENDOR")
    ds.add_new(0x00291001, "UN", b"keep me!")
    ds.SpecificCharacterSet, ds.SeriesDescription = "ISO_IR 192", "Schädel " * 10
    ds.InstanceNumber = None
    ds.SeriesNumber = 2**31 - 5
    ds.PixelAspectRatio = [1, 1]
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / "b.dcm")
    new = pydicom.dcmread(tmp_path / "b.dcm")
    for gone in (0x60000010, 0x60003000, "IconImageSequence"):
        assert gone not in new
    assert (new.SmallestImagePixelValue, new.LargestImagePixelValue) == (0, 0)
    assert b"SECRET" not in (tmp_path / "b.dcm").read_bytes()
    assert (new.ShutterLeftVerticalEdge, new.ShutterRightVerticalEdge) == (2, 10)
    assert (new.WindowCenter, new.WindowWidth, new.BurnedInAnnotation) == (40, 400, "NO")
    assert (new.LossyImageCompression, new.LossyImageCompressionRatio) == ("01", 7)
    assert new[0x00291001].value == b"keep me!"
    assert new.SeriesDescription == ("Schädel " * 10)[:54] + " x2 rdst-e"
    assert len(new.SeriesDescription) == 64
    assert new.InstanceNumber == 1
    assert new.SeriesNumber == 2**31 - 5
    assert new.PixelAspectRatio == [1, 1]


def test_ultrasound_regions_keep_covering_the_same_tissue(tmp_path):
    path = compressed(tmp_path / "a.dcm", [jpeg()] * 3, JPEGBaseline8Bit, "YBR_FULL_422", (64, 48))
    ds = pydicom.dcmread(path)
    region = Dataset()
    region.RegionSpatialFormat, region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 1, 3, 3
    region.RegionLocationMinX0, region.RegionLocationMaxX1 = 8, 39
    region.RegionLocationMinY0, region.RegionLocationMaxY1 = 0, 63
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.05, 0.04
    region.ReferencePixelX0, region.ReferencePixelPhysicalValueX = 10, 1.5
    ds.SequenceOfUltrasoundRegions, ds.FrameTime = [region], "33"
    pydicom.dcmwrite(path, ds)
    source = open_reader(path, OPTIONS)
    assert source.volume.spacing_mm == pytest.approx((0.4, 0.5))
    derive(source, tmp_path / "b.dcm")
    new = pydicom.dcmread(tmp_path / "b.dcm")
    after = new.SequenceOfUltrasoundRegions[0]
    assert (after.RegionLocationMinX0, after.RegionLocationMaxX1) == (16, 79)
    assert (after.RegionLocationMinY0, after.RegionLocationMaxY1) == (0, 127)
    assert (after.PhysicalDeltaX, after.PhysicalDeltaY) == pytest.approx((0.025, 0.02))
    # Old pixel 10 covers new pixels 20 and 21; its value belongs to the line between them.
    shift = after.ReferencePixelX0 - 20.5
    assert after.ReferencePixelPhysicalValueX == pytest.approx(1.5 + shift * 0.025)
    assert (new.NumberOfFrames, new.FrameTime) == (3, 33)
    assert (new.LossyImageCompression, new.LossyImageCompressionMethod) == ("01", "ISO_10918_1")


def test_unequal_enlargement_changes_the_aspect(tmp_path):
    ds = header()
    ds.PixelAspectRatio = [1, 1]
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    source = open_reader(tmp_path / "a.dcm", OPTIONS)
    result = source.volume.enlarged(18, 10)
    with open_writer(tmp_path / "b.dcm", source, result, DERIVATION, overwrite=False) as writer:
        writer.write(np.zeros((1, 18, 10), np.uint16))
    assert pydicom.dcmread(tmp_path / "b.dcm").PixelAspectRatio == [2, 3]


def test_big_endian_tables_are_turned(tmp_path):
    ds = place(header(), (0, 0, 0))
    table = Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.add_new("LUTData", "OW", np.array([1, 2, 3, 4], ">u2").tobytes())
    ds.VOILUTSequence = [table]
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
    ds.PixelData = np.arange(30, dtype=">u2").tobytes()
    ds["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "a.dcm", ds, enforce_file_format=True)
    derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / "b.dcm")
    new = pydicom.dcmread(tmp_path / "b.dcm")
    assert new.VOILUTSequence[0].LUTData == np.array([1, 2, 3, 4], "<u2").tobytes()
    assert np.array_equal(new.pixel_array, enlarge(np.arange(30).reshape(6, 5)))


# -- whole or not at all --------------------------------------------------------------------------------------


def write_all(target, source, result, slices):
    with open_writer(target, source, result, DERIVATION, overwrite=False) as writer:
        for pixels in slices:
            writer.write(pixels)


def test_a_missing_or_a_wrong_slice_leaves_nothing(tmp_path):
    series(tmp_path / "in", 3)
    source = open_reader(tmp_path / "in", OPTIONS)
    result = source.volume.enlarged(12, 10)
    good = np.zeros((1, 12, 10), np.uint16)
    for slices, phrase in ([[good] * 2, "1 slices are missing"], [[good] * 4, "More than 3"],
                           [[good[:, 1:]], "belongs"], [[good.astype(float)], "belongs"]):  # fmt: skip
        with pytest.raises(RunError, match=phrase):
            write_all(tmp_path / "out", source, result, slices)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# -- several threads ------------------------------------------------------------------------------------------


def writing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("medsr-dicom")]


def slowed(monkeypatch, name, before):
    """Call `before` ahead of a method of the writer."""
    method = getattr(dicom_write.DicomWriter, name)
    monkeypatch.setattr(dicom_write.DicomWriter, name, lambda self, *a: (before(*a), method(self, *a))[1])


def test_frames_are_encoded_at_once_and_headers_one_at_a_time(tmp_path, monkeypatch):
    at_once = {"_stored": [0, 0], "_header": [0, 0]}
    lock = threading.Lock()
    for name, (_, _) in list(at_once.items()):
        method = getattr(dicom_write.DicomWriter, name)

        def counted(self, *args, name=name, method=method):
            with lock:
                at_once[name][0] += 1
                at_once[name][1] = max(at_once[name])
            time.sleep(0.01)
            result = method(self, *args)
            with lock:
                at_once[name][0] -= 1
            return result

        monkeypatch.setattr(dicom_write.DicomWriter, name, counted)
    stored = series(tmp_path / "in", 16)
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out")
    assert 2 <= at_once["_stored"][1] <= dicom_write.THREADS
    assert at_once["_header"][1] == 1
    assert not writing_threads()
    back = open_reader(tmp_path / "out", OPTIONS)
    assert np.array_equal(np.concatenate(list(back.slices())), enlarge(stored))


def test_files_keep_their_names_and_numbers_however_threads_race(tmp_path, monkeypatch):
    """Early slices take longest: their files are written last, under the names that they would have had first."""
    rng = np.random.default_rng(3)
    slowed(monkeypatch, "_stored", lambda *_: time.sleep(float(rng.random()) * 0.02))
    stored = series(tmp_path / "in", 12)
    source = open_reader(tmp_path / "in", OPTIONS)
    derive(source, tmp_path / "out")
    for at, path in enumerate(sorted((tmp_path / "out").iterdir())):
        new = pydicom.dcmread(path)
        instance = source.stack.frames[at].instance
        assert path.name == f"{at + 1:04d}.dcm"
        assert new.SourceImageSequence[0].ReferencedSOPInstanceUID == instance.sop_instance
        assert new.InstanceNumber == 12 - at
        assert np.array_equal(new.pixel_array, enlarge(stored[at]))


def test_frames_of_one_file_race_into_their_places(tmp_path, monkeypatch):
    """With an odd number of bytes, which is padded behind the last frame, whichever is written last."""
    ds = header()
    ds.NumberOfFrames, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 9, 8, 8, 7
    pixels = np.random.default_rng(4).integers(0, 256, (9, 6, 5)).astype(np.uint8)
    save(ds, tmp_path / "a.dcm", pixels)
    source = open_reader(tmp_path / "a.dcm", OPTIONS)
    result = source.volume.enlarged(9, 7)
    large = np.random.default_rng(5).integers(0, 256, (9, 1, 9, 7)).astype(np.uint8)
    first_ones = iter([0.05, 0.03, 0.01])
    slowed(monkeypatch, "_stored", lambda *_: time.sleep(next(first_ones, 0)))
    with open_writer(tmp_path / "b.dcm", source, result, DERIVATION, overwrite=False) as writer:
        for plane in large:
            writer.write(plane)
    assert np.array_equal(pydicom.dcmread(tmp_path / "b.dcm").pixel_array, large[:, 0])


@pytest.mark.parametrize("at", [0, 3, 11])
@pytest.mark.parametrize("stage", ["_stored", "_header", "_close_full"])
def test_a_failure_in_any_thread_fails_the_series(tmp_path, monkeypatch, stage, at):
    series(tmp_path / "in", 12)
    source = open_reader(tmp_path / "in", OPTIONS)
    unlucky = source.stack.frames[at].instance

    def fail(*args):
        if any(arg is unlucky or getattr(arg, "instance", None) is unlucky for arg in args):
            raise InputRefused("unlucky")

    slowed(monkeypatch, stage, fail)
    with pytest.raises(InputRefused, match="unlucky"):
        derive(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not writing_threads()


def test_of_several_failures_that_of_the_earliest_slice_is_told(tmp_path, monkeypatch):
    series(tmp_path / "in", 8)
    source = open_reader(tmp_path / "in", OPTIONS)
    numbers = {id(frame.instance): at for at, frame in enumerate(source.stack.frames)}

    def fail(pixels, frame):
        number = numbers[id(frame.instance)]
        time.sleep(0.05 if number == 1 else 0)
        if number >= 1:
            raise InputRefused(f"slice {number}")

    slowed(monkeypatch, "_stored", fail)
    with pytest.raises(InputRefused, match="slice 1"):
        derive(source, tmp_path / "out")


def test_an_error_outside_leaves_no_thread_and_no_file(tmp_path, monkeypatch):
    series(tmp_path / "in", 8)
    source = open_reader(tmp_path / "in", OPTIONS)
    slowed(monkeypatch, "_stored", lambda *_: time.sleep(0.02))

    def stop_half_way() -> None:
        with open_writer(tmp_path / "out", source, source.volume, DERIVATION, overwrite=False) as writer:
            for number, pixels in enumerate(source.slices()):
                writer.write(pixels)
                if number == 5:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert not writing_threads()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_few_large_frames_are_pending(tmp_path, monkeypatch):
    """A frame of more than half of the bytes that may be pending is written before the next one is taken."""
    monkeypatch.setattr(dicom_write, "PENDING_BYTES", 2 * 6 * 5 * 3 // 2)
    series(tmp_path / "in", 6)
    source = open_reader(tmp_path / "in", OPTIONS)
    busy, most = [0], [0]

    def begin(*_):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.01)
        busy[0] -= 1

    slowed(monkeypatch, "_stored", begin)
    derive(source, tmp_path / "out", 1)
    assert most == [1]


def test_a_result_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    series(tmp_path / "in", 2)
    source = open_reader(tmp_path / "in", OPTIONS)
    monkeypatch.setattr("medsr_cli.formats.dicom_identity.fresh_uid", lambda: "2.25.1")
    with pytest.raises(RunError, match="did not read back"):
        derive(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets(tmp_path):
    series(tmp_path / "in", 2)
    source = open_reader(tmp_path / "in", OPTIONS)
    with pytest.raises(ArgumentsError, match="do not go into one"):
        derive(source, tmp_path / "out.dcm")
    derive(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ArgumentsError, match="exists"):
        derive(source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    derive(source, tmp_path / "out", overwrite=True)
    assert first(tmp_path / "out").SOPInstanceUID.encode() not in before["0001.dcm"]


def test_only_dicom_becomes_dicom(tmp_path):
    series(tmp_path, 2)
    source = open_reader(tmp_path, OPTIONS)

    class Other:
        volume, path = source.volume, tmp_path / "scan.nii"

    with pytest.raises(ArgumentsError, match="only be written from DICOM"):
        open_writer(tmp_path / "out", Other(), source.volume, DERIVATION, overwrite=False)


def test_more_than_two_gib_in_one_file_is_refused(tmp_path):
    enhanced(tmp_path / "e.dcm", 4)
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    with pytest.raises(ArgumentsError, match="more than 2 GiB"):
        derive(source, tmp_path / "out.dcm", 3500, ONE_OBJECT)
    assert [path.name for path in tmp_path.iterdir()] == ["e.dcm"]


def test_the_source_is_left_as_it_was(tmp_path):
    series(tmp_path / "in", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_texts_of_the_derivation_are_plain(tmp_path):
    series(tmp_path / "in", 1)
    derivation = replace(DERIVATION, degradation="Größe\\half " * 200, method="bicubic", scale=(2.0, 3.0))
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out", derivation=derivation)
    new = first(tmp_path / "out")
    assert isinstance(new.DerivationDescription, str)
    assert len(new.DerivationDescription) <= 1024
    assert new.DerivationDescription.startswith("Interpolated")
    assert new.SeriesDescription == "t1 axial x2,3 bicubic"
    assert CANARY not in new.DerivationDescription


# -- other people's tools -------------------------------------------------------------------------------------

CONFORMANCE = [
    "plain_small/MR_small.dcm", "plain_small/CT_small.dcm", "big_endian/MR_small_bigendian.dcm",
    "enhanced_multiframe/emri_small.dcm",
    "jpeg_baseline_ybr_colour_cine_30frames/examples_ybr_color.dcm", "secondary_capture_rgb/SC_rgb.dcm",
    "monochrome1_no_pixel_spacing/RG3_J2KI.dcm", "palette_colour/OBXXXX1A_rle.dcm", "single_ct_coronal/coronal.dcm",
    "jpeg_extended_12bit/JPGExtended.dcm", "us_colour_no_pixel_spacing/US1_J2KR.dcm",
]  # fmt: skip


def conformance_errors(path):
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return {re.sub(r"\d+", "#", line) for line in lines if line.startswith("Error")}


@needs_shared
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("name", CONFORMANCE)
def test_dciodvfy_finds_no_error_that_the_source_lacks(tmp_path, name):
    derive(open_reader(SHARED / name, OPTIONS), tmp_path / "out")
    new = conformance_errors(tmp_path / "out" / "0001.dcm") - conformance_errors(SHARED / name)
    assert not new


@needs_shared
@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
@pytest.mark.parametrize("name", ["enhanced_mr_siemens_xa10", "nonsquare_pixels_pmod"])
def test_dcm2niix_sees_the_same_field_of_view(tmp_path, name):
    derive(open_reader(SHARED / name, OPTIONS), tmp_path / "result")
    source = SHARED / name
    (tmp_path / "source").mkdir()
    for path in [source] if source.is_file() else source.iterdir():
        shutil.copy(path, tmp_path / "source")
    images = []
    for which in ("source", "result"):
        (tmp_path / f"nii_{which}").mkdir()
        command = ["dcm2niix", "-b", "n", "-z", "n", "-f", "x", "-o", tmp_path / f"nii_{which}", tmp_path / which]
        subprocess.run(command, capture_output=True, check=True)
        (path,) = (tmp_path / f"nii_{which}").glob("*.nii")
        images.append(nib.load(path))
    old, new = images
    assert new.shape == (old.shape[0] * 2, old.shape[1] * 2, *old.shape[2:])
    assert np.allclose(old.affine[:3, :3], new.affine[:3, :3] * [2, 2, 1], atol=1e-3)
    middles = [image.affine @ [(image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2, 0, 1] for image in images]
    assert np.allclose(*middles, atol=1e-3)
    assert np.array_equal(old.get_fdata().repeat(2, 0).repeat(2, 1), new.get_fdata())
