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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.derived import Derived
from medsr_cli.networks.graph import IMAGE, PLANES, GraphForm
from medsr_cli.networks.linear_tail import SMALLEST, ComposedTail, composed, run_composed
from medsr_cli.networks.windows import WindowAttention, WindowOrder, kept_window_order, reordered

TOKENS_AT_ONCE = 2048
"""Tokens that a layer takes through all of its steps before the next ones, on CPUs: they stay in the cache."""


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


Shape = tuple[int, int, int]
"""Batch, rows and columns of a map."""


class Mlp(nn.Module):
    """Linear, GELU (exact), Linear; added to `residual`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            out: Tensor = residual + self.fc2(F.gelu(self.fc1(tokens)))
            return out
        hidden = torch.ops.aten.gelu_(self.fc1(tokens))
        return (residual + self.fc2.bias).addmm_(hidden, self.fc2.weight.t())


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

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        """Tokens (T, C) in the order of this layer's windows; `kinds` (T / M²,) says how shifted ones are masked."""
        if torch.is_grad_enabled() or tokens.device.type != "cpu":
            return self._layer(tokens, kinds)
        windows = max(TOKENS_AT_ONCE // self.window**2, 1)
        parts = zip(torch.split(tokens, windows * self.window**2), torch.split(kinds, windows), strict=True)
        results = [self._layer(*part) for part in parts]
        return torch.cat(results) if len(results) > 1 else results[0]

    def _layer(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        tokens = self.attn(self.norm1(tokens), kinds if self.shift else None, tokens)
        out: Tensor = self.mlp(self.norm2(tokens), tokens)
        return out


class SwinLayers(nn.Module):
    """The STLs of one dense block, un-shifted and shifted in turn."""

    def __init__(self, channels: int, config: RdstConfig) -> None:
        super().__init__()
        shifts = (0, config.window_size // 2)
        self.blocks = nn.Sequential(*(SwinLayer(channels, config, shifts[i % 2]) for i in range(config.stl_per_dstb)))

    def forward(self, tokens: Tensor, order: WindowOrder) -> tuple[Tensor, bool]:
        """Tokens in the order "windows"; the result is in the order "shifted" if the second value says so."""
        shifted = False
        for layer in self.blocks:
            if layer.shift and not shifted:
                tokens = reordered(tokens, order.windows_to_shifted, order.shifted_to_windows)
            elif shifted and not layer.shift:
                tokens = reordered(tokens, order.shifted_to_windows, order.windows_to_shifted)
            shifted = bool(layer.shift)
            tokens = layer(tokens, order.kinds)
        return tokens, shifted


class DenseSwinBlock(nn.Module):
    """DSTB: STLs, a pre-norm bottleneck to the growth rate, and the input kept beside the result."""

    def __init__(self, channels: int, config: RdstConfig) -> None:
        super().__init__()
        self.body = SwinLayers(channels, config)
        self.tail = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, config.growth_rate))

    def forward(self, tokens: Tensor, order: WindowOrder) -> Tensor:
        result, shifted = self.body(tokens, order)
        grown = self.tail(result)  # (T, growth)
        if shifted:
            grown = reordered(grown, order.shifted_to_windows, order.windows_to_shifted)
        return torch.cat((tokens, grown), dim=-1)  # (T, C + growth)


class ResidualDenseSwinBlock(nn.Module):
    """RDSTB: dense blocks that widen the map, 3x3 local feature fusion, and the block's input added."""

    def __init__(self, config: RdstConfig) -> None:
        super().__init__()
        d, g = config.embed_dim, config.growth_rate
        self.body = nn.Sequential(*(DenseSwinBlock(width, config) for width in config.widths))
        self.conv = nn.Conv2d(d + config.dstb_per_rdstb * g, d, 3, padding=1)

    def forward(self, tokens: Tensor, order: WindowOrder, shape: Shape) -> Tensor:
        dense = tokens
        for block in self.body:
            dense = block(dense, order)  # at last (T, d + 3g)
        return tokens + convolve_windows(self.conv, dense, order, shape)


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

        self._composed_tail: Derived[ComposedTail] = Derived()

    def _apply(self, fn: Any, recurse: bool = True) -> Rdst:
        self._composed_tail.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        shallow = self.head(self.sub_mean(pad_to_multiple(image, self.config.window_size)))  # F0, (N, d, H', W')
        shape = (shallow.shape[0], shallow.shape[2], shallow.shape[3])
        m = self.config.window_size
        order = kept_window_order(shape[0], shape[1] // m, shape[2] // m, m, m // 2, shallow.device)
        tokens = reordered(tokens_of(shallow), order.raster_to_windows, order.windows_to_raster)  # (N·H'·W', d)
        deep = self.patch_embed(tokens)
        for block in self.body:
            deep = block(deep, order, shape)
        deep = convolve_windows(self.conv_after_body, self.norm(deep), order, shape)
        features = tokens + deep  # global residual
        features = reordered(features, order.windows_to_raster, order.raster_to_windows)
        enlarged = self._enlarge(map_of(features, shape))
        return enlarged[..., : h * self.config.scale, : w * self.config.scale]

    def _enlarge(self, features: Tensor) -> Tensor:
        """The tail, stage by stage where gradients are wanted, else as the one linear map that it is."""
        if torch.is_grad_enabled():
            self._composed_tail.forget()
        if torch.is_grad_enabled() or min(features.shape[-2:]) < SMALLEST:
            enlarged: Tensor = self.add_mean(self.tail(features))
            return enlarged
        parameters = (*self.tail.parameters(), *self.add_mean.parameters())
        return run_composed(self._composed_tail.of(parameters, lambda: composed(self.tail_layers())), features)

    def tail_layers(self) -> list[nn.Module]:
        """The convolutions and pixel shuffles between the features and the result."""
        return [m for m in (*self.tail.modules(), self.add_mean) if isinstance(m, nn.Conv2d | nn.PixelShuffle)]

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


def tokens_of(image: Tensor) -> Tensor:
    """(N, C, H, W) to (N·H·W, C)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def map_of(tokens: Tensor, shape: Shape) -> Tensor:
    """(N·H·W, C), row after row, to (N, C, H, W), channels innermost in memory as convolutions like them."""
    return tokens.view(*shape, tokens.shape[-1]).permute(0, 3, 1, 2)


def convolve_windows(conv: nn.Conv2d, tokens: Tensor, order: WindowOrder, shape: Shape) -> Tensor:
    """A convolution of (T, C) in the order of the windows, to the same order."""
    raster = reordered(tokens, order.windows_to_raster, order.raster_to_windows)
    return reordered(tokens_of(conv(map_of(raster, shape))), order.raster_to_windows, order.windows_to_raster)


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


def graph_form(net: Rdst) -> GraphForm:
    """The network as a graph of tensor operations, for any batch and size of at least 1."""
    from medsr_cli.networks.rdst_graph import RdstGraph

    side = net.config.window_size + 1
    example = torch.zeros(2, net.config.in_channels, side, side + net.config.window_size)
    return GraphForm(RdstGraph(net), {IMAGE: example}, {IMAGE: PLANES})


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
