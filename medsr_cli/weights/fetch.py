"""The one module that opens sockets: a request to a server, and the client of a model hub.

`download` fetches checkpoints through it, `send` and `hub` upload through it; what is asked for and what an answer
means is theirs. Here is whom a transfer trusts, where a redirect may lead, what an exception of a connection means,
and what forbids the network; how often it is tried again is in `patience`. A host's certificate is always verified.
Nothing is sent but the request itself.

The hub is talked to by huggingface_hub. Its own storage client (Xet) is left off: it connects to further hosts, by
certificates of its own, and mirrors lack it. Large files go the documented way of git LFS.

Environment: `HTTPS_PROXY`, `NO_PROXY`; `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`, `SSL_CERT_FILE`,
`SSL_CERT_DIR`; `HF_ENDPOINT`; `MEDSR_OFFLINE`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NoReturn
from urllib.parse import urljoin, urlsplit

from medsr_cli import __version__
from medsr_cli.weights.manifest import allowed_url
from medsr_cli.weights.patience import Failed, Policy, Retry

MAX_REDIRECTS = 5
TRUE_WORDS = ("1", "true", "yes", "on")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
OFFLINE_VARIABLES = ("MEDSR_OFFLINE", "HF_HUB_OFFLINE")
PUBLIC_HUB = "https://huggingface.co"
OWN_HEADERS = {"User-Agent": f"medsr/{__version__}", "Accept-Encoding": "identity"}
ERROR = 40
"""Of Python's logging: what a library says below it is not shown."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that say: later."""


def offline_reason(flag: bool = False) -> str | None:
    """What forbids the network: `--offline` or a variable of the environment; None where nothing does."""
    if flag:
        return "--offline"
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").strip().lower() in TRUE_WORDS:
            return f"{name}={os.environ[name]}"
    return None


def classify(error: Exception) -> NoReturn:
    """Turn an exception of a connection into what to do about it."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise Failed(
            "tls",
            f"the server's certificate was not accepted ({reason.verify_message}); if your site inspects"
            " encrypted traffic, set SSL_CERT_FILE to its CA file",
        ) from error
    if isinstance(reason, ssl.SSLEOFError):
        raise Retry("reset", "the encrypted connection broke") from error
    if isinstance(reason, ssl.SSLError):
        raise Failed(
            "tls", f"no encrypted connection could be made ({getattr(reason, 'reason', None) or reason})"
        ) from error
    if isinstance(reason, socket.gaierror):
        raise Failed("dns", "the name of the server (or proxy) is not known here, or there is no network") from error
    if isinstance(reason, TimeoutError):
        raise Retry("timeout", "the server did not answer in time") from error
    if isinstance(reason, ConnectionRefusedError):
        raise Failed("refused", "the server (or proxy) refuses connections") from error
    if isinstance(reason, (ConnectionError, http.client.HTTPException)):
        raise Retry("reset", "the connection broke") from error
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        raise Failed("disk", f"the disk cannot take it ({reason.strerror})") from error
    if "407" in str(reason):
        raise Failed("proxy", "the proxy asks for a login (HTTP 407); put it in HTTPS_PROXY") from error
    raise Failed("network", f"no connection could be made ({' '.join(str(reason).split())[:160]})") from error


def hub_endpoint() -> str:
    """Where the model hub is: `HF_ENDPOINT`, such as a mirror inside a hospital, or the public one.

    Raises:
        Failed: `HF_ENDPOINT` is not an address that medsr talks to.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    if not allowed_url(endpoint):
        raise Failed("address", f"HF_ENDPOINT is {endpoint}, which is neither https nor this machine itself")
    return endpoint


def tls_context() -> ssl.SSLContext:
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
                raise Failed("tls", f"{name} names {path}, which is not a readable file of certificates") from error
    return ssl.create_default_context()


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it says nothing."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


# -- one request -------------------------------------------------------------------------------------------


class Answer:
    """What a server says to a request, whatever its status; to be read inside the `with` of `exchange`."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        """By names in any case."""

    @property
    def ok(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    def read(self, size: int) -> bytes:
        """So many bytes of the body; fewer only at its end."""
        data: bytes = self._response.read(size)
        return data

    def read_some(self, size: int) -> bytes:
        """At most so many bytes, as soon as there are any; none at the end."""
        data: bytes = self._response.read1(size)
        return data

    def refuse_busy(self) -> None:
        """Raise `Retry`, with the wait that the server asks for, if the status says: later."""
        if self.status in BUSY:
            wait_s = retry_after_s(self.headers.get("Retry-After"))
            raise Retry("busy", f"the server is busy (HTTP {self.status})", wait_s)


@contextlib.contextmanager
def exchange(
    url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    *,
    method: Literal["GET", "HEAD", "PUT"] = "GET",
    body: io.RawIOBase | None = None,
    follow: bool = True,
) -> Iterator[Answer]:
    """Send one request; the connection is closed when the `with` ends, however it ends.

    Args:
        url: https, or what the caller has made sure may be talked to in the clear.
        headers: beside medsr's own; `Authorization` is left out where a redirect leads to another host, and
            a body needs its `Content-Length`.
        timeout_s: of each step, such as a connection or a read.
        method: what is asked.
        body: read while it is sent.
        follow: go where a redirect leads, if that is https; else a redirect is `Failed`.

    Raises:
        Failed: no connection, or none that may be trusted.
        Retry: the connection broke, or a step took too long; also while the `with` reads the answer.
    """
    request = urllib.request.Request(url, data=body, headers={**OWN_HEADERS, **headers}, method=method)  # noqa: S310
    redirects = _Redirects() if follow else _NoRedirect()
    opener = urllib.request.build_opener(redirects, _Http(), _Https(tls_context()))
    try:
        with _opened(opener, request, timeout_s) as response:
            yield Answer(response)
    except (Retry, Failed):
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        classify(error)


def _opened(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float) -> Any:
    """The response, which urllib raises where its status is not one of success."""
    try:
        return opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        return error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, to https only, and take the token along to the same host only."""

    max_redirections = MAX_REDIRECTS
    max_repeats = 2

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request that goes where the server points, or `Failed`."""
        newurl = urljoin(req.full_url, newurl)
        if not allowed_url(newurl):
            raise Failed("redirect", "the server redirects to an address that is not https")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An upload goes where it was told to, or nowhere."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        host = urlsplit(newurl).hostname or "somewhere else"
        reason = f"the server sends the upload on to {host} (HTTP {code}), which is not followed"
        raise Failed("redirect", reason)


class _EarlyAnswer:
    """A connection that listens to a server which answers, and hangs up, before it has read everything."""

    broke: OSError | None = None

    def request(self, *arguments: Any, **options: Any) -> None:
        try:
            super().request(*arguments, **options)  # type: ignore[misc] # of the connection beside it
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as error:
            if getattr(self, "sock", None) is None:
                raise  # never connected: nobody is there to listen to
            self.broke = error

    def getresponse(self) -> http.client.HTTPResponse:
        try:
            response: http.client.HTTPResponse = super().getresponse()  # type: ignore[misc]
        except (OSError, http.client.HTTPException) as error:
            raise self.broke or error from None
        return response


class _Connection(_EarlyAnswer, http.client.HTTPConnection):
    """Plain."""


class _SafeConnection(_EarlyAnswer, http.client.HTTPSConnection):
    """Encrypted."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self.context = context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SafeConnection, req, context=self.context)


# -- the model hub -----------------------------------------------------------------------------------------


def hub_file_url(repo: str, file: str, revision: str | None, endpoint: str) -> str:
    """The address of a file of a repository; asks nobody."""
    # Read at import by huggingface_hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 -- only after the variable is set

    return hf_hub_url(repo, file, revision=revision, endpoint=endpoint)


@contextlib.contextmanager
def hub_library(policy: Policy) -> Iterator[None]:
    """huggingface_hub, told to be silent, to send nothing of its own accord and to trust whom medsr trusts."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants, get_session, set_client_factory  # noqa: PLC0415
    from huggingface_hub.utils import logging  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_XET = True
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)  # its warnings name addresses that are keys
    disable_progress_bars()
    plain = get_session()
    requests = list(plain.event_hooks["request"])

    def trusting() -> Any:
        hooks = {"request": requests, "response": [_refuse_leaving]}
        return type(plain)(verify=tls_context(), timeout=policy.timeout_s, follow_redirects=True, event_hooks=hooks)

    set_client_factory(trusting)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        set_client_factory(lambda: type(plain)(follow_redirects=True, timeout=None, event_hooks={"request": requests}))
        logging.set_verbosity(verbosity)


def _refuse_leaving(response: Any) -> None:
    """Follow no redirect of an upload to another host."""
    if not response.has_redirect_location or response.request.method in ("GET", "HEAD"):
        return
    there = urlsplit(response.headers["Location"])
    if there.netloc and there.netloc != urlsplit(str(response.request.url)).netloc:
        reason = f"the hub sends the upload on to {there.hostname} (HTTP {response.status_code}), which is not followed"
        raise Failed("redirect", reason)


def hub_login() -> str:
    """The token of `HF_TOKEN`, else of the hub's own login; empty where there is none. Inside `hub_library`."""
    from huggingface_hub import get_token  # noqa: PLC0415

    return get_token() or ""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository by the hub's own hashes: SHA-256 of large files, git's id of small ones."""

    sha256: str | None
    git_blob: str | None


@dataclass(frozen=True)
class Repository:
    """A branch of a repository as it is; `commit` is empty, and `private` None, where the hub does not tell."""

    commit: str
    private: bool | None
    files: Mapping[str, HubFile]


class NoRepository(Exception):
    """The hub has no such repository, or does not show it to this login."""


class NoBranch(Exception):
    """The repository is there, the branch is not."""


class HubClient:
    """The calls of huggingface_hub that a push makes, inside `hub_library`; its exceptions come through as they are."""

    def __init__(self, endpoint: str, token: str) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415

        self.endpoint = endpoint
        self._api = HfApi(endpoint, token=token or False, library_name="medsr", library_version=__version__)

    def repository(self, repo: str, branch: str | None, timeout_s: float) -> Repository:
        """What is there; raises `NoRepository` or `NoBranch`."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

        try:
            info = self._api.model_info(repo, revision=branch, files_metadata=True, timeout=timeout_s)
        except RevisionNotFoundError as error:
            raise NoBranch from error
        except RepositoryNotFoundError as error:
            raise NoRepository from error
        files = {
            file.rfilename: HubFile(None if file.lfs is None else file.lfs.sha256, file.blob_id)
            for file in info.siblings or ()
        }
        return Repository(info.sha or "", info.private, files)

    def make(self, repo: str, *, private: bool) -> None:
        """Make a repository. The hub answers 409 where it exists and this login may not see it."""
        self._api.create_repo(repo, private=True if private else None)

    def addition(self, name: str, content: bytes | BinaryIO) -> Any:
        """A file to be committed; read once here, for its hash, and once again when it is sent."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        return CommitOperationAdd(name, content)

    def commit(self, repo: str, branch: str | None, additions: Sequence[Any], summary: str, parent: str | None) -> str:
        """Commit upon `parent`; returns the id of the commit, empty where the hub does not name it."""
        done = self._api.create_commit(
            repo, list(additions), commit_message=summary, revision=branch, parent_commit=parent
        )
        return done.oid or ""
