"""Winograd convolutions against direct ones, and the Cohf-T made of them against the plain one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch does
from torch import nn

from medsr_cli.networks import cohft, cohft_released
from medsr_cli.networks.cohft_blocks import Rrdb
from medsr_cli.networks.cohft_ready import WinogradRrdb, ready_for_cpu
from medsr_cli.networks.winograd import KEPT_SIZES, BufferPool, Buffers, DenseChain, Size, interpolation
from tests.networks import test_cohft, test_cohft_released


@pytest.mark.parametrize("points", [(0.0, 1.0, -1.0), (0.0, 0.625, -0.625, 1.5, -1.5)])
def test_interpolation_gives_a_correlation(points):
    a, g, b = interpolation(points)
    inputs, kernel = torch.rand(len(points) + 1).double(), torch.rand(3).double()
    found = a @ ((g @ kernel) * (b @ inputs))
    torch.testing.assert_close(found, inputs.unfold(0, 3, 1) @ kernel)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 8), (5, 3), (70, 66)])
def test_a_chain_is_its_convolutions(height, width):
    """Also where tiles reach over the edge, images share a strip, and a strip is not the whole image."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)]
    x = torch.rand(3, 3, height, width)
    buffers = Buffers(Size(3, height, width, 3, 2, 3))
    with torch.no_grad():
        for _ in range(2):  # nothing is left over from the first time
            buffers.maps.inner.copy_(x.permute(0, 2, 3, 1))
            DenseChain(convs, 0.2)(buffers)
        dense = x
        for conv in convs[:-1]:
            dense = torch.cat((dense, F.gelu(conv(dense))), dim=1)
        expected = x + 0.2 * convs[-1](dense)
    torch.testing.assert_close(buffers.maps.inner.permute(0, 3, 1, 2), expected, atol=2e-6, rtol=1e-5)


def test_rounding_is_that_of_direct_convolutions():
    """On the widths of L, against float64: no more than twice the error of PyTorch's own convolutions."""
    torch.manual_seed(0)
    plain = Rrdb(32, 32, 2, 5).eval()
    x = torch.rand(1, 32, 20, 24)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(x.double())
        direct = (plain(x) - exact).abs().max()
        assert (WinogradRrdb(plain, BufferPool())(x) - exact).abs().max() <= 2 * direct + 1e-7


def test_a_pool_keeps_few_sizes_and_gives_nothing_twice():
    pool, sizes = BufferPool(), [Size(1, side, side, 2, 2, 2) for side in range(4, 12)]
    for size in sizes:
        pool.give_back(size, pool.take(size))
    assert len(pool._kept) == KEPT_SIZES
    first, second = pool.take(sizes[-1]), pool.take(sizes[-1])
    assert first is not second
    huge = Size(1, 1, 100_000, 1, 1, 2)
    pool.give_back(huge, first)
    assert all(size != huge for size, _ in pool._kept)


def test_threads_do_not_disturb_each_other():
    torch.manual_seed(0)
    rrdb = WinogradRrdb(Rrdb(4, 3, 2, 3).eval(), BufferPool())
    images = [torch.rand(1, 4, 9, 9) for _ in range(4)]
    expected, found = [rrdb(image) for image in images], {}

    def run(i: int) -> None:
        for _ in range(20):
            found[i] = rrdb(images[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("smallest_growth", [1, 24])  # Winograd for every block, and for none
@pytest.mark.parametrize("size", [(6, 6), (13, 20), (1, 3)])
def test_paper_network_made_ready_is_the_same(size, smallest_growth):
    net = test_cohft.tiny()
    image, guide = test_cohft.inputs(*size, batch=2)
    with torch.inference_mode():
        expected = net.with_gradient(image, guide)
        ready = ready_for_cpu(copy.deepcopy(net), smallest_growth)
        found = ready.with_gradient(image, guide)
        assert torch.equal(ready(image, guide), found[0])
    assert any(isinstance(m, WinogradRrdb) for m in ready.modules()) == (smallest_growth == 1)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * (b.max() - b.min())


@pytest.mark.parametrize("smallest_growth", [1, 24])
def test_released_network_made_ready_is_the_same(smallest_growth):
    net, (image, guide) = test_cohft_released.tiny(), test_cohft_released.inputs()
    with torch.inference_mode():
        expected = net(image, guide)
        found = ready_for_cpu(copy.deepcopy(net), smallest_growth)(image, guide)
    assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_wide_blocks_are_exchanged_and_narrow_ones_kept():
    wide = cohft.made_ready(cohft.Cohft(cohft.CohftConfig(scale=2, stages=1, rrdb_per_stage=1, rdbs=1, convs=2)).eval())
    narrow = cohft_released.made_ready(test_cohft_released.tiny())
    assert any(isinstance(m, WinogradRrdb) for m in wide.modules())
    assert not any(isinstance(m, WinogradRrdb) for m in narrow.modules())
    assert wide.config.scale == 2
    assert narrow.side == 6


def test_other_precisions_are_left_as_they_are():
    net = test_cohft.tiny().double()
    before = list(net.modules())
    assert cohft.made_ready(net) is net
    assert list(net.modules()) == before
