"""ONNX files as `medsr export` writes them, made by hand in milliseconds: networks that repeat every pixel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from medsr_cli.engines.traits import Traits
from medsr_cli.networks import catalogue

FLOAT = TensorProto.FLOAT
CONFIG = '{"scale": 2, "n_rdstb": 4}'


def entry(method: str) -> catalogue.Arch:
    return next(arch for arch in catalogue.CATALOGUE if arch.id == method)


def traits_of(method: str, **changes: Any) -> dict[str, Any]:
    arch = entry(method)
    any_scale = arch.scale_range is not None
    facts = Traits(
        scale=1 if any_scale else 2,
        channels=1,
        tiling=arch.tiling,
        smallest=arch.smallest,
        guided="guide" in arch.needs,
        first_stage=arch.first_stage,
        enlarged_first=arch.enlarged_first,
        any_scale=any_scale,
    )
    return {**asdict(facts), **changes}


def metadata_of(method: str = "rdst", **changes: str) -> dict[str, str]:
    own = {
        "medsr.format": "1",
        "medsr.method": method,
        "medsr.config": CONFIG,
        "medsr.traits": json.dumps(traits_of(method)),
        "medsr.precision": "float32",
        "medsr.opset": "20",
        "modality": "mr",
    }
    return {**own, **changes}


def nearest_graph(scale: int = 2) -> GraphProto:
    """Every pixel becomes scale x scale of the same value: a 1x1 convolution of ones, and a shuffle."""
    ones = numpy_helper.from_array(np.ones((scale**2, 1, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["wide"], "conv", kernel_shape=[1, 1]),
        helper.make_node("DepthToSpace", ["wide"], ["enlarged"], "shuffle", blocksize=scale, mode="CRD"),
    ]
    image = helper.make_tensor_value_info("image", FLOAT, ["batch", 1, "rows", "columns"])
    enlarged = helper.make_tensor_value_info("enlarged", FLOAT, ["batch", 1, f"{scale}*rows", f"{scale}*columns"])
    return helper.make_graph(nodes, "nearest", [image], [enlarged], [ones])


def model_of(graph: GraphProto, metadata: Mapping[str, str], opset: int = 20) -> ModelProto:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, dict(metadata))
    return model


def nearest(**changes: str) -> ModelProto:
    return model_of(nearest_graph(), metadata_of(**changes))


def any_scale_model() -> ModelProto:
    """Of each result's pixel the value is what the graph was told, as digits: scale along rows, then the places'."""
    nodes = [
        helper.make_node("Shape", ["image"], ["batch_and_channels"], start=0, end=2),
        helper.make_node("Gather", ["place", "three"], ["counts"], axis=1),
        helper.make_node("Concat", ["batch_and_channels", "counts"], ["size"], axis=0),
        helper.make_node("Cast", ["scale"], ["single"], to=FLOAT),
        helper.make_node("Cast", ["place"], ["places"], to=FLOAT),
        helper.make_node("ReduceSum", ["single"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["places", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted"], ["told"], keepdims=0),
        helper.make_node("Add", ["sum", "told"], ["value"]),
        helper.make_node("Expand", ["value", "size"], ["enlarged"]),
    ]
    held = [
        numpy_helper.from_array(np.int64(3), "three"),
        numpy_helper.from_array(np.array([[1e1, 1e2, 1e3, 1e4], [1, 2, 3, 4]], np.float32), "weights"),
        numpy_helper.from_array(np.zeros((2, 4), np.int64), "place"),
    ]
    inputs = [
        helper.make_tensor_value_info("image", FLOAT, ["batch", 1, "rows", "columns"]),
        helper.make_tensor_value_info("scale", TensorProto.DOUBLE, [2]),
        helper.make_tensor_value_info("place", TensorProto.INT64, [2, 4]),
    ]
    enlarged = helper.make_tensor_value_info("enlarged", FLOAT, ["batch", 1, "more_rows", "more_columns"])
    return model_of(helper.make_graph(nodes, "any", inputs, [enlarged], held), metadata_of("miassr"))


def two_stage_model() -> ModelProto:
    """MS-GAN's names: 0.5 everywhere after the first stage, the image four times as large after the second."""
    graph = nearest_graph(4)
    graph.node.extend(
        [
            helper.make_node("MaxPool", ["enlarged"], ["half_size"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Mul", ["half_size", "half"], ["intermediate"]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
    middle = helper.make_tensor_value_info("intermediate", FLOAT, ["batch", 1, "2*rows", "2*columns"])
    graph.output.insert(0, middle)
    traits = json.dumps(traits_of("msgan", scale=4))
    return model_of(graph, metadata_of("msgan", **{"medsr.traits": traits, "medsr.config": '{"scale": 4}'}))
