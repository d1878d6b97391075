"""MS-GAN's generator and detector: the equations computed a second time, the counts, and nothing foreign loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its own name
from safetensors.torch import save_file
from torch import nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.batch_norm import BatchNorm, fold_into
from medsr_cli.networks.msgan import MsGan, MsGanConfig, config_from_state, example_inputs, made_ready
from medsr_cli.networks.msgan_detector import LesionDetector, LesionDetectorConfig
from medsr_cli.networks.msgan_detector import config_from_state as detector_config_from_state
from medsr_cli.networks.msgan_detector import example_inputs as detector_inputs
from medsr_cli.networks.msgan_ready import ReadyMsGan
from medsr_cli.networks.rdst import Rdst, RdstConfig
from tests.networks.golden import assert_close

TINY = MsGanConfig(n_blocks=2, n_feats=6)
SINGLE = MsGanConfig(extractors=1, n_blocks=3, n_feats=5, in_channels=3)
PLAIN = MsGanConfig(n_blocks=1, n_feats=4, norm="none", second_relu=False)
GENERATORS = [TINY, SINGLE, PLAIN, MsGanConfig(extractors=1, n_blocks=1, n_feats=4, norm="none", second_relu=False)]
SMALL = LesionDetectorConfig(widths="3,5", hidden="7", side=12)
DETECTORS = [SMALL, LesionDetectorConfig(widths="4,4,6", hidden="9,8,3", side=24, in_channels=2)]


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, scales and shifts too: fresh ones would hide a norm that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            drawn = torch.rand(value.shape, generator=generator)
            if key.endswith(("running_var", "norm1.weight", "norm2.weight")):
                value.copy_(0.5 + drawn)
            else:
                fan = value[0].numel() if value.dim() > 1 else 4
                value.copy_((drawn - 0.5) * 2 * (3 / fan) ** 0.5)
    return network.eval()


# -- the generator --------------------------------------------------------------------------------------------


def conv(state, key, x):
    weight, bias = state[key + ".weight"], state.get(key + ".bias")
    rows, columns = x.shape[-2:]
    radius = weight.shape[-1] // 2
    padded = torch.zeros(*x.shape[:2], rows + 2 * radius, columns + 2 * radius, dtype=x.dtype)
    padded[..., radius : radius + rows, radius : radius + columns] = x
    out = torch.zeros(x.shape[0], weight.shape[0], rows, columns, dtype=x.dtype)
    for dr in range(weight.shape[-2]):  # the definition: one product for each tap
        for dc in range(weight.shape[-1]):
            shifted = padded[..., dr : dr + rows, dc : dc + columns]
            out += torch.einsum("oc,nchw->nohw", weight[..., dr, dc], shifted)
    return out if bias is None else out + bias[:, None, None]


def normed(state, key, x):
    if key + ".weight" not in state:
        return x
    mean, var, gain, shift = (state[f"{key}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    scale = gain / torch.sqrt(var + 1e-5)
    return x * scale[:, None, None] + (shift - mean * scale)[:, None, None]


def positive(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def extracted(state, config, name, x):
    first = positive(conv(state, f"{name}.head", x))
    x = first
    for i in range(config.n_blocks):
        block = f"{name}.blocks.{i}"
        y = positive(normed(state, f"{block}.norm1", conv(state, f"{block}.conv1", x)))
        y = normed(state, f"{block}.norm2", conv(state, f"{block}.conv2", y))
        x = x + (positive(y) if config.second_relu else y)
    return first + conv(state, f"{name}.tail", x)


def magnified(state, name, x):
    wide = conv(state, f"{name}.conv", x)
    n, channels, rows, columns = wide.shape
    out = torch.zeros(n, channels // 4, 2 * rows, 2 * columns, dtype=x.dtype)
    for part in range(4):
        out[..., part // 2 :: 2, part % 2 :: 2] = wide[:, part::4]
    return positive(out)


def written_out(net, image):
    """SR×2 and SR×4 from the equations of the specification, in float64."""
    state = {key: value.double() for key, value in net.state_dict().items()}
    f_a = magnified(state, "m1", extracted(state, net.config, "f1", image.double()))
    deep = extracted(state, net.config, "f2", f_a) if net.config.extractors == 2 else f_a
    return conv(state, "c1", f_a), conv(state, "c2", magnified(state, "m2", deep))


def error(found, wanted):
    return float((found - wanted).abs().max() / (wanted.max() - wanted.min()))


@pytest.mark.parametrize("config", [*GENERATORS, dataclasses.replace(TINY, n_feats=16, n_blocks=5)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (16, 12)], ids=str)
def test_is_what_the_equations_say(config, size):
    net = lively(MsGan(config))
    image = torch.rand(2, config.in_channels, *size)
    wanted = written_out(net, image)
    with torch.inference_mode():
        found, exact = net.stages(image), net.double().stages(image.double())
    assert [tuple(sr.shape[-2:]) for sr in found] == [(k * size[0], k * size[1]) for k in (2, 4)]
    for single, double, right in zip(found, exact, wanted, strict=True):
        assert error(double, right) < 1e-12
        assert error(single, right) < 1e-5
    with torch.no_grad():
        assert torch.equal(net.float()(image), found[1])


def test_counts_are_those_of_the_specification():
    counts = {
        "msgan": MsGan(),
        "ms-srresnet": MsGan(MsGanConfig(extractors=1)),
        "msgan-detector": LesionDetector(),
    }
    for name, net in counts.items():
        arch, variant = catalogue.find(name)
        assert sum(p.numel() for p in net.parameters()) == arch.parameters[name]
        assert arch.variant_of(dataclasses.asdict(net.config)) == (variant or name)
    assert round(catalogue.MSGAN.parameters["msgan"], -4) == 2_780_000
    assert round(catalogue.MSGAN.parameters["ms-srresnet"], -4) == 1_520_000
    assert catalogue.MSGAN_DETECTOR.parameters == {"msgan-detector": 4_096_898}


def test_a_batch_is_its_single_images():
    net = lively(MsGan(TINY))
    batch = torch.rand(3, 1, 7, 10)
    with torch.inference_mode():
        torch.testing.assert_close(net(batch), torch.cat([net(i[None]) for i in batch]), atol=1e-5, rtol=0)


def seen_by_one_pixel(config):
    """The columns and rows of the input that the 4 × 4 results of one pixel depend on, as distances from it."""
    net = MsGan(config).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.01)  # nothing cancels and no ReLU closes
    middle = 4 * config.n_blocks + 12
    image = torch.ones(1, 1, 2 * middle + 1, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    net(image)[..., 4 * middle : 4 * middle + 4, 4 * middle : 4 * middle + 4].sum().backward()
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    return {int((axis - middle).abs().max()) for axis in (rows, columns)}


@pytest.mark.parametrize(("extractors", "blocks"), [(2, 1), (2, 2), (2, 3), (1, 1), (1, 4)])
def test_reach_is_how_far_a_result_sees(extractors, blocks):
    config = MsGanConfig(extractors=extractors, n_blocks=blocks, n_feats=2)
    assert seen_by_one_pixel(config) == {MsGan(config).reach}


@pytest.mark.parametrize("config", [TINY, MsGanConfig(extractors=1, n_blocks=2, n_feats=4)], ids=str)
def test_a_tile_with_its_halo_is_part_of_the_whole(config):
    net = lively(MsGan(config)).double()
    image = torch.rand(1, 1, 50, 40, dtype=torch.float64)
    top, left, side, r = 21, 0, 6, net.reach
    rows, columns = slice(max(top - r, 0), top + side + r), slice(max(left - r, 0), left + side + r)
    with torch.inference_mode():
        whole, tile = net(image), net(image[..., rows, columns])
    start = 4 * (top - rows.start), 4 * (left - columns.start)
    part = tile[..., start[0] : start[0] + 4 * side, start[1] : start[1] + 4 * side]
    wanted = whole[..., 4 * top : 4 * (top + side), 4 * left : 4 * (left + side)]
    torch.testing.assert_close(part, wanted, atol=1e-12, rtol=0)


def test_training_after_inference_reaches_every_weight():
    net = MsGan(TINY)
    with torch.inference_mode():
        net.eval()(torch.rand(1, 1, 6, 6))
    small, large = net.train().stages(torch.rand(2, 1, 6, 6))
    (small.square().mean() + large.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.f1.blocks[0].norm1.running_mean.abs().sum() > 0


def test_the_norm_is_pytorchs_less_its_counter():
    torch.manual_seed(2)
    own, reference = BatchNorm(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 1
        assert torch.equal(own(x), reference(x))
    own.eval(), reference.eval()
    assert torch.equal(own(x), reference(x))
    assert not torch.equal(own(x), own.train()(x))
    state = reference.state_dict()
    assert state.pop("num_batches_tracked") == 3
    own.load_state_dict(state)


WIDE = MsGanConfig(n_blocks=2, n_feats=48, in_channels=2)
WIDE_SINGLE = MsGanConfig(extractors=1, n_blocks=1, n_feats=50, norm="none", second_relu=False)


@pytest.mark.parametrize("config", [*GENERATORS, dataclasses.replace(TINY, second_relu=False), WIDE, WIDE_SINGLE])
def test_the_ready_generator_is_the_generator(config):
    net = lively(MsGan(config))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ready = made_ready(net)
    assert isinstance(ready, ReadyMsGan) == (config in (WIDE, WIDE_SINGLE))
    assert not any(isinstance(layer, BatchNorm) for layer in ready.modules())
    assert (ready.reach, ready.config.scale) == (net.reach, 4)
    for size in ((1, 1), (3, 20), (9, 8), (70, 33)):
        image = torch.rand(2, config.in_channels, *size)
        with torch.inference_mode():
            for found, wanted in zip(ready.stages(image), net.stages(image), strict=True):
                assert_close(found, wanted, 1e-5)
            assert_close(ready(image), net(image), 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(value.requires_grad for value in net.parameters())


def test_the_ready_generator_takes_other_precisions():
    net = lively(MsGan(WIDE))
    image = torch.rand(1, 2, 9, 8)
    with torch.no_grad():
        single = net(image)
        half = made_ready(net.to(torch.bfloat16))(image.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), single, 0.05)


def test_a_folded_normalisation_is_the_normalisation():
    torch.manual_seed(0)
    conv, after = nn.Conv2d(3, 5, 3, padding=1).double(), BatchNorm(5).double().eval()
    with torch.no_grad():
        for value in (after.running_mean, after.running_var, after.weight, after.bias):
            value.copy_(torch.rand(5) * 3 + 0.01)
        x = torch.rand(2, 3, 6, 7, dtype=torch.float64)
        wanted = after(conv(x))
        fold_into(conv, after)
        torch.testing.assert_close(conv(x), wanted, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="bias"):
        fold_into(nn.Conv2d(3, 5, 3, bias=False), after)


# -- the detector ---------------------------------------------------------------------------------------------


def found_centre(net, image):
    """The detector from the specification, in float64."""
    config = net.config
    state = {key: value.double() for key, value in net.state_dict().items()}
    x = F.interpolate(image.double(), size=(config.side, config.side), mode="bilinear", align_corners=False)
    for level, _ in enumerate(config.widths.split(",")):
        for block in (0, 1):
            name = f"levels.{level}.{block}"
            y = positive(normed(state, f"{name}.norm1", conv(state, f"{name}.conv1", x)))
            y = normed(state, f"{name}.norm2", conv(state, f"{name}.conv2", y))
            if f"{name}.skip.0.weight" in state:
                x = normed(state, f"{name}.skip.1", conv(state, f"{name}.skip.0", x))
            x = positive(x + y)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax((3, 5))
    x = x.reshape(len(x), -1)
    last = len(config.hidden.split(","))
    for layer in range(last + 1):
        x = x @ state[f"fc.{layer}.weight"].T + state[f"fc.{layer}.bias"]
        x = positive(x) if layer < last else x
    return x


@pytest.mark.parametrize("config", DETECTORS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (12, 12), (31, 17)], ids=str)
def test_the_detector_is_what_the_specification_says(config, size):
    net = lively(LesionDetector(config))
    image = torch.rand(3, config.in_channels, *size)
    with torch.inference_mode():
        found = net(image)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found.double(), found_centre(net, image), atol=1e-5, rtol=1e-5)


def test_the_first_level_alone_changes_its_skip():
    net = LesionDetector()
    assert [len(block.skip) for level in net.levels for block in level] == [2, 0, 2, 0, 2, 0, 0, 0, 0, 0]
    assert net.fc[0].in_features == 2048
    assert net.fc[-1].out_features == 2


def test_a_detector_learns_where_a_spot_is():
    torch.manual_seed(4)
    net = LesionDetector(LesionDetectorConfig(widths="4,8,8", hidden="16", side=16)).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    corners = torch.randint(0, 28, (64, 2))
    images = torch.zeros(64, 1, 32, 32)
    for image, (row, column) in zip(images, corners, strict=True):
        image[0, row : row + 5, column : column + 5] = 1
    wanted = (corners.flip(1) + 2.5) / 32  # x along the columns, y along the rows
    for _ in range(60):
        optimiser.zero_grad()
        (net(images) - wanted).square().sum(1).mean().backward()
        optimiser.step()
    with torch.inference_mode():
        assert (net(images) - wanted).square().sum(1).mean() < 0.02  # of 0.15 for the mean place


# -- checkpoints ----------------------------------------------------------------------------------------------

EVERY = [MsGan(config) for config in GENERATORS] + [LesionDetector(config) for config in DETECTORS]


def entry(network):
    return catalogue.MSGAN if isinstance(network, MsGan) else catalogue.MSGAN_DETECTOR


def inputs(network):
    return (example_inputs if isinstance(network, MsGan) else detector_inputs)(network.config)


@pytest.mark.parametrize("network", EVERY, ids=lambda n: str(n.config))
def test_every_size_survives_a_checkpoint(tmp_path: Path, network):
    lively(network)
    path = tmp_path / "a.safetensors"
    path.write_bytes(checkpoint.save_network(network, {"id": "test"}))
    found = load_network(path)
    assert type(found) is type(network)
    assert found.config == network.config
    checkpoint.rehearse(found)
    with torch.inference_mode():
        torch.testing.assert_close(found(*inputs(network)), network(*inputs(network)), atol=1e-6, rtol=1e-6)
    path.write_bytes(checkpoint.save_network(network, half=True))
    half = load_network(path)
    for key, value in network.state_dict().items():
        expected = value.half().float() if value.ndim > 1 else value
        assert torch.equal(half.state_dict()[key], expected), key


@pytest.mark.parametrize("network", EVERY, ids=lambda n: str(n.config))
def test_every_size_is_recovered_from_the_shapes(tmp_path: Path, network):
    assert catalogue.detect(network.state_dict()) == [entry(network)]
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    found = load_network(tmp_path / "bare.safetensors").config
    for field in dataclasses.fields(network.config):
        if field.name not in entry(network).loose_fields:
            assert getattr(found, field.name) == getattr(network.config, field.name), field.name


def test_the_counters_of_other_trainings_are_dropped():
    network = lively(MsGan(TINY))
    state = dict(network.state_dict())
    for key in list(state):
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    found = checkpoint.network_from_state(state, catalogue.MSGAN)
    assert found.state_dict().keys() == network.state_dict().keys()


def spoil(state, how):
    match how:
        case "missing":
            del state["f1.blocks.1.norm2.running_mean"]
        case "missing-start":
            del state["f1.head.weight"]
        case "missing-block":
            state = {key: value for key, value in state.items() if not key.startswith("f1.blocks.0.")}
        case "half-second":
            state = {key: value for key, value in state.items() if not key.startswith("f2.blocks.")}
        case "extra":
            state["f2.blocks.9.conv1.weight"] = torch.ones(6, 6, 3, 3)
        case "shape":
            state["c2.bias"] = torch.ones(3)
        case "rank":
            state["f1.head.weight"] = torch.ones(6)
        case "nan":
            state["f2.blocks.1.norm1.running_mean"][2] = float("nan")
        case "variance":
            state["f1.blocks.0.norm1.running_var"][2] = -1.0
        case "integer":
            state["c1.bias"] = torch.ones(1, dtype=torch.int64)
        case "wide":
            state["f1.head.weight"] = torch.ones(2_000_000, 1, 1, 1)
        case "huge-index":
            state["f1.blocks.99999999.conv1.weight"] = torch.ones(1)
    return state


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "lacks the tensor f1.blocks.1.norm2.running_mean"),
        ("missing-start", "f1.head.weight is missing"),
        ("missing-block", "f1.blocks.0.conv1.weight is missing"),
        ("half-second", "lacks the tensor f2.blocks.0"),
        ("extra", r"f2\.blocks\.9\.conv1\.weight"),
        ("shape", r"c2.bias in shape \(3,\)"),
        ("rank", "not of its shapes"),
        ("nan", "NaN or infinity in the tensor f2.blocks.1.norm1.running_mean"),
        ("variance", "f1.blocks.0.norm1.running_var has variances below zero"),
        ("integer", "c1.bias as torch.int64"),
        ("wide", "shape"),
        ("huge-index", r"f1\.blocks\.99999999"),
    ],
)
def test_what_does_not_fit_is_named(how, sentence):
    state = spoil({key: value.clone() for key, value in lively(MsGan(TINY)).state_dict().items()}, how)
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.MSGAN)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("fc.1.bias", None, "lacks the tensor fc.1.bias"),
        ("fc.0.weight", None, "fc.0.weight is missing"),
        ("fc.0.weight", torch.ones(7, 46), "fc.0.weight in shape"),
        ("levels.1.0.skip.0.weight", torch.ones(5, 4, 1, 1), "skip.0.weight in shape"),
        ("levels.0.1.norm1.running_var", -torch.ones(3), "variances below zero"),
        ("levels.0.2.conv1.weight", torch.ones(3, 3, 3, 3), "levels.0.2.conv1.weight"),
        ("fc.0.bias", torch.full((7,), float("inf")), "NaN or infinity"),
    ],
)
def test_what_does_not_fit_the_detector_is_named(key, value, sentence):
    state = dict(lively(LesionDetector(SMALL)).state_dict())
    state[key] = value
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.MSGAN_DETECTOR)


def test_more_levels_than_a_side_can_be_halved_are_refused():
    state = {f"levels.{i}.0.conv1.weight": torch.ones(1, 1, 3, 3) for i in range(900)}
    state |= {f"fc.{i}.weight": torch.ones(1, 1) for i in range(2)}
    with pytest.raises(WeightsError, match="shapes"):
        checkpoint.network_from_state(state, catalogue.MSGAN_DETECTOR)


def test_other_methods_are_refused():
    rdst = dict(Rdst(RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6)).state_dict())
    generator, detector = dict(MsGan(TINY).state_dict()), dict(LesionDetector(SMALL).state_dict())
    for state, method in ((rdst, "rdst"), (detector, "msgan-detector")):
        with pytest.raises(WeightsError, match=rf"is not msgan.*missing.*looks like {method}"):
            checkpoint.network_from_state(state, catalogue.MSGAN)
    with pytest.raises(WeightsError, match=r"is not msgan-detector.*missing.*looks like msgan"):
        checkpoint.network_from_state(generator, catalogue.MSGAN_DETECTOR)
    with pytest.raises(WeightsError, match=r"f1\.head\.weight"):
        config_from_state(rdst)
    with pytest.raises(WeightsError, match=r"levels\.0"):
        detector_config_from_state(generator)


@pytest.mark.parametrize("field", ["extractors", "n_blocks", "n_feats", "in_channels", "norm"])
def test_a_configuration_that_disagrees_is_refused(field):
    other = {"extractors": 1, "n_blocks": 1, "n_feats": 7, "in_channels": 2, "norm": "none"}[field]
    declared = dataclasses.replace(TINY, **{field: other})
    with pytest.raises(WeightsError, match=field):
        checkpoint.network_from_state(dict(MsGan(TINY).state_dict()), catalogue.MSGAN, declared)


@pytest.mark.parametrize(
    "fields", [{"extractors": 3}, {"extractors": 0}, {"n_blocks": 0}, {"n_feats": -1}, {"norm": "layer"}]
)
def test_impossible_generators_are_refused(fields):
    with pytest.raises(ValueError, match=r"extractors|at least|norm"):
        MsGanConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"widths": ""}, {"widths": "3,x"}, {"widths": "0"}, {"side": 100}, {"side": 1 << 13}, {"hidden": "-1"},
     {"widths": ",".join(["1"] * 40)}],
)  # fmt: skip
def test_impossible_detectors_are_refused(fields):
    with pytest.raises(ValueError, match=r"invalid literal|at least|halved"):
        LesionDetectorConfig(**fields)
