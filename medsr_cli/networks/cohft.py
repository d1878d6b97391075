"""Cohf-T: cross-modality high-frequency transformer, which enlarges a T2 slice guided by a registered T1 slice.

Paper: C. Fang, D. Zhang, L. Wang, Y. Zhang, L. Cheng, J. Han, "Cross-Modality High-Frequency Transformer for MR
Image Super-Resolution", ACM Multimedia 2022, doi 10.1145/3503161.3547804, arXiv 2203.15314.

This is the paper's network, for any size and in its three variants. What the authors released differs in so
many places that it is a network of its own, `cohft_released`; the blocks in which the two agree stand here.
Where the paper is silent, the choice is said at the place where it is made.

A convolutional main stream works on the image; beside it, a fluid branch of transformers works on gradients.
At the end of each of its stages the branch is added to the stream through a gate, and both are enlarged,
supervised and fused at the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.rdst import convolve_tokens, count_blocks, pad_to_multiple
from medsr_cli.networks.windows import merge_windows, partition_windows

FACTORS = {2: (2,), 3: (3,), 4: (2, 2)}
"""The steps of sub-pixel enlargement that make up each scale."""
RESIDUAL = 0.2
"""What dense blocks are multiplied with before their input is added."""
GRADIENT_FLOOR = 1e-6
"""Added below the root of the gradient map, which is then never flat at zero."""
LONGEST_WINDOW = 64
"""Longest side of a window or patch; a file that declares more is refused before memory is asked for."""


@dataclass(frozen=True)
class CohftConfig:
    """Sizes of one Cohf-T of the paper; the defaults are its L for x4."""

    scale: int = 4
    stages: int = 4
    feature_dim: int = 32
    growth: int = 32
    rrdb_per_stage: int = 5
    rdbs: int = 3
    """Dense blocks of an RRDB."""
    convs: int = 5
    """Convolutions of a dense block."""
    heads: int = 4
    window: int = 6
    """Side of the windows of the intra-modality attention, in pixels."""
    patch: int = 5
    """Side of the patches of the inter-modality attention, in pixels."""

    def __post_init__(self) -> None:
        refuse_sizes(self.scale, (self.stages, self.rrdb_per_stage, self.rdbs, self.growth), self.convs)
        refuse_heads(self.heads, (self.feature_dim, self.feature_dim * self.patch**2))
        if not (1 <= self.window <= LONGEST_WINDOW and 1 <= self.patch <= LONGEST_WINDOW):
            msg = f"Windows of {self.window} and patches of {self.patch} pixels are not within 1 to {LONGEST_WINDOW}."
            raise ValueError(msg)
        if self.multiple > LONGEST_WINDOW**2 // 4:
            msg = f"Windows of {self.window} and patches of {self.patch} pixels have no small common multiple."
            raise ValueError(msg)

    @property
    def in_channels(self) -> int:
        """Channels of the image, and of the guide."""
        return 1

    @property
    def multiple(self) -> int:
        """Sides that windows and patches both divide, in pixels of the low-resolution image."""
        return math.lcm(self.window, self.patch)


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

    def forward(self, query: Tensor, guide: Tensor) -> Tensor:
        variance, mean = torch.var_mean(query, dim=(2, 3), correction=int(self.released), keepdim=True)  # (N, d, 1, 1)
        deviation = torch.sqrt(variance if self.released else variance + 1e-5)
        shared = self.conv_shared(torch.cat((self.conv_noshared(query), guide), dim=1))  # (N, d, sH, sW)
        scaled = F.instance_norm(guide) * (self.conv_gamma(shared) + deviation)
        out: Tensor = scaled + (self.conv_beta(shared) + mean)
        return out


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


class Stage(nn.Module):
    """One stage of stream and branch: (F^{i-1}, P^{i-1}, F_c^0) to (F^i, P^i).

    E = RRDBs(F^{i-1}); e = C(E); F_s = C([P^{i-1}, e]) through both window attentions; P^i attends from F_s to
    AdaIN(F_s, F_c^0); F^i = E + T∘P^i with the gate T = sigmoid(conv 1x1 (e)), one channel.
    """

    def __init__(self, config: CohftConfig) -> None:
        super().__init__()
        c, d = config, config.feature_dim
        blocks = (Rrdb(d, c.growth, c.rdbs, c.convs) for _ in range(c.rrdb_per_stage))
        self.rrdbs = nn.Sequential(*blocks)
        self.conv_stream = conv3(d, d)
        self.conv_concat = conv3(2 * d, d)
        self.short_distance = WindowAttention(d, c.heads, c.window, strided=False)
        self.long_distance = WindowAttention(d, c.heads, c.window, strided=True)
        self.adain = AdaptiveInstanceNorm(d, c.scale, affine=1)
        self.inter_modality = InterModalityAttention(d, c.scale, c.heads, c.patch)
        self.gate = nn.Conv2d(d, 1, 1)

    def forward(self, stream: Tensor, prior: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.rrdbs(stream)
        local = self.conv_stream(stream)
        structure = self.conv_concat(torch.cat((prior, local), dim=1))
        structure = self.long_distance(self.short_distance(structure))
        prior = self.inter_modality(structure, self.adain(structure, guide))
        return stream + torch.sigmoid(self.gate(local)) * prior, prior


class OutputGate(nn.Module):
    """Enlarges stream and branch, reads the gradient map off the branch and the image off both (figure 3a).

    (F^0, F^S, P^S) to (image (N, 1, sH, sW), gradient map of the same shape), neither clipped. The gradient has no
    activation, so that any target can be fitted.
    """

    def __init__(self, config: CohftConfig) -> None:
        super().__init__()
        c, d = config, config.feature_dim
        self.stream_conv = conv3(d, d)
        self.stream = nn.Sequential(*upsampler(d, c.scale), conv3(d, d), nn.GELU(), conv3(d, d))
        self.branch_conv = conv3(d, d)
        self.branch = nn.Sequential(*upsampler(d, c.scale), conv3(d, d), nn.GELU(), conv3(d, d), nn.GELU())
        self.gradient = nn.Conv2d(d, 1, 1)
        self.fusion = nn.Sequential(Rrdb(2 * d, c.growth, c.rdbs, c.convs), conv3(2 * d, d))
        self.refine = nn.Sequential(conv3(d, d), nn.GELU())
        self.image = conv3(d, 1)

    def forward(self, shallow: Tensor, stream: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        main = self.stream(shallow + self.stream_conv(stream))  # (N, d, sH, sW)
        branch = self.branch(prior + self.branch_conv(prior))
        fused = self.fusion(torch.cat((branch, main), dim=1))
        return self.image(fused + self.refine(fused)), self.gradient(branch)


class Cohft(nn.Module):
    """The whole network: T2 (N, 1, H, W) and T1 (N, 1, sH, sW) in [0, 1] to T2 (N, 1, sH, sW), not clipped.

    Any H, W of at least 1: sides that windows and patches do not divide are padded at the bottom and right, the
    guide by s times as much (see `pad_to_multiple`), and the results are cropped.
    """

    def __init__(self, config: CohftConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CohftConfig()
        self.image_gate = self._input_gate(c)
        self.gradient_gate = self._input_gate(c)
        self.guide_gate = self._input_gate(c)
        self.stages = nn.ModuleList(Stage(c) for _ in range(c.stages))
        self.output_gate = OutputGate(c)

    @staticmethod
    def _input_gate(c: CohftConfig) -> nn.Sequential:
        return nn.Sequential(conv3(1, c.feature_dim), Rrdb(c.feature_dim, c.growth, c.rdbs, c.convs))

    def forward(self, image: Tensor, guide: Tensor) -> Tensor:
        return self.with_gradient(image, guide)[0]

    def with_gradient(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The image and its predicted gradient map, both (N, 1, sH, sW).

        Raises:
            ValueError: the guide is not on the grid of the result.
        """
        refuse_other_grid(image, guide, self.config.scale)
        h, w = guide.shape[-2:]
        image = pad_to_multiple(image, self.config.multiple)  # (N, 1, H', W')
        guide = pad_to_multiple(guide, self.config.scale * self.config.multiple)  # (N, 1, sH', sW')
        shallow = stream = self.image_gate(image)  # F^0
        prior = self.gradient_gate(gradient_map(image))  # P^0 = F_s^0
        context = self.guide_gate(gradient_map(guide))  # F_c^0
        for stage in self.stages:
            stream, prior = stage(stream, prior, context)
        enlarged, gradient = self.output_gate(shallow, stream, prior)
        return enlarged[..., :h, :w], gradient[..., :h, :w]


def refuse_other_grid(image: Tensor, guide: Tensor, scale: int) -> None:
    """Raise ValueError unless both have one channel and the guide lies on the enlarged grid of the image."""
    n, channels, h, w = image.shape
    if channels != 1 or tuple(guide.shape) != (n, 1, scale * h, scale * w):
        msg = (
            f"Cohf-T x{scale} needs a guide of shape {(n, 1, scale * h, scale * w)} for an image of shape "
            f"{(n, 1, h, w)}; it got {tuple(guide.shape)} and {tuple(image.shape)}."
        )
        raise ValueError(msg)


def example_inputs(config: CohftConfig) -> tuple[Tensor, ...]:
    """Empty image and guide of the smallest size that is not padded."""
    side = config.multiple
    return torch.zeros(1, 1, side, side), torch.zeros(1, 1, config.scale * side, config.scale * side)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()


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


def config_from_state(state: Mapping[str, Tensor]) -> CohftConfig:
    """Recover the sizes of a paper's Cohf-T from the shapes of its tensors; windows leave no trace and are 6.

    Raises:
        WeightsError: the tensors are not those of this network; the sentence names what is missing.
        ValueError: they have its names, but shapes that no configuration gives.
    """
    dense = "image_gate.1.RDB1.conv1.0.weight"
    projection = "stages.0.inter_modality.attention.to_q.weight"
    embedding = "stages.0.inter_modality.embed_reference.conv.weight"
    for key in ("image_gate.0.weight", dense, projection, embedding):
        if key not in state:
            msg = f"These tensors are not a Cohf-T of the paper: {key} is missing."
            raise WeightsError(msg)
    d = state["image_gate.0.weight"].shape[0]
    heads, _, width = state[projection].shape
    return CohftConfig(
        scale=state[embedding].shape[2],
        stages=count_blocks(state, "stages."),
        feature_dim=d,
        growth=state[dense].shape[0],
        rrdb_per_stage=count_blocks(state, "stages.0.rrdbs."),
        rdbs=count_numbered(state, "image_gate.1.RDB{}.conv1.0.weight"),
        convs=count_numbered(state, "image_gate.1.RDB1.conv{}.0.weight"),
        heads=heads,
        patch=square_side(width // max(d, 1), "A patch"),
    )
