"""What `medsr weights` does: list, pull, verify, import, bundle; `tasks.push` sends.

PyTorch, the network and archives are imported where they are used: a listing needs none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.errors import ArgumentsError, MedsrError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.weights.manifest import Entry, Manifest, load_manifest
from medsr_cli.weights.store import Digest, Record, State, Store, digest_file

if TYPE_CHECKING:
    from torch import nn

    from medsr_cli.weights.bundle import Arrived
    from medsr_cli.weights.patience import Policy, Progress


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


# -- pull --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PullRequest:
    """Which checkpoints to bring to this machine: ids, entries that someone pushed (`ID.yaml`), or all."""

    names: Sequence[str] = ()
    everything: bool = False
    allow_unpinned: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Pulled:
    """A checkpoint that is here and verified; `seen` is what an unpinned source turned out to be."""

    entry: Entry
    path: Path
    fetched: bool
    seen: Digest | None = None


@dataclass(frozen=True)
class PullResult:
    """What came, what was left out because nothing pins it or medsr cannot fetch it, and what failed."""

    pulled: list[Pulled]
    skipped: list[Entry]
    failed: list[tuple[Entry, MedsrError]]
    by_hand: list[Entry] = field(default_factory=list)


def pull(
    request: PullRequest,
    progress: Progress | None = None,
    shelf: Shelf | None = None,
    policy: Policy | None = None,
) -> PullResult:
    """Fetch, verify and convert checkpoints; what is here and whole is not fetched again.

    One that fails does not stop the others. With `everything`, unpinned ones are left out unless allowed, and
    those that only a person can fetch unless that has been done.

    Raises:
        ArgumentsError: nothing or an unknown checkpoint was named.
        WeightsError: the manifest is invalid.
    """
    shelf = shelf or open_shelf()
    known = {entry.id for entry in shelf.manifest.entries}
    entries = _wanted(shelf, request, policy)
    shelf.store.sweep()
    result = PullResult([], [], [])
    for entry in entries:
        if request.everything and _only_by_hand(shelf.store, entry):
            result.by_hand.append(entry)
            continue
        if request.everything and not entry.pinned and not request.allow_unpinned:
            result.skipped.append(entry)
            continue
        try:
            result.pulled.append(_pull_one(shelf.store, entry, request, progress, policy))
            if entry.id not in known:
                shelf.store.write_entry(entry)
        except MedsrError as error:
            result.failed.append((entry, error))
    return result


def _wanted(shelf: Shelf, request: PullRequest, policy: Policy | None) -> list[Entry]:
    """The entries of all names, those that are read from files and addresses among them."""
    from medsr_cli.tasks.announced import announced, is_announcement

    wanted: dict[str, Entry] = {}
    for name in request.names:
        if is_announcement(name) and not request.everything:
            found = announced(name, shelf.manifest, offline=request.offline, policy=policy)
        else:
            found = _named(shelf.manifest, [name], everything=request.everything)
        wanted |= {entry.id: entry for entry in found}
    return [*wanted.values()] or _named(shelf.manifest, (), everything=request.everything)


def _named(manifest: Manifest, names: Sequence[str], *, everything: bool) -> list[Entry]:
    if everything:
        if names:
            msg = "Both --all and names of checkpoints were given."
            raise ArgumentsError(msg, "Give one or the other.")
        return list(manifest.entries)
    if not names:
        msg = "No checkpoint was named."
        raise ArgumentsError(msg, "Name one or more (medsr weights list shows them), or pass --all.")
    return [manifest.entry(name) for name in dict.fromkeys(names)]


def _pull_one(
    store: Store, entry: Entry, request: PullRequest, progress: Progress | None, policy: Policy | None
) -> Pulled:
    if _only_by_hand(store, entry):
        msg = f"medsr cannot fetch {entry.id} by itself."
        raise WeightsError(msg, entry.how_to_get)
    if not entry.pinned and not request.allow_unpinned:
        msg = f"The manifest does not say which bytes {entry.id} is, so nothing can check what the server sends."
        raise WeightsError(msg, "Pass --allow-unpinned if you trust the source; the hash seen is printed.")
    here = _whole_here(store, entry)
    if here is not None:
        return Pulled(entry, here, fetched=False)
    with store.lock(entry.id):
        here = _whole_here(store, entry)  # another job may have fetched it while this one waited
        if here is not None:
            return Pulled(entry, here, fetched=False)
        digest, url = _obtain_source(store, entry, request, progress, policy)
        try:
            _put_in_store(store, entry, digest, url)
            path = store.verified_path(entry, allow_unpinned=True)
        except WeightsError:
            # Such as the login page of a proxy: kept, it would pass for a copy made by hand next time.
            if url and not entry.pinned:
                store.source_path(entry).unlink(missing_ok=True)
            raise
    return Pulled(entry, path, fetched=True, seen=None if entry.pinned else digest)


def _only_by_hand(store: Store, entry: Entry) -> bool:
    """Whether a person has to get the file, and has not yet put it anywhere that `pull` looks."""
    return not entry.sources and not store.present(entry) and not store.source_path(entry).is_file()


def _whole_here(store: Store, entry: Entry) -> Path | None:
    """The checkpoint if it is here, whole and traceable; None where it has to be fetched (again)."""
    state = store.state(entry)
    if state == "missing" or (state == "present" and store.record(entry) is None):
        return None
    try:
        return store.verified_path(entry, allow_unpinned=True)
    except WeightsError:
        if state == "bundled":
            raise
        return None


def _obtain_source(
    store: Store, entry: Entry, request: PullRequest, progress: Progress | None, policy: Policy | None
) -> tuple[Digest, str]:
    """The file that the sources give: one that was copied in by hand, else a download."""
    from medsr_cli.weights.download import download
    from medsr_cli.weights.fetch import offline_reason
    from medsr_cli.weights.patience import silent

    by_hand = store.source_path(entry)
    if by_hand.is_file():
        digest = digest_file(by_hand)
        try:
            store.refuse_mismatch(entry, digest, by_hand)
            if entry.pinned or store.record(entry) is None:
                return digest, ""
        except WeightsError:
            if offline_reason(request.offline):
                raise
    fetched = download(entry, store, offline=request.offline, progress=progress or silent, policy=policy)
    return fetched.digest, fetched.url


def _put_in_store(store: Store, entry: Entry, source: Digest, url: str) -> None:
    """Convert where needed, and write down where it came from."""
    path = store.source_path(entry)
    stored = source
    if entry.format != "safetensors":
        data = _convert_for_store(entry, path, source)
        stored = Digest(len(data), hashlib.sha256(data).hexdigest(), "")
        store.write(store.path(entry), data)
    store.write_record(Record(entry.id, stored.bytes, stored.sha256, source.bytes, source.sha256, source.git_blob, url))
    if path != store.path(entry):
        path.unlink(missing_ok=True)


def _convert_for_store(entry: Entry, path: Path, source: Digest) -> bytes:
    from medsr_cli.networks import checkpoint

    network = _read_network(path, catalogue.find(entry.method)[0], entry.id)
    _refuse_other_network(entry, checkpoint.config_of(network))
    described = {
        "id": entry.id,
        "scales": json.dumps(entry.scales),
        "scale_range": json.dumps(entry.scale_range),
        "modality": entry.modality,
        "body_part": entry.body_part,
        "value_range": json.dumps(entry.value_range),
        "degradation": entry.degradation,
        "licence_of_weights": entry.licence.weights,
        "source_sha256": source.sha256,
    }
    return checkpoint.save_network(network, described)


def _refuse_other_network(entry: Entry, config: dict[str, Any]) -> None:
    """A file of the right method may still be of another variant, scale or number of channels."""
    arch = catalogue.find(entry.method)[0]
    variant = arch.variant_of(config)
    facts: list[tuple[str, object, object]] = [("channels", entry.channels, config.get("in_channels", entry.channels))]
    if entry.variant:
        facts.append(("variant", entry.variant, variant))
    if "scale" in config and config["scale"] not in entry.scales:
        facts.append(("scale", entry.scales, config["scale"]))
    for fact, expected, found in facts:
        if expected != found:
            msg = f"The file of {entry.id} is of {fact} {found}, where the manifest says {expected}."
            raise WeightsError(msg, "The source gave another checkpoint: report it, or import it with weights import.")


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
    entries = _named(shelf.manifest, names, everything=not names)
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
    """Convert a .pt, .pth, .tar or .safetensors checkpoint to a safetensors file that `--weights` takes.

    Raises:
        ArgumentsError: no such method, or the output is not called .safetensors.
        WeightsError: not a checkpoint, of another network, incomplete, NaN, or code beside the tensors.
        RunError: the output exists and `overwrite` is false, or it cannot be written.
    """
    arch, variant = _method_with_weights(request.method)
    if request.output.suffix != ".safetensors":
        msg = f"The output {request.output.name} is not called .safetensors."
        raise ArgumentsError(msg, "Give it that ending; later commands go by it.")
    from medsr_cli.formats.atomic import atomic_file
    from medsr_cli.networks import checkpoint

    network = _read_network(request.file, arch, request.file.name)
    found = checkpoint.entry_of(network)
    if request.settings:
        wanted = _with_settings(found, network.config, request.settings)
        network = checkpoint.network_from_state(network.state_dict(), found, wanted, name=request.file.name)
    config = checkpoint.config_of(network)
    if variant is not None and found.variant_of(config) != variant:
        msg = f"{request.file.name} is {found.variant_of(config) or f'a {found.id} of other sizes'}, not {variant}."
        raise WeightsError(msg, f"Pass -m {found.id}.")
    source = digest_file(request.file)
    data = checkpoint.save_network(network, {"id": request.output.stem, "source_sha256": source.sha256})
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
        untold=found.untold_fields,
    )


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


def _read_network(path: Path, arch: catalogue.Arch | None, name: str) -> nn.Module:
    """A checkpoint of any accepted kind as a network that has run once."""
    from medsr_cli.networks import checkpoint

    state = checkpoint.read_author_checkpoint(path, numpy_scalars())
    if arch is None or arch.family:
        # A family has several networks under one name: the tensors tell which it is.
        found = checkpoint.detect_method(state, name)
        arch = found if arch is None or found in catalogue.named(arch.id) else arch
    network = checkpoint.network_from_state(state, arch, name=name)
    checkpoint.rehearse(network, name)
    return network


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
        entries = _named(shelf.manifest, request.names, everything=False)
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
