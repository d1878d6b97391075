"""Self-supervised CycleGAN for ultrasound super-resolution: generator G, its counterpart F, discriminators.

Paper: H. Liu, J. Liu, T. Tao, S. Hou, J. Han, "Perception consistency ultrasound image super-resolution via
self-supervised CycleGAN", Neural Computing and Applications 35 (2021), doi 10.1007/s00521-020-05687-9, section 3;
where the paper is silent, the authors' release decides. All of the networks are trained on the one image that is to
be enlarged (`medsr_cli.training.self_supervised`), so there are no published checkpoints; attribute names are
those that the released modules would save.

All images are RGB in [0, 1]. G works at the size of the result: it is given the image enlarged bicubically.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.graph import IMAGE, PLANES, GraphForm


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of one generator; the defaults are the released ones for x4."""

    in_channels: int = 3
    width1: int = 32
    width2: int = 32
    width3: int = 64
    negative_slope: float = 1.0
    """Of the leaky ReLUs: 1 as released, which makes them the identity; 0.01 as was probably meant."""
    scale: int = 4
    """The enlargement it was trained for; nothing in its shapes."""

    def __post_init__(self) -> None:
        if min(self.in_channels, *self.widths, self.scale) < 1:
            msg = "Channels, widths and scale are at least 1."
            raise ValueError(msg)
        if not 0 <= self.negative_slope <= 1:
            msg = f"The negative slope {self.negative_slope} is not between 0 and 1."
            raise ValueError(msg)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels after each of the encoders."""
        return self.width1, self.width2, self.width3


class Unit(nn.Module):
    """Two 3x3 layers, each followed by the activation; the first one of a decoder is a transposed convolution."""

    def __init__(self, channels: int, width: int, negative_slope: float, decoder: bool = False) -> None:
        super().__init__()
        first = nn.ConvTranspose2d if decoder else nn.Conv2d
        self.conv = nn.Sequential(
            first(channels, width, 3, padding=1),
            leaky(negative_slope),
            nn.Conv2d(width, width, 3, padding=1),
            leaky(negative_slope),
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.conv(features)
        return out


def leaky(negative_slope: float) -> nn.Module:
    """A leaky ReLU; with slope 1 it is the identity, and costs nothing."""
    return nn.Identity() if negative_slope == 1 else nn.LeakyReLU(negative_slope, inplace=True)


class Generator(nn.Module):
    """G: (N, C, H, W) in [0, 1], enlarged beforehand, to the same shape in [0, 1]; any size.

    With encoders a1 = E(x), a2 = E(a1), a3 = E(a2) and decoders d1 = D(a1), d2 = D(D(a2)), d3 = D(D(D(a3))):
    r_k = P(d_k) + x with one shared P, y = clamp(tanh(conv([r1, r2, r3])), 0, 1). "Scales" are depths here,
    nothing is made smaller or larger inside.
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GeneratorConfig()
        c, (w1, w2, w3), slope = config.in_channels, config.widths, config.negative_slope
        self.encoder1 = Unit(c, w1, slope)
        self.decoder1 = Unit(w1, w1, slope, decoder=True)
        self.encoder2 = Unit(w1, w2, slope)
        self.decoder2_1 = Unit(w2, w2, slope, decoder=True)
        self.decoder2_2 = Unit(w2, w1, slope, decoder=True)
        self.encoder3 = Unit(w2, w3, slope)
        self.decoder3_1 = Unit(w3, w3, slope, decoder=True)
        self.decoder3_2 = Unit(w3, w2, slope, decoder=True)
        self.decoder3_3 = Unit(w2, w1, slope, decoder=True)
        self.conv = nn.Conv2d(w1, c, 3, padding=1)
        self.final_conv = nn.Conv2d(3 * c, c, 3, padding=1)

    @property
    def reach(self) -> int:
        """Pixels around an output pixel that it depends on, on every side: one for each 3x3 layer in a row."""
        encoders, decoders = 3, 3
        return 2 * (encoders + decoders) + 2

    def forward(self, image: Tensor) -> Tensor:
        a1 = self.encoder1(image)  # (N, w1, H, W)
        a2 = self.encoder2(a1)  # (N, w2, H, W)
        a3 = self.encoder3(a2)  # (N, w3, H, W)
        deep = self.decoder1(a1), self.decoder2_2(self.decoder2_1(a2)), self.decoder3(a3)  # each (N, w1, H, W)
        results = torch.cat([self.conv(d) + image for d in deep], dim=1)  # r1, r2, r3, (N, 3C, H, W)
        return torch.tanh(self.final_conv(results)).clamp(0, 1)

    def decoder3(self, a3: Tensor) -> Tensor:
        """The three decoders of the deepest branch."""
        out: Tensor = self.decoder3_3(self.decoder3_2(self.decoder3_1(a3)))
        return out


@dataclass(frozen=True)
class HrToLrConfig:
    """Sizes of one F; the defaults are the released ones."""

    in_channels: int = 3
    width1: int = 96
    width2: int = 128
    width3: int = 256
    width4: int = 512
    hidden: int = 8
    """Channels between the last two convolutions."""
    noise_dim: int = 64
    side: int = 64
    """Rows and columns of the images; the noise map fixes it."""

    def __post_init__(self) -> None:
        if min(self.in_channels, *self.widths, self.hidden, self.noise_dim) < 1:
            msg = "Channels, widths and the length of the noise are at least 1."
            raise ValueError(msg)
        if self.width4 % 16:
            msg = f"The last width {self.width4} cannot be shuffled into pixels twice: it is no multiple of 16."
            raise ValueError(msg)
        if self.side < 16 or self.side % 16:
            msg = f"A side of {self.side} pixels cannot be halved four times."
            raise ValueError(msg)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels after each halving."""
        return self.width1, self.width2, self.width3, self.width4


class ResidualBlock(nn.Module):
    """Pre-activation block: x + conv2(relu(bn2(conv1(relu(bn1(x)))))), biases left out.

    A halving block averages 2x2 pixels before its second convolution and before the 1x1 convolution of its skip;
    the others have the identity as skip and keep the number of channels.
    """

    def __init__(self, channels: int, width: int, halving: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2: nn.Module = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if halving:
            self.conv2 = nn.Sequential(nn.AvgPool2d(2), self.conv2)
            self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.bn1(features)))
        out: Tensor = self.skip(features) + self.conv2(F.relu(self.bn2(x)))
        return out


class HrToLr(nn.Module):
    """F: (N, C, 64, 64) in [0, 1] and noise (N, 1, 64) to (N, C, 64, 64) in [0, 1], a blurred image of 16x16 pixels.

    A linear layer makes the noise one more channel; four halvings, two pixel shuffles (x2 each), and a bicubic
    enlargement by 4 with corners aligned. Trained together with G and thrown away after.
    """

    def __init__(self, config: HrToLrConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HrToLrConfig()
        w1, w2, w3, w4 = config.widths
        self.noise_fc = nn.Linear(config.noise_dim, config.side**2)
        self.in_layer = nn.Conv2d(config.in_channels + 1, w1, 3, padding=1, bias=False)
        down: list[nn.Module] = []
        for channels, width in ((w1, w1), (w1, w2), (w2, w3), (w3, w4)):
            down += [ResidualBlock(channels, width, halving=True), ResidualBlock(width, width)]
        self.down_layers = nn.Sequential(*down)
        up: list[nn.Module] = []
        for width in (w4 // 4, w4 // 16):
            up += [nn.PixelShuffle(2), ResidualBlock(width, width), ResidualBlock(width, width)]
        self.up_layers = nn.Sequential(*up)
        self.out_layer = nn.Sequential(
            nn.Conv2d(w4 // 16, config.hidden, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.hidden, config.in_channels, 3, padding=1, bias=False),
            nn.Tanh(),
        )

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        n, _, *size = image.shape
        side = self.config.side
        if size != [side, side]:
            msg = f"The network takes images of {side}x{side} pixels, not {size[0]}x{size[1]}."
            raise ValueError(msg)
        noise_map = self.noise_fc(noise).view(n, 1, side, side)
        deep = self.down_layers(self.in_layer(torch.cat((image, noise_map), dim=1)))  # (N, w4, side/16, side/16)
        small = self.out_layer(self.up_layers(deep))  # (N, C, side/4, side/4)
        enlarged = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=True)
        return enlarged.clamp(0, 1)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of one discriminator; the defaults are the released ones."""

    in_channels: int = 3
    conv_dim: int = 64
    repeat_num: int = 2
    """Halving layers after the first; each doubles the channels."""
    negative_slope: float = 0.2

    def __post_init__(self) -> None:
        if min(self.in_channels, self.conv_dim) < 1 or self.repeat_num < 0:
            msg = "Channels and width are at least 1, repetitions at least 0."
            raise ValueError(msg)


class Discriminator(nn.Module):
    """D: (N, C, H, W) to logits (N, 1, H', W'), one for each overlapping patch; 64x64 pixels to 5x5 logits.

    4x4 convolutions: `repeat_num` + 1 of stride 2, then three of stride 1; batch norm stands after the activation.
    No sigmoid.
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiscriminatorConfig()
        slope, width = config.negative_slope, config.conv_dim
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 4, 2, 1), nn.LeakyReLU(slope, inplace=True)]
        steps = [(2, 2)] * config.repeat_num + [(2, 1), (1, 1)]  # (factor of the width, stride)
        for factor, stride in steps:
            layers += [
                nn.Conv2d(width, factor * width, 4, stride, 1),
                nn.LeakyReLU(slope, inplace=True),
                nn.BatchNorm2d(factor * width),
            ]
            width *= factor
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.main(image)
        return out


def made_ready(net: Generator) -> Generator:
    """A copy for inference: the same results, faster.

    Transposed convolutions of stride 1 become the ordinary ones that they equal, and channels lie innermost.
    """
    ready = copy.deepcopy(net).eval().requires_grad_(False)
    for unit in (part for part in ready.modules() if isinstance(part, Unit)):
        if isinstance(unit.conv[0], nn.ConvTranspose2d):
            unit.conv[0] = as_convolution(unit.conv[0])
    return ready.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # not in its stubs


def as_convolution(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """A transposed 3x3 convolution of stride 1 and padding 1: its taps turned by 180° and in and out exchanged."""
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
    weight, bias = layer.weight.detach(), layer.get_parameter("bias").detach()
    conv.weight = nn.Parameter(weight.flip(2, 3).transpose(0, 1).contiguous(), requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


def graph_form(net: Generator) -> GraphForm:
    """The generator for an exporter; the image is one that bicubic has enlarged already. See `GraphForm`."""
    return GraphForm(made_ready(net), {IMAGE: torch.zeros(2, net.config.in_channels, 12, 20)}, {IMAGE: PLANES})


def example_inputs(config: GeneratorConfig) -> tuple[Tensor, ...]:
    """Empty inputs for the generator, which takes any size."""
    return (torch.zeros(1, config.in_channels, 8, 8),)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()
"""Nothing in the generator's state is computed."""


def config_from_state(state: Mapping[str, Tensor]) -> GeneratorConfig:
    """Recover the sizes of a generator from the shapes of its tensors; slope and scale stay the defaults.

    Raises:
        WeightsError: the tensors are not those of a generator; the sentence names what is missing.
    """
    needed = [f"encoder{i}.conv.0.weight" for i in (1, 2, 3)]
    missing = [key for key in (*needed, "final_conv.weight") if key not in state]
    if missing:
        msg = f"These tensors are not a generator of the ultrasound CycleGAN: {missing[0]} is missing."
        raise WeightsError(msg)
    first, second, third = (state[key].shape for key in needed)
    return GeneratorConfig(in_channels=first[1], width1=first[0], width2=second[0], width3=third[0])
