"""Convolutions and pixel shuffles with nothing between them, run as one convolution.

A sub-pixel tail without activations is one linear map. Inside the image it is the same at every pixel of the
low-resolution map: a 5x5 convolution from its channels to the s·s pixels that each pixel becomes (every stage
reaches half as far as the one before, 1 + 1/2 + 1/4 + ... < 2). Only the first and last row and column differ,
because every stage pads its own input with zeros; they get kernels of their own, nine in all. For RDST x4 that
is 0.2 GFLOP in place of 5.4 on a map of 64 x 64, and none of the large maps in between is ever made. The results
are those of the stages to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACES = 3
"""First, inner and last: the kinds of rows and columns."""
SIDE = 5
"""Of the composed kernels; also the smallest map whose middle pixel touches neither border."""
SMALLEST = 2
"""Of a map's sides: a row that is first and last at once has no kernel here."""


class ComposedTail(NamedTuple):
    """The kernels and biases of the nine kinds of pixels; index 3 · kind of row + kind of column."""

    kernels: Tensor
    """(9, C·s², channels, 5, 5)."""
    biases: Tensor
    """(9, C·s²)."""
    scale: int


def composed(layers: Sequence[nn.Module]) -> ComposedTail:
    """The one linear map that 3x3 convolutions (padding 1), 1x1 convolutions and pixel shuffles make up.

    Kernels are rows of the transposed map: what each result at the nine places of a 5x5 map takes from its input.
    Always worked out on the CPU: the convolutions of GPUs round to fewer bits than float32 has.

    Raises:
        ValueError: there is a layer of another kind.
    """
    weight = _first(layers).weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale, channels = 1, 0
    for layer in layers:
        scale *= layer.upscale_factor if isinstance(layer, nn.PixelShuffle) else 1
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else channels
    n = channels * scale**2
    places = torch.eye(SIDE, dtype=dtype)[[0, SIDE // 2, SIDE - 1]]
    pixels = places[:, None, :, None] * places[None, :, None, :]  # (3, 3, 5, 5)
    one_hot = pixels.reshape(9, 1, 1, SIDE, SIDE) * torch.eye(n, dtype=dtype)[None, :, :, None, None]
    back = F.pixel_shuffle(one_hot.flatten(0, 1), scale)  # (9n, C, 5s, 5s)
    forth = torch.zeros(1, _first(layers).in_channels, SIDE, SIDE, dtype=dtype)
    for layer in layers:
        forth = _run(layer, forth)
    for layer in reversed(layers):
        back = _run_transposed(layer, back)
    biases = F.pixel_unshuffle(forth, scale)[0][:, [0, SIDE // 2, SIDE - 1]][:, :, [0, SIDE // 2, SIDE - 1]]
    kernels = back.view(PLACES, PLACES, n, -1, SIDE, SIDE)
    # A first row reads rows 0, 1, 2 of the map, which are the lower three of a kernel centred on it.
    shifts = (SIDE // 2, 0, -(SIDE // 2))
    centred = [[kernels[i, j].roll((shifts[i], shifts[j]), (-2, -1)) for j in range(PLACES)] for i in range(PLACES)]
    return ComposedTail(
        torch.stack([kernel for row in centred for kernel in row]).to(weight),
        biases.permute(1, 2, 0).reshape(9, n).to(weight),
        scale,
    )


def run_composed(tail: ComposedTail, features: Tensor) -> Tensor:
    """(N, channels, H, W), H and W at least 2, to (N, C, s·H, s·W)."""
    reach = SIDE // 2 + 1
    rows = (
        _band(tail, features[:, :, :reach], 0)[:, :, :1],
        _band(tail, features, 1)[:, :, 1:-1],
        _band(tail, features[:, :, -reach:], 2)[:, :, -1:],
    )
    return F.pixel_shuffle(torch.cat(rows, 2), tail.scale)


def _band(tail: ComposedTail, features: Tensor, row_kind: int) -> Tensor:
    """One kind of row at every pixel of a map, with the kernels of the first and last column where these are."""
    reach = SIDE // 2 + 1
    first, inner, last = (
        F.conv2d(part, tail.kernels[k], tail.biases[k], padding=SIDE // 2)
        for k, part in enumerate(
            (features[..., :reach], features, features[..., -reach:]),
            start=PLACES * row_kind,
        )
    )
    return torch.cat((first[..., :1], inner[..., 1:-1], last[..., -1:]), 3)


def _first(layers: Sequence[nn.Module]) -> nn.Conv2d:
    return next(layer for layer in layers if isinstance(layer, nn.Conv2d))


def _run(layer: nn.Module, images: Tensor) -> Tensor:
    if isinstance(layer, nn.PixelShuffle):
        return F.pixel_shuffle(images, layer.upscale_factor)
    conv = _checked(layer)
    bias = None if conv.bias is None else conv.bias.to(images)
    return F.conv2d(images, conv.weight.to(images), bias, padding=conv.kernel_size[0] // 2)


def _run_transposed(layer: nn.Module, images: Tensor) -> Tensor:
    if isinstance(layer, nn.PixelShuffle):
        return F.pixel_unshuffle(images, layer.upscale_factor)
    conv = _checked(layer)
    return F.conv_transpose2d(images, conv.weight.to(images), padding=conv.kernel_size[0] // 2)


def _checked(layer: nn.Module) -> nn.Conv2d:
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size not in ((1, 1), (3, 3)) or layer.groups != 1:
        msg = f"{layer} has no part in a composed tail"
        raise ValueError(msg)
    return layer
