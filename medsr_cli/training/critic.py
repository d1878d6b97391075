"""The critic beside a network that is trained against it (WGAN-GP), with an optimiser of its own.

Losses and architecture are those of `networks.wgan`; when it is stepped, and on which images, is the loop's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsr_cli.networks.wgan import Discriminator, DiscriminatorConfig, discriminator_loss
from medsr_cli.training.processes import Processes
from medsr_cli.training.recipe import Recipe

SEED = 1
"""Set apart from the network's own seed."""


def has_critic(stage: Recipe) -> bool:
    """Whether a stage trains a critic beside the network."""
    return stage.losses.get("wgan", 0) != 0


def draws_per_step(stage: Recipe) -> int:
    """Batches that a step takes: each step of the critic has its own, and the network has the last one's."""
    return stage.critic_steps if has_critic(stage) else 1


class CriticTrainer:
    """A critic of the paper's sizes and its Adam; `begin` gives it a new optimiser for another stage.

    Args:
        recipe: of the stage.
        channels: of the images.
        side: longest side of the targets in pixels.
        device: where it is trained.
        processes: those that share each batch.
    """

    def __init__(self, recipe: Recipe, channels: int, side: int, device: torch.device, processes: Processes) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_whole_seed(recipe.seed, SEED))
            self.net = Discriminator(DiscriminatorConfig(in_channels=channels, side=side)).to(device)
        self.processes = processes
        self.begin(recipe)

    def takes(self, channels: int, side: int) -> bool:
        """Whether images of so many channels and pixels suit it."""
        config = self.net.config
        return (config.in_channels, config.end) == (channels, DiscriminatorConfig(side=side).end)

    def begin(self, recipe: Recipe) -> None:
        """The optimiser of a new stage; the weights go on."""
        self.recipe = recipe
        self.optimiser = torch.optim.Adam(self.net.parameters(), recipe.critic_rate, recipe.critic_betas)

    def step(self, result: Tensor, target: Tensor, draw: int, factor: float) -> float:
        """Teach the critic one batch; returns its loss.

        Args:
            result: what the network made, (N, C, H, W), this process's share; no gradient flows into the network.
            target: the same of the image itself.
            draw: number of this step of the critic, from which the mixing shares are drawn.
            factor: what its learning rate is multiplied by.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.critic_rate * factor
        self.optimiser.zero_grad(set_to_none=True)
        share = self._shares(draw, len(result)).to(result)
        loss = discriminator_loss(self.net, result.detach(), target, share, self.recipe.penalty)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch does not say
        self.processes.average_gradients(self.net.parameters())
        value = self.processes.mean(float(loss.detach()))
        if abs(value) < self.recipe.skip_loss:  # what is no number is told by the loop
            self.optimiser.step()
        return value

    def _shares(self, draw: int, count: int) -> Tensor:
        """This process's part of the shares of the whole batch, so that they do not depend on who computes them."""
        generator = torch.Generator().manual_seed(_whole_seed(self.recipe.seed, SEED, draw))
        whole = torch.rand(count * self.processes.count, 1, 1, 1, generator=generator)
        return whole[count * self.processes.rank :][:count]

    def state_dict(self) -> dict[str, Any]:
        """Sizes, weights and optimiser, on the CPU."""
        config = self.net.config
        weights = {name: value.detach().cpu() for name, value in self.net.state_dict().items()}
        sizes = {"channels": config.in_channels, "side": config.side}
        return {**sizes, "weights": weights, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same sizes."""
        self.net.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])


def _whole_seed(*parts: int) -> int:
    """One seed for PyTorch of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
