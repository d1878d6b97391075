"""Pairs to learn from, out of the one image there is: high-resolution fathers and their low-resolution sons.

Source: the release of H. Liu et al. 2021 (doi 10.1007/s00521-020-05687-9), after A. Shocher et al., CVPR 2018,
section 3.2. A father is a 64x64 piece of the image, plain, turned and mirrored, or distorted; a son is the father
shrunk by the scale and enlarged back, blurred as the image will be when it is enlarged.

Coordinates are (x, y), whole numbers at the centres of pixels, as OpenCV has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.antialias import antialiased_resize

SIDE = 64
"""Rows and columns of a father (release); F takes no other size."""
PLAIN_UNTIL, TURNED_UNTIL = 0.05, 0.50
"""Shares of the fathers: plain below the first, turned below the second, distorted above (release)."""
SCALE_RANGE = (0.6, 1.0)
"""Of distorted fathers, uniform (release)."""
ANISOTROPY_DEVIATION = 0.25
"""Standard deviation of the difference of the scales of x and y (release)."""
SHEAR_DEVIATION = 0.1
"""Standard deviation of either shear (release)."""
WARP_A = -0.75
"""Keys' parameter in the warp: OpenCV's bicubic (release). Resizing has -0.5."""

Floats = NDArray[np.float32]
Matrix = NDArray[np.float64]
Kind = Literal["plain", "turned", "distorted"]


@dataclass(frozen=True)
class Placement:
    """Where in the image a father lies: father = linear · (image - centre of the image) + centre of the father - shift.

    For whole quarter turns `shift` is such that pixels fall on pixels.
    """

    kind: Kind
    linear: Matrix
    """(2, 2): shear · rotation · scale, in (x, y)."""
    shift: tuple[float, float]
    """Pixels (x, y) from the centre of the transformed image to that of the piece cut out of it."""

    def matrix(self, rows: int, columns: int) -> Matrix:
        """The whole transform of image coordinates (x, y, 1) to the father's, (3, 3)."""
        to_centre = translation(-(columns - 1) / 2, -(rows - 1) / 2)
        middle = np.eye(3)
        middle[:2, :2] = self.linear
        crop = translation(-self.shift[0], -self.shift[1])
        back = translation((SIDE - 1) / 2, (SIDE - 1) / 2)
        return back @ crop @ middle @ to_centre


def translation(x: float, y: float) -> Matrix:
    """(3, 3), for columns (x, y, 1)."""
    matrix = np.eye(3)
    matrix[:2, 2] = x, y
    return matrix


def draw_placement(rng: np.random.Generator, rows: int, columns: int) -> Placement:
    """Draw kind and transform of a father: 5 % plain, 45 % turned, 50 % distorted (see the constants above)."""
    u = rng.random()
    if u < PLAIN_UNTIL:
        return _pixel_exact("plain", np.eye(2), rng, rows, columns)
    if u < TURNED_UNTIL:
        quarters, mirrored = rng.integers(4), rng.integers(2)
        cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
        turn = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
        return _pixel_exact("turned", turn, rng, rows, columns)
    return _distorted(rng, rows, columns)


def _pixel_exact(kind: Kind, linear: Matrix, rng: np.random.Generator, rows: int, columns: int) -> Placement:
    """A crop at a random whole pixel of the turned image; an image too small is put into the middle of zeros."""
    width, height = np.abs(linear) @ (columns, rows)
    corners = [int(rng.integers(max(int(n) - SIDE, 0) + 1)) + min(int(n) - SIDE, 0) // 2 for n in (width, height)]
    # From the crop's corner to its distance from the centre, half a pixel where the side is odd.
    return Placement(kind, linear, (corners[0] - (width - SIDE) / 2, corners[1] - (height - SIDE) / 2))


def _distorted(rng: np.random.Generator, rows: int, columns: int) -> Placement:
    """Scale, anisotropy, mirror, rotation and shear; the crop lies within the scaled, not yet turned, image."""
    scale = rng.uniform(*SCALE_RANGE)
    half = rng.normal(0.0, ANISOTROPY_DEVIATION) / 2
    x_scale = (scale + half) * (-1 if rng.integers(2) else 1)
    y_scale = scale - half
    angle = rng.uniform(0, 2 * math.pi)
    x_shear, y_shear = rng.normal(0.0, SHEAR_DEVIATION, 2)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = np.array([[1.0, x_shear], [y_shear, 1.0]]) @ rotation @ np.diag([x_scale, y_scale])
    beyond = [max(abs(s) * n - SIDE, 0.0) for s, n in ((x_scale, columns), (y_scale, rows))]
    shift = [float(rng.uniform(-b / 2, b / 2)) for b in beyond]
    return Placement("distorted", linear, (shift[0], shift[1]))


def warp(image: Floats, matrix: Matrix) -> Floats:
    """Sample a (SIDE, SIDE) image at the places that an affine transform takes to its pixels.

    Bicubic with a = -0.75, taps outside the image are zero; OpenCV's `warpPerspective` with INTER_CUBIC and
    BORDER_CONSTANT, but for its rounding of places to 1/32 pixel.

    Args:
        image: (channels, rows, columns).
        matrix: (3, 3), invertible, image coordinates to result coordinates; its last row is 0, 0, 1.

    Returns:
        (channels, SIDE, SIDE); overshoots are not clipped.
    """
    _, rows, columns = image.shape
    inverse = np.linalg.inv(matrix)
    y, x = np.mgrid[:SIDE, :SIDE]
    places = inverse[:2, :2] @ np.stack((x.ravel(), y.ravel())) + inverse[:2, 2:]  # (2, SIDE²), x before y
    across, x_weights = _taps(places[0], columns)
    down, y_weights = _taps(places[1], rows)
    pixels = (down[:, :, None] * columns + across[:, None, :]).reshape(SIDE**2, 16)
    weights = (y_weights[:, :, None] * x_weights[:, None, :]).reshape(SIDE**2, 16)
    result: Floats = np.einsum("cpk,pk->cp", image.reshape(-1, rows * columns)[:, pixels], weights)
    return result.reshape(-1, SIDE, SIDE)


def _taps(places: Matrix, size: int) -> tuple[NDArray[np.intp], Floats]:
    """Of each place along an axis: four pixels, and their weights, zero for pixels that are not there."""
    places = np.clip(places, -4.0, size + 4.0)  # further away nothing changes, and nothing overflows
    first = np.floor(places)
    t = places - first
    pixels = first.astype(np.intp)[:, None] + np.arange(-1, 3)
    weights = np.stack((_far(1 + t), _near(t), _near(1 - t), _far(2 - t)), axis=1)
    weights[(pixels < 0) | (pixels >= size)] = 0.0
    return np.clip(pixels, 0, size - 1), weights.astype(np.float32)


def _near(d: Matrix) -> Matrix:
    """Keys' kernel for distances up to 1 pixel."""
    return ((WARP_A + 2) * d - (WARP_A + 3)) * d * d + 1


def _far(d: Matrix) -> Matrix:
    """Keys' kernel for distances from 1 to 2 pixels."""
    return ((WARP_A * d - 5 * WARP_A) * d + 8 * WARP_A) * d - 4 * WARP_A


class Family:
    """Draws fathers from one or more images, and makes their sons.

    Several images are slices of one file; each father is then from one of them, all equally likely. (The release
    knows one image. This is ours.)

    Args:
        images: (3, rows, columns) in [0, 1] each, of any sizes.
        scale: enlargement that is learnt, a whole number of at least 2.
        noise_deviation: of the normal noise that is added to sons while they are small.
    """

    def __init__(self, images: Sequence[Floats], scale: int, noise_deviation: float = 0.0) -> None:
        self.images, self.scale, self.noise_deviation = images, scale, noise_deviation

    def father(self, rng: np.random.Generator) -> Floats:
        """(3, SIDE, SIDE) in [0, 1]."""
        image = self.images[int(rng.integers(len(self.images)))]
        placement = draw_placement(rng, *image.shape[1:])
        return np.clip(warp(image, placement.matrix(*image.shape[1:])), 0, 1)

    def son(self, father: Floats, rng: np.random.Generator) -> Floats:
        """The father as the low-resolution image that the networks see: same shape, enlarged, not clipped after."""
        small = shrunk(father, self.scale)
        if self.noise_deviation > 0:
            small = small + rng.normal(0, self.noise_deviation, small.shape).astype(np.float32)
        return enlarged(np.clip(small, 0, 1), self.scale, father.shape[1:])


def shrunk(image: Floats, scale: int) -> Floats:
    """Shrink (…, rows, columns) by a whole number, sides rounded up; pixels keep their distance of `scale`."""
    rows, columns = (-(-n // scale) for n in image.shape[-2:])
    return antialiased_resize(image, (rows, columns), 1 / scale).astype(np.float32, copy=False)


def enlarged(image: Floats, scale: int, size: Sequence[int]) -> Floats:
    """Enlarge (…, rows, columns) by a whole number, cut to `size` at the right and the bottom."""
    return antialiased_resize(image, (size[0], size[1]), scale).astype(np.float32, copy=False)
