"""Exports: the same network, the same bytes, nothing of this machine in them, and refused where they would not be."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from medsr_cli.engines import onnx_export
from medsr_cli.engines.onnx_export import checked, compared, exported, exported_network
from medsr_cli.engines.onnx_file import OPSET, OPSETS
from medsr_cli.engines.onnx_provider import runtime
from medsr_cli.errors import ArgumentsError, RunError, WeightsError
from medsr_cli.networks.graph import ENLARGED, INTERMEDIATE, PLANES, GraphForm
from medsr_cli.networks.msgan import MsGan, MsGanConfig

FACTS = {"medsr.format": "1", "medsr.method": "msgan", "id": "tiny", "modality": "mr", "notes": "for Müller"}


class Doubled(nn.Module):
    """A convolution and a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(nn.functional.gelu(self.conv(image)), 2)


def form() -> GraphForm:
    return GraphForm(Doubled().eval(), {"image": torch.zeros(2, 1, 6, 9)}, {"image": PLANES})


class Stages(nn.Module):
    """Both results of an MS-GAN."""

    def __init__(self, net: MsGan) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net.stages(image)


def stages_form(net: MsGan) -> GraphForm:
    return GraphForm(Stages(net), {"image": torch.rand(2, 1, 6, 9)}, {"image": PLANES}, (INTERMEDIATE, ENLARGED))


def config_json(net: MsGan) -> str:
    return json.dumps(asdict(net.config))


def small() -> MsGan:
    torch.manual_seed(5)
    return MsGan(MsGanConfig(n_blocks=1, n_feats=8)).eval()


@pytest.fixture(scope="module")
def net() -> MsGan:
    return small()


@pytest.fixture(scope="module")
def data(net) -> bytes:
    with pytest.MonkeyPatch.context() as patch:  # what is tested here is not how a network is handed over
        patch.setattr("medsr_cli.networks.msgan.graph_form", stages_form, raising=False)
        return exported_network(net, {**FACTS, "medsr.config": config_json(net)}, checkpoint_sha256="ab" * 32)


def test_it_is_the_network_on_every_size_and_batch(data, net):
    file, agreement = checked(data, net)
    assert agreement.largest_difference <= 1e-4
    assert len({size[0] for size in agreement.sizes}) > 1
    assert any(rows % 8 and columns % 8 for _, rows, columns in agreement.sizes)
    assert min(min(size[1:]) for size in agreement.sizes) < 8, "smaller than a window"
    assert (file.traits.scale, file.arch.id, file.opset) == (4, "msgan", OPSET)


def test_it_says_what_the_checkpoint_says_and_what_an_engine_needs(data, net):
    metadata = {entry.key: entry.value for entry in onnx.load_model_from_string(data).metadata_props}
    assert {key: metadata[key] for key in FACTS} == FACTS
    assert json.loads(metadata["medsr.config"]) == asdict(net.config)
    assert metadata["medsr.checkpoint_sha256"] == "ab" * 32
    assert (metadata["medsr.opset"], metadata["medsr.precision"]) == ("20", "float32")
    assert (
        metadata["medsr.torch"] == torch.__version__.partition("+")[0] or metadata["medsr.torch"] == torch.__version__
    )
    assert {"medsr.version", "medsr.onnxscript", "medsr.traits"} <= set(metadata)


def test_nothing_of_this_machine_is_in_it(data):
    for word in (str(Path(__file__).parents[2]), sys.prefix, "site-packages", ".py", "stack_trace", "/home"):
        assert word.encode() not in data, word


def test_it_holds_its_weights_and_standard_operators_alone(data):
    model = onnx.load_model_from_string(data)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_the_network_given_stays_as_it_is(data, net):
    again = small()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    assert net.state_dict().keys() == again.state_dict().keys()


def test_another_network_is_found_out(data, net):
    other = small()
    with torch.no_grad():
        other.c2.bias += 0.05
    difference = compared(checked(data, net)[0], other).largest_difference
    assert difference > 1e-3
    with pytest.raises(RunError, match=f"differ by {difference:.1e} of the range"):
        checked(data, other)


def test_a_result_of_nan_is_no_agreement(data, net, monkeypatch):
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: float("nan"))
    with pytest.raises(RunError, match="differ by nan"):
        checked(data, net)


def test_what_onnx_does_not_know_is_not_written(net):
    with pytest.raises(RunError, match="not valid"):
        checked(b"\x08\x0a", net)


def test_the_same_bytes_in_another_process():
    program = (
        "import hashlib\nfrom tests.engines.test_onnx_export import form\n"
        "from medsr_cli.engines.onnx_export import exported\n"
        "print(hashlib.sha256(exported(form())).hexdigest())\n"
    )
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == hashlib.sha256(exported(form())).hexdigest()


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_other_opsets(opset):
    data = exported(form(), opset)
    assert [item.version for item in onnx.load_model_from_string(data).opset_import] == [opset]
    onnx.checker.check_model(data, full_check=True)
    image = np.random.default_rng(0).random((3, 1, 5, 7), np.float32)
    (ours,) = runtime().InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"image": image})
    with torch.no_grad():
        np.testing.assert_allclose(ours, Doubled()(torch.from_numpy(image)).numpy(), atol=1e-6)


@pytest.mark.parametrize("opset", [0, 16, 24, 99])
def test_opsets_that_are_not_written(opset):
    with pytest.raises(ArgumentsError, match=f"opset {opset}.*{OPSETS[0]} to {OPSETS[-1]}"):
        exported(form(), opset)


def test_more_than_a_file_can_hold_is_refused(monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_FILE_BYTES", 10_000_100)
    with pytest.raises(RunError, match="160 bytes of weights; an ONNX file in one piece has at most 10000100"):
        exported(form())


def test_half_precision_inside_single_outside():
    half = onnx_export._half(form(), type("Arch", (), {"scale_range": None, "id": "x"})())
    model = onnx.load_model_from_string(exported(half))
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]
    assert {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4} == {
        onnx.TensorProto.FLOAT16
    }


def test_any_scale_in_half_precision_is_refused():
    from medsr_cli.networks import catalogue

    with pytest.raises(ArgumentsError, match="miassr"):
        onnx_export._half(form(), catalogue.MIASSR)


def test_a_network_without_a_graph_is_told(net, monkeypatch):
    monkeypatch.delattr("medsr_cli.networks.msgan.graph_form", raising=False)
    with pytest.raises(WeightsError, match=r"msgan cannot be exported.*--backend torch"):
        exported_network(net, {}, checkpoint_sha256="")
