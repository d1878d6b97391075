"""Checkpoints that the manifest does not list, made known by an entry that someone pushed: `ID.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import ArgumentsError, WeightsError, mention, reason_of
from medsr_cli.weights.manifest import Entry, Manifest, parse_manifest

if TYPE_CHECKING:
    from medsr_cli.weights.patience import Policy

MAX_ENTRY_BYTES = 1_000_000
SUFFIXES = (".yaml", ".yml")


def is_announcement(name: str) -> bool:
    """Whether a name is a file or address of an entry rather than an id."""
    return name.endswith(SUFFIXES)


def announced(name: str, manifest: Manifest, *, offline: bool = False, policy: Policy | None = None) -> list[Entry]:
    """The entries of a small manifest: a file, `https://HOST/.../ID.yaml` or `hf://ORG/REPO[@REVISION]/ID.yaml`.

    An id that the manifest has already is the manifest's, and must be the same bytes.

    Raises:
        ArgumentsError: not such an address, or an id of the manifest for other bytes.
        WeightsError: offline, not to be had, or not a manifest.
    """
    data = _read(name, offline, policy)
    try:
        found = parse_manifest(data.decode(), name.rpartition("/")[2])
    except UnicodeDecodeError as error:
        msg = f"{mention(name)} is not text."
        raise WeightsError(msg, "Give the .yaml file that medsr weights push wrote.") from error
    known = {entry.id: entry for entry in manifest.entries}
    for entry in found.entries:
        ours = known.get(entry.id)
        if ours is not None and (ours.sha256 or ours.git_blob) != (entry.sha256 or entry.git_blob):
            msg = f"{mention(name)} calls its checkpoint {entry.id}, which is the id of another one here."
            raise ArgumentsError(msg, "Ask its sender for another id, or fetch it and pass its path to --weights.")
    return [known.get(entry.id, entry) for entry in found.entries]


def _read(name: str, offline: bool, policy: Policy | None) -> bytes:
    if "://" not in name:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            msg = f"{mention(name)} cannot be read ({reason_of(error)})."
            raise WeightsError(msg, "Check the path.") from error
        if len(data) > MAX_ENTRY_BYTES:
            msg = f"{mention(name)} has more than {MAX_ENTRY_BYTES} bytes."
            raise WeightsError(msg, "Give the .yaml file that medsr weights push wrote.")
        return data
    from medsr_cli.weights.download import fetch_small, hub_source
    from medsr_cli.weights.fetch import offline_reason

    reason = offline_reason(offline)
    if reason:
        msg = f"{reason} forbids fetching {mention(name)}."
        raise WeightsError(msg, "Get the file, and give its path.")
    if not name.startswith("hf://"):
        return fetch_small(name, MAX_ENTRY_BYTES, policy=policy)
    url, authorization = hub_source(name)
    return fetch_small(url, MAX_ENTRY_BYTES, authorization, policy)
