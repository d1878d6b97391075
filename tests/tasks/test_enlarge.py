"""The streaming core with an engine that does nothing: values, types and masks come back exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsr_cli.engines.engine import Enlarged
from medsr_cli.engines.wrapped import Ensemble
from medsr_cli.errors import QualityGateFailed
from medsr_cli.tasks.enlarge import SPREAD, Enlarger, Stream, nearest_indices
from medsr_cli.tasks.maps import map_volume
from medsr_cli.tasks.progress import Silent
from medsr_cli.volume.intensity import measure
from medsr_cli.volume.volume import Volume


class Identity:
    """An engine of scale 1."""

    name, device, precision, channels, guided, warnings = "identity", "cpu", "float64", 0, False, ()

    def size_of(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns

    def run(self, planes: np.ndarray, guide: np.ndarray | None = None) -> Enlarged:
        return Enlarged(planes.copy())

    def turned(self):
        return self

    def batch_of(self, rows: int, columns: int) -> int:
        return 4


class Spoiled(Identity):
    """An engine whose result is spoiled by a function."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def run(self, planes: np.ndarray, guide: np.ndarray | None = None) -> Enlarged:
        return Enlarged(self.spoil(planes))


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
    stream = Stream(memory, result, intensity, memory)
    Enlarger([stream], engine).run(Silent())
    return stream.measured


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
        (lambda planes: planes + 3 * (-1.0) ** np.arange(8), "far beyond"),
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
    Enlarger([Stream(memory, memory.volume.enlarged(4, 4), intensity, memory)], Identity()).run(Silent())
    assert len(memory.taken) == 200
    assert max(ahead) < 40


def test_nearest_indices_cover_and_centre():
    assert nearest_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_indices(4, 4).tolist() == [0, 1, 2, 3]
    assert nearest_indices(5, 2).tolist() == [1, 3]


def test_registered_images_go_through_side_by_side():
    """Each keeps its own range and type, and a slice that is empty in one of them alone stays so exactly."""
    rng = np.random.default_rng(5)
    t1 = Memory(rng.integers(0, 900, (3, 1, 8, 9)).astype(np.int16))
    t2 = Memory(rng.normal(50, 9, (3, 1, 8, 9)).astype(np.float32))
    t1.array[1] = 7
    seen = []

    class Joint(Identity):
        channels = 2

        def run(self, planes, guide=None):
            seen.append(planes)
            return Enlarged(planes.copy())

    streams = [Stream(m, m.volume, measure(m.slices(), None), m) for m in (t1, t2)]
    Enlarger(streams, Joint()).run(Silent())
    for memory in (t1, t2):
        np.testing.assert_array_equal(np.stack(memory.taken), memory.array)
    planes = np.concatenate(seen)
    assert planes.shape == (3, 2, 8, 9)
    assert planes.min() >= 0
    assert planes.max() <= 1
    assert streams[0].measured.constant_slices == 1
    assert streams[1].measured.constant_slices == 0


def test_a_guide_arrives_with_its_slice():
    array = np.random.default_rng(6).integers(0, 900, (20, 1, 6, 6)).astype(np.int16)
    memory = Memory(array)

    class Guide:
        def slices(self):
            for number in range(20):
                yield np.full((6, 6), number, np.float32)

    class Guided(Identity):
        guided = True

        def run(self, planes, guide=None):
            assert guide.shape == planes.shape
            for plane, level in zip(planes[:, 0], guide[:, 0, 0, 0], strict=True):
                expected = (array[int(level), 0] - array.min()) / (int(array.max()) - int(array.min()))
                np.testing.assert_allclose(plane, expected)
            return Enlarged(planes.copy())

    Enlarger([Stream(memory, memory.volume, measure(memory.slices(), None), memory)], Guided(), Guide()).run(Silent())
    assert len(memory.taken) == 20


def test_the_spread_of_an_ensemble_is_in_units_of_the_image():
    array = np.random.default_rng(7).integers(0, 1000, (2, 1, 8, 8)).astype(np.int16)
    array[0, 0, 0, 0], array[0, 0, 0, 1] = 0, 1000
    memory = Memory(array, padding=-1.0, value_scale=(2.0, -5.0))
    memory.array[1, 0, 3, 3] = -1

    class Leaning(Identity):
        """Adds a thousandth of the range to the first row, whichever way up the slice lies."""

        def run(self, planes, guide=None):
            planes = planes.copy()
            planes[..., 0, :] += 0.001
            return Enlarged(planes)

    grid = map_volume(memory.volume)
    maps = Memory(np.zeros((1, 1, 8, 8), np.float32))
    stream = Stream(memory, memory.volume, measure(memory.slices(), -1.0), memory, extras={SPREAD: (grid, maps)})
    Enlarger([stream], Ensemble(Leaning())).run(Silent())
    spread = np.stack(maps.taken)
    assert spread.dtype == np.float32
    # Of eight orientations two raise each edge (a corner lies on two of them): deviation of a share of 1/4.
    width = stream.intensity.width
    assert spread[0, 0, 0, 4] == pytest.approx(2 * width * 0.001 * np.sqrt(0.25 * 0.75), rel=1e-4)
    assert spread[0, 0, 4, 4] == pytest.approx(0, abs=1e-4)
    assert spread[1, 0, 3, 3] == 0
    assert stream.measured.spread[1] >= spread.max() * 0.999
