"""What `medsr weights` does: list, verify, import, bundle; `tasks.pull` fetches and `tasks.push` sends.

PyTorch and archives are imported where they are used: a listing needs none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.errors import ArgumentsError, WeightsError, mention
from medsr_cli.networks import catalogue
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.manifest import Entry, Manifest, load_manifest
from medsr_cli.weights.store import State, Store, digest_file

if TYPE_CHECKING:
    from torch import nn

    from medsr_cli.weights.bundle import Arrived


@dataclass(frozen=True)
class Shelf:
    """The manifest, with the entries that bundles brought to this machine, and the store."""

    manifest: Manifest
    store: Store

    def first_present(self, method: str) -> Entry | None:
        """The first checkpoint of a method that is on this machine, in the manifest's order."""
        entries = (entry for entry in self.manifest.entries if entry.method == method)
        return next((entry for entry in entries if self.store.present(entry)), None)


def open_shelf(manifest_path: Path | None = None, store: Store | None = None) -> Shelf:
    """The checkpoints known to this machine.

    Raises:
        WeightsError: the manifest or an imported entry is invalid.
    """
    store = store or Store()
    return Shelf(load_manifest(manifest_path).extended(store.entries()), store)


def named(manifest: Manifest, names: Sequence[str], *, everything: bool) -> list[Entry]:
    """The entries of these ids, or all.

    Raises:
        ArgumentsError: both, neither, or an unknown id.
    """
    if everything:
        if names:
            msg = "Both --all and names of checkpoints were given."
            raise ArgumentsError(msg, "Give one or the other.")
        return list(manifest.entries)
    if not names:
        msg = "No checkpoint was named."
        raise ArgumentsError(msg, "Name one or more (medsr weights list shows them), or pass --all.")
    return [manifest.entry(name) for name in dict.fromkeys(names)]


# -- list --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """One checkpoint and where it stands."""

    entry: Entry
    state: State
    path: Path

    @property
    def words(self) -> str:
        """`bundled`, `present` or `missing`, with what stands in the way of fetching it."""
        if not self.entry.sources:
            return f"{self.state}, by hand"
        return self.state if self.entry.pinned else f"{self.state}, unpinned"


def list_weights(shelf: Shelf | None = None) -> list[Listed]:
    """Every checkpoint of the manifest, in its order.

    Raises:
        WeightsError: the manifest is invalid.
    """
    shelf = shelf or open_shelf()
    return [Listed(entry, shelf.store.state(entry), shelf.store.path(entry)) for entry in shelf.manifest.entries]


# -- verify ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """`ok`, `missing` or `corrupt`, and why."""

    entry: Entry
    status: str
    path: Path
    reason: str = ""


def verify(names: Sequence[str] = (), shelf: Shelf | None = None) -> list[Verified]:
    """Compute the hash of checkpoints again; no names means all of them.

    An unpinned checkpoint is `ok` if it is what was fetched at the time.

    Raises:
        ArgumentsError: an unknown checkpoint was named.
        WeightsError: the manifest is invalid.
    """
    shelf = shelf or open_shelf()
    entries = named(shelf.manifest, names, everything=not names)
    return [_verify_one(shelf.store, entry) for entry in entries]


def _verify_one(store: Store, entry: Entry) -> Verified:
    path = store.path(entry)
    if not store.present(entry):
        return Verified(entry, "missing", path)
    try:
        store.verified_path(entry, allow_unpinned=True)
    except WeightsError as error:
        return Verified(entry, "corrupt", path, str(error))
    return Verified(entry, "ok", path, "" if entry.pinned else "unpinned: compared with what was fetched")


# -- import ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportRequest:
    """An author's checkpoint to convert; no method means recognise it by its tensors."""

    file: Path
    output: Path
    method: str | None = None
    overwrite: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    """Values of the configuration that no tensor tells, such as a generator's scale."""


@dataclass(frozen=True)
class Imported:
    """The safetensors file that came out, and every size that was read from the shapes."""

    path: Path
    method: str
    variant: str | None
    config: dict[str, Any]
    parameters: int
    bytes: int
    sha256: str
    source_sha256: str
    untold: tuple[str, ...] = ()
    """Fields of the configuration that no tensor tells."""


def import_weights(request: ImportRequest) -> Imported:
    """Convert a .pt, .pth, .tar, .zip or .safetensors checkpoint to a safetensors file that `--weights` takes.

    A checkpoint of medsr's own declares what no tensor tells, and says what it was trained on: it is copied byte for
    byte once it has proved to load, or with `settings` keeps all of that but them.

    Raises:
        ArgumentsError: no such method, or the output is not called .safetensors.
        WeightsError: not a checkpoint, of another network, incomplete, NaN, or code beside the tensors; in a zip
            archive, not exactly one checkpoint.
        RunError: the output exists and `overwrite` is false, or it cannot be written.
    """
    arch, variant = _method_with_weights(request.method)
    if request.output.suffix != ".safetensors":
        msg = f"The output {mention(request.output.name)} is not called .safetensors."
        raise ArgumentsError(msg, "Give it that ending; later commands go by it.")
    from medsr_cli.formats.atomic import atomic_file
    from medsr_cli.networks import checkpoint

    network = read_network(request.file, arch, request.file.name)
    found = checkpoint.entry_of(network)
    if request.settings:
        wanted = _with_settings(found, network.config, request.settings)
        network = checkpoint.network_from_state(network.state_dict(), found, wanted, name=request.file.name)
    config = checkpoint.config_of(network)
    if variant is not None and found.variant_of(config) != variant:
        msg = (
            f"{mention(request.file.name)} is "
            f"{found.variant_of(config) or f'a {found.id} of other sizes'}, not {variant}."
        )
        raise WeightsError(msg, f"Pass -m {found.id}.")
    source = digest_file(request.file)
    told = _own_metadata(request.file)
    if told is None:
        data = checkpoint.save_network(network, {"id": request.output.stem, "source_sha256": source.sha256})
    elif request.settings:
        free = {key: value for key, value in told.items() if not key.startswith("medsr.")}
        data = checkpoint.save_network(network, free, half=_in_half_precision(request.file))
    else:
        data = request.file.read_bytes()
    with atomic_file(request.output, overwrite=request.overwrite) as file:
        file.write(data)
    return Imported(
        path=request.output,
        method=found.id,
        variant=found.variant_of(config),
        config=config,
        parameters=sum(value.numel() for value in network.parameters()),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        source_sha256=source.sha256,
        untold=found.untold_fields if told is None else (),
    )


def _own_metadata(path: Path) -> dict[str, str] | None:
    """What a checkpoint that medsr wrote says of itself; None of any other file."""
    if path.suffix != ".safetensors":
        return None
    metadata = read_header(path).metadata
    return metadata if "medsr.method" in metadata else None


def _in_half_precision(path: Path) -> bool:
    return any(dtype == "F16" for dtype, _ in read_header(path).tensors.values())


def _with_settings(arch: catalogue.Arch, config: Any, settings: Mapping[str, str]) -> Any:
    """The configuration with the values that were given for what no tensor tells.

    Raises:
        ArgumentsError: a field that tensors do tell, or a value that it cannot have.
    """
    changes: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in arch.loose_fields:
            msg = f"{arch.id} has no setting {name} that its tensors leave open."
            raise ArgumentsError(msg, f"Those are: {', '.join(arch.loose_fields) or 'none'}.")
        kind = type(getattr(config, name))
        try:
            changes[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            msg = f"{name} = {text} is no {kind.__name__}."
            raise ArgumentsError(msg, "Give NAME=VALUE.") from error
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        msg = f"{arch.id} cannot be so: {error}"
        raise ArgumentsError(msg.rstrip("."), "Give another value.") from error


def _method_with_weights(name: str | None) -> tuple[catalogue.Arch | None, str | None]:
    if name is None:
        return None, None
    arch, variant = catalogue.find(name)
    if not arch.module:
        msg = f"{arch.id} is computed, not learned: it has no weights to import."
        raise ArgumentsError(msg, "Name the method that the checkpoint is of.")
    return arch, variant


def numpy_scalars() -> list[Any]:
    """What a number of numpy is pickled with: training programs keep their figures beside the network as such."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")]
    # Older releases of numpy wrote the function's address as numpy.core.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def read_network(path: Path, arch: catalogue.Arch | None, name: str) -> nn.Module:
    """A checkpoint of any accepted kind as a network that has run once.

    Args:
        path: a pickle, safetensors, or a zip archive with one checkpoint in it.
        arch: the method; None recognises it.
        name: what to call the file in an error.

    Raises:
        WeightsError: not a checkpoint, of another network, incomplete, NaN, or code beside the tensors.
    """
    from medsr_cli.networks import checkpoint
    from medsr_cli.networks.archive import read_published_checkpoint

    if path.is_file() and _own_metadata(path) is not None:
        network = checkpoint.load_network(path)
        _refuse_other_method(checkpoint.entry_of(network), arch, name)
        checkpoint.rehearse(network, name)
        return network
    state = read_published_checkpoint(path, numpy_scalars())
    if arch is None or arch.family:
        # A family has several networks under one name: the tensors tell which it is.
        found = checkpoint.detect_method(state, name)
        arch = found if arch is None or found in catalogue.named(arch.id) else arch
    network = checkpoint.network_from_state(state, arch, name=name)
    checkpoint.rehearse(network, name)
    return network


def _refuse_other_method(found: catalogue.Arch, wanted: catalogue.Arch | None, name: str) -> None:
    """A checkpoint that declares its method is of no other one, but of any of its family."""
    if wanted is None or found == wanted or (wanted.family and found in catalogue.named(wanted.id)):
        return
    msg = f"{mention(name)} is not {wanted.id}: it declares that it is of {found.id}."
    raise WeightsError(msg, f"Pass -m {found.id}.")


# -- bundle ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportRequest:
    """Checkpoints to pack into one file; no names means all that are on this machine."""

    output: Path
    names: Sequence[str] = ()
    overwrite: bool = False


def export_bundle(request: ExportRequest, shelf: Shelf | None = None) -> list[Entry]:
    """Write a .zip or .tar of checkpoints with their manifest entries; returns what is in it.

    Raises:
        ArgumentsError: an unknown checkpoint, or neither .zip nor .tar.
        WeightsError: one is missing or corrupt, or there is none at all.
        RunError: the output exists and `overwrite` is false, or it cannot be written.
    """
    from medsr_cli.weights import bundle

    bundle.check_suffix(request.output)
    shelf = shelf or open_shelf()
    if request.names:
        entries = named(shelf.manifest, request.names, everything=False)
    else:
        entries = [entry for entry in shelf.manifest.entries if shelf.store.present(entry)]
    if not entries:
        msg = "No checkpoint is on this machine, so there is nothing to bundle."
        raise WeightsError(msg, "Run medsr weights pull first.")
    from medsr_cli.formats.atomic import atomic_file

    with atomic_file(request.output, overwrite=request.overwrite) as file:
        bundle.write_bundle(file, request.output.suffix, entries, shelf.store)
    return entries


def import_bundle(file: Path, shelf: Shelf | None = None) -> list[Arrived]:
    """Put the checkpoints of a bundle in the store, each verified before it gets its name.

    Raises:
        ArgumentsError: neither .zip nor .tar.
        WeightsError: damaged, malformed, or not what the manifest says.
    """
    from medsr_cli.weights import bundle

    shelf = shelf or open_shelf()
    return bundle.read_bundle(file, shelf.store, shelf.manifest)
