"""MS-GAN: the two-stage generator that makes a ×2 image on the way to ×4, and its one-stage alternative.

J. Zhu, G. Yang, P. Liò, "How can we make GAN perform better in single medical image super-resolution? A lesion
focused multi-scale approach", arXiv 1901.03419 (ISBI 2019); the same, "Lesion focused super-resolution", arXiv
1810.06693 (SPIE 2019); J. Zhu's PhD dissertation (Cambridge), chapter 3. No code and no weights were published:
what the texts leave open is marked [ours]. The detector of the lesion is in `msgan_detector`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.batch_norm import RECOMPUTED_BUFFERS, BatchNorm, fold_into, refuse_negative_variance
from medsr_cli.networks.graph import ENLARGED, IMAGE, INTERMEDIATE, PLANES, GraphForm

__all__ = [
    "RECOMPUTED_BUFFERS",
    "MsGan",
    "MsGanConfig",
    "config_from_state",
    "example_inputs",
    "graph_form",
    "made_ready",
]

NORMS = ("batch", "none")


@dataclass(frozen=True)
class MsGanConfig:
    """Sizes of one generator; the defaults are the paper's."""

    extractors: int = 2
    """2 for MS-GAN's generator, 1 for MS-SRResNet, which enlarges twice after one extractor."""
    n_blocks: int = 16
    """Residual blocks of each extractor."""
    n_feats: int = 64
    in_channels: int = 1
    second_relu: bool = True
    """Whether a block's second convolution too is followed by ReLU (the dissertation has it, SRResNet does not)."""
    norm: str = "batch"
    """`batch` after every convolution of a block, as in the paper, or `none`."""

    def __post_init__(self) -> None:
        if self.extractors not in (1, 2):
            msg = f"MS-GAN has 1 or 2 extractors, not {self.extractors}"
            raise ValueError(msg)
        if self.norm not in NORMS:
            msg = f"the norm is one of {', '.join(NORMS)}, not {self.norm[:40]!r}"
            raise ValueError(msg)
        if min(self.n_blocks, self.n_feats, self.in_channels) < 1:
            msg = "blocks, features and channels are at least 1"
            raise ValueError(msg)

    @property
    def scale(self) -> int:
        """Two stages of ×2."""
        return 4


class ResidualBlock(nn.Module):
    """x + ReLU(BN(conv(ReLU(BN(conv(x)))))), the dissertation's block; the outer ReLU is an option."""

    def __init__(self, config: MsGanConfig) -> None:
        super().__init__()
        d = config.n_feats
        self.second_relu = config.second_relu
        self.conv1, self.norm1 = conv3x3(d, d), norm(config)
        self.conv2, self.norm2 = conv3x3(d, d), norm(config)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)), inplace=True)
        inner = self.norm2(self.conv2(inner))
        return x + (F.relu(inner, inplace=True) if self.second_relu else inner)


class Extractor(nn.Module):
    """F: conv and ReLU, residual blocks, conv, and the skip from the first ReLU over all of them [ours]."""

    def __init__(self, channels: int, config: MsGanConfig) -> None:
        super().__init__()
        self.head = conv3x3(channels, config.n_feats)
        self.blocks = nn.Sequential(*(ResidualBlock(config) for _ in range(config.n_blocks)))
        self.tail = conv3x3(config.n_feats, config.n_feats)

    def forward(self, x: Tensor) -> Tensor:
        shallow = F.relu(self.head(x), inplace=True)  # (N, d, H, W)
        deep: Tensor = self.tail(self.blocks(shallow))
        return shallow + deep


class Magnifier(nn.Module):
    """M: sub-pixel enlargement by 2, a conv to four times the kernels and a shuffle, then ReLU [ours]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.conv(x)  # (N, 4d, H, W)
        return F.relu(F.pixel_shuffle(wide, 2), inplace=True)  # (N, d, 2H, 2W)


class MsGan(nn.Module):
    """The generator: F_a = M1(F1(L)), SR×2 = C1(F_a), SR×4 = C2(M2(F2(F_a))).

    With one extractor it is MS-SRResNet, which the dissertation compares: F2 is then left out. C1 and C2 are
    linear and nothing is clipped [ours].
    """

    def __init__(self, config: MsGanConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MsGanConfig()
        d, channels = config.n_feats, config.in_channels
        self.f1 = Extractor(channels, config)
        self.m1 = Magnifier(d)
        self.c1 = conv3x3(d, channels)
        self.f2 = Extractor(d, config) if config.extractors == 2 else nn.Identity()
        self.m2 = Magnifier(d)
        self.c2 = conv3x3(d, channels)

    def forward(self, image: Tensor) -> Tensor:
        """SR×4 alone: (N, C, H, W) in [0, 1] to (N, C, 4H, 4W)."""
        return self._second_stage(self.m1(self.f1(image)))

    def stages(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """SR×2, (N, C, 2H, 2W), and SR×4, (N, C, 4H, 4W): both are trained against the image."""
        features = self.m1(self.f1(image))  # F_a, (N, d, 2H, 2W)
        return self.c1(features), self._second_stage(features)

    def _second_stage(self, features: Tensor) -> Tensor:
        enlarged: Tensor = self.c2(self.m2(self.f2(features)))  # (N, C, 4H, 4W)
        return enlarged

    @property
    def reach(self) -> int:
        """Pixels of the input, in each direction, beyond which nothing changes what comes out of a pixel.

        Counted back from the result: C2 looks at one pixel of ×4, which is one of ×2 at most; M2 and F2 at so
        many of ×2, of which two make one of the input; M1 and F1 at so many of the input.
        """
        of_extractor = 2 * self.config.n_blocks + 2
        at_x2 = 1 + (of_extractor if self.config.extractors == 2 else 0)
        return of_extractor + 1 + (at_x2 + 1) // 2


def conv3x3(channels: int, kernels: int) -> nn.Conv2d:
    """The only convolution of the network: 3×3, zeros at the rim, with a bias."""
    return nn.Conv2d(channels, kernels, 3, padding=1)


def norm(config: MsGanConfig) -> nn.Module:
    """What follows a convolution of a block."""
    return BatchNorm(config.n_feats) if config.norm == "batch" else nn.Identity()


def made_ready(net: MsGan) -> nn.Module:
    """A copy for inference, with `forward`, `stages`, `config` and `reach`: the same results, faster.

    On a CPU in float32, networks that are wide enough run as `msgan_ready` says; others have the channels innermost.
    """
    from medsr_cli.networks.msgan_ready import SMALLEST_FEATURES, ReadyMsGan

    folded = without_norms(net)
    weight = folded.c1.weight
    if (weight.device.type, weight.dtype) == ("cpu", torch.float32) and net.config.n_feats >= SMALLEST_FEATURES:
        return ReadyMsGan(folded).eval()
    return folded


def without_norms(net: MsGan) -> MsGan:
    """A copy whose normalisations by running statistics are part of the convolutions before them."""
    copied = copy.deepcopy(net).eval().requires_grad_(False)
    for block in (part for part in copied.modules() if isinstance(part, ResidualBlock)):
        for conv, after in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
            if isinstance(after, BatchNorm):
                fold_into(conv, after)
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    copied.config = replace(net.config, norm="none")
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # not in its stubs


class GraphStages(nn.Module):
    """`MsGan.stages` as what a graph computes."""

    def __init__(self, net: MsGan) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.stages(image)


def graph_form(net: MsGan) -> GraphForm:
    """The network for an exporter, with the results of both stages; see `GraphForm`."""
    example = torch.zeros(2, net.config.in_channels, 12, 20)
    return GraphForm(
        GraphStages(without_norms(net)).eval(), {IMAGE: example}, {IMAGE: PLANES}, (INTERMEDIATE, ENLARGED)
    )


def example_inputs(config: MsGanConfig) -> tuple[Tensor, ...]:
    """One small empty image; the network runs on any size from a single pixel."""
    return (torch.zeros(1, config.in_channels, 8, 8),)


def config_from_state(state: Mapping[str, Tensor]) -> MsGanConfig:
    """Recover every size of a generator from the shapes of its tensors.

    Whether a block ends with ReLU leaves no trace in them; the dissertation's answer is assumed.

    Raises:
        WeightsError: the tensors are not those of an MS-GAN generator; the sentence names what is missing.
    """
    for key in ("f1.head.weight", "f1.blocks.0.conv1.weight", "m1.conv.weight", "c1.weight", "c2.weight"):
        if key not in state:
            msg = f"These tensors are not a generator of MS-GAN: {key} is missing."
            raise WeightsError(msg)
    refuse_negative_variance(state)
    kernels, channels = state["f1.head.weight"].shape[:2]
    n_blocks = 0
    while f"f1.blocks.{n_blocks}.conv1.weight" in state:
        n_blocks += 1
    return MsGanConfig(
        extractors=2 if "f2.head.weight" in state else 1,
        n_blocks=n_blocks,
        n_feats=kernels,
        in_channels=channels,
        norm="batch" if "f1.blocks.0.norm1.weight" in state else "none",
    )
