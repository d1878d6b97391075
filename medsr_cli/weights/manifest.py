"""The list of checkpoints, `weights_manifest.yaml`: its schema, its reader, and the choice of an entry.

The file is inside the wheel as `medsr_cli/weights_manifest.yaml` and at the top of the repository. Every
field below is required unless it has a default; unknown fields, wrong types and values out of range are
refused by entry and field.

    version: 1
    default_modality: mr            # assumed where neither the user nor DICOM says; mr | ct | us | xr
    checkpoints:                    # in order of preference
      - id: rdst-x4-brain           # [a-z0-9.-], at most 64, unique; also the name of the file in the store
        method: rdst                # id in medsr_cli.networks.catalogue
        variant: rdst-e             # a variant of that method, or null
        scales: [4]                 # in-plane enlargements, in (1, 8]; may be [] with scale_range, or for a network
                                    # that enlarges nothing
        scale_range: null           # default null; [low, high]: every enlargement above low and up to high, also
                                    # another along rows than along columns
        modality: mr                # mr | ct | us | xr | any
        body_part: brain            # as DICOM's BodyPartExamined, in lower case; "any" for all
        channels: 1                 # 1 to 16
        value_range: [0.0, 1.0]     # of the network's input, low < high
        degradation: cubic          # [a-z0-9-]: how the low-resolution images were made
        spacing_mm: [0.5, 1.5]      # in-plane pixel spacing of the low-resolution training images; null: unknown
        format: safetensors         # safetensors | author-pt (a pickle of the authors, converted on pull)
        sources:                    # tried in order; [] where medsr cannot fetch it, and then by_hand says where it is
          - {kind: bundled, file: rdst-x4-brain.safetensors}           # in medsr_cli/checkpoints/
          - {kind: hf, repo: owner/name, file: a.safetensors, revision: <commit>}
          - {kind: url, url: https://..., file: a.safetensors}         # http only for loopback
        by_hand: null               # default null; where a person gets the file, with what is needed there
        bytes: 4807312              # of the file that the sources give; null: unknown
        sha256: <64 hex>            # of the same file; null where git_blob is given or nothing is known
        sha256_prefix: null         # default null; 8 to 63 hex that it begins with: compared, but proof of nothing
        git_blob: null              # 40 hex, git's id of the file, which covers its length; null otherwise
        licence: {code: ..., weights: ..., data: ...}
        trained_on: ...             # a sentence
        validation:                 # [] where nothing was measured; dB and SSIM, beside bicubic
          - {name: ..., contrast: T1w, psnr: 33.4, ssim: 0.93, bicubic_psnr: 29.9, bicubic_ssim: 0.86}
        consistency: null           # default null; what its shrunken results showed on validation images, see
                                    # medsr_cli/evaluation/agreement_map.py:
                                    # {limit: 0.15, slices: 232, largest_seen: 0.05}
        precision_cost_db: null     # default null; PSNR that bfloat16 and float16 lose against float32, each null or
                                    # left out where not measured, on so many validation slices (see
                                    # tests/benchmarks/precision.py): {bfloat16: 0.002, float16: 0.0, slices: 24}
        command: ...                # what trained it; null: not known
        date: 2026-11-20            # of the weights or of the entry; null: not known
        notes: ...                  # default ""

An entry without sha256 and git_blob is unpinned: it is fetched and loaded only with `--allow-unpinned`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import yaml

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks import catalogue

FILE_NAME = "weights_manifest.yaml"
MODALITIES = ("mr", "ct", "us", "xr")
FORMATS = ("safetensors", "author-pt")
MAX_BYTES = 4_000_000_000
MAX_CHANNELS = 16
MAX_SCALE = 8
MAX_COST_DB = 100.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_WORD = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HF_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA256_PREFIX = re.compile(r"[0-9a-f]{8,63}")

Scale = float | tuple[float, float]
"""An enlargement: of rows and columns alike, or of each."""
_NEWER = ("scale_range", "by_hand", "sha256_prefix", "consistency", "precision_cost_db")
"""Fields left out of the JSON where they say nothing, so that earlier releases can read it."""


@dataclass(frozen=True)
class Source:
    """One place that a checkpoint can come from; which fields are set depends on `kind`."""

    kind: Literal["bundled", "hf", "url"]
    file: str
    repo: str = ""
    revision: str = ""
    url: str = ""


@dataclass(frozen=True)
class Licence:
    """Licences of the code that trained it, of the weights and of the training data, in words or SPDX."""

    code: str
    weights: str
    data: str


@dataclass(frozen=True)
class Validation:
    """Figures on images that were not trained on: PSNR in dB, SSIM, and the same for bicubic."""

    name: str
    contrast: str
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float


@dataclass(frozen=True)
class Consistency:
    """How far blocks of its shrunken results may be from the input, and the validation slices that this rests on."""

    limit: float
    slices: int
    largest_seen: float | None = None


@dataclass(frozen=True)
class PrecisionCost:
    """PSNR in dB that narrower arithmetic loses against float32; None: not measured. Below zero it gained."""

    slices: int
    """Validation slices that it was measured on."""
    bfloat16: float | None = None
    float16: float | None = None

    @property
    def by_name(self) -> dict[str, float]:
        """What is known, by the name of the arithmetic."""
        both = {"bfloat16": self.bfloat16, "float16": self.float16}
        return {name: cost for name, cost in both.items() if cost is not None}

    def to_json(self) -> str:
        """For a checkpoint's metadata; `precision_cost_of_json` reads it back."""
        return json.dumps({"slices": self.slices, **self.by_name})


@dataclass(frozen=True)
class Entry:
    """One checkpoint; the fields are those of the module's schema."""

    id: str
    method: str
    variant: str | None
    scales: tuple[float, ...]
    modality: str
    body_part: str
    channels: int
    value_range: tuple[float, float]
    degradation: str
    spacing_mm: tuple[float, float] | None
    format: str
    sources: tuple[Source, ...]
    bytes: int | None
    sha256: str | None
    git_blob: str | None
    licence: Licence
    trained_on: str
    validation: tuple[Validation, ...]
    command: str | None
    date: str | None
    notes: str = ""
    scale_range: tuple[float, float] | None = None
    by_hand: str | None = None
    sha256_prefix: str | None = None
    consistency: Consistency | None = None
    precision_cost_db: PrecisionCost | None = None

    def covers(self, rows: float, columns: float | None = None) -> bool:
        """Whether it enlarges rows by the first and columns by the second number (None: by the same)."""
        both = (rows, rows if columns is None else columns)
        if self.scale_range is not None and all(self.scale_range[0] < s <= self.scale_range[1] for s in both):
            return True
        return both[0] == both[1] and rows in self.scales

    @property
    def scale_words(self) -> tuple[str, ...]:
        """Its scales as words: `2`, and `1.0-4.0` for every scale between."""
        words = tuple(f"{scale:g}" for scale in self.scales)
        return words if self.scale_range is None else (*words, f"{self.scale_range[0]}-{self.scale_range[1]}")

    @property
    def how_to_get(self) -> str:
        """What to do to have it on this machine, a sentence or two."""
        if self.sources:
            return f"Run: medsr weights pull {self.id}{'' if self.pinned else ' --allow-unpinned'}."
        convert = f"medsr weights import FILE -m {self.method} -o OUT.safetensors"
        return f"Get it by hand from {self.by_hand}, run {convert} and pass --weights OUT.safetensors."

    @property
    def pinned(self) -> bool:
        """Whether the manifest says which bytes it is."""
        return bool(self.sha256 or self.git_blob)

    @property
    def bundled_file(self) -> str | None:
        """Its file in medsr_cli/checkpoints/, for checkpoints that travel inside the package."""
        return next((source.file for source in self.sources if source.kind == "bundled"), None)

    def to_json(self) -> dict[str, Any]:
        """The entry as the schema has it; `parse_entry` reads it back."""
        written = {
            key: value for key, value in dataclasses.asdict(self).items() if not (key in _NEWER and value is None)
        }
        written["sources"] = [
            {key: value for key, value in dataclasses.asdict(source).items() if value} for source in self.sources
        ]
        return written


@dataclass(frozen=True)
class Manifest:
    """All entries, in order of preference."""

    default_modality: str
    entries: tuple[Entry, ...]

    def entry(self, entry_id: str) -> Entry:
        """The entry of an id.

        Raises:
            ArgumentsError: there is none; the sentence lists those there are.
        """
        for entry in self.entries:
            if entry.id == entry_id:
                return entry
        known = ", ".join(entry.id for entry in self.entries) or "none"
        msg = f"There is no checkpoint called {entry_id!r}."
        raise ArgumentsError(msg, f"The manifest lists: {known}.")

    def extended(self, more: tuple[Entry, ...]) -> Manifest:
        """With entries of a bundle after its own; an id that it has already stays its own."""
        known = {entry.id for entry in self.entries}
        return Manifest(self.default_modality, self.entries + tuple(e for e in more if e.id not in known))


def manifest_path() -> Path:
    """The manifest inside the installed package, or at the top of the repository.

    Raises:
        WeightsError: it is in neither place.
    """
    packaged = Path(str(resources.files("medsr_cli").joinpath(FILE_NAME)))
    beside = Path(str(resources.files("medsr_cli"))).parent / FILE_NAME
    for path in (packaged, beside):
        if path.is_file():
            return path
    msg = f"The list of checkpoints, {FILE_NAME}, is missing from the installation."
    raise WeightsError(msg, "Install medsr again.")


def load_manifest(path: Path | None = None) -> Manifest:
    """Read and validate a manifest; None is the one that came with medsr.

    Raises:
        WeightsError: unreadable or invalid; the sentence names the entry and the field.
    """
    path = path or manifest_path()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read as text."
        raise WeightsError(msg, "Install medsr again.") from error
    return parse_manifest(text, path.name)


def parse_manifest(text: str, name: str = FILE_NAME) -> Manifest:
    """Validate the text of a manifest; `name` is what errors call it.

    Raises:
        WeightsError: invalid; the sentence names the entry and the field.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 -- a SafeLoader that refuses repeated keys
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{name} is not valid YAML ({reason})."
        raise WeightsError(msg, "Correct the file.") from error
    top = _Fields(data, name)
    if top.integer("version", 1, 1) != 1:  # pragma: no cover -- integer() refuses it
        top.refuse("version", "must be 1")
    default_modality = top.one_of("default_modality", MODALITIES)
    entries = tuple(parse_entry(item, f"{name}, checkpoint {i + 1}") for i, item in enumerate(top.list("checkpoints")))
    top.finish()
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            msg = f"{name}: the id {entry.id} stands twice."
            raise WeightsError(msg, "Give each checkpoint an id of its own.")
        seen.add(entry.id)
    return Manifest(default_modality, entries)


def parse_entry(data: object, where: str) -> Entry:
    """Validate one entry; `where` is what errors call it until its id is known.

    Raises:
        WeightsError: invalid; the sentence names the field.
    """
    fields = _Fields(data, where)
    entry_id = fields.text("id", _ID)
    fields.where = f"{where.partition(',')[0]}, {entry_id}"
    method = fields.one_of("method", tuple(arch.id for arch in catalogue.CATALOGUE if arch.module))
    arch = catalogue.find(method)[0]
    entry = Entry(
        id=entry_id,
        method=method,
        variant=fields.one_of("variant", tuple(arch.variants)) if fields.given("variant") else None,
        scales=fields.numbers("scales", 1.0, float(MAX_SCALE)),
        modality=fields.one_of("modality", (*MODALITIES, "any")),
        body_part=fields.text("body_part", _WORD),
        channels=fields.integer("channels", 1, MAX_CHANNELS),
        value_range=fields.pair("value_range", -math.inf),
        degradation=fields.text("degradation", _WORD),
        spacing_mm=fields.pair("spacing_mm", 0.0) if fields.given("spacing_mm") else None,
        format=fields.one_of("format", FORMATS),
        sources=tuple(_parse_source(item, f"{fields.where}, sources[{i}]") for i, item in fields.items("sources")),
        bytes=fields.integer("bytes", 1, MAX_BYTES) if fields.given("bytes") else None,
        sha256=fields.text("sha256", _SHA256) if fields.given("sha256") else None,
        git_blob=fields.text("git_blob", _COMMIT) if fields.given("git_blob") else None,
        licence=_parse_licence(fields.take("licence"), f"{fields.where}, licence"),
        trained_on=fields.text("trained_on"),
        validation=tuple(
            _parse_validation(item, f"{fields.where}, validation[{i}]") for i, item in fields.items("validation")
        ),
        command=fields.text("command") if fields.given("command") else None,
        date=fields.date("date") if fields.given("date") else None,
        notes=fields.text("notes") if fields.data.get("notes") else fields.skip("notes"),
        scale_range=fields.pair("scale_range", 0.0) if fields.stated("scale_range") else None,
        by_hand=fields.text("by_hand") if fields.stated("by_hand") else None,
        sha256_prefix=fields.text("sha256_prefix", _SHA256_PREFIX) if fields.stated("sha256_prefix") else None,
        consistency=(
            _parse_consistency(fields.data["consistency"], f"{fields.where}, consistency")
            if fields.stated("consistency")
            else None
        ),
        precision_cost_db=(
            _parse_precision_cost(fields.data["precision_cost_db"], f"{fields.where}, precision_cost_db")
            if fields.stated("precision_cost_db")
            else None
        ),
    )
    fields.finish()
    _check_entry(entry, fields)
    _check_scales(entry, arch, fields)
    return entry


def _check_entry(entry: Entry, fields: _Fields) -> None:
    """What no single field can say."""
    if not entry.sources and not entry.by_hand:
        fields.refuse("sources", "must name at least one, or by_hand must say where a person gets the file")
    if entry.sources and entry.by_hand:
        fields.refuse("by_hand", "is for files that medsr cannot fetch, and this one has sources")
    if entry.sha256 and entry.sha256_prefix and not entry.sha256.startswith(entry.sha256_prefix):
        fields.refuse("sha256_prefix", "is not what sha256 begins with")
    if entry.format == "author-pt" and entry.bundled_file:
        fields.refuse("sources", "cannot bundle an author-pt file: only safetensors travel in the package")
    if entry.bundled_file and not entry.pinned:
        fields.refuse("sha256", "must be given for a bundled checkpoint")


def _check_scales(entry: Entry, arch: catalogue.Arch, fields: _Fields) -> None:
    """Scales suit the method: none for a network that enlarges nothing, a range for one that takes any."""
    if len(set(entry.scales)) != len(entry.scales) or any(scale <= 1 for scale in entry.scales):
        fields.refuse("scales", "must be different numbers above 1")
    if entry.scale_range is not None and not 1 <= entry.scale_range[0] < entry.scale_range[1] <= MAX_SCALE:
        fields.refuse("scale_range", f"must be within 1 and {MAX_SCALE}")
    if entry.scale_range is not None and arch.scale_range is None:
        fields.refuse("scale_range", f"is given, but {arch.id} has a network for each scale")
    if arch.kind != "network" and (entry.scales or entry.scale_range):
        fields.refuse("scales", f"must be empty, since {arch.id} enlarges nothing")
    if arch.kind == "network" and not entry.scales and not entry.scale_range:
        fields.refuse("scales", "must name at least one, or scale_range must be given")


def _parse_source(data: object, where: str) -> Source:
    fields = _Fields(data, where)
    kind = fields.one_of("kind", ("bundled", "hf", "url"))
    if kind == "bundled":
        source = Source("bundled", fields.text("file", _FILE))
    elif kind == "hf":
        # A commit, not a branch: a branch can be moved to other bytes.
        source = Source(
            "hf", fields.text("file", _HF_FILE), fields.text("repo", _REPO), fields.text("revision", _COMMIT)
        )
    else:
        url = fields.text("url")
        if not allowed_url(url):
            fields.refuse("url", "must be https (http only for this machine itself)")
        source = Source("url", fields.text("file", _FILE), url=url)
    fields.finish()
    return source


def allowed_url(url: str) -> bool:
    """Whether medsr may fetch from there: https, or http from this machine itself; no password in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not host or parts.username or parts.password or not url.isprintable() or " " in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)


def _parse_licence(data: object, where: str) -> Licence:
    fields = _Fields(data, where)
    licence = Licence(fields.text("code"), fields.text("weights"), fields.text("data"))
    fields.finish()
    return licence


def _parse_validation(data: object, where: str) -> Validation:
    fields = _Fields(data, where)
    validation = Validation(
        name=fields.text("name"),
        contrast=fields.text("contrast"),
        psnr=fields.number("psnr", 0.0, 200.0),
        ssim=fields.number("ssim", -1.0, 1.0),
        bicubic_psnr=fields.number("bicubic_psnr", 0.0, 200.0),
        bicubic_ssim=fields.number("bicubic_ssim", -1.0, 1.0),
    )
    fields.finish()
    return validation


def _parse_consistency(data: object, where: str) -> Consistency:
    fields = _Fields(data, where)
    limit = fields.number("limit", 0.001, 10.0)
    slices = fields.integer("slices", 1, MAX_BYTES)
    seen = fields.number("largest_seen", 0.0, 1e6) if fields.stated("largest_seen") else None
    fields.finish()
    return Consistency(limit, slices, seen)


def _parse_precision_cost(data: object, where: str) -> PrecisionCost:
    fields = _Fields(data, where)
    slices = fields.integer("slices", 1, MAX_BYTES)
    costs = {
        name: fields.number(name, -MAX_COST_DB, MAX_COST_DB) for name in ("bfloat16", "float16") if fields.stated(name)
    }
    if not costs:
        fields.refuse("bfloat16", "or float16 must be given")
    fields.finish()
    return PrecisionCost(slices, **costs)


def precision_cost_of_json(text: str | None) -> PrecisionCost | None:
    """What a checkpoint's metadata tell of narrower arithmetic; None where they tell nothing, or no sense."""
    try:
        return _parse_precision_cost(json.loads(text or "null"), "the metadata")
    except (ValueError, RecursionError, WeightsError):
        return None


class _Fields:
    """The fields of one mapping, taken one by one; what is left over is unknown."""

    def __init__(self, data: object, where: str) -> None:
        self.where = where
        if not isinstance(data, Mapping):
            msg = f"{where} must be a mapping of fields, not {type(data).__name__}."
            raise WeightsError(msg, "Correct the file.")
        self.data: dict[object, Any] = dict(data)
        self.taken: set[object] = set()

    def refuse(self, key: str, rule: str) -> NoReturn:
        msg = f"{self.where}: {key} {rule}."
        raise WeightsError(msg, "Correct the manifest.")

    def take(self, key: str) -> Any:
        if key not in self.data:
            self.refuse(key, "is missing")
        self.taken.add(key)
        return self.data[key]

    def given(self, key: str) -> bool:
        return self.take(key) is not None

    def stated(self, key: str) -> bool:
        """`given` for a field that may be absent."""
        return key in self.data and self.given(key)

    def skip(self, key: str) -> str:
        self.taken.add(key)
        return ""

    def finish(self) -> None:
        unknown = [str(key) for key in self.data if key not in self.taken]
        if unknown:
            self.refuse(unknown[0][:80], "is not a field of the manifest")

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value.strip():
            self.refuse(key, "must be a text")
        if pattern and not pattern.fullmatch(value):
            self.refuse(key, f"is {value[:80]!r}, which is not of the form {pattern.pattern}")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.take(key)
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, f"is {str(value)[:80]!r}; it must be one of {', '.join(allowed)}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.take(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"must be a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        return self._number(key, self.take(key), low, high)

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        return tuple(self._number(key, value, low, high) for value in self.list(key))

    def pair(self, key: str, low: float) -> tuple[float, float]:
        values = self.numbers(key, low, math.inf)
        if len(values) != 2 or not values[0] < values[1] or values[0] <= low:
            bound = "" if low == -math.inf else f" above {low:g}"
            self.refuse(key, f"must be two numbers{bound}, the smaller first")
        return values[0], values[1]

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        if type(value) not in (int, float):
            self.refuse(key, f"is {str(value)[:80]!r}, not a number")
        number = float(value)
        if not math.isfinite(number) or not low <= number <= high:
            self.refuse(key, f"is {number:g}; it must be from {low:g} to {high:g}")
        return number

    def list(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, (list, tuple)):
            self.refuse(key, "must be a list")
        return [*value]

    def items(self, key: str) -> enumerate[Any]:
        return enumerate(self.list(key))

    def date(self, key: str) -> str:
        value = self.take(key)
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value.isoformat()
        try:
            return datetime.date.fromisoformat(value).isoformat()
        except (TypeError, ValueError):
            self.refuse(key, "must be a date, YYYY-MM-DD")


# libyaml's parser where PyYAML was built with it: start-up is a promise, and the list grows.
_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_SafeLoader):  # type: ignore[valid-type,misc]
    """YAML's safe loader, which would silently keep the last of two equal keys."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict[object, object]:
    keys: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in keys:
            problem = f"the key {str(key)[:80]!r} is no text or stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        keys.add(key)
    mapping: dict[object, object] = loader.construct_mapping(node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
