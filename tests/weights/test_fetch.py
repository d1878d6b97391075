"""Whatever the network does, the file is absent or the right one, and the sentence says what happened."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import misbehaving_site as site_module
import pytest
from misbehaving_site import PATIENCE, Behaviour, Handler, Site, entry_for, leftovers, redirect, running, status

from medsr_cli.errors import WeightsError
from medsr_cli.weights import download as download_module
from medsr_cli.weights.download import DownloadError, download, source_url
from medsr_cli.weights.fetch import exchange, offline_reason
from medsr_cli.weights.manifest import Entry
from medsr_cli.weights.patience import Failed, Policy, Retry
from medsr_cli.weights.store import Digest, Store

SIZE = len(site_module.safetensors_bytes())
OFFSETS = sorted(
    {0, 1, 7, 8, 100, 4096, 65_535, 65_536, 65_537, SIZE // 3, SIZE // 2, SIZE - 65_536, SIZE - 2, SIZE - 1}
)


def toy(site: Site, **options: Any) -> Entry:
    return entry_for(site.data, f"{site.url}/toy", **options)


def get(entry: Entry, store: Store, **options: Any) -> Path:
    with store.lock(entry.id):
        download(entry, store, policy=options.pop("policy", PATIENCE), **options)
    return store.source_path(entry)


def assert_absent_or_right(entry: Entry, store: Store, data: bytes) -> bool:
    path = store.source_path(entry)
    if path.exists():
        assert path.read_bytes() == data
        assert leftovers(store.home) == []
    return path.exists()


@pytest.mark.parametrize("pin", ["sha256", "git_blob", "git_blob alone", ""])
def test_a_plain_download(site: Site, store: Store, pin: str) -> None:
    seen: list[tuple[int, int | None]] = []
    entry = toy(site, pin=pin)
    path = get(entry, store, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == site.data
    assert seen[-1] == (SIZE, SIZE)
    assert leftovers(store.home) == []


BEHAVIOURS = {
    "reset": site_module.reset,
    "short": site_module.short,
    "200-for-a-range": site_module.whole_for_a_range,
    "wrong-length": site_module.wrong_length,
    "flipped": site_module.flipped,
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("pin", ["sha256", "git_blob"])
def test_dropped_once_at_any_offset(site: Site, store: Store, kind: str, offset: int, pin: str) -> None:
    site.plan = [BEHAVIOURS[kind](offset)]
    if kind == "200-for-a-range":
        site.plan = [site_module.short(offset), BEHAVIOURS[kind](0)]
    entry = toy(site, pin=pin)
    if kind in ("wrong-length", "flipped"):
        with pytest.raises(DownloadError) as caught:
            get(entry, store)
        assert caught.value.kind == ("size" if kind == "wrong-length" else "hash")
        assert leftovers(store.home) == []
        assert not assert_absent_or_right(entry, store, site.data)
    else:
        get(entry, store)
        assert assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("offset", [0, 7, 65_537, SIZE - 1])
@pytest.mark.parametrize("kind", BEHAVIOURS)
def test_dropped_once_where_git_knows_the_length_and_nobody_else(
    site: Site, store: Store, kind: str, offset: int
) -> None:
    """A git blob id begins with the file's length, so it can only be computed from the whole file."""
    site.plan = [BEHAVIOURS[kind](offset)]
    if kind == "200-for-a-range":
        site.plan = [site_module.short(offset), BEHAVIOURS[kind](0)]
    entry = toy(site, pin="git_blob alone")
    assert entry.bytes is None
    assert entry.pinned
    if kind in ("wrong-length", "flipped"):
        with pytest.raises(DownloadError) as caught:
            get(entry, store)
        assert caught.value.kind == "hash"
        assert not assert_absent_or_right(entry, store, site.data)
        assert leftovers(store.home) == []
    else:
        get(entry, store)
        assert assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("length", [1, 4096, SIZE])
@pytest.mark.parametrize("rotten", [True, False])
def test_a_part_of_unknown_length_is_taken_up(site: Site, store: Store, length: int, rotten: bool) -> None:
    entry = toy(site, pin="git_blob alone")
    target = store.source_path(entry)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".part").write_bytes(b"\xee" * length if rotten else site.data[:length])
    if length == SIZE:
        site.plan = [status(416)]
    fetched = download(entry, store, policy=PATIENCE)
    assert site.requests[0][1]["Range"] == f"bytes={length}-"
    assert fetched.digest == Digest(SIZE, hashlib.sha256(site.data).hexdigest(), entry.git_blob)
    assert assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("pin", ["git_blob alone", ""])
def test_a_download_of_unknown_length_is_capped(
    site: Site, store: Store, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    monkeypatch.setattr(download_module, "MAX_BYTES", SIZE - 1)
    with pytest.raises(DownloadError, match=f"no checkpoint has more than {SIZE - 1}"):
        get(toy(site, pin=pin), store)

    def chunked(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n" % SIZE + site.data + b"\r\n0\r\n\r\n")

    site.always = chunked
    with pytest.raises(DownloadError, match=f"sends more than {SIZE - 1} bytes"):
        get(toy(site, pin=pin), store)
    assert leftovers(store.home) == []


def test_the_beginning_of_a_hash_is_compared(site: Site, store: Store) -> None:
    begins = hashlib.sha256(site.data).hexdigest()[:12]
    get(toy(site, pin="", sha256_prefix=begins), store)
    with pytest.raises(DownloadError, match=r"which is not the expected one.*sha256 beginning with 00000000") as caught:
        get(toy(site, pin="", sha256_prefix="00000000", id="other"), store)
    assert caught.value.kind == "hash"


def test_what_a_person_has_to_fetch_is_not_asked_for(store: Store) -> None:
    entry = entry_for(b"", pin="", by_hand="https://example.org/login (code 1)")
    for offline in (False, True):
        with pytest.raises(DownloadError, match=r"by hand from https://example\.org/login \(code 1\)") as caught:
            download(entry, store, offline=offline)
        assert caught.value.kind == "by-hand"


@pytest.mark.parametrize("offset", [0, 1, 65_536, SIZE - 1])
def test_a_hang_ends(site: Site, store: Store, offset: int) -> None:
    site.plan = [site_module.hang(offset)]
    entry = toy(site)
    get(entry, store)
    assert assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("kind", [*BEHAVIOURS, "hang", "redirect-loop", "429", "503"])
@pytest.mark.parametrize("offset", [0, 1, 4096, SIZE - 1])
def test_dropped_every_time(site: Site, store: Store, kind: str, offset: int) -> None:
    always: dict[str, Behaviour] = {name: make(offset) for name, make in BEHAVIOURS.items()}
    always |= {"hang": site_module.hang(offset), "redirect-loop": redirect(), "429": status(429), "503": status(503)}
    site.always = always[kind]
    entry = toy(site)
    try:
        get(entry, store, policy=Policy(timeout_s=0.15, attempts=1, backoff_s=0.0, max_attempts=3, max_wait_s=0.0))
    except DownloadError as error:
        assert error.exit_code == 5  # noqa: PT017 -- success is an outcome, too
    # Some bring a byte or more each time, and so the end: then it is the right file.
    assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("offset", [1, 65_536, SIZE - 1])
def test_a_later_run_takes_up_the_part(site: Site, store: Store, offset: int) -> None:
    site.always = site_module.short(offset)
    entry = toy(site)
    once = Policy(timeout_s=0.3, attempts=1, max_attempts=1, backoff_s=0.0)
    with pytest.raises(DownloadError, match=f"ended after {offset} of {SIZE}"):
        get(entry, store, policy=once)
    assert leftovers(store.home) == ["toy.safetensors.part"]
    site.always = None
    site.requests.clear()
    get(entry, store)
    assert [headers["Range"] for _, headers in site.requests] == [f"bytes={offset}-"]
    assert assert_absent_or_right(entry, store, site.data)


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1])
def test_a_rotten_part_is_started_over(site: Site, store: Store, length: int) -> None:
    entry = toy(site)
    target = store.source_path(entry)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".part").write_bytes(b"\xee" * length)
    get(entry, store)
    assert assert_absent_or_right(entry, store, site.data)


def test_a_whole_part_is_not_fetched_again(site: Site, store: Store) -> None:
    entry = toy(site)
    target = store.source_path(entry)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".part").write_bytes(site.data)
    get(entry, store)
    assert site.requests == []
    assert assert_absent_or_right(entry, store, site.data)


def test_a_refused_range_is_started_over(site: Site, store: Store) -> None:
    site.plan = [site_module.short(100), status(416)]
    get(toy(site), store)
    assert len(site.requests) == 3


def test_another_range_than_asked_for_is_not_mixed_in(site: Site, store: Store) -> None:
    def other_range(handler: Handler) -> None:
        handler.wfile.write(handler.head(50))

    site.plan = [site_module.short(100), other_range]
    entry = toy(site)
    get(entry, store)
    assert assert_absent_or_right(entry, store, site.data)


def test_unpinned_is_never_pieced_together(site: Site, store: Store) -> None:
    site.plan = [site_module.short(100)]
    entry = toy(site, pin="")
    get(entry, store)
    assert all("Range" not in headers for _, headers in site.requests)
    site.always = site_module.short(100)
    other = toy(site, pin="", id="other")
    with pytest.raises(DownloadError):
        get(other, store)
    assert leftovers(store.home) == []


def test_more_bytes_than_stated_are_not_taken(site: Site, store: Store) -> None:
    def chunked_forever(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    site.always = chunked_forever
    with pytest.raises(DownloadError, match=f"sends more than {SIZE} bytes"):
        get(toy(site), store)
    assert leftovers(store.home) == []


def test_chunked_without_length_is_fine(site: Site, store: Store) -> None:
    def chunked(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n" % SIZE + site.data + b"\r\n0\r\n\r\n")

    site.always = chunked
    for pin in ("sha256", ""):
        entry = toy(site, pin=pin, id=f"toy{pin}")
        assert get(entry, store).read_bytes() == site.data


def test_a_packed_answer_is_refused(site: Site, store: Store) -> None:
    def packed(handler: Handler) -> None:
        handler.wfile.write(handler.head(0, Content_Encoding="gzip"))

    site.always = packed
    with pytest.raises(DownloadError, match="packed"):
        get(toy(site), store)


def test_a_trickle_counts_as_a_hang(site: Site, store: Store) -> None:
    stop = threading.Event()

    def trickle(handler: Handler) -> None:
        body = handler.head(handler.begin())
        for i in range(len(body)):
            handler.wfile.write(body[i : i + 1])
            if stop.wait(0.05):
                return

    site.always = trickle
    policy = Policy(timeout_s=0.2, attempts=1, max_attempts=1, backoff_s=0.0)
    with pytest.raises(DownloadError, match="fewer than 1024 bytes") as caught:
        get(toy(site), store, policy=policy)
    stop.set()
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize(
    ("value", "waited"),
    [("7", 7.0), ("100000", 60.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", 1.0), ("-5", 1.0)],
)
def test_retry_after_is_honoured_within_bounds(site: Site, store: Store, value: str, waited: float) -> None:
    waits: list[float] = []
    site.plan = [status(429, Retry_After=value)]
    get(toy(site), store, policy=Policy(timeout_s=1.0, attempts=3, sleep=waits.append))
    assert waits == [waited]


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        (status(401), "forbidden", "refuses access"), (status(403), "forbidden", "refuses access"),
        (status(404), "not-found", "no such file"), (status(410), "not-found", "no such file"),
        (status(418), "status", "HTTP 418"), (status(500), "busy", "HTTP 500"), (status(429), "busy", "HTTP 429"),
        (status(407), "proxy", "proxy asks for a login"),
        (redirect(), "redirect", "circle"), (redirect("http://example.org/x"), "redirect", "not https"),
        (redirect("ftp://example.org/x"), "redirect", "not https"),
        (redirect("file:///etc/passwd"), "redirect", "not to https"),
    ],
)  # fmt: skip
def test_answers_are_told_apart(site: Site, store: Store, behaviour: Behaviour, kind: str, words: str) -> None:
    site.always = behaviour
    entry = toy(site)
    with pytest.raises(DownloadError, match=words) as caught:
        get(entry, store)
    message = str(caught.value)
    assert caught.value.kind == kind
    for fact in (f"{site.url}/toy", str(SIZE), str(entry.sha256), str(store.source_path(entry)), "weights pull toy"):
        assert fact in message


def certificate_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "CERTIFICATE_VERIFY_FAILED")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "dns", "name of the server"),
        (certificate_error(), "tls", "self-signed certificate.*SSL_CERT_FILE"),
        (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), "tls", "no encrypted connection.*WRONG"),
        (ssl.SSLEOFError(8, "EOF"), "reset", "encrypted connection broke"),
        (ConnectionRefusedError(111, "refused"), "refused", "refuses connections"),
        (TimeoutError("timed out"), "timeout", "did not answer in time"),
        (ConnectionResetError(104, "reset"), "reset", "connection broke"),
        (OSError("Tunnel connection failed: 407 Proxy Authentication Required"), "proxy", "login"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "network", "unreachable"),
    ],
)
def test_connections_that_fail_are_told_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch, raised: OSError, kind: str, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise raised

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(DownloadError, match=words) as caught:
        get(entry_for(b"x" * 10, "https://example.org/toy"), store)
    assert caught.value.kind == kind


def test_a_real_self_signed_server_is_refused_until_its_authority_is_given(
    site: Site, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with running_tls(site.data, certificate, key) as url:
        entry = entry_for(site.data, f"{url}/toy")
        with pytest.raises(DownloadError, match="certificate was not accepted") as caught:
            get(entry, store)
        assert caught.value.kind == "tls"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
        with pytest.raises(DownloadError, match="REQUESTS_CA_BUNDLE names"):
            get(entry, store)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        get(entry, store)
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        get(entry, Store(tmp_path / "second", store.bundled))


class running_tls:  # noqa: N801 -- used as a with block
    def __init__(self, data: bytes, certificate: Path, key: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate, key)
        self.running = running(data)
        self.listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        site = self.running.__enter__()
        self.plain = int(site.url.rsplit(":", 1)[1])
        self.thread = threading.Thread(target=self._relay, daemon=True)
        self.thread.start()
        return f"https://localhost:{self.listener.getsockname()[1]}"

    def _relay(self) -> None:
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            inner = socket.create_connection(("127.0.0.1", self.plain))
            try:
                with inner, self.context.wrap_socket(raw, server_side=True) as outer:
                    inner.sendall(outer.recv(65_536))
                    while chunk := inner.recv(65_536):
                        outer.sendall(chunk)
            except OSError:
                continue

    def __exit__(self, *error: object) -> None:
        self.listener.close()
        self.running.__exit__(None, None, None)


def test_a_full_disk_is_refused_before_and_noticed_during(
    site: Site, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DownloadError, match=r"1000 bytes free.*MEDSR_HOME") as caught:
            get(toy(site), store)
    assert caught.value.kind == "disk"

    class FullFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, chunk: bytes) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = Store.receiving

    class FullStore(Store):
        def receiving(self, target: Path, *, resume: bool = False) -> Any:
            @contextlib.contextmanager
            def full() -> Any:
                with real(self, target, resume=resume) as file:
                    yield FullFile(file)

            return full()

    full_store = FullStore(store.home, store.bundled)
    with pytest.raises(DownloadError, match="No space left") as caught:
        get(toy(site), full_store)
    assert caught.value.kind == "disk"
    assert leftovers(store.home) == []


def test_sources_are_tried_in_order(site: Site, store: Store) -> None:
    site.plan = [status(404)]
    get(entry_for(site.data, f"{site.url}/first", f"{site.url}/second"), store)
    assert [path for path, _ in site.requests] == ["/first", "/second"]
    site.always = status(404)
    with pytest.raises(DownloadError, match=r"/a failed.*Then: .*/b failed"):
        get(entry_for(site.data, f"{site.url}/a", f"{site.url}/b", id="other"), store)


# -- offline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "MEDSR_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("kind", ["url", "hf"])
def test_offline_opens_no_socket(store: Store, monkeypatch: pytest.MonkeyPatch, how: str, kind: str) -> None:
    source = {"kind": "url", "url": "https://example.org/x", "file": "x"}
    if kind == "hf":
        source = {"kind": "hf", "repo": "a/b", "file": "x", "revision": "0" * 40}
    entry = entry_for(b"x", sources=[source])

    def forbidden(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    if how != "flag":
        monkeypatch.setenv(how, "1")
    with pytest.raises(DownloadError, match="forbids") as caught:
        get(entry, store, offline=how == "flag")
    assert (caught.value.kind, caught.value.exit_code) == ("offline", 5)
    assert source_url(entry.sources[0]) in str(caught.value)


@pytest.mark.parametrize(("value", "off"), [("1", True), ("YES", True), ("0", False), ("", False), ("false", False)])
def test_offline_words(monkeypatch: pytest.MonkeyPatch, value: str, off: bool) -> None:
    monkeypatch.setenv("MEDSR_OFFLINE", value)
    assert (offline_reason() is not None) is off
    assert offline_reason(True) == "--offline"


# -- Hugging Face ------------------------------------------------------------------------------------------


def hub_entry(data: bytes, **changes: Any) -> Entry:
    source = {
        "kind": "hf",
        "repo": "owner/name",
        "file": "folder/a b.safetensors".replace(" ", ""),
        "revision": "c" * 40,
    }
    return entry_for(data, sources=[source], **changes)


def test_the_hub_is_asked_at_a_commit_with_the_token(site: Site, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    entry = hub_entry(site.data)
    get(entry, store)
    path, headers = site.requests[0]
    assert path == f"/owner/name/resolve/{'c' * 40}/folder/ab.safetensors"
    assert headers["Authorization"] == "Bearer hf_secret"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_the_token_stays_with_its_host(site: Site, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running(site.data) as elsewhere:
        monkeypatch.setenv("HF_ENDPOINT", elsewhere.url)
        elsewhere.plan = [redirect(f"{elsewhere.url}/moved"), redirect(f"{site.url}/cdn")]
        get(hub_entry(site.data), store)
        assert [headers.get("Authorization") for _, headers in elsewhere.requests] == ["Bearer hf_secret"] * 2
    assert [(path, headers.get("Authorization")) for path, headers in site.requests] == [("/cdn", None)]
    get(toy(site, id="url-source"), store)
    assert "Authorization" not in site.requests[-1][1]


def test_an_endpoint_without_encryption_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example.org")
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        get(hub_entry(b"x"), store)


def test_a_proxy_is_used(site: Site, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # The site plays the proxy: it is asked to connect to the server that the address names, and refuses.
    monkeypatch.setenv("HTTPS_PROXY", site.url)
    with pytest.raises(DownloadError) as caught:
        get(entry_for(site.data, "https://example.invalid/toy"), store)
    assert caught.value.kind in ("network", "reset")  # and not dns: the name was left to the proxy
    assert "Tunnel" in str(caught.value) or "connection broke" in str(caught.value)


# -- many at once ------------------------------------------------------------------------------------------


def pull_in_process(home: str, bundled: str, url: str, sha256: str, size: int) -> str:
    store = Store(Path(home), Path(bundled))
    entry = entry_for(b"", url, sha256=sha256, bytes=size)
    with store.lock(entry.id):
        if not store.present(entry):
            download(entry, store)
    return str(store.verified_path(entry))


def test_eight_processes_fetch_one_intact_file(site: Site, store: Store) -> None:
    arguments = (str(store.home), str(store.bundled), f"{site.url}/toy", hashlib.sha256(site.data).hexdigest(), SIZE)
    with multiprocessing.get_context("fork").Pool(8) as pool:
        paths = pool.starmap(pull_in_process, [arguments] * 8)
    assert set(paths) == {str(store.source_path(toy(site)))}
    assert Path(paths[0]).read_bytes() == site.data
    assert len(site.requests) == 1
    assert leftovers(store.home) == []


def test_writers_whose_lock_lies_do_not_mix(site: Site, store: Store) -> None:
    entry = toy(site)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            download(entry, store, policy=PATIENCE)  # without the lock, as on a file system that grants it to all
        except WeightsError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert assert_absent_or_right(entry, store, site.data)


def test_a_killed_download_leaves_no_file_and_is_taken_up(site: Site, store: Store) -> None:
    arrived = threading.Event()

    def half(handler: Handler) -> None:
        handler.wfile.write(handler.head(0)[: SIZE // 2])
        handler.wfile.flush()
        arrived.set()
        time.sleep(0.8)

    site.plan = [half]
    arguments = (str(store.home), str(store.bundled), f"{site.url}/toy", hashlib.sha256(site.data).hexdigest(), SIZE)
    process = multiprocessing.get_context("fork").Process(target=pull_in_process, args=arguments)
    process.start()
    assert arrived.wait(10)
    time.sleep(0.3)
    process.kill()
    process.join()
    entry = toy(site)
    assert not store.source_path(entry).exists()
    assert len([name for name in leftovers(store.home) if name.endswith(".part")]) == 1
    get(entry, store)
    assert site.requests[-1][1]["Range"].startswith("bytes=")
    assert assert_absent_or_right(entry, store, site.data)


# -- one request -------------------------------------------------------------------------------------------


def test_a_request_is_answered_whatever_its_status(site: Site) -> None:
    with exchange(f"{site.url}/toy", {"Range": "bytes=10-"}, 2.0) as answer:
        assert (answer.status, answer.ok) == (206, True)
        assert answer.headers.get("content-length") == str(SIZE - 10)
        assert answer.read(5) + answer.read_some(3) == site.data[10:18]
    site.plan = [status(404), status(503)]
    with exchange(f"{site.url}/toy", {}, 2.0) as answer:
        assert (answer.status, answer.ok) == (404, False)
        answer.refuse_busy()
    with pytest.raises(Retry, match="HTTP 503"), exchange(f"{site.url}/toy", {}, 2.0) as answer:
        answer.refuse_busy()
    with exchange(f"{site.url}/toy", {}, 2.0, method="HEAD") as answer:
        assert answer.status == 501  # of a server that knows GET alone
    with pytest.raises(Failed, match="refuses connections"), exchange("http://127.0.0.1:9/", {}, 2.0):
        pytest.fail("an answer")


def test_a_redirect_is_not_followed_where_it_may_not_be(site: Site) -> None:
    site.plan = [redirect(f"{site.url}/elsewhere")]
    with pytest.raises(Failed, match="not followed"), exchange(f"{site.url}/toy", {}, 2.0, follow=False):
        pytest.fail("an answer")
    site.plan = [redirect(f"{site.url}/elsewhere")]
    with exchange(f"{site.url}/toy", {}, 2.0) as answer:
        assert answer.status == 200
