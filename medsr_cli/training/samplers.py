"""The batch of each step, for every method: a pure function of the recipe's seed, the step and the process.

All that is random about a batch is drawn for the whole of it, whatever the number of processes; each process then
takes its share of the images, one after another, so that the shares together are the batch of a single process.
A low-resolution image is the shrunken crop, so that its borders come from the crop itself, as in the released code
of RDST, unless the packed file holds low-resolution partners.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.networks import catalogue
from medsr_cli.training.batch import Batch
from medsr_cli.training.captions import made_caption
from medsr_cli.training.pack import PackedSlices, Role
from medsr_cli.training.patches import Crops, FloatArray, Patch, Place, augmented
from medsr_cli.training.recipe import Recipe
from medsr_cli.volume.degradation import CUBIC, CUBIC_BLUR, DEGRADATIONS, FOURIER
from medsr_cli.volume.fourier import shrink_as_released
from medsr_cli.volume.resample import blur_3x3, resize

Indices = NDArray[np.int64]

STACK = 4
"""Consecutive slices that Cohf-T's authors scale together in training."""
LABELLED_SHARE = 0.5
"""Share of the segmentation's crops that are drawn around a labelled pixel; others may hold some too."""
SEGMENTATION_MULTIPLE = 32
"""What the sides of the segmentation U-Net's inputs are multiples of."""
DETECTOR_SIDE = 128
"""Rows and columns that the lesion detector resizes every image to [ours], unless `high_patch` says another."""

_DEGRADING = 1
"""Set apart from the numbers that places are drawn by, so that noise moves no patch."""


class Sampler(Protocol):
    """Makes batches."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, or this process's share of it."""
        ...


class _Share:
    """Which images of each batch are this process's."""

    def __init__(self, recipe: Recipe, rank: int, processes: int) -> None:
        if not 0 <= rank < processes or recipe.batch < processes:
            msg = f"A batch of {recipe.batch} cannot be shared by {processes} processes."
            raise ArgumentsError(msg, "Give a larger --batch, or fewer processes.")
        self.seed, self.rank = recipe.seed, rank
        self.part = slice(rank * recipe.batch // processes, (rank + 1) * recipe.batch // processes)

    def batch_seed(self, step: int) -> int:
        """For what a loss draws."""
        state = np.random.SeedSequence((self.seed, step, self.rank)).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))


def sampler_for(
    recipe: Recipe, slices: PackedSlices, indices: Indices, scale: float, *, rank: int = 0, processes: int = 1
) -> Sampler:
    """The batches of one stage of a recipe.

    Args:
        recipe: of this stage.
        slices: the packed slices.
        indices: those to train on.
        scale: the enlargement; where the recipe has `scales` it is not used.
        rank: number of this process.
        processes: how many there are; each gets its share of `recipe.batch`.

    Raises:
        ArgumentsError: the batch has fewer images than there are processes, or the recipe's degradation, its scales
            and the partners in the file contradict each other.
        InputRefused: the slices have not the guides or labels that the recipe needs.
    """
    share = _Share(recipe, rank, processes)
    if recipe.task == "segmentation":
        return _Segmentation(recipe, slices, _having(slices, "labels", indices), share)
    if recipe.task == "detection":
        return _Detection(recipe, slices, _labelled(slices, indices), share)
    if recipe.scales or recipe.method == "miassr" or scale != int(scale):
        return _AnyScale(recipe, slices, indices, scale, share)
    return _OneScale(recipe, slices, indices, int(scale), share)


def _is_guided(recipe: Recipe) -> bool:
    return any(arch.id == recipe.method and "guide" in arch.needs for arch in catalogue.CATALOGUE)


def _having(slices: PackedSlices, role: Role, indices: Indices) -> Indices:
    kept = slices.with_role(role, indices)
    if not len(kept):
        if role == "guide":
            msg = "None of the images to train on has a guide: a target without its partner cannot be trained on."
            raise InputRefused(msg, "Pack pairs of a target and a guide on one grid.")
        msg = "None of the images to train on has a mask or a label map."
        raise InputRefused(msg, "Put masks beside the images, named after them or with the word mask or label.")
    return kept


def _labelled(slices: PackedSlices, indices: Indices) -> Indices:
    """Slices with labelled pixels."""
    kept = slices.labelled(_having(slices, "labels", indices))
    if not len(kept):
        msg = "The masks of the images to train on are empty."
        raise InputRefused(msg, "Give images with lesions.")
    return kept


def _stacked(images: list[FloatArray]) -> FloatArray:
    return np.ascontiguousarray(np.stack(images))


def _tensor(images: FloatArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images, np.float32))


# -- how images are made small -----------------------------------------------------------------------------


class _Shrinking:
    """The recipe's degradation, with how much of its blur and noise each image gets."""

    def __init__(self, recipe: Recipe, share: _Share) -> None:
        if recipe.degradation not in DEGRADATIONS:
            msg = f"There is no degradation {recipe.degradation!r}."
            raise ArgumentsError(msg, f"There are: {', '.join(DEGRADATIONS)}.")
        self.recipe, self.share, self.degradation = recipe, share, DEGRADATIONS[recipe.degradation]

    def __call__(self, patches: list[Patch], size: tuple[int, int], step: int) -> FloatArray:
        """(N, C, h, w) of this process, from the patches of the whole batch."""
        own = patches[self.share.part]
        rng = np.random.default_rng((self.recipe.seed, step, _DEGRADING))
        if self.degradation is FOURIER:
            small = self._scaled_together(patches, size)[self.share.part]
        elif self.degradation is CUBIC_BLUR:
            small = CUBIC.down(_stacked([patch.image for patch in own]), size).astype(np.float32)
            amount = self._blurs(rng)[self.share.part, None, None, None]
            small = (1 - amount) * small + amount * blur_3x3(small).astype(np.float32)
        else:
            small = self.degradation.down(_stacked([patch.image for patch in own]), size).astype(np.float32, copy=False)
        if self.recipe.noise > 0:
            deviation = rng.random(self.recipe.batch, np.float32)[:, None, None, None] * np.float32(self.recipe.noise)
            noise = rng.standard_normal((self.recipe.batch, *small.shape[1:]), np.float32)
            small = small + (deviation * noise)[self.share.part]
        return np.asarray(small, np.float32)

    def _blurs(self, rng: np.random.Generator) -> FloatArray:
        """How much each image of the batch is blurred: in full, not at all, or anything between."""
        full, none = self.recipe.blur_draws
        which, between = rng.random((2, self.recipe.batch))
        drawn = np.where(which < full, 1.0, np.where(which < full + none, 0.0, between))
        return (self.recipe.blur_share * drawn).astype(np.float32)

    def _scaled_together(self, patches: list[Patch], size: tuple[int, int]) -> FloatArray:
        """Cohf-T's: every stack of neighbouring slices from its smallest to its largest value."""
        images = _stacked([patch.image for patch in patches])
        small = np.empty((*images.shape[:2], *size), np.float32)
        numbers = np.array([patch.stack for patch in patches])
        for number in np.unique(numbers):
            small[numbers == number] = shrink_as_released(images[numbers == number], size)
        return small


# -- super-resolution --------------------------------------------------------------------------------------


class _OneScale:
    """Pairs for one whole enlargement: crops, whole slices or lesions; guides, partners, texts where asked for."""

    def __init__(self, recipe: Recipe, slices: PackedSlices, indices: Indices, scale: int, share: _Share) -> None:
        self.recipe, self.slices, self.scale, self.share = recipe, slices, scale, share
        roles: list[Role] = []
        if _is_guided(recipe):
            roles.append("guide")
            indices = _having(slices, "guide", indices)
        if slices.has("low"):
            roles.append("low")
            indices = _with_partners(slices, indices, scale)
        if recipe.region == "lesion":
            indices = _labelled(slices, indices)
        self.crops = Crops(slices, indices, recipe, roles, scale)
        self.shrink = _Shrinking(recipe, share)
        self.side = (recipe.high_patch or scale * recipe.patch) // scale * scale
        self.neighbours = STACK if recipe.degradation == FOURIER.name and "guide" in roles else 1

    def batch(self, step: int) -> Batch:
        """Low (N, C, h, w), high (N, C, H, W), and what the method takes beside them."""
        rng = np.random.default_rng((self.recipe.seed, step))
        patches = self._patches(rng)
        own = patches[self.share.part]
        high = _stacked([patch.image for patch in own])
        rows, columns = high.shape[-2:]
        partners = [patch.low for patch in own if patch.low is not None]
        size = (rows // self.scale, columns // self.scale)
        low = _stacked(partners) if partners else self.shrink(patches, size, step)
        guides = [patch.guide for patch in own if patch.guide is not None]
        batch = Batch(_tensor(low), _tensor(high), seed=self.share.batch_seed(step))
        if guides:
            batch = replace(batch, guide=_tensor(_stacked(guides)))
        if self.recipe.method == "msgan" or "mse_x2" in self.recipe.losses:
            batch = replace(batch, middle=_tensor(resize(high, (rows // 2, columns // 2))))
        if self.recipe.method == "m2trans" or "semantic" in self.recipe.losses:
            batch = replace(batch, captions=tuple(self._caption(patch.volume) for patch in own))
        return batch

    def _caption(self, volume: int) -> str:
        return self.slices.volumes[volume].caption or made_caption(self.recipe.seed, volume)

    def _patches(self, rng: np.random.Generator) -> list[Patch]:
        """Those of the whole batch."""
        if self.recipe.region == "slice":
            return self._whole(rng)
        patches: list[Patch] = []
        while len(patches) < self.recipe.batch:
            patches += self.crops.varied(rng, self._drawn(rng, len(patches)))
        return patches[: self.recipe.batch]

    def _drawn(self, rng: np.random.Generator, stack: int) -> list[Patch]:
        """A patch, or those of neighbouring slices at one place."""
        crops = self.crops
        if self.recipe.region == "lesion":
            return [crops.cut(self._around_lesion(crops.index(rng)))]
        if self.neighbours == 1:
            return [crops.cut(*crops.square(rng, self.side))]
        indices = crops.neighbours(rng, self.neighbours)
        place = self._anywhere(rng, indices[0], (self.side, self.side))
        return [crops.cut(replace(place, index=index), stack=stack) for index in indices]

    def _anywhere(self, rng: np.random.Generator, index: int, size: tuple[int, int]) -> Place:
        rows, columns = self.slices.size_of("image", index)
        top = int(rng.integers(max(rows - size[0], 0) + 1))
        left = int(rng.integers(max(columns - size[1], 0) + 1))
        return Place(index, self.crops.snapped(top), self.crops.snapped(left), *size)

    def _whole(self, rng: np.random.Generator) -> list[Patch]:
        """Whole slices, cut at random to the smallest of the batch and to whole low-resolution pixels.

        With `high_patch`, for networks of one size, all are cut to a square of it, or continued by their edges.
        """
        stacks: list[list[int]] = []
        while sum(map(len, stacks)) < self.recipe.batch:
            stacks.append(self.crops.neighbours(rng, self.neighbours))
        shapes = self.slices.shapes[[index for stack in stacks for index in stack][: self.recipe.batch]]
        smallest = shapes.min(axis=0) // self.scale * self.scale
        size = (max(int(smallest[0]), self.scale), max(int(smallest[1]), self.scale))
        if self.recipe.high_patch:
            size = (self.side, self.side)
        patches: list[Patch] = []
        for number, stack in enumerate(stacks):
            place = self._anywhere(rng, stack[0], size)
            cut = [self.crops.cut(replace(place, index=index), stack=number) for index in stack]
            patches += self.crops.varied(rng, cut)
        return patches[: self.recipe.batch]

    def _around_lesion(self, index: int) -> Place:
        """The square around the labels' centre of mass, moved into the slice, at whole low-resolution pixels."""
        s, side = self.scale, self.side
        centre = _centre_of_mass(self.slices.labels_of(index))
        corner = []
        for middle, length in zip(centre, self.slices.size_of("image", index), strict=True):
            wanted = round((middle + 0.5) / s - side / s / 2)
            corner.append(s * min(max(wanted, 0), max((length - side) // s, 0)))
        return Place(index, corner[0], corner[1], side, side)


def _with_partners(slices: PackedSlices, indices: Indices, scale: int) -> Indices:
    kept = slices.with_role("low", indices)
    for index in kept:
        low, high = slices.size_of("low", int(index)), slices.size_of("image", int(index))
        if (low[0] * scale, low[1] * scale) != high:
            msg = f"The low-resolution images that were packed are not {scale} times smaller."
            raise ArgumentsError(msg, "Give the scale of the pairs.")
    if not len(kept):
        msg = "None of the images to train on has a low-resolution partner, but others have."
        raise InputRefused(msg, "Give partners of all images, or of none.")
    return kept


def _centre_of_mass(labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean row and column of all labelled pixels."""
    rows, columns = np.nonzero(labels)
    return float(rows.mean()), float(columns.mean())


class _AnyScale:
    """MIASSR's: one enlargement for each batch; the target is resized to what the network makes of the small image.

    Source: J. Zhu et al., arXiv 2105.10738, and the released code. Of a crop of P pixels and a scale s, the small
    image has int(P / s) pixels and the target int(int(P / s)·s), computed in float64 and cut off.
    """

    def __init__(self, recipe: Recipe, slices: PackedSlices, indices: Indices, scale: float, share: _Share) -> None:
        if slices.has("low"):
            msg = "The packed low-resolution images are for one scale, and this method draws many."
            raise ArgumentsError(msg, "Pack the high-resolution images alone.")
        self.recipe, self.share = recipe, share
        self.scales = recipe.scales or (float(scale),)
        self.side = recipe.high_patch or int(recipe.patch * max(self.scales))
        self.crops = Crops(slices, indices, recipe)
        self.shrink = _Shrinking(recipe, share)

    def batch(self, step: int) -> Batch:
        """Low (N, C, h, h), high (N, C, H, H), and both ratios H / h."""
        rng = np.random.default_rng((self.recipe.seed, step))
        scale = float(self.scales[rng.integers(len(self.scales))])
        patches: list[Patch] = []
        while len(patches) < self.recipe.batch:
            patches += self.crops.varied(rng, [self.crops.cut(*self.crops.square(rng, self.side))])
        small = max(int(self.side / scale), 1)
        large = max(int(small * scale), 1)
        high = _stacked([patch.image for patch in patches[self.share.part]])
        if large != self.side:
            high = resize(high, (large, large))
        low = self.shrink(patches, (small, small), step)
        ratio = Fraction(large, small)
        return Batch(_tensor(low), _tensor(high), (ratio, ratio), seed=self.share.batch_seed(step))


# -- segmentation and detection ----------------------------------------------------------------------------


class _Segmentation:
    """Crops with their labels; at least half of them, on average, hold a labelled pixel."""

    def __init__(self, recipe: Recipe, slices: PackedSlices, indices: Indices, share: _Share) -> None:
        self.recipe, self.slices, self.share = recipe, slices, share
        self.crops = Crops(slices, indices, recipe, ["labels"])
        self.labelled = Crops(slices, _labelled(slices, indices), recipe, ["labels"])
        self.side = _multiple(recipe.high_patch or recipe.patch)

    def batch(self, step: int) -> Batch:
        """The images as low and as high, (N, C, H, W), and labels (N, H, W)."""
        rng = np.random.default_rng((self.recipe.seed, step))
        drawn = [self._index(rng) for _ in range(self.recipe.batch)]
        size = self._size([index for index, _ in drawn])
        patches: list[Patch] = []
        for index, around in drawn:
            place = self._place(rng, index, size, around=around)
            patches += self.crops.varied(rng, [self.crops.cut(place)])
        own = patches[self.share.part]
        image = _tensor(_stacked([patch.image for patch in own]))
        labels = np.stack([patch.labels for patch in own if patch.labels is not None])
        return Batch(image, image, labels=torch.from_numpy(labels), seed=self.share.batch_seed(step))

    def _index(self, rng: np.random.Generator) -> tuple[int, bool]:
        """A slice, and whether its crop is to hold a labelled pixel."""
        around = bool(rng.random() < LABELLED_SHARE)
        return (self.labelled if around else self.crops).index(rng), around

    def _size(self, indices: list[int]) -> tuple[int, int]:
        """The crops' sides; of whole slices, what fits into the smallest of the batch."""
        if self.recipe.region != "slice":
            return self.side, self.side
        rows, columns = self.slices.shapes[indices].min(axis=0)
        return _multiple(int(rows)), _multiple(int(columns))

    def _place(self, rng: np.random.Generator, index: int, size: tuple[int, int], *, around: bool) -> Place:
        """Anywhere in the slice, or anywhere around one of its labelled pixels."""
        first, last = (
            [0, 0],
            [max(n - side, 0) for n, side in zip(self.slices.size_of("image", index), size, strict=True)],
        )
        if around:
            pixels = np.argwhere(self.slices.labels_of(index))
            pixel = [int(n) for n in pixels[rng.integers(len(pixels))]]
            first = [min(max(p - side + 1, 0), end) for p, side, end in zip(pixel, size, last, strict=True)]
            last = [min(p, end) for p, end in zip(pixel, last, strict=True)]
        top, left = (int(rng.integers(a, b + 1)) for a, b in zip(first, last, strict=True))
        return Place(index, top, left, *size)


def _multiple(side: int) -> int:
    return max(side // SEGMENTATION_MULTIPLE, 1) * SEGMENTATION_MULTIPLE


class _Detection:
    """Whole slices with lesions, at the detector's size, and where their centres of mass are."""

    def __init__(self, recipe: Recipe, slices: PackedSlices, indices: Indices, share: _Share) -> None:
        self.recipe, self.slices, self.share = recipe, slices, share
        self.crops = Crops(slices, indices, recipe)
        self.side = recipe.high_patch or DETECTOR_SIDE

    def batch(self, step: int) -> Batch:
        """The images as low and as high, (N, C, side, side), and centres (N, 2), rows first.

        The centre of pixel r of H lies at (r + 1/2) / H.
        """
        rng = np.random.default_rng((self.recipe.seed, step))
        images, centres = [], []
        for _ in range(self.recipe.batch):
            index = self.crops.index(rng)
            which = int(rng.integers(8)) if self.recipe.augment else 0
            gain = np.float32(self.recipe.gain ** rng.random()) if self.recipe.gain > 1 else np.float32(1)
            labels = augmented(self.slices.labels_of(index), which)
            row, column = _centre_of_mass(labels)
            centres.append(((row + 0.5) / labels.shape[0], (column + 0.5) / labels.shape[1]))
            images.append(augmented(self.slices.slice_of("image", index), which) * gain)
        own = [self._resized(image) for image in images[self.share.part]]
        image = torch.cat(own)
        place = torch.tensor(centres[self.share.part], dtype=torch.float32)
        return Batch(image, image, centres=place, seed=self.share.batch_seed(step))

    def _resized(self, image: FloatArray) -> Tensor:
        """As the network itself resizes a whole slice."""
        whole = _tensor(image)[None]
        return interpolate(whole, (self.side, self.side), mode="bilinear", align_corners=False)
