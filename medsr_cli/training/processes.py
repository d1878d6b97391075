"""The processes of a training that `accelerate launch` or `torchrun` started, through accelerate.

Each process has its own device and its share of every batch. Gradients are averaged in one sum over all of them
after the backward pass, so that a step of several processes is that of one with the whole batch. Mixed precision
is not accelerate's here: it keeps one for the whole program, and a recipe has one for each stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, get_int_from_env
from torch import Tensor

from medsr_cli.errors import DeviceUnavailable

LONGEST_WAIT = timedelta(days=1)
"""While the main process validates, the others wait."""
WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Where torchrun and MPI say how many processes there are."""


def accelerator_for(device: torch.device | str | None = None) -> Accelerator:
    """The accelerator of this process: it joins the others where the process was started as one of several.

    Args:
        device: what was asked for; `cpu` keeps several processes on the CPU too. None takes what there is.

    Raises:
        DeviceUnavailable: it was started as one of several, and cannot join the others.
    """
    alone = get_int_from_env(WORLD_SIZES, 1) == 1
    # Alone, the network's own device counts; accelerate would hold on to its first choice for the whole program.
    asked = device is not None and torch.device(device).type == "cpu"
    # Without a GPU accelerate joins processes only where it is told to stay on the CPU.
    cpu = alone or asked or not torch.accelerator.is_available()
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[waiting])
    if not alone and accelerator.num_processes == 1:
        msg = "This process was started as one of several, which cannot train together on this device."
        raise DeviceUnavailable(msg, "Give --device cpu, or start one process alone.")
    return accelerator


class Processes:
    """What the processes of one training do together; alone, none of it costs anything."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.count: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        self._accelerator = accelerator

    def device(self, own: torch.device) -> torch.device:
        """Where this process trains: where the network is, or its own accelerator where there are several."""
        if self.count == 1:
            return own
        device = self._accelerator.device
        return torch.device("cpu") if device.type == "cpu" else device

    def mean(self, value: float) -> float:
        """The mean of a number over the processes, the same in each; NaN if one has NaN."""
        return float(self._sum(torch.tensor(value, dtype=torch.float64))) / self.count if self.count > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return float(self._sum(torch.tensor(float(flag)))) > 0 if self.count > 1 else flag

    def from_main(self, value: float) -> float:
        """The main process's number."""
        if self.count == 1:
            return value
        return float(self._sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over the processes, in one sum for all of them."""
        if self.count == 1:
            return
        listed = list(tensors)
        if not listed:
            return
        flat = self._sum(torch.cat([tensor.reshape(-1) for tensor in listed])) / self.count
        _scatter(flat, listed)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their means; every process has computed the same ones."""
        self.average(parameter.grad for parameter in parameters if parameter.grad is not None)

    def share_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the main process."""
        listed = list(tensors)
        if self.count > 1 and listed:
            _scatter(broadcast(torch.cat([tensor.reshape(-1) for tensor in listed])), listed)

    def _sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(tensor.to(self._accelerator.device), reduction="sum")
        return total


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
