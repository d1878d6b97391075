"""A result is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.formats import atomic
from medsr_cli.formats.atomic import (
    ANY_REMEDY,
    atomic_file,
    atomic_folder,
    atomic_path,
    refuse_existing,
    sweep_stale,
    temporary_beside,
)

ROOT = Path(__file__).resolve().parents[2]
PAYLOAD = bytes(range(256)) * 300


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write(target, **options):
    with atomic_file(target, **options) as file:
        for start in range(0, len(PAYLOAD), 1000):
            file.write(PAYLOAD[start : start + 1000])


def test_whole_and_alone(tmp_path):
    target = tmp_path / "made" / "on the way" / "scan.bin"
    write(target)
    assert target.read_bytes() == PAYLOAD
    assert names(target.parent) == ["scan.bin"]


def test_nothing_under_the_name_before_the_end(tmp_path):
    target = tmp_path / "scan.bin"
    with atomic_file(target) as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
        (temporary,) = names(tmp_path)
        assert temporary.startswith(".medsr-")
        assert "scan" not in temporary


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_inside_leaves_everything_as_it_was(tmp_path, error, existing):
    target = tmp_path / "scan.bin"
    if existing:
        target.write_bytes(b"old")
    with pytest.raises(error), atomic_file(target, overwrite=True) as file:  # noqa: PT012 - it fails half-way
        file.write(b"half")
        raise error
    assert names(tmp_path) == (["scan.bin"] if existing else [])
    if existing:
        assert target.read_bytes() == b"old"


def test_existing_targets(tmp_path):
    target = tmp_path / "scan.bin"
    target.write_bytes(b"old")
    with pytest.raises(ArgumentsError, match="--overwrite"), atomic_file(target):
        pytest.fail("the block must not run")
    assert target.read_bytes() == b"old"
    write(target, overwrite=True)
    assert target.read_bytes() == PAYLOAD
    assert names(tmp_path) == ["scan.bin"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "scan.bin"
    with pytest.raises(ArgumentsError), atomic_file(target) as file:  # noqa: PT012 - it fails at the end
        file.write(b"mine")
        target.write_bytes(b"somebody else's")
    assert target.read_bytes() == b"somebody else's"
    assert names(tmp_path) == ["scan.bin"]


def test_a_dangling_link_is_a_target_too(tmp_path):
    (tmp_path / "scan.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArgumentsError):
        write(tmp_path / "scan.bin")


def test_verify_sees_everything_and_can_refuse(tmp_path):
    target = tmp_path / "scan.bin"
    seen = []
    write(target, verify=lambda path: seen.append(path.read_bytes()))
    assert seen == [PAYLOAD]

    def refuse(path):
        raise RunError("No.")

    with pytest.raises(RunError, match="No"):
        write(target, overwrite=True, verify=refuse)
    assert target.read_bytes() == PAYLOAD
    assert names(tmp_path) == ["scan.bin"]


def test_paths(tmp_path):
    with atomic_path(tmp_path / "scan.bin") as path:
        path.write_bytes(b"whole")
    assert (tmp_path / "scan.bin").read_bytes() == b"whole"
    assert names(tmp_path) == ["scan.bin"]


# ------------------------------------------------------------------------------------------ full disks


class Disk:
    """Fails the n-th of all writes, flushes and renames with one error number."""

    def __init__(self, monkeypatch, fail_at, number=errno.ENOSPC):
        self.count, self.fail_at, self.number = 0, fail_at, number
        real_open, real_fsync, real_replace, real_rename = Path.open, os.fsync, os.replace, os.rename
        disk = self

        class File(io.FileIO):
            def write(self, data):
                disk.step()
                return super().write(data)

        def opened(path, mode="r", *args, **kwargs):
            if mode == "r+b":
                return io.BufferedRandom(File(path, "r+"), 8192)
            return real_open(path, mode, *args, **kwargs)

        def stepped(real):
            return lambda *args: (disk.step(), real(*args))[1]

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", stepped(real_fsync))
        monkeypatch.setattr(os, "replace", stepped(real_replace))
        monkeypatch.setattr(os, "rename", stepped(real_rename))

    def step(self):
        self.count += 1
        # A full disk stays full.
        if self.count >= self.fail_at:
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "failed")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_of_the_disk_at_every_step(tmp_path, number, words, existing):
    target = tmp_path / "scan.bin"
    failures = 0
    for fail_at in range(1, 100):
        if existing:
            target.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at, number)
            try:
                write(target, overwrite=True)
            except RunError as error:
                failures += 1
                sentence = error.sentence
                assert words in sentence
                assert "scan.bin" in sentence
            else:
                break
        # After the rename only the folder's own flush is left: the result is whole then.
        if target.exists() and target.read_bytes() != b"old":
            assert target.read_bytes() == PAYLOAD
        else:
            assert names(tmp_path) == (["scan.bin"] if existing else [])
    assert failures > 10
    assert target.read_bytes() == PAYLOAD
    assert names(tmp_path) == ["scan.bin"]


def test_a_folder_on_a_disk_that_fails_at_every_step(tmp_path):
    failures = 0
    for fail_at in range(1, 50):
        target = tmp_path / "series"
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at)
            try:
                with atomic_folder(target) as folder:
                    (folder / "1.dcm").write_bytes(b"one")
                    (folder / "2.dcm").write_bytes(b"two")
            except RunError as error:
                failures += 1
                sentence = error.sentence
                assert "disk is full" in sentence
            else:
                break
        if target.exists():
            assert names(target) == ["1.dcm", "2.dcm"]
            (target / "1.dcm").unlink()
            (target / "2.dcm").unlink()
            target.rmdir()
        assert names(tmp_path) == []
    assert failures >= 4
    assert names(tmp_path / "series") == ["1.dcm", "2.dcm"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, number):
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        if "x" in mode or "w" in mode:
            raise OSError(number, os.strerror(number))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "scan.bin")
    with pytest.raises(RunError, match="cannot be written"), atomic_folder(tmp_path / "series"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError):
        write(tmp_path / "file" / "scan.bin")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(RunError, match="too long"):
        write(tmp_path / ("x" * 300))
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------- folders


def test_folders_are_whole_or_absent(tmp_path):
    target = tmp_path / "series"
    with atomic_folder(target) as folder:
        (folder / "1.dcm").write_bytes(b"one")
        assert not target.exists()
    assert names(target) == ["1.dcm"]
    assert names(tmp_path) == ["series"]

    with pytest.raises(ValueError, match="stop"), atomic_folder(target, overwrite=True) as folder:  # noqa: PT012
        (folder / "2.dcm").write_bytes(b"two")
        raise ValueError("stop")
    assert names(target) == ["1.dcm"]
    with pytest.raises(ArgumentsError), atomic_folder(target):
        pytest.fail("the block must not run")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "2.dcm").write_bytes(b"two")
    assert names(target) == ["2.dcm"]
    assert names(tmp_path) == ["series"]


def test_a_folder_that_fails_its_check(tmp_path):
    def refuse(path):
        raise RunError(f"{len(list(path.iterdir()))} files are not enough.")

    with pytest.raises(RunError, match="1 files"), atomic_folder(tmp_path / "series", verify=refuse) as folder:
        (folder / "1.dcm").write_bytes(b"one")
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------------- killed runs


WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from medsr_cli.formats.atomic import atomic_file, atomic_folder
    kind, target = sys.argv[1], Path(sys.argv[2])
    with (atomic_file if kind == "file" else atomic_folder)(target, overwrite=True) as place:
        if kind == "file":
            place.write(b"half"); place.flush()
        else:
            (place / "1.dcm").write_bytes(b"half")
        print("ready", flush=True)
        sys.stdin.readline()
    """
)


def start(kind, target):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    return process


def end(process):
    process.stdin.close()
    process.stdout.close()
    return process.wait(10)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_runs_leave_nothing_and_are_swept_up(tmp_path, kind):
    target = tmp_path / "result"
    process = start(kind, target)
    process.send_signal(signal.SIGKILL)
    end(process)
    assert not target.exists()
    assert all(name.startswith(".medsr-") for name in names(tmp_path))
    assert names(tmp_path)
    write(tmp_path / "other.bin")  # the next run
    assert names(tmp_path) == ["other.bin"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_live_runs_are_left_alone(tmp_path, kind):
    target = tmp_path / "result"
    process = start(kind, target)
    before = names(tmp_path)
    write(tmp_path / "other.bin")
    assert sorted([*before, "other.bin"]) == names(tmp_path)
    assert end(process) == 0
    assert names(tmp_path) == ["other.bin", "result"]


def test_sweeping_takes_only_its_own(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(10)
    host = temporary_beside(tmp_path / "x").name.split("-")[1]
    kept = [
        f".medsr-{'0' * 8}-{dead.pid}-{'a' * 12}.part",  # of another machine
        f".medsr-{host}-{os.getpid()}-{'a' * 12}.part",  # ours, alive
        f".medsr-{host}-{dead.pid}-{'a' * 12}.nii",
        f"medsr-{host}-{dead.pid}-{'a' * 12}.part",
        "scan.part",
    ]
    stale = [f".medsr-{host}-{dead.pid}-{c * 12}.{end}" for c, end in [("a", "part"), ("b", "lock")]]
    for name in (*kept, *stale):
        (tmp_path / name).write_bytes(b"x")
    folder = tmp_path / f".medsr-{host}-{dead.pid}-{'c' * 12}.part"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"x")
    assert sweep_stale(tmp_path) == 3
    assert names(tmp_path) == sorted(kept)
    assert sweep_stale(tmp_path / "missing") == 0


def test_a_locked_temporary_of_a_dead_number_is_left_alone(tmp_path):
    # Process numbers are per container; the lock is what tells there.
    fcntl = pytest.importorskip("fcntl")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(10)
    host = temporary_beside(tmp_path / "x").name.split("-")[1]
    path = tmp_path / f".medsr-{host}-{dead.pid}-{'a' * 12}.part"
    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep_stale(tmp_path) == 0
    assert sweep_stale(tmp_path) == 1

    folder, guard = path, path.with_suffix(".lock")
    folder.mkdir()
    with guard.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep_stale(tmp_path) == 0
        assert folder.exists()
    assert sweep_stale(tmp_path) == 2


def test_names_tell_neither_target_nor_machine(tmp_path):
    import socket

    name = temporary_beside(tmp_path / "Doe^Jane.nii.gz").name
    assert "Doe" not in name
    assert socket.gethostname() not in name
    assert name != temporary_beside(tmp_path / "Doe^Jane.nii.gz").name
    assert atomic._TEMPORARY.match(name)


def test_the_remedy_for_what_exists_is_that_of_the_command(tmp_path):
    target = tmp_path / "scan.bin"
    target.write_bytes(b"old")
    with pytest.raises(ArgumentsError) as refused:
        refuse_existing(target, overwrite=False)
    assert refused.value.remedy == "Give --overwrite to replace it, --skip-existing to keep it, or another -o."
    with pytest.raises(ArgumentsError) as refused:
        refuse_existing(target, overwrite=False, remedy="Move it.")
    assert refused.value.remedy == "Move it."
    # The writer does not know which options there are.
    with pytest.raises(ArgumentsError) as refused:
        write(target)
    assert refused.value.remedy == ANY_REMEDY
    assert "--skip-existing" not in ANY_REMEDY
    refuse_existing(target, overwrite=True)
