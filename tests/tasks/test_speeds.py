"""Measured speeds: kept per machine and network, harmless when damaged, and measured with what the engine takes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medsr_cli.engines.engine import Enlarged, Interpolation
from medsr_cli.tasks import speeds
from medsr_cli.tasks.speeds import Speeds, Workload, network_key, seconds_per_plane


def test_what_was_kept_is_known_to_this_machine_alone(tmp_path, monkeypatch):
    store = Speeds(tmp_path / "home")
    assert store.known("a") == {}
    store.keep("a", {"torch": 0.5, "onnx": 0.25})
    store.keep("b", {"torch": 2.0})
    assert Speeds(tmp_path / "home").known("a") == {"torch": 0.5, "onnx": 0.25}
    assert store.known("b") == {"torch": 2.0}
    monkeypatch.setattr(speeds, "machine", lambda: "another")
    assert store.known("a") == {}
    store.keep("a", {"torch": 9.0})
    monkeypatch.undo()
    assert store.known("a") == {"torch": 0.5, "onnx": 0.25}


DAMAGED = ["", "[]", "{", '{"%s": 3}', '{"%s": {"a": 3}}', '{"%s": {"a": {"torch": "fast"}}}', "[" * 100_000]


@pytest.mark.parametrize("text", [*DAMAGED, '{"%s": {"a": {"torch": 1' + "0" * 400 + "}}}"])
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, text):
    store = Speeds(tmp_path)
    store.path.write_text(text.replace("%s", json.dumps(speeds.machine())[1:-1]))
    assert store.known("a") == {}
    store.keep("a", {"torch": 1.0})
    assert store.known("a") == {"torch": 1.0}


def test_a_store_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    store = Speeds(tmp_path / "home")
    store.keep("a", {"torch": 1.0})
    assert store.known("a") == {}


def test_anything_that_changes_the_speed_changes_the_key(monkeypatch):
    keys = {
        network_key("rdst", {"n": 4}, device="cpu", threads=None),
        network_key("rdst", {"n": 8}, device="cpu", threads=None),
        network_key("rdst", {"n": 4}, device="cuda", threads=None),
        network_key("rdst", {"n": 4}, device="cpu", threads=1),
        network_key("miassr", {"n": 4}, device="cpu", threads=None),
    }
    monkeypatch.setattr(speeds, "__version__", "0.0.0")
    keys.add(network_key("rdst", {"n": 4}, device="cpu", threads=None))
    assert len(keys) == 6
    assert network_key("a", {"x": 1, "y": 2}, p=1, q=2) == network_key("a", {"y": 2, "x": 1}, q=2, p=1)


def test_a_workload_counts_in_planes_of_the_size_that_is_measured():
    assert Workload(256, 128, 10).probes == 10 * 8
    assert Workload(20, 500, 3).probe_size == (20, 64)
    assert Workload(20, 32, 3).probes == 3


def test_the_probe_gives_an_engine_what_it_takes():
    class Guided(Interpolation):
        guided = True
        channels = 3
        seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # noqa: RUF012

        def batch_of(self, rows: int, columns: int) -> int:
            return 2

        def run(self, planes, guide=None) -> Enlarged:
            self.seen.append((planes.shape, guide.shape))
            assert np.ptp(planes) > 0.5
            return super().run(planes)

    engine = Guided("cubic", 2)
    assert 0 < seconds_per_plane(engine, 10, 12) < 1
    assert set(engine.seen) == {((2, 3, 10, 12), (2, 1, 20, 24))}
    assert len(engine.seen) == speeds.RUNS + 1
