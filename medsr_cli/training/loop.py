"""The training loop of every method: steps, validations, stages, and a state from which it goes on exactly.

A recipe's stages follow one another: the weights go on, optimisers and schedules begin anew. Every batch is a
function of the seed and the step, so that a run that was stopped and resumed computes what an uninterrupted one
would have, bit for bit on one CPU with the same number of threads: PyTorch's CPU kernels for these networks add in
one order. `torch.use_deterministic_algorithms` is left off, since it would change nothing there and costs time
(it fills every new tensor); on a GPU two runs agree only about as well as its kernels do.

Several processes (see `processes`) share each batch. Only the main one validates, saves and tells its watcher.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.networks.rdst import Rdst
from medsr_cli.training.batch import Batch, Outputs
from medsr_cli.training.compiling import compiled
from medsr_cli.training.critic import CriticTrainer, draws_per_step, has_critic
from medsr_cli.training.forward import forward
from medsr_cli.training.interruption import Clock, Stopped, StopSwitch
from medsr_cli.training.losses import build_terms
from medsr_cli.training.prefetch import Prefetcher
from medsr_cli.training.processes import Processes, accelerator_for
from medsr_cli.training.rdst_start import forget_momenta, linear_part, parameter_groups
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.state import TrainingState, not_a_state, read_state, state_of, write_state
from medsr_cli.training.validation import Score, mean_gain

SAVE_EVERY_SECONDS = 300.0
"""Longest time between two states on the disk: what a power cut can cost."""
WORTH_COMPILING = 2000
"""Steps from which on compiling the network for a GPU, a minute or two, pays."""
ARITHMETIC = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Sampler(Protocol):
    """Makes the batches."""

    def batch(self, step: int, /) -> Batch:
        """This process's share of a batch: a function of the recipe's seed, the step and the process alone."""


class Watcher(Protocol):
    """Is told how the training goes, in the main process."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step is done; `loss` is the weighted sum of its terms, the mean over the processes."""

    def validated(self, done: int, scores: Sequence[Score], best: bool) -> None:
        """A validation is done; `best` says that its weights are now the ones kept."""


class Trainer:
    """Trains one network by one recipe; `run` can be called again after it stopped.

    Args:
        net: the network; alone, a process trains it where it is, one of several moves it to its own device.
        recipe: every number of the training.
        make_sampler: the batches of a stage; they are numbered on over all stages.
        score: validates a network; called before the first step, every `validate_every` and after each stage.
        state_path: where the state is saved, again and again.
        networks: what the losses need, by role, see `losses.needed_networks`.
        accelerator: of `processes.accelerator_for`; None makes one.

    Raises:
        ArgumentsError: the recipe does not suit the network or the number of processes, or names no known loss.
        WeightsError: a network that a loss of any stage needs is not given.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        make_sampler: Callable[[Recipe], Sampler],
        score: Callable[[nn.Module], Sequence[Score]],
        state_path: Path,
        *,
        networks: Mapping[str, nn.Module] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        own = next(net.parameters()).device
        self.processes = Processes(accelerator or accelerator_for(own))
        self.device = self.processes.device(own)
        self.net, self.recipe, self.stages = net.to(self.device), recipe, recipe.stages
        self.make_sampler, self.score, self.state_path = make_sampler, score, state_path
        self.networks = dict(networks or {})
        self.state = TrainingState()
        self.averaged: nn.Module = self.net
        self._runner: nn.Module = self.net
        self.critic: CriticTrainer | None = None
        self._saved_step = -1
        for stage in self.stages:
            self._refuse_unsuitable(stage)
        self._begin_stage(0)

    @property
    def is_main(self) -> bool:
        """Whether this process validates, saves and tells."""
        return self.processes.is_main

    @property
    def stage(self) -> Recipe:
        """The recipe of the stage that the optimisers belong to."""
        return self.stages[self.state.stage]

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or validations have not improved for `patience` times."""
        return self.state.step >= self.recipe.total or self.state.ended_early

    def run(self, watcher: Watcher, until_seconds: float = float("inf")) -> TrainingState:
        """Train to the recipe's last step, or until so many seconds have passed since the first start.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came, in any process; the step was finished and the state saved.
            RunError: the loss is not a number, or the state could not be saved; the last one saved is whole.
        """
        clock = Clock(self.state.seconds, until_seconds)
        self._share_weights()
        self.net.train()
        with StopSwitch() as switch:
            # A stop inside a validation leaves nothing half-done: it is saved, and done anew on resuming.
            with contextlib.suppress(Stopped):
                self._run_steps(watcher, switch, clock)
            self.state.seconds = clock.seconds
            if self._saved_step != self.state.step:
                self.save()
            if self.processes.any(switch.pressed):
                raise KeyboardInterrupt
        return self.state

    # -- steps ---------------------------------------------------------------------------------------------

    def _run_steps(self, watcher: Watcher, switch: StopSwitch, clock: Clock) -> None:
        state, total = self.state, self.recipe.total
        with contextlib.ExitStack() as feed:
            batches: Prefetcher[Batch] | None = None
            while self._goes_on(watcher, switch, clock):
                index, stage, within = self.recipe.stage_at(state.step)
                if batches is None or index != state.stage:
                    feed.close()
                    if index != state.stage:
                        self._begin_stage(index)
                    self._compile_if_worth_it(within)
                    first, end = self._draw(within), self._draw(stage.iterations)
                    batches = feed.enter_context(Prefetcher(self.sampler.batch, first, end))
                loss = self._step(within, batches)
                state.step += 1
                if self.is_main:
                    watcher.step(state.step, total, loss)

    def _goes_on(self, watcher: Watcher, switch: StopSwitch, clock: Clock) -> bool:
        """What is due between two steps, and whether there is another one; the same in every process."""
        due = self._validation_is_due()
        if due:
            self._judge(self._validate(switch), watcher)
            self.state.ended_early = self._patience_is_over()
        if due or clock.since_save > SAVE_EVERY_SECONDS:
            self.state.seconds = clock.seconds
            self.save()
            clock.saved()
        if self.finished:
            return False
        return not self.processes.any(switch.pressed or clock.is_over)

    def _draw(self, within: int) -> int:
        """Number of the first batch of a step of this stage; stages go on counting, and so does the critic."""
        before = sum(stage.iterations * draws_per_step(stage) for stage in self.stages[: self.state.stage])
        return before + within * draws_per_step(self.stage)

    def _step(self, within: int, batches: Prefetcher[Batch]) -> float:
        """One step of the network, after those of the critic; returns the loss."""
        stage = self.stage
        for group in self.optimiser.param_groups:
            group["lr"] = stage.learning_rate_at(within) * group["factor"]
        draw = self._draw(within)
        for extra in range(draws_per_step(stage) - 1):
            batch = batches.get(draw + extra).to(self.device)
            with torch.no_grad():
                outputs = self._enlarge(batch, within)
            self._teach_critic(outputs, batch, draw + extra, within)
        draw += draws_per_step(stage) - 1
        batch = batches.get(draw).to(self.device)
        self.optimiser.zero_grad(set_to_none=True)
        outputs = self._enlarge(batch, within)
        self._teach_critic(outputs, batch, draw, within)
        loss = self._loss(outputs, batch)
        value = self.processes.mean(float(loss.detach()))
        self._refuse_no_number(value)
        if value < stage.skip_loss:
            self._descend(loss)
            self._average()
        if within + 1 == stage.linear_steps:
            forget_momenta(self.optimiser)
        return value

    def _enlarge(self, batch: Batch, within: int) -> Outputs:
        """The network's outputs in single precision: compiled where that works, in the recipe's arithmetic."""
        if within < self.stage.linear_steps:
            assert isinstance(self.net, Rdst)  # noqa: S101 - refused before otherwise
            return Outputs(linear_part(self.net, batch.low))
        precision = ARITHMETIC.get(self.stage.precision)
        with torch.autocast(self.device.type, precision) if precision else contextlib.nullcontext():
            try:
                outputs = forward(self._runner, batch)
            except Exception:
                if self._runner is self.net:
                    raise
                # The compiler needs a C compiler and a recent GPU; without them the plain network does.
                self._runner = self.net
                outputs = forward(self._runner, batch)
        return Outputs(outputs.image.float(), {name: value.float() for name, value in outputs.extras.items()})

    def _teach_critic(self, outputs: Outputs, batch: Batch, draw: int, within: int) -> None:
        if self.critic is not None:
            self._refuse_no_number(
                self.critic.step(outputs.image, batch.high, draw, self.stage.rate_factor_at(within)), "critic's"
            )

    def _loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        parts = [term.weight * term(outputs, batch) for term in self.terms]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def _descend(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # PyTorch does not say
        self.processes.average_gradients(self.net.parameters())
        self.scaler.unscale_(self.optimiser)
        if self.stage.clip_norm:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.stage.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        # Batch norms have seen other images in each process.
        self.processes.average(buffer for buffer in self.net.buffers() if buffer.is_floating_point())

    def _average(self) -> None:
        if self.averaged is self.net:
            return
        first = self.state.stage
        while first and self.stages[first - 1].average:
            first -= 1
        averaged = self.state.step - self._start_of(first)
        # Early on, the average is over the steps there were, not over a horizon longer than the run.
        decay = min(self.stage.average, (averaged + 1) / (averaged + 10))
        with torch.no_grad():
            torch._foreach_lerp_(_moving(self.averaged), _moving(self.net), 1 - decay)

    def _refuse_no_number(self, value: float, whose: str = "training") -> None:
        if math.isnan(value) or value == -math.inf:
            msg = f"The {whose} loss is not a number at step {self.state.step + 1}."
            raise RunError(msg, "Lower the learning rate.")

    # -- stages --------------------------------------------------------------------------------------------

    def _begin_stage(self, index: int) -> None:
        """New optimisers and schedule; the weights, averaged ones and the critic's go on."""
        self.state.stage = index
        stage = self.stage
        self.sampler = self.make_sampler(stage)
        groups = parameter_groups(self.net, stage)
        self.optimiser = torch.optim.Adam(groups, stage.learning_rate, stage.betas, weight_decay=stage.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=stage.precision == "fp16")
        self._runner = self.net
        self.critic = self._critic_of(stage)
        critics = {} if self.critic is None else {"critic": self.critic.net}
        self.terms = build_terms(stage, {**self.networks, **critics}, self.device)
        if not stage.average:
            self.averaged = self.net
        elif self.averaged is self.net:
            self.averaged = copy.deepcopy(self.net).eval()

    def _critic_of(self, stage: Recipe) -> CriticTrainer | None:
        if not has_critic(stage):
            return None
        high = self.sampler.batch(self._draw(0)).high
        side = stage.high_patch or max(high.shape[-2:])
        if self.critic is not None and self.critic.takes(high.shape[1], side):
            self.critic.begin(stage)
            return self.critic
        return CriticTrainer(stage, high.shape[1], side, self.device, self.processes)

    def _refuse_unsuitable(self, stage: Recipe) -> None:
        if stage.batch % self.processes.count:
            msg = f"A batch of {stage.batch} images cannot be shared among {self.processes.count} processes."
            raise ArgumentsError(msg, f"Give a --batch that is a multiple of {self.processes.count}.")
        if stage.linear_steps and not isinstance(self.net, Rdst):
            msg = f"linear_steps is for rdst, not for {type(self.net).__name__}."
            raise ArgumentsError(msg)
        # Before hours are spent: what is missing for a later stage is missing now.
        build_terms(stage, {"critic": nn.Identity(), **self.networks}, self.device)

    def _compile_if_worth_it(self, within: int) -> None:
        """Only where every batch has one size; the compiler would begin anew for each."""
        one_size = not self.stage.scales and self.stage.region != "slice"
        steps = self.stage.iterations - max(within, self.stage.linear_steps)
        if self.device.type == "cuda" and one_size and steps >= WORTH_COMPILING:
            self._runner = compiled(self.net)

    def _share_weights(self) -> None:
        """The main process's weights for all, whatever the others began with."""
        nets = [self.net, self.averaged, *([self.critic.net] if self.critic else [])]
        self.processes.share_main(t for net in nets for t in net.state_dict().values() if t.is_floating_point())

    # -- validation ----------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        """Whether this step is one after which to validate, and that was not done yet."""
        state = self.state
        if state.history and state.history[-1]["step"] == state.step:
            return False
        within = state.step - self._stage_start
        ends = within == self.stage.iterations
        return not state.history or ends or within % self.stage.validate_every == 0

    @property
    def _stage_start(self) -> int:
        return self._start_of(self.state.stage)

    def _start_of(self, index: int) -> int:
        return sum(stage.iterations for stage in self.stages[:index])

    def _validate(self, switch: StopSwitch | None = None) -> Sequence[Score]:
        """Scores of the weights that would be kept, in the main process; in the others none.

        Raises:
            Stopped: in every process, where a signal came while it went on.
        """
        scores: Sequence[Score] = ()
        stopped = False
        if self.is_main:
            try:
                with switch.at_once() if switch is not None else contextlib.nullcontext():
                    scores = self.score(self.averaged)
            except Stopped:
                stopped = True
        if self.processes.any(stopped):
            raise Stopped
        return scores

    def validate_now(self, watcher: Watcher) -> None:
        """Validate the weights as they are, between the steps at which a run does; this is not saved.

        So a run that is resumed knows nothing of it, and keeps what an uninterrupted one would have kept. Where
        there are several processes, all of them call it.
        """
        if not self.state.history or self.state.history[-1]["step"] != self.state.step:
            self._judge(self._validate(), watcher)

    def _judge(self, scores: Sequence[Score], watcher: Watcher) -> None:
        state = self.state
        gain = self.processes.from_main(mean_gain(scores) if self.is_main else 0.0)
        best = gain > state.best_gain_db or (self.stage.judge == "last" and gain > 0)
        if best:
            state.best_gain_db, state.best_step = gain, state.step
            if self.is_main:
                state.best_weights = _on_cpu(self.averaged.state_dict())
        state.history.append({"step": state.step, "stage": state.stage, "gain_db": gain})
        if self.is_main:
            watcher.validated(state.step, scores, best)

    def _patience_is_over(self) -> bool:
        since = max(self.state.best_step, self._stage_start)
        waited = sum(entry["step"] > since for entry in self.state.history)
        return 0 < self.stage.patience <= waited

    # -- state ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state beside the result, in the main process; the file before it stays until this one is whole.

        Raises:
            RunError: it could not be written, or weights are no longer numbers and the last state is the better one.
        """
        if self.is_main:
            self._refuse_broken_weights()
            parts: dict[str, Any] = {
                "recipe": self.recipe.to_json(),
                "stage_start": self._stage_start,
                "weights": _on_cpu(self.net.state_dict()),
                "averaged": None if self.averaged is self.net else _on_cpu(self.averaged.state_dict()),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "critic": None if self.critic is None else self.critic.state_dict(),
            }
            write_state(self.state_path, self.state, parts)
        self._saved_step = self.state.step

    def _refuse_broken_weights(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.net.parameters()):
            msg = f"After step {self.state.step} a weight is not a number."
            raise RunError(msg, "Lower the learning rate; the last state saved is kept.")

    def resume(self) -> None:
        """Go on from the saved state; where there are several processes, all of them call it.

        Raises:
            WeightsError: there is none, or it belongs to another network or version.
            ArgumentsError: a stage that is over has another length in this recipe.
        """
        record = read_state(self.state_path)
        try:
            self.state = state_of(record)
            self._begin_stage(self.state.stage)
            self._refuse_other_lengths(record["stage_start"])
            self.net.load_state_dict(record["weights"])
            if self.averaged is not self.net:
                self.averaged.load_state_dict(record["averaged"])
            self.optimiser.load_state_dict(record["optimiser"])
            self.scaler.load_state_dict(record["scaler"])
            if self.critic is not None:
                self.critic.load_state_dict(record["critic"])
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise not_a_state(self.state_path) from error

    def _refuse_other_lengths(self, stage_start: int) -> None:
        index, _, within = self.recipe.stage_at(self.state.step)
        next_begins = index == self.state.stage + 1 and within == 0
        if stage_start != self._stage_start or not (index == self.state.stage or next_begins):
            msg = f"The run to go on with is at step {self.state.step}, in its stage {self.state.stage + 1}."
            raise ArgumentsError(msg, "A stage that is over keeps its number of iterations.")


def _moving(net: nn.Module) -> list[Tensor]:
    """What a moving average is of: trained weights, and the statistics of batch norms."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [*trained, *(buffer for buffer in net.buffers() if buffer.is_floating_point())]


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in weights.items()}
