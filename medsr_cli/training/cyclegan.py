"""One iteration of the self-supervised ultrasound CycleGAN: two generators, two discriminators, their losses.

H. Liu et al., "Perception consistency ultrasound image super-resolution via self-supervised CycleGAN", Neural
Computing and Applications 35, 2021, doi 10.1007/s00521-020-05687-9 ("paper"), and its release ("release"),
github.com/hengliusky/UltraSound_SSSR at 16f83a2, which differ; a `Preset` is one or the other.

y is a father, x its son enlarged to the same size, z noise. G makes ŷ of x, F makes x̂ of y and z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, mse_loss

from medsr_cli.networks.uscyclegan import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    HrToLr,
    HrToLrConfig,
)

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Φ(result, target) of images (1, 3, 64, 64) in [0, 1]: a scalar."""

POOL_SIZE = 50
"""Earlier results that a discriminator may see again (release)."""
HR_TO_LR = HrToLrConfig()
DISCRIMINATOR = DiscriminatorConfig()


@dataclass(frozen=True)
class Preset:
    """Every number of the training in which paper and release differ, or that one of them states."""

    name: str
    negative_slope: float
    """Of G's leaky ReLUs: 1 in the release, where a boolean stands for it; not stated in the paper, 0.01 is the
    framework's default."""
    pixel: float
    """Weight of |ŷ - y| + |x̂ - x|, mean absolute errors (release: 1; paper: 5)."""
    cycle: float
    """Weight of |G(x̂) - y| + |F(ŷ, z) - x| (release: 1; paper: 0.3)."""
    perceptual: float
    """Weight of Φ(ŷ, y) + Φ(x̂, x) (release: 1; paper: 0.1)."""
    adversarial: float
    """Weight of the discriminators' verdicts on ŷ and x̂ (release: 0.15; paper: 5)."""
    verdict: Literal["least squares", "cross entropy"]
    """Release: (D - 1)²; paper: -log D, taken of logits."""
    follow_rate: bool
    """Whether the optimisers are given the reduced rate (paper); in the release it only decides when to stop."""
    minimum_rate: float
    """Training ends below this rate (release: 9e-6; paper: 1e-6)."""
    rate: float = 1e-3
    """Of Adam, at first (release and paper)."""
    iterations: int = 3000
    """At most so many (release; the paper does not say)."""
    noise_deviation: float = 0.0
    """Of the normal noise added to sons (release: none)."""


RELEASED = Preset(
    name="released",
    negative_slope=1.0,
    pixel=1.0,
    cycle=1.0,
    perceptual=1.0,
    adversarial=0.15,
    verdict="least squares",
    follow_rate=False,
    minimum_rate=9e-6,
)
PAPER = Preset(
    name="paper",
    negative_slope=0.01,
    pixel=5.0,
    cycle=0.3,
    perceptual=0.1,
    adversarial=5.0,
    verdict="cross entropy",
    follow_rate=True,
    minimum_rate=1e-6,
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in (RELEASED, PAPER)}


class ImagePool:
    """Earlier results of a generator, so that its discriminator does not forget them (release; size 50).

    While it is not full, an image is kept and given back. Then, with probability 1/2, a kept one is given back
    and the new one takes its place; otherwise the new one is given back and not kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def swap(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Take in an image, without its gradients, and give one back."""
        image = image.detach()
        if len(self.images) < self.size:
            self.images.append(image)
            return image
        if rng.random() < 0.5:
            place = int(rng.integers(self.size))
            image, self.images[place] = self.images[place], image
        return image


class CycleGan:
    """The four networks, their optimisers and pools.

    Args:
        scale: the enlargement, kept in G's configuration; it changes nothing here.
        preset: losses and first rate.
        seed: of the initial weights, which are PyTorch's default ones.
        device: where everything is computed; initial weights do not depend on it.
        perceptual: Φ, or None to leave that term out.
    """

    def __init__(
        self, scale: int, preset: Preset, seed: int, device: torch.device | str, perceptual: Perceptual | None
    ) -> None:
        self.preset, self.perceptual, self.device = preset, perceptual, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(GeneratorConfig(negative_slope=preset.negative_slope, scale=scale))
            self.hr_to_lr = HrToLr(HR_TO_LR)
            self.judge_high = Discriminator(DISCRIMINATOR)
            self.judge_low = Discriminator(DISCRIMINATOR)
        for network in self._networks().values():
            # Always in training mode, as in the release: batch norm takes the statistics of the one image.
            network.to(self.device).train()
        both = [*self.generator.parameters(), *self.hr_to_lr.parameters()]
        self.optimisers = {
            "generators": self._adam(both),
            "judge_high": self._adam(self.judge_high.parameters()),
            "judge_low": self._adam(self.judge_low.parameters()),
        }
        self.pools = {"high": ImagePool(POOL_SIZE), "low": ImagePool(POOL_SIZE)}

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generator,
            "hr_to_lr": self.hr_to_lr,
            "judge_high": self.judge_high,
            "judge_low": self.judge_low,
        }

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # Fused: one pass over 26 million parameters, not one for each operation of Adam (7 % of an iteration).
        return torch.optim.Adam(parameters, self.preset.rate, fused=True)

    def set_rate(self, rate: float) -> None:
        """Give all optimisers this rate."""
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate

    def iterate(self, father: Tensor, son: Tensor, noise: Tensor, rng: np.random.Generator) -> float:
        """One step of G and F together, then one of each discriminator.

        Args:
            father: y, (1, 3, 64, 64) in [0, 1].
            son: x, the same shape.
            noise: z, (1, 1, 64), standard normal.
            rng: decides what the pools give back.

        Returns:
            The loss of G and F.
        """
        y, x, z = (t.to(self.device) for t in (father, son, noise))
        loss, fake_high, fake_low = self._step_generators(y, x, z)
        for name, judge, real, fake, pool in (
            ("judge_low", self.judge_low, x, fake_low, self.pools["low"]),
            ("judge_high", self.judge_high, y, fake_high, self.pools["high"]),
        ):
            optimiser = self.optimisers[name]
            optimiser.zero_grad(set_to_none=True)
            judged = self._verdict(judge(real), 1.0) + self._verdict(judge(pool.swap(fake, rng)), 0.0)
            judged.backward()  # type: ignore[no-untyped-call]  # PyTorch does not say
            optimiser.step()
        return float(loss)

    def _step_generators(self, y: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step G and F; returns loss, ŷ and x̂ from before the step, without gradients."""
        for judge in (self.judge_high, self.judge_low):
            judge.requires_grad_(False)  # their gradients would be thrown away
        optimiser = self.optimisers["generators"]
        optimiser.zero_grad(set_to_none=True)
        fake_high, fake_low = self.generator(x), self.hr_to_lr(y, z)
        loss = self.loss(y, x, z, fake_high, fake_low)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch does not say
        optimiser.step()
        for judge in (self.judge_high, self.judge_low):
            judge.requires_grad_(True)
        return loss.detach(), fake_high.detach(), fake_low.detach()

    def loss(self, y: Tensor, x: Tensor, z: Tensor, fake_high: Tensor, fake_low: Tensor) -> Tensor:
        """The loss of G and F (paper, equation 8; release), given ŷ = G(x) and x̂ = F(y, z)."""
        preset = self.preset
        cycle = l1_loss(self.generator(fake_low), y) + l1_loss(self.hr_to_lr(fake_high, z), x)
        pixel = l1_loss(fake_high, y) + l1_loss(fake_low, x)
        verdicts = self._verdict(self.judge_high(fake_high), 1.0) + self._verdict(self.judge_low(fake_low), 1.0)
        total = preset.cycle * cycle + preset.pixel * pixel + preset.adversarial * verdicts
        if self.perceptual is not None:
            total = total + preset.perceptual * (self.perceptual(fake_high, y) + self.perceptual(fake_low, x))
        return total

    def _verdict(self, logits: Tensor, wanted: float) -> Tensor:
        """How far a discriminator's answer is from 1, real, or 0, made up."""
        target = torch.full_like(logits, wanted)
        if self.preset.verdict == "least squares":
            return mse_loss(logits, target)
        return binary_cross_entropy_with_logits(logits, target)

    def state(self) -> dict[str, Any]:
        """Networks, optimisers and pools, as `load_state` takes them."""
        return {
            "networks": {name: network.state_dict() for name, network in self._networks().items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "pools": {name: pool.images for name, pool in self.pools.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from.

        Raises:
            RuntimeError, KeyError, ValueError, TypeError, AttributeError: it is not such a state.
        """
        for name, network in self._networks().items():
            network.load_state_dict(state["networks"][name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for name, pool in self.pools.items():
            pool.images = [image.to(self.device) for image in state["pools"][name]]
