"""Validation on labelled slices: the overlap of a segmentation, the distance of a detected centre.

Neither has bicubic to beat. A segmentation is measured beside thresholds on the intensity, one for each label, of
all those between 0 and 1 the one with the best overlap on the training subjects: what a network has to see beyond
brightness is its gain. A detector is measured beside always answering the mean centre of the training subjects,
which is what it learns first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medsr_cli.evaluation.metrics import DICE_EPSILON
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.validation import CentreScore, Indices, OverlapScore, by_volume, evaluating, planes, spread

LEVELS = 256
"""Thresholds that are tried for each label, on either side."""
TRAINING_SLICES = 256
"""Slices of the training subjects that the baselines are taken from, at most."""

Labels = NDArray[np.int64]
Image = NDArray[np.float32]


@dataclass(frozen=True)
class Threshold:
    """A label as all pixels at or above a level, or all below it; intensities are in [0, 1]."""

    level: float
    above: bool

    def of(self, image: Image) -> NDArray[np.bool_]:
        """Which pixels of (C, rows, columns) it takes, by the mean over the channels."""
        grey: Image = image.mean(axis=0)
        return np.greater_equal(grey, self.level) if self.above else np.less(grey, self.level)


class OverlapScorer:
    """Dice of a segmentation network on the held-out subjects' labelled slices, labels counted together.

    Slices without any label count too: what is found there is wrong.

    Args:
        slices: the packed slices with their labels.
        train: indices that the thresholds are taken from.
        held: indices to validate on.
        per_volume: the largest number of slices of each volume; 0 takes all.
        thresholds: those of an earlier scorer on the same training slices.
    """

    def __init__(
        self,
        slices: PackedSlices,
        train: Indices,
        held: Indices,
        per_volume: int = 0,
        thresholds: dict[int, Threshold] | None = None,
    ) -> None:
        self.slices, self.held, self.per_volume = slices, held, per_volume
        self.thresholds = thresholds or best_thresholds(slices, train)

    def __call__(self, net: nn.Module) -> list[OverlapScore]:
        """Scores of a network that makes logits (N, classes, H, W); volumes without any label are left out."""
        found: list[OverlapScore] = []
        with evaluating(net) as device:
            for subject, name, indices in by_volume(self.slices, self.held, self.per_volume):
                own, plain, count = _Overlap(), _Overlap(), 0
                for index in indices:
                    if not self.slices.has("labels", int(index)):
                        continue
                    labels = self.slices.labels_of(int(index))
                    image = planes(self.slices.slice(int(index)))
                    logits = net(torch.from_numpy(image)[None].to(device))
                    result = logits[0].argmax(dim=0).cpu().numpy()
                    for label, threshold in self.thresholds.items():
                        own.add(result == label, labels == label)
                        plain.add(threshold.of(image), labels == label)
                    count += 1
                if own.reference:
                    found.append(OverlapScore(subject, name, count, own.dice, plain.dice))
        return found


@dataclass
class _Overlap:
    """Pixels of a result, of its reference and of both."""

    shared: int = 0
    result: int = 0
    reference: int = 0

    def add(self, result: NDArray[np.bool_], reference: NDArray[np.bool_]) -> None:
        self.shared += int(np.count_nonzero(result & reference))
        self.result += int(np.count_nonzero(result))
        self.reference += int(np.count_nonzero(reference))

    @property
    def dice(self) -> float:
        return (2 * self.shared + DICE_EPSILON) / (self.result + self.reference + DICE_EPSILON)


def best_thresholds(slices: PackedSlices, indices: Indices) -> dict[int, Threshold]:
    """For each label but 0 the threshold of the largest Dice on (at most `TRAINING_SLICES` of) these slices."""
    inside: dict[int, NDArray[np.int64]] = {}
    all_pixels = np.zeros(LEVELS, np.int64)
    for index in spread(slices.with_role("labels", indices), TRAINING_SLICES):
        labels = slices.labels_of(int(index))
        grey = planes(slices.slice(int(index))).mean(axis=0)
        bins = np.clip((grey * LEVELS).astype(np.int64), 0, LEVELS - 1)
        all_pixels += np.bincount(bins.ravel(), minlength=LEVELS)
        for label in np.unique(labels):
            if label:
                own = np.bincount(bins[labels == label], minlength=LEVELS)
                inside[int(label)] = inside.get(int(label), np.zeros(LEVELS, np.int64)) + own
    return {label: _best_threshold(own, all_pixels) for label, own in sorted(inside.items())}


def _best_threshold(own: NDArray[np.int64], every: NDArray[np.int64]) -> Threshold:
    """From the histograms of a label's pixels and of all pixels."""
    size = own.sum()
    above, taken_above = own[::-1].cumsum()[::-1], every[::-1].cumsum()[::-1]  # at or above each level
    dice_above = 2 * above / (taken_above + size)
    dice_below = 2 * (size - above) / (every.sum() - taken_above + size)
    upwards = bool(dice_above.max() >= dice_below.max())
    best = int(np.argmax(dice_above if upwards else dice_below))
    return Threshold(best / LEVELS, upwards)


class CentreScorer:
    """Distance of a detector's centres from those of the held-out subjects' labels, beside the mean centre.

    Args:
        slices: the packed slices with their labels.
        train: indices that the mean centre is taken from.
        held: indices to validate on; slices without a label have no centre and are left out.
        per_volume: the largest number of slices of each volume; 0 takes all.
    """

    def __init__(self, slices: PackedSlices, train: Indices, held: Indices, per_volume: int = 0) -> None:
        self.slices, self.per_volume = slices, per_volume
        self.held = _with_some(slices, held)
        centres = [centre_of(slices, int(i)) for i in spread(_with_some(slices, train), TRAINING_SLICES)]
        known = [centre for centre in centres if centre is not None]
        self.mean = np.mean(known, axis=0) if known else np.array((0.5, 0.5))

    def __call__(self, net: nn.Module) -> list[CentreScore]:
        """Scores of a network that makes centres (N, 2), column before row."""
        found: list[CentreScore] = []
        with evaluating(net) as device:
            for subject, name, indices in by_volume(self.slices, self.held, self.per_volume):
                own: list[float] = []
                plain: list[float] = []
                for index in indices:
                    centre = centre_of(self.slices, int(index))
                    if centre is None:
                        continue
                    image = planes(self.slices.slice(int(index)))
                    x, y = net(torch.from_numpy(image)[None].to(device))[0].float().cpu().numpy()
                    own.append(float(np.hypot(y - centre[0], x - centre[1])))
                    plain.append(float(np.hypot(*(self.mean - centre))))
                if own:
                    found.append(CentreScore(subject, name, len(own), float(np.mean(own)), float(np.mean(plain))))
        return found


def _with_some(slices: PackedSlices, indices: Indices) -> Indices:
    """The slices in which something is labelled."""
    labelled = slices.with_role("labels", indices)
    return labelled[[bool(slices.labels_of(int(i)).any()) for i in labelled]] if len(labelled) else labelled


def centre_of(slices: PackedSlices, index: int) -> NDArray[np.float64] | None:
    """Row and column of the centre of mass of all labels of a slice, as shares of the image; None without any.

    The centre of pixel (r, c) of H x W lies at ((r + 1/2) / H, (c + 1/2) / W), as the detector has it.
    """
    labels = slices.labels_of(index)
    places = np.argwhere(labels > 0)
    return (places.mean(axis=0) + 0.5) / labels.shape if len(places) else None
