"""How a short training of RDST begins: as the best linear enlargement, or as a smaller network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medsr_cli.networks.rdst import Rdst, ResidualDenseSwinBlock
from medsr_cli.training.recipe import Recipe


def parameter_groups(net: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """What is trained, in groups with a factor for the learning rate; for other networks than RDST it is one group.

    RDST's dense blocks, and everything around them with its own share of the rate: the convolutions around the
    blocks have hundreds of inputs of one sign, and steps that suit the attention move their output as a whole, and
    the image's brightness with it.
    """
    if not isinstance(net, Rdst):
        return [{"params": [p for p in net.parameters() if p.requires_grad], "factor": 1.0}]
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
