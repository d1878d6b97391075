"""NIfTI and Analyze in and out, against nibabel and SimpleITK."""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import os
import subprocess
import sys
import textwrap
import time
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError, RunError
from medsr_cli.formats import nifti
from medsr_cli.formats.contract import Derivation, ReadOptions
from medsr_cli.formats.limits import Limits
from medsr_cli.volume.volume import Volume

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "formats"
SHARED_FILES = sorted([*SHARED.glob("nifti/*"), *SHARED.glob("analyze/*")]) if SHARED.is_dir() else []
READABLE = [p for p in SHARED_FILES if p.name != "truncated.nii.gz"]
DERIVATION = Derivation("nearest", (1, 1), "test")

needs_shared = pytest.mark.skipif(not READABLE, reason="the shared data are not beside the checkout")


def read(path, axis="auto", **options):
    return nifti.open_reader(Path(path), ReadOptions(axis=axis, **options))


def nearest(n, new):
    return np.minimum(((np.arange(new) + 0.5) * n / new).astype(int), n - 1)


def enlarge(source, target, rows_by=1.0, columns_by=1.0, axis="auto", overwrite=True):
    """Repeat voxels: a method whose every value is known."""
    reader = read(source, axis)
    volume = reader.volume
    rows, columns = max(round(volume.rows * rows_by), 1), max(round(volume.columns * columns_by), 1)
    result = volume.enlarged(rows, columns)
    with nifti.open_writer(Path(target), reader, result, DERIVATION, overwrite=overwrite) as writer:
        for pixels in reader.slices():
            writer.write(pixels[:, nearest(volume.rows, rows)][:, :, nearest(volume.columns, columns)])
    assert writer.clipped == 0
    return reader, result


def stored(path):
    """Stored values by nibabel, without scaling."""
    image = nib.load(path)
    proxy = image.dataobj
    array = proxy.get_unscaled() if hasattr(proxy, "get_unscaled") else np.asarray(proxy)
    return np.asarray(array)


def as_numbers(array):
    """Structured colours with a last axis of channels."""
    return np.stack([array[f] for f in array.dtype.names], -1) if array.dtype.names else array


def raw_header(path):
    """The header as it is stored (nibabel's images reset some fields)."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rb") as file:
        block = file.read()
    cls = nib.Nifti2Header if block[4:7] in (b"n+2", b"ni2") else nib.Nifti1Header
    if block[344:347] == b"ni1":
        cls = nib.nifti1.Nifti1PairHeader
    if path.suffix == ".hdr" and block[344:346] != b"ni":
        cls = nib.AnalyzeHeader
    return cls.from_fileobj(io.BytesIO(block), check=False)


def corners(affine, shape):
    edges = itertools.product(*[(-0.5, n - 0.5) for n in (*shape, 1)[:3]])
    return np.array([affine[:3, :3] @ np.array(e) + affine[:3, 3] for e in edges])


# ------------------------------------------------------------------------------------------- made-up headers


@st.composite
def placements(draw):
    """How an image lies in space: codes, orientation, handedness, shear, and whether the two forms agree."""
    kind = draw(st.sampled_from(["sform", "qform", "both", "differ", "sheared", "none"]))
    rotation = Rotation.from_euler("xyz", [draw(st.floats(-180, 180)) for _ in range(3)], degrees=True).as_matrix()
    spacing = np.array([draw(st.floats(0.2, 5)) for _ in range(3)])
    flips = np.array([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing * flips
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    other = affine.copy()
    if kind == "sheared":
        shear = np.eye(3)
        shear[0, 1], shear[1, 2] = draw(st.floats(0.1, 0.4)), draw(st.floats(-0.4, -0.1))
        affine[:3, :3] = affine[:3, :3] @ shear
    if kind == "differ":
        turned = Rotation.from_euler("z", draw(st.floats(5, 60)), degrees=True).as_matrix()
        other[:3, :3] = turned @ other[:3, :3]
        other[:3, 3] += [5, -3, 2]
    return kind, affine, other


def make(path, kind, affine, other, *, shape=(5, 6, 4), version=1, order="<", units="mm"):
    rng = np.random.default_rng(3)
    data = rng.integers(-1000, 1000, shape).astype(np.int16)
    cls = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    header = cls.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    image = cls(data, None, header)
    image.header.set_xyzt_units(units, "sec")
    image.header.set_qform(other, code=0 if kind in ("sform", "none", "sheared") else 1)
    image.header.set_sform(None if kind in ("qform", "none") else affine, code=0 if kind in ("qform", "none") else 2)
    nib.save(image, path)
    return data


@given(
    placements(), st.sampled_from([(2.0, 2.0), (3.0, 3.0), (1.5, 2.5), (1.0, 4.0)]), st.sampled_from("012"),
    st.sampled_from([(1, "<", ".nii"), (1, ">", ".nii.gz"), (2, "<", ".nii.gz"), (2, ">", ".nii")]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_edges_align_whatever_the_header_says(tmp_path, placement, scale, axis, container):
    kind, affine, other = placement
    version, order, suffix = container
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    data = make(source, kind, affine, other, version=version, order=order)
    reader, result = enlarge(source, target, *scale, axis=axis)
    old, new = nib.load(source), nib.load(target)

    assert new.shape == result.array_shape
    assert new.header.endianness == order
    np.testing.assert_allclose(reader.volume.affine, old.affine, atol=1e-6)
    for form in ("get_sform", "get_qform"):
        (before, code), (after, new_code) = getattr(old.header, form)(True), getattr(new.header, form)(True)
        assert code == new_code
        if code:
            np.testing.assert_allclose(corners(after, new.shape), corners(before, old.shape), atol=1e-3)
    np.testing.assert_allclose(corners(new.affine, new.shape), corners(old.affine, old.shape), atol=1e-3)
    np.testing.assert_allclose(result.affine, new.affine, atol=1e-3)

    # Every voxel of the result has the value of the old voxel that its centre lies in.
    grid = np.stack(np.meshgrid(*map(np.arange, new.shape), indexing="ij"), -1).reshape(-1, 3)
    where = nib.affines.apply_affine(np.linalg.inv(old.affine) @ new.affine, grid)
    old_index = np.clip(np.rint(where - 1e-4).astype(int), 0, np.array(old.shape) - 1)
    unsure = (np.abs(where - np.rint(where)) > 0.499).any(1)
    np.testing.assert_array_equal(
        stored(target)[tuple(grid[~unsure].T)], data[tuple(old_index[~unsure].T)]
    )  # fmt: skip
    assert unsure.mean() < 0.9


@given(placements(), st.sampled_from([(2.0, 2.0), (1.5, 2.5)]), st.sampled_from("012"))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_simpleitk_sees_the_same_place(tmp_path, placement, scale, axis):
    sitk = pytest.importorskip("SimpleITK")
    kind, affine, other = placement
    if kind in ("sheared", "differ", "none"):
        return  # ITK straightens the first, picks one of the second, and invents the third
    source, target = tmp_path / "in.nii", tmp_path / "out.nii"
    make(source, kind, affine, other)
    enlarge(source, target, *scale, axis=axis)
    before, after = sitk.ReadImage(str(source)), sitk.ReadImage(str(target))
    for corner in itertools.product((0, 1), repeat=3):
        edges = [
            image.TransformContinuousIndexToPhysicalPoint(
                [c * n - 0.5 for c, n in zip(corner, image.GetSize(), strict=True)]
            )
            for image in (before, after)
        ]
        np.testing.assert_allclose(edges[0], edges[1], atol=1e-3)
    # ITK counts left and back positive: the reader's matrix says the same in its own convention.
    lps = np.diag([-1, -1, 1, 1]) @ read(target).volume.affine
    np.testing.assert_allclose(after.GetOrigin(), lps[:3, 3], atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), stored(target).T)


@given(placements(), st.sampled_from([1, 2]), st.sampled_from("<>"), st.sampled_from("012"))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_identity_returns_every_byte(tmp_path, placement, version, order, axis):
    source, target = tmp_path / "in.nii", tmp_path / "out.nii"
    make(source, *placement, version=version, order=order)
    enlarge(source, target, axis=axis)
    assert target.read_bytes() == source.read_bytes()


def test_differing_forms_are_said(tmp_path):
    affine, other = np.diag([1.0, 1, 1, 1]), np.diag([1.0, 1, 1, 1])
    other[0, 3] = 7
    make(tmp_path / "in.nii", "differ", affine, other)
    assert any("qform" in w for w in read(tmp_path / "in.nii").volume.warnings)
    make(tmp_path / "in.nii", "both", affine, affine)
    assert read(tmp_path / "in.nii").volume.warnings == ()
    make(tmp_path / "in.nii", "none", affine, affine)
    assert any("orientation" in w for w in read(tmp_path / "in.nii").volume.warnings)


@pytest.mark.parametrize(("units", "mm"), [("mm", 1.0), ("micron", 1e-3), ("meter", 1e3), ("unknown", 1.0)])
def test_units_become_millimetres_and_the_header_keeps_its_own(tmp_path, units, mm):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 5, 6, 7
    make(tmp_path / "in.nii", "both", affine, affine, units=units)
    reader, _ = enlarge(tmp_path / "in.nii", tmp_path / "out.nii", 2, 2)
    np.testing.assert_allclose(reader.volume.affine[:3], affine[:3] * mm)
    assert reader.volume.affine[3].tolist() == [0, 0, 0, 1]
    assert reader.volume.spacing_mm == pytest.approx((3 * mm, 2 * mm))
    assert reader.volume.slice_spacing_mm == pytest.approx(4 * mm)
    new = nib.load(tmp_path / "out.nii")
    assert new.header.get_xyzt_units() == (units, "sec")
    assert new.header.get_zooms() == (1.0, 1.5, 4.0)


# ------------------------------------------------------------------------------------------- the shared files


@needs_shared
@pytest.mark.parametrize("source", READABLE, ids=lambda p: p.name)
def test_identity_of_every_shared_file(tmp_path, source):
    suffix = ".nii.gz" if source.name.endswith(".nii.gz") else source.suffix
    target = tmp_path / f"out{suffix}"
    enlarge(source, target)
    image, copy = nib.load(source), nib.load(target)
    assert type(image) is type(copy)
    np.testing.assert_array_equal(stored(copy.get_filename()), stored(image.get_filename()))
    np.testing.assert_array_equal(copy.affine, image.affine)
    headers = [p.with_suffix(".hdr") if suffix in (".hdr", ".img") else p for p in (source, target)]
    old, new = (raw_header(p) for p in headers)
    assert old.endianness == new.endianness
    for field in old.keys():  # noqa: SIM118
        before, after = old[field], new[field]
        if before.dtype.kind == "S":
            # A text ends where it ends; bytes behind that are not part of it and are left behind.
            assert after.item() == before.item().split(b"\0")[0]
        else:
            assert before.tobytes() == after.tobytes(), field
    if hasattr(old, "extensions"):
        assert [(e.get_code(), e.content) for e in new.extensions] == [
            (e.get_code(), e.content) for e in old.extensions
        ]


@needs_shared
@pytest.mark.parametrize("axis", "012")
@pytest.mark.parametrize(
    "name",
    ["plain_int16.nii.gz", "functional_4d_anisotropic.nii", "rgba_52x77x4.nii.gz", "big_endian.nii",
     "example_nifti2.nii.gz", "pair.hdr", "sagittal_axis_order.nii.gz"],
)  # fmt: skip
def test_slices_reassemble_to_nibabels_array(tmp_path, name, axis):
    source = SHARED / "nifti" / name
    reader = read(source, axis)
    volume = reader.volume
    slices = list(reader.slices())
    assert len(slices) == volume.slices
    assert all(s.shape == (volume.channels, volume.rows, volume.columns) for s in slices)
    assert all(s.dtype == volume.dtype and s.dtype.isnative for s in slices)
    expected = as_numbers(stored(source))
    colour = volume.channels > 1
    expected = expected.reshape(*expected.shape[:3], -1, volume.channels) if colour else expected[..., np.newaxis]
    if not colour and expected.ndim == 4:
        expected = expected[..., np.newaxis]
    # (i, j, k, t, channels): slices run along the slice axis, volume after volume.
    rows, columns = volume.plane_axes
    ordered = np.transpose(expected, (3, volume.slice_axis, 4, rows, columns))
    np.testing.assert_array_equal(np.concatenate(ordered), np.stack(slices))
    np.testing.assert_array_equal(np.stack(list(reader.slices())), np.stack(slices))  # each call starts anew
    enlarge(source, tmp_path / "out.nii", axis=axis)
    np.testing.assert_array_equal(stored(tmp_path / "out.nii"), stored(source))


@needs_shared
@pytest.mark.parametrize("source", READABLE, ids=lambda p: p.name)
def test_volume_agrees_with_nibabel(source):
    reader, image = read(source), nib.load(source)
    volume = reader.volume
    mm = 1e-3 if "micron" in source.name else 1.0
    np.testing.assert_allclose(volume.affine[:3], image.affine[:3] * mm, atol=1e-6)
    assert volume.array_shape == image.shape
    assert volume.rows * volume.columns * volume.slices == np.prod(image.shape)
    assert volume.alpha == (volume.channels == 4)
    details = reader.details()
    assert all(isinstance(v, str | int | float | bool | None) for v in details.values())
    assert details["compression"] == ("gzip" if source.suffix == ".gz" else None)
    assert details["extensions"] == len(getattr(image.header, "extensions", []))


@needs_shared
@pytest.mark.parametrize("name", ["functional_4d_anisotropic.nii", "scl_slope_0p25_inter_m100.nii.gz"])
def test_enlarged_values_keep_their_meaning(tmp_path, name):
    source = SHARED / "nifti" / name
    enlarge(source, tmp_path / "out.nii.gz", 2, 3)
    old, new = nib.load(source), nib.load(tmp_path / "out.nii.gz")
    assert old.header.get_data_dtype() == new.header.get_data_dtype()
    np.testing.assert_array_equal(new.get_fdata(), np.repeat(np.repeat(old.get_fdata(), 3, 0), 2, 1))
    np.testing.assert_allclose(new.header.get_zooms()[2:], old.header.get_zooms()[2:])


@needs_shared
def test_anatomical_planes():
    plain, sagittal = SHARED / "nifti" / "plain_int16.nii.gz", SHARED / "nifti" / "sagittal_axis_order.nii.gz"
    for path in (plain, sagittal):
        affine = nib.load(path).affine
        names = nib.aff2axcodes(affine)
        for plane, ends in [("sagittal", "LR"), ("coronal", "PA"), ("axial", "IS")]:
            assert names[read(path, plane).volume.slice_axis] in ends


# ------------------------------------------------------------------------------------------- fields


def rich_image(path, shape=(6, 5, 4), dim_info=(0, 1, 2)):
    data = np.random.default_rng(1).integers(-9999, 9999, shape).astype(np.int16)
    image = nib.Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0]))
    image.set_qform(image.affine, 1)
    header = image.header
    header["descrip"] = b"described"
    header["aux_file"] = b"aux"
    header["intent_name"] = b"intent"
    header["intent_code"], header["intent_p1"] = 1002, 4.5
    header["cal_max"], header["cal_min"], header["toffset"] = 1500, -3, 12.5
    header["db_name"] = b"base"
    header.set_dim_info(*dim_info)
    header["slice_code"], header["slice_start"], header["slice_end"], header["slice_duration"] = 3, 0, 3, 0.5
    header.set_slope_inter(0.5, 7)
    for code, text in [(6, b"comment"), (44, b"{}"), (2, b"no DICOM at all"), (99, b"unknown\0\0")]:
        header.extensions.append(nib.nifti1.NiftiExtension(code, text))
    nib.save(image, path)
    return data


def test_fields_and_extensions_survive_enlarging(tmp_path):
    rich_image(tmp_path / "in.nii")
    enlarge(tmp_path / "in.nii", tmp_path / "out.nii", 2, 2)
    old, new = raw_header(tmp_path / "in.nii"), raw_header(tmp_path / "out.nii")
    changed = {"dim", "pixdim", "srow_x", "srow_y", "qoffset_x", "qoffset_y"}
    for field in old.keys():  # noqa: SIM118
        assert (old[field].tobytes() != new[field].tobytes()) == (field in changed), field
    assert new["dim"].tolist()[:4] == [3, 12, 10, 4]
    assert new["pixdim"].tolist()[1:4] == [0.5, 0.5, 2.0]
    assert [(e.get_code(), e.content) for e in new.extensions] == [(e.get_code(), e.content) for e in old.extensions]
    assert len(new.extensions) == 4
    assert nib.load(tmp_path / "out.nii").shape == (12, 10, 4)


def test_slice_timing_goes_when_its_axis_is_enlarged(tmp_path):
    rich_image(tmp_path / "in.nii", dim_info=(1, 2, 0))
    enlarge(tmp_path / "in.nii", tmp_path / "out.nii", 2, 2)
    new = raw_header(tmp_path / "out.nii")
    assert [float(new[f]) for f in ("slice_code", "slice_start", "slice_end", "slice_duration")] == [0, 0, 0, 0]
    assert new.get_dim_info() == (1, 2, 0)
    enlarge(tmp_path / "in.nii", tmp_path / "same.nii", 2, 1)  # rows only: its axis is as it was
    assert raw_header(tmp_path / "same.nii")["slice_end"] == 3


def test_stray_bytes_do_not_travel(tmp_path):
    rich_image(tmp_path / "in.nii")
    block = bytearray((tmp_path / "in.nii").read_bytes())
    name = b"DOE^JANE"
    block[148 + 20 : 148 + 20 + len(name)] = name  # behind the end of descrip
    block[349 : 349 + 3] = b"JAN"  # the unused bytes of the extension flag
    (tmp_path / "in.nii").write_bytes(block)
    enlarge(tmp_path / "in.nii", tmp_path / "out.nii")
    result = (tmp_path / "out.nii").read_bytes()
    assert name not in result
    assert b"JAN" not in result[:352]
    assert b"described" in result


def test_gzip_is_deterministic_and_names_nothing(tmp_path):
    rich_image(tmp_path / "in.nii")
    for name in ("one.nii.gz", "two.nii.gz"):
        enlarge(tmp_path / "in.nii", tmp_path / name, 2, 2)
        time.sleep(1.1 if name == "one.nii.gz" else 0)
    one, two = (tmp_path / "one.nii.gz").read_bytes(), (tmp_path / "two.nii.gz").read_bytes()
    assert one == two
    assert one[:4] == b"\x1f\x8b\x08\x00"  # no name, no comment
    assert one[4:8] == bytes(4)  # no time
    enlarge(tmp_path / "in.nii", tmp_path / "raw.nii", 2, 2)
    assert gzip.decompress(one) == (tmp_path / "raw.nii").read_bytes()


TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


@pytest.mark.parametrize("axis", "012")
@pytest.mark.parametrize("letters", TYPES)
@pytest.mark.parametrize("order", "<>")
def test_every_type_keeps_its_extremes(tmp_path, letters, order, axis):
    dtype = np.dtype(letters)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    data = np.resize(np.array([limits.min, limits.max, 0, 1], dtype), (3, 4, 5))
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype.newbyteorder(order))
    nib.Nifti1Image(data, np.eye(4), header).to_filename(tmp_path / "in.nii")
    reader, _ = enlarge(tmp_path / "in.nii", tmp_path / "out.nii.gz", 2, 1, axis=axis)
    assert reader.volume.dtype == dtype
    new = stored(tmp_path / "out.nii.gz")
    assert new.dtype.newbyteorder("=") == dtype
    rows = reader.volume.plane_axes[0]
    np.testing.assert_array_equal(new, np.repeat(data, 2, rows))


@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".img", ".hdr"), (".img.gz", ".hdr.gz"), (".HDR", ".IMG")])
def test_pairs(tmp_path, suffixes):
    given_name, other = suffixes
    rich_image(tmp_path / "in.nii")
    enlarge(tmp_path / "in.nii", tmp_path / f"out{given_name}", 2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.nii", f"out{given_name}", f"out{other}"])
    if given_name.islower():
        image = nib.load(tmp_path / f"out{given_name}")
        assert type(image) is nib.Nifti1Pair
        assert len(image.header.extensions) == 4
        np.testing.assert_array_equal(stored(tmp_path / f"out{given_name}")[::2, ::2], stored(tmp_path / "in.nii"))
    enlarge(tmp_path / f"out{other}", tmp_path / "back.nii")
    enlarge(tmp_path / "in.nii", tmp_path / "again.nii", 2, 2)
    assert (tmp_path / "back.nii").read_bytes() == (tmp_path / "again.nii").read_bytes()


def test_half_a_pair_is_refused(tmp_path):
    rich_image(tmp_path / "in.nii")
    enlarge(tmp_path / "in.nii", tmp_path / "out.hdr")
    (tmp_path / "out.img").unlink()
    with pytest.raises(InputRefused, match=r"out\.img is missing"):
        read(tmp_path / "out.hdr")
    with pytest.raises(InputRefused):
        read(tmp_path / "out.img")


def test_a_pair_replaced_is_never_a_mixture(tmp_path, monkeypatch):
    rich_image(tmp_path / "in.nii")
    enlarge(tmp_path / "in.nii", tmp_path / "out.hdr")
    real, seen = os.replace, []

    def replaced(old, new):
        seen.append((Path(new).name, (tmp_path / "out.hdr").exists()))
        real(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    enlarge(tmp_path / "in.nii", tmp_path / "out.hdr", 2, 2)
    assert seen == [("out.img", False), ("out.hdr", False)]
    with pytest.raises(ArgumentsError):
        enlarge(tmp_path / "in.nii", tmp_path / "out.hdr", overwrite=False)


def test_analyze_stays_analyze_and_claims_no_orientation(tmp_path):
    data = np.arange(4 * 6 * 3, dtype=np.int16).reshape(4, 6, 3)
    for order in "<>":
        header = nib.AnalyzeHeader(endianness=order)
        header.set_data_dtype(np.int16)
        header.set_zooms((2, 3, 4)) if header.set_data_shape(data.shape) is None else None
        header["patient_id"] = b"study 4"
        nib.AnalyzeImage(data, None, header).to_filename(tmp_path / "in.img")
        reader, _ = enlarge(tmp_path / "in.hdr", tmp_path / "out.hdr", 2, 2)
        assert any("left" in w for w in reader.volume.warnings)
        new, old = nib.AnalyzeImage.load(tmp_path / "out.img"), nib.AnalyzeImage.load(tmp_path / "in.img")
        assert new.header.endianness == order
        assert (tmp_path / "out.hdr").stat().st_size == 348
        assert new.header["patient_id"] == b"study 4"
        assert new.header.get_zooms() == (1.0, 1.5, 4.0)
        np.testing.assert_array_equal(np.asarray(new.dataobj), np.repeat(np.repeat(data, 2, 0), 2, 1))
        np.testing.assert_allclose(corners(new.affine, new.shape), corners(old.affine, old.shape), atol=1e-4)
        enlarge(tmp_path / "in.hdr", tmp_path / "single.nii", 2, 2)
        single = nib.load(tmp_path / "single.nii")
        assert (single.header["sform_code"], single.header["qform_code"]) == (0, 0)
        np.testing.assert_allclose(single.affine, new.affine)


def test_spm_origin_follows_to_the_nearest_voxel(tmp_path):
    header = nib.Spm99AnalyzeImage.header_class()
    header.set_data_dtype(np.int16)
    header.set_data_shape((9, 9, 5))
    header["origin"][:3] = 5, 5, 3
    nib.Spm99AnalyzeImage(np.zeros((9, 9, 5), np.int16), None, header).to_filename(tmp_path / "in.img")
    block = bytearray((tmp_path / "in.hdr").read_bytes())
    block[253:259] = np.array([5, 5, 3], "<i2").tobytes()
    (tmp_path / "in.hdr").write_bytes(block)
    reader, _ = enlarge(tmp_path / "in.hdr", tmp_path / "out.hdr", 3, 3)
    assert any("origin" in w for w in reader.volume.warnings)
    found = nib.Spm99AnalyzeHeader.from_fileobj((tmp_path / "out.hdr").open("rb"))["origin"][:3].tolist()
    assert found == [14, 14, 3]  # the middle voxel of 9 is the middle voxel of 27


def test_two_dimensions(tmp_path):
    nib.Nifti1Image(np.arange(12, dtype=np.int16).reshape(3, 4), np.diag([1, 2, 1, 1.0])).to_filename(
        tmp_path / "in.nii"
    )
    block = bytearray((tmp_path / "in.nii").read_bytes())
    block[76 + 12 : 76 + 16] = bytes(4)  # pixdim[3] = 0, as many programs leave it
    for row in range(3):
        block[280 + 16 * row + 8 : 280 + 16 * row + 12] = bytes(4)  # and no third column either
    (tmp_path / "in.nii").write_bytes(block)
    reader, _ = enlarge(tmp_path / "in.nii", tmp_path / "out.nii", 2, 2)
    assert reader.volume.slices == 1
    assert reader.volume.spacing_mm == (2, 1)
    assert nib.load(tmp_path / "out.nii").shape == (6, 8)
    with pytest.raises(InputRefused, match="two axes"):
        read(tmp_path / "in.nii", "0")


def test_too_long_for_nifti1_becomes_nifti2(tmp_path):
    rich_image(tmp_path / "in.nii", shape=(20000, 3, 2))
    enlarge(tmp_path / "in.nii", tmp_path / "out.nii.gz", 1, 2)
    new = nib.load(tmp_path / "out.nii.gz")
    assert type(new) is nib.Nifti2Image
    assert new.shape == (40000, 3, 2)
    assert new.header["descrip"] == b"described"
    assert new.header["cal_max"] == 1500
    assert len(new.header.extensions) == 4
    np.testing.assert_array_equal(stored(tmp_path / "out.nii.gz")[::2], stored(tmp_path / "in.nii"))


# ------------------------------------------------------------------------------------------- from other formats


class Other:
    """A reader of another format."""

    def __init__(self, volume):
        self.volume = volume
        self.path = Path("other.png")

    def slices(self):
        raise NotImplementedError

    def details(self):
        return {}


def convert(target, volume, slices):
    with nifti.open_writer(target, Other(volume), volume, DERIVATION, overwrite=True) as writer:
        for pixels in slices:
            writer.write(pixels)
    return nib.load(target)


@given(placements(), st.sampled_from("012"))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_place_in_the_patient_comes_along(tmp_path, placement, axis):
    kind, affine, _ = placement
    source = tmp_path / "in.nii"
    data = make(source, "sform", affine, affine)
    reader = read(source, axis)
    image = convert(tmp_path / "out.nii.gz", reader.volume, reader.slices())
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)
    assert image.header["sform_code"] == 1
    assert image.header["qform_code"] == (0 if kind == "sheared" else 1)
    if kind != "sheared":
        np.testing.assert_allclose(image.header.get_qform(), affine, atol=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(stored(tmp_path / "out.nii.gz"), data)


def test_pictures_without_a_place(tmp_path):
    rng = np.random.default_rng(0)
    for channels in (1, 3, 4):
        pixels = rng.integers(0, 256, (channels, 5, 7), np.uint8)
        volume = Volume(
            "png", 5, 7, 1, np.dtype("u1"), channels, alpha=channels == 4, array_shape=(5, 7), plane_axes=(0, 1)
        )
        image = convert(tmp_path / "out.nii", volume, [pixels])
        assert image.shape == (7, 5, 1)
        assert (image.header["sform_code"], image.header["qform_code"]) == (0, 0)
        found = as_numbers(np.asarray(image.dataobj)).reshape(7, 5, channels)
        np.testing.assert_array_equal(found, pixels.transpose(2, 1, 0))
    volume = Volume("png", 5, 7, 2, np.dtype("u2"), spacing_mm=(0.5, 0.25), slice_spacing_mm=3.0)
    image = convert(tmp_path / "out.nii", volume, [np.zeros((1, 5, 7), np.uint16)] * 2)
    assert image.header.get_zooms() == (0.25, 0.5, 3.0)


def test_rows_and_columns_in_the_other_order(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = Volume(
        "nrrd", 2, 3, 4, np.dtype("i2"), array_shape=(2, 3, 4), slice_axis=2, plane_axes=(0, 1), affine=np.eye(4)
    )
    convert(tmp_path / "out.nii", volume, [np.ascontiguousarray(array[:, :, k])[None] for k in range(4)])
    np.testing.assert_array_equal(stored(tmp_path / "out.nii"), array)


@pytest.mark.parametrize(("dtype", "channels"), [("f2", 1), ("u2", 3), ("u1", 2), ("?", 1)])
def test_what_nifti_cannot_hold_is_refused(tmp_path, dtype, channels):
    volume = Volume("png", 5, 7, 1, np.dtype(dtype), channels)
    with pytest.raises(InputRefused, match="NIfTI cannot hold"):
        convert(tmp_path / "out.nii", volume, [])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- refusals


def plain(path, **fields):
    """A small file whose header fields are then overwritten."""
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(data.shape)
    header.set_sform(np.eye(4), 1)
    header.set_qform(np.eye(4), 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1, 0, 352
    for field, value in fields.items():
        if isinstance(value, dict):
            whole = header[field].copy()
            for index, item in value.items():
                whole[index] = item
            header[field] = whole
        else:
            header[field] = value
    path.write_bytes(header.binaryblock + bytes(4) + data.tobytes("F"))
    return path


def refuse(path, match=None):
    start = time.perf_counter()
    with pytest.raises(InputRefused, match=match) as caught:
        for _ in read(path).slices():
            pass
    assert time.perf_counter() - start < 1
    return caught.value


NAN, INF = float("nan"), float("inf")
BAD_FIELDS = {
    "nan slope": ({"scl_slope": NAN}, "scl_slope"),
    "infinite slope": ({"scl_slope": INF}, "scl_slope"),
    "nan intercept": ({"scl_inter": NAN}, "scl_slope"),
    "zero spacing": ({"pixdim": {1: 0}}, "spacing"),
    "nan spacing": ({"pixdim": {2: NAN}}, "spacing"),
    "negative spacing": ({"pixdim": {3: -1}}, "spacing"),
    "infinite spacing": ({"pixdim": {3: INF}}, "spacing"),
    "nan sform": ({"srow_x": {0: NAN}}, "orientation"),
    "infinite offset": ({"srow_y": {3: INF}}, "orientation"),
    "zero sform": ({"srow_x": np.zeros(4), "srow_y": np.zeros(4), "srow_z": np.zeros(4)}, "orientation"),
    "flat sform": ({"srow_y": {0: 1, 1: 0}}, "orientation"),
    "broken quaternion": ({"sform_code": 0, "quatern_b": 3.0}, "orientation"),
    "nan quaternion": ({"sform_code": 0, "quatern_b": NAN}, "orientation"),
    "complex": ({"datatype": 32, "bitpix": 64}, "complex"),
    "unknown type": ({"datatype": 77}, "data type"),
    "bits": ({"datatype": 1}, "data type"),
    "longdouble": ({"datatype": 1536}, "data type"),
    "no axes": ({"dim": {0: 0}}, "header"),
    "nine axes": ({"dim": {0: 9}}, "axes"),
    "one axis": ({"dim": {0: 1}}, "one axis"),
    "empty axis": ({"dim": {2: 0}}, "without voxels"),
    "negative axis": ({"dim": {1: -1}}, "without voxels"),
    "vectors": ({"dim": {0: 5, 3: 1, 4: 1, 5: 5}}, "vector"),
    "vectors in time": ({"dim": {0: 5, 3: 1, 4: 5, 5: 5}}, "vector"),
    "nan data offset": ({"vox_offset": NAN}, "begin"),
    "huge data offset": ({"vox_offset": 3e38}, "begin"),
    "data within the header": ({"vox_offset": 100}, "begin"),
    "extensions of a gigabyte": ({"vox_offset": 2.0**30}, "extensions"),
    "pair": ({"magic": b"ni1"}, "pair|single"),
    "analyze in one file": ({"magic": b""}, "not NIfTI"),
    "one slice too many": ({"dim": {3: 6}}, "cut short"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gz"])
def test_headers_that_cannot_be_true(tmp_path, case, packed):
    fields, words = BAD_FIELDS[case]
    path = plain(tmp_path / "in.nii", **fields)
    if packed:
        data = path.read_bytes()
        path = tmp_path / "in.nii.gz"
        path.write_bytes(gzip.compress(data))
    error = refuse(path, words)
    assert path.name in str(error)


def test_slope_zero_means_none(tmp_path):
    reader = read(plain(tmp_path / "in.nii", scl_slope=0, scl_inter=NAN))
    assert reader.details()["slope"] is None
    assert sum(1 for _ in reader.slices()) == 5


def test_offset_zero_is_taken_for_the_only_place_there_is(tmp_path):
    reader = read(plain(tmp_path / "in.nii", vox_offset=0))
    assert next(reader.slices())[0, 0].tolist() == [0, 20, 40]


@pytest.mark.parametrize("content", [b"", b"text, not an image\n" * 50, b"\0" * 400, b"\x5c\x01\0\0", b"\x1f\x8b\x08"])
@pytest.mark.parametrize("name", ["in.nii", "in.nii.gz", "in.hdr", "in.img"])
def test_files_that_are_something_else(tmp_path, content, name):
    for suffix in (".hdr", ".img"):
        (tmp_path / f"in{suffix}").write_bytes(content)
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    refuse(tmp_path / "missing.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    refuse(tmp_path / "folder.nii")


@pytest.mark.parametrize("packed", [False, True])
def test_truncation_anywhere(tmp_path, packed):
    whole = plain(tmp_path / "in.nii").read_bytes()
    whole = gzip.compress(whole) if packed else whole
    path = tmp_path / ("cut.nii.gz" if packed else "cut.nii")
    for length in [*range(0, len(whole) - 8, 7), len(whole) - 9 if packed else len(whole) - 1]:
        path.write_bytes(whole[:length])
        refuse(path)


def test_a_wrong_checksum_is_noticed(tmp_path):
    whole = bytearray(gzip.compress(plain(tmp_path / "in.nii").read_bytes()))
    whole[-6] ^= 1
    (tmp_path / "in.nii.gz").write_bytes(whole)
    refuse(tmp_path / "in.nii.gz", "damaged|short")


def test_a_wrong_checksum_behind_a_large_volume_is_noticed(tmp_path):
    rich_image(tmp_path / "in.nii", shape=(256, 256, 20))
    whole = bytearray(gzip.compress((tmp_path / "in.nii").read_bytes(), 1))
    whole[-6] ^= 1
    (tmp_path / "in.nii.gz").write_bytes(whole)
    refuse(tmp_path / "in.nii.gz", "damaged|short")


@needs_shared
def test_the_shared_truncated_file():
    refuse(SHARED / "nifti" / "truncated.nii.gz", "short|damaged")


@pytest.mark.parametrize("packed", [False, True])
def test_forty_gigabytes_in_352_bytes(tmp_path, packed):
    header = plain(tmp_path / "in.nii", dim={1: 5000, 2: 5000, 3: 800}).read_bytes()[:352]
    path = tmp_path / ("claim.nii.gz" if packed else "claim.nii")
    path.write_bytes(gzip.compress(header) if packed else header)
    tracemalloc.start()
    try:
        with pytest.raises(InputRefused, match="claims"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    refuse(path)


@pytest.mark.parametrize("dim", [{1: 30000, 2: 30000, 3: 30000}, {1: 30000, 2: 30000, 3: 1}, {0: 4, 3: 500, 4: 500}])
def test_limits(tmp_path, dim):
    path = plain(tmp_path / "in.nii", dim=dim)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a file with a hole, as large as it claims to be
    with pytest.raises(InputRefused, match=r"more than is allowed|claims"):
        read(path, limits=Limits(slices=100_000, voxels=1 << 32, decoded_bytes=1 << 34))


def test_planes_are_bounded_even_if_slices_are_thin(tmp_path):
    path = plain(tmp_path / "in.nii", dim={1: 30000, 2: 30000, 3: 1})
    with path.open("r+b") as file:
        file.truncate(1 << 31)
    with pytest.raises(InputRefused, match="allowed"):
        read(path, "0")


def test_a_bomb_is_not_unpacked_beyond_its_claim(tmp_path):
    payload = plain(tmp_path / "in.nii").read_bytes() + bytes(64 << 20)
    packed = gzip.compress(payload, 1)
    # Damaged far behind the claimed end: whoever reads that far fails.
    (tmp_path / "bomb.nii.gz").write_bytes(packed[: len(packed) * 3 // 4])
    start = time.perf_counter()
    assert sum(1 for _ in read(tmp_path / "bomb.nii.gz").slices()) == 5
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("size", [-8, 0, 7, 8, 17, 1 << 30, -(1 << 31)])
def test_odd_extension_sizes(tmp_path, size):
    path = plain(tmp_path / "in.nii", vox_offset=384)
    whole = path.read_bytes()
    for order in ("<", ">"):
        length = np.array([size, 6], f"{order}i4").tobytes()
        path.write_bytes(whole[:348] + b"\1\0\0\0" + length + b"x" * 24 + whole[352:])
        try:
            reader = read(path)
        except InputRefused as error:
            sentence = error.sentence
            assert "extension" in sentence
            continue
        assert size in (8, 17)
        assert next(reader.slices())[0, 0].tolist() == [0, 20, 40]
        break


def test_flipped_bytes_never_escape(tmp_path):
    rich_image(tmp_path / "in.nii")
    whole = (tmp_path / "in.nii").read_bytes()
    rng = np.random.default_rng(20)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(250):
            mutant = bytearray(whole)
            for position in rng.integers(0, 480, rng.integers(1, 6)):
                mutant[position] = rng.integers(0, 256)
            (tmp_path / "mutant.nii").write_bytes(mutant)
            try:
                enlarge(tmp_path / "mutant.nii", tmp_path / "out.nii", 2, 2)
            except MedsrError as error:
                refused += 1
                assert error.exit_code == InputRefused.exit_code  # noqa: PT017 - others must not pass either
    assert 20 < refused < 230


def test_unknown_axes(tmp_path):
    with pytest.raises(ArgumentsError, match="axis"):
        read(plain(tmp_path / "in.nii"), "diagonal")


# ------------------------------------------------------------------------------------------- writing


def write_all(target, reader, slices):
    with nifti.open_writer(target, reader, reader.volume, DERIVATION, overwrite=False) as writer:
        for pixels in slices:
            writer.write(pixels)


def test_too_few_and_too_many_and_other_slices(tmp_path):
    rich_image(tmp_path / "in.nii")
    reader = read(tmp_path / "in.nii")
    slices = list(reader.slices())
    for wrong in (slices[:-1], [*slices, slices[0]], [s[:, 1:] for s in slices], [s.astype(np.int32) for s in slices]):
        with pytest.raises(RunError):
            write_all(tmp_path / "out.nii.gz", reader, wrong)
        assert [p.name for p in tmp_path.iterdir()] == ["in.nii"]


def test_other_names_are_refused(tmp_path):
    rich_image(tmp_path / "in.nii")
    with pytest.raises(ArgumentsError, match="not a name"):
        enlarge(tmp_path / "in.nii", tmp_path / "out.mgz")


def test_an_existing_result_is_kept(tmp_path):
    rich_image(tmp_path / "in.nii")
    (tmp_path / "out.nii").write_bytes(b"old")
    with pytest.raises(ArgumentsError):
        enlarge(tmp_path / "in.nii", tmp_path / "out.nii", overwrite=False)
    assert (tmp_path / "out.nii").read_bytes() == b"old"


class Corrupting(io.FileIO):
    """A disk that writes something else than it was given."""

    def write(self, data):
        block = bytearray(data)
        if len(block) > self.skip:
            block[self.skip] ^= 0xFF
        return super().write(block)


@pytest.mark.parametrize(("name", "skip"), [("out.nii", 42), ("out.nii", 350), ("out.nii.gz", 60), ("out.hdr", 42)])
def test_what_cannot_be_read_back_is_not_kept(tmp_path, monkeypatch, name, skip):
    rich_image(tmp_path / "in.nii")
    real = Path.open
    monkeypatch.setattr(Corrupting, "skip", skip, raising=False)

    def opened(path, mode="r", *args, **kwargs):
        return Corrupting(path, "r+") if mode == "r+b" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(RunError, match="read back"):
        enlarge(tmp_path / "in.nii", tmp_path / name, 2, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["in.nii"]


class Losing(io.FileIO):
    """A disk that loses the last byte of everything large."""

    def write(self, data):
        super().write(data[:-1] if len(data) > 400 else data)
        return len(data)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "out.img", "out.hdr.gz"])
def test_lost_bytes_are_noticed(tmp_path, monkeypatch, name):
    rich_image(tmp_path / "in.nii", shape=(30, 30, 4))
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        return Losing(path, "r+") if mode == "r+b" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(RunError, match="read back"):
        enlarge(tmp_path / "in.nii", tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["in.nii"]


class Filling(io.FileIO):
    left = 0

    def write(self, data):
        Filling.left -= 1
        if Filling.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "out.img"])
def test_a_full_disk_at_every_write(tmp_path, monkeypatch, name):
    source = tmp_path / "in" / "in.nii"
    source.parent.mkdir()
    rich_image(source, shape=(120, 90, 6))
    before = source.read_bytes()
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        return io.BufferedRandom(Filling(path, "r+"), 1024) if mode == "r+b" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    folder = tmp_path / "out"
    for room in range(200):
        Filling.left = room
        try:
            enlarge(source, folder / name, 2, 2)
        except RunError as error:
            sentence = error.sentence
            assert "full" in sentence
            assert list(folder.iterdir()) == []
        else:
            break
    assert room >= 2
    assert read(folder / name).volume.rows == 180
    assert source.read_bytes() == before


# ------------------------------------------------------------------------------------------- memory


MEMORY = textwrap.dedent(
    """
    import re, sys
    from pathlib import Path
    from medsr_cli.formats import nifti
    from medsr_cli.formats.contract import Derivation, ReadOptions
    source, target, axis = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    reader = nifti.open_reader(source, ReadOptions(axis=axis))
    result = reader.volume
    with nifti.open_writer(target, reader, result, Derivation("x", (1, 1), "t"), overwrite=True) as writer:
        for pixels in reader.slices():
            writer.write(pixels)
    # Not ru_maxrss: a process inherits that from the one which started it.
    peak_kib = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)
    print(result.slices, int(peak_kib) // 1024)
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("axis", "suffix"), [(2, ".nii.gz"), (0, ".nii")])
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path, axis, suffix):
    peaks = {}
    for slices in (60, 600):
        shape = [256, 256, 256]
        shape[axis] = slices
        source = plain(tmp_path / "in.nii", dim={i + 1: n for i, n in enumerate(shape)}, datatype=16, bitpix=32)
        with source.open("r+b") as file:
            file.truncate(352 + 4 * int(np.prod(shape)))  # 157 MB for 600 slices: holding them would be seen
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(source), str(tmp_path / f"out{suffix}"), str(axis)],
            capture_output=True, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
        count, peaks[slices] = (int(word) for word in done.stdout.split())
        assert count == slices
    assert peaks[600] <= peaks[60] + 64
