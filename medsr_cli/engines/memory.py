"""How much memory a run may take: what the device has free now, within the limits of the container.

Also what libraries raise when there is too little of it: not all of them have an exception of their own.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import psutil

SHARE = 0.5
"""Of the free memory, what one run may plan with: others live here too, and estimates are estimates."""
_CGROUP = Path("/sys/fs/cgroup")
WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "bfcarena::allocaterawinternal",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "bad allocation",
    "bad_alloc",
)
"""In the texts of PyTorch (CPU, CUDA, oneDNN), ONNX Runtime and the C++ library for memory that is not there."""


def usable_bytes(device: object) -> int:
    """Bytes that a run may plan with.

    Args:
        device: a `torch.device`, or its name, such as `cpu` or `cuda:0`.
    """
    if str(device).startswith("cuda"):
        # By name: nobody else here needs PyTorch, and ONNX Runtime runs without it.
        torch: Any = importlib.import_module("torch")
        free, _ = torch.cuda.mem_get_info(torch.device(str(device)))
        # What this process has kept for the next run and does not use is free to it.
        kept = torch.cuda.memory_reserved(str(device)) - torch.cuda.memory_allocated(str(device))
        return int((free + kept) * SHARE)
    return int(min(psutil.virtual_memory().available, _container_bytes()) * SHARE)


def is_out_of_memory(error: BaseException, kinds: tuple[type[BaseException], ...] = ()) -> bool:
    """Whether an exception says that memory was short.

    Args:
        error: any exception.
        kinds: what a library raises for that and nothing else.
    """
    if isinstance(error, (MemoryError, *kinds)):
        return True
    text = str(error).lower()
    return isinstance(error, Exception) and any(words in text for words in WORDS)


def _container_bytes() -> float:
    """What a container's limit leaves, or infinity where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(int(limit) - used, 0)
