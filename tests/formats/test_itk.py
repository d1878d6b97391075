"""NRRD and MetaImage against ITK: what ITK writes is read as ITK reads it, and ITK reads what is written here."""

from __future__ import annotations

import bz2
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsr_cli.errors import ArgumentsError, InputRefused, RunError
from medsr_cli.formats import create_image, open_image
from medsr_cli.formats.contract import Derivation, ReadOptions
from medsr_cli.formats.limits import Limits

MADE_BY = Derivation("rdst-e", (2.0, 2.0), "medsr test", "rdst-e-x2", "0" * 64, "cubic")
SUFFIXES = [".nrrd", ".mha"]
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def voxels(shape=(4, 5, 6), dtype="int16", seed=0) -> np.ndarray:
    """(k, j, i), or with channels last."""
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def written_by_itk(path: Path, array: np.ndarray, *, vector=False, packed=True, **place) -> sitk.Image:
    image = sitk.GetImageFromArray(array, isVector=vector)
    for name, value in place.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path), packed)
    return image


def doubled(source, target: Path, rows=2, columns=2, **more) -> None:
    before = source.volume
    wanted = before.enlarged(rows * before.rows, columns * before.columns)
    with create_image(target, source, wanted, MADE_BY, **more) as writer:
        for page in source.slices():
            writer.write(np.repeat(np.repeat(page, rows, 1), columns, 2))


def corners_lps(volume) -> np.ndarray:
    shape = np.array((*volume.array_shape, 1)[:3])
    ends = np.array([[i, j, k] for k in (0, 1) for j in (0, 1) for i in (0, 1)]) * shape - 0.5
    return (ends @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * [-1, -1, 1]


def itk_corners(image: sitk.Image) -> np.ndarray:
    i, j, k = (size - 0.5 for size in image.GetSize())
    ends = [(x, y, z) for z in (-0.5, k) for y in (-0.5, j) for x in (-0.5, i)]
    return np.array([image.TransformContinuousIndexToPhysicalPoint(end) for end in ends])


unit = st.floats(-1, 1).map(lambda value: round(value, 3))
quaternions = st.tuples(unit, unit, unit, unit).filter(lambda q: np.linalg.norm(q) > 0.1)
spacings = st.tuples(*[st.floats(0.05, 9).map(lambda value: round(value, 4))] * 3)
origins = st.tuples(*[st.floats(-500, 500).map(lambda value: round(value, 4))] * 3)


def rotation(q, mirrored: bool) -> np.ndarray:
    w, x, y, z = np.array(q) / np.linalg.norm(q)
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    return matrix * [1, 1, -1] if mirrored else matrix


@pytest.mark.parametrize("suffix", SUFFIXES)
@few
@given(q=quaternions, mirrored=st.booleans(), spacing=spacings, origin=origins, axis=st.sampled_from("012"))
def test_oblique_images_lie_where_itk_says(suffix, q, mirrored, spacing, origin, axis, tmp_path):
    path, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    array = voxels()
    image = written_by_itk(
        path, array, Direction=rotation(q, mirrored).ravel().tolist(), Spacing=spacing, Origin=origin
    )
    source = open_image(path, ReadOptions(axis=axis))
    np.testing.assert_allclose(corners_lps(source.volume), itk_corners(image), atol=1e-3)

    doubled(source, target, rows=2, columns=3, overwrite=True)
    result = sitk.ReadImage(str(target))
    np.testing.assert_allclose(itk_corners(result), itk_corners(image), atol=1e-3)
    row_axis, column_axis = source.volume.plane_axes
    expected = np.repeat(np.repeat(array, 2, 2 - row_axis), 3, 2 - column_axis)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(result), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
def test_every_type_keeps_its_type_and_values(suffix, packed, dtype, tmp_path):
    array = voxels(dtype=dtype)
    array[0, 0, 0] = np.iinfo(dtype).max if array.dtype.kind in "iu" else np.nan
    written_by_itk(tmp_path / f"in{suffix}", array, packed=packed)
    source = open_image(tmp_path / f"in{suffix}")
    np.testing.assert_array_equal(np.concatenate(list(source.slices())), array)
    doubled(source, tmp_path / f"out{suffix}", 1, 1)
    again = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"out{suffix}")))
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("axis", ["0", "1", "2"])
def test_colours_are_channels(suffix, channels, axis, tmp_path):
    array = voxels((4, 5, 6, channels), "uint8")
    written_by_itk(tmp_path / f"in{suffix}", array, vector=True)
    source = open_image(tmp_path / f"in{suffix}", ReadOptions(axis=axis))
    assert (source.volume.channels, source.volume.alpha) == (channels, channels == 4)
    doubled(source, tmp_path / f"out{suffix}")
    again = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"out{suffix}")))
    row_axis, column_axis = source.volume.plane_axes
    np.testing.assert_array_equal(again, np.repeat(np.repeat(array, 2, 2 - row_axis), 2, 2 - column_axis))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vectors_that_are_no_colours_are_refused(suffix, tmp_path):
    written_by_itk(tmp_path / f"in{suffix}", voxels((4, 5, 6, 3), "float32"), vector=True)
    with pytest.raises(InputRefused, match="not colours"):
        open_image(tmp_path / f"in{suffix}")


@pytest.mark.parametrize("axis", ["0", "1", "2"])
def test_series_of_volumes_in_metaimage(axis, tmp_path):
    array = voxels((3, 4, 5, 6))
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / "in.mha"))
    source = open_image(tmp_path / "in.mha", ReadOptions(axis=axis))
    assert source.volume.slices == 3 * (6, 5, 4)[int(axis)]
    doubled(source, tmp_path / "out.mha")
    again = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.mha")))
    row_axis, column_axis = source.volume.plane_axes
    np.testing.assert_array_equal(again, np.repeat(np.repeat(array, 2, 3 - row_axis), 2, 3 - column_axis))


def test_series_of_volumes_in_nrrd(tmp_path):
    array = voxels((3, 4, 5, 6))
    head = "NRRD0004\ntype: short\ndimension: 4\nspace: RAS\nsizes: 6 5 4 3\nendian: big\nencoding: raw\n"
    head += (
        "kinds: domain domain domain list\nspace directions: (2,0,0) (0,2,0) (0,0,5) none\nspace origin: (1,2,3)\n\n"
    )
    (tmp_path / "in.nrrd").write_bytes(head.encode() + array.astype(">i2").tobytes())
    source = open_image(tmp_path / "in.nrrd")
    assert (source.volume.slices, source.volume.array_shape, source.volume.slice_spacing_mm) == (12, (6, 5, 4, 3), 5)
    np.testing.assert_array_equal(source.volume.affine @ [0, 0, 1, 1], [1, 2, 8, 1])  # RAS as it is
    np.testing.assert_array_equal(np.concatenate(list(source.slices())), array.reshape(12, 5, 6))
    doubled(source, tmp_path / "out.nrrd")
    text = (tmp_path / "out.nrrd").read_bytes().split(b"\n\n")[0].decode()
    assert "sizes: 12 10 4 3" in text
    assert "space directions: (1,0,0) (0,1,0) (0,0,5) none" in text
    assert "space origin: (0.5,1.5,3)" in text
    assert "space: RAS" in text


def test_slices_lie_across_the_largest_spacing(tmp_path):
    written_by_itk(tmp_path / "in.nrrd", voxels(), Spacing=(4.0, 1.0, 1.0))
    volume = open_image(tmp_path / "in.nrrd").volume
    assert (volume.slice_axis, volume.slices, volume.slice_spacing_mm) == (0, 6, 4.0)
    assert open_image(tmp_path / "in.nrrd", ReadOptions(axis="axial")).volume.slice_axis == 2
    assert open_image(tmp_path / "in.nrrd", ReadOptions(axis="coronal")).volume.slice_axis == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_keys_of_the_user_stay_and_those_of_the_old_grid_go(suffix, tmp_path):
    image = sitk.GetImageFromArray(voxels())
    kept = {"my_note": "left as it is", "dim[0]": "3", "0008|0060": "MR", "sform_code": "2"}
    stale = {"dim[1]": "6", "srow_x": "1 0 0 0", "0028|0030": r"1\1", "qoffset_x": "0"}
    for key, value in (kept | stale).items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(tmp_path / f"in{suffix}"))
    doubled(open_image(tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}")
    result = sitk.ReadImage(str(tmp_path / f"out{suffix}"))
    keys = {key: result.GetMetaData(key) for key in result.GetMetaDataKeys()}
    assert kept.items() <= keys.items()
    assert not stale.keys() & keys.keys()
    assert keys["medsr_method"] == "rdst-e"
    assert keys["medsr_checkpoint_sha256"] == "0" * 64


def test_nrrd_without_a_place_keeps_spacings_and_moves_node_centred_ends(tmp_path):
    head = "NRRD0001\n# a note\ntype: unsigned char\ndimension: 2\nsizes: 6 5\nencoding: raw\nspacings: 2 3\n"
    head += 'axis mins: 10 20\ncenterings: cell node\nlabels: "x" "y"\ncontent: test\n\n'
    (tmp_path / "in.nrrd").write_bytes(head.encode() + bytes(range(30)))
    source = open_image(tmp_path / "in.nrrd")
    assert source.volume.affine is None
    assert source.volume.spacing_mm == (3, 2)
    doubled(source, tmp_path / "out.nrrd")
    text = (tmp_path / "out.nrrd").read_bytes().split(b"\n\n")[0].decode()
    for line in (
        "# a note",
        "sizes: 12 10",
        "spacings: 1 1.5",
        "axis mins: 10 19.25",
        'labels: "x" "y"',
        "content: test",
    ):
        assert line in text.splitlines()
    assert open_image(tmp_path / "out.nrrd").volume.spacing_mm == (1.5, 1)


def test_bzip2_line_skip_and_byte_skip(tmp_path):
    array = voxels((2, 3, 4), "uint8")
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 3 2\n"
    (tmp_path / "a.nrrd").write_bytes((head + "encoding: bzip2\n\n").encode() + bz2.compress(array.tobytes()))
    (tmp_path / "b.raw").write_bytes(b"a line\nanother\nxyz" + array.tobytes())
    (tmp_path / "b.nhdr").write_text(head + "encoding: raw\nline skip: 2\nbyte skip: 3\ndata file: b.raw\n")
    (tmp_path / "c.nhdr").write_text(head + "encoding: raw\nbyte skip: -1\ndata file: b.raw\n\n")
    for name in ("a.nrrd", "b.nhdr", "c.nhdr"):
        np.testing.assert_array_equal(np.concatenate(list(open_image(tmp_path / name).slices())), array)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_from_another_format_the_place_is_kept(suffix, tmp_path):
    image = written_by_itk(tmp_path / "in.nrrd", voxels(), Spacing=(4.0, 1.0, 2.0), Origin=(7.0, -8.0, 9.0))
    doubled(open_image(tmp_path / "in.nrrd"), tmp_path / "between.nii.gz", 1, 1)
    source = open_image(tmp_path / "between.nii.gz")
    doubled(source, tmp_path / f"out{suffix}")
    result = sitk.ReadImage(str(tmp_path / f"out{suffix}"))
    found = {tuple(np.round(corner, 3) + 0.0) for corner in itk_corners(result)}
    assert found == {tuple(np.round(corner, 3) + 0.0) for corner in itk_corners(image)}
    # The same value at the same place, whatever the order of the axes.
    for index in ((0, 0, 0), (5, 4, 3), (2, 1, 0)):
        place = image.TransformIndexToPhysicalPoint(index)
        assert result[result.TransformPhysicalPointToIndex(place)] == image[index]


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nendian: little\nencoding: {encoding}\n{more}\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\n{more}ElementDataFile = {file}\n"


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("a.nrrd", NRRD.format(sizes="30000 30000 30000", encoding="raw", more=""), "more than is allowed"),
        ("a.nrrd", NRRD.format(sizes="4000 4000 100", encoding="gzip", more=""), "compressed bytes can hold"),
        ("a.nrrd", NRRD.format(sizes="40 40 40", encoding="raw", more=""), "cut short"),
        ("a.nrrd", NRRD.format(sizes="-4 4 4", encoding="raw", more=""), "contradict"),
        ("a.nrrd", NRRD.format(sizes="4 4", encoding="raw", more=""), "contradict"),
        ("a.nrrd", NRRD.format(sizes="4 4 4", encoding="ascii", more=""), "as text"),
        ("a.nrrd", NRRD.format(sizes="4 4 4", encoding="raw", more="data file: ../secret\n"), "outside its own folder"),
        ("a.nrrd", NRRD.format(sizes="4 4 4", encoding="raw", more="data file: /etc/passwd\n"), "outside its own"),
        ("a.nrrd", NRRD.format(sizes="4 4 4", encoding="raw", more="data file: gone.raw\n"), "is not there"),
        ("a.nrrd", NRRD.format(sizes="4 4 4", encoding="raw", more="data file: LIST\n"), "several files"),
        (
            "a.nrrd",
            NRRD.format(sizes="4 4 4", encoding="raw", more="space directions: (1,0,0) (1,0,0) (0,0,nan)\n"),
            "do not span",
        ),
        ("a.mha", META.format(sizes="30000 30000 30000", more="", file="LOCAL"), "more than is allowed"),
        ("a.mha", META.format(sizes="40 40 40", more="", file="LOCAL"), "cut short"),
        ("a.mha", META.format(sizes="0 4 4", more="", file="LOCAL"), "not a picture"),
        ("a.mha", META.format(sizes="4 4 4", more="", file="../../secret"), "outside its own folder"),
        ("a.mha", META.format(sizes="4 4 4", more="", file="LIST"), "several files"),
        ("a.mha", META.format(sizes="4 4 4", more="BinaryData = False\n", file="LOCAL"), "as text"),
        ("a.mha", META.format(sizes="4 4 4", more="ElementSpacing = 1 0 1\n", file="LOCAL"), "do not span"),
        ("a.mha", META.format(sizes="4 4 4", more="Offset = 1 2\n", file="LOCAL"), "cannot be understood"),
        ("a.mha", "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\n", "cut short"),
    ],
)
def test_claims_and_contradictions_are_refused(name, text, phrase, tmp_path):
    (tmp_path / name).write_bytes(text.encode() + bytes(64))
    with pytest.raises(InputRefused, match=phrase) as refusal:
        open_image(tmp_path / name)
    assert str(refusal.value).count("\n") == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_limits_are_kept(suffix, tmp_path):
    written_by_itk(tmp_path / f"in{suffix}", voxels())
    with pytest.raises(InputRefused, match="more than is allowed"):
        open_image(tmp_path / f"in{suffix}", ReadOptions(limits=Limits(slices=3)))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_files_never_escape(suffix, packed, tmp_path):
    written_by_itk(tmp_path / f"good{suffix}", voxels(), packed=packed)
    good = (tmp_path / f"good{suffix}").read_bytes()
    dice = random.Random(1)  # noqa: S311 - damage, not a secret
    refused = 0
    for n in range(150):
        bad = bytearray(good[: dice.randrange(1, len(good))] if n % 3 == 0 else good)
        for _ in range(dice.randrange(1, 4)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        (tmp_path / f"bad{suffix}").write_bytes(bad)
        try:
            for _ in open_image(tmp_path / f"bad{suffix}").slices():
                pass
        except InputRefused:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_two_files_are_not_written(suffix, tmp_path):
    written_by_itk(tmp_path / "in.nrrd", voxels())
    source = open_image(tmp_path / "in.nrrd")
    with (
        pytest.raises(ArgumentsError, match="two files"),
        create_image(tmp_path / f"out{suffix}", source, source.volume, MADE_BY),
    ):
        pass
    assert not (tmp_path / f"out{suffix}").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", ["0", "2"])
def test_missing_wrong_or_surplus_slices_leave_nothing_behind(suffix, axis, tmp_path):
    written_by_itk(tmp_path / f"in{suffix}", voxels())
    source = open_image(tmp_path / f"in{suffix}", ReadOptions(axis=axis))
    pages = list(source.slices())
    for wrong in (pages[:-1], [*pages, pages[0]], [page[:, 1:] for page in pages], [page + 0.5 for page in pages]):
        with pytest.raises(RunError):
            write_pages(tmp_path / f"out{suffix}", source, wrong)
    assert [path.name for path in tmp_path.iterdir()] == [f"in{suffix}"]


def write_pages(target: Path, source, pages, **more) -> None:
    with create_image(target, source, source.volume, MADE_BY, **more) as writer:
        for page in pages:
            writer.write(page)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_results_are_equal_files(suffix, tmp_path):
    written_by_itk(tmp_path / f"in{suffix}", voxels())
    source = open_image(tmp_path / f"in{suffix}")
    for name in ("a", "b"):
        doubled(source, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("axis", ["0", "2"])
def test_memory_does_not_grow_with_the_number_of_slices(suffix, axis, tmp_path, monkeypatch):
    monkeypatch.setattr("medsr_cli.formats.spool.SLAB_BYTES", 1 << 16)
    peaks = []
    for slices in (40, 400):
        shape = (slices, 96, 96) if axis == "2" else (96, 96, slices)
        written_by_itk(tmp_path / f"in{suffix}", voxels(shape))
        source = open_image(tmp_path / f"in{suffix}", ReadOptions(axis=axis))
        tracemalloc.start()
        write_pages(tmp_path / f"out{suffix}", source, source.slices(), overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    whole = 400 * 96 * 96 * 2
    assert peaks[1] - peaks[0] < whole / 8
