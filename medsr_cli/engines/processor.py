"""The processor, as far as this process may use it."""

from __future__ import annotations

import os


def cores() -> int:
    """Of the CPU, those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
