"""What stands in for the name of a file: names hold patients' names, so none leaves medsr but where it was asked for.

Sentences and reports mark every name by `errors.mention`. On the way out, to stderr, a log file or a report, `discreet`
puts a stand-in there: eight hexadecimal digits of an HMAC-SHA256 of the resolved path, keyed with a random salt that
stays on this machine, and the ending where it is one that medsr knows. `Mueller^Anna.nii.gz is damaged.` becomes
`3f2a9c01.nii.gz is damaged.` Lines on stdout have the same digits beside the path (`id_of`), so that whoever may see
the names can find them in a log. Until `begin` says otherwise, everything is discreet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import shlex
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsr_cli.errors import MedsrError, mention, replaced_mentions, unmarked

DIGITS = 8
SALT_BYTES = 32
SALT = "salt"
"""Its name in MEDSR_HOME."""
ENDINGS = (
    *(".brik.gz", ".brik.bz2", ".nii.gz", ".img.gz", ".hdr.gz", ".mgh.gz", ".mnc.gz", ".log.jsonl", ".tar.gz"),
    *(".nii", ".hdr", ".img", ".dcm", ".dicom", ".ima", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc"),
    *(
        ".mnc2",
        ".par",
        ".rec",
        ".raw",
        ".gipl",
        ".head",
        ".brik",
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".tif",
        ".tiff",
        ".bmp",
    ),
    *(".zip", ".tar", ".gz", ".bz2", ".safetensors", ".onnx", ".pt", ".pth", ".ckpt", ".work"),
    *(".yaml", ".yml", ".json", ".jsonl", ".csv", ".html", ".txt", ".md", ".log"),
)
"""What a stand-in may end with; the longer ones first."""
_PLAIN = re.compile(r"[-+]?[\d.,x:]{1,6}[kKmMgG]?")
"""Small numbers, sizes and factors: they name nobody. A longer number may be a patient's."""
_PATH = re.compile(r"(?<![\w/.~:-])~?/(?:[^\s'\"/()]+/)+[^\s'\"()]*[^\s'\"().,:;]")
"""An absolute path within a sentence."""
_ADDRESS = re.compile(r"\b(?:https?|hf)://[^\s\0]+")
_FRAME = re.compile(r"#\d+$")
"""Which series of a file: `scan.zip#2`."""


@dataclass
class _Run:
    """What this process knows of names."""

    shown: bool = False
    salt: bytes | None = None
    home: Callable[[], Path] | None = None
    words: Callable[[], Collection[str]] = frozenset
    arguments: tuple[str, ...] = ()
    known: dict[str, str] = field(default_factory=dict)
    """What a file is called in sentences to its resolved path."""
    foreign: list[str] | None = None
    """What the command line named, once it was looked for."""
    near: list[re.Pattern[str]] | None = None
    """Paths beside those, once they were asked for."""
    gathered: Collection[str] | None = None
    """medsr's own words, once they were asked for."""


_run = _Run()


def begin(
    *,
    shown: bool = False,
    arguments: Sequence[str] = (),
    home: Callable[[], Path] | None = None,
    words: Callable[[], Collection[str]] = frozenset,
) -> None:
    """Say how this process is to speak of files, and forget what an earlier run in it knew.

    Args:
        shown: whether names are shown as they are (`--log-paths`).
        arguments: the command line without the program's own name; what in it is no option and none of medsr's own
            words is hidden wherever it turns up.
        home: the folder in which the salt is kept, asked for at the first stand-in; None keeps none.
        words: methods, checkpoints and values of options: what may be on a command line and names nobody.
    """
    global _run  # noqa: PLW0603 - one process speaks of files in one way
    _run = _Run(shown=shown, home=home, words=words, arguments=tuple(values_of(arguments)))
    for value in _run.arguments:
        if os.sep in value or ending_of(value) or os.path.lexists(value):
            introduce(value)


def names_shown() -> bool:
    """Whether `--log-paths` was given."""
    return _run.shown


def introduce(path: Path | str, *called: str) -> None:
    """Say which file is meant from now on by its path, its last name, and what else it is `called` in sentences."""
    resolved = os.path.realpath(path)
    for name in (str(path), os.path.basename(os.path.normpath(path)), *called):
        _run.known[name] = _run.known[unmarked(mention(name))] = resolved


def id_of(path: Path | str) -> str:
    """The eight digits that stand for a file wherever it is not named."""
    return _digits(os.path.realpath(path))


def stand_in(name: str) -> str:
    """What is said in the place of a file's name or path; the name itself with `--log-paths`."""
    if _run.shown:
        return name
    resolved = _run.known.get(name)
    if resolved is None:
        bare = _FRAME.sub("", name)
        resolved = _run.known.get(bare) or (os.path.realpath(bare) if os.sep in bare else bare)
    return _digits(resolved) + ending_of(name)


def ending_of(name: str) -> str:
    """The ending of a name in lower case where medsr knows it, with the number of a series in the file; else empty."""
    number = _FRAME.search(name)
    bare = _FRAME.sub("", name).lower()
    found = next((ending for ending in ENDINGS if bare.endswith(ending) and bare != ending), "")
    return found + (number.group() if number else "")


def discreet(sentence: str, about: Path | None = None) -> str:
    """A sentence as it may be seen: stand-ins for the names that are marked in it and for what a command line named.

    Args:
        sentence: with marked names.
        about: the input that it is about: a file of the same name is taken for this one.
    """
    if _run.shown:
        return unmarked(sentence)
    if about is not None:
        introduce(about)
    put = _Put()
    hidden = _ADDRESS.sub(put.as_it_is, replaced_mentions(sentence, put))
    for near in _near():
        hidden = near.sub(lambda found: put(found.group()), hidden)
    hidden = _PATH.sub(put.path, hidden)
    for value in _named_in(hidden):
        hidden = _spot_of(value).sub(lambda _, value=value: put(value), hidden)  # type: ignore[misc]
    return put.back(hidden)


def discreet_usage(text: str) -> str:
    """A usage error of the command line's parser, which quotes what it was given in many ways."""
    if _run.shown:
        return text
    put = _Put()
    for value in _named_in(text):
        for said in dict.fromkeys((value, repr(value)[1:-1])):
            text = re.sub(rf"(?<![\w-]){re.escape(said)}(?!\w)", lambda _, value=value: put(value), text)  # type: ignore[misc]
    return put.back(text)


class _Put:
    """Stand-ins on their way into a sentence, apart from it so that no later replacement looks into them."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def __call__(self, name: str) -> str:
        self.kept.append(stand_in(name))
        return f"\0{len(self.kept) - 1}\0"

    def as_it_is(self, found: re.Match[str]) -> str:
        """An address on a network, which is no file."""
        self.kept.append(found.group())
        return f"\0{len(self.kept) - 1}\0"

    def path(self, found: re.Match[str]) -> str:
        """An absolute path that nobody marked; where medsr itself is, and keeps its own files, is no secret."""
        return found.group() if _is_own(found.group()) else self(found.group())

    def back(self, text: str) -> str:
        """The sentence with all of them in it."""
        return re.sub("\0(\\d+)\0", lambda found: self.kept[int(found.group(1))], text)


def _is_own(path: str) -> bool:
    package = Path(__file__).resolve().parents[1]
    own = [package, *([_run.home()] if _run.home is not None else [])]
    return any(Path(path).is_relative_to(folder) for folder in own)


def discreet_facts(value: Any) -> Any:
    """Plain data, or a dataclass of it, with every text in it as `discreet` has it."""
    if isinstance(value, str):
        return discreet_text(value)
    if isinstance(value, Mapping):
        return {discreet_facts(key): discreet_facts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [discreet_facts(inner) for inner in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(discreet_facts(inner) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        now = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if item.init}
        return dataclasses.replace(value, **{name: discreet_facts(inner) for name, inner in now.items()})
    return value


def discreet_text(text: str) -> str:
    """Text of any length, such as a table: only marked names are replaced."""
    return unmarked(text) if _run.shown else replaced_mentions(text, stand_in)


def named_checkpoint(checkpoint_id: str | None) -> str | None:
    """A checkpoint as reports and headers tell it: an id as it is, a file's name (`x.safetensors`) marked as one."""
    if checkpoint_id is None or not ending_of(checkpoint_id):
        return checkpoint_id
    return mention(checkpoint_id)


def discreet_command(program: str, arguments: Sequence[str]) -> str:
    """A command line as a report tells it: options as they are, a stand-in for every value that may name someone."""
    if _run.shown:
        return shlex.join([program, *arguments])
    return shlex.join([program, *_told_arguments(arguments)])


def discreet_traceback(error: BaseException) -> str:
    """Frames and types of an exception and of what led to it.

    What an exception of a library says may quote a tag or a path, so that is left out unless `--log-paths` was given;
    so are the values of variables, always.
    """
    return "".join(_trace(error, set()))


def _trace(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _trace(before, seen)
        yield "\nThat led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    said = discreet(error.marked) if isinstance(error, MedsrError) else str(error) if _run.shown else ""
    yield f"{name}: {said}\n" if said else f"{name}\n"
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            if id(one) not in seen:
                yield from _trace(one, seen)


def values_of(arguments: Sequence[str]) -> list[str]:
    """What a command line gives as values: everything but the options' own names, also what stands joined to them."""
    found: list[str] = []
    only_values = False
    for word in arguments:
        if only_values or not word.startswith("-") or word == "-":
            found.append(word)
        elif word == "--":
            only_values = True
        elif "=" in word:
            found.append(word.partition("=")[2])
        elif not word.startswith("--") and len(word) > 2:
            found.append(word[2:])
        if not only_values and word.startswith("-") and len(word) > 1:
            # An option that there is not may be a name that begins with a dash; medsr's own words have it otherwise.
            found.append(word.partition("=")[0])
    return found


def _told_arguments(arguments: Sequence[str]) -> Iterator[str]:
    words = _own_words()
    only_values = False
    for word in arguments:
        if word == "--":
            only_values = True
        option, equals, value = word.partition("=")
        if not only_values and word.startswith("-"):
            known = option in words or not option.startswith("--")
            yield (option if known else stand_in(option)) + (equals + _told(value, words) if equals else "")
        else:
            yield _told(word, words)


def _told(value: str, words: Collection[str]) -> str:
    if is_harmless(value, words):
        return value
    return ",".join(part if is_harmless(part, words) else stand_in(part) for part in value.split(","))


def is_harmless(value: str, words: Collection[str]) -> bool:
    """Whether a value of a command line names nobody: a small number, or one of medsr's own words."""
    return value in ("", "-") or value in words or _PLAIN.fullmatch(value) is not None


def _near() -> list[re.Pattern[str]]:
    """Paths made of one that the command line named: in the same folder, or of the same name with another ending."""
    if _run.near is None:
        _run.near = []
        endings = "|".join(map(re.escape, ENDINGS))
        for value in sorted(_run.arguments, key=len, reverse=True):
            if "://" in value or (os.sep not in value and not ending_of(value)):
                continue
            folder, name = os.path.split(os.path.normpath(value))
            stem = re.escape(name.removesuffix(name[len(name) - len(ending_of(name)) :]) or name)
            within = rf"(?:{re.escape(folder)}/)" if folder else ""
            _run.near.append(re.compile(rf"(?<!\w){within}{'?' if within else ''}{stem}[\w.-]*(?:{endings})(?!\w)"))
            if folder.count(os.sep) > 1:
                _run.near.append(re.compile(rf"{within}[^\s'\"\0]*[^\s'\"\0.,:;)]"))
    return _run.near


def _named_in(text: str) -> list[str]:
    """What the command line named, and parts of it, as far as a text has it; the longer ones first."""
    if _run.foreign is None:
        found: set[str] = set()
        for value in _run.arguments:
            if _ADDRESS.fullmatch(value):
                continue
            parts = {value, *value.split(","), *re.split("[,=]", value)}
            parts |= {os.path.basename(os.path.normpath(part)) for part in parts if part}
            found |= {part for part in parts if len(part) > 1 and not is_harmless(part, ())}
        _run.foreign = sorted(found, key=len, reverse=True)
    there = [value for value in _run.foreign if value in text or repr(value)[1:-1] in text]
    # medsr's own words take a moment to be gathered: they are asked for where there is something to ask.
    return [value for value in there if value not in _own_words()] if there else []


def _own_words() -> Collection[str]:
    if _run.gathered is None:
        _run.gathered = _run.words()
    return _run.gathered


def _spot_of(value: str) -> re.Pattern[str]:
    """Where a value of the command line counts as quoted within one of medsr's own sentences.

    What looks like a path or a name of its own does wherever it stands; a short or plain word only in quotation marks
    or behind an option, for it may be one of the sentence's own.
    """
    said = "|".join(re.escape(text) for text in dict.fromkeys((value, repr(value)[1:-1])))
    path = os.sep in value or ending_of(value) != ""
    if path or (len(value) > 3 and not value.islower()):
        return re.compile(rf"(?<!\w)(?:{said})(?!\w)")
    return re.compile(rf"(?<=['\"])(?:{said})(?=['\"])")


def _digits(resolved: str) -> str:
    if _run.salt is None:
        _run.salt = kept_salt(_run.home() if _run.home is not None else None)
    return hmac.new(_run.salt, os.fsencode(resolved), hashlib.sha256).hexdigest()[:DIGITS]


def kept_salt(home: Path | None) -> bytes:
    """The salt of a store, made if there is none; where it cannot be kept, one for this process alone."""
    if home is None:
        return secrets.token_bytes(SALT_BYTES)
    path = home / SALT
    known = _read(path)
    if known is not None:
        return known
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        _write_once(path, secrets.token_bytes(SALT_BYTES))
    return _read(path) or secrets.token_bytes(SALT_BYTES)


def _read(path: Path) -> bytes | None:
    try:
        salt = path.read_bytes()
    except OSError:
        return None
    return salt if len(salt) == SALT_BYTES else None


def _write_once(path: Path, salt: bytes) -> None:
    """Put the salt there whole, unless another process was first: then its salt stays."""
    part = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            os.write(descriptor, salt)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
