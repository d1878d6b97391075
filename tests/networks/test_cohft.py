"""Cohf-T of the paper: its equations, its counts, any size, and its checkpoints."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.cohft import Cohft, CohftConfig, Stage, config_from_state
from medsr_cli.networks.cohft_attention import (
    Attention,
    ResidualMlp,
    WindowAttention,
    correlate_heads,
    merge_strided,
    partition_strided,
)
from medsr_cli.networks.cohft_blocks import AdaptiveInstanceNorm, DenseBlock, Rrdb, gradient_map
from medsr_cli.networks.rdst import pad_to_multiple
from tests.networks.golden import assert_close, fixture, procedural_state, save_declared

TINY = CohftConfig(
    scale=2, stages=2, feature_dim=4, growth=3, rrdb_per_stage=1, rdbs=2, convs=3, heads=2, window=2, patch=3
)
VARIANTS = catalogue.COHFT.variants


def tiny(config: CohftConfig = TINY) -> Cohft:
    """A network in which nothing is zero: AdaIN and norms are random too."""
    torch.manual_seed(3)
    net = Cohft(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(height: int, width: int, scale: int = 2, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    return (
        torch.rand(batch, 1, height, width, generator=g),
        torch.rand(batch, 1, scale * height, scale * width, generator=g),
    )


def laid_out(variant: str, scale: int) -> Cohft:
    with torch.device("meta"):
        return Cohft(CohftConfig(scale=scale, **VARIANTS[variant]))


@pytest.mark.parametrize(
    ("variant", "counts"),
    [
        ("cohft-s", (1_489_288, 1_538_248, 1_569_672)),
        ("cohft-m", (2_421_979, 2_483_819, 2_533_275)),
        ("cohft-l", (18_645_742, 18_943_662, 19_212_782)),
    ],
)
def test_parameters_are_those_of_the_specification(variant, counts):
    """1.489, 1.538, 1.570; 2.422, 2.484, 2.533; 18.646, 18.944, 19.213 millions for x2, x3 and x4."""
    found = tuple(sum(p.numel() for p in laid_out(variant, scale).parameters()) for scale in (2, 3, 4))
    assert found == counts
    assert catalogue.COHFT.parameters[variant] == found[2]


@pytest.mark.parametrize(("variant", "gflops"), [("cohft-s", 17.4), ("cohft-m", 26.3), ("cohft-l", 224.8)])
def test_operations_are_those_of_the_specification(variant, gflops):
    net = laid_out(variant, 4)
    image, guide = (tensor.to("meta") for tensor in inputs(60, 60, 4))
    with FlopCounterMode(display=False) as counted:
        net.with_gradient(image, guide)
    assert counted.get_total_flops() / 1e9 == pytest.approx(gflops, rel=0.003)


def test_equals_its_own_fixture():
    """What the ambiguities were decided to be stays decided: trained checkpoints depend on it."""
    facts, _, tensors = fixture("cohft_procedural")
    net = Cohft(CohftConfig(**facts["paper"])).eval()
    net.load_state_dict(procedural_state(net, facts["procedural_seed"]))
    with torch.inference_mode():
        image, gradient = net.with_gradient(tensors["paper/x"], tensors["paper/r"])
        alone = net(tensors["paper/x"], tensors["paper/r"])
    assert torch.equal(alone, image)
    for found, wanted in ((image, tensors["paper/y"]), (gradient, tensors["paper/g"])):
        assert_close(found, wanted, 1e-5)


# The parts, each against its equation.


def test_gradient_map_is_the_authors():
    tensors = fixture("cohft_preprocess").tensors
    assert (gradient_map(tensors["x0"][:, None])[:, 0] - tensors["grad"]).abs().max() <= 1e-5


def test_gradient_map_is_its_formula():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 5.0, 4.0]])[None, None]
    found = gradient_map(image)[0, 0]
    assert found[0, 0] == pytest.approx((2.0**2 + 1.0**2 + 1e-6) ** 0.5)  # zeros outside
    assert found[1, 1] == pytest.approx((1.0**2 + 2.0**2 + 1e-6) ** 0.5)
    assert gradient_map(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(1e-3)


def test_dense_blocks_are_their_formula():
    torch.manual_seed(1)
    block, x = DenseBlock(3, 2, 3), torch.rand(1, 3, 5, 4)
    with torch.no_grad():
        a = torch.nn.functional.gelu(block.conv1[0](x))
        b = torch.nn.functional.gelu(block.conv2[0](torch.cat((x, a), dim=1)))
        torch.testing.assert_close(block(x), x + 0.2 * block.conv3[0](torch.cat((x, a, b), dim=1)))
        rrdb = Rrdb(3, 2, 2, 3)
        torch.testing.assert_close(rrdb(x), x + 0.2 * rrdb.RDB2(rrdb.RDB1(x)))


def test_strided_windows_take_pixels_far_apart():
    tokens = torch.rand(2, 6, 9, 4)
    windows = partition_strided(tokens, 3)
    assert windows.shape == (2, 2, 3, 9, 4)
    for u, v, a, b in itertools.product(range(2), range(3), range(3), range(3)):
        assert torch.equal(windows[:, u, v, a * 3 + b], tokens[:, u + 2 * a, v + 3 * b])
    assert torch.equal(merge_strided(windows, 3), tokens)


def test_attention_is_its_equations():
    torch.manual_seed(5)
    attention = Attention(6, 3).double()
    x, y = torch.randn(2, 4, 6).double(), torch.randn(2, 5, 6).double()
    with torch.no_grad():
        v_hat = []
        for m in range(3):
            q, k, v = (
                tokens @ projection.weight[m].T
                for tokens, projection in ((x, attention.to_q), (y, attention.to_k), (y, attention.to_v))
            )
            v_hat.append(torch.softmax(q @ k.mT / 2**0.5, dim=-1) @ v)
        expected = []
        for m in range(3):
            logits = torch.stack([(v_hat[m] * v_hat[j]).sum(-1) for j in range(3)], dim=-1)
            weights = torch.softmax(logits, dim=-1)
            expected.append(v_hat[m] + sum(weights[..., j : j + 1] * v_hat[j] for j in range(3)))
        torch.testing.assert_close(attention(x, y), torch.cat(expected, dim=-1))


def test_one_head_is_correlated_with_itself_alone():
    values = torch.randn(2, 1, 3, 4)
    torch.testing.assert_close(correlate_heads(values), 2 * values[:, 0])


@pytest.mark.parametrize("strided", [False, True])
def test_pixels_of_other_windows_do_not_matter(strided):
    """Attention stays inside a window, of neighbours or of pixels far apart, once the convolution is 1x1."""
    torch.manual_seed(2)
    module = WindowAttention(4, 2, 3, strided=strided).eval()
    module.conv_end = torch.nn.Conv2d(4, 4, 1)
    features = torch.rand(1, 4, 6, 6)
    changed = features.clone()
    changed[0, 1, 0, 0] += 1.0  # one channel: the norms would take away a step in all of them
    with torch.inference_mode():
        moved = (module(changed) - module(features)).abs().sum(dim=1)[0] > 1e-7
    expected = torch.zeros(6, 6, dtype=torch.bool)
    if strided:
        expected[::2, ::2] = True
    else:
        expected[:3, :3] = True
    assert torch.equal(moved, expected)


def test_adaptive_norm_starts_by_giving_the_guide_the_statistics_of_the_query():
    module = AdaptiveInstanceNorm(3, 2, affine=1)
    query, guide = 2 + 3 * torch.randn(2, 3, 8, 6), torch.rand(2, 3, 16, 12)
    with torch.no_grad():
        out = module(query, guide)
    for c in range(3):
        torch.testing.assert_close(out[:, c].mean((1, 2)), query[:, c].mean((1, 2)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            out[:, c].std((1, 2), correction=0), query[:, c].std((1, 2), correction=0), rtol=1e-3, atol=1e-3
        )
    assert module.conv_gamma.out_channels == 1
    assert AdaptiveInstanceNorm(3, 2, affine=3, released=True).conv_gamma.out_channels == 3


def test_residual_mlp_normalises_the_channels_of_each_pixel():
    torch.manual_seed(4)
    mlp, features = ResidualMlp(4), torch.rand(1, 4, 3, 2)
    with torch.no_grad():
        pixel = features[0, :, 2, 1]
        normed = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-5).sqrt()
        hidden = mlp.fc1(normed)
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
        expected = pixel + mlp.fc2(torch.nn.functional.gelu(hidden))
        torch.testing.assert_close(mlp(features)[0, :, 2, 1], expected)


def test_a_stage_adds_the_branch_through_its_gate():
    torch.manual_seed(6)
    stage = Stage(TINY).eval()
    stream, prior, guide = torch.rand(1, 4, 6, 6), torch.rand(1, 4, 6, 6), torch.rand(1, 4, 12, 12)
    with torch.inference_mode():
        torch.nn.init.zeros_(stage.gate.weight)
        added = []
        for bias in (-100.0, 0.0, 100.0):
            torch.nn.init.constant_(stage.gate.bias, bias)
            out, branch = stage(stream, prior, guide)
            added.append(out - stage.rrdbs(stream))
    torch.testing.assert_close(added[0], torch.zeros_like(branch), atol=1e-6, rtol=0)
    torch.testing.assert_close(added[1], 0.5 * branch, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[2], branch, atol=1e-5, rtol=1e-4)


def test_the_guide_enters_by_its_gradient_only():
    net = tiny()
    image, guide = inputs(6, 6)
    with torch.inference_mode():
        base = net(image, guide)
        assert not torch.allclose(net(image, guide.flip(-1)), base, atol=1e-4)
        torch.testing.assert_close(net(image, -guide), base)  # the magnitude of a gradient has no sign


# What holds for every network.


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (3, 5), (6, 6), (7, 6), (13, 20)])
@pytest.mark.parametrize("scale", [2, 3])
def test_any_size_is_padded_and_cropped(size, scale):
    net = tiny(dataclasses.replace(TINY, scale=scale))
    image, guide = inputs(*size, scale, batch=2)
    h, w = size[0] * scale, size[1] * scale
    with torch.inference_mode():
        found = net.with_gradient(image, guide)
        whole = net.with_gradient(pad_to_multiple(image, 6), pad_to_multiple(guide, 6 * scale))
    for cropped, padded in zip(found, whole, strict=True):
        assert cropped.shape == (2, 1, h, w)
        assert tuple(padded.shape[-2:]) == (scale * (size[0] + -size[0] % 6), scale * (size[1] + -size[1] % 6))
        assert torch.equal(cropped, padded[..., :h, :w])


def test_the_multiple_is_that_of_windows_and_patches():
    assert CohftConfig().multiple == catalogue.COHFT.size_multiple == 30


def test_a_batch_is_its_single_images():
    net = tiny().double()
    image, guide = (tensor.double() for tensor in inputs(7, 12, batch=3))
    with torch.inference_mode():
        together = net(image, guide)
        alone = torch.cat([net(image[i : i + 1], guide[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)


def test_single_precision_is_close_to_double():
    net = tiny()
    image, guide = inputs(12, 18)
    with torch.inference_mode():
        single = net(image, guide)
        double = net.double()(image.double(), guide.double())
    assert double.dtype == torch.float64
    assert (single - double).abs().max() <= 1e-5 * (double.max() - double.min())


def test_trains_after_inference_and_every_parameter_takes_part():
    net = tiny()
    image, guide = inputs(7, 6)
    with torch.inference_mode():
        before = net(image, guide)
    found, gradient = net.with_gradient(image, guide)
    torch.testing.assert_close(found, before)
    (found * torch.rand_like(found)).sum().add((gradient * torch.rand_like(gradient)).sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("guide", [(1, 1, 6, 6), (2, 1, 12, 12), (1, 2, 12, 12), (1, 1, 12, 13)])
def test_a_guide_on_another_grid_is_refused(guide):
    with pytest.raises(ValueError, match="needs a guide of shape"):
        tiny()(torch.zeros(1, 1, 6, 6), torch.zeros(guide))


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 5},
        {"stages": 0},
        {"rdbs": 0},
        {"convs": 1},
        {"growth": 0},
        {"feature_dim": 0},
        {"heads": 0},
        {"heads": 3},
        {"heads": 32, "feature_dim": 16},
        {"window": 0},
        {"window": 10**9},
        {"patch": 65},
        {"window": 63, "patch": 64},
    ],
)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(ValueError, match=r"Cohf-T|within|divided|common multiple"):
        CohftConfig(**fields)


# Checkpoints.

ODD = [
    TINY,
    dataclasses.replace(TINY, scale=3, stages=1, feature_dim=6, heads=3, window=5, patch=2, convs=4, rdbs=1),
    dataclasses.replace(TINY, scale=4, stages=3, rrdb_per_stage=2, heads=1, window=1, patch=1, growth=5),
    dataclasses.replace(TINY, window=6, heads=4, feature_dim=8),
]


@pytest.mark.parametrize("config", ODD)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path, config, with_metadata):
    net, path = tiny(config), tmp_path / "odd.safetensors"
    if with_metadata:
        path.write_bytes(checkpoint.save_network(net))
    else:
        save_file(net.state_dict(), path)
    found = load_network(path)
    loose = () if with_metadata else catalogue.COHFT.loose_fields
    for field in dataclasses.fields(config):
        if field.name not in loose:
            assert getattr(found.config, field.name) == getattr(config, field.name), field.name
    if found.config == config:
        image, guide = inputs(5, 7, config.scale)
        with torch.inference_mode():
            assert torch.equal(found(image, guide), net(image, guide))
    checkpoint.rehearse(found)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_have_their_names(variant):
    config = CohftConfig(scale=2, **VARIANTS[variant])
    assert catalogue.COHFT.variant_of(dataclasses.asdict(config)) == variant
    assert catalogue.COHFT.variant_of(dataclasses.asdict(dataclasses.replace(config, growth=8))) is None
    assert config_from_state(laid_out(variant, 3).state_dict()) == dataclasses.replace(config, scale=3)


def spoil(state: dict[str, torch.Tensor], how: str) -> None:
    match how:
        case "missing":
            del state["stages.1.gate.weight"]
        case "missing-start":
            del state["image_gate.0.weight"]
        case "extra":
            state["stages.1.gate.extra"] = torch.ones(1)
        case "shape":
            state["output_gate.gradient.bias"] = torch.ones(2)
        case "rank":
            state["stages.0.inter_modality.attention.to_q.weight"] = torch.ones(4)
        case "not-square":
            state["stages.0.inter_modality.attention.to_q.weight"] = torch.ones(2, 16, 32)
        case "nan":
            state["output_gate.image.bias"][0] = float("nan")
        case "scale":
            state["stages.0.inter_modality.embed_reference.conv.weight"] = torch.ones(4, 4, 7, 7)
        case "huge-index":
            state["stages.999999999.gate.weight"] = torch.ones(1)
        case "many-blocks":
            state |= {"stages.900.x": torch.ones(1), "stages.0.rrdbs.900.x": torch.ones(1)}
        case "empty":
            state["image_gate.0.weight"] = torch.ones(0, 1, 3, 3)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "lacks the tensor stages.1.gate.weight"),
        ("missing-start", "image_gate.0.weight is missing"),
        ("extra", "'stages.1.gate.extra'"),
        ("shape", r"output_gate.gradient.bias in shape \(2,\), where cohft needs \(1,\)"),
        ("rank", "not of its shapes"),
        ("not-square", "A patch of 8 is not square"),
        ("nan", "NaN or infinity in the tensor output_gate.image.bias"),
        ("scale", "not by 7"),
        ("huge-index", "beyond 1000"),
        ("many-blocks", "too few for"),
        ("empty", "not of its shapes"),
    ],
)
def test_first_offender_is_named(how, sentence):
    state = dict(tiny().state_dict())
    spoil(state, how)
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.COHFT, name="bad.pt")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CohftConfig)])
def test_metadata_that_disagrees_is_refused(tmp_path, field):
    declared = dataclasses.asdict(TINY)
    declared[field] = 1000 if field == "window" else declared[field] * 2
    save_declared(tmp_path / "a.safetensors", tiny().state_dict(), "cohft", declared)
    with pytest.raises(WeightsError, match=f"{field}|Windows of 1000"):
        load_network(tmp_path / "a.safetensors")


def test_the_two_cohfts_are_told_apart():
    assert checkpoint.detect_method(tiny().state_dict()).id == "cohft"
    assert [arch.id for arch in catalogue.named("cohft")] == ["cohft", "cohft-released"]
    with pytest.raises(WeightsError, match=r"image_gate\.0\.weight is missing.*It looks like cohft-released"):
        checkpoint.network_from_state(
            {"sam1.x_pos_embedding": torch.ones(1), "t1_fea_conv.0.weight": torch.ones(1)}, catalogue.COHFT
        )
