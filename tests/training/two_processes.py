"""What each process of a launch does in test_processes: small trainings, whose outcome it writes beside the state."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from medsr_cli.errors import ArgumentsError
from medsr_cli.training.processes import accelerator_for
from tests.training.small_runs import MIASSR, PLAIN, Quiet, score, trainer

RDST = replace(PLAIN, batch=4, iterations=2, validate_every=1, average=0.9)
WITH_CRITIC = replace(MIASSR.stages[1], batch=4, iterations=2, validate_every=1)
LONG = replace(PLAIN, iterations=1000, validate_every=1000)


def first_gradients(run):
    """Makes the run remember the gradients of its first step."""
    seen: dict[str, torch.Tensor] = {}
    step = run.scaler.step

    def watched(optimiser):
        for name, parameter in run.net.named_parameters():
            if parameter.grad is not None and name not in seen:
                seen[name] = parameter.grad.clone()
        step(optimiser)

    run.scaler.step = watched
    return seen


def equal_steps(folder, accelerator, name, recipe):
    validated = []

    def counted(net):
        validated.append(1)
        return score(recipe, net)

    run = trainer(folder / f"{name}.pt", recipe, counted, accelerator)
    gradients, watcher = first_gradients(run), Quiet()
    run.run(watcher)
    return {
        "weights": run.net.state_dict(),
        "averaged": run.averaged.state_dict(),
        "critic": run.critic.net.state_dict() if run.critic else {},
        "gradients": gradients,
        "losses": watcher.losses,
        "validated": len(validated),
        "history": run.state.history,
        "is_main": run.is_main,
        "kept": len(run.state.best_weights),
    }


def stopped_by_a_signal(folder, accelerator):
    """Only the last process gets it, after its second step."""
    run = trainer(folder / "signal.pt", LONG, lambda net: score(LONG, net), accelerator)
    step = run._step

    def signalled(within, batches):
        loss = step(within, batches)
        if within == 1 and not run.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    run._step = signalled
    try:
        run.run(Quiet())
    except KeyboardInterrupt:
        return run.state.step
    return -1


def stopped_by_the_time(folder, accelerator):
    """Only the last process has a limit."""
    run = trainer(folder / "time.pt", LONG, lambda net: score(LONG, net), accelerator)
    return run.run(Quiet(), 0.0 if accelerator.process_index else float("inf")).step


def resumed(folder, accelerator):
    run = trainer(folder / "signal.pt", LONG, lambda net: score(LONG, net), accelerator)
    run.resume()
    return run.state.step


def refused(folder, accelerator):
    try:
        trainer(folder / "odd.pt", replace(PLAIN, batch=3), None, accelerator)
    except ArgumentsError as error:
        return error.sentence
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = accelerator_for()  # without a GPU: the test hides them
    found = {
        "rdst": equal_steps(folder, accelerator, "rdst", RDST),
        "critic": equal_steps(folder, accelerator, "critic", WITH_CRITIC),
    }
    if accelerator.num_processes > 1:
        found["signal"] = stopped_by_a_signal(folder, accelerator)
        found["time"] = stopped_by_the_time(folder, accelerator)
        found["resumed"] = resumed(folder, accelerator)
        found["refused"] = refused(folder, accelerator)
    torch.save(found, folder / f"rank{accelerator.process_index}.of{accelerator.num_processes}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
