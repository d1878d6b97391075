"""Where the store keeps ONNX files made of its checkpoints, and the proof before each use that they are whole.

    exports/KEY.onnx    an exported checkpoint; KEY begins with the checkpoint's hash and the precision
    exports/KEY.json    its own hash and size, and what it was made with

The rest of the key stands for everything else that decides what is in the file, so that a newer PyTorch or medsr makes
a new one. Nothing here writes a result: `tasks.export` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medsr_cli import __version__
from medsr_cli.weights.store import Store

MADE_WITH = ("torch", "onnxscript", "onnx")
"""Packages whose version decides what an exporter writes."""
HASH_CHARACTERS = 20
MAX_RECORD_BYTES = 100_000
LOCK_TIMEOUT_S = 900.0
"""Longer than any export takes: another job that holds the lock for longer is dead."""


@dataclass(frozen=True)
class Export:
    """One exported checkpoint's place in the store, whether it is there or not."""

    checkpoint_sha256: str
    precision: str
    """`float32` or `float16`."""
    opset: int
    folder: Path

    @property
    def made_with(self) -> dict[str, str]:
        """What decides the bytes, beside the checkpoint."""
        versions = {package: installed(package) for package in MADE_WITH}
        return {**versions, "medsr": __version__, "opset": str(self.opset), "precision": self.precision}

    @property
    def stem(self) -> str:
        """How the names of all exports of this checkpoint in this precision begin."""
        return f"{self.checkpoint_sha256[:HASH_CHARACTERS]}-{self.precision}-"

    @property
    def key(self) -> str:
        """The name without its ending."""
        facts = json.dumps({"checkpoint": self.checkpoint_sha256, **self.made_with}, sort_keys=True)
        return self.stem + hashlib.sha256(facts.encode()).hexdigest()[:HASH_CHARACTERS]

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / f"{self.key}.onnx"

    @property
    def record_path(self) -> Path:
        """What is written down about it."""
        return self.folder / f"{self.key}.json"

    def record(self, data: bytes) -> bytes:
        """What to write down about these bytes."""
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        made = {"checkpoint_sha256": self.checkpoint_sha256, "made_with": self.made_with}
        return (json.dumps({**facts, **made}, indent=1, sort_keys=True) + "\n").encode()

    def read(self) -> bytes | None:
        """The file's bytes if they are those that were written down; None where there is none, or a damaged one.

        The bytes are what was compared: the file is not read a second time.
        """
        record = _read_record(self.record_path)
        try:
            if record is None or self.path.stat().st_size != record.get("bytes"):
                return None
            data = self.path.read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == record.get("sha256") else None

    def is_there(self) -> bool:
        """Whether there is a file of the name, whole or not."""
        return self.path.exists()

    def older(self) -> list[Path]:
        """Files of exports of the same checkpoint and precision that were made with something else."""
        with contextlib.suppress(OSError):
            return sorted(path for path in self.folder.glob(f"{self.stem}*") if path.stem != self.key)
        return []


def export_of(store: Store, checkpoint_sha256: str, precision: str, opset: int) -> Export:
    """Where the export of a checkpoint lies, or would lie."""
    return Export(checkpoint_sha256, precision, opset, store.home / "exports")


@contextlib.contextmanager
def one_at_a_time(store: Store, export: Export) -> Iterator[None]:
    """Let one job make it; the others wait, and find it.

    Raises:
        WeightsError: another job has been at it for too long, or the store cannot be written to.
    """
    with store.lock(f"export-{export.key}", LOCK_TIMEOUT_S):
        yield


def installed(package: str) -> str:
    """The version of a package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read_record(path: Path) -> Mapping[str, object] | None:
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
