"""Every exception that a library raises about an input becomes one sentence and exit code 6."""

from __future__ import annotations

import errno
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medsr_cli.errors import InputRefused, RunError
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.bounded import open_bounded
from medsr_cli.formats.dicom_files import refusing as refusing_dicom
from medsr_cli.formats.tiff_pages import count_pages

PATIENT = "CANARY^PATIENT"
RAISED = [
    RecursionError(PATIENT), MemoryError(PATIENT), struct.error(PATIENT), zlib.error(PATIENT), AssertionError(PATIENT),
    UnicodeDecodeError("utf-8", b"CANARY", 0, 1, PATIENT), SystemError(PATIENT), KeyError(PATIENT), OSError(PATIENT),
    FileNotFoundError(errno.ENOENT, "No such file", PATIENT), PermissionError(errno.EACCES, "Denied", PATIENT),
    OSError(errno.EIO, os.strerror(errno.EIO), PATIENT), OverflowError(PATIENT), NotImplementedError(PATIENT),
    EOFError(PATIENT), StopIteration(PATIENT), ZeroDivisionError(PATIENT), ImportError(PATIENT), BufferError(PATIENT),
]  # fmt: skip


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("of_dicom", [False, True])
def test_whatever_is_raised_is_one_sentence(error: Exception, of_dicom: bool) -> None:
    boundary = refusing_dicom("a.dcm", "reading") if of_dicom else refusing(Path("folder/a.dcm"), "is damaged", "Look.")
    with pytest.raises(InputRefused) as refused, boundary:
        raise error
    assert refused.value.exit_code == 6
    assert refused.value.__cause__ is error
    says = str(refused.value)
    assert says.startswith("a.dcm ")
    assert "CANARY" not in says
    assert "\n" not in says
    assert refused.value.sentence.endswith(".")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_and_exits_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), refusing(Path("a")):
        raise error


def test_sentences_pass() -> None:
    with pytest.raises(RunError, match="The disk is full"), refusing(Path("a")):
        raise RunError("The disk is full.")


def test_the_systems_own_words_are_kept_and_those_of_libraries_are_not() -> None:
    with pytest.raises(InputRefused, match="cannot be read: Input/output error"), refusing("a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(InputRefused, match="is damaged or cut short"), refusing("a"):
        raise OSError("image file is truncated (3 bytes not processed)")


@given(
    st.binary(max_size=30_000), st.lists(st.tuples(st.integers(-40_000, 40_000), st.integers(-1, 1 << 40)), max_size=8)
)
def test_a_bounded_file_reads_what_a_file_reads(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, steps: list
) -> None:
    path = tmp_path_factory.mktemp("bounded") / "a"
    path.write_bytes(data)
    plain = io.BytesIO(data)
    with open_bounded(path) as file:
        for seek, size in steps:
            at = max(seek, 0)
            assert file.seek(at) == plain.seek(at)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()
        file.seek(0)
        assert file.read() == data


def test_a_bounded_file_takes_no_memory_for_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    tracemalloc.start()
    try:
        with open_bounded(tmp_path / "a") as file:
            assert file.read(1 << 28) == b"abc"
            assert file.read(1 << 28) == b""
        with (tmp_path / "a").open("rb") as file:
            before = tracemalloc.get_traced_memory()[1]
            file.read(1 << 26)
            assert tracemalloc.get_traced_memory()[1] >= 1 << 26, "Python does not do so any more: drop BoundedFile"
    finally:
        tracemalloc.stop()
    assert before < 1 << 20


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("pages", [1, 2, 7])
def test_pages_are_counted_as_pillow_counts_them(pages: int, big: bool, tmp_path: Path) -> None:
    images = [Image.new("L", (4, 3)) for _ in range(pages)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:], big_tiff=big)
    with Image.open(tmp_path / "a.tif") as image:
        assert count_pages(tmp_path / "a.tif", 100) == image.n_frames == pages
    assert count_pages(tmp_path / "a.tif", 0) == 1
    (tmp_path / "b.tif").write_bytes(b"II*\0\x08")
    with pytest.raises(ValueError, match="header"):
        count_pages(tmp_path / "b.tif", 1)
