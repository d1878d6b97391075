"""What a network costs: parameters and multiply-accumulates, counted on a network without memory."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from medsr_cli.networks.catalogue import Arch


SAMPLE = 20
"""Side of the slice that a network of any scale is counted on: two periods of every scale of one decimal."""


@dataclass(frozen=True)
class Cost:
    """Of one run on one slice."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions, linear layers and attention; FLOPs are twice as many."""
    rows: int
    """Of the slice that was counted; networks of one fixed size are counted at that."""
    columns: int


def cost_of(arch: Arch, variant: str | None, scale: float, rows: int, columns: int) -> Cost:
    """Count a variant of a method at a scale, for a slice of rows x columns.

    Args:
        arch: a method with a network.
        variant: one of its variants; None takes the configuration's defaults.
        scale: enlargement; for networks of any scale this is given to the run, for others to the network.
        rows: of the input.
        columns: of the input.

    Raises:
        ValueError: the network cannot have this scale or size.
    """
    module = importlib.import_module(arch.module)
    fields: dict[str, Any] = dict(arch.variants.get(variant or "", {}))
    config_class = getattr(module, arch.config)
    if "scale" in config_class.__dataclass_fields__ and arch.scale_range is None:
        fields["scale"] = int(scale)
    if "side" in config_class.__dataclass_fields__:
        fields["side"] = module.SIDES[int(scale)]
        rows = columns = fields["side"]
    # Grids of any scale are worked out from values: a small slice is really run, and counted by its pixels.
    sample = (rows, columns) if arch.scale_range is None else (SAMPLE, SAMPLE)
    with torch.device("meta" if arch.scale_range is None else "cpu"):
        network = getattr(module, arch.network)(config_class(**fields)).eval()
        inputs = _inputs(arch, network.config, scale, *sample)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    share = rows * columns / (sample[0] * sample[1])
    return Cost(parameters, round(counter.get_total_flops() / 2 * share), rows, columns)


def _inputs(arch: Arch, config: Any, scale: float, rows: int, columns: int) -> tuple[Any, ...]:
    channels = getattr(config, "in_channels", 1)
    if arch.enlarged_first:
        return (torch.empty(1, channels, round(rows * scale), round(columns * scale)),)
    image = torch.empty(1, channels, rows, columns)
    if "guide" in arch.needs:
        return image, torch.empty(1, channels, int(rows * scale), int(columns * scale))
    return (image, scale) if arch.scale_range is not None else (image,)
