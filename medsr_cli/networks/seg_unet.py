"""The segmentation U-Net whose features and labels RDST's second stage compares, and Dice is measured with.

J. Zhu et al., arXiv 2302.11184, sections 3.3 and 4.3: a ResNet-34 encoder (He et al., CVPR 2016) in a U-Net
(Ronneberger et al., 2015). Tensor names are those of the authors' `loss/unet_oasis.pt`, so that it loads as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.batch_norm import EPS, RECOMPUTED_BUFFERS, BatchNorm, refuse_negative_variance

__all__ = [
    "RECOMPUTED_BUFFERS",
    "SegUnet",
    "SegUnetConfig",
    "config_from_state",
    "example_inputs",
    "frozen",
    "pad_by_repetition",
    "with_batch_statistics",
]

LEVELS = 5
"""E(1) to E(5); each halves the sides."""
MULTIPLE = 2**LEVELS
WIDENING = (1, 2, 4, 8)
"""Channels of E(2) to E(5) in units of `width`; E(1) has `width` itself."""


@dataclass(frozen=True)
class SegUnetConfig:
    """Sizes of one U-Net; the defaults are the paper's. `SegUnetConfig.narrow` makes the same shape smaller."""

    in_channels: int = 1
    classes: int = 4
    """Background, which is class 0, among them."""
    width: int = 64
    """Channels of E(1) and E(2); doubled from each further level to the next."""
    blocks: str = "3,4,6,3"
    """Basic blocks of E(2) to E(5)."""
    decoder: str = "256,128,64,32,16"
    """Channels after each of the five decoder blocks, from the smallest map to the full size."""

    def __post_init__(self) -> None:
        if len(self.block_counts) != len(WIDENING) or len(self.decoder_widths) != LEVELS:
            msg = f"blocks are {len(WIDENING)} numbers and decoder {LEVELS}, not {self.blocks!r} and {self.decoder!r}"
            raise ValueError(msg)
        if min(*self.block_counts, *self.decoder_widths, self.in_channels, self.width) < 1 or self.classes < 2:
            msg = "every size is at least 1, and there are at least two classes"
            raise ValueError(msg)

    @classmethod
    def narrow(cls, width: int, in_channels: int = 1, classes: int = 4) -> SegUnetConfig:
        """The paper's shape with `width` instead of 64 channels at the start, the decoder in proportion."""
        decoder = ",".join(str(max(width * 4 // 2**i, 4)) for i in range(LEVELS))
        return cls(in_channels, classes, width, decoder=decoder)

    @property
    def block_counts(self) -> tuple[int, ...]:
        """`blocks` as numbers."""
        return tuple(int(count) for count in self.blocks.split(","))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """`decoder` as numbers."""
        return tuple(int(width) for width in self.decoder.split(","))

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of E(1) to E(5)."""
        return (self.width, *(self.width * factor for factor in WIDENING))


class BasicBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(conv(x))))) + x); the first convolution may halve the sides, x then goes through 1×1."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), BatchNorm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), BatchNorm(width)
        self.downsample = nn.Sequential()  # the identity
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), BatchNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = self.bn2(self.conv2(inner))
        return F.relu(inner + self.downsample(x), inplace=True)


class Encoder(nn.Module):
    """ResNet-34 without its head: (N, C, H, W) to E(1) … E(5), H/2 … H/32."""

    def __init__(self, config: SegUnetConfig) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.conv1 = nn.Conv2d(config.in_channels, widths[0], 7, 2, 3, bias=False)
        self.bn1 = BatchNorm(widths[0])
        for i, ((before, width), count) in enumerate(zip(pairwise(widths), config.block_counts, strict=True), start=1):
            stride = 1 if i == 1 else 2  # E(2) is halved by its pooling
            first = BasicBlock(before, width, stride)
            rest = (BasicBlock(width, width, 1) for _ in range(count - 1))
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))

    def forward(self, image: Tensor, depth: int = LEVELS) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        features = [x]  # E(1): (N, width, H/2, W/2)
        for level in range(2, depth + 1):
            if level == 2:
                x = F.max_pool2d(x, 3, 2, 1)
            x = self.get_submodule(f"layer{level - 1}")(x)
            features.append(x)  # E(level): (N, width · 2^(level - 2), H/2^level, W/2^level)
        return features


def _conv_norm_relu(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), BatchNorm(width), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Nearest-neighbour ×2, the skip (if any) beside it, two (conv 3×3, BN, ReLU)."""

    def __init__(self, channels: int, skip: int, width: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(channels + skip, width)
        self.conv2 = _conv_norm_relu(width, width)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = torch.cat((x, skip), dim=1)  # the enlarged map first
        out: Tensor = self.conv2(self.conv1(x))
        return out


class Decoder(nn.Module):
    """E(1) … E(5) to D, (N, last decoder width, H, W)."""

    def __init__(self, config: SegUnetConfig) -> None:
        super().__init__()
        skips = (*reversed(config.encoder_widths[:-1]), 0)  # E(4), E(3), E(2), E(1), none
        widths = pairwise((config.encoder_widths[-1], *config.decoder_widths))
        self.blocks = nn.ModuleList(
            DecoderBlock(before, skip, width) for (before, width), skip in zip(widths, skips, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = features[-1]
        skips = (*reversed(features[:-1]), None)
        for block, skip in zip(self.blocks, skips, strict=True):
            x = block(x, skip)
        return x


class SegUnet(nn.Module):
    """Images (N, C, H, W) in [0, 1] to logits (N, classes, H, W).

    `forward` takes any size: sides that are no multiple of 32 are padded by repeating the last row and column, and
    the logits are cropped again. `encode` and `decode` take multiples of 32 only.
    """

    def __init__(self, config: SegUnetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SegUnetConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.segmentation_head = nn.Sequential(nn.Conv2d(config.decoder_widths[-1], config.classes, 3, padding=1))

    def encode(self, image: Tensor, depth: int = LEVELS) -> list[Tensor]:
        """E(1) to E(depth) of images whose sides are multiples of 32; nothing deeper is computed.

        Raises:
            ValueError: a side is no multiple of 32, or the image has other channels than the network.
        """
        h, w = image.shape[-2:]
        if h % MULTIPLE or w % MULTIPLE or not h or not w:
            msg = f"The encoder takes sides that are multiples of {MULTIPLE}, not {h} x {w}."
            raise ValueError(msg)
        if image.shape[1] != self.config.in_channels:
            msg = f"This U-Net takes {self.config.in_channels} channels, not {image.shape[1]}."
            raise ValueError(msg)
        features: list[Tensor] = self.encoder(image, depth)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """D of the features E(1) to E(5): (N, last decoder width, H, W)."""
        decoded: Tensor = self.decoder(features)
        return decoded

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        decoded = self.decode(self.encode(pad_by_repetition(image)))
        logits: Tensor = self.segmentation_head(decoded)
        return logits[..., :h, :w]


def pad_by_repetition(image: Tensor) -> Tensor:
    """(N, C, H, W) padded below and on the right, by its last row and column, to multiples of 32."""
    h, w = image.shape[-2:]
    return F.pad(image, (0, -w % MULTIPLE, 0, -h % MULTIPLE), mode="replicate")


class BatchStatistics(nn.Module):
    """A batch norm that always takes mean and variance of its batch, and remembers neither."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, features: Tensor) -> Tensor:
        return F.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=EPS)


def frozen(net: SegUnet) -> SegUnet:
    """The same network in evaluation mode, whose tensors are shared and take no gradient; `net` is left alone."""
    with torch.device("meta"):
        copy = SegUnet(net.config)
    copy.load_state_dict(net.state_dict(), assign=True)
    return copy.requires_grad_(False).eval()


def with_batch_statistics(net: SegUnet) -> SegUnet:
    """`frozen`, but normalising with each batch's own mean and variance.

    RDST's released fine-tuning never switches its U-Net to evaluation mode. The running statistics of `net` stay as
    they are, and so does `net`.
    """
    copy = frozen(net)
    for module in [*copy.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, BatchNorm):
                setattr(module, name, BatchStatistics(child))
    return copy


def example_inputs(config: SegUnetConfig) -> tuple[Tensor, ...]:
    """The smallest image whose deepest map has a pixel."""
    return (torch.zeros(1, config.in_channels, MULTIPLE, MULTIPLE),)


def config_from_state(state: Mapping[str, Tensor]) -> SegUnetConfig:
    """Recover every size of a U-Net from the names and shapes of its tensors.

    Raises:
        WeightsError: the tensors are not those of this U-Net; the sentence names what is missing.
    """
    firsts = [f"encoder.layer{i}.0.conv1.weight" for i in range(1, 5)]
    decoder = [f"decoder.blocks.{i}.conv1.0.weight" for i in range(LEVELS)]
    for key in ("encoder.conv1.weight", *firsts, *decoder, "segmentation_head.0.weight"):
        if key not in state:
            msg = f"These tensors are not a segmentation U-Net with a ResNet-34 encoder: {key} is missing."
            raise WeightsError(msg)
    refuse_negative_variance(state)
    counts = []
    for i in range(1, 5):
        count = 1
        while f"encoder.layer{i}.{count}.conv1.weight" in state:
            count += 1
        counts.append(count)
    return SegUnetConfig(
        in_channels=state["encoder.conv1.weight"].shape[1],
        classes=state["segmentation_head.0.weight"].shape[0],
        width=state["encoder.conv1.weight"].shape[0],
        blocks=",".join(map(str, counts)),
        decoder=",".join(str(state[key].shape[0]) for key in decoder),
    )
