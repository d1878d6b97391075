"""What an engine is: something that enlarges planes of numbers in [0, 1] by a fixed factor.

The contract, which one suite checks for every engine: `run` takes (n, channels, rows, columns) float64,
values about [0, 1], and returns (n, channels, rows', columns') with rows' and columns' as `enlarged_length`
gives them; the result does not depend on how planes were batched by more than rounding; inputs are not
changed.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.geometry import enlarged_length
from medsr_cli.volume.resample import Kernel, resize

Planes = NDArray[np.floating]


class Engine(Protocol):
    """Enlarges batches of planes."""

    name: str
    """For the report: `torch`, `numpy`."""
    device: str
    """What it really runs on, such as `cpu` or `cuda:0`."""
    precision: str
    channels: int
    """Channels of one plane; grey networks take 1."""
    scale: float

    def run(self, planes: Planes) -> Planes:
        """Enlarge a batch."""
        ...

    def batch_of(self, rows: int, columns: int) -> int:
        """How many planes of this size are best given at once."""
        ...


class Interpolation:
    """The baselines: a cubic or Lanczos kernel, any scale, in numpy."""

    name = "numpy"
    device = "cpu"
    precision = "float64"
    channels = 1

    def __init__(self, kernel: Kernel, scale: float) -> None:
        self.kernel: Kernel = kernel
        self.scale = scale

    def run(self, planes: Planes) -> Planes:
        """Enlarge by interpolation; float64 in, float64 out."""
        rows, columns = planes.shape[-2:]
        size = (enlarged_length(rows, self.scale), enlarged_length(columns, self.scale))
        return resize(planes.astype(np.float64, copy=False), size, self.kernel)

    def batch_of(self, rows: int, columns: int) -> int:
        """One at a time: there is nothing to gain."""
        return 1
