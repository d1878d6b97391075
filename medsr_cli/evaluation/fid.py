"""Fréchet inception distance of two sets of images: of Gaussians fitted to their Inception features.

M. Heusel et al., NeurIPS 2017, arXiv 1706.08500, equation 6: |µ1 - µ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½). RDST and MIASSR
measure it for each subject, on its slices without their border, and average over subjects (arXiv 2302.11184, section
4.3). With some hundred slices and 2048 features it is biased upwards by much: compare it at equal numbers of slices
only. The network's weights are not in the package; `tasks` load them from the store or refuse with the command that
fetches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from medsr_cli.errors import WeightsError
from medsr_cli.networks.inception import Inception

WEIGHTS_ID = "inception-fid"
"""Id of the network's weights in the manifest."""
LEAST_IMAGES = 2
"""A covariance needs two."""
BATCH = 8

Image = NDArray[np.floating]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What is left of a set of images."""

    mean: Doubles
    """(features,)"""
    covariance: Doubles
    """(features, features), of the sample: divided by n - 1."""
    count: int


def moments(features: Doubles) -> Moments:
    """Mean and covariance of (images, features).

    Raises:
        ValueError: fewer than two images, or not a matrix.
    """
    _refuse_few(features)
    return Moments(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


def distance_of_moments(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, by the matrix square root; at least 0.

    `fid` is quicker and more exact where the features themselves are at hand.
    """
    root = sqrtm(a.covariance @ b.covariance)
    # Tiny negative eigenvalues of a singular product give it an imaginary part.
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root.real)
    return max(float(np.sum((a.mean - b.mean) ** 2) + trace), 0.0)


def fid(result: Doubles, reference: Doubles) -> float:
    """Fréchet distance of two sets of features, (images, features) each; 0 for equal sets, lower is better.

    The covariances are AᵀA and BᵀB with centred features A and B over √(n - 1). The eigenvalues of their product are
    the squared singular values of ABᵀ, a small matrix for few images: tr (Σ1 Σ2)^½ is the sum of these.

    Raises:
        ValueError: fewer than two images in a set, or sets of different features.
    """
    _refuse_few(result)
    _refuse_few(reference)
    if result.shape[1] != reference.shape[1]:
        msg = f"Features of {result.shape[1]} and {reference.shape[1]} values cannot be compared."
        raise ValueError(msg)
    a, b = _centred(result), _centred(reference)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = np.sum((result.mean(axis=0) - reference.mean(axis=0)) ** 2)
    return max(float(means + np.sum(a * a) + np.sum(b * b) - 2 * root), 0.0)


def features(network: Inception, images: Iterable[Image], batch: int = BATCH) -> Doubles:
    """Features (images, 2048) of images in [0, 1], each (rows, columns) or (C, rows, columns).

    Values outside of [0, 1] are clipped. Grey becomes three equal channels; of images with two, four or more channels
    each channel is an image of its own, as RDST has it for the four sequences of BraTS. Without images: (0, 2048).
    """
    device = next(network.parameters()).device
    found: list[Doubles] = []
    waiting: list[torch.Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            given = torch.cat(waiting).to(device)
            found.append(network(given).double().cpu().numpy())
        waiting.clear()

    for image in images:
        for colour in _colours(image):
            if waiting and (waiting[0].shape != colour.shape or len(waiting) == batch):
                run()
            waiting.append(colour)
    if waiting:
        run()
    return np.concatenate(found) if found else np.zeros((0, network.config.features))


def fid_by_subject(network: Inception, subjects: Sequence[tuple[Sequence[Image], Sequence[Image]]]) -> list[float]:
    """FID of each subject's results against its references, in order; the papers average these.

    NaN for a subject with fewer than two slices, which has no covariance.

    Args:
        network: the Inception of the manifest's `inception-fid`.
        subjects: result slices and reference slices, in [0, 1], their border removed.
    """
    scores = []
    for results, references in subjects:
        few = min(len(results), len(references)) < LEAST_IMAGES
        scores.append(float("nan") if few else fid(features(network, results), features(network, references)))
    return scores


def missing_weights() -> WeightsError:
    """The error for a machine that has no weights of the network."""
    msg = "FID needs the Inception network, which is not on this machine."
    return WeightsError(msg, f"Run: medsr weights pull {WEIGHTS_ID}, or leave FID out.")


def _colours(image: Image) -> list[torch.Tensor]:
    """(1, 3, rows, columns) for each image that the channels make."""
    stacked = torch.from_numpy(np.clip(np.asarray(image, dtype=np.float32), 0, 1))[None]
    if stacked.ndim == 3:
        stacked = stacked[None]
    if stacked.shape[1] == 3:
        return [stacked]
    return [channel[:, None].expand(-1, 3, -1, -1) for channel in stacked.unbind(1)]


def _centred(values: Doubles) -> Doubles:
    """Features less their mean over √(n - 1); of more images than features their triangular factor instead."""
    centred: Doubles = (values - values.mean(axis=0)) / np.sqrt(len(values) - 1)
    if len(values) <= values.shape[1]:
        return centred
    factor: Doubles = np.linalg.qr(centred)[1]
    return factor


def _refuse_few(values: Doubles) -> None:
    if values.ndim != 2 or len(values) < LEAST_IMAGES:
        msg = f"A Fréchet distance needs at least {LEAST_IMAGES} images in each set, got {len(values)}."
        raise ValueError(msg)
