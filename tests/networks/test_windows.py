"""Window attention in its three forms, the orders of tokens, and what inference keeps of the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from medsr_cli.networks.derived import Derived
from medsr_cli.networks.windows import (
    WindowAttention,
    all_window_masks,
    kept_window_order,
    merge_windows,
    partition_windows,
    reordered,
    window_kinds,
    window_order,
)

CPU = torch.device("cpu")


def attention(channels: int = 30, heads: int = 3, window: int = 4, qkv_bias: bool = True) -> WindowAttention:
    torch.manual_seed(channels + heads + window)
    layer = WindowAttention(channels, heads, window, qkv_bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def by_definition(layer: WindowAttention, tokens: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """One window and one head after another, in float64."""
    n, d = layer.window**2, layer.head_width
    qkv = (tokens.double() @ layer.qkv.weight.double().T).view(-1, n, 3, layer.heads, d)
    if layer.qkv.bias is not None:
        qkv = qkv + layer.qkv.bias.double().view(3, layer.heads, d)
    out = torch.empty(len(qkv), n, layer.heads, d, dtype=torch.float64)
    side = 2 * layer.window - 1
    for w in range(len(qkv)):
        for h in range(layer.heads):
            q, k, v = qkv[w, :, :, h].unbind(1)
            logits = q @ k.T / d**0.5
            for i in range(n):
                for j in range(n):
                    rows, columns = i // layer.window - j // layer.window, i % layer.window - j % layer.window
                    row = (rows + layer.window - 1) * side + columns + layer.window - 1
                    logits[i, j] += layer.relative_position_bias_table[row, h].double()
            if masks is not None:
                logits = logits + masks[w].double()
            out[w, :, h] = logits.softmax(-1) @ v
    return out.view(tokens.shape) @ layer.proj.weight.double().T + layer.proj.bias.double()


@pytest.mark.parametrize("form", ["plain", "products", "fused"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_every_form_is_the_definition(form, shifted, qkv_bias):
    layer = attention(qkv_bias=qkv_bias)
    tokens, residual = torch.randn(2, 6 * 16, 30).unbind(0)
    kinds = window_kinds(1, 2, 3, CPU) if shifted else None
    masks = all_window_masks(4, 2, 2, 3, CPU) if shifted else None
    with torch.no_grad():
        expected = by_definition(layer, tokens, masks).float() + residual
        if form == "fused":
            found = residual + layer._attend_fused(tokens, kinds)
        else:
            layer.plain = form == "plain"
            found = layer(tokens, kinds, residual)
    torch.testing.assert_close(found, expected, atol=2e-6 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_logits_beyond_the_range_of_exponentials_are_left_to_the_definition(factor, monkeypatch):
    layer = attention()
    tokens = torch.randn(4 * 16, 30)
    kinds = window_kinds(1, 2, 2, CPU)
    definition, called = layer._attend_plain, []
    monkeypatch.setattr(layer, "_attend_plain", lambda *given: called.append(1) or definition(*given))
    with torch.no_grad():
        layer.qkv.weight *= factor**0.5
        found = layer(tokens, kinds, torch.zeros_like(tokens))
        expected = by_definition(layer, tokens, all_window_masks(4, 2, 2, 2, CPU)).float()
    assert called
    # Logits of thousands have few digits behind the point in float32, whichever form computes them.
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


def test_ordinary_logits_are_not_left_to_the_definition(monkeypatch):
    layer = attention()
    monkeypatch.setattr(layer, "_attend_plain", None)
    with torch.no_grad():
        layer(torch.randn(32, 30), None, torch.zeros(32, 30))


def test_what_is_not_a_number_stays_so():
    layer = attention()
    tokens = torch.randn(2 * 16, 30)
    tokens[3, 5] = torch.nan
    with torch.no_grad():
        found = layer(tokens, None, torch.zeros_like(tokens)).view(2, -1)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_a_masked_pair_takes_nothing():
    """In the corner window tokens of four regions see their own region only."""
    layer = attention()
    tokens = torch.randn(16, 30)
    other = tokens.view(4, 4, 30).clone()
    other[2:] = 9.0
    with torch.no_grad():
        kinds = torch.tensor([3])
        a = layer(tokens, kinds, torch.zeros_like(tokens)).view(4, 4, 30)
        b = layer(other.view(16, 30), kinds, torch.zeros_like(tokens)).view(4, 4, 30)
    torch.testing.assert_close(a[:2], b[:2], atol=1e-5, rtol=0)
    assert not torch.allclose(a[2:], b[2:])


def test_bfloat16_is_near_float32():
    layer = attention(24, 3, 8)
    tokens = torch.randn(4 * 64, 24)
    kinds = window_kinds(1, 2, 2, CPU)
    with torch.no_grad():
        expected = layer(tokens, kinds, tokens)
        found = layer.to(torch.bfloat16)(tokens.bfloat16(), kinds, tokens.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("batch", "rows", "columns", "window"), [(1, 1, 1, 4), (2, 3, 2, 4), (3, 1, 4, 3)])
def test_orders_are_those_of_partition_and_roll(batch, rows, columns, window):
    shift = window // 2
    order = window_order(batch, rows, columns, window, shift, CPU)
    maps = torch.arange(batch * rows * columns * window**2).view(batch, rows * window, columns * window, 1)
    in_windows = partition_windows(maps, window)
    shifted = partition_windows(maps.roll((-shift, -shift), (1, 2)), window)
    raster = maps.flatten()
    assert torch.equal(raster[order.raster_to_windows], in_windows.flatten())
    assert torch.equal(in_windows.flatten()[order.windows_to_raster], raster)
    assert torch.equal(in_windows.flatten()[order.windows_to_shifted], shifted.flatten())
    assert torch.equal(shifted.flatten()[order.shifted_to_windows], in_windows.flatten())
    assert torch.equal(merge_windows(in_windows, window), maps)
    masks = all_window_masks(window, shift, rows, columns, CPU).repeat(batch, 1, 1)
    kinds = order.kinds.view(batch, rows, columns)
    assert kinds[:, -1, -1].eq(3).all()
    assert len(order.kinds) == len(masks)


def test_gradients_come_back_in_order():
    order = kept_window_order(2, 1, 2, 2, 1, CPU)
    tokens = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    there = lambda t: reordered(t, order.windows_to_shifted, order.shifted_to_windows)  # noqa: E731
    assert torch.autograd.gradcheck(there, (tokens,))
    assert torch.equal(there(tokens), tokens[order.windows_to_shifted])


@pytest.mark.parametrize("change", ["in place", "loaded", "replaced", "there and back", "assigned"])
def test_changed_weights_are_noticed(change):
    layer, other = attention(), attention(channels=30, heads=3, window=4)
    torch.nn.init.normal_(other.qkv.weight)
    tokens = torch.randn(16, 30)
    with torch.inference_mode():
        layer(tokens, None, tokens)
    with torch.no_grad():
        if change == "in place":
            layer.relative_position_bias_table.add_(torch.randn_like(layer.relative_position_bias_table))
        elif change == "replaced":
            layer.qkv.weight = torch.nn.Parameter(other.qkv.weight.clone())
        elif change == "there and back":
            layer.to(torch.bfloat16).to(torch.float32)
        else:
            layer.load_state_dict(other.state_dict(), assign=change == "assigned")
        found = layer(tokens, None, tokens)
        layer.plain = True
        expected = layer(tokens, None, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_was_made_is_kept_and_not_copied():
    kept: Derived[int] = Derived()
    weight, made = torch.zeros(3), []
    for _ in range(3):
        kept.of((weight, None), lambda: made.append(1) or len(made))
    assert made == [1]
    copied = copy.deepcopy(kept)
    assert copied.of((weight, None), lambda: 7) == 7
    weight.add_(1)
    assert kept.of((weight, None), lambda: 8) == 8


def test_gradients_flow_after_inference():
    """What inference keeps must not be an inference tensor, nor take part in training."""
    layer = attention()
    tokens = torch.randn(4 * 16, 30)
    kinds = window_kinds(1, 2, 2, CPU)
    with torch.inference_mode():
        layer(tokens, kinds, tokens)
    layer(tokens, kinds, tokens).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_second_run_is_the_first(windows, shifted):
    """What is kept between runs is not changed by them, also where one window needs no copy of it."""
    torch.manual_seed(2)
    layer = WindowAttention(12, 3, 4).eval()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    tokens = torch.rand(16 * windows, 12)
    kinds = torch.zeros(windows, dtype=torch.int64) if shifted else None
    with torch.inference_mode():
        first = layer(tokens, kinds, tokens)
        second = layer(tokens, kinds, tokens)
    assert torch.equal(first, second)


@pytest.mark.parametrize("change", ["fused optimiser", "data"])
def test_changes_that_leave_no_trace_in_the_version_are_noticed(change):
    layer = attention()
    tokens = torch.rand(32, 30)
    with torch.inference_mode():
        layer(tokens, None, tokens)
    if change == "data":
        layer.qkv.weight.data.mul_(1.5)
    else:
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
        layer(tokens, None, tokens).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        got = layer(tokens, None, tokens)
        layer.plain = True
        assert torch.allclose(got, layer(tokens, None, tokens), atol=1e-5)
