"""A batch on a real cluster of two worker processes, some of which die at the worst moments."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsr_cli import errors
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, InputRefused, MedsrError, RunError, mention
from medsr_cli.tasks import cluster, cluster_worker
from medsr_cli.tasks.cluster import spread
from medsr_cli.tasks.cluster_upscale import Upscaling, absolute
from medsr_cli.tasks.cluster_worker import Parcel, Taken, Task
from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.request import Item, UpscaleRequest
from medsr_cli.tasks.upscale import upscale

distributed = pytest.importorskip("distributed")
COUNT = 30


@pytest.fixture(scope="module")
def address():
    import dask

    with (
        # What waits for a dying worker is given up by the scheduler at once: it has to be sent again.
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as running,
    ):
        yield running.scheduler_address


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for at in range(COUNT):
        values = rng.integers(0, 1000, (6, 5, 2)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 2, 1])), folder / f"scan{at:02d}.nii")
    return sorted(folder.iterdir())


def request_for(images, output, **changes):
    return UpscaleRequest(
        inputs=tuple(images), model=ModelRequest("bicubic"), magnification=Magnification((2, 2)), output=output,
        **changes,
    )  # fmt: skip


def workers_of(address):
    with distributed.Client(address, set_as_default=False) as client:
        return client.run(os.getpid)


def pixels(path):
    return np.asarray(nib.load(path).dataobj)


def test_a_worker_is_killed_midway_and_nothing_is_lost_or_done_twice(address, images, tmp_path):
    output, alone = tmp_path / "out", tmp_path / "alone"
    request = request_for(images, output)
    parcels = (Parcel((path,), roots=(output,)) for path in images)
    first_seen, done = {}, []
    for parcel, items in spread(address, parcels, Upscaling.of(request), output):
        done.append(parcel.paths[0])
        assert [item.status for item in items] == ["done"], items[0].error
        assert items[0].source == parcel.paths[0]
        first_seen[items[0].output] = items[0].output.stat().st_mtime_ns
        if len(done) == 8:
            os.kill(next(iter(workers_of(address).values())), signal.SIGKILL)
    assert done == images
    assert sorted(os.listdir(output)) == sorted(path.name for path in first_seen)
    assert all(path.stat().st_mtime_ns == then for path, then in first_seen.items())
    for item in upscale(request_for(images, alone)):
        np.testing.assert_array_equal(pixels(item.output), pixels(output / item.output.name))
    # The second run does nothing.
    again = request_for(images, output, skip_existing=True)
    items = [item for _, some in spread(address, map(one, images), Upscaling.of(again), output) for item in some]
    assert [item.status for item in items] == ["skipped"] * COUNT
    assert all(path.stat().st_mtime_ns == then for path, then in first_seen.items())
    assert len(os.listdir(output)) == COUNT


def one(path):
    return Parcel((path,))


@dataclass(frozen=True)
class Dying:
    """Dies once for each parcel: `before` its result is there, `after` it, or `always`."""

    inner: Upscaling
    moments: tuple[str, ...]
    marks: Path

    def __call__(self, taken):
        run = self.inner(taken)

        def dying(parcel, again, stopped):
            number = int(parcel.paths[0].name[4:6])
            moment = self.moments[number] if number < len(self.moments) else ""
            mark = self.marks / f"{number}"
            first = not mark.exists() or moment == "always"
            with mark.open("a") as file:
                file.write(f"{os.getpid()} {again}\n")
            if moment in ("before", "always") and first:
                time.sleep(1)  # Dask's nanny gives up on workers that die before it knows that they run
                os.kill(os.getpid(), signal.SIGKILL)
            items = run(parcel, again, stopped)
            if moment == "after" and first:
                os.kill(os.getpid(), signal.SIGKILL)
            return items

        return dying


def test_workers_that_die_before_and_after_a_result_and_always(address, images, tmp_path):
    output, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    work = Dying(Upscaling.of(request_for(images, output)), ("before", "after", "", "always"), marks)
    found = [items[0] for _, items in spread(address, map(one, images[:6]), work, output)]
    assert [item.status for item in found] == ["done"] * 3 + ["failed"] + ["done"] * 2
    assert isinstance(found[3].error, RunError)
    assert str(found[3].error).startswith("scan03.nii was given up: 3 workers died")
    assert sorted(p.name for p in output.iterdir()) == sorted(
        f"scan{at:02d}_x2-bicubic.nii" for at in range(6) if at != 3
    )
    # The result that was there before its worker died was in the way of the second attempt, and replaced by the third.
    assert [line.split()[1] for line in (marks / "1").read_text().splitlines()] == ["False", "False", "True"]
    assert [len((marks / f"{at}").read_text().splitlines()) for at in (0, 2, 3, 4)] == [2, 1, 3, 1]


def test_what_has_a_receipt_is_not_done_again(images, tmp_path):
    calls = []

    def run(parcel, again, stopped):
        calls.append(again)
        item = Item(parcel.paths[0], output=tmp_path / "x.nii", report={"a": (1, 2)}, warnings=["slow"])
        return [item, Item(parcel.paths[0], status="failed", error=InputRefused(f"{mention('x')} is bad.", "Stop."))]

    task = task_of(images[:1], tmp_path, run)
    first, second = cluster_worker.attempt(task), cluster_worker.attempt(task)
    assert calls == [False]
    assert [item.output for item in second] == [item.output for item in first]
    assert second[0].report == {"a": [1, 2]}
    assert second[1].error.marked == first[1].error.marked
    assert type(second[1].error) is InputRefused


def task_of(paths, folder, run, version=cluster_worker.__version__):
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    cluster_worker._RUNNERS.clear()
    return Task(1, Parcel(tuple(paths)), WorkOf(run), shared, version, cluster_worker.seen_file(paths))


class WorkOf:
    def __init__(self, run):
        self.run = run

    def __reduce__(self):
        return str, ("work",)  # told apart by what it pickles to

    def __call__(self, taken):
        return self.run


def test_an_older_result_in_the_way_is_never_replaced(images, tmp_path):
    """Only a result that was made after the item was begun is of a dead worker."""
    target = tmp_path / "there.nii"
    target.write_bytes(b"mine")
    calls = []

    def run(parcel, again, stopped):
        calls.append(again)
        return [Item(parcel.paths[0], output=target, status="failed", error=ArgumentsError("It exists."))]

    task = task_of(images[:1], tmp_path, run)
    time.sleep(0.02)
    cluster_worker._begun(task)  # a first worker, which died at once
    assert cluster_worker.attempt(task)[0].status == "failed"
    assert calls == [False]
    (task.shared / "item-1.json").unlink()
    time.sleep(0.02)
    os.replace(target, tmp_path / "moved")
    os.replace(tmp_path / "moved", target)  # as a dead worker's rename would
    cluster_worker.attempt(task)
    assert calls == [False, False, True]


def test_two_inputs_of_one_name_are_not_written_over_each_other(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    here, there = Taken(shared), pickle.loads(pickle.dumps(Taken(shared)))  # noqa: S301 - its own
    a, b = tmp_path / "a" / "scan.nii", tmp_path / "b" / "scan.nii"
    assert here.setdefault(tmp_path / "out", a) == a
    assert there.setdefault(tmp_path / "out", a) == a
    assert there.setdefault(tmp_path / "out", b) not in (a, b)


def test_an_interrupted_batch_leaves_nothing_hidden(address, images, tmp_path):
    output = tmp_path / "out"
    running = spread(address, map(one, images), Upscaling.of(request_for(images, output)), output)
    next(running)
    running.close()
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    before = len(os.listdir(output))
    time.sleep(0.5)
    assert len(os.listdir(output)) == before < COUNT


def test_workers_must_see_the_same_files(images, tmp_path):
    task = task_of(images[:1], tmp_path, None)
    images[0].write_bytes(b"another file")
    assert "is another file for a worker" in str(cluster_worker.attempt(task)[0].error)
    images[0].unlink()
    found = cluster_worker.attempt(task)[0]
    assert isinstance(found.error, InputRefused)
    assert str(found.error).startswith("scan00.nii is not there for a worker")
    assert cluster._look(tmp_path / "nowhere", "token") == "it is not there"


def test_another_version_on_a_worker_is_refused(address, images, tmp_path, monkeypatch):
    task = task_of(images[:1], tmp_path, None, version="0.0.0")
    assert isinstance(cluster_worker.attempt(task), DeviceUnavailable)
    monkeypatch.setattr(cluster, "__version__", "9.9.9")
    with pytest.raises(DeviceUnavailable, match=r"have medsr .*; this is 9\.9\.9"):
        next(spread(address, map(one, images), Upscaling.of(request_for(images, tmp_path)), tmp_path))


def test_what_stops_a_batch_on_one_machine_stops_it_on_a_cluster(address, images, tmp_path):
    request = request_for(images, tmp_path / "out")
    missing = UpscaleRequest(inputs=request.inputs, model=ModelRequest("rdst", weights="no.safetensors"))
    with pytest.raises(MedsrError) as caught:
        list(spread(address, map(one, images[:1]), Upscaling.of(missing), tmp_path / "out"))
    assert caught.value.exit_code == 5


def test_no_cluster_and_no_dask_are_said(images, tmp_path, monkeypatch):
    work = Upscaling.of(request_for(images, tmp_path))
    monkeypatch.setattr(cluster, "CONNECT_S", 0.3)
    with pytest.raises(DeviceUnavailable, match="No Dask scheduler answers"):
        next(spread("tcp://127.0.0.1:9", map(one, images), work, tmp_path))
    with pytest.raises(DeviceUnavailable, match="no scheduler file"):
        next(spread(str(tmp_path / "s.json"), map(one, images), work, tmp_path))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ArgumentsError, match=r"pip install 'medsr\[cluster\]'"):
        next(spread("tcp://127.0.0.1:9", map(one, images), work, tmp_path))


def test_paths_are_made_absolute_and_named_as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    request = UpscaleRequest(
        inputs=(Path("a/b.nii"),), model=ModelRequest("rdst", weights="w.safetensors"), output=Path("out")
    )
    sent = absolute(request)
    assert (sent.inputs, sent.output) == ((tmp_path / "a/b.nii",), tmp_path / "out")
    assert sent.model.weights == str(tmp_path / "w.safetensors")
    parcel = Parcel((Path("a/b.nii"),), roots=(Path("out"),))
    item = Item(tmp_path / "a/b.nii", output=tmp_path / "out/b_x4.nii", more_outputs=[tmp_path / "a/b_map.nii"])
    named = parcel.as_named([item])[0]
    assert (named.source, named.output, named.more_outputs) == (
        Path("a/b.nii"), Path("out/b_x4.nii"), [Path("a/b_map.nii")],
    )  # fmt: skip


@pytest.mark.parametrize("kind", [errors.RunError, errors.WeightsError, errors.QualityGateFailed, errors.InputRefused])
def test_errors_survive_the_way(kind):
    error = kind(f"{mention('anna.nii')} is bad.", "Do something.")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - its own
    assert type(back) is kind
    assert (back.sentence, back.remedy, back.marked, back.exit_code) == (
        error.sentence, error.remedy, error.marked, kind.exit_code,
    )  # fmt: skip


def test_dask_can_log_nothing_of_a_patient(tmp_path):
    request = request_for([tmp_path / "MUELLER^ANNA.nii"], tmp_path / "MUELLER")
    task = Task(1, Parcel(request.inputs), Upscaling(request), tmp_path, "1", ())
    assert "MUELLER" not in repr(task) + str(task)
    outcome = cluster_worker.attempt(task)
    assert "MUELLER" not in repr(task)
    assert isinstance(outcome, list | MedsrError)


def test_the_command_spreads_a_tree_and_resumes(address, images, tmp_path, monkeypatch):
    """The whole way: record, locks, exit code, a worker killed midway, and a second run that has nothing to do."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "medsr_cli", "upscale", "in", "-o", "out", "-m", "bicubic", "-s", "2", "--json"]
    running = subprocess.Popen(
        [*command, "--dask", address], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lines = [running.stdout.readline() for _ in range(5)]
    os.kill(next(iter(workers_of(address).values())), signal.SIGKILL)
    rest, errors_said = running.communicate(timeout=90)
    assert running.returncode == 0, errors_said
    told = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert [(line["status"], line["input"]) for line in told] == [("done", f"in/{path.name}") for path in images]
    assert [line["output"] for line in told] == [f"out/{path.stem}_x2-bicubic.nii" for path in images]
    record = [json.loads(line) for line in (tmp_path / "out/.medsr-batch.jsonl").read_text().splitlines()]
    done = [line["item"] for line in record if line.get("status") == "done"]
    assert len(done) == len(set(done)) == COUNT
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii")}
    assert len(before) == COUNT
    again = subprocess.run(
        [*command, "--dask", address, "--resume"], env=environment, text=True, capture_output=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert {json.loads(line)["status"] for line in again.stdout.splitlines()} == {"skipped"}
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii")} == before
    left = [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert left == [".medsr-batch.jsonl"]


@pytest.mark.parametrize("address", ["nonsense", "tcp:", "a b:1", "host:port"])
def test_what_is_no_address_is_refused_at_once(tmp_path, address):
    with pytest.raises(ArgumentsError, match="no address"):
        list(spread(address, [Parcel((tmp_path / "a.nii",))], Upscaling.of(request_for([], tmp_path)), tmp_path))
