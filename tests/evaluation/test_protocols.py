"""Protocols: the pairs, borders and figures of each paper, and that each one's words are those of its functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medsr_cli.evaluation import structure
from medsr_cli.evaluation.fsim import fsim
from medsr_cli.evaluation.metrics import psnr, ssim
from medsr_cli.evaluation.protocols import METRICS, PROTOCOLS, protocol_named
from medsr_cli.volume.antialias import antialiased_resize
from medsr_cli.volume.band_limited import band_limited_resize
from medsr_cli.volume.degradation import DEGRADATIONS
from medsr_cli.volume.fourier import shrink_as_released
from medsr_cli.volume.resample import blur_3x3, resize

RNG = np.random.default_rng(0)


def image(channels: int = 1, rows: int = 53, columns: int = 46) -> np.ndarray:
    return np.clip(resize(RNG.random((channels, 14, 12)), (rows, columns)), 0, 1).astype(np.float32)


WHOLE = [name for name, protocol in PROTOCOLS.items() if protocol.whole_scales]


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_protocol_measures_bicubic(name, channels):
    protocol, high = PROTOCOLS[name], image(channels)
    low, target = protocol.pair(high, 2)
    assert low.shape[-2:] == (26, 23)
    assert target.shape == (channels, 52, 46)
    assert low.dtype == target.dtype == np.float32
    result = protocol.enlarge(low, target.shape[-2:])
    figures = protocol.measure(result, target, 2)
    assert list(figures) == list(protocol.metrics)
    assert all(math.isfinite(value) for value in figures.values())
    for metric, value in protocol.measure(target, target, 2).items():
        known = METRICS[metric]
        assert value == pytest.approx(known.best, abs=1e-6) or (known.best == math.inf and value > 20)
        assert (value > figures[metric]) == known.higher_is_better


@pytest.mark.parametrize("name", WHOLE)
def test_targets_are_cut_to_a_multiple_and_are_the_image_itself(name):
    high = image()
    _, target = PROTOCOLS[name].pair(high, 4)
    np.testing.assert_array_equal(target, high[:, :52, :44])
    with pytest.raises(ValueError, match="whole scales"):
        PROTOCOLS[name].pair(high, 2.5)


def test_each_papers_low_resolution_image():
    high = image()
    cut = high[:, :52, :44]
    expected = {
        "rdst": resize(cut, (13, 11)),
        "msgan": resize(cut, (13, 11)),
        "m2trans": antialiased_resize(cut, (13, 11)),
        "uscyclegan": antialiased_resize(cut, (13, 11)),
        "cohft": band_limited_resize(cut, (13, 11)),
        "cohft-released": shrink_as_released(cut, (13, 11)),
        "miassr": blur_3x3(resize(high, (13, 11))),
    }
    assert set(expected) == set(PROTOCOLS)
    for name, low in expected.items():
        np.testing.assert_allclose(PROTOCOLS[name].pair(high, 4)[0], low, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["rdst", "miassr", "m2trans", "cohft", "uscyclegan", "msgan"])
def test_degradations_are_those_that_checkpoints_name(name):
    kind = {"rdst": "cubic", "msgan": "cubic", "miassr": "cubic-blur", "cohft": "band-limited"}
    degradation = DEGRADATIONS[kind.get(name, "bicubic-antialiased")]
    high = image(rows=48, columns=48)
    np.testing.assert_allclose(PROTOCOLS[name].pair(high, 3)[0], degradation.down(high, (16, 16)), atol=1e-6)


@pytest.mark.parametrize("scale", [1.5, 2.5, 3.0, 3.5, (1.5, 2.25)])
def test_miassr_takes_any_scale_as_its_paper_rounds_it(scale):
    high, protocol = image(), PROTOCOLS["miassr"]
    both = scale if isinstance(scale, tuple) else (scale, scale)
    low, target = protocol.pair(high, scale)
    small = tuple(int(n // s) for n, s in zip((53, 46), both, strict=True))
    large = tuple(int(n // s * s) for n, s in zip((53, 46), both, strict=True))
    assert (low.shape[-2:], target.shape[-2:]) == (small, large)
    np.testing.assert_allclose(target, resize(high, large), atol=1e-6)
    assert protocol.border_pixels(scale) == math.ceil(max(both))


def test_figures_are_those_of_the_metrics_with_the_papers_border():
    result, target = image(3), image(3)
    each = [(psnr(r, t, 4), ssim(r, t, 4)) for r, t in zip(result, target, strict=True)]
    found = PROTOCOLS["rdst"].measure(result, target, 4)
    assert tuple(found.values()) == pytest.approx(tuple(np.mean(each, axis=0)))
    assert PROTOCOLS["miassr"].measure(result, target, 3.5) == found
    found = PROTOCOLS["m2trans"].measure(result, target, 4)
    assert found["psnr_y"] == structure.psnr_y(result, target, 4)
    assert found["ssim_y"] == structure.ssim_y(result, target, 4)
    assert found["ssim_y"] != found["ssim_y_conventional"] == structure.ssim_y_conventional(result, target, 4)
    assert found["fsim"] == fsim(result, target), "no border"
    found = PROTOCOLS["uscyclegan"].measure(result, target, 4)
    assert found["psnr_rgb"] == pytest.approx(-10 * np.log10(np.mean((result - target).astype(np.float64) ** 2)))
    assert found["psnr_y"] == structure.psnr_y(result, target, 4)
    found = PROTOCOLS["cohft"].measure(result[:1], target[:1], 4)
    assert found["ssim_cohft"] == structure.cohft_ssim(result[:1], target[:1]), "no border"
    roi = PROTOCOLS["msgan"].measure(result[:1], target[:1], 4)
    assert roi["psnr"] == psnr(result[0], target[0], 0)


def test_borders_hide_what_lies_in_them():
    target = image()
    result = target.copy()
    result[:, :4] = 0
    assert PROTOCOLS["rdst"].measure(result, target, 4)["psnr"] == 100
    assert PROTOCOLS["rdst"].measure(result, target, 3)["psnr"] < 50
    assert PROTOCOLS["cohft"].measure(result, target, 4)["psnr_cohft"] < 50
    assert PROTOCOLS["rdst"].inner(target, 3.2).shape == (1, 45, 38)


def test_the_released_cohft_goes_by_chunks_and_scales_a_volume_together():
    protocol = PROTOCOLS["cohft-released"]
    volume = [0.5 * image(), image(), 0.1 + 0.2 * image()]
    pairs = protocol.pairs(volume, 2)
    lows = np.stack([low for low, _ in pairs])
    assert (lows.min(), lows.max()) == (0, 1)
    expected = shrink_as_released(np.stack(volume)[:, :, :52, :46], (26, 23))
    np.testing.assert_allclose(lows, expected, atol=1e-6)
    np.testing.assert_array_equal(pairs[0][1], volume[0][:, :52, :46])
    assert [c.stop - c.start for c in protocol.chunks(45)] == [20, 20, 5]
    assert [c.stop - c.start for c in PROTOCOLS["rdst"].chunks(3)] == [1, 1, 1]
    results, targets = (np.stack([image() for _ in range(3)]) for _ in range(2))
    found = protocol.measure(results, targets, 2)
    assert found["psnr_cohft"] == structure.cohft_psnr(results, targets)
    constant = protocol.pairs([np.full((1, 20, 20), 0.3, np.float32)] * 2, 2)
    assert all(np.isfinite(low).all() for low, _ in constant)
    assert protocol.pairs([], 2) == []


def test_bicubic_of_first_centres_is_in_its_place():
    """A smooth image comes back where it was, which the edge-aligned bicubic of the same input does not do."""
    protocol = PROTOCOLS["cohft-released"]
    y, x = np.mgrid[:64, :64] / 64
    high = (0.5 + 0.25 * np.cos(2 * np.pi * (x + 0.1)) + 0.25 * np.cos(2 * np.pi * 2 * y))[None].astype(np.float32)
    low = protocol.degrade(high, (16, 16))
    inner = (..., slice(12, -12), slice(12, -12))
    moved = np.abs(protocol.enlarge(low, (64, 64)) - high)[inner].max()
    aligned = np.abs(protocol.bicubic(low, (64, 64)) - high)[inner].max()
    assert moved < 0.05
    assert aligned > 3 * moved
    assert aligned > 0.1


def test_more_metrics_may_be_asked_for():
    protocol, high = PROTOCOLS["rdst"], image(4)
    low, target = protocol.pair(high, 2)
    result = protocol.enlarge(low, target.shape[-2:])
    found = protocol.measure(result, target, 2, also=("fsim", "gmsd", "ifc", "psnr"))
    assert list(found) == ["psnr", "ssim", "fsim", "gmsd", "ifc"]
    assert found["fsim"] == pytest.approx(np.mean([fsim(r, t) for r, t in zip(result, target, strict=True)]))
    chunk = PROTOCOLS["cohft-released"].measure(result[:, None], target[:, None], 2, also=("fsim",))
    assert chunk["fsim"] == found["fsim"]
    with pytest.raises(ValueError, match="no metric lpips"):
        protocol.measure(result, target, 2, also=("lpips",))


def test_what_is_too_small_is_nan_and_not_worth_measuring():
    tiny = image(rows=12, columns=12)
    found = PROTOCOLS["rdst"].measure(tiny, tiny, 4, also=("ifc", "psnr_y"))
    assert found["psnr"] == 100
    assert math.isnan(found["ssim"])
    assert math.isnan(found["ifc"])
    assert all(math.isnan(v) for v in PROTOCOLS["rdst"].measure(tiny[:, :7], tiny[:, :7], 4).values())
    protocol = PROTOCOLS["rdst"]
    assert not protocol.worth_measuring(tiny, 4)
    assert protocol.worth_measuring(image(), 4)
    assert not protocol.worth_measuring(np.ones((1, 50, 50)), 4)
    flat = np.full((1, 40, 40), 0.5, np.float32)
    for each in PROTOCOLS.values():
        assert all(math.isfinite(v) for k, v in each.measure(flat, flat, 4).items() if k != "fsim")


def test_scales_and_shapes_that_cannot_be():
    protocol = PROTOCOLS["rdst"]
    for scale in (1, 0.5, (2.0, 1.0)):
        with pytest.raises(ValueError, match="above 1"):
            protocol.pair(image(), scale)
    with pytest.raises(ValueError, match="cannot be shrunken"):
        protocol.pair(np.zeros((1, 3, 40)), 4)
    with pytest.raises(ValueError, match="is not"):
        protocol.measure(np.zeros((1, 40, 40)), np.zeros((1, 40, 41)), 4)
    with pytest.raises(ValueError, match="there are rdst, miassr"):
        protocol_named("srgan")
    assert protocol_named("rdst") is protocol


def test_every_protocol_says_what_it_does():
    for protocol in PROTOCOLS.values():
        assert set(protocol.metrics) <= set(METRICS)
        assert all((protocol.title, protocol.low, protocol.border, protocol.averaging, protocol.intensity))
        assert (protocol.border == "none") == (protocol.border_pixels(4) == 0)
        assert (protocol.average == "chunk") == (protocol.chunk_slices > 1)
    assert any("half a unit" in note for note in PROTOCOLS["m2trans"].notes)
