"""Dice of what a segmentation network sees in a result."""

from __future__ import annotations

import numpy as np
import pytest
import torch.nn.functional as F  # noqa: N812 -- torch's own name

from medsr_cli.errors import WeightsError
from medsr_cli.evaluation.metrics import dice
from medsr_cli.evaluation.segmentation import score_images, segment, segmentation_score
from medsr_cli.networks.seg_unet import SegUnet, SegUnetConfig
from tests.networks.test_seg_unet import tiny


class Threshold(SegUnet):
    """Label 1 from a half up, label 2 from three quarters up."""

    def forward(self, image):
        grey = image[:, 0]
        label = (grey >= 0.5).long() + (grey >= 0.75).long()
        return F.one_hot(label, 3).movedim(-1, 1).float()


def test_the_dice_of_a_result_against_labels_and_against_the_reference():
    net = Threshold(SegUnetConfig(1, 3, 1, "1,1,1,1", "1,1,1,1,1"))
    result, reference = np.random.default_rng(3).random((2, 5, 9, 7), np.float32)
    labels = (reference >= 0.5).astype(np.int64) + (reference >= 0.75)
    seen = segment(net, result, batch=2)
    assert np.array_equal(seen, (result >= 0.5).astype(np.int64) + (result >= 0.75))
    by_reference = score_images(net, result, reference=reference)
    assert by_reference == score_images(net, result[:, None], labels=labels, batch=3)
    for label in (1, 2):
        both, either = ((seen == label) & (labels == label)).sum(), (seen == label).sum() + (labels == label).sum()
        assert by_reference.per_label[label] == pytest.approx(2 * both / either, abs=1e-6)
    assert by_reference.total == dice(seen, labels, (1, 2))
    assert by_reference.present == (1, 2)
    assert score_images(net, reference, reference=reference).total == 1


def test_a_label_that_is_nowhere_scores_one_and_is_not_present():
    zeros = np.zeros((2, 4, 4), np.int64)
    score = segmentation_score(zeros, zeros, 3)
    assert (score.per_label, score.present) == ({1: 1.0, 2: 1.0}, ())
    assert segmentation_score(zeros + 1, zeros, 3).per_label[1] < 1e-6


def test_scores_that_cannot_be_are_refused():
    net = tiny()
    with pytest.raises(WeightsError, match="takes 1 channels; the images have 2"):
        segment(net, np.zeros((1, 2, 32, 32)))
    with pytest.raises(ValueError, match="labels or a reference"):
        score_images(net, np.zeros((1, 32, 32)))
    with pytest.raises(ValueError, match="cannot be compared"):
        segmentation_score(np.zeros((1, 3, 3), int), np.zeros((1, 3, 4), int), 3)
