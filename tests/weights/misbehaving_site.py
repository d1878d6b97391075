"""Entries, files, and a server on this machine that can misbehave in every way a network does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from medsr_cli.weights.manifest import Entry, parse_entry
from medsr_cli.weights.patience import Policy

PATIENCE = Policy(timeout_s=0.3, attempts=2, backoff_s=0.0, max_wait_s=0.0)


def safetensors_bytes(n_values: int = 50_000, seed: int = 1) -> bytes:
    """A valid file without PyTorch: one float32 tensor of hash bytes."""
    blocks = [hashlib.sha256(struct.pack("<QQ", seed, i)).digest() for i in range(-(-4 * n_values // 32))]
    data = b"".join(blocks)[: 4 * n_values]
    header = json.dumps({"w": {"dtype": "F32", "shape": [n_values], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def entry_data(**changes: Any) -> dict[str, Any]:
    """A valid entry as YAML gives it, with some fields replaced; a field set to ... is left out."""
    data: dict[str, Any] = {
        "id": "toy",
        "method": "rdst",
        "variant": "rdst-e",
        "scales": [4],
        "modality": "mr",
        "body_part": "brain",
        "channels": 1,
        "value_range": [0.0, 1.0],
        "degradation": "cubic",
        "spacing_mm": [0.5, 1.5],
        "format": "safetensors",
        "sources": [{"kind": "url", "url": "https://example.org/toy.safetensors", "file": "toy.safetensors"}],
        "bytes": 1000,
        "sha256": "a" * 64,
        "git_blob": None,
        "licence": {"code": "MIT", "weights": "CC-BY-4.0", "data": "CC0"},
        "trained_on": "nothing",
        "validation": [],
        "command": None,
        "date": "2026-11-20",
        "notes": "",
    }
    data |= changes
    return {key: value for key, value in data.items() if value is not ...}


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def entry_for(data: bytes, *urls: str, pin: str = "sha256", **changes: Any) -> Entry:
    """An entry whose file is `data`, from these addresses, pinned by sha256, git_blob (also alone) or nothing."""
    pins = {
        "sha256": hashlib.sha256(data).hexdigest() if pin == "sha256" else None,
        "git_blob": git_blob(data) if pin.startswith("git_blob") else None,
        "bytes": len(data) if pin in ("sha256", "git_blob") else None,
    }
    sources = [{"kind": "url", "url": url, "file": "toy.bin"} for url in urls]
    return parse_entry(entry_data(**{**pins, "sources": sources, **changes}), "test")


Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Serves `site.data`, honouring ranges, after the first of `site.plan` has had its way."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.close_connection = True
        with self.site.guard:
            self.site.requests.append((self.path, dict(self.headers)))
            behave = self.site.plan.pop(0) if self.site.plan else self.site.always or serve
        with contextlib.suppress(ConnectionError, TimeoutError):
            behave(self)

    def begin(self) -> int:
        value = self.headers.get("Range", "bytes=0-")
        return int(value.removeprefix("bytes=").rstrip("-"))

    def head(self, begin: int, length: int | None = None, data: bytes | None = None, **headers: str) -> bytes:
        """Send the headers of a right answer from `begin` on; returns the body that belongs to it."""
        data = self.site.data if data is None else data
        body = data[begin:]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclass
class Site:
    """What a test tells the server, and what the server saw."""

    data: bytes
    url: str = ""
    plan: list[Behaviour] = field(default_factory=list)
    always: Behaviour | None = None
    """What it does when the plan is used up; None: serve the data."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)


def serve(handler: Handler) -> None:
    handler.wfile.write(handler.head(handler.begin()))


def reset(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        body = handler.head(handler.begin())
        handler.wfile.write(body[:offset])
        handler.wfile.flush()
        linger = struct.pack("ii", 1, 0)  # close with a reset instead of an end
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()

    return behave


def short(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.wfile.write(handler.head(handler.begin())[:offset])

    return behave


def hang(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.wfile.write(handler.head(handler.begin())[:offset])
        handler.wfile.flush()
        time.sleep(0.8)

    return behave


def whole_for_a_range(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.wfile.write(handler.head(0)[:offset] if offset else handler.head(0))

    return behave


def wrong_length(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        data = handler.site.data[: max(offset, 1)]
        handler.wfile.write(handler.head(0, data=data))

    return behave


def flipped(offset: int) -> Behaviour:
    def behave(handler: Handler) -> None:
        data = bytearray(handler.site.data)
        data[min(offset, len(data) - 1)] ^= 1
        begin = handler.begin()
        handler.wfile.write(handler.head(begin, data=bytes(data)))

    return behave


def status(code: int, **headers: str) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return behave


def redirect(to: str | None = None) -> Behaviour:
    def behave(handler: Handler) -> None:
        status(302, Location=to or f"{handler.path}x")(handler)

    return behave


@contextlib.contextmanager
def running(data: bytes) -> Iterator[Site]:
    site = Site(data)
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def leftovers(home: Path) -> list[str]:
    """Part files; the empty files that locks are taken on stay, as removing them would be a race."""
    return sorted(path.name for path in home.rglob("*.part"))
