"""The meta-upscale layer as a graph: the scale is an input, nothing in Python depends on a size.

The sums are those of `medsr_cli.networks.meta_upscale`, its second form. LR pixel (p, q) is seen by up to S output
rows and T output columns, its slots. With a the row's part of P2W's first layer and b the column's,

    out(p, q, slots) = relu(a + b) · responses(p, q)        (S·T, hidden + 1) times (hidden + 1, C)

one small matrix product for each LR pixel, over bands of LR rows that bound the memory. Slots that no output pixel
has are computed too and left out at the end.

Lengths that only a tensor knows become sizes by `counted`; the rest is integer arithmetic, which is exact: by `//` and
`%`, for the exporter writes `torch.div` with a rounding mode as a division of float32, also of integers.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.meta_upscale import WRAP, MetaUpsampler

BAND_BYTES = 4_000_000
"""Most memory for one band of rows, unless a single row needs more."""
FAR = 1 << 40
"""More than any axis has pixels."""


class Axis(NamedTuple):
    """The wanted output pixels of one axis."""

    source: Tensor
    """LR pixel of each, int64 (n',), counted from the tile's first."""
    offset: Tensor
    """Distance from it, float32 (n',)."""
    inverse: Tensor
    """1/s as P2W is told, float64 ()."""


class Slots(NamedTuple):
    """The LR pixels that the output pixels of one axis look at, from the first to the last."""

    begin: Tensor
    """First of these LR pixels, int64 ()."""
    length: Tensor
    """How many there are, int64 ()."""
    most: Tensor
    """Most output pixels that one of them has, int64 ()."""
    outputs: Tensor
    """Output pixel in each slot of each of them, int64 (length, most); any where there is none."""
    own: Tensor
    """Each output pixel's slot, LR pixel by LR pixel, int64 (n',)."""


class GraphUpsampler(nn.Module):
    """Features (N, F, H, W), scale and place to images (N, C, H', W').

    `scale`, float64 (2,), is the enlargement of rows and columns, above 0. `place`, int64 (2, 4), has for rows and
    for columns the length of the whole image, the tile's first pixel in it, the first output pixel that is wanted
    and how many are. Zeros: the tile is the whole image, and all of its output is wanted.

    "exact" rounding makes round(s·N) pixels of N, halves up and one at least, and pixel i looks at i·N/N';
    "reference" makes int(s·N), and pixel i looks at i/s as the authors' program rounds it.
    """

    bank: Tensor

    def __init__(self, layer: MetaUpsampler, rounding: str) -> None:
        super().__init__()
        self.p2w = layer.P2W
        self.margin = layer.margin
        self.channels = layer.channels
        self.exact = rounding == "exact"
        last = layer.P2W.last_layer().detach()  # (F, k, k, C, hidden + 1)
        self.register_buffer("bank", last.permute(1, 2, 0, 3, 4).flatten(3).flatten(0, 2).contiguous())

    def forward(self, features: Tensor, scale: Tensor, place: Tensor) -> Tensor:
        """(N, F, H, W) to (N, C, H', W')."""
        down, across = (
            self._axis(size_tensor(features, dim), scale[axis], place[axis]) for axis, dim in enumerate((2, 3))
        )
        inverse = (down.inverse * across.inverse).sqrt().float()
        by_row, by_column = self.p2w.before_relu(inverse, down.offset, across.offset)  # (H', M) and (W', M)
        rows, columns = slots_of(down.source), slots_of(across.source)
        hidden_columns = by_column[columns.outputs]  # (Q, T, M)
        bands = self._bands(features, rows, columns)  # (B, b), LR rows of each band
        m = self.margin
        padded = F.pad(features, (m, m, m, m)).permute(0, 2, 3, 1).flatten(1, 2)  # (N, (H + 2m)·(W + 2m), F)
        taps = torch.arange(2 * m + 1)
        starts = (bands[:, :, None] + rows.begin + taps) * (size_tensor(features, 3) + 2 * m)  # (B, b, k)
        across_taps = torch.arange(hidden_columns.shape[0])[:, None] + columns.begin + taps  # (Q, k)
        (mixed,) = torch.ops.higher_order.scan(
            slots_of_band,
            [],
            [by_row[rows.outputs[bands]], starts],
            [padded, across_taps, hidden_columns, self.bank],
        )  # (B, N, b·Q, S·T, C)
        mixed = mixed.unflatten(3, (rows.outputs.shape[1], columns.outputs.shape[1]))
        mixed = mixed.unflatten(2, (bands.shape[1], columns.outputs.shape[0]))  # (B, N, b, Q, S, T, C)
        mixed = mixed.permute(1, 6, 0, 2, 4, 3, 5).flatten(5, 6).flatten(2, 4)  # (N, C, B·b·S, Q·T)
        out: Tensor = mixed.index_select(2, rows.own).index_select(3, columns.own)
        return out

    def _bands(self, features: Tensor, rows: Slots, columns: Slots) -> Tensor:
        """LR rows in bands of equally many, (B, b); the last row is repeated at the end of the last band."""
        images = size_tensor(features, 0)
        outputs = self.bank.shape[1]  # C·M
        hidden = rows.most * columns.most * (2 * (outputs // self.channels))
        per_row = (hidden + images * (outputs + self.bank.shape[0])) * columns.length * 4
        height = (BAND_BYTES * torch.ones_like(per_row) // per_row).clamp(min=1)
        height = torch.minimum(height, rows.length)
        count = (rows.length + height - 1) // height
        band = counted(count, 1)[:, None] * height + counted(height, 1)
        return torch.minimum(band, rows.length - 1)

    def _axis(self, length: Tensor, scale: Tensor, place: Tensor) -> Axis:
        whole = torch.where(place[0] > 0, place[0], length)
        if self.exact:
            source, offset, inverse = exact_axis(whole, scale)
        else:
            source, offset, inverse = reference_axis(whole, scale)
        count = torch.where(place[3] > 0, place[3], size_tensor(source, 0) - place[2])
        wanted = counted(count, 1) + place[2]
        return Axis(source.index_select(0, wanted) - place[1], offset.index_select(0, wanted), inverse)


def slots_of_band(
    by_row: Tensor, starts: Tensor, padded: Tensor, taps: Tensor, by_column: Tensor, bank: Tensor
) -> list[Tensor]:
    """(b, S, M) and (b, k), with what all bands share, to the slots of all pixels of b LR rows, (N, b·Q, S·T, C)."""
    n, m = padded.shape[0], by_column.shape[-1]
    index = starts[:, None, :, None] + taps[None, :, None]  # (b, Q, k, k)
    patches = padded.index_select(1, index.flatten())  # (N, b·Q·k·k, F)
    responses = patches.view(n, index.shape[0] * index.shape[1], -1) @ bank  # (N, b·Q, C·M)
    hidden = (by_row[:, None, :, None] + by_column[None, :, None]).relu()  # (b, Q, S, T, M)
    hidden = hidden.flatten(2, 3).flatten(0, 1)  # (b·Q, S·T, M)
    return [hidden @ responses.view(n, -1, bank.shape[1] // m, m).transpose(-1, -2)]


def size_tensor(tensor: Tensor, dim: int) -> Tensor:
    """A size as a tensor, int64 ()."""
    return torch.zeros((), dtype=torch.int64) + tensor.shape[dim]


def counted(count: Tensor, least: int) -> Tensor:
    """0 … count − 1, where only the tensor knows the count; it is never below `least`."""
    n = cast("int", count.item())  # int() would fix it while tracing
    torch._check(n >= least)  # type: ignore[no-untyped-call]
    return torch.arange(n)


def slots_of(source: Tensor) -> Slots:
    """See `Slots`; the sources never decrease."""
    begin = source[0]
    pixels = source - begin
    length = pixels[-1] + 1
    position = torch.ones_like(source).cumsum(0) - 1
    nowhere = counted(length, 1) * 0 + FAR
    first = nowhere.scatter_reduce(0, pixels, position, "amin")  # output pixel of each LR pixel
    earlier = position - first.index_select(0, pixels)
    most = earlier.max() + 1
    outputs = torch.minimum(first[:, None] + counted(most, 1), position[-1])
    return Slots(begin, length, most, outputs, pixels * most + earlier)


def exact_axis(length: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N' = round(s·N) output pixels at i·N/N': sources, offsets and N/N'."""
    size = (length * scale + 0.5).floor().to(torch.int64).clamp(min=1)
    numerator = counted(size, 1) * length
    source = numerator // size
    offset = (numerator % size).double() / size.double()
    return source, offset.float(), length.double() / size.double()


def reference_axis(length: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int(s·N) output pixels at i/s in float32, with the authors' pattern of offsets: sources, offsets and 1/s."""
    inverse = 1 / scale
    position = counted((length * scale).to(torch.int64), 1).float() * inverse.float()
    source = position.floor().to(torch.int64)
    offset = position - source
    found = slots_of(source)
    slot = source * scale.ceil().to(torch.int64) + found.own - (source - found.begin) * found.most
    pattern = counted(slot.max() + 1, 1) * 0 + torch.ones_like(inverse).float()
    pattern = pattern.scatter(0, slot, offset)
    place = torch.ones_like(pattern).cumsum(0).to(torch.int64) - 1
    wraps = (pattern < WRAP) & (place > 0)
    period = torch.where(wraps, place, torch.full_like(place, FAR)).min()  # FAR: none, every slot has its own offset
    return source, pattern.index_select(0, slot % period), inverse
