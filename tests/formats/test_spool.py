"""Slices across the stored order, through a temporary file, against numpy's own transposition."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest

from medsr_cli.errors import RunError
from medsr_cli.formats import spool
from medsr_cli.formats.spool import SliceSpool, opaque_element

SHAPE = (7, 5, 6)  # planes, lines, elements


def volume(item_bytes):
    rng = np.random.default_rng(item_bytes)
    raw = rng.integers(0, 256, (*SHAPE, item_bytes), np.uint8)
    return raw.reshape(-1).view(opaque_element(item_bytes)).reshape(SHAPE)


@pytest.fixture(params=[1, 40 << 20], ids=["plane-by-plane", "at-once"])
def _slab_size(request, monkeypatch):
    monkeypatch.setattr(spool, "SLAB_BYTES", request.param)


@pytest.mark.usefixtures("_slab_size")
@pytest.mark.parametrize("item_bytes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [1, 2])
def test_planes_in_slices_out(item_bytes, axis):
    stored = volume(item_bytes)
    with SliceSpool(SHAPE, axis, item_bytes) as turned:
        for _ in range(2):  # the file is used again for the next volume
            for first, planes in turned.slabs():
                turned.put_slab(first, stored[first : first + planes])
            for index in range(turned.slices):
                np.testing.assert_array_equal(turned.take_slice(index), np.take(stored, index, axis))
            stored = stored[::-1].copy()


@pytest.mark.usefixtures("_slab_size")
@pytest.mark.parametrize("item_bytes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [1, 2])
def test_slices_in_planes_out(item_bytes, axis):
    stored = volume(item_bytes)
    with SliceSpool(SHAPE, axis, item_bytes) as turned:
        for index in range(turned.slices):
            turned.put_slice(index, np.take(stored, index, axis))
        found = np.concatenate([turned.take_slab(first, planes) for first, planes in turned.slabs()])
    np.testing.assert_array_equal(found, stored)


def test_slabs_are_bounded_whatever_the_number_of_planes():
    with SliceSpool((10_000, 64, 64), 1, 2) as turned:
        sizes = [planes * 64 * 64 * 2 for _, planes in turned.slabs()]
    assert max(sizes) <= spool.SLAB_BYTES
    assert sum(sizes) == 10_000 * 64 * 64 * 2


def test_the_file_has_no_name(tmp_path):
    with SliceSpool(SHAPE, 1, 2, tmp_path) as turned:
        turned.put_slab(0, volume(2))
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


class FullFile:
    """A temporary file on a disk that is full after some writes."""

    def __init__(self, file, writes):
        self._file, self._left = file, writes

    def write(self, data):
        if self._left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._left -= 1
        return self._file.write(data[: max(len(data) // 2, 1)])  # and one that takes a part only

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_full_disks_and_partial_writes(monkeypatch):
    real = tempfile.TemporaryFile
    stored = volume(2)
    for writes in range(0, 400, 7):
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, n=writes, **k: FullFile(real(*a, **k), n))
        try:
            with SliceSpool(SHAPE, 1, 2) as turned:
                turned.put_slab(0, stored)
                np.testing.assert_array_equal(turned.take_slice(3), stored[:, 3])
        except RunError as error:
            sentence = error.sentence
            assert "full" in sentence
            assert writes < 300
        else:
            break
    else:
        pytest.fail("never enough room")
    assert writes > 20


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="temporary file"):
        SliceSpool(SHAPE, 1, 2, tmp_path / "missing")
