"""RDST as a graph for ONNX: its weights arranged for ONNX Runtime, every size worked out by tensor arithmetic.

The orders of windows and the kinds of their masks are computed once at the beginning and shared by all layers.
Attention keeps channels before tokens, as `WindowAttention` does on CPUs, so that transposes stand only where ONNX
Runtime takes them into the products. Three constants are folded into weights: the scale of q; the bias of k, which
adds the same to all logits of a row and so vanishes in the softmax; and the bias of v, which the softmax (whose
rows add up to 1) hands unchanged to the projection.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.linear_tail import SMALLEST, ComposedTail, composed, run_composed
from medsr_cli.networks.rdst import (
    DenseSwinBlock,
    Rdst,
    ResidualDenseSwinBlock,
    SwinLayer,
    convolve_windows,
    map_of,
    tokens_of,
)
from medsr_cli.networks.windows import WindowOrder, window_order


class RdstGraph(nn.Module):
    """(N, C, H, W) to (N, C, s·H, s·W), as `Rdst`; a copy of its weights, for inference only."""

    def __init__(self, net: Rdst) -> None:
        super().__init__()
        self.net = net
        self.window, self.scale = net.config.window_size, net.config.scale
        # In the order of the forward pass.
        self.layers = nn.ModuleList(GraphLayer(layer) for layer in net.modules() if isinstance(layer, SwinLayer))
        with torch.no_grad():
            self.tail = None if self.window < SMALLEST else GraphTail(net)

    def forward(self, image: Tensor) -> Tensor:
        batch, _, rows, columns = image.shape
        m, net = self.window, self.net
        window_rows, window_columns = (rows + m - 1) // m, (columns + m - 1) // m
        for axis, side, padded in ((2, rows, window_rows * m), (3, columns, window_columns * m)):
            image = image.index_select(axis, padded_positions(side, padded, image.device))
        shallow = net.head(net.sub_mean(image))  # (N, d, H', W')
        order = window_order(batch, window_rows, window_columns, m, m // 2, image.device)
        shape = (batch, window_rows * m, window_columns * m)
        tokens = tokens_of(shallow).index_select(0, order.raster_to_windows)
        deep = net.patch_embed(tokens)
        layers = iter(self.layers)
        for block in net.body:
            assert isinstance(block, ResidualDenseSwinBlock)  # noqa: S101 - for the type checker
            dense = deep
            for part in block.body:
                dense = self._dense_block(part, layers, dense, order)
            deep = deep + convolve_windows(block.conv, dense, order, shape)
        features = tokens + convolve_windows(net.conv_after_body, net.norm(deep), order, shape)
        features = map_of(features.index_select(0, order.windows_to_raster), shape)
        enlarged: Tensor = net.add_mean(net.tail(features)) if self.tail is None else self.tail(features)
        # Cropped by indices: a slice would have the exporter prove that it fits.
        for axis, side in ((2, rows), (3, columns)):
            enlarged = enlarged.index_select(axis, torch.arange(side * self.scale, device=image.device))
        return enlarged

    @staticmethod
    def _dense_block(block: nn.Module, layers: Iterator[nn.Module], dense: Tensor, order: WindowOrder) -> Tensor:
        assert isinstance(block, DenseSwinBlock)  # noqa: S101 - for the type checker
        tokens, shifted = dense, False
        for _ in block.body.blocks:
            layer = next(layers)
            if bool(layer.shift) != shifted:
                tokens = tokens.index_select(0, order.shifted_to_windows if shifted else order.windows_to_shifted)
            shifted = bool(layer.shift)
            tokens = layer(tokens, order.kinds)
        grown = block.tail(tokens)
        if shifted:
            grown = grown.index_select(0, order.shifted_to_windows)
        return torch.cat((dense, grown), dim=-1)


def padded_positions(side: int, padded: int, device: torch.device) -> Tensor:
    """Which position of a side each of the padded side shows: reflected, or the last one; see `pad_to_multiple`."""
    positions = torch.arange(padded, device=device)
    reflected = (2 * side - 2) - positions
    # Reflection never reaches position 0's left where fewer are missing than there are.
    beyond = torch.where(reflected[-1:] >= 0, reflected, side - 1)
    return torch.where(positions < side, positions, beyond)


class GraphLayer(nn.Module):
    """One STL; see the module's text."""

    weight: Tensor
    q_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    biases: Tensor

    def __init__(self, layer: SwinLayer) -> None:
        super().__init__()
        self.layer, attention = layer, layer.attn
        self.shift = layer.shift
        heads, d = attention.heads, attention.head_width
        c = heads * d
        with torch.no_grad():
            q, k, v = attention.qkv.weight.view(3, heads, d, c).unbind(0)
            bias = attention.qkv.bias
            q_bias, _, v_bias = torch.zeros(3, c) if bias is None else bias.view(3, c)
            biases = attention.biases_of_kinds() if layer.shift else attention.position_bias()[None]
            tensors = {
                "weight": torch.cat((q * attention.scale, k, v)).reshape(3 * c, c),
                "q_bias": (q_bias * attention.scale).view(c, 1),
                "proj_weight": attention.proj.weight.t(),
                "proj_bias": attention.proj.bias + attention.proj.weight @ v_bias,
                "biases": biases,
            }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        """Tokens (T, C) in the order of this layer's windows."""
        layer, n, c = self.layer, self.layer.window**2, tokens.shape[-1]
        heads, d = layer.attn.heads, layer.attn.head_width
        windows = layer.norm1(tokens).view(-1, n, c)
        q, k, v = torch.split(self.weight @ windows.transpose(1, 2), c, dim=1)  # each (windows, C, M²)
        q, k, v = (x.view(-1, heads, d, n) for x in (q + self.q_bias, k, v))
        biases = self.biases.index_select(0, kinds) if layer.shift else self.biases
        weights = (q.transpose(2, 3) @ k + biases).softmax(dim=-1)  # (windows, heads, query, key)
        mixed = (v @ weights.transpose(2, 3)).view(-1, c, n)
        tokens = tokens + ((mixed.transpose(1, 2) @ self.proj_weight).view(-1, c) + self.proj_bias)
        mlp = layer.mlp
        out: Tensor = tokens + mlp.fc2(F.gelu(mlp.fc1(layer.norm2(tokens))))
        return out


class GraphTail(nn.Module):
    """The composed tail, its kernels as constants."""

    kernels: Tensor
    biases: Tensor

    def __init__(self, net: Rdst) -> None:
        super().__init__()
        tail = composed(net.tail_layers())
        self.register_buffer("kernels", tail.kernels)
        self.register_buffer("biases", tail.biases)
        self.scale = tail.scale

    def forward(self, features: Tensor) -> Tensor:
        return run_composed(ComposedTail(self.kernels, self.biases, self.scale), features)
