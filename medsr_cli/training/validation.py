"""A network beside what it has to beat, on whole slices of the held-out subjects.

Enlarging is measured beside bicubic, a segmentation beside the best threshold, a detector beside always answering
the mean of the training subjects. Every figure has a `gain`, by which training chooses its best weights and
the gate decides; volumes count alike, whatever their number of slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medsr_cli.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.whole_slices import WholeSlices
from medsr_cli.volume.band_limited import shifted
from medsr_cli.volume.degradation import CUBIC, CUBIC_BLUR, Degradation, degradation_named
from medsr_cli.volume.resample import resize

Image = NDArray[np.float32]
Indices = NDArray[np.int64]
Figures = tuple[float, float, float, float]
"""PSNR in dB and SSIM of the network, then of bicubic."""

ANY_SCALE = (1.5, 2.0, 3.0, 4.0)
"""Enlargements that a network for any of them is validated at, unless its recipe lists them."""


class Score(Protocol):
    """What a validation says of one held-out volume; the larger its gain the better."""

    unit: ClassVar[str]
    """Of `figure` and `gain`."""
    baseline: ClassVar[str]
    """What `gain` is over, in words."""

    @property
    def subject(self) -> str:
        """Whose volume it is."""

    @property
    def name(self) -> str:
        """The volume's name in the packed file."""

    @property
    def slices(self) -> int:
        """How many were measured."""

    @property
    def figure(self) -> float:
        """The network's own."""

    @property
    def gain(self) -> float:
        """How much better it is than the baseline, above zero where it is."""


@dataclass(frozen=True)
class ConditionFigures:
    """Means over the slices of one volume at one enlargement and one strength of the blur."""

    condition: str
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float


@dataclass(frozen=True)
class VolumeScore:
    """Means over the slices of one volume: PSNR in dB and SSIM, of the network and of bicubic."""

    unit: ClassVar[str] = "dB"
    baseline: ClassVar[str] = "bicubic"

    subject: str
    name: str
    slices: int
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float
    conditions: tuple[ConditionFigures, ...] = ()
    """The same for each enlargement and blur, where there is more than one; the figures are their means."""

    @property
    def gain_db(self) -> float:
        """PSNR above bicubic."""
        return self.psnr - self.bicubic_psnr

    @property
    def figure(self) -> float:
        """PSNR in dB."""
        return self.psnr

    @property
    def gain(self) -> float:
        """PSNR above bicubic, in dB."""
        return self.gain_db


@dataclass(frozen=True)
class OverlapScore:
    """Dice of one volume's labels, counted together over its slices, and that of the best thresholds."""

    unit: ClassVar[str] = "Dice"
    baseline: ClassVar[str] = "the best threshold"

    subject: str
    name: str
    slices: int
    dice: float
    threshold_dice: float

    @property
    def figure(self) -> float:
        """Dice, from 0 to 1."""
        return self.dice

    @property
    def gain(self) -> float:
        """Dice above that of the thresholds."""
        return self.dice - self.threshold_dice


@dataclass(frozen=True)
class CentreScore:
    """Mean distance of the detected centres of one volume from the labelled ones, in shares of the image's sides."""

    unit: ClassVar[str] = "of the image"
    baseline: ClassVar[str] = "always answering the training subjects' mean centre"

    subject: str
    name: str
    slices: int
    distance: float
    mean_distance: float
    """Of always answering the mean centre of the training subjects."""

    @property
    def figure(self) -> float:
        """The distance; the smaller the better."""
        return self.distance

    @property
    def gain(self) -> float:
        """By how much it is nearer than the mean centre."""
        return self.mean_distance - self.distance


def mean_gain(scores: Iterable[Score]) -> float:
    """Mean over volumes of the gain over the baseline; every volume counts alike."""
    return float(np.mean([score.gain for score in scores]))


def spread(indices: Indices, most: int) -> Indices:
    """At most `most` of the indices, evenly spread, always the same ones; 0 takes all."""
    if not most or len(indices) <= most:
        return indices
    chosen: Indices = indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]
    return chosen


Scorer = Callable[[nn.Module], Sequence[Score]]
"""Validates a network."""


def by_volume(slices: PackedSlices, indices: Indices, per_volume: int) -> Iterator[tuple[str, str, Indices]]:
    """Subject, name and at most `per_volume` slices (0: all) of each volume."""
    volumes = slices.volume_of[indices]
    for v in np.unique(volumes):
        volume = slices.volumes[int(v)]
        yield volume.subject, volume.name, spread(indices[volumes == v], per_volume)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[torch.device]:
    """The network in evaluation mode, without gradients, and its device; it is put back as it was."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            yield next(net.parameters()).device
    finally:
        net.train(training)


# -- enlarging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One way in which the low-resolution slices are made."""

    scale: float
    degradation: Degradation = CUBIC
    blur: float = 1.0
    """How much of a blurring degradation is blended in."""

    @property
    def in_words(self) -> str:
        """For a table: `x2`, or `x2, blur 0.5`."""
        blur = f", blur {self.blur:g}" if self.degradation is CUBIC_BLUR else ""
        return f"x{self.scale:g}{blur}"

    def down(self, high: Image, size: tuple[int, int]) -> Image:
        """(..., H, W) to (..., *size), with nothing drawn at random."""
        low = self.degradation.down(high, size)
        if self.degradation is CUBIC_BLUR and self.blur != 1:
            sharp = CUBIC.down(high, size)
            low = sharp + self.blur * (low - sharp)
        result: Image = np.asarray(low, np.float32)
        return result


Bicubic = dict[tuple[int, Condition], tuple[float, float]]
"""PSNR and SSIM of bicubic by slice and condition, kept from one validation to the next."""


def conditions_of(recipe: Recipe, scale: float | None) -> tuple[Condition, ...]:
    """What a recipe's network is validated on: its scale or scales, with the blurs that it is trained on.

    Of blurs that are drawn, the strongest is measured, and none at all beside it where some patches have none.
    """
    degradation = degradation_named(recipe.degradation)
    scales = (scale,) if scale else any_scales(recipe)
    blurs: tuple[float, ...] = (1.0,)
    if degradation is CUBIC_BLUR:
        blurs = (recipe.blur_share, 0.0) if recipe.blur_draws[1] > 0 else (recipe.blur_share,)
    return tuple(Condition(float(s), degradation, blur) for blur in blurs for s in scales)


def any_scales(recipe: Recipe) -> tuple[float, ...]:
    """Up to four of the enlargements that a recipe draws from, the ends among them; `ANY_SCALE` without any."""
    drawn = sorted({float(scale) for scale in recipe.scales if scale > 1})
    if len(drawn) <= len(ANY_SCALE):
        return tuple(drawn) or ANY_SCALE
    nearest = {min(drawn, key=lambda s: abs(s - wanted)) for wanted in ANY_SCALE}
    return tuple(sorted(nearest | {drawn[-1]}))


def validate(
    net: nn.Module,
    slices: PackedSlices,
    indices: Indices,
    conditions: Sequence[Condition] | float,
    per_volume: int = 0,
    bicubic: Bicubic | None = None,
) -> list[VolumeScore]:
    """Score the network by the RDST paper's protocol (whole slices, border of ceil(scale) pixels removed).

    Slices too small for the border and SSIM's window, and constant ones, are left out, and so are volumes
    that have no other. Low-resolution partners in the packed file are taken instead of making some. A network
    of three channels gets grey slices three times over and its results are averaged, as `upscale` does.

    Args:
        net: any network of the catalogue that enlarges, or a module called with (1, C, rows, columns) in [0, 1].
        slices: the packed slices; for a network of one scale each is cut to a multiple of it.
        indices: which of them.
        conditions: how they are shrunken first; a number is the cubic of RDST at that scale.
        per_volume: the largest number of slices taken from each volume; 0 takes all.
        bicubic: figures of an earlier call on the same slices; new ones are added to it.
    """
    wanted = (Condition(float(conditions)),) if isinstance(conditions, int | float) else tuple(conditions)
    known: Bicubic = {} if bicubic is None else bicubic
    with evaluating(net) as device:
        scores = [
            _score_volume(WholeSlices(net, device), slices, subject, name, chosen, wanted, known)
            for subject, name, chosen in by_volume(slices, indices, per_volume)
        ]
    return [score for score in scores if score is not None]


def _score_volume(
    enlarge: WholeSlices,
    slices: PackedSlices,
    subject: str,
    name: str,
    indices: Indices,
    conditions: Sequence[Condition],
    bicubic: Bicubic,
) -> VolumeScore | None:
    table: list[ConditionFigures] = []
    count = 0
    for condition in conditions:
        rows = [_score_slice(enlarge, slices, int(i), condition, bicubic) for i in indices]
        scored = [row for row in rows if row is not None]
        if scored:
            table.append(ConditionFigures(condition.in_words, *(float(f) for f in np.mean(scored, axis=0))))
            count = max(count, len(scored))
    if not table:
        return None
    rows_of_figures = [(row.psnr, row.ssim, row.bicubic_psnr, row.bicubic_ssim) for row in table]
    own, own_ssim, cubic, cubic_ssim = (float(f) for f in np.mean(rows_of_figures, axis=0))
    told = tuple(table) if len(conditions) > 1 else ()
    return VolumeScore(subject, name, count, own, own_ssim, cubic, cubic_ssim, told)


def _score_slice(
    enlarge: WholeSlices, slices: PackedSlices, index: int, condition: Condition, bicubic: Bicubic
) -> Figures | None:
    pair = pair_of(enlarge, slices, index, condition)
    if pair is None:
        return None
    margin, size = math.ceil(condition.scale), (pair.high.shape[-2], pair.high.shape[-1])
    if (index, condition) not in bicubic:
        bicubic[index, condition] = _psnr_ssim(np.asarray(resize(pair.low, size), np.float32), pair.high, margin)
    return (*_psnr_ssim(enlarge(pair.given, size, pair.guide), pair.high, margin), *bicubic[index, condition])


@dataclass(frozen=True)
class Pair:
    """A slice (C, H, W), its low-resolution partner (C, h, w) and its guide (H, W)."""

    high: Image
    low: Image
    given: Image
    """What the network gets: the partner, moved where the network expects it elsewhere."""
    guide: Image | None


def pair_of(enlarge: WholeSlices, slices: PackedSlices, index: int, condition: Condition) -> Pair | None:
    """What is measured of a slice; None where it is too small or constant, or lacks the guide that is needed."""
    if enlarge.guided and not slices.has("guide", index):
        return None
    high, partner = planes(slices.slice(index)), _partner(enlarge, slices, index, condition)
    whole, step = (high.shape[-2], high.shape[-1]), max(round(condition.scale), 1)
    if partner is not None and not enlarge.any_scale:
        whole = min(whole[0], partner.shape[-2] * step), min(whole[1], partner.shape[-1] * step)
    part = enlarge.measured(*whole, condition.scale)
    if min(part) < 2 * math.ceil(condition.scale) + SSIM_WINDOW:
        return None
    size = max(round(part[0] / condition.scale), 1), max(round(part[1] / condition.scale), 1)
    # It begins at a whole pixel of the low-resolution slice.
    top, left = ((n - own) // 2 // step for n, own in zip(whole, part, strict=True))
    cut = np.s_[top * step : top * step + part[0], left * step : left * step + part[1]]
    high = high[:, *cut]
    if high.min() == high.max():
        return None
    if partner is None:
        low = condition.down(high, size)
    else:
        low = partner if enlarge.any_scale else partner[:, top : top + size[0], left : left + size[1]]
    given = _realigned(low, (high.shape[-2], high.shape[-1])) if condition.degradation.first_centres else low
    return Pair(high, low, given, slices.slice_of("guide", index)[0][cut] if enlarge.guided else None)


def _partner(enlarge: WholeSlices, slices: PackedSlices, index: int, condition: Condition) -> Image | None:
    """The low-resolution image that came with the slice; for any scale only where it is of this one."""
    if not slices.has("low", index):
        return None
    low = slices.slice_of("low", index)
    rows, columns = slices.size_of("image", index)
    fits = low.shape[-2:] == (round(rows / condition.scale), round(columns / condition.scale))
    return low if fits or not enlarge.any_scale else None


def _realigned(low: Image, size: tuple[int, int]) -> Image:
    """Moved to where a network expects it that was trained on pairs that share their first pixels' centres.

    So `upscale` does (`engines.wrapped.Realigned`): pixel j goes to j + 1/(2s) - 1/2.
    """
    by = [(new / n - 1) * n / new / 2 for n, new in zip(low.shape[-2:], size, strict=True)]
    return np.asarray(shifted(low, by[0], by[1]), np.float32)


def planes(image: Image) -> Image:
    """(C, rows, columns) of a slice with or without an axis of channels."""
    return image if image.ndim == 3 else image[None]


def _psnr_ssim(result: Image, high: Image, margin: int) -> tuple[float, float]:
    """Means over the channels."""
    each = [(psnr(r, h, margin), ssim(r, h, margin)) for r, h in zip(result, high, strict=True)]
    mean = np.mean(each, axis=0)
    return float(mean[0]), float(mean[1])
