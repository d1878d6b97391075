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
from medsr_cli.networks.cohft_attention import InterModalityAttention, WindowAttention
from medsr_cli.networks.cohft_blocks import (
    LONGEST_WINDOW,
    RESIDUAL,
    AdaptiveInstanceNorm,
    Rrdb,
    conv3,
    count_numbered,
    gradient_map,
    refuse_heads,
    refuse_other_grid,
    refuse_sizes,
    square_side,
    upsampler,
)
from medsr_cli.networks.cohft_ready import ready_for_cpu
from medsr_cli.networks.graph import GUIDE, IMAGE, PLANES, GraphForm
from medsr_cli.networks.rdst import count_blocks, pad_to_multiple

__all__ = [
    "RESIDUAL",
    "Cohft",
    "CohftConfig",
    "config_from_state",
    "example_inputs",
    "gradient_map",
    "graph_form",
    "made_ready",
]


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

    def forward(
        self, stream: Tensor, prior: Tensor, guide: Tensor, normed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        stream = self.rrdbs(stream)
        local = self.conv_stream(stream)
        structure = self.conv_concat(torch.cat((prior, local), dim=1))
        structure = self.long_distance(self.short_distance(structure))
        prior = self.inter_modality(structure, self.adain(structure, guide, normed))
        return stream + torch.sigmoid(self.gate(local)) * prior, prior


class OutputGate(nn.Module):
    """Enlarges stream and branch, reads the gradient map off the branch and the image off both (figure 3a).

    (F^0, F^S, P^S) to (image (N, 1, sH, sW), features of the branch (N, d, sH, sW)); `gradient` of these is the
    gradient map. Neither is clipped, and the gradient has no activation, so that any target can be fitted.
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
        return self.image(fused + self.refine(fused)), branch


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
        enlarged, _ = self.run_padded(*self._padded(image, guide))
        return enlarged[..., : guide.shape[2], : guide.shape[3]]

    def run_padded(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the features of its gradient, for sides H' and W' that windows and patches divide."""
        shallow = stream = self.image_gate(image)  # F^0
        prior = self.gradient_gate(gradient_map(image))  # P^0 = F_s^0
        context = self.guide_gate(gradient_map(guide))  # F_c^0
        normed = F.instance_norm(context)
        for stage in self.stages:
            stream, prior = stage(stream, prior, context, normed)
        enlarged, branch = self.output_gate(shallow, stream, prior)
        return enlarged, branch

    def with_gradient(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The image and its predicted gradient map, both (N, 1, sH, sW).

        Raises:
            ValueError: the guide is not on the grid of the result.
        """
        enlarged, branch = self.run_padded(*self._padded(image, guide))
        gradient = self.output_gate.gradient(branch)
        h, w = guide.shape[-2:]
        return enlarged[..., :h, :w], gradient[..., :h, :w]

    def _padded(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, H', W') and (N, 1, sH', sW')."""
        c = self.config
        refuse_other_grid(image, guide, c.scale)
        return pad_to_multiple(image, c.multiple), pad_to_multiple(guide, c.scale * c.multiple)


class CohftGraph(nn.Module):
    """The same with its padding in tensor arithmetic: (image, guide) to the image, for an exporter."""

    def __init__(self, net: Cohft) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, guide: Tensor) -> Tensor:
        c = self.net.config
        rows, columns = guide.shape[-2:]
        for axis in (2, 3):
            image = gathered_to_multiple(image, axis, c.multiple)
            guide = gathered_to_multiple(guide, axis, c.scale * c.multiple)
        enlarged, _ = self.net.run_padded(image, guide)
        return enlarged[..., :rows, :columns]


def gathered_to_multiple(image: Tensor, axis: int, multiple: int) -> Tensor:
    """One axis padded as `pad_to_multiple` does, by looking up a row for each row of the result."""
    side = image.shape[axis]
    whole = (side + multiple - 1) // multiple * multiple
    i = torch.arange(whole, device=image.device)
    reflected, repeated = (side - 1 - (side - 1 - i).abs()).abs(), i.clamp(max=side - 1)
    reflects = torch.scalar_tensor(2 * side - whole, device=image.device).clamp(0, 1).long()  # missing < side
    return image.index_select(axis, reflects * reflected + (1 - reflects) * repeated)


def graph_form(net: Cohft) -> GraphForm:
    """The network for an exporter: any batch, rows and columns."""
    scale = net.config.scale
    side = net.config.multiple + 1
    image, guide = torch.rand(2, 1, side, side + 2), torch.rand(2, 1, scale * side, scale * (side + 2))
    guide_axes = {0: "batch", 2: f"{scale}*rows", 3: f"{scale}*columns"}
    return GraphForm(CohftGraph(net).eval(), {IMAGE: image, GUIDE: guide}, {IMAGE: PLANES, GUIDE: guide_axes})


def made_ready(net: Cohft) -> nn.Module:
    """The network for inference: same results, faster; the original is not needed any more."""
    return ready_for_cpu(net)


def example_inputs(config: CohftConfig) -> tuple[Tensor, ...]:
    """Empty image and guide of the smallest size that is not padded."""
    side = config.multiple
    return torch.zeros(1, 1, side, side), torch.zeros(1, 1, config.scale * side, config.scale * side)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()


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
