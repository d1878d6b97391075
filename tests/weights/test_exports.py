"""The store's place for exported checkpoints: its names, and what is not taken for whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from medsr_cli.errors import WeightsError
from medsr_cli.weights import exports
from medsr_cli.weights.exports import Export, export_of, one_at_a_time
from medsr_cli.weights.store import Store

SHA256 = "0123456789abcdef" * 4
DATA = b"an ONNX file" * 100


@pytest.fixture
def place() -> Export:
    return export_of(Store(), SHA256, "float32", 20)


def keep(place: Export, data: bytes = DATA) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    place.path.write_bytes(data)
    place.record_path.write_bytes(place.record(data))


def test_lies_in_the_store_and_is_read_back(place):
    assert place.path.parent == Store().home / "exports"
    assert (place.read(), place.is_there()) == (None, False)
    keep(place)
    assert (place.read(), place.is_there()) == (DATA, True)
    record = json.loads(place.record_path.read_bytes())
    assert (record["bytes"], record["sha256"]) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert record["checkpoint_sha256"] == SHA256
    assert set(record["made_with"]) == {"torch", "onnxscript", "onnx", "medsr", "opset", "precision"}


def test_nothing_is_created_by_looking(place):
    home = Store().home
    before = list(home.parent.rglob("*"))
    place.read()
    assert place.older() == []
    assert list(home.parent.rglob("*")) == before


def test_the_key_is_of_everything_that_decides_the_bytes(place, monkeypatch):
    store = Store()
    others = [
        export_of(store, SHA256[::-1], "float32", 20),
        export_of(store, SHA256, "float16", 20),
        export_of(store, SHA256, "float32", 19),
    ]
    keys = {place.key, *(other.key for other in others)}
    for package in exports.MADE_WITH:
        with pytest.MonkeyPatch.context() as patch:
            real = exports.installed
            patch.setattr(exports, "installed", lambda name, p=package, r=real: "0.0" if name == p else r(name))
            keys.add(place.key)
    monkeypatch.setattr(exports, "__version__", "0.0")
    keys.add(place.key)
    assert len(keys) == 5 + len(exports.MADE_WITH)
    assert all(len(key) < 64 for key in keys)


@pytest.mark.parametrize("damage", ["bit", "short", "long", "no record", "no json", "a list", "deep", "huge", "other"])
def test_what_is_not_as_written_down_is_not_read(place, damage):
    keep(place)
    match damage:
        case "bit":
            place.path.write_bytes(DATA[:50] + b"\0" + DATA[51:])
        case "short":
            place.path.write_bytes(DATA[:-1])
        case "long":
            place.path.write_bytes(DATA + b"\0")
        case "no record":
            place.record_path.unlink()
        case "no json":
            place.record_path.write_bytes(b"\xff{")
        case "a list":
            place.record_path.write_bytes(b"[]")
        case "deep":
            place.record_path.write_bytes(b"[" * 90_000)
        case "huge":
            place.record_path.write_bytes(place.record(DATA) + b" " * exports.MAX_RECORD_BYTES)
        case _:
            place.record_path.write_bytes(place.record(b"other bytes"))
    assert place.read() is None
    assert place.is_there()


def test_older_ones_are_those_of_the_same_checkpoint_and_precision(place):
    keep(place)
    older = place.folder / f"{place.stem}{'0' * 20}.onnx"
    of_half = place.folder / f"{export_of(Store(), SHA256, 'float16', 20).key}.onnx"
    of_another = place.folder / f"{export_of(Store(), SHA256[::-1], 'float32', 20).key}.onnx"
    for path in (older, older.with_suffix(".json"), of_half, of_another):
        path.write_bytes(b"")
    assert place.older() == [older.with_suffix(".json"), older]


def test_one_at_a_time_and_others_are_told(place, monkeypatch):
    monkeypatch.setattr(exports, "LOCK_TIMEOUT_S", 0.1)
    store = Store()
    with one_at_a_time(store, place):
        program = (
            "from medsr_cli.errors import WeightsError\n"
            "from medsr_cli.weights import exports\nfrom medsr_cli.weights.store import Store\n"
            "exports.LOCK_TIMEOUT_S = 0.1\n"
            f"place = exports.export_of(Store(), {SHA256!r}, 'float32', 20)\n"
            "try:\n    with exports.one_at_a_time(Store(), place):\n        print('taken')\n"
            "except WeightsError:\n    print('held')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "held\n"
    with one_at_a_time(store, place):
        pass


def test_a_home_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "home")
    with pytest.raises(WeightsError, match="cannot be made"), one_at_a_time(store, export_of(store, SHA256, "x", 20)):
        pass
