"""How far a finished network's shrunken results are from its inputs, on the held-out slices: the limit of its card.

`upscale` flags blocks beyond that limit. Inputs are of two kinds: slices that were shrunken first, and crops of
slices as they are, whose noise no degradation has smoothed, since those are what the network will meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medsr_cli.evaluation.agreement_map import Limit, calibrate
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.validation import Condition, evaluating, pair_of, spread
from medsr_cli.training.whole_slices import Image, WholeSlices
from medsr_cli.volume.degradation import Degradation

MOST_SLICES = 24
"""Held-out slices that are run, for each way of shrinking them."""
CROP_SIDE = 80
"""Pixels of a crop that is run as it is."""


def local_limit(
    net: nn.Module,
    slices: PackedSlices,
    held: NDArray[np.int64],
    conditions: Sequence[Condition],
    undone: Degradation,
) -> Limit:
    """The limit of a network that enlarges, from at most `MOST_SLICES` slices and as many crops a condition.

    Args:
        net: as it will be stored.
        slices: the packed slices.
        held: those of the held-out subjects.
        conditions: how the network was validated.
        undone: what its card says that it undoes, by which `upscale` shrinks results again.
    """
    chosen = spread(held, MOST_SLICES)
    with evaluating(net) as device:
        return calibrate(_pairs(WholeSlices(net, device), slices, chosen, conditions), undone)


def _pairs(
    enlarge: WholeSlices, slices: PackedSlices, chosen: NDArray[np.int64], conditions: Sequence[Condition]
) -> Iterator[tuple[Image, Image]]:
    for index, condition in product(chosen, conditions):
        pair = pair_of(enlarge, slices, int(index), condition)
        if pair is not None:
            yield pair.low, enlarge(pair.given, (pair.high.shape[-2], pair.high.shape[-1]), pair.guide)
        if not enlarge.guided:  # a crop as it is has no guide of its resolution
            crop = _middle(slices.slice_of("image", int(index)))
            size = (round(crop.shape[-2] * condition.scale), round(crop.shape[-1] * condition.scale))
            yield crop, enlarge(crop, size)


def _middle(image: Image) -> Image:
    """The middle of (C, H, W), at most `CROP_SIDE` a side."""
    top, left = (max(n - CROP_SIDE, 0) // 2 for n in image.shape[-2:])
    return image[:, top : top + CROP_SIDE, left : left + CROP_SIDE]
