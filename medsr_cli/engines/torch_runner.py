"""A network through PyTorch, on one device and in one precision."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medsr_cli.engines.build import engine_of
from medsr_cli.engines.cuda_graphs import CudaCapture, Forward, Graphs, as_tuple
from medsr_cli.engines.devices import device_settings, find_device
from medsr_cli.engines.engine import Planes
from medsr_cli.engines.memory import usable_bytes
from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.engines.precision import arithmetic, name_of
from medsr_cli.engines.runner import Place
from medsr_cli.engines.traits import Traits
from medsr_cli.networks.catalogue import Arch
from medsr_cli.networks.meta_upscale import AxisGrid, Scale, grid_of, inverse_scale
from medsr_cli.volume.geometry import enlarged_length

PINNED_BYTES = 256 * 2**20
"""Larger arrays are copied from and to ordinary memory: pinned memory is kept for the next run, and cannot be swapped
out."""


@dataclass(frozen=True)
class TorchSettings:
    """How PyTorch is to run a network, beside device and precision."""

    cost_db: Mapping[str, float] | None = None
    """What the checkpoint's card says that less than float32 costs; see `precision.arithmetic`."""
    deterministic: bool = False
    """The same bits every time: no algorithm whose result depends on timing, and batches of one size, since other
    sizes may be summed up otherwise."""
    max_bytes: int | None = None
    """Most memory of the device to use: CUDA refuses what is above, other devices plan with it."""
    graphs: bool = True
    """Whether shapes that keep coming become CUDA graphs; no matter on other devices."""


class TorchRunner:
    """A network on one device; the network given is used up.

    PyTorch's settings are those of `device_settings` during a run and while the network is set up, and as they were
    at all other times.

    Args:
        net: the network, loaded.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`; see `precision.arithmetic`.
        stages: whether the network has a result of its first stage too.
        settings: the rest.
    """

    name = "torch"
    out_of_memory: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError)

    def __init__(
        self,
        net: nn.Module,
        *,
        device: str = "auto",
        precision: str = "auto",
        stages: bool = False,
        settings: TorchSettings | None = None,
    ) -> None:
        self._device, self._settings = find_device(device), settings or TorchSettings()
        self._dtype, warnings = arithmetic(precision, self._device, self._settings.cost_db)
        self.device, self.precision = str(self._device), name_of(self._dtype)
        self.warnings: list[str] = list(warnings)
        self._largest_batch: dict[tuple[int, ...], int] = {}
        """Of each size of planes, for deterministic runs."""
        with self._at_work():
            self.net: Any = made_ready(net.to(self._device, self._dtype).eval())
            if self._device.type == "cuda" and self._dtype is not torch.float32:
                # The order that tensor cores take; shapes and values stay.
                self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's stub has no such form
        forward: Any = self.net.stages if stages else self.net
        # A MIASSR's grids are made on the CPU, which a graph cannot hold; its features are half of the work or more.
        features: Any = getattr(self.net, "features", self.net)
        if self._settings.graphs and self._device.type == "cuda":
            capture = CudaCapture(self._device)
            forward, features = Graphs(forward, capture), Graphs(features, capture)
        self._forward: Forward | Graphs = forward
        self._features: Forward | Graphs = features

    def run(self, planes: Planes, guide: Planes | None = None) -> tuple[Planes, ...]:
        """Every result of the network, the enlarged planes last."""
        count = len(planes)
        with self._at_work(), torch.inference_mode():
            given = [self._tensor(self._of_full_batch(planes))]
            if guide is not None:
                given.append(self._tensor(self._of_full_batch(guide)))
            return self._arrays(tuple(result[:count] for result in self._run(self._forward, *given)))

    def run_scaled(self, planes: Planes, scale: tuple[float, float], places: tuple[Place, Place]) -> Planes:
        """MIASSR's part of a result, on grids that it works out itself."""
        down, across, inverse = grids_of(scale, places, self.net.config.rounding)
        with self._at_work(), torch.inference_mode():
            features = self._run(self._features, self._tensor(self._of_full_batch(planes)))[0]
            enlarged = self.net.enlarge(features, inverse, down, across)
            return self._arrays((enlarged[: len(planes)],))[0]

    def usable_bytes(self) -> int:
        """Of the device's free memory, what a run may plan with."""
        usable = usable_bytes(self._device)
        if self._settings.max_bytes is None:
            return usable
        held = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0
        return min(usable, max(self._settings.max_bytes - held, 0))

    def release(self) -> None:
        """Drops CUDA graphs and empties CUDA's cache."""
        self._largest_batch.clear()  # what comes next will be smaller
        for forward in (self._forward, self._features):
            if isinstance(forward, Graphs):
                forward.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _at_work(self) -> AbstractContextManager[None]:
        settings = self._settings
        return device_settings(self._device, deterministic=settings.deterministic, max_bytes=settings.max_bytes)

    def _run(self, forward: Forward | Graphs, *given: Tensor) -> tuple[Tensor, ...]:
        results = as_tuple(forward(*given))
        if isinstance(forward, Graphs) and forward.failure is not None:
            sentence = f"CUDA graphs are not used, which is slower and nothing else: {forward.failure}"
            if sentence not in self.warnings:
                self.warnings.append(sentence)
        return results

    def _of_full_batch(self, planes: Planes) -> Planes:
        """In deterministic runs a smaller batch is filled up with its last plane; what that gives is dropped."""
        if not self._settings.deterministic:
            return planes
        size = planes.shape[1:]
        most = self._largest_batch[size] = max(self._largest_batch.get(size, 0), len(planes))
        missing = [(0, most - len(planes))] + [(0, 0)] * len(size)
        return np.pad(planes, missing, mode="edge") if len(planes) < most else planes

    def _tensor(self, planes: Planes) -> Tensor:
        if self._device.type == "cuda" and 4 * planes.size <= PINNED_BYTES:
            pinned = torch.empty(planes.shape, dtype=torch.float32, pin_memory=True)
            pinned.numpy()[...] = planes
            # The allocator of pinned memory gives it away again only when the copy is through.
            return pinned.to(self._device, non_blocking=True).to(self._dtype)
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32)).to(self._device).to(self._dtype)

    def _arrays(self, tensors: tuple[Tensor, ...]) -> tuple[Planes, ...]:
        if self._device.type != "cuda":
            return tuple(tensor.to("cpu", torch.float32).numpy() for tensor in tensors)
        singles = [tensor.float() for tensor in tensors]
        arrays = [
            torch.empty(single.shape, dtype=torch.float32, pin_memory=4 * single.numel() <= PINNED_BYTES)
            for single in singles
        ]
        for array, single in zip(arrays, singles, strict=True):
            array.copy_(single, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return tuple(array.numpy() for array in arrays)


def engine_for(
    net: nn.Module,
    arch: Arch,
    scale: tuple[float, float],
    *,
    device: str = "auto",
    precision: str = "auto",
    tile: int | None = None,
    settings: TorchSettings | None = None,
) -> NetworkEngine:
    """An engine that runs a network of the catalogue through PyTorch; the network given is used up.

    Args:
        net: the network, loaded.
        arch: its entry.
        scale: see `engine_of`.
        device: see `TorchRunner`, as for all that follow.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        tile: see `engine_of`.
        settings: the rest.

    Raises:
        ArgumentsError: a scale, precision or tile that cannot be.
        DeviceUnavailable: the device is not there.
    """
    runner = TorchRunner(net, device=device, precision=precision, stages=bool(arch.first_stage), settings=settings)
    limit_bytes = None if settings is None else settings.max_bytes
    return engine_of(runner, arch, Traits.of(arch, net), scale, tile=tile, limit_bytes=limit_bytes)


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
