"""A guide on the grid of a result: every voxel of it takes the value at its own place in the patient."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from medsr_cli.errors import InputRefused
from medsr_cli.formats import nifti, open_image
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.guide import open_guide
from medsr_cli.formats.identity import Identity
from tests.formats.dicom_makers import CANARY, TILTED, series
from tests.formats.dicom_makers import SHARED as SHARED_DICOM
from tests.makers import anatomy

BRAIN = SHARED_DICOM.parent / "val" / "brain_mr" / "ms_long_p04_s1"
SLOPES = np.array([3.0, -2.0, 5.0])
"""What a guide's value gains with each mm along x, y and z."""


def save(path, data, affine, code=1, slope=None, intercept=0):
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(None, 0)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)
    return path


def ramp(shape, affine):
    """A value at every voxel that depends on its place in the patient alone, and is linear in it."""
    indices = np.moveaxis(np.indices(shape), 0, -1)
    return ((indices @ affine[:3, :3].T + affine[:3, 3]) @ SLOPES).astype(np.float32)


def centred(directions, shape, at=(0.0, 0.0, 0.0)):
    """An affine that puts the middle of a grid at a position."""
    affine = np.eye(4)
    affine[:3, :3] = directions
    affine[:3, 3] = np.array(at) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def enlarged(reader, rows=2, columns=2):
    return reader.volume.enlarged(rows * reader.volume.rows, columns * reader.volume.columns)


def as_array(volume, slices):
    """Slices back in the order of the stored array (i, j, k)."""
    stack = np.array(slices)  # (slices, rows, columns)
    return np.moveaxis(stack, (0, 1, 2), (volume.slice_axis, *volume.plane_axes))


def positions(volume):
    """Patient position of every voxel, (i, j, k, 3)."""
    shape = volume.array_shape[:3]
    return np.moveaxis(np.indices(shape), 0, -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def refused(match, *arguments, **options):
    with pytest.raises(InputRefused, match=match) as caught:
        open_guide(*arguments, **options)
    assert "CANARY" not in str(caught.value)
    return str(caught.value)


def pair(folder, guide_affine=None, guide_shape=(24, 24, 24), target_shape=(10, 12, 6), **how):
    """A target of 20 x 24 x 18 mm about the origin, its reader, and a guide of a linear ramp."""
    target = save(folder / "t2.nii.gz", anatomy(target_shape), centred(np.diag([2.0, 2.0, 3.0]), target_shape))
    guide_affine = centred(np.eye(3) * 1.5, guide_shape) if guide_affine is None else guide_affine
    guide = save(folder / "t1.nii.gz", ramp(guide_shape, guide_affine), guide_affine, **how)
    return open_image(target), guide


# -- place ----------------------------------------------------------------------------------------------------


@st.composite
def frames(draw, finest, coarsest):
    """Directions and spacings of a grid: oblique, left-handed or sheared, its axes in any order."""
    angles = draw(st.tuples(*[st.floats(-180, 180)] * 3))
    spacing = [draw(st.floats(finest, coarsest)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    shear = np.eye(3)
    shear[0, 1], shear[1, 2], shear[0, 2] = (draw(st.floats(-0.3, 0.3)) for _ in range(3))
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return (rotation @ shear @ np.diag(np.array(signs) * spacing))[:, order]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    target=frames(0.8, 4.0),
    guide=frames(2.2, 4.0),
    axis=st.sampled_from("012"),
    shift=st.tuples(*[st.floats(-6, 6)] * 3),
)
@example(np.diag([1.0, 1.0, 4.0])[:, [2, 0, 1]], np.diag([-2.5, 2.5, 2.5]), "0", (0.0, 0.0, 0.0))  # sagittal, axial
def test_every_voxel_takes_the_value_at_its_place(tmp_path_factory, target, guide, axis, shift):
    folder = tmp_path_factory.mktemp("oblique")
    target_shape, guide_shape = (7, 6, 5), (31, 30, 29)
    path = save(folder / "t2.nii", anatomy(target_shape), centred(target, target_shape))
    guide_affine = centred(guide, guide_shape, shift)
    values = ramp(guide_shape, guide_affine)
    reader = open_image(path, ReadOptions(axis=axis))
    volume = reader.volume
    result = volume.enlarged(3 * volume.rows - 1, 2 * volume.columns)
    opened = open_guide(save(folder / "t1.nii", values, guide_affine), reader, result)

    slices = list(opened.slices())
    assert {s.shape for s in slices} == {(result.rows, result.columns)}
    assert {s.dtype for s in slices} == {np.dtype(np.float32)}
    found = as_array(result, slices)
    assert found.shape == result.array_shape
    places = positions(result)
    index = (places - guide_affine[:3, 3]) @ np.linalg.inv(guide_affine[:3, :3]).T
    beyond = np.maximum(-0.5 - index, index - (np.array(guide_shape) - 0.5)).max(-1)
    within = ((index >= 0) & (index <= np.array(guide_shape) - 1)).all(-1)
    wanted = (places @ SLOPES - values.min()) / (values.max() - values.min())
    if not any(opened.facts["blurred_mm"] or ()):
        np.testing.assert_allclose(found[within], wanted[within], atol=2e-5)
    outside = as_array(result, [opened.outside(at) for at in range(len(slices))])
    clear = np.abs(beyond) > 1e-3  # nearer to the edge than that, rounding decides
    assert np.array_equal(outside[clear], beyond[clear] > 0)
    assert opened.coverage == pytest.approx(1 - outside.mean())
    assert not found[outside].any()
    assert within.mean() > 0.2


def test_every_orientation_of_one_guide_is_the_same_guide(tmp_path):
    """Not only a ramp: the same anatomy, stored in any order and direction of its axes."""
    reader, path = pair(tmp_path)
    data = np.random.default_rng(4).integers(0, 1000, (24, 24, 24)).astype(np.int16)
    image = nib.Nifti1Image(data, centred(np.eye(3) * 1.5, (24, 24, 24)))
    found = []
    for codes in ("RAS", "LPS", "PIR", "ASL"):
        turned = image.as_reoriented(nib.orientations.axcodes2ornt(codes))
        nib.save(turned, path)
        found.append(np.array([*open_guide(path, reader, enlarged(reader)).slices()]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    index = (positions(enlarged(reader)) - image.affine[:3, 3]) / 1.5
    wanted = map_coordinates(data.astype(float), np.moveaxis(index, -1, 0), order=1)
    wanted = (wanted - data.min()) / (data.max() - data.min())
    np.testing.assert_allclose(as_array(enlarged(reader), found[0]), wanted, atol=1e-5)


def test_dicom_takes_a_nifti_guide(tmp_path):
    series(tmp_path / "t2", count=5, rows=14, columns=12)
    reader = open_image(tmp_path / "t2")
    affine = reader.volume.affine
    middle = (affine @ [*(np.array(reader.volume.array_shape) - 1) / 2, 1])[:3]
    guide_affine = centred(np.diag([-1.0, 1.2, 1.1]), (24, 24, 24), middle)
    values = ramp((24, 24, 24), guide_affine)
    result = enlarged(reader, 4, 4)
    opened = open_guide(save(tmp_path / "t1.nii.gz", values, guide_affine), reader, result)
    # From the tags alone: position of the first pixel, directions along a row and down a column, LPS.
    along, down = np.array(TILTED[:3]), np.array(TILTED[3:])
    for at, found in enumerate(opened.slices()):
        first = np.array([-20.0, 31.0, 7.0]) + np.cross(along, down) * 2.5 * at
        rows, columns = np.mgrid[:56, :48]
        # Enlarged by 4: voxel edges align, so the first centre moves back by 3/8 of an old pixel.
        lps = (
            first
            + along * 0.5 * ((columns + 0.5) / 4 - 0.5)[..., None]
            + down * 0.7 * ((rows + 0.5) / 4 - 0.5)[..., None]
        )
        wanted = (lps * [-1, -1, 1] @ SLOPES - values.min()) / (values.max() - values.min())
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert at == 4
    assert opened.facts["same_patient"].startswith("not known")


def test_a_dicom_guide_in_the_other_direction(tmp_path):
    """A guide whose slices are numbered, and lie, across those of the image."""
    series(tmp_path / "t2", count=4, rows=8, columns=8, orientation=(1, 0, 0, 0, 1, 0))
    sagittal = [(-20.5 + 1.0 * at, 29.0, 18.0) for at in range(8)]
    series(
        tmp_path / "t1", count=8, rows=20, columns=20, orientation=(0, 1, 0, 0, 0, -1), positions=sagittal,
        series_uid="1.2.3.4.9",
    )  # fmt: skip
    reader, guide = open_image(tmp_path / "t2"), open_image(tmp_path / "t1")
    result = enlarged(reader)
    opened = open_guide(tmp_path / "t1", reader, result)
    stack = np.stack([s[0] for s in guide.slices()], -1).astype(float)  # (rows, columns, slices)
    index = (positions(result) - guide.volume.affine[:3, 3]) @ np.linalg.inv(guide.volume.affine[:3, :3]).T
    column, row, at = np.moveaxis(index, -1, 0)
    wanted = map_coordinates(stack, [row, column, at], order=1, mode="nearest")
    wanted = (wanted - stack.min()) / (stack.max() - stack.min())
    found = as_array(result, [*opened.slices()])
    inside = ~as_array(result, [opened.outside(i) for i in range(4)])
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-5)


def test_time_points_are_guided_alike(tmp_path):
    data = np.stack([anatomy((10, 12, 6), seed) for seed in range(3)], -1)
    target = save(tmp_path / "t2.nii.gz", data, centred(np.diag([2.0, 2.0, 3.0]), (10, 12, 6)))
    (tmp_path / "other").mkdir()
    _, guide = pair(tmp_path / "other")
    reader = open_image(target)
    opened = open_guide(guide, reader, enlarged(reader))
    slices = list(opened.slices())
    assert len(slices) == reader.volume.slices == 18
    for at in range(6):
        assert np.array_equal(slices[at], slices[at + 6])
        assert np.array_equal(opened.outside(at), opened.outside(at + 12))


# -- values ---------------------------------------------------------------------------------------------------


def test_values_are_scaled_by_the_whole_volume(tmp_path):
    reader, guide = pair(tmp_path)
    data = np.full((24, 24, 24), 300, np.int16)
    data[0, 0, 0], data[-1, -1, -1] = -100, 1900  # neither lies within the result
    save(guide, data, nib.load(guide).affine)
    opened = open_guide(guide, reader, enlarged(reader))
    assert (opened.low, opened.high) == (-100, 1900)
    assert opened.facts["range"] == [-100, 1900]
    for found in opened.slices():
        np.testing.assert_allclose(found, 0.2, atol=1e-6)


def test_a_negative_slope_keeps_bright_bright(tmp_path):
    reader, guide = pair(tmp_path)
    affine = nib.load(guide).affine
    up = [*open_guide(guide, reader, enlarged(reader)).slices()]
    save(guide, np.rint(ramp((24, 24, 24), affine) * 100 / 5).astype(np.int16) * -1, affine, slope=-0.05, intercept=7)
    opened = open_guide(guide, reader, enlarged(reader))
    np.testing.assert_allclose([*opened.slices()], up, atol=1e-3)
    assert opened.low < opened.high
    assert opened.low == pytest.approx(ramp((24, 24, 24), affine).min() + 7, abs=0.1)


def test_what_is_no_number_is_zero(tmp_path):
    reader, guide = pair(tmp_path)
    affine = nib.load(guide).affine
    values = ramp((24, 24, 24), affine)
    values[:, :, 12:] = np.nan
    values[0, 0, 0] = np.inf
    opened = open_guide(save(guide, values, affine), reader, enlarged(reader))
    slices = list(opened.slices())
    assert np.isfinite(slices).all()
    assert not np.any(slices[-1])
    assert opened.high == pytest.approx(np.nanmax(values[np.isfinite(values)]))


def test_padding_does_not_stretch_the_range(tmp_path):
    pixels = series(tmp_path / "t2", rows=12, columns=12)
    brightest = int(pixels.max())

    def padded(ds, at):
        ds.PixelPaddingValue = brightest

    series(tmp_path / "t1", rows=12, columns=12, series_uid="1.2.9", change=padded)
    reader = open_image(tmp_path / "t2")
    opened = open_guide(tmp_path / "t1", reader, reader.volume)  # the makers give both the same pixels
    assert opened.high == np.unique(pixels)[-2] < brightest
    found = np.array([*opened.slices()])
    assert found[pixels == brightest].max() < 1e-6
    assert found.max() == pytest.approx(1)


def test_a_finer_guide_is_averaged_instead_of_skipped(tmp_path):
    """Stripes that a coarse result cannot show become grey; without a blur, every second voxel is taken."""
    shape = (64, 64, 12)
    affine = centred(np.diag([0.5, 0.5, 2.0]), shape)
    stripes = np.broadcast_to((np.arange(64) % 4 < 2)[:, None, None], shape).astype(np.int16) * 1000
    _, guide = pair(tmp_path)
    save(guide, stripes, affine)
    reader = open_image(
        save(tmp_path / "t2.nii.gz", anatomy((14, 14, 8)), centred(np.diag([2.0, 2.0, 2.5]), (14, 14, 8)))
    )
    opened = open_guide(guide, reader, reader.volume)
    found = np.array([*opened.slices()])
    assert 0.35 < found[:, 2:-2, 2:-2].min() <= found[:, 2:-2, 2:-2].max() < 0.65
    assert opened.facts["blurred_mm"][0] > 0.5
    assert opened.facts["blurred_mm"][2] == 0  # across the slices, the middle plane is taken
    # Four times as fine, the result shows what is there.
    sharp = open_guide(guide, reader, enlarged(reader, 4, 4))
    assert sharp.facts["blurred_mm"] is None
    assert np.ptp([*sharp.slices()]) == pytest.approx(1, abs=1e-6)


# -- coverage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "share"), [(0.0, 1.0), (4.0, 0.8), (8.0, 0.6)])
def test_coverage_is_counted(tmp_path, shift, share):
    """A guide of exactly the result's field, moved along its first axis of 20 mm."""
    affine = centred(np.diag([2.0, 2.0, 3.0]), (10, 12, 6), (shift, 0, 0))
    reader, guide = pair(tmp_path, affine, (10, 12, 6))
    opened = open_guide(guide, reader, enlarged(reader))
    assert opened.coverage == pytest.approx(share)
    assert np.mean([opened.outside(at) for at in range(6)]) == pytest.approx(1 - share)
    outside = np.array([opened.outside(at) for at in range(6)])
    assert not np.array([*opened.slices()])[outside].any()
    assert bool(opened.warnings) == (share < 0.95)
    if share < 0.95:
        assert f"covers {share:.0%}" in opened.warnings[0]


def test_another_place_is_refused_before_a_voxel_is_read(tmp_path, monkeypatch):
    affine = centred(np.diag([2.0, 2.0, 3.0]), (10, 12, 6), (11.0, 0, 0))
    reader, guide = pair(tmp_path, affine, (10, 12, 6))
    monkeypatch.setattr(nifti.NiftiReader, "slices", lambda _: pytest.fail("read"))
    assert "45%" in refused("does not show the same place", guide, reader, enlarged(reader))


# -- what is no guide -----------------------------------------------------------------------------------------


def test_what_is_no_grey_volume_is_refused(tmp_path):
    reader, guide = pair(tmp_path)
    affine = nib.load(guide).affine
    four = save(tmp_path / "dwi.nii.gz", np.zeros((8, 8, 8, 2), np.int16), affine)
    refused("several volumes", four, reader, enlarged(reader))
    rgb = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused("in colour", save(tmp_path / "rgb.nii.gz", rgb, affine), reader, enlarged(reader))
    flat = save(tmp_path / "flat.nii.gz", np.full((24, 24, 24), 7, np.int16), affine)
    refused("same value everywhere", flat, reader, enlarged(reader))
    refused("the image itself", reader.path, reader, enlarged(reader))
    refused("does not exist", tmp_path / "missing.nii.gz", reader, enlarged(reader))


def png(path, shape, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)).save(path)
    return path


def test_images_without_a_place_must_have_equal_sizes(tmp_path):
    reader = open_image(png(tmp_path / "t2.png", (12, 10)))
    result = enlarged(reader)
    large = open_guide(png(tmp_path / "large.png", (24, 20), 1), reader, result)
    assert "same field is assumed" in large.facts["placed_by"]
    pixels = np.asarray(Image.open(tmp_path / "large.png")).astype(float)
    (found,) = large.slices()
    np.testing.assert_allclose(found, (pixels - pixels.min()) / np.ptp(pixels), atol=1e-6)
    small = open_guide(png(tmp_path / "small.png", (12, 10), 2), reader, result)
    pixels = np.asarray(Image.open(tmp_path / "small.png")).astype(float)
    pixels = (pixels - pixels.min()) / np.ptp(pixels)
    places = np.meshgrid((np.arange(24) + 0.5) / 2 - 0.5, (np.arange(20) + 0.5) / 2 - 0.5, indexing="ij")
    (found,) = small.slices()
    np.testing.assert_allclose(found, map_coordinates(pixels, places, order=1, mode="nearest"), atol=1e-5)
    assert small.coverage == large.coverage == 1
    refused("neither the image's nor the result's size", png(tmp_path / "other.png", (13, 10)), reader, result)
    refused("cannot be registered", tmp_path / "small.png", reader, result, register="rigid")


def test_one_place_is_not_enough(tmp_path):
    reader, guide = pair(tmp_path)
    data, affine = nib.load(guide).get_fdata(dtype=np.float32), nib.load(guide).affine
    lost = save(tmp_path / "lost.nii.gz", data, affine, code=0)
    assert "lost.nii.gz does not say" in refused("cannot be laid over", lost, reader, enlarged(reader))
    without = open_image(save(tmp_path / "t2lost.nii.gz", anatomy((10, 12, 6)), reader.volume.affine, code=0))
    assert "t2lost.nii.gz does not say" in refused("cannot be laid over", guide, without, enlarged(without))
    refused("neither the image's nor the result's size", lost, without, enlarged(without))
    same = save(tmp_path / "same.nii.gz", anatomy((10, 12, 6), 3), affine, code=0)
    assert open_guide(same, without, enlarged(without)).coverage == 1


# -- whose it is ----------------------------------------------------------------------------------------------


def two_series(folder, change):
    """A T2 and a T1 over the same field; the T1's header is changed."""
    series(folder / "t2", rows=10, columns=10)

    def altered(ds, at):
        for keyword, value in change.items():
            setattr(ds, keyword, value)

    series(folder / "t1", rows=10, columns=10, series_uid="1.2.3.4.9", change=altered)
    return open_image(folder / "t2"), folder / "t1"


def test_the_same_patient_is_taken(tmp_path):
    reader, guide = two_series(tmp_path, {"StudyInstanceUID": "1.2.3.99", "PatientID": "CANARYID "})
    opened = open_guide(guide, reader, enlarged(reader))
    assert opened.warnings == ()
    facts = opened.facts
    assert (facts["same_patient"], facts["same_study"], facts["same_frame_of_reference"]) == ("yes", "no", "yes")
    assert CANARY not in str(facts)
    assert "CANARY" not in str(reader.identity())


@pytest.mark.parametrize(
    "change", [{"PatientID": "CANARYTOO"}, {"PatientBirthDate": "CANARY1950"}, {"IssuerOfPatientID": "CANARY HOSPITAL"}]
)
def test_another_patient_is_refused(tmp_path, change):
    reader, guide = two_series(tmp_path, change)
    if "PatientID" not in change:  # both files have to say it

        def other(ds, at):
            setattr(ds, next(iter(change)), "CANARY2")

        series(tmp_path / "t2", rows=10, columns=10, change=other)
        reader = open_image(tmp_path / "t2")
    for register in ("none", "rigid"):
        refused("different patients", guide, reader, enlarged(reader), register=register)
    opened = open_guide(guide, reader, enlarged(reader), allow_mismatch=True)
    assert "different patients" in opened.warnings[0]
    assert "CANARY" not in str(opened.warnings)
    assert opened.facts["same_patient"] == "no"


def test_a_missing_patient_is_said(tmp_path):
    reader, guide = two_series(tmp_path, {"PatientID": "", "FrameOfReferenceUID": ""})
    facts = open_guide(guide, reader, enlarged(reader)).facts
    assert facts["same_patient"].startswith("not known")
    assert facts["same_frame_of_reference"].startswith("not known")


def test_another_frame_of_reference_needs_registration(tmp_path):
    reader, guide = two_series(tmp_path, {"FrameOfReferenceUID": "1.2.3.77"})
    refused("different frames of reference", guide, reader, enlarged(reader))
    assert "frames of reference" in open_guide(guide, reader, enlarged(reader), allow_mismatch=True).warnings[0]
    # Registration may go on; these images are too small for it, and that is what stops it.
    refused("cannot be registered", guide, reader, enlarged(reader), register="rigid")


def test_the_series_itself_is_no_guide(tmp_path):
    series(tmp_path / "t2", rows=10, columns=10)
    reader = open_image(tmp_path / "t2")
    refused("the image itself", tmp_path / "t2", reader, enlarged(reader))
    series(tmp_path / "t2" / "t1", rows=10, columns=10, series_uid="1.2.3.4.9")
    reader = open_image(tmp_path / "t2", ReadOptions(series="1.2.3.4.5"))
    opened = open_guide(tmp_path / "t2", reader, enlarged(reader), options=ReadOptions(series="1.2.3.4.9"))
    assert opened.facts["same_study"] == "yes"


def test_identities_say_nothing_but_same_or_other():
    one = Identity.of({"PatientID": "CANARY", "FrameOfReferenceUID": "1.2"})
    assert "CANARY" not in repr(one)
    assert one.same_patient(Identity.of({"PatientID": " CANARY\0"})) is True
    assert one.same_patient(Identity.of({"PatientID": "canary"})) is False
    assert one.same_patient(Identity.of({"PatientBirthDate": "19500101"})) is None
    assert one.same_frame(Identity.of({"FrameOfReferenceUID": "1.20"})) is False
    assert one.same_study(one) is None


@pytest.mark.parametrize(("code", "warned"), [(1, False), (2, False), (4, True)])
def test_a_template_is_not_the_scanner(tmp_path, code, warned):
    reader, guide = pair(tmp_path, code=code)
    warnings = open_guide(guide, reader, enlarged(reader)).warnings
    assert any("different spaces" in w for w in warnings) == warned


# -- real images ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not BRAIN.is_dir(), reason="the shared data are not beside the checkout")
def test_a_real_pair_lands_where_others_put_it():
    reader = open_image(BRAIN / "T2W.nii.gz")
    opened = open_guide(BRAIN / "T1W.nii.gz", reader, reader.volume)
    found = np.array([*opened.slices()])
    wanted = np.array([s[0] for s in open_image(BRAIN / "T1W_in_T2W.nii.gz").slices()]).astype(float)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
    assert opened.coverage == 1
