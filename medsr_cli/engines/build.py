"""The engine that suits a network: the catalogue's entry says which kind of network it is."""

from __future__ import annotations

from torch import nn

from medsr_cli.engines.any_scale import AnyScaleEngine
from medsr_cli.engines.engine import Engine
from medsr_cli.engines.torch_engine import EnlargedFirst, TorchEngine, Traits, TwoStages
from medsr_cli.networks.catalogue import Arch


def engine_for(
    net: nn.Module,
    arch: Arch,
    scale: tuple[float, float],
    *,
    device: str = "auto",
    precision: str = "auto",
    tile: int | None = None,
) -> Engine:
    """An engine that runs `net`.

    Args:
        net: a network of the catalogue.
        arch: its entry.
        scale: enlargement along rows and columns; only networks of any scale take it from here.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        tile: side of a tile in pixels of the input; None tiles only what is too large.

    Raises:
        ArgumentsError: a scale, precision or tile that cannot be.
        DeviceUnavailable: the device is not there.
    """
    if arch.scale_range is not None:
        return AnyScaleEngine(net, scale, device=device, precision=precision, tile=tile)
    traits = Traits.of(arch, net)
    if arch.enlarged_first:
        return EnlargedFirst(net, traits, device=device, precision=precision, tile=tile)
    kind = TwoStages if arch.first_stage else TorchEngine
    return kind(net, traits, device=device, precision=precision, tile=tile)
