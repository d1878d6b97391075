"""One file that carries checkpoints to a machine without a network: a .zip or .tar, not compressed.

    medsr-bundle.json          {"format": 1, "medsr": VERSION, "checkpoints": [
                                 {"entry": manifest entry, "record": store record or null,
                                  "file": "weights/ID.safetensors", "bytes": N, "sha256": HEX}]}
    weights/ID.safetensors     one for each of them

Nothing is ever unpacked to a path that an archive names: paths are made from ids that passed the manifest's
validation. An archive that holds anything else than what its list says is refused before a byte is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, WeightsError, mention, reason_of
from medsr_cli.weights.manifest import MAX_BYTES, Entry, Manifest, parse_entry
from medsr_cli.weights.store import CHUNK_BYTES, Digest, Record, Store, digest_file, new_git_blob, parse_record

LIST_NAME = "medsr-bundle.json"
MAX_LIST_BYTES = 4_000_000
MAX_MEMBERS = 1_000
MAX_TOTAL_BYTES = 16_000_000_000
SUFFIXES = (".zip", ".tar")
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Arrived:
    """One checkpoint of an imported bundle; `written` is false where it was here already."""

    entry: Entry
    path: Path
    written: bool


@dataclass(frozen=True)
class _Item:
    entry: Entry
    record: Record | None
    file: str
    bytes: int
    sha256: str


_Members = dict[str, tuple[int, Callable[[], IO[bytes]]]]


def check_suffix(path: Path) -> None:
    """Refuse a bundle's name that is neither .zip nor .tar.

    Raises:
        ArgumentsError: it is neither.
    """
    if path.suffix.lower() not in SUFFIXES:
        msg = f"{mention(path.name)} is neither a .zip nor a .tar file."
        raise ArgumentsError(msg, "Give the bundle one of these endings.")


def write_bundle(file: BinaryIO, suffix: str, entries: Sequence[Entry], store: Store) -> None:
    """Write a bundle of checkpoints that are on this machine; each is verified first.

    Args:
        file: where to, seekable.
        suffix: `.zip` or `.tar`.
        entries: what to put in.
        store: where they are.

    Raises:
        WeightsError: one is missing or corrupt.
    """
    listed, paths = [], []
    for entry in entries:
        path = store.verified_path(entry, allow_unpinned=True)
        digest = digest_file(path)
        record = store.record(entry)
        listed.append(
            {
                "entry": entry.to_json(),
                "record": asdict(record) if record else None,
                "file": _member(entry),
                "bytes": digest.bytes,
                "sha256": digest.sha256,
            }
        )
        paths.append((_member(entry), path))
    text = json.dumps({"format": 1, "medsr": __version__, "checkpoints": listed}, indent=1, sort_keys=True).encode()
    if suffix.lower() == ".zip":
        _write_zip(file, text, paths)
    else:
        _write_tar(file, text, paths)


def read_bundle(path: Path, store: Store, manifest: Manifest) -> list[Arrived]:
    """Verify a bundle and put its checkpoints in the store.

    Where the manifest lists an id, the manifest's hash counts, not the bundle's. Ids that it does not list
    become known to this machine.

    Raises:
        ArgumentsError: neither .zip nor .tar.
        WeightsError: unreadable, malformed, too large, not what its list says, or not what the manifest says.
    """
    check_suffix(path)
    try:
        with _opened(path) as members:
            items = _read_list(path, members)
            return [_receive(path, item, members, store, manifest) for item in items]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        _refuse(path, f"it is not a readable archive ({str(error)[:120]})", error)
    except OSError as error:
        _refuse(path, f"it cannot be read ({reason_of(error)})", error)


def _write_zip(file: BinaryIO, text: bytes, paths: list[tuple[str, Path]]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(LIST_NAME, _EPOCH), text)
        for name, path in paths:
            info = zipfile.ZipInfo(name, _EPOCH)
            info.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(info, "w") as member:
                while chunk := source.read(CHUNK_BYTES):
                    member.write(chunk)


def _write_tar(file: BinaryIO, text: bytes, paths: list[tuple[str, Path]]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(LIST_NAME)
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
        for name, path in paths:
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            with path.open("rb") as source:
                archive.addfile(info, source)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Members]:
    """The regular files of an archive by name, with their sizes and how to open each."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            plain = [info for info in infos if not info.is_dir() and info.compress_type == zipfile.ZIP_STORED]
            _refuse_odd(path, len(infos), len(plain), [info.filename for info in infos])
            yield {info.filename: (info.file_size, _zip_opener(archive, info)) for info in plain}
    else:
        with tarfile.open(path, "r:") as tar:
            members: list[tarfile.TarInfo] = []
            while (member := tar.next()) is not None and len(members) <= MAX_MEMBERS:
                members.append(member)
            files = [member for member in members if member.isreg()]
            _refuse_odd(path, len(members), len(files), [member.name for member in members])
            yield {member.name: (member.size, _tar_opener(tar, member)) for member in files}


def _zip_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(info)


def _tar_opener(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.extractfile(member) or io.BytesIO()


def _refuse_odd(path: Path, n_members: int, n_plain: int, names: list[str]) -> None:
    if n_members > MAX_MEMBERS:
        _refuse(path, f"it holds more than {MAX_MEMBERS} files")
    if n_plain != n_members:
        _refuse(path, "it holds folders, links or compressed files, which medsr does not write")
    if len(set(names)) != len(names):
        _refuse(path, "it holds two files of one name")


def _read_list(path: Path, members: _Members) -> list[_Item]:
    if LIST_NAME not in members:
        _refuse(path, f"it has no {LIST_NAME}")
    size, opener = members[LIST_NAME]
    if size > MAX_LIST_BYTES:
        _refuse(path, f"its {LIST_NAME} has {size} bytes")
    with opener() as file:
        text = file.read(MAX_LIST_BYTES)
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its {LIST_NAME} is not JSON", error)
    if not isinstance(data, dict) or data.get("format") != 1 or not isinstance(data.get("checkpoints"), list):
        _refuse(path, f"its {LIST_NAME} is not of format 1")
    items = [_parse_item(path, item, i) for i, item in enumerate(data["checkpoints"])]
    for item in items:
        if item.file not in members or members[item.file][0] != item.bytes:
            _refuse(path, f"its file {item.file} is missing or not of the length that its list says")
    if {item.file for item in items} | {LIST_NAME} != set(members) or len(items) != len(members) - 1:
        _refuse(path, "it holds other files than its list says")
    if sum(item.bytes for item in items) > MAX_TOTAL_BYTES:
        _refuse(path, f"it holds more than {MAX_TOTAL_BYTES} bytes")
    return items


def _parse_item(path: Path, data: Any, number: int) -> _Item:
    where = f"{mention(path.name)}, checkpoint {number + 1}"
    match data:
        case {"entry": dict(entry_data), "record": record_data, "file": str(file), "bytes": int(size)} if (
            isinstance(data.get("sha256"), str) and 0 < size <= MAX_BYTES
        ):
            entry = parse_entry(entry_data, where)
        case _:
            _refuse(path, f"checkpoint {number + 1} of its list is malformed")
    if file != _member(entry):
        _refuse(path, f"the file of {entry.id} does not have the name {_member(entry)}")
    record = None
    if record_data is not None:
        record = parse_record(record_data)
        if record is None or record.id != entry.id or record.sha256 != data["sha256"]:
            _refuse(path, f"the record of {entry.id} is not of this file")
    return _Item(entry, record, file, size, data["sha256"])


def _receive(path: Path, item: _Item, members: _Members, store: Store, manifest: Manifest) -> Arrived:
    known = {entry.id: entry for entry in manifest.entries}
    entry = known.get(item.entry.id, item.entry)
    with store.lock(entry.id):
        here = _already_here(entry, item, store)
        if here is not None:
            return Arrived(entry, here, written=False)
        target = store.home / "weights" / f"{entry.id}.safetensors"
        with store.receiving(target) as file, members[item.file][1]() as source:
            digest = _copy(source, file, item.bytes)
            if (digest.bytes, digest.sha256) != (item.bytes, item.sha256):
                _refuse(path, f"its file {item.file} is damaged: the hash is not that of its list")
            _refuse_other_source(path, entry, item, digest, store)
        store.write_record(item.record or Record(entry.id, *_facts(digest), *_facts(digest), digest.git_blob))
        if entry.id not in known:
            store.write_entry(entry)
    return Arrived(entry, store.verified_path(entry, allow_unpinned=True), written=True)


def _already_here(entry: Entry, item: _Item, store: Store) -> Path | None:
    """The checkpoint's file if the same bytes, or the package's own, are here already and whole."""
    if not store.present(entry):
        return None
    try:
        here = store.verified_path(entry, allow_unpinned=True)
    except WeightsError:
        return None
    same = store.state(entry) == "bundled" or digest_file(here).sha256 == item.sha256
    return here if same else None


def _refuse_other_source(path: Path, entry: Entry, item: _Item, digest: Digest, store: Store) -> None:
    """The manifest's hash, of the file itself or of the author's file that it was converted from."""
    if entry.format == "safetensors":
        store.refuse_mismatch(entry, digest, path)
    elif item.record is not None:
        source = Digest(item.record.source_bytes, item.record.source_sha256, item.record.source_git_blob)
        store.refuse_mismatch(entry, source, path)
    elif entry.pinned:
        _refuse(path, f"it does not say what {entry.id} was converted from")


def _copy(source: IO[bytes], file: BinaryIO, size: int) -> Digest:
    """Copy at most one byte more than `size`, hashing on the way."""
    sha256, git_blob = hashlib.sha256(), new_git_blob(size)
    copied = 0
    while copied <= size and (chunk := source.read(min(CHUNK_BYTES, size + 1 - copied))):
        file.write(chunk)
        sha256.update(chunk)
        git_blob.update(chunk)
        copied += len(chunk)
    return Digest(copied, sha256.hexdigest(), git_blob.hexdigest())


def _facts(digest: Digest) -> tuple[int, str]:
    return digest.bytes, digest.sha256


def _member(entry: Entry) -> str:
    return f"weights/{entry.id}.safetensors"


def _refuse(path: Path, reason: str, error: Exception | None = None) -> NoReturn:
    msg = f"{mention(path.name)} is not a bundle that can be imported: {reason}."
    raise WeightsError(msg, "Make it again with medsr weights bundle export.") from error
