"""Plans: never more than may be used, never less than would fit, and only as many slices at once as help."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medsr_cli.engines.plan import (
    CPU_BYTES,
    FIXED_BYTES,
    MINIMUM_TILE,
    Means,
    computed_share,
    fewer_pixels,
    plan_for,
    tile_pixels,
    tiles_of,
)
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError
from medsr_cli.networks.catalogue import CATALOGUE

BLENDED = Traits(4, tiling="blended", bytes_per_pixel=5_000)
EXACT = Traits(4, tiling="exact", bytes_per_pixel=2_000, reach=35, size_multiple=1)
INEXACT = Traits(4, tiling="inexact", bytes_per_pixel=3_000, size_multiple=32, overlap=32)
FIXED = Traits(4, tiling="fixed", bytes_per_pixel=60_000, side=60, size_multiple=1)
KINDS = {"blended": BLENDED, "exact": EXACT, "inexact": INEXACT, "fixed": FIXED}
PLENTY = 2**40

sizes = st.integers(1, 900)
kinds = st.sampled_from(list(KINDS.values()))
devices = st.sampled_from(["cpu", "cuda:1", "mps"])


def taken(plan, traits) -> int:
    return FIXED_BYTES + traits.bytes_per_pixel * plan.pixels * plan.batch


@given(rows=sizes, columns=sizes, traits=kinds, device=devices, limit=st.integers(10**6, 4 * 10**9))
def test_a_limit_is_never_exceeded(rows, columns, traits, device, limit):
    try:
        plan = plan_for(rows, columns, traits, Means(device, PLENTY, limit))
    except ArgumentsError as error:
        assert "--max-vram" in error.remedy  # noqa: PT017 - one of both must hold
        smallest = plan_for(rows, columns, traits, Means(device, PLENTY, most_pixels=1))
        assert taken(smallest, traits) > limit
    else:
        assert taken(plan, traits) <= limit


@given(rows=sizes, columns=sizes, traits=kinds, limit=st.integers(10**8, 4 * 10**9), tile=st.integers(64, 900))
def test_a_tile_that_is_asked_for_stays_within_the_limit_too(rows, columns, traits, limit, tile):
    try:
        plan = plan_for(rows, columns, traits, Means("cuda:0", PLENTY, limit), tile)
    except ArgumentsError:
        return
    assert taken(plan, traits) <= limit
    assert traits.tiling == "fixed" or plan.side <= tile


@given(rows=sizes, columns=sizes, traits=kinds)
def test_with_plenty_of_memory_a_gpu_takes_slices_whole(rows, columns, traits):
    plan = plan_for(rows, columns, traits, Means("cuda:0", PLENTY))
    assert traits.tiling == "fixed" or plan.side >= max(rows, columns)
    assert plan.batch == 1 or plan.batch * plan.pixels <= 64 * 64 * 32


@given(
    rows=st.integers(400, 900), columns=st.integers(1, 900), traits=st.sampled_from([BLENDED, EXACT, INEXACT]),
    free=st.integers(10**8, 3 * 10**8),
)  # fmt: skip
def test_the_next_larger_tile_would_not_fit(rows, columns, traits, free):
    plan = plan_for(rows, columns, traits, Means("cuda:0", free))
    step = max(traits.size_multiple, 8)
    sides = range((plan.side // step + 1) * step, max(rows, columns) + step, step)
    larger = [pixels for side in sides if (pixels := tile_pixels(rows, columns, side, traits)) > plan.pixels]
    assert FIXED_BYTES + traits.bytes_per_pixel * plan.pixels <= free
    assert all(FIXED_BYTES + traits.bytes_per_pixel * pixels > free for pixels in larger[:1])


@given(rows=sizes, columns=sizes, traits=kinds, tile=st.integers(64, 1000))
def test_a_tile_is_honoured_and_one_larger_than_the_slice_is_the_whole(rows, columns, traits, tile):
    assume(traits.tiling != "fixed")
    plan = plan_for(rows, columns, traits, Means("cpu", 0), tile)
    assert plan.side == min(tile, max(rows, columns))


@given(rows=sizes, columns=sizes, traits=kinds, side=st.integers(64, 600))
def test_pixels_of_a_tile_are_those_of_the_largest_that_is_cut(rows, columns, traits, side):
    assume(max(rows, columns) > side or traits.tiling == "fixed")
    tiles = tiles_of(side, traits)
    if traits.tiling == "exact":
        return
    extent = [min(tiles.length_of_tile(max(n, traits.side)), max(n, traits.side)) for n in (rows, columns)]
    padded = [-(-n // traits.size_multiple) * traits.size_multiple for n in extent]
    assert tile_pixels(rows, columns, side, traits) == padded[0] * padded[1]


@given(rows=sizes, columns=sizes, traits=kinds, planes=st.integers(1, 40), device=devices)
def test_every_failure_leads_to_fewer_pixels_until_nothing_smaller_is_left(rows, columns, traits, planes, device):
    """Batches first, then tiles; and it ends."""
    plan = plan_for(rows, columns, traits, Means(device, PLENTY))
    for _ in range(60):
        at_once = min(plan.batch, planes)
        most = fewer_pixels(rows, columns, traits, plan, planes)
        if most is None:
            assert at_once == 1
            break
        assert most < at_once * plan.pixels
        then = plan_for(rows, columns, traits, Means(device, PLENTY, most_pixels=most))
        assert then.batch * then.pixels <= most
        assert at_once == 1 or then.side == plan.side
        plan = then
    else:
        pytest.fail("it never gives up")


def test_the_smallest_tile_is_tried_before_giving_up():
    plan = plan_for(100, 100, BLENDED, Means("cpu", PLENTY))
    most = fewer_pixels(100, 100, BLENDED, plan, 1)
    then = plan_for(100, 100, BLENDED, Means("cpu", PLENTY, most_pixels=most))
    assert then.side == MINIMUM_TILE
    assert fewer_pixels(64, 64, BLENDED, plan_for(64, 64, BLENDED, Means("cpu", PLENTY)), 1) is None


def test_the_cpu_takes_no_more_memory_than_it_needs():
    """A 512 x 512 slice of RDST: four tiles. Much more memory only where tiles would cost much more."""
    plan = plan_for(512, 512, BLENDED, Means("cpu", PLENTY))
    assert plan.side == 280
    assert taken(plan, BLENDED) <= CPU_BYTES[1]
    assert computed_share(512, 512, plan.side, BLENDED) < 1.2
    assert taken(plan_for(250, 250, BLENDED, Means("cpu", PLENTY)), BLENDED) <= CPU_BYTES[0]
    assert plan_for(512, 512, EXACT, Means("cpu", PLENTY)).side == 512, "150 MB more save a quarter of the work"
    greedy = Traits(4, tiling="exact", bytes_per_pixel=11_000, reach=53, size_multiple=1)
    plan = plan_for(512, 512, greedy, Means("cpu", PLENTY))
    assert CPU_BYTES[0] < taken(plan, greedy) <= CPU_BYTES[-1]


def test_a_network_that_tiles_change_takes_whole_slices_while_there_is_room():
    assert plan_for(700, 700, INEXACT, Means("cpu", PLENTY)).side == 700
    assert plan_for(700, 700, INEXACT, Means("cpu", 10**9)).side < 700


def test_little_free_memory_is_no_reason_to_refuse():
    """An estimate may be wrong; a limit is an order."""
    for traits in KINDS.values():
        plan = plan_for(300, 300, traits, Means("cpu", 0))
        assert plan.batch == 1
        assert plan.side < MINIMUM_TILE + 40
        with pytest.raises(ArgumentsError):
            plan_for(300, 300, traits, Means("cpu", PLENTY, limit_bytes=FIXED_BYTES))


def test_small_slices_are_put_together_as_far_as_that_helps():
    assert plan_for(32, 32, BLENDED, Means("cpu", PLENTY)).batch == 4
    assert plan_for(32, 32, BLENDED, Means("cuda:0", PLENTY)).batch == 128
    assert plan_for(32, 32, BLENDED, Means("cuda:0", FIXED_BYTES + 5_000 * 32 * 32 * 7)).batch == 7
    assert plan_for(200, 200, BLENDED, Means("cpu", PLENTY)).batch == 1


@pytest.mark.parametrize("arch", [arch for arch in CATALOGUE if arch.kind == "network"], ids=lambda arch: arch.id)
def test_the_catalogue_says_what_every_network_takes(arch):
    assert 500 <= arch.bytes_per_pixel <= 100_000
    assert all(name.split(" x")[0] in arch.variants for name in arch.working_bytes)
    assert max(arch.working_bytes.values(), default=0) <= arch.bytes_per_pixel
    assert arch.overlap % 2 == 0
