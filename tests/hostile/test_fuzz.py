"""Thousands of damaged files of every kind: each is read or refused in a sentence, in little time and memory.

Which files there are depends on nothing but their numbers (`mutants.mutant`), so that a failure names what to make
again. All of them are opened where CI is set, fewer on a laptop; MEDSR_FUZZ sets how many of each kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hostile.mutants import RSS_BYTES, SECONDS, mutant

ROOT = Path(__file__).resolve().parents[2]
IN_CI = {"dicom": 20_000, "nifti": 20_000, "png": 5_000, "others": 5_000}
ELSEWHERE = {"dicom": 2_000, "nifti": 2_000, "png": 1_000, "others": 500}
WORKERS = 2
HANGS_S = 60.0
"""Without a step for so long, a process is taken to hang in a library; what is slow is told by its processor time."""


def how_many(kind: str) -> int:
    return int(os.environ.get("MEDSR_FUZZ", "0")) or (IN_CI if os.environ.get("CI") else ELSEWHERE)[kind]


class Worker:
    """A process that opens every second mutant, started again behind one that killed it."""

    def __init__(self, kind: str, first: int, end: int, folder: Path) -> None:
        self.kind, self.end, self.folder = kind, end, folder
        folder.mkdir()
        self.killers: list[tuple[int, str]] = []
        self.start(first)

    def start(self, first: int) -> None:
        self.seen, self.moved = -2, time.monotonic()
        command = [sys.executable, "-m", "tests.hostile.mutants", self.kind]
        command += [str(first), str(WORKERS), str(self.end), str(self.folder)]
        with (self.folder / "stderr").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def at(self) -> int:
        path = self.folder / "at"
        text = path.read_text(encoding="ascii") if path.exists() else ""
        return int(text) if text.strip() else -2

    def done(self) -> bool:
        """Whether it is through; a process that died or hangs is told, and another one takes its place."""
        code, at = self.process.poll(), self.at()
        if at != self.seen:
            self.seen, self.moved = at, time.monotonic()
        if code is None and time.monotonic() - self.moved > HANGS_S:
            self.process.kill()
            code = self.process.wait()
        if code is None:
            return False
        if code == 0 and at == -1:
            return True
        assert at >= 0, (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")[-2000:]
        self.killers.append((at, f"the process ended with {code}"))
        self.start(at + WORKERS)
        return False


def faults(workers: list[Worker]) -> list[str]:
    """Every mutant that did harm, with what it was made from."""
    found = [killer for worker in workers for killer in worker.killers]
    for worker in workers:
        lines = (worker.folder / "found.jsonl").read_text(encoding="utf-8").splitlines()
        found += [(line["index"], line["fault"]) for line in map(json.loads, lines)]
    told = []
    for index, fault in sorted(found)[:20]:
        seed, _, change = mutant(workers[0].kind, index)
        told.append(f"{workers[0].kind} {index} ({seed.name}, {change}): {fault}")
    return told


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", IN_CI)
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = how_many(kind)
    began = time.monotonic()
    workers = [Worker(kind, first, count, tmp_path / str(first)) for first in range(WORKERS)]
    try:
        while sum(worker.done() for worker in workers) < WORKERS:
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    seconds = time.monotonic() - began
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary*.json")]
    accepted, refused = (sum(s.get(word, 0) for s in summaries) for word in ("accepted", "refused"))
    slowest = max((s["slowest_s"], s["slowest"]) for s in summaries)
    with capsys.disabled():
        print(
            f"\n{kind}: {count} damaged files in {seconds:.0f} s ({count / seconds:.0f} a second), {accepted} read, "
            f"{refused} refused, slowest {slowest[0]:.2f} s (number {slowest[1]}), "
            f"{max(s['rss_mib'] for s in summaries)} MiB"
        )
    assert not faults(workers), "\n".join(faults(workers))
    assert accepted + refused == count
    assert min(accepted, refused) > count // 20, "the damage is too much, or too little, to find anything"
    assert slowest[0] <= SECONDS
    assert max(s["rss_mib"] for s in summaries) << 20 <= RSS_BYTES


def test_a_mutant_depends_on_its_number_alone() -> None:
    for kind in IN_CI:
        assert [mutant(kind, at)[1] for at in range(20)] == [mutant(kind, at)[1] for at in range(20)]
        assert len({mutant(kind, at)[1] for at in range(50)}) > 40


def test_a_file_that_kills_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a crash of a library written in C is a failure that names the file."""
    code = "import os, sys; f = sys.argv[5]; i = int(sys.argv[2])\n"
    code += "open(f + '/found.jsonl', 'a').close()\n"
    code += "open(f + '/at', 'w').write('%12d' % (6 if i < 6 else -1))\n"
    code += "i < 6 and os.kill(os.getpid(), 11)"
    real = subprocess.Popen

    def crashing(command, **options):
        return real([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", crashing)
    worker = Worker("png", 0, 10, tmp_path / "w")
    while not worker.done():
        time.sleep(0.01)
    assert [at for at, _ in worker.killers] == [6]
    assert "png 6 (" in faults([worker])[0]
    assert "-11" in faults([worker])[0]
