"""Names of devices as PyTorch has them, and its settings while one of them works."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from medsr_cli.errors import ArgumentsError, DeviceUnavailable

CUBLAS_CONFIG = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS gives the same bits every time; the first is the faster one."""


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


@contextlib.contextmanager
def device_settings(
    device: torch.device, *, deterministic: bool = False, max_bytes: int | None = None
) -> Iterator[None]:
    """PyTorch's process-wide settings as a run wants them, restored after it.

    TF32 stays off, in matrix products and in convolutions (where PyTorch has it on): float32 means float32.
    cuDNN tries its algorithms on every new shape and keeps the fastest, since shapes repeat. Deterministic: no such
    trials, only algorithms that give the same bits every time, and an error where there is none.

    Other threads that use PyTorch in the meantime see these settings, too.

    Args:
        device: what runs in the block.
        deterministic: the same bits every time, on the same device with the same batches.
        max_bytes: most memory of a CUDA device that this process may hold; other devices have no such limit.
    """
    with contextlib.ExitStack() as stack:
        if deterministic:
            stack.enter_context(_deterministic_algorithms())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
            stack.enter_context(_replaced(products, fp32_precision="ieee"))
            stack.enter_context(_replaced(convolutions, fp32_precision="ieee"))
            stack.enter_context(
                _replaced(torch.backends.cudnn, benchmark=not deterministic, deterministic=deterministic)
            )
            if max_bytes is not None:
                stack.enter_context(_limited_memory(device, max_bytes))
        yield


@contextlib.contextmanager
def _replaced(place: Any, **values: Any) -> Iterator[None]:
    """Attributes that have other values within a block."""
    before = {name: getattr(place, name) for name in values}
    changed = {name: value for name, value in values.items() if before[name] != value}
    for name, value in changed.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name in changed:
            setattr(place, name, before[name])


@contextlib.contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    config = os.environ.get(CUBLAS_CONFIG)
    torch.use_deterministic_algorithms(True)
    # cuBLAS reads it when its first handle is made, and PyTorch refuses matrix products without it.
    os.environ[CUBLAS_CONFIG] = config if config in DETERMINISTIC_CUBLAS else DETERMINISTIC_CUBLAS[0]
    try:
        # With it on, PyTorch would fill all new memory with NaN, which only finds errors.
        with _replaced(torch.utils.deterministic, fill_uninitialized_memory=False):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if config is None:
            del os.environ[CUBLAS_CONFIG]
        else:
            os.environ[CUBLAS_CONFIG] = config


@contextlib.contextmanager
def _limited_memory(device: torch.device, max_bytes: int) -> Iterator[None]:
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(max_bytes / total, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
