"""What a safetensors file says about itself, read without PyTorch and without reading a tensor.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON maps each name to
dtype, shape and [begin, end) in the data; `__metadata__` maps strings to strings. The tensors must fill the
data exactly, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from medsr_cli.errors import WeightsError, mention, reason_of

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 10_000_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Header:
    """Metadata and, per tensor name, dtype and shape."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        WeightsError: the file is not there, or not a whole safetensors file; the sentence says in what way.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            if len(start) < LENGTH_BYTES:
                _refuse(path, "it is shorter than 8 bytes")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                _refuse(path, f"its first 8 bytes claim a header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        msg = f"{mention(path)} cannot be read ({reason_of(error)})."
        raise WeightsError(msg, "Check the path.") from error
    try:
        parsed = json.loads(text.decode())
    except (ValueError, RecursionError):
        _refuse(path, "its header is not JSON")
    if not isinstance(parsed, dict):
        _refuse(path, "its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _refuse(path, "its metadata are not strings")
    return Header(metadata, _read_tensors(path, parsed, size - LENGTH_BYTES - length))


def _read_tensors(path: Path, parsed: dict[str, object], data_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in parsed.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                dtype in ITEM_BYTES and all(type(side) is int and side >= 0 for side in shape)
            ):
                if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
                    _refuse(path, f"the tensor {name[:120]!r} does not have the bytes of its shape")
                tensors[name] = (dtype, tuple(shape))
                spans.append((begin, end))
            case _:
                _refuse(path, f"the entry of the tensor {name[:120]!r} is malformed")
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            _refuse(path, "its tensors overlap or leave holes")
        position = end
    if position != data_bytes:
        _refuse(path, f"it has {data_bytes} bytes of tensors where its header says {position}")
    return tensors


def _refuse(path: Path, reason: str) -> NoReturn:
    msg = f"{mention(path.name)} is not a whole safetensors file: {reason}."
    raise WeightsError(msg, "Fetch it again, or convert a .pt checkpoint with medsr weights import.")
