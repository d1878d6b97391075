"""MGH, MINC, AFNI and PAR/REC against nibabel's own reading of the same files."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.freesurfer.mghformat import MGHHeader

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.formats import create_image, open_image
from medsr_cli.formats.contract import Derivation, ReadOptions

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
OTHER = SHARED / "data" / "formats" / "other"
needs_fixtures = pytest.mark.skipif(not OTHER.is_dir(), reason="the shared fixtures are not beside this checkout")

MADE_BY = Derivation("nearest", (2.0, 2.0), "medsr test")


def doubled(source, target: Path, **more) -> None:
    before = source.volume
    with create_image(target, source, before.enlarged(2 * before.rows, 2 * before.columns), MADE_BY, **more) as writer:
        for page in source.slices():
            writer.write(np.repeat(np.repeat(page, 2, 1), 2, 2))


def as_array(source) -> np.ndarray:
    """The slices put back as (i, j, k[, volume])."""
    volume = source.volume
    pages = np.stack([page[0] for page in source.slices()])
    count = volume.array_shape[volume.slice_axis]
    stack = pages.reshape(-1, count, volume.rows, volume.columns)  # volume, n, rows, columns
    axes = [volume.slice_axis, *volume.plane_axes]
    moved = np.moveaxis(stack, [1, 2, 3, 0], [*axes, 3])
    return moved if len(volume.array_shape) == 4 else moved[..., 0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    matrix=st.lists(st.floats(-3, 3), min_size=12, max_size=12).filter(
        lambda v: abs(np.linalg.det(np.reshape(v, (3, 4))[:, :3])) > 0.3
    ),
    axis=st.sampled_from("012"),
    volumes=st.sampled_from([1, 3]),
)
def test_mgh_of_any_shear_and_type(dtype, suffix, matrix, axis, volumes, tmp_path):
    shape = (4, 5, 6, volumes)[: 3 if volumes == 1 else 4]
    array = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    affine = np.vstack([np.reshape(matrix, (3, 4)), [0, 0, 0, 1]])
    path, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    nibabel.MGHImage(array, affine).to_filename(path)
    source = open_image(path, ReadOptions(axis=axis))
    np.testing.assert_array_equal(as_array(source), array)
    np.testing.assert_allclose(source.volume.affine, nibabel.load(path).affine, atol=1e-4)

    doubled(source, target, overwrite=True)
    result = nibabel.load(target)
    assert result.get_data_dtype().newbyteorder("=") == array.dtype
    expected = array
    for plane_axis in source.volume.plane_axes:
        expected = np.repeat(expected, 2, plane_axis)
    np.testing.assert_array_equal(np.asarray(result.dataobj), expected)
    edges = np.array([[x, y, z, 0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    before = (edges * [4, 5, 6, 0] - [0.5, 0.5, 0.5, -1]) @ affine.T
    after = (edges * [*result.shape[:3], 0] - [0.5, 0.5, 0.5, -1]) @ result.affine.T
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_scan_parameters_and_tags_behind_the_voxels_stay(suffix, tmp_path):
    header = MGHHeader()
    header["tr"], header["te"], header["flip_angle"] = 2000, 3.5, 0.2
    nibabel.MGHImage(np.ones((4, 5, 6), np.int16), np.eye(4), header).to_filename(tmp_path / "plain.mgh")
    tags = b"\0\0\0\x03\0\0\0\0\0\0\0\x0frecon-all -all\0"
    data = (tmp_path / "plain.mgh").read_bytes() + tags
    (tmp_path / f"in{suffix}").write_bytes(gzip.compress(data) if suffix == ".mgz" else data)
    doubled(open_image(tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}")
    result = (tmp_path / f"out{suffix}").read_bytes()
    assert (gzip.decompress(result) if suffix == ".mgz" else result).endswith(tags)
    again = nibabel.load(tmp_path / f"out{suffix}").header
    assert (again["tr"], again["te"], again["flip_angle"]) == (2000, np.float32(3.5), np.float32(0.2))


def test_mgh_says_what_it_cannot_hold(tmp_path):
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float64), np.eye(4)).to_filename(tmp_path / "in.nii")
    source = open_image(tmp_path / "in.nii")
    with pytest.raises(ArgumentsError, match="float64"):
        doubled(source, tmp_path / "out.mgz")


def test_mgh_cut_short_or_too_large_is_refused(tmp_path):
    nibabel.MGHImage(np.ones((4, 5, 6), np.int16), np.eye(4)).to_filename(tmp_path / "in.mgh")
    whole = (tmp_path / "in.mgh").read_bytes()
    (tmp_path / "short.mgh").write_bytes(whole[:400])
    with pytest.raises(InputRefused, match="cut short"):
        open_image(tmp_path / "short.mgh")
    (tmp_path / "short.mgz").write_bytes(gzip.compress(whole[:400]))
    with pytest.raises(InputRefused, match="cut short"):
        list(open_image(tmp_path / "short.mgz").slices())
    huge = whole[:4] + (30_000).to_bytes(4, "big") * 3 + whole[16:]
    (tmp_path / "huge.mgh").write_bytes(huge)
    with pytest.raises(InputRefused, match="more than is allowed"):
        open_image(tmp_path / "huge.mgh")


@needs_fixtures
@pytest.mark.parametrize("axis", ["auto", "0", "1", "2"])
@pytest.mark.parametrize("name", ["example4d+orig.HEAD", "phantom_EPI.PAR", "phantom_varscale.PAR", "tiny_minc1.mnc"])
def test_read_only_formats_have_nibabels_values_and_places(name, axis, tmp_path):
    image = nibabel.load(OTHER / name)
    values, affine = np.asarray(image.dataobj), image.affine
    if name.endswith(".mnc"):  # MINC counts its slowest axis first
        values, affine = values.T, affine[:, [2, 1, 0, 3]]
    source = open_image(OTHER / name, ReadOptions(axis=axis))
    assert source.volume.array_shape == values.shape
    np.testing.assert_allclose(source.volume.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(as_array(source), values.astype(source.volume.dtype))
    assert source.volume.dtype == (np.int16 if "example4d" in name else np.float32)

    doubled(source, tmp_path / "out.nii.gz")
    result = nibabel.load(tmp_path / "out.nii.gz")
    expected = values.astype(source.volume.dtype)
    for plane_axis in source.volume.plane_axes:
        expected = np.repeat(expected, 2, plane_axis)
    # The NIfTI writer may order the axes anew: compare values by place.
    rng = np.random.default_rng(0)
    wanted = source.volume.enlarged(2 * source.volume.rows, 2 * source.volume.columns).affine
    for index in rng.integers(0, expected.shape[:3], (20, 3)):
        place = wanted @ [*index, 1]
        there = np.rint(np.linalg.solve(result.affine, place))[:3].astype(int)
        np.testing.assert_allclose(result.affine @ [*there, 1], place, atol=1e-3)
        np.testing.assert_array_equal(np.asarray(result.dataobj)[tuple(there)], expected[tuple(index)])


@needs_fixtures
@pytest.mark.parametrize("suffix", [".mnc", ".HEAD", ".PAR"])
def test_read_only_formats_say_so(suffix, tmp_path):
    path = next(OTHER.glob(f"*{suffix}"))
    source = open_image(path)
    assert "read but not written" in source.volume.warnings[0]
    with pytest.raises(ArgumentsError, match="only read"):
        doubled(source, tmp_path / f"out{suffix}")


@needs_fixtures
def test_a_pair_without_its_other_half_is_refused(tmp_path):
    for name in ("phantom_EPI.PAR", "example4d+orig.HEAD"):
        (tmp_path / name).write_bytes((OTHER / name).read_bytes())
        with pytest.raises(InputRefused, match=r"does not exist|lacks a file"):
            open_image(tmp_path / name)
    (tmp_path / "phantom_EPI.REC").write_bytes((OTHER / "phantom_EPI.REC").read_bytes()[:-1])
    with pytest.raises(InputRefused, match="cut short"):
        open_image(tmp_path / "phantom_EPI.PAR")


def test_minc2_without_h5py_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "in.mnc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    with pytest.raises(InputRefused, match="h5py"):
        open_image(tmp_path / "in.mnc")
