"""What a series falls into, how its slices lie, and that every slice stays where it was through the real writer."""

from dataclasses import replace

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import UltrasoundImageStorage

from medsr_cli.errors import InputRefused
from medsr_cli.formats import dicom_series
from medsr_cli.formats.contract import DicomOutput, ReadOptions
from medsr_cli.formats.dicom import open_reader, open_writer
from medsr_cli.formats.dicom_refusals import LOCALISER, OWN_RESULT, SCREEN
from medsr_cli.formats.dicom_series import find_series, study_of
from medsr_cli.formats.dicom_stacks import MOST_STACKS
from tests.formats.dicom_makers import (
    CANARY,
    DERIVATION,
    OPTIONS,
    SHARED,
    derive,
    enhanced,
    enhanced_mr,
    header,
    place,
    save,
    series,
)

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
MOSAICS = ["csa_slice_norm"] + [
    f"siemens_mosaic_{kind}" for kind in ("big_endian", "explicit_le", "implicit_le", "rle")
]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")


def read(path, wanted=None):
    reader = open_reader(path, ReadOptions(series=wanted))
    return reader, np.array(list(reader.slices()))


def refused(path, wanted=None):
    with pytest.raises(InputRefused) as caught:
        read(path, wanted)
    assert CANARY not in str(caught.value)
    return str(caught.value)


def warned(reader, phrase):
    return any(phrase in warning for warning in reader.volume.warnings)


def numbered(first):
    """Instance numbers from `first`, against the direction of the slices."""

    def change(ds, at):
        ds.InstanceNumber = first - at

    return change


# -- every place, through the writer --------------------------------------------------------------------------


def turned(angles, flips):
    """Row and column direction of a slice turned by three angles, with negated cosines."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_z = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cb, -sb], [0, sb, cb]])
    about_y = np.array([[cc, 0, sc], [0, 1, 0], [-sc, 0, cc]])
    rotation = about_z @ about_x @ about_y
    return np.concatenate([rotation[:, 0] * flips[0], rotation[:, 1] * flips[1]])


def corners_mm(ds):
    """The outer corners of a slice in the patient, as PS3.3 C.7.6.2.1.1 has the centres of its pixels."""
    origin, cosines = np.array(ds.ImagePositionPatient, float), np.array(ds.ImageOrientationPatient, float)
    between_rows, between_columns = (float(value) for value in ds.PixelSpacing)
    return np.array([
        origin + cosines[:3] * between_columns * column + cosines[3:] * between_rows * row
        for row in (-0.5, ds.Rows - 0.5) for column in (-0.5, ds.Columns - 0.5)
    ])  # fmt: skip


def write_enlarged(source, target, scale):
    volume = source.volume
    rows, columns = round(volume.rows * scale), round(volume.columns * scale)
    result = volume.enlarged(rows, columns)
    with open_writer(target, source, result, DERIVATION, overwrite=False) as writer:
        for pixels in source.slices():
            across = np.arange(columns) * volume.columns // columns
            down = np.arange(rows) * volume.rows // rows
            writer.write(np.ascontiguousarray(pixels[:, down][:, :, across]))
    return result


def derived_by_source(folder):
    found = {}
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        found[ds.SourceImageSequence[0].ReferencedSOPInstanceUID] = ds
    return found


@given(
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    flips=st.tuples(*[st.sampled_from((1, -1))] * 2),
    steps=st.lists(st.sampled_from((0.6, 2.0, 2.0, 5.5)), max_size=3),
    direction=st.sampled_from((1, -1)),
    tilt=st.tuples(*[st.floats(-0.7, 0.7)] * 2),
    patient=st.sampled_from(("HFS", "HFP", "FFS", "FFP", "HFDR", "HFDL", "FFDR", "FFDL")),
    scale=st.sampled_from((2, 3, 2.7)),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_slice_keeps_its_place(tmp_path_factory, *, angles, flips, steps, direction, tilt, patient, scale):
    folder = tmp_path_factory.mktemp("study")
    orientation = turned(angles, flips)
    normal = np.cross(orientation[:3], orientation[3:])
    way = normal * direction + orientation[:3] * tilt[0] + orientation[3:] * tilt[1]
    heights = np.cumsum([0.0, *steps])
    positions = [np.array([-31.0, 17.5, 400.25]) + way * height for height in heights]

    def change(ds, at):
        ds.PatientPosition = patient

    stored = series(folder / "in", len(positions), positions=positions, orientation=orientation, change=change)
    source, slices = read(folder / "in")
    # In the order of their height along the normal, whichever way they were numbered.
    assert np.array_equal(slices[:, 0], stored[::direction])
    result = write_enlarged(source, folder / "out", scale)
    derived = derived_by_source(folder / "out")
    assert len(derived) == len(positions)
    for path in (folder / "in").iterdir():
        before = pydicom.dcmread(path)
        after = derived[before.SOPInstanceUID]
        assert (after.Rows, after.Columns) == (round(6 * scale), round(5 * scale))
        assert np.abs(corners_mm(after) - corners_mm(before)).max() < 1e-3
        assert after.PatientPosition == patient
        # The corner pixels are those of the source, not turned and not mirrored.
        for row in (0, -1):
            assert np.array_equal(after.pixel_array[row, [0, -1]], before.pixel_array[row, [0, -1]])
    again = open_reader(folder / "out", OPTIONS).volume
    assert (again.affine is None) == (result.affine is None) == (len(set(steps)) > 1)
    if result.affine is not None:
        assert np.allclose(again.affine, result.affine, atol=1e-3)


# -- stacks of one series -------------------------------------------------------------------------------------


def three_planes(folder, images=3, **kw):
    return [
        series(folder / name, images, 8.0, orientation=orientation, **kw)
        for name, orientation in (("a", AXIAL), ("c", CORONAL), ("s", SAGITTAL))
    ]


def test_the_planes_of_a_localiser_are_stacks_of_their_own(tmp_path):
    planes = three_planes(tmp_path)
    study = study_of(tmp_path, OPTIONS)
    assert [(s.selector, s.images, s.refusal, s.aside) for s in study.stacks] == [
        (f"1#{at}", 3, None, LOCALISER) for at in (1, 2, 3)
    ]
    said = refused(tmp_path)
    assert "3 stacks of 1 series" in said
    assert "--series 1#1" in said
    for at, stored in enumerate(planes, 1):
        reader, slices = read(tmp_path, f"1#{at}")
        assert np.array_equal(slices[:, 0], stored)
        assert reader.volume.affine is not None
        derived = write_enlarged(reader, tmp_path.with_name(f"{tmp_path.name}-out{at}"), 2)
        assert derived.slices == 3


def test_radial_slices_and_reformatted_volumes_are_no_localisers(tmp_path):
    for at, angle in enumerate(np.radians((0, 36, 72, 108, 144))):
        series(tmp_path / "radial" / str(at), 1, orientation=(np.cos(angle), np.sin(angle), 0, 0, 0, -1))
    assert [stack.aside for stack in study_of(tmp_path / "radial", OPTIONS).stacks] == [None] * 5
    three_planes(tmp_path / "mpr", images=31)
    assert [stack.aside for stack in study_of(tmp_path / "mpr", OPTIONS).stacks] == [None] * 3


def test_images_that_say_localizer_are_apart_from_the_slices(tmp_path):
    series(tmp_path / "slices", 4)
    series(tmp_path / "scout", 1, change=lambda ds, at: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    first, second = sorted(study_of(tmp_path, OPTIONS).stacks, key=lambda stack: stack.images)
    assert (first.aside, second.aside) == (LOCALISER, None)
    assert len(read(tmp_path)[1]) == 4
    # Alone in its folder it is what was meant.
    assert len(read(tmp_path / "scout")[1]) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: setattr(ds, "PixelSpacing", ["0.9", "0.5"]),
        lambda ds: place(ds, (0, 0, 1), AXIAL),
        lambda ds: delattr(ds, "ImagePositionPatient"),
        lambda ds: setattr(ds, "PixelRepresentation", 1),
        lambda ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"),
        lambda ds: setattr(ds, "Rows", 5),
    ],
)
def test_what_differs_is_another_stack(tmp_path, change):
    series(tmp_path, 4, change=lambda ds, at: change(ds) if at == 3 else None)
    assert sorted(stack.images for stack in study_of(tmp_path, OPTIONS).stacks) == [1, 3]
    assert "2 stacks of 1 series" in refused(tmp_path)
    lengths = sorted(len(read(tmp_path, selector)[1]) for selector in ("1#1", "1#2"))
    assert lengths == [1, 3]


def test_frames_of_one_object_may_be_of_two_stacks(tmp_path):
    pixels = enhanced(tmp_path / "e.dcm", 5)
    ds = pydicom.dcmread(tmp_path / "e.dcm")
    for frame in (1, 3):
        group = ds.PerFrameFunctionalGroupsSequence[frame]
        group.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * frame]
    ds.save_as(tmp_path / "e.dcm")
    tilted, first = read(tmp_path / "e.dcm", "1#1")
    axial, second = read(tmp_path / "e.dcm", "1#2")
    assert np.array_equal(first[:, 0], pixels[[0, 2, 4]])
    assert np.array_equal(second[:, 0], pixels[[1, 3]])
    assert tilted.volume.slice_spacing_mm == pytest.approx(4)
    assert axial.volume.slice_spacing_mm == pytest.approx(6)
    derive(axial, tmp_path / "out")
    _, again = read(tmp_path / "out")
    assert np.array_equal(again[:, 0, ::2, ::2], pixels[[1, 3]])


def test_a_series_in_too_many_pieces_is_refused(tmp_path):
    enhanced(tmp_path / "e.dcm", MOST_STACKS + 1)
    ds = pydicom.dcmread(tmp_path / "e.dcm")
    for at, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        angle = 0.01 * at
        group.PlaneOrientationSequence[0].ImageOrientationPatient = [np.cos(angle), np.sin(angle), 0, 0, 0, -1]
    ds.save_as(tmp_path / "e.dcm")
    assert "different directions or sizes" in refused(tmp_path / "e.dcm")


def test_places_beyond_reason_are_refused(tmp_path):
    series(tmp_path, 2, positions=[np.zeros(3), np.full(3, 1e9)])
    assert "kilometre" in refused(tmp_path)


@needs_shared
def test_a_real_series_of_two_directions():
    path = SHARED / "mixed_orientation_noise_pixels"
    volumes = [read(path, selector)[0].volume for selector in ("1#1", "1#2")]
    assert [volume.slices for volume in volumes] == [2, 2]
    assert [round(volume.slice_spacing_mm, 1) for volume in volumes] == [3.3, 4.4]


# -- copies ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_twice_is_taken_once(tmp_path):
    stored = series(tmp_path, 3)
    path = next(tmp_path.iterdir())
    (tmp_path / "copy.dcm").write_bytes(path.read_bytes())
    reader, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], stored)
    assert warned(reader, "1 file(s) are copies")


@pytest.mark.parametrize("tail", [b"\0", None])
def test_two_images_of_one_identity_are_refused(tmp_path, tail):
    series(tmp_path, 3)
    data = next(tmp_path.iterdir()).read_bytes()
    (tmp_path / "other.dcm").write_bytes(data[:-1] + b"\7" if tail is None else data + tail)
    assert "two different images under one SOPInstanceUID" in refused(tmp_path)


# -- uneven, missing, doubled, tilted -------------------------------------------------------------------------


def test_missing_slices_of_a_tilted_series_are_said_with_the_tilt(tmp_path):
    positions = [np.array([0.0, 0.4, 2.0]) * at for at in (0, 1, 2, 5)]
    series(tmp_path, 4, positions=positions, orientation=AXIAL)
    reader, _ = read(tmp_path)
    assert warned(reader, "not evenly spaced, 2 to 6 mm apart")
    assert warned(reader, "gantry tilt of 11.3 degrees")
    assert reader.stack.tilt_degrees == pytest.approx(np.degrees(np.arctan(0.2)))
    assert (reader.stack.smallest_step_mm, reader.stack.largest_step_mm) == pytest.approx((2, 6))
    assert reader.volume.affine is None
    assert reader.volume.slice_spacing_mm is None


def test_even_slices_say_their_step_and_nothing_else(tmp_path):
    series(tmp_path, 4, 2.5)
    reader, _ = read(tmp_path)
    assert reader.volume.warnings == ()
    assert (reader.stack.smallest_step_mm, reader.stack.largest_step_mm) == pytest.approx((2.5, 2.5))
    assert reader.stack.tilt_degrees == pytest.approx(0, abs=1e-3)


def test_slices_that_wander_have_no_tilt(tmp_path):
    positions = [np.array([at % 2, 0.0, 2.0 * at]) for at in range(4)]
    series(tmp_path, 4, positions=positions, orientation=AXIAL)
    reader, _ = read(tmp_path)
    assert reader.stack.tilt_degrees == 0
    assert warned(reader, "not evenly spaced")


def test_an_incomplete_time_series_is_upscaled_slice_by_slice(tmp_path):
    first = series(tmp_path / "0", 3, change=numbered(3))
    second = series(tmp_path / "1", 3, change=numbered(6))
    (tmp_path / "1" / "07x1.dcm").unlink()
    reader, slices = read(tmp_path)
    assert np.array_equal(slices[:, 0], [*first, second[0], second[2]])
    assert warned(reader, "1 to 2 images at a place")
    assert (reader.volume.affine, reader.volume.slice_spacing_mm) == (None, None)
    assert reader.volume.array_shape == (5, 6, 5)
    out = tmp_path.with_name(tmp_path.name + "-out")
    write_enlarged(reader, out, 2)
    derived = derived_by_source(out)
    for path in tmp_path.glob("*/*.dcm"):
        before = pydicom.dcmread(path)
        assert np.abs(corners_mm(derived[before.SOPInstanceUID]) - corners_mm(before)).max() < 1e-3


def test_images_side_by_side_are_upscaled_and_keep_their_places(tmp_path):
    at = [np.array([x, 0.0, z]) for x in (0.0, 90.0) for z in (0.0, 4.0)]
    series(tmp_path, 4, positions=at, orientation=AXIAL)
    reader, slices = read(tmp_path)
    assert len(slices) == 4
    assert warned(reader, "side by side")
    assert reader.volume.affine is None


# -- naming one -----------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """Series 1 with one stack, series 2 with two, series 3, whose UID begins as that of the second."""
    series(tmp_path / "1", 2, series_uid="1.2.840.1.77")
    series(tmp_path / "2" / "a", 3, series_uid="1.2.840.2.5")
    series(tmp_path / "2" / "b", 4, series_uid="1.2.840.2.5", rows=9, change=numbered(20))
    series(tmp_path / "3", 5, series_uid="1.2.840.2.51")
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "images"),
    [
        ("1", 2), ("3", 5), ("2#1", 3), ("2#2", 4), ("1#1", 2), (" 3 ", 5), ("1.2.840.1.77", 2), (".77", 2),
        ("1.2.840.1", 2), ("1.2.840.2.5#2", 4), ("1.2.840.2.51", 5), (".51", 5), ("2.5#1", 3),
    ],
)  # fmt: skip
def test_a_stack_is_named(study, wanted, images):
    assert len(read(study, wanted)[1]) == images


@pytest.mark.parametrize(
    ("wanted", "phrase"),
    [
        ("2", "2 stacks of 1 series"), ("1.2.840.2.5", "2 stacks of 1 series"), ("1.2.840", "more than one"),
        ("4", "none"), ("0", "none"), ("", "none"), ("#1", "none"), ("2#3", "a stack that is not in"),
        ("2#", "a stack that is not in"), ("2#0", "a stack that is not in"), ("x", "none"),
    ],
)  # fmt: skip
def test_what_names_no_single_stack_is_refused_with_the_list(study, wanted, phrase):
    said = refused(study, wanted)
    assert phrase in said
    assert "2#1: 3 image(s) of 6 x 5" in said


# -- left aside -----------------------------------------------------------------------------------------------


def asides(path):
    return sorted((stack.images, stack.aside) for stack in study_of(path, OPTIONS).stacks)


def test_an_own_result_is_left_beside_its_source(tmp_path):
    series(tmp_path / "study" / "in", 3)
    derive(open_reader(tmp_path / "study" / "in", OPTIONS), tmp_path / "study" / "out")
    found = {(stack.rows, stack.aside) for stack in study_of(tmp_path / "study", OPTIONS).stacks}
    assert found == {(6, None), (12, OWN_RESULT)}
    assert read(tmp_path / "study")[0].volume.rows == 6
    assert read(tmp_path / "study" / "out")[0].volume.rows == 12


def screen(ds, at):
    ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.7", "OT"


def test_saved_screens_are_left_unless_they_are_all_there_is(tmp_path):
    series(tmp_path / "screens" / "a", 1, series_uid="1.2.3.1", change=screen)
    series(tmp_path / "screens" / "b", 2, series_uid="1.2.3.2", change=screen)
    assert asides(tmp_path) == [(1, None), (2, None)]
    series(tmp_path / "slices", 3, series_uid="1.2.3.3")
    assert asides(tmp_path) == [(1, SCREEN), (2, SCREEN), (3, None)]
    assert len(read(tmp_path)[1]) == 3
    assert len(read(tmp_path, "2")[1]) == 2


def test_a_derived_image_of_another_maker_is_an_image(tmp_path):
    def change(ds, at):
        ds.ImageType = ["DERIVED", "SECONDARY"]
        item = pydicom.Dataset()
        item.Manufacturer = "another"
        ds.ContributingEquipmentSequence = [item]

    series(tmp_path / "a", 2, series_uid="1.2.3.1", change=change)
    series(tmp_path / "b", 3, series_uid="1.2.3.2")
    assert asides(tmp_path) == [(2, None), (3, None)]


# -- mosaics --------------------------------------------------------------------------------------------------


def without_marks(ds, *, number, private):
    """A mosaic whose marks were taken away, as some archives do."""
    ds.ImageType = [part for part in ds.ImageType if part != "MOSAIC"]
    if not number:
        for tag in [tag for tag in ds.keys() if tag.group == 0x0019]:  # noqa: SIM118
            del ds[tag]
    if not private:
        for tag in [tag for tag in ds.keys() if tag.group == 0x0029]:  # noqa: SIM118
            del ds[tag]
    return ds


@needs_shared
@pytest.mark.parametrize("folder", MOSAICS)
@pytest.mark.parametrize(("number", "private"), [(True, True), (True, False), (False, True)])
def test_a_mosaic_is_known_by_any_of_its_marks(tmp_path, folder, number, private):
    source = next(path for path in (SHARED / folder).iterdir() if path.is_file())
    assert "is a Siemens mosaic" in refused(source)
    assert "is a Siemens mosaic" in refused(source.parent)
    ds = without_marks(pydicom.dcmread(source), number=number, private=private)
    if folder == "csa_slice_norm":
        if not private:
            pytest.skip("its number of tiles is in the image header alone")
        ds.PixelData = bytes(ds.Rows * ds.Columns * 2)  # it came without pixels
        ds["PixelData"].VR = "OW"
    ds.save_as(tmp_path / "m.dcm")
    assert "is a Siemens mosaic" in refused(tmp_path / "m.dcm")


def test_a_number_of_tiles_in_another_private_block_or_from_another_maker(tmp_path):
    def tiled(group, creator, value, block=0x11):
        ds = place(header(), (0, 0, 0))
        ds.add_new((group, block), "LO", creator)
        ds.add_new((group, (block << 8) | (0x0A if group == 0x0019 else 0x50)), "IS", value)
        return ds

    for name, ds, phrase in (
        ("siemens", tiled(0x0019, "SIEMENS MR HEADER", 36), "Siemens mosaic"),
        ("uih", tiled(0x0065, "Image Private Header", 36, 0x10), "United Imaging mosaic"),
        ("other", tiled(0x0019, "ANOTHER MAKER", 36), None),
        ("one", tiled(0x0019, "SIEMENS MR HEADER", 1), None),
    ):
        save(ds, tmp_path / f"{name}.dcm", np.zeros((6, 5), np.uint16))
        if phrase is None:
            read(tmp_path / f"{name}.dcm")
        else:
            assert phrase in refused(tmp_path / f"{name}.dcm")


# -- headers are read once ------------------------------------------------------------------------------------


def test_headers_are_read_once_as_long_as_no_file_changes(tmp_path, monkeypatch):
    series(tmp_path / "a", 3, series_uid="1.2.3.1")
    series(tmp_path / "b", 2, series_uid="1.2.3.2")
    opened = []
    original = dicom_series.read_instance

    def counting(member, *rest):
        opened.append(member.name)
        return original(member, *rest)

    monkeypatch.setattr(dicom_series, "read_instance", counting)
    study_of(tmp_path, OPTIONS)
    for selector in ("1", "2", "1"):
        read(tmp_path, selector)
    assert len(opened) == 5
    assert find_series(tmp_path, OPTIONS.limits) is find_series(tmp_path, OPTIONS.limits)
    path = next((tmp_path / "b").iterdir())
    ds = pydicom.dcmread(path)
    ds.InstanceNumber = 99
    ds.save_as(path)
    read(tmp_path, "1")
    assert len(opened) == 10
    path.unlink()
    assert study_of(tmp_path, OPTIONS).stacks[1].images == 1
    assert len(dicom_series._kept) <= dicom_series.KEPT_PATHS


def test_a_missing_or_unreadable_file_is_not_remembered_as_something_else(tmp_path):
    series(tmp_path, 2)
    read(tmp_path)
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    assert "1 of the 3 DICOM files" in refused(tmp_path)
    (tmp_path / "broken.dcm").unlink()
    assert len(read(tmp_path)[1]) == 2


def test_a_cine_of_many_frames_is_one_stack(tmp_path):
    ds = header(sop_class=UltrasoundImageStorage, modality="US")
    ds.NumberOfFrames = 7
    save(ds, tmp_path / "c.dcm", np.zeros((7, 6, 5), np.uint16))
    reader, slices = read(tmp_path / "c.dcm")
    assert len(slices) == 7
    assert reader.stack.smallest_step_mm is None


def test_overlays_stay_on_the_frames_of_an_object_that_is_taken_apart(tmp_path):
    turns = [(AXIAL, 0), (CORONAL, 0), (AXIAL, 1), (CORONAL, 1)]
    planes = [((0, 0, at) if turn == AXIAL else (0, at, 0), turn) for turn, at in turns]
    enhanced_mr(tmp_path / "in.dcm", planes)
    ds = pydicom.dcmread(tmp_path / "in.dcm")
    drawn = np.zeros((2, 6, 5), np.uint8)
    drawn[0, 1, 2] = drawn[1, 4, 3] = 1  # on the second frame and on the third
    said = {0x10: 6, 0x11: 5, 0x15: 2, 0x40: "G", 0x50: [1, 1], 0x51: 2, 0x100: 1, 0x102: 0}
    for element, value in said.items():
        ds.add_new((0x6000, element), {0x15: "IS", 0x40: "CS", 0x50: "SS"}.get(element, "US"), value)
    ds.add_new((0x6000, 0x3000), "OW", np.packbits(drawn.reshape(-1), bitorder="little").tobytes())
    ds.save_as(tmp_path / "in.dcm")
    expected = {"1#1": [None, drawn[1]], "1#2": [drawn[0], None]}
    for wanted, planes_drawn in expected.items():
        reader, _ = read(tmp_path / "in.dcm", wanted)
        out = tmp_path / f"{wanted[-1]}.dcm"
        derive(reader, out, derivation=replace(DERIVATION, dicom=DicomOutput(multiframe=True)))
        result = pydicom.dcmread(out)
        shown = result.overlay_array(0x6000)
        assert result[0x6000, 0x51].value == 1
        for one, plane in zip(shown, planes_drawn, strict=True):
            assert np.array_equal(one, np.zeros((12, 10)) if plane is None else plane.repeat(2, 0).repeat(2, 1))
