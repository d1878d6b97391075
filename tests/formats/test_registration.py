"""Rigid registration: known motions of a phantom in two contrasts are found again, and nonsense is refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medsr_cli.errors import InputRefused, RunError
from medsr_cli.formats import open_image, registration
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.guide import open_guide
from medsr_cli.formats.placed_image import load, slice_affine

TISSUES = {"t1": (0.0, 900.0, 400.0, 600.0, 80.0, 700.0), "t2": (0.0, 250.0, 500.0, 400.0, 1200.0, 330.0)}
ELLIPSOIDS = [  # centre and half axes in mm, tissue: each lies over those before it
    ((0, 0, 0), (72, 88, 66), 1),
    ((0, 0, 2), (66, 82, 60), 2),
    ((18, 8, 10), (38, 55, 38), 3),
    ((-24, -12, 6), (28, 50, 30), 3),
    ((10, 12, 14), (9, 26, 13), 4),
    ((-12, 4, 12), (8, 22, 15), 4),
    ((24, -38, -18), (15, 18, 17), 5),
    ((-30, 30, -8), (12, 13, 20), 5),
]


def phantom(positions_mm, contrast):
    """Values (n,) of a head of several tissues at positions (n, 3)."""
    tissue = np.zeros(len(positions_mm), int)
    for centre, half_axes, kind in ELLIPSOIDS:
        tissue[(((positions_mm - centre) / half_axes) ** 2).sum(axis=1) < 1] = kind
    return np.array(TISSUES[contrast])[tissue]


def moving(degrees, mm, axis=(1.0, 2.0, -1.5), along=(1.0, -1.0, 0.6)):
    """A rotation about the origin, then a shift, as a 4 x 4 matrix."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    motion[:3, 3] = mm * np.array(along) / np.linalg.norm(along)
    return motion


def centred(directions, shape):
    """An affine whose grid has its middle in the origin."""
    affine = np.eye(4)
    affine[:3, :3] = directions
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def scan(path, contrast, affine, shape, motion=None, noise=15.0):
    """A NIfTI file whose header says `affine`, of a head that has moved by `motion`."""
    indices = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)
    seen = np.linalg.inv(np.eye(4) if motion is None else motion) @ affine
    values = phantom(indices @ seen[:3, :3].T + seen[:3, 3], contrast).reshape(shape)
    values = values + np.random.default_rng(3).normal(0, noise, shape)
    nib.save(nib.Nifti1Image(np.clip(values, 0, 3000).astype(np.int16), affine), path)
    return path


T2_SHAPE, T1_SHAPE = (100, 110, 32), (70, 80, 72)
OBLIQUE = Rotation.from_euler("xyz", [8, -5, 12], degrees=True).as_matrix()
T2_AFFINE = centred(OBLIQUE @ np.diag([-1.7, 1.7, 4.5]), T2_SHAPE)  # left-handed
T1_AFFINE = centred(np.array([[0, 0, 2.2], [2.4, 0, 0], [0, 2.2, 0]]), T1_SHAPE)  # axes in another order


def placed(path):
    reader = open_image(path, ReadOptions(axis="2"))
    return load(reader.volume, reader.slices(), slice_affine(reader.volume, reader.volume.affine))


def register(image, guide, *, trust_headers=True):
    return registration.register_rigid(
        placed(image), placed(guide), trust_headers=trust_headers, guide_name="t1.nii.gz"
    )


def error_mm(found, motion):
    """Mean distance of where tissue was found from where it is, over the head."""
    points = np.random.default_rng(2).uniform(-60, 60, (500, 3))
    apart = (found - motion) @ np.c_[points, np.ones(len(points))].T
    return np.linalg.norm(apart[:3], axis=0).mean()


@pytest.fixture
def coarse(monkeypatch):
    """Fewer points: what is tested is not how exact it is."""
    monkeypatch.setattr(registration, "FIELD_POINTS", 200_000)
    monkeypatch.setattr(registration, "SHARES", (1.0, 0.5, 0.2))


def test_a_known_motion_is_found_to_half_a_millimetre(tmp_path):
    motion = moving(5, 4)
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE, motion)
    found = register(image, guide)
    assert error_mm(np.eye(4), motion) > 4  # or there would be nothing to find
    assert error_mm(found.to_guide, motion) < 0.5
    assert found.facts["information_after"] > found.facts["information_before"] > 0
    assert found.facts["begun_at"] == "headers"
    np.testing.assert_allclose(found.facts["matrix"], found.to_guide)
    # The six numbers of the report are the motion: angles about x, y and z, ITK's order Z X Y.
    x, y, z = found.facts["rotation_degrees"]
    turned = Rotation.from_euler("ZXY", [z, x, y], degrees=True).as_matrix()
    np.testing.assert_allclose(turned, found.to_guide[:3, :3], atol=1e-4)
    centre = np.array(found.facts["centre_mm"])
    moved = found.to_guide[:3, :3] @ centre + found.to_guide[:3, 3]
    np.testing.assert_allclose(moved - centre, found.facts["translation_mm"], atol=1e-3)


def test_a_sheared_image_is_registered_in_millimetres(tmp_path, coarse):
    motion = moving(6, 5, axis=(0.3, -1.0, 0.5))
    shear = np.array([[1, 0, 0.1], [0, 1, -0.35], [0, 0, 1]])  # a gantry tilt of 20 degrees
    affine = centred(shear @ T2_AFFINE[:3, :3], T2_SHAPE)
    image = scan(tmp_path / "t2.nii.gz", "t2", affine, T2_SHAPE)
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE, motion)
    assert error_mm(register(image, guide).to_guide, motion) < 0.7


def test_two_runs_agree_to_the_last_bit(tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(registration, "FIELD_POINTS", 60_000)
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE, moving(3, 2))
    first, second = register(image, guide), register(image, guide)
    assert np.array_equal(first.to_guide, second.to_guide)
    assert first.facts == second.facts


def test_what_lies_right_stays(tmp_path, coarse):
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE, noise=0)
    assert error_mm(register(image, image).to_guide, np.eye(4)) < 0.1


def test_images_far_apart_begin_with_their_centres_of_mass(tmp_path, coarse):
    motion = moving(5, 160)
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    away = np.array(T1_AFFINE)
    away[:3, 3] += motion[:3, 3]
    guide = scan(tmp_path / "t1.nii.gz", "t1", away, T1_SHAPE, motion)
    found = register(image, guide)
    assert found.facts["begun_at"] == "centres of mass"
    assert error_mm(found.to_guide, motion) < 0.7


def test_other_origins_are_not_believed(tmp_path, coarse):
    """Another frame of reference: the headers overlap, but 45 mm beside the truth."""
    motion = moving(0, 45)
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    away = np.array(T1_AFFINE)
    away[:3, 3] += motion[:3, 3]
    guide = scan(tmp_path / "t1.nii.gz", "t1", away, T1_SHAPE, motion)
    found = register(image, guide, trust_headers=False)
    assert found.facts["begun_at"] == "centres of mass"
    assert error_mm(found.to_guide, motion) < 0.7


def test_noise_is_not_registered(tmp_path, coarse):
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    noise = np.random.default_rng(1).integers(0, 1000, T1_SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, T1_AFFINE), tmp_path / "noise.nii.gz")
    with pytest.raises(RunError, match=r"registration of t1\.nii\.gz failed"):
        register(image, tmp_path / "noise.nii.gz")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ((0.0, 0.0, 0.0, 30.0, 45.0, 30.0), "too large to be true"),
        ((0.0, 0.5, -0.7, 0.0, 0.0, 0.0), "too large to be true"),
        ((0.0, 0.2, 0.0, 20.0, 0.0, 0.0), "no motion matches the images better"),
        ((float("nan"),) * 6, "no motion matches the images better"),
    ],
)
def test_a_motion_that_cannot_be_is_refused(found, says, tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(registration._Search, "run", lambda *_: (np.array(found), 1))
    if "too large" in says:  # the measure is content with it, so that only its size speaks against it
        monkeypatch.setattr(registration._Search, "information", lambda _, at: 1.0 + np.abs(at).sum())
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE)
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE)
    with pytest.raises(RunError, match=says):
        register(image, guide)


def test_a_single_slice_is_refused(tmp_path):
    image = scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, (100, 110, 1))
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE)
    with pytest.raises(InputRefused, match="fewer than 8"):
        register(image, guide)


def test_the_registered_guide_lies_on_the_image(tmp_path, coarse):
    """The same head, moved, guides as it does unmoved."""
    target = open_image(scan(tmp_path / "t2.nii.gz", "t2", T2_AFFINE, T2_SHAPE))
    result = target.volume.enlarged(2 * target.volume.rows, 2 * target.volume.columns)
    still = scan(tmp_path / "still.nii.gz", "t1", T1_AFFINE, T1_SHAPE)
    guide = scan(tmp_path / "t1.nii.gz", "t1", T1_AFFINE, T1_SHAPE, moving(6, 6))
    wanted = np.array([*open_guide(still, target, result).slices()])
    as_it_is = np.array([*open_guide(guide, target, result).slices()])
    opened = open_guide(guide, target, result, register="rigid")
    found = np.array([*opened.slices()])
    assert np.abs(found - wanted).mean() < 0.4 * np.abs(as_it_is - wanted).mean()
    assert opened.facts["registration"]["rotation_degrees"]
    assert open_guide(still, target, result).facts["registration"] is None
