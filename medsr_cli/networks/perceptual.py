"""Perceptual losses: the mean squared difference of VGG-19 activations of a result and its target.

What the papers call by the same name differs in the layer, before or after its ReLU, in how the image is
prepared, and in what is done with images that are not RGB. A `PerceptualSpec` says all of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint
from medsr_cli.networks.vgg import Vgg19Features, VggConfig, convolution_of

if TYPE_CHECKING:
    from os import PathLike

Normalisation = Literal["imagenet", "half", "none"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PerceptualSpec:
    """Which activation of VGG-19 is compared, and what the images go through before."""

    layer: str
    """`conv2_2` is before the ReLU, `relu2_2` after it, `pool4` after the pooling."""
    normalisation: Normalisation = "imagenet"
    """`imagenet`: (v - mean) / deviation of each colour; `half`: (v + 1) / 2, which takes images in [-1, 1] to
    [0, 1], and those in [0, 1] to [1/2, 1]; `none`."""
    side: int = 0
    """Rows and columns that images are resized to (bicubic, a = -0.75, corners aligned); 0 leaves them."""

    def __post_init__(self) -> None:
        convolution_of(self.layer)
        if self.normalisation not in ("imagenet", "half", "none") or self.side < 0:
            msg = f"There is no normalisation {self.normalisation!r} to a side of {self.side}."
            raise ValueError(msg)


VGG22 = PerceptualSpec("conv2_2")
"""MIASSR (arXiv 2105.10738, section 3.3; the release): conv2_2 before its ReLU, ImageNet normalisation."""
VGG54 = PerceptualSpec("conv5_4")
"""The deep alternative of MIASSR's release, and SRGAN's: conv5_4 before its ReLU."""
VGG54_ACTIVATED = PerceptualSpec("relu5_4")
"""MS-GAN (J. Zhu's dissertation, chapter 3): a deep layer after its activation; which one is not stated."""
PERCEPTION_CONSISTENCY = PerceptualSpec("pool4", "half", side=224)
"""Φ of the ultrasound CycleGAN (Liu et al. 2021, equation 6; the release): after the fourth pooling."""


class PerceptualLoss(nn.Module):
    """`loss(result, target)`: two (N, C, H, W) in [0, 1] to a scalar, differentiable in both; VGG-19 itself is frozen.

    RGB goes in as it is, grey as three equal channels, and images of any other number of channels one channel
    after the other as grey, the losses added up (MIASSR's release, for the four MR sequences of BraTS).

    Args:
        spec: the layer and the preparation.
        vgg: with at least the layers that `spec` needs; its tensors are shared, deeper ones are left out.
    """

    def __init__(self, spec: PerceptualSpec, vgg: Vgg19Features) -> None:
        super().__init__()
        self.spec = spec
        self.vgg = shortened(vgg, spec.layer).requires_grad_(False).eval()
        mean, deviation = {
            "imagenet": (IMAGENET_MEAN, IMAGENET_DEVIATION),
            "half": ((-1.0,) * 3, (2.0,) * 3),
            "none": ((0.0,) * 3, (1.0,) * 3),
        }[spec.normalisation]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.deviation: Tensor

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        if result.shape != target.shape:
            msg = f"A result {tuple(result.shape)} cannot be compared with a target {tuple(target.shape)}."
            raise ValueError(msg)
        n, channels, h, w = result.shape
        if channels in (1, 3):
            return F.mse_loss(self.features(result), self.features(target))
        # All channels in one batch: they have equally many elements, so C times their common mean is the sum.
        result, target = (image.reshape(n * channels, 1, h, w) for image in (result, target))
        return channels * F.mse_loss(self.features(result), self.features(target))

    def features(self, image: Tensor) -> Tensor:
        """The compared activation of (N, 1 or 3, H, W) in [0, 1]: (N, C', H', W')."""
        prepared = self.prepare(image.expand(-1, 3, -1, -1))
        (activation,) = self.vgg(prepared, (self.spec.layer,))
        found: Tensor = activation
        return found

    def prepare(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) as VGG-19 is given it: resized, then (v - mean) / deviation."""
        side = self.spec.side
        if side:
            image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=True)
        return (image - self.mean.to(image.dtype)) / self.deviation.to(image.dtype)


def shortened(vgg: Vgg19Features, layer: str) -> Vgg19Features:
    """A VGG-19 that ends where `layer` needs it to and shares the tensors of `vgg`.

    Raises:
        ValueError: `vgg` itself ends before.
    """
    config = VggConfig(vgg.config.width, convolution_of(layer))
    if layer not in vgg.config.layers:
        msg = f"This VGG-19 ends with {vgg.config.layers[-1]}, before {layer}."
        raise ValueError(msg)
    with torch.device("meta"):
        short = Vgg19Features(config)
    tensors = vgg.state_dict()
    short.load_state_dict({key: tensors[key] for key in short.state_dict()}, assign=True)
    return short


def loss_of(network: nn.Module, spec: PerceptualSpec, name: str = "the network") -> PerceptualLoss:
    """The loss of `spec` on a network that was loaded from a file of that name.

    Raises:
        WeightsError: it is not VGG-19, or ends before the layer.
    """
    if not isinstance(network, Vgg19Features):
        msg = f"{name} is not a VGG-19."
        raise WeightsError(msg, "Name the checkpoint whose features the loss compares.")
    if spec.layer not in network.config.layers:
        msg = f"{name} ends with {network.config.layers[-1]}; the loss compares {spec.layer}."
        raise WeightsError(msg, "Use the whole VGG-19.")
    return PerceptualLoss(spec, network)


def cyclegan_loss(network: nn.Module) -> PerceptualLoss:
    """Φ of the ultrasound CycleGAN on a loaded VGG-19.

    Raises:
        WeightsError: it is not VGG-19, or ends before the fourth pooling.
    """
    return loss_of(network, PERCEPTION_CONSISTENCY)


def load_perceptual(path: str | PathLike[str], spec: PerceptualSpec) -> PerceptualLoss:
    """The loss of `spec` with the weights of a file: safetensors, or a checkpoint of torchvision (`.pth`).

    Raises:
        WeightsError: the file is not readable, not VGG-19, damaged, or ends before the layer.
    """
    name = Path(path).name
    if name.endswith(".safetensors"):
        return loss_of(checkpoint.load_network(path), spec, name)
    state = checkpoint.read_author_checkpoint(path)
    return loss_of(checkpoint.network_from_state(state, catalogue.VGG19, name=name), spec, name)
