"""RDST: residual dense Swin transformer for single-image super-resolution of medical slices.

Paper: J. Zhu, G. Yang, P. Liò, "A residual dense vision transformer for medical image super-resolution with
segmentation-based perceptual loss fine-tuning", arXiv 2302.11184 (2023), section 3; J. Zhu's PhD
dissertation (Cambridge, 2023), chapter 5. RDST has eight residual dense blocks, RDST-E four.

Attribute names are those of the published checkpoints, so that a state_dict of theirs loads as it is, less
the masks and index tables that it carries and that are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.windows import WindowAttention, merge_windows, partition_windows


@dataclass(frozen=True)
class RdstConfig:
    """Sizes of one RDST; the defaults are the paper's RDST for x4 and one channel."""

    n_rdstb: int = 8
    embed_dim: int = 60
    growth_rate: int = 30
    num_heads: int = 6
    window_size: int = 8
    dstb_per_rdstb: int = 3
    stl_per_dstb: int = 2
    mlp_ratio: float = 2.0
    qkv_bias: bool = True
    in_channels: int = 1
    scale: int = 4

    def __post_init__(self) -> None:
        if any(width % self.num_heads for width in self.widths):
            msg = f"Widths {self.widths} cannot be divided among {self.num_heads} heads."
            raise ValueError(msg)

    @property
    def widths(self) -> list[int]:
        """Channels of the token map in each dense block of an RDSTB: d, d + g, d + 2g."""
        return [self.embed_dim + i * self.growth_rate for i in range(self.dstb_per_rdstb)]

    def hidden(self, channels: int) -> int:
        """Width of the hidden layer of an MLP."""
        return int(channels * self.mlp_ratio)


class Mlp(nn.Module):
    """Linear, GELU (exact), Linear."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class SwinLayer(nn.Module):
    """STL: x + Attn(LN(x)), then x + MLP(LN(x)) (section 3.2); every second one works on shifted windows.

    The shift stays on for a map of one single window, as in the published network.
    """

    def __init__(self, channels: int, config: RdstConfig, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.window = config.window_size
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, config.num_heads, config.window_size, config.qkv_bias)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, config.hidden(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm1(tokens)  # (B, H, W, C)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = merge_windows(self.attn(partition_windows(x, self.window), self.shift), self.window)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        tokens = tokens + x
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class SwinLayers(nn.Module):
    """The STLs of one dense block, un-shifted and shifted in turn."""

    def __init__(self, channels: int, config: RdstConfig) -> None:
        super().__init__()
        shifts = (0, config.window_size // 2)
        self.blocks = nn.Sequential(*(SwinLayer(channels, config, shifts[i % 2]) for i in range(config.stl_per_dstb)))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.blocks(tokens)
        return out


class DenseSwinBlock(nn.Module):
    """DSTB: STLs, a pre-norm bottleneck to the growth rate, and the input kept beside the result."""

    def __init__(self, channels: int, config: RdstConfig) -> None:
        super().__init__()
        self.body = SwinLayers(channels, config)
        self.tail = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, config.growth_rate))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat((tokens, self.tail(self.body(tokens))), dim=-1)  # (B, H, W, C + growth)


class ResidualDenseSwinBlock(nn.Module):
    """RDSTB: dense blocks that widen the map, 3x3 local feature fusion, and the block's input added."""

    def __init__(self, config: RdstConfig) -> None:
        super().__init__()
        d, g = config.embed_dim, config.growth_rate
        self.body = nn.Sequential(*(DenseSwinBlock(width, config) for width in config.widths))
        self.conv = nn.Conv2d(d + config.dstb_per_rdstb * g, d, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        dense = self.body(tokens)  # (B, H, W, d + 3g)
        return tokens + convolve_tokens(self.conv, dense)


class Rdst(nn.Module):
    """The whole network: (N, C, H, W) in [0, 1] to (N, C, scale·H, scale·W), not clipped.

    Any H, W of at least 1: sides that are not multiples of the window are padded at the bottom and right
    (see `pad_to_multiple`) and the result is cropped.
    """

    def __init__(self, config: RdstConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RdstConfig()
        d, channels = config.embed_dim, config.in_channels
        self.sub_mean = frozen_pointwise(channels)
        self.head = nn.Conv2d(channels, d, 3, padding=1)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("norm", nn.LayerNorm(d))
        self.body = nn.Sequential(*(ResidualDenseSwinBlock(config) for _ in range(config.n_rdstb)))
        self.norm = nn.LayerNorm(d)
        self.conv_after_body = nn.Conv2d(d, d, 3, padding=1)
        self.tail = nn.Sequential(subpixel(d, config.scale), nn.Conv2d(d, channels, 3, padding=1))
        self.add_mean = frozen_pointwise(channels)
        self.apply(initialise)

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        shallow = self.head(self.sub_mean(pad_to_multiple(image, self.config.window_size)))  # F0, (N, d, H', W')
        tokens = self.patch_embed(shallow.permute(0, 2, 3, 1))  # (N, H', W', d)
        deep = convolve_tokens(self.conv_after_body, self.norm(self.body(tokens)))
        features = shallow + deep.permute(0, 3, 1, 2)  # global residual, (N, d, H', W')
        enlarged: Tensor = self.add_mean(self.tail(features))
        return enlarged[..., : h * self.config.scale, : w * self.config.scale]

    def flops(self, height: int, width: int) -> int:
        """Floating-point operations for one image (2 per multiply-add): linear, convolution and attention."""
        c = self.config
        m2 = c.window_size**2
        tokens = -(-height // c.window_size) * -(-width // c.window_size) * m2
        d, g = c.embed_dim, c.growth_rate
        per_token = 9 * c.in_channels * d
        for n in c.widths:
            per_layer = n * 3 * n + n * n + 2 * n * c.hidden(n) + 2 * m2 * n
            per_token += c.n_rdstb * (c.stl_per_dstb * per_layer + n * g)
        per_token += c.n_rdstb * 9 * (d + c.dstb_per_rdstb * g) * d + 9 * d * d
        area = 1
        for factor in subpixel_factors(c.scale):
            per_token += area * 9 * d * d * factor**2
            area *= factor**2
        per_token += area * 9 * d * c.in_channels
        return 2 * tokens * per_token


def frozen_pointwise(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as the identity and is never trained (mean and deviation of the data)."""
    conv = nn.Conv2d(channels, channels, 1)
    conv.requires_grad_(False)
    return conv


def convolve_tokens(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A convolution applied to a token map (B, H, W, C)."""
    image = conv(tokens.permute(0, 3, 1, 2))  # (B, C, H, W)
    out: Tensor = image.permute(0, 2, 3, 1)
    return out


def subpixel_factors(scale: int) -> tuple[int, ...]:
    """The enlargements that make up a scale: powers of two in steps of 2, and 3 in one step."""
    if scale == 3:
        return (3,)
    steps = scale.bit_length() - 1
    if scale < 1 or 2**steps != scale:
        msg = f"RDST has no sub-pixel tail for scale {scale}; it is built for 2, 3 and powers of two."
        raise ValueError(msg)
    return (2,) * steps


def subpixel(channels: int, scale: int) -> nn.Sequential:
    """Sub-pixel enlargement: 3x3 convolution and pixel shuffle for each factor, nothing between."""
    layers: list[nn.Module] = []
    for factor in subpixel_factors(scale):
        layers += [nn.Conv2d(channels, channels * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad bottom and right to a multiple: reflected, or the edge repeated where a side is too short for that."""
    bottom, right = (-side % multiple for side in image.shape[-2:])
    for padding, missing, side in (
        ((0, 0, 0, bottom), bottom, image.shape[-2]),
        ((0, right, 0, 0), right, image.shape[-1]),
    ):
        if missing:
            image = F.pad(image, padding, mode="reflect" if missing < side else "replicate")
    return image


def initialise(module: nn.Module) -> None:
    """Linear and bias tables truncated normal (0.02), norms 1 and 0; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
    elif isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
        nn.init.dirac_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def example_inputs(config: RdstConfig) -> tuple[Tensor, ...]:
    """Empty inputs of one window, the smallest that the network is worth running on."""
    return (torch.zeros(1, config.in_channels, config.window_size, config.window_size),)


RECOMPUTED_BUFFERS = (".attn.relative_position_index", ".attn_mask")
"""Endings of the keys that published checkpoints carry and that depend on the training patch."""


def config_from_state(state: Mapping[str, Tensor]) -> RdstConfig:
    """Recover every size of an RDST from the shapes of its tensors.

    Raises:
        WeightsError: the tensors are not those of an RDST; the sentence names what is missing.
    """
    table = "body.0.body.0.body.blocks.0.attn.relative_position_bias_table"
    needed = ("head.weight", table, "body.0.body.0.tail.1.weight", "tail.0.0.weight", "tail.1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        msg = f"These tensors are not an RDST: {missing[0]} is missing."
        raise WeightsError(msg)
    d, channels = state["head.weight"].shape[:2]
    layer = "body.0.body.0.body.blocks.0."
    return RdstConfig(
        n_rdstb=count_blocks(state, "body."),
        embed_dim=d,
        growth_rate=state["body.0.body.0.tail.1.weight"].shape[0],
        num_heads=state[table].shape[1],
        window_size=(round(state[table].shape[0] ** 0.5) + 1) // 2,
        dstb_per_rdstb=count_blocks(state, "body.0.body."),
        stl_per_dstb=count_blocks(state, "body.0.body.0.body.blocks."),
        mlp_ratio=mlp_ratio_from_state(state),
        qkv_bias=layer + "attn.qkv.bias" in state,
        in_channels=channels,
        scale=scale_from_tail(state, d),
    )


def mlp_ratio_from_state(state: Mapping[str, Tensor]) -> float:
    """The shortest decimal r with hidden = int(r · channels) in every dense block of the first RDSTB.

    Raises:
        WeightsError: no ratio gives all of the hidden widths.
    """
    layers = [
        state[key].shape  # (hidden, channels)
        for key in (f"body.0.body.{i}.body.blocks.0.mlp.fc1.weight" for i in range(count_blocks(state, "body.0.body.")))
        if key in state
    ]
    smallest = max((hidden / channels for hidden, channels in layers), default=2.0)
    for digits in range(8):
        step = 10**digits
        ratio: float = math.ceil(smallest * step - 1e-9) / step
        if all(int(channels * ratio) == hidden for hidden, channels in layers):
            return ratio
    msg = "These tensors are not an RDST: its MLPs are not widened by one common ratio."
    raise WeightsError(msg)


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest index that follows `prefix` in any key."""
    indices = {key[len(prefix) :].split(".", 1)[0] for key in state if key.startswith(prefix)}
    return max((int(i) for i in indices if i.isdigit()), default=-1) + 1


def scale_from_tail(state: Mapping[str, Tensor], channels: int) -> int:
    """The enlargement that the sub-pixel convolutions add up to."""
    scale = 1
    for index in range(count_blocks(state, "tail.0.")):
        weight = state.get(f"tail.0.{index}.weight")
        if weight is not None:
            scale *= max(round((weight.shape[0] / channels) ** 0.5), 1)
    return scale
