"""What one step of a training is given, and what a network made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The pairs of one step, float32 in about [0, 1]; what a method does not use is None."""

    low: Tensor
    """(N, C, h, w)."""
    high: Tensor
    """(N, C, H, W); segmentation and detection: the image itself, as `low` is."""
    ratio: tuple[Fraction, Fraction] | None = None
    """H / h and W / w, where the network takes any."""
    guide: Tensor | None = None
    """(N, 1, H, W), of another contrast (Cohf-T's T1)."""
    labels: Tensor | None = None
    """(N, H, W), int64, label numbers."""
    centres: Tensor | None = None
    """(N, 2), row and column of the lesion's centre of mass as shares of the image, in [0, 1]."""
    middle: Tensor | None = None
    """(N, C, H / 2, W / 2): the target shrunken by 2, for networks that make a x2 image on the way (MS-GAN)."""
    captions: tuple[str, ...] = ()
    """One text for each image (M2Trans)."""
    seed: int = 0
    """For what a loss draws: of the recipe, the step and the process."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Outputs:
    """What a network made of a batch."""

    image: Tensor
    """(N, C, H, W); segmentation: logits (N, classes, H, W); detection: centres (N, 2)."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """`x2`: (N, C, H / 2, W / 2) of MS-GAN; `gradient`: (N, 1, H, W) of Cohf-T."""
