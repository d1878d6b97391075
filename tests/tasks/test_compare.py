"""Comparison of two images against figures of scikit-image, and places that are worked out here."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from skimage.metrics import normalized_mutual_information, peak_signal_noise_ratio, structural_similarity

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.evaluation.page import page_html
from medsr_cli.tasks.compare import CompareRequest, compare, normalised_mutual_information
from medsr_cli.tasks.compare_page import page_of
from medsr_cli.volume.geometry import enlarged_affine
from medsr_cli.volume.resample import resize
from tests.formats import dicom_makers
from tests.makers import anatomy, save_nifti

AFFINE = np.array([[0.9, 0.1, 0, -20], [-0.1, 0.8, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1.0]])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    data = anatomy((64, 56, 3))
    noisy = data + np.random.default_rng(1).normal(0, 30, data.shape).round().astype(np.int16)
    return save_nifti(tmp_path / "a.nii.gz", noisy, AFFINE), save_nifti(tmp_path / "b.nii.gz", data, AFFINE)


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, np.float64)


def test_figures_are_those_of_scikit_image(pair):
    found = compare(CompareRequest(*pair))
    a, b = (values(path) for path in pair)
    figures, width = found.figures(), np.ptp(b)
    assert figures["psnr_db"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=width))
    slices = [structural_similarity(b[..., z], a[..., z], win_size=7, data_range=width) for z in range(3)]
    assert [one.ssim for one in found.slices] == pytest.approx(slices)
    assert figures["ssim"] == pytest.approx(np.mean(slices))
    assert figures["mean_absolute"] == pytest.approx(np.abs(a - b).mean())
    assert figures["mean_difference"] == pytest.approx((a - b).mean())
    assert figures["largest"] == np.abs(a - b).max()
    assert figures["nmi"] == pytest.approx(normalized_mutual_information(a, b, bins=100), abs=1e-6)
    assert found.relation.how == "same"
    assert found.headers == []
    assert sum(found.histograms[0]) == sum(found.histograms[1]) == a.size


def test_an_image_is_equal_to_itself(pair):
    found = compare(CompareRequest(pair[1], pair[1], reference=True))
    figures = found.figures()
    assert (figures["psnr_db"], figures["ssim"], figures["largest"], figures["flagged_share"]) == (100, 1, 0, 0)
    assert figures["nmi"] == pytest.approx(2)
    assert found.sums.patches > 0
    assert normalised_mutual_information(np.ones((4, 4), np.int64)) == pytest.approx(1)


def test_slope_and_intercept_count(tmp_path, pair):
    image = nib.load(pair[1])
    image.header.set_slope_inter(2.0, -1000.0)
    halves = nib.Nifti1Image(values(pair[1]) * 2 - 1000, AFFINE, image.header)
    nib.save(halves, tmp_path / "scaled.nii.gz")
    assert nib.load(tmp_path / "scaled.nii.gz").dataobj.slope != 1
    plain = nib.Nifti1Image(values(tmp_path / "scaled.nii.gz").astype(np.float64), AFFINE)
    nib.save(plain, tmp_path / "plain.nii.gz")
    found = compare(CompareRequest(tmp_path / "scaled.nii.gz", tmp_path / "plain.nii.gz"))
    assert found.figures()["largest"] < 1e-6
    assert {"slope and intercept", "type"} <= {one.field for one in found.headers}


def test_a_whole_factor_is_shrunken_and_said(tmp_path, pair):
    data = values(pair[1])
    large = resize(np.moveaxis(data, 2, 0), (128, 112)).transpose(1, 2, 0)
    affine = enlarged_affine(enlarged_affine(AFFINE, 0, 64, 128), 1, 56, 112)
    big = save_nifti(tmp_path / "big.nii.gz", large.astype(np.float32), affine)
    for request, how in (
        (CompareRequest(big, pair[1]), "first shrunken"), (CompareRequest(pair[1], big), "second shrunken"),
    ):  # fmt: skip
        found = compare(request)
        assert found.relation.how == how
        again = resize(large.astype(np.float32).astype(np.float64).transpose(2, 0, 1), (64, 56)).transpose(1, 2, 0)
        assert found.figures()["mean_absolute"] == pytest.approx(np.abs(again - data).mean(), rel=1e-6)
        assert any("2 times finer" in warning for warning in found.warnings)
        changed = {one.field: one.expected for one in found.headers}
        assert changed["rows"]
        assert changed["spacing (mm)"]
        assert not changed["type"]
    assert found.report()["grid"]["degradation"] == "cubic"


def test_other_grids_are_refused_unless_resampled(tmp_path, pair):
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, 0] * 3
    other = save_nifti(tmp_path / "moved.nii.gz", values(pair[1])[3:].astype(np.int16), moved)
    with pytest.raises(InputRefused, match="56 x 64 pixels in 3 slices against 56 x 61") as refused:
        compare(CompareRequest(pair[1], other))
    assert "affine" in str(refused.value)
    assert "--resample" in str(refused.value)
    found = compare(CompareRequest(other, pair[1], resample=True))
    assert found.relation.how == "second resampled"
    # Voxels lie on voxels: what was cut off at the start is all that is missing.
    assert found.figures()["largest"] < 0.01
    far = AFFINE.copy()
    far[:3, 3] += 500
    with pytest.raises(InputRefused, match="covers 0%"):
        compare(CompareRequest(pair[1], save_nifti(tmp_path / "far.nii.gz", anatomy((64, 56, 3)), far), resample=True))
    turned = AFFINE.copy()
    turned[:3, 0] *= -1
    with pytest.raises(InputRefused, match="affine"):
        compare(CompareRequest(pair[1], save_nifti(tmp_path / "t.nii.gz", anatomy((64, 56, 3)), turned)))


def test_invented_detail_is_flagged_where_it_is(tmp_path):
    data = anatomy((128, 112, 2)).astype(np.int16)
    invented = data.copy()
    rng = np.random.default_rng(0)
    blob = resize(rng.normal(0, 900, (6, 6)), (36, 36))
    invented[80:116, 60:96, 1] = np.clip(invented[80:116, 60:96, 1] + blob, 0, 4000)
    a = save_nifti(tmp_path / "a.nii.gz", invented, AFFINE)
    b = save_nifti(tmp_path / "b.nii.gz", data, AFFINE)
    flags, difference = tmp_path / "flags.nii.gz", tmp_path / "difference.nii.gz"
    found = compare(CompareRequest(a, b, reference=True, scale=4, flagged_map=flags, difference_map=difference))
    assert found.flagged
    assert {box.slice for box in found.flagged} == {2}
    assert found.slices[0].flagged_share == 0
    for box in found.flagged:
        # Rows run along y, columns along x.
        assert box.column < 116 and box.column + box.side > 80  # noqa: PT018
        assert box.row < 96 and box.row + box.side > 60  # noqa: PT018
        middle = (box.side - 1) / 2
        place = AFFINE @ [box.column + middle, box.row + middle, 1, 1]
        assert box.centre_mm == pytest.approx(place[:3], abs=2e-3)
    heat = nib.load(flags)
    np.testing.assert_allclose(heat.affine, AFFINE, atol=1e-5)
    shown = np.asarray(heat.dataobj)
    assert shown[..., 0].max() == 0
    assert np.unravel_index(shown.argmax(), shown.shape)[2] == 1
    assert shown[80:116, 60:96, 1].mean() > 5 * shown[:40, :40, 1].mean()
    np.testing.assert_allclose(
        np.asarray(nib.load(difference).dataobj), invented.astype(float) - data, atol=1e-3
    )  # fmt: skip
    html = page_html(page_of(found))
    assert "slice 2, row" in html


def test_maps_must_be_nifti_and_not_there_yet(tmp_path, pair):
    with pytest.raises(ArgumentsError, match=r"\.nii\.gz"):
        compare(CompareRequest(*pair, difference_map=tmp_path / "d.png"))
    (tmp_path / "d.nii.gz").write_bytes(b"")
    with pytest.raises(ArgumentsError, match="exists"):
        compare(CompareRequest(*pair, difference_map=tmp_path / "d.nii.gz"))
    with pytest.raises(ArgumentsError, match="enlarge"):
        compare(CompareRequest(*pair, scale=1))
    with pytest.raises(InputRefused, match="same value"):
        compare(CompareRequest(pair[0], save_nifti(tmp_path / "c.nii.gz", np.ones((64, 56, 3), np.int16), AFFINE)))


def test_dicom_of_different_patients_is_remarked_without_naming_anyone(tmp_path):
    for name, patient in (("a", "SECRET^ONE"), ("b", "SECRET^TWO")):
        dicom_makers.series(tmp_path / name, 3, rows=32, columns=40)
        for path in (tmp_path / name).iterdir():
            ds = dcmread(path)
            ds.PatientID = patient
            ds.save_as(path)
    found = compare(CompareRequest(tmp_path / "a", tmp_path / "b"))
    assert any("different patients" in warning for warning in found.warnings)
    assert "SECRET" not in str(found.report())
    assert "SECRET" not in page_html(page_of(found))


def blank_slice(tmp_path: Path, invented: np.ndarray | None = None) -> tuple[Path, Path]:
    """A and its reference, whose second of three slices shows nothing."""
    data = anatomy((96, 80, 3)).astype(np.float32)
    data[..., 1] = 0
    changed = data.copy()
    if invented is not None:
        changed[50:57, 40:47, 1] = invented
    return (
        save_nifti(tmp_path / "changed.nii.gz", changed, AFFINE),
        save_nifti(tmp_path / "truth.nii.gz", data, AFFINE),
    )


def test_what_is_invented_where_the_reference_shows_nothing_is_flagged(tmp_path):
    flags = tmp_path / "flags.nii.gz"
    a, b = blank_slice(tmp_path, np.full((7, 7), 400.0))
    found = compare(CompareRequest(a, b, reference=True, flagged_map=flags))
    assert [one.flagged_share for one in found.slices] == [0, 1, 0]
    assert found.flagged_share == pytest.approx(1 / 3)
    (box,) = found.flagged
    assert (box.slice, box.added, box.why) == (2, True, "constant reference")
    # Listed where A varies most; columns run along x.
    assert box.column <= 50 and box.column + box.side >= 57  # noqa: PT018
    assert box.row <= 40 and box.row + box.side >= 47  # noqa: PT018
    assert box.centre_mm is not None
    shown = np.asarray(nib.load(flags).dataobj)
    assert [float(shown[..., z].min()) for z in range(3)] == [0, 1, 0]
    assert shown[..., [0, 2]].max() == 0
    assert "slice 2, all of it" in page_html(page_of(found))


def test_noise_below_the_floor_is_nothing_invented(tmp_path):
    # The floor of sFRC, 0.5 % of the range, is that of the whole reference here.
    for deviation, share in ((0.2, None), (2.0, 1.0)):
        noise = np.zeros((7, 7))
        a, b = blank_slice(tmp_path)
        data, width = values(a), np.ptp(values(b))
        noise = np.random.default_rng(0).normal(0, deviation / 100 * width, data.shape[:2])
        data[..., 1] += noise
        found = compare(CompareRequest(save_nifti(a, data.astype(np.float32), AFFINE), b, reference=True))
        assert found.slices[1].flagged_share == share


def test_no_number_is_told_and_left_out(tmp_path):
    data = anatomy((64, 56, 3)).astype(np.float32)
    a, b = data + np.random.default_rng(0).normal(0, 20, data.shape).astype(np.float32), data.copy()
    a[10:14, 20:22, 0] = np.nan
    b[10:12, 20:22, 0] = np.inf
    b[40, 40, 2] = np.nan
    paths = save_nifti(tmp_path / "a.nii.gz", a, AFFINE), save_nifti(tmp_path / "b.nii.gz", b, AFFINE)
    difference = tmp_path / "d.nii.gz"
    found = compare(CompareRequest(*paths, reference=True, difference_map=difference))
    either = ~(np.isfinite(a) & np.isfinite(b))
    apart = (a.astype(np.float64) - b)[~either]
    figures = found.figures()
    assert figures["mean_absolute"] == pytest.approx(np.abs(apart).mean())
    assert figures["largest"] == pytest.approx(np.abs(apart).max())
    width = np.ptp(b[np.isfinite(b)])
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(width**2 / np.square(apart).mean()))
    assert [one.left_out for one in found.slices] == [8, 0, 1]
    assert [one.in_one_alone for one in found.slices] == [4, 0, 1]
    told = found.report()["not_numbers"]
    assert (told["a"], told["b"], told["in_one_alone"]) == (8, 5, 5)
    assert sum("no numbers" in warning for warning in found.warnings) == 2
    assert any("differ in 5 pixels" in w and "slices 1, 3" in w for w in found.warnings)
    assert np.array_equal(np.isnan(np.asarray(nib.load(difference).dataobj)), either)
    torn = {(box.slice, box.added) for box in found.flagged if box.why == "not a number"}
    assert torn == {(1, False), (3, True)}
    assert all(np.histogram(x[np.isfinite(x)], found.edges)[0].sum() == sum(h)
               for x, h in zip((a, b), found.histograms, strict=True))  # fmt: skip
    assert "no numbers" in page_html(page_of(found))


def test_a_hole_is_never_equal(tmp_path, pair):
    data = values(pair[1]).astype(np.float32)
    whole = save_nifti(tmp_path / "whole.nii.gz", data, AFFINE)
    data[:8, :8, 1] = np.nan  # air: filled with the least value it would look the same
    torn = save_nifti(tmp_path / "torn.nii.gz", data, AFFINE)
    for a, b in ((torn, whole), (whole, torn)):
        found = compare(CompareRequest(a, b, reference=True))
        assert {box.slice for box in found.flagged} == {2}
        assert found.slices[1].flagged_share > 0
    both = compare(CompareRequest(torn, torn, reference=True))
    assert (both.sums.in_one_alone, both.sums.flagged, both.figures()["psnr_db"]) == (0, 0, 100)
    # Nothing that both know: no figure, rather than that of equal images.
    one, other = np.full((2, 32, 32, 2), np.nan, np.float32)
    one[..., 0], other[..., 1] = anatomy((32, 32)), anatomy((32, 32))
    apart = [save_nifti(tmp_path / f"{n}.nii.gz", x, AFFINE) for n, x in (("one", one), ("other", other))]
    found = compare(CompareRequest(*apart, reference=True))
    assert set(found.figures().values()) == {None, 1.0}
    assert found.flagged_share == 1
    assert "numbers" in page_html(page_of(found))


def test_holes_go_along_onto_the_grid_that_is_compared(tmp_path, pair):
    data = values(pair[1])
    large = np.repeat(np.repeat(data, 2, 0), 2, 1).astype(np.float32)
    large[10, 20, 1] = np.nan
    affine = enlarged_affine(enlarged_affine(AFFINE, 0, 64, 128), 1, 56, 112)
    found = compare(CompareRequest(save_nifti(tmp_path / "big.nii.gz", large, affine), pair[1], degradation="cubic"))
    assert [one.in_one_alone for one in found.slices] == [0, 1, 0]
    moved = AFFINE.copy()
    moved[:3, 3] += AFFINE[:3, 0] * 3
    torn = data.astype(np.float32)
    torn[30, 20, 2] = np.nan
    part = save_nifti(tmp_path / "part.nii.gz", data[3:].astype(np.int16), moved)
    found = compare(CompareRequest(part, save_nifti(tmp_path / "torn.nii.gz", torn, AFFINE), resample=True))
    assert found.slices[2].in_one_alone >= 1
    assert found.figures()["largest"] < 0.01


def test_options_without_use_are_refused(pair):
    with pytest.raises(ArgumentsError, match="neither is shrunken"):
        compare(CompareRequest(*pair, degradation="cubic"))
    with pytest.raises(ArgumentsError, match="--reference"):
        compare(CompareRequest(*pair, scale=2))
