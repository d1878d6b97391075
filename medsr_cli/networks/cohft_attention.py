"""Cohf-T's attention as the paper has it: within windows of one modality, and of patches to those of the other.

Paper: C. Fang et al., "Cross-Modality High-Frequency Transformer for MR Image Super-Resolution", ACM Multimedia
2022, doi 10.1145/3503161.3547804, arXiv 2203.15314, equations 2 to 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.cohft_blocks import conv3
from medsr_cli.networks.rdst import convolve_tokens
from medsr_cli.networks.windows import merge_windows, partition_windows


class Embedding(nn.Module):
    """LN, 1x1 convolution, LN, GELU: (N, d, H, W) to tokens (N, H, W, d).

    A reference at ρ times the resolution has a ρxρ convolution of stride ρ in its place. The layer
    norms are over the channels of each pixel, which the paper does not say.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, stride, stride)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.norm1(features.permute(0, 2, 3, 1))  # (N, ρH, ρW, d)
        return F.gelu(self.norm2(convolve_tokens(self.conv, tokens)))


class HeadProjection(nn.Module):
    """The linear maps of all heads, no bias: tokens (B, n, D) to (B, M, n, D/M)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width // heads, width))  # (M, d', D): it tells M
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)  # as nn.Linear

    def forward(self, tokens: Tensor) -> Tensor:
        heads, width, _ = self.weight.shape
        batch, count, _ = tokens.shape
        flat = F.linear(tokens, self.weight.flatten(0, 1))  # (B, n, D)
        return flat.view(batch, count, heads, width).transpose(1, 2)  # (B, M, n, d')


def correlate_heads(values: Tensor) -> Tensor:
    """u_i^(m) = v_i^(m) + Σ_j A_i,mj v_i^(j), A_i = softmax_j(v_i^(m)·v_i^(j)) (equations 4 and 5).

    Each token mixes its own M heads: (B, M, n, d') to tokens (B, n, M·d').
    """
    by_token = values.transpose(1, 2)  # (B, n, M, d')
    correlation = (by_token @ by_token.transpose(-2, -1)).softmax(dim=-1)  # (B, n, M, M), no scale
    return (by_token + correlation @ by_token).flatten(2)


class Attention(nn.Module):
    """The basic attention module on tokens of D = d·p² values (equations 2 to 5), (B, n, D) twice to (B, n, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_q = HeadProjection(width, heads)
        self.to_k = HeadProjection(width, heads)
        self.to_v = HeadProjection(width, heads)

    def forward(self, query: Tensor, reference: Tensor) -> Tensor:
        q, k, v = self.to_q(query), self.to_k(reference), self.to_v(reference)
        return correlate_heads(F.scaled_dot_product_attention(q, k, v))  # softmax(q kᵀ / √d') v, all heads


class ResidualMlp(nn.Module):
    """x + conv1x1(GELU(LN(conv1x1(LN(x))))), all of width d, on (N, d, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.fc1(self.norm1(features.permute(0, 2, 3, 1)))  # (N, H, W, d)
        out: Tensor = features + self.fc2(F.gelu(self.norm2(tokens))).permute(0, 3, 1, 2)
        return out


def partition_strided(tokens: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B, H/g, W/g, g², C): window (u, v) has the pixels (u + a·H/g, v + b·W/g), a, b < g."""
    b, h, w, c = tokens.shape
    grid = tokens.view(b, window, h // window, window, w // window, c)  # (B, a, u, b, v, C)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, h // window, w // window, window * window, c)


def merge_strided(windows: Tensor, window: int) -> Tensor:
    """The inverse of `partition_strided`."""
    b, rows, columns, _, c = windows.shape
    grid = windows.view(b, rows, columns, window, window, c)  # (B, u, v, a, b, C)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, rows * window, columns * window, c)


class WindowAttention(nn.Module):
    """Intra-modality attention among the pixels of a window, then the residual MLP.

    Short-distance windows are compact, long-distance ones take every (H/g)th row and (W/g)th column. The same
    features are query and reference, each with an embedding of its own; a 3x3 convolution ends the module.
    """

    def __init__(self, channels: int, heads: int, window: int, *, strided: bool) -> None:
        super().__init__()
        self.window = window
        self.partition = partition_strided if strided else partition_windows
        self.merge = merge_strided if strided else merge_windows
        self.embed_query = Embedding(channels)
        self.embed_reference = Embedding(channels)
        self.attention = Attention(channels, heads)
        self.conv_end = conv3(channels, channels)
        self.mlp = ResidualMlp(channels)

    def forward(self, features: Tensor) -> Tensor:
        query = self.partition(self.embed_query(features), self.window)  # (N, H/g, W/g, g², d)
        reference = self.partition(self.embed_reference(features), self.window)
        mixed = self.attention(query.flatten(0, 2), reference.flatten(0, 2)).view_as(query)
        folded = self.merge(mixed, self.window).permute(0, 3, 1, 2)  # (N, d, H, W)
        out: Tensor = self.mlp(features + self.conv_end(folded))
        return out


class InterModalityAttention(nn.Module):
    """Patches of the branch attend to all patches of the adapted T1 features, then the residual MLP.

    (features (N, d, H, W), guide (N, d, sH, sW)) to (N, d, H, W).
    """

    def __init__(self, channels: int, scale: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed_query = Embedding(channels)
        self.embed_reference = Embedding(channels, stride=scale)
        self.attention = Attention(channels * patch**2, heads)
        self.conv_end = conv3(channels, channels)
        self.mlp = ResidualMlp(channels)

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        query = partition_windows(self.embed_query(features), self.patch)  # (N, H/p, W/p, p², d)
        reference = partition_windows(self.embed_reference(guide), self.patch)
        mixed = self.attention(query.flatten(3).flatten(1, 2), reference.flatten(3).flatten(1, 2))  # (N, n, d·p²)
        folded = merge_windows(mixed.view_as(query), self.patch).permute(0, 3, 1, 2)  # (N, d, H, W)
        out: Tensor = self.mlp(features + self.conv_end(folded))
        return out
