"""The networks and how to load them.

Importing this package costs nothing: PyTorch is imported when `load_network` is called. What networks
there are stands in `medsr_cli.networks.catalogue`, which needs the standard library only.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load_network(path: str | PathLike[str]) -> nn.Module:
    """The network of a safetensors file on the CPU, in evaluation mode; see `checkpoint.load_network`.

    Raises:
        WeightsError: the file is not the weights of one of the catalogue's networks; the sentence says why.
    """
    from medsr_cli.networks import checkpoint

    return checkpoint.load_network(path)
