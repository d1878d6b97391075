"""What an engine has to know of a network beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from medsr_cli.networks.catalogue import Arch, Tiling


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
        config = net.config
        any_scale = arch.scale_range is not None
        scale = 1 if any_scale else int(getattr(config, "scale", max(arch.scales)))
        return cls(
            scale=scale,
            channels=int(getattr(config, "in_channels", 1)),
            tiling=arch.tiling,
            smallest=arch.smallest,
            guided="guide" in arch.needs,
            bytes_per_pixel=_bytes_per_pixel(arch, config, scale),
            reach=int(getattr(net, "reach", 0)),
            side=int(net.side) if arch.tiling == "fixed" else 0,
            first_stage=arch.first_stage,
            enlarged_first=arch.enlarged_first,
            any_scale=any_scale,
            rounding=str(getattr(config, "rounding", "exact")),
            size_multiple=arch.size_multiple,
            overlap=arch.overlap,
        )


def _bytes_per_pixel(arch: Arch, config: Any, scale: int) -> int:
    """As measured for the variant at its scale; for other sizes, that of the method."""
    variant = arch.variant_of(asdict(config)) if is_dataclass(config) and not isinstance(config, type) else None
    for name in (f"{variant} x{scale}", str(variant)):
        if name in arch.working_bytes:
            return arch.working_bytes[name]
    return arch.bytes_per_pixel
