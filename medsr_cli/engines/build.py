"""The engine that suits a network: its traits say which kind of network it is."""

from __future__ import annotations

from medsr_cli.engines.any_scale import AnyScaleEngine
from medsr_cli.engines.network_engine import EnlargedFirst, NetworkEngine
from medsr_cli.engines.runner import Runner
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError
from medsr_cli.networks.catalogue import Arch


def engine_of(
    runner: Runner,
    arch: Arch,
    traits: Traits,
    scale: tuple[float, float],
    *,
    tile: int | None = None,
    limit_bytes: int | None = None,
) -> NetworkEngine:
    """An engine around a runner.

    Args:
        runner: a network of the catalogue, ready to run.
        arch: its entry.
        traits: what tiles and batches depend on.
        scale: enlargement along rows and columns; only networks of any scale take it from here.
        tile: side of a tile in pixels of the input; None tiles only what is too large.
        limit_bytes: most memory that tiles and batches are planned with; None for what the device has.

    Raises:
        ArgumentsError: a scale or tile that cannot be.
    """
    engine: NetworkEngine
    if arch.scale_range is not None:
        low, high = arch.scale_range
        if not (low <= min(scale) and low < max(scale) <= high):
            msg = f"{arch.id} does not enlarge by {scale[0]:g} x {scale[1]:g}."
            raise ArgumentsError(msg, f"Give scales above {low:g} and up to {high:g}.")
        engine = AnyScaleEngine(runner, traits, scale, tile=tile, limit_bytes=limit_bytes)
    else:
        kind = EnlargedFirst if traits.enlarged_first else NetworkEngine
        engine = kind(runner, traits, tile=tile, limit_bytes=limit_bytes)
    return engine
