"""A volume in memory with its place in the patient, and how another grid looks into it.

SimpleITK takes only directions at right angles, which sheared headers (gantry tilt, 12-parameter fits) do not have.
So an image is handed to it lying along its own axes, and the whole place, rotation, mirroring, shear and all, goes
into an affine transform, which may be any that can be inverted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from medsr_cli.formats.contract import Pixels
from medsr_cli.volume.geometry import Affine, spacings_mm
from medsr_cli.volume.intensity import usable_values
from medsr_cli.volume.volume import Volume

sitk: Any = SimpleITK  # without types

EDGE_TOLERANCE = 1e-4
"""Part of a voxel that a point may lie beyond the outer edge of a grid and still count as inside (rounding)."""

FINER = 1.5
"""A guide is smoothed along an axis where a step of the grid it is brought to covers more of its voxels than this."""

FWHM_PER_SIGMA = 2.3548
"""Full width at half maximum of a Gaussian, 2·sqrt(2·ln 2) standard deviations."""

RECURSIVE_TAPS = 4
"""Fewest samples along an axis that ITK's recursive Gaussian takes."""


@dataclass(frozen=True)
class PlacedImage:
    """A grey volume scaled to [0, 1] and where it lies."""

    image: Any
    """SimpleITK image, float32, (columns, rows, slices), along its own axes: a point is index times spacing."""
    affine: Affine
    """(column, row, slice) index to mm, RAS+."""
    low: float
    """Smallest usable value, in the file's own units; 0 in the image."""
    high: float
    """Largest; 1 in the image."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        columns, rows, slices = self.image.GetSize()
        return columns, rows, slices

    @property
    def from_mm(self) -> Affine:
        """Patient position in mm, RAS+, to a point of `image`."""
        scaled: Affine = np.diag([*self.image.GetSpacing(), 1.0]) @ np.linalg.inv(self.affine)
        return scaled

    @property
    def values(self) -> NDArray[np.float32]:
        """(slices, rows, columns), a view that must not be written to."""
        view: NDArray[np.float32] = sitk.GetArrayViewFromImage(self.image)
        return view


def slice_affine(volume: Volume, affine: Affine) -> Affine:
    """The affine of a stored array, for indices in the order (column, row, slice)."""
    ordered: Affine = affine[:, [volume.plane_axes[1], volume.plane_axes[0], volume.slice_axis, 3]]
    return ordered


def places_of(volume: Volume) -> int:
    """Slices at different places: those of one time point."""
    shape = (*volume.array_shape, 1, 1, 1)[:3]
    return shape[volume.slice_axis] if volume.array_shape else volume.slices


def load(volume: Volume, slices: Iterable[Pixels], affine: Affine) -> PlacedImage:
    """Read a grey volume into memory, min-max scaled to [0, 1] over all its slices.

    Padding and values that are not finite become 0 and do not count for the range. A rescale of negative slope is
    followed, so that bright stays bright.

    Args:
        volume: what is read; only its first time point is.
        slices: (1, rows, columns) each.
        affine: (column, row, slice) index to mm.
    """
    count = places_of(volume)
    stored = np.zeros((count, volume.rows, volume.columns), np.float32)
    low, high = np.inf, -np.inf
    unusable: list[tuple[int, NDArray[np.bool_]]] = []
    for at, pixels in enumerate(slices):
        if at == count:
            break
        plane = pixels[0]
        usable, n_odd, n_padded = usable_values(plane, volume.padding)
        if usable.size:
            low, high = min(low, float(usable.min())), max(high, float(usable.max()))
        stored[at] = plane
        if n_odd or n_padded:
            unusable.append((at, ~np.isfinite(plane) | (plane == volume.padding)))
    if low > high:
        low = high = 0.0
    slope, intercept = volume.value_scale
    first, last = (low, high) if slope >= 0 else (high, low)
    stored -= np.float32(first)
    stored /= np.float32((last - first) or 1.0)
    for at, mask in unusable:
        stored[at][mask] = 0.0
    np.clip(stored, 0.0, 1.0, out=stored)
    image = sitk.GetImageFromArray(stored)
    image.SetSpacing(spacings_mm(affine))
    return PlacedImage(image, affine, first * slope + intercept, last * slope + intercept)


def itk_affine(matrix: Affine) -> Any:
    """A 4 x 4 matrix as SimpleITK's transform of points."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.asarray(matrix[:3, :3], np.float64).ravel().tolist())
    transform.SetTranslation(np.asarray(matrix[:3, 3], np.float64).tolist())
    return transform


@dataclass(frozen=True)
class View:
    """How the slices of one grid cut through the voxels of another."""

    index_map: Affine
    """(column, row, slice) index of the grid to the index in the image, in voxels."""
    grid: tuple[int, int, int]
    """Columns, rows, slices of the grid."""
    size: tuple[int, int, int]
    """Columns, rows, slices of the image."""

    @cached_property
    def _inside(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First column inside the image and the one after the last, each (slices, rows).

        The image is a box and a row is a line, so what of the row lies inside is one piece.
        """
        columns, rows, slices = self.grid
        first = np.zeros((slices, rows))
        last = np.full((slices, rows), columns - 1.0)
        for axis, length in enumerate(self.size):
            along, down, across, start = self.index_map[axis]
            begin = start + down * np.arange(rows) + across * np.arange(slices)[:, None]
            low, high = -0.5 - EDGE_TOLERANCE - begin, length - 0.5 + EDGE_TOLERANCE - begin
            if abs(along) * columns < EDGE_TOLERANCE:
                last[(low > 0) | (high < 0)] = -1.0
                continue
            bounds = np.sort(np.stack([low / along, high / along]), axis=0)
            first, last = np.maximum(first, np.ceil(bounds[0])), np.minimum(last, np.floor(bounds[1]))
        end = np.maximum(last + 1, 0)
        return np.minimum(first, columns).astype(np.int64), np.maximum(end, np.minimum(first, columns)).astype(np.int64)

    @property
    def coverage(self) -> float:
        """Share of the grid's voxels whose centres lie inside the image, voxel edges counted."""
        first, end = self._inside
        return float((end - first).sum() / np.prod(self.grid))

    def outside(self, at: int) -> NDArray[np.bool_]:
        """(rows, columns) of slice `at`: True where its voxels have no counterpart in the image."""
        first, end = self._inside
        columns = np.arange(self.grid[0])
        mask: NDArray[np.bool_] = (columns < first[at][:, None]) | (columns >= end[at][:, None])
        return mask

    def sample(self, placed: PlacedImage, at: int) -> NDArray[np.float32]:
        """(rows, columns) of the image's values at the voxel centres of slice `at`, linear; 0 outside."""
        columns, rows, _ = self.grid
        to_point = np.diag([*placed.image.GetSpacing(), 1.0]) @ self.index_map
        resampled = sitk.Resample(
            placed.image, (columns, rows, 1), itk_affine(to_point), sitk.sitkLinear,
            (0.0, 0.0, float(at)), (1.0, 1.0, 1.0), np.eye(3).ravel().tolist(), 0.0, sitk.sitkFloat32, True,
        )  # fmt: skip
        # ITK repeats the outermost voxels; where the image ends is decided here, once for mask and values.
        values: NDArray[np.float32] = sitk.GetArrayFromImage(resampled)[0]
        values[self.outside(at)] = 0.0
        return values

    def smoothing_voxels(self, *, through_plane: bool = False) -> tuple[float, float, float]:
        """Standard deviations, in voxels of the image, that keep it from aliasing in the plane of the grid; 0 for none.

        A voxel of one step of the grid is a blur of that width; what the image's own voxels already have is taken off.

        Args:
            through_plane: whether the steps from slice to slice count as well.
        """
        steps = np.linalg.norm(self.index_map[:3, : 3 if through_plane else 2], axis=1)
        sigmas = [np.sqrt(step**2 - 1) / FWHM_PER_SIGMA if step > FINER else 0.0 for step in steps]
        return tuple(float(s) if n >= RECURSIVE_TAPS else 0.0 for s, n in zip(sigmas, self.size, strict=True))  # type: ignore[return-value]


def smoothed(placed: PlacedImage, sigmas_voxels: tuple[float, float, float]) -> PlacedImage:
    """The image blurred along its own axes."""
    image = placed.image
    for axis, (sigma, step) in enumerate(zip(sigmas_voxels, image.GetSpacing(), strict=True)):
        if sigma > 0:
            image = sitk.RecursiveGaussian(
                image, sigma * step, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis
            )
    if image is not placed.image:
        # The recursive filter is an approximation that may overshoot a little.
        image = sitk.Clamp(image, sitk.sitkFloat32, 0.0, 1.0)
    return PlacedImage(image, placed.affine, placed.low, placed.high)
