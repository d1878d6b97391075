"""Small trainings of every kind, for the tests of the loop and of several processes; standard parts and torch only."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.networks.wgan import DiscriminatorConfig
from medsr_cli.training import critic, loop
from medsr_cli.training.batch import Batch
from medsr_cli.training.loop import Trainer
from medsr_cli.training.recipe import Recipe, changed

PLAIN = Recipe(iterations=12, batch=2, patch=8, learning_rate=1e-3, validate_every=5)
RICH = replace(PLAIN, schedule="cooldown", warmup=2, linear_steps=3, augment=True, gain=2.0, average=0.9, clip_norm=1.0)
STAGES = changed(
    replace(PLAIN, iterations=7, average=0.9, schedule="milestones", milestones=(4,), weight_decay=1e-3),
    {
        "then": [
            {
                "iterations": 6,
                "schedule": "cosine",
                "final_rate": 1e-5,
                "average": 0.8,
                "losses": {"mse": 2.0, "l1": 1.0},
            }
        ]
    },
)
MIASSR = changed(
    replace(PLAIN, method="miassr", iterations=6, high_patch=16, scales=(1.5, 2.0, 3.2)),
    {"then": [{"iterations": 7, "losses": {"l1": 1.0, "wgan": 0.001}, "judge": "last", "critic_rate": 1e-3}]},
)
MSGAN = replace(
    PLAIN,
    method="msgan",
    losses={"mse": 1.0, "mse_x2": 0.5, "wgan": 0.01},
    high_patch=16,
    critic_steps=2,
    critic_rate=1e-3,
    average=0.9,
)
HALF = replace(PLAIN, method="msgan", losses={"mse": 1.0, "mse_x2": 0.5}, high_patch=16, precision="fp16")
PATIENT = replace(
    PLAIN,
    method="msgan",
    losses={"mse": 1.0},
    high_patch=16,
    iterations=40,
    validate_every=2,
    patience=4,
    learning_rate=0.3,
)
KINDS = {
    "rdst paper": PLAIN,
    "rdst quick": RICH,
    "two stages": STAGES,
    "miassr, critic in the second stage": MIASSR,
    "msgan, two critic steps": MSGAN,
    "half precision": HALF,
    "patience": PATIENT,
}


def network_of(recipe: Recipe) -> torch.nn.Module:
    """A small one of the recipe's method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.method == "miassr":
            return Miassr(MiassrConfig(n_feats=8, n_blocks=1, hidden=8))
        if recipe.method == "msgan":
            return MsGan(MsGanConfig(n_blocks=1, n_feats=8))
        return Rdst(RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, scale=2))


class Waves:
    """Batches of sums of waves, a function of the seed and the step; each process gets its part of them."""

    def __init__(self, recipe: Recipe, rank: int = 0, processes: int = 1) -> None:
        self.recipe, self.rank, self.processes = recipe, rank, processes

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.recipe.seed, step))
        side = self.recipe.high_patch or 2 * self.recipe.patch
        high = waves(rng, self.recipe.batch, side)
        ratio, middle = None, None
        if self.recipe.method == "miassr":
            low_side = int(side / self.recipe.scales[rng.integers(len(self.recipe.scales))])
            ratio = (Fraction(side, low_side), Fraction(side, low_side))
        else:
            low_side = side // (4 if self.recipe.method == "msgan" else 2)
        if self.recipe.method == "msgan":
            middle = interpolate(high, (side // 2, side // 2), mode="area")
        low = interpolate(high, (low_side, low_side), mode="area")
        share = self.recipe.batch // self.processes
        own = slice(self.rank * share, (self.rank + 1) * share)
        return Batch(low[own], high[own], ratio, middle=None if middle is None else middle[own], seed=step)


def waves(rng: np.random.Generator, count: int, side: int) -> torch.Tensor:
    y, x = np.mgrid[:side, :side] / side
    images = []
    for _ in range(count):
        parts = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-4, 4, (3, 3))]
        images.append(0.5 + 0.15 * np.sum(parts, axis=0))
    return torch.from_numpy(np.stack(images)[:, None]).float()


@dataclass(frozen=True)
class Gain:
    """One score."""

    gain: float


def score(recipe: Recipe, net: torch.nn.Module) -> list[Gain]:
    """How far the network is from the target, on two batches that are never trained on."""
    from medsr_cli.training.forward import forward

    was = net.training
    net.eval()
    with torch.no_grad():
        batches = [Waves(recipe).batch(10**6 + k) for k in range(2)]
        errors = [float((forward(net, b).image - b.high).abs().mean()) for b in batches]
    net.train(was)
    return [Gain(1 - 4 * error) for error in errors]


def trainer(path: Path, recipe: Recipe, own_score=None, accelerator=None) -> Trainer:
    """A training of this recipe, with a narrow critic."""
    critic.DiscriminatorConfig = partial(DiscriminatorConfig, width=4, dense=8)
    rank, count = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    return Trainer(
        network_of(recipe),
        recipe,
        lambda stage: Waves(stage, rank, count),
        own_score or partial(score, recipe),
        path,
        accelerator=accelerator,
    )


class Quiet:
    """Remembers what it is told, and can do something at a step."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.losses, self.validations = at, act, [], []

    def step(self, done, total, loss):
        self.losses.append(loss)
        if done == self.at:
            self.act()

    def validated(self, done, scores, best):
        self.validations.append((done, best))


def main() -> None:
    """One training of a kind in a process of its own: kind, path of the state, and whether to resume."""
    torch.set_num_threads(1)
    kind, path, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "resume"
    run = trainer(path, KINDS[kind])
    if resume:
        run.resume()

    class Told(Quiet):
        def step(self, done, total, loss):
            sys.stdout.write(f"{done}\n")
            sys.stdout.flush()

    loop.SAVE_EVERY_SECONDS = 0.0
    run.run(Told())


if __name__ == "__main__":
    main()
