"""The record of a batch and the locks beside it: nothing wrong in it, nothing of a patient, one holder at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medsr_cli import __version__
from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.tasks import batch_locks, batch_record
from medsr_cli.tasks.batch_locks import Locks
from medsr_cli.tasks.batch_places import key_of, name_for_record, place_of, state_of
from medsr_cli.tasks.batch_record import BatchRecord

SETTINGS = {"model": "rdst", "scale": "4"}
INPUT = {"files": 1, "bytes": 10, "state": "s"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def told(record: BatchRecord, item: str = "a", status: str = "done", **more) -> None:
    record.item(item, status, {"input": INPUT, "outputs": [], **more})


def test_the_first_line_says_what_the_file_is_and_earlier_runs_stay(tmp_path):
    path = tmp_path / "out" / "record.jsonl"
    for number in range(3):
        with BatchRecord(path, SETTINGS) as record:
            told(record, f"item{number}")
    first, *rest = lines_of(path)
    assert first["medsr_batch"] == 1
    assert len(bytes.fromhex(first["salt"])) == 16
    assert [line.get("item") for line in rest] == [None, "item0", None, "item1", None, "item2"]
    assert {line["settings"] for line in rest} == {first["settings"]}
    assert not (tmp_path / "out" / batch_record.LOCKS).exists(), "locks are gone when nobody runs"


def test_what_was_recorded_is_known_to_the_next_run_and_to_one_beside(tmp_path):
    with BatchRecord(tmp_path / "r", SETTINGS) as record, BatchRecord(tmp_path / "r", SETTINGS) as beside:
        told(record, status="begun")
        told(record, outputs=[{"name": "*0*_x4", "files": 1, "bytes": 5, "sha256": "ab"}], attempt=3)
        seen = beside.last("a")
        assert (seen.status, seen.attempt, seen.outputs[0].bytes, seen.run) == ("done", 3, 5, record.run)
        assert beside.is_current(record.run)
        assert record.last("b") is None
        assert record.is_current(beside.run)
    with BatchRecord(tmp_path / "r", SETTINGS, resume=True) as later:
        assert later.last("a") == seen
        assert later.last("b") is None
        assert not later.is_current(record.run)
        assert later.torn == 0


def test_other_settings_know_nothing_of_it_and_are_no_resumption(tmp_path):
    with BatchRecord(tmp_path / "r", SETTINGS) as record:
        told(record)
    other = {**SETTINGS, "scale": "2"}
    with pytest.raises(ArgumentsError, match="here these differ: scale"):
        BatchRecord(tmp_path / "r", other, resume=True)
    with BatchRecord(tmp_path / "r", other) as record:
        assert record.last("a") is None
        told(record, status="failed", exit_code=6)
    with BatchRecord(tmp_path / "r", SETTINGS, resume=True) as record:
        assert record.last("a").status == "done"


def test_it_is_known_which_versions_made_parts_of_a_batch(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, BatchRecord(tmp_path / "r", SETTINGS) as record:
        assert record.versions == set()
        patch.setattr(batch_record, "__version__", "99.0")
        with BatchRecord(tmp_path / "r", SETTINGS, resume=True) as later:
            assert later.versions == {__version__}


def test_a_record_that_was_not_begun_can_be_resumed(tmp_path):
    with BatchRecord(tmp_path / "r", SETTINGS, resume=True) as record:
        assert record.last("a") is None


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10_000), junk=st.sampled_from([b"", b"\0" * 30, b'{"item": ', b"\xff\xfe"]))
def test_whatever_a_loss_of_power_left_of_the_end_the_rest_is_known(tmp_path_factory, cut, junk):
    path = tmp_path_factory.mktemp("torn") / "r"
    with BatchRecord(path, SETTINGS) as record:
        for item in "abc":
            told(record, item)
    whole = path.read_bytes()
    left = whole[: cut % (len(whole) + 1)]
    assume(b"\n" in left or not junk.strip(b"\0"))  # else nothing tells that it is a record
    path.write_bytes(left + junk)
    with BatchRecord(path, SETTINGS, resume=True) as record:
        whole_lines = [line for line in left.split(b"\n")[:-1] if b'"item"' in line]
        assert [item for item in "abc" if record.last(item)] == [json.loads(line)["item"] for line in whole_lines]
        told(record, "d")
    with BatchRecord(path, SETTINGS, resume=True) as record:
        assert record.last("d").status == "done"
    assert json.loads(path.read_bytes().splitlines()[-1])["run"]
    assert path.read_bytes().startswith(left), "nothing that was written is changed"


@pytest.mark.parametrize(
    "content", [b"{}\n", b"a list\nof names\n", b'{"medsr_batch": 2, "salt": "00"}\n', b"[1]\n", b"\x89PNG"]
)
def test_nothing_is_added_to_another_file(tmp_path, content):
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(ArgumentsError, match="--batch-record"):
        BatchRecord(tmp_path / "r", SETTINGS)
    assert (tmp_path / "r").read_bytes() == content
    assert not (tmp_path / batch_record.LOCKS).exists()


@pytest.mark.parametrize(
    "line", [b"7", b'{"item": 5, "settings": "x"}', b'{"item":"a","settings":"x","input":3}', b"[" * 5000]
)
def test_odd_lines_are_passed_over(tmp_path, line):
    with BatchRecord(tmp_path / "r", SETTINGS) as record:
        told(record)
        os.write(record._descriptor, line + b"\n")
        assert record.last("a").status == "done"


def test_a_full_disk_is_a_sentence_and_the_next_line_stands_on_its_own(tmp_path, monkeypatch):
    with BatchRecord(tmp_path / "r", SETTINGS) as record:
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            return write(descriptor, data[:20] if descriptor == record._descriptor else data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError, match="the disk is full"):
            told(record, "lost")
        monkeypatch.setattr(os, "write", write)
        told(record, "kept")
        assert record.last("kept").status == "done"
        assert record.last("lost") is None
        assert record.torn == 1


def test_a_record_that_is_moved_away_is_missed(tmp_path):
    with BatchRecord(tmp_path / "r", SETTINGS) as record:
        (tmp_path / "r").rename(tmp_path / "s")
        with pytest.raises(RunError):
            told(record)


def test_ids_differ_from_record_to_record_and_give_away_no_name(tmp_path):
    with BatchRecord(tmp_path / "r", SETTINGS) as one, BatchRecord(tmp_path / "s", SETTINGS) as two:
        assert one.hidden("DOE^JOHN.nii") == one.hidden("DOE^JOHN.nii")
        assert one.hidden("DOE^JOHN.nii") != two.hidden("DOE^JOHN.nii")
        assert one.hidden("caf\udce9")


# -- processes ---------------------------------------------------------------------------------------------


def _append_many(path: str, name: str, count: int) -> None:
    with BatchRecord(Path(path), SETTINGS) as record:
        for number in range(count):
            told(record, f"{name}-{number}", note="x" * (number * 37 % 5000))


@posix
def test_four_processes_add_to_one_record_without_mixing_lines(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_append_many, args=(str(tmp_path / "r"), f"w{n}", 25)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    lines = lines_of(tmp_path / "r")
    assert {line["item"] for line in lines if "item" in line} == {f"w{n}-{i}" for n in range(4) for i in range(25)}
    assert len(lines) == 1 + 4 + 100
    assert sum("medsr_batch" in line for line in lines) == 1


def _count_alone(folder: str, counter: str, rounds: int, how: dict) -> None:
    locks = Locks(Path(folder), **how)
    for _ in range(rounds):
        with locks.wait("one"):
            number = int(Path(counter).read_text())
            time.sleep(0.0005)
            Path(counter).write_text(str(number + 1))
    locks.close()


@posix
@pytest.mark.parametrize(
    ("how", "links"), [({}, True), ({"flock": False}, True), ({}, False), ({"flock": False}, False)]
)
def test_one_holder_at_a_time_with_and_without_flock_and_links(tmp_path, monkeypatch, how, links):
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "not here")

        monkeypatch.setattr(os, "link", refuse)
    counter = tmp_path / "n"
    counter.write_text("0")
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_count_alone, args=(str(tmp_path / "l"), str(counter), 20, how)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert counter.read_text() == "80"
    assert not (tmp_path / "l").exists()


def _hold(folder: str, how: dict) -> None:
    lock = Locks(Path(folder), **how).claim("one")
    assert lock is not None
    (Path(folder).parent / "held").touch()
    time.sleep(60)


def killed_holder(tmp_path: Path, **how) -> None:
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(str(tmp_path / "l"), how))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    assert Locks(tmp_path / "l", **how).claim("one") is None
    assert Locks(tmp_path / "l", **how).is_held("one")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)


@posix
def test_the_lock_of_a_killed_process_is_free_at_once_on_its_machine(tmp_path):
    killed_holder(tmp_path)
    locks = Locks(tmp_path / "l")
    assert not locks.is_held("one")
    assert locks.claim("one") is not None


@posix
def test_the_lock_of_a_killed_process_is_free_elsewhere_when_it_gave_no_sign_for_long(tmp_path, monkeypatch):
    killed_holder(tmp_path, stale_s=300.0)
    monkeypatch.setattr(batch_locks, "_machine", lambda: "another")
    locks = Locks(tmp_path / "l", stale_s=300.0)
    assert locks.claim("one") is None
    os.utime(tmp_path / "l" / "one.lock", (time.time() - 301,) * 2)
    assert locks.claim("one") is None, "the dead one is set aside; the next attempt has it"
    with locks.wait("one", timeout_s=5):
        assert locks.claim("one") is None


def test_a_holder_elsewhere_that_gives_signs_of_life_keeps_its_lock(tmp_path, monkeypatch):
    holder = Locks(tmp_path / "l", flock=False, stale_s=0.4)
    monkeypatch.setattr(batch_locks, "_machine", lambda: "another")
    other = Locks(tmp_path / "l", flock=False, stale_s=0.4)
    with holder.claim("one"):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert other.claim("one") is None
            time.sleep(0.05)
    assert other.claim("one") is not None
    holder.close()
    other.close()


def test_a_lock_that_cannot_be_had_ends_in_a_sentence(tmp_path):
    locks = Locks(tmp_path / "l")
    with locks.claim("one"), pytest.raises(RunError, match="Another run has held"):
        Locks(tmp_path / "l").wait("one", timeout_s=0.05)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be locked"):
        Locks(tmp_path / "file" / "l").claim("one")


# -- places ------------------------------------------------------------------------------------------------


def places(**given) -> SimpleNamespace:
    return SimpleNamespace(
        **{"inputs": (), "output": None, "ending": "_x4-rdst", "recursive": True, "tree": None, **given}
    )


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda text: text not in (".", "..")
)


@given(
    name=NAMES,
    suffix=st.sampled_from([".nii.gz", ".nii", ".dcm", ".zip", ".png", "", ".1.2.840", ".nhdr"]),
    ending=st.sampled_from(["_x4-rdst", "2", "*3*", ""]),
    kind=st.sampled_from(["nifti", "dicom", "png", "nrrd"]),
    study=st.booleans(),
)
def test_a_result_is_found_again_from_its_source_and_what_the_record_says(name, suffix, ending, kind, study):
    from medsr_cli import formats

    source = Path("tree/sub") / (name + suffix)
    where = places(inputs=(Path("tree"),), output=Path("out"))
    output = Path("out/sub") / formats.default_name(source, ending, kind).name
    if study:
        output = output / "series-02-stack-1"
    shown = name_for_record(where, source, output)
    assert shown is not None
    assert place_of(where, source, shown) == output


@pytest.mark.parametrize("shown", ["../x", "*0*/../../etc", "etc/passwd", "/etc/passwd", "*x*y", ""])
def test_no_path_that_is_not_a_result_comes_out_of_a_record(tmp_path, shown):
    where = places(output=tmp_path / "out")
    place = place_of(where, tmp_path / "scan.nii", shown)
    assert place is None or (tmp_path / "out") in place.parents


def test_what_the_record_says_of_a_result_holds_no_name(tmp_path):
    where = places(output=tmp_path / "out", inputs=(tmp_path,))
    source = tmp_path / "DOE" / "DOE_JOHN_1950.nii.gz"
    shown = name_for_record(where, source, tmp_path / "out" / "DOE" / "DOE_JOHN_1950_x4-rdst.nii.gz")
    assert shown == "*7*_x4-rdst.nii.gz"
    assert name_for_record(where, source, tmp_path / "elsewhere" / "DOE.nii") is None
    assert name_for_record(where, source, tmp_path / "out" / "DOE" / "JOHN.nii") is None


def test_one_tree_is_one_batch_wherever_it_is_mounted(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    source = tmp_path / "a" / "b" / "scan.nii"
    assert key_of(places(inputs=(tmp_path / "a",)), (source,)) == "b/scan.nii"
    monkeypatch.chdir(tmp_path)
    assert key_of(places(inputs=(Path("a"),)), (Path("a/b/scan.nii"),)) == "b/scan.nii"
    assert key_of(places(inputs=(Path("a"),), tree=tmp_path), (Path("a/b/scan.nii"),)) == "a/b/scan.nii"
    two = places(inputs=(tmp_path / "a", tmp_path / "c"))
    assert key_of(two, (source,)) == key_of(two, (Path("a/b/scan.nii"),)) == str(source)


def test_the_state_of_an_input_tells_of_every_change_of_its_files_and_of_nothing_else(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.dcm").write_bytes(b"x" * number)
    seen = [state_of(places(), (folder,), str).state]

    def differs() -> bool:
        seen.append(state_of(places(), (folder,), str).state)
        return seen[-1] != seen[-2]

    assert not differs()
    (folder / "sub_x4-rdst").mkdir()
    (folder / "sub_x4-rdst" / "0001.dcm").write_bytes(b"a result of ours")
    (folder / ".DS_Store").write_bytes(b"hidden")
    assert not differs()
    (folder / "3.dcm").write_bytes(b"")
    assert differs()
    os.utime(folder / "0.dcm", ns=(1, 1))
    assert differs()
    (folder / "3.dcm").rename(folder / "4.dcm")
    assert differs()
    (folder / "4.dcm").unlink()
    assert differs()
    (folder / "1.dcm").write_bytes(b"longer")
    assert differs()


def test_the_voxels_of_a_header_are_part_of_its_state(tmp_path):
    header, voxels = tmp_path / "a.mhd", tmp_path / "a.raw"
    header.write_bytes(b"NDims = 3")
    voxels.write_bytes(b"12")
    before = state_of(places(), (header,), str)
    assert before.files == 2
    voxels.write_bytes(b"123")
    assert state_of(places(), (header,), str).state != before.state


def _die_on_the_way(folder: str) -> None:
    os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    Locks(Path(folder)).claim("a")


@posix
def test_what_a_process_left_on_the_way_to_a_lock_goes_with_the_next_run(tmp_path):
    """A kill between making the file and linking it once kept `.medsr-locks` in the results for an hour."""
    folder = tmp_path / "locks"
    process = multiprocessing.get_context("fork").Process(target=_die_on_the_way, args=(str(folder),))
    process.start()
    process.join()
    assert len(list(folder.glob("*.new"))) == 1
    own = Locks(folder)
    (folder / f"{own._machine}-{os.getpid()}-0.new").touch()
    own.close()
    assert [path.name for path in folder.iterdir()] == [f"{own._machine}-{os.getpid()}-0.new"], "its maker is alive"
