"""Released Cohf-T: the authors' outputs, every oddity of theirs by its definition, and their checkpoints."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network
from medsr_cli.networks.cohft_blocks import gradient_map
from medsr_cli.networks.cohft_released import (
    SIDES,
    ReleasedCohft,
    ReleasedCohftConfig,
    StoredGradientMap,
    config_from_state,
    example_inputs,
)
from medsr_cli.networks.cohft_released_attention import HeadCorrelation, InterModality, TokenAttention, WindowBlock
from tests.networks.golden import assert_close, fixture, procedural_state, save_declared, specification

PARAMETERS = {2: 106_597_924, 3: 100_047_844, 4: 97_920_164}
TINY = ReleasedCohftConfig(
    scale=2, side=6, stages=3, feature_dim=4, growth=3, rrdbs=4, rdbs=2, convs=3, heads=2,
    window=3, patch=2,
)  # fmt: skip


def tiny(config: ReleasedCohftConfig = TINY) -> ReleasedCohft:
    """A network in which nothing is zero: scales, tables and γ are random too."""
    torch.manual_seed(3)
    net = ReleasedCohft(config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("get_g"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def inputs(config: ReleasedCohftConfig = TINY, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    low, high = config.side, config.scale * config.side
    return torch.rand(batch, 1, low, low, generator=g), torch.rand(batch, 1, high, high, generator=g)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_the_released_network(scale):
    facts, state, tensors = fixture(f"cohft_x{scale}")
    net = checkpoint.network_from_state(state, catalogue.COHFT_RELEASED)
    declared = {**facts["config"], "side": facts["config"]["lr_size"], "growth": facts["config"]["growth_channels"]}
    for name, value in declared.items():
        if hasattr(net.config, name):
            assert getattr(net.config, name) == value, name
    for case in facts["cases"]:
        with torch.inference_mode():
            image, gradient = net.with_gradient(tensors[case["x"]], tensors[case["r"]])
            alone = net(tensors[case["x"]], tensors[case["r"]])
        assert (image - tensors[case["y"]]).abs().max() <= 2e-5
        assert (gradient - tensors[case["g"]]).abs().max() <= 2e-5
        assert torch.equal(alone, image)


def test_equals_its_own_fixture():
    facts, _, tensors = fixture("cohft_procedural")
    net = ReleasedCohft(ReleasedCohftConfig(**facts["released"])).eval()
    seed = facts["procedural_seed"]
    state = procedural_state(net, seed, keep="get_g", name=lambda key: key.replace("model.5.", "HR_conv0_new.0."))
    net.load_state_dict(state)
    with torch.inference_mode():
        image, gradient = net.with_gradient(tensors["released/x"], tensors["released/r"])
    for found, wanted in ((image, tensors["released/y"]), (gradient, tensors["released/g"])):
        assert_close(found, wanted, 1e-5)


def laid_out(**fields) -> ReleasedCohft:
    with torch.device("meta"):
        return ReleasedCohft(ReleasedCohftConfig(**fields))


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_names_and_shapes_are_those_of_the_authors(scale):
    net = laid_out(scale=scale, side=SIDES[scale])
    assert count(net) == PARAMETERS[scale]
    assert len(net.state_dict()) == (1220 if scale == 4 else 1216)
    wanted = specification(f"cohft_x{scale}_state_dict")["keys"]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == wanted


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"stages": 2, "rrdbs": 13, "rdbs": 2, "convs": 3, "feature_dim": 16, "growth": 16}, (12.01, 20.26)),
        ({"stages": 3, "rrdbs": 18, "rdbs": 3, "convs": 3, "feature_dim": 16, "growth": 16}, (18.19, 30.57)),
        ({}, (97.92, 163.91)),
    ],
)
def test_other_sizes_have_the_parameters_that_the_specification_counts(fields, millions):
    for window, wanted in zip((5, 6), millions, strict=True):
        assert count(laid_out(window=window, **fields)) / 1e6 == pytest.approx(wanted, abs=0.005)


def test_operations_are_those_of_the_released_network():
    """261.0 GFLOPs for T2 of 60x60 at x4, of which the parts without effect are not computed here."""
    net = laid_out()
    image, guide = (tensor.to("meta") for tensor in example_inputs(net.config))
    low, high = (torch.zeros(1, 32, side, side, device="meta") for side in (60, 240))
    with FlopCounterMode(display=False) as computed:
        net.with_gradient(image, guide)
    with FlopCounterMode(display=False) as skipped:
        net.sam1(low, net.t1_adap_1(low, high))
    assert (computed.get_total_flops() + skipped.get_total_flops()) / 1e9 == pytest.approx(261.0, abs=0.1)
    assert skipped.get_total_flops() > 7e9


# The oddities, each against its definition.


def test_tensors_without_effect_are_not_computed_with_and_all_others_are():
    net = tiny()
    image, gradient = net.with_gradient(*inputs())
    (image * torch.rand_like(image)).sum().add((gradient * torch.rand_like(gradient)).sum()).backward()
    for name, parameter in net.named_parameters():
        without = name.startswith(("select1.", "sam1.", "t1_adap_1.", "t1_concat_", "get_g_")) or ".norm1." in name
        assert (parameter.grad is None) == without, name
        assert without or parameter.grad.any(), name


def test_the_first_stage_has_the_gate_of_the_second_and_the_third_takes_what_it_let_through():
    net = tiny()
    g = torch.Generator().manual_seed(2)
    main, prior, structure = (torch.rand(1, 4, 6, 6, generator=g) for _ in range(3))
    context = torch.rand(1, 4, 12, 12, generator=g)
    with torch.inference_mode():
        local = net.conv_f1(net.model[1].sub[0](main))
        s = net.b_block_1(net.b_concat_1(torch.cat((prior, local), dim=1)))
        gated = net.select2(local) * s
        _, prior_1, structure_1 = net._stage(1, main, prior, context)
        torch.testing.assert_close(prior_1, s + gated)
        torch.testing.assert_close(structure_1, s + gated)
        main_2, prior_2, structure_2 = net._stage(2, main, structure, context)
        torch.testing.assert_close(prior_2, main_2 - net.model[1].sub[1](main), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(prior_2, structure_2)
        adapted = net.t1_adap_3(prior_2, context)
        local = net.conv_f3(net.model[1].sub[2](main_2))
        s = net.b_block_3(net.b_concat_3(torch.cat((prior_2, local), dim=1)))
        _, prior_3, structure_3 = net._stage(3, main_2, prior_2, context)
        torch.testing.assert_close(structure_3, s + net.sam3(s, adapted))
        assert torch.equal(prior_3, structure_3)


@pytest.mark.parametrize("strided", [False, True])
def test_windows_are_cut_and_scrambled_pixel_by_pixel(strided):
    config = dataclasses.replace(TINY, side=12, window=3, patch=2)
    block = WindowBlock(config, strided=strided)
    d, r, w, k = 4, 12, 3, 4
    features = torch.rand(2, d, r, r)
    tokens = block._cut(features)
    assert tokens.shape == (2, k * k, d * w * w)
    for u, v, c, a, b in itertools.product(range(k), range(k), range(d), range(w), range(w)):
        pixel = features[:, c, u + k * a, v + k * b] if strided else features[:, c, u * w + a, v * w + b]
        assert torch.equal(tokens[:, u * k + v, (c * w + a) * w + b], pixel)
    back = block._scramble(tokens)
    for t, c, a, b in itertools.product(range(k * k), range(d), range(w), range(w)):
        if strided:  # channel t·d + c of the stack goes to channel // k², at the place that the rest says
            channel, place = divmod(t * d + c, k * k)
            row, column = a * k + place // k, b * k + place % k
        else:
            channel, (row, column) = c, divmod((t * w + a) * w + b, r)
        assert torch.equal(back[:, channel, row, column], tokens[:, t, (c * w + a) * w + b])
    assert not torch.equal(back, features)


def test_patches_are_cut_by_row_column_channel_and_folded_back():
    block = InterModality(dataclasses.replace(TINY, side=6, patch=2))
    features = torch.rand(2, 4, 6, 6)
    tokens = block._cut(features)
    for i, j, a, b, c in itertools.product(range(3), range(3), range(2), range(2), range(4)):
        assert torch.equal(tokens[:, i * 3 + j, (a * 2 + b) * 4 + c], features[:, c, i * 2 + a, j * 2 + b])
    assert torch.equal(block._fold(tokens), features)


def test_attention_is_its_formula():
    torch.manual_seed(5)
    attention = TokenAttention(12, 3).double()
    with torch.no_grad():
        attention.layer_att_other.gamma.fill_(0.7)
        x, z = torch.randn(2, 5, 12).double(), torch.randn(2, 5, 12).double()
        q, kv = x @ attention.to_q.weight.T, z @ attention.to_kv_other.weight.T
        k, v = kv[..., :12], kv[..., 12:]
        heads = [slice(4 * i, 4 * i + 4) for i in range(3)]
        o = [torch.softmax(q[..., h] @ k[..., h].mT / 2, dim=-1) @ v[..., h] for h in heads]
        a = torch.cat([part.mT for part in o], dim=-1)  # (N, d', M·n), head-major
        a = a + 0.7 * torch.softmax(a @ a.mT, dim=-1) @ a
        o = torch.cat([part.mT for part in a.split(5, dim=-1)], dim=-1)
        expected = (x + o + q) @ attention.proj.weight.T + attention.proj.bias
        torch.testing.assert_close(attention(x, z), expected)


def test_correlation_of_heads_starts_without_effect():
    values = torch.randn(1, 2, 5, 3)
    assert torch.equal(HeadCorrelation()(values), values)


def test_stored_kernels_give_the_gradient_map():
    image = torch.rand(2, 1, 7, 5)
    torch.testing.assert_close(StoredGradientMap()(image), gradient_map(image))


# What holds for every network.


def test_a_batch_is_its_single_images():
    net, (image, guide) = tiny().double(), (tensor.double() for tensor in inputs(batch=3))
    with torch.inference_mode():
        together = net(image, guide)
        alone = torch.cat([net(image[i : i + 1], guide[i : i + 1]) for i in range(3)])
    assert together.shape == (3, 1, 12, 12)
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)


def test_single_precision_is_close_to_double():
    net, (image, guide) = tiny(), inputs()
    with torch.inference_mode():
        single = net(image, guide)
        double = net.double()(image.double(), guide.double())
    assert double.dtype == torch.float64
    assert (single - double).abs().max() <= 1e-5 * (double.max() - double.min())


def test_trains_after_inference():
    net, (image, guide) = tiny(), inputs()
    with torch.inference_mode():
        before = net(image, guide)
    image_out, gradient = net.with_gradient(image, guide)
    torch.testing.assert_close(image_out, before)
    (image_out.mean() + gradient.mean()).backward()
    assert net.t1_fea_conv[0].weight.grad.abs().sum() > 0
    assert net.select1.conv.weight.grad is None
    assert not net.get_g_nopadding.weight_h.requires_grad


@pytest.mark.parametrize(
    ("image", "guide", "sentence"),
    [
        ((1, 1, 8, 8), (1, 1, 16, 16), "6 x 6 pixels only"),
        ((1, 1, 6, 12), (1, 1, 12, 24), "6 x 6 pixels only"),
        ((1, 1, 6, 6), (1, 1, 6, 6), "guide of shape"),
        ((2, 1, 6, 6), (1, 1, 12, 12), "guide of shape"),
        ((1, 3, 6, 6), (1, 3, 12, 12), "guide of shape"),
    ],
)
def test_other_sizes_are_refused_in_a_sentence(image, guide, sentence):
    net = tiny()
    assert net.side == 6
    with pytest.raises(ValueError, match=sentence):
        net(torch.zeros(image), torch.zeros(guide))


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 5},
        {"side": 61},
        {"side": 0},
        {"side": 6000},
        {"window": 0},
        {"stages": 1},
        {"rrdbs": 3},
        {"rdbs": 0},
        {"convs": 1},
        {"heads": 0},
        {"heads": 3},
        {"growth": 0},
        {"feature_dim": 0},
    ],
)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(ValueError, match=r"Cohf-T|multiple|within|divided"):
        ReleasedCohftConfig(**fields)


@pytest.mark.parametrize(
    ("stages", "rrdbs", "per_stage", "tail"), [(4, 23, 5, 3), (2, 13, 5, 3), (3, 4, 1, 1), (4, 8, 2, 0), (3, 3, 1, 0)]
)
def test_rrdbs_are_shared_out_among_stages_and_tail(stages, rrdbs, per_stage, tail):
    config = ReleasedCohftConfig(stages=stages, rrdbs=rrdbs)
    assert (config.rrdb_per_stage, config.tail_rrdb) == (per_stage, tail)


# Checkpoints.

ODD = [
    TINY,
    dataclasses.replace(TINY, scale=3, side=20, stages=2, window=5, patch=2, rrdbs=7, convs=4),
    dataclasses.replace(TINY, scale=4, side=4, stages=5, feature_dim=6, window=2, patch=1, rrdbs=8, rdbs=1),
    dataclasses.replace(TINY, scale=2, window=1, patch=3, heads=1, rrdbs=5, growth=7),
]


@pytest.mark.parametrize("config", ODD)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path, config, with_metadata):
    net, path = tiny(config), tmp_path / "odd.safetensors"
    if with_metadata:
        path.write_bytes(checkpoint.save_network(net))
    else:
        save_file({key: value.clone() for key, value in net.state_dict().items()}, path)
    found = load_network(path)
    loose = () if with_metadata else catalogue.COHFT_RELEASED.loose_fields
    for field in dataclasses.fields(config):
        if field.name not in loose:
            assert getattr(found.config, field.name) == getattr(config, field.name), field.name
    image, guide = inputs(config)
    if found.config == config:
        with torch.inference_mode():
            assert torch.equal(found(image, guide), net(image, guide))
    checkpoint.rehearse(found)


def test_the_convolution_of_two_names_stays_one(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(checkpoint.save_network(tiny()))
    found = load_network(path)
    assert found.HR_conv0_new[0] is found.model[-2]
    assert torch.equal(found.state_dict()["HR_conv0_new.0.weight"], found.state_dict()["model.5.weight"])
    with torch.no_grad():
        found.HR_conv0_new[0].weight.fill_(2.0)
    assert found.model[5].weight.eq(2.0).all()
    half = checkpoint.save_network(tiny(), half=True)
    (tmp_path / "half.safetensors").write_bytes(half)
    assert load_network(tmp_path / "half.safetensors").config == TINY


def test_authors_layouts_are_told_and_read(tmp_path):
    state = tiny().state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "sepoch9x2_best_model.pt")
    read = checkpoint.read_author_checkpoint(tmp_path / "sepoch9x2_best_model.pt")
    assert checkpoint.detect_method(read).id == "cohft-released"
    net = checkpoint.network_from_state(read, catalogue.COHFT_RELEASED)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


DELETED = {"missing": "b_LR_conv.0.weight", "missing-twin": "model.5.bias", "missing-start": "model.0.weight"}
REPLACED = {
    "extra": ("sam1.extra", (1,)),
    "shape": ("sam2.ln11.weight", (5, 6)),
    "rank": ("sam1.con4.weight", (4,)),
    "not-square": ("b_block_1.swin_normal.pos_embedding", (1, 4, 4 * 8)),
    "scale": ("sam1.con4.weight", (4, 4, 7, 7)),
    "huge-side": ("sam1.ln11.weight", (60_000, 1)),
    "huge-block": ("model.1.sub.999999999.weight", (1,)),
    "many-blocks": ("model.1.sub.900.weight", (1,)),
    "empty": ("model.0.weight", (0, 1, 3, 3)),
}


def spoil(state: dict[str, torch.Tensor], how: str) -> None:
    if how in DELETED:
        del state[DELETED[how]]
    elif how in REPLACED:
        key, shape = REPLACED[how]
        state[key] = torch.ones(shape)
    elif how == "unequal-twin":
        state["HR_conv0_new.0.bias"] = state["HR_conv0_new.0.bias"] + 1e-3
    elif how == "nan":
        state["select3.conv.bias"][0] = float("nan")
    elif how == "nan-twin":
        state["model.5.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "lacks the tensor b_LR_conv.0.weight"),
        ("missing-twin", "lacks the tensor model.5.bias"),
        ("missing-start", "model.0.weight is missing"),
        ("unequal-twin", "HR_conv0_new.0.bias and model.5.bias differ"),
        ("extra", "'sam1.extra'"),
        ("shape", r"sam2.ln11.weight in shape \(5, 6\)"),
        ("rank", "not of its shapes"),
        ("not-square", "A window of 8 is not square"),
        ("nan", "NaN or infinity in the tensor select3.conv.bias"),
        ("nan-twin", "NaN or infinity in the tensor HR_conv0_new.0.bias"),
        ("scale", "not by 7"),
        ("huge-side", "side of 60000 pixels"),
        ("huge-block", "beyond 1000"),
        ("many-blocks", "too few for"),
        ("empty", "not of its shapes"),
    ],
)
def test_first_offender_is_named(how, sentence):
    state = dict(tiny().state_dict())
    spoil(state, how)
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.COHFT_RELEASED, name="bad.pt")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReleasedCohftConfig)])
def test_metadata_that_disagrees_is_refused(tmp_path, field):
    declared = dataclasses.asdict(TINY)
    declared[field] = 3 if field == "heads" else declared[field] * 2  # 3 heads divide neither 36 nor 16
    save_declared(tmp_path / "a.safetensors", tiny().state_dict(), "cohft-released", declared)
    with pytest.raises(WeightsError, match=f"{field} = |cannot have"):
        load_network(tmp_path / "a.safetensors")


def test_another_network_is_refused():
    with pytest.raises(WeightsError, match=r"model\.0\.weight"):
        config_from_state({"conv.weight": torch.zeros(3, 3)})
