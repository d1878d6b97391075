"""What an engine has to know of a network beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medsr_cli.networks.catalogue import Arch, Tiling

OF_CYCLEGAN = 14
"""Pixels that the generator of the ultrasound CycleGAN sees to every side."""


@dataclass(frozen=True)
class Traits:
    """The facts that tiles, batches and guides depend on; the catalogue's entry and the configuration say them."""

    scale: int
    """Enlargement; 1 for networks of any scale, which are told it with every run."""
    channels: int = 1
    tiling: Tiling = "blended"
    smallest: int = 1
    guided: bool = False
    bytes_per_pixel: int = 0
    """Working memory for one pixel of the input; 0 where it is not known."""
    reach: int = 0
    """Pixels of the input beyond which nothing changes a pixel's result, for networks whose tiles are exact."""
    side: int = 0
    """The one size that a network with `fixed` tiles runs at."""
    first_stage: int = 0
    """Enlargement of the result of its first stage; 0 where there is none."""
    enlarged_first: bool = False
    """Whether bicubic enlarges the image before the network; all pixels here are then those of the result."""
    any_scale: bool = False
    rounding: str = "exact"
    """How a network of any scale finds the input's pixels: `exact`, or `reference` for the authors' weights."""
    size_multiple: int = 8
    """Tiles are this many pixels, or a multiple: the network's windows, or what it pads to."""
    overlap: int = 40
    """Pixels that neighbouring tiles share, for networks whose tiles are not exact."""

    @classmethod
    def of(cls, arch: Arch, net: Any) -> Traits:
        """Those of a network of the catalogue, built or laid out without memory."""
        side = int(net.side) if arch.tiling == "fixed" else 0
        return cls.of_config(arch, asdict(net.config), reach=int(getattr(net, "reach", 0)), side=side)

    @classmethod
    def of_config(cls, arch: Arch, config: Mapping[str, Any], *, reach: int, side: int) -> Traits:
        """Those of a configuration; what only a network can tell is given."""
        any_scale = arch.scale_range is not None
        scale = 1 if any_scale else int(config.get("scale", max(arch.scales)))
        return cls(
            scale=scale,
            channels=int(config.get("in_channels", 1)),
            tiling=arch.tiling,
            smallest=arch.smallest,
            guided="guide" in arch.needs,
            bytes_per_pixel=_bytes_per_pixel(arch, config, scale),
            reach=reach,
            side=side,
            first_stage=arch.first_stage,
            enlarged_first=arch.enlarged_first,
            any_scale=any_scale,
            rounding=str(config.get("rounding", "exact")),
            size_multiple=arch.size_multiple,
            overlap=arch.overlap,
        )


def least_reach(arch: Arch, config: Mapping[str, Any]) -> int:
    """How far a network with exact tiles sees, by its configuration; the networks say why."""
    if arch.tiling != "exact":
        return 0
    if arch.id == "miassr":
        return 2 * int(config.get("n_blocks", 16)) + 2 + int(config.get("kernel", 3)) // 2
    if arch.id == "msgan":
        of_extractor = 2 * int(config.get("n_blocks", 16)) + 2
        at_x2 = 1 + (of_extractor if config.get("extractors", 2) == 2 else 0)
        return of_extractor + 1 + (at_x2 + 1) // 2
    return OF_CYCLEGAN


def _bytes_per_pixel(arch: Arch, config: Mapping[str, Any], scale: int) -> int:
    """As measured for the variant at its scale; for other sizes, that of the method."""
    variant = arch.variant_of(config)
    for name in (f"{variant} x{scale}", str(variant)):
        if name in arch.working_bytes:
            return arch.working_bytes[name]
    return arch.bytes_per_pixel
