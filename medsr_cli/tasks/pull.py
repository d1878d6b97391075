"""What `medsr weights pull` does: fetch checkpoints, verify them, convert them where needed.

PyTorch and the network are imported where they are used: what is here and whole needs neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.errors import MedsrError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.tasks.weights import Shelf, named, open_shelf, read_network
from medsr_cli.weights.manifest import Entry
from medsr_cli.weights.store import Digest, Record, Store, digest_file

if TYPE_CHECKING:
    from medsr_cli.weights.patience import Policy, Progress


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
            found = named(shelf.manifest, [name], everything=request.everything)
        wanted |= {entry.id: entry for entry in found}
    return [*wanted.values()] or named(shelf.manifest, (), everything=request.everything)


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

    network = read_network(path, catalogue.find(entry.method)[0], entry.id)
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
