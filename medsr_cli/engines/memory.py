"""How much memory a run may take: what the device has free now, within the limits of the container."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

SHARE = 0.5
"""Of the free memory, what one run may plan with: others live here too, and estimates are estimates."""
_CGROUP = Path("/sys/fs/cgroup")


def usable_bytes(device: torch.device) -> int:
    """Bytes that a run on this device may plan with."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * SHARE)
    return int(min(psutil.virtual_memory().available, _container_bytes()) * SHARE)


def _container_bytes() -> float:
    """What a container's limit leaves, or infinity where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else max(int(limit) - used, 0)
