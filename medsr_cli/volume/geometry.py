"""Where voxels lie, and where they lie after upscaling: the only place with that arithmetic.

Voxel edges align. With scale s, an axis of N voxels of spacing d becomes N' = round(N·s) voxels of spacing
d·N/N', and the centre of the first voxel moves by d·(N/N' - 1)/2 along that axis. Affines map an array
index to millimetres, RAS+ (x to the right, y to the front, z up), whatever the format uses itself.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Affine = NDArray[np.float64]
Plane = Literal["axial", "sagittal", "coronal"]

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM and ITK count x to the left and y to the back; NIfTI and medsr to the right and to the front."""

ANISOTROPIC = 1.05
"""A largest spacing of more than this times the others marks the direction across the slices."""

PLANE_NORMALS: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The patient axis (x, y, z) that each plane is perpendicular to."""


def enlarged_length(n: int, scale: float) -> int:
    """N' = round(N·s), halves away from zero, at least 1."""
    return max(math.floor(n * scale + 0.5), 1)


def enlarged_spacing(spacing_mm: float, n: int, n_new: int) -> float:
    """d·N/N'."""
    return spacing_mm * n / n_new


def first_voxel_shift(n: int, n_new: int) -> float:
    """How far the centre of the first voxel moves along its axis, in old voxels: (N/N' - 1)/2."""
    return (n / n_new - 1) / 2


def enlarged_affine(affine: Affine, axis: int, n: int, n_new: int) -> Affine:
    """The affine of a grid with `n_new` instead of `n` voxels along `axis`, covering the same space."""
    result = np.array(affine, np.float64)
    result[:3, 3] += affine[:3, axis] * first_voxel_shift(n, n_new)
    result[:3, axis] = affine[:3, axis] * (n / n_new)
    return result


def cropped_affine(affine: Affine, axis: int, first: int) -> Affine:
    """The affine of a grid that begins with voxel `first` along `axis`: the voxels that are left keep their places."""
    result = np.array(affine, np.float64)
    result[:3, 3] += affine[:3, axis] * first
    return result


def spacings_mm(affine: Affine) -> tuple[float, float, float]:
    """Length of one step along each array axis."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def is_usable(affine: Affine) -> bool:
    """Whether an affine is finite and maps voxels to a volume rather than to a plane or a point."""
    matrix = affine[:3, :3]
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(matrix, axis=0)
    if (lengths <= 0).any():
        return False
    return bool(abs(np.linalg.det(matrix / lengths)) > 1e-6)


def slice_axis_from_spacing(spacing_mm: tuple[float, float, float], shape: tuple[int, int, int]) -> int:
    """The axis across the acquired slices: that of the largest spacing, else the last one.

    An axis of one single voxel is always across: there is no plane along it.
    """
    single = [axis for axis in range(3) if shape[axis] == 1]
    if single:
        return single[-1]
    ordered = sorted(spacing_mm)
    largest = int(np.argmax(spacing_mm))
    return largest if ordered[2] > ANISOTROPIC * ordered[1] else 2


def slice_axis_of_plane(affine: Affine, plane: Plane) -> int:
    """The array axis that runs closest to the normal of an anatomical plane."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return int(np.argmax(np.abs(directions[PLANE_NORMALS[plane]])))


def voxel_centres_mm(affine: Affine, indices: NDArray[np.floating]) -> NDArray[np.float64]:
    """Patient positions (n, 3) of array indices (n, 3), which may lie between voxels."""
    positions: NDArray[np.float64] = indices @ affine[:3, :3].T + affine[:3, 3]
    return positions
