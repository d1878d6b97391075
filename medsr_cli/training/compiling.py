"""A network compiled for the steps of a training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from medsr_cli.networks.cohft import Cohft
from medsr_cli.networks.cohft_released import ReleasedCohft
from medsr_cli.networks.msgan import MsGan

METHODS: dict[type[nn.Module], str] = {MsGan: "stages", Cohft: "with_gradient", ReleasedCohft: "with_gradient"}
"""What `training.forward` calls of a network where that is not the network itself."""


def compiled(net: nn.Module) -> nn.Module:
    """The same network, sharing every weight, whose pass in training is compiled."""
    runner = copy.copy(net)
    name = METHODS.get(type(net))
    if name is None:
        runner.compile()
    else:
        setattr(runner, name, torch.compile(getattr(runner, name)))
    return runner
