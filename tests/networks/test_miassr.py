"""MIASSR against the authors' released network, against the paper's formula, and cut into tiles."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network, meta_upscale, miassr
from medsr_cli.networks.miassr import (
    RECOMPUTED_BUFFERS,
    AxisGrid,
    Miassr,
    MiassrConfig,
    config_from_state,
    grid_of,
    inverse_scale,
)
from tests.networks.golden import assert_close, fixture, procedural_state, save_declared, specification

TENTHS = [k / 10 for k in range(11, 41)]
TINY = MiassrConfig(n_feats=4, n_blocks=1, hidden=7, in_channels=2)
ODD = MiassrConfig(n_feats=6, n_blocks=3, hidden=11, kernel=5, in_channels=3)


def tiny(config: MiassrConfig = TINY, **fields) -> Miassr:
    torch.manual_seed(3)
    net = Miassr(dataclasses.replace(config, **fields)).eval()
    with torch.no_grad():  # a mean that shows when it is left out
        net.sub_mean.bias.fill_(-0.3)
        net.add_mean.bias.fill_(0.3)
    return net


def image_of(config: MiassrConfig, *size: int, n: int = 1) -> torch.Tensor:
    torch.manual_seed(8)
    return torch.rand(n, config.in_channels, *size)


# The authors' network


def loaded(name: str) -> tuple[Miassr, dict, dict]:
    facts, state, tensors = fixture(name)
    state = state or procedural_state(Miassr(), facts["procedural_seed"], keep="mean")
    net = checkpoint.network_from_state(state, checkpoint.detect_method(state))
    assert isinstance(net, Miassr)
    return net, facts, tensors


@pytest.mark.parametrize("name", ["miassr_small_cut", "miassr_small", "miassr_small_4ch", "miassr_full_procedural"])
@pytest.mark.parametrize("form", ["auto", "kernels", "hidden"])
def test_equals_the_released_network(name, form):
    net, facts, tensors = loaded(name)
    assert (net.config.n_blocks, net.config.rounding) == (facts["config"]["n_resblocks"], "reference")
    net.meta_upsampler.form = form
    for case in facts["cases"]:
        expected = tensors[case["y"]]
        with torch.no_grad():
            found = net(tensors[case["x"]], case["scale"])
        assert_close(found, expected, 1e-5, case["scale"])


@pytest.mark.parametrize(("name", "channels"), [("miassr", 1), ("miassr_4ch", 4)])
def test_tensors_are_those_of_the_checkpoints(name, channels):
    facts = specification(f"{name}_state_dict")
    net = Miassr(MiassrConfig(in_channels=channels))
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == {
        key: shape for key, shape in facts["keys"].items() if not key.startswith("feature_extractor.tail.")
    }
    assert sum(p.numel() for p in net.parameters()) == facts["parameters_used"]


@pytest.mark.parametrize(("channels", "used", "upscaler"), [(1, 1368324, 149056), (4, 1814184, 593152)])
def test_parameters_are_counted_as_in_the_paper(channels, used, upscaler):
    net = Miassr(MiassrConfig(in_channels=channels))
    assert sum(p.numel() for p in net.parameters()) == used
    assert sum(p.numel() for p in net.meta_upsampler.parameters()) == upscaler
    frozen = [key for key, value in net.named_parameters() if not value.requires_grad]
    assert frozen == ["sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias"]


# Grids


def reference_by_hand(n: int, s: float) -> tuple[list[int], list[np.float32]]:
    """Section 3.4 of the specification, step by step."""
    inverse, r = np.float32(1 / s), math.ceil(s)
    pixels, slots, own = [], [], []
    off = [np.float32(1.0)] * (n * r)
    for i in range(int(s * n)):
        c = np.float32(i) * inverse
        p = int(np.floor(c))
        slot = p * r + pixels.count(p)
        off[slot] = np.float32(c - np.float32(p))
        pixels.append(p)
        slots.append(slot)
        own.append(off[slot])
    period = next((k for k in range(1, n * r) if off[k] < 1e-6), None)
    return pixels, own if period is None else [off[slot % period] for slot in slots]


@pytest.mark.parametrize("s", [*TENTHS, 2.37, 3.14, 1.01, 1.05, 3.999, 1.0, 489 / 181])
@pytest.mark.parametrize("n", [1, 2, 8, 11, 30, 45, 64, 121])
def test_reference_grid_is_the_authors_arithmetic(n, s):
    grid = grid_of(n, s, "reference")
    pixels, offsets = reference_by_hand(n, s)
    assert grid.source.tolist() == pixels
    assert grid.offset.tolist() == [float(o) for o in offsets]  # bit for bit


@pytest.mark.parametrize("s", [*(Fraction(k, 10) for k in range(11, 41)), Fraction(489, 181), Fraction(157, 50)])
@pytest.mark.parametrize("n", [1, 7, 45, 181])
def test_exact_grid_is_the_papers_formula(n, s):
    grid = grid_of(n, s)
    places = [i / s for i in range(math.floor(s * n))]
    assert grid.source.tolist() == [math.floor(place) for place in places]
    assert grid.offset.tolist() == [float(np.float32(float(place - math.floor(place)))) for place in places]
    decimal = grid_of(n, float(s)) if s.denominator <= 50 else grid
    assert torch.equal(decimal.source, grid.source)
    assert torch.equal(decimal.offset, grid.offset)


def differs(n: int, s: float) -> bool:
    reference, exact = grid_of(n, s, "reference"), grid_of(n, s)
    if len(reference) != len(exact) or not torch.equal(reference.source, exact.source):
        return True
    return bool((reference.offset - exact.offset).abs().max() > 2e-5)


def test_roundings_differ_where_the_specification_says():
    """Only at 2.3, 2.7 and 3.7 from 31 pixels on, and where the float64 product of the size falls short."""
    for s in TENTHS:
        found = [n for n in range(2, 100) if differs(n, s)]
        short = [n for n in range(2, 100) if int(s * n) < math.floor(Fraction(str(s)) * n)]
        assert found == (list(range(31, 100)) if s in (2.3, 2.7, 3.7) else short), s
    assert (len(grid_of(45, 1.4, "reference")), len(grid_of(45, 1.4))) == (62, 63)
    for s, i in ((2.3, 69), (2.7, 81), (3.7, 111)):
        reference, exact = grid_of(40, s, "reference"), grid_of(40, s)
        assert int((reference.source != exact.source).nonzero()[0]) == i
        assert reference.source[i] == exact.source[i] - 1


def test_a_fraction_states_its_size_in_both_roundings():
    for size in range(182, 4 * 181 + 1):
        assert len(grid_of(181, Fraction(size, 181))) == len(grid_of(181, Fraction(size, 181), "reference")) == size


def test_a_fraction_that_equals_a_float_is_not_taken_for_it():
    binary = Fraction(2.7)  # 2.70000000000000017…, in the cache under a hash equal to that of the float
    assert int(grid_of(54, binary).source[27]) == 9
    assert int(grid_of(54, 2.7).source[27]) == 10
    assert int(grid_of(54, binary).source[27]) == 9


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan, Fraction(0), 0.01])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(ValueError, match=r"not an enlargement|Nothing is left"):
        grid_of(20, scale)
    with pytest.raises(ValueError, match="no rounding 'nearest'"):
        grid_of(20, 2.0, "nearest")


# The formula


def by_the_formula(net: Miassr, image: torch.Tensor, rows: AxisGrid, columns: AxisGrid, inverse: float):
    """Section 3.2: one kernel for every output pixel."""
    k, f, c = net.config.kernel, net.config.n_feats, net.config.in_channels
    features = net.features(image)
    padded = torch.nn.functional.pad(features, (k // 2,) * 4)
    out = image.new_zeros(len(image), c, len(rows), len(columns))
    for i, (p, row_offset) in enumerate(zip(rows.source.tolist(), rows.offset.tolist(), strict=True)):
        for j, (q, column_offset) in enumerate(zip(columns.source.tolist(), columns.offset.tolist(), strict=True)):
            weights = net.meta_upsampler.P2W.meta_block(image.new_tensor((inverse, row_offset, column_offset)))
            patch = padded[:, :, p : p + k, q : q + k].reshape(len(image), -1)
            out[:, :, i, j] = patch @ weights.view(f * k * k, c)
    return net.add_mean(out)


@pytest.mark.parametrize("form", ["kernels", "hidden"])
def test_all_scales_equal_the_formula(form):
    net, image = tiny().double(), image_of(TINY, 5, 4).double()
    net.meta_upsampler.form = form
    with torch.inference_mode():
        for s in TENTHS:
            rows, columns = grid_of(5, s), grid_of(4, s)
            expected = by_the_formula(net, image, rows, columns, 1 / s)
            torch.testing.assert_close(net(image, s), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (8, 10), (10, 8), (11, 4), (33, 5)])
def test_sizes_and_scales_where_the_authors_program_fails(rounding, size):
    """Sides within one period, or a period on one axis only, or scales without one; two images at once."""
    net = tiny(ODD, rounding=rounding).double()
    image = image_of(ODD, *size, n=2).double()
    for s in (2.7, 2.37, 3.14, 1.0):
        rows, columns = (grid_of(n, s, rounding) for n in size)
        with torch.inference_mode():
            found = net(image, s)
            expected = by_the_formula(net, image, rows, columns, 1 / s)
        assert found.shape == (2, 3, int(s * size[0]), int(s * size[1]))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_scale_for_each_axis():
    net, image = tiny().double(), image_of(TINY, 5, 4).double()
    with torch.inference_mode():
        found = net(image, (1.0, Fraction(489, 181)))
        expected = by_the_formula(net, image, grid_of(5, 1.0), grid_of(4, Fraction(489, 181)), (489 / 181) ** -0.5)
        assert found.shape[-2:] == (5, 10)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(net(image, (2.5, 2.5)), net(image, 2.5))
    assert inverse_scale(2.0, 2.0) == 0.5
    assert inverse_scale(2.0, 4.5) == pytest.approx(1 / 3)


def test_single_precision_agrees_with_double():
    net, image = tiny(), image_of(TINY, 9, 14)
    for form in ("kernels", "hidden"):
        net.meta_upsampler.form = form
        with torch.inference_mode():
            single = [net.float()(image, s) for s in (2.0, 2.7)]
            double = [net.double()(image.double(), s) for s in (2.0, 2.7)]
        for a, b in zip(single, double, strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * (b.max() - b.min())


def test_made_ready_changes_no_result():
    net, image = tiny(), image_of(TINY, 9, 14)
    with torch.inference_mode():
        before = net(image, 2.7)
        torch.testing.assert_close(miassr.made_ready(net)(image, 2.7), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("s", [2.0, 3.3])
def test_a_batch_is_its_single_images(s):
    net, batch = tiny(), image_of(TINY, 12, 7, n=3)
    with torch.no_grad():
        together, alone = net(batch, s), torch.cat([net(image[None], s) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_mean_of_the_checkpoint_is_used():
    net, image = tiny(), image_of(TINY, 6, 6)
    without = tiny()
    with torch.no_grad():
        without.sub_mean.bias.zero_()
        without.add_mean.bias.zero_()
        torch.testing.assert_close(net(image), without(image - 0.3) + 0.3)
        assert not torch.allclose(net(image), without(image), atol=1e-3)


# Gradients


@pytest.mark.parametrize("form", ["kernels", "hidden"])
def test_gradients_are_those_of_the_formula(form):
    net = tiny().double()
    net.meta_upsampler.form = form
    with torch.inference_mode():  # fills the caches first
        net(image_of(TINY, 4, 3).double(), 1.7)
    gradients = []
    for run in (lambda x: net(x, 1.7), lambda x: by_the_formula(net, x, grid_of(4, 1.7), grid_of(3, 1.7), 1 / 1.7)):
        image = image_of(TINY, 4, 3, n=2).double().requires_grad_()
        trained = [p for p in net.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(run(image).sin().sum(), [image, *trained]))
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


# Bands and tiles


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.n_bytes = max(self.n_bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("s", [2.0, 1.9, Fraction(1024, 509)])
def test_memory_is_bounded(s):
    net = tiny(n_feats=8, hidden=256, in_channels=1)
    features, grid = torch.rand(1, 8, 512, 512), grid_of(512, s)
    with torch.inference_mode(), Largest() as largest:
        assert net.enlarge(features, inverse_scale(s, s), grid, grid).shape[-1] == len(grid)
    assert largest.n_bytes < 64_000_000


@pytest.mark.parametrize("form", ["kernels", "hidden"])
@pytest.mark.parametrize("s", [2.0, 2.7, 1.01, 0.6])
def test_bands_change_nothing(monkeypatch, form, s):
    net, image = tiny(ODD).double(), image_of(ODD, 13, 6, n=2).double()
    net.meta_upsampler.form = form
    with torch.inference_mode():
        whole = net(image, s)
        monkeypatch.setattr(meta_upscale, "RESPONSE_BYTES", 1)
        monkeypatch.setattr(meta_upscale, "DOT_BYTES", {})
        torch.testing.assert_close(net(image, s), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rounding", ["exact", "reference"])
@pytest.mark.parametrize("scale", [2.0, 2.7, (Fraction(100, 37), 1.0)])
def test_tiles_with_a_halo_are_the_whole_image(rounding, scale):
    net = tiny(ODD, rounding=rounding).double()
    height, width, side = 37, 45, 10
    image = image_of(ODD, height, width, n=2).double()
    by_row, by_column = scale if isinstance(scale, tuple) else (scale, scale)
    grids = grid_of(height, by_row, rounding), grid_of(width, by_column, rounding)
    with torch.inference_mode():
        whole = net(image, scale)
        joined = torch.full_like(whole, torch.nan)
        for top in range(0, height, side):
            for left in range(0, width, side):
                crop, parts, spans = image, [], []
                for dim, first, grid, length in ((2, top, grids[0], height), (3, left, grids[1], width)):
                    start, stop = max(first - net.reach, 0), min(first + side + net.reach, length)
                    crop = crop.narrow(dim, start, stop - start)
                    spans.append(slice(*grid.span(first, first + side)))
                    parts.append(grid.sliced(spans[-1].start, spans[-1].stop).shifted(-start))
                tile = net.enlarge(net.features(crop), inverse_scale(by_row, by_column), *parts)
                joined[:, :, spans[0], spans[1]] = tile
    torch.testing.assert_close(joined, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", [TINY, ODD])
def test_reach_is_as_far_as_anything_is_seen(config):
    net, side = tiny(config).double(), 41
    image = torch.full((1, config.in_channels, side, side), 0.5).double().requires_grad_()
    middle = grid_of(side, 2.0).sliced(40, 42)  # both of LR pixel 20
    out = net.enlarge(net.features(image), 0.5, middle, middle)
    (seen,) = torch.autograd.grad(out.sum(), image)
    rows = seen.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (20 - net.reach, 20 + net.reach)


def test_grids_beyond_the_features_are_refused():
    net, features = tiny(), torch.rand(1, 4, 6, 6)
    grid = grid_of(6, 2.0)
    for wrong, sentence in (
        (grid.shifted(1), "1 to 6"),
        (grid.shifted(-1), "-1 to 4"),
        (grid.sliced(3, 3), "nothing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            net.enlarge(features, 0.5, wrong, grid)
        with pytest.raises(ValueError, match=sentence):
            net.enlarge(features, 0.5, grid, wrong)


# Checkpoints


@pytest.mark.parametrize("config", [TINY, ODD, dataclasses.replace(ODD, kernel=1, rounding="reference", in_channels=1)])
@pytest.mark.parametrize("half", [True, False])
def test_every_size_is_recovered(tmp_path, config, half):
    net = tiny(config)
    (tmp_path / "a.safetensors").write_bytes(checkpoint.save_network(net, half=half))
    found = load_network(tmp_path / "a.safetensors")
    assert found.config == config
    checkpoint.rehearse(found)
    assert torch.equal(found.sub_mean.bias, net.sub_mean.bias)
    save_file(net.state_dict(), tmp_path / "bare.safetensors")
    bare = load_network(tmp_path / "bare.safetensors")
    assert bare.config == dataclasses.replace(config, rounding="reference")


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_the_unused_tail_of_the_authors_is_dropped(tmp_path, scale):
    net = tiny()
    state, tail = dict(net.state_dict()), "feature_extractor.tail."
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    for index, factor in enumerate(steps):
        state[f"{tail}0.{2 * index}.weight"] = torch.rand(4 * factor**2, 4, 3, 3)
        state[f"{tail}0.{2 * index}.bias"] = torch.rand(4 * factor**2)
    state |= {f"{tail}1.weight": torch.rand(2, 4, 3, 3), f"{tail}1.bias": torch.rand(2)}
    torch.save(state, tmp_path / "GAN_model_g.pt")
    read = checkpoint.read_author_checkpoint(tmp_path / "GAN_model_g.pt")
    found = checkpoint.network_from_state(read, catalogue.MIASSR)
    assert found.config == dataclasses.replace(TINY, rounding="reference")
    assert not [key for key in found.state_dict() if "tail" in key]
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:  # noqa: PLR0912 -- a list of cases
    body, p2w = "feature_extractor.body.", "meta_upsampler.P2W.meta_block."
    match how:
        case "missing":
            del state[body + "0.body.2.bias"]
        case "missing-mean":
            del state["sub_mean.bias"]
        case "missing-last":
            del state[p2w + "2.weight"]
        case "no-blocks":
            state = {key: value for key, value in state.items() if not key.startswith(body)}
        case "extra":
            state["feature_extractor.neck.weight"] = torch.ones(1)
        case "shape":
            state[p2w + "0.weight"] = torch.ones(7, 4)
        case "rank":
            state["feature_extractor.head.0.weight"] = torch.ones(4)
        case "empty":
            state["feature_extractor.head.0.weight"] = torch.ones(0, 2, 3, 3)
        case "even":
            state[p2w + "2.weight"] = torch.ones(4 * 4 * 4 * 2, 7)
        case "not-square":
            state[p2w + "2.weight"] = torch.ones(4 * 10 * 2, 7)
        case "nan":
            state[p2w + "2.bias"][3] = torch.nan
        case "integer":
            state["add_mean.bias"] = torch.ones(2, dtype=torch.int32)
        case "huge-index":
            state[body + "999999999.weight"] = torch.ones(1)
        case "many-blocks":
            state[body + "900.weight"] = torch.ones(1)
        case "wide":
            state["feature_extractor.head.0.weight"] = torch.ones(60_000, 1, 1, 1)
    return state


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", r"lacks the tensor feature_extractor\.body\.0\.body\.2\.bias"),
        ("missing-mean", r"lacks the tensor sub_mean\.bias"),
        ("missing-last", r"P2W\.meta_block\.2\.weight is missing"),
        ("no-blocks", "at least 1"),
        ("extra", "neck"),
        ("shape", r"meta_block\.0\.weight in shape \(7, 4\), where miassr needs \(7, 3\)"),
        ("rank", "not of its shapes"),
        ("empty", "not of its shapes"),
        ("even", "no centre"),
        ("not-square", r"meta_block\.2\.weight in shape \(80, 7\), where miassr needs \(72, 7\)"),
        ("nan", r"NaN or infinity in the tensor meta_upsampler\.P2W\.meta_block\.2\.bias"),
        ("integer", r"add_mean\.bias as torch\.int32"),
        ("huge-index", "999999999"),
        ("many-blocks", "too few for the 900 layers"),
        ("wide", "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(how, sentence):
    state = spoil({key: value.clone() for key, value in tiny().state_dict().items()}, how)
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.MIASSR)


def test_another_network_is_refused():
    from tests.makers import almost_nearest

    with pytest.raises(WeightsError, match="It looks like rdst"):
        checkpoint.network_from_state(almost_nearest().state_dict(), catalogue.MIASSR)
    assert catalogue.detect(tiny().state_dict()) == [catalogue.MIASSR]


@pytest.mark.parametrize(
    ("field", "value"), [("n_feats", 5), ("n_blocks", 2), ("hidden", 8), ("kernel", 5), ("in_channels", 1)]
)
def test_metadata_that_disagrees_is_refused(tmp_path, field, value):
    declared = {**dataclasses.asdict(TINY), field: value}
    save_declared(tmp_path / "a.safetensors", tiny().state_dict(), "miassr", declared)
    with pytest.raises(WeightsError, match=field):
        load_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"kernel": 4}, "no centre"), ({"rounding": "up"}, "no rounding 'up'"), ({"hidden": 0}, "at least 1")],
)
def test_configurations_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MiassrConfig(**fields)


def test_recovery_needs_only_the_shapes_that_it_names():
    with pytest.raises(WeightsError, match=r"head\.0\.weight is missing"):
        config_from_state({"conv.weight": torch.zeros(3, 3)})
    assert all(key.startswith("feature_extractor.tail.") for key in RECOMPUTED_BUFFERS)
