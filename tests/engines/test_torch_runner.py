"""A network through PyTorch: precisions, deterministic runs, limits, and graphs where they are (pretended here)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from medsr_cli.engines import torch_runner
from medsr_cli.engines.cuda_graphs import Graphs
from medsr_cli.engines.torch_runner import TorchRunner, TorchSettings
from medsr_cli.networks.rdst import Rdst, RdstConfig


class Noted(nn.Module):
    """Doubles, and keeps the batches that it got and what PyTorch was set to."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.batches: list[int] = []
        self.deterministic: list[bool] = []

    def forward(self, image, guide=None):
        self.batches.append(len(image))
        self.deterministic.append(torch.are_deterministic_algorithms_enabled())
        return self.factor * image if guide is None else self.factor * image + guide

    def stages(self, image):
        return image, self(image)


def planes_of(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(count).random((count, 1, side, side))


def test_bfloat16_runs_weights_and_values_in_it():
    runner = TorchRunner(Noted(), device="cpu", precision="bf16")
    assert runner.precision == "bfloat16"
    assert runner.net.factor.dtype is torch.bfloat16
    assert "not measured" in runner.warnings[0]
    planes = planes_of(2)
    (result,) = runner.run(planes)
    assert result.dtype == np.float32
    expected = 2 * torch.from_numpy(planes).float().bfloat16().float().numpy()
    assert np.array_equal(result, expected)
    assert not np.array_equal(result, 2 * planes.astype(np.float32))


def test_bfloat16_of_a_network_is_near_float32():
    torch.manual_seed(0)
    net = Rdst(RdstConfig(n_rdstb=1, dstb_per_rdstb=1))
    planes = planes_of(2, 16)
    (single,) = TorchRunner(net, device="cpu", precision="fp32").run(planes)
    (half,) = TorchRunner(net, device="cpu", precision="bf16").run(planes)
    assert 0 < np.abs(single - half).max() < 0.02 * np.abs(single).max()


def test_auto_is_float32_without_a_card():
    runner = TorchRunner(Noted(), device="cpu")
    assert (runner.precision, runner.warnings) == ("float32", [])


def test_inputs_of_any_width_and_ones_that_cannot_be_written_to():
    runner = TorchRunner(Noted(), device="cpu")
    for dtype in (np.float64, np.float32, np.float16):
        planes = planes_of(1).astype(dtype)
        planes.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (result,) = runner.run(planes)
        np.testing.assert_allclose(result, 2 * planes.astype(np.float32))


def test_deterministic_batches_are_of_one_size_and_give_only_what_was_asked():
    net = Noted()
    runner = TorchRunner(net, device="cpu", settings=TorchSettings(deterministic=True))
    for count in (4, 4, 1, 3):
        planes = planes_of(count)
        (result,) = runner.run(planes)
        np.testing.assert_allclose(result, 2 * planes, rtol=1e-6)
    runner.run(planes_of(2, side=6))
    assert net.batches == [4, 4, 4, 4, 2]
    assert all(net.deterministic)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_runs_fill_up_the_guide_too():
    runner = TorchRunner(Noted(), device="cpu", settings=TorchSettings(deterministic=True))
    runner.run(planes_of(3), planes_of(3))
    planes, guide = planes_of(2), planes_of(2) + 1
    (result,) = runner.run(planes, guide)
    np.testing.assert_allclose(result, 2 * planes + guide, rtol=1e-6)


def test_after_memory_ran_out_batches_may_be_smaller():
    net = Noted()
    runner = TorchRunner(net, device="cpu", settings=TorchSettings(deterministic=True))
    runner.run(planes_of(4))
    runner.release()
    runner.run(planes_of(2))
    assert net.batches == [4, 2]


def test_other_runs_take_batches_as_they_come():
    net = Noted()
    runner = TorchRunner(net, device="cpu")
    for count in (4, 1):
        runner.run(planes_of(count))
    assert net.batches == [4, 1]
    assert not any(net.deterministic)


def test_deterministic_results_are_those_of_other_runs():
    torch.manual_seed(0)
    net = Rdst(RdstConfig(n_rdstb=1, dstb_per_rdstb=1))
    planes = planes_of(1, 12)
    (usual,) = TorchRunner(net, device="cpu").run(planes)
    runner = TorchRunner(net, device="cpu", settings=TorchSettings(deterministic=True))
    (once,), (twice,) = runner.run(planes), runner.run(planes)
    np.testing.assert_allclose(once, usual, atol=1e-6)
    assert np.array_equal(once, twice)


def test_plans_keep_to_the_limit(monkeypatch):
    monkeypatch.setattr(torch_runner, "usable_bytes", lambda device: 1000)
    assert TorchRunner(Noted(), device="cpu").usable_bytes() == 1000
    for limit, usable in ((400, 400), (5000, 1000)):
        runner = TorchRunner(Noted(), device="cpu", settings=TorchSettings(max_bytes=limit))
        assert runner.usable_bytes() == usable


def test_every_result_comes_back_with_stages():
    planes = planes_of(2)
    first, last = TorchRunner(Noted(), device="cpu", stages=True).run(planes)
    np.testing.assert_allclose(last, 2 * first, rtol=1e-6)


def test_graphs_that_fail_are_told_once_and_change_nothing():
    def refuse(forward, inputs):
        msg = "operation not permitted when stream is capturing"
        raise RuntimeError(msg)

    runner = TorchRunner(Noted(), device="cpu")
    runner._forward = Graphs(runner._forward, refuse, eager_runs=1)
    planes = planes_of(1)
    for _ in range(4):
        np.testing.assert_allclose(runner.run(planes)[0], 2 * planes, rtol=1e-6)
    assert len(runner.warnings) == 1
    assert "not permitted" in runner.warnings[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_gives_what_the_network_gives(precision):
    torch.manual_seed(0)
    config = RdstConfig(n_rdstb=1, dstb_per_rdstb=1)
    net = Rdst(config)
    state = net.state_dict()

    def runner(graphs: bool) -> TorchRunner:
        own = Rdst(config)
        own.load_state_dict(state)
        return TorchRunner(own, device="cuda", precision=precision, settings=TorchSettings(graphs=graphs))

    with_graphs, without = runner(True), runner(False)
    kept = []
    for seed in range(8):
        planes = np.random.default_rng(seed).random((2, 1, 24, 24))
        kept.append((with_graphs.run(planes)[0], without.run(planes)[0]))
    for one, other in kept:
        np.testing.assert_allclose(one, other, atol=1e-5 if precision == "fp32" else 1e-2)
    assert with_graphs.warnings == without.warnings
