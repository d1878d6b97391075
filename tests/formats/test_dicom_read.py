"""Reading DICOM: what opens, what is refused and why, in which order slices come, and where they lie."""

import struct
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsr_cli.errors import InputRefused
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_pixels import decode_frames
from medsr_cli.formats.dicom_series import list_series
from medsr_cli.formats.limits import Limits
from medsr_cli.volume.geometry import voxel_centres_mm
from tests.formats.dicom_makers import CANARY, OPTIONS, SHARED, TILTED, enhanced, header, place, save, series

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")
LPS = np.array([-1.0, -1.0, 1.0])


def read(path, options=OPTIONS):
    reader = open_reader(path, options)
    return reader.volume, np.array(list(reader.slices()))


def refused(path, options=OPTIONS):
    with pytest.raises(InputRefused) as caught:
        read(path, options)
    assert CANARY not in str(caught.value)
    return str(caught.value)


# -- every fixture --------------------------------------------------------------------------------------------

WHOLE = "."
EMRI = (10, 64, 64, 1, "uint16")
SMALL = (1, 64, 64, 1, "int16")
MOSAIC = "Siemens mosaic"
EXPECTED = {
    "big_endian": {
        "ExplVR_BigEnd.dcm": (1, 60, 80, 3, "uint8"), "MR_small_bigendian.dcm": SMALL,
        "emri_small_big_endian.dcm": EMRI,
    },
    "csa_slice_norm": {WHOLE: MOSAIC},
    "ct_variable_slice_increment_noise_pixels": {WHOLE: (4, 512, 512, 1, "int16")},
    "cxr_jpeg_baseline": {WHOLE: (1, 1024, 1024, 1, "uint8")},
    "decimal_rescale": {WHOLE: (1, 96, 128, 1, "uint16")},
    "deflated": {WHOLE: (1, 512, 512, 1, "uint8")},
    "dicomdir": {WHOLE: "holds DICOM files but no image", "DICOMDIR": "is a DICOMDIR"},
    "enhanced_mr_philips": {WHOLE: (64, 64, 64, 1, "float32")},
    "enhanced_mr_siemens_xa10": {WHOLE: (12, 64, 64, 1, "uint16"), "6_1.dcm": (6, 64, 64, 1, "uint16")},
    "enhanced_multiframe": {"emri_small.dcm": EMRI, "eCT_Supplemental.dcm": "entries of a colour table"},
    "htj2k_lossless_rgb_photo": {WHOLE: (1, 480, 640, 3, "uint8")},
    "hyperfine_multiframe_noise_pixels": {WHOLE: (8, 138, 112, 1, "uint16")},
    "implicit_vr": {WHOLE: SMALL},
    "jpeg2000_lossless": {"MR2_J2KR.dcm": (1, 1024, 1024, 1, "uint16"), "emri_small_jpeg_2k_lossless.dcm": EMRI},
    "jpeg2000_lossy": {WHOLE: (1, 1024, 1024, 1, "uint16")},
    "jpeg_baseline_ybr_colour_cine_30frames": {WHOLE: (30, 240, 320, 3, "uint8")},
    "jpeg_extended_12bit": {WHOLE: (1, 1024, 256, 1, "uint16")},
    "jpeg_lossless_sv1": {WHOLE: (1, 1024, 256, 1, "int16")},
    "jpeg_ls_lossless": {
        "JLSL_16_15_1_1F.dcm": (1, 128, 128, 1, "int16"),
        "MR_small_jpeg_ls_lossless.dcm": SMALL,
        "emri_small_jpeg_ls_lossless.dcm": EMRI,
    },
    "jpeg_ls_near_lossless": {WHOLE: (1, 50, 10, 1, "uint16")},
    "malformed_sequence_ct": {WHOLE: (1, 512, 512, 1, "uint16")},
    "mixed_orientation_noise_pixels": {WHOLE: "2 stacks of 1 series"},
    "monochrome1_no_pixel_spacing": {WHOLE: (1, 1760, 1760, 1, "uint16")},
    "monochrome1_pixel_spacing_zero": {WHOLE: (1, 1955, 1841, 1, "uint16")},
    "no_file_meta": {WHOLE: "cannot be read", "no_meta.dcm": "lacks the file meta information"},
    "no_pixels_rtplan": {WHOLE: "no image", "rtplan.dcm": "has no pixels"},
    "no_pixels_structured_report": {WHOLE: "no image", "reportsi.dcm": "has no pixels"},
    "nonsquare_pixels_pmod": {WHOLE: (4, 28, 64, 1, "float32")},
    "palette_colour": {
        "OBXXXX1A_rle.dcm": (1, 600, 800, 3, "uint8"), "OBXXXX1A_rle_2frame.dcm": (2, 600, 800, 3, "uint8"),
    },
    "parametric_map_float": {WHOLE: "parametric map"},
    "philips_slope_multiframe_noise_pixels": {WHOLE: (32, 64, 64, 1, "uint16")},
    "plain_small": {"CT_small.dcm": (1, 128, 128, 1, "int16"), "MR_small.dcm": SMALL, WHOLE: "2 series"},
    "rgb_jpeg2000_mr_4slices": {WHOLE: (4, 77, 52, 3, "uint8")},
    "rle": {"MR_small_RLE.dcm": SMALL, "emri_small_RLE.dcm": EMRI},
    "rtdose_32bit_multiframe": {WHOLE: "radiotherapy"},
    "secondary_capture_rgb": {
        WHOLE: "two different images under one SOPInstanceUID",
        "SC_rgb.dcm": (1, 100, 100, 3, "uint8"),
        "SC_rgb_16bit.dcm": (1, 100, 100, 3, "uint16"),
        "SC_ybr_full_422_uncompressed.dcm": (1, 100, 100, 3, "uint8"),
    },
    "seg_1bit": {WHOLE: "segmentation"},
    "series_ct_gantry_tilt_phantom": {WHOLE: (4, 512, 512, 1, "uint16")},
    "series_ct_torso_jpeg2000": {WHOLE: (20, 512, 512, 1, "uint16")},
    "series_mr_t1_isotropic_12slices": {WHOLE: (12, 384, 274, 1, "int16")},
    "siemens_mosaic_big_endian": {WHOLE: MOSAIC},
    "siemens_mosaic_explicit_le": {WHOLE: MOSAIC},
    "siemens_mosaic_implicit_le": {WHOLE: MOSAIC},
    "siemens_mosaic_rle": {WHOLE: MOSAIC},
    "single_ct_axial": {WHOLE: (1, 512, 512, 1, "int16")},
    "single_ct_coronal": {WHOLE: (1, 512, 512, 1, "int16")},
    "single_ct_sagittal": {WHOLE: (1, 512, 512, 1, "int16")},
    "trailing_padding": {WHOLE: SMALL},
    "truncated_pixels": {WHOLE: "cut short"},
    "us_colour_no_pixel_spacing": {WHOLE: (1, 480, 640, 3, "uint8")},
    "voi_lut": {WHOLE: (1, 512, 512, 1, "uint8")},
}  # fmt: skip
CASES = [(folder, name) for folder, files in EXPECTED.items() for name in files]


@needs_shared
@pytest.mark.parametrize(("folder", "name"), CASES)
def test_every_fixture_opens_or_is_refused_with_the_reason(folder, name, capfd):
    expected = EXPECTED[folder][name]
    path = SHARED / folder / name
    if isinstance(expected, str):
        assert expected in refused(path)
    else:
        volume, slices = read(path)
        assert slices.shape == (expected[0], expected[3], expected[1], expected[2])
        assert slices.dtype == volume.dtype == np.dtype(expected[4])
        assert (volume.slices, volume.rows, volume.columns, volume.channels) == expected[:4]
        assert slices.dtype.isnative
    assert capfd.readouterr() == ("", "")


@needs_shared
def test_no_fixture_is_missing_from_the_table():
    assert {folder.name for folder in SHARED.iterdir()} == set(EXPECTED)
    for folder, files in EXPECTED.items():
        names = {path.name for path in (SHARED / folder).rglob("*") if path.is_file()}
        assert WHOLE in files or names == set(files)


# -- finding and choosing -------------------------------------------------------------------------------------


def test_two_series_are_listed_and_one_can_be_chosen(tmp_path):
    first = series(tmp_path / "a", 3, series_uid="1.2.3.111")
    series(tmp_path / "b", 2, series_uid="1.2.3.222", rows=4)
    said = refused(tmp_path)
    assert "2 series" in said
    assert "1.2.3.111" in said
    assert "3 image(s) of 6 x 5" in said
    assert "2 image(s) of 4 x 5" in said
    assert "--series" in said
    assert "t1 axial" not in said
    for wanted in ("1.2.3.111", "111", "1.2.3.1"):
        _, slices = read(tmp_path, ReadOptions(series=wanted))
        assert np.array_equal(slices[:, 0], first)
    assert "matches more than one" in refused(tmp_path, ReadOptions(series="1.2.3"))
    assert "matches none" in refused(tmp_path, ReadOptions(series="9"))


def test_the_one_usable_series_is_taken_beside_others(tmp_path):
    stored = series(tmp_path / "a", 3)
    seg = header(series="9.9", sop_class="1.2.840.10008.5.1.4.1.1.66.4", modality="SEG")
    save(seg, tmp_path / "seg.dcm", np.zeros((6, 5), np.uint16))
    report = header(series="9.8", sop_class="1.2.840.10008.5.1.4.1.1.88.11", modality="SR")
    del report.Rows
    save(report, tmp_path / "sr.dcm")
    _, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], stored)
    summaries = list_series(tmp_path, OPTIONS)
    assert {(s.uid, s.images, s.refusal is None) for s in summaries} == {("1.2.3.4.5", 3, True), ("9.9", 1, False)}
    assert "segmentation" in refused(tmp_path, ReadOptions(series="9.9"))


def test_files_that_are_not_dicom_are_passed_over(tmp_path):
    stored = series(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty").touch()
    (tmp_path / "._0.dcm").write_bytes(b"\0" * 200)
    _, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], stored)


def test_a_slice_whose_header_is_cut_short_is_not_passed_over(tmp_path):
    series(tmp_path, 3)
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"CANARYID")])
    assert "1 of the 3 DICOM files" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 128 + b"DICM" + b"\xff" * 40, b"text"])
def test_an_unreadable_file_among_slices_is_refused_and_counted(tmp_path, content):
    series(tmp_path, 3)
    (tmp_path / "broken.dcm").write_bytes(content)
    assert "1 of the 4 DICOM files" in refused(tmp_path)


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no DICOM file" in refused(tmp_path / "empty")
    assert "not there" in refused(tmp_path / "missing")


def test_a_zip_reads_like_its_folder(tmp_path):
    stored = series(tmp_path / "in", 5)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "in").iterdir():
            archive.write(path, f"../../evil/{path.name}")
        archive.writestr("readme.txt", "hello")
    volume, slices = read(tmp_path / "in.zip")
    assert np.array_equal(slices[:, 0], stored)
    assert volume == read(tmp_path / "in")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "in.zip"]


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", b"\0" * 4_000_000)
    limits = Limits(expansion=100, expansion_floor_bytes=1 << 20)
    assert "claims to expand" in refused(tmp_path / "bomb.zip", ReadOptions(limits=limits))
    assert "more than 0 files" in refused(tmp_path / "bomb.zip", ReadOptions(limits=Limits(files=0)))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:300])
    refused(tmp_path / "cut.zip")


def test_the_axis_is_its_own(tmp_path):
    series(tmp_path, 2)
    assert "DICOM stays on its own slices" in refused(tmp_path, ReadOptions(axis="coronal"))
    read(tmp_path, ReadOptions(axis="2"))


# -- order and place ------------------------------------------------------------------------------------------


@given(
    turn=st.tuples(*[st.floats(-3, 3)] * 3), flip=st.tuples(st.sampled_from((1, -1)), st.sampled_from((1, -1))),
    count=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_direction_lies_where_simpleitk_says(tmp_path_factory, turn, flip, count):
    a, b, c = turn
    rotation = (
        np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        @ np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    )
    orientation = (*(rotation[:, 0] * flip[0]), *(rotation[:, 1] * flip[1]))
    folder = tmp_path_factory.mktemp("series")
    stored = series(folder, count, 2.5, orientation=orientation)
    volume, slices = read(folder)
    assert np.array_equal(slices[:, 0], stored)
    assert volume.spacing_mm == (0.7, 0.5)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    image = reader.Execute()
    for index in ([0, 0, 0], [4, 5, 0], [2, 3, count - 1]):
        ours = voxel_centres_mm(volume.affine, np.array([index], float))[0] * LPS
        assert np.allclose(ours, image.TransformIndexToPhysicalPoint(index), atol=1e-3)
        assert slices[index[2], 0, index[1], index[0]] == image[index]


def test_time_points_come_one_complete_stack_after_the_other(tmp_path):
    def at_time(point):
        def change(ds, at):
            ds.InstanceNumber = point * 10 + at + 1

        return change

    first = series(tmp_path / "0", 3, change=at_time(0))
    series(tmp_path / "1", 3, change=at_time(1))
    volume, slices = read(tmp_path)
    assert volume.array_shape == (5, 6, 3, 2)
    assert volume.slices == 6
    assert np.array_equal(slices[:3, 0], first)
    assert any("2 time points" in warning for warning in volume.warnings)


def test_uneven_slices_are_read_with_a_warning_and_without_an_affine(tmp_path):
    normal = np.cross(TILTED[:3], TILTED[3:])
    stored = series(tmp_path, 4, positions=[normal * height for height in (0, 2, 4, 8)])
    volume, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], stored)
    assert volume.affine is None
    assert volume.slice_spacing_mm is None
    assert any("not evenly spaced" in warning for warning in volume.warnings)


def test_a_tilted_gantry_keeps_its_sheared_affine(tmp_path):
    positions = [np.array([0.0, 0.4, 2.0]) * at for at in range(4)]
    series(tmp_path, 4, positions=positions, orientation=(1, 0, 0, 0, 1, 0))
    volume, _ = read(tmp_path)
    assert np.allclose(volume.affine[:3, 2], [0, -0.4, 2])
    assert any("gantry tilt of 11.3 degrees" in warning for warning in volume.warnings)


def test_without_positions_the_instance_numbers_decide(tmp_path):
    stored = series(tmp_path, 4, change=lambda ds, at: delattr(ds, "ImagePositionPatient"))
    volume, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], stored[::-1])
    assert volume.affine is None
    assert any("carry no position" in warning for warning in volume.warnings)


def test_frames_of_an_enhanced_object_are_sorted_by_position(tmp_path):
    pixels = enhanced(tmp_path / "e.dcm", 4, order=[2, 0, 3, 1])
    volume, slices = read(tmp_path / "e.dcm")
    assert np.array_equal(slices[:, 0], pixels[[1, 3, 0, 2]])
    assert volume.affine is not None
    assert volume.spacing_mm == (0.7, 0.5)
    assert volume.slice_spacing_mm == pytest.approx(2)


def test_unknown_spacing_is_never_invented(tmp_path):
    ds = header()
    ds.PixelSpacing = ["0", "0"]
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    volume, _ = read(tmp_path / "a.dcm")
    assert volume.spacing_mm is None
    assert any("how large a pixel" in warning for warning in volume.warnings)


# -- values ---------------------------------------------------------------------------------------------------


def test_bits_padding_and_meaning(tmp_path):
    ds = place(header(modality="CT"), (0, 0, 0))
    ds.PixelRepresentation, ds.BodyPartExamined = 1, "CHEST"
    ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
    ds.add_new("PixelPaddingValue", "US", 63536)  # -2000 with the wrong sign
    save(ds, tmp_path / "a.dcm", np.full((6, 5), -7, np.int16))
    volume, slices = read(tmp_path / "a.dcm")
    assert (volume.lowest, volume.highest, volume.padding) == (-2048, 2047, -2000)
    assert (volume.modality, volume.body_part) == ("ct", "chest")
    assert (slices == -7).all()


def test_a_body_part_that_a_person_typed_is_not_believed(tmp_path):
    ds = place(header(), (0, 0, 0))
    ds.BodyPartExamined = "JOHN SMITH"
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    reader = open_reader(tmp_path / "a.dcm", OPTIONS)
    assert reader.volume.body_part is None
    assert not any("SMITH" in str(value) or "CANARY" in str(value) for value in reader.details().values())


def test_slices_scaled_differently_are_read_as_real_values(tmp_path):
    def change(ds, at):
        ds.RescaleSlope, ds.RescaleIntercept = str(0.5 + at), str(10 * at)

    stored = series(tmp_path, 3, change=change)
    volume, slices = read(tmp_path)
    real = stored * (0.5 + np.arange(3))[:, None, None] + 10 * np.arange(3)[:, None, None]
    assert volume.dtype == np.float32
    assert np.allclose(slices[:, 0], real)


def test_monochrome1_is_not_turned_around(tmp_path):
    ds = header()
    ds.PhotometricInterpretation = "MONOCHROME1"
    pixels = np.arange(30, dtype=np.uint16).reshape(6, 5)
    save(ds, tmp_path / "a.dcm", pixels)
    assert np.array_equal(read(tmp_path / "a.dcm")[1][0, 0], pixels)


@pytest.mark.parametrize(
    ("keyword", "value", "phrase"),
    [
        ("HighBit", 15, "upper bits"),
        ("BitsAllocated", 12, "bits, which is not read"),
        ("PhotometricInterpretation", "CMYK", "colours in a way"),
        ("SamplesPerPixel", 3, "grey or coloured"),
        ("Rows", 60, "cut short"),
        ("Rows", 0, "no pixels"),
        ("NumberOfFrames", 2, "cut short"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.77.1.6", "tiles"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.481.1", "radiotherapy"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, keyword, value, phrase):
    ds = header()
    setattr(ds, keyword, value)
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    assert phrase in refused(tmp_path / "a.dcm")


def test_a_video_is_refused_by_name(tmp_path):
    ds = header()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    ds["PixelData"].VR = "OB"
    save(ds, tmp_path / "a.dcm")
    assert "MPEG-4" in refused(tmp_path / "a.dcm")


# -- hostile --------------------------------------------------------------------------------------------------


def test_huge_claims_are_refused_before_memory_is_taken(tmp_path):
    ds = header()
    ds.Rows = ds.Columns = 65535
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    refused(tmp_path / "a.dcm")
    ds = header()
    ds.NumberOfFrames = 2_000_000_000
    save(ds, tmp_path / "b.dcm", np.zeros((6, 5), np.uint16))
    refused(tmp_path / "b.dcm")


@pytest.mark.parametrize("depth", [100, 400])
def test_deep_sequences_are_refused(tmp_path, depth):
    inner = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0)
    for _ in range(depth):
        item = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        inner = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, len(item)) + item
    save(header(), tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    data = (tmp_path / "a.dcm").read_bytes()
    at = data.index(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    (tmp_path / "a.dcm").write_bytes(data[:at] + inner + data[at:])
    assert "nests sequences" in refused(tmp_path / "a.dcm")


DAMAGED = {  # and where its pixels begin
    "plain_small/MR_small.dcm": 1488,
    "rle/MR_small_RLE.dcm": 1504,
    "jpeg_ls_lossless/MR_small_jpeg_ls_lossless.dcm": 1500,
    "jpeg_lossless_sv1/JPEG-LL.dcm": 2890,
    "cxr_jpeg_baseline/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm": 986,
    "jpeg2000_lossless/emri_small_jpeg_2k_lossless.dcm": 1500,
}


@needs_shared
@pytest.mark.parametrize("name", DAMAGED)
def test_nothing_but_refusals_escapes_from_damaged_files(tmp_path, name):
    good = (SHARED / name).read_bytes()
    rng = np.random.default_rng(11)
    outcomes = set()
    for turn in range(60):
        first = DAMAGED[name] if turn % 2 else 140
        bad = bytearray(good[: rng.integers(first, len(good))] if turn % 10 == 0 else good)
        for at in rng.integers(first - 1, min(len(bad), first + 600), 3):
            bad[at] = rng.integers(0, 256)
        (tmp_path / "bad.dcm").write_bytes(bad)
        try:
            read(tmp_path / "bad.dcm")
            outcomes.add("read")
        except InputRefused:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_pydicoms_messages_stay_out_of_the_log(tmp_path, caplog, capfd, recwarn):
    ds = header()
    ds.PatientBirthDate, ds.WindowWidth = "CANARYDATE", "123456789012"
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(data.replace(b"123456789012", b"CANARYNUMBER"))
    read(tmp_path / "a.dcm")
    assert "CANARY" not in caplog.text + "".join(capfd.readouterr()) + "".join(str(w.message) for w in recwarn)


def test_opening_decodes_nothing_and_slices_start_anew(tmp_path, monkeypatch):
    stored = series(tmp_path, 3)
    decoded = []

    def counting(instance, indices):
        decoded.append(instance.number)
        return decode_frames(instance, indices)

    monkeypatch.setattr("medsr_cli.formats.dicom.decode_frames", counting)
    reader = open_reader(tmp_path, OPTIONS)
    assert decoded == []
    for _ in range(2):
        assert np.array_equal(np.array(list(reader.slices()))[:, 0], stored)
    slices = reader.slices()
    next(slices)
    assert len(decoded) == 7  # one slice at a time


def test_threads_that_read_at_once_silence_warnings_together_and_leave_them_as_they_were():
    import threading
    import warnings

    from medsr_cli.formats.dicom_files import refusing

    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with refusing("a", "reading"):
            inside.set()
            leave.wait(10)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(10)
        with refusing("b", "reading"):
            leave.set()
            thread.join()
            warnings.warn("the first has left, the second is still reading", stacklevel=1)
        assert warnings.filters == filters
        warnings.warn("nobody reads", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["nobody reads"]
