"""Both Cohf-Ts as ONNX graphs: one file each, against PyTorch, at any size and batch that they take."""

from __future__ import annotations

import dataclasses

import onnx
import onnxruntime
import pytest
import torch

from medsr_cli.engines.onnx_export import OPSET, exported
from medsr_cli.networks import cohft, cohft_released
from medsr_cli.networks.rdst import pad_to_multiple
from tests.networks import test_cohft, test_cohft_released

SHARE = 1e-4
"""Of the range of PyTorch's result."""


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def assert_valid(model: bytes) -> onnx.ModelProto:
    """One file of standard operators of the one opset, which the checker passes."""
    read = onnx.load_from_string(model)
    onnx.checker.check_model(read, full_check=True)
    assert [(opset.domain, opset.version) for opset in read.opset_import] == [("", OPSET)]
    assert not read.functions
    return read


def assert_equal(graph: onnxruntime.InferenceSession, net: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.inference_mode():
        wanted = net(*inputs)
    names = ("image", "guide")
    (found,) = graph.run(["enlarged"], {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    assert found.shape == tuple(wanted.shape)
    assert (torch.from_numpy(found) - wanted).abs().max() <= SHARE * (wanted.max() - wanted.min())


@pytest.mark.parametrize("scale", [2, 3])
def test_one_file_serves_every_size_and_batch(scale):
    net = test_cohft.tiny(dataclasses.replace(test_cohft.TINY, scale=scale, stages=1))
    model = exported(cohft.graph_form(net))
    read = assert_valid(model)
    named = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in read.graph.input
    }
    assert named["image"] == ["batch", 1, "rows", "columns"]
    assert named["guide"] == ["batch", 1, f"{scale}*rows", f"{scale}*columns"]
    graph = session(model)
    g = torch.Generator().manual_seed(1)
    drawn = [tuple(torch.randint(1, 40, (2,), generator=g).tolist()) for _ in range(4)]
    # Multiples of 6 are not padded; 1 and 2 are shorter than their padding and repeat the edge.
    for batch, (h, w) in enumerate([(1, 1), (6, 12), (2, 13), (3, 4), (4, 3), *drawn], start=1):
        assert_equal(graph, net, test_cohft.inputs(h, w, scale, batch=1 + batch % 3))


@pytest.mark.parametrize("side", range(1, 15))
def test_padding_by_lookup_is_padding(side):
    image = torch.rand(2, 1, side, 5)
    found = cohft.gathered_to_multiple(cohft.gathered_to_multiple(image, 2, 6), 3, 6)
    assert torch.equal(found, pad_to_multiple(image, 6))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_released_network_has_one_size_and_any_batch(scale):
    net = test_cohft_released.tiny(dataclasses.replace(test_cohft_released.TINY, scale=scale))
    model = exported(cohft_released.graph_form(net))
    read = assert_valid(model)
    for value, side in zip(read.graph.input, (6, 6 * scale), strict=True):
        shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        assert shape == ["batch", 1, side, side], value.name
    graph = session(model)
    for batch in (1, 2, 5):
        assert_equal(graph, net, test_cohft_released.inputs(net.config, batch))
