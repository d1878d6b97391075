"""MedCLIP-ViT's two encoders: how well a text describes an image, for M2Trans' semantic loss.

Z. Wang et al., "MedCLIP", EMNLP 2022: the image encoder is a Swin transformer (Liu et al., ICCV 2021), the text
encoder a BERT (Devlin et al., NAACL 2019; Bio_ClinicalBERT), each with a linear projection. Tensor names are those
of the published `pytorch_model.bin`, so that it loads as it is. Written here and not taken from a library, because
libraries rename tensors between releases, and because a checkpoint must be laid out before its bytes are trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.windows import all_window_masks, merge_windows, partition_windows, relative_position_index

IMAGE_EPS = 1e-5
TEXT_EPS = 1e-12
HEAD_SIZE = 64
"""Channels of each head of a BERT of any of the published sizes; no tensor tells."""


@dataclass(frozen=True)
class MedClipConfig:
    """Sizes of one pair of encoders; the defaults are MedCLIP-ViT's."""

    in_channels: int = 3
    patch: int = 4
    """Side of the patches that are tokens, in pixels."""
    width: int = 96
    """Channels of the first level; doubled from level to level."""
    depths: str = "2,2,6,2"
    """Blocks of each level."""
    heads: str = "3,6,12,24"
    window: int = 7
    """Side of the windows, in tokens; the last level is one window."""
    vocabulary: int = 28_996
    """Tokens that the text encoder knows."""
    positions: int = 512
    """The longest text in tokens."""
    token_types: int = 2
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    """Channels inside each feed-forward part of the text encoder."""
    out: int = 512
    """Length of both results."""

    def __post_init__(self) -> None:
        image = (self.in_channels, self.patch, self.width, self.out)
        words = (self.vocabulary, self.positions, self.token_types)
        text = (self.text_width, self.text_layers, self.text_heads, self.text_hidden)
        if (
            min(*image, *words, *text, *self.level_depths, *self.level_heads) < 1
            or self.window < 2
            or self.text_layers < 2
        ):
            msg = "every size is at least 1, windows and layers of text at least 2"
            raise ValueError(msg)
        if len(self.level_depths) != len(self.level_heads) or self.text_width % self.text_heads:
            msg = "there are as many heads as depths, and heads divide channels"
            raise ValueError(msg)
        if any((self.width << i) % count for i, count in enumerate(self.level_heads)):
            msg = "heads divide channels"
            raise ValueError(msg)

    @property
    def level_depths(self) -> tuple[int, ...]:
        """`depths` as numbers."""
        return tuple(int(depth) for depth in self.depths.split(","))

    @property
    def level_heads(self) -> tuple[int, ...]:
        """`heads` as numbers."""
        return tuple(int(count) for count in self.heads.split(","))

    @property
    def side(self) -> int:
        """Rows and columns of the images, in pixels: 224."""
        return (self.patch * self.window) << (len(self.level_depths) - 1)


class _QueryKeyValue(nn.Module):
    """The three projections of an attention, under the published names."""

    def __init__(self, width: int, table: tuple[int, int] | None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        if table is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(table))


class _Output(nn.Module):
    """A linear layer, and in the text encoder the norm after it."""

    def __init__(self, width: int, out: int, *, norm: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)
        if norm:
            self.LayerNorm = nn.LayerNorm(out, eps=TEXT_EPS)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, window: int = 0, norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.self = _QueryKeyValue(width, ((2 * window - 1) ** 2, heads) if window else None)
        self.output = _Output(width, width, norm=norm)

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / √d + bias) v and the output projection; tokens (B, n, C), bias (B, heads, n, n) or None."""
        b, n, c = tokens.shape
        qkv = (layer(tokens) for layer in (self.self.query, self.self.key, self.self.value))
        q, k, v = (x.view(b, n, self.heads, c // self.heads).transpose(1, 2) for x in qkv)  # (B, heads, n, d)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.output.dense(mixed.transpose(1, 2).reshape(b, n, c))
        return out


class SwinBlock(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)), on (B, H, W, C); windows of `window`, rolled by `shift` (Swin, eq. 3)."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.layernorm_before = nn.LayerNorm(width, eps=IMAGE_EPS)
        self.attention = _Attention(width, heads, window=window)
        self.layernorm_after = nn.LayerNorm(width, eps=IMAGE_EPS)
        self.intermediate = _Output(width, 4 * width)
        self.output = _Output(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rolled = self.layernorm_before(x).roll((-self.shift, -self.shift), (1, 2))
        mixed = self._attend(partition_windows(rolled, self.window))
        x = x + merge_windows(mixed, self.window).roll((self.shift, self.shift), (1, 2))
        inner = F.gelu(self.intermediate.dense(self.layernorm_after(x)))
        out: Tensor = x + self.output.dense(inner)
        return out

    def _attend(self, windows: Tensor) -> Tensor:
        """(B, rows, columns, M², C) of windows to the same."""
        b, rows, columns, n, c = windows.shape
        table: Tensor = self.attention.self.relative_position_bias_table
        bias = table[relative_position_index(self.window, table.device)].permute(2, 0, 1)[None]  # (1, heads, M², M²)
        if self.shift:
            masks = all_window_masks(self.window, self.shift, rows, columns, table.device)
            bias = bias + masks[:, None].to(bias.dtype)  # (windows, heads, M², M²)
        bias = bias.expand(rows * columns, -1, -1, -1).repeat(b, 1, 1, 1)
        mixed: Tensor = self.attention(windows.reshape(b * rows * columns, n, c), bias)
        return mixed.view(b, rows, columns, n, c)


class PatchMerging(nn.Module):
    """Each 2x2 tokens, column after column, to one of twice the channels: (B, H, W, C) to (B, H/2, W/2, 2C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=IMAGE_EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        out: Tensor = self.reduction(self.norm(torch.cat(parts, dim=-1)))
        return out


class SwinLevel(nn.Module):
    """Blocks, every second one shifted by half a window unless the map is one window; then the merging, if any."""

    def __init__(self, config: MedClipConfig, level: int) -> None:
        super().__init__()
        width, last = config.width << level, level == len(config.level_depths) - 1
        shift = 0 if last else config.window // 2
        self.blocks = nn.ModuleList(
            SwinBlock(width, config.level_heads[level], config.window, shift * (i % 2))
            for i in range(config.level_depths[level])
        )
        self.downsample = nn.Identity() if last else PatchMerging(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        merged: Tensor = self.downsample(x)
        return merged


class _Patches(nn.Module):
    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(config.in_channels, config.width, config.patch, config.patch)


class _PatchEmbedding(nn.Module):
    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.patch_embeddings = _Patches(config)
        self.norm = nn.LayerNorm(config.width, eps=IMAGE_EPS)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embeddings.projection(image).permute(0, 2, 3, 1)  # (N, side/4, side/4, width)
        normed: Tensor = self.norm(tokens)
        return normed


class _Levels(nn.Module):
    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwinLevel(config, level) for level in range(len(config.level_depths)))


class Swin(nn.Module):
    """(N, 3, side, side) to the mean of the last level's tokens, (N, 8 · width)."""

    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.embeddings = _PatchEmbedding(config)
        self.encoder = _Levels(config)
        self.layernorm = nn.LayerNorm(config.width << (len(config.level_depths) - 1), eps=IMAGE_EPS)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embeddings(image)
        for level in self.encoder.layers:
            x = level(x)
        pooled: Tensor = self.layernorm(x).mean(dim=(1, 2))
        return pooled


class _TextEmbedding(nn.Module):
    """LN(word + position + type 0) of token ids (N, T): (N, T, text_width)."""

    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.text_width)
        self.position_embeddings = nn.Embedding(config.positions, config.text_width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.text_width)
        self.LayerNorm = nn.LayerNorm(config.text_width, eps=TEXT_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: tokens.shape[1]]
        summed = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0] + positions
        normed: Tensor = self.LayerNorm(summed)
        return normed


class TextLayer(nn.Module):
    """LN(x + Attn(x)), then LN(x + MLP(x)): BERT norms after each residual."""

    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.attention = _Attention(config.text_width, config.text_heads, norm=True)
        self.intermediate = _Output(config.text_width, config.text_hidden)
        self.output = _Output(config.text_hidden, config.text_width, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention.output.LayerNorm(x + self.attention(x))
        inner = F.gelu(self.intermediate.dense(x))
        out: Tensor = self.output.LayerNorm(x + self.output.dense(inner))
        return out


class _TextLayers(nn.Module):
    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))


class Bert(nn.Module):
    """Token ids (N, T) to the mean of the hidden states 1, 2 and last over all tokens, (N, text_width)."""

    def __init__(self, config: MedClipConfig) -> None:
        super().__init__()
        self.embeddings = _TextEmbedding(config)
        self.encoder = _TextLayers(config)

    def forward(self, tokens: Tensor) -> Tensor:
        states = [self.embeddings(tokens)]  # state 0, which is not taken
        for layer in self.encoder.layer:
            states.append(layer(states[-1]))
        return torch.stack((states[1], states[2], states[-1])).mean(dim=(0, 2))


class _Projected(nn.Module):
    """An encoder, a linear layer without bias, and length one."""

    def __init__(self, model: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.model = model
        self.projection_head = nn.Linear(width, out, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        return F.normalize(self.projection_head(self.model(given)), dim=-1)


class MedClip(nn.Module):
    """E_i, images (N, 3, side, side) in [0, 1], and E_t, token ids (N, T), each to unit vectors (N, out).

    Texts of one call have equally many tokens: there is no padding, so that no text depends on its neighbours.
    """

    def __init__(self, config: MedClipConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MedClipConfig()
        image_width = config.width << (len(config.level_depths) - 1)
        self.vision_model = _Projected(Swin(config), image_width, config.out)
        self.text_model = _Projected(Bert(config), config.text_width, config.out)

    def encode_image(self, image: Tensor) -> Tensor:
        """E_i.

        Raises:
            ValueError: the images are not of the encoder's size.
        """
        side = self.config.side
        if image.shape[1:] != (self.config.in_channels, side, side):
            msg = f"This MedCLIP takes images of {self.config.in_channels} x {side} x {side}, not {[*image.shape[1:]]}."
            raise ValueError(msg)
        found: Tensor = self.vision_model(image)
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        """E_t.

        Raises:
            ValueError: there are more tokens than positions.
        """
        if tokens.shape[1] > self.config.positions:
            msg = f"A text of {tokens.shape[1]} tokens is too long; this MedCLIP takes {self.config.positions}."
            raise ValueError(msg)
        found: Tensor = self.text_model(tokens)
        return found

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """The cosine of each image and its text, (N,)."""
        return (self.encode_image(image) * self.encode_text(tokens)).sum(dim=-1)


def example_inputs(config: MedClipConfig) -> tuple[Tensor, ...]:
    """An empty image and a text of two tokens."""
    return torch.zeros(1, config.in_channels, config.side, config.side), torch.zeros(1, 2, dtype=torch.long)


RECOMPUTED_BUFFERS = (".relative_position_index", ".position_ids")
"""Endings of the keys of what is counted, not learned."""
DROPPED_PREFIXES = ("logit_scale", "text_model.model.pooler.")
"""What the published file holds beside the encoders: the temperature of their training, and BERT's unused pooling."""


def config_from_state(state: Mapping[str, Tensor]) -> MedClipConfig:
    """Recover every size from names and shapes; heads of the text encoder are taken to have 64 channels.

    Raises:
        WeightsError: the tensors are not those of MedCLIP-ViT; the sentence names what is missing.
    """
    image, text = "vision_model.model.", "text_model.model."

    def tensor(key: str) -> Tensor:
        if key not in state:
            msg = f"These tensors are not MedCLIP-ViT: {key} is missing."
            raise WeightsError(msg)
        return state[key]

    def block(level: int, number: int) -> str:
        return f"{image}encoder.layers.{level}.blocks.{number}.attention.self.relative_position_bias_table"

    def count(*keys: str) -> int:
        return next((i for i, key in enumerate(keys) if key not in state), len(keys))

    depths, most = list[int](), range(len(state))
    while block(len(depths), 0) in state:
        depths.append(count(*(block(len(depths), i) for i in most)))
    table = tensor(block(0, 0))
    patches = tensor(f"{image}embeddings.patch_embeddings.projection.weight")
    words = tensor(f"{text}embeddings.word_embeddings.weight")
    return MedClipConfig(
        in_channels=patches.shape[1],
        patch=patches.shape[2],
        width=patches.shape[0],
        depths=_joined(depths),
        heads=_joined([state[block(level, 0)].shape[1] for level in range(len(depths))]),
        window=(round(table.shape[0] ** 0.5) + 1) // 2,
        vocabulary=words.shape[0],
        positions=tensor(f"{text}embeddings.position_embeddings.weight").shape[0],
        token_types=tensor(f"{text}embeddings.token_type_embeddings.weight").shape[0],
        text_width=words.shape[1],
        text_layers=count(*(f"{text}encoder.layer.{i}.intermediate.dense.weight" for i in most)),
        text_heads=max(words.shape[1] // HEAD_SIZE, 1),
        text_hidden=tensor(f"{text}encoder.layer.0.intermediate.dense.weight").shape[0],
        out=tensor("vision_model.projection_head.weight").shape[0],
    )


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
