from fractions import Fraction

import pytest
import torch

from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.cohft_released import ReleasedCohft, ReleasedCohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.msgan_detector import LesionDetector, LesionDetectorConfig
from medsr_cli.networks.seg_unet import SegUnet, SegUnetConfig
from medsr_cli.training.batch import Batch
from medsr_cli.training.forward import forward
from tests.training.anatomy import tiny_network


def image(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch(side, scale, **given):
    return Batch(image(2, 1, side, side), image(2, 1, side * scale, side * scale, seed=1), **given)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_rdst_takes_the_image():
    net, given = tiny_network(), batch(16, 2)
    outputs = forward(net, given)
    assert torch.equal(outputs.image, net(given.low))
    assert not outputs.extras
    assert outputs.image.requires_grad


def test_m2trans_takes_the_image():
    net, given = M2Trans(M2TransConfig(n_feats=16, n_blocks=1, in_channels=1, scale=2)), batch(32, 2)
    assert torch.equal(forward(net, given).image, net(given.low))


def test_miassr_is_told_the_enlargement():
    net = Miassr(MiassrConfig(n_feats=8, n_blocks=1, hidden=8))
    given = Batch(image(2, 1, 10, 8), image(2, 1, 27, 20), ratio=(Fraction(27, 10), Fraction(20, 8)))
    outputs = forward(net, given)
    assert outputs.image.shape == given.high.shape
    assert torch.equal(outputs.image, net(given.low, (Fraction(27, 10), Fraction(5, 2))))
    assert not torch.equal(outputs.image[..., :20, :20], net(given.low, 2.5)[..., :20, :20])
    without = forward(net, Batch(given.low, given.high))
    assert torch.equal(without.image, outputs.image)


def test_msgan_gives_both_enlargements():
    net, given = MsGan(MsGanConfig(n_blocks=1, n_feats=8)).eval(), batch(8, 4)
    outputs = forward(net, given)
    assert outputs.image.shape == (2, 1, 32, 32)
    assert outputs.extras["x2"].shape == (2, 1, 16, 16)
    assert torch.allclose(outputs.image, net(given.low), atol=1e-6)


def test_cohft_takes_the_guide_and_gives_the_gradient():
    net = Cohft(CohftConfig(scale=2, stages=1, feature_dim=4, growth=4, rrdb_per_stage=1, rdbs=1, heads=2))
    given = batch(30, 2, guide=image(2, 1, 60, 60, seed=2))
    outputs = forward(net, given)
    assert torch.equal(outputs.image, net(given.low, given.guide))
    assert outputs.extras["gradient"].shape == (2, 1, 60, 60)
    other = forward(net, batch(30, 2, guide=image(2, 1, 60, 60, seed=3)))
    assert not torch.equal(outputs.image, other.image)
    with pytest.raises(ValueError, match="guide"):
        forward(net, batch(30, 2))


def test_the_released_cohft_too():
    with torch.device("meta"), torch.no_grad():  # a hundred million weights, of which only the shapes count
        net = ReleasedCohft(ReleasedCohftConfig(scale=2)).eval()
        low, high = torch.zeros(1, 1, net.side, net.side), torch.zeros(1, 1, 2 * net.side, 2 * net.side)
        given = Batch(low, high, guide=high)
        outputs = forward(net, given)
    assert outputs.image.shape == given.high.shape
    assert outputs.extras["gradient"].shape == given.high.shape


def test_segmentation_gives_logits():
    net = SegUnet(SegUnetConfig(classes=3, width=8)).eval()
    given = batch(32, 1)
    assert forward(net, given).image.shape == (2, 3, 32, 32)


def test_the_detectors_columns_and_rows_become_rows_and_columns():
    net = LesionDetector(LesionDetectorConfig(widths="4,4", hidden="8", side=16)).eval()
    given = batch(16, 1)
    x, y = net(given.low).unbind(dim=1)
    assert torch.equal(forward(net, given).image, torch.stack([y, x], dim=1))
