"""Downloads of checkpoints, over `fetch`.

A download ends in exactly one of two ways: the bytes that the manifest pins are in the file, or a
`DownloadError` says what went wrong, from which address, what was expected, and where to put a copy by hand.
Broken connections are taken up where they broke; a server that cannot do that is started over. Nothing is
sent but the request itself; a Hugging Face token (`HF_TOKEN`) goes to the configured endpoint's host alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from medsr_cli.errors import WeightsError, reason_of
from medsr_cli.weights.fetch import (
    Answer,
    exchange,
    hub_endpoint,
    hub_file_url,
    offline_reason,
)
from medsr_cli.weights.manifest import MAX_BYTES, Entry, Source, allowed_url
from medsr_cli.weights.patience import Failed, Policy, Progress, Retry, backoff, silent
from medsr_cli.weights.store import CHUNK_BYTES, Digest, KeepPart, Store, new_git_blob

SPARE_BYTES = 16_000_000
"""Free space that a download leaves on the disk."""
MIN_BYTES_PER_TIMEOUT = 1024
"""A connection slower than this per `timeout_s` counts as hanging."""

HTTP_PARTIAL = 206
HTTP_BAD_RANGE = 416


@dataclass(frozen=True)
class Downloaded:
    """What was downloaded, and from where."""

    digest: Digest
    url: str


class DownloadError(WeightsError):
    """A download that failed; `kind` says how, in one word."""

    def __init__(self, kind: str, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence, remedy)
        self.kind = kind


class ConnectionBrokeError(DownloadError, KeepPart):
    """The connection ended early; what arrived is good as far as it goes."""


def download(
    entry: Entry, store: Store, *, offline: bool = False, progress: Progress = silent, policy: Policy | None = None
) -> Downloaded:
    """Download the file of an entry to `store.source_path(entry)`; its sources are tried in order.

    The caller holds `store.lock(entry.id)`.

    Raises:
        DownloadError: offline, or no source gave the file. If several failed, the sentence is the first
            one's and names the others.
        WeightsError: the store cannot be written.
    """
    target = store.source_path(entry)
    if not entry.sources:
        raise DownloadError("by-hand", f"medsr cannot fetch {entry.id} by itself.", entry.how_to_get)
    reason = offline_reason(offline)
    remote = [source for source in entry.sources if source.kind != "bundled"]
    if reason:
        msg = f"{entry.id} is not on this machine and {reason} forbids fetching it."
        raise DownloadError("offline", msg, _by_hand(entry, target, [source_url(source) for source in remote]))
    if not remote:
        msg = f"{entry.id} should have come with medsr, but its file is missing from the installation."
        raise DownloadError("no-source", msg, "Install medsr again.")
    job = _Job(entry, target, progress, policy or Policy())
    failures: list[DownloadError] = []
    for source in remote:
        try:
            with store.receiving(target, resume=entry.pinned) as file:
                return _Download(job, source, file).run()
        except DownloadError as error:
            failures.append(error)
            if error.kind == "disk":
                break
    first = failures[0]
    if len(failures) > 1:
        others = " ".join(error.sentence for error in failures[1:])
        raise DownloadError(first.kind, f"{first.sentence} Then: {others}", first.remedy)
    raise first


def fetch_small(url: str, limit: int, authorization: str = "", policy: Policy | None = None) -> bytes:
    """A small file whose bytes nobody has pinned, such as an entry of a manifest.

    Args:
        url: https, or this machine itself.
        limit: bytes that it may have.
        authorization: header for that host alone; empty for none.
        policy: how patient.

    Raises:
        DownloadError: not such an address, no answer, or more bytes.
    """
    policy = policy or Policy()
    if not allowed_url(url):
        msg = "The address is neither https nor this machine itself."
        raise DownloadError("address", msg, "Give an https address.")
    headers = {"Authorization": authorization} if authorization else {}
    for attempt in range(1, policy.attempts + 1):
        try:
            return _read_small(url, limit, headers, policy.timeout_s)
        except Failed as failure:
            raise DownloadError(failure.kind, f"Downloading {url} failed: {failure.reason}.") from failure
        except Retry as retry:
            last = retry
            if attempt < policy.attempts:
                backoff(policy, attempt, retry)
    raise ConnectionBrokeError(last.kind, f"Downloading {url} failed: {last.reason}.", "Try again later.")


def _read_small(url: str, limit: int, headers: dict[str, str], timeout_s: float) -> bytes:
    with exchange(url, headers, timeout_s) as answer:
        answer.refuse_busy()
        if not answer.ok:
            raise Failed("status", f"the server answers HTTP {answer.status}")
        data = answer.read(limit + 1)
    if len(data) > limit:
        raise Failed("size", f"the server sends more than {limit} bytes")
    return data


def source_url(source: Source) -> str:
    """The address that a source is fetched from.

    Raises:
        DownloadError: `HF_ENDPOINT` is not an address that medsr fetches from.
    """
    if source.kind == "url":
        return source.url
    return _hub_url(source.repo, source.file, source.revision)


def hub_source(address: str) -> tuple[str, str]:
    """The https address of `hf://ORG/REPO[@REVISION]/FILE`, and the header that carries HF_TOKEN there.

    Raises:
        DownloadError: not such an address, or `HF_ENDPOINT` is not one that medsr fetches from.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w.-]+(?:/[\w.-]+)*)", address, re.ASCII)
    if match is None or ".." in address:
        msg = f"{address} is not of the form hf://ORG/REPO/FILE."
        raise DownloadError("address", msg, "Such as hf://our-group/our-model/our-x4.yaml.")
    token = os.environ.get("HF_TOKEN", "")
    return _hub_url(match[1], match[3], match[2]), f"Bearer {token}" if token else ""


def _hub_url(repo: str, file: str, revision: str | None) -> str:
    try:
        endpoint = hub_endpoint()
    except Failed as failure:
        msg = f"{failure.reason}."
        raise DownloadError("address", msg, "Set it to an https address.") from failure
    return hub_file_url(repo, file, revision, endpoint)


@dataclass(frozen=True)
class _Job:
    """What all sources of one entry have in common."""

    entry: Entry
    target: Path
    progress: Progress
    policy: Policy


class _Download:
    """One source being read into one file; `digest` and `received` always describe the file's content."""

    def __init__(self, job: _Job, source: Source, file: BinaryIO) -> None:
        self.entry = entry = job.entry
        self.target = job.target
        self.file = file
        self.progress = job.progress
        self.policy = job.policy
        self.url = source_url(source)
        self.token = os.environ.get("HF_TOKEN", "") if source.kind == "hf" else ""
        self.total = entry.bytes
        self.received = 0
        self.best = 0
        self.resumed = False
        self._start_hashes()

    def run(self) -> Downloaded:
        self._hash_what_is_there()
        fruitless = 0
        for _ in range(self.policy.max_attempts):
            best = self.best
            try:
                self._attempt()
                return Downloaded(self._checked_digest(), self.url)
            except Failed as failure:
                self._fail(failure.kind, failure.reason)
            except Retry as retry:
                fruitless = 0 if self.best > best else fruitless + 1
                last = retry
                if fruitless >= self.policy.attempts:
                    break
                backoff(self.policy, fruitless, retry)
        self._fail(last.kind, last.reason, broke=True)

    def _attempt(self) -> None:
        """One request, read to its end; what arrived stays in the file."""
        if self.total is not None and self.received == self.total:
            return
        if self.received and not self.entry.pinned:
            self._start_over()  # without a hash nobody could tell two versions of the file mixed
        with exchange(self.url, self._headers(), self.policy.timeout_s) as answer:
            if not answer.ok:
                self._refuse_status(answer)
            self._prepare(answer)
            self._read(answer)

    def _headers(self) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        return headers

    def _prepare(self, answer: Answer) -> None:
        """Learn from the headers where the body belongs and how long the file is."""
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise Failed("status", f"the server sent it packed ({encoding}), which was not asked for")
        length = _whole(answer.headers.get("Content-Length"))
        if answer.status == HTTP_PARTIAL:
            begin, total = _content_range(answer.headers.get("Content-Range", ""))
            if begin != self.received:
                self._start_over()
                raise Retry("status", "the server sent another part than was asked for", 0.0)
        else:
            if self.received:
                self._start_over()  # the server answers 200 to a range: it sends everything again
            total = length
        if total is not None:
            self._refuse_size(total)
        expected = self.total if self.total is not None else total
        self.stated = expected
        _refuse_full_disk(self.target.parent, (expected or 0) - self.received)

    def _refuse_size(self, total: int) -> None:
        if self.total is not None and total != self.total:
            raise Failed("size", f"the server has a file of {total} bytes instead of {self.total}")
        if total > MAX_BYTES:
            raise Failed("size", f"the server has a file of {total} bytes; no checkpoint has more than {MAX_BYTES}")

    def _read(self, answer: Answer) -> None:
        window_start, window_bytes = time.monotonic(), 0
        limit = self.stated if self.stated is not None else MAX_BYTES
        while chunk := answer.read_some(CHUNK_BYTES):
            if self.received + len(chunk) > limit:
                self._start_over()
                raise Failed("size", f"the server sends more than {limit} bytes")
            self._append(chunk)
            window_bytes += len(chunk)
            if time.monotonic() - window_start > self.policy.timeout_s:
                if window_bytes < MIN_BYTES_PER_TIMEOUT:
                    raise Retry("timeout", f"fewer than {MIN_BYTES_PER_TIMEOUT} bytes in {self.policy.timeout_s:g} s")
                window_start, window_bytes = time.monotonic(), 0
        if self.stated is not None and self.received < self.stated:
            raise Retry("short", f"the connection ended after {self.received} of {self.stated} bytes")
        if self.received == 0:
            raise Retry("short", "the server sent nothing")

    def _append(self, chunk: bytes) -> None:
        try:
            self.file.write(chunk)
        except OSError as error:
            raise Failed("disk", f"{self.target.parent} cannot take it ({reason_of(error)})") from error
        self.sha256.update(chunk)
        if self.git_blob is not None:
            self.git_blob.update(chunk)
        self.received += len(chunk)
        self.best = max(self.best, self.received)
        self.progress(self.received, self.stated)

    def _hash_what_is_there(self) -> None:
        """Take up what an earlier attempt left, unless it is longer than the file can be."""
        while chunk := self.file.read(CHUNK_BYTES):
            self.sha256.update(chunk)
            if self.git_blob is not None:
                self.git_blob.update(chunk)
            self.received += len(chunk)
        if self.total is not None and self.received > self.total:
            self._start_over()
        self.resumed = self.received > 0
        self.best = self.received

    def _start_hashes(self) -> None:
        self.sha256 = hashlib.sha256()
        self.git_blob = None if self.entry.bytes is None else new_git_blob(self.entry.bytes)

    def _start_over(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received = 0
        self._start_hashes()

    def _checked_digest(self) -> Digest:
        """The hash of all bytes received, if it is the pinned one; a resumed file gets one fresh attempt."""
        sha256, git_blob = self.sha256.hexdigest(), self._git_blob_of_file()
        pins = [
            ("sha256", self.entry.sha256, sha256),
            ("sha256", self.entry.sha256_prefix, sha256),
            ("git blob", self.entry.git_blob, git_blob),
        ]
        wrong = [(kind, found) for kind, pin, found in pins if pin and not found.startswith(pin)]
        if wrong:
            self._start_over()
            if self.resumed:
                self.resumed = False
                raise Retry("hash", "the resumed file has the wrong hash", 0.0)
            raise Failed("hash", f"the file has the {wrong[0][0]} {wrong[0][1]}, which is not the expected one")
        try:
            self.file.flush()
        except OSError as error:
            raise Failed("disk", f"{self.target.parent} cannot take it ({reason_of(error)})") from error
        return Digest(self.received, sha256, git_blob)

    def _git_blob_of_file(self) -> str:
        """Git's id of what arrived. It begins with the length: if that was not known, the file is read again."""
        if self.git_blob is None and self.entry.git_blob:
            self.git_blob = new_git_blob(self.received)
            try:
                self.file.seek(0)
                while chunk := self.file.read(CHUNK_BYTES):
                    self.git_blob.update(chunk)
            except OSError as error:
                raise Failed("disk", f"{self.target.parent} cannot take it ({reason_of(error)})") from error
        return self.git_blob.hexdigest() if self.git_blob is not None else ""

    def _refuse_status(self, answer: Answer) -> NoReturn:
        status = answer.status
        if status == HTTP_BAD_RANGE and self.received:
            self._start_over()
            raise Retry("status", "the server refuses to continue", 0.0)
        answer.refuse_busy()
        if status in (401, 403):
            token = " or a HF_TOKEN that may read it" if self.token or "huggingface" in self.url else ""
            raise Failed("forbidden", f"the server refuses access (HTTP {status}); it needs permission{token}")
        if status in (404, 410):
            raise Failed("not-found", f"the server has no such file (HTTP {status})")
        if status == 407:
            raise Failed("proxy", "the proxy asks for a login (HTTP 407); put it in HTTPS_PROXY")
        if 300 <= status < 400:
            raise Failed("redirect", f"the server redirects in a circle or not to https (HTTP {status})")
        raise Failed("status", f"the server answers HTTP {status}")

    def _fail(self, kind: str, reason: str, *, broke: bool = False) -> NoReturn:
        msg = f"Downloading {self.url} failed: {reason}."
        error = ConnectionBrokeError if broke else DownloadError
        raise error(kind, msg, _by_hand(self.entry, self.target, [self.url]))


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise Failed("disk", f"{folder} has {free} bytes free and the file needs {needed}; make room or set MEDSR_HOME")


def _content_range(value: str) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range header such as `bytes 10-99/100`."""
    span, _, total = value.removeprefix("bytes ").partition("/")
    return _whole(span.partition("-")[0]), _whole(total)


def _whole(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(MAX_BYTES)) + 6 else None


def _by_hand(entry: Entry, target: Path, urls: list[str]) -> str:
    """How to bring the file in without this machine's network, with what proves it whole."""
    size = f"{entry.bytes} bytes" if entry.bytes is not None else "size not known"
    if entry.sha256:
        pin = f"sha256 {entry.sha256}"
    elif entry.git_blob:
        pin = f"git blob {entry.git_blob}"
    elif entry.sha256_prefix:
        pin = f"sha256 beginning with {entry.sha256_prefix}"
    else:
        pin = "hash not known"
    address = " or ".join(urls) or "its source"
    flag = "" if entry.pinned else " --allow-unpinned"
    return (
        f"To bring it in by hand, get {address} ({size}, {pin}), copy it to {target} and run"
        f" medsr weights pull {entry.id}{flag}."
    )
