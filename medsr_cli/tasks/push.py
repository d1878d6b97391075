"""What `medsr weights push` does: check a checkpoint, say what would go where, send it, read it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.weights.manifest import Source
from medsr_cli.weights.push import (
    HubTarget,
    Outgoing,
    Parcel,
    Sent,
    SiteTarget,
    authorization,
    parcel_of_entry,
    parcel_of_file,
    parse_target,
    secret_from,
)

if TYPE_CHECKING:
    from medsr_cli.tasks.weights import Shelf
    from medsr_cli.weights.patience import Policy, Progress

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")
SITE_TOKEN = "MEDSR_PUSH_TOKEN"  # noqa: S105 -- the name of a variable
"""The variable that holds the secret for a web server, where --token-env names no other."""


@dataclass(frozen=True)
class PushRequest:
    """What to send where."""

    what: str
    """A safetensors file, or the id of a checkpoint that is on this machine."""
    to: str
    card: Path | None = None
    token_env: str | None = None
    """Name of the variable that holds the secret."""
    private: bool = False
    dry_run: bool = False
    overwrite: bool = False
    insecure_http: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Planned:
    """A file that would go out; `bytes` and `sha256` are None for the entry of a hub, which names its commit."""

    name: str
    to: str
    bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class Pushed:
    """What was planned, and what became of it; nothing where it was a dry run."""

    id: str
    plan: list[Planned]
    sent: list[Sent]
    pull: str
    """What the receiving side gives to `medsr weights pull`; empty where it cannot pull from there."""


def push(
    request: PushRequest,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    shelf: Shelf | None = None,
    policy: Policy | None = None,
) -> Pushed:
    """Send a checkpoint with its card and its entry of the manifest, after all was checked.

    Args:
        request: what, and where to.
        progress: told about each file.
        say: told, before the first byte, what goes where.
        shelf: the checkpoints of this machine.
        policy: how patient.

    Raises:
        ArgumentsError: an address that is none, an unknown id, a variable that is not set.
        WeightsError: offline; the checkpoint does not load, has no card or no licence; what was read back is
            not what was sent.
        RunError: the other side has other bytes under the name or refuses, or the connection failed.
    """
    target = parse_target(request.to, insecure_http=request.insecure_http)
    if request.private and isinstance(target, SiteTarget):
        msg = "--private is for a model hub; who may read a web server is for its keeper to say."
        raise ArgumentsError(msg, "Leave it out.")
    secret = secret_from(request.token_env, SITE_TOKEN if isinstance(target, SiteTarget) else "HF_TOKEN")
    _refuse_offline(request)
    parcel = _parcel(request, shelf)
    files = _site_files(parcel, target) if isinstance(target, SiteTarget) else [*parcel.files]
    plan = _planned(parcel, files, target)
    for line in plan:
        size = f"{line.bytes} bytes, sha256 {line.sha256}" if line.sha256 else "names the commit of the others"
        say(f"{line.name} -> {line.to} ({size})")
    say(f"Licence of the weights: {parcel.entry.licence.weights}. Of the data: {parcel.entry.licence.data}.")
    pull = f"{_folder(target)}{parcel.entry.id}.yaml" if _can_be_pulled(target) else ""
    if request.dry_run:
        return Pushed(parcel.entry.id, plan, [], pull)
    from medsr_cli.weights.patience import silent
    from medsr_cli.weights.send import PATIENCE, Login, Manner, send_to_site

    manner = Manner(request.overwrite, request.private, progress or silent, policy or PATIENCE, say)
    if isinstance(target, SiteTarget):
        sent = send_to_site(files, target, Login(authorization(secret)), manner)
    else:
        from medsr_cli.weights.hub import login_token, send_to_hub

        sent = send_to_hub(parcel, target, secret or login_token(), manner)
    return Pushed(parcel.entry.id, plan, sent, pull)


def _refuse_offline(request: PushRequest) -> None:
    from medsr_cli.weights.fetch import offline_reason

    reason = offline_reason(request.offline)
    if reason and not request.dry_run:
        msg = f"{reason} forbids sending anything."
        raise WeightsError(msg, "Add --dry-run to see what would be sent; medsr weights bundle carries it by hand.")


def _parcel(request: PushRequest, shelf: Shelf | None) -> Parcel:
    path = Path(request.what)
    if path.exists() or path.suffix in CHECKPOINT_SUFFIXES:
        return parcel_of_file(path, request.card)
    from medsr_cli.tasks.weights import open_shelf

    shelf = shelf or open_shelf()
    try:
        entry = shelf.manifest.entry(request.what)
    except ArgumentsError as error:
        msg = f"{request.what} is neither a file nor the id of a checkpoint."
        raise ArgumentsError(msg, error.remedy) from error
    # Unpinned ones too: what is sent is the file that lies here, under the hash that it has.
    return parcel_of_entry(entry, shelf.store.verified_path(entry, allow_unpinned=True), request.card)


def _site_files(parcel: Parcel, target: SiteTarget) -> list[Outgoing]:
    """The entry last: what it announces is then there."""
    url = f"{target.url}{parcel.weights.name}"
    if target.can_be_pulled:
        entry = parcel.described(Source("url", parcel.weights.name, url=url))
    else:
        entry = parcel.described(by_hand=url)
    return [*parcel.files, entry]


def _folder(target: HubTarget | SiteTarget) -> str:
    return target.url if isinstance(target, SiteTarget) else f"{target}/"


def _can_be_pulled(target: HubTarget | SiteTarget) -> bool:
    return isinstance(target, HubTarget) or target.can_be_pulled


def _planned(parcel: Parcel, files: list[Outgoing], target: HubTarget | SiteTarget) -> list[Planned]:
    folder = _folder(target)
    plan = [Planned(file.name, folder + file.name, file.digest.bytes, file.digest.sha256) for file in files]
    if isinstance(target, HubTarget):
        plan.append(Planned(f"{parcel.entry.id}.yaml", f"{folder}{parcel.entry.id}.yaml", None, None))
    return plan
