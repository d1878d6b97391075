"""Shifted-window attention, shared by the networks that use it.

Windows are M by M, non-overlapping, counted from the top-left corner, tokens row-major. Source: Liu et al., Swin
Transformer (ICCV 2021), section 3.2, as used by RDST (arXiv 2302.11184).

Only four masks exist at any image size: windows inside the map need none, and those of the last row, the
last column and the corner each need one. They are kept per device, never in a checkpoint, and made outside
inference mode whoever asks first, so that training can use them too.

Everything in a Swin layer but the choice of windows works on single tokens or single windows. So tokens are kept in
the order of the windows, (tokens, channels), from layer to layer, and `WindowOrder` says how to bring them into
another order in one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.networks.derived import Derived

MASKED_LOGIT = -100.0
"""Added to the logit of a pair of tokens that the cyclic shift brought together from far apart."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of the bias table for each (query, key) pair: (dr + M - 1)(2M - 1) + (dc + M - 1), shape (M², M²)."""
    positions = torch.arange(window * window, device=device)
    rows, columns = positions // window, positions % window
    row_difference = rows[:, None] - rows[None, :] + window - 1  # (M², M²), query minus key
    column_difference = columns[:, None] - columns[None, :] + window - 1
    return row_difference * (2 * window - 1) + column_difference


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def shift_mask(window: int, shift: int, last_row: bool, last_column: bool, device: torch.device) -> Tensor:
    """Additive mask (M², M²) of one window of a shifted map: 0 where both tokens are neighbours in the image.

    After the cyclic roll, the last `shift` rows of the last window row come from the top of the image, and
    likewise for columns; tokens of different origin must not attend to each other.
    """
    wrapped = (torch.arange(window, device=device) >= window - shift).long()
    none = torch.zeros_like(wrapped)
    row_region = wrapped if last_row else none
    column_region = wrapped if last_column else none
    region = (2 * row_region[:, None] + column_region[None, :]).flatten()  # (M²,)
    return torch.where(region[:, None] == region[None, :], 0.0, MASKED_LOGIT)


def partition_windows(tokens: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B, H/M, W/M, M², C)."""
    b, h, w, c = tokens.shape
    grid = tokens.view(b, h // window, window, w // window, window, c)
    return grid.transpose(2, 3).reshape(b, h // window, w // window, window * window, c)


def merge_windows(windows: Tensor, window: int) -> Tensor:
    """(B, H/M, W/M, M², C) back to (B, H, W, C)."""
    b, rows, columns, _, c = windows.shape
    grid = windows.view(b, rows, columns, window, window, c)
    return grid.transpose(2, 3).reshape(b, rows * window, columns * window, c)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def all_window_masks(window: int, shift: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The mask of every window of a shifted map, (rows · columns, M², M²), row-major."""
    kinds = window_kinds(1, rows, columns, device)
    return masks_of_kinds(window, shift, device).index_select(0, kinds)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def masks_of_kinds(window: int, shift: int, device: torch.device) -> Tensor:
    """The four masks (4, M², M²): inside, last column, last row, corner."""
    kinds = [(False, False), (False, True), (True, False), (True, True)]
    return torch.stack([shift_mask(window, shift, last_row, last_column, device) for last_row, last_column in kinds])


def window_kinds(batch: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Which of the four masks each window of `batch` shifted maps needs, (batch · rows · columns,)."""
    windows = torch.arange(batch * rows * columns, device=device)
    last_row = remainder(windows // columns, rows) == rows - 1
    last_column = remainder(windows, columns) == columns - 1
    return 2 * last_row.long() + last_column.long()


def remainder(numbers: Tensor, size: int) -> Tensor:
    """`numbers % size` of numbers of at least 0; the ONNX exporter has none by a size that is not fixed."""
    return numbers - numbers // size * size


@dataclass(frozen=True)
class WindowOrder:
    """Orders of the tokens of maps of one size, as indices to gather by, and the masks of the shifted windows.

    All but `kinds` are (batch · rows · columns,): element i says which token comes to place i. The order "windows"
    has the tokens of one window after another, the order "shifted" those of the windows of the map rolled by
    (-shift, -shift).
    """

    raster_to_windows: Tensor
    windows_to_raster: Tensor
    windows_to_shifted: Tensor
    shifted_to_windows: Tensor
    kinds: Tensor
    """(windows,), see `window_kinds`; in the order "shifted"."""


def window_order(batch: int, rows: int, columns: int, window: int, shift: int, device: torch.device) -> WindowOrder:
    """Of `batch` maps of `rows` by `columns` windows.

    Whole-number arithmetic on the number of each token, so that a graph can do it for any size.
    """
    m, height, width = window, rows * window, columns * window
    number = torch.arange(batch * height * width, device=device)

    def place(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Where the order "windows" has a token."""
        which = (image * rows + row // m) * columns + column // m
        return which * m * m + row % m * m + column % m

    inside, which = number % (m * m), number // (m * m)
    image = which // (rows * columns)
    row = remainder(which // columns, rows) * m + inside // m
    column = remainder(which, columns) * m + inside % m
    return WindowOrder(
        raster_to_windows=(image * height + row) * width + column,
        windows_to_raster=place(
            number // (height * width), remainder(number // width, height), remainder(number, width)
        ),
        windows_to_shifted=place(image, remainder(row + shift, height), remainder(column + shift, width)),
        shifted_to_windows=place(
            image, remainder(row + height - shift, height), remainder(column + width - shift, width)
        ),
        kinds=window_kinds(batch, rows, columns, device),
    )


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def kept_window_order(
    batch: int, rows: int, columns: int, window: int, shift: int, device: torch.device
) -> WindowOrder:
    """`window_order`, kept for the last few sizes."""
    return window_order(batch, rows, columns, window, shift, device)


def reordered(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows of (tokens, channels) gathered by `order`; `inverse` undoes it, and carries gradients back."""
    if not torch.is_grad_enabled():
        return tokens.index_select(0, order)
    out: Tensor = _Reordered.apply(tokens, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Reordered(torch.autograd.Function):
    """A gather both ways: the gradient of `index_select` would add where nothing needs adding."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


LOG2_E = math.log2(math.e)
EXCLUDED_LOGIT = -1000.0
"""In place of `MASKED_LOGIT` where logits are small: its exponential is 0, and not a slow denormal number."""
FARTHEST_SUM = 2.0**60
"""Sums of exponentials that are kept as they are lie between this and its inverse; see `_attend_by_products`."""


class _Ready(NamedTuple):
    """Weights of one attention layer as inference takes them."""

    weight: Tensor
    bias: Tensor
    biases_of_kinds: Tensor


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned relative position bias (Swin, equation 4).

    `forward` takes tokens (windows · M², C) in the order of the windows and returns `residual`, of the same shape,
    plus the result. `kinds` says which mask each window needs, where they are shifted (see `window_kinds`).
    """

    def __init__(self, channels: int, heads: int, window: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.head_width = channels // heads
        self.scale = self.head_width**-0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.plain = False
        """True runs the definition, which the other forms are tested against."""
        self._ready: Derived[_Ready] = Derived()

    def _apply(self, fn: Any, recurse: bool = True) -> WindowAttention:
        self._ready.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def position_bias(self) -> Tensor:
        """The bias of every pair, (heads, M², M²)."""
        index = relative_position_index(self.window, self.relative_position_bias_table.device)
        bias: Tensor = self.relative_position_bias_table[index].permute(2, 0, 1)
        return bias

    def biases_of_kinds(self, masked: float = MASKED_LOGIT) -> Tensor:
        """Bias and mask of each kind of window, (4, heads, M², M²)."""
        masks = masks_of_kinds(self.window, self.window // 2, self.relative_position_bias_table.device)
        bias = self.position_bias()
        return bias[None] + masks[:, None].to(bias.dtype) * (masked / MASKED_LOGIT)

    def forward(self, tokens: Tensor, kinds: Tensor | None, residual: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._ready.forget()  # what can be trained may be another thing after the next step
        if self.plain or torch.is_grad_enabled():
            return residual + self._attend_plain(tokens, kinds)
        if tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64):
            return self._attend_by_products(tokens, kinds, residual)
        return residual + self._attend_fused(tokens, kinds)

    def _attend_plain(self, tokens: Tensor, kinds: Tensor | None) -> Tensor:
        """softmax(q kᵀ / √d + bias + mask) v, written out; also the form that trains the bias table."""
        n = self.window**2
        split = self.qkv(tokens).view(-1, n, 3, self.heads, self.head_width)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (windows, heads, M², d)
        logits = (q * self.scale) @ k.transpose(-2, -1) + self.position_bias().to(q.dtype)
        if kinds is not None:
            masks = masks_of_kinds(self.window, self.window // 2, tokens.device).to(q.dtype)
            logits = logits + masks.index_select(0, kinds)[:, None]  # (windows, 1, M², M²)
        mixed: Tensor = logits.softmax(dim=-1) @ v  # (windows, heads, M², d)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(tokens.shape))
        return out

    def _attend_by_products(self, tokens: Tensor, kinds: Tensor | None, residual: Tensor) -> Tensor:
        """The same in batched matrix products that need no copies between them, for float32 on CPUs.

        Channels come before the tokens of each window, so that q, k and v of every head are matrices where they
        are. Exponentials are of base 2 (half the time of base e here) and not shifted by their largest: a row of
        ones below v adds them up in the same product. Should a sum leave the range where that is exact, which
        takes logits beyond ±40, the definition is run.
        """
        n, heads, d = self.window**2, self.heads, self.head_width
        ready = self._ready.of(self._parameters_of_attention(), self._ready_for_products)
        windows = tokens.view(-1, n, tokens.shape[-1])
        count = windows.shape[0]
        qkv = torch.baddbmm(ready.bias, ready.weight.expand(count, -1, -1), windows.transpose(1, 2))
        qkv = qkv.view(count * heads, 3 * d + 1, n)  # (windows · heads, [q | k | v | 1], M²)
        biases = ready.biases_of_kinds
        # A copy in any case, as what follows is in place: an expanded or reshaped table may still be the kept one.
        logits = biases[:1].repeat(count, 1, 1, 1) if kinds is None else biases.index_select(0, kinds)
        logits = logits.view(count * heads, n, n)  # (windows · heads, key, query)
        exponentials = logits.baddbmm_(qkv[:, d : 2 * d].transpose(1, 2), qkv[:, :d]).exp2_()
        mixed = torch.bmm(qkv[:, 2 * d :], exponentials)  # (windows · heads, d + 1, query)
        smallest, largest = mixed[:, d].aminmax()
        if not (smallest > 1 / FARTHEST_SUM and largest < FARTHEST_SUM):
            return residual + self._attend_plain(tokens, kinds)
        mixed = (mixed[:, :d] / mixed[:, d:]).view(count, heads * d, n)
        out = (residual + self.proj.bias).view(windows.shape)
        return out.baddbmm_(mixed.transpose(1, 2), self.proj.weight.t().expand(count, -1, -1)).view(tokens.shape)

    def _ready_for_products(self) -> _Ready:
        """q times log2(e) / √d, heads outermost, and beside each head's v the row of ones; biases as (key, query)."""
        heads, d, c = self.heads, self.head_width, self.qkv.in_features
        factors = torch.tensor([self.scale * LOG2_E, 1.0, 1.0]).to(self.qkv.weight).view(3, 1, 1, 1)
        weight = (self.qkv.weight.view(3, heads, d, c) * factors).transpose(0, 1).reshape(heads, 3 * d, c)
        bias = torch.zeros_like(weight[..., 0])
        if self.qkv.bias is not None:
            bias = (self.qkv.bias.view(3, heads, d) * factors[..., 0]).transpose(0, 1).reshape(heads, 3 * d)
        weight, bias = F.pad(weight, (0, 0, 0, 1)), F.pad(bias, (0, 1), value=1.0)
        biases = self.biases_of_kinds(EXCLUDED_LOGIT).transpose(-2, -1) * LOG2_E
        return _Ready(weight.reshape(1, -1, c), bias.reshape(1, -1, 1), biases.contiguous())

    def _attend_fused(self, tokens: Tensor, kinds: Tensor | None) -> Tensor:
        """The same through PyTorch's fused kernel, heads padded with zeros to a multiple of 8 as it needs on GPUs."""
        n, d = self.window**2, self.head_width
        ready = self._ready.of(self._parameters_of_attention(), self._ready_for_fused)
        split = F.linear(tokens, ready.weight, ready.bias).view(tokens.shape[0] // n, n, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (windows, heads, M², padded d)
        biases = ready.biases_of_kinds
        mask = biases[:1] if kinds is None else biases.index_select(0, kinds)  # (1 or windows, heads, M², M²)
        mask = mask.expand(q.shape[0], -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        out: Tensor = self.proj(mixed[..., :d].transpose(1, 2).reshape(tokens.shape))
        return out

    def _ready_for_fused(self) -> _Ready:
        heads, d, c = self.heads, self.head_width, self.qkv.in_features
        more = -d % 8
        weight = F.pad(self.qkv.weight.view(3, heads, d, c), (0, 0, 0, more)).reshape(-1, c)
        bias = torch.zeros_like(weight[:, 0])
        if self.qkv.bias is not None:
            bias = F.pad(self.qkv.bias.view(3, heads, d), (0, more)).flatten()
        return _Ready(weight, bias, self.biases_of_kinds().contiguous())

    def _parameters_of_attention(self) -> tuple[Tensor | None, ...]:
        return self.qkv.weight, self.qkv.bias, self.relative_position_bias_table
