"""Lists of inputs as `find`, Windows and mistakes write them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError
from medsr_cli.tasks import file_lists
from medsr_cli.tasks.file_lists import paths_from


def listed(tmp_path: Path, data: bytes, **how) -> list[Path]:
    file = tmp_path / "list"
    file.write_bytes(data)
    return list(paths_from(str(file), **how))


@pytest.mark.parametrize(
    ("data", "nul", "expected"),
    [
        (b"a.nii\nb c.nii\n", False, ["a.nii", "b c.nii"]),
        (b"a.nii\nlast", False, ["a.nii", "last"]),
        (b"a.nii\r\nb.nii\r\n", False, ["a.nii", "b.nii"]),
        (b"\n\na.nii\n  \n\r\nb.nii\n\n", False, ["a.nii", "b.nii"]),
        (b"\xef\xbb\xbfa.nii\n", False, ["a.nii"]),
        (b" leading\ntrailing \n", False, [" leading", "trailing "]),
        (b"a\r\0b\nc\0\0 \0", True, ["a\r", "b\nc", " "]),
        ("Müller\n".encode(), False, ["Müller"]),
        (b"", False, []),
    ],
)
def test_what_stands_in_a_list(tmp_path, data, nul, expected):
    assert listed(tmp_path, data, nul=nul) == [Path(name) for name in expected]


@pytest.mark.skipif(sys.platform == "win32", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize("find", [["-print"], ["-print0"]])
def test_what_find_wrote_is_found_again(tmp_path, find):
    names = [b"plain", b"sp ace", b"M\xfcller latin-1", "Müller".encode(), b"quo\"te'", b"-dash", b"tab\there"]
    names += [b"new\nline", b"cr\r"] if find == ["-print0"] else []
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"")
    found = subprocess.run(["find", str(folder), "-type", "f", *find], capture_output=True, check=True).stdout
    paths = listed(tmp_path, found, nul=find == ["-print0"])
    assert {os.fsencode(path.name) for path in paths} == set(names)
    assert all(path.is_file() for path in paths)


@given(
    names=st.lists(st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b), max_size=30),
    block=st.integers(1, 64),
)
def test_any_bytes_come_through_once_and_in_order_whatever_the_blocks(names, block):
    stdin = SimpleNamespace(buffer=io.BytesIO(b"\0".join(names)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(file_lists, "BLOCK_BYTES", block)
        paths = list(paths_from("-", nul=True))
    expected = dict.fromkeys(os.fsencode(Path(os.fsdecode(name))) for name in names)
    assert [os.fsencode(path) for path in paths] == list(expected)
    assert not stdin.buffer.closed


def test_paths_are_handed_on_before_the_list_ends(monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, b"first\nsecond")
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        paths = paths_from("-")
        assert next(paths) == Path("first")
        os.close(writing)
        assert list(paths) == [Path("second")]


def test_a_path_that_stands_there_twice_is_taken_once_and_said(tmp_path):
    said: list[str] = []
    assert listed(tmp_path, b"a\nb\na\n./b\n", say=said.append) == [Path("a"), Path("b")]
    assert said == ["2 lines repeat paths that the list had before; each path is taken once."]


@pytest.mark.parametrize(
    ("data", "nul", "says"),
    [
        ("a.nii\n".encode("utf-16"), False, "UTF-16"),
        (b"a\0b\0", False, "-0"),
        (b"x" * 70_000, False, "more than 65536 bytes"),
        (b"a\n" * 70_000, True, "Leave -0 away"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, data, nul, says):
    with pytest.raises(ArgumentsError, match=says):
        listed(tmp_path, data, nul=nul)


def test_a_list_that_is_not_there_is_refused_with_its_name_marked(tmp_path):
    with pytest.raises(InputRefused) as refused:
        list(paths_from(str(tmp_path / "Doe_John.txt")))
    assert "\u2068Doe_John.txt\u2069" in refused.value.sentence


@given(data=st.binary(max_size=300), nul=st.booleans())
def test_nothing_but_our_own_errors_comes_out_of_any_bytes(data, nul):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        with contextlib.suppress(MedsrError):
            list(paths_from("-", nul=nul))


MEASURED = """
import sys, tracemalloc
from medsr_cli.tasks.file_lists import paths_from
tracemalloc.start()
count = sum(1 for _ in paths_from(sys.argv[1]))
print(count, tracemalloc.get_traced_memory()[1])
"""


def test_many_lines_cost_little_memory(tmp_path):
    lines = 50_000
    file = tmp_path / "list"
    file.write_bytes(b"".join(b"/archive/2024/patients/study-%08d/image.nii.gz\n" % number for number in range(lines)))
    # In a process of its own: threads that other tests have left allocate, too.
    command = [sys.executable, "-c", MEASURED, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    count, peak = (int(word) for word in done.stdout.split())
    assert count == lines
    assert peak / lines < 200, "a million lines must stay below 200 MB"
