"""The attention of the released Cohf-T: between windows, and of patches to those of the other modality.

See `cohft_released` for the source and for what differs from the paper; `side`, `window`, `patch`, `heads`, `scale`
and `feature_dim` are those of its configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.cohft_blocks import conv3

if TYPE_CHECKING:
    from medsr_cli.networks.cohft_released import ReleasedCohftConfig


class HeadCorrelation(nn.Module):
    """A + γ·softmax_rows(A Aᵀ)·A for the matrix A of d' rows and M·n columns, head-major."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, values: Tensor) -> Tensor:
        n, heads, tokens, width = values.shape
        a = values.permute(0, 3, 1, 2).reshape(n, width, heads * tokens)  # (N, d', M·n)
        mixed = (a @ a.transpose(1, 2)).softmax(dim=-1) @ a
        return (a + self.gamma * mixed).view(n, width, heads, tokens).permute(0, 2, 3, 1)  # (N, M, n, d')


class TokenAttention(nn.Module):
    """Attention of tokens X to tokens Z, both (N, n, D): proj(X + O + q), O the heads' results after correlation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv_other = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.layer_att_other = HeadCorrelation()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        query = self.to_q(x)
        q, k, v = (self._split(part) for part in (query, *self.to_kv_other(z).chunk(2, dim=-1)))
        heads = self.layer_att_other(F.scaled_dot_product_attention(q, k, v))  # (N, M, n, D/M)
        out: Tensor = self.proj(x + heads.transpose(1, 2).flatten(2) + query)
        return out

    def _split(self, tokens: Tensor) -> Tensor:
        """(N, n, D) to (N, M, n, D/M)."""
        n, count, width = tokens.shape
        return tokens.reshape(n, count, self.heads, width // self.heads).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class WindowBlock(nn.Module):
    """Attention between windows, each of which is one token of d·w² values, (N, d, R, R) to the same.

    Neither way back to a map is the inverse of its cut. Short distance: compact windows, whose tokens are written
    one after another into each channel in raster order. Long distance: window (u, v) has the pixels
    (u + k·a, v + k·b), k = R/w, and the tokens are stacked as channels (token, channel) and pixel-shuffled by k.
    """

    def __init__(self, config: ReleasedCohftConfig, *, strided: bool) -> None:
        super().__init__()
        c, d, side = config, config.feature_dim, (config.side, config.side)
        self.strided, self.window, self.side = strided, c.window, c.side
        width, tokens = d * c.window**2, (c.side // c.window) ** 2
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.pos_embedding_simi = nn.Parameter(torch.zeros(1, tokens, width))
        self.norm1 = nn.LayerNorm(width)  # not applied
        self.attn = TokenAttention(width, c.heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.con1 = nn.Conv2d(d, d, 1)
        self.con4 = nn.Conv2d(d, d, 1)
        self.ln11 = nn.LayerNorm(side)
        self.ln12 = nn.LayerNorm(side)
        self.ln21 = nn.LayerNorm(side)
        self.ln22 = nn.LayerNorm(side)

    def forward(self, features: Tensor) -> Tensor:
        x = self._cut(F.gelu(self.ln12(self.con1(self.ln11(features))))) + self.pos_embedding
        z = self._cut(F.gelu(self.ln22(self.con4(self.ln21(features))))) + self.pos_embedding_simi
        x = self.attn(x, z) + x
        return self._scramble(x + self.mlp(self.norm2(x)))

    def _cut(self, features: Tensor) -> Tensor:
        """(N, d, R, R) to (N, k², d·w²), values in order (channel, row, column)."""
        n, d, side, _ = features.shape
        w, k = self.window, side // self.window
        if self.strided:
            grid = features.reshape(n, d, w, k, w, k).permute(
                0, 3, 5, 1, 2, 4
            )  # (N, d, a, u, b, v) to (N, u, v, d, a, b)
        else:
            grid = features.reshape(n, d, k, w, k, w).permute(
                0, 2, 4, 1, 3, 5
            )  # (N, d, u, a, v, b) to (N, u, v, d, a, b)
        return grid.reshape(n, k * k, d * w * w)

    def _scramble(self, tokens: Tensor) -> Tensor:
        """(N, k², d·w²) to (N, d, R, R), not the inverse of `_cut`."""
        n, count, width = tokens.shape
        w, side, d = self.window, self.side, width // self.window**2
        if self.strided:
            stacked = tokens.reshape(n, count * d, w, w)  # channels (token, channel)
            return F.pixel_shuffle(stacked, side // w)
        by_channel = tokens.view(n, count, d, w * w).transpose(1, 2)  # (N, d, k², w²)
        return by_channel.reshape(n, d, side, side)


class WindowBlocks(nn.Module):
    """Short distance, then long distance."""

    def __init__(self, config: ReleasedCohftConfig) -> None:
        super().__init__()
        self.swin_normal = WindowBlock(config, strided=False)
        self.swin_downshuffle = WindowBlock(config, strided=True)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.swin_downshuffle(self.swin_normal(features))
        return out


class CrossAttention(nn.Module):
    """X̂ = LN(X), X1 = X̂ + Attn(X̂, LN(Z)), X2 = X1 + MLP(LN(X1)); returns X2 + X."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.x_norm1 = nn.LayerNorm(width)
        self.c_norm1 = nn.LayerNorm(width)
        self.attn = TokenAttention(width, heads)
        self.x_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        normed = self.x_norm1(x)
        first = normed + self.attn(normed, self.c_norm1(z))
        out: Tensor = first + self.mlp(self.x_norm2(first)) + x
        return out


class InterModality(nn.Module):
    """Inter-modality attention: s (N, d, R, R) attends to a (N, d, rR, rR), in patches; returns s + conv(result).

    GELU acts twice on both: on the maps and again on the tokens, before the second position table is added but
    after the first.
    """

    def __init__(self, config: ReleasedCohftConfig) -> None:
        super().__init__()
        c, d = config, config.feature_dim
        low, high = (c.side, c.side), (c.scale * c.side, c.scale * c.side)
        self.patch, self.side = c.patch, c.side
        width, tokens = d * c.patch**2, (c.side // c.patch) ** 2
        self.x_pos_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.complement_pos_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.con1 = nn.Conv2d(d, d, 1)
        self.con4 = nn.Conv2d(d, d, c.scale, c.scale)
        self.cross_transformer = nn.ModuleDict({"cross_att": CrossAttention(width, c.heads)})
        self.ln11 = nn.LayerNorm(low)
        self.ln12 = nn.LayerNorm(low)
        self.ln21 = nn.LayerNorm(high)
        self.ln22 = nn.LayerNorm(low)
        self.conv_end = conv3(d, d)

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        x = self._cut(F.gelu(self.ln12(self.con1(self.ln11(s)))))
        z = self._cut(F.gelu(self.ln22(self.con4(self.ln21(a)))))
        x = F.gelu(x + self.x_pos_embedding)
        z = F.gelu(z) + self.complement_pos_embedding
        out: Tensor = s + self.conv_end(self._fold(self.cross_transformer["cross_att"](x, z)))
        return out

    def _cut(self, features: Tensor) -> Tensor:
        """(N, d, R, R) to (N, n, p²·d), values in order (row, column, channel)."""
        n, d, side, _ = features.shape
        p, k = self.patch, side // self.patch
        grid = features.reshape(n, d, k, p, k, p)  # (N, d, i, a, j, b)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, k * k, p * p * d)

    def _fold(self, tokens: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        n, _, width = tokens.shape
        p, k, d = self.patch, self.side // self.patch, width // self.patch**2
        grid = tokens.view(n, k, k, p, p, d)  # (N, i, j, a, b, d)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, d, self.side, self.side)
