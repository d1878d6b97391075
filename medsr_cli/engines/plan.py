"""Tile and batch, from what a network takes and what may be used.

The working memory of a run grows with the pixels that are run at once: the traits say how fast, as measured. A plan
is the largest tile, and the most slices of it, that fit; more slices than help are not put together, and on the CPU
no more memory is taken than helps: tiles cost a few per cent of extra pixels, gigabytes would cost a user's machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from medsr_cli.engines.tiles import TilePlan, halo_spans
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError

MINIMUM_TILE = 64
FIXED_BYTES = 20_000_000
"""What a run takes however small it is: buffers of the libraries, and pages that the allocator keeps."""
USUAL_BYTES_PER_PIXEL = 6_000
"""For a network of which nothing is known."""
CPU_BYTES = (400_000_000, 600_000_000, 850_000_000)
"""Working memory on the CPU: the first with which tiles compute hardly more pixels than with the last."""
WORTH_IT = 1.1
"""Times as many pixels that are not worth more memory."""
ENOUGH_PIXELS = {"cpu": 64 * 64, "cuda": 64 * 64 * 32, "mps": 64 * 64 * 8}
"""Pixels at once that fill a device: slices are put together up to so many, more would not be faster."""


@dataclass(frozen=True)
class Plan:
    """How slices of one size are run."""

    side: int
    """Most pixels along a side of a tile, its surroundings left out; that of the slice where it is run whole."""
    batch: int
    """Slices, or tiles of as many slices, that are run at once."""
    pixels: int
    """Pixels of the largest tile and of what it has to see, padded as the network pads it."""


@dataclass(frozen=True)
class Means:
    """What a plan may use."""

    device: str
    """Such as `cpu` or `cuda:0`."""
    usable_bytes: int
    """Memory of the device that is free for this run."""
    limit_bytes: int | None = None
    """What the user allows for the working memory."""
    most_pixels: int | None = None
    """Pixels at once that have not failed, after more have."""


def plan_for(rows: int, columns: int, traits: Traits, means: Means, tile: int | None = None) -> Plan:
    """The largest tile and batch that fit.

    Args:
        rows: pixels of a slice, as the network gets it.
        columns: the same.
        traits: what the network takes.
        means: what may be used.
        tile: the side that is asked for; it is only cut down by a limit, or after a failure.

    Raises:
        ArgumentsError: the limit is too low for the smallest tile.
    """
    sides = _sides(rows, columns, traits, tile)
    allowed = _limit_pixels(traits, means)
    side = _largest(sides, rows, columns, traits, _pixels_within(rows, columns, traits, means, sides, tile))
    if tile is None:
        side = min(side, max(_own_length(n, side, traits) for n in (rows, columns)))
    pixels = tile_pixels(rows, columns, side, traits)
    if means.limit_bytes is not None and pixels > allowed:
        _refuse_limit(traits, pixels)
    most = min(allowed, means.most_pixels or allowed, _free_pixels(traits, means))
    enough = ENOUGH_PIXELS.get(kind_of(means.device), 1)
    return Plan(side, max(min(most, enough) // pixels, 1), pixels)


def slices_that_fill(device: str, rows: int, columns: int) -> int:
    """How many slices of a size keep a device busy."""
    return max(ENOUGH_PIXELS.get(kind_of(device), 1) // (rows * columns), 1)


def fewer_pixels(rows: int, columns: int, traits: Traits, plan: Plan, planes: int) -> int | None:
    """Pixels at once to go on with after a plan has failed; None where nothing smaller can be run.

    Half as many planes; where it was one alone, a tile of half the side, or the smallest one.
    """
    at_once = min(plan.batch, planes)
    if at_once > 1:
        return at_once // 2 * plan.pixels
    half = min(plan.side, max(rows, columns)) // 2
    sides = [side for side in _sides(rows, columns, traits, None)[1:] if side < plan.side]
    for side in [side for side in sides if side <= half] or sides[-1:]:
        pixels = tile_pixels(rows, columns, side, traits)
        if pixels < plan.pixels:
            return pixels
    return None


def kind_of(device: str) -> str:
    """`cpu`, `cuda` or `mps`, of names such as `cuda:0`."""
    return device.partition(":")[0]


def tile_pixels(rows: int, columns: int, side: int, traits: Traits) -> int:
    """Pixels that are run at once for the largest tile of a slice, its surroundings and padding with it."""
    return prod(_padded(max(end - start for start, end in _spans(n, side, traits)), traits) for n in (rows, columns))


def computed_share(rows: int, columns: int, side: int, traits: Traits) -> float:
    """Pixels computed for each pixel of the slice: what tiles cost."""
    return prod(sum(end - start for start, end in _spans(n, side, traits)) / n for n in (rows, columns))


def tiles_of(side: int, traits: Traits) -> TilePlan:
    """Overlapping tiles of at most this side, as the network's kind needs them.

    Where the result converges with the distance from a tile's rim (`blended`), half of the overlap is thrown away on
    either side; where it does not (`inexact`, `fixed`), seams are hidden by blending over all of it.
    """
    if traits.tiling == "fixed":
        return TilePlan(traits.side, traits.side // 4, 1, fixed=True)
    step = traits.size_multiple
    side, overlap = (-(-length // step) * step for length in (max(side, MINIMUM_TILE), traits.overlap))
    if traits.tiling == "blended":
        return TilePlan(side, overlap, step, margin=overlap // 2)
    return TilePlan(side, min(overlap, max(side // 2 // step, 1) * step), step)


def _spans(length: int, side: int, traits: Traits) -> list[tuple[int, int]]:
    """First and end of what is run for each tile along an axis."""
    if traits.tiling == "exact":
        return [(start, end) for _, _, start, end in halo_spans(length, side, traits.reach)]
    if traits.tiling != "fixed" and length <= side:
        return [(0, length)]
    plan = tiles_of(side, traits)
    length = max(length, traits.side)
    tile = plan.length_of_tile(length)
    return [(start, min(start + tile, length)) for start in plan.starts(length)]


def _own_length(length: int, side: int, traits: Traits) -> int:
    """The smallest side that cuts an axis into as many tiles."""
    if traits.tiling == "exact":
        return -(-length // -(-length // side))
    return traits.side if traits.tiling == "fixed" else tiles_of(side, traits).length_of_tile(length)


def _padded(length: int, traits: Traits) -> int:
    return -(-max(length, traits.smallest) // traits.size_multiple) * traits.size_multiple


def _sides(rows: int, columns: int, traits: Traits, tile: int | None) -> list[int]:
    """Sides of tiles that may be tried, from the largest; the first is the whole slice or what was asked for."""
    if traits.tiling == "fixed":
        return [traits.side]
    whole = max(rows, columns)
    first = min(tile or whole, whole)
    step = traits.size_multiple if traits.size_multiple > 1 else 8
    smaller = range((first - 1) // step * step, MINIMUM_TILE - 1, -step)
    return [first, *smaller]


def _largest(sides: list[int], rows: int, columns: int, traits: Traits, most_pixels: int) -> int:
    """The first side whose tiles have at most so many pixels; the last where none has."""
    fitting = (side for side in sides if tile_pixels(rows, columns, side, traits) <= most_pixels)
    return next(fitting, sides[-1])


def _pixels_within(rows: int, columns: int, traits: Traits, means: Means, sides: list[int], tile: int | None) -> int:
    """Pixels at once that a tile may have."""
    most = min(_limit_pixels(traits, means), means.most_pixels or _limit_pixels(traits, means))
    if tile is not None:
        return most
    most = min(most, _free_pixels(traits, means))
    # A network whose result tiles would change is run whole wherever there is room.
    if kind_of(means.device) != "cpu" or traits.tiling == "inexact":
        return most
    levels = [min(most, _pixels_in(n_bytes, traits)) for n_bytes in CPU_BYTES]
    costs = [computed_share(rows, columns, _largest(sides, rows, columns, traits, pixels), traits) for pixels in levels]
    return next(pixels for pixels, cost in zip(levels, costs, strict=True) if cost <= costs[-1] * WORTH_IT)


def _limit_pixels(traits: Traits, means: Means) -> int:
    if means.limit_bytes is None:
        return 2**62
    return _pixels_in(means.limit_bytes, traits)


def _free_pixels(traits: Traits, means: Means) -> int:
    return _pixels_in(means.usable_bytes, traits)


def _pixels_in(n_bytes: int, traits: Traits) -> int:
    return max(n_bytes - FIXED_BYTES, 0) // (traits.bytes_per_pixel or USUAL_BYTES_PER_PIXEL)


def _refuse_limit(traits: Traits, pixels: int) -> None:
    needed = (traits.bytes_per_pixel or USUAL_BYTES_PER_PIXEL) * pixels + FIXED_BYTES
    megabytes = -(-needed // 2**20)
    msg = f"The network takes about {megabytes} MiB for its smallest tile, more than the memory limit allows."
    raise ArgumentsError(msg, f"Give --max-vram {megabytes}M or more.")
