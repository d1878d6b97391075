"""Chains of 3x3 convolutions on a CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3).

Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", CVPR 2016, arXiv 1509.09308: a tile
of 4x4 results is Aᵀ[(G g Gᵀ) ∘ (Bᵀ d B)]A for the tile d of 6x6 inputs around it and the kernel g, where A, B and G
come from interpolation in five points and at infinity. With many channels the product ∘ is 36 matrix products.

The points decide how rounding grows. Those of the paper (0, ±1, ±2) lose two bits; `POINTS` lose none that can be
seen: on 96 channels the largest error against float64 is 0.7e-6 of the range, that of a direct convolution 0.6e-6.

In a dense block every convolution takes all results before it. Each of them is transformed once, when it is made,
and serves all convolutions after it, so nothing is ever concatenated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
"""Where the polynomials are evaluated, beside infinity."""
OUT, IN = 4, 6
"""Sides of a tile of results, and of the inputs that it depends on."""
STRIP_TILES = 256
"""Tiles transformed at once: few enough that what stands between two products stays in the cache of a core."""
KEPT_SIZES = 3
"""Sizes of maps whose buffers are kept: a network has features of low and high resolution, and wider ones."""
KEPT_PIXELS = 256 * 256
"""Buffers of larger maps, above about 120 MB, are freed after use."""


def interpolation(points: Sequence[float] = POINTS) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ (m, n), G (n, 3) and Bᵀ (n, n) of F(m, 3) for n - 1 = m + 1 points and infinity, float64 (Cook and Toom)."""
    n, m = len(points) + 1, len(points) - 1
    a, g, b = torch.zeros(m, n).double(), torch.zeros(n, 3).double(), torch.zeros(n, n).double()
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = math.prod(point - other for other in others)
        a[:, j] = torch.tensor([point**i for i in range(m)])
        g[j] = torch.tensor([point**k / scale for k in range(3)])
        b[j, :-1] = _coefficients(others)
    a[-1, -1] = g[-1, -1] = 1.0
    b[-1] = _coefficients(points)
    return a, g, b


def _coefficients(roots: Sequence[float]) -> Tensor:
    """Of Π(x - root), the constant first."""
    found = torch.ones(1).double()
    for root in roots:
        shifted, kept = torch.zeros(2, len(found) + 1).double()
        shifted[1:], kept[:-1] = found, found
        found = shifted - root * kept
    return found


def transformed_kernel(weight: Tensor) -> Tensor:
    """G g Gᵀ of a convolution's weight (O, C, 3, 3) as (36, C, O), in float64."""
    _, g, _ = interpolation()
    kernel = torch.einsum("ai,ocij,bj->abco", g, weight.detach().double().cpu(), g)
    return kernel.flatten(0, 1).contiguous()


class Strip(NamedTuple):
    """Some rows of tiles of some images."""

    images: slice
    first: int
    rows: int


class Maps:
    """A batch of feature maps with the channels last, in a frame of zeros, of a whole number of tiles.

    Beyond the last row and column of the map there are zeros too, since a convolution takes zeros from there.
    """

    def __init__(self, batch: int, height: int, width: int, channels: int) -> None:
        down, across = -(-height // OUT), -(-width // OUT)
        self.framed = torch.zeros(batch, OUT * down + 2, OUT * across + 2, channels)
        self.inner = self.framed[:, 1 : 1 + height, 1 : 1 + width]  # (N, H, W, C)
        self._beyond = (self.framed[:, 1 + height :], self.framed[:, :, 1 + width :])
        self._ragged = bool(height % OUT or width % OUT)
        self._columns = across

    def clear_beyond(self) -> None:
        """Zeros where tiles reach over the edge."""
        if self._ragged:
            for part in self._beyond:
                part.zero_()

    def inputs(self, strip: Strip) -> Tensor:
        """Overlapping tiles of inputs, a view (6, 6, images, rows, columns, C)."""
        return self._tiles(self.framed[strip.images, OUT * strip.first :], strip.rows, IN)

    def results(self, strip: Strip) -> Tensor:
        """Tiles of results, a view (4, 4, images, rows, columns, C)."""
        return self._tiles(self.framed[strip.images, 1 + OUT * strip.first :, 1:], strip.rows, OUT)

    def _tiles(self, part: Tensor, rows: int, side: int) -> Tensor:
        image, row, column, channel = part.stride()
        shape = (side, side, part.shape[0], rows, self._columns, part.shape[-1])
        strides = (row, column, image, OUT * row, OUT * column, channel)
        return part.as_strided(shape, strides, part.storage_offset())


class Size(NamedTuple):
    """Of the maps that run through dense blocks."""

    batch: int
    height: int
    width: int
    channels: int
    growth: int
    convs: int

    def strips(self) -> list[Strip]:
        """All tiles, about `STRIP_TILES` at a time."""
        down, across = -(-self.height // OUT), -(-self.width // OUT)
        images = max(1, STRIP_TILES // (down * across))
        rows = min(down, max(1, STRIP_TILES // across))
        return [
            Strip(slice(i, min(i + images, self.batch)), first, min(rows, down - first))
            for i, first in itertools.product(range(0, self.batch, images), range(0, down, rows))
        ]


class StripBuffers:
    """What one strip needs: views of its tiles, what is transformed of them, and room for products and results."""

    def __init__(self, size: Size, strip: Strip, maps: Maps, grown: Maps, shared: list[Tensor]) -> None:
        self.of_maps = _Tiles(maps, strip, shared)
        self.of_grown = _Tiles(grown, strip, shared)
        widths = [size.channels] + [size.growth] * (size.convs - 1)
        tiles = self.of_maps.tiles
        self.transformed = [torch.empty(IN * IN, tiles, width) for width in widths]


class _Tiles:
    """Views of the tiles of one strip of a map, and room for them that all strips share."""

    def __init__(self, maps: Maps, strip: Strip, shared: list[Tensor]) -> None:
        self.inputs, self.results = maps.inputs(strip), maps.results(strip)
        self.tiles, channels = self.results.shape[2:5].numel(), self.results.shape[-1]
        gathered, products, result = shared
        values = self.tiles * channels
        self.gathered = gathered[: IN * IN * values].view(self.inputs.shape)
        self.products = products[: (IN * IN + 1) * values].view(IN * IN + 1, self.tiles, channels)
        self.product, self.bias = self.products[:-1], self.products[-1]
        self.result = result[: self.results.numel()].view(self.results.shape)


class Buffers:
    """Everything that dense blocks on maps of one size write to."""

    @torch.inference_mode(False)  # whoever asks first, they may be written to outside inference mode too
    def __init__(self, size: Size) -> None:
        self.maps = Maps(*size[:4])
        self.grown = Maps(*size[:3], size.growth)
        strips = size.strips()
        most = max((s.images.stop - s.images.start) * s.rows for s in strips) * -(-size.width // OUT)
        most *= max(size.channels, size.growth)
        shared = [torch.empty(count * most) for count in (IN * IN, IN * IN + 1, OUT * OUT)]
        self.strips = [StripBuffers(size, strip, self.maps, self.grown, shared) for strip in strips]


class BufferPool:
    """Buffers of the sizes of maps that were seen last; large ones are made anew each time."""

    def __init__(self) -> None:
        self._kept: list[tuple[Size, Buffers]] = []

    def take(self, size: Size) -> Buffers:
        """Buffers that nobody else has."""
        for i, (kept, _) in enumerate(self._kept):
            if kept == size:
                return self._kept.pop(i)[1]
        return Buffers(size)

    def give_back(self, size: Size, buffers: Buffers) -> None:
        """For the next one of this size."""
        if size.batch * size.height * size.width <= KEPT_PIXELS:
            self._kept = [*self._kept[-KEPT_SIZES + 1 :], (size, buffers)]


class DenseChain(nn.Module):
    """The convolutions of a dense block: y_k = GELU(conv_k([x, y_1, ..., y_k-1])), x + s·conv_n([x, y_1, ...]).

    `forward` takes buffers whose maps hold x, and leaves the result in their place.
    """

    def __init__(self, convs: Sequence[nn.Conv2d], residual: float) -> None:
        super().__init__()
        channels, growth = convs[0].in_channels, convs[0].out_channels
        self.kernels: list[list[Tensor]] = []
        """Of each convolution, for each of its inputs: (36, C, O)."""
        self.biases: list[Tensor] = []
        for k, conv in enumerate(convs):
            scale = residual if conv is convs[-1] else 1.0
            kernel = (scale * transformed_kernel(conv.weight)).float()
            parts = torch.split(kernel, [channels] + [growth] * k, dim=1)
            self.kernels.append([part.contiguous() for part in parts])
            assert conv.bias is not None  # noqa: S101 - for the type checker
            self.biases.append((scale * conv.bias.detach()).float())
        a, _, b = interpolation()
        self.input_transform = torch.kron(b, b).float()  # (36, 36)
        # The last column adds the bias, which stands as one more product.
        self.output_transform = torch.cat((torch.kron(a, a), torch.ones(OUT * OUT, 1)), dim=1).float()  # (16, 37)

    def forward(self, buffers: Buffers) -> None:
        *inner, last = range(len(self.kernels))
        for strip in buffers.strips:
            self._transform(strip.of_maps, strip.transformed[0])
        for k in inner:
            for strip in buffers.strips:
                self._convolve(k, strip.transformed, strip.of_grown)
                torch.ops.aten.gelu_(strip.of_grown.result)
                strip.of_grown.results.copy_(strip.of_grown.result)
            buffers.grown.clear_beyond()
            for strip in buffers.strips:
                self._transform(strip.of_grown, strip.transformed[k + 1])
        for strip in buffers.strips:
            self._convolve(last, strip.transformed, strip.of_maps)
            strip.of_maps.results.add_(strip.of_maps.result)
        buffers.maps.clear_beyond()

    def _transform(self, tiles: _Tiles, out: Tensor) -> None:
        """Bᵀ d B of each tile, (36, tiles, C)."""
        tiles.gathered.copy_(tiles.inputs)
        torch.mm(self.input_transform, tiles.gathered.view(IN * IN, -1), out=out.view(IN * IN, -1))

    def _convolve(self, k: int, transformed: list[Tensor], tiles: _Tiles) -> None:
        """Convolution k of what was transformed so far, as tiles of results before the activation."""
        first, *others = zip(transformed, self.kernels[k], strict=False)
        torch.bmm(*first, out=tiles.product)
        for part, kernel in others:
            tiles.product.baddbmm_(part, kernel)
        tiles.bias.copy_(self.biases[k])
        torch.mm(self.output_transform, tiles.products.view(IN * IN + 1, -1), out=tiles.result.view(OUT * OUT, -1))
