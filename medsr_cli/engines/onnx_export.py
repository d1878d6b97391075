"""From a network to one ONNX file: dynamic sizes, one opset, nothing beside the file."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import Dim

from medsr_cli.networks.graph import Axes, GraphForm

OPSET = 20
"""Of the standard operators; the first with Gelu as one operator, and read by every ONNX Runtime since 1.17."""
_MULTIPLE = re.compile(r"(\d+)\*(\w+)")


def exported(form: GraphForm, opset: int = OPSET) -> bytes:
    """The graph as a serialised ONNX model, all tensors inside.

    Args:
        form: see `GraphForm`.
        opset: of the standard operators.
    """
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
    return bytes(program.model_proto.SerializeToString())


def _dynamic(axes: Axes) -> dict[int, Any]:
    """Symbolic lengths of one input."""
    shape: dict[int, Any] = {}
    for axis, text in axes.items():
        product = _MULTIPLE.fullmatch(text)
        shape[axis] = int(product[1]) * Dim(product[2]) if product else Dim(text)
    return shape


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
