"""The meta-upscale layer: features to an image on any grid, with kernels that a small network predicts.

Meta-upscaling is of X. Hu et al., "Meta-SR: a magnification-arbitrary network for super-resolution" (CVPR 2019); what
is here is that of MIASSR, see `medsr_cli.networks.miassr` for the paper.

Output pixel (i, j) looks at LR pixel (⌊i/s⌋, ⌊j/s⌋). A small network, P2W, turns (1/s, i/s − ⌊i/s⌋, j/s − ⌊j/s⌋)
into a k×k kernel over all F features, which is applied around that LR pixel. Written out, with h the hidden
layer of P2W and V, c the weights and bias of its last layer,

    out(i, j) = Σ_{f, u, v} F[f, p+u, q+v] · (V h + c)[f, u, v]                          (kernels)
              = Σ_m h_m · (Σ_{f, u, v} F[f, p+u, q+v] · V_m[f, u, v]) + (the same of c)  (hidden)

Both forms are here. The first evaluates P2W once for each distinct pair of offsets: a sub-pixel convolution,
best for scales such as 2, 2.5 or 4. The second convolves the features with the columns of V once for each LR
pixel; its cost hardly depends on the scale, however odd. The cheaper one is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scale = float | Fraction
"""An enlargement. A float means the decimal that it prints as: 2.7 is 27/10."""

ROUNDINGS = ("exact", "reference")
WRAP = 1e-6
"""An offset below this is where the authors' program sees the pattern of offsets begin again."""
RESPONSE_BYTES = 32_000_000
"""Most memory for the convolved features of one band of rows."""
DOT_BYTES = {"cpu": 2_000_000}
"""Most memory for one step of the dot products: on the CPU what its caches hold, else `RESPONSE_BYTES`."""


@dataclass(frozen=True, eq=False)
class AxisGrid:
    """Where the output pixels of one axis fall on the LR pixels; on the CPU, for whole images and tiles alike."""

    source: Tensor
    """LR pixel of each output pixel, int64 (n',), never decreasing."""
    offset: Tensor
    """Distance from it in LR pixels, in [0, 1), float32 (n',)."""

    def __len__(self) -> int:
        return len(self.source)

    def sliced(self, start: int, stop: int) -> AxisGrid:
        """Output pixels start … stop − 1."""
        return AxisGrid(self.source[start:stop], self.offset[start:stop])

    def shifted(self, by: int) -> AxisGrid:
        """For features that begin at LR pixel −by: `by` is added to every LR pixel."""
        return AxisGrid(self.source + by, self.offset)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """The output pixels, as (start, stop), whose LR pixel is one of first … stop − 1."""
        start, end = torch.searchsorted(self.source, torch.tensor((first, stop))).tolist()
        return start, end


def grid_of(length: int, scale: Scale, rounding: str = "exact") -> AxisGrid:
    """The grid of one axis.

    "exact" has ⌊s·n⌋ output pixels. "reference" has int(s·n), a float64 product that can be one less; a
    `Fraction` states its size exactly in both.

    Args:
        length: LR pixels.
        scale: any number above 0; the paper's networks are trained for (1, 4].
        rounding: "exact" or "reference", in rational arithmetic or as the authors' program has it.

    Raises:
        ValueError: no such rounding, or a scale that leaves no pixel.
    """
    ratio = ratio_of(scale)
    size = math.floor(ratio * length)
    if rounding == "exact":
        grid = _exact_grid(length, ratio)
    elif rounding == "reference":
        if not isinstance(scale, Fraction):
            size = int(float(scale) * length)
        grid = _reference_grid(length, size, float(scale))
    else:
        msg = f"There is no rounding {rounding!r}; there are {' and '.join(ROUNDINGS)}."
        raise ValueError(msg)
    if not len(grid):
        msg = f"Nothing is left of {length} pixels at scale {scale}."
        raise ValueError(msg)
    return grid


def ratio_of(scale: Scale) -> Fraction:
    """The scale as the fraction it means.

    Raises:
        ValueError: not a finite number above 0.
    """
    if not (math.isfinite(scale) and scale > 0):
        msg = f"{scale} is not an enlargement."
        raise ValueError(msg)
    return scale if isinstance(scale, Fraction) else Fraction(str(scale))


def inverse_scale(rows: Scale, columns: Scale) -> float:
    """P2W's first input, 1/s; where the axes differ, s is their geometric mean (ours, the paper has one scale)."""
    if rows == columns:
        return 1 / float(rows)
    return 1 / math.sqrt(float(rows) * float(columns))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _exact_grid(length: int, ratio: Fraction) -> AxisGrid:
    """i/s = i·d/m for s = m/d: whole part and remainder, without rounding."""
    m, d = ratio.numerator, ratio.denominator
    places = [divmod(i * d, m) for i in range(math.floor(ratio * length))]
    return AxisGrid(
        torch.tensor([whole for whole, _ in places], dtype=torch.int64, device="cpu"),
        torch.tensor([rest / m for _, rest in places], dtype=torch.float32, device="cpu"),
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _reference_grid(length: int, size: int, scale: float) -> AxisGrid:
    """The authors' arithmetic: float32 positions, and offsets repeated from the first period.

    Where float32 rounds a whole i/s down, the pixel before is used with an offset of the pattern. Without a
    second period inside the axis (there their program fails) the offsets are used as they are. The period is
    that of this axis alone.
    """
    position = torch.arange(size, dtype=torch.float32, device="cpu") * torch.tensor(1 / scale, dtype=torch.float32)
    source = position.floor().to(torch.int64)
    offset = position - source
    slots = math.ceil(scale)  # of each LR pixel
    earlier = torch.arange(size) - torch.searchsorted(source, source)  # output pixels of the same LR pixel before
    slot = source * slots + earlier
    pattern = torch.ones(max(length * slots, size and int(slot.max()) + 1))
    pattern[slot] = offset
    wraps = (pattern[1:] < WRAP).nonzero()
    if len(wraps):
        offset = pattern[slot % (int(wraps[0]) + 1)]
    return AxisGrid(source, offset)


class WeightPredictor(nn.Module):
    """P2W: Linear 3→hidden, ReLU, Linear hidden→F·k·k·C, for the vector (1/s, row offset, column offset).

    One constant 1 is put after the hidden layer and the last bias after its weights' columns, so that the
    kernel is one matrix times one vector of length hidden + 1.
    """

    def __init__(self, n_feats: int, kernel: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.shape = (n_feats, kernel, kernel, channels)
        self.meta_block = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, math.prod(self.shape)))

    def before_relu(self, inverse: float | Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer as one term of the row and one of the column, (R, hidden + 1) and (Q, hidden + 1)."""
        layer = cast("nn.Linear", self.meta_block[0])
        weight, bias = layer.weight, layer.bias
        by_row = rows.to(weight)[:, None] * weight[:, 1] + (weight[:, 0] * inverse + bias)
        by_column = columns.to(weight)[:, None] * weight[:, 2]
        return F.pad(by_row, (0, 1), value=1.0), F.pad(by_column, (0, 1))  # ReLU(1 + 0) = 1

    def last_layer(self) -> Tensor:
        """Weights with the bias as one more column, (F, k, k, C, hidden + 1)."""
        layer = cast("nn.Linear", self.meta_block[2])
        return torch.cat((layer.weight, layer.bias[:, None]), dim=1).view(*self.shape, -1)


class MetaUpsampler(nn.Module):
    """Features (N, F, H, W) to images (N, C, H', W') on any grid, in bands of rows that bound the memory.

    `form` is "auto" (the cheaper one), "kernels" or "hidden"; the two are the sums of this module's docstring.
    """

    def __init__(self, n_feats: int, kernel: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.P2W = WeightPredictor(n_feats, kernel, channels, hidden)
        self.margin = kernel // 2
        self.channels = channels
        self.hidden = hidden
        self.form = "auto"

    def forward(self, features: Tensor, inverse: float, rows: AxisGrid, columns: AxisGrid) -> Tensor:
        for grid, length in zip((rows, columns), features.shape[-2:], strict=True):
            _refuse_outside(grid, length)
        features, columns = cut(features, columns, 3, self.margin)
        row_offsets, row_phase = distinct(rows.offset)
        column_offsets, column_phase = distinct(columns.offset)
        pairs = len(row_offsets) * len(column_offsets)
        if self.form == "kernels" or (self.form == "auto" and pairs <= self.hidden + 1):
            terms = self._terms(features, inverse, row_offsets, column_offsets)
            return self._by_kernels(features, terms, (rows, row_phase), (columns, column_phase))
        terms = self._terms(features, inverse, rows.offset, columns.offset)
        return self._by_hidden(features, terms, rows, columns)

    def _terms(self, features: Tensor, inverse: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return self.P2W.before_relu(inverse, rows.to(features.device), columns.to(features.device))

    def _by_kernels(
        self,
        features: Tensor,
        terms: tuple[Tensor, Tensor],
        rows: tuple[AxisGrid, Tensor],
        columns: tuple[AxisGrid, Tensor],
    ) -> Tensor:
        """One kernel for each pair of distinct offsets; every output pixel takes the response of its own pair."""
        hidden = (terms[0][:, None] + terms[1]).relu()  # (R, Q, hidden + 1)
        kernels = torch.einsum("fuvcm,rqm->rqcfuv", self.P2W.last_layer(), hidden)
        bank = kernels.flatten(0, 2)  # (R·Q·C, F, k, k)
        n_row_phases, n_column_phases = hidden.shape[:2]
        place = columns[0].source * (n_row_phases * n_column_phases) + columns[1]
        bands = []
        for start, stop in self._bands(features, len(bank), rows[0], len(columns[0])):
            slab, band = cut(features, rows[0].sliced(start, stop), 2, self.margin)
            responses = self._convolved(slab, bank).reshape(len(slab), -1, self.channels)  # (N, h·W·R·Q, C)
            row = band.source * slab.shape[3] * n_row_phases + rows[1][start:stop]
            index = (row[:, None] * n_column_phases + place).flatten()
            picked = responses.index_select(1, index.to(slab.device))  # (N, h'·W', C)
            bands.append(picked.view(len(slab), len(band), -1, self.channels))
        return torch.cat(bands, dim=1).permute(0, 3, 1, 2)

    def _by_hidden(self, features: Tensor, terms: tuple[Tensor, Tensor], rows: AxisGrid, columns: AxisGrid) -> Tensor:
        """The features convolved with the columns of P2W's last layer; the hidden layer mixes them per output pixel."""
        bank = self.P2W.last_layer().permute(3, 4, 0, 1, 2).flatten(0, 1)  # (C·(hidden + 1), F, k, k)
        sources = columns.source.to(features.device)
        step = self._rows_at_once(features, len(columns))
        bands = []
        for start, stop in self._bands(features, len(bank), rows, len(columns)):
            slab, band = cut(features, rows.sliced(start, stop), 2, self.margin)
            responses = self._convolved(slab, bank)  # (N, h·W, C·(hidden + 1))
            first = (band.source * slab.shape[3]).to(slab.device)
            for i in range(0, stop - start, step):
                by_row = terms[0][start + i : min(start + i + step, stop)]
                hidden = (by_row[:, None] + terms[1]).relu_()  # (h', W', hidden + 1)
                index = (first[i : i + step, None] + sources).flatten()
                picked = responses.index_select(1, index).view(len(slab), *hidden.shape[:2], self.channels, -1)
                bands.append(picked.mul_(hidden[:, :, None]).sum(dim=-1))  # (N, h', W', C)
        return torch.cat(bands, dim=1).permute(0, 3, 1, 2)

    def _convolved(self, slab: Tensor, bank: Tensor) -> Tensor:
        """Every LR pixel's responses, (N, h·W, M)."""
        slab = slab.contiguous(memory_format=torch.channels_last)
        # One copy at most; a selection of rows from anything not contiguous would copy all of it each time.
        return F.conv2d(slab, bank, padding=self.margin).permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def _bands(self, features: Tensor, responses: int, rows: AxisGrid, width: int) -> list[tuple[int, int]]:
        """Output rows in bands of whole LR rows whose responses fit into `RESPONSE_BYTES`."""
        n, f, height, lr_width = features.shape
        per_output = width * (2 * 8 + n * self.channels * features.element_size())  # indices and picked values
        per_row = n * lr_width * (responses + f) * features.element_size() + per_output * -(-len(rows) // height)
        step = max(RESPONSE_BYTES // per_row, 1)
        first, last = int(rows.source[0]), int(rows.source[-1])
        spans = [rows.span(p, p + step) for p in range(first, last + 1, step)]
        return [(start, stop) for start, stop in spans if start < stop]

    def _rows_at_once(self, features: Tensor, width: int) -> int:
        per_row = width * (self.hidden + 1) * features.element_size() * (1 + 2 * len(features) * self.channels)
        return max(DOT_BYTES.get(features.device.type, RESPONSE_BYTES) // per_row, 1)


def cut(features: Tensor, grid: AxisGrid, dim: int, margin: int) -> tuple[Tensor, AxisGrid]:
    """The part of the features that a grid needs along one axis, with the grid counted from its start."""
    start = max(int(grid.source[0]) - margin, 0)
    stop = min(int(grid.source[-1]) + 1 + margin, features.shape[dim])
    return features.narrow(dim, start, stop - start), grid.shifted(-start)


def distinct(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The different offsets of an axis, and which of them each output pixel has."""
    values, phase = torch.unique(offsets, return_inverse=True)
    return values, phase


def _refuse_outside(grid: AxisGrid, length: int) -> None:
    if not len(grid) or int(grid.source[0]) < 0 or int(grid.source[-1]) >= length:
        found = f"{int(grid.source[0])} to {int(grid.source[-1])}" if len(grid) else "nothing"
        msg = f"A grid asks for LR pixels {found}; the features have 0 to {length - 1}."
        raise ValueError(msg)
