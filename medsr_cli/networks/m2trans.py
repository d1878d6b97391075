"""M2Trans: coarse-to-fine transformer for super-resolution of B-mode ultrasound, RGB in and RGB out.

Paper: Z. Ni, R. Xiao, W. Yang, H. Wang, Z. Wang, L. Xiang, L. Sun, "M2Trans: Multi-Modal Regularized
Coarse-to-Fine Transformer for Ultrasound Image Super-Resolution", IEEE J. Biomed. Health Inform. 29(5),
3112-3123, 2025, section III. Where the published network and the paper differ (the cascade takes the mean of
two inputs, blocks are normalised and have a residual), this is the published one, which the published weights
are of. Attribute names are those of these weights.

Blocks normalise by the statistics of the whole image: a tile of an image does not give a tile of the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.graph import IMAGE, PLANES, GraphForm

HALO = 1
"""Pixels by which the keys of a block reach beyond its queries, on every side."""
STRIP_VALUES = 2**20
"""Enlarged features that are worked on at once where no gradient is wanted, more in very wide images."""
MIN_STRIP_ROWS = 8
WAVELET_LEVELS = 2
"""Levels of the coarsest branches."""
MAX_SCALE = 8
NORM_EPS = 1e-5
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour in the published `sub_mean` and `add_mean`, which no forward pass applies."""


@dataclass(frozen=True)
class M2TransConfig:
    """Sizes of one M2Trans; the defaults are the paper's for x4."""

    n_feats: int = 64
    n_blocks: int = 8
    block_size: int = 8
    in_channels: int = 3
    scale: int = 4

    def __post_init__(self) -> None:
        if self.n_feats < 8 or self.n_feats % 8:
            msg = f"{self.n_feats} features cannot be split into four branches of an even number of channels."
            raise ValueError(msg)
        if min(self.n_blocks, self.block_size, self.in_channels) < 1:
            msg = "Blocks, their size and the image's channels must be at least one."
            raise ValueError(msg)
        if self.block_size & (self.block_size - 1):
            msg = f"The side {self.block_size} of a block of pixels is no power of two."
            raise ValueError(msg)
        enlargement_steps(self.scale)

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this: whole blocks on the coarsest level."""
        return int(self.block_size * 2**WAVELET_LEVELS)

    @property
    def smallest(self) -> int:
        """Shortest side that reflection can pad to a multiple."""
        return self.multiple // 2 + 1


def enlargement_steps(scale: int) -> tuple[int, ...]:
    """The enlargements that make up a scale: 3 in one step, powers of two in steps of 2.

    Raises:
        ValueError: no network is built for this scale.
    """
    if scale == 3:
        return (3,)
    steps = scale.bit_length() - 1
    if not 1 < scale <= MAX_SCALE or 2**steps != scale:
        msg = f"M2Trans has no tail for scale {scale}; it is built for 2, 3, 4 and 8."
        raise ValueError(msg)
    return (2,) * steps


def haar_split(tokens: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform: (N, H, W, C), H and W even, to (N, H/2, W/2, 4C).

    Channels out are all of LL, then HL (difference across columns), LH (across rows) and HH; a second level
    is applied to all of them, as a wavelet packet.
    """
    n, h, w, c = tokens.shape
    rows = tokens.reshape(n, h // 2, 2, w // 2, 2, c) / 2
    low, high = rows[:, :, 0] + rows[:, :, 1], rows[:, :, 1] - rows[:, :, 0]  # each (N, H/2, W/2, 2, C)
    ll, hl = low[..., 0, :] + low[..., 1, :], low[..., 1, :] - low[..., 0, :]
    lh, hh = high[..., 0, :] + high[..., 1, :], high[..., 1, :] - high[..., 0, :]
    return torch.cat((ll, hl, lh, hh), dim=-1)


def haar_join(bands: Tensor) -> Tensor:
    """The inverse of `haar_split`, which is its transpose: (N, H, W, 4C) to (N, 2H, 2W, C)."""
    n, h, w, c4 = bands.shape
    ll, hl, lh, hh = (bands / 2).chunk(4, dim=-1)  # each (N, H, W, C)
    low = torch.stack((ll - hl, ll + hl), dim=3)  # left and right column, (N, H, W, 2, C)
    high = torch.stack((lh - hh, lh + hh), dim=3)
    return torch.stack((low - high, low + high), dim=2).view(n, 2 * h, 2 * w, c4 // 4)  # top and bottom row


class BlockAttention(nn.Module):
    """Self-attention of one head in blocks of b by b pixels whose keys reach one pixel further (section III-C).

    softmax(q (k + r)ᵀ / √c) v, where r is a learned position in the window of keys: the first half of the
    channels by its row, the second by its column. Beyond the image's border k and v are 0 but not masked: such
    a position is attended to by r alone and takes weight from the others.

    `forward` takes and returns token maps (N, H, W, c), H and W multiples of b.
    """

    def __init__(self, channels: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.window = window = block + 2 * HALO
        self.rel_h = nn.Parameter(torch.randn(1, window, 1, channels // 2))
        self.rel_w = nn.Parameter(torch.randn(1, 1, window, channels // 2))
        self.qkv_conv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        nn.init.kaiming_normal_(self.qkv_conv.weight, mode="fan_out", nonlinearity="relu")
        self.plain = False
        """True runs the definition, which the fused form is tested and timed against."""

    def forward(self, tokens: Tensor) -> Tensor:
        n, h, w, c = tokens.shape
        b = self.block
        qkv = F.linear(tokens, self.qkv_conv.weight.flatten(1))  # a 1x1 convolution, (N, H, W, 3c)
        blocks: Tensor = self.attend(self.queries(qkv[..., :c]), *self.keys_and_values(qkv[..., c:]))
        return blocks.view(n, h // b, w // b, b, b, c).transpose(2, 3).reshape(n, h, w, c)

    def queries(self, q: Tensor) -> Tensor:
        """(N, H, W, c) to (blocks, 1, b², c)."""
        n, h, w, c = q.shape
        b = self.block
        return q.view(n, h // b, b, w // b, b, c).transpose(2, 3).reshape(-1, 1, b * b, c)

    def keys_and_values(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, W, 2c) to keys with their positions and values, each (blocks, 1, (b + 2)², c)."""
        c2 = kv.shape[-1]
        padded = F.pad(kv, (0, 0, HALO, HALO, HALO, HALO))  # (N, H + 2, W + 2, 2c)
        windows = padded.unfold(1, self.window, self.block).unfold(2, self.window, self.block)
        # (N, H/b, W/b, 2c, b + 2, b + 2) to (blocks, 1, (b + 2)², 2c)
        tokens = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, 1, self.window**2, c2)
        k, v = tokens.chunk(2, dim=-1)
        return k + self.positions(), v

    def positions(self) -> Tensor:
        """r of every key of a window, ((b + 2)², c), row-major."""
        w = self.window
        halves = (self.rel_h.expand(1, w, w, -1), self.rel_w.expand(1, w, w, -1))
        return torch.cat(halves, dim=-1).view(w * w, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √c) v, (blocks, 1, b², c)."""
        if self.plain:
            return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v)


class CoarseToFineBlock(nn.Module):
    """CFTM (section III-B): a quarter of the channels on each of four branches, each fed by the one before.

    y = A(t) + t with t = (u + y of the branch before) / 2, where A attends on the pixels themselves, on one
    Haar level, and twice on two; then 3x3 convolution of all four, and the block's input added.
    """

    def __init__(self, config: M2TransConfig) -> None:
        super().__init__()
        c, quarter, b = config.n_feats, config.n_feats // 4, config.block_size
        self.attn1 = BlockAttention(quarter, b)
        self.attn2 = BlockAttention(quarter * 4, b)
        self.attn3 = BlockAttention(quarter * 4**WAVELET_LEVELS, b)
        self.attn4 = BlockAttention(quarter * 4**WAVELET_LEVELS, b)
        self.feed_forward = nn.Sequential(nn.Conv2d(c, c, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        branches = instance_norm(features.permute(0, 2, 3, 1)).chunk(4, dim=-1)  # each (N, H, W, C/4)
        attentions = ((self.attn1, 0), (self.attn2, 1), (self.attn3, WAVELET_LEVELS), (self.attn4, WAVELET_LEVELS))
        found: list[Tensor] = []
        for branch, (attention, levels) in zip(branches, attentions, strict=True):
            mixed = (branch + found[-1]) / 2 if found else branch
            found.append(attend_on_bands(attention, levels, mixed) + mixed)
        out: Tensor = self.feed_forward(torch.cat(found, dim=-1).permute(0, 3, 1, 2))  # (N, C, H, W)
        return out + features


def instance_norm(maps: Tensor, dims: tuple[int, int] = (1, 2)) -> Tensor:
    """Mean 0 and variance 1 of each channel of each map, (N, H, W, C) unless told, over all of its pixels."""
    # Relative to the first pixel, so that constant maps, such as those of an empty slice, become exactly 0: the mean
    # is rounded, and 1/√ε would multiply what that leaves by 300 in every block, to a result made of rounding.
    # Two passes: faster than PyTorch's own on channels that lie innermost, and as exact.
    relative = maps - maps.narrow(dims[0], 0, 1).narrow(dims[1], 0, 1)
    centred = relative - relative.mean(dim=dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=dims, keepdim=True) + NORM_EPS)


def attend_on_bands(attention: BlockAttention, levels: int, tokens: Tensor) -> Tensor:
    """Attention on the Haar bands of a token map (N, H, W, C), put together again."""
    for _ in range(levels):
        tokens = haar_split(tokens)  # (N, H/2, W/2, 4C)
    tokens = attention(tokens)
    for _ in range(levels):
        tokens = haar_join(tokens)
    return tokens


class M2Trans(nn.Module):
    """The whole network: (N, C, H, W) in [0, 1] to (N, C, scale·H, scale·W), clipped to [0, 1].

    Any H, W of at least 1. Sides are padded at the bottom and right by reflection to a multiple of 32; ones
    below 17, which reflection cannot pad so far, first get their last pixel repeated. The result is cropped.
    """

    def __init__(self, config: M2TransConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or M2TransConfig()
        c, channels = config.n_feats, config.in_channels
        self.sub_mean = mean_shift(channels, -1.0)
        self.add_mean = mean_shift(channels, 1.0)
        self.head = nn.Conv2d(channels, c, 3, padding=1, padding_mode="reflect")
        self.body = nn.Sequential(*(CoarseToFineBlock(config) for _ in range(config.n_blocks)))
        enlarging: list[nn.Module] = []
        for step in enlargement_steps(config.scale):
            enlarging += [nn.Conv2d(c, c * step**2, 1), nn.PixelShuffle(step), nn.GELU()]
        last = nn.Conv2d(c, channels, 3, padding=1, padding_mode="reflect", bias=False)
        self.tail = nn.Sequential(*enlarging, last)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        padded = pad_to_blocks(image, self.config).contiguous(memory_format=torch.channels_last)
        shallow = self.head(padded)  # F0, (N, c, H', W')
        features = shallow + self.body(shallow)  # global residual
        enlarged = self.enlarge_by_strips(features) if wants_strips(features) else self.tail(features)
        cropped: Tensor = enlarged[..., : h * self.config.scale, : w * self.config.scale]
        return cropped.clamp(0, 1)

    def enlarge_by_strips(self, features: Tensor) -> Tensor:
        """The tail, a few rows at a time; see `tail_by_strips`."""
        return tail_by_strips(self.tail, features)

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of the convolutions for one image, what the paper calls FLOPs: 5.84 G for x4 of 96x96."""
        c, channels = self.config.n_feats, self.config.in_channels
        # Each branch has c/4 · 4^L channels on 1/4^L of the pixels, and a projection to three times as many.
        projections: int = 3 * (c // 4) ** 2 * (1 + 4 + 2 * 4**WAVELET_LEVELS)
        per_pixel = 9 * channels * c + self.config.n_blocks * (projections + 9 * c * c)
        area = 1
        for step in enlargement_steps(self.config.scale):
            area *= step**2  # a 1x1 convolution to step² times the channels, before the enlargement
            per_pixel += area * c * c
        per_pixel += area * 9 * c * channels
        return self._padded_pixels(height, width) * per_pixel

    def flops(self, height: int, width: int) -> int:
        """Floating-point operations for one image: 2 per multiply-add, attention products included."""
        keys = (self.config.block_size + 2 * HALO) ** 2
        # q·k and attention·v; a branch's channels times its pixels is c/4 per pixel on every level.
        products = self.config.n_blocks * 4 * 2 * keys * (self.config.n_feats // 4)
        return 2 * (self.macs(height, width) + self._padded_pixels(height, width) * products)

    def _padded_pixels(self, height: int, width: int) -> int:
        m = self.config.multiple
        return -(-height // m) * m * -(-width // m) * m


def tail_by_strips(tail: nn.Sequential, features: Tensor) -> Tensor:
    """The tail, a few rows at a time: (N, c, H, W) to (N, C, scale·H, scale·W), the same values.

    Everything in the tail but its last convolution works on single pixels, and that reaches one pixel
    further. The enlarged features take most of the network's memory; strips of them stay in the cache.
    """
    c, h, w = features.shape[1:]
    scale = math.prod(layer.upscale_factor for layer in tail if isinstance(layer, nn.PixelShuffle))
    last = tail[-1].get_parameter("weight")
    rows = max(STRIP_VALUES // (c * scale**2 * w), MIN_STRIP_ROWS)
    strips = []
    for top in range(0, h, rows):
        bottom = min(top + rows, h)
        above, below = int(top > 0), int(bottom < h)
        strip = tail[:-1](features[:, :, top - above : bottom + below])
        # Of a neighbouring row, one enlarged row is enough; at the border it is made by reflection.
        strip = strip[:, :, above * (scale - 1) : strip.shape[2] - below * (scale - 1)]
        padded = F.pad(strip, (1, 1, 1 - above, 1 - below), mode="reflect")
        strips.append(F.conv2d(padded, last))
    return torch.cat(strips, dim=2)


def wants_strips(features: Tensor) -> bool:
    """Not in training, in a graph that is exported (its number of strips would be fixed), or to count its cost."""
    exporting = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return not (torch.is_grad_enabled() or exporting or features.is_meta)


def made_ready(net: M2Trans) -> nn.Module:
    """A copy for inference: the same results, faster; see `m2trans_ready`."""
    from medsr_cli.networks.m2trans_ready import ReadyM2Trans

    return ReadyM2Trans(copy.deepcopy(net)).eval()


def graph_form(net: M2Trans) -> GraphForm:
    """The network for an exporter; see `GraphForm`."""
    from medsr_cli.networks.m2trans_ready import GraphM2Trans, ReadyM2Trans

    # Longer than the smallest side, and no multiples of one another.
    example = torch.zeros(2, net.config.in_channels, net.config.multiple + 8, 2 * net.config.multiple + 4)
    return GraphForm(GraphM2Trans(ReadyM2Trans(copy.deepcopy(net))).eval(), {IMAGE: example}, {IMAGE: PLANES})


def mean_shift(channels: int, sign: float) -> nn.Conv2d:
    """The published, never applied 1x1 convolution that takes the data's mean away or adds it; not trained."""
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type] # it has one
    if channels == len(DIV2K_MEAN):
        with torch.no_grad():
            conv.bias.copy_(sign * torch.tensor(DIV2K_MEAN))  # type: ignore[union-attr]
    conv.requires_grad_(False)
    return conv


def pad_to_blocks(image: Tensor, config: M2TransConfig) -> Tensor:
    """Pad bottom and right: the edge repeated up to the smallest side that reflection can work on, then that."""
    bottom, right = (max(config.smallest - side, 0) for side in image.shape[-2:])
    if bottom or right:
        image = F.pad(image, (0, right, 0, bottom), mode="replicate")
    return reflect_to_multiple(image, config.multiple)


def reflect_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad bottom and right to a multiple by reflection that does not repeat the edge."""
    bottom, right = (-side % multiple for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, bottom), mode="reflect") if bottom or right else image


def example_inputs(config: M2TransConfig) -> tuple[Tensor, ...]:
    """Empty inputs of the smallest size that is not padded by repetition."""
    return (torch.zeros(1, config.in_channels, config.smallest, config.smallest),)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()
"""Endings of keys that are computed rather than loaded: there are none."""


def config_from_state(state: Mapping[str, Tensor]) -> M2TransConfig:
    """Recover every size of an M2Trans from the shapes of its tensors.

    Raises:
        WeightsError: the tensors are not those of an M2Trans; the sentence names what is missing.
        ValueError: they are, but of sizes that no M2Trans has.
    """
    needed = ("head.weight", "body.0.attn1.rel_h", "body.0.feed_forward.0.weight", "tail.0.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        msg = f"These tensors are not an M2Trans: {missing[0]} is missing."
        raise WeightsError(msg)
    n_feats, channels = state["head.weight"].shape[:2]
    return M2TransConfig(
        n_feats=n_feats,
        n_blocks=count_children(state, "body."),
        block_size=state["body.0.attn1.rel_h"].shape[1] - 2 * HALO,
        in_channels=channels,
        scale=scale_from_tail(state, n_feats),
    )


def count_children(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest index that follows `prefix` in any key."""
    indices = {key[len(prefix) :].split(".", 1)[0] for key in state if key.startswith(prefix)}
    return max((int(i) for i in indices if i.isdigit()), default=-1) + 1


def scale_from_tail(state: Mapping[str, Tensor], channels: int) -> int:
    """The enlargement of all convolutions of the tail but the last, which makes the image."""
    scale = 1
    for index in range(count_children(state, "tail.") - 1):
        weight = state.get(f"tail.{index}.weight")
        if weight is not None:
            scale *= max(round((weight.shape[0] / channels) ** 0.5), 1)
    return scale
