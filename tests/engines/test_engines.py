"""The engine contract, for every engine: shape, independence of batching, inputs untouched, no hidden gain."""

from __future__ import annotations

import numpy as np
import pytest

from medsr_cli.engines.devices import find_device
from medsr_cli.engines.engine import Engine, Interpolation
from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.engines.onnx_file import checked_onnx
from medsr_cli.engines.onnx_runner import OnnxRunner
from medsr_cli.errors import ArgumentsError
from tests.engines.onnx_models import nearest
from tests.makers import almost_nearest, torch_engine


def onnx_engine(tile: int | None = None) -> Engine:
    file = checked_onnx(nearest().SerializeToString(), "nearest.onnx")
    return NetworkEngine(OnnxRunner(file, device="cpu"), file.traits, tile=tile)


MAKERS = {
    "bicubic": lambda: Interpolation("cubic", 2),
    "lanczos": lambda: Interpolation("lanczos", 2),
    "torch": lambda: torch_engine(almost_nearest(2), 2),
    "torch-tiled": lambda: torch_engine(almost_nearest(2), 2, tile=64),
    "onnx": onnx_engine,
    "onnx-tiled": lambda: onnx_engine(tile=64),
}


@pytest.fixture(params=MAKERS)
def engine(request) -> Engine:
    return MAKERS[request.param]()


@pytest.mark.parametrize("size", [(24, 16), (5, 31), (70, 130)])
def test_enlarges_to_the_promised_size_and_leaves_its_input_alone(engine, size):
    planes = np.random.default_rng(0).random((2, 1, *size))
    given = planes.copy()
    result = engine.run(planes).planes
    assert result.shape == (2, 1, 2 * size[0], 2 * size[1])
    assert np.array_equal(planes, given)
    assert np.isfinite(result).all()


def test_batching_does_not_matter(engine):
    planes = np.random.default_rng(1).random((3, 1, 20, 24))
    alone = np.concatenate([engine.run(plane[None]).planes for plane in planes])
    np.testing.assert_allclose(engine.run(planes).planes, alone, atol=1e-6)


def test_the_same_twice_is_the_same(engine):
    planes = np.random.default_rng(2).random((1, 1, 24, 24))
    assert np.array_equal(engine.run(planes).planes, engine.run(planes).planes)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos"])
@pytest.mark.parametrize("scale", [1.5, 2, 3.7, 8])
def test_interpolation_keeps_constants_and_lines(kernel, scale):
    engine = Interpolation(kernel, scale)
    assert engine.run(np.full((1, 1, 9, 12), 0.3)).planes == pytest.approx(0.3, abs=1e-12)
    ramp = np.broadcast_to(np.arange(40.0), (1, 1, 8, 40))
    result = engine.run(ramp).planes[0, 0, 4]
    n = result.size
    expected = (np.arange(n) + 0.5) * 40 / n - 0.5
    inner = slice(n // 4, 3 * n // 4)
    assert np.abs(result[inner] - expected[inner]).max() < 0.06


def test_tiled_is_close_to_whole_on_a_network():
    planes = np.random.default_rng(3).random((1, 1, 128, 96))
    whole = torch_engine(almost_nearest(2), 2).run(planes).planes
    tiled = torch_engine(almost_nearest(2), 2, tile=64).run(planes).planes
    assert np.abs(whole - tiled).max() < 0.02 * np.ptp(whole)


def test_odd_requests_are_refused():
    with pytest.raises(ArgumentsError):
        find_device("toaster")
    with pytest.raises(ArgumentsError):
        torch_engine(almost_nearest(2), 2, tile=8)
    with pytest.raises(ArgumentsError):
        torch_engine(almost_nearest(2), 2, precision="fp16")
