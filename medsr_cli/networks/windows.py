"""Shifted-window attention on token maps, shared by the networks that use it.

Token maps are (batch, rows, columns, channels). Windows are M by M, non-overlapping, counted from the
top-left corner, tokens row-major. Source: Liu et al., Swin Transformer (ICCV 2021), section 3.2, as used
by RDST (arXiv 2302.11184).

Only four masks exist at any image size: windows inside the map need none, and those of the last row, the
last column and the corner each need one. They are kept per device, never in a checkpoint, and made outside
inference mode whoever asks first, so that training can use them too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned relative position bias (Swin, equation 4).

    `forward` takes and returns (B, H/M, W/M, M², C). With `shift` > 0 the last window row and column are
    masked as `shift_mask` says.
    """

    def __init__(self, channels: int, heads: int, window: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = (channels // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.plain = False
        """True runs the definition, which the fused form is tested and timed against."""

    def position_bias(self) -> Tensor:
        """The bias of every pair, (heads, M², M²)."""
        index = relative_position_index(self.window, self.relative_position_bias_table.device)
        bias: Tensor = self.relative_position_bias_table[index].permute(2, 0, 1)
        return bias

    def forward(self, windows: Tensor, shift: int) -> Tensor:
        fused = not (self.plain or torch.is_grad_enabled())
        attend = self._attend_fused if fused else self._attend_plain
        out: Tensor = self.proj(attend(self.qkv(windows), shift))
        return out

    def _attend_plain(self, qkv: Tensor, shift: int) -> Tensor:
        """softmax(q kᵀ / √d + bias + mask) v, written out; also the form that trains the bias table."""
        b, rows, columns, n, c3 = qkv.shape
        split = qkv.view(b, rows * columns, n, 3, self.heads, c3 // (3 * self.heads))
        q, k, v = split.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, windows, heads, M², d)
        logits = (q * self.scale) @ k.transpose(-2, -1) + self.position_bias().to(q.dtype)
        if shift:
            mask = all_window_masks(self.window, shift, rows, columns, qkv.device)
            logits = logits + mask[None, :, None].to(q.dtype)  # (1, windows, 1, M², M²)
        mixed: Tensor = logits.softmax(dim=-1) @ v  # (B, windows, heads, M², d)
        return mixed.transpose(2, 3).reshape(b, rows, columns, n, c3 // 3)

    def _attend_fused(self, qkv: Tensor, shift: int) -> Tensor:
        """The same through PyTorch's fused kernel, one call for each of the (at most four) masks."""
        bias = self.position_bias().to(qkv.dtype)
        if not shift:
            return self._attend_group(qkv, bias)
        inside = self._attend_band(qkv[:, :-1], bias, shift, last_row=False)
        bottom = self._attend_band(qkv[:, -1:], bias, shift, last_row=True)
        return torch.cat((inside, bottom), dim=1)

    def _attend_band(self, qkv: Tensor, bias: Tensor, shift: int, last_row: bool) -> Tensor:
        parts = []
        for columns, last_column in ((qkv[:, :, :-1], False), (qkv[:, :, -1:], True)):
            mask = shift_mask(self.window, shift, last_row, last_column, qkv.device)
            parts.append(self._attend_group(columns, bias + mask.to(bias.dtype)))
        return torch.cat(parts, dim=2)

    def _attend_group(self, qkv: Tensor, bias: Tensor) -> Tensor:
        b, rows, columns, n, c3 = qkv.shape
        if rows == 0 or columns == 0:
            return qkv.new_empty(b, rows, columns, n, c3 // 3)
        split = qkv.reshape(b * rows * columns, n, 3, self.heads, c3 // (3 * self.heads))
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (B·windows, heads, M², d)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=self.scale)
        return mixed.transpose(1, 2).reshape(b, rows, columns, n, c3 // 3)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def all_window_masks(window: int, shift: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The mask of every window of a shifted map, (rows · columns, M², M²), row-major."""
    grid = [
        shift_mask(window, shift, r == rows - 1, c == columns - 1, device) for r in range(rows) for c in range(columns)
    ]
    return torch.stack(grid)
