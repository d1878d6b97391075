"""`medsr export`, and the exports that `--backend onnx` keeps in the store.

PyTorch is imported where a network is really exported: an export that the store has already is used without it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.engines.onnx_file import OPSET, OnnxFile, checked_onnx, refuse_opset
from medsr_cli.engines.onnx_runner import known_precision
from medsr_cli.errors import ArgumentsError, MedsrError, RunError, WeightsError, mention
from medsr_cli.formats.atomic import ANY_REMEDY, atomic_file, refuse_existing
from medsr_cli.networks import catalogue
from medsr_cli.tasks.model import is_path
from medsr_cli.tasks.progress import Progress
from medsr_cli.weights.exports import Export, export_of, one_at_a_time
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.manifest import Entry
from medsr_cli.weights.selection import select
from medsr_cli.weights.store import Store, digest_file

if TYPE_CHECKING:
    from torch import nn

    from medsr_cli.engines.onnx_export import Agreement

DEFAULT_SCALE = 4.0


@dataclass(frozen=True)
class ExportRequest:
    """Which network to export, and how."""

    output: Path
    model: str = "rdst"
    scale: float | None = None
    """Chooses among checkpoints; None is 4, or that of the file named in `weights`."""
    weights: str | None = None
    """A checkpoint's id or a .safetensors file; None for the manifest's choice."""
    modality: str | None = None
    opset: int = OPSET
    precision: str = "fp32"
    overwrite: bool = False
    check: bool = True
    """Whether to compare with PyTorch; the model is looked at by ONNX's checker in any case."""
    allow_unpinned: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    checkpoint: str
    """Its id, or the name of its file."""
    method: str
    """With its variant, such as `rdst-e`."""
    scale: float | None
    """None where the scale is an input."""
    bytes: int
    sha256: str
    opset: int
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    largest_difference: float | None
    """From PyTorch, as a part of the range; None where it was not compared."""
    sizes: tuple[tuple[int, int, int], ...]
    """Planes, rows and columns of the images that were compared."""


@dataclass(frozen=True)
class _Source:
    """A verified checkpoint file, and what is said of it."""

    path: Path
    id: str
    sha256: str
    metadata: Mapping[str, str]


def export(request: ExportRequest, progress: Progress) -> Exported:
    """Write a checkpoint as one ONNX file for any number and size of images.

    Raises:
        ArgumentsError: an option that cannot be, a scale without a checkpoint, an output that exists.
        WeightsError: the checkpoint is missing or damaged.
        RunError: the exported model is not the network, or it could not be written.
    """
    precision = known_precision(request.precision)
    refuse_opset(request.opset)
    if request.output.suffix != ".onnx":
        msg = f"{mention(request.output.name)} does not end in .onnx."
        raise ArgumentsError(msg, "Name the output FILE.onnx: medsr knows such files by their ending.")
    if request.output.is_dir():
        msg = f"{mention(request.output)} is a folder."
        raise ArgumentsError(msg, "Name a file, FILE.onnx.")
    refuse_existing(request.output, request.overwrite, ANY_REMEDY)
    source, net = _chosen(request)
    progress.say(f"Exporting {source.id} with opset {request.opset}.")
    file, agreement = _made(source, net, request.opset, precision, check=request.check)
    with atomic_file(request.output, overwrite=request.overwrite) as out:
        out.write(file.data)
    return Exported(
        path=request.output,
        checkpoint=source.id,
        method=file.variant,
        scale=None if file.traits.any_scale else float(file.traits.scale),
        bytes=len(file.data),
        sha256=file.sha256,
        opset=file.opset,
        precision=file.precision,
        inputs=(*file.inputs, *file.optional_inputs),
        outputs=file.outputs,
        largest_difference=agreement.largest_difference if agreement else None,
        sizes=agreement.sizes if agreement else (),
    )


def stored_export(
    checkpoint_path: Path, sha256: str, precision: str, progress: Progress, store: Store | None = None
) -> OnnxFile:
    """The ONNX file of a checkpoint, from the store; made there first if it is missing or damaged.

    A store that cannot be written to is no failure: the file is then made for this run alone, with a warning.

    Args:
        checkpoint_path: verified; a safetensors file.
        sha256: of that file.
        precision: `auto`, `fp32` or `fp16`.
        progress: is told that a file is made, which takes up to half a minute, and why one is made anew.
        store: that of `MEDSR_HOME` where None.

    Raises:
        ArgumentsError: a precision that ONNX Runtime does not have.
        WeightsError: the checkpoint is damaged, or its network cannot be exported.
        RunError: the exported model is not the network.
    """
    store = store or Store()
    place = export_of(store, sha256, known_precision(precision), OPSET)
    found = _kept(place)
    if found is not None:
        return found
    with contextlib.ExitStack() as locked:
        try:
            locked.enter_context(one_at_a_time(store, place))
        except WeightsError as error:
            progress.warn(f"The ONNX file is made for this run alone: {error.sentence}")
            return _made_of_file(checkpoint_path, sha256, place.precision, progress)
        found = _kept(place)  # by another job, while this one waited
        if found is not None:
            return found
        if place.is_there():
            progress.warn(f"The ONNX file in the store was damaged and is made anew: {mention(place.path.name)}.")
        file = _made_of_file(checkpoint_path, sha256, place.precision, progress)
        _keep(place, file.data, progress)
    return file


def has_stored_export(sha256: str, precision: str, store: Store | None = None) -> bool:
    """Whether the store has a file for a checkpoint; whether it is whole, `stored_export` looks."""
    return export_of(store or Store(), sha256, known_precision(precision), OPSET).is_there()


# -- the store's exports ---------------------------------------------------------------------------------------------


def _kept(place: Export) -> OnnxFile | None:
    """The store's file if it is whole and one that this medsr runs."""
    data = place.read()
    if data is None:
        return None
    try:
        return checked_onnx(data, place.path.name)
    except WeightsError:
        return None


def _keep(place: Export, data: bytes, progress: Progress) -> None:
    """Put it into the store, its record last, and remove what it takes the place of."""
    try:
        with atomic_file(place.path, overwrite=True) as out:
            out.write(data)
        with atomic_file(place.record_path, overwrite=True) as out:
            out.write(place.record(data))
    except RunError as error:
        progress.warn(f"The ONNX file could not be kept for the next run: {error.sentence}")
        return
    for path in place.older():
        with contextlib.suppress(OSError):
            path.unlink()


def _made_of_file(path: Path, sha256: str, precision: str, progress: Progress) -> OnnxFile:
    progress.say("Exporting the network for ONNX Runtime; this takes up to a minute, once for each checkpoint.")
    net = _network(path)
    source = _Source(path, path.name, sha256, _metadata(path, net))
    return _made(source, net, OPSET, precision, check=True)[0]


def _made(
    source: _Source, net: nn.Module, opset: int, precision: str, *, check: bool
) -> tuple[OnnxFile, Agreement | None]:
    from medsr_cli.engines.onnx_export import checked, exported_network

    try:
        data = exported_network(net, source.metadata, checkpoint_sha256=source.sha256, opset=opset, precision=precision)
        if not check:
            return checked_onnx(data, "the exported file"), None
        return checked(data, net)
    except (MedsrError, MemoryError):
        raise
    except Exception as error:  # whatever the exporter raises: its errors have no class in common
        msg = f"PyTorch could not export {source.id} with opset {opset} ({type(error).__name__})."
        raise RunError(msg, f"Use --opset {OPSET}, or run it with --backend torch.") from error


# -- which checkpoint ------------------------------------------------------------------------------------------------


def _chosen(request: ExportRequest) -> tuple[_Source, nn.Module]:
    """The checkpoint that `medsr upscale` would take, loaded."""
    if request.weights is not None and is_path(request.weights):
        return _of_file(request, Path(request.weights))
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    scale = DEFAULT_SCALE if request.scale is None else request.scale
    entry = select(shelf.manifest, request.weights or request.model, scale, request.modality, shelf.store.present)
    path = shelf.store.verified_path(entry, request.allow_unpinned)
    net = _network(path)
    metadata = {**_metadata_of_entry(entry), **_metadata(path, net)}
    return _Source(path, entry.id, digest_file(path).sha256, metadata), net


def _of_file(request: ExportRequest, path: Path) -> tuple[_Source, nn.Module]:
    wanted = catalogue.find(request.model)[0]
    if not path.is_file():
        msg = f"There is no checkpoint {mention(path)}."
        raise WeightsError(msg, "Check the path given with --weights.")
    if path.suffix != ".safetensors":
        msg = f"{mention(path.name)} is not a safetensors file."
        raise WeightsError(
            msg, f"Convert it first: medsr weights import {mention(path.name)} -m {wanted.id} -o OUT.safetensors."
        )
    net = _network(path)
    _refuse_other(net, wanted, request.scale, path.name)
    return _Source(path, path.name, digest_file(path).sha256, _metadata(path, net)), net


def _refuse_other(net: nn.Module, wanted: catalogue.Arch, scale: float | None, name: str) -> None:
    """A file of another method or scale than the one that was named."""
    from medsr_cli.networks.checkpoint import config_of, entry_of

    arch = entry_of(net)
    if arch.kind == "network" and arch not in catalogue.named(wanted.id):
        msg = f"{mention(name)} is a checkpoint of {arch.id}, not of {wanted.id}."
        raise WeightsError(msg, f"Export it with -m {arch.id}.")
    own = float(config_of(net).get("scale", max(arch.scales, default=1)))
    if scale is not None and arch.scale_range is None and scale != own:
        msg = f"{mention(name)} enlarges by {own:g}, not by {scale:g}."
        raise ArgumentsError(msg, f"Use --scale {own:g}, or other weights.")


def _network(path: Path) -> nn.Module:
    from medsr_cli.networks import load_network
    from medsr_cli.networks.checkpoint import entry_of

    net = load_network(path)
    arch = entry_of(net)
    if arch.kind != "network":
        msg = f"{mention(path.name)} is a checkpoint of {arch.id}, which does not enlarge images."
        raise WeightsError(msg, "Use a checkpoint of a method that medsr models lists with scales.")
    return net


def _metadata(path: Path, net: nn.Module) -> dict[str, str]:
    """All that the file's header says; method and configuration also where it says nothing."""
    from medsr_cli.networks.checkpoint import FORMAT, config_of, entry_of

    own = {
        "medsr.format": FORMAT,
        "medsr.method": entry_of(net).id,
        "medsr.config": json.dumps(config_of(net), sort_keys=True),
    }
    return {**read_header(path).metadata, **own}


def _metadata_of_entry(entry: Entry) -> dict[str, str]:
    """What the manifest says of a checkpoint, in the words of a file's header."""
    facts: dict[str, object] = {
        "id": entry.id,
        "modality": entry.modality,
        "body_part": entry.body_part,
        "degradation": entry.degradation,
        "licence_of_weights": entry.licence.weights,
        "trained_on": entry.trained_on,
        "notes": entry.notes,
        "scales": list(entry.scales) or None,
        "scale_range": entry.scale_range,
        "spacing_mm": entry.spacing_mm,
        "value_range": entry.value_range,
    }
    known = entry.consistency
    if known is not None:
        facts["consistency"] = {"limit": known.limit, "slices": known.slices, "largest_seen": known.largest_seen}
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in facts.items()
        if value not in (None, "")
    }
