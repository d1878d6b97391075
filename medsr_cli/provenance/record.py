"""The run's record: program, machine, checkpoint, image before and after, warnings, timings."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from medsr_cli import __version__

NOTICE = "Research use; not a medical device; AI-derived, not for primary diagnosis."
IN_PLANE = "In-plane only: slices are not made thinner."
LIBRARIES = ("torch", "numpy", "nibabel", "pydicom", "SimpleITK", "Pillow", "safetensors", "isal")
BLOCK = 1 << 20


def software() -> dict[str, Any]:
    """Versions of medsr and of what it runs on, read without importing any of it."""
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "medsr": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": versions,
    }


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a file, or of a folder's files in the order of their names; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            with file.open("rb") as opened:
                while block := opened.read(BLOCK):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
