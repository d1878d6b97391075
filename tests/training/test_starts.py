"""A new network that starts as interpolation enlarges a smooth image nearly as bilinear interpolation does."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.nn.functional import interpolate

from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.training.starts import begin_as_interpolation


def smooth(channels: int = 1, side: int = 32) -> torch.Tensor:
    """A band-limited image in [0.2, 0.8], another one in each channel, higher than wide."""
    y = torch.linspace(0, 3, side + 2)[:, None]
    x = torch.linspace(0, 2, side)[None]
    planes = [0.5 + 0.2 * torch.sin(y * (1 + c)) + 0.1 * torch.cos(x * 2 - c) for c in range(channels)]
    return torch.stack(planes)[None]


def error(result: torch.Tensor, image: torch.Tensor, scale: int) -> float:
    """Largest difference from bilinear interpolation away from the border."""
    expected = interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
    margin = 2 * scale
    return float((result - expected)[..., margin:-margin, margin:-margin].abs().max())


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_m2trans(scale: int, channels: int):
    torch.manual_seed(1)
    net = M2Trans(M2TransConfig(n_feats=64, n_blocks=2, scale=scale, in_channels=channels)).eval()
    image = smooth(channels)
    with torch.no_grad():
        before = error(net(image), image, scale)
        begin_as_interpolation(net)
        assert error(net(image), image, scale) < 0.06 < before


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_cohft(scale: int):
    torch.manual_seed(1)
    config = CohftConfig(scale=scale, stages=2, feature_dim=16, growth=16, rrdb_per_stage=1, rdbs=2, convs=3)
    net = Cohft(config).eval()
    image = smooth(1, 30)
    guide = torch.rand(1, 1, scale * 32, scale * 30)
    with torch.no_grad():
        before = error(net(image, guide), image, scale)
        begin_as_interpolation(net)
        assert error(net(image, guide), image, scale) < 0.06 < before


@pytest.mark.parametrize("extractors", [1, 2])
def test_msgan(extractors: int):
    torch.manual_seed(1)
    net = MsGan(MsGanConfig(n_blocks=2, extractors=extractors)).eval()
    image = smooth()
    with torch.no_grad():
        before = error(net(image), image, 4)
        begin_as_interpolation(net)
        at_x2, at_x4 = net.stages(image)
        assert error(at_x4, image, 4) < 0.08 < before
        assert error(at_x2, image, 2) < 0.06


@pytest.mark.parametrize("channels", [1, 4])
def test_miassr_takes_the_nearest_pixel(channels: int):
    torch.manual_seed(1)
    net = Miassr(MiassrConfig(n_blocks=2, in_channels=channels)).eval()
    image = smooth(channels)
    ratio = (Fraction(3, 2), Fraction(2))
    with torch.no_grad():
        begin_as_interpolation(net)
        result = net(image, ratio)
    nearest = image[:, :, torch.arange(result.shape[2]) * 2 // 3][..., torch.arange(result.shape[3]) // 2]
    assert float((result - nearest)[..., 4:-4, 4:-4].abs().max()) < 0.1


def test_every_weight_that_should_learn_gets_a_gradient():
    torch.manual_seed(1)
    net = M2Trans(M2TransConfig(n_feats=64, n_blocks=1, scale=4))
    begin_as_interpolation(net)
    net(torch.rand(1, 3, 32, 32)).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert silent == []


def test_what_cannot_start_so_is_refused():
    with pytest.raises(ValueError, match="cannot start"):
        begin_as_interpolation(Rdst(RdstConfig(n_rdstb=1)))
    with pytest.raises(ValueError, match="features"):
        begin_as_interpolation(M2Trans(M2TransConfig(n_feats=16, n_blocks=1, scale=2)))
