"""Cohf-T as its authors released it: the network that their weights belong to.

Paper: C. Fang et al., "Cross-Modality High-Frequency Transformer for MR Image Super-Resolution", ACM Multimedia
2022, doi 10.1145/3503161.3547804. The released network (github.com/langlang3/sr_mri, commit b8b2157) differs from
the paper: whole windows are tokens, their folding is scrambled, correlations are between the dimensions of heads,
positions are learned, and the first and third stage do not follow the others. Each of these is kept, since the
weights were trained with it. Layer norms over rows and columns and the position tables fix the size of the image:
120, 80 or 60 pixels a side for x2, x3 and x4.

Attribute names are those of the released state_dict. Tensors that have no effect there are kept and loaded, but
nothing is computed with them: `select1`, `sam1`, `t1_adap_1`, `t1_concat_*` and every `norm1` of `b_block_*`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.cohft_blocks import (
    GRADIENT_FLOOR,
    LONGEST_WINDOW,
    AdaptiveInstanceNorm,
    Rrdb,
    conv3,
    count_numbered,
    refuse_heads,
    refuse_other_grid,
    refuse_sizes,
    square_side,
    upsampler,
)
from medsr_cli.networks.cohft_ready import ready_for_cpu
from medsr_cli.networks.cohft_released_attention import InterModality, WindowBlocks
from medsr_cli.networks.graph import GUIDE, IMAGE, GraphForm
from medsr_cli.networks.rdst import count_blocks

LONGEST_SIDE = 1024
"""Longest side of a low-resolution image that a file may ask for."""
HEADS, TAIL_RRDBS = 4, 3
SIDES = {2: 120, 3: 80, 4: 60}
"""Sides of the low-resolution images of the authors' weights; the guide has 240 always."""


@dataclass(frozen=True)
class ReleasedCohftConfig:
    """Sizes of one released Cohf-T; the defaults are the authors' L for x4."""

    scale: int = 4
    side: int = 60
    """Rows and columns of the low-resolution image; no other size runs."""
    stages: int = 4
    feature_dim: int = 32
    growth: int = 32
    rrdbs: int = 23
    """RRDBs of the main stream, those after the last stage among them."""
    rdbs: int = 3
    """Dense blocks of an RRDB."""
    convs: int = 5
    """Convolutions of a dense block."""
    heads: int = HEADS
    window: int = 5
    patch: int = 5

    def __post_init__(self) -> None:
        refuse_sizes(self.scale, (self.rdbs, self.growth, self.feature_dim), self.convs)
        if not 2 <= self.stages <= self.rrdbs:
            msg = (
                "A released Cohf-T has two stages at least (the first takes the gate of the second), each with an RRDB."
            )
            raise ValueError(msg)
        if not (1 <= self.window <= LONGEST_WINDOW and 1 <= self.patch <= LONGEST_WINDOW):
            msg = f"Windows of {self.window} and patches of {self.patch} pixels are not within 1 to {LONGEST_WINDOW}."
            raise ValueError(msg)
        if not 1 < self.side <= LONGEST_SIDE or self.side % self.window or self.side % self.patch:
            msg = f"A side of {self.side} pixels is not a multiple of windows of {self.window} and {self.patch} pixels."
            raise ValueError(msg)
        refuse_heads(self.heads, (self.feature_dim * self.window**2, self.feature_dim * self.patch**2))

    @property
    def in_channels(self) -> int:
        """Channels of the image, and of the guide."""
        return 1

    @property
    def tail_rrdb(self) -> int:
        """RRDBs after the last stage: the authors' 3, or what the stages leave over where that does not fit."""
        fits = self.rrdbs > TAIL_RRDBS and (self.rrdbs - TAIL_RRDBS) % self.stages == 0
        return TAIL_RRDBS if fits else self.rrdbs % self.stages

    @property
    def rrdb_per_stage(self) -> int:
        """RRDBs of each stage."""
        return (self.rrdbs - self.tail_rrdb) // self.stages


class StoredGradientMap(nn.Module):
    """sqrt(v² + h² + 1e-6) of the differences that the two frozen kernels take (see `cohft.gradient_map`)."""

    def __init__(self) -> None:
        super().__init__()
        across = torch.zeros(1, 1, 3, 3)
        across[0, 0, 1, 0], across[0, 0, 1, 2] = -1.0, 1.0
        self.weight_h = nn.Parameter(across, requires_grad=False)
        self.weight_v = nn.Parameter(across.transpose(2, 3).contiguous(), requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        v = F.conv2d(image, self.weight_v, padding=1)
        h = F.conv2d(image, self.weight_h, padding=1)
        return torch.sqrt(v * v + h * h + GRADIENT_FLOOR)


class Select(nn.Module):
    """The gate of a stage: sigmoid of a 1x1 convolution to one channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        gate: Tensor = torch.sigmoid(self.conv(features))
        return gate


class Skip(nn.Module):
    """The body of the main stream; only its parts are called."""

    def __init__(self, config: ReleasedCohftConfig) -> None:
        super().__init__()
        c, d = config, config.feature_dim
        blocks = (Rrdb(d, c.growth, c.rdbs, c.convs) for _ in range(c.rrdbs))
        self.sub = nn.Sequential(*blocks, conv3(d, d))


class ReleasedCohft(nn.Module):
    """The whole network: T2 (N, 1, R, R) and T1 (N, 1, rR, rR) in [0, 1] to T2 (N, 1, rR, rR), not clipped.

    R is `side` and no other. Names of attributes are the authors'; `HR_conv0_new.0` and the last convolution of
    `model` are one and the same, and the state_dict names its tensors twice.
    """

    model: nn.Sequential

    def __init__(self, config: ReleasedCohftConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or ReleasedCohftConfig()
        d = c.feature_dim
        for i in range(1, c.stages + 1):
            self.add_module(f"sam{i}", InterModality(c))
            self.add_module(f"conv_f{i}", nn.Sequential(conv3(d, d)))
            self.add_module(f"t1_adap_{i}", AdaptiveInstanceNorm(d, c.scale, affine=d, released=True))
            self.add_module(f"select{i}", Select(d))
            self.add_module(f"b_concat_{i}", nn.Sequential(conv3(2 * d, d)))
            self.add_module(f"b_block_{i}", WindowBlocks(c))
            if i > 1:
                self.add_module(f"t1_concat_{i}", nn.Sequential(conv3(2 * d, d)))  # not applied
        shared = conv3(d, d)
        self.HR_conv0_new = nn.Sequential(shared, nn.GELU())
        self.HR_conv1_new = nn.Sequential(conv3(d, d))
        self.model = nn.Sequential(conv3(1, d), Skip(c), *upsampler(d, c.scale), shared, nn.GELU())
        self.get_g_nopadding = StoredGradientMap()
        self.t2_fea_conv = nn.Sequential(conv3(1, d))
        self.t2_fea_conv_s = Rrdb(d, c.growth, c.rdbs, c.convs)
        self.t1_fea_conv = nn.Sequential(conv3(1, d))
        self.t1_fea_conv_s = Rrdb(d, c.growth, c.rdbs, c.convs)
        self.b_LR_conv = nn.Sequential(conv3(d, d))
        self.b_module = nn.Sequential(*upsampler(d, c.scale), conv3(d, d), nn.GELU(), conv3(d, d), nn.GELU())
        self.conv_w = nn.Sequential(nn.Conv2d(d, 1, 1), nn.GELU())
        self.f_concat = nn.Sequential(conv3(2 * d, d))
        self.f_block = Rrdb(2 * d, c.growth, c.rdbs, c.convs)
        self.f_HR_conv0 = nn.Sequential(conv3(d, d), nn.GELU())
        self.f_HR_conv1 = nn.Sequential(conv3(d, 1))

    @property
    def side(self) -> int:
        """Rows and columns of the low-resolution image."""
        return self.config.side

    def forward(self, image: Tensor, guide: Tensor) -> Tensor:
        return self._fuse(*self._run_stages(image, guide))[0]

    def with_gradient(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """The image and its predicted gradient map, both (N, 1, rR, rR).

        Raises:
            ValueError: the image is not of the one size that runs, or the guide is not on the grid of the result.
        """
        enlarged, branch = self._fuse(*self._run_stages(image, guide))
        return enlarged, self.conv_w(branch)

    def _run_stages(self, image: Tensor, guide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input gate and stages: f0, m after the last stage, s' of the last stage, each (N, d, R, R)."""
        if tuple(image.shape[-2:]) != (self.side, self.side):
            msg = f"This network runs on {self.side} x {self.side} pixels only, not on {tuple(image.shape[-2:])}."
            raise ValueError(msg)
        refuse_other_grid(image, guide, self.config.scale)
        prior = self.t2_fea_conv_s(self.t2_fea_conv(self.get_g_nopadding(image)))  # s0
        context = self.t1_fea_conv_s(self.t1_fea_conv(guide))  # c0: of T1 itself, not of its gradient
        normed = F.instance_norm(context)
        shallow = main = self.model[0](image)
        for i in range(1, self.config.stages + 1):
            main, prior, structure = self._stage(i, main, prior, context, normed)
        return shallow, main, structure

    def _stage(
        self, i: int, main: Tensor, prior: Tensor, context: Tensor, normed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage i: m, the prior p_i of the next stage (s', or g after stage 2), and s'; `normed` is IN(context)."""
        per_stage = self.config.rrdb_per_stage
        main = self.body[(i - 1) * per_stage : i * per_stage](main)
        local = self._part("conv_f", i)(main)  # e
        s = self._part("b_block_", i)(self._part("b_concat_", i)(torch.cat((prior, local), dim=1)))
        if i == 1:  # its inter-modality result is discarded, and it has the gate of stage 2
            gated = self._part("select", 2)(local) * s
            return main + gated, s + gated, s + gated
        # In stage 3 the prior is the gated g of stage 2, and it stands in for s in AdaIN.
        adapted = self._part("t1_adap_", i)(prior if i == 3 else s, context, normed)
        structure = s + self._part("sam", i)(s, adapted)  # s', which has s twice
        gated = self._part("select", i)(local) * structure
        return main + gated, gated if i == 2 else structure, structure

    def _fuse(self, shallow: Tensor, main: Tensor, structure: Tensor) -> tuple[Tensor, Tensor]:
        """Output gate: the image (N, 1, rR, rR) and the features of the gradient branch (N, d, rR, rR)."""
        c = self.config
        main = self.body[c.stages * c.rrdb_per_stage :](main)
        main = self.HR_conv1_new(self.model[2:](shallow + main))
        branch = self.b_module(structure + self.b_LR_conv(structure))
        fused = self.f_concat(self.f_block(torch.cat((branch, main), dim=1)))
        return self.f_HR_conv1(fused + self.f_HR_conv0(fused)), branch

    @property
    def body(self) -> nn.Sequential:
        """The RRDBs of the main stream and the convolution behind them."""
        sub = self.get_submodule("model.1.sub")
        assert isinstance(sub, nn.Sequential)  # noqa: S101 -- for the type checker
        return sub

    def _part(self, name: str, i: int) -> nn.Module:
        return self.get_submodule(f"{name}{i}")


def example_inputs(config: ReleasedCohftConfig) -> tuple[Tensor, ...]:
    """Empty image and guide of the only size that runs."""
    side = config.side
    return torch.zeros(1, 1, side, side), torch.zeros(1, 1, config.scale * side, config.scale * side)


def graph_form(net: ReleasedCohft) -> GraphForm:
    """The network for an exporter: any batch, but `net.side` rows and columns only, as the network itself.

    Layer norms over rows and columns and tables of positions fix the size; a graph for others would need weights
    that nobody trained.
    """
    image, guide = (tensor.repeat(2, 1, 1, 1) for tensor in example_inputs(net.config))
    return GraphForm(net.eval(), {IMAGE: image, GUIDE: guide}, {IMAGE: {0: "batch"}, GUIDE: {0: "batch"}})


def made_ready(net: ReleasedCohft) -> nn.Module:
    """The network for inference: same results, faster; the original is not needed any more."""
    return ready_for_cpu(net)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()


def config_from_state(state: Mapping[str, Tensor]) -> ReleasedCohftConfig:
    """Recover the sizes of a released Cohf-T from the shapes of its tensors.

    The number of heads leaves no trace and is 4 where 4 divides the tokens.

    Raises:
        WeightsError: the tensors are not those of this network; the sentence names what is missing.
        ValueError: they have its names, but shapes that no configuration gives.
    """
    block = "model.1.sub.0.RDB1.conv1.0.weight"
    window_table, patch_table = "b_block_1.swin_normal.pos_embedding", "sam1.x_pos_embedding"
    for key in ("model.0.weight", block, "sam1.con4.weight", "sam1.ln11.weight", window_table, patch_table):
        if key not in state:
            msg = f"These tensors are not a released Cohf-T: {key} is missing."
            raise WeightsError(msg)
    refuse_unequal_twins(state)
    d = state["model.0.weight"].shape[0]
    windows, patches = state[window_table].shape[2], state[patch_table].shape[2]
    return ReleasedCohftConfig(
        scale=state["sam1.con4.weight"].shape[2],
        side=state["sam1.ln11.weight"].shape[0],
        stages=count_numbered(state, "sam{}.ln11.weight"),
        feature_dim=d,
        growth=state[block].shape[0],
        rrdbs=count_blocks(state, "model.1.sub.") - 1,  # a convolution ends the body
        rdbs=count_numbered(state, "model.1.sub.0.RDB{}.conv1.0.weight"),
        convs=count_numbered(state, "model.1.sub.0.RDB1.conv{}.0.weight"),
        heads=math.gcd(HEADS, windows, patches),
        window=square_side(windows // max(d, 1), "A window"),
        patch=square_side(patches // max(d, 1), "A patch"),
    )


def refuse_unequal_twins(state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError where the convolution that has two names has two sets of values."""
    last = f"model.{count_blocks(state, 'model.') - 1}."
    for part in ("weight", "bias"):
        first, second = state.get(f"HR_conv0_new.0.{part}"), state.get(last + part)
        if first is None or second is None or first.is_meta or first.shape != second.shape:
            continue  # what is missing or of another shape is told by the one who loads them
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            msg = f"These tensors are not a released Cohf-T: HR_conv0_new.0.{part} and {last}{part} differ."
            raise WeightsError(msg)
