"""Voxel edges align, and the centre of every voxel of the result lies where it should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medsr_cli.volume.geometry import (
    enlarged_affine,
    enlarged_length,
    enlarged_spacing,
    first_voxel_shift,
    is_usable,
    slice_axis_from_spacing,
    slice_axis_of_plane,
    spacings_mm,
    voxel_centres_mm,
)
from medsr_cli.volume.volume import Volume


@st.composite
def affines(draw):
    """Any orientation, left- and right-handed, sheared or not."""
    angles = [draw(st.floats(-180, 180)) for _ in range(3)]
    spacing = [draw(st.floats(0.05, 10)) for _ in range(3)]
    handed = [draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)]
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = (draw(st.floats(-0.5, 0.5)) for _ in range(3))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ shear @ np.diag(spacing) * handed
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    return affine


lengths = st.integers(1, 300)


def corners(affine, shape):
    """Patient positions of the eight outer corners, written out without the code under test."""
    edges = itertools.product(*[(-0.5, n - 0.5) for n in shape])
    return np.array([[affine[r, :3] @ np.array(e) + affine[r, 3] for r in range(3)] for e in edges])


@given(affines(), st.tuples(lengths, lengths, lengths), st.tuples(lengths, lengths, lengths))
@settings(max_examples=150, deadline=None)
def test_outer_edges_stay(affine, shape, new_shape):
    new = affine
    for axis in range(3):
        new = enlarged_affine(new, axis, shape[axis], new_shape[axis])
    before, after = corners(affine, shape), corners(new, new_shape)
    assert np.abs(before - after).max() <= 1e-6 * max(np.abs(before).max(), 1)


@given(affines(), lengths, st.integers(0, 2), st.floats(1, 8))
@settings(max_examples=150, deadline=None)
def test_every_centre_lies_at_its_fraction_of_the_axis(affine, n, axis, scale):
    new_n = enlarged_length(n, scale)
    new = enlarged_affine(affine, axis, n, new_n)
    for i in {0, 1, new_n // 2, new_n - 1} & set(range(new_n)):
        index, old_index = np.zeros(3), np.zeros(3)
        index[axis] = i
        old_index[axis] = (i + 0.5) / new_n * n - 0.5
        expected = affine[:3, :3] @ old_index + affine[:3, 3]
        found = voxel_centres_mm(new, index[np.newaxis])[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(np.abs(expected).max(), 1))


@given(affines(), lengths, lengths, st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_other_axes_and_handedness_are_untouched(affine, n, new_n, axis):
    new = enlarged_affine(affine, axis, n, new_n)
    others = [a for a in range(3) if a != axis]
    np.testing.assert_array_equal(new[:3, others], affine[:3, others])
    assert np.sign(np.linalg.det(new[:3, :3])) == np.sign(np.linalg.det(affine[:3, :3]))
    assert spacings_mm(new)[axis] == pytest.approx(enlarged_spacing(spacings_mm(affine)[axis], n, new_n))


def test_the_argument_is_not_changed():
    affine = np.eye(4)
    enlarged_affine(affine, 0, 10, 20)
    np.testing.assert_array_equal(affine, np.eye(4))


def test_known_values():
    new = enlarged_affine(np.diag([2.0, 3.0, 4.0, 1.0]), 0, 10, 20)
    np.testing.assert_allclose(new[:3, :3], np.diag([1.0, 3.0, 4.0]))
    np.testing.assert_allclose(new[:3, 3], [-0.5, 0, 0])  # d·(N/N' - 1)/2 = 2·(1/2 - 1)/2
    assert first_voxel_shift(10, 40) == pytest.approx(-0.375)


@pytest.mark.parametrize(
    ("n", "scale", "expected"), [(10, 2, 20), (5, 1.5, 8), (3, 1.5, 5), (7, 1.1, 8), (1, 0.2, 1), (101, 2.5, 253)]
)
def test_lengths_round_halves_up(n, scale, expected):
    assert enlarged_length(n, scale) == expected


def test_volume_moves_along_its_own_plane_axes():
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    volume = Volume(
        "nifti", 30, 20, 10, np.dtype("i2"), array_shape=(10, 20, 30), slice_axis=0, plane_axes=(2, 1),
        spacing_mm=(3.0, 2.0), slice_spacing_mm=1.0, affine=affine,
    )  # fmt: skip
    new = volume.enlarged(60, 80)
    assert new.array_shape == (10, 80, 60)
    assert new.spacing_mm == (1.5, 0.5)
    np.testing.assert_allclose(corners(new.affine, new.array_shape), corners(affine, volume.array_shape))


def test_unusable_matrices():
    assert is_usable(np.diag([1e-4, 1e-4, 5e-3, 1]))
    flat, nan = np.diag([1.0, 1, 0, 1]), np.eye(4)
    nan[1, 3] = np.nan
    parallel = np.eye(4)
    parallel[:3, 1] = parallel[:3, 0]
    assert not any(is_usable(a) for a in (flat, nan, parallel))


def test_slice_axis():
    assert slice_axis_from_spacing((1, 1, 5), (9, 9, 9)) == 2
    assert slice_axis_from_spacing((5, 1, 1), (9, 9, 9)) == 0
    assert slice_axis_from_spacing((1, 5, 1), (9, 9, 9)) == 1
    assert slice_axis_from_spacing((1, 1, 1), (9, 9, 9)) == 2
    assert slice_axis_from_spacing((1, 1, 5), (1, 9, 9)) == 0
    assert slice_axis_from_spacing((3, 3, 1), (9, 9, 9)) == 2


@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3), st.floats(-25, 25))
@settings(max_examples=60, deadline=None)
def test_anatomical_planes(order, signs, tilt):
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, patient_axis in enumerate(order):
        affine[patient_axis, axis] = signs[axis] * (axis + 1.0)
    affine[:3, :3] = Rotation.from_euler("x", tilt, degrees=True).as_matrix() @ affine[:3, :3]
    assert order[slice_axis_of_plane(affine, "sagittal")] == 0
    assert order[slice_axis_of_plane(affine, "coronal")] == 1
    assert order[slice_axis_of_plane(affine, "axial")] == 2
