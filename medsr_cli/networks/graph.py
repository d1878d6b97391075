"""How a network is handed to an exporter: its traceable form, and what its inputs and outputs are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

IMAGE, GUIDE, SCALE = "image", "guide", "scale"
"""Names of a graph's inputs."""
ENLARGED, INTERMEDIATE = "enlarged", "intermediate"
"""Names of a graph's outputs."""

Axes = Mapping[int, str]
"""Axis of a tensor to the name of its length; axes that are not named have one length only."""
PLANES: Axes = {0: "batch", 2: "rows", 3: "columns"}
"""Of (N, C, H, W)."""


@dataclass(frozen=True)
class GraphForm:
    """A network as a graph of tensor operations, for any batch and size that its axes name.

    Every network module offers `graph_form(net) -> GraphForm`: same weights, same results, no step in Python that
    depends on a size.
    """

    module: nn.Module
    """Takes the inputs and returns the outputs in the order of their names; in evaluation mode."""
    inputs: Mapping[str, Tensor]
    """Names of the inputs, and an example of each; named axes are longer than 1 in it, and unlike each other."""
    axes: Mapping[str, Axes]
    """Of each input; a name that stands twice means the same length, `4*rows` four times that of `rows`."""
    outputs: tuple[str, ...] = (ENLARGED,)
