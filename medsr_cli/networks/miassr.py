"""MIASSR: one network for every enlargement, by a meta-upscale layer that predicts its own kernels.

Paper: J. Zhu, C. Tan, J. Yang, G. Yang, P. Liò, "Arbitrary scale super-resolution for medical images", Int. J.
Neural Systems 31(10), 2150037 (2021), arXiv 2105.10738; J. Zhu's PhD dissertation (Cambridge, 2023), chapter 4.
The meta-upscale idea is that of Hu et al., Meta-SR (CVPR 2019).

Output pixel (i, j) looks at LR pixel (⌊i/s⌋, ⌊j/s⌋). A small network, P2W, turns (1/s, i/s − ⌊i/s⌋, j/s − ⌊j/s⌋)
into a k×k kernel over all F features, which is applied around that LR pixel. Written out, with h the hidden
layer of P2W and V, c the weights and bias of its last layer,

    out(i, j) = Σ_{f, u, v} F[f, p+u, q+v] · (V h + c)[f, u, v]                          (kernels)
              = Σ_m h_m · (Σ_{f, u, v} F[f, p+u, q+v] · V_m[f, u, v]) + (the same of c)  (hidden)

Both forms are here. The first evaluates P2W once for each distinct pair of offsets: a sub-pixel convolution,
best for scales such as 2, 2.5 or 4. The second convolves the features with the columns of V once for each LR
pixel; its cost hardly depends on the scale, however odd. The cheaper one is taken.

Attribute names are those of the authors' program, so that a state_dict of theirs loads as it is, less a
sub-pixel tail that it builds and never runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.rdst import count_blocks, frozen_pointwise

Scale = float | Fraction
"""An enlargement. A float means the decimal that it prints as: 2.7 is 27/10."""

ROUNDINGS = ("exact", "reference")
NEGATIVE_SLOPE = 0.2
WRAP = 1e-6
"""An offset below this is where the authors' program sees the pattern of offsets begin again."""
RESPONSE_BYTES = 32_000_000
"""Most memory for the convolved features of one band of rows."""
DOT_BYTES = {"cpu": 2_000_000}
"""Most memory for one step of the dot products: on the CPU what its caches hold, else `RESPONSE_BYTES`."""


@dataclass(frozen=True)
class MiassrConfig:
    """Sizes of one MIASSR; the defaults are the paper's, for one channel.

    `rounding` is how output pixels find their LR pixel: "exact" in rational arithmetic as the paper has it,
    "reference" in float32 as the authors' program does, for their weights.
    """

    n_feats: int = 64
    n_blocks: int = 16
    hidden: int = 256
    kernel: int = 3
    in_channels: int = 1
    rounding: str = "exact"

    def __post_init__(self) -> None:
        if min(self.n_feats, self.n_blocks, self.hidden, self.kernel, self.in_channels) < 1:
            msg = f"Every size of a MIASSR is at least 1: {self}."
            raise ValueError(msg)
        if self.kernel % 2 == 0:
            msg = f"A kernel of {self.kernel} pixels has no centre; it must be odd."
            raise ValueError(msg)
        if self.rounding not in ROUNDINGS:
            msg = f"There is no rounding {self.rounding!r}; there are {' and '.join(ROUNDINGS)}."
            raise ValueError(msg)


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
        rounding: "exact" or "reference", see `MiassrConfig`.

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


class ResidualBlock(nn.Module):
    """x + conv(LeakyReLU(conv(x))), 3×3, no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class EdsrLite(nn.Module):
    """The feature extractor: 3×3 convolution, residual blocks, 3×3 convolution, and the first one's output added."""

    def __init__(self, config: MiassrConfig) -> None:
        super().__init__()
        f = config.n_feats
        self.head = nn.Sequential(nn.Conv2d(config.in_channels, f, 3, padding=1))
        blocks: list[nn.Module] = [ResidualBlock(f) for _ in range(config.n_blocks)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(f, f, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        shallow: Tensor = self.head(image)  # (N, F, H, W)
        if shallow.device.type == "cpu":  # a fifth faster there; the convolutions after it keep the layout
            shallow = shallow.contiguous(memory_format=torch.channels_last)
        out: Tensor = shallow + self.body(shallow)
        return out


class WeightPredictor(nn.Module):
    """P2W: Linear 3→hidden, ReLU, Linear hidden→F·k·k·C, for the vector (1/s, row offset, column offset).

    One constant 1 is put after the hidden layer and the last bias after its weights' columns, so that the
    kernel is one matrix times one vector of length hidden + 1.
    """

    def __init__(self, config: MiassrConfig) -> None:
        super().__init__()
        self.shape = (config.n_feats, config.kernel, config.kernel, config.in_channels)
        self.meta_block = nn.Sequential(
            nn.Linear(3, config.hidden), nn.ReLU(), nn.Linear(config.hidden, math.prod(self.shape))
        )

    def before_relu(self, inverse: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
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

    def __init__(self, config: MiassrConfig) -> None:
        super().__init__()
        self.P2W = WeightPredictor(config)
        self.margin = config.kernel // 2
        self.channels = config.in_channels
        self.hidden = config.hidden
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


class Miassr(nn.Module):
    """The whole network: (N, C, H, W) in [0, 1] to (N, C, H', W') on the grids of `grid_of`, not clipped."""

    def __init__(self, config: MiassrConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MiassrConfig()
        self.sub_mean = frozen_pointwise(config.in_channels)
        self.feature_extractor = EdsrLite(config)
        self.meta_upsampler = MetaUpsampler(config)
        self.add_mean = frozen_pointwise(config.in_channels)
        for conv in (self.sub_mean, self.add_mean):  # all others keep PyTorch's default
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type] # it has one

    @property
    def reach(self) -> int:
        """How far, in LR pixels, the input is that still changes an output pixel of one LR pixel."""
        return 2 * self.config.n_blocks + 2 + self.config.kernel // 2

    def forward(self, image: Tensor, scale: Scale | tuple[Scale, Scale] = 2.0) -> Tensor:
        """Enlarge; a pair is (rows, columns), see `inverse_scale` for what P2W is told then.

        Raises:
            ValueError: a scale that leaves no pixel.
        """
        by_row, by_column = scale if isinstance(scale, tuple) else (scale, scale)
        rows = grid_of(image.shape[-2], by_row, self.config.rounding)
        columns = grid_of(image.shape[-1], by_column, self.config.rounding)
        return self.enlarge(self.features(image), inverse_scale(by_row, by_column), rows, columns)

    def features(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to (N, F, H, W): the mean subtracted and the extractor, whose padding is zeros."""
        out: Tensor = self.feature_extractor(self.sub_mean(image))
        return out

    def enlarge(self, features: Tensor, inverse_scale: float, rows: AxisGrid, columns: AxisGrid) -> Tensor:
        """(N, F, H, W) to (N, C, H', W') for any part of the grids, counted from the features' first pixel.

        With `features` of a crop that has `reach` more pixels on each side than the grids use (fewer only where
        the image ends), the result is that part of the whole image's.

        Raises:
            ValueError: a grid is empty or asks for pixels that the features do not have.
        """
        out: Tensor = self.add_mean(self.meta_upsampler(features, inverse_scale, rows, columns))
        return out


def example_inputs(config: MiassrConfig) -> tuple[Tensor, ...]:
    """One empty image of 2 × 2 pixels."""
    return (torch.zeros(1, config.in_channels, 2, 2),)


RECOMPUTED_BUFFERS = tuple(
    f"feature_extractor.tail.{place}.{kind}" for place in ("0.0", "0.2", "0.4", "1") for kind in ("weight", "bias")
)
"""The extractor's sub-pixel tail in the authors' checkpoints: never run, and shaped by an unrelated setting."""


def config_from_state(state: Mapping[str, Tensor]) -> MiassrConfig:
    """Recover every size of a MIASSR from the shapes of its tensors; the rounding is that of the authors' program.

    Raises:
        WeightsError: the tensors are not those of a MIASSR; the sentence names what is missing.
    """
    head, first, last = (
        "feature_extractor.head.0.weight",
        "meta_upsampler.P2W.meta_block.0.weight",
        "meta_upsampler.P2W.meta_block.2.weight",
    )
    for key in (head, first, last):
        if key not in state:
            msg = f"These tensors are not a MIASSR: {key} is missing."
            raise WeightsError(msg)
    n_feats, channels = state[head].shape[:2]
    area = state[last].shape[0] // (n_feats * channels)
    return MiassrConfig(
        n_feats=n_feats,
        n_blocks=count_blocks(state, "feature_extractor.body.") - 1,  # the last one is the closing convolution
        hidden=state[first].shape[0],
        kernel=math.isqrt(area),
        in_channels=channels,
        rounding="reference",
    )
