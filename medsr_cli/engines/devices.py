"""Names of devices and of arithmetic, as PyTorch has them."""

from __future__ import annotations

import warnings

import torch

from medsr_cli.errors import ArgumentsError, DeviceUnavailable


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
