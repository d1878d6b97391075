"""A disk that is full, or breaks, at every single step: the right sentence, nothing half-done, the source untouched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from medsr_cli.errors import InputRefused, RunError
from tests.hostile.jobs import BROKEN, FULL, JOBS, Disk, clear, convert, digest, failing, is_whole, names, slices_of

ROOT = Path(__file__).resolve().parents[2]
MOST_STEPS = 4000


@pytest.mark.parametrize("number", [FULL, BROKEN], ids=["full", "broken"])
@pytest.mark.parametrize("name", JOBS)
def test_the_disk_fails_at_every_step_of_writing(name: str, number: int, tmp_path: Path) -> None:
    make, target_name = JOBS[name]
    source = make(tmp_path)
    slices, before = slices_of(source), digest(source)
    folder = tmp_path / "out"
    clear(folder)
    target = folder / target_name
    for at in range(1, MOST_STEPS):
        with Disk(at, failing(number)).in_place() as disk:
            try:
                convert(source, target)
            except RunError as error:
                sentence = error.sentence
            else:
                break
        assert ("disk is full" in sentence) == (number == FULL), sentence
        assert "\n" not in sentence
        assert digest(source) == before
        if not target.exists():
            assert names(folder) == [], f"left behind at step {at}"
            continue
        # What fails behind the rename is the folder's own flush: the result is whole, and the user is told.
        assert is_whole(target, slices)
        clear(folder)
    else:
        pytest.fail("it never came through")
    assert at == disk.count + 1
    assert at > 3
    assert is_whole(target, slices)
    assert digest(source) == before
    print(f"{name}: {at - 1} steps")


@pytest.mark.parametrize("name", ["NIfTI", "NIfTI across", "DICOM series", "DICOM multi-frame", "PNG", "TIFF", "NRRD"])
def test_the_disk_fails_at_every_step_of_reading(name: str, tmp_path: Path) -> None:
    make, target_name = JOBS[name]
    if name == "NRRD":  # a source that is NRRD, too
        convert(make(tmp_path), tmp_path / "source.nrrd")
    source = tmp_path / "source.nrrd" if name == "NRRD" else make(tmp_path)
    slices, before = slices_of(source), digest(source)
    folder = tmp_path / "out"
    clear(folder)
    target = folder / target_name
    for at in range(1, MOST_STEPS):
        with Disk(at, failing(BROKEN), reading=True).in_place() as disk:
            try:
                convert(source, target)
            except InputRefused as error:
                sentence = error.sentence
            except RunError as error:  # the result could not be read back
                sentence = error.sentence
            else:
                break
        assert "\n" not in sentence
        assert names(folder) == [], f"left behind at step {at}: {sentence}"
    else:
        pytest.fail("it never came through")
    assert at == disk.count + 1
    assert at > 2
    assert is_whole(target, slices)
    assert digest(source) == before


PROGRAM = textwrap.dedent(
    """
    import resource, signal, sys
    from pathlib import Path
    from tests.hostile.jobs import convert, JOBS
    from medsr_cli.errors import MedsrError
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3] != "0":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    try:
        convert(source, target)
    except MedsrError as error:
        print(error)
        sys.exit(error.exit_code)
    """
)


@pytest.mark.parametrize("name", ["packed NIfTI", "DICOM series", "PNG", "PNG of 48 bits", "TIFF"])
def test_a_file_that_may_not_grow(name: str, tmp_path: Path) -> None:
    """The kernel refuses the bytes, whoever writes them: also the libraries that open files on their own."""
    make, target_name = JOBS[name]
    source = make(tmp_path)
    before = digest(source)
    folder = tmp_path / "out"
    clear(folder)
    done = run(source, folder / target_name, 500)
    assert done.returncode == 1, done
    assert "failed" in done.stdout or "full" in done.stdout
    assert "Traceback" not in done.stderr
    assert names(folder) == []
    assert digest(source) == before


def run(source: Path, target: Path, most_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), str(most_bytes)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system with room for 48 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], check=False)
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", ["NIfTI", "NIfTI across", "DICOM series", "PNG of 48 bits", "PNG", "TIFF", "MGZ"])
def test_a_real_disk_that_is_full(name: str, tmp_path: Path, small_disk: Path) -> None:
    make, target_name = JOBS[name]
    source = make(tmp_path)
    before = digest(source)
    fill = small_disk / "other people's"
    fill.write_bytes(bytes(44 << 10))
    done = run(source, small_disk / target_name)
    assert done.returncode == 1, done
    assert "disk is full" in done.stdout, done
    assert names(small_disk) == [fill.name]
    assert digest(source) == before
