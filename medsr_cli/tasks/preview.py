"""A picture to look at: the input by bicubic beside the result, a few slices below each other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.resample import resize
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]

GAP = 8
BRIGHTEST_PERCENTILE = 99.5
MAX_WIDTH = 2400
"""Pictures wider than this are shrunken: they are for looking at, not for reading values."""


def preview_png(shown: Sequence[tuple[int, Pixels, Pixels]], source: Volume, result: Volume) -> bytes:
    """The bytes of a PNG.

    Args:
        shown: slice number, input (channels, rows, columns) and result (channels, rows', columns').
        source: the input's volume.
        result: the result's.
    """
    rows = []
    for _, given, enlarged in shown:
        colours = slice(0, source.channels - 1) if source.alpha else slice(None)
        cubic = resize(given[colours].astype(np.float64), (result.rows, result.columns))
        pair = [cubic, enlarged[colours].astype(np.float64)]
        # Rows of a NIfTI slice run from back to front or from foot to head: the picture starts at the other end.
        rows.append([image[:, ::-1] for image in pair] if source.format == "nifti" else pair)
    return picture_png(rows)


def picture_png(rows: Sequence[Sequence[NDArray[np.floating]]]) -> bytes:
    """Images (channels, rows, columns) side by side, row below row; each row has its first image's brightness."""
    from PIL import Image

    lines = []
    for row in rows:
        low, high = window(row[0])
        line = [grey_levels(image, low, high) for image in row]
        lines.append(_joined(line, axis=1))
    picture = Image.fromarray(_joined(lines, axis=0))
    if picture.width > MAX_WIDTH:
        picture = picture.resize((MAX_WIDTH, round(picture.height * MAX_WIDTH / picture.width)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _joined(images: Sequence[NDArray[np.uint8]], axis: int) -> NDArray[np.uint8]:
    """Images (rows, columns, 3) beside or below each other, with a white gap."""
    shape = list(images[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    parts = [part for image in images for part in (image, gap)][:-1]
    return np.concatenate(parts, axis=axis)


def window(pixels: Pixels) -> tuple[float, float]:
    """Darkest and brightest value worth showing."""
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (0.5, BRIGHTEST_PERCENTILE))
    return float(low), float(high if high > low else low + 1)


def grey_levels(planes: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """(channels, rows, columns) to (rows, columns, 3), 8 bit, between the two values."""
    scaled = np.clip((np.nan_to_num(planes, nan=low) - low) / (high - low), 0, 1)
    levels = np.rint(scaled * 255).astype(np.uint8)
    return np.moveaxis(np.broadcast_to(levels, (3, *levels.shape[1:])) if len(levels) != 3 else levels, 0, -1)
