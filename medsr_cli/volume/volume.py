"""What an image is, less its pixels: a stack of equal slices with a place in the patient.

Slices are (channels, rows, columns). Rows and columns are the two in-plane axes, in the order in which the
format's reader hands them out; `plane_axes` and `slice_axis` say which axes of the stored array they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.geometry import cropped_affine, enlarged_affine, enlarged_spacing

Modality = Literal["mr", "ct", "us", "xr"]


@dataclass(frozen=True)
class Volume:
    """Size, type, place and meaning of an image whose slices are streamed apart."""

    format: str
    """The format it was read from: `nifti`, `dicom`, `png`, `jpeg`, `tiff`, `bmp`, `nrrd`, `metaimage`, ..."""
    rows: int
    columns: int
    slices: int
    """All slices, in the order in which they are streamed; of a 4D image, those of every volume."""
    dtype: np.dtype[Any]
    """Type of the values that the reader hands out and the writer takes."""
    channels: int = 1
    """1 grey, 3 RGB; plus one if `alpha`."""
    alpha: bool = False
    """Whether the last channel is opacity, which is not anatomy and is enlarged by bicubic."""
    array_shape: tuple[int, ...] = ()
    """Shape of the stored array, in the format's own axis order."""
    slice_axis: int = 2
    """Axis of the stored array that slices are counted along."""
    plane_axes: tuple[int, int] = (1, 0)
    """Axes of the stored array that rows and columns run along."""
    spacing_mm: tuple[float, float] | None = None
    """Distance between rows and between columns; None where the file does not say."""
    slice_spacing_mm: float | None = None
    affine: NDArray[np.float64] | None = field(default=None, compare=False)
    """Stored array index (i, j, k) to patient position in mm, RAS+, (4, 4); None where there is none."""
    lowest: float | None = None
    """Smallest value that can be stored; None takes that of the type."""
    highest: float | None = None
    """Largest value that can be stored (for 12 bits in 16: 4095); None takes that of the type."""
    padding: float | None = None
    """Value that marks pixels outside the scanned field, if the file names one."""
    value_scale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept that turn the values handed out into the file's own units (Hounsfield units)."""
    modality: Modality | None = None
    body_part: str | None = None
    warnings: tuple[str, ...] = ()
    """What is odd about the header, a sentence each; never a tag's value."""

    def enlarged(self, rows: int, columns: int) -> Volume:
        """The same image on a finer grid: voxel edges align, type and meaning stay (promise 2)."""
        shape = list(self.array_shape)
        affine = self.affine
        for axis, old, new in zip(self.plane_axes, (self.rows, self.columns), (rows, columns), strict=True):
            if axis < len(shape):
                shape[axis] = new
            if affine is not None:
                affine = enlarged_affine(affine, axis, old, new)
        spacing = self.spacing_mm
        if spacing is not None:
            spacing = (
                enlarged_spacing(spacing[0], self.rows, rows),
                enlarged_spacing(spacing[1], self.columns, columns),
            )
        return replace(self, rows=rows, columns=columns, array_shape=tuple(shape), affine=affine, spacing_mm=spacing)

    def cropped(self, top: int, left: int, height: int, width: int) -> Volume:
        """A rectangle of every slice: the pixels that are left keep their places, sizes and meaning.

        Args:
            top: first row, counted from 0.
            left: first column, counted from 0.
            height: rows that are left.
            width: columns that are left.

        Raises:
            ValueError: the rectangle is empty or not within the slices.
        """
        if not (0 <= top < top + height <= self.rows and 0 <= left < left + width <= self.columns):
            msg = f"{height} x {width} pixels from ({top}, {left}) are not within {self.rows} x {self.columns}"
            raise ValueError(msg)
        shape = list(self.array_shape)
        affine = self.affine
        for axis, first, length in zip(self.plane_axes, (top, left), (height, width), strict=True):
            if axis < len(shape):
                shape[axis] = length
            if affine is not None:
                affine = cropped_affine(affine, axis, first)
        return replace(self, rows=height, columns=width, array_shape=tuple(shape), affine=affine)
