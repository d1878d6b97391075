"""RDST against the authors' released network, and what it must keep for any size."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from medsr_cli.engines.onnx_export import exported
from medsr_cli.errors import WeightsError
from medsr_cli.networks import rdst
from medsr_cli.networks.rdst import (
    RECOMPUTED_BUFFERS,
    Rdst,
    RdstConfig,
    config_from_state,
    graph_form,
    pad_to_multiple,
)
from medsr_cli.networks.windows import WindowAttention, all_window_masks
from tests.networks.golden import assert_close, fixture, procedural_state

STORED = ["rdst_e_small_x4", "rdst_tiny_x2_4ch_meanstd", "rdst_tiny_x3"]
PROCEDURAL = ["rdst_e_full_procedural", "rdst_full_procedural"]


def loaded(name: str) -> tuple[Rdst, dict, dict]:
    facts, weights, tensors = fixture(name)
    state = {key: value for key, value in weights.items() if not key.endswith(RECOMPUTED_BUFFERS)}
    if not state:
        c = facts["config"]
        blank = Rdst(RdstConfig(n_rdstb=c["n_rdstb"], scale=c["scale"], in_channels=c["in_channels"]))
        state = procedural_state(blank, facts["procedural_seed"], keep="mean")
    net = Rdst(config_from_state(state))
    net.load_state_dict(state)
    return net.eval(), facts, tensors


@pytest.mark.parametrize("name", STORED + PROCEDURAL)
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_equals_the_released_network(name, plain):
    net, facts, tensors = loaded(name)
    use_plain(net, plain)
    assert facts["config"]["n_rdstb"] == net.config.n_rdstb
    for case in facts["cases"]:
        expected = tensors[case["y"]]
        with torch.no_grad():
            found = net(tensors[case["x"]])
        assert_close(found, expected, 0.5e-4)


def use_plain(net: Rdst, plain: bool) -> None:
    for module in net.modules():
        if isinstance(module, WindowAttention):
            module.plain = plain


@pytest.mark.parametrize(
    ("blocks", "channels", "count"), [(8, 1, 4464965), (4, 1, 2379245), (8, 4, 4468244), (4, 4, 2382524)]
)
def test_parameters_are_counted_as_in_the_paper(blocks, channels, count):
    net = Rdst(RdstConfig(n_rdstb=blocks, in_channels=channels))
    assert sum(p.numel() for p in net.parameters()) == count


def tiny(**fields) -> Rdst:
    torch.manual_seed(3)
    sizes = {"n_rdstb": 1, "embed_dim": 12, "growth_rate": 6, **fields}
    return Rdst(RdstConfig(**sizes)).eval()


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 5), (7, 8), (9, 8), (20, 33), (60, 60)])
def test_any_size_is_padded_and_cropped(size):
    net = tiny(scale=2)
    image = torch.rand(1, 1, *size)
    with torch.no_grad():
        result = net(image)
        padded = net(pad_to_multiple(image, 8))
    assert result.shape[-2:] == (2 * size[0], 2 * size[1])
    torch.testing.assert_close(result, padded[..., : 2 * size[0], : 2 * size[1]])


def test_padding_reflects_where_it_can_and_repeats_where_it_cannot():
    row = torch.arange(6.0).reshape(1, 1, 1, 6)
    assert pad_to_multiple(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert pad_to_multiple(row[..., :3], 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_a_batch_is_its_single_images():
    net = tiny()
    batch = torch.rand(3, 1, 16, 24)
    with torch.no_grad():
        together, alone = net(batch), torch.cat([net(image[None]) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_nothing_that_depends_on_size_is_stored():
    net = tiny()
    with torch.no_grad():
        net(torch.rand(1, 1, 16, 16))
    assert not [key for key in net.state_dict() if key.endswith(RECOMPUTED_BUFFERS)]
    assert set(net.state_dict()) == set(tiny().state_dict())


def test_masks_are_those_of_the_region_labels():
    """The definition: label rolled positions by region, mask pairs of different labels (spec, section 2)."""
    height, width, window, shift = 24, 16, 8, 4

    def region(i: torch.Tensor, n: int) -> torch.Tensor:
        return (i >= n - window).long() + (i >= n - shift).long()

    labels = 3 * region(torch.arange(height), height)[:, None] + region(torch.arange(width), width)[None, :]
    windows = labels.view(3, 8, 2, 8).transpose(1, 2).reshape(6, 64)
    expected = torch.where(windows[:, :, None] == windows[:, None, :], 0.0, -100.0)
    found = all_window_masks(window, shift, 3, 2, torch.device("cpu"))
    assert torch.equal(found, expected)


def test_flops_agree_with_the_paper():
    """Multiply-adds of a 40x32 input, attention products included: 3.83 G and 6.78 G (spec, section 3)."""
    assert Rdst(RdstConfig(n_rdstb=4)).flops(40, 32) / 2e9 == pytest.approx(3.83, abs=0.01)
    assert Rdst(RdstConfig(n_rdstb=8)).flops(40, 32) / 2e9 == pytest.approx(6.78, abs=0.01)


@pytest.mark.parametrize(
    "config",
    [
        RdstConfig(n_rdstb=3, embed_dim=24, growth_rate=12, num_heads=4, window_size=4, dstb_per_rdstb=2, scale=2),
        RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=3, stl_per_dstb=4, mlp_ratio=1.5, scale=3),
        RdstConfig(n_rdstb=2, embed_dim=16, growth_rate=8, num_heads=2, mlp_ratio=2.3, qkv_bias=False, scale=8),
        RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, in_channels=4, scale=4),
    ],
)
def test_every_size_is_recovered_from_the_shapes(config):
    assert config_from_state(Rdst(config).state_dict()) == config


def test_widths_that_no_number_of_heads_divides_are_refused():
    with pytest.raises(ValueError, match="heads"):
        RdstConfig(embed_dim=61)


def test_another_network_is_refused():
    with pytest.raises(WeightsError, match=r"head\.weight"):
        config_from_state({"conv.weight": torch.zeros(3, 3)})


def test_layers_taken_in_parts_are_whole(monkeypatch):
    net = tiny(scale=2)
    image = torch.rand(2, 1, 24, 32)
    with torch.no_grad():
        whole = net(image)
        monkeypatch.setattr(rdst, "TOKENS_AT_ONCE", 5 * 64)
        parts = net(image)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)


def test_training_and_inference_give_the_same():
    net = tiny()
    image = torch.rand(2, 1, 16, 24)
    with_gradients = net(image)
    with torch.inference_mode():
        torch.testing.assert_close(net(image), with_gradients.detach(), atol=1e-5, rtol=0)
    with_gradients.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_windows_of_a_single_pixel_keep_the_tail_in_stages():
    net = tiny(window_size=1, scale=2)
    image = torch.rand(1, 1, 1, 4)
    with torch.no_grad():
        found = net(image)
    torch.testing.assert_close(found, net(image).detach(), atol=1e-5, rtol=0)


def test_half_precision_is_near_single():
    net = tiny(scale=2)
    image = torch.rand(1, 1, 16, 24)
    with torch.no_grad():
        single = net(image)
        half = net.to(torch.bfloat16)(image.bfloat16())
    assert (half.float() - single).abs().max() < 0.05 * single.abs().max()


def test_one_graph_serves_every_size():
    torch.manual_seed(11)
    net = tiny(scale=4, dstb_per_rdstb=2)
    session = onnxruntime.InferenceSession(exported(graph_form(net)), providers=["CPUExecutionProvider"])
    for size in [(1, 1, 1, 1), (2, 1, 8, 8), (1, 1, 3, 30), (3, 1, 17, 9), (1, 1, 24, 40), (1, 1, 4, 5)]:
        image = torch.rand(size)
        with torch.no_grad():
            expected = net(image)
        (found,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
