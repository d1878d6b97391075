"""The PyTorch engine: one network on one device, whole slices or tiles."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from medsr_cli.engines.engine import Enlarged, Planes, Size
from medsr_cli.engines.memory import usable_bytes
from medsr_cli.engines.tiles import TilePlan, halo_boxes, run_tiled, run_with_halo
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, RunError
from medsr_cli.networks.catalogue import Arch, Tiling
from medsr_cli.volume.antialias import antialiased_resize

WHOLE_PIXELS = {"blended": 256 * 256, "exact": 768 * 768}
"""Largest slice that is run whole unless a tile size is given: below 1 GB of activations for every network."""
TILE_OVERLAP = 32
"""Pixels that neighbouring tiles share; twice the reach of one dense block's windows."""
MINIMUM_TILE = 64
BATCH_PIXELS = {"cpu": 64 * 64, "cuda": 64 * 64 * 32, "mps": 64 * 64 * 8}
"""Pixels given at once: enough to fill the device, few enough to stay in its caches or memory."""


def find_device(wanted: str) -> torch.device:
    """The device of a name: `auto`, `cpu`, `cuda`, `cuda:N`, `gpu` or `mps`.

    Raises:
        DeviceUnavailable: it is not on this machine.
        ArgumentsError: there is no such name.
    """
    name = wanted.strip().lower()
    name = {"gpu": "cuda"}.get(name, name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"There is no device called {wanted!r}."
        raise ArgumentsError(msg, "Give auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda":
        _refuse_missing_cuda(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            msg = "There is no MPS device on this machine."
            raise DeviceUnavailable(msg, "Use --device cpu.")
    elif device.type != "cpu":
        msg = f"medsr does not run on {device.type} devices."
        raise ArgumentsError(msg, "Give auto, cpu, cuda, cuda:N or mps.")
    return device


def _refuse_missing_cuda(device: torch.device) -> None:
    # A driver that is too old is told as a warning; the sentence below says what matters.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if torch.version.cuda is None:
        msg = "CUDA was asked for, but this PyTorch was built without it."
        raise DeviceUnavailable(msg, "Install PyTorch's CUDA build, or use --device cpu.")
    if not available:
        msg = "CUDA was asked for, but no usable NVIDIA GPU or driver was found."
        raise DeviceUnavailable(msg, "Check nvidia-smi, or use --device cpu.")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        msg = f"There is no GPU number {device.index}: this machine has {count}."
        raise DeviceUnavailable(msg, "Choose another with --device cuda:N.")


def find_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The arithmetic of a name; `auto` is float32, since no checkpoint's card says yet that less is as good."""
    types = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted not in types:
        msg = f"There is no precision called {wanted!r}."
        raise ArgumentsError(msg, "Give auto, fp32, bf16 or fp16.")
    if types[wanted] is torch.float16 and device.type == "cpu":
        msg = "fp16 needs a GPU."
        raise ArgumentsError(msg, "Use fp32 or bf16 on the CPU.")
    return types[wanted]


@dataclass(frozen=True)
class Traits:
    """What an engine has to know of a network beside its weights; the catalogue's entry says it."""

    scale: int
    channels: int = 1
    tiling: Tiling = "blended"
    smallest: int = 1
    guided: bool = False
    bytes_per_pixel: int = 0

    @classmethod
    def of(cls, arch: Arch, net: nn.Module) -> Traits:
        """Those of a network of the catalogue."""
        config: Any = net.config
        return cls(
            scale=int(getattr(config, "scale", 1)),
            channels=int(getattr(config, "in_channels", 1)),
            tiling=arch.tiling,
            smallest=arch.smallest,
            guided="guide" in arch.needs,
            bytes_per_pixel=arch.bytes_per_pixel,
        )


class TorchEngine:
    """A network that enlarges by a whole factor, on one device."""

    name = "torch"

    def __init__(
        self,
        net: nn.Module,
        traits: Traits | int,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: int | None = None,
    ) -> None:
        self._device = find_device(device)
        self._dtype = find_precision(precision, self._device)
        self.net: Any = net.to(self._device, self._dtype).eval()
        self.traits = traits if isinstance(traits, Traits) else Traits(traits)
        self.channels, self.guided = self.traits.channels, self.traits.guided
        self.device = str(self._device)
        self.precision = str(self._dtype).removeprefix("torch.")
        self.warnings: list[str] = []
        if tile is not None and tile < MINIMUM_TILE:
            msg = f"A tile of {tile} pixels is too small."
            raise ArgumentsError(msg, f"Give --tile auto, or at least {MINIMUM_TILE}.")
        self.tile = tile

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.traits.scale, columns * self.traits.scale

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge (n, c, rows, columns); returns float32.

        Raises:
            RunError: the device has too little memory even for the smallest tile.
        """
        rows, columns = planes.shape[-2:]
        side = self.tile or self._affordable_side(rows, columns)
        while True:
            try:
                return Enlarged(self._run(planes, guide, side))
            except (torch.OutOfMemoryError, MemoryError) as error:
                side = min(side, max(rows, columns)) // 2 // 8 * 8
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                if side < MINIMUM_TILE or self.traits.tiling == "fixed":
                    msg = f"The device {self.device} has too little memory for a tile of {MINIMUM_TILE} pixels."
                    raise RunError(msg, "Close other programs, or use --device cpu.") from error
                self.tile = side

    def _affordable_side(self, rows: int, columns: int) -> int:
        """The side of the largest tile that fits into memory; that of the whole slice where it fits."""
        whole = max(rows, columns)
        if self.traits.tiling == "inexact":
            pixels = usable_bytes(self._device) // max(self.traits.bytes_per_pixel, 1)
        else:
            pixels = WHOLE_PIXELS.get(self.traits.tiling, rows * columns)
        if rows * columns <= pixels:
            return whole
        return max(min(math.isqrt(pixels), whole) // 8 * 8, MINIMUM_TILE)

    def _run(self, planes: Planes, guide: Planes | None, side: int) -> Planes:
        traits = self.traits
        rows, columns = planes.shape[-2:]
        if traits.tiling == "fixed":
            return self._run_fixed(planes, guide)
        if max(rows, columns) <= side:
            return self._run_whole(planes, guide)
        if traits.tiling == "exact":
            return run_with_halo(self._run_whole, planes, side, int(self.net.reach), traits.scale, guide)
        if traits.tiling == "inexact":
            self._warn(
                f"The slices of {rows} x {columns} were cut into tiles of {side}: this network takes statistics "
                "of the whole image, so the result is not that of the whole image."
            )
        plan = TilePlan(-(-side // 8) * 8, min(TILE_OVERLAP, side // 2 // 8 * 8))
        return run_tiled(self._run_whole, planes, plan, traits.scale, guide)

    def _run_fixed(self, planes: Planes, guide: Planes | None) -> Planes:
        """A network of one size: tiles of that size, and smaller slices padded to it by repetition."""
        side, scale = int(self.net.side), self.traits.scale
        rows, columns = planes.shape[-2:]
        padded = padded_to(planes, side, side)
        padded_guide = None if guide is None else padded_to(guide, side * scale, side * scale)
        plan = TilePlan(side, side // 4, 1, fixed=True)
        result = run_tiled(self._run_whole, padded, plan, scale, padded_guide)
        return result[..., : rows * scale, : columns * scale]

    def _run_whole(self, planes: Planes, guide: Planes | None = None) -> Planes:
        rows, columns = planes.shape[-2:]
        smallest, scale = self.traits.smallest, self.traits.scale
        if min(rows, columns) < smallest:
            planes = padded_to(planes, smallest, smallest)
            guide = None if guide is None else padded_to(guide, smallest * scale, smallest * scale)
        given = [self._tensor(planes)] + ([] if guide is None else [self._tensor(guide)])
        with torch.inference_mode():
            result: Planes = self.net(*given).to("cpu", torch.float32).numpy()
        return result[..., : rows * scale, : columns * scale]

    def _tensor(self, planes: Planes) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32)).to(self._device, self._dtype)

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def batch_of(self, rows: int, columns: int) -> int:
        """Planes that make up `BATCH_PIXELS` of this device."""
        return max(BATCH_PIXELS.get(self._device.type, 1) // (rows * columns), 1)

    def turned(self) -> TorchEngine:
        """Itself: its factor is that of both axes."""
        return self


class TwoStages(TorchEngine):
    """MS-GAN: the result of the first stage, at half the scale, beside that of the second; one pass for both."""

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Both results; tiles are exact for both, since every layer is a convolution."""
        result = super().run(planes, guide)
        return Enlarged(result.planes, {"intermediate": self._first})

    def _run(self, planes: Planes, guide: Planes | None, side: int) -> Planes:
        n, channels, rows, columns = planes.shape
        scale = self.traits.scale
        self._first: Planes = np.empty((n, channels, rows * scale // 2, columns * scale // 2), np.float32)
        second = np.empty((n, channels, rows * scale, columns * scale), np.float32)
        for own, seen in halo_boxes(rows, columns, side, int(self.net.reach)):
            with torch.inference_mode():
                both = self.net.stages(self._tensor(seen.of(planes)))
            for tile, whole, factor in zip(both, (self._first, second), (scale // 2, scale), strict=True):
                of_tile = own.within(seen).scaled(factor).of(tile.to("cpu", torch.float32).numpy())
                own.scaled(factor).of(whole)[...] = of_tile
        return second


class EnlargedFirst(TorchEngine):
    """The ultrasound CycleGAN's generator, which works on an image that has been enlarged by bicubic."""

    def __init__(
        self,
        net: nn.Module,
        traits: Traits,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: int | None = None,
    ) -> None:
        # Channels innermost: 1.8 times as fast on a slice of 512 x 512, one thread (measured 2026-11-21).
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in its stubs
        super().__init__(net, replace(traits, scale=1), device=device, precision=precision, tile=tile)
        self.factor = traits.scale

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns times the factor."""
        return rows * self.factor, columns * self.factor

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Bicubic to the size of the result, then the network."""
        return super().run(antialiased_resize(planes, self.size_of(planes.shape[-2], planes.shape[-1])))


def padded_to(planes: Planes, rows: int, columns: int) -> Planes:
    """At least so many rows and columns: what is missing at the bottom and right repeats the edge."""
    missing = [(0, 0)] * (planes.ndim - 2) + [
        (0, max(rows - planes.shape[-2], 0)),
        (0, max(columns - planes.shape[-1], 0)),
    ]
    return np.pad(planes, missing, mode="edge") if any(after for _, after in missing) else planes
