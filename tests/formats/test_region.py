"""A region of interest keeps its values and its place in every format, by nibabel, SimpleITK and pydicom."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError, RunError
from medsr_cli.formats import create_image, default_name, open_image, series_name
from medsr_cli.formats.contract import Derivation, DicomOutput, ReadOptions
from medsr_cli.formats.region import NO_PLACE, Region, centred, cropped
from medsr_cli.volume.geometry import voxel_centres_mm
from medsr_cli.volume.volume import Volume
from tests.formats.dicom_makers import TILTED, enhanced, header, place, save, series

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")
MADE_BY = Derivation("nearest", (1.0, 1.0), "medsr test")
BRIEF = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(reader, target, scale=1, *, whole_name=True, multiframe=False):
    """The reader's slices, every pixel repeated `scale` times, as a file of its own, or a series of them."""
    volume = reader.volume
    dicom = DicomOutput(multiframe=multiframe)
    if whole_name:
        target = series_name(default_name(target / reader.path.name, "_part", volume.format), reader, dicom)
    result = volume.enlarged(volume.rows * scale, volume.columns * scale)
    with create_image(target, reader, result, replace(MADE_BY, scale=(float(scale),) * 2, dicom=dicom)) as writer:
        for pixels in reader.slices():
            writer.write(np.ascontiguousarray(pixels.repeat(scale, 1).repeat(scale, 2)))
    return target


def stacked(reader):
    return np.stack(list(reader.slices()))  # (slices, channels, rows, columns)


def some_region(volume: Volume) -> Region:
    """Off the middle, of odd lengths, and never at the rim where that can be."""
    height, width = max(volume.rows // 3 | 1, 1), max(volume.columns // 2 | 1, 1)
    return Region(min(2, volume.rows - height), (volume.columns - width + 1) // 2, height, width)


def pixel_index(volume: Volume, row, column, at):
    """Array index of a pixel, as far as space goes."""
    index = np.zeros(3)
    index[volume.plane_axes[0]], index[volume.plane_axes[1]], index[volume.slice_axis] = row, column, at
    return index


def check_same_place(whole: Volume, part: Volume, region: Region, scale=1):
    """The middle of each block of new pixels lies where the old pixel lay."""
    assert (whole.affine is None) == (part.affine is None)
    if whole.affine is None:
        return
    slices = whole.array_shape[whole.slice_axis] if whole.slice_axis < len(whole.array_shape) else 1
    for row, column, at in itertools.product((0, region.height - 1), (0, region.width - 1), (0, slices - 1)):
        middle = [(x + 0.5) * scale - 0.5 for x in (row, column)]
        before = pixel_index(whole, region.top + row, region.left + column, at)
        after = pixel_index(part, *middle, at)
        a, b = (voxel_centres_mm(v.affine, i[None])[0] for v, i in ((whole, before), (part, after)))
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=0)


def check_round_trip(path, folder, options, region=None, scale=1):
    """Cut, written and read back: the values and the place of the source's rectangle."""
    whole = open_image(path, options)
    region = region or some_region(whole.volume)
    part = cropped(whole, region)
    target = write(part, folder, scale)
    # A part may be so small that another axis would be taken for that of the slices.
    back = open_image(target, ReadOptions(axis=str(whole.volume.slice_axis)))
    expected = stacked(whole)[..., region.top :, region.left :][..., : region.height, : region.width]
    assert np.array_equal(stacked(part), expected, equal_nan=expected.dtype.kind == "f")
    written = stacked(back)
    if whole.volume.format != "jpeg":
        enlarged = expected.repeat(scale, -2).repeat(scale, -1)
        assert written.dtype == expected.dtype
        assert np.array_equal(written, enlarged, equal_nan=expected.dtype.kind == "f")
    if NO_PLACE not in part.volume.warnings:
        check_same_place(whole.volume, part.volume, region)
        check_same_place(whole.volume, back.volume, region, scale)
    assert part.volume.padding == whole.volume.padding
    assert part.volume.alpha == whole.volume.alpha
    return whole, part, back


# -- the rectangle --------------------------------------------------------------------------------------------


def test_a_region_is_columns_first():
    assert Region.parse(" 3,40 ,5, 6 ") == Region(top=40, left=3, height=6, width=5)
    assert str(Region.parse("3,40,5,6")) == "3,40,5,6"


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,5,5", "0,0,0,5", "0,0,5,0", "1.5,0,2,2", "9" * 5000 + ",0,1,1"]
)
def test_what_is_no_region_is_refused(text):
    with pytest.raises(ArgumentsError, match="region") as refused:
        Region.parse(text)
    assert "x,y,w,h" in refused.value.remedy


@pytest.mark.parametrize("text", ["31,0,6,3", "0,38,3,3", "36,0,1,1", "0,40,1,1", "0,0,37,40", "0,0,36,41"])
def test_what_lies_outside_is_refused_with_the_size(tmp_path, text):
    nib.save(nib.Nifti1Image(np.zeros((36, 40, 2), np.int16), np.eye(4)), tmp_path / "scan.nii")
    reader = open_image(tmp_path / "scan.nii")
    with pytest.raises(ArgumentsError, match=rf"{text} .*scan\.nii.* 36 columns and 40 rows"):
        cropped(reader, Region.parse(text))
    assert cropped(reader, Region.parse("35,39,1,1")).volume.rows == 1


@given(
    st.floats(-0.5, 1.5), st.floats(-0.5, 1.5), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60),
    st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_centred_region_is_whole_inside_and_as_near_as_can_be(x, y, height, width, rows, columns):
    volume = Volume("png", rows, columns, 1, np.dtype("u1"))
    region = centred(x, y, height, width, volume)
    assert region.fits(volume)
    assert (region.height, region.width) == (min(height, rows), min(width, columns))
    for centre, first, length, available in (
        (y, region.top, region.height, rows),
        (x, region.left, region.width, columns),
    ):
        distance = [abs(k + length / 2 - min(max(centre, 0), 1) * available) for k in range(available - length + 1)]
        assert distance[first] <= min(distance) + 1e-9


def test_the_lr_region_is_the_hr_region_over_four():
    """Sixteen different centres: four times the LR region is a region of the HR image with the same middle."""
    small, large = (Volume("png", n, n, 1, np.dtype("u1")) for n in (60, 240))
    for x in np.linspace(0, 1, 16):
        lr, hr = centred(x, 0.5, 30, 30, small), centred(x, 0.5, 120, 120, large)
        assert abs(4 * lr.left - hr.left) <= 2
        assert 4 * lr.top == hr.top == 60


def test_a_centre_that_is_no_number_is_an_error():
    with pytest.raises(RunError, match="not a number"):
        centred(float("nan"), 0.5, 3, 3, Volume("png", 9, 9, 1, np.dtype("u1")))


@pytest.mark.parametrize("box", [(-1, 0, 2, 2), (0, 0, 0, 2), (9, 0, 2, 2), (0, 7, 2, 2)])
def test_a_volume_refuses_to_be_cut_outside(box):
    with pytest.raises(ValueError, match="not within 10 x 8"):
        Volume("png", 10, 8, 1, np.dtype("u1")).cropped(*box)


# -- random oblique volumes -----------------------------------------------------------------------------------


@st.composite
def rigid(draw):
    """Rotation, spacing and a mirror or not; no shear, so that a qform and ITK can hold it."""
    q = np.array([draw(st.floats(0.5, 2)), *(draw(st.floats(-1, 1)) for _ in range(3))])
    q /= np.linalg.norm(q)
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat(q) * [draw(st.floats(0.3, 5)) for _ in range(3)]
    affine[:3, 2] *= draw(st.sampled_from((1, -1)))
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return affine


def numbered(shape):
    """Every voxel has a value of its own, so that it can be found again."""
    return np.arange(np.prod(shape)).astype(np.int32).reshape(shape)


@given(rigid(), rigid(), st.sampled_from("012"), st.sampled_from([1, 2, 3]), st.booleans())
@BRIEF
def test_sform_and_qform_keep_their_own_places(tmp_path_factory, sform, qform, axis, scale, shear):
    folder = tmp_path_factory.mktemp("forms")
    if shear:
        sform = sform @ np.array([[1, 0.2, -0.1, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    image = nib.Nifti1Image(numbered((7, 8, 9)), sform)
    image.set_sform(sform, 2)
    image.set_qform(qform, 1)
    nib.save(image, folder / "a.nii")
    part = cropped(open_image(folder / "a.nii", ReadOptions(axis=axis)), Region(2, 1, 5, 4))
    old, new = nib.load(folder / "a.nii"), nib.load(write(part, folder, scale))
    values = np.asarray(new.dataobj)
    steps = [scale if a != int(axis) else 1 for a in range(3)]
    assert values.shape == tuple(n * s for n, s in zip(part.volume.array_shape, steps, strict=True))
    for forms in ((old.get_sform(), new.get_sform()), (old.get_qform(), new.get_qform())):
        for index in np.ndindex(*part.volume.array_shape):
            first = tuple(i * s for i, s in zip(index, steps, strict=True))
            there = np.unravel_index(int(values[first]), (7, 8, 9))
            middle = [(i + 0.5) * s - 0.5 for i, s in zip(index, steps, strict=True)]
            found, wanted = (f[:3, :3] @ np.array(i) + f[:3, 3] for f, i in zip(forms, (there, middle), strict=True))
            np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert (int(new.header["sform_code"]), int(new.header["qform_code"])) == (2, 1)


@given(rigid(), st.sampled_from(["a.nii.gz", "a.nrrd", "a.mha", "a.mgz"]), st.sampled_from("012"), st.integers(1, 2))
@BRIEF
def test_itk_finds_every_voxel_where_it_was(tmp_path_factory, affine, name, axis, scale):
    """Written by this room from NIfTI, cut in its own format, and both ends read with SimpleITK or nibabel."""
    folder = tmp_path_factory.mktemp("itk")
    nib.save(nib.Nifti1Image(numbered((6, 7, 5)), affine), folder / "s.nii")
    write(open_image(folder / "s.nii", ReadOptions(axis=axis)), folder / name, whole_name=False)
    reader = open_image(folder / name, ReadOptions(axis="1"))
    new = write(cropped(reader, Region(1, 2, 3, 3)), folder, scale)
    place, values = itk_or_nibabel(folder / name)
    new_place, new_values = itk_or_nibabel(new)
    positions = {int(values[index]): place(index) for index in np.ndindex(*values.shape)}
    corner = [scale if a != 1 else 1 for a in range(3)]
    assert new_values.shape == tuple(3 * s if s > 1 or a != 1 else reader.volume.slices for a, s in enumerate(corner))
    for index in np.ndindex(*(n // s for n, s in zip(new_values.shape, corner, strict=True))):
        first = tuple(i * s for i, s in zip(index, corner, strict=True))
        middle = [(i + 0.5) * s - 0.5 for i, s in zip(index, corner, strict=True)]
        np.testing.assert_allclose(new_place(middle), positions[int(new_values[first])], atol=2e-3)


def itk_or_nibabel(path):
    """Index to position, and values by index, from somebody else's reader."""
    if path.suffix == ".mgz":
        image = nib.load(path)
        return lambda i: image.affine[:3, :3] @ np.array(i) + image.affine[:3, 3], np.asarray(image.dataobj)
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    return lambda i: image.TransformContinuousIndexToPhysicalPoint([float(v) for v in i]), values


@given(rigid(), st.integers(0, 5), st.integers(0, 4), st.integers(1, 4), st.integers(1, 3))
@BRIEF
def test_a_part_of_the_enlarged_is_the_enlarged_part(affine, top, left, height, width):
    volume = Volume("nifti", 9, 7, 5, np.dtype("i2"), array_shape=(7, 9, 5), affine=affine)
    part = volume.cropped(top, left, height, width).enlarged(height * 4, width * 4)
    other = volume.enlarged(36, 28).cropped(top * 4, left * 4, height * 4, width * 4)
    assert part == other
    np.testing.assert_allclose(part.affine, other.affine, atol=1e-9)


def test_a_part_of_a_part_is_a_part(tmp_path):
    series(tmp_path / "in", 3)
    nib.save(nib.Nifti1Image(numbered((9, 8, 4)), np.diag([1, 2, 3, 1.0])), tmp_path / "a.nii")
    for path, suffix in ((tmp_path / "in", ""), (tmp_path / "a.nii", ".nii")):
        whole = open_image(path)
        twice = cropped(cropped(whole, Region(1, 1, 4, 3)), Region(2, 1, 2, 2))
        once = cropped(whole, Region(3, 2, 2, 2))
        for name, part in (("twice", twice), ("once", once)):
            write(part, tmp_path / (name + suffix), 2, whole_name=False)
        a, b = (open_image(tmp_path / (name + suffix)) for name in ("twice", "once"))
        assert np.array_equal(stacked(a), stacked(b))
        np.testing.assert_allclose(a.volume.affine, b.volume.affine, atol=1e-6)
        check_same_place(whole.volume, a.volume, Region(3, 2, 2, 2), 2)


# -- files of every format ------------------------------------------------------------------------------------


def shared_files():
    files = SHARED / "formats"
    return [
        path.relative_to(files).as_posix()
        for path in sorted(files.rglob("*"))
        if path.is_file() and path.suffix not in (".raw", ".zraw", ".img", ".REC", ".md", ".txt", ".gz~")
    ]


@needs_shared
@pytest.mark.parametrize("name", shared_files() if SHARED.is_dir() else [])
def test_every_shared_file_can_be_cut(tmp_path, name):
    options = ReadOptions()
    try:
        reader = open_image(SHARED / "formats" / name, options)
        assert len(stacked(reader)) == reader.volume.slices
    except InputRefused:
        pytest.skip("refused whole, too")
    if reader.volume.rows * reader.volume.columns * reader.volume.slices > 2_000_000:
        region = Region(50, 60, 20, 30)
        assert np.array_equal(stacked(cropped(reader, region)), stacked(reader)[..., 50:70, 60:90])
        return
    check_round_trip(SHARED / "formats" / name, tmp_path, options)


@needs_shared
@pytest.mark.parametrize("name", ["oblique_20deg.nii.gz", "sform_qform_mismatch.nii.gz", "units_micron.nii.gz"])
@pytest.mark.parametrize("axis", ["0", "1", "2"])
def test_every_axis_can_be_cut(tmp_path, name, axis):
    check_round_trip(SHARED / "formats" / "nifti" / name, tmp_path, ReadOptions(axis=axis), scale=2)


def test_a_header_that_is_cut_keeps_its_other_fields(tmp_path):
    image = nib.Nifti1Image(numbered((9, 8, 4)), np.diag([1, 2, 3, 1.0]))
    image.set_qform(image.affine, 1)
    image.header["descrip"], image.header["cal_max"] = b"kept", 7.0
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    image.header.set_dim_info(slice=1)
    image.header["slice_end"], image.header["slice_code"] = 7, 1
    nib.save(image, tmp_path / "a.nii")
    before = nib.load(tmp_path / "a.nii").header
    after = nib.load(write(cropped(open_image(tmp_path / "a.nii"), Region(1, 2, 5, 4)), tmp_path)).header
    assert after.extensions[0].get_content().rstrip(b"\0") == b"a comment"
    changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
    # slice_*: the axis on which slices were acquired one after the other was cut.
    assert changed == {"dim", "qoffset_x", "qoffset_y", "srow_x", "srow_y", "slice_end", "slice_code"}
    assert (after["srow_x"][3], after["srow_y"][3]) == (2, 2)


def test_a_header_without_orientation_says_so(tmp_path):
    image = nib.Nifti1Image(numbered((9, 8, 4)), None)
    image.header["pixdim"][1:4] = 2, 3, 4
    nib.save(image, tmp_path / "a.nii")
    part = cropped(open_image(tmp_path / "a.nii"), Region(1, 2, 5, 4))
    assert NO_PLACE in part.volume.warnings
    new = nib.load(write(part, tmp_path, 2))
    assert (int(new.header["sform_code"]), int(new.header["qform_code"])) == (0, 0)
    assert not any(float(new.header[f"qoffset_{axis}"]) for axis in "xyz")
    np.testing.assert_allclose(new.affine, part.volume.enlarged(10, 8).affine)


def test_the_origin_of_spm_moves_along(tmp_path):
    image = nib.spm99analyze.Spm99AnalyzeImage(numbered((9, 8, 4)).astype(np.int16), np.diag([2, 2, 3, 1.0]))
    image.header["origin"][:3] = 5, 4, 2
    (tmp_path / "out").mkdir()
    nib.save(image, tmp_path / "a.img")
    (tmp_path / "a.mat").unlink(missing_ok=True)
    reader = open_image(tmp_path / "a.hdr")
    write(cropped(reader, Region(1, 2, 5, 4)), tmp_path / "out")
    found = nib.spm99analyze.Spm99AnalyzeImage.load(tmp_path / "out" / "a_part.img")
    assert found.header["origin"][:3].tolist() == [3, 3, 2]
    (tmp_path / "out" / "a_part.hdr").unlink(), (tmp_path / "out" / "a_part.img").unlink()
    write(cropped(reader, Region(0, 8, 5, 1)), tmp_path / "out")  # five columns to the left of the only one
    found = nib.spm99analyze.Spm99AnalyzeImage.load(tmp_path / "out" / "a_part.img")
    assert not found.header["origin"][:3].any()


def test_nrrd_without_directions_moves_the_ends_of_its_axes(tmp_path):
    values = numbered((6, 8, 5)).astype("<i2")
    lines = [
        "NRRD0004", "type: int16", "dimension: 3", "sizes: 5 8 6", "spacings: 0.5 2 3", "axis mins: 10 20 30",
        "axis maxs: 12.5 36 48", "thicknesses: NaN NaN 2", "endian: little", "encoding: raw", "note:=kept",
    ]  # fmt: skip
    (tmp_path / "a.nrrd").write_bytes("\n".join([*lines, "", ""]).encode() + values.tobytes())
    part = cropped(open_image(tmp_path / "a.nrrd"), Region(1, 2, 4, 3))
    target = write(part, tmp_path, 2)
    text = target.read_bytes().split(b"\n\n")[0].decode()
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert fields["sizes"] == "6 8 6"
    assert [float(v) for v in fields["spacings"].split()] == [0.25, 1, 3]
    assert [float(v) for v in fields["axis mins"].split()] == [11, 22, 30]
    assert [float(v) for v in fields["axis maxs"].split()] == [12.5, 30, 48]
    assert "note:=kept" in text
    assert np.array_equal(stacked(open_image(target))[:, 0, ::2, ::2], values[:, 1:5, 2:5])


def test_colours_alpha_and_print_size_survive(tmp_path):
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png", dpi=(300, 150))
    whole, _, back = check_round_trip(tmp_path / "a.png", tmp_path, ReadOptions(), Region(3, 2, 5, 7), scale=2)
    assert whole.volume.alpha
    assert back.volume.alpha
    with Image.open(tmp_path / "a_part.png") as image:
        assert image.size == (14, 10)
        np.testing.assert_allclose(image.info["dpi"], (600, 300), rtol=1e-3)
    pages = [Image.fromarray(rng.integers(0, 60000, (9, 8), dtype=np.uint16)) for _ in range(3)]
    pages[0].save(tmp_path / "s.tif", save_all=True, append_images=pages[1:], dpi=(72, 72))
    check_round_trip(tmp_path / "s.tif", tmp_path, ReadOptions(), Region(3, 2, 5, 6), scale=3)
    with Image.open(tmp_path / "s_part.tif") as image:
        np.testing.assert_allclose([float(v) for v in image.info["dpi"]], (216, 216))


# -- DICOM ----------------------------------------------------------------------------------------------------


def dicom_folders():
    return sorted(path.name for path in (SHARED / "dicom").iterdir()) if SHARED.is_dir() else []


@needs_shared
@pytest.mark.parametrize("name", dicom_folders())
def test_every_readable_dicom_can_be_cut(tmp_path, name):
    """Written at its own resolution and read back: positions and values of the source's sub-rectangle."""
    folder = SHARED / "dicom" / name
    paths = [folder]
    try:
        open_image(folder)
    except MedsrError:
        paths = sorted(folder.iterdir())
    seen = 0
    for path in paths:
        try:
            whole = open_image(path)
            if whole.volume.rows * whole.volume.columns * whole.volume.slices > 3_000_000:
                continue
            pixels = stacked(whole)
        except MedsrError:
            continue
        seen += 1
        check_dicom(whole, pixels, tmp_path / path.stem)
    if not seen:
        pytest.skip("refused whole, or too large")


def check_dicom(whole, pixels, out):
    region = some_region(whole.volume)
    part = cropped(whole, region)
    single = whole.path.is_file()
    target = out.with_suffix(".dcm") if single else out
    write(part, target, whole_name=False)
    back = open_image(target)
    expected = pixels[..., region.top :, region.left :][..., : region.height, : region.width]
    assert np.array_equal(stacked(part), expected)
    assert np.array_equal(stacked(back), expected)
    assert back.volume.padding == whole.volume.padding
    assert (back.volume.spacing_mm is None) == (whole.volume.spacing_mm is None)
    if whole.volume.spacing_mm is not None:
        np.testing.assert_allclose(back.volume.spacing_mm, whole.volume.spacing_mm, rtol=1e-9)
    check_same_place(whole.volume, back.volume, region)
    for old, new in zip(whole.stack.frames, back.stack.frames, strict=True):
        assert (old.plane.position_mm is None) == (new.plane.position_mm is None)
        if old.plane.position_mm is None or old.plane.spacing_mm is None:
            continue
        along, down = np.split(np.array(old.plane.orientation), 2)
        step = along * old.plane.spacing_mm[1] * region.left + down * old.plane.spacing_mm[0] * region.top
        np.testing.assert_allclose(new.plane.position_mm, np.array(old.plane.position_mm) + step, atol=1e-4)
    files = [target] if single else sorted(target.iterdir())
    for path in files:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        assert (ds.Rows, ds.Columns) == (region.height, region.width)
        told = derivations(ds)
        which = f"{region.width} x {region.height} pixels from x {region.left}, y {region.top}"
        assert told == [] or all(which in sentence for sentence in told)


def derivations(ds):
    """How a file says that it was derived: once, or enhanced objects for their frames."""
    groups = [*ds.get("SharedFunctionalGroupsSequence", []), *ds.get("PerFrameFunctionalGroupsSequence", [])]
    items = [item for group in groups for item in group.get("DerivationImageSequence", [])[-1:]]
    return [item.DerivationDescription for item in [*items, ds] if "DerivationDescription" in item]


def simpleitk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(1, 3))
@BRIEF
def test_oblique_series_keep_their_place_for_simpleitk(tmp_path_factory, a, b, scale):
    folder = tmp_path_factory.mktemp("oblique")
    down = (-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b))
    series(folder / "in", 3, orientation=(np.cos(a), np.sin(a), 0.0, *down), rows=9, columns=8)
    write(cropped(open_image(folder / "in"), Region(2, 3, 5, 4)), folder / "out", scale, whole_name=False)
    old, new = simpleitk_series(folder / "in"), simpleitk_series(folder / "out")
    assert new.GetSize() == (4 * scale, 5 * scale, 3)
    for i, j, k in itertools.product((0, 3), (0, 4), (0, 2)):
        middle = ((i + 0.5) * scale - 0.5, (j + 0.5) * scale - 0.5, k)
        there = old.TransformIndexToPhysicalPoint((i + 3, j + 2, k))
        np.testing.assert_allclose(new.TransformContinuousIndexToPhysicalPoint(middle), there, atol=1e-3)
        assert new[i * scale, j * scale, k] == old[i + 3, j + 2, k]


def test_shifted_slices_each_keep_their_place(tmp_path):
    """A gantry tilt: the positions do not follow the normal."""
    positions = [np.array([5.0, -3.0, 10.0]) + np.array([0.4, 1.1, 2.5]) * at for at in range(4)]
    series(tmp_path / "in", 4, positions=positions, orientation=(1.0, 0, 0, 0, 1.0, 0), rows=9, columns=8)
    whole = open_image(tmp_path / "in")
    assert whole.stack.tilt_degrees > 10
    check_dicom(whole, stacked(whole), tmp_path / "out")


def test_multiframe_objects_move_every_frame(tmp_path):
    pixels = enhanced(tmp_path / "in.dcm", frames=5, order=[3, 0, 4, 1, 2])
    whole = open_image(tmp_path / "in.dcm")
    write(cropped(whole, Region(1, 2, 4, 3)), tmp_path / "out.dcm", 2, whole_name=False, multiframe=True)
    old, new = (pydicom.dcmread(tmp_path / name) for name in ("in.dcm", "out.dcm"))
    along, down = np.split(np.array(TILTED), 2)
    for a, b in zip(old.PerFrameFunctionalGroupsSequence, new.PerFrameFunctionalGroupsSequence, strict=True):
        before = np.array(a.PlanePositionSequence[0].ImagePositionPatient, float)
        after = np.array(b.PlanePositionSequence[0].ImagePositionPatient, float)
        np.testing.assert_allclose(after, before + along * 0.5 * (2 - 0.25) + down * 0.7 * (1 - 0.25), atol=1e-6)
        assert [float(v) for v in b.PixelMeasuresSequence[0].PixelSpacing] == [0.35, 0.25]
    assert np.array_equal(new.pixel_array[:, ::2, ::2], pixels[:, 1:5, 2:5])


def test_shutters_and_calibrated_regions_are_cut(tmp_path):
    ds = place(header(rows=64, columns=80), (0, 0, 0))
    ds.ShutterLeftVerticalEdge, ds.ShutterUpperHorizontalEdge = 12, 5

    def calibrated(left, right, top, bottom):
        region = Dataset()
        region.RegionSpatialFormat, region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 1, 3, 3
        region.RegionLocationMinX0, region.RegionLocationMaxX1 = left, right
        region.RegionLocationMinY0, region.RegionLocationMaxY1 = top, bottom
        region.ReferencePixelX0, region.ReferencePixelY0 = 7, 3
        region.PhysicalDeltaX, region.PhysicalDeltaY = 0.05, 0.07
        return region

    ds.SequenceOfUltrasoundRegions = [calibrated(4, 30, 16, 63), calibrated(0, 9, 0, 63), calibrated(60, 79, 0, 9)]
    save(ds, tmp_path / "in.dcm", np.arange(64 * 80, dtype=np.uint16).reshape(64, 80))
    whole = open_image(tmp_path / "in.dcm")
    write(cropped(whole, Region(top=8, left=10, height=40, width=50)), tmp_path / "out.dcm", 1, whole_name=False)
    new = pydicom.dcmread(tmp_path / "out.dcm")
    assert (new.ShutterLeftVerticalEdge, new.ShutterUpperHorizontalEdge) == (2, -3)
    (region,) = new.SequenceOfUltrasoundRegions
    assert (region.RegionLocationMinX0, region.RegionLocationMaxX1) == (0, 20)
    assert (region.RegionLocationMinY0, region.RegionLocationMaxY1) == (8, 39)
    # It counts from the corner of its region, which moved by six columns and by no row.
    assert (region.ReferencePixelX0, region.ReferencePixelY0) == (1, 3)
    assert (region.PhysicalDeltaX, region.PhysicalDeltaY) == (0.05, 0.07)
    write(cropped(whole, Region(top=0, left=40, height=64, width=10)), tmp_path / "none.dcm", 1, whole_name=False)
    assert "SequenceOfUltrasoundRegions" not in pydicom.dcmread(tmp_path / "none.dcm")


def test_a_part_of_dicom_becomes_nifti_in_its_place(tmp_path):
    series(tmp_path / "in", 3, rows=9, columns=8)
    whole = open_image(tmp_path / "in")
    target = write(cropped(whole, Region(2, 3, 5, 4)), tmp_path / "out.nii.gz", 2, whole_name=False)
    check_same_place(whole.volume, open_image(target).volume, Region(2, 3, 5, 4), 2)


def test_whole_slices_say_nothing_of_a_region(tmp_path):
    series(tmp_path / "in", 2)
    write(open_image(tmp_path / "in"), tmp_path / "out", whole_name=False)
    assert "region" not in pydicom.dcmread(sorted((tmp_path / "out").iterdir())[0]).DerivationDescription
