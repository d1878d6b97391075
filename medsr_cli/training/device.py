"""Where a network is trained."""

from __future__ import annotations

import torch

from medsr_cli.errors import ArgumentsError, DeviceUnavailable


def pick_device(name: str) -> torch.device:
    """The device of `auto`, `cpu`, `cuda`, `cuda:N`, `gpu` or `mps`; `auto` is the best one there is.

    Raises:
        ArgumentsError: no such kind of device.
        DeviceUnavailable: it is not on this machine.
    """
    wanted = name.strip().lower()
    kind, _, index = ("cuda" if wanted == "gpu" else wanted).partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        msg = f"There is no device {name!r}."
        raise ArgumentsError(msg, "Give auto, cpu, cuda, cuda:N or mps.")
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if kind == "auto":
        return torch.device("cuda" if n_cuda else "mps" if has_mps else "cpu")
    if kind == "cuda" and int(index or 0) >= n_cuda:
        msg = f"{name} was asked for, but PyTorch finds {n_cuda or 'no'} CUDA device{'s' * (n_cuda > 1)} here."
        raise DeviceUnavailable(msg, "Give --device auto or cpu, or install the driver and a CUDA build of PyTorch.")
    if kind == "mps" and not has_mps:
        msg = "mps was asked for, but this is no Mac with Metal."
        raise DeviceUnavailable(msg, "Give --device auto or cpu.")
    return torch.device(kind, int(index)) if index else torch.device(kind)
