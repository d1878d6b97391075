"""Uploads to a model hub, by the client that `fetch` holds: preupload, the large file's own storage, and a commit.

The hub is that of `HF_ENDPOINT`. A commit shows whole or not at all, and names the commit it was made upon, so
that nothing changed in between is lost. The checkpoint and its card are one commit; the entry of the manifest
is a second one, since it pins the first by its id. The card is also made the repository's front page where it
has none.

Large files go to the hub's storage. Nothing that the library or the hub says is repeated, for the addresses of that
storage are keys to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medsr_cli.errors import RunError, WeightsError
from medsr_cli.weights.download import fetch_small
from medsr_cli.weights.fetch import (
    PUBLIC_HUB,
    HubClient,
    NoBranch,
    NoRepository,
    Repository,
    classify,
    hub_endpoint,
    hub_file_url,
    hub_library,
    hub_login,
)
from medsr_cli.weights.manifest import Source, parse_manifest
from medsr_cli.weights.model_card import hub_front_page
from medsr_cli.weights.patience import Failed, Progress, Retry, backoff, silent
from medsr_cli.weights.push import HubTarget, Outgoing, Parcel, Sent, authorization
from medsr_cli.weights.send import PATIENCE, Login, Manner, OtherBytesError, SendError, look_at

MAX_ENTRY_BYTES = 1_000_000
FRONT_PAGE = "README.md"
HUB_REFUSALS = {
    400: ("status", "the hub finds the request wrong (HTTP 400)", "Check the name of the repository."),
    401: ("forbidden", "the hub does not know this login, or it may not see the repository (HTTP 401)", ""),
    403: ("forbidden", "the hub does not let this login write there (HTTP 403)", ""),
    404: ("not-found", "the hub has no such repository or branch, or does not show it (HTTP 404)", ""),
    409: ("conflict", "the hub is at work on that name (HTTP 409)", "Push again later."),
    412: ("changed", "the repository was changed by someone else in the meantime (HTTP 412)", "Push again."),
    413: ("too-large", "the hub takes no file of this size (HTTP 413)", "Ask its keeper to raise the limit."),
    429: ("busy", "the hub has had too many requests (HTTP 429)", "Push again later."),
    507: ("full", "the hub has no room left (HTTP 507)", "Make room there."),
}
LOGIN_REMEDY = "Set HF_TOKEN to a token that may write there, name another variable with --token-env, or hf auth login."

_COMMIT = re.compile(r"[0-9a-f]{40}")


def login_token() -> str:
    """The token of `HF_TOKEN`, else of the hub's own login; empty where there is none."""
    with hub_library(PATIENCE):
        return hub_login()


def send_to_hub(parcel: Parcel, target: HubTarget, token: str, manner: Manner) -> list[Sent]:
    """Commit a checkpoint, its card and its entry to a repository, which is made if it is not there.

    Args:
        parcel: what to send.
        target: repository and branch.
        token: may write there; goes to the hub's host alone.
        manner: whether to replace, how patient, who is told.

    Raises:
        SendError: other bytes are there and may not be replaced, the hub refuses, or the connection failed.
        OtherBytesError: what was read back is not what was sent.
    """
    endpoint = _endpoint()
    if not token and endpoint == PUBLIC_HUB:
        msg = "There is no login for the model hub."
        raise SendError("forbidden", msg, LOGIN_REMEDY)
    with hub_library(manner.policy), _explained(f"Sending {parcel.entry.id} to {target}"):
        return _Push(HubClient(endpoint, token), target, Login(authorization(token)), manner).run(parcel)


def _endpoint() -> str:
    try:
        return hub_endpoint()
    except Failed as failure:
        msg = f"{failure.reason}."
        raise SendError(failure.kind, msg, "Set it to an https address.") from None


@dataclass
class _Push:
    """One parcel on its way to one repository."""

    client: HubClient
    target: HubTarget
    login: Login
    manner: Manner

    def run(self, parcel: Parcel) -> list[Sent]:
        found = self._repository()
        states = {file.name: _state(found, file) for file in parcel.files}
        head = found.commit
        entry_name = f"{parcel.entry.id}.yaml"
        there = self._entry_there(parcel, head) if entry_name in found.files else "absent"
        self._refuse_replacing({**states, entry_name: there})
        new = [file for file in parcel.files if states[file.name] != "equal"]
        if new:
            head = self._commit(new, f"Add {parcel.entry.id}", head)
        sent = [self._read_back(file, states[file.name], head) for file in parcel.files]
        if there == "equal" and not new:
            return [*sent, self._already(entry_name, head)]
        described = parcel.described(self._source(parcel, head))
        front = [] if FRONT_PAGE in found.files else [self._front_page(parcel)]
        final = self._commit_entry([described, *front], parcel, head)
        return [*sent, self._read_back(described, there, final)]

    def _repository(self) -> Repository:
        """The repository as it is, made if it is not there."""
        try:
            found = self._look()
        except NoBranch:
            msg = f"{self.target.repo} has no branch {self.target.branch}."
            raise SendError("not-found", msg, "Make it on the hub first. Nothing was sent.") from None
        except NoRepository:
            self.manner.say(f"{self.target.repo} is not there: making it, {self._visibility}.")
            self.client.make(self.target.repo, private=self.manner.private)
            return self._look()
        if self.manner.private and found.private is False:
            msg = f"{self.target.repo} exists and is public, and --private is for new repositories."
            raise SendError("exists", msg, "Give another repository, or leave out --private. Nothing was sent.")
        return found

    @property
    def _visibility(self) -> str:
        return "private" if self.manner.private else "as public as the hub makes new ones (--private prevents it)"

    def _look(self) -> Repository:
        return self.client.repository(self.target.repo, self.target.branch, self.manner.policy.timeout_s)

    def _refuse_replacing(self, states: Mapping[str, str]) -> None:
        other = [name for name, state in states.items() if state == "different"]
        if other and not self.manner.overwrite:
            msg = f"{self.target} has {', '.join(other)} with other content. Nothing was sent."
            raise SendError("exists", msg, "Pass --overwrite to replace it, or give another repository or branch.")

    def _commit(self, files: Sequence[Outgoing], summary: str, parent: str) -> str:
        """Commit files upon `parent`; returns the id of the commit."""
        with contextlib.ExitStack() as opened:
            additions = [self._addition(file, opened) for file in files]
            upon = parent if _COMMIT.fullmatch(parent) else None
            commit = self.client.commit(self.target.repo, self.target.branch, additions, summary, upon)
        if not _COMMIT.fullmatch(commit):
            msg = f"{self.target} took the files, but did not name the commit."
            raise SendError("status", msg, "Look at the repository.")
        return commit

    def _addition(self, file: Outgoing, opened: contextlib.ExitStack) -> Any:
        if not isinstance(file.content, Path):
            return self.client.addition(file.name, file.content)
        body = opened.enter_context(_Watched(file.content))
        addition = self.client.addition(file.name, body)
        body.progress = self.manner.progress  # from here on: it has been read once already, for its hash
        return addition

    def _commit_entry(self, files: Sequence[Outgoing], parcel: Parcel, parent: str) -> str:
        """The second commit; a hub that finds fault with the front page gets the entry without it."""
        summary = f"Describe {parcel.entry.id}"
        try:
            return self._commit(files, summary, parent)
        except ValueError:
            if len(files) == 1:
                raise
            self.manner.say(f"The hub does not take the card as {FRONT_PAGE}; it is there as {parcel.card.name}.")
            return self._commit(files[:1], summary, parent)

    def _front_page(self, parcel: Parcel) -> Outgoing:
        card = parcel.card.content
        page = hub_front_page(card if isinstance(card, bytes) else card.read_bytes())
        return Outgoing.of_bytes(FRONT_PAGE, page, parcel.card.content_type)

    def _source(self, parcel: Parcel, commit: str) -> Source:
        return Source("hf", parcel.weights.name, self.target.repo, commit)

    def _entry_there(self, parcel: Parcel, commit: str) -> Literal["equal", "different"]:
        """Whether the entry that lies there says the same; the commit that it pins may be an earlier one."""
        name = f"{parcel.entry.id}.yaml"
        with io.BytesIO(self._small_file(name, commit)) as file:
            try:
                entries = parse_manifest(file.read().decode(), name).entries
            except (WeightsError, UnicodeDecodeError):
                return "different"
        ours = dataclasses.replace(parcel.entry, sources=(), by_hand=None)
        same = len(entries) == 1 and dataclasses.replace(entries[0], sources=()) == ours
        places = [(source.kind, source.repo, source.file) for entry in entries for source in entry.sources]
        return "equal" if same and places == [("hf", self.target.repo, parcel.weights.name)] else "different"

    def _small_file(self, name: str, commit: str) -> bytes:
        return fetch_small(self._url(name, commit), MAX_ENTRY_BYTES, self.login.header, self.manner.policy)

    def _url(self, name: str, commit: str) -> str:
        return hub_file_url(self.target.repo, name, commit or self.target.branch, self.client.endpoint)

    def _already(self, name: str, commit: str) -> Sent:
        data = Outgoing.of_bytes(name, self._small_file(name, commit), "")
        return Sent(name, self._url(name, commit), data.digest, "already there", verified=True)

    def _read_back(self, file: Outgoing, before: str, commit: str) -> Sent:
        """Compare what the hub gives out at a commit with what was sent."""
        url = self._url(file.name, commit)
        for attempt in range(1, self.manner.policy.attempts + 1):
            try:
                found = look_at(url, file.digest, self.login, self.manner.policy.timeout_s)
                break
            except Retry as retry:
                if attempt == self.manner.policy.attempts:
                    raise
                backoff(self.manner.policy, attempt, retry)
        if found.state in ("absent", "different"):
            msg = f"{file.name} was sent, but {url} holds other bytes (sha256 {file.digest.sha256} was sent)."
            raise OtherBytesError(msg, "Do not use what lies there; push again with --overwrite.")
        words: dict[str, Literal["sent", "replaced", "already there"]]
        words = {"absent": "sent", "different": "replaced", "equal": "already there"}
        return Sent(file.name, url, file.digest, words[before], verified=found.state == "equal")


def _state(found: Repository, file: Outgoing) -> Literal["absent", "equal", "different"]:
    """By the hub's own hashes of what lies there."""
    there = found.files.get(file.name)
    if there is None:
        return "absent"
    if there.sha256 is not None:
        return "equal" if there.sha256 == file.digest.sha256 else "different"
    return "equal" if there.git_blob == file.digest.git_blob else "different"


class _Watched(io.BufferedReader):
    """A file that tells how far it was read."""

    progress: Progress = staticmethod(silent)

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("rb", buffering=0))
        self.total = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        self.progress(self.tell(), self.total)
        return chunk


@contextlib.contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn whatever the library raises into a sentence, without repeating a word of it."""
    try:
        yield
    except (RunError, WeightsError):
        raise
    except Exception as error:
        kind, reason, remedy = _meaning(error)
        msg = f"{doing} failed: {reason}."
        raise SendError(kind, msg, remedy) from None


def _meaning(error: BaseException) -> tuple[str, str, str]:
    """Kind, words and remedy; the cause is looked for, since the library wraps what it meets."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, (Failed, Retry)):
            return link.kind, link.reason, "Nothing shows on the hub until a push has ended well."
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            kind, reason, remedy = HUB_REFUSALS.get(status, ("status", f"the hub answers HTTP {status}", ""))
            return kind, reason, remedy or (LOGIN_REMEDY if kind in ("forbidden", "not-found") else "Push again later.")
    for link in chain:
        if isinstance(link, OSError) and not hasattr(link, "request"):
            try:
                classify(link)
            except (Failed, Retry) as failure:
                return failure.kind, failure.reason, "Push again later."
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "TimeoutException" in names:
        return "timeout", "the hub did not answer in time", "Push again later."
    if names & {"TransportError", "HTTPError"}:
        return "reset", "the connection to the hub broke", "Push again later."
    return "answer", f"the hub's answer was not understood ({type(error).__name__})", "Check HF_ENDPOINT."
