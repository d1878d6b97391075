"""The model card: what a checkpoint says of itself to people, read before it is sent and made from an entry.

A card is Markdown with a YAML block in front, as `medsr finetune` writes it. Read of it are `license`, and of
the part `medsr`: `sha256`, `licence_of_weights`, `licence_of_data`, `trained_on`, `recipe`, `command`, and the
fields of the manifest.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medsr_cli.errors import WeightsError, mention, reason_of
from medsr_cli.weights.manifest import Entry
from medsr_cli.weights.store import Digest

MAX_CARD_BYTES = 1_000_000
MAX_PICTURE_BYTES = 5_000_000
SILENT_LICENCES = ("", "none", "not stated", "unknown", "todo", "tbd")
"""What begins so is no licence."""
SPDX_ON_THE_HUB = (
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "pddl", "odbl", "mpl-2.0", "unlicense"),
)
"""Licences that a model hub knows by these words; any other is `other` there, with its name beside it."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE = re.compile(r"!\[[^\]\n]*\]\(([^()\s]+)\)")
_FRONT = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_RECIPE = re.compile(r"^#+ .*\brecipe\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class ModelCard:
    """A card that was read: its bytes, its licence and the facts of its YAML block."""

    path: Path
    data: bytes
    licence: str
    facts: Mapping[str, Any]
    has_recipe: bool

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        return self.path.name

    def refuse_gaps(self, digest: Digest) -> None:
        """Refuse a card of another file, or one that does not say what a receiver must know.

        Raises:
            WeightsError: either.
        """
        stated = self.facts.get("sha256")
        if stated != digest.sha256:
            found = f"states the sha256 {stated}" if isinstance(stated, str) and stated else "states no sha256"
            which = f"that of the checkpoint is {digest.sha256}: it is the card of another file"
            msg = f"{mention(self.name)} {found}, but {which}."
            raise WeightsError(msg, "Give the card that was written with the checkpoint.")
        gaps = {
            "the licence of the weights (license)": says_nothing(self.licence),
            "what it was trained on (medsr: trained_on)": says_nothing(self.facts.get("trained_on")),
            "its recipe (a section Recipe, or medsr: command)": not self.has_recipe,
        }
        missing = [words for words, absent in gaps.items() if absent]
        if missing:
            msg = f"{mention(self.name)} does not say {', nor '.join(missing)}."
            raise WeightsError(msg, "Add it to the card: whoever gets the checkpoint needs to know.")


def read_card(path: Path, checkpoint: Path) -> ModelCard:
    """Read a model card.

    Raises:
        WeightsError: missing, too large, not text, or without a YAML block that can be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
        text = data.decode()
    except FileNotFoundError as error:
        msg = f"{mention(checkpoint.name)} has no model card: {mention(path)} is not there."
        raise WeightsError(msg, "medsr finetune writes one beside its checkpoint; --card names another.") from error
    except (OSError, UnicodeDecodeError) as error:
        msg = f"The card {mention(path)} cannot be read as text."
        raise WeightsError(msg, "Check the path given with --card.") from error
    if len(data) > MAX_CARD_BYTES:
        msg = f"The card {mention(path)} has more than {MAX_CARD_BYTES} bytes."
        raise WeightsError(msg, "Give the card alone.")
    front = _front_matter(text)
    facts = front.get("medsr") if front else None
    if front is None or not isinstance(facts, Mapping):
        msg = f"The card {path.name} does not begin with a YAML block that has a part called medsr."
        raise WeightsError(msg, "Give a card as medsr finetune writes it.")
    licence = front.get("license") or facts.get("licence_of_weights") or ""
    recipe = any(not says_nothing(facts.get(key)) for key in ("recipe", "command")) or bool(_RECIPE.search(text))
    return ModelCard(path, data, str(licence), facts, recipe)


def _front_matter(text: str) -> Mapping[str, Any] | None:
    match = _FRONT.match(text)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return front if isinstance(front, Mapping) else None


def says_nothing(value: object) -> bool:
    """Whether a text leaves open what it should tell: empty, unknown, not stated."""
    words = str(value or "").strip().lower()
    return any(words == silent or (silent and words.startswith(f"{silent} ")) for silent in SILENT_LICENCES)


def picture_beside(card: ModelCard, name: str) -> bytes | None:
    """The picture that a card shows under a name, from beside the card; None where it shows none or it is not there.

    Raises:
        WeightsError: it cannot be read, is no whole PNG, or has 5 MB or more.
    """
    path = card.path.parent / name
    if name not in _PICTURE.findall(card.data.decode()) or not path.is_file():
        return None
    remedy = f"Put the picture right, or take the line that shows it out of {mention(card.name)}."
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PICTURE_BYTES)
    except OSError as error:
        msg = f"{mention(path)} cannot be read ({reason_of(error)})."
        raise WeightsError(msg, remedy) from error
    if len(data) == MAX_PICTURE_BYTES:
        msg = f"{mention(name)}, which {mention(card.name)} shows, has {MAX_PICTURE_BYTES} bytes or more."
        raise WeightsError(msg, remedy)
    if not _is_png(data):
        msg = f"{mention(name)}, which {mention(card.name)} shows, is not a whole PNG, or holds more than a picture."
        raise WeightsError(msg, remedy)
    return data


def _is_png(data: bytes) -> bool:
    """Whether all bytes are chunks of one PNG (ISO/IEC 15948, clause 5): IHDR to IEND, each with its checksum."""
    position, kinds = len(_PNG), []
    while data.startswith(_PNG) and position + 12 <= len(data):  # length, kind and checksum: 4 bytes each
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[position + 4 : end])):
            return False
        kinds.append(data[position + 4 : position + 8])
        position = end + 4
    whole = kinds[:1] == [b"IHDR"] and b"IDAT" in kinds and kinds[-1] == b"IEND"
    return whole and kinds.count(b"IEND") == 1 and position == len(data)


def card_of_entry(entry: Entry) -> str:
    """The card of a checkpoint of the manifest, made of its entry, in the form that `medsr finetune` writes."""
    facts = {key: value for key, value in plain(entry.to_json()).items() if key not in ("sources", "git_blob")}
    licence = entry.licence
    facts |= {"licence_of_weights": licence.weights, "licence_of_data": licence.data}
    front = {
        "library_name": "medsr",
        "pipeline_tag": "image-to-image",
        "license": licence.weights,
        "tags": ["super-resolution", "medical-imaging", entry.method],
        "medsr": facts,
    }
    block = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    scales = ", ".join(f"x{words}" for words in entry.scale_words) or "no enlargement"
    lines = [
        f"# {entry.id}",
        f"{entry.variant or entry.method}, {scales}; {entry.modality}, {entry.body_part}; {entry.channels} channel(s).",
        f"- Licence of the weights: {licence.weights}.\n- Licence of the code: {licence.code}.\n"
        f"- Licence of the data: {licence.data}.",
        "## Data",
        f"Trained on {entry.trained_on}.",
        "## Recipe",
        f"    {entry.command or 'not known: trained by the authors, see their paper'}",
        *_figures(entry),
        *([entry.notes.strip()] if entry.notes.strip() else []),
        "## Limits",
        "- Research use; not a medical device.\n- In-plane only: slices do not become thinner.\n"
        "- What is finer than the input's grid is inferred from the training images and may not be there.",
    ]
    return f"---\n{block}---\n\n" + "\n\n".join(lines) + "\n"


def _figures(entry: Entry) -> list[str]:
    if not entry.validation:
        return ["## Beside bicubic", "Not measured."]
    head = "| image | contrast | PSNR, dB | bicubic | SSIM | bicubic |\n|---|---|---|---|---|---|"
    rows = [
        f"| {v.name} | {v.contrast} | {v.psnr:.2f} | {v.bicubic_psnr:.2f} | {v.ssim:.4f} | {v.bicubic_ssim:.4f} |"
        for v in entry.validation
    ]
    return ["## Beside bicubic, on images that were not trained on", "\n".join((head, *rows))]


def hub_front_page(card: bytes) -> bytes:
    """A card as the hub's front page, README.md: the same text, with its licence in the hub's own words.

    Args:
        card: one that `read_card` has read, or that was made of an entry.
    """
    text = card.decode()
    match = _FRONT.match(text)
    front = dict(_front_matter(text) or {})
    named = str(front.get("license") or front.get("medsr", {}).get("licence_of_weights"))
    word = named.strip().lower().replace(" ", "-")
    if word in SPDX_ON_THE_HUB:
        front["license"] = word
    else:
        front |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", named.lower()).strip("-")[:60]}
    block = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{block}---\n{text[match.end() if match else 0 :]}".encode()


def plain(value: Any) -> Any:
    """A value without tuples, which YAML has no word for."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
