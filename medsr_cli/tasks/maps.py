"""Maps of real numbers on an image's grid: what they are written as, and what stands for their source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medsr_cli.volume.volume import Volume


def map_volume(grid: Volume) -> Volume:
    """A map on an image's grid: float32, one channel, no units of its own."""
    return replace(
        grid,
        dtype=np.dtype(np.float32),
        channels=1,
        alpha=False,
        lowest=None,
        highest=None,
        padding=None,
        value_scale=(1.0, 0.0),
    )


@dataclass
class MapSource:
    """A grid that stands for a reader where a map has no header of its own to keep."""

    volume: Volume
    path: Path

    def slices(self) -> Iterator[Any]:
        """None: it is only written for."""
        return iter(())

    def details(self) -> dict[str, str | int | float | bool | None]:
        """None."""
        return {}
