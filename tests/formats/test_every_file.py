"""Every file of the shared format fixtures: it opens as what it is and survives a round trip, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsr_cli.errors import InputRefused
from medsr_cli.formats import create_image, default_name, open_image
from medsr_cli.formats.contract import Derivation, Reader
from medsr_cli.volume.volume import Volume

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FILES = SHARED / "data" / "formats"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the shared fixtures are not beside this checkout")

MADE_BY = Derivation("nearest", (2.0, 2.0), "medsr test")

T2 = (16, 56, 48, 1, "int16")
"""Slices, rows, columns, channels and type of the volume that most files hold."""

OK: dict[str, tuple[int, int, int, int, str]] = {
    "analyze/analyze75.hdr": T2,
    "analyze/analyze75.img": T2,
    "metaimage/CT_2D_head_fixed.mha": (1, 256, 256, 1, "int16"),
    "metaimage/CT_2D_head_fixed_mask.mha": (1, 256, 256, 1, "uint8"),
    "metaimage/CT_2D_head_moving.mha": (1, 256, 256, 1, "int16"),
    "metaimage/compressed.mha": T2,
    "metaimage/detached.mhd": T2,
    "nifti/4d_single_volume.nii.gz": T2,
    "nifti/all_zero.nii.gz": T2,
    "nifti/anat_moved_big_endian_float32.nii": (22, 26, 21, 1, "float32"),
    "nifti/anatomical_big_endian_int16.nii": (25, 41, 33, 1, "int16"),
    "nifti/big_endian.nii": (16, 56, 48, 1, "float32"),
    "nifti/ct_abdomen_30slices_3mm_int16.nii.gz": (30, 101, 122, 1, "int16"),
    "nifti/example4d_oblique_extensions.nii.gz": (48, 96, 128, 1, "int16"),
    "nifti/example_nifti2.nii.gz": (24, 20, 32, 1, "int16"),
    "nifti/flipped_x_positive_det.nii.gz": T2,
    "nifti/float32_with_nan.nii.gz": (16, 56, 48, 1, "float32"),
    "nifti/float64.nii.gz": (16, 56, 48, 1, "float64"),
    "nifti/functional_4d_anisotropic.nii": (60, 21, 17, 1, "int16"),
    "nifti/header_extension.nii.gz": T2,
    "nifti/mr_abdomen_20slices_3mm_int16.nii.gz": (20, 91, 117, 1, "int16"),
    "nifti/name with spaces.and.dots.nii.gz": T2,
    "nifti/nifti2.nii.gz": T2,
    "nifti/no_orientation_codes.nii.gz": T2,
    "nifti/oblique_20deg.nii.gz": T2,
    "nifti/pair.hdr": T2,
    "nifti/pair.img": T2,
    "nifti/plain_int16.nii.gz": T2,
    "nifti/qform_only.nii.gz": T2,
    "nifti/rgb24_report_page.nii.gz": (1, 1244, 1201, 3, "uint8"),
    "nifti/rgba_52x77x4.nii.gz": (4, 77, 52, 4, "uint8"),
    "nifti/sagittal_axis_order.nii.gz": (48, 16, 56, 1, "int16"),
    "nifti/scl_slope_0p25_inter_m100.nii.gz": T2,
    "nifti/sform_qform_mismatch.nii.gz": T2,
    "nifti/single_slice_3d.nii.gz": (1, 56, 48, 1, "int16"),
    "nifti/thick_slices_4mm.nii.gz": (4, 56, 48, 1, "int16"),
    "nifti/two_dimensional.nii.gz": (1, 56, 48, 1, "int16"),
    "nifti/uint16.nii.gz": (16, 56, 48, 1, "uint16"),
    "nifti/units_micron.nii.gz": T2,
    "nrrd/detached.nhdr": T2,
    "nrrd/gzip.nrrd": T2,
    "nrrd/raw.nrrd": T2,
    "other/example4d+orig.BRIK.gz": (75, 41, 33, 1, "int16"),
    "other/example4d+orig.HEAD": (75, 41, 33, 1, "int16"),
    "other/phantom_EPI.PAR": (27, 64, 64, 1, "float32"),
    "other/phantom_EPI.REC": (27, 64, 64, 1, "float32"),
    "other/phantom_varscale.PAR": (27, 64, 64, 1, "float32"),
    "other/phantom_varscale.REC": (27, 64, 64, 1, "float32"),
    "other/test.mgz": (10, 4, 3, 1, "float32"),
    "other/tiny_minc1.mnc": (10, 20, 20, 1, "float32"),
    "png/grey16.png": (1, 56, 48, 1, "uint16"),
    "png/grey8.png": (1, 56, 48, 1, "uint8"),
    "png/grey_alpha.png": (1, 56, 48, 2, "uint8"),
    "png/odd_size_53x37.png": (1, 37, 48, 1, "uint8"),
    "png/palette.png": (1, 56, 48, 3, "uint8"),
    "png/rgb_equal_channels.png": (1, 56, 48, 3, "uint8"),
    "png/rgba.png": (1, 56, 48, 4, "uint8"),
    "png/us_with_scanner_ui_1234x688.png": (1, 688, 1234, 3, "uint8"),
    "png/us_with_scanner_ui_rgb.png": (1, 600, 800, 3, "uint8"),
    "png/with_dpi_300.png": (1, 56, 48, 1, "uint8"),
    "raster/grey.bmp": (1, 56, 48, 1, "uint8"),
    "raster/grey.jpg": (1, 56, 48, 1, "uint8"),
    "raster/grey16.tif": (1, 56, 48, 1, "uint16"),
    "raster/stack6_16bit.tif": (6, 56, 48, 1, "uint16"),
}

REFUSED = {
    "metaimage/detached.raw": "Open detached.mhd instead",
    "nifti/truncated.nii.gz": "is cut short",
    "nrrd/detached.raw.gz": "Open detached.nhdr instead",
    "png/one_bit.png": "only black and white",
}

JPEG_MEAN_ERROR = 1.0
"""Grey levels that one more JPEG compression may cost on average."""


def test_no_file_is_missing_from_the_tables():
    there = {path.relative_to(FILES).as_posix() for path in FILES.rglob("*") if path.is_file()}
    assert there == OK.keys() | REFUSED.keys()
    assert not OK.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_that_names_the_file(name):
    path = FILES / name
    with pytest.raises(InputRefused, match=REFUSED[name]) as refusal:
        for _ in open_image(path).slices():
            pass
    assert path.name in str(refusal.value)


@pytest.mark.parametrize("name", OK)
def test_opened_counted_enlarged_and_read_back(name, tmp_path):
    source = open_image(FILES / name)
    before = source.volume
    assert (before.slices, before.rows, before.columns, before.channels, str(before.dtype)) == OK[name]

    target = tmp_path / default_name(FILES / name, "_x2-nearest").name
    wanted = before.enlarged(2 * before.rows, 2 * before.columns)
    pixels = enlarge(source, target, wanted)
    assert len(pixels) == before.slices

    after = open_image(target, options_of(before)).volume
    read_back = list(open_image(target, options_of(before)).slices())
    assert (after.rows, after.columns, after.slices) == (wanted.rows, wanted.columns, wanted.slices)
    assert (after.channels, after.dtype, after.alpha) == (before.channels, before.dtype, before.alpha)
    for page, again in zip(pixels, read_back, strict=True):
        if target.suffix == ".jpg":
            assert np.abs(page.astype(float) - again).mean() < JPEG_MEAN_ERROR
        else:
            np.testing.assert_array_equal(page, again)
    assert_same_edges(before, after)
    assert_foreign_reader_agrees(FILES / name, target, before)


def options_of(volume: Volume):
    """Read a result along the axis that its source was read along: a finer plane may change the choice."""
    from medsr_cli.formats.contract import ReadOptions

    return ReadOptions(axis=str(volume.slice_axis)) if volume.affine is not None else ReadOptions()


def enlarge(source: Reader, target: Path, wanted: Volume) -> list[np.ndarray]:
    """Every pixel becomes four; what was written is returned."""
    pages = []
    with create_image(target, source, wanted, MADE_BY) as writer:
        for page in source.slices():
            assert page.shape == (source.volume.channels, source.volume.rows, source.volume.columns)
            assert page.dtype == source.volume.dtype
            assert page.dtype.isnative
            pages.append(np.repeat(np.repeat(page, 2, axis=1), 2, axis=2))
            writer.write(pages[-1])
        assert writer.clipped == 0
        assert not target.exists(), "nothing stands under the name of a result before it is whole"
    return pages


def corners(volume: Volume) -> np.ndarray:
    """The eight outer corners of the field of view, in millimetres, through the affine."""
    shape = np.array((*volume.array_shape, 1, 1)[:3])
    index = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * shape - 0.5
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def assert_same_edges(before: Volume, after: Volume) -> None:
    if before.affine is None:
        assert after.affine is None
        return
    np.testing.assert_allclose(corners(after), corners(before), atol=1e-3)
    rows_mm, columns_mm = before.spacing_mm
    np.testing.assert_allclose(after.spacing_mm, (rows_mm / 2, columns_mm / 2), rtol=1e-6)


def assert_foreign_reader_agrees(source: Path, target: Path, before: Volume) -> None:
    """Somebody else's library finds the same field of view in the input and in the result."""
    if source.suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        np.testing.assert_allclose(itk_corners(target), itk_corners(source), atol=1e-3)
    elif before.affine is not None and source.suffix not in (".hdr", ".img"):
        np.testing.assert_allclose(
            sorted(nibabel_corners(target).tolist()), sorted(nibabel_corners(source).tolist()), atol=1e-3
        )


def itk_corners(path: Path) -> np.ndarray:
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    ends = [[(0, size)[bit] - 0.5 for bit, size in zip(bits, image.GetSize(), strict=True)] for bits in _bits(image)]
    return np.array([image.TransformContinuousIndexToPhysicalPoint(end) for end in ends])


def _bits(image) -> list[tuple[int, ...]]:
    n = image.GetDimension()
    return [tuple(corner >> axis & 1 for axis in range(n)) for corner in range(1 << n)]


def nibabel_corners(path: Path) -> np.ndarray:
    import nibabel

    image = nibabel.load(path)
    shape = np.array((*(int(size) for size in image.shape), 1, 1)[:3])
    index = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * shape - 0.5
    return np.round(index @ image.affine[:3, :3].T + image.affine[:3, 3], 4)
