"""The streaming core with an engine that does nothing: values, types and masks come back exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsr_cli.errors import QualityGateFailed
from medsr_cli.tasks.enlarge import Enlarger, nearest_indices
from medsr_cli.tasks.progress import Silent
from medsr_cli.volume.intensity import measure
from medsr_cli.volume.volume import Volume


class Identity:
    """An engine of scale 1."""

    name, device, precision, channels, scale = "identity", "cpu", "float64", 1, 1.0

    def run(self, planes: np.ndarray) -> np.ndarray:
        return planes.copy()

    def batch_of(self, rows: int, columns: int) -> int:
        return 4


class Spoiled(Identity):
    """An engine whose result is spoiled by a function."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def run(self, planes: np.ndarray) -> np.ndarray:
        return self.spoil(planes)


class Memory:
    """A reader of an array (slices, channels, rows, columns) and a writer into a list."""

    path = Path("memory")

    def __init__(self, array: np.ndarray, **fields) -> None:
        self.array, self.read, self.taken, self.clipped, self.warnings = array, 0, [], 0, ()
        slices, channels, rows, columns = array.shape
        self.volume = Volume("nifti", rows, columns, slices, array.dtype, channels=channels, **fields)

    def slices(self):
        for pixels in self.array:
            self.read += 1
            yield pixels

    def details(self):
        return {}

    def write(self, pixels: np.ndarray) -> None:
        self.taken.append(pixels)


def run(memory: Memory, engine: Identity):
    volume = memory.volume
    intensity = measure(memory.slices(), volume.padding, volume.alpha)
    result = volume.enlarged(volume.rows, volume.columns)
    return Enlarger(memory, result, engine, intensity).run(memory, Silent())


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4"])
@pytest.mark.parametrize("channels", [1, 3])
def test_identity_gives_back_every_value(dtype, channels):
    kind = np.dtype(dtype)
    rng = np.random.default_rng(0)
    if kind.kind == "f":
        array = rng.normal(0, 400, (7, channels, 9, 11)).astype(kind)
    else:
        limits = np.iinfo(kind)
        array = rng.integers(limits.min, limits.max, (7, channels, 9, 11), dtype=kind, endpoint=True)
    memory = Memory(array)
    measured = run(memory, Identity())
    assert measured.clipped == 0
    np.testing.assert_array_equal(np.stack(memory.taken), array)
    assert memory.taken[0].dtype == kind
    assert measured.consistency.correlation == pytest.approx(1)


def test_alpha_padding_and_nan_are_put_back():
    rng = np.random.default_rng(1)
    array = rng.integers(0, 900, (3, 1, 8, 8)).astype(np.int16)
    array[:, :, :2] = -2000
    memory = Memory(array, padding=-2000.0)
    measured = run(memory, Spoiled(lambda planes: planes + 0.01))
    result = np.stack(memory.taken)
    assert (result[:, :, :2] == -2000).all()
    assert (result[:, :, 2:] > array[:, :, 2:] - 1).all()
    assert measured.intensity.minimum >= 0
    coloured = Memory(rng.integers(0, 255, (2, 4, 8, 8)).astype(np.uint8), alpha=True)
    run(coloured, Spoiled(lambda planes: planes * 0.98))
    np.testing.assert_array_equal(np.stack(coloured.taken)[:, 3], coloured.array[:, 3])


def test_saturation_is_counted():
    array = np.array([[[[0, 255], [100, 200]]]], np.uint8)
    memory = Memory(array)
    measured = run(memory, Spoiled(lambda planes: planes + 0.02 * (planes > 0.9)))
    assert measured.clipped == 1
    assert np.stack(memory.taken).max() == 255


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda planes: planes * np.nan, "not numbers"),
        (lambda planes: planes * 0 + 0.5, "constant"),
        (lambda planes: planes + 0.3, "mean of slice"),
    ],
)
def test_a_broken_result_fails_the_run(spoil, said):
    array = np.random.default_rng(2).integers(0, 900, (2, 1, 8, 8)).astype(np.int16)
    with pytest.raises(QualityGateFailed, match=said):
        run(Memory(array), Spoiled(spoil))


def test_constant_slices_do_not_pile_up():
    """A long empty stretch once waited in memory for the first slice with something in it."""
    array = np.zeros((200, 1, 4, 4), np.int16)
    array[-1, 0, 0, 0] = 9
    memory = Memory(array)
    intensity = measure(memory.slices(), None)
    memory.read = 0
    ahead: list[int] = []
    write = memory.write
    memory.write = lambda pixels: (ahead.append(memory.read - len(memory.taken)), write(pixels))[1]
    Enlarger(memory, memory.volume.enlarged(4, 4), Identity(), intensity).run(memory, Silent())
    assert len(memory.taken) == 200
    assert max(ahead) < 40


def test_nearest_indices_cover_and_centre():
    assert nearest_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_indices(4, 4).tolist() == [0, 1, 2, 3]
    assert nearest_indices(5, 2).tolist() == [1, 3]
