"""Pairs of low- and high-resolution patches, a pure function of the recipe's seed and the step.

The low-resolution patch is the shrunken crop, so that its borders come from the crop itself, as in the
released code of RDST; there is no noise.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.recipe import Recipe
from medsr_cli.volume.resample import shrink

DRAWS = 8
"""How often a patch that is too flat is drawn again."""


class PatchSampler:
    """Draws batches from the slices of the training subjects, every volume equally often."""

    def __init__(self, slices: PackedSlices, indices: NDArray[np.int64], recipe: Recipe, scale: int) -> None:
        self.slices, self.recipe, self.scale = slices, recipe, scale
        of_volume = slices.volume_of[indices]
        self.by_volume = [indices[of_volume == v] for v in np.unique(of_volume)]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Low (N, 1, p, p) and high (N, 1, s·p, s·p) patches of a step, float32 in about [0, 1]."""
        rng = np.random.default_rng((self.recipe.seed, step))
        side = self.recipe.patch * self.scale
        high = np.stack([self._patch(rng, side) for _ in range(self.recipe.batch)])[:, None]
        low = shrink(high, (self.recipe.patch, self.recipe.patch))
        return torch.from_numpy(low), torch.from_numpy(high)

    def _patch(self, rng: np.random.Generator, side: int) -> NDArray[np.float32]:
        patch = self._draw(rng, side)
        for _ in range(DRAWS):
            if patch.std() >= self.recipe.minimum_deviation:
                break
            patch = self._draw(rng, side)
        if self.recipe.augment:
            patch = augmented(patch, int(rng.integers(8)))
        if self.recipe.gain > 1:
            patch = patch * np.float32(self.recipe.gain ** rng.random())
        return np.ascontiguousarray(patch)

    def _draw(self, rng: np.random.Generator, side: int) -> NDArray[np.float32]:
        volume = self.by_volume[rng.integers(len(self.by_volume))]
        index = int(volume[rng.integers(len(volume))])
        rows, columns = (int(n) for n in self.slices.shapes[index])
        reduce = min(rows, columns) >= 2 * side and rng.random() < self.recipe.reduced_share
        reach = 2 * side if reduce else side
        top = int(rng.integers(max(rows - reach, 0) + 1))
        left = int(rng.integers(max(columns - reach, 0) + 1))
        patch = self.slices.crop(index, top, left, reach, reach)
        if reduce:
            patch = patch.reshape(side, 2, side, 2).mean(axis=(1, 3))
        return patch


def augmented(patch: NDArray[np.float32], which: int) -> NDArray[np.float32]:
    """One of the eight symmetries of the square, 0 to 7."""
    if which & 1:
        patch = patch[::-1]
    if which & 2:
        patch = patch[:, ::-1]
    if which & 4:
        patch = patch.T
    return patch
