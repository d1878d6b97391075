"""MIASSR: one network for every enlargement, by a meta-upscale layer that predicts its own kernels.

Paper: J. Zhu, C. Tan, J. Yang, G. Yang, P. Liò, "Arbitrary scale super-resolution for medical images", Int. J.
Neural Systems 31(10), 2150037 (2021), arXiv 2105.10738; J. Zhu's PhD dissertation (Cambridge, 2023), chapter 4.
Residual blocks make 64 features of each pixel; `medsr_cli.networks.meta_upscale` makes an image of any size of them.

Attribute names are those of the authors' program, so that a state_dict of theirs loads as it is, less a
sub-pixel tail that it builds and never runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.graph import IMAGE, PLANES, SCALE, GraphForm
from medsr_cli.networks.meta_upscale import ROUNDINGS, AxisGrid, MetaUpsampler, Scale, grid_of, inverse_scale
from medsr_cli.networks.meta_upscale_graph import GraphUpsampler
from medsr_cli.networks.rdst import count_blocks, frozen_pointwise

NEGATIVE_SLOPE = 0.2


@dataclass(frozen=True)
class MiassrConfig:
    """Sizes of one MIASSR; the defaults are the paper's, for one channel.

    `rounding` is how output pixels find their LR pixel: "exact" in rational arithmetic as the paper has it,
    "reference" in float32 as the authors' program does, for their weights.
    """

    n_feats: int = 64
    n_blocks: int = 16
    hidden: int = 256
    kernel: int = 3
    in_channels: int = 1
    rounding: str = "exact"

    def __post_init__(self) -> None:
        if min(self.n_feats, self.n_blocks, self.hidden, self.kernel, self.in_channels) < 1:
            msg = f"Every size of a MIASSR is at least 1: {self}."
            raise ValueError(msg)
        if self.kernel % 2 == 0:
            msg = f"A kernel of {self.kernel} pixels has no centre; it must be odd."
            raise ValueError(msg)
        if self.rounding not in ROUNDINGS:
            msg = f"There is no rounding {self.rounding!r}; there are {' and '.join(ROUNDINGS)}."
            raise ValueError(msg)


class ResidualBlock(nn.Module):
    """x + conv(LeakyReLU(conv(x))), 3×3, no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).add_(x)
        return out


class EdsrLite(nn.Module):
    """The feature extractor: 3×3 convolution, residual blocks, 3×3 convolution, and the first one's output added."""

    def __init__(self, config: MiassrConfig) -> None:
        super().__init__()
        f = config.n_feats
        self.head = nn.Sequential(nn.Conv2d(config.in_channels, f, 3, padding=1))
        blocks: list[nn.Module] = [ResidualBlock(f) for _ in range(config.n_blocks)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(f, f, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        shallow: Tensor = self.head(image)  # (N, F, H, W)
        if shallow.device.type == "cpu":  # a fifth faster there; the convolutions after it keep the layout
            shallow = shallow.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.body(shallow).add_(shallow)
        return out


class Miassr(nn.Module):
    """The whole network: (N, C, H, W) in [0, 1] to (N, C, H', W') on the grids of `grid_of`, not clipped."""

    def __init__(self, config: MiassrConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MiassrConfig()
        self.sub_mean = frozen_pointwise(config.in_channels)
        self.feature_extractor = EdsrLite(config)
        self.meta_upsampler = MetaUpsampler(config.n_feats, config.kernel, config.in_channels, config.hidden)
        self.add_mean = frozen_pointwise(config.in_channels)
        for conv in (self.sub_mean, self.add_mean):  # all others keep PyTorch's default
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type] # it has one

    @property
    def reach(self) -> int:
        """How far, in LR pixels, the input is that still changes an output pixel of one LR pixel."""
        return 2 * self.config.n_blocks + 2 + self.config.kernel // 2

    def forward(self, image: Tensor, scale: Scale | tuple[Scale, Scale] = 2.0) -> Tensor:
        """Enlarge; a pair is (rows, columns), see `inverse_scale` for what P2W is told then.

        Raises:
            ValueError: a scale that leaves no pixel.
        """
        by_row, by_column = scale if isinstance(scale, tuple) else (scale, scale)
        rows = grid_of(image.shape[-2], by_row, self.config.rounding)
        columns = grid_of(image.shape[-1], by_column, self.config.rounding)
        return self.enlarge(self.features(image), inverse_scale(by_row, by_column), rows, columns)

    def features(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to (N, F, H, W): the mean subtracted and the extractor, whose padding is zeros."""
        out: Tensor = self.feature_extractor(self.sub_mean(image))
        return out

    def enlarge(self, features: Tensor, inverse_scale: float, rows: AxisGrid, columns: AxisGrid) -> Tensor:
        """(N, F, H, W) to (N, C, H', W') for any part of the grids, counted from the features' first pixel.

        With `features` of a crop that has `reach` more pixels on each side than the grids use (fewer only where
        the image ends), the result is that part of the whole image's.

        Raises:
            ValueError: a grid is empty or asks for pixels that the features do not have.
        """
        out: Tensor = self.add_mean(self.meta_upsampler(features, inverse_scale, rows, columns))
        return out


PLACE = "place"
"""Name of a graph's input: which part of a large image is given, see `MiassrGraph`."""
GRAPH_DEFAULTS: Mapping[str, Tensor] = {PLACE: torch.zeros(2, 4, dtype=torch.int64)}
"""Inputs of the graph that need not be given, and what they are then."""


class MiassrGraph(nn.Module):
    """MIASSR as tensor operations alone, for any image, scale and tile; see `GraphUpsampler` for its inputs."""

    def __init__(self, net: Miassr) -> None:
        super().__init__()
        self.net = net
        self.upsampler = GraphUpsampler(net.meta_upsampler, net.config.rounding)

    def forward(self, image: Tensor, scale: Tensor, place: Tensor) -> Tensor:
        """(N, C, H, W), float64 (2,) and int64 (2, 4) to (N, C, H', W')."""
        out: Tensor = self.net.add_mean(self.upsampler(self.net.features(image), scale, place))
        return out


def graph_form(net: Miassr) -> GraphForm:
    """The network with the scale as an input: one graph for every enlargement, tile by tile where that is wanted."""
    image = torch.zeros(2, net.config.in_channels, 6, 9)
    scale = torch.tensor((2.0, 2.7), dtype=torch.float64)
    return GraphForm(
        MiassrGraph(net).eval(), {IMAGE: image, SCALE: scale, PLACE: GRAPH_DEFAULTS[PLACE]}, {IMAGE: PLANES}
    )


def made_ready(net: Miassr) -> Miassr:
    """For inference: the extractor's kernels in the order of channels-last features, which saves sorting them anew."""
    net.feature_extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stub has no such form
    return net


def example_inputs(config: MiassrConfig) -> tuple[Tensor, ...]:
    """One empty image of 2 × 2 pixels."""
    return (torch.zeros(1, config.in_channels, 2, 2),)


RECOMPUTED_BUFFERS = tuple(
    f"feature_extractor.tail.{place}.{kind}" for place in ("0.0", "0.2", "0.4", "1") for kind in ("weight", "bias")
)
"""The extractor's sub-pixel tail in the authors' checkpoints: never run, and shaped by an unrelated setting."""


def config_from_state(state: Mapping[str, Tensor]) -> MiassrConfig:
    """Recover every size of a MIASSR from the shapes of its tensors; the rounding is that of the authors' program.

    Raises:
        WeightsError: the tensors are not those of a MIASSR; the sentence names what is missing.
    """
    head, first, last = (
        "feature_extractor.head.0.weight",
        "meta_upsampler.P2W.meta_block.0.weight",
        "meta_upsampler.P2W.meta_block.2.weight",
    )
    for key in (head, first, last):
        if key not in state:
            msg = f"These tensors are not a MIASSR: {key} is missing."
            raise WeightsError(msg)
    n_feats, channels = state[head].shape[:2]
    area = state[last].shape[0] // (n_feats * channels)
    return MiassrConfig(
        n_feats=n_feats,
        n_blocks=count_blocks(state, "feature_extractor.body.") - 1,  # the last one is the closing convolution
        hidden=state[first].shape[0],
        kernel=math.isqrt(area),
        in_channels=channels,
        rounding="reference",
    )
