"""The engine that suits a network: the catalogue's entry says which kind of network it is."""

from __future__ import annotations

from torch import nn

from medsr_cli.engines.any_scale import AnyScaleEngine
from medsr_cli.engines.engine import Engine
from medsr_cli.engines.torch_engine import EnlargedFirst, TorchEngine, Traits, TwoStages
from medsr_cli.errors import ArgumentsError
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
    engine: TorchEngine
    if arch.scale_range is not None:
        low, high = arch.scale_range
        if not (low <= min(scale) and low < max(scale) <= high):
            msg = f"{arch.id} does not enlarge by {scale[0]:g} x {scale[1]:g}."
            raise ArgumentsError(msg, f"Give scales above {low:g} and up to {high:g}.")
        engine = AnyScaleEngine(net, scale, device=device, precision=precision, tile=tile)
    else:
        kind = EnlargedFirst if arch.enlarged_first else TwoStages if arch.first_stage else TorchEngine
        engine = kind(net, Traits.of(arch, net), device=device, precision=precision, tile=tile)
    if engine.precision not in arch.precision:
        engine.warnings.append(f"{arch.id} was only ever tried in {', '.join(arch.precision)}, not {engine.precision}.")
    return engine
