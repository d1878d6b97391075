"""Uploads to a web server: a PUT for each file, each read back and compared.

Nothing that exists is replaced unless it was asked for: all names are looked at before the first byte goes out,
and each PUT carries the condition (`If-None-Match: *`, or `If-Match` with the tag that was seen), so that a
server which knows conditions refuses what changed in between. The entry of the manifest goes last: a checkpoint
that arrived in part is never announced. Whether a broken upload shows under its name is the server's doing; what
lies there afterwards is looked at and said.

A PUT is repeated only where nothing but the connection or a busy server stood in its way: the same bytes under
the same name twice are the same as once. An upload follows no redirect. The secret is kept out of every sentence
and of every `repr`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn, TypeVar
from urllib.parse import quote, urljoin

from medsr_cli.errors import RunError, WeightsError
from medsr_cli.weights.fetch import Answer, exchange
from medsr_cli.weights.patience import Failed, Policy, Progress, Retry, backoff, silent
from medsr_cli.weights.push import Outgoing, Sent, SiteTarget
from medsr_cli.weights.store import CHUNK_BYTES, Digest

PATIENCE = Policy(timeout_s=60.0)
HTTP_PRECONDITION_FAILED = 412
LOGIN_REMEDY = "Put a token that may write there in a variable and name it with --token-env."
UPLOAD_REFUSALS = {
    401: ("forbidden", "the server asks for a login (HTTP 401)", LOGIN_REMEDY),
    403: ("forbidden", "the server does not let this login write there (HTTP 403)", LOGIN_REMEDY),
    404: ("not-found", "the server has no such folder (HTTP 404)", "Check the address, or make the folder first."),
    405: ("not-taken", "the server takes no uploads there (HTTP 405)", "Give the address of a folder that takes PUT."),
    407: ("proxy", "the proxy asks for a login (HTTP 407)", "Put it in HTTPS_PROXY."),
    409: ("conflict", "the server cannot put it there (HTTP 409)", "Make the folder first, or wait if it is in use."),
    413: ("too-large", "the server takes no file of this size (HTTP 413)", "Ask its keeper to raise the limit."),
    423: ("conflict", "the name is locked on the server (HTTP 423)", "Wait for whoever holds it."),
    501: ("not-taken", "the server takes no uploads (HTTP 501)", "Give the address of a folder that takes PUT."),
    507: ("full", "the server has no room left (HTTP 507)", "Make room there."),
}
"""What a status of an upload means: kind, words, remedy."""

T = TypeVar("T")


class SendError(RunError):
    """A push that failed; `kind` says how, in one word."""

    def __init__(self, kind: str, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence, remedy)
        self.kind = kind


class OtherBytesError(WeightsError):
    """What lies on the server is not what was sent."""


@dataclass(frozen=True)
class Remote:
    """What lies under a name: nothing, the same bytes, other bytes, or something that may not be read."""

    state: Literal["absent", "equal", "different", "unreadable"]
    tag: str = ""
    """The server's strong tag of it, for `If-Match`."""


class _Refused(Exception):
    """A status that ends the upload."""

    def __init__(self, kind: str, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.remedy = remedy


class _Changed(Exception):
    """The server's condition failed: the name is no longer as it was seen."""


@dataclass(frozen=True)
class Login:
    """The Authorization header, or none; it does not show in tracebacks."""

    header: str = field(default="", repr=False)


def _say_nothing(sentence: str) -> None:
    """For a push that nobody watches."""


@dataclass(frozen=True)
class Manner:
    """How a push goes about it."""

    overwrite: bool = False
    """Replace other bytes under the same names."""
    private: bool = False
    """Make a new repository private; an existing public one is then refused. Of a hub alone."""
    progress: Progress = silent
    """Told about each file, from its first to its last byte."""
    policy: Policy = PATIENCE
    say: Callable[[str], None] = _say_nothing
    """Told what was decided on the way."""


def send_to_site(files: Sequence[Outgoing], target: SiteTarget, login: Login, manner: Manner) -> list[Sent]:
    """Put files in a folder of a web server, in order, and read each back.

    Args:
        files: what to send; equal bytes under the same name are left as they are.
        target: the folder.
        login: goes to the target's host alone.
        manner: whether to replace, how patient, who is told.

    Raises:
        SendError: other bytes are there and may not be replaced, the server refuses, or the connection failed.
        OtherBytesError: what was read back is not what was sent.
    """
    site = _Site(target, login, manner.progress, manner.policy)
    found = {file.name: site.look(file) for file in files}
    if not manner.overwrite:
        for file in files:
            site.refuse_replacing(file, found[file.name])
    return [site.deliver(file, found[file.name]) for file in files]


class _Site:
    """One folder of a server, and how it is talked to."""

    def __init__(self, target: SiteTarget, login: Login, progress: Progress, policy: Policy) -> None:
        self.target = target
        self.login = login
        self.progress = progress
        self.policy = policy

    def url(self, file: Outgoing) -> str:
        return urljoin(self.target.url, quote(file.name))

    def look(self, file: Outgoing) -> Remote:
        """What lies under the name of a file.

        Raises:
            SendError: the server cannot be asked.
        """
        try:
            return self._persist(lambda: self._look(file))
        except (Failed, Retry) as failure:
            msg = f"Looking at {self.url(file)} failed: {failure.reason}."
            remedy = LOGIN_REMEDY if failure.kind == "forbidden" else "Nothing was sent."
            raise SendError(failure.kind, msg, remedy) from None

    def refuse_replacing(self, file: Outgoing, found: Remote) -> None:
        if found.state == "different":
            msg = f"{self.url(file)} exists and has other bytes. Nothing was sent."
            raise SendError("exists", msg, "Pass --overwrite to replace it, or give another --to.")
        if found.state == "unreadable":
            msg = f"The server does not let {self.url(file)} be read, so it cannot be told whether it exists."
            raise SendError("exists", msg, "Pass --overwrite to write it all the same. Nothing was sent.")

    def deliver(self, file: Outgoing, before: Remote) -> Sent:
        """Send a file where it is not there yet, and read it back."""
        if before.state == "equal":
            return Sent(file.name, self.url(file), file.digest, "already there", verified=True)
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            self._put(file, before)

        try:
            self._persist(attempt)
        except _Changed:
            self._refuse_change(file, broke=tries > 1)
        except _Refused as refusal:
            raise self._failure(file, refusal.kind, refusal.reason, refusal.remedy) from None
        except (Failed, Retry) as failure:
            left = self._leftover(file, before)
            raise self._failure(file, failure.kind, failure.reason, left or "Push again later.") from None
        after = self.look(file)
        if after.state in ("absent", "different"):
            what = "other bytes than were sent" if after.state == "different" else "nothing, though the server took it"
            msg = f"{self.url(file)} was sent, but read back it holds {what} (sha256 {file.digest.sha256} was sent)."
            raise OtherBytesError(msg, "Do not use what lies there; push again with --overwrite.")
        status: Literal["sent", "replaced"] = "replaced" if before.state == "different" else "sent"
        return Sent(file.name, self.url(file), file.digest, status, verified=after.state == "equal")

    def _refuse_change(self, file: Outgoing, *, broke: bool) -> None:
        """The name is no longer as it was seen: fine where it holds our bytes and only their answer was lost."""
        if self.look(file).state == "equal":
            return
        if broke:
            reason = "the connection broke, and what the server kept of it, or someone else's file, lies there now"
            raise self._failure(file, "changed", reason, "Push again with --overwrite.")
        msg = f"{self.url(file)} was changed by someone else in the meantime."
        raise SendError("changed", msg, "Look at it, then push again.") from None

    def _failure(self, file: Outgoing, kind: str, reason: str, remedy: str) -> SendError:
        return SendError(kind, f"Sending {file.name} to {self.target} failed: {reason}.", remedy)

    def _leftover(self, file: Outgoing, before: Remote) -> str:
        """What a broken upload left under the name, as a remedy; empty where nothing changed or none can tell."""
        with contextlib.suppress(Failed, Retry):
            now = self._look(file)
            if now.state == "different" and before.state == "absent":
                return f"The server kept an incomplete {file.name}: push again with --overwrite."
            if now.state == "equal":
                return "It arrived all the same: push again to go on."
        return ""

    def _persist(self, action: Callable[[], T]) -> T:
        """Repeat what only the connection or a busy server stood in the way of."""
        for attempt in range(1, self.policy.attempts + 1):
            try:
                return action()
            except Retry as retry:
                if attempt == self.policy.attempts:
                    raise
                backoff(self.policy, attempt, retry)
        raise AssertionError  # pragma: no cover -- the loop returns or raises

    def _look(self, file: Outgoing) -> Remote:
        return look_at(self.url(file), file.digest, self.login, self.policy.timeout_s)

    def _put(self, file: Outgoing, before: Remote) -> None:
        headers = {
            **_headers(self.login),
            "Content-Type": file.content_type,
            "Content-Length": str(file.digest.bytes),
            **_condition(before),
        }
        url, timeout_s = self.url(file), self.policy.timeout_s
        with (
            _Body(file, self.progress) as body,
            exchange(url, headers, timeout_s, method="PUT", body=body, follow=False) as answer,
        ):
            if not answer.ok:
                _refuse_status(answer)
            answer.read(CHUNK_BYTES)


def look_at(url: str, expected: Digest, login: Login, timeout_s: float) -> Remote:
    """What lies at an address, beside what is expected there; read to its end only where its length is right.

    Raises:
        Failed: it cannot be read.
        Retry: the same, and it may be tried again.
    """
    with exchange(url, _headers(login), timeout_s) as answer:
        return _compare(answer, expected) if answer.ok else _remote_of_status(answer)


def _headers(login: Login) -> dict[str, str]:
    return {"Authorization": login.header} if login.header else {}


def _condition(before: Remote) -> dict[str, str]:
    """The header that makes a server refuse the upload if the name is not as it was seen."""
    if before.state == "absent":
        return {"If-None-Match": "*"}
    return {"If-Match": before.tag} if before.tag else {}


def _compare(answer: Answer, expected: Digest) -> Remote:
    tag = answer.headers.get("ETag", "")
    tag = tag if tag.startswith('"') and tag.isprintable() else ""  # a weak one (W/) matches nothing
    length = answer.headers.get("Content-Length", "")
    if length.isdigit() and int(length) != expected.bytes:
        return Remote("different", tag)
    sha256, received = hashlib.sha256(), 0
    while received <= expected.bytes and (chunk := answer.read(CHUNK_BYTES)):
        sha256.update(chunk)
        received += len(chunk)
    if length.isdigit() and received < int(length):
        raise Retry("short", f"the connection ended after {received} of {length} bytes")
    equal = received == expected.bytes and sha256.hexdigest() == expected.sha256
    return Remote("equal" if equal else "different", tag)


def _remote_of_status(answer: Answer) -> Remote:
    if answer.status in (404, 410):
        return Remote("absent")
    if answer.status in (403, 405, 501):
        return Remote("unreadable")
    if answer.status == 401:
        raise Failed("forbidden", "the server asks for a login (HTTP 401)")
    answer.refuse_busy()
    raise Failed("status", f"the server answers HTTP {answer.status}")


def _refuse_status(answer: Answer) -> NoReturn:
    if answer.status == HTTP_PRECONDITION_FAILED:
        raise _Changed
    answer.refuse_busy()
    otherwise = ("status", f"the server answers HTTP {answer.status}", "Ask its keeper.")
    raise _Refused(*UPLOAD_REFUSALS.get(answer.status, otherwise))


class _Body(io.RawIOBase):
    """A file that tells how far it was read; never more bytes than were announced."""

    def __init__(self, file: Outgoing, progress: Progress) -> None:
        super().__init__()
        self.source: BinaryIO = file.content.open("rb") if isinstance(file.content, Path) else io.BytesIO(file.content)
        self.progress = progress
        self.total = file.digest.bytes
        self.done = 0

    def read(self, size: int = -1) -> bytes:
        left = self.total - self.done
        chunk = self.source.read(left if size < 0 else min(size, left))
        if not chunk and left:
            raise Failed("source", "the file became shorter while it was sent")
        self.done += len(chunk)
        self.progress(self.done, self.total)
        return chunk

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.source.close()
        super().close()
