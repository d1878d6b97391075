"""The training loop: L1 on patches, validation beside bicubic, and a state from which it goes on exactly.

Every batch is a function of the seed and the step, so that a run that was stopped and resumed computes what
an uninterrupted one would have, bit for bit on one CPU.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medsr_cli.errors import RunError, WeightsError
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.networks.rdst import Rdst, ResidualDenseSwinBlock
from medsr_cli.training.interruption import Stopped, StopSwitch
from medsr_cli.training.patches import PatchSampler
from medsr_cli.training.prefetch import Prefetcher
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.validation import VolumeScore, mean_gain_db

SAVE_EVERY_SECONDS = 300.0
"""Longest time between two states on the disk: what a power cut can cost."""
WORTH_COMPILING = 2000
"""Steps from which on compiling the network for a GPU, a minute or two, pays."""

Batch = tuple[Tensor, Tensor]


class Watcher(Protocol):
    """Is told how the training goes."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step is done; `loss` is its mean absolute error."""

    def validated(self, done: int, scores: list[VolumeScore], best: bool) -> None:
        """A validation is done; `best` says that its weights are now the ones kept."""


@dataclass
class TrainingState:
    """What a run needs to go on: weights, optimiser, best weights so far, and the history."""

    step: int = 0
    best_gain_db: float = float("-inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """Trains one network by one recipe; `run` can be called again after it stopped.

    Args:
        net: on the device that it is to be trained on.
        recipe: every number of the training.
        sampler: the batch of each step.
        score: validates a network; called before the first step, every `validate_every` and after the last.
        state_path: where the state is saved, again and again.
    """

    def __init__(
        self,
        net: Rdst,
        recipe: Recipe,
        sampler: PatchSampler,
        score: Callable[[nn.Module], list[VolumeScore]],
        state_path: Path,
    ) -> None:
        self.net, self.recipe, self.sampler, self.score = net, recipe, sampler, score
        self.state_path = state_path
        self.device = next(net.parameters()).device
        self.optimiser = torch.optim.Adam(parameter_groups(net, recipe), recipe.learning_rate, recipe.betas)
        self.state = TrainingState()
        self.averaged = copy.deepcopy(net).eval() if recipe.average else net
        self._forward: Callable[[Tensor], Tensor] = net
        self._compiled = False

    def run(self, watcher: Watcher, until_seconds: float = float("inf")) -> TrainingState:
        """Train to the recipe's last step, or until so many seconds have passed since the first start.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and the state saved.
            RunError: the loss is not a number, or the state could not be saved; the last one saved is whole.
        """
        state, recipe = self.state, self.recipe
        started = time.monotonic() - state.seconds
        self._compile_if_worth_it()
        self.net.train()
        with StopSwitch() as switch, Prefetcher(self.sampler.batch, state.step, recipe.iterations) as batches:
            saved = -1
            # A stop inside a validation leaves nothing half-done: it is saved, and done anew on resuming.
            with contextlib.suppress(Stopped):
                saved = self._run_steps(watcher, switch, batches, started, until_seconds)
            state.seconds = time.monotonic() - started
            if saved != state.step:
                self.save()
            if switch.pressed:
                raise KeyboardInterrupt
        return state

    def _run_steps(
        self,
        watcher: Watcher,
        switch: StopSwitch,
        batches: Prefetcher[Batch],
        started: float,
        until_seconds: float,
    ) -> int:
        """Step and validate; returns the step that was saved last."""
        state, recipe = self.state, self.recipe
        saved, saved_at = -1, time.monotonic()
        while True:
            due = self._validation_is_due()
            if due:
                with switch.at_once():
                    scores = self.score(self.averaged)
                self._judge(scores, watcher)
            if due or time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                state.seconds = time.monotonic() - started
                self.save()
                saved, saved_at = state.step, time.monotonic()
            if switch.pressed or state.step >= recipe.iterations or time.monotonic() - started >= until_seconds:
                return saved
            loss = self._step(state.step, batches.get(state.step))
            state.step += 1
            watcher.step(state.step, recipe.iterations, loss)

    def _compile_if_worth_it(self) -> None:
        if self.device.type == "cuda" and self.recipe.iterations - self.state.step >= WORTH_COMPILING:
            self._forward = torch.compile(self.net)
            self._compiled = True

    def _enlarge(self, low: Tensor) -> Tensor:
        """The network's forward pass, compiled where that works, in the recipe's precision."""
        arithmetic = (
            torch.autocast(self.device.type, torch.bfloat16)
            if self.recipe.precision == "bf16"
            else contextlib.nullcontext()
        )
        with arithmetic:
            try:
                out = self._forward(low)
            except Exception:
                if not self._compiled:
                    raise
                # The compiler needs a C compiler and a recent GPU; without them the plain network does.
                self._forward, self._compiled = self.net, False
                out = self._forward(low)
        return out.float()

    def _step(self, step: int, batch: Batch) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate_at(step) * group["factor"]
        low, high = (t.to(self.device) for t in batch)
        self.optimiser.zero_grad(set_to_none=True)
        linear = step < self.recipe.linear_steps
        result = linear_part(self.net, low) if linear else self._enlarge(low)
        loss = (result - high).abs().mean()
        value = float(loss.detach())
        if math.isnan(value):
            msg = f"The training loss is not a number at step {step + 1}."
            raise RunError(msg, "Lower the learning rate.")
        if value < self.recipe.skip_loss:
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch does not say
            if self.recipe.clip_norm:
                nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm)
            self.optimiser.step()
            self._average(step)
        if step + 1 == self.recipe.linear_steps:
            forget_momenta(self.optimiser)
        return value

    def _average(self, step: int) -> None:
        if not self.recipe.average:
            return
        # Early on, the average is over the steps there were, not over a horizon longer than the run.
        decay = min(self.recipe.average, (step + 1) / (step + 10))
        with torch.no_grad():
            own: list[Tensor] = [p for p in self.averaged.parameters() if p.requires_grad]
            new: list[Tensor] = [p for p in self.net.parameters() if p.requires_grad]
            torch._foreach_lerp_(own, new, 1 - decay)

    def _validation_is_due(self) -> bool:
        """Whether this step is one after which to validate, and that was not done yet."""
        state, recipe = self.state, self.recipe
        if state.history and state.history[-1]["step"] == state.step:
            return False
        return not state.history or state.step % recipe.validate_every == 0 or state.step == recipe.iterations

    def validate_now(self, watcher: Watcher) -> None:
        """Validate the weights as they are, between the steps at which a run does; this is not saved.

        So a run that is resumed knows nothing of it, and keeps what an uninterrupted one would have kept.
        """
        if not self.state.history or self.state.history[-1]["step"] != self.state.step:
            self._judge(self.score(self.averaged), watcher)

    def _judge(self, scores: list[VolumeScore], watcher: Watcher) -> None:
        state = self.state
        gain = mean_gain_db(scores)
        best = gain > state.best_gain_db
        if best:
            state.best_gain_db, state.best_step = gain, state.step
            state.best_weights = {k: v.detach().cpu().clone() for k, v in self.averaged.state_dict().items()}
        state.history.append({"step": state.step, "gain_db": gain})
        watcher.validated(state.step, scores, best)

    def save(self) -> None:
        """Write the state beside the result; the file before it stays until this one is whole."""
        state = self.state
        record = {
            "recipe": self.recipe.to_json(),
            "step": state.step,
            "seconds": state.seconds,
            "best_gain_db": state.best_gain_db,
            "best_step": state.best_step,
            "best_weights": state.best_weights,
            "history": state.history,
            "weights": {k: v.cpu() for k, v in self.net.state_dict().items()},
            "averaged": {k: v.cpu() for k, v in self.averaged.state_dict().items()},
            "optimiser": self.optimiser.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(record, buffer)
        with atomic_file(self.state_path, overwrite=True) as file:
            file.write(buffer.getbuffer())

    def resume(self) -> None:
        """Go on from the saved state.

        Raises:
            WeightsError: there is none, or it belongs to another network.
        """
        record = read_state(self.state_path)
        try:
            self.net.load_state_dict(record["weights"])
            self.averaged.load_state_dict(record["averaged"])
            self.optimiser.load_state_dict(record["optimiser"])
            self.state = TrainingState(
                step=record["step"],
                best_gain_db=record["best_gain_db"],
                best_step=record["best_step"],
                best_weights=record["best_weights"],
                history=record["history"],
                seconds=record["seconds"],
            )
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _not_a_state(self.state_path) from error


def read_state(path: Path) -> dict[str, Any]:
    """A saved state: tensors, numbers and texts, nothing that runs.

    Raises:
        WeightsError: there is none, or it is not whole.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise _not_a_state(path) from error
    if not isinstance(record, dict):
        raise _not_a_state(path)
    return record


def _not_a_state(path: Path) -> WeightsError:
    msg = f"{path.name} is not a training state of this network."
    return WeightsError(msg, "Give --overwrite instead of --resume to start anew.")


def parameter_groups(net: Rdst, recipe: Recipe) -> list[dict[str, Any]]:
    """The dense blocks, and everything around them with its own share of the learning rate.

    The convolutions around the blocks have hundreds of inputs of one sign: steps that suit the attention move
    their output as a whole, and the image's brightness with it.
    """
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            inside = name.startswith("body.") and ".body." in name
            (inner if inside else outer).append(parameter)
    return [{"params": inner, "factor": 1.0}, {"params": outer, "factor": recipe.outer_rate}]


def linear_part(net: Rdst, low: Tensor) -> Tensor:
    """The network without its body: head, sub-pixel tail; it learns the best linear enlargement in minutes."""
    out: Tensor = net.add_mean(net.tail(net.head(net.sub_mean(low))))
    return out


def start_from_linear(net: Rdst) -> None:
    """Make the body's contribution zero at first, so that training it starts where `linear_part` ended."""
    nn.init.zeros_(net.conv_after_body.weight)
    if net.conv_after_body.bias is not None:
        nn.init.zeros_(net.conv_after_body.bias)


def grow(net: Rdst, weights: dict[str, Tensor]) -> list[str]:
    """Start a network from a smaller one's weights: what fits is taken, added blocks start as the identity.

    Returns the names of the tensors that stay as they were initialised.
    """
    own = net.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(fitting, strict=False)
    known = sum(1 for k in fitting if k.startswith("body.") and k.endswith(".conv.weight"))
    for block in list(net.body)[known:]:
        if isinstance(block, ResidualDenseSwinBlock):
            for parameter in block.conv.parameters():
                nn.init.zeros_(parameter)
    return [k for k in own if k not in fitting]


def forget_momenta(optimiser: torch.optim.Optimizer) -> None:
    """Drop what the optimiser gathered, before another part of the network is trained."""
    optimiser.state.clear()
