"""M2Trans arranged for inference and for export: the same results from fewer passes over memory.

Rearrangements of `medsr_cli.networks.m2trans`, none of which is in the paper:

- The Haar transforms vanish. They are linear, as is the projection to q, k and v that follows, and their inverse
  commutes with the weights of attention. With a patch t of 2^L by 2^L pixels as one token and H the transform,
  q = (Wq·H)·t, k = (Wk·H)·t and the inverse of v, (Hᵀ·Wv·H)·t, are what the bands give.
- Pixels are kept in an order in which every patch and every block of all four branches is a run of its own, so that
  taking patches and blocks apart is a view: one copy into this order and one out of it for a whole CFTM.
- The windows of keys are tokens looked up by indices that depend on the size alone, so that all CFTMs share them. A
  token of zeros after the last one stands for everything beyond the border.
- In a graph, the tail works on tokens too, where a shuffle is a view: see `GraphTail`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.m2trans import (
    HALO,
    WAVELET_LEVELS,
    BlockAttention,
    CoarseToFineBlock,
    M2Trans,
    M2TransConfig,
    haar_split,
    instance_norm,
    tail_by_strips,
    wants_strips,
)

LEVELS = (0, 1, WAVELET_LEVELS, WAVELET_LEVELS)
"""Haar levels of the four branches."""
SIZES_KEPT = 4
"""Layouts that are remembered: 41 bytes for each pixel of the padded image."""


class Layout(NamedTuple):
    """What depends on rows and columns alone; P = H'·W' pixels of the padded image."""

    rows: Tensor
    """The image's row at each row of the padded image, (H',)."""
    columns: Tensor
    """The image's column at each of its columns, (W',)."""
    order: Tensor
    """The padded image's pixel, counted row by row, at each place of the blocks' order, (P,)."""
    place: Tensor
    """The inverse: each pixel's place in that order, (P,)."""
    windows: tuple[Tensor, ...]
    """For each Haar level the tokens that each block looks at, (blocks·(b + 2)²,); P/4^level stands for zeros."""


def layout(h: int, w: int, config: M2TransConfig, device: torch.device) -> Layout:
    """The layout of one size, in tensor arithmetic throughout, so that it can stand in a graph."""
    m = config.multiple
    rows, columns = (padding(side, config, device) for side in (h, w))
    tall, wide = rows.shape[0], columns.shape[0]
    inner = torch.tensor(z_order(m), device=device)  # (m², 2)
    top = torch.arange(tall // m, device=device).view(-1, 1, 1)
    left = torch.arange(wide // m, device=device).view(1, -1, 1)  # of large blocks, each m by m
    y = (top * m + inner[:, 0] + 0 * left).flatten()  # (P,)
    x = (left * m + inner[:, 1] + 0 * top).flatten()
    within = torch.tensor([[z_place(i, j) for j in range(m)] for i in range(m)], device=device)
    block = top[..., None] * (wide // m) + left[..., None]  # (H'/m, W'/m, 1, 1)
    place = (block.transpose(1, 2) * m**2 + within[:, None]).flatten()  # (H'/m, m, W'/m, m) to (P,)
    windows = []
    for level in range(WAVELET_LEVELS + 1):
        side, area = 2**level, 4**level
        reach = torch.arange(-HALO, config.block_size + HALO, device=device) * side
        first = config.block_size**2 * area  # pixels of a block; its first one is its top left
        ky = y.view(-1, first)[:, :1, None] + reach[:, None]  # top left of the keys' patches, (blocks, b + 2, 1)
        kx = x.view(-1, first)[:, :1, None] + reach  # (blocks, 1, b + 2)
        inside = (ky >= 0) & (ky < tall) & (kx >= 0) & (kx < wide)
        tokens = place[torch.where(inside, ky * wide + kx, 0)] // area
        windows.append(torch.where(inside, tokens, place.shape[0] // area).flatten())
    return Layout(rows, columns, y * wide + x, place, tuple(windows))


@lru_cache(maxsize=SIZES_KEPT)
def remembered_layout(h: int, w: int, config: M2TransConfig, device: torch.device) -> Layout:
    """`layout`, made once for each size."""
    return layout(h, w, config, device)


def padding(side: int, config: M2TransConfig, device: torch.device) -> Tensor:
    """Indices that pad one side as `m2trans.pad_to_blocks` does: the edge repeated, then reflection."""
    m = config.multiple
    repeated = max(side, config.smallest)
    index = torch.arange((repeated + m - 1) // m * m, device=device)
    reflected = (repeated - 1) - (index - (repeated - 1)).abs()
    return reflected.clamp(max=side - 1)


def z_place(row: int, column: int) -> int:
    """Place in Z-order: the binary digits of both, interleaved."""
    return 2 * int(f"{row:b}", 4) + int(f"{column:b}", 4)


def z_order(side: int) -> list[tuple[int, int]]:
    """Rows and columns of a square in Z-order: each aligned square of 2^k by 2^k is one run of it."""
    pixels = [(row, column) for row in range(side) for column in range(side)]
    return sorted(pixels, key=lambda pixel: z_place(*pixel))


def patch_transform(channels: int, levels: int) -> Tensor:
    """Haar bands of each patch that has one value of 1: (n, n) with n = 4^levels·channels, float64.

    Values of a patch are counted pixel by pixel in Z-order, channels innermost.
    """
    side = 2**levels
    n = channels * side**2
    y, x = torch.tensor(z_order(side)).unbind(1)
    bands = torch.zeros(n, side, side, channels, dtype=torch.float64)
    bands[:, y, x] = torch.eye(n, dtype=torch.float64).view(n, side**2, channels)
    for _ in range(levels):
        bands = haar_split(bands)
    return bands.view(n, n)


class ReadyAttention(nn.Module):
    """`BlockAttention` on the Haar bands of patches, with the transform and its inverse inside the projections.

    `forward` takes and returns pixels in the blocks' order, (N, P, C/4).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor

    def __init__(self, attention: BlockAttention, levels: int) -> None:
        super().__init__()
        weight = attention.qkv_conv.weight.detach()
        c = weight.shape[1]
        self.levels, self.queries = levels, attention.block**2
        haar = patch_transform(c // 4**levels, levels)
        q, k, v = (part @ haar.T for part in weight.flatten(1).to("cpu", torch.float64).chunk(3))
        for name, value in (("q", q / math.sqrt(c)), ("k", k), ("v", haar @ v)):
            self.register_buffer(name, value.to(weight))
        self.register_buffer("positions", attention.positions().detach().clone())  # ((b + 2)², c)

    def forward(self, pixels: Tensor, windows: Tensor) -> Tensor:
        n, p, quarter = pixels.shape
        keys, c = self.positions.shape
        tokens = pixels.reshape(n, p // 4**self.levels, c)
        with_zeros = F.pad(tokens, (0, 0, 0, 1))
        k = F.linear(with_zeros, self.k).index_select(1, windows).view(-1, keys, c) + self.positions
        v = F.linear(with_zeros, self.v).index_select(1, windows).view(-1, keys, c)
        q = F.linear(tokens, self.q).view(-1, self.queries, c)  # (N·blocks, b², c)
        if torch.compiler.is_exporting():  # as one operator it is exported with a scale on q and on k
            return q.bmm(k.transpose(1, 2)).softmax(dim=-1).bmm(v).reshape(n, p, quarter)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
        return out.reshape(n, p, quarter)


class ReadyBlock(nn.Module):
    """`CoarseToFineBlock` on pixels in the blocks' order; features are (N, C, H', W')."""

    def __init__(self, block: CoarseToFineBlock) -> None:
        super().__init__()
        attentions = (block.attn1, block.attn2, block.attn3, block.attn4)
        self.attentions = nn.ModuleList(map(ReadyAttention, attentions, LEVELS))
        self.feed_forward = block.feed_forward

    def forward(self, features: Tensor, where: Layout) -> Tensor:
        n, c, h, w = features.shape
        tokens = instance_norm(features, dims=(2, 3)).permute(0, 2, 3, 1).reshape(n, h * w, c)
        pixels = tokens.index_select(1, where.order)
        del tokens  # not needed while the branches run, which take most of the memory
        pixels = self._branches(pixels, where)
        joined = pixels.index_select(1, where.place).view(n, h, w, c)
        out: Tensor = self.feed_forward(joined.permute(0, 3, 1, 2))
        return out + features

    def _branches(self, pixels: Tensor, where: Layout) -> Tensor:
        found: list[Tensor] = []
        for attention, level, branch in zip(self.attentions, LEVELS, pixels.chunk(4, dim=-1), strict=True):
            mixed = (branch + found[-1]) / 2 if found else branch
            found.append(attention(mixed, where.windows[level]) + mixed)
        return torch.cat(found, dim=-1)  # (N, P, C)


class ReadyM2Trans(nn.Module):
    """`M2Trans` for inference: the same inputs and results, for blocks whose side is a power of two."""

    def __init__(self, net: M2Trans) -> None:
        super().__init__()
        self.config = net.config
        self.head, self.tail = net.head, net.tail
        blocks = [block for block in net.body if isinstance(block, CoarseToFineBlock)]
        self.body = nn.ModuleList(map(ReadyBlock, blocks))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in its stubs
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        where = remembered_layout(h, w, self.config, image.device)
        features = self.features(image.contiguous(memory_format=torch.channels_last), where)
        enlarged = tail_by_strips(self.tail, features) if wants_strips(features) else self.tail(features)
        cropped: Tensor = enlarged[..., : h * self.config.scale, : w * self.config.scale]
        return cropped.clamp(0, 1)

    def features(self, image: Tensor, where: Layout) -> Tensor:
        """What the tail enlarges, (N, C, H', W')."""
        shallow: Tensor = self.head(image.index_select(2, where.rows).index_select(3, where.columns))
        features = shallow
        for block in self.body:
            features = block(features, where)
        return features + shallow


class GraphM2Trans(nn.Module):
    """`ReadyM2Trans` as a graph for any batch and size."""

    def __init__(self, net: ReadyM2Trans) -> None:
        super().__init__()
        self.net, self.tail = net, GraphTail(net.tail)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        where = layout(h, w, self.net.config, image.device)
        enlarged: Tensor = self.tail(self.net.features(image, where), h, w)
        return enlarged.clamp(0, 1)


class GraphTail(nn.Module):
    """The tail on tokens: (N, C, H', W') to what of (N, 3, s·H', s·W') belongs to the image, (N, 3, s·H, s·W).

    1x1 convolutions and GELU see single pixels, so that a shuffle only says where a pixel goes: the pixels that
    one becomes stay beside each other. The last convolution is a product with all of its taps at once, and the sum
    over taps, each shifted by its place: engines fill three channels up to eight or more, 27 taps and channels to
    hardly more, and only these are copied into rows and columns, the reflected border with them.
    """

    weight: Tensor

    def __init__(self, tail: nn.Sequential) -> None:
        super().__init__()
        shuffles = [layer for layer in tail if isinstance(layer, nn.PixelShuffle)]
        self.steps = [shuffle.upscale_factor for shuffle in shuffles]
        convolutions = [layer for layer in tail if isinstance(layer, nn.Conv2d)]
        self.enlarging = nn.ModuleList(map(as_linear, convolutions[:-1], self.steps))
        last = convolutions[-1].weight.detach()  # (3, C, 3, 3)
        self.channels = last.shape[0]
        self.register_buffer("weight", last.permute(2, 3, 0, 1).flatten(0, 2).contiguous())  # (tap·3, C)

    def forward(self, features: Tensor, rows: int, columns: int) -> Tensor:
        n, c, h, w = features.shape
        device = features.device
        tokens = features.flatten(2).transpose(1, 2)  # (N, H'·W', C)
        at = torch.arange(h, device=device)[:, None] * w + torch.arange(w, device=device)  # token of each pixel
        for step, layer in zip(self.steps, self.enlarging, strict=True):
            tokens = F.gelu(layer(tokens)).reshape(n, -1, c)  # (N, step²·tokens, C)
            parts = torch.arange(step**2, device=device).view(1, step, 1, step)
            at = (at[:, None, :, None] * step**2 + parts).flatten(2).flatten(0, 1)
            rows, columns = rows * step, columns * step
        seen = at.index_select(0, with_border(rows, at.shape[0], device))
        seen = seen.index_select(1, with_border(columns, at.shape[1], device))  # (s·H + 2, s·W + 2)
        taps = F.linear(tokens, self.weight).index_select(1, seen.flatten()).transpose(1, 2)
        taps = taps.reshape(n, 9, self.channels, rows + 2, columns + 2)
        terms = [taps[:, 3 * i + j, :, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        return sum(terms[1:], terms[0])


def with_border(shown: int, side: int, device: torch.device) -> Tensor:
    """Indices of the first pixels of a side and of one more at each end, reflected where the side ends."""
    index = torch.arange(-1, shown + 1, device=device).abs()
    return (side - 1) - (side - 1 - index).abs()


def as_linear(layer: nn.Module, step: int) -> nn.Linear:
    """A 1x1 convolution before a shuffle as a product that gives the shuffled pixels one after the other."""
    weight, bias = layer.get_parameter("weight").detach(), layer.get_parameter("bias").detach()
    wide, c = weight.shape[:2]
    linear = nn.Linear(c, wide)
    linear.weight = nn.Parameter(weight.view(-1, step**2, c).transpose(0, 1).reshape(wide, c), requires_grad=False)
    linear.bias = nn.Parameter(bias.view(-1, step**2).T.reshape(wide), requires_grad=False)
    return linear
