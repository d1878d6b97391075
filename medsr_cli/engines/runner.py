"""What a runner is: one network on one device, through one library; arrays in, arrays out.

Engines cut slices into tiles, blend, pad and name results; a runner does none of that, so that every library runs
the same pipeline. Runners take float arrays of any width and return float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from medsr_cli.engines.engine import Planes


@dataclass(frozen=True)
class Place:
    """One axis of a tile: where it lies in the image, and which pixels of the result are wanted of it."""

    length: int
    """Pixels of the whole image."""
    first: int
    """First pixel of the tile."""
    start: int
    """First pixel of the result that is wanted."""
    count: int
    """How many of them."""


class Runner(Protocol):
    """A network that is ready to run."""

    name: str
    """The library, for the report: `torch`, `onnx`."""
    device: str
    """What it really runs on, such as `cpu` or `cuda:0`."""
    precision: str
    """Such as `float32`."""
    warnings: list[str]
    """What a user must know about how it was set up."""
    out_of_memory: tuple[type[BaseException], ...]
    """What is raised when the device, or the process, has too little memory."""

    def run(self, planes: Planes, guide: Planes | None = None) -> tuple[Planes, ...]:
        """(n, c, rows, columns) to the network's results, the enlarged planes last."""
        ...

    def run_scaled(self, planes: Planes, scale: tuple[float, float], places: tuple[Place, Place]) -> Planes:
        """Networks of any scale: the wanted pixels of the result of a tile, along rows and columns."""
        ...

    def usable_bytes(self) -> int:
        """Memory of the device that a run may plan with."""
        ...

    def release(self) -> None:
        """Give memory back that is kept for the next run."""
        ...
