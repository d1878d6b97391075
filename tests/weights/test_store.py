"""A file is used only after it was proven to be the right one; nothing half-written has a name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving_site import entry_for, leftovers, safetensors_bytes

from medsr_cli.errors import WeightsError
from medsr_cli.weights import store as store_module
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.store import KeepPart, Record, Store, default_home, digest_file

DATA = safetensors_bytes(500)
SHA256 = hashlib.sha256(DATA).hexdigest()
URL = "https://example.org/toy"


def put(store: Store, data: bytes, entry_id: str = "toy") -> Path:
    path = store.home / "weights" / f"{entry_id}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("pin", ["sha256", "git_blob", "git_blob alone"])
def test_the_right_bytes_are_verified(store: Store, pin: str) -> None:
    entry = entry_for(DATA, URL, pin=pin)
    assert store.state(entry) == "missing"
    path = put(store, DATA)
    assert store.verified_path(entry) == path
    assert store.state(entry) == "present"


@pytest.mark.parametrize("pin", ["sha256", "git_blob", "git_blob alone"])
@pytest.mark.parametrize("position", [0, 9, 100, -1])
def test_one_tampered_byte_is_refused(store: Store, pin: str, position: int) -> None:
    data = bytearray(DATA)
    data[position] ^= 1
    put(store, bytes(data))
    with pytest.raises(WeightsError, match=r"not the checkpoint toy.*medsr weights pull toy"):
        store.verified_path(entry_for(DATA, URL, pin=pin))


@pytest.mark.parametrize("other", [safetensors_bytes(500, seed=2), DATA[:-4], DATA + b"\0", b""])
@pytest.mark.parametrize("pin", ["sha256", "git_blob alone"])
def test_other_files_are_refused(store: Store, other: bytes, pin: str) -> None:
    put(store, other)
    with pytest.raises(WeightsError, match=r"expected .* found"):
        store.verified_path(entry_for(DATA, URL, pin=pin))


def test_the_beginning_of_a_hash_is_compared_but_proves_nothing(store: Store) -> None:
    put(store, DATA)
    right, wrong = (entry_for(DATA, URL, pin="", sha256_prefix=text) for text in (SHA256[:8], "0" * 8))
    assert store.verified_path(right, allow_unpinned=True).is_file()
    with pytest.raises(WeightsError, match="--allow-unpinned"):
        store.verified_path(right)
    with pytest.raises(WeightsError, match=r"expected sha256 00000000\.\.\., found sha256"):
        store.verified_path(wrong, allow_unpinned=True)


def test_a_missing_file_of_a_person_says_where_it_is(store: Store) -> None:
    entry = entry_for(DATA, pin="", by_hand="https://example.org/login (code 1)")
    with pytest.raises(WeightsError, match=r"by hand from https://example\.org/login \(code 1\).*import FILE -m rdst"):
        store.verified_path(entry)


def test_missing_is_refused_with_the_path(store: Store) -> None:
    with pytest.raises(WeightsError, match=r"pull toy.*weights.toy\.safetensors"):
        store.verified_path(entry_for(DATA, URL))


def test_unpinned_needs_consent_and_stays_what_it_was(store: Store) -> None:
    entry = entry_for(DATA, URL, pin="")
    path = put(store, DATA)
    with pytest.raises(WeightsError, match="--allow-unpinned"):
        store.verified_path(entry)
    assert store.verified_path(entry, allow_unpinned=True) == path
    digest = digest_file(path)
    store.write_record(Record("toy", digest.bytes, digest.sha256, digest.bytes, digest.sha256, digest.git_blob))
    put(store, safetensors_bytes(500, seed=2))
    with pytest.raises(WeightsError, match="expected sha256"):
        store.verified_path(entry, allow_unpinned=True)


def test_a_pickle_called_safetensors_is_refused(store: Store) -> None:
    pickle = b"\x80\x04\x95" + bytes(200)
    put(store, pickle)
    for entry in (entry_for(pickle, URL), entry_for(pickle, URL, pin="")):
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            store.verified_path(entry, allow_unpinned=True)


def test_a_converted_file_is_traced_to_its_source(store: Store) -> None:
    source, converted = b"author's pickle", DATA
    entry = entry_for(source, URL, format="author-pt")
    path = put(store, converted)
    with pytest.raises(WeightsError, match="cannot be traced"):
        store.verified_path(entry)
    here, origin = digest_file(path), digest_file(_written(store.home / "x", source))
    store.write_record(Record("toy", here.bytes, here.sha256, origin.bytes, origin.sha256, origin.git_blob))
    assert store.verified_path(entry) == path
    other = entry_for(b"another pickle", URL, format="author-pt")
    with pytest.raises(WeightsError, match="expected"):
        store.verified_path(other)
    put(store, safetensors_bytes(500, seed=2))
    with pytest.raises(WeightsError, match="expected sha256"):
        store.verified_path(entry)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_bundled_checkpoints_are_read_in_place(store: Store) -> None:
    entry = entry_for(DATA, sources=[{"kind": "bundled", "file": "b.safetensors"}])
    assert store.state(entry) == "missing"
    _written(store.bundled / "b.safetensors", DATA)
    assert store.state(entry) == "bundled"
    assert store.verified_path(entry) == store.bundled / "b.safetensors"
    assert not store.home.exists()
    _written(store.bundled / "b.safetensors", DATA[:-1] + b"!")
    with pytest.raises(WeightsError, match="expected"):
        store.verified_path(entry)


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "toy"}', "null", '{"id": 3}'])
def test_a_damaged_record_is_refused(store: Store, text: str) -> None:
    put(store, DATA)
    (store.home / "weights" / "toy.json").write_text(text)
    with pytest.raises(WeightsError, match="damaged"):
        store.record(entry_for(DATA, URL))


def test_entries_of_bundles_are_remembered(store: Store) -> None:
    entry = entry_for(DATA, URL)
    store.write_entry(entry)
    assert store.entries() == (entry,)
    folder = store.home / "weights"
    (folder / "toy.entry.json").rename(folder / "other.entry.json")
    with pytest.raises(WeightsError, match="another checkpoint"):
        store.entries()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_fails_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    target = put(store, b"old")
    with pytest.raises((error, WeightsError)), store.receiving(target) as file:  # noqa: PT012 -- the context manager is under test
        file.write(b"new")
        raise error
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


class BrokeError(KeepPart):
    pass


@pytest.mark.parametrize("error", [BrokeError, KeyboardInterrupt])
def test_what_breaks_is_taken_up(store: Store, error: type[BaseException]) -> None:
    target = store.home / "weights" / "a"
    with pytest.raises(error), store.receiving(target, resume=True) as file:  # noqa: PT012 -- the context manager is under test
        file.write(b"half")
        raise error
    assert not target.exists()
    with store.receiving(target, resume=True) as file:
        assert file.read() == b"half"
        file.write(b" and half")
    assert target.read_bytes() == b"half and half"
    assert leftovers(store.home) == []


def test_parts_of_the_dead_are_taken_up_and_of_the_living_left(store: Store) -> None:
    target = store.home / "weights" / "a"
    target.parent.mkdir(parents=True)
    host = store_module._host()
    living = target.with_name(f"a.{host}.{os.getppid()}.{'0' * 8}.part")
    dead = target.with_name(f"a.{host}.{2**22 + 7}.{'1' * 8}.part")
    shorter = target.with_name(f"a.{host}.{2**22 + 8}.{'2' * 8}.part")
    foreign = target.with_name(f"a.elsewhere.1.{'3' * 8}.part")
    for path, data in ((living, b"living"), (dead, b"dead body"), (shorter, b"dead"), (foreign, b"foreign and long")):
        path.write_bytes(data)
    with store.receiving(target, resume=True) as file:
        assert file.read() == b"dead body"
    assert leftovers(store.home) == sorted([living.name, foreign.name])
    old = time.time() - store_module.FOREIGN_PART_AGE_S - 60
    os.utime(foreign, (old, old))
    with store.receiving(target, resume=True) as file:
        assert file.read() == b"foreign and long"


def test_sweep_removes_old_parts_only(store: Store) -> None:
    folder = store.home / "weights"
    folder.mkdir(parents=True)
    for name in ("old.part", "new.part"):
        (folder / name).write_bytes(b"x")
    long_ago = time.time() - 8 * 86400
    os.utime(folder / "old.part", (long_ago, long_ago))
    assert [path.name for path in store.sweep()] == ["old.part"]
    assert (folder / "new.part").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_sync_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WeightsError, match=os.strerror(code)):
        store.write(store.home / "weights" / "a", b"data")
    assert list((store.home / "weights").iterdir()) == []


def test_a_home_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="MEDSR_HOME"), Store(tmp_path / "file" / "home").lock("a"):
        pass


def test_a_held_lock_times_out(store: Store) -> None:
    with store.lock("a"), pytest.raises(WeightsError, match="Another job"), store.lock("a", timeout_s=0.1):
        pass


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_home() == tmp_path / "home"
    monkeypatch.delenv("MEDSR_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert default_home() == tmp_path / "xdg" / "medsr"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_home() == Path.home() / ".local" / "share" / "medsr"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_home() == Path.home() / "Library" / "Application Support" / "medsr"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_home() == tmp_path / "local" / "medsr"


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: int, end: int, shape: list[object] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_header_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"id": "x"}, "a": tensor(0, 8), "b": tensor(8, 8, [0, 3])}
    found = read_header(header_file(tmp_path / "a", header, bytes(8)))
    assert found.metadata == {"id": "x"}
    assert found.tensors == {"a": ("F32", (2,)), "b": ("F32", (0, 3))}
    assert found.parameters() == 2


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": tensor(0, 8)}, bytes(7), None), ({"a": tensor(0, 8)}, bytes(9), None),
        ({"a": tensor(4, 8)}, bytes(8), None),
        ({"a": tensor(0, 8), "b": tensor(4, 8)}, bytes(8), None), ({"a": tensor(0, 8, [3])}, bytes(8), None),
        ({"a": tensor(0, 8, [-2])}, bytes(8), None), ({"a": tensor(0, 8, ["2"])}, bytes(8), None),
        ({"a": tensor(0, 8, dtype="F128")}, bytes(8), None), ({"a": {}}, b"", None), ({"a": 3}, b"", None),
        ({"__metadata__": {"a": 1}}, b"", None), ({"__metadata__": []}, b"", None), ([], b"", None),
        (b"{", b"", None), (b"\xff\xff", b"", None), (b"[" * 100_000, b"", None), ({}, b"", 2**63), ({}, b"", 1000),
    ],
)  # fmt: skip
def test_malformed_headers_are_refused(tmp_path: Path, header: object, data: bytes, length: int | None) -> None:
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_header(header_file(tmp_path / "a", header, data, length))


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 150), value=st.integers(0, 255), cut=st.integers(0, 2100))
def test_mutated_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    data = bytearray(safetensors_bytes(500))
    data[position] = value
    path = tmp_path_factory.getbasetemp() / "mutant"
    path.write_bytes(bytes(data[: len(data) - cut]))
    with contextlib.suppress(WeightsError):
        read_header(path)
