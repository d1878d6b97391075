"""MS-GAN's generator arranged for inference on a CPU: the same results from a quarter of the multiplications.

All convolutions from features to features run as Winograd's F(4x4, 3x3), see `winograd`; what transforms and copies
take back leaves about 1.5 times the speed of the plain network. Each strip of tiles is transformed, multiplied,
transformed back, activated and added while it is in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.msgan import Extractor, MsGan
from medsr_cli.networks.winograd import IN, OUT, Maps, Size, Strip, interpolation, transformed_kernel

SMALLEST_FEATURES = 48
"""Channels from which the products saved are more than what the transforms cost."""


class Work(NamedTuple):
    """Room for one strip, shared by all convolutions of a pass over maps of one size."""

    strips: list[Strip]
    gathered: Tensor
    transformed: Tensor
    products: Tensor
    result: Tensor

    @classmethod
    def on(cls, maps: Maps, widest: int) -> Work:
        """For maps of this size, of so many channels at most."""
        n, h, w, c = maps.inner.shape
        strips = Size(n, h, w, c, c, 1).strips()
        values = max(maps.results(strip).shape[2:5].numel() for strip in strips) * widest
        areas = (IN * IN, IN * IN, IN * IN + 1, OUT * OUT)
        return cls(strips, *(torch.empty(area * values) for area in areas))


class TileConvolution(nn.Module):
    """A 3x3 convolution with zeros at the rim, from maps to maps: f(conv(x)), or added to the target; f may be ReLU."""

    kernel: Tensor
    bias: Tensor
    into: Tensor
    back: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        a, _, b = interpolation()
        self.register_buffer("kernel", transformed_kernel(conv.weight).float())  # (36, C, O)
        self.register_buffer("bias", conv.get_parameter("bias").detach().clone())
        self.register_buffer("into", torch.kron(b, b).float())  # (36, 36)
        # The last column adds the bias, which stands as one more product.
        self.register_buffer("back", torch.cat((torch.kron(a, a), torch.ones(OUT * OUT, 1)), dim=1).float())  # (16, 37)

    def forward(self, source: Maps, target: Maps, work: Work, relu: bool, add: bool = False) -> None:
        c, o = self.kernel.shape[1:]
        for strip in work.strips:
            inputs, results = source.inputs(strip), target.results(strip)
            tiles = results.shape[2:5].numel()
            gathered = work.gathered[: IN * IN * tiles * c]
            transformed = work.transformed[: IN * IN * tiles * c]
            products = work.products[: (IN * IN + 1) * tiles * o].view(IN * IN + 1, tiles, o)
            result = work.result[: OUT * OUT * tiles * o]
            gathered.view(inputs.shape).copy_(inputs)
            torch.mm(self.into, gathered.view(IN * IN, -1), out=transformed.view(IN * IN, -1))
            torch.bmm(transformed.view(IN * IN, tiles, c), self.kernel, out=products[:-1])
            products[-1] = self.bias
            torch.mm(self.back, products.flatten(1), out=result.view(OUT * OUT, -1))
            if relu:
                result.relu_()
            if add:
                results.add_(result.view(results.shape))
            else:
                results.copy_(result.view(results.shape))
        target.clear_beyond()


class ReadyExtractor(nn.Module):
    """`msgan.Extractor` without norms; its first convolution is left to the caller."""

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        blocks = list(extractor.blocks.children())
        self.second_relu = bool(blocks[0].second_relu)
        self.first = nn.ModuleList(TileConvolution(block.get_submodule("conv1")) for block in blocks)  # type: ignore[arg-type]
        self.second = nn.ModuleList(TileConvolution(block.get_submodule("conv2")) for block in blocks)  # type: ignore[arg-type]
        self.tail = TileConvolution(extractor.tail)

    def forward(self, shallow: Maps, work: Work) -> Maps:
        x, inner = like(shallow), like(shallow)
        x.framed.copy_(shallow.framed)
        for first, second in zip(self.first, self.second, strict=True):
            first(x, inner, work, relu=True)
            second(inner, x, work, relu=self.second_relu, add=True)
        self.tail(x, shallow, work, relu=False, add=True)
        return shallow


class ReadyMsGan(nn.Module):
    """`MsGan` for inference on a CPU in float32: same inputs, same results.

    Args:
        net: without norms, see `msgan.made_ready`.
    """

    def __init__(self, net: MsGan) -> None:
        super().__init__()
        self.config, self.reach = net.config, net.reach
        self.head = net.f1.head
        self.f1, self.m1, self.c1 = ReadyExtractor(net.f1), TileConvolution(shuffled(net.m1.conv)), net.c1
        self.head2, self.f2 = None, None
        if isinstance(net.f2, Extractor):
            self.head2, self.f2 = TileConvolution(net.f2.head), ReadyExtractor(net.f2)
        self.m2, self.c2 = TileConvolution(shuffled(net.m2.conv)), net.c2

    def forward(self, image: Tensor) -> Tensor:
        """SR×4 alone."""
        return self._second_stage(self._features(image))

    def stages(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """SR×2 and SR×4."""
        features = self._features(image)
        return to_image(self.c1, features), self._second_stage(features)

    def _features(self, image: Tensor) -> Maps:
        n, _, h, w = image.shape
        maps = Maps(n, h, w, self.config.n_feats)
        maps.inner.copy_(F.relu(self.head(image), inplace=True).permute(0, 2, 3, 1))
        work = Work.on(maps, 4 * self.config.n_feats)
        return magnified(self.m1, self.f1(maps, work), work)

    def _second_stage(self, features: Maps) -> Tensor:
        work = Work.on(features, 4 * self.config.n_feats)
        if self.head2 is not None and self.f2 is not None:
            shallow = like(features)
            self.head2(features, shallow, work, relu=True)
            features = self.f2(shallow, work)
        return to_image(self.c2, magnified(self.m2, features, work))


def like(maps: Maps) -> Maps:
    """Empty maps of the same size."""
    n, h, w, c = maps.inner.shape
    return Maps(n, h, w, c)


def shuffled(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution before a shuffle by 2 with its results in the order (row, column, channel)."""
    other = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    order = torch.arange(conv.out_channels).view(-1, 4).T.flatten()
    with torch.no_grad():
        other.weight.copy_(conv.weight[order])
        other.get_parameter("bias").copy_(conv.get_parameter("bias")[order])
    return other


def magnified(conv: TileConvolution, features: Maps, work: Work) -> Maps:
    """`msgan.Magnifier`: features of twice the rows and columns."""
    n, h, w, c = features.inner.shape
    wide, out = Maps(n, h, w, 4 * c), Maps(n, 2 * h, 2 * w, c)
    conv(features, wide, work, relu=True)
    for row in range(2):
        for column in range(2):
            part = c * (2 * row + column)
            out.inner[:, row::2, column::2] = wide.inner[..., part : part + c]
    return out


def to_image(conv: nn.Conv2d, features: Maps) -> Tensor:
    """A convolution to few channels: a product with all of its taps, and their sum, each shifted to its place."""
    _, h, w, _ = features.inner.shape
    o = conv.out_channels
    taps = F.linear(features.framed, conv.weight.permute(2, 3, 0, 1).flatten(0, 2))  # (N, H + 2, W + 2, 9·O), or more
    total = conv.get_parameter("bias").expand(*features.inner.shape[:3], o).clone()
    for i in range(3):
        for j in range(3):
            tap = o * (3 * i + j)
            total += taps[:, i : i + h, j : j + w, tap : tap + o]
    return total.permute(0, 3, 1, 2)
