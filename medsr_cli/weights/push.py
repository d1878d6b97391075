"""What a push sends, and where to: a checkpoint, its model card and its entry of the manifest. Opens no socket.

Three files, a fourth where the card shows it, and never another one:

    ID.safetensors     the checkpoint, byte for byte
    ID.md              its card: FILE.md beside it, or for an entry of the manifest one made from the entry
    ID.png             the picture that the card shows under this name, if it lies beside the card
    ID.yaml            a manifest of this one checkpoint, with its sha256 and where it now lies; the receiving
                       side says `medsr weights pull ID.yaml`

What the entry says is taken from the card, and where the card is silent from the checkpoint's own metadata.
Nothing is sent without the licence of the weights, the data and the recipe.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import yaml

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, InputRefused, WeightsError
from medsr_cli.networks.catalogue import Arch
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.manifest import LOOPBACK, Entry, Source, parse_entry, parse_manifest
from medsr_cli.weights.model_card import ModelCard, card_of_entry, picture_beside, plain, read_card, says_nothing
from medsr_cli.weights.store import Digest, digest_file, new_git_blob

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


# -- where to ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubTarget:
    """A repository of the model hub; `branch` is None for its default one."""

    repo: str
    branch: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.branch}" if self.branch else "")


@dataclass(frozen=True)
class SiteTarget:
    """A folder of a web server that takes PUT; `url` ends in a slash."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def encrypted(self) -> bool:
        """Whether what is sent can be read on its way."""
        return self.url.startswith("https://")

    @property
    def can_be_pulled(self) -> bool:
        """Whether `medsr weights pull` accepts the address: https, or this machine itself."""
        return self.encrypted or urlsplit(self.url).hostname in LOOPBACK


def parse_target(text: str, *, insecure_http: bool = False) -> HubTarget | SiteTarget:
    """`hf://ORG/REPO[@BRANCH]`, or the https address of a folder.

    Plain http is for this machine itself, unless `insecure_http`.

    Raises:
        ArgumentsError: neither, or it carries a password or a query, which is not repeated in the sentence.
    """
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() == "hf":
        return _parse_hub(rest)
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        _refuse_target("is not an address")
    if parts.username or parts.password or "@" in parts.netloc:
        _refuse_target("carries a user name or password", "Put them in a variable: see --token-env.")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        _refuse_target("carries a query or a fragment", "Give the address of a folder alone.")
    if parts.scheme not in ("https", "http") or not host or not text.isprintable() or " " in text:
        _refuse_target("is neither hf://ORG/REPO nor an http address")
    if not parts.path.isascii():
        _refuse_target("has a path of other characters than ASCII", "Write them as %XX.")
    target = SiteTarget(text.rstrip("/") + "/")
    if not (target.can_be_pulled or insecure_http):
        msg = f"{target} is not encrypted: anyone between here and there can read and change what is sent."
        raise ArgumentsError(msg, "Use https, or pass --insecure-http if the way there is otherwise protected.")
    return target


def _parse_hub(rest: str) -> HubTarget:
    repo, at, branch = rest.rstrip("/").partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo:
        _refuse_target("is not of the form hf://ORG/REPO or hf://ORG/REPO@BRANCH")
    if at and (not _BRANCH.fullmatch(branch) or ".." in branch):
        _refuse_target("names a branch that cannot be one")
    return HubTarget(repo, branch or None)


def _refuse_target(reason: str, remedy: str = "Such as hf://our-group/our-model or https://host/models/.") -> NoReturn:
    # Without the address: a secret may have been put in it.
    msg = f"The address given with --to {reason}."
    raise ArgumentsError(msg, remedy)


def secret_from(variable: str | None, default: str) -> str:
    """The token in an environment variable, by its name; empty where none was named and the default is not set.

    Raises:
        ArgumentsError: the named variable is not set, or holds what no header can carry. Neither the value nor
            the name is repeated, since a secret may have been given for a name.
    """
    secret = os.environ.get(variable or default, "").strip()
    if variable is not None and not secret:
        msg = "The variable that --token-env names is not set, or empty."
        raise ArgumentsError(msg, "Give the name of a variable that holds the token, never the token itself.")
    if secret and not (secret.isascii() and secret.isprintable() and " " not in secret):
        msg = "The token holds spaces or other characters that no token has."
        raise ArgumentsError(msg, "Set the variable again.")
    return secret


def authorization(secret: str) -> str:
    """The header that carries a secret: USER:PASSWORD as Basic, anything else as a Bearer token."""
    if ":" in secret:
        return f"Basic {base64.b64encode(secret.encode()).decode()}"
    return f"Bearer {secret}" if secret else ""


# -- what --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outgoing:
    """A file to send: its name there, its bytes or the file that holds them, and its hashes."""

    name: str
    content: Path | bytes
    digest: Digest
    content_type: str

    @classmethod
    def of_bytes(cls, name: str, data: bytes, content_type: str) -> Outgoing:
        """A small file, from memory."""
        git_blob = new_git_blob(len(data))
        git_blob.update(data)
        digest = Digest(len(data), hashlib.sha256(data).hexdigest(), git_blob.hexdigest())
        return cls(name, data, digest, content_type)


@dataclass(frozen=True)
class Sent:
    """What became of a file, and where it lies."""

    name: str
    url: str
    digest: Digest
    status: Literal["sent", "replaced", "already there"]
    verified: bool
    """Whether the bytes were read back and are those that were sent."""


@dataclass(frozen=True)
class Parcel:
    """A checkpoint that may be sent; `entry` has no sources yet."""

    entry: Entry
    weights: Outgoing
    card: Outgoing
    picture: Outgoing | None = None
    """What the card shows; without it a card would point to nothing."""

    @property
    def files(self) -> tuple[Outgoing, ...]:
        """What goes out before the entry."""
        return (self.weights, self.card) if self.picture is None else (self.weights, self.card, self.picture)

    def described(self, *sources: Source, by_hand: str | None = None) -> Outgoing:
        """The entry as a manifest of one checkpoint, with the places that it can be had from.

        Raises:
            WeightsError: the entry is not what the manifest's schema takes; the sentence names the field.
        """
        entry = dataclasses.replace(self.entry, sources=sources, by_hand=by_hand)
        data = {
            "version": 1,
            "default_modality": entry.modality if entry.modality != "any" else "mr",
            "checkpoints": [plain(entry.to_json())],
        }
        name = f"{entry.id}.yaml"
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
        if parse_manifest(text, name).entries != (entry,):  # pragma: no cover -- guards against a lossy dump
            msg = f"{name} would not be read back as it was written."
            raise WeightsError(msg, "Report this as a fault of medsr.")
        header = f"# One checkpoint of medsr. To have it: medsr weights pull {name}\n"
        return Outgoing.of_bytes(name, (header + text).encode(), "application/yaml")


def parcel_of_file(path: Path, card_path: Path | None = None) -> Parcel:
    """The parcel of a checkpoint that `medsr finetune` wrote, and of the card beside it.

    Raises:
        WeightsError: not there, not safetensors, not a network that loads; no card, or one of another file; the
            picture that it shows is no PNG, or too large.
        InputRefused: the card does not say licence, data or recipe.
    """
    _refuse_other_kinds(path)
    header = read_header(path)
    digest = digest_file(path)
    card = read_card(card_path or path.with_suffix(".md"), path)
    _refuse_gaps(card, digest)
    arch, config = _loaded(path)
    entry = _entry_from(_Facts(card.facts, header.metadata), path, arch, config, digest)
    entry = dataclasses.replace(entry, licence=dataclasses.replace(entry.licence, weights=card.licence))
    return _parcel(entry, path, digest, card)


def parcel_of_entry(entry: Entry, path: Path, card_path: Path | None = None) -> Parcel:
    """The parcel of a checkpoint of the manifest that lies at `path`, which the caller has verified.

    Raises:
        WeightsError: it does not load, or its card is of another file or shows a picture that may not be sent.
        InputRefused: it has no licence to be handed on under, or the card does not say one, data or recipe.
    """
    if says_nothing(entry.licence.weights):
        msg = f"The licence of the weights of {entry.id} is {entry.licence.weights!r}, so they may not be handed on."
        raise InputRefused(msg, "Give the receiving side the id: it can pull them from the authors.")
    digest = digest_file(path)
    _loaded(path)
    converted = f"Converted by medsr from the authors' file ({entry.sha256 or entry.git_blob or 'not pinned'})."
    entry = dataclasses.replace(
        entry,
        format="safetensors",
        bytes=digest.bytes,
        sha256=digest.sha256,
        sha256_prefix=None,
        git_blob=None,
        notes=entry.notes if entry.format == "safetensors" else f"{entry.notes} {converted}".strip(),
    )
    if card_path is None:
        return _parcel(entry, path, digest, card_of_entry(entry).encode())
    card = read_card(card_path, path)
    _refuse_gaps(card, digest)
    return _parcel(entry, path, digest, card)


def _parcel(entry: Entry, path: Path, digest: Digest, card: ModelCard | bytes) -> Parcel:
    weights = Outgoing(f"{entry.id}.safetensors", path, digest, "application/octet-stream")
    data = card.data if isinstance(card, ModelCard) else card
    page = Outgoing.of_bytes(f"{entry.id}.md", data, "text/markdown; charset=utf-8")
    name = f"{entry.id}.png"
    shown = picture_beside(card, name) if isinstance(card, ModelCard) else None
    return Parcel(entry, weights, page, None if shown is None else Outgoing.of_bytes(name, shown, "image/png"))


def _refuse_gaps(card: ModelCard, digest: Digest) -> None:
    """Refuse a card of another file as its checksum, and one that leaves something out as an input."""
    try:
        card.refuse_gaps(digest)
    except WeightsError as error:
        if card.facts.get("sha256") != digest.sha256:
            raise
        raise InputRefused(error.sentence, error.remedy) from error


def _refuse_other_kinds(path: Path) -> None:
    if not path.is_file():
        msg = f"There is no checkpoint {path}."
        raise WeightsError(msg, "Give a .safetensors file, or the id of a checkpoint (medsr weights list).")
    if path.suffix != ".safetensors":
        msg = f"{path.name} is not a safetensors file; a pickle can run code on the machine that opens it."
        remedy = f"Convert it first: medsr weights import {path.name} -o OUT.safetensors."
        raise WeightsError(msg, remedy)


def _loaded(path: Path) -> tuple[Arch, Mapping[str, Any]]:
    """The method and configuration of a checkpoint, after it has been built and run once."""
    from medsr_cli.networks import checkpoint, load_network  # noqa: PLC0415 -- torch, only where it is needed

    network = load_network(path)
    checkpoint.rehearse(network, path.name)
    return checkpoint.entry_of(network), checkpoint.config_of(network)


# -- the entry ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What a card and the checkpoint's own metadata say; the metadata are texts, JSON where not words."""

    card: Mapping[str, Any]
    metadata: Mapping[str, str]

    def get(self, key: str, otherwise: Any = None) -> Any:
        """A fact; of the card, else of the metadata, else `otherwise`."""
        if self.card.get(key) is not None:
            return self.card[key]
        return self.metadata.get(key) or otherwise

    def structure(self, key: str, otherwise: Any) -> Any:
        """A fact that is no word: a number, a list, a mapping."""
        value = self.get(key, otherwise)
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return otherwise


def _entry_from(facts: _Facts, path: Path, arch: Arch, config: Mapping[str, Any], digest: Digest) -> Entry:
    """The entry of a fine-tuned checkpoint; what the network itself tells is taken from the network.

    Raises:
        WeightsError: what is told is not what the manifest takes; the sentence names the field.
    """
    scales = [config["scale"]] if "scale" in config else facts.structure("scales", [])
    any_scale = list(arch.scale_range) if arch.scale_range and not scales else None
    licence = facts.get("licence")
    known = licence if isinstance(licence, Mapping) else {}
    written_by = f"Apache-2.0 (medsr {facts.get('medsr_version', __version__)})"
    data = {
        "id": facts.get("id", path.stem),
        "method": arch.id,
        "variant": arch.variant_of(dict(config)) or None,
        "scales": scales if arch.kind == "network" else [],
        "scale_range": facts.structure("scale_range", any_scale),
        "modality": facts.get("modality", "any"),
        "body_part": facts.get("body_part", "any"),
        "channels": config.get("in_channels", facts.structure("channels", 1)),
        "value_range": facts.structure("value_range", [0.0, 1.0]),
        "degradation": facts.get("degradation", arch.degradation),
        "spacing_mm": facts.structure("spacing_mm", None),
        "format": "safetensors",
        "sources": [],
        "by_hand": "the sender",
        "bytes": digest.bytes,
        "sha256": digest.sha256,
        "git_blob": None,
        "licence": {
            "code": known.get("code") or facts.get("licence_of_code", written_by),
            "weights": known.get("weights") or facts.get("licence_of_weights", "see the card"),
            "data": known.get("data") or facts.get("licence_of_data", "not stated"),
        },
        "trained_on": facts.get("trained_on"),
        "validation": [_figure(row) for row in facts.structure("validation", []) if _beside_bicubic(row)],
        "command": facts.get("command"),
        "date": facts.get("date"),
        "notes": str(facts.get("notes", "")),
        "consistency": facts.structure("consistency", None),
        "precision_cost_db": facts.structure("precision_cost_db", None),
    }
    try:
        return parse_entry(data, f"The card of {path.name}")
    except WeightsError as error:
        raise WeightsError(error.sentence, "Correct the card.") from error


def _beside_bicubic(row: Any) -> bool:
    """Whether a row is of the manifest's kind; those of masks and centres stay in the card."""
    return isinstance(row, Mapping) and "bicubic_psnr" in row


def _figure(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of figures; a contrast that the card leaves open gets a word, since the manifest wants one."""
    return {**row, "contrast": row.get("contrast") or "not told"}
