"""M2Trans, MS-GAN and the ultrasound CycleGAN's generator through ONNX Runtime: one file for every batch and size."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import medsr_cli
from medsr_cli.engines.onnx_export import OPSET, exported
from medsr_cli.networks import load_network, m2trans, msgan, uscyclegan
from medsr_cli.networks.graph import ENLARGED, IMAGE, INTERMEDIATE, GraphForm
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.m2trans_ready import GraphM2Trans
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig
from tests.networks.golden import assert_close

SHARE = 2e-5
"""Largest difference as a part of the range; engines may be 1e-4 apart, a right graph is about 2e-6."""
SIZES = [(1, 1, 1), (3, 1, 40), (1, 16, 17), (2, 5, 33), (1, 31, 64), (2, 32, 32), (1, 65, 20), (1, 37, 70)]
"""Batches, rows and columns; around 17 and 32, where M2Trans begins to pad otherwise."""
CHECKPOINTS = Path(medsr_cli.__file__).parent / "checkpoints"

NETWORKS = {
    "m2trans": lambda: M2Trans(M2TransConfig(n_feats=16, n_blocks=2, scale=4)),
    "m2trans x3, grey, small blocks": lambda: M2Trans(
        M2TransConfig(n_feats=8, n_blocks=1, block_size=4, in_channels=1, scale=3)
    ),
    "msgan": lambda: MsGan(MsGanConfig(n_blocks=2, n_feats=8)),
    "msgan, one extractor": lambda: MsGan(MsGanConfig(extractors=1, n_blocks=1, n_feats=6, in_channels=3)),
    "uscyclegan": lambda: Generator(GeneratorConfig(width1=4, width2=8, width3=6)),
    "uscyclegan, bent": lambda: Generator(
        GeneratorConfig(in_channels=1, width1=4, width2=5, width3=6, negative_slope=0.2)
    ),
}


@cache
def network(name: str) -> nn.Module:
    """With running statistics and shifts that a graph without them would be found out by."""
    torch.manual_seed(4)
    net = NETWORKS[name]().eval()
    for key, value in net.state_dict().items():
        if "norm" in key:
            value.copy_(0.5 + torch.rand(value.shape))
    return net


def form_of(net: nn.Module) -> GraphForm:
    return {M2Trans: m2trans, MsGan: msgan, Generator: uscyclegan}[type(net)].graph_form(net)


@cache
def session(name: str) -> ort.InferenceSession:
    return session_of(exported(form_of(network(name))))


def session_of(data: bytes) -> ort.InferenceSession:
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert {item.domain: item.version for item in model.opset_import} == {"": OPSET}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def results_of(net: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        if isinstance(net, MsGan):
            return dict(zip((INTERMEDIATE, ENLARGED), net.stages(image), strict=True))
        return {ENLARGED: net(image)}


def assert_same(run: ort.InferenceSession, net: nn.Module, image: torch.Tensor) -> None:
    wanted = results_of(net, image)
    assert [output.name for output in run.get_outputs()] == list(wanted)
    for found, (name, expected) in zip(run.run(None, {IMAGE: image.numpy()}), wanted.items(), strict=True):
        if expected.max() > expected.min():
            assert_close(torch.from_numpy(found), expected, SHARE, (name, tuple(image.shape)))
        else:
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_file_serves_every_batch_and_size(name: str) -> None:
    net, run = network(name), session(name)
    for n, rows, columns in SIZES:
        assert_same(run, net, torch.rand(n, net.config.in_channels, rows, columns))


@pytest.mark.parametrize(
    ("name", "factors"),
    [("m2trans", {ENLARGED: 4}), ("msgan", {INTERMEDIATE: 2, ENLARGED: 4}), ("uscyclegan", {ENLARGED: 1})],
)
def test_lengths_are_named(name: str, factors: dict[str, int]) -> None:
    run, channels = session(name), network(name).config.in_channels
    assert [(given.name, given.shape) for given in run.get_inputs()] == [
        (IMAGE, ["batch", channels, "rows", "columns"])
    ]
    for output in run.get_outputs():
        times = f"{factors[output.name]}*" if factors[output.name] > 1 else ""
        assert output.shape == ["batch", channels, f"{times}rows", f"{times}columns"]


def test_an_empty_slice_is_the_same_in_both() -> None:
    """Rounding differs between engines; a constant image must not be made of it. See `instance_norm`."""
    net, run = network("m2trans"), session("m2trans")
    for value in (0.0, 0.4):
        image = torch.full((1, 3, 40, 33), value)
        found = run.run(None, {IMAGE: image.numpy()})[0]
        np.testing.assert_allclose(found, results_of(net, image)[ENLARGED].numpy(), atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_graphs_of_shipped_m2trans_are_the_networks(scale: int) -> None:
    """What is exported, run by PyTorch: exports of the full size take long, and one of them is tested below."""
    net = load_network(CHECKPOINTS / f"m2trans-x{scale}-us-muscle.safetensors")
    form = form_of(net)
    assert isinstance(form.module, GraphM2Trans)
    image = torch.rand(1, 3, 45, 30)
    with torch.inference_mode():
        assert_close(form.module(image), net(image), SHARE)


@pytest.mark.parametrize("name", ["m2trans-x4-us-muscle", "msgan-x4-brain-mr"])
def test_shipped_checkpoints_are_exported(name: str) -> None:
    net = load_network(CHECKPOINTS / f"{name}.safetensors")
    run = session_of(exported(form_of(net)))
    for n, rows, columns in ((1, 45, 30), (2, 20, 33)):
        assert_same(run, net, torch.rand(n, net.config.in_channels, rows, columns))
