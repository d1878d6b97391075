"""What the two Cohf-Ts have in common: gradient map, dense blocks, enlargement, adaptive norm, and what they refuse.

Paper: C. Fang et al., "Cross-Modality High-Frequency Transformer for MR Image Super-Resolution", ACM Multimedia
2022, doi 10.1145/3503161.3547804, arXiv 2203.15314. See `cohft` and `cohft_released`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTORS = {2: (2,), 3: (3,), 4: (2, 2)}
"""The steps of sub-pixel enlargement that make up each scale."""
RESIDUAL = 0.2
"""What dense blocks are multiplied with before their input is added."""
GRADIENT_FLOOR = 1e-6
"""Added below the root of the gradient map, which is then never flat at zero."""
LONGEST_WINDOW = 64
"""Longest side of a window or patch; a file that declares more is refused before memory is asked for."""


def refuse_sizes(scale: int, counts: tuple[int, ...], convs: int) -> None:
    """Raise ValueError for a scale without enlargement, a count below one, or dense blocks of one convolution."""
    if scale not in FACTORS:
        msg = f"Cohf-T enlarges by {', '.join(map(str, FACTORS))}, not by {scale}."
        raise ValueError(msg)
    if min(counts) < 1 or convs < 2:
        msg = "Cohf-T needs at least one stage, one RRDB, one dense block, one feature and two convolutions in each."
        raise ValueError(msg)


def refuse_heads(heads: int, widths: tuple[int, ...]) -> None:
    """Raise ValueError where tokens cannot be divided among the heads."""
    if heads < 1 or any(width < 1 or width % heads for width in widths):
        msg = f"Tokens of {', '.join(map(str, widths))} values cannot be divided among {heads} heads."
        raise ValueError(msg)


def conv3(n_in: int, n_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(n_in, n_out, 3, padding=1)


def gradient_map(image: Tensor) -> Tensor:
    """Magnitude of central differences without the half, sqrt(v² + h² + 1e-6), zeros outside the image.

    Args:
        image: (N, C, H, W), any values. The map has the same shape; it is also the target of the gradient loss.
    """
    padded = F.pad(image, (1, 1, 1, 1))
    v = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    h = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    return torch.sqrt(v * v + h * h + GRADIENT_FLOOR)


class DenseBlock(nn.Module):
    """RDB: x + 0.2·c(x), each 3x3 convolution fed with the input and all results before it."""

    def __init__(self, channels: int, growth: int, convs: int) -> None:
        super().__init__()
        for k in range(1, convs):
            widened = channels + (k - 1) * growth
            self.add_module(f"conv{k}", nn.Sequential(conv3(widened, growth), nn.GELU()))
        self.add_module(f"conv{convs}", nn.Sequential(conv3(channels + (convs - 1) * growth, channels)))

    def forward(self, features: Tensor) -> Tensor:
        *inner, last = self.children()
        dense = features
        for layer in inner:
            dense = torch.cat((dense, layer(dense)), dim=1)  # (N, n + k·g, H, W)
        return torch.add(features, last(dense), alpha=RESIDUAL)


class Rrdb(nn.Module):
    """RRDB: x + 0.2·r(x), r being the dense blocks one after another."""

    def __init__(self, channels: int, growth: int, rdbs: int, convs: int) -> None:
        super().__init__()
        for k in range(1, rdbs + 1):
            self.add_module(f"RDB{k}", DenseBlock(channels, growth, convs))

    def forward(self, features: Tensor) -> Tensor:
        deep = features
        for block in self.children():
            deep = block(deep)
        return torch.add(features, deep, alpha=RESIDUAL)


def upsampler(channels: int, scale: int) -> list[nn.Module]:
    """Sub-pixel enlargement: 3x3 convolution, pixel shuffle and GELU for each factor."""
    layers: list[nn.Module] = []
    for factor in FACTORS[scale]:
        layers += [conv3(channels, channels * factor**2), nn.PixelShuffle(factor), nn.GELU()]
    return layers


class AdaptiveInstanceNorm(nn.Module):
    """AdaIN: brings the guide's features to the mean and deviation of the query, shaped by both.

    (query (N, d, H, W), guide (N, d, sH, sW)) to IN(guide)·(γ + σ) + (β + μ), where γ and β are convolutions of the
    enlarged query beside the guide, and μ, σ are statistics of each channel of the query. They start at zero.
    """

    def __init__(self, channels: int, scale: int, affine: int, *, released: bool = False) -> None:
        super().__init__()
        self.conv_noshared = nn.Sequential(conv3(channels, channels * scale**2), nn.GELU(), nn.PixelShuffle(scale))
        self.conv_shared = nn.Sequential(conv3(2 * channels, channels), nn.GELU())
        self.conv_gamma = conv3(channels, affine)
        self.conv_beta = conv3(channels, affine)
        self.released = released
        """The released deviation is unbiased and has no epsilon; the paper's is that of instance norm."""
        for conv in (self.conv_gamma, self.conv_beta):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type] # made with a bias

    def forward(self, query: Tensor, guide: Tensor, normed: Tensor | None = None) -> Tensor:
        """With `normed`, IN(guide) is not computed again: it is the same in every stage."""
        rows = query.flatten(2).contiguous()  # (N, d, H·W): slow to reduce with the channels last
        variance, mean = torch.var_mean(rows, dim=2, correction=int(self.released), keepdim=True)
        variance, mean = variance[..., None], mean[..., None]  # (N, d, 1, 1)
        deviation = torch.sqrt(variance if self.released else variance + 1e-5)
        shared = self.conv_shared(torch.cat((self.conv_noshared(query), guide), dim=1))  # (N, d, sH, sW)
        normed = F.instance_norm(guide) if normed is None else normed
        return torch.addcmul(self.conv_beta(shared) + mean, normed, self.conv_gamma(shared) + deviation)


def refuse_other_grid(image: Tensor, guide: Tensor, scale: int) -> None:
    """Raise ValueError unless both have one channel and the guide lies on the enlarged grid of the image."""
    n, channels, h, w = image.shape
    if channels != 1 or tuple(guide.shape) != (n, 1, scale * h, scale * w):
        msg = (
            f"Cohf-T x{scale} needs a guide of shape {(n, 1, scale * h, scale * w)} for an image of shape "
            f"{(n, 1, h, w)}; it got {tuple(guide.shape)} and {tuple(image.shape)}."
        )
        raise ValueError(msg)


def count_numbered(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many of the keys `pattern.format(1)`, `pattern.format(2)`, ... there are without a gap."""
    count = 0
    while pattern.format(count + 1) in state:
        count += 1
    return count


def square_side(area: int, what: str) -> int:
    """The side of a square, or a ValueError that names what should have been one."""
    side = math.isqrt(max(area, 0))
    if side < 1 or side * side != area:
        msg = f"{what} of {area} is not square"
        raise ValueError(msg)
    return side
