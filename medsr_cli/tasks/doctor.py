"""What works on this machine, found out by doing it, and what to do about what does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medsr_cli import __version__
from medsr_cli.tasks.engine_trials import trials
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.speeds import machine
from medsr_cli.tasks.weights import Shelf, open_shelf, verify

State = Literal["ok", "note", "fault"]
"""`note`: something that medsr can do without is not here."""

DISTRIBUTION = "medsr"
SHOWN = (
    *("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "numpy", "safetensors"),
    *("nibabel", "pydicom", "SimpleITK", "Pillow", "isal"),
)
"""Distributions whose versions are told even where nothing asks for them."""
LITTLE_SPACE_BYTES = 2_000_000_000
GIGABYTE = 1e9


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    group: str
    name: str
    state: State
    found: str
    """What was found, a phrase."""
    remedy: str = ""
    """What to do about it, a sentence; empty where there is nothing to do."""
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine(progress: Progress, *, quick: bool = False, threads: int | None = None) -> Iterator[Check]:
    """Look at everything in turn.

    Args:
        progress: is told what takes time.
        quick: leave out the runs of the methods.
        threads: of the processor.
    """
    yield from _versions()
    yield from _devices()
    yield from _providers()
    yield from _codecs()
    shelf = open_shelf()
    yield from _store(shelf)
    if not quick:
        for trial in trials(shelf, progress, threads):
            yield Check("methods", trial.name, trial.state, trial.found, trial.remedy, trial.facts)


# -- versions ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    yield Check("versions", "medsr", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    floors = _floors()
    for name in dict.fromkeys((*floors, *SHOWN)):
        found = _version(name)
        if found is None:
            if name in floors:
                remedy = f"Install it: pip install '{name}{floors[name]}'."
                yield Check("versions", name, "fault", "not installed", remedy)
        elif name in floors and not _satisfies(found, floors[name]):
            remedy = f"Install another: pip install '{name}{floors[name]}'."
            yield Check("versions", name, "fault", f"{found}, needs {floors[name]}", remedy, {"version": found})
        else:
            yield Check("versions", name, "ok", found, facts={"version": found})
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        yield Check(
            "versions",
            "onnxruntime twice",
            "fault",
            "onnxruntime and onnxruntime-gpu are one module, and both are installed",
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want.",
        )


def _floors() -> dict[str, str]:
    """Distribution to the versions that medsr asks for; empty where medsr runs from a folder."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(text) for text in texts]
    return {
        need.name: str(need.specifier) for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})
    }


def _satisfies(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- devices and providers -------------------------------------------------------------------------------------


def _devices() -> Iterator[Check]:
    import psutil
    import torch

    free = psutil.virtual_memory().available / GIGABYTE
    found = f"{machine()}, {free:.1f} GB of memory free, PyTorch takes {torch.get_num_threads()} threads"
    yield Check("devices", "cpu", "ok", found)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            left, whole = torch.cuda.mem_get_info(number)
            found = f"{torch.cuda.get_device_name(number)}, {left / GIGABYTE:.1f} of {whole / GIGABYTE:.1f} GB free"
            yield Check("devices", f"cuda:{number}", "ok", found)
    elif torch.version.cuda is None:
        remedy = "With an NVIDIA GPU, install PyTorch's CUDA build; see pytorch.org." if _has_nvidia() else ""
        yield Check("devices", "cuda", "note", "this PyTorch was built without CUDA", remedy)
    else:
        remedy = "Check nvidia-smi: the driver may be too old for this PyTorch." if _has_nvidia() else ""
        yield Check("devices", "cuda", "note", "no usable NVIDIA GPU or driver", remedy)
    if torch.backends.mps.is_available():
        yield Check("devices", "mps", "ok", "Apple's GPU")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def _providers() -> Iterator[Check]:
    from medsr_cli.engines.onnx_provider import providers

    for provider in providers():
        if provider.works:
            yield Check("providers", provider.name, "ok", "works")
        else:
            wanted = provider.name.startswith("CUDA") and _has_nvidia()
            yield Check("providers", provider.name, "note", provider.fault, provider.remedy if wanted else "")


# -- codecs and store ------------------------------------------------------------------------------------------


def _codecs() -> Iterator[Check]:
    from medsr_cli.formats.codecs import codecs

    for codec in codecs():
        if codec.fault:
            remedy = f"Install it again: pip install --force-reinstall {codec.library}."
            yield Check("codecs", codec.name, "fault", f"{codec.library}: {codec.fault}", remedy)
        else:
            yield Check("codecs", codec.name, "ok", codec.library)


def _store(shelf: Shelf) -> Iterator[Check]:
    home = shelf.store.home
    standing = next(folder for folder in (home, *home.parents) if folder.exists())
    if os.access(standing, os.W_OK):
        yield Check("store", "place", "ok", str(home))
    else:
        remedy = "Set MEDSR_HOME to a folder that you may write to."
        yield Check("store", "place", "fault", f"{home} cannot be written to", remedy)
    for name, folder in (("space for weights", standing), ("space for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        little = free < LITTLE_SPACE_BYTES
        yield Check(
            "store",
            name,
            "note" if little else "ok",
            f"{free / GIGABYTE:.1f} GB free in {folder}",
            "Make room: a large volume enlarged four times takes gigabytes." if little else "",
            {"free_bytes": free},
        )
    checked = verify(shelf=shelf)
    for entry in checked:
        if entry.status == "corrupt":
            remedy = f"Fetch it again: medsr weights pull {entry.entry.id}."
            yield Check("store", entry.entry.id, "fault", entry.reason, remedy)
    here = sum(entry.status == "ok" for entry in checked)
    found = f"{here} of {len(checked)} checkpoints are here and whole"
    yield Check("store", "checkpoints", "ok" if here else "note", found, facts={"present": here, "known": len(checked)})
