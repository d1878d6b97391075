"""Engines around engines: orientation, colours, back projection and the way down, each against what it must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsr_cli.engines.engine import Enlarged, Interpolation
from medsr_cli.engines.wrapped import (
    BackProjected,
    Colours,
    Ensemble,
    Fitted,
    Realigned,
    back_project,
    orient,
    orient_back,
)
from medsr_cli.volume.degradation import BAND_LIMITED, BICUBIC_ANTIALIASED, CUBIC, DEGRADATIONS, degradation_named
from medsr_cli.volume.resample import resize
from tests.makers import almost_nearest, torch_engine


class Counted(Interpolation):
    """Bicubic that remembers what it was given, and adds a share of its guide."""

    def __init__(self, scale: tuple[float, float], channels: int = 1) -> None:
        super().__init__("cubic", scale)
        self.channels = channels
        self.given: list[np.ndarray] = []

    def run(self, planes, guide=None):
        self.given.append(planes)
        planes = super().run(planes).planes
        return Enlarged(planes if guide is None else planes + 0.1 * guide, {"intermediate": planes[..., ::2, ::2]})

    def turned(self):
        return Counted((self.scale[1], self.scale[0]), self.channels)


@given(st.integers(0, 7), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_orientation_is_undone(k, rows, columns):
    planes = np.random.default_rng(0).random((2, 1, rows, columns))
    np.testing.assert_array_equal(orient_back(orient(planes, k), k), planes)


def test_the_eight_orientations_are_eight():
    planes = np.arange(6.0).reshape(1, 1, 2, 3)
    assert len({orient(planes, k).tobytes() + bytes(orient(planes, k).shape) for k in range(8)}) == 8
    np.testing.assert_array_equal(orient(planes, 1)[0, 0], [[2, 5], [1, 4], [0, 3]])
    np.testing.assert_array_equal(orient(planes, 4)[0, 0], [[2, 1, 0], [5, 4, 3]])


@pytest.mark.parametrize("scale", [(2.0, 2.0), (1.7, 3.0)])
@pytest.mark.parametrize("reduce", ["mean", "median"])
def test_an_ensemble_of_something_symmetric_is_that_thing(scale, reduce):
    planes = np.random.default_rng(1).random((2, 1, 9, 14))
    plain = Interpolation("cubic", scale)
    result = Ensemble(Interpolation("cubic", scale), reduce).run(planes)
    np.testing.assert_allclose(result.planes, plain.run(planes).planes, atol=1e-12)
    assert result.extras["spread"].shape == result.planes.shape
    assert result.extras["spread"].max() < 1e-12


def test_an_ensemble_turns_its_guide_and_extras_along():
    planes = np.random.default_rng(2).random((1, 1, 6, 10))
    guide = np.random.default_rng(3).random((1, 1, 12, 20))
    alone = Counted((2.0, 2.0)).run(planes, guide)
    result = Ensemble(Colours(Counted((2.0, 2.0)))).run(planes, guide)
    np.testing.assert_allclose(result.planes, alone.planes, atol=1e-12)
    assert result.extras["intermediate"].shape == alone.extras["intermediate"].shape


def test_an_ensemble_averages_what_depends_on_the_way_up():
    engine = torch_engine(almost_nearest(2), 2)
    planes = np.random.default_rng(4).random((1, 1, 16, 24))
    result = Ensemble(engine).run(planes)
    turned = [orient_back(engine.run(orient(planes, k)).planes, k) for k in range(8)]
    np.testing.assert_allclose(result.planes, np.mean(turned, axis=0), atol=1e-6)
    np.testing.assert_allclose(result.extras["spread"], np.std(turned, axis=0), atol=1e-6)
    assert result.extras["spread"].max() > 0


def test_colours_of_a_grey_network_cannot_tint_each_other():
    engine = Counted((2.0, 2.0))
    planes = np.random.default_rng(5).random((2, 3, 5, 6))
    result = Colours(engine).run(planes)
    assert engine.given[0].shape == (6, 1, 5, 6)
    assert result.extras["intermediate"].shape == (2, 3, 5, 6)
    for channel in range(3):
        alone = Interpolation("cubic", 2.0).run(planes[:, channel : channel + 1]).planes
        np.testing.assert_allclose(result.planes[:, channel : channel + 1], alone)


def test_a_colour_network_takes_grey_three_times_and_averages():
    class Tinting(Counted):
        def run(self, planes, guide=None):
            return Enlarged(super().run(planes).planes + np.array([0.0, 0.1, 0.5])[:, None, None])

    planes = np.random.default_rng(6).random((2, 1, 5, 6))
    engine = Tinting((2.0, 2.0), channels=3)
    result = Colours(engine).run(planes)
    assert engine.given[0].shape == (2, 3, 5, 6)
    np.testing.assert_allclose(result.planes, Interpolation("cubic", 2.0).run(planes).planes + 0.2)


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
@pytest.mark.parametrize("size", [(24, 20), (17, 31)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_back_projection_brings_the_result_to_agree_with_its_input(name, size, scale):
    degradation = DEGRADATIONS[name]
    rng = np.random.default_rng(7)
    large = np.clip(resize(rng.random((1, 1, 9, 9)), (size[0] * scale, size[1] * scale)), 0, 1)
    low = degradation.down(large, size)
    start = resize(low, (size[0] * scale, size[1] * scale)) + 0.1 * rng.standard_normal(
        (1, 1, size[0] * scale, size[1] * scale)
    )
    before = np.abs(degradation.down(start, size) - low).mean()
    after = np.abs(degradation.down(back_project(start, low, degradation, 20), size) - low).mean()
    assert after < 0.2 * before


def test_back_projection_leaves_a_result_that_agrees_alone():
    low = np.random.default_rng(8).random((1, 1, 12, 12))
    # Cubic without smoothing, an odd factor: the middle of each block is the pixel itself.
    result = resize(low, (36, 36))
    np.testing.assert_allclose(CUBIC.down(result, (12, 12)), low, atol=1e-12)
    np.testing.assert_allclose(back_project(result, low, CUBIC, 5), result, atol=1e-12)


def test_back_projection_clips_when_told_to():
    low = np.zeros((1, 1, 8, 8))
    low[..., 4:] = 1
    engine = BackProjected(Interpolation("cubic", 4), BICUBIC_ANTIALIASED, 10, clip=True)
    result = engine.run(low).planes
    assert result.min() >= 0
    assert result.max() <= 1
    assert BackProjected(Interpolation("cubic", 4), BICUBIC_ANTIALIASED, 10).run(low).planes.max() > 1


@pytest.mark.parametrize("scale", [(2.5, 2.5), (3.1, 1.5)])
def test_fitted_goes_up_and_comes_down_to_size(scale):
    planes = np.random.default_rng(9).random((2, 1, 11, 13))
    guide = np.random.default_rng(10).random((2, 1, *Interpolation("cubic", scale).size_of(11, 13)))
    inner = Counted((4.0, 4.0))
    result = Fitted(inner, scale).run(planes)
    expected = resize(Interpolation("cubic", 4.0).run(planes).planes, guide.shape[-2:])
    np.testing.assert_allclose(result.planes, expected, atol=1e-12)
    assert result.extras["intermediate"].shape == (2, 1, 22, 26)
    assert Fitted(inner, scale).run(planes, guide).planes.shape == guide.shape
    assert Fitted(inner, scale).turned().size_of(13, 11) == guide.shape[:-3:-1]


def test_wrapped_engines_pass_their_warnings_on():
    inner = Interpolation("cubic", 2)
    engine = BackProjected(Ensemble(Colours(Fitted(inner, (1.5, 1.5)))), CUBIC, 1)
    inner.warnings.append("odd")
    assert engine.warnings == ["odd"]


def test_degradations_are_found_by_name():
    assert degradation_named("cubic-blur").name == "cubic-blur"
    assert degradation_named(None) is CUBIC
    assert degradation_named("something-else") is CUBIC


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_networks_of_cropped_kspace_see_their_input_where_they_expect_it(scale):
    """An engine that enlarges as k-space cropping shrinks (pixel s·j of the result is pixel j of the input)."""

    class FirstCentres(Counted):
        def run(self, planes, guide=None):
            rows, columns = planes.shape[-2:]
            at = [np.arange(n * scale) / scale for n in (rows, columns)]
            return Enlarged(sampled(planes, *at))

    def sampled(planes, rows, columns):
        def weights(n, positions):
            k = np.arange(n)
            analysis = np.cos(np.pi * k[:, None] * (np.arange(n) + 0.5) / n) * 2 / n
            analysis[0] /= 2
            return np.cos(np.pi * k * (positions[:, None] + 0.5) / n) @ analysis

        return weights(planes.shape[-2], rows) @ planes @ weights(planes.shape[-1], columns).T

    planes = resize(np.random.default_rng(11).random((1, 1, 6, 5)), (24, 20))
    result = Realigned(FirstCentres((float(scale), float(scale)))).run(planes).planes
    expected = BAND_LIMITED.up(planes, (24 * scale, 20 * scale))
    inner = (..., slice(4 * scale, -4 * scale), slice(4 * scale, -4 * scale))
    np.testing.assert_allclose(result[inner], expected[inner], atol=0.02)
    moved = FirstCentres((float(scale), float(scale))).run(planes).planes
    assert np.abs(moved[inner] - expected[inner]).max() > 0.05
