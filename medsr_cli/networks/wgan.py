"""The critic of MIASSR, MS-GAN and RDST's ablation, and the Wasserstein losses with a gradient penalty.

Architecture: J. Zhu et al., arXiv 2105.10738, as their program has it (seven convolutions after the first);
losses: Gulrajani et al., "Improved training of Wasserstein GANs" (2017), equation 3. Attribute names are the
authors'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.2
DOUBLINGS = (1, 1, 2, 2, 4, 4, 8, 8)
"""Width of each convolution in units of the first; every second one halves the image."""
SHRINKAGE = 16
"""Four halvings."""

Critic = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to one number each, (N, 1)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of one critic; the defaults are the paper's. `side` is that of the training targets in pixels."""

    in_channels: int = 1
    width: int = 64
    dense: int = 1024
    side: int = 96

    def __post_init__(self) -> None:
        if min(self.in_channels, self.width, self.dense, self.side) < 1:
            msg = f"Every size of a discriminator is at least 1: {self}."
            raise ValueError(msg)

    @property
    def end(self) -> int:
        """Pixels along each side of the last map; targets of 81 to 96 pixels all end in 6."""
        return -(-self.side // SHRINKAGE)


class Discriminator(nn.Module):
    """Eight 3×3 convolutions without bias or normalisation, two linear layers: (N, C, side, side) to (N, 1).

    Strides are 1, 2, 1, 2, … and LeakyReLU follows each convolution and the first linear layer; the result is
    a score, not a probability. Sides may be anything that ends in the same last map.
    """

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiscriminatorConfig()
        widths = [config.in_channels, *(config.width * factor for factor in DOUBLINGS)]
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 + i % 2, padding=1, bias=False),
                    nn.LeakyReLU(NEGATIVE_SLOPE),
                )
                for i in range(len(DOUBLINGS))
            )
        )
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * config.end**2, config.dense),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            nn.Linear(config.dense, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Score images.

        Raises:
            ValueError: their size is not one that this critic was built for.
        """
        maps: Tensor = self.features(image)  # (N, 8·width, end, end)
        if maps.shape[-2:] != (self.config.end, self.config.end):
            least, most = SHRINKAGE * (self.config.end - 1) + 1, SHRINKAGE * self.config.end
            msg = f"This discriminator takes sides of {least} to {most} pixels, not {tuple(image.shape[-2:])}."
            raise ValueError(msg)
        score: Tensor = self.classifier(maps.flatten(1))
        return score


def gradient_penalty(critic: Critic, sr: Tensor, hr: Tensor, share: Tensor) -> Tensor:
    """Mean of (‖∇D(x̂)‖₂ − 1)² at x̂ = (1 − a)·SR + a·HR, one norm for each sample.

    Args:
        critic: scores a batch.
        sr: enlarged images (N, C, H, W); no gradient flows into what made them.
        hr: their targets, same shape.
        share: a, uniform in [0, 1), one for each sample: (N, 1, 1, 1) or (N,), see `draw_share`.
    """
    a = share.view(-1, 1, 1, 1)
    with torch.enable_grad():  # validation may ask for it too
        mixed = ((1 - a) * sr.detach() + a * hr.detach()).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        penalty: Tensor = (norms - 1).square().mean()
        return penalty


def discriminator_loss(critic: Critic, sr: Tensor, hr: Tensor, share: Tensor, penalty: float = 10.0) -> Tensor:
    """mean D(SR) − mean D(HR) + penalty · gradient penalty, to be minimised by the critic alone."""
    distance = critic(sr.detach()).mean() - critic(hr).mean()
    return distance + penalty * gradient_penalty(critic, sr, hr, share)


def generator_loss(critic: Critic, sr: Tensor) -> Tensor:
    """−mean D(SR), whose gradient goes through the critic into the generator."""
    return -critic(sr).mean()


def draw_share(sr: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mixing shares for a batch, uniform in [0, 1), (N, 1, 1, 1); drawn on the CPU, the same for every device."""
    return torch.rand(len(sr), 1, 1, 1, generator=generator).to(sr)
