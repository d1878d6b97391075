"""MIASSR's graph: one file for every scale, size, batch and tile, against PyTorch's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import medsr_cli
from medsr_cli.engines.onnx_defaults import with_default
from medsr_cli.engines.onnx_export import OPSET, exported
from medsr_cli.engines.tiles import halo_boxes
from medsr_cli.networks import checkpoint, load_network, meta_upscale_graph
from medsr_cli.networks.meta_upscale import AxisGrid, Scale, grid_of, inverse_scale
from medsr_cli.networks.meta_upscale_graph import GraphUpsampler, exact_axis, reference_axis, slots_of
from medsr_cli.networks.miassr import GRAPH_DEFAULTS, Miassr, MiassrConfig, graph_form
from medsr_cli.volume.geometry import enlarged_length
from tests.networks.golden import assert_close, fixture

TOLERANCE = 1e-4
"""Of the range of the output."""
SCALES = [1.0, 1.1, 1.5, 2.0, 2.3, 2.7, 3.3, 3.7, 4.0, 7 / 6, (2.0, 2.7), (1.1, 4.0), (489 / 181, 1.5)]
SIZES = [(9, 13), (1, 6), (2, 2), (33, 7), (20, 45)]
SHIPPED = Path(medsr_cli.__file__).parent / "checkpoints" / "miassr-brain-mr.safetensors"

Pair = tuple[float, float]
Run = Callable[..., np.ndarray]


def four_channels() -> Miassr:
    torch.manual_seed(3)
    net = Miassr(MiassrConfig(n_feats=6, n_blocks=2, hidden=11, kernel=5, in_channels=4)).eval()
    with torch.no_grad():  # a mean that shows when it is left out
        net.sub_mean.bias.fill_(-0.3)
        net.add_mean.bias.fill_(0.3)
    return net


def authors() -> Miassr:
    state = fixture("miassr_small_cut").weights
    net = checkpoint.network_from_state(state, checkpoint.detect_method(state))
    assert isinstance(net, Miassr)
    return net


def file_of(net: Miassr) -> bytes:
    found = exported(graph_form(net))
    for name, value in GRAPH_DEFAULTS.items():
        found = with_default(found, name, value.numpy())
    return found


def runner(model: bytes) -> Run:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor, scale: float | Pair, place: list[list[int]] | None = None) -> np.ndarray:
        given = {"image": image.numpy(), "scale": np.array(both(scale))}
        if place is not None:
            given["place"] = np.array(place)
        (found,) = session.run(None, given)
        return found

    return run


def both(scale: float | Pair) -> Pair:
    return scale if isinstance(scale, tuple) else (scale, scale)


@pytest.fixture(scope="module", params=[four_channels, authors], ids=["exact-4-channels", "reference-1-channel"])
def exact_or_reference(request) -> tuple[Miassr, bytes]:
    net = request.param()
    return net, file_of(net)


def grids(net: Miassr, size: tuple[int, int], scale: Pair) -> tuple[AxisGrid, AxisGrid, float]:
    """What the engine tells the network: steps of N'/N with exact rounding, as the authors have it otherwise."""
    steps: list[Scale] = list(scale)
    if net.config.rounding == "exact":
        steps = [Fraction(enlarged_length(n, s), n) for n, s in zip(size, scale, strict=True)]
    rows, columns = (grid_of(n, s, net.config.rounding) for n, s in zip(size, steps, strict=True))
    return rows, columns, inverse_scale(*steps)


def by_pytorch(net: Miassr, image: torch.Tensor, scale: float | Pair) -> torch.Tensor:
    rows, columns, inverse = grids(net, image.shape[-2:], both(scale))
    with torch.inference_mode():
        return net.enlarge(net.features(image), inverse, rows, columns)


def assert_same(found: np.ndarray, expected: torch.Tensor, case: object) -> None:
    assert found.shape == expected.shape, case
    spread = float(expected.max() - expected.min())
    assert float(np.abs(found - expected.numpy()).max()) <= TOLERANCE * max(spread, 0.1), case


# The file


def test_one_file_has_every_scale_and_size(exact_or_reference):
    net, model = exact_or_reference
    run = runner(model)
    torch.manual_seed(1)
    for number, scale in enumerate(SCALES):
        for k in (0, 1):
            size = SIZES[(number + 2 * k) % len(SIZES)]
            image = torch.rand(1 + (number + k) % 3, net.config.in_channels, *size)
            assert_same(run(image, scale), by_pytorch(net, image, scale), (scale, size))


def test_it_gives_what_the_authors_network_gave(exact_or_reference):
    net, model = exact_or_reference
    if net.config.rounding == "exact":
        pytest.skip("the other file")
    facts, _, tensors = fixture("miassr_small_cut")
    run = runner(model)
    for case in facts["cases"]:
        assert_close(torch.from_numpy(run(tensors[case["x"]], case["scale"])), tensors[case["y"]], 1e-5, case["scale"])


@pytest.mark.parametrize("scale", [2.0, 2.7, (1.1, 3.3)])
def test_tiles_with_a_halo_are_the_whole_image(exact_or_reference, scale):
    net, model = exact_or_reference
    run, (height, width) = runner(model), (37, 45)
    torch.manual_seed(2)
    image = torch.rand(2, net.config.in_channels, height, width)
    whole = run(image, scale)
    rows, columns, _ = grids(net, (height, width), both(scale))
    joined = np.full_like(whole, np.nan)
    for own, seen in halo_boxes(height, width, 16, net.reach):
        top, bottom = rows.span(own.top, own.bottom)
        left, right = columns.span(own.left, own.right)
        place = [[height, seen.top, top, bottom - top], [width, seen.left, left, right - left]]
        joined[..., top:bottom, left:right] = run(seen.of(image).contiguous(), scale, place)
    assert_same(joined, torch.from_numpy(whole), scale)


def test_a_part_of_the_result_can_be_wanted_without_tiles(exact_or_reference):
    net, model = exact_or_reference
    run = runner(model)
    image = torch.rand(1, net.config.in_channels, 12, 15)
    whole = run(image, 2.3)
    np.testing.assert_allclose(run(image, 2.3, [[0, 0, 5, 0], [15, 0, 3, 1]]), whole[..., 5:, 3:4], atol=1e-6)
    np.testing.assert_array_equal(run(image, 2.3, [[0] * 4] * 2), whole)


def test_positions_are_exact_on_the_longest_axes(exact_or_reference):
    """i·N is beyond what float32 counts; pixels near the end of 30,011, three of which float32 places wrongly."""
    net, model = exact_or_reference
    n, scale, tile = 30_011, 3.0, torch.rand(1, net.config.in_channels, 24, 3)
    rows, columns, inverse = grids(net, (n, 3), (scale, 1.0))
    first = n - 24
    start, stop = rows.span(first + 5, first + 15)
    found = runner(model)(tile, (scale, 1.0), [[n, first, start, stop - start], [3, 0, 0, 0]])
    with torch.inference_mode():
        expected = net.enlarge(net.features(tile), inverse, rows.sliced(start, stop).shifted(-first), columns)
    assert_same(found, expected, scale)


def test_the_file_is_a_standard_one(exact_or_reference):
    _, model = exact_or_reference
    proto = onnx.load_model_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert not [t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [("image", "tensor(float)"), ("scale", "tensor(double)")]
    assert [i.name for i in session.get_overridable_initializers()] == ["place"]
    assert session.get_outputs()[0].name == "enlarged"
    with pytest.raises(ValueError, match="no input place that needs"):
        with_default(model, "place", np.zeros((2, 4), np.int64))
    with pytest.raises(ValueError, match="no input size"):
        with_default(model, "size", np.zeros(2))
    for wrong in (np.zeros(3), np.zeros((1, 2)), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match="scale is not of shape"):
            with_default(model, "scale", wrong)


@pytest.mark.skipif(not SHIPPED.exists(), reason="needs the checkpoint")
def test_the_shipped_network():
    net = load_network(SHIPPED)
    assert isinstance(net, Miassr)
    model = file_of(net)
    run = runner(model)
    rows, columns = torch.linspace(0, 3, 41)[:, None], torch.linspace(0, 2, 28)
    image = (0.5 + 0.3 * torch.sin(rows * columns * 4) + 0.1 * (rows > 1.5))[None, None]
    for scale in (4.0, 2.3):
        assert_same(run(image, scale), by_pytorch(net, image, scale), scale)


# Its parts, in PyTorch


def test_positions_are_those_of_the_grids():
    for rounding, axis in (("exact", exact_axis), ("reference", reference_axis)):
        for n in (1, 2, 8, 11, 30, 31, 64, 121):
            for s in (*(k / 10 for k in range(10, 41)), 7 / 6, 2.37, 3.14, 489 / 181, 3.999):
                step = Fraction(enlarged_length(n, s), n) if rounding == "exact" else s
                expected = grid_of(n, step, rounding)
                source, offset, inverse = axis(torch.tensor(n), torch.tensor(s, dtype=torch.float64))
                assert torch.equal(source, expected.source), (rounding, n, s)
                assert torch.equal(offset, expected.offset), (rounding, n, s)  # bit for bit
                assert float(inverse) == pytest.approx(1 / step, rel=1e-15)


@pytest.mark.parametrize("source", [[0], [3], [2, 2, 2], [1, 1, 4, 5, 5, 5], [0, 3, 6]])
def test_slots_hold_the_output_pixels_of_each_pixel(source):
    found = slots_of(torch.tensor(source))
    assert (int(found.begin), int(found.length)) == (source[0], source[-1] - source[0] + 1)
    assert int(found.most) == max(source.count(p) for p in source)
    held = found.outputs.flatten()[found.own]
    assert held.tolist() == list(range(len(source)))
    for own, pixel in zip(found.own.tolist(), source, strict=True):
        assert own // int(found.most) == pixel - source[0]


def test_memory_is_bounded_by_bands(monkeypatch):
    net = four_channels()
    layer = GraphUpsampler(net.meta_upsampler, "exact")
    features, place = torch.rand(1, 6, 10, 15), GRAPH_DEFAULTS["place"]
    scale = torch.tensor((3.3, 2.0), dtype=torch.float64)
    whole = layer(features, scale, place)
    made: list[int] = []
    monkeypatch.setattr(torch.Tensor, "relu", lambda x: made.append(x.numel() * 4) or x.clamp(min=0))
    one_row = 15 * 4 * 2 * 12 * 4  # Q·S·T·M in float32
    for limit, most in ((1, one_row), (200_000, 100_000), (10**9, 10 * one_row)):
        monkeypatch.setattr(meta_upscale_graph, "BAND_BYTES", limit)
        made.clear()
        torch.testing.assert_close(layer(features, scale, place), whole)
        assert one_row <= max(made) <= most, limit
    assert max(made) == 10 * one_row


def test_the_graph_has_the_networks_own_weights():
    net, image, scale = four_channels(), torch.rand(1, 4, 5, 5), torch.tensor((1.5, 2.0), dtype=torch.float64)
    with torch.no_grad():
        before = graph_form(net).module(image, scale, GRAPH_DEFAULTS["place"])
        net.meta_upsampler.P2W.meta_block[2].bias.add_(0.1)
        after = graph_form(net).module(image, scale, GRAPH_DEFAULTS["place"])
    assert not torch.allclose(before, after, atol=1e-3)
    assert_same(after.numpy(), by_pytorch(net, image, (1.5, 2.0)), "changed")
