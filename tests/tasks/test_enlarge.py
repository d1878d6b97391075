"""The streaming core with an engine that does nothing: values, types and masks come back exactly."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsr_cli import formats
from medsr_cli.engines.engine import Enlarged, Interpolation
from medsr_cli.engines.wrapped import Colours, Ensemble
from medsr_cli.errors import QualityGateFailed, RunError
from medsr_cli.formats.contract import Derivation
from medsr_cli.tasks.enlarge import CONSISTENCY, SPREAD, Enlarger, Stream, nearest_indices
from medsr_cli.tasks.maps import map_volume
from medsr_cli.tasks.progress import Silent
from medsr_cli.volume.intensity import IntensityRange, measure, store
from medsr_cli.volume.resample import axis_weights, resize
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
        (lambda planes: np.where(planes > 0.9, -np.inf, planes), "not numbers"),
        (lambda planes: np.where(planes > 0.9, np.inf, planes), "not numbers"),
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


# -- colours --------------------------------------------------------------------------------------------------


class Network(Identity):
    """What stands for a network: any number of channels, a function of the doubled planes, a first stage."""

    name = "torch"

    def __init__(self, channels=1, change=lambda planes: planes) -> None:
        self.channels, self.change, self.seen = channels, change, []

    def size_of(self, rows, columns):
        return 2 * rows, 2 * columns

    def run(self, planes, guide=None):
        assert planes.shape[1] == self.channels
        self.seen.append(planes.copy())
        large = resize(planes.astype(np.float64), (2 * planes.shape[-2], 2 * planes.shape[-1]))
        return Enlarged(self.change(large).astype(np.float32), {"intermediate": planes.astype(np.float32)})


def doubled(array, network, extras=(), **fields):
    """An array through a network as `medsr upscale` wraps it: pixels, what was measured, maps by name."""
    memory = Memory(array, **fields)
    volume = memory.volume
    result = volume.enlarged(2 * volume.rows, 2 * volume.columns)
    grids = {SPREAD: map_volume(result), CONSISTENCY: map_volume(volume), "intermediate": volume}
    maps = {name: (grids[name], Memory(np.zeros((1, 1, 1, 1)))) for name in extras}
    intensity = measure(memory.slices(), volume.padding, volume.alpha)
    stream = Stream(memory, result, intensity, memory, extras=maps)
    Enlarger([stream], network).run(Silent())
    return np.stack(memory.taken), stream.measured, {name: np.stack(maps[name][1].taken) for name in extras}


def sharpened(planes):
    """More contrast, as a network makes it: not linear, so that it acts differently on each colour."""
    return np.clip(planes, 0, 1) ** 1.2


def doppler(slices=2):
    """Speckle in grey, with a red, a blue and an orange field: their hues, and where these are."""
    rng = np.random.default_rng(20)
    image = np.repeat(rng.integers(0, 180, (slices, 1, 40, 48)), 3, axis=1).astype(np.uint8)
    fields = {(255, 20, 20): (4, 4), (10, 40, 240): (22, 4), (230, 120, 10): (4, 28)}
    for colour, (row, column) in fields.items():
        image[:, :, row : row + 14, column : column + 16] = np.array(colour).reshape(1, 3, 1, 1)
    return image, fields


def hue_deg(rgb):
    r, g, b = (float(plane.mean()) for plane in rgb)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)))


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_keep_their_hue_whatever_a_network_does(channels):
    """A network that takes each colour for itself turned them: by four degrees here."""
    image, fields = doppler()
    tinting = np.array([1.0, 0.93, 1.05]).reshape(1, 3, 1, 1) if channels == 3 else 1.0
    result, measured, _ = doubled(image, Colours(Network(channels, lambda p: sharpened(p) * tinting)))
    for colour, (row, column) in fields.items():
        inner = result[:, :, 2 * row + 8 : 2 * row + 20, 2 * column + 8 : 2 * column + 24].astype(float)
        for pixel in inner.transpose(0, 2, 3, 1).reshape(-1, 3):
            assert hue_deg(pixel) == pytest.approx(hue_deg(np.array(colour)), abs=0.5)
    assert measured.consistency.correlation > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_colours_stay_grey_to_the_last_bit(channels):
    grey = np.random.default_rng(21).integers(0, 4096, (3, 1, 12, 14)).astype(np.uint16)
    tinting = np.arange(1, channels + 1).reshape(1, -1, 1, 1) * 0.02
    network = Network(channels, lambda p: sharpened(p) + tinting)
    coloured, measured, _ = doubled(np.repeat(grey, 3, axis=1), Colours(network))
    np.testing.assert_array_equal(coloured[:, 0], coloured[:, 1])
    np.testing.assert_array_equal(coloured[:, 2], coloured[:, 1])
    if channels == 1:
        alone, of_grey, _ = doubled(grey, Colours(network))
        np.testing.assert_array_equal(coloured[:, :1], alone)
        assert measured.consistency.report(1.0) == of_grey.consistency.report(1.0)
        assert measured.clipped == 3 * of_grey.clipped
    assert sum(len(planes) for planes in network.seen) == (6 if channels == 1 else 3)  # one plane for each slice


def test_a_network_of_three_channels_gets_rgb_and_decides_the_luminance_alone():
    image, _ = doppler()
    network = Network(3, lambda planes: planes[:, ::-1])  # red and blue exchanged
    result, _, _ = doubled(image, Colours(network))
    low, high = int(image.min()), int(image.max())
    np.testing.assert_allclose(np.concatenate(network.seen), (image - float(low)) / (high - low))
    large = resize(image.astype(np.float64), (80, 96))
    share = np.array([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    wanted = large + ((large[:, ::-1] - large) * share).sum(axis=1, keepdims=True)
    fits = ((wanted >= 0) & (wanted <= 255)).all(axis=1, keepdims=True) & np.ones((1, 3, 1, 1), bool)
    assert fits.mean() > 0.5
    np.testing.assert_allclose(result[fits], wanted[fits], atol=0.51)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos"])
def test_baselines_act_on_each_colour(kernel):
    image, _ = doppler()
    result, measured, _ = doubled(image, Colours(Interpolation(kernel, 2.0)))
    large = resize(image.astype(np.float64), (80, 96), kernel)
    np.testing.assert_allclose(result, np.clip(large, 0, 255), atol=0.51)
    assert measured.clipped == int(((np.rint(large) < 0) | (np.rint(large) > 255)).sum())
    assert measured.consistency.own.pixels == image.size  # each colour is compared


def test_opacity_and_holes_of_colours_stay():
    image, _ = doppler()
    alpha = np.random.default_rng(22).integers(0, 256, (2, 1, 40, 48)).astype(np.uint8)
    result, _, _ = doubled(np.concatenate((image, alpha), axis=1), Colours(Network()), alpha=True)
    expected, _ = store(resize(alpha.astype(np.float64), (80, 96)), np.dtype(np.uint8))
    np.testing.assert_array_equal(result[:, 3:], expected)
    holes = image.astype(np.float32)
    holes[0, :, 10, 10] = np.nan
    result, _, _ = doubled(holes, Colours(Network()))
    assert np.isnan(result[0, :, 20:22, 20:22]).all()
    assert np.isfinite(result).sum() == result.size - 12


def test_maps_and_first_stages_of_colours_are_those_of_the_luminance():
    image, _ = doppler()

    class Leaning(Network):
        def run(self, planes, guide=None):
            made = super().run(planes)
            made.planes[..., 0, :] += 0.001
            return made

    extras = (SPREAD, CONSISTENCY, "intermediate")
    _, measured, maps = doubled(image, Ensemble(Colours(Leaning())), extras)
    width = float(image.max()) - float(image.min())
    assert maps[SPREAD].shape == (2, 1, 80, 96)
    assert maps[SPREAD][0, 0, 0, 48] == pytest.approx(width * 0.001 * np.sqrt(0.25 * 0.75), rel=1e-3)
    assert measured.spread[1] == pytest.approx(maps[SPREAD].max())
    assert maps[CONSISTENCY].shape == (2, 1, 40, 48)
    np.testing.assert_allclose(maps["intermediate"], image, atol=1)
    # Deviations of three colours that go together are the deviation of the luminance.
    _, _, of_colours = doubled(image, Ensemble(Colours(Leaning(3))), extras)
    np.testing.assert_allclose(of_colours[SPREAD], maps[SPREAD], atol=1e-4)
    np.testing.assert_allclose(of_colours["intermediate"], image, atol=1)


# -- overlapped, and stopped ----------------------------------------------------------------------------------


class Sleepy(Identity):
    """An engine whose only cost is time."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def run(self, planes, guide=None):
        time.sleep(self.pause_s * len(planes))
        return Enlarged(planes.copy())

    def batch_of(self, rows, columns):
        return 2


def test_reading_running_and_writing_overlap():
    """Three stages of 5 ms for each of 60 slices: 0.9 s one after the other."""
    memory = Memory(np.random.default_rng(8).integers(0, 900, (60, 1, 8, 8)).astype(np.int16))
    slices, write = memory.slices, memory.write
    memory.slices = lambda: ((time.sleep(0.005), pixels)[1] for pixels in slices())
    memory.write = lambda pixels: (time.sleep(0.005), write(pixels))[1]
    intensity = measure(slices(), None)
    started = time.perf_counter()
    Enlarger([Stream(memory, memory.volume, intensity, memory)], Sleepy(0.005)).run(Silent())
    assert time.perf_counter() - started < 0.65
    np.testing.assert_array_equal(np.stack(memory.taken), memory.array)


def test_large_slices_do_not_queue_up(monkeypatch):
    """What is read ahead of what was written: a batch in the hands of each thread and one in each queue."""
    monkeypatch.setattr("medsr_cli.tasks.enlarge.AHEAD_BYTES", 10_000)
    monkeypatch.setattr("medsr_cli.tasks.enlarge.RESULT_BYTES", 10_000)
    monkeypatch.setattr("medsr_cli.tasks.enlarge.STORED_BYTES", 10_000)
    memory = Memory(np.random.default_rng(9).integers(0, 900, (60, 1, 64, 64)).astype(np.int16))
    intensity = measure(memory.slices(), None)
    memory.read, ahead = 0, []
    write = memory.write
    memory.write = lambda pixels: (time.sleep(0.003), ahead.append(memory.read - len(memory.taken)), write(pixels))[2]
    Enlarger([Stream(memory, memory.volume, intensity, memory)], Sleepy(0)).run(Silent())
    assert max(ahead) <= 2 * 5 + 2  # batches of two; before the writer single slices
    assert len(memory.taken) == 60


def test_progress_tells_what_the_writer_has():
    memory = Memory(np.random.default_rng(10).integers(0, 900, (30, 1, 8, 8)).astype(np.int16))
    write = memory.write
    memory.write = lambda pixels: (time.sleep(0.002), write(pixels))[1]
    told: list[tuple[int, int]] = []

    class Heard(Silent):
        def slices(self, done, total):
            told.append((done, len(memory.taken)))
            assert total == 30

    Enlarger([Stream(memory, memory.volume, measure(memory.slices(), None), memory)], Identity()).run(Heard())
    assert all(done <= written for done, written in told)
    assert told[-1] == (30, 30)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def opened(folder: Path, dtype=np.int16):
    array = np.random.default_rng(11).integers(0, 900, (8, 9, 40)).astype(dtype)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "in.nii.gz")
    return formats.open_image(folder / "in.nii.gz")


def broken_after(number: int, error: BaseException):
    """A function that raises on its call of that number, and otherwise gives back what it got."""
    calls = []

    def call(item):
        calls.append(item)
        if len(calls) == number:
            raise error
        return item

    return call


@pytest.mark.parametrize("where", ["reader", "engine", "finishing", "writer", "interrupt"])
@pytest.mark.parametrize("at", [1, 17, 40])
def test_an_error_anywhere_leaves_nothing_and_nobody(tmp_path, monkeypatch, where, at):
    reader = opened(tmp_path)
    wanted: type[BaseException] = KeyboardInterrupt if where == "interrupt" else RunError
    raising = broken_after(at, wanted("broken"))
    intensity = measure(reader.slices(), None)
    engine = Identity()
    engine.batch_of = lambda rows, columns: 1
    if where == "reader":
        slices = reader.slices
        reader.slices = lambda: (raising(pixels) for pixels in slices())
    elif where in ("engine", "interrupt"):
        engine.run = lambda planes, guide=None: Enlarged(raising(planes).copy())
    elif where == "finishing":
        restored = IntensityRange.restored
        monkeypatch.setattr(IntensityRange, "restored", lambda self, unit, *rest: restored(self, raising(unit), *rest))

    def run_it() -> None:
        result = reader.volume
        derivation = Derivation("copy", (1, 1), "test")
        with formats.create_image(tmp_path / "out.nii.gz", reader, result, derivation, overwrite=False) as writer:
            if where == "writer":
                write = writer.write
                writer.write = lambda pixels: write(raising(pixels))
            Enlarger([Stream(reader, result, intensity, writer)], engine).run(Silent())

    before = set(threading.enumerate())  # other tests' may be ending
    with pytest.raises(wanted, match="broken"):
        run_it()
    assert [path.name for path in tmp_path.iterdir()] == ["in.nii.gz"]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("medsr")]


# -- faster, with the same values -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
@pytest.mark.parametrize("shape", [(1, 700, 611), (3, 5, 7), (1, 2, 200_000), (1, 0, 4)])
@pytest.mark.parametrize("unit_type", [np.float32, np.float64])
def test_rows_at_a_time_give_the_same_values(dtype, shape, unit_type):
    unit = (np.random.default_rng(12).random(shape) * 1.2 - 0.1).astype(unit_type)
    intensity = IntensityRange(-40.0, 260.0)
    expected, clipped = store(intensity.denormalise(unit), np.dtype(dtype), -20, 250)
    pixels, counted = intensity.restored(unit, np.dtype(dtype), -20, 250)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == expected.dtype
    assert counted == clipped
    assert clipped > 0 or dtype == "f4" or not unit.size


@pytest.mark.parametrize(("n", "n_new"), [(300, 1200), (512, 1024), (1200, 300), (517, 131), (260, 261), (1, 70_000)])
@pytest.mark.parametrize("kernel", ["cubic", "lanczos"])
def test_bands_give_the_whole_product(n, n_new, kernel):
    image = np.random.default_rng(13).random((2, n, 40))
    weights = axis_weights(n, n_new, kernel)
    expected = np.einsum("ij,cjk->cik", weights, resize(image, (n, 57), kernel))
    np.testing.assert_allclose(resize(image, (n_new, 57), kernel), expected, rtol=0, atol=2e-15)
    across = resize(np.ascontiguousarray(image.swapaxes(1, 2)), (57, n_new), kernel)
    np.testing.assert_allclose(across, resize(image, (n_new, 57), kernel).swapaxes(1, 2), rtol=0, atol=2e-15)
