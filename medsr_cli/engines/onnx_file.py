"""An ONNX file that may come from anywhere: what it holds, checked before a session is made of it.

Only files of `medsr export` are run. They are one ONNX model each, with all tensors inside, standard operators only,
and this metadata (all values are strings):

    everything that the checkpoint's safetensors file says, see `networks.checkpoint` (medsr.format, medsr.method,
    medsr.config, id, modality, ...)
    medsr.traits             JSON object of every field of `Traits`
    medsr.precision          "float32", or "float16": what it computes in; inputs and outputs are float32
    medsr.opset              version of the standard operators
    medsr.checkpoint_sha256  of the file that it was made from
    medsr.version, medsr.torch, medsr.onnxscript

Nothing here imports PyTorch, and nothing is read but the bytes given: files that keep tensors elsewhere are refused,
since their paths could name any file of this machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from medsr_cli.engines.traits import Traits, least_reach
from medsr_cli.errors import ArgumentsError, WeightsError, mention, reason_of
from medsr_cli.networks import catalogue

FORMAT = "1"
OPSET = 20
"""What is written unless another is asked for; the first with Gelu as one operator, and read by every ONNX Runtime
since 1.17."""
OPSETS = range(17, 24)
"""Of the standard operators: from the first with LayerNormalization to the last that PyTorch writes."""
MAX_FILE_BYTES = 2**31 - 1
"""Protocol buffers end here; also the limit of what `medsr export` writes."""
MAX_NODES = 100_000
MAX_DEPTH = 8
"""Of graphs within graphs; those of networks have none, or one."""
STANDARD_DOMAINS = ("", "ai.onnx")
REFUSED_OPERATORS = frozenset(
    (
        *("Loop", "SequenceMap"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
    )
)
"""What need not end, or not give the same result twice."""
PRECISIONS = ("float32", "float16")
INPUT_TYPES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "image": ((TensorProto.FLOAT,), 4),
    "guide": ((TensorProto.FLOAT,), 4),
    "scale": ((TensorProto.FLOAT, TensorProto.DOUBLE), 1),
    "place": ((TensorProto.INT64,), 2),
}
"""Name of an input to the types that its elements may have, and its number of axes."""
TRAIT_LIMITS: Mapping[str, tuple[int, int]] = {
    "scale": (1, 8),
    "channels": (1, 16),
    "smallest": (1, 1024),
    "bytes_per_pixel": (0, 10**7),
    "reach": (0, 4096),
    "side": (0, 4096),
    "first_stage": (0, 8),
    "size_multiple": (1, 1024),
    "overlap": (0, 1024),
}
"""Smallest and largest value that makes sense."""
REMEDY = "Make it with medsr export, from a checkpoint that you trust."
_FLOATS: Mapping[int, str] = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2", TensorProto.DOUBLE: "<f8"}
_ITEM_BYTES: Mapping[int, int] = {
    **{TensorProto.DOUBLE: 8, TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2},
    **{TensorProto.INT64: 8, TensorProto.INT32: 4, TensorProto.INT8: 1, TensorProto.UINT8: 1, TensorProto.BOOL: 1},
}
_TYPED_FIELDS: Mapping[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    **dict.fromkeys(
        (TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), "int32_data"
    ),
}


TOLD_BY_THE_NETWORK = (
    *("scale", "channels", "tiling", "smallest", "guided"),
    *("first_stage", "enlarged_first", "any_scale", "rounding"),
)
"""Traits that follow from method and configuration, and that results depend on."""


@dataclass(frozen=True)
class OnnxFile:
    """A model that passed every check, and what it says about itself."""

    name: str
    """For sentences; that of the file."""
    data: bytes
    metadata: Mapping[str, str]
    arch: catalogue.Arch
    traits: Traits
    precision: str
    """`float32` or `float16`."""
    opset: int
    inputs: tuple[str, ...]
    """Without those that have a value in the file already."""
    optional_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sha256: str

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the network that it was made from."""
        found: dict[str, Any] = json.loads(self.metadata["medsr.config"])
        return found

    @property
    def variant(self) -> str:
        """The variant's name, or that of the method for a size that has none."""
        return self.arch.variant_of(self.config) or self.arch.id

    def own_scale(self, wanted: tuple[float, float]) -> tuple[float, float]:
        """The enlargement of the network: its own, or for networks of any scale the one that is asked for."""
        if self.traits.any_scale:
            return wanted
        return float(self.traits.scale), float(self.traits.scale)


def read_onnx(path: Path) -> OnnxFile:
    """Read and check a file.

    Raises:
        WeightsError: it cannot be read, or is not a model that medsr exported; the sentence says in what way.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            msg = f"{mention(path.name)} has {size} bytes; an ONNX file in one piece has at most {MAX_FILE_BYTES}."
            raise WeightsError(msg, "Check that it is the right file.")
        data = path.read_bytes()
    except OSError as error:
        msg = f"{mention(path)} cannot be read ({reason_of(error)})."
        raise WeightsError(msg, "Check the path.") from error
    return checked_onnx(data, path.name)


def checked_onnx(data: bytes, name: str) -> OnnxFile:
    """The same for bytes.

    Args:
        data: a serialised model.
        name: of the file, for sentences.

    Raises:
        WeightsError: see `read_onnx`.
    """
    model = _parsed(data, name)
    metadata = _metadata(model, name)
    arch = _arch(metadata, name)
    traits = _traits(metadata, arch, name)
    opset = _opset(model, metadata, name)
    _refuse_contents(model, name)
    inputs, optional = _inputs(model.graph, traits, name)
    outputs = _outputs(model.graph, traits, name)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # its own errors, and whatever a damaged model makes the library raise
        _refuse(name, f"it is not a valid ONNX model ({_first_line(error)})")
    precision = metadata["medsr.precision"]
    sha256 = hashlib.sha256(data).hexdigest()
    return OnnxFile(name, data, metadata, arch, traits, precision, opset, inputs, optional, outputs, sha256)


def refuse_opset(opset: int) -> None:
    """Before an export.

    Raises:
        ArgumentsError: medsr does not write it.
    """
    if opset not in OPSETS:
        msg = f"medsr does not write opset {opset}."
        raise ArgumentsError(msg, f"Give --opset {OPSETS[0]} to {OPSETS[-1]}; {OPSET} is what it writes otherwise.")


def _parsed(data: bytes, name: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protocol buffers' own error, whose module has no types
        msg = f"{mention(name)} is not an ONNX file."
        raise WeightsError(msg, "Check that it is the right file, and whole.") from error
    if not model.graph.node:
        msg = f"{mention(name)} is not an ONNX file, or an empty one."
        raise WeightsError(msg, "Check that it is the right file, and whole.")
    return model


def _metadata(model: ModelProto, name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in model.metadata_props:
        if entry.key in found:
            _refuse(name, f"its metadata have {entry.key[:80]!r} twice")
        found[entry.key] = entry.value
    needed = ("medsr.format", "medsr.method", "medsr.config", "medsr.traits", "medsr.precision", "medsr.opset")
    missing = [key for key in needed if key not in found]
    if missing:
        msg = f"{mention(name)} does not say what network it holds: its metadata lack {missing[0]}."
        raise WeightsError(msg, REMEDY)
    if found["medsr.format"] != FORMAT:
        msg = f"{mention(name)} is of format {found['medsr.format'][:40]!r}; this medsr reads format {FORMAT}."
        raise WeightsError(msg, "Install the medsr that wrote it, or export it again.")
    if found["medsr.precision"] not in PRECISIONS:
        _refuse(name, f"its metadata name a precision {found['medsr.precision'][:40]!r}")
    return found


def _arch(metadata: Mapping[str, str], name: str) -> catalogue.Arch:
    method = metadata["medsr.method"]
    arch = next((entry for entry in catalogue.CATALOGUE if entry.id == method), None)
    if arch is None:
        msg = f"{mention(name)} names a method {method[:40]!r}, which this medsr does not have."
        raise WeightsError(msg, "Install a newer medsr, or export it again.")
    if arch.kind != "network":
        _refuse(name, f"{arch.id} does not enlarge images")
    config = _json_object(metadata["medsr.config"], "configuration", name)
    if not all(isinstance(value, int | float | bool | str) for value in config.values()):
        _refuse(name, "its configuration holds more than numbers and words")
    return arch


def _traits(metadata: Mapping[str, str], arch: catalogue.Arch, name: str) -> Traits:
    """Every field, of its type and within its limits; those that the catalogue says are the catalogue's."""
    given = _json_object(metadata["medsr.traits"], "traits", name)
    kinds = {item.name: type(getattr(Traits(1), item.name)) for item in fields(Traits)}
    wrong = sorted(set(kinds) ^ set(given))
    if wrong:
        _refuse(name, f"its traits are not those that this medsr knows ({wrong[0][:40]})")
    for key, kind in kinds.items():
        low, high = TRAIT_LIMITS.get(key, (0, 4096))
        if type(given[key]) is not kind or (kind is int and not low <= given[key] <= high):
            _refuse(name, f"its trait {key} is {str(given[key])[:40]!r}")
    traits = Traits(**given)
    config = _json_object(metadata["medsr.config"], "configuration", name)
    expected = _expected(arch, config, traits, name)
    for key in (
        "scale",
        "channels",
        "tiling",
        "smallest",
        "guided",
        "first_stage",
        "enlarged_first",
        "any_scale",
        "rounding",
    ):
        if getattr(traits, key) != getattr(expected, key):
            _refuse(name, f"its trait {key} is not that of its network")
    # What planning goes by is that of this release, whichever wrote the file; tiles see at least what they must.
    traits = replace(expected, reach=max(traits.reach, least_reach(arch, config)))
    if traits.rounding not in ("exact", "reference") or (traits.tiling == "fixed") != (traits.side > 0):
        _refuse(name, "its traits contradict each other")
    return traits


def _expected(arch: catalogue.Arch, config: Mapping[str, Any], given: Traits, name: str) -> Traits:
    numbers = ("scale", "in_channels", "n_blocks", "kernel", "extractors")
    if any(type(config.get(key, 1)) is not int or not 1 <= config.get(key, 1) <= 4096 for key in numbers):
        _refuse(name, "its configuration holds sizes that cannot be")
    return Traits.of_config(arch, config, reach=given.reach, side=given.side)


def _opset(model: ModelProto, metadata: Mapping[str, str], name: str) -> int:
    versions: dict[str, int] = {}
    for item in model.opset_import:
        if item.domain not in STANDARD_DOMAINS:
            _refuse_domain(name, item.domain)
        versions[item.domain] = item.version
    if len(versions) != 1:
        _refuse(name, "it does not say one version of the standard operators")
    (version,) = versions.values()
    if version not in OPSETS:
        msg = f"{mention(name)} has operators of opset {version}; medsr runs {OPSETS[0]} to {OPSETS[-1]}."
        raise WeightsError(msg, "Export it again with --opset.")
    if metadata["medsr.opset"] != str(version):
        _refuse(name, f"it has opset {version} where its metadata say {metadata['medsr.opset'][:20]!r}")
    return version


# -- what is in the graph --------------------------------------------------------------------------------------------


def _refuse_contents(model: ModelProto, name: str) -> None:
    """Everything that a graph, or a graph within it, may not hold."""
    if model.functions or model.training_info:
        _refuse(name, "it holds functions of its own, which need not be standard operators")
    count = 0
    for graph in _graphs(model.graph, name):
        count += len(graph.node)
        if count > MAX_NODES:
            _refuse(name, f"it has more than {MAX_NODES} operators")
        if graph.sparse_initializer:
            _refuse(name, "it has sparse tensors")
        for tensor in graph.initializer:
            _refuse_tensor(tensor, name)
        for node in graph.node:
            _refuse_node(node, name)


def _graphs(graph: GraphProto, name: str, depth: int = 0) -> Iterator[GraphProto]:
    """A graph and those that its operators hold."""
    if depth > MAX_DEPTH:
        _refuse(name, f"its graphs lie more than {MAX_DEPTH} deep in each other")
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner, name, depth + 1)


def _refuse_node(node: NodeProto, name: str) -> None:
    if node.domain not in STANDARD_DOMAINS:
        _refuse_domain(name, node.domain)
    if node.op_type in REFUSED_OPERATORS:
        _refuse(name, f"it has the operator {node.op_type}, which no exported network needs")
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            _refuse(name, "it has sparse tensors")
        for tensor in _tensors_of(attribute):
            _refuse_tensor(tensor, name)


def _tensors_of(attribute: AttributeProto) -> Iterable[TensorProto]:
    return (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)


def _refuse_tensor(tensor: TensorProto, name: str) -> None:
    """All of its values are in the file, as many as its shape says, and finite."""
    label = tensor.name[:80]
    if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
        msg = f"{mention(name)} keeps the tensor {label!r} outside the file."
        raise WeightsError(msg, f"medsr reads ONNX files in one piece only. {REMEDY}")
    kind = tensor.data_type
    if kind not in _ITEM_BYTES or tensor.HasField("segment"):
        _refuse(name, f"the tensor {label!r} is of a type that no exported network has")
    if any(side < 0 for side in tensor.dims):
        _refuse(name, f"the tensor {label!r} has a negative length")
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        whole = len(tensor.raw_data) == count * _ITEM_BYTES[kind]
    else:
        whole = len(getattr(tensor, _TYPED_FIELDS[kind])) == count
    if not whole:
        _refuse(name, f"the tensor {label!r} does not have the values of its shape")
    # Single numbers may be infinite: the bounds of a clip, the weight of what attention must not see.
    if kind in _FLOATS and count > 1 and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all():
        _refuse(name, f"the tensor {label!r} holds NaN or infinity")


# -- its inputs and outputs ------------------------------------------------------------------------------------------


def _inputs(graph: GraphProto, traits: Traits, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs that must be given, and of those that need not, since the file has a value for them."""
    held = {tensor.name for tensor in graph.initializer}
    given = [value.name for value in graph.input]
    wanted = ("image", *(["guide"] if traits.guided else []), *(["scale", "place"] if traits.any_scale else []))
    unknown = sorted(set(given) - set(wanted))
    if unknown or len(set(given)) != len(given):
        _refuse(name, f"it has an input {(unknown or given)[0][:40]!r} that medsr does not know")
    lacking = [one for one in wanted if one not in given]
    if lacking:
        _refuse(name, f"it has no input {lacking[0]!r}")
    for value in graph.input:
        kinds, rank = INPUT_TYPES[value.name]
        _refuse_misfit(value, kinds, rank, name)
    image = next(value for value in graph.input if value.name == "image")
    sides = _lengths(image)
    size = (traits.side or None,) * 2
    if sides != (None, traits.channels, *size):
        words = " x ".join("any" if length is None else str(length) for length in sides)
        _refuse(name, f"its image has the shape {words}, which is not that of its traits")
    required = tuple(one for one in given if one not in held)
    return required, tuple(one for one in given if one in held)


def _outputs(graph: GraphProto, traits: Traits, name: str) -> tuple[str, ...]:
    names = tuple(value.name for value in graph.output)
    wanted = ("intermediate", "enlarged") if traits.first_stage else ("enlarged",)
    if names != wanted:
        _refuse(name, f"its outputs are not {' and '.join(wanted)}")
    for value in graph.output:
        _refuse_misfit(value, (TensorProto.FLOAT,), 4, name)
    return names


def _refuse_misfit(value: ValueInfoProto, kinds: tuple[int, ...], rank: int, name: str) -> None:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in kinds or not tensor.HasField("shape"):
        _refuse(name, f"its {value.name!r} is not of the type that medsr knows")
    if len(tensor.shape.dim) != rank:
        _refuse(name, f"its {value.name!r} has {len(tensor.shape.dim)} axes instead of {rank}")


def _lengths(value: ValueInfoProto) -> tuple[int | None, ...]:
    """Of each axis, None where it may have any length."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


# -- sentences -------------------------------------------------------------------------------------------------------


def _json_object(text: str, what: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse(name, f"its {what} are not a JSON object")
    return found


def _refuse_domain(name: str, domain: str) -> NoReturn:
    msg = (
        f"{mention(name)} has operators of {domain[:80]!r}, which are not standard ones; medsr loads no code for them."
    )
    raise WeightsError(msg, REMEDY)


def _refuse(name: str, reason: str) -> NoReturn:
    msg = f"{mention(name)} is not a network that medsr exported: {reason}."
    raise WeightsError(msg, REMEDY)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__
