"""A web server that takes PUT and a model hub, both on this machine, both able to misbehave; and what is sent there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import yaml

from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.rdst import Rdst, RdstConfig

CONFIG = RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, dstb_per_rdstb=1, stl_per_dstb=2, scale=2)
SECRET = "hf_VerySecretTokenOfNobody0123456789"  # noqa: S105 -- nobody's
FIGURES = {"name": "subject 1", "contrast": "", "psnr": 33.5, "ssim": 0.9, "bicubic_psnr": 30.0, "bicubic_ssim": 0.8}


# -- what is sent ------------------------------------------------------------------------------------------


def described(checkpoint_id: str = "ours-x2") -> dict[str, str]:
    """What a fine-tuned checkpoint says of itself."""
    return {
        "id": checkpoint_id,
        "scales": "[2]",
        "channels": "1",
        "modality": "mr",
        "body_part": "knee",
        "value_range": "[0.0, 1.0]",
        "degradation": "cubic",
        "spacing_mm": "[0.6, 1.2]",
        "licence_of_weights": "CC-BY-4.0",
        "licence_of_data": "own",
        "trained_on": "3 subjects",
        "validation": json.dumps(
            [
                {
                    "name": "subject 1",
                    "contrast": "",
                    "psnr": 33.5,
                    "ssim": 0.9,
                    "bicubic_psnr": 30.0,
                    "bicubic_ssim": 0.8,
                }
            ]
        ),
        "recipe": "{}",
        "command": "medsr finetune DIR -m rdst -s 2 -o OUT",
        "date": "2026-11-21",
        "medsr_version": "0.1.0",
    }


def card_text(sha256: str, **changes: Any) -> str:
    """A card as `medsr finetune` writes it; `changes` go to its part `medsr`, None takes a line away."""
    told = {key: value for key, value in described().items() if key not in ("validation", "recipe")}
    facts = {**told, "sha256": sha256, "spacing_mm": [0.6, 1.2], "scales": [2], **changes}
    front = {"license": "CC-BY-4.0", "medsr": {key: value for key, value in facts.items() if value is not None}}
    return f"---\n{yaml.safe_dump(front)}---\n\n# ours\n\n## Recipe\n\nL1.\n"


def checkpoint_in(folder: Path, seed: int = 3, name: str = "ours-x2.safetensors") -> Path:
    """A small network that loads, with its card beside it."""
    torch.manual_seed(seed)
    data = save_network(Rdst(CONFIG), described(Path(name).stem))
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    path.with_suffix(".md").write_text(card_text(sha256, id=Path(name).stem))
    return path


# -- servers -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]


Behaviour = Callable[["Receiver"], None]


@dataclass
class Place:
    """What a test tells a server, and what the server holds and saw."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    plan: dict[str, list[Behaviour]] = field(default_factory=dict)
    """By method: what the next requests meet instead of service."""
    requests: list[Seen] = field(default_factory=list)
    keeps_halves: bool = False
    """Whether a broken upload shows under its name."""
    guard: threading.Lock = field(default_factory=threading.Lock)

    def of(self, method: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.method == method]


class Receiver(BaseHTTPRequestHandler):
    """A folder under /models/ that takes PUT with conditions."""

    protocol_version = "HTTP/1.1"
    place: Place

    def do_GET(self) -> None:
        self.serve("GET", self.give)

    def do_PUT(self) -> None:
        self.serve("PUT", self.take)

    def do_POST(self) -> None:
        self.serve("POST", lambda: self.answer(405))

    def serve(self, method: str, right: Callable[[], None]) -> None:
        self.close_connection = True
        with self.place.guard:
            self.place.requests.append(
                Seen(method, self.path, {name.title(): value for name, value in self.headers.items()})
            )
            plan = self.place.plan.get(method)
            behave = plan.pop(0) if plan else None
        with contextlib.suppress(ConnectionError, TimeoutError):
            if behave is not None:
                behave(self)
            else:
                right()

    def give(self) -> None:
        data = self.place.files.get(self.path)
        if data is None:
            self.answer(404)
        else:
            self.answer(200, data, ETag=tag_of(data))

    def take(self) -> None:
        data = self.body()
        if len(data) < int(self.headers.get("Content-Length", "0")):
            return  # broken off: nothing to keep
        there = self.place.files.get(self.path)
        if not self.path.startswith("/models/"):
            self.answer(404)
        elif (self.headers.get("If-None-Match") == "*" and there is not None) or (
            self.headers.get("If-Match") and (there is None or self.headers["If-Match"] != tag_of(there))
        ):
            self.answer(412)
        else:
            self.place.files[self.path] = data
            self.answer(201)

    def body(self, most: int | None = None) -> bytes:
        length = int(self.headers.get("Content-Length", "0"))
        return self.rfile.read(length if most is None else min(most, length))

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def status(code: int, **headers: str) -> Behaviour:
    """Read all, then answer with a status."""

    def behave(handler: Receiver) -> None:
        handler.body()
        handler.answer(code, **headers)

    return behave


def reset_after(n_bytes: int) -> Behaviour:
    """Take some bytes of an upload, then break the connection; a place that keeps halves shows them."""

    def behave(handler: Receiver) -> None:
        part = handler.body(n_bytes)
        if handler.place.keeps_halves:
            handler.place.files[handler.path] = part
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return behave


def taken_without_an_answer(handler: Receiver) -> None:
    """The whole upload arrives; its answer is lost."""
    handler.place.files[handler.path] = handler.body()
    handler.connection.close()


def spoilt(handler: Receiver) -> None:
    """One bit of an upload is kept wrong, with a good answer."""
    data = bytearray(handler.body())
    data[len(data) // 2] ^= 1
    handler.place.files[handler.path] = bytes(data)
    handler.answer(201)


@contextlib.contextmanager
def receiving(kind: type[Receiver] = Receiver, place: Place | None = None) -> Iterator[Place]:
    place = place or Place()
    handler = type("PlaceHandler", (kind,), {"place": place})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    place.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield place
    finally:
        server.shutdown()
        server.server_close()


# -- the hub -----------------------------------------------------------------------------------------------


@dataclass
class Commit:
    id: str
    files: dict[str, bytes]


@dataclass
class Hub(Place):
    """One repository of a hub, as the calls of huggingface_hub see it."""

    repo: str = "our-group/our-models"
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    """None before the repository is made."""
    storage: dict[str, bytes] = field(default_factory=dict)
    """Large files, by SHA-256."""
    summaries: list[str] = field(default_factory=list)
    validates: bool = True
    """Whether it knows /api/validate-yaml, which a mirror may not."""

    def make(self, **files: bytes) -> None:
        self.add({name.replace("__", "."): data for name, data in files.items()})

    def add(self, files: dict[str, bytes]) -> str:
        merged = {**(self.commits[-1].files if self.commits else {}), **files}
        told = repr((len(self.commits), sorted(merged.items()))).encode()
        self.commits.append(Commit(hashlib.sha1(told, usedforsecurity=False).hexdigest(), merged))
        return self.commits[-1].id

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1] if self.commits else None
        return next((commit for commit in self.commits if commit.id == revision), None)


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class HubReceiver(Receiver):
    """The calls that `model_info`, `create_repo`, `create_commit` and a download make."""

    place: Hub

    def do_POST(self) -> None:
        self.serve("POST", self.post)

    def do_HEAD(self) -> None:
        self.serve("HEAD", lambda: self.answer(404))

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {SECRET}"

    def give(self) -> None:
        hub, path = self.place, unquote(urlsplit(self.path).path)
        if path.startswith("/storage/"):
            assert "Authorization" not in self.headers, "the token went to the storage"
            self.answer(200, hub.storage[path.removeprefix("/storage/")])
            return
        if not self.allowed():
            self.answer(401, X_Error_Code="RepoNotFound")
        elif path.startswith(f"/api/models/{hub.repo}"):
            self.give_info(path.partition("/revision/")[2] or "main")
        elif match := re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/(.+)", path):
            self.give_file(match[1], match[2])
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    def give_info(self, revision: str) -> None:
        commit = self.place.at(revision)
        if not self.place.commits:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif commit is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            siblings = [_sibling(name, data) for name, data in commit.files.items()]
            facts = {"id": self.place.repo, "sha": commit.id, "private": self.place.private, "siblings": siblings}
            self.answer_json(facts)

    def give_file(self, revision: str, name: str) -> None:
        commit = self.place.at(revision)
        data = commit.files.get(name) if commit else None
        if data is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        elif is_large(name):
            elsewhere = self.place.url.replace("127.0.0.1", "localhost")
            self.answer(302, Location=f"{elsewhere}/storage/{hashlib.sha256(data).hexdigest()}")
        else:
            self.answer(200, data)

    def take(self) -> None:
        assert "Authorization" not in self.headers, "the token went to the storage"
        data, oid = self.body(), urlsplit(self.path).path.removeprefix("/storage/")
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer(400)
            return
        self.place.storage[oid] = data
        self.answer(200)

    def post(self) -> None:
        hub, path = self.place, urlsplit(self.path).path
        body = self.body()
        if not self.allowed():
            self.answer(401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body))
        elif path.startswith(f"/api/models/{hub.repo}/preupload/"):
            self.preupload(json.loads(body))
        elif path == f"/{hub.repo}.git/info/lfs/objects/batch":
            self.batch(json.loads(body))
        elif path.startswith(f"/api/models/{hub.repo}/commit/"):
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def create(self, asked: dict[str, Any]) -> None:
        assert f"{asked['organization']}/{asked['name']}" == self.place.repo
        self.place.private = asked.get("visibility") == "private" or asked.get("private") is True
        self.place.make(__gitattributes=b"*.safetensors filter=lfs\n")
        self.answer_json({"url": f"{self.place.url}/{self.place.repo}"})

    def validate(self, asked: dict[str, Any]) -> None:
        if not self.place.validates:
            self.answer(404, b"<html>not here</html>")
            return
        front = yaml.safe_load(asked["content"].split("---\n")[1])
        if front["license"] != front["license"].lower():
            errors = [{"message": f"license {front['license']} is not known {SECRET}"}]
            self.answer_json({"errors": errors, "warnings": []}, 400)
        else:
            self.answer_json({"errors": [], "warnings": []})

    def preupload(self, asked: dict[str, Any]) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular", "shouldIgnore": False}
            for file in asked["files"]
        ]
        self.answer_json({"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            known = item["oid"] in self.place.storage
            href = f"{self.place.url}/storage/{item['oid']}?signature={SECRET}"
            actions = {} if known else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self.answer_json({"objects": objects, "transfer": "basic"})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != self.place.commits[-1].id:
            self.answer(412)
            return
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                if value["oid"] not in self.place.storage:
                    self.answer(400)
                    return
                files[value["path"]] = self.place.storage[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.place.summaries.append(header["value"]["summary"])
        oid = self.place.add(files)
        self.answer_json({"commitUrl": f"{self.place.url}/{self.place.repo}/commit/{oid}", "commitOid": oid})

    def answer_json(self, data: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(data).encode(), Content_Type="application/json")


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    facts: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": sha1}
    if is_large(name):
        facts["blobId"] = "0" * 40
        facts["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return facts


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    with receiving(HubReceiver, Hub()) as hub:
        assert isinstance(hub, Hub)
        yield hub
