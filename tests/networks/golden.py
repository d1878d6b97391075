"""What authors' networks gave, kept as fixtures: their facts, their weights or the formula of them, and the comparison.

A fixture is `NAME.json` with `NAME.safetensors`, here in tests/golden or beside the specifications; a test that needs
one that is not there is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

OWN = Path(__file__).resolve().parents[1] / "golden"
SPECS = Path(__file__).resolve().parents[2].parent / "shared" / "specs"
needs_shared = pytest.mark.skipif(not SPECS.is_dir(), reason="needs the shared data")


class Fixture(NamedTuple):
    """What a network was, and what it made of some inputs."""

    facts: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """State of the network; empty where a formula gives it."""
    tensors: dict[str, torch.Tensor]
    """Everything in the file, inputs and outputs under the names that the facts give them."""


def fixture(name: str) -> Fixture:
    """A fixture by its name; the test is skipped where it is not."""
    for folder in (OWN, SPECS / "golden"):
        if (folder / f"{name}.safetensors").exists():
            path = folder / f"{name}.json"
            tensors = load_file(folder / f"{name}.safetensors")
            weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}
            return Fixture(json.loads(path.read_text()) if path.exists() else {}, weights, tensors)
    pytest.skip("needs the shared data")


def specification(name: str) -> dict[str, Any]:
    """A JSON file of the specifications, such as the names and shapes of a state dict; skipped where it is not."""
    path = SPECS / f"{name}.json"
    if not path.exists():
        pytest.skip("needs the shared data")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def procedural(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Weights from a formula, as PROCEDURAL_WEIGHTS.md says."""
    word = (1 << 64) - 1
    u64 = np.uint64
    with np.errstate(over="ignore"):
        base = u64(((crc32(key.encode()) << 32) ^ ((seed * 0x9E3779B97F4A7C15) & word)) & word)
        z = np.arange(int(np.prod(shape)), dtype=u64) + base + u64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
        z = z ^ (z >> u64(31))
    r = 2 * ((z >> u64(11)).astype(np.float64) * 2.0**-53) - 1
    if "relative_position_bias_table" in key:
        value = 0.5 * r
    elif len(shape) >= 2:
        value = r * np.sqrt(3 / np.prod(shape[1:]))
    elif key.endswith("bias"):
        value = 0.1 * r
    else:
        value = 1 + 0.1 * r
    return torch.tensor(value.reshape(shape), dtype=torch.float32)


def procedural_state(
    net: torch.nn.Module, seed: int, keep: str | None = None, name: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    """A state for a network by the formula.

    Args:
        net: for names and shapes.
        seed: of the formula.
        keep: what has this in its name stays as the network has it.
        name: from a name here to the authors'.
    """
    return {
        key: value if keep is not None and keep in key else procedural(name(key), tuple(value.shape), seed)
        for key, value in net.state_dict().items()
    }


def assert_close(found: torch.Tensor, wanted: torch.Tensor, share: float, what: object = "") -> None:
    """Of one shape, and nowhere further apart than a share of the range of what is wanted."""
    assert found.shape == wanted.shape, what
    assert (found - wanted).abs().max() <= share * (wanted.max() - wanted.min()), what


def save_declared(path: Path, state: Mapping[str, torch.Tensor], method: str, config: Mapping[str, Any]) -> Path:
    """A file of ours whose metadata says what it likes of the network in it."""
    metadata = {"medsr.format": "1", "medsr.method": method, "medsr.config": json.dumps(config)}
    save_file({key: value.clone() for key, value in state.items()}, path, metadata)
    return path
