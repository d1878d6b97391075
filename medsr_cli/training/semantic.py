"""M2Trans' image-text semantic loss: a result should fit its caption as well as its target does.

Z. Ni et al., IEEE JBHI 29(5), 2025, section III-D: L_sem = Σ_images Σ_k (1/K) |cos(E_i(SR_k), v) - cos(E_i(HR_k), v)|
with v = E_t(caption), as the paper has it: gradients on, all K patches, each image with its own caption and the
caption's own words. The released script does none of these; weight 0 gives its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name
from torch import Tensor, nn

from medsr_cli.errors import WeightsError, mention
from medsr_cli.networks import checkpoint
from medsr_cli.networks.archive import read_published_checkpoint
from medsr_cli.networks.catalogue import MEDCLIP
from medsr_cli.networks.medclip import MedClip
from medsr_cli.networks.wordpiece import WordPiece, read_vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

VOCABULARY_SUFFIX = ".vocab.txt"
"""The vocabulary stands beside the checkpoint under the same name with this ending."""
VOCABULARY_SOURCE = "https://huggingface.co/emilyalsentzer/Bio_ClinicalBERT/resolve/main/vocab.txt"


class ImageText(nn.Module):
    """MedCLIP with its tokeniser: E_i of images, E_t of captions. Frozen, in evaluation mode."""

    def __init__(self, net: MedClip, tokeniser: WordPiece) -> None:
        super().__init__()
        if len(tokeniser) != net.config.vocabulary:
            msg = f"The vocabulary has {len(tokeniser)} pieces, where this MedCLIP knows {net.config.vocabulary}."
            raise WeightsError(msg, f"Use {VOCABULARY_SOURCE}.")
        self.net = net.requires_grad_(False).eval()
        self.tokeniser = tokeniser

    @property
    def side(self) -> int:
        """Rows and columns that the image encoder takes."""
        return self.net.config.side

    def train(self, mode: bool = True) -> ImageText:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors (N, D) of (N, 1 or 3, side, side) in [0, 1]; grey goes in as three equal channels.

        M2Trans' released training leaves out MedCLIP's own normalisation of grey levels, and so does this.
        """
        return self.net.encode_image(image.expand(-1, 3, -1, -1))

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors (N, D), each caption by itself and without padding."""
        device = next(self.net.parameters()).device
        tokens = (torch.tensor([self.tokeniser.ids(caption)], device=device) for caption in captions)
        return torch.cat([self.net.encode_text(ids) for ids in tokens])


def load_image_text(path: str | PathLike[str], vocabulary: str | PathLike[str] | None = None) -> ImageText:
    """MedCLIP from a safetensors file of the store, the published zip or its `pytorch_model.bin`.

    Args:
        path: the weights.
        vocabulary: `vocab.txt` of the text encoder; None: NAME.vocab.txt or vocab.txt beside the weights.

    Raises:
        WeightsError: a file is missing, damaged, or of something else.
    """
    path = Path(path)
    beside = path.with_name(path.stem + VOCABULARY_SUFFIX)
    candidates = (beside, path.with_name("vocab.txt")) if vocabulary is None else (Path(vocabulary),)
    words = next((file for file in candidates if file.is_file()), None)
    if words is None:
        msg = f"The vocabulary of MedCLIP's text encoder, {candidates[0]}, is missing."
        raise WeightsError(msg, f"Copy {VOCABULARY_SOURCE} there.")
    if path.suffix == ".safetensors":
        net = checkpoint.load_network(path)
    else:
        net = checkpoint.network_from_state(read_published_checkpoint(path), MEDCLIP, name=path.name)
    if not isinstance(net, MedClip):
        msg = f"{mention(path.name)} is not MedCLIP."
        raise WeightsError(msg, "Run: medsr weights pull medclip-vit --allow-unpinned.")
    return ImageText(net, read_vocabulary(words))


class SemanticLoss:
    """`loss(result, target, captions, seed)`: images (N, 1 or 3, H, W) in [0, 1] to a scalar.

    Patch 1 is the whole image, resized to the encoder's 224 x 224; patches 2 to K are crops of 224 x 224 at
    random places, the same in result and target, another for each image. An image with a side below 224 is enlarged
    for its crops until its shorter side is 224 [ours]. All resizing is bicubic with aligned corners (a = -0.75).
    """

    def __init__(self, encoders: ImageText, patches: int = 3) -> None:
        self.encoders, self.patches = encoders, patches

    def __call__(self, result: Tensor, target: Tensor, captions: Sequence[str], seed: int) -> Tensor:
        """The sum over images and patches, divided by K.

        Raises:
            ValueError: shapes differ, or there is not one caption for each image.
        """
        if result.shape != target.shape or len(captions) != len(result):
            msg = f"{[*result.shape]} cannot be compared with {[*target.shape]} under {len(captions)} captions."
            raise ValueError(msg)
        texts = self.encoders.encode_captions(captions)  # (N, D)
        found = self._fits(result, texts, seed)
        with torch.no_grad():
            wanted = self._fits(target, texts, seed)
        return (found - wanted).abs().sum() / self.patches

    def _fits(self, image: Tensor, texts: Tensor, seed: int) -> Tensor:
        """Cosine of every patch and the image's caption, (K, N)."""
        cut = patches(image, self.encoders.side, self.patches, seed)
        vectors = self.encoders.encode_image(cut.flatten(0, 1)).view(*cut.shape[:2], -1)  # (K, N, D)
        cosines: Tensor = (vectors * texts).sum(dim=-1)
        return cosines


def patches(image: Tensor, side: int, count: int, seed: int) -> Tensor:
    """The whole of (N, C, H, W) and count - 1 random crops of it, (count, N, C, side, side); see `SemanticLoss`."""
    n, _, h, w = image.shape
    whole = F.interpolate(image, (side, side), mode="bicubic", align_corners=True)
    if min(h, w) < side:
        h, w = (max(side, round(length * side / min(h, w))) for length in (h, w))
        image = F.interpolate(image, (h, w), mode="bicubic", align_corners=True)
    random = torch.Generator().manual_seed(seed)  # on the CPU, the same for every device
    cut = [whole]
    for _ in range(count - 1):
        rows = torch.randint(h - side + 1, (n,), generator=random).tolist()
        columns = torch.randint(w - side + 1, (n,), generator=random).tolist()
        crops = [image[i, :, r : r + side, c : c + side] for i, (r, c) in enumerate(zip(rows, columns, strict=True))]
        cut.append(torch.stack(crops))
    return torch.stack(cut)
