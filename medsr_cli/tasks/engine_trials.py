"""A tiny volume through every method, by every library and device that is here."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medsr_cli.engines.engine import Engine, Interpolation, Planes
from medsr_cli.errors import MedsrError
from medsr_cli.networks import catalogue
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.weights import Shelf
from medsr_cli.weights.manifest import Entry

if TYPE_CHECKING:
    from torch import nn

    from medsr_cli.engines.onnx_file import OnnxFile

SLICES, ROWS, COLUMNS = 3, 24, 20
FAR = 1e-3
"""A part of the result's range that no engine may differ by from PyTorch on the CPU: one stored unit in a thousand."""
SCALE_OF_ANY = (2.5, 2.5)
MOST_UNTRAINED = 20_000_000
"""Parameters of a network that is built here where there is no checkpoint; larger ones are left out."""


REMEDY = "Install the versions that medsr asks for again; if it stays so, tell the authors of medsr this line."


@dataclass(frozen=True)
class Trial:
    """What became of one method."""

    name: str
    state: Literal["ok", "note", "fault"]
    found: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A network to try, and how it comes into ONNX Runtime."""

    arch: catalogue.Arch
    load: Callable[[], nn.Module]
    export: Callable[[], OnnxFile]
    what: str
    """Which weights: a checkpoint's id, or that they are untrained."""


def trials(shelf: Shelf, progress: Progress, threads: int | None = None) -> Iterator[Trial]:
    """Every method of the catalogue that enlarges, in its order."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    for arch in catalogue.CATALOGUE:
        if arch.kind == "baseline":
            yield _baseline(arch)
        elif arch.kind == "network":
            yield _network(arch, shelf, progress, threads)


def _baseline(arch: catalogue.Arch) -> Trial:
    engine = Interpolation("lanczos" if arch.id == "lanczos" else "cubic", 4)
    difference = float(np.abs(engine.run(np.full((1, 1, ROWS, COLUMNS), 0.3)).planes - 0.3).max())
    state: Literal["ok", "fault"] = "ok" if difference < FAR else "fault"
    return Trial(arch.id, state, f"a constant stays one (largest difference {difference:.0e})")


def _network(arch: catalogue.Arch, shelf: Shelf, progress: Progress, threads: int | None) -> Trial:
    progress.say(f"Trying {arch.id}.")
    try:
        subject = _subject(arch, shelf, progress)
        if subject is None:
            return Trial(arch.id, "note", "no checkpoint here, and too large to be tried without one")
        return _compared(subject, threads)
    except MedsrError as error:
        return Trial(arch.id, "fault", str(error))
    except Exception as error:  # whatever a library may throw on this machine is what is looked for
        first = next(iter(str(error).strip().splitlines()), "")
        return Trial(arch.id, "fault", f"{type(error).__name__}: {first}", REMEDY)


def _compared(subject: Subject, threads: int | None) -> Trial:
    """PyTorch on the CPU in single precision is what the others are measured against."""
    from medsr_cli.engines.traits import Traits

    net = subject.load()
    traits = Traits.of(subject.arch, net)
    side = max(ROWS, traits.smallest, traits.side)
    planes = _noise((SLICES, traits.channels, side, max(COLUMNS, traits.smallest, traits.side)))
    reference: Planes | None = None
    largest, faults, differences = 0.0, list[str](), dict[str, float]()
    for name, make in _engines(subject, threads):
        try:
            engine = make()
        except MedsrError as error:
            faults.append(f"{name}: {error}")
            continue
        guide = _noise((SLICES, 1, *engine.size_of(*planes.shape[-2:]))) if engine.guided else None
        result = engine.run(planes, guide).planes
        if reference is None:
            reference = result
            continue
        difference = float(np.abs(result - reference).max() / np.ptp(reference))
        differences[name] = difference
        largest = max(largest, difference) if np.isfinite(difference) else float("inf")
        if not difference < FAR:
            faults.append(f"{name} differs by {difference:.1e} of the range")
    facts = {"weights": subject.what, "differences": differences, "largest_difference": largest}
    if faults:
        remedy = "Use --backend torch --device cpu until it is mended; another version of the library may be right."
        return Trial(subject.arch.id, "fault", "; ".join(faults), remedy, facts)
    tried = ", ".join(differences) or "no other engine here"
    return Trial(subject.arch.id, "ok", f"{tried}: largest difference {largest:.0e} ({subject.what})", facts=facts)


def _noise(shape: tuple[int, ...]) -> Planes:
    return np.random.default_rng(0).random(shape)


def _engines(subject: Subject, threads: int | None) -> Iterator[tuple[str, Callable[[], Engine]]]:
    import torch

    from medsr_cli.engines.build import engine_of
    from medsr_cli.engines.onnx_provider import CUDA, providers
    from medsr_cli.engines.onnx_runner import OnnxRunner
    from medsr_cli.engines.torch_runner import engine_for
    from medsr_cli.engines.traits import Traits

    arch = subject.arch
    traits = Traits.of(arch, subject.load())
    scale = SCALE_OF_ANY if traits.any_scale else (float(traits.scale), float(traits.scale))

    def through_torch(device: str) -> Engine:
        return engine_for(subject.load(), arch, scale, device=device, precision="fp32")

    def through_onnx(device: str) -> Engine:
        runner = OnnxRunner(subject.export(), device=device, precision="fp32", threads=threads)
        return engine_of(runner, arch, traits, scale)

    yield "torch on cpu", lambda: through_torch("cpu")
    yield "onnx on cpu", lambda: through_onnx("cpu")
    if torch.cuda.is_available():
        yield "torch on cuda", lambda: through_torch("cuda")
    elif torch.backends.mps.is_available():
        yield "torch on mps", lambda: through_torch("mps")
    if any(provider.name == CUDA and provider.works for provider in providers()):
        yield "onnx on cuda", lambda: through_onnx("cuda")


# -- networks to try -------------------------------------------------------------------------------------------


def _subject(arch: catalogue.Arch, shelf: Shelf, progress: Progress) -> Subject | None:
    """The first checkpoint of a method that is here; else a small network of it with seeded weights."""
    for entry in shelf.manifest.entries:
        if entry.method == arch.id and shelf.store.present(entry) and entry.pinned:
            return _of_entry(arch, entry, shelf, progress)
    return _untrained(arch)


def _of_entry(arch: catalogue.Arch, entry: Entry, shelf: Shelf, progress: Progress) -> Subject:
    from medsr_cli.networks import load_network
    from medsr_cli.provenance.record import sha256_of
    from medsr_cli.tasks.export import stored_export

    path = shelf.store.verified_path(entry)
    return Subject(
        arch,
        lambda: load_network(path),
        lambda: stored_export(path, sha256_of(path) or "", "fp32", progress),
        entry.id,
    )


def _untrained(arch: catalogue.Arch) -> Subject | None:
    import torch

    from medsr_cli.engines.onnx_export import exported_network
    from medsr_cli.engines.onnx_file import checked_onnx
    from medsr_cli.networks.checkpoint import FORMAT, config_of

    module = importlib.import_module(arch.module)
    config = getattr(module, arch.config)(**dict(next(iter(arch.variants.values()), {})))
    network = getattr(module, arch.network)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in network(config).parameters())
    if size > MOST_UNTRAINED:
        return None

    def load() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net: nn.Module = network(config)
        return net.eval()

    def export() -> OnnxFile:
        net = load()
        said = {"medsr.format": FORMAT, "medsr.method": arch.id, "medsr.config": json.dumps(config_of(net))}
        return checked_onnx(exported_network(net, said, checkpoint_sha256="0" * 64), arch.id)

    return Subject(arch, load, export, "untrained weights")
