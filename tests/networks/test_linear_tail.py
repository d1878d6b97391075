"""Tails without activations as one convolution, against their stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medsr_cli.networks.linear_tail import composed, run_composed

SIZES = [(2, 2), (2, 7), (3, 3), (4, 5), (9, 16)]


def tail(channels: int, factors: tuple[int, ...], results: int) -> list[nn.Module]:
    torch.manual_seed(len(factors) + channels)
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [nn.Conv2d(channels, channels * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return [*layers, nn.Conv2d(channels, results, 3, padding=1), nn.Conv2d(results, results, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("channels", "factors", "results"), [(6, (2, 2), 1), (5, (2,), 4), (4, (3,), 2), (4, (2, 2, 2), 1), (3, (), 1)]
)
def test_equals_its_stages_at_every_pixel(channels, factors, results, size):
    layers = tail(channels, factors, results)
    features = torch.randn(2, channels, *size)
    with torch.no_grad():
        expected = nn.Sequential(*layers)(features)
        found = run_composed(composed(layers), features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_biases_count_at_the_borders():
    """Zeros in: only biases are left, and those of the first and last pixels differ from the inner ones."""
    layers = tail(6, (2, 2), 1)
    with torch.no_grad():
        expected = nn.Sequential(*layers)(torch.zeros(1, 6, 6, 6))
        found = run_composed(composed(layers), torch.zeros(1, 6, 6, 6))
    assert not torch.allclose(expected[..., 0, 0], expected[..., 12, 12], atol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_half_precision_weights_are_composed_in_single():
    layers = [layer.bfloat16() for layer in tail(6, (2, 2), 1)]
    kernels = composed(layers).kernels
    assert kernels.dtype == torch.bfloat16
    single = composed([layer.float() for layer in layers]).kernels
    torch.testing.assert_close(kernels, single.bfloat16())


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, groups=2)], ids=str)
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="composed tail"):
        composed([nn.Conv2d(4, 4, 3, padding=1), layer])
