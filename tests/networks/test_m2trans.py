"""M2Trans against the authors' released network, and what it must keep for any size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from medsr_cli.errors import WeightsError
from medsr_cli.networks import catalogue, checkpoint, load_network, m2trans_ready
from medsr_cli.networks import m2trans as module
from medsr_cli.networks.m2trans import (
    DIV2K_MEAN,
    BlockAttention,
    M2Trans,
    M2TransConfig,
    config_from_state,
    haar_join,
    haar_split,
    instance_norm,
    reflect_to_multiple,
)
from medsr_cli.networks.rdst import Rdst, RdstConfig
from tests.networks.golden import fixture, save_declared, specification

NAMES = ["m2trans_x2_cut", "m2trans_x2", "m2trans_x3", "m2trans_x4"]
TINY = M2TransConfig(n_feats=8, n_blocks=1, scale=2)
ODD = M2TransConfig(n_feats=24, n_blocks=3, block_size=4, in_channels=1, scale=3)


def made(config: M2TransConfig = TINY, seed: int = 3) -> M2Trans:
    torch.manual_seed(seed)
    return M2Trans(config).eval()


def use_plain(net: torch.nn.Module, plain: bool) -> None:
    for layer in net.modules():
        if isinstance(layer, BlockAttention):
            layer.plain = plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["fused", "plain", "with-gradient", "ready"])
def test_equals_the_released_network(name: str, form: str) -> None:
    facts, state, tensors = fixture(name)
    net = checkpoint.network_from_state(state, catalogue.M2TRANS)
    declared = {key: facts["config"][key] for key in ("n_feats", "n_blocks", "scale", "block_size")}
    assert {key: getattr(net.config, key) for key in declared} == declared
    assert sum(value.numel() for value in net.parameters()) == facts["parameters"]
    use_plain(net, form == "plain")
    run = module.made_ready(net) if form == "ready" else net
    for case in facts["cases"]:
        expected = tensors[case["y"]]
        with torch.set_grad_enabled(form == "with-gradient"):
            found = run(tensors[case["x"]])
        assert list(found.shape) == case["out_shape"]
        assert (found - expected).abs().max() <= 1e-5


def test_every_stage_equals_the_released_one() -> None:
    facts, state, tensors = fixture("m2trans_x4")
    net = checkpoint.network_from_state(state, catalogue.M2TRANS)
    with torch.no_grad():
        head = net.head(tensors["x0"])
        torch.testing.assert_close(head, tensors["i0/head"], atol=1e-5, rtol=0)
        torch.testing.assert_close(net.body[0](head), tensors["i0/body0"], atol=1e-4, rtol=0)
        enlarged = net.tail(head + net.body(head))
    torch.testing.assert_close(enlarged, tensors["i0/preclamp"], atol=1e-4, rtol=0)
    assert len(facts["cases"]) == 3


def channels_last(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 3, 1)


def test_parts_equal_the_released_ones() -> None:
    facts, state, tensors = fixture("m2trans_parts")
    attention = BlockAttention(facts["config"]["channels"], facts["config"]["block_size"])
    attention.load_state_dict(state)
    run = {"dwt": haar_split, "idwt": haar_join, "attn": attention}
    for case in facts["cases"]:
        rows, columns = case["out_shape"][-2:]
        image = tensors[case["x"]]
        if case["part"] == "attn":
            image = reflect_to_multiple(image, attention.block)
        found = run[case["part"]](channels_last(image)).permute(0, 3, 1, 2)[..., :rows, :columns]
        torch.testing.assert_close(found, tensors[case["y"]], atol=2e-5, rtol=0)


def test_haar_bands_are_sums_and_differences_of_four_pixels() -> None:
    a, b, c, d = 1.0, 20.0, 300.0, 4000.0  # top left, bottom left, top right, bottom right
    bands = haar_split(torch.tensor([[a, c], [b, d]])[None, :, :, None])[0, 0, 0]
    assert bands.tolist() == [2160.5, 2139.5, 1859.5, 1840.5]  # LL, HL across columns, LH across rows, HH
    image = torch.rand(2, 6, 8, 5, dtype=torch.float64)
    torch.testing.assert_close(haar_join(haar_split(image)), image)
    assert haar_split(image).square().sum().item() == pytest.approx(image.square().sum().item())  # orthonormal


def attention_pixel_by_pixel(layer: BlockAttention, image: torch.Tensor) -> torch.Tensor:
    """The definition, one query at a time: keys of the block and one pixel around it, zero where there is none."""
    c, h, w = image.shape
    q, k, v = functional.conv2d(image[None], layer.qkv_conv.weight)[0].split(c)
    out = torch.zeros_like(image)
    for row in range(h):
        for column in range(w):
            top, left = row // layer.block * layer.block - 1, column // layer.block * layer.block - 1
            logits, values = [], []
            for i in range(layer.window):
                for j in range(layer.window):
                    inside = 0 <= top + i < h and 0 <= left + j < w
                    key = k[:, top + i, left + j] if inside else torch.zeros(c)
                    position = torch.cat((layer.rel_h[0, i, 0], layer.rel_w[0, 0, j]))
                    logits.append((q[:, row, column] * (key + position)).sum() / c**0.5)
                    values.append(v[:, top + i, left + j] if inside else torch.zeros(c))
            out[:, row, column] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("plain", [False, True])
def test_attention_is_the_definition(plain: bool) -> None:
    torch.manual_seed(0)
    layer = BlockAttention(4, 2)
    layer.plain = plain
    image = torch.randn(4, 4, 6)
    with torch.no_grad():
        expected = attention_pixel_by_pixel(layer, image)
        found = layer(channels_last(image[None])).permute(0, 3, 1, 2)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_normalisation_is_pytorchs() -> None:
    image = torch.randn(2, 5, 12, 9) * 3 + 40
    expected = functional.instance_norm(image.double(), eps=1e-5)
    found = instance_norm(channels_last(image)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    flat = instance_norm(torch.full((1, 4, 4, 2), 0.7))
    assert flat.abs().max() < 1e-3  # a constant map stays finite


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("size", [(3, 3), (96, 33)])
def test_an_empty_slice_stays_empty(value: float, size: tuple[int, int]) -> None:
    """Normalisation of constant maps must not blow up what rounding left of them, 300 times in every block."""
    net = made(dataclasses.replace(TINY, n_feats=24, n_blocks=6))
    for run in (net, module.made_ready(net)):
        with torch.inference_mode():
            result = run(torch.full((1, 3, *size), value))[..., 2:-2, 2:-2]  # the last convolution sums in any order
            expected = net.double()(torch.full((1, 3, *size), value, dtype=torch.float64))[..., 2:-2, 2:-2]
            net.float()
        assert (result - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("scale", "count", "trainable"), [(2, 3613144, 3613120), (3, 3633944, 3633920), (4, 3629784, 3629760)]
)
def test_parameters_are_counted_as_in_the_paper(scale: int, count: int, trainable: int) -> None:
    with torch.device("meta"):
        net = M2Trans(M2TransConfig(scale=scale))
    values = list(net.parameters())
    assert sum(value.numel() for value in values) == count
    assert sum(value.numel() for value in values if value.requires_grad) == trainable
    listed = catalogue.M2TRANS.parameters
    assert listed["m2trans" if scale == 4 else f"m2trans x{scale}"] == count


@pytest.mark.parametrize(
    ("scale", "side", "macs", "flops"), [(2, 192, 20.174, 47.90), (3, 128, 9.443, 22.24), (4, 96, 5.839, 13.56)]
)
def test_cost_agrees_with_the_paper(scale: int, side: int, macs: float, flops: float) -> None:
    """The paper counts multiply-adds of the layers only (spec, section 4)."""
    with torch.device("meta"):
        net = M2Trans(M2TransConfig(scale=scale))
    assert net.macs(side, side) / 1e9 == pytest.approx(macs, abs=1e-3)
    assert net.flops(side, side) / 1e9 == pytest.approx(flops, abs=6e-3)
    assert net.flops(side - 31, side) == net.flops(side, side)  # padded to 32


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_names_and_shapes_are_the_published_ones(scale: int) -> None:
    listed = specification(f"m2trans_x{scale}_state_dict")
    with torch.device("meta"):
        state = M2Trans(M2TransConfig(scale=scale)).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == listed["keys"]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 17), (5, 33), (31, 64), (32, 32), (65, 20)])
def test_any_size_is_padded_and_cropped(size: tuple[int, int]) -> None:
    net = made()
    image = torch.rand(2, 3, *size)
    by_hand = functional.pad(image, (0, max(17 - size[1], 0), 0, max(17 - size[0], 0)), mode="replicate")
    bottom, right = (-side % 32 for side in by_hand.shape[-2:])
    by_hand = functional.pad(by_hand, (0, right, 0, bottom), mode="reflect")
    with torch.inference_mode():
        result, padded = net(image), net(by_hand)
    assert result.shape == (2, 3, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(result, padded[..., : 2 * size[0], : 2 * size[1]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 5, 31, 32, 1000])
def test_strips_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch, scale: int, rows: int) -> None:
    monkeypatch.setattr(module, "MIN_STRIP_ROWS", rows)
    monkeypatch.setattr(module, "STRIP_VALUES", 1)
    net = made(dataclasses.replace(TINY, scale=scale))
    features = torch.randn(2, 8, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.enlarge_by_strips(features), net.tail(features), atol=1e-6, rtol=0)


def test_a_batch_is_its_single_images() -> None:
    net = made(dataclasses.replace(TINY, scale=4))
    batch = torch.rand(3, 3, 33, 40)
    with torch.no_grad():
        together, alone = net(batch), torch.cat([net(image[None]) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_single_precision_is_double_precision_rounded() -> None:
    net = made(dataclasses.replace(TINY, n_feats=32, n_blocks=2))
    image = torch.rand(1, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        single = net(image.float())
        double = net.double()(image)
    assert double.dtype == torch.float64
    assert 0 < (single - double).abs().max() < 1e-5


def test_the_result_is_clipped_and_the_mean_shift_unused() -> None:
    net = made()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = net(image)
        net.sub_mean.bias.fill_(9.0)
        net.add_mean.weight.fill_(7.0)
        assert torch.equal(net(image), before)
        net.tail[-1].weight.mul_(100)
        loud = net(image)
    assert (loud.min().item(), loud.max().item()) == (0.0, 1.0)


def test_new_networks_carry_the_published_mean_shift() -> None:
    net = M2Trans(TINY)
    assert torch.equal(net.add_mean.bias, torch.tensor(DIV2K_MEAN))
    assert torch.equal(net.sub_mean.bias, -torch.tensor(DIV2K_MEAN))
    assert torch.equal(net.add_mean.weight[:, :, 0, 0], torch.eye(3))
    assert not any(value.requires_grad for value in (*net.add_mean.parameters(), *net.sub_mean.parameters()))


def test_training_after_inference_reaches_every_weight() -> None:
    net = made()
    image = torch.rand(1, 3, 17, 20)
    with torch.inference_mode():
        net(image)
    (net.train()(image) - 0.3).square().mean().backward()
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in trained.values())
    use_plain(net, True)
    gradients = {name: value.grad.clone() for name, value in trained.items()}
    net.zero_grad()
    (net(image) - 0.3).square().mean().backward()
    for name, value in trained.items():
        torch.testing.assert_close(value.grad, gradients[name], atol=1e-5, rtol=1e-3)


# -- arranged for inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, ODD, dataclasses.replace(TINY, block_size=2, scale=8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 33), (32, 64), (70, 20)])
def test_the_ready_network_is_the_network(config: M2TransConfig, size: tuple[int, int]) -> None:
    net = made(config)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    ready = module.made_ready(net)
    image = torch.rand(2, config.in_channels, *size)
    with torch.inference_mode():
        torch.testing.assert_close(ready(image), net(image), atol=2e-6, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(value.requires_grad for value in net.body.parameters())


def test_the_ready_network_takes_half_precision() -> None:
    net = made()
    image = torch.rand(1, 3, 40, 33)
    with torch.inference_mode():
        single = net(image)
        half = module.made_ready(net.to(torch.bfloat16))(image.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).abs().max() < 0.05


@pytest.mark.parametrize("level", [0, 1, 2])
def test_blocks_and_patches_are_runs(level: int) -> None:
    """Read off coordinates that are carried through the layout as if they were the image."""
    config = dataclasses.replace(TINY, block_size=4)
    where = m2trans_ready.layout(20, 40, config, torch.device("cpu"))
    h, w = len(where.rows), len(where.columns)
    assert (h, w) == (32, 48)
    assert torch.equal(where.order[where.place], torch.arange(h * w))
    y, x = where.order // w, where.order % w
    side, area = 2**level, 4**level
    for size, count in ((side, area), (4 * side, 16 * area)):  # patches, blocks
        for coordinate in (y, x):
            runs = coordinate.view(-1, count) // size
            assert torch.equal(runs, runs[:, :1].expand_as(runs))
    patch = {(int(y[i]) // side, int(x[i]) // side): i // area for i in range(0, h * w, area)}
    window = where.windows[level].view(-1, 36)
    for block in range(len(window)):
        top, left = int(y[block * 16 * area]) // side, int(x[block * 16 * area]) // side
        cells = [(top + i, left + j) for i in range(-1, 5) for j in range(-1, 5)]
        assert window[block].tolist() == [patch.get(cell, h * w // area) for cell in cells]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 17), (31, 64), (33, 65), (48, 20)])
def test_padding_by_indices_is_padding(size: tuple[int, int]) -> None:
    image = torch.rand(1, 1, *size)
    rows, columns = (m2trans_ready.padding(side, TINY, torch.device("cpu")) for side in size)
    assert torch.equal(image[:, :, rows][..., columns], module.pad_to_blocks(image, TINY))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_transform_of_a_patch_is_the_haar_transform(levels: int) -> None:
    side, channels = 2**levels, 3
    image = torch.rand(1, side, side, channels, dtype=torch.float64)
    order = m2trans_ready.z_order(side)
    found = torch.cat([image[0, y, x] for y, x in order]) @ m2trans_ready.patch_transform(channels, levels)
    for _ in range(levels):
        image = haar_split(image)
    torch.testing.assert_close(found, image.flatten())


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_the_tail_on_tokens_is_the_tail(scale: int) -> None:
    net = made(dataclasses.replace(TINY, scale=scale))
    features = torch.randn(2, 8, 32, 64)
    with torch.no_grad():
        whole = net.tail(features)
        for h, w in ((32, 64), (31, 64), (20, 1)):
            shown = m2trans_ready.GraphTail(net.tail)(features, h, w)
            torch.testing.assert_close(shown, whole[..., : scale * h, : scale * w], atol=1e-6, rtol=0)


# -- checkpoints -------------------------------------------------------------------------------------------


WIDE = dataclasses.replace(TINY, n_feats=40, scale=4)


@pytest.mark.parametrize("config", [ODD, TINY, WIDE, dataclasses.replace(TINY, scale=8)])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_every_size_is_recovered(tmp_path: Path, config: M2TransConfig, with_metadata: bool) -> None:
    net = made(config)
    path = tmp_path / "odd.safetensors"
    if with_metadata:
        path.write_bytes(checkpoint.save_network(net, {"id": "odd"}))
    else:
        save_file(net.state_dict(), path)
    found = load_network(path)
    for field in dataclasses.fields(M2TransConfig):
        assert getattr(found.config, field.name) == getattr(config, field.name), field.name
    image = torch.rand(1, config.in_channels, 20, 23)
    with torch.inference_mode():
        assert torch.equal(found(image), net(image))
    checkpoint.rehearse(found)


def test_half_precision_keeps_what_is_not_trained(tmp_path: Path) -> None:
    net = made()
    (tmp_path / "half.safetensors").write_bytes(checkpoint.save_network(net, half=True))
    found = load_network(tmp_path / "half.safetensors").state_dict()
    assert torch.equal(found["add_mean.bias"], net.add_mean.bias)
    assert torch.equal(found["head.weight"], net.head.weight.half().float())


@pytest.mark.parametrize(
    "wrong",
    [{"n_feats": 12}, {"n_feats": 0}, {"n_feats": -8}, {"n_blocks": 0}, {"block_size": 0}, {"in_channels": 0},
     {"block_size": 12},
     {"scale": 1}, {"scale": 0}, {"scale": -2}, {"scale": 5}, {"scale": 16}],
)  # fmt: skip
def test_sizes_that_no_network_has_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"features|least one|scale|power of two"):
        M2TransConfig(**wrong)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(M2TransConfig)])
def test_metadata_that_disagrees_is_refused(tmp_path: Path, field: str) -> None:
    declared = dataclasses.asdict(TINY)
    declared[field] *= 2
    save_declared(tmp_path / "a.safetensors", made().state_dict(), "m2trans", declared)
    with pytest.raises(WeightsError, match=field):
        load_network(tmp_path / "a.safetensors")


GONE = torch.empty(0)
SPOILED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "missing": ({"body.0.attn3.rel_w": GONE}, "lacks the tensor body.0.attn3.rel_w"),
    "missing-start": ({"tail.0.weight": GONE}, "tail.0.weight is missing"),
    "missing-mean": ({"sub_mean.bias": GONE}, "lacks the tensor sub_mean.bias"),
    "extra": ({"body.0.attn5.rel_h": torch.ones(1)}, "'body.0.attn5.rel_h'"),
    "shape": ({"body.0.attn2.rel_h": torch.ones(1, 10, 1, 5)}, r"\(1, 10, 1, 5\), where m2trans needs \(1, 10, 1, 4\)"),
    "nan": ({"head.bias": torch.full((8,), float("nan"))}, "NaN or infinity in the tensor head.bias"),
    "rank": ({"body.0.attn1.rel_h": torch.ones(3)}, "not of its shapes"),
    "empty": ({"head.weight": torch.ones(0, 3, 3, 3)}, "not of its shapes"),
    "odd-width": ({"head.weight": torch.ones(12, 3, 3, 3)}, "four branches"),
    "window": ({"body.0.attn1.rel_h": torch.ones(1, 100_000, 1, 1)}, "shape"),
    "tail": ({"tail.0.weight": torch.ones(8 * 25, 8, 1, 1)}, "scale 5"),
    "many-tails": ({f"tail.{3 * i}.weight": torch.ones(32, 8, 1, 1) for i in range(300)}, "no tail for scale"),
    "many-blocks": ({"body.900.x": torch.ones(1)}, "too few for"),
    "huge-index": ({"tail.99999999999999999999.weight": torch.ones(1)}, "beyond 1000"),
    "wide": ({"head.weight": torch.ones(80_000, 1, 1, 1)}, "shape"),  # small, but of a network of gigabytes
}


@pytest.mark.parametrize("how", SPOILED)
def test_the_first_offender_is_named(how: str) -> None:
    changes, sentence = SPOILED[how]
    state = {key: value for key, value in {**made().state_dict(), **changes}.items() if value is not GONE}
    with pytest.raises(WeightsError, match=sentence):
        checkpoint.network_from_state(state, catalogue.M2TRANS, name="bad.pt")


def test_other_networks_are_told_apart() -> None:
    rdst = Rdst(RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, scale=2)).state_dict()
    with pytest.raises(WeightsError, match=r"is not m2trans.*looks like rdst"):
        checkpoint.network_from_state(rdst, catalogue.M2TRANS)
    with pytest.raises(WeightsError, match=r"is not rdst.*looks like m2trans"):
        checkpoint.network_from_state(made().state_dict(), catalogue.RDST)
    assert checkpoint.detect_method(made().state_dict()) is catalogue.M2TRANS
    with pytest.raises(WeightsError, match=r"head\.weight"):
        config_from_state({})
