"""The PyTorch engine: one network on one device, whole slices or tiles."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import nn

from medsr_cli.engines.engine import Planes
from medsr_cli.engines.tiles import TilePlan, run_tiled
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, RunError

WHOLE_PIXELS = 256 * 256
"""Largest slice that is run whole unless a tile size is given: about 0.8 GB of activations for RDST."""
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


class TorchEngine:
    """A network that enlarges by a whole factor, on one device."""

    name = "torch"

    def __init__(
        self,
        net: nn.Module,
        scale: int,
        channels: int = 1,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: int | None = None,
    ) -> None:
        self._device = find_device(device)
        self._dtype = find_precision(precision, self._device)
        self.net = net.to(self._device, self._dtype).eval()
        self.scale: float = scale
        self.channels = channels
        self.device = str(self._device)
        self.precision = str(self._dtype).removeprefix("torch.")
        if tile is not None and tile < MINIMUM_TILE:
            msg = f"A tile of {tile} pixels is too small."
            raise ArgumentsError(msg, f"Give --tile auto, or at least {MINIMUM_TILE}.")
        self.tile = tile

    def run(self, planes: Planes) -> Planes:
        """Enlarge (n, c, rows, columns); returns float32.

        Raises:
            RunError: the device has too little memory even for the smallest tile.
        """
        rows, columns = planes.shape[-2:]
        whole = self.tile is None and rows * columns <= WHOLE_PIXELS
        side = max(rows, columns) if whole else (self.tile or MINIMUM_TILE * 4)
        while True:
            try:
                return self._run(planes, side)
            except (torch.OutOfMemoryError, MemoryError) as error:
                side = side // 2 // 8 * 8
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                if side < MINIMUM_TILE:
                    msg = f"The device {self.device} has too little memory for a tile of {MINIMUM_TILE} pixels."
                    raise RunError(msg, "Close other programs, or use --device cpu.") from error
                self.tile = side

    def _run(self, planes: Planes, side: int) -> Planes:
        plan = TilePlan(-(-side // 8) * 8, min(TILE_OVERLAP, side // 2 // 8 * 8))
        if plan.covers(*planes.shape[-2:]):
            return self._run_whole(planes)
        return run_tiled(self._run_whole, planes, plan, int(self.scale))

    def _run_whole(self, planes: Planes) -> Planes:
        given = torch.from_numpy(np.ascontiguousarray(planes, np.float32))
        with torch.inference_mode():
            enlarged = self.net(given.to(self._device, self._dtype))
            result: Planes = enlarged.to("cpu", torch.float32).numpy()
        return result

    def batch_of(self, rows: int, columns: int) -> int:
        """Planes that make up `BATCH_PIXELS` of this device."""
        return max(BATCH_PIXELS.get(self._device.type, 1) // (rows * columns), 1)
