"""A network through PyTorch, on one device and in one precision."""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from medsr_cli.engines.build import engine_of
from medsr_cli.engines.devices import find_device, find_precision
from medsr_cli.engines.engine import Planes
from medsr_cli.engines.memory import usable_bytes
from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.engines.runner import Place
from medsr_cli.engines.traits import Traits
from medsr_cli.networks.catalogue import Arch
from medsr_cli.networks.miassr import AxisGrid, Scale, grid_of, inverse_scale
from medsr_cli.volume.geometry import enlarged_length


class TorchRunner:
    """A network on one device; the network given is used up."""

    name = "torch"
    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError)

    def __init__(self, net: nn.Module, *, device: str = "auto", precision: str = "auto", stages: bool = False) -> None:
        self._device = find_device(device)
        self._dtype = find_precision(precision, self._device)
        self.device = str(self._device)
        self.precision = str(self._dtype).removeprefix("torch.")
        self.warnings: list[str] = []
        self._stages = stages
        """Whether the network has a result of its first stage too."""
        self.net: Any = made_ready(net.to(self._device, self._dtype).eval())

    def run(self, planes: Planes, guide: Planes | None = None) -> tuple[Planes, ...]:
        """Every result of the network, the enlarged planes last."""
        given = [self._tensor(planes)] + ([] if guide is None else [self._tensor(guide)])
        with torch.inference_mode():
            results = self.net.stages(*given) if self._stages else self.net(*given)
        return tuple(map(_array, results)) if isinstance(results, tuple) else (_array(results),)

    def run_scaled(self, planes: Planes, scale: tuple[float, float], places: tuple[Place, Place]) -> Planes:
        """MIASSR's part of a result, on grids that it works out itself."""
        down, across, inverse = grids_of(scale, places, self.net.config.rounding)
        with torch.inference_mode():
            features = self.net.features(self._tensor(planes))
            return _array(self.net.enlarge(features, inverse, down, across))

    def usable_bytes(self) -> int:
        """Of the device's free memory, what a run may plan with."""
        return usable_bytes(self._device)

    def release(self) -> None:
        """Empties CUDA's cache."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tensor(self, planes: Planes) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32)).to(self._device, self._dtype)


def engine_for(
    net: nn.Module,
    arch: Arch,
    scale: tuple[float, float],
    *,
    device: str = "auto",
    precision: str = "auto",
    tile: int | None = None,
) -> NetworkEngine:
    """An engine that runs a network of the catalogue through PyTorch; the network given is used up.

    Args:
        net: the network, loaded.
        arch: its entry.
        scale: see `engine_of`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        tile: see `engine_of`.

    Raises:
        ArgumentsError: a scale, precision or tile that cannot be.
        DeviceUnavailable: the device is not there.
    """
    runner = TorchRunner(net, device=device, precision=precision, stages=bool(arch.first_stage))
    return engine_of(runner, arch, Traits.of(arch, net), scale, tile=tile)


def made_ready(net: nn.Module) -> nn.Module:
    """The network as its module prepares it for inference; itself where there is nothing to prepare."""
    module = importlib.import_module(type(net).__module__)
    ready: nn.Module = getattr(module, "made_ready", lambda net: net)(net)
    return ready


def grids_of(
    scale: tuple[float, float], places: tuple[Place, Place], rounding: str
) -> tuple[AxisGrid, AxisGrid, float]:
    """Where the wanted rows and columns of the result look in the tile, and the 1/s that the network is told.

    With exact rounding an axis of N pixels has the ratio N'/N of its own, so that edges align.
    """
    steps: tuple[Scale, Scale] = scale
    if rounding == "exact":
        steps = (_ratio(places[0].length, scale[0]), _ratio(places[1].length, scale[1]))
    down, across = (
        grid_of(place.length, step, rounding).sliced(place.start, place.start + place.count).shifted(-place.first)
        for place, step in zip(places, steps, strict=True)
    )
    return down, across, inverse_scale(*steps)


def _ratio(length: int, scale: float) -> Fraction:
    return Fraction(enlarged_length(length, scale), length)


def _array(tensor: torch.Tensor) -> Planes:
    array: Planes = tensor.to("cpu", torch.float32).numpy()
    return array
