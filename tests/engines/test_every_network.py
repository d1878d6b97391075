"""Every network as the engine runs it: a run leaves nothing behind that another run would see."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from medsr_cli.engines.torch_runner import TorchRunner
from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig

SMALL_COHFT = {"scale": 2, "stages": 2, "rrdb_per_stage": 1, "rdbs": 1, "convs": 3, "heads": 2, "window": 2, "patch": 3}
MAKERS = {
    "rdst": lambda: Rdst(RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=3)),
    "miassr": lambda: Miassr(MiassrConfig(n_blocks=1, n_feats=8, hidden=16)),
    "msgan": lambda: MsGan(MsGanConfig(n_blocks=2, n_feats=8)),
    "msgan, as trained here": lambda: MsGan(MsGanConfig(n_blocks=2, n_feats=64, norm="none")),
    "m2trans": lambda: M2Trans(M2TransConfig(n_feats=16, n_blocks=1, in_channels=1)),
    "m2trans, paper's width": lambda: M2Trans(M2TransConfig(n_blocks=1, in_channels=1)),
    "uscyclegan": lambda: Generator(GeneratorConfig(in_channels=1, width1=4, width2=8, width3=6)),
    "cohft": lambda: Cohft(CohftConfig(feature_dim=4, growth=3, **SMALL_COHFT)),
    "cohft, wide enough for Winograd": lambda: Cohft(CohftConfig(feature_dim=8, growth=24, **SMALL_COHFT)),
}
SIZES = [(1, 32, 32), (3, 32, 32), (1, 60, 44), (1, 17, 90), (2, 64, 64), (1, 32, 32), (1, 60, 44), (3, 32, 32)]
"""Planes, rows and columns, one after another; most come again after others."""


@pytest.fixture(scope="module", params=MAKERS)
def network(request) -> torch.nn.Module:
    torch.manual_seed(7)
    net = MAKERS[request.param]().eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data *= 1.5  # far enough from where they begin for attention to choose
    return net


def given(net: torch.nn.Module, size: tuple[int, int, int]) -> list[np.ndarray]:
    n, rows, columns = size
    rng = np.random.default_rng(rows)
    inputs = [rng.random((n, 1, rows, columns), np.float32)]
    if isinstance(net, Cohft):
        scale = net.config.scale
        inputs.append(rng.random((n, 1, rows * scale, columns * scale), np.float32))
    return inputs


def test_results_depend_on_nothing_but_the_input(network):
    runner = TorchRunner(copy.deepcopy(network), device="cpu", stages=isinstance(network, MsGan))
    sizes = SIZES[:4] + SIZES[5:] if isinstance(network, Cohft) else SIZES
    seen: dict[tuple[int, int, int], np.ndarray] = {}
    for size in sizes:
        inputs = given(network, size)
        kept = [array.copy() for array in inputs]
        first, second = runner.run(*inputs)[-1].copy(), runner.run(*inputs)[-1].copy()
        assert np.array_equal(first, second), size
        assert all(np.array_equal(a, b) for a, b in zip(inputs, kept, strict=True)), "the input was changed"
        assert np.array_equal(seen.setdefault(size, first), first), f"{size} after other sizes"


@pytest.mark.parametrize("size", SIZES[:3])
def test_what_the_engine_runs_is_the_network(network, size):
    runner = TorchRunner(copy.deepcopy(network), device="cpu", stages=isinstance(network, MsGan))
    inputs = given(network, size)
    with torch.enable_grad():  # the form that trains, which is the one that is written from the paper
        expected = network(*map(torch.from_numpy, inputs)).detach().numpy()
    for _ in range(2):
        np.testing.assert_allclose(runner.run(*inputs)[-1], expected, atol=1e-5 * np.ptp(expected))


def test_one_plane_is_what_it_is_among_others(network):
    runner = TorchRunner(copy.deepcopy(network), device="cpu", stages=isinstance(network, MsGan))
    inputs = given(network, (3, 32, 32))
    together = runner.run(*inputs)[-1]
    for i in range(3):
        alone = runner.run(*(array[i : i + 1] for array in inputs))[-1]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5 * np.ptp(together))
