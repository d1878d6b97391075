"""From a network to one ONNX file: dynamic sizes, one opset, nothing beside the file, and checked against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto
from torch import Tensor, nn
from torch.export import Dim

from medsr_cli import __version__
from medsr_cli.engines.engine import Planes
from medsr_cli.engines.onnx_defaults import with_default
from medsr_cli.engines.onnx_file import MAX_FILE_BYTES, OPSET, OnnxFile, checked_onnx, refuse_opset
from medsr_cli.engines.onnx_runner import OnnxRunner
from medsr_cli.engines.runner import Place
from medsr_cli.engines.torch_runner import TorchRunner
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import ArgumentsError, RunError, WeightsError
from medsr_cli.networks.catalogue import Arch
from medsr_cli.networks.checkpoint import entry_of
from medsr_cli.networks.graph import Axes, GraphForm
from medsr_cli.volume.geometry import enlarged_length

TOLERANCES = {"float32": 1e-4, "float16": 5e-3}
"""Largest difference from PyTorch in float32, as a part of the range of its result."""
TRIED_SCALES = ((2.0, 2.0), (2.7, 1.6), (4.0, 3.0))
"""Of networks of any scale, within what every one of them takes."""
_MULTIPLE = re.compile(r"(\d+)\*(\w+)")


@dataclass(frozen=True)
class Agreement:
    """How far an exported file was from PyTorch."""

    largest_difference: float
    """As a part of the range of PyTorch's result."""
    sizes: tuple[tuple[int, int, int], ...]
    """Planes, rows and columns that were tried, on random images."""


def exported(form: GraphForm, opset: int = OPSET) -> bytes:
    """The graph as a serialised ONNX model, all tensors inside.

    Nothing in it tells when, where or from which folder it was made; the same network gives the same bytes.

    Args:
        form: see `GraphForm`.
        opset: of the standard operators, one of `OPSETS`.

    Raises:
        ArgumentsError: no such opset, or the network cannot be written in it.
        RunError: the model would be larger than an ONNX file can be.
    """
    refuse_opset(opset)
    _refuse_size(form.module)
    names = list(form.inputs)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            form.module,
            tuple(form.inputs.values()),
            input_names=names,
            output_names=list(form.outputs),
            dynamic_shapes=[_dynamic(form.axes.get(name, {})) for name in names],
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - without a file name the program is returned
    model = ModelProto()
    model.CopyFrom(program.model_proto)
    found = {item.domain: item.version for item in model.opset_import}
    if found.get("") != opset:
        msg = f"This network cannot be written with opset {opset}; PyTorch wrote {found.get('')}."
        raise ArgumentsError(msg, f"Use --opset {OPSET}.")
    _strip(model)
    return bytes(model.SerializeToString(deterministic=True))


def exported_network(
    net: nn.Module,
    metadata: Mapping[str, str],
    *,
    checkpoint_sha256: str,
    opset: int = OPSET,
    precision: str = "float32",
) -> bytes:
    """A network of the catalogue as one ONNX file that says what it is; see `engines.onnx_file`.

    Args:
        net: loaded; it stays as it is.
        metadata: of its checkpoint file, with `medsr.format`, `medsr.method` and `medsr.config`.
        checkpoint_sha256: of that file.
        opset: see `exported`.
        precision: `float32`, or `float16` for GPUs.

    Raises:
        ArgumentsError: see `exported`; or a network of any scale in half precision.
        WeightsError: the network has no form for an exporter.
        RunError: see `exported`.
    """
    arch = entry_of(net)
    module: Any = importlib.import_module(arch.module)
    if not hasattr(module, "graph_form"):
        msg = f"{arch.id} cannot be exported."
        raise WeightsError(msg, "Run it with --backend torch.")
    form = module.graph_form(copy.deepcopy(net))
    if precision == "float16":
        form = _half(form, arch)
    data = exported(form, opset)
    for name, value in getattr(module, "GRAPH_DEFAULTS", {}).items():
        data = with_default(data, name, value.numpy())
    own = {
        "medsr.traits": json.dumps(asdict(Traits.of(arch, net)), sort_keys=True),
        "medsr.precision": precision,
        "medsr.opset": str(opset),
        "medsr.checkpoint_sha256": checkpoint_sha256,
        "medsr.version": __version__,
        "medsr.torch": _version("torch"),
        "medsr.onnxscript": _version("onnxscript"),
    }
    return _with_metadata(data, {**metadata, **own})


def checked(data: bytes, net: nn.Module, name: str = "the exported file") -> tuple[OnnxFile, Agreement]:
    """Prove that a file is whole, standard, and the network: by the checker, and by random images of several sizes.

    Args:
        data: of `exported_network`.
        net: the same network; it stays as it is.
        name: for sentences.

    Raises:
        RunError: it is not; the sentence has the largest difference.
    """
    try:
        onnx.checker.check_model(data, full_check=True)
        file = checked_onnx(data, name)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, WeightsError) as error:
        msg = f"The exported model is not valid ({str(error).strip().splitlines()[0][:200]})."
        raise RunError(msg, "Use another --opset, and tell the authors of medsr.") from error
    agreement = compared(file, net)
    tolerance = TOLERANCES[file.precision]
    if not agreement.largest_difference <= tolerance:  # NaN is not, either
        msg = (
            f"The exported model is not the network: its results differ by {agreement.largest_difference:.1e} of the "
            f"range from those of PyTorch, where {tolerance:.0e} is allowed."
        )
        raise RunError(msg, "Use another --opset, and tell the authors of medsr.")
    return file, agreement


def compared(file: OnnxFile, net: nn.Module, seed: int = 0) -> Agreement:
    """The largest difference from PyTorch, both on the CPU, over random images of several sizes."""
    rng = np.random.default_rng(seed)
    traits = file.traits
    theirs = TorchRunner(copy.deepcopy(net), device="cpu", precision="fp32", stages=bool(traits.first_stage))
    ours = OnnxRunner(file, device="cpu")
    differences, sizes = [], _sizes(traits, rng)
    for number, (n, rows, columns) in enumerate(sizes):
        planes = rng.random((n, traits.channels, rows, columns), np.float32)
        if traits.any_scale:
            scale = TRIED_SCALES[number % len(TRIED_SCALES)]
            places = _part(rows, scale[0], traits), _part(columns, scale[1], traits)
            pairs = [(ours.run_scaled(planes, scale, places), theirs.run_scaled(planes, scale, places))]
        else:
            guide = rng.random((n, 1, rows * traits.scale, columns * traits.scale), np.float32)
            given = (planes, guide if traits.guided else None)
            pairs = list(zip(ours.run(*given), theirs.run(*given), strict=True))
        differences += [_difference(*pair) for pair in pairs]
    return Agreement(float(np.max(differences)), sizes)  # NaN where there is one


# -- parts -------------------------------------------------------------------------------------------------------------


class HalfInside(nn.Module):
    """A graph in half precision whose inputs and outputs are float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.half()

    def forward(self, image: Tensor, guide: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """As the inner module."""
        results = self.inner(image.half()) if guide is None else self.inner(image.half(), guide.half())
        return tuple(r.float() for r in results) if isinstance(results, tuple) else results.float()


def _half(form: GraphForm, arch: Arch) -> GraphForm:
    if arch.scale_range is not None:
        msg = f"{arch.id} finds its pixels by arithmetic that half precision is too coarse for."
        raise ArgumentsError(msg, "Use --precision fp32.")
    return GraphForm(HalfInside(form.module).eval(), form.inputs, form.axes, form.outputs)


def _dynamic(axes: Axes) -> dict[int, Any]:
    """Symbolic lengths of one input."""
    shape: dict[int, Any] = {}
    for axis, text in axes.items():
        product = _MULTIPLE.fullmatch(text)
        shape[axis] = int(product[1]) * Dim(product[2]) if product else Dim(text)
    return shape


def _strip(model: ModelProto) -> None:
    """Take out what the exporter writes for its own developers: file names of this machine, traces, its graph."""
    del model.metadata_props[:]
    model.producer_name, model.producer_version, model.doc_string = "medsr", "", ""
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.HasField("t"):
                attribute.t.doc_string = ""
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _strip_graph(inner)


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    model = onnx.load_model_from_string(data)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString(deterministic=True))


def _refuse_size(module: nn.Module) -> None:
    """Protocol buffers end at 2 GB."""
    held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    total = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    if total > MAX_FILE_BYTES - 10_000_000:
        msg = f"The network has {total} bytes of weights; an ONNX file in one piece has at most {MAX_FILE_BYTES}."
        raise RunError(msg, "Run it with --backend torch.")


def _sizes(traits: Traits, rng: np.random.Generator) -> tuple[tuple[int, int, int], ...]:
    """Of what to compare on: the shortest sides, and odd ones; few enough pixels to be quick."""
    if traits.side:
        return (1, traits.side, traits.side), (2, traits.side, traits.side)
    low = max(traits.smallest, 2)
    others = [(low + int(rows), low + int(columns)) for rows, columns in rng.integers(3, 40, (3, 2))]
    sides = [(low, low + int(rng.integers(1, 9))), *others]
    return tuple((n, rows, columns) for n, (rows, columns) in zip((1, 2, 1, 3), sides, strict=True))


def _part(length: int, scale: float, traits: Traits) -> Place:
    """The inner part of a result, as of a tile that is all of the image."""
    size = enlarged_length(length, scale) if traits.rounding == "exact" else int(scale * length)
    return Place(length, 0, size // 4, size - size // 4)


def _difference(ours: Planes, theirs: Planes) -> float:
    return float(np.abs(ours - theirs).max() / max(float(np.ptp(theirs)), 1e-6))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
