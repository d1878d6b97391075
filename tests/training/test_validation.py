import numpy as np
import pytest
import torch
from torch import nn

from medsr_cli.evaluation.metrics import psnr, ssim
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.validation import mean_gain_db, spread, validate
from medsr_cli.volume.resample import resize, shrink
from tests.training.anatomy import packed


class Cubic(nn.Module):
    """Bicubic as a network, a little brighter if told so."""

    def __init__(self, scale, add=0.0):
        super().__init__()
        self.scale, self.add, self.calls = scale, nn.Parameter(torch.tensor(add)), 0

    def forward(self, low):
        self.calls += 1
        h, w = low.shape[-2:]
        big = resize(low.numpy(), (h * self.scale, w * self.scale))
        return torch.from_numpy(big) + self.add


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    path = packed(tmp_path_factory.mktemp("pack") / "p.safetensors", subjects=2, volumes=2, side=(46, 41))
    return PackedSlices(path)


def test_bicubic_as_a_network_gains_nothing(slices):
    scores = validate(Cubic(4), slices, slices.indices_of(["s0", "s1"]), 4)
    assert len(scores) == 4
    assert all(abs(score.gain_db) < 1e-6 for score in scores)
    assert [score.slices for score in scores] == [3] * 4


def test_figures_are_the_protocols(slices):
    (score,) = validate(Cubic(2, 0.01), slices, slices.indices_of(["s1"])[:1], 2)
    high = slices.slice(int(slices.indices_of(["s1"])[0]))[:46, :40]
    low = shrink(high, (23, 20))
    result = resize(low, (46, 40)) + np.float32(0.01)
    assert score.psnr == pytest.approx(psnr(result[2:-2, 2:-2], high[2:-2, 2:-2]), abs=1e-6)
    assert score.bicubic_ssim == pytest.approx(ssim(resize(low, (46, 40)), high, 2), abs=1e-9)
    assert mean_gain_db([score]) == score.psnr - score.bicubic_psnr


def test_bicubic_is_measured_once(slices, monkeypatch):
    known = {}
    held = slices.indices_of(["s0"])
    first = validate(Cubic(2), slices, held, 2, 2, known)
    assert len(known) == 4
    monkeypatch.setattr("medsr_cli.training.validation.resize", None)
    net = Cubic(2)
    assert [s.bicubic_psnr for s in validate(net, slices, held, 2, 2, known)] == [s.bicubic_psnr for s in first]
    assert net.calls == 4


def test_training_mode_comes_back(slices):
    net = Cubic(2).train()
    validate(net, slices, slices.indices_of(["s0"])[:1], 2)
    assert net.training


def test_volumes_without_a_slice_that_can_be_measured_are_left_out(tmp_path):
    small = PackedSlices(packed(tmp_path / "p.safetensors", subjects=2, side=(16, 14)))
    assert validate(Cubic(4), small, small.indices_of(["s0", "s1"]), 4) == []


@pytest.mark.parametrize(("n", "most", "expected"), [(10, 0, 10), (3, 5, 3), (10, 4, 4), (10, 1, 1)])
def test_spread(n, most, expected):
    chosen = spread(np.arange(100, 100 + n), most)
    assert len(set(chosen)) == expected
    assert chosen[0] == 100
