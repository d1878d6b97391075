"""A network and bicubic side by side on whole slices of the held-out subjects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medsr_cli.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from medsr_cli.training.pack import PackedSlices
from medsr_cli.volume.resample import resize, shrink

Upscale = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class VolumeScore:
    """Means over the slices of one volume: PSNR in dB and SSIM, of the network and of bicubic."""

    subject: str
    name: str
    slices: int
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float

    @property
    def gain_db(self) -> float:
        """PSNR above bicubic."""
        return self.psnr - self.bicubic_psnr


def mean_gain_db(scores: Iterable[VolumeScore]) -> float:
    """Mean over volumes of the gain over bicubic; every volume counts alike."""
    return float(np.mean([score.gain_db for score in scores]))


def spread(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the indices, evenly spread, always the same ones; 0 takes all."""
    if not most or len(indices) <= most:
        return indices
    chosen: NDArray[np.int64] = indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]
    return chosen


Bicubic = dict[int, tuple[float, float]]
"""PSNR and SSIM of bicubic by slice, kept from one validation to the next."""


def validate(
    net: nn.Module,
    slices: PackedSlices,
    indices: NDArray[np.int64],
    scale: int,
    per_volume: int = 0,
    bicubic: Bicubic | None = None,
) -> list[VolumeScore]:
    """Score the network by the RDST paper's protocol (whole slices, border of `scale` pixels removed).

    Slices too small for the border and SSIM's window, and constant ones, are left out, and so are volumes
    that have no other.

    Args:
        net: called with (1, 1, rows, columns) in [0, 1].
        slices: the packed slices; each is cut to a multiple of `scale`.
        indices: which of them.
        scale: the factor by which they are shrunken first.
        per_volume: the largest number of slices taken from each volume; 0 takes all.
        bicubic: figures of an earlier call on the same slices and scale; new ones are added to it.
    """
    device = next(net.parameters()).device
    known: Bicubic = {} if bicubic is None else bicubic

    def upscale(low: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            out: NDArray[np.float32] = net(torch.from_numpy(low)[None, None].to(device))[0, 0].cpu().numpy()
        return out

    training = net.training
    net.eval()
    try:
        volumes = slices.volume_of[indices]
        scores = (
            _score_volume(upscale, slices, spread(indices[volumes == v], per_volume), scale, known)
            for v in np.unique(volumes)
        )
        return [score for score in scores if score is not None]
    finally:
        net.train(training)


def _score_volume(
    upscale: Upscale, slices: PackedSlices, indices: NDArray[np.int64], scale: int, bicubic: Bicubic
) -> VolumeScore | None:
    rows = [_score_slice(upscale, slices.slice(int(i)), scale, int(i), bicubic) for i in indices]
    scored = [row for row in rows if row is not None]
    if not scored:
        return None
    volume = slices.volumes[int(slices.volume_of[indices[0]])]
    return VolumeScore(volume.subject, volume.name, len(scored), *(float(f) for f in np.mean(scored, axis=0)))


def _score_slice(
    upscale: Upscale, high: NDArray[np.float32], scale: int, index: int, bicubic: Bicubic
) -> tuple[float, float, float, float] | None:
    rows, columns = (n // scale for n in high.shape)
    high = high[: rows * scale, : columns * scale]
    margin = math.ceil(scale)
    if min(high.shape) < 2 * margin + SSIM_WINDOW or high.min() == high.max():
        return None
    low = shrink(high, (rows, columns))
    if index not in bicubic:
        cubic = resize(low, (high.shape[0], high.shape[1]))
        bicubic[index] = (psnr(cubic, high, margin), ssim(cubic, high, margin))
    result = upscale(low)
    return (psnr(result, high, margin), ssim(result, high, margin), *bicubic[index])
