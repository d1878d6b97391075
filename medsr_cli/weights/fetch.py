"""Downloads: the only module of medsr that may open a socket.

A download ends in exactly one of two ways: the bytes that the manifest pins are in the file, or a
`DownloadError` says what went wrong, from which address, what was expected, and where to put a copy by hand.
Broken connections are taken up where they broke; a server that cannot do that is started over. Nothing is
sent but the request itself; a Hugging Face token goes to the configured endpoint's host alone.

Environment: `HTTPS_PROXY`, `NO_PROXY`; `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`, `SSL_CERT_FILE`,
`SSL_CERT_DIR`; `HF_ENDPOINT`, `HF_TOKEN`; `MEDSR_OFFLINE`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO, NoReturn, Protocol
from urllib.parse import urljoin, urlsplit

from medsr_cli import __version__
from medsr_cli.errors import WeightsError
from medsr_cli.weights.manifest import MAX_BYTES, Entry, Source, allowed_url
from medsr_cli.weights.store import CHUNK_BYTES, Digest, KeepPart, Store, new_git_blob

SPARE_BYTES = 16_000_000
"""Free space that a download leaves on the disk."""
MIN_BYTES_PER_TIMEOUT = 1024
"""A connection slower than this per `timeout_s` counts as hanging."""
MAX_REDIRECTS = 5
TRUE_WORDS = ("1", "true", "yes", "on")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
OFFLINE_VARIABLES = ("MEDSR_OFFLINE", "HF_HUB_OFFLINE")

HTTP_PARTIAL = 206
HTTP_BAD_RANGE = 416
BUSY = (408, 425, 429, 500, 502, 503, 504)


class Progress(Protocol):
    """Told how far a download is; `total_bytes` is None where nobody knows."""

    def __call__(self, done_bytes: int, total_bytes: int | None, /) -> None:
        """Take notice; must not raise."""


def silent(done_bytes: int, total_bytes: int | None) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True)
class Policy:
    """How patient a download is."""

    timeout_s: float = 30.0
    attempts: int = 5
    """Attempts in a row that bring no new byte before a source is given up."""
    max_attempts: int = 50
    backoff_s: float = 1.0
    max_wait_s: float = 60.0
    """Longest wait between attempts, whatever `Retry-After` says."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)


@dataclass(frozen=True)
class Fetched:
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


class _Retry(Exception):
    """Try the same source again."""

    def __init__(self, kind: str, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.wait_s = wait_s


class _Failed(Exception):
    """Give this source up."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def offline_reason(flag: bool = False) -> str | None:
    """What forbids the network: `--offline` or a variable of the environment; None where nothing does."""
    if flag:
        return "--offline"
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").strip().lower() in TRUE_WORDS:
            return f"{name}={os.environ[name]}"
    return None


def fetch(
    entry: Entry, store: Store, *, offline: bool = False, progress: Progress = silent, policy: Policy | None = None
) -> Fetched:
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


def source_url(source: Source) -> str:
    """The address that a source is fetched from.

    Raises:
        DownloadError: `HF_ENDPOINT` is not an address that medsr fetches from.
    """
    if source.kind == "url":
        return source.url
    endpoint = _hf_endpoint()
    # Read at import by huggingface_hub; medsr only asks it for an address, and sends nothing anywhere.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 -- only after the variable is set

    return hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)


def _hf_endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not allowed_url(endpoint):
        msg = f"HF_ENDPOINT is {endpoint}, which is neither https nor this machine itself."
        raise DownloadError("address", msg, "Set it to an https address.")
    return endpoint


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

    def run(self) -> Fetched:
        self._hash_what_is_there()
        fruitless = 0
        for _ in range(self.policy.max_attempts):
            best = self.best
            try:
                self._attempt()
                return Fetched(self._checked_digest(), self.url)
            except _Failed as failure:
                self._fail(failure.kind, failure.reason)
            except _Retry as retry:
                fruitless = 0 if self.best > best else fruitless + 1
                last = retry
                if fruitless >= self.policy.attempts:
                    break
                backoff = self.policy.backoff_s * 2 ** max(fruitless - 1, 0)
                wait_s = backoff if retry.wait_s is None else retry.wait_s
                self.policy.sleep(min(max(wait_s, 0.0), self.policy.max_wait_s))
        self._fail(last.kind, last.reason, broke=True)

    def _attempt(self) -> None:
        """One request, read to its end; what arrived stays in the file."""
        if self.total is not None and self.received == self.total:
            return
        if self.received and not self.entry.pinned:
            self._start_over()  # without a hash nobody could tell two versions of the file mixed
        request = urllib.request.Request(self.url, headers=self._headers())  # noqa: S310 -- allowed_url was asked
        opener = urllib.request.build_opener(_Redirects(self.token), urllib.request.HTTPSHandler(context=_tls()))
        try:
            with opener.open(request, timeout=self.policy.timeout_s) as response:
                self._prepare(response)
                self._read(response)
        except (_Retry, _Failed):
            raise
        except urllib.error.HTTPError as error:
            error.close()
            self._classify_status(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _classify(error)

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"medsr/{__version__}", "Accept-Encoding": "identity"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        return headers

    def _prepare(self, response: http.client.HTTPResponse) -> None:
        """Learn from the headers where the body belongs and how long the file is."""
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise _Failed("status", f"the server sent it packed ({encoding}), which was not asked for")
        length = _whole(response.headers.get("Content-Length"))
        if response.status == HTTP_PARTIAL:
            begin, total = _content_range(response.headers.get("Content-Range", ""))
            if begin != self.received:
                self._start_over()
                raise _Retry("status", "the server sent another part than was asked for", 0.0)
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
            raise _Failed("size", f"the server has a file of {total} bytes instead of {self.total}")
        if total > MAX_BYTES:
            raise _Failed("size", f"the server has a file of {total} bytes; no checkpoint has more than {MAX_BYTES}")

    def _read(self, response: http.client.HTTPResponse) -> None:
        window_start, window_bytes = time.monotonic(), 0
        limit = self.stated if self.stated is not None else MAX_BYTES
        while chunk := response.read1(CHUNK_BYTES):
            if self.received + len(chunk) > limit:
                self._start_over()
                raise _Failed("size", f"the server sends more than {limit} bytes")
            self._append(chunk)
            window_bytes += len(chunk)
            if time.monotonic() - window_start > self.policy.timeout_s:
                if window_bytes < MIN_BYTES_PER_TIMEOUT:
                    raise _Retry("timeout", f"fewer than {MIN_BYTES_PER_TIMEOUT} bytes in {self.policy.timeout_s:g} s")
                window_start, window_bytes = time.monotonic(), 0
        if self.stated is not None and self.received < self.stated:
            raise _Retry("short", f"the connection ended after {self.received} of {self.stated} bytes")
        if self.received == 0:
            raise _Retry("short", "the server sent nothing")

    def _append(self, chunk: bytes) -> None:
        try:
            self.file.write(chunk)
        except OSError as error:
            raise _Failed("disk", f"{self.target.parent} cannot take it ({error.strerror})") from error
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
                raise _Retry("hash", "the resumed file has the wrong hash", 0.0)
            raise _Failed("hash", f"the file has the {wrong[0][0]} {wrong[0][1]}, which is not the expected one")
        try:
            self.file.flush()
        except OSError as error:
            raise _Failed("disk", f"{self.target.parent} cannot take it ({error.strerror})") from error
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
                raise _Failed("disk", f"{self.target.parent} cannot take it ({error.strerror})") from error
        return self.git_blob.hexdigest() if self.git_blob is not None else ""

    def _classify_status(self, error: urllib.error.HTTPError) -> NoReturn:
        status = error.code
        if status == HTTP_BAD_RANGE and self.received:
            self._start_over()
            raise _Retry("status", "the server refuses to continue", 0.0) from error
        if status in BUSY:
            wait_s = _retry_after_s(error.headers.get("Retry-After"))
            raise _Retry("busy", f"the server is busy (HTTP {status})", wait_s) from error
        if status in (401, 403):
            token = " or a HF_TOKEN that may read it" if self.token or "huggingface" in self.url else ""
            raise _Failed("forbidden", f"the server refuses access (HTTP {status}); it needs permission{token}")
        if status in (404, 410):
            raise _Failed("not-found", f"the server has no such file (HTTP {status})")
        if status == 407:
            raise _Failed("proxy", "the proxy asks for a login (HTTP 407); put it in HTTPS_PROXY")
        if 300 <= status < 400:
            raise _Failed("redirect", f"the server redirects in a circle or not to https (HTTP {status})")
        raise _Failed("status", f"the server answers HTTP {status}")

    def _fail(self, kind: str, reason: str, *, broke: bool = False) -> NoReturn:
        msg = f"Downloading {self.url} failed: {reason}."
        error = ConnectionBrokeError if broke else DownloadError
        raise error(kind, msg, _by_hand(self.entry, self.target, [self.url]))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, to https only, and take the token along to the same host only."""

    max_redirections = MAX_REDIRECTS
    max_repeats = 2

    def __init__(self, token: str) -> None:
        self.token = token

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        newurl = urljoin(req.full_url, newurl)
        if not allowed_url(newurl):
            raise _Failed("redirect", "the server redirects to an address that is not https")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


def _classify(error: Exception) -> NoReturn:
    """Turn an exception of a connection into what to do about it."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise _Failed(
            "tls",
            f"the server's certificate was not accepted ({reason.verify_message}); if your site inspects"
            " encrypted traffic, set SSL_CERT_FILE to its CA file",
        ) from error
    if isinstance(reason, ssl.SSLEOFError):
        raise _Retry("reset", "the encrypted connection broke") from error
    if isinstance(reason, ssl.SSLError):
        raise _Failed(
            "tls", f"no encrypted connection could be made ({getattr(reason, 'reason', None) or reason})"
        ) from error
    if isinstance(reason, socket.gaierror):
        raise _Failed("dns", "the name of the server (or proxy) is not known here, or there is no network") from error
    if isinstance(reason, TimeoutError):
        raise _Retry("timeout", "the server did not answer in time") from error
    if isinstance(reason, ConnectionRefusedError):
        raise _Failed("refused", "the server (or proxy) refuses connections") from error
    if isinstance(reason, (ConnectionError, http.client.HTTPException)):
        raise _Retry("reset", "the connection broke") from error
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        raise _Failed("disk", f"the disk cannot take it ({reason.strerror})") from error
    if "407" in str(reason):
        raise _Failed("proxy", "the proxy asks for a login (HTTP 407); put it in HTTPS_PROXY") from error
    raise _Failed("network", f"no connection could be made ({' '.join(str(reason).split())[:160]})") from error


def _tls() -> ssl.SSLContext:
    """Certificates of the variables that other tools read, else OpenSSL's own (SSL_CERT_FILE, the system's)."""
    return _trusting(tuple((name, os.environ.get(name, "")) for name in CERTIFICATE_VARIABLES))


@lru_cache(maxsize=4)  # reading the system's certificates takes 50 ms
def _trusting(variables: tuple[tuple[str, str], ...]) -> ssl.SSLContext:
    for name, path in variables:
        if path and name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            try:
                folder = Path(path).is_dir()
                return ssl.create_default_context(cafile=None if folder else path, capath=path if folder else None)
            except OSError as error:
                raise _Failed("tls", f"{name} names {path}, which is not a readable file of certificates") from error
    return ssl.create_default_context()


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise _Failed(
            "disk", f"{folder} has {free} bytes free and the file needs {needed}; make room or set MEDSR_HOME"
        )


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it says nothing."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


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
