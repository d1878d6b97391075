"""The lesion detector of MS-GAN: where in an image the region lies that is worth enlarging.

J. Zhu's PhD dissertation (Cambridge), chapter 3, and the papers named in `msgan`. No code and no weights were
published: what the texts leave open is marked [ours].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.batch_norm import RECOMPUTED_BUFFERS, BatchNorm, refuse_negative_variance

__all__ = ["RECOMPUTED_BUFFERS", "LesionDetector", "LesionDetectorConfig", "config_from_state", "example_inputs"]

LARGEST_SIDE = 4096
"""More pixels than an image has along an axis; it also bounds the number of levels."""


@dataclass(frozen=True)
class LesionDetectorConfig:
    """Sizes of one detector; the defaults are the dissertation's, with an input side of 128 [ours]."""

    widths: str = "32,64,128,128,128"
    """Kernels of each level, from the image down; every level halves the sides."""
    hidden: str = "1024,128"
    """Outputs of the fully connected layers before the last, which has two."""
    side: int = 128
    """Rows and columns that every image is resized to; a multiple of 2 to the number of levels."""
    in_channels: int = 1

    def __post_init__(self) -> None:
        levels = len(self.level_widths)
        if min(*self.level_widths, *self.hidden_sizes, self.in_channels, self.side) < 1:
            msg = "widths, hidden sizes, channels and side are at least 1"
            raise ValueError(msg)
        if self.side > LARGEST_SIDE or self.side % 2 ** min(levels, 16):
            msg = f"a side of {self.side} pixels cannot be halved {levels} times"
            raise ValueError(msg)

    @property
    def level_widths(self) -> tuple[int, ...]:
        """`widths` as numbers."""
        return tuple(int(width) for width in self.widths.split(","))

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """`hidden` as numbers."""
        return tuple(int(size) for size in self.hidden.split(","))

    @property
    def flattened(self) -> int:
        """Numbers that come out of the last level."""
        rest: int = self.side >> len(self.level_widths)
        return self.level_widths[-1] * rest**2


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + x), with a 1×1 conv and BN on x where the width changes [ours]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), BatchNorm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), BatchNorm(width)
        self.skip = nn.Sequential()  # the identity
        if channels != width:
            self.skip = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), BatchNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)), inplace=True)
        inner = self.norm2(self.conv2(inner))
        return F.relu(inner + self.skip(x), inplace=True)


class LesionDetector(nn.Module):
    """LD: levels of two residual blocks and 2×2 max pooling, then fully connected layers to (x, y).

    x runs along the columns and y along the rows, each from 0 at the first edge of the image to 1 at its last:
    the centre of pixel (row r, column c) of H × W is ((c + 1/2)/W, (r + 1/2)/H), at every resolution alike
    [ours]. The last layer is linear [ours], so that what it says may lie outside.
    """

    def __init__(self, config: LesionDetectorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LesionDetectorConfig()
        self.levels = nn.ModuleList()
        channels = config.in_channels
        for width in config.level_widths:
            self.levels.append(nn.Sequential(ResidualBlock(channels, width), ResidualBlock(width, width)))
            channels = width
        sizes = (config.flattened, *config.hidden_sizes, 2)
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) of any size, in [0, 1], to (N, 2)."""
        side = self.config.side
        features = F.interpolate(image, (side, side), mode="bilinear", align_corners=False)
        for level in self.levels:
            features = F.max_pool2d(level(features), 2)  # (N, width, side / 2^level, side / 2^level)
        numbers = features.flatten(1)  # (N, width · rest²)
        for layer in self.fc[:-1]:
            numbers = F.relu(layer(numbers), inplace=True)
        centre: Tensor = self.fc[-1](numbers)
        return centre


def example_inputs(config: LesionDetectorConfig) -> tuple[Tensor, ...]:
    """One small empty image; any size is resized."""
    return (torch.zeros(1, config.in_channels, 8, 8),)


def config_from_state(state: Mapping[str, Tensor]) -> LesionDetectorConfig:
    """Recover every size of a detector from the shapes of its tensors.

    Raises:
        WeightsError: the tensors are not those of a lesion detector; the sentence names what is missing.
    """
    for key in ("levels.0.0.conv1.weight", "fc.0.weight", "fc.1.weight"):
        if key not in state:
            msg = f"These tensors are not a lesion detector of MS-GAN: {key} is missing."
            raise WeightsError(msg)
    refuse_negative_variance(state)
    widths: list[int] = []
    hidden: list[int] = []
    while (weight := state.get(f"levels.{len(widths)}.0.conv1.weight")) is not None:
        widths.append(weight.shape[0])
    while f"fc.{len(hidden) + 1}.weight" in state:
        hidden.append(state[f"fc.{len(hidden)}.weight"].shape[0])
    rest = math.isqrt(state["fc.0.weight"].shape[1] // widths[-1])
    return LesionDetectorConfig(
        widths=",".join(map(str, widths)),
        hidden=",".join(map(str, hidden)),
        side=rest * 2 ** min(len(widths), 16),
        in_channels=state["levels.0.0.conv1.weight"].shape[1],
    )
