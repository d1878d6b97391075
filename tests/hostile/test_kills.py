"""Two hundred moments at which a process is killed: nothing half-done under a final name, and the next run works.

A child is forked for every moment, so that libraries are loaded once. Half of the moments are drawn over the time that
the work takes; the other half are the steps that it takes on the disk, one after the other, each the last that the
process lives to take.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.hostile.jobs import JOBS, Disk, convert, digest, names

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

MOMENTS = 40
"""Of each of five jobs, at least; up to half of them are steps."""


class Work:
    """A job with what is true of its folder before and after it."""

    def __init__(self, run: Callable[[], None], folder: Path, target: Path, whole: Callable[[], str]) -> None:
        self.run, self.folder, self.target, self.whole = run, folder, target, whole


def child(work: Work, at: int) -> None:
    """Do the work; killed at its `at`-th step on the disk, if that is not 0."""
    disk = Disk(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with disk.in_place():
        work.run()
    Path(work.folder.parent, "steps").write_text(str(disk.count), encoding="ascii")


def killed(work: Work, *, at: int = 0, after_s: float | None = None) -> int | None:
    """Exit code of a child."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(work, at))
    process.start()
    if after_s is not None:
        time.sleep(after_s)
        process.kill()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def moments(work: Work) -> tuple[list[int], list[float]]:
    """Steps and delays, spread over all of the work."""
    times = []
    for _ in range(3):
        shutil.rmtree(work.folder)
        work.folder.mkdir()
        start = time.monotonic()
        assert killed(work) == 0
        times.append(time.monotonic() - start)
    count = int(Path(work.folder.parent, "steps").read_text(encoding="ascii"))
    # From the last steps, which rename and flush, none is left out.
    steps = sorted(
        {*np.linspace(1, count, MOMENTS // 2 - 6).round().astype(int).tolist(), *range(count - 5, count + 1)}
    )
    steps = [int(step) for step in steps if step > 0]
    return steps, np.random.default_rng(20261121).uniform(0, 1.1 * min(times), MOMENTS - len(steps)).tolist()


def check(work: Work, kept: str | None) -> int:
    """After a kill: the target is absent, old or whole. Then the next run: whole, and swept. Returns what was swept."""
    found = work.whole() if work.target.exists() else None
    assert found in (None, "whole", kept), "a result that is not whole stands under its name"
    left = [name for name in names(work.folder) if name not in (work.target.name, "kept")]
    assert all(name.startswith(".medsr-") or name.endswith((".part", ".lock")) for name in left), left
    if work.target.is_dir():
        shutil.rmtree(work.target)
    elif work.target.exists():
        work.target.unlink()
    assert killed(work) == 0
    assert work.whole() == "whole"
    assert [name for name in names(work.folder) if name.endswith(".part")] == []
    return len(left)


def all_moments(work: Work, capsys: pytest.CaptureFixture[str], name: str) -> None:
    steps, delays = moments(work)
    began, died, swept = time.monotonic(), 0, 0
    for options in [*[{"at": at} for at in steps], *[{"after_s": delay} for delay in delays]]:
        shutil.rmtree(work.folder)
        work.folder.mkdir()
        code = killed(work, **options)
        died += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), code
        swept += check(work, None)
    with capsys.disabled():
        print(
            f"\n{name}: {len(steps) + len(delays)} moments, {died} killed before the end, {swept} temporaries swept, "
            f"{time.monotonic() - began:.0f} s"
        )
    assert died > len(steps)
    assert swept > 0


@pytest.mark.parametrize("name", ["packed NIfTI", "DICOM series", "PNG"])
def test_images(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, target_name = JOBS[name]
    source = make(tmp_path)
    before = digest(source)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / target_name
    wanted = pixels_of_an_enlarged(source)

    def whole() -> str:
        return "whole" if pixels_of(target) == wanted else "another"

    all_moments(Work(lambda: convert(source, target), folder, target, whole), capsys, name)
    assert digest(source) == before


def pixels_of(path: Path) -> str:
    from medsr_cli.formats import open_image

    return hashlib.sha256(b"".join(pixels.tobytes() for pixels in open_image(path).slices())).hexdigest()


def pixels_of_an_enlarged(source: Path) -> str:
    from medsr_cli.formats import open_image

    enlarged = (pixels.repeat(2, 1).repeat(2, 2).tobytes() for pixels in open_image(source).slices())
    return hashlib.sha256(b"".join(enlarged)).hexdigest()


def test_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A download from a server of this process: the checkpoint is whole or absent, and a part is taken up."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
    from misbehaving_site import entry_for, running, safetensors_bytes

    from medsr_cli.weights.download import download
    from medsr_cli.weights.store import Store

    data = safetensors_bytes(400_000)
    bundled, home = tmp_path / "bundled", tmp_path / "home"
    bundled.mkdir()
    folder = home / "weights"
    folder.mkdir(parents=True)
    with running(data) as site:
        entry = entry_for(data, f"{site.url}/toy")
        store = Store(home, bundled)
        target = store.source_path(entry)
        assert target.parent == folder

        def run() -> None:
            with store.lock(entry.id):
                download(entry, store)

        def whole() -> str:
            return "whole" if target.read_bytes() == data else "another"

        all_moments(Work(run, folder, target, whole), capsys, "weights")


def test_training_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state of a training: the one before, or the new one, and never a part of either."""
    import torch

    from medsr_cli.training.state import TrainingState, read_state, write_state

    torch.set_num_threads(1)
    folder = tmp_path / "run"
    folder.mkdir()
    target = folder / "state.pt"
    weights = {"w": torch.arange(300_000, dtype=torch.float32)}

    def save(step: int) -> None:
        write_state(target, TrainingState(step=step), {"weights": weights})

    def run() -> None:
        save(2)

    def whole() -> str:
        state = read_state(target)
        assert torch.equal(state["weights"]["w"], weights["w"])
        return {2: "whole", 1: "old"}[state["step"]]

    work = Work(run, folder, target, whole)
    steps, delays = moments(work)
    died = 0
    for options in [*[{"at": at} for at in steps], *[{"after_s": delay} for delay in delays]]:
        shutil.rmtree(folder)
        folder.mkdir()
        save(1)
        died += killed(work, **options) == -signal.SIGKILL
        assert whole() in ("old", "whole")  # there was one before: it is never absent
        check(work, "old")
    with capsys.disabled():
        print(f"\ntraining: {len(steps) + len(delays)} moments, {died} killed before the end")
    assert died > len(steps)


def test_the_kill_is_felt(tmp_path: Path) -> None:
    """The harness itself: a writer in place is caught with a part of a file under its name."""
    folder = tmp_path / "out"
    folder.mkdir()

    def careless() -> None:
        with (folder / "result").open("wb") as file:
            for _ in range(100):
                file.write(bytes(20_000))

    work = Work(
        careless,
        folder,
        folder / "result",
        lambda: "whole" if (folder / "result").stat().st_size == 2_000_000 else "part",
    )
    assert killed(work, at=50) == -signal.SIGKILL
    with pytest.raises(AssertionError, match="not whole"):
        check(work, None)
