"""What an engine is: something that enlarges planes of numbers in [0, 1].

The contract, which one suite checks for every engine: `run` takes (n, channels, rows, columns) float64,
values about [0, 1], and returns planes of the size that `size_of` gives; the result does not depend on how
planes were batched by more than rounding; inputs are not changed. A guided engine also takes (n, 1, rows',
columns') of a second image on the grid of the result.

Engines are put into one another: one that adapts colours, repeats a run in eight orientations or compares the
result with the input again is an engine itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli.volume.geometry import enlarged_length
from medsr_cli.volume.resample import Kernel, resize

Planes = NDArray[np.floating]
Size = tuple[int, int]


@dataclass(frozen=True)
class Enlarged:
    """What an engine returns: the result, and what else it made on the way."""

    planes: Planes
    extras: Mapping[str, Planes] = field(default_factory=dict)
    """`spread`: deviation of an ensemble, on the result's grid; `intermediate`: a result at a smaller scale."""


class Engine(Protocol):
    """Enlarges batches of planes."""

    name: str
    """For the report: `torch`, `numpy`."""
    device: str
    """What it really runs on, such as `cpu` or `cuda:0`."""
    precision: str
    channels: int
    """Channels of one plane; 0 takes any number."""
    guided: bool
    """Whether it needs a second image."""
    warnings: list[str]
    """What a user must know about how it ran, such as tiles that change the result."""

    def size_of(self, rows: int, columns: int) -> Size:
        """Rows and columns of the result for a plane of this size."""
        ...

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge a batch."""
        ...

    def batch_of(self, rows: int, columns: int) -> int:
        """How many planes of this size are best given at once."""
        ...

    def turned(self) -> Engine:
        """The same for planes whose rows and columns have changed places."""
        ...


class Interpolation:
    """The baselines: a cubic or Lanczos kernel, any scale along each axis, in numpy."""

    name = "numpy"
    device = "cpu"
    precision = "float64"
    channels = 1
    guided = False

    def __init__(self, kernel: Kernel, scale: tuple[float, float] | float) -> None:
        self.kernel: Kernel = kernel
        self.scale = scale if isinstance(scale, tuple) else (scale, scale)
        self.warnings: list[str] = []

    def size_of(self, rows: int, columns: int) -> Size:
        """N' = round(N·s) along each axis."""
        return enlarged_length(rows, self.scale[0]), enlarged_length(columns, self.scale[1])

    def run(self, planes: Planes, guide: Planes | None = None) -> Enlarged:
        """Enlarge by interpolation; float64 in, float64 out."""
        size = self.size_of(planes.shape[-2], planes.shape[-1])
        return Enlarged(resize(planes.astype(np.float64, copy=False), size, self.kernel))

    def batch_of(self, rows: int, columns: int) -> int:
        """One at a time: there is nothing to gain."""
        return 1

    def turned(self) -> Interpolation:
        """With the scales of rows and columns exchanged."""
        return Interpolation(self.kernel, (self.scale[1], self.scale[0]))
