"""Dice of what a segmentation network sees in a result: against labels, or against what it sees in the reference.

J. Zhu et al., arXiv 2302.11184, section 4.3: arg-max labels of the U-Net on whole slices; "Dice-T" counts all labels
but the background together, one-hot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medsr_cli.errors import WeightsError
from medsr_cli.evaluation.metrics import dice
from medsr_cli.networks.seg_unet import SegUnet

Images = NDArray[np.floating]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SegmentationScore:
    """Overlap from 0 to 1 of the labels of a stack of slices."""

    per_label: dict[int, float]
    """By label number; the background is left out."""
    total: float
    """All of them together, one-hot: the paper's Dice-T."""
    present: tuple[int, ...]
    """Labels that the reference has; the overlap of another is 1 where the result has none of it either, else 0."""


def segment(net: SegUnet, images: Images, batch: int = 8) -> Labels:
    """Label numbers (slices, rows, columns) of images (slices, rows, columns) or (slices, channels, rows, columns).

    Args:
        net: on any device; it is put into evaluation mode and left so.
        images: intensities as the network was trained on, about [0, 1]; any size.
        batch: slices that go through the network together.

    Raises:
        WeightsError: the network takes another number of channels.
    """
    stack = images[:, None] if images.ndim == 3 else images
    if stack.shape[1] != net.config.in_channels:
        msg = f"The segmentation U-Net takes {net.config.in_channels} channels; the images have {stack.shape[1]}."
        raise WeightsError(msg, "Name one that was trained on such images.")
    found = list(_batches(net.eval(), stack, batch))
    return np.concatenate(found) if found else np.zeros((0, *stack.shape[2:]), np.int64)


@torch.inference_mode()
def _batches(net: SegUnet, stack: Images, batch: int) -> Iterator[Labels]:
    device = next(net.parameters()).device
    for start in range(0, len(stack), batch):
        images = torch.from_numpy(np.ascontiguousarray(stack[start : start + batch], dtype=np.float32))
        labels: Labels = net(images.to(device)).argmax(dim=1).cpu().numpy()
        yield labels


def segmentation_score(result: NDArray[np.integer], reference: NDArray[np.integer], classes: int) -> SegmentationScore:
    """Overlap of two label maps of equal shape, labels 1 to classes - 1.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape:
        msg = f"Labels {result.shape} cannot be compared with labels {reference.shape}."
        raise ValueError(msg)
    labels = range(1, classes)
    return SegmentationScore(
        per_label={label: dice(result, reference, (label,)) for label in labels},
        total=dice(result, reference, labels),
        present=tuple(label for label in labels if bool((reference == label).any())),
    )


def score_images(
    net: SegUnet,
    result: Images,
    *,
    labels: NDArray[np.integer] | None = None,
    reference: Images | None = None,
    batch: int = 8,
) -> SegmentationScore:
    """Dice of the segmentation of a result against labels, or else against the segmentation of a reference.

    Args:
        net: the segmentation network.
        result: (slices, rows, columns) or (slices, channels, rows, columns), as the network was trained on.
        labels: true label numbers (slices, rows, columns).
        reference: the images that `result` should be, same shape; only where there are no labels.
        batch: slices that go through the network together.

    Raises:
        ValueError: neither or both of labels and reference are given, or shapes differ.
        WeightsError: the network takes another number of channels.
    """
    if (labels is None) == (reference is None):
        msg = "Give either labels or a reference."
        raise ValueError(msg)
    wanted = labels if reference is None else segment(net, reference, batch)
    assert wanted is not None  # noqa: S101 -- one of both is given
    return segmentation_score(segment(net, result, batch), wanted, net.config.classes)
