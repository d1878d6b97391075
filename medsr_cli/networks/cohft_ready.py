"""Cohf-T arranged for inference on a CPU: the same results, less work and fewer passes over memory.

- Dense blocks of many channels run as Winograd chains (see `winograd`), which also never concatenate.
- All other convolutions have the channels last, as the layer norms and linear maps beside them.
- A convolution of one channel is nine values a pixel and a matrix; as a convolution it takes 15 times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.cohft_blocks import RESIDUAL, Rrdb
from medsr_cli.networks.winograd import BufferPool, DenseChain, Size

SMALLEST_GROWTH = 24
"""Channels from which the products saved are more than what the transforms cost; S and M have 16."""
FUSES = bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
"""Whether this PyTorch has a convolution that ends with an activation."""


def ready_for_cpu(net: nn.Module, smallest_growth: int = SMALLEST_GROWTH) -> nn.Module:
    """The network with its blocks exchanged for faster ones; elsewhere than on a CPU in float32, as it is.

    The network is changed in place: it cannot be trained or saved any more.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in net.parameters()):
        return net
    pool = BufferPool()
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Rrdb) and _first(child).out_channels >= smallest_growth:
                setattr(parent, name, WinogradRrdb(child, pool))
            elif isinstance(child, nn.Sequential) and FUSES:
                _fuse_activations(child)
            if isinstance(child, nn.Conv2d) and child.in_channels == 1 and child.kernel_size == (3, 3):
                setattr(parent, name, PlaneConvolution(child))
    ready: nn.Module = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    return ready.requires_grad_(False)


def _fuse_activations(layers: nn.Sequential) -> None:
    """Every 3x3 convolution that a GELU follows becomes one step with it."""
    pairs = list(enumerate(zip(layers, list(layers)[1:], strict=False)))
    for i, (conv, activation) in pairs:
        if isinstance(conv, nn.Conv2d) and isinstance(activation, nn.GELU) and conv.in_channels > 1:
            layers[i], layers[i + 1] = GeluConvolution(conv), nn.Identity()


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def _first(rrdb: Rrdb) -> nn.Conv2d:
    return _convolutions(rrdb)[0]


class WinogradRrdb(nn.Module):
    """RRDB: x + 0.2·r(x), (N, n, H, W) to the same with the channels last in memory."""

    def __init__(self, rrdb: Rrdb, pool: BufferPool) -> None:
        super().__init__()
        self._pool = pool
        self.chains = nn.ModuleList(DenseChain(_convolutions(block), RESIDUAL) for block in rrdb.children())
        convs = _convolutions(next(rrdb.children()))
        self._widths = (convs[0].in_channels, convs[0].out_channels, len(convs))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        n, _, h, w = features.shape
        size = Size(n, h, w, *self._widths)
        buffers = self._pool.take(size)
        buffers.maps.inner.copy_(features.permute(0, 2, 3, 1))
        for chain in self.chains:
            chain(buffers)
        out = torch.add(features, buffers.maps.inner.permute(0, 3, 1, 2), alpha=RESIDUAL)
        self._pool.give_back(size, buffers)
        return out


class GeluConvolution(nn.Module):
    """GELU(conv(x)) in one pass, by the operator that torch.compile uses for it; equal to the last bit."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1, "gelu", [], "none"
        )
        return out


class PlaneConvolution(nn.Module):
    """A 3x3 convolution of one channel: (N, 1, H, W) to (N, n, H, W) with the channels last in memory."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.bias = conv.bias
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))  # (n, 9)

    def forward(self, plane: Tensor) -> Tensor:
        n, _, h, w = plane.shape
        around = F.unfold(plane, 3, padding=1).transpose(1, 2)  # (N, H·W, 9)
        return F.linear(around, self.weight, self.bias).view(n, h, w, -1).permute(0, 3, 1, 2)
