"""Inputs of an exported graph that need not be given."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


def with_default(model_bytes: bytes, name: str, value: NDArray[np.generic]) -> bytes:
    """The model with a value for one of its inputs; who runs it may still give another.

    ONNX's way (since IR version 4): an initializer of the input's own name.

    Args:
        model_bytes: a serialised model.
        name: of an input without a default.
        value: of the input's type and shape.

    Raises:
        ValueError: no such input, or its type or shape is another.
    """
    model = onnx.load_model_from_string(model_bytes)
    declared = {value.name: value.type.tensor_type for value in model.graph.input}
    if name not in declared or name in {tensor.name for tensor in model.graph.initializer}:
        msg = f"The graph has no input {name} that needs a default; it has {', '.join(declared)}."
        raise ValueError(msg)
    default = numpy_helper.from_array(np.ascontiguousarray(value), name)
    lengths = [axis.dim_value for axis in declared[name].shape.dim]  # 0 where the length is free
    fits = len(lengths) == value.ndim and all(n in (0, m) for n, m in zip(lengths, value.shape, strict=True))
    if default.data_type != declared[name].elem_type or not fits:
        msg = f"The input {name} is not of shape {value.shape} and type {value.dtype}."
        raise ValueError(msg)
    model.graph.initializer.append(default)
    return bytes(model.SerializeToString())
