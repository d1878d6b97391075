"""Batches that are stopped, killed, resumed and shared: each input done once, and nothing said that is not so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsr_cli.errors import (
    ArgumentsError,
    DeviceUnavailable,
    InputRefused,
    MedsrError,
    QualityGateFailed,
    RunError,
    SomeInputsFailed,
    mention,
)
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.tasks.batch import Batch, Claim, Tally, item_line, spread_over
from medsr_cli.tasks.batch_record import NAME, BatchRecord
from medsr_cli.tasks.batch_request import BatchRequest
from medsr_cli.tasks.batch_settings import open_record, record_place, settings_of
from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.progress import Silent
from medsr_cli.tasks.request import Item, UpscaleRequest

DRIVER = Path(__file__).with_name("batch_driver.py")
posix = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed")
PLAIN = BatchRequest()
RESUME = BatchRequest(resume=True)


class Copying:
    """A work that copies its source, or fails as the source says."""

    def __init__(self, out: Path, claim: Claim, done: list[str], overwrite: bool = False) -> None:
        self.claim, self.done, self.overwrite = claim, done, overwrite or claim.repeat
        self.items = [Item(claim.sources[0], out / f"{claim.sources[0].stem}_x4-rdst.nii")]

    def prepare(self) -> None:
        source = self.items[0].source
        if not source.exists():
            raise InputRefused(f"{mention(source.name)} does not exist.")
        if (word := source.read_text()) in FAILURES:
            raise FAILURES[word](f"{mention(source.name)} is {word}.")
        if self.items[0].output.exists() and not self.overwrite:
            raise ArgumentsError(f"{mention(self.items[0].output)} exists.")

    def run(self) -> None:
        self.done.append(self.items[0].source.stem)
        with atomic_file(self.items[0].output, overwrite=self.overwrite) as file:
            file.write(self.items[0].source.read_bytes() * 2)


FAILURES: dict[str, type[MedsrError]] = {
    "refused": InputRefused,
    "passing": RunError,
    "untrusted": QualityGateFailed,
    "nodevice": DeviceUnavailable,
}


class Tree:
    """Inputs of a few bytes, and batches of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder / "in", folder / "out"
        self.folder.mkdir()
        self.done: list[str] = []

    def put(self, **files: str) -> Tree:
        for name, text in files.items():
            (self.folder / f"{name}.nii").write_text(text)
        return self

    def run(self, asked: BatchRequest = PLAIN, *, scale: float = 4, overwrite: bool = False) -> dict[str, Item]:
        """Name to item, in the order they came; `done` says what was really done."""
        self.done = []
        request = UpscaleRequest(
            inputs=(self.folder,),
            output=self.out,
            model=ModelRequest(model="bicubic"),
            suffix="_x4-rdst",
            magnification=Magnification((scale, scale)),
        )
        units = [(path,) for path in sorted(self.folder.iterdir())]
        with open_record(request, asked, Silent(), several=True) as record:
            batch = Batch(asked, request, record, total=len(units))
            found = batch.run(units, lambda claim: Copying(self.out, claim, self.done, overwrite))
            return {finished.item.source.stem: finished.item for finished in found}

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / NAME).read_bytes().splitlines()]


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def statuses(items: dict[str, Item]) -> dict[str, str]:
    return {name: item.status for name, item in items.items()}


# -- resuming ----------------------------------------------------------------------------------------------


def test_what_is_done_is_passed_over_and_what_is_new_is_done(tree):
    tree.put(a="1", b="2")
    assert statuses(tree.run(RESUME)) == {"a": "done", "b": "done"}
    tree.put(c="3")
    items = tree.run(RESUME)
    assert statuses(items) == {"a": "skipped", "b": "skipped", "c": "done"}
    assert tree.done == ["c"]
    assert items["a"].output == tree.out / "a_x4-rdst.nii"


def test_resuming_opens_nothing_that_is_done(tree, monkeypatch):
    tree.put(a="1")
    tree.run(RESUME)
    opened: list[object] = []
    monkeypatch.setattr(Path, "read_text", lambda self, *_: opened.append(self) or "")
    monkeypatch.setattr(Copying, "prepare", opened.append)
    assert statuses(tree.run(RESUME)) == {"a": "skipped"}
    assert [path for path in opened if "boot_id" not in str(path)] == []


def test_without_resume_what_is_there_is_not_replaced(tree):
    tree.put(a="1")
    tree.run()
    items = tree.run()
    assert items["a"].error.exit_code == 2
    assert statuses(tree.run(overwrite=True)) == {"a": "done"}


def test_a_result_that_is_gone_or_cut_short_is_made_again(tree):
    tree.put(a="1", b="22")
    tree.run(RESUME)
    (tree.out / "a_x4-rdst.nii").unlink()
    assert statuses(tree.run(RESUME)) == {"a": "done", "b": "skipped"}
    (tree.out / "b_x4-rdst.nii").write_text("someone's own")
    items = tree.run(RESUME)
    assert statuses(items) == {"a": "skipped", "b": "failed"}, "what is no longer ours is not replaced"
    assert items["b"].error.exit_code == 2
    assert (tree.out / "b_x4-rdst.nii").read_text() == "someone's own"


def test_a_changed_input_is_done_again_but_its_result_replaced_only_if_that_was_said(tree):
    tree.put(a="1")
    tree.run(RESUME)
    tree.put(a="new")
    assert tree.run(RESUME)["a"].error.exit_code == 2
    assert statuses(tree.run(RESUME, overwrite=True)) == {"a": "done"}
    assert (tree.out / "a_x4-rdst.nii").read_text() == "newnew"
    assert statuses(tree.run(RESUME)) == {"a": "skipped"}


def test_what_will_not_pass_is_not_tried_again_unless_it_changes_or_is_asked_for(tree):
    tree.put(a="refused", b="untrusted", c="passing", d="4")
    first = tree.run(RESUME)
    assert {name: item.error and item.error.exit_code for name, item in first.items()} == {
        "a": 6,
        "b": 7,
        "c": 1,
        "d": None,
    }
    tree.put(c="3")
    again = tree.run(RESUME)
    assert {name: item.error and item.error.exit_code for name, item in again.items()} == {
        "a": 6,
        "b": 7,
        "c": None,
        "d": None,
    }
    assert "earlier run" in str(again["a"].error)
    assert "\u2068a.nii\u2069" in again["a"].error.sentence
    assert Counter(line.get("status") for line in tree.lines())["failed"] == 3, "what was not tried is not recorded"
    tried = tree.run(BatchRequest(resume=True, retry_failed=True))
    assert "earlier run" not in str(tried["a"].error)
    time.sleep(0.01)
    tree.put(a="fine")
    assert statuses(tree.run(RESUME)) == {"a": "done", "b": "failed", "c": "skipped", "d": "skipped"}
    attempts = [line["attempt"] for line in tree.lines() if line.get("status") == "done"]
    assert sorted(attempts) == [1, 2, 3], "d at once, c after a failure, a after two"


def test_a_result_that_came_just_before_the_end_of_its_run_is_made_again(tree, monkeypatch):
    tree.put(a="1", b="2")
    run = Copying.run

    def interrupted(self: Copying) -> None:
        run(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Copying, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tree.run(RESUME)
    monkeypatch.undo()
    assert [path.name for path in tree.out.iterdir() if path.name != NAME] == ["a_x4-rdst.nii"]
    assert tree.lines()[-1]["status"] == "begun"
    assert statuses(tree.run(RESUME)) == {"a": "done", "b": "done"}
    assert [line["attempt"] for line in tree.lines() if line.get("status") == "done"] == [2, 1]


def test_what_stood_there_before_a_batch_is_never_taken_for_its_own(tree):
    tree.put(a="1")
    tree.out.mkdir()
    (tree.out / "a_x4-rdst.nii").write_text("someone's")
    for _ in range(3):
        assert tree.run(RESUME)["a"].error.exit_code == 2
    assert (tree.out / "a_x4-rdst.nii").read_text() == "someone's"


def test_other_settings_are_no_resumption(tree):
    tree.put(a="1")
    tree.run()
    with pytest.raises(ArgumentsError, match="differ: scale"):
        tree.run(RESUME, scale=2)


def test_an_earlier_failure_does_not_stop_a_resumed_batch_before_it_begins(tree):
    tree.put(a="refused", b="2", c="3")
    assert statuses(tree.run(BatchRequest(fail_fast=True))) == {"a": "failed", "b": "not begun", "c": "not begun"}
    again = tree.run(BatchRequest(fail_fast=True, resume=True))
    assert statuses(again) == {"a": "failed", "b": "done", "c": "done"}


# -- stopping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [0, 1, 4])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "done failed failed done failed done"),
        ({"fail_fast": True}, "done failed not-begun not-begun not-begun not-begun"),
        ({"max_failures": 2}, "done failed failed not-begun not-begun not-begun"),
        ({"max_failures": 3}, "done failed failed done failed not-begun"),
    ],
)
def test_a_batch_stops_after_so_many_failures(tree, options, expected, jobs):
    tree.put(a="1", b="passing", c="refused", d="4", e="passing", f="6")
    items = tree.run(BatchRequest(jobs=jobs, **options))
    assert " ".join(item.status.replace(" ", "-") for item in items.values()) == expected
    assert sorted(tree.done) == [name for name, item in items.items() if item.status == "done"]
    assert not list(tree.out.glob(".medsr-locks"))


def test_without_its_device_nothing_more_is_tried(tree):
    tree.put(a="1", b="nodevice", c="3")
    with pytest.raises(DeviceUnavailable):
        tree.run()
    assert [(line["status"], line.get("exit_code")) for line in tree.lines() if "item" in line] == [
        ("begun", None),
        ("done", 0),
        ("failed", 4),
    ]
    tree.put(b="2")
    assert statuses(tree.run(RESUME)) == {"a": "skipped", "b": "done", "c": "done"}


def failed_item(code: type[MedsrError] = InputRefused) -> Item:
    return Item(Path("x"), status="failed", error=code("No."))


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([], 0),
        ([Item(Path("x"))], 0),
        ([Item(Path("x"), status="skipped")], 0),
        ([failed_item()], 6),
        ([failed_item(), failed_item()], 3),
        ([Item(Path("x")), failed_item()], 3),
        ([Item(Path("x"), status="skipped"), failed_item()], 3),
        ([failed_item(RunError), Item(Path("y"), status="not begun")], 1),
        ([failed_item(RunError), failed_item(), Item(Path("y"), status="not begun")], 1),
        ([Item(Path("x")), failed_item(), Item(Path("y"), status="not begun")], 3),
    ],
)
def test_what_a_batch_ends_with(items, code):
    tally = Tally()
    for item in items:
        tally.add(item)
    error = tally.error()
    assert (error.exit_code if error else 0) == code
    if isinstance(error, SomeInputsFailed):
        assert f"of {len(items)} inputs failed" in str(error)


def test_channels_that_failed_together_have_one_reason():
    error, tally = QualityGateFailed("No."), Tally()
    for _ in range(3):
        tally.add(Item(Path("x"), status="failed", error=error))
    assert tally.error() is error


def test_the_line_of_an_input():
    item = Item(Path("a.nii"), Path("b.nii"), status="failed", error=InputRefused(f"{mention('a.nii')} is odd."))
    assert item_line(item, "0f") == {
        "input": "a.nii",
        "output": "b.nii",
        "status": "failed",
        "exit_code": 6,
        "error": f"{mention('a.nii')} is odd.",
        "seconds": 0.0,
        "id": "0f",
        "warnings": [],
    }


@pytest.mark.parametrize(
    "options",
    [
        {"null": True},
        {"fail_fast": True, "max_failures": 3},
        {"max_failures": 0},
        {"retry_failed": True},
        {"jobs": -1},
        {"jobs": 65},
    ],
)
def test_options_that_cannot_both_be_meant(options):
    with pytest.raises(ArgumentsError):
        BatchRequest(**options).refuse_contradictions()


def test_where_a_record_is(tmp_path):
    def place(several: bool = True, batch: BatchRequest = PLAIN, **how) -> Path | None:
        return record_place(UpscaleRequest(model=ModelRequest(), **how), batch, several=several)

    scan = tmp_path / "scan.nii"
    assert place(inputs=(scan, scan), output=tmp_path / "o") == tmp_path / "o" / NAME
    assert place(inputs=(tmp_path,)) == tmp_path / NAME
    assert place(inputs=(scan, scan)) is None
    assert place(several=False, inputs=(scan,), output=tmp_path / "o.nii") is None
    named = BatchRequest(record=tmp_path / "r", resume=True)
    assert place(several=False, batch=named, inputs=(scan,)) == tmp_path / "r"
    with pytest.raises(ArgumentsError, match="--batch-record"):
        place(inputs=(scan, scan), batch=RESUME)


def test_every_option_that_decides_a_result_is_a_setting(tmp_path):
    def settings(model: dict | None = None, **how) -> dict[str, str]:
        return settings_of(
            UpscaleRequest(inputs=(), model=ModelRequest(**{"model": "bicubic", **(model or {})}), **how)
        )

    plain = settings()
    checkpoint = tmp_path / "net.safetensors"
    checkpoint.write_bytes(b"1")
    for name, other in {
        "model": settings({"model": "lanczos"}),
        "scale": settings(magnification=Magnification((2.0, 2.0))),
        "precision": settings({"precision": "bf16"}),
        "tta": settings({"ensemble": True}),
        "roi": settings(region="1,2,3,4"),
        "series": settings(series="2"),
        "checkpoints": settings({"weights": str(checkpoint)}),
    }.items():
        assert name in {key for key in plain if plain[key] != other[key]}, name
    assert settings({"device": "cuda", "threads": 3, "tile": 64}, overwrite=True, skip_existing=True) == plain
    before = settings({"weights": str(checkpoint)})
    checkpoint.write_bytes(b"2")
    assert settings({"weights": str(checkpoint)})["checkpoints"] != before["checkpoints"]


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [False, True])
def test_the_record_names_no_file_unless_that_is_asked_for(tree, shown):
    tree.put(DOE_JOHN="1", CANARY="refused")
    tree.run(BatchRequest(log_paths=shown))
    text = (tree.out / NAME).read_text()
    assert ("DOE_JOHN" in text) is ("CANARY" in text) is shown
    assert str(tree.folder) not in text or shown


# -- others beside -----------------------------------------------------------------------------------------


def bicubic(tree: Tree) -> UpscaleRequest:
    return UpscaleRequest(
        inputs=(tree.folder,), output=tree.out, model=ModelRequest(model="bicubic"), suffix="_x4-rdst"
    )


def test_what_another_holds_is_come_back_to_and_the_rest_does_not_wait_for_it(tree):
    """Who holds the first input lets go of it only when the others are done."""
    tree.put(a="1", b="2", c="3")
    request = bicubic(tree)
    waited: list[bool] = []
    with BatchRecord(tree.out / NAME, settings_of(request)) as other:
        theirs = next(Batch(PLAIN, request, other).steps([(tree.folder / "a.nii",)]))
        work = Copying(tree.out, theirs, [])

        def end() -> None:
            latest = time.monotonic() + 10
            while not (tree.out / "c_x4-rdst.nii").exists() and time.monotonic() < latest:
                time.sleep(0.01)
            waited.append((tree.out / "c_x4-rdst.nii").exists())
            work.run()
            Batch(PLAIN, request, other).end(theirs, work.items)

        thread = threading.Thread(target=end)
        thread.start()
        items = tree.run(BatchRequest(jobs=4))
        thread.join()
    assert waited == [True]
    assert statuses(items) == {"b": "done", "c": "done", "a": "skipped"}
    assert tree.done == ["b", "c"]


def test_what_is_done_between_the_look_and_the_lock_is_not_done_again(tree, monkeypatch):
    tree.put(a="1")
    request = bicubic(tree)
    lock_of = BatchRecord.lock_of

    def late(record: BatchRecord, item: str):
        if record is not other and not (tree.out / "a_x4-rdst.nii").exists():
            batch = Batch(PLAIN, request, other)
            claim = next(batch.steps([(tree.folder / "a.nii",)]))
            work = Copying(tree.out, claim, [])
            work.run()
            batch.end(claim, work.items)
        return lock_of(record, item)

    monkeypatch.setattr(BatchRecord, "lock_of", late)
    with BatchRecord(tree.out / NAME, settings_of(request)) as other:
        assert statuses(tree.run()) == {"a": "skipped"}
    assert tree.done == []


def test_two_batches_that_hold_what_the_other_wants_both_end(tree):
    tree.put(**{f"n{number:02d}": "x" for number in range(12)})
    request = bicubic(tree)
    units = [(path,) for path in sorted(tree.folder.iterdir())]
    done: list[str] = []
    both = threading.Barrier(2)
    counted: list[Counter] = []

    def run(order: list) -> None:
        with BatchRecord(tree.out / NAME, settings_of(request)) as record:
            both.wait(20)
            batch = Batch(BatchRequest(jobs=3), request, record)
            found = list(batch.run(order, lambda claim: Copying(tree.out, claim, done)))
            counted.append(Counter(one.item.status for one in found))
            both.wait(20)

    threads = [threading.Thread(target=run, args=(order,)) for order in (units, units[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == sorted(path.stem for (path,) in units)
    assert sum(counted, Counter()) == {"done": 12, "skipped": 12}


def test_a_batch_can_be_spread_over_others_who_do_it(tree):
    tree.put(a="1", b="refused", c="3", d="4")
    request = bicubic(tree)
    units = [(path,) for path in sorted(tree.folder.iterdir())]

    def spread(claims):
        held = list(claims)
        for claim in reversed(held):
            work = Copying(tree.out, claim, tree.done)
            try:
                work.prepare()
                work.run()
            except MedsrError as error:
                work.items[0].status, work.items[0].error = "failed", error
            yield claim, work.items

    def run(asked: BatchRequest) -> dict[str, str]:
        with BatchRecord(tree.out / NAME, settings_of(request), resume=asked.resume) as record:
            found = spread_over(Batch(asked, request, record), units, spread)
            return {one.item.source.stem: one.item.status for one in found}

    assert run(BatchRequest()) == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    assert run(RESUME) == {"a": "skipped", "b": "failed", "c": "skipped", "d": "skipped"}
    assert tree.done == ["d", "c", "a"]


# -- real processes ----------------------------------------------------------------------------------------


def images(folder: Path, count: int) -> dict[str, np.ndarray]:
    made = {}
    for number in range(count):
        place = folder / f"patient{number % 5}"
        place.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 1000, (10, 9, 2)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), place / f"doe{number}.nii")
        made[f"doe{number}"] = values
    return made


def drive(**given) -> list:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), json.dumps(given)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def whole_results(out: Path, made: dict[str, np.ndarray]) -> None:
    """Every result is there, whole, and of its own source; nothing else is."""
    found = {path.name.removesuffix("_x2-bicubic.nii"): path for path in out.rglob("*.nii")}
    assert found.keys() == made.keys()
    for name, path in found.items():
        result = np.asanyarray(nib.load(path).dataobj)
        assert result.shape == (20, 18, 2)
        shrunken = result.reshape(10, 2, 9, 2, 2).mean((1, 3))
        assert np.corrcoef(shrunken.ravel(), made[name].ravel())[0, 1] > 0.9
    assert {path.name for path in out.rglob(".*")} == {NAME}, "no locks and no temporaries are left"


def times_done(out: Path) -> Counter:
    lines = [json.loads(line) for line in (out / NAME).read_bytes().splitlines() if line]
    return Counter(line["item"] for line in lines if line.get("status") == "done")


@posix
@pytest.mark.parametrize("runs", [2, 4])
def test_processes_share_a_tree_and_do_each_image_once(tmp_path, runs):
    made = images(tmp_path / "in", 60)
    tree, out = str(tmp_path / "in"), str(tmp_path / "out")
    told = drive(mode="together", tree=tree, out=out, runs=runs, options={"jobs": 2})
    assert [code for code, _ in told] == [0] * runs
    done = [name for _, items in told for name, status, _ in items if status == "done"]
    assert sorted(done) == sorted(f"{name}.nii" for name in made)
    assert {status for _, items in told for _, status, _ in items} <= {"done", "skipped"}
    assert all(len(items) == 60 for _, items in told), "each run tells of every input"
    whole_results(tmp_path / "out", made)
    assert set(times_done(tmp_path / "out").values()) == {1}
    assert len(times_done(tmp_path / "out")) == 60


@posix
def test_thirty_kills_lose_nothing_and_leave_nothing_half_done(tmp_path):
    made = images(tmp_path / "in", 300)  # more than thirty short runs can do
    where = {"tree": str(tmp_path / "in"), "out": str(tmp_path / "out")}
    options = {"resume": True}
    codes = drive(mode="killed", runs=30, seed=5, longest_s=0.35, options=options, **where)
    assert codes.count(-9) >= 15, "too few were killed to prove anything"
    for path in (tmp_path / "out").rglob("*.nii"):
        assert np.asanyarray(nib.load(path).dataobj).shape == (20, 18, 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii")}
    recorded = times_done(tmp_path / "out")
    told = drive(mode="together", runs=1, options=options, **where)
    assert told[0][0] == 0
    assert {status for _, status, _ in told[0][1]} <= {"done", "skipped"}
    whole_results(tmp_path / "out", made)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii")}
    assert sum(before[name] == after[name] for name in before) >= len(recorded), "what was recorded is not done again"
    assert set(times_done(tmp_path / "out").values()) == {1}
    assert len(times_done(tmp_path / "out")) == 300


def test_a_lock_that_is_given_back_twice_closes_nobody_elses_file(tmp_path):
    from medsr_cli.tasks.batch_locks import Locks

    locks = Locks(tmp_path / "locks")
    lock = locks.claim("a")
    lock.release()
    with (tmp_path / "other").open("w") as other:
        assert other.fileno() == lock.descriptor, "or this test shows nothing"
        lock.release()
        other.write("still open")
    assert (tmp_path / "other").read_text() == "still open"


def test_thousands_of_listed_inputs_find_their_folders_at_once():
    """Each was once compared with every other: two hours for 20,000 with --recursive."""
    from types import SimpleNamespace

    from medsr_cli.tasks.inputs import folder_within

    inputs = tuple(Path(f"tree/{number % 50}/{number}.nii.gz") for number in range(20_000))
    places = SimpleNamespace(inputs=inputs, recursive=True, tree=None, output=Path("out"), ending="_x4-rdst")
    began = time.process_time()
    for path in inputs:
        folder_within(places, path)
    assert time.process_time() - began < 5
