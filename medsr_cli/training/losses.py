"""What a step of a training is judged by: every term of the papers' losses by name.

A recipe's `losses` name terms and weigh them. `needed_networks` says what has to be on this machine for them,
`build_terms` makes them. Terms are computed in single precision whatever the network's arithmetic is, and their
gradient reaches what the network made and nothing else: the networks that compare are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name
from torch import Tensor, nn

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks.cohft import gradient_map
from medsr_cli.networks.perceptual import VGG22, VGG54, VGG54_ACTIVATED, PerceptualSpec, loss_of
from medsr_cli.networks.seg_unet import LEVELS, SegUnet, frozen, pad_by_repetition, with_batch_statistics
from medsr_cli.networks.wgan import generator_loss
from medsr_cli.training.batch import Batch, Outputs
from medsr_cli.training.semantic import ImageText, SemanticLoss

if TYPE_CHECKING:
    from medsr_cli.training.recipe import Recipe

Comparison = Callable[[Outputs, Batch], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]

COHFT_ALPHA = 0.95
"""Share of the squared error in Cohf-T's loss; the rest is 1 - SSIM."""
SSIM_SIDE, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 1e-4, 9e-4
DICE_FLOOR = 1e-7

ROLES = {
    "segmentation": (
        "a segmentation U-Net",
        "Train one with medsr finetune DIR --task segmentation and give it with --segmentation FILE.",
    ),
    "vgg": ("VGG-19", "Run: medsr weights pull vgg19-imagenet."),
    "medclip": ("MedCLIP and its vocabulary", "Run: medsr weights pull medclip-vit --allow-unpinned."),
    "critic": ("the critic of the training", "It is made by the training itself, for recipes with the term wgan."),
}
"""What each network is, and what to do where it is missing."""


@dataclass(frozen=True)
class TermSpec:
    """One term: where it comes from, which network it needs, and how it is made."""

    source: str
    make: Callable[[Recipe, nn.Module], Comparison]
    """Of a recipe and the network of `role` (any network where there is none)."""
    role: str = ""
    """`segmentation`, `vgg`, `medclip`, `critic`, or nothing."""


@dataclass(frozen=True)
class Term:
    """One term of a recipe's loss; a call gives it unweighted."""

    name: str
    weight: float
    compare: Comparison

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """A scalar, in single precision (double where the outputs are).

        Raises:
            ArgumentsError: the method does not make, or the data do not have, what the term compares.
        """
        single = {name: _single(value) for name, value in outputs.extras.items()}
        outputs = Outputs(_single(outputs.image), single)
        with torch.autocast(outputs.image.device.type, enabled=False):
            return self.compare(outputs, _single_batch(batch, outputs.image.dtype))


def needed_networks(recipe: Recipe) -> dict[str, str]:
    """Role to what has to be given for it, over this stage and all later ones; the critic is the training's own.

    Raises:
        ArgumentsError: a term has no such name.
    """
    needed: dict[str, str] = {}
    for losses in (recipe.losses, *(stage["losses"] for stage in recipe.then if "losses" in stage)):
        for name in _active(losses):
            role = TERMS[name].role
            if role and role != "critic":
                needed.setdefault(role, f"{ROLES[role][0]}, for the loss {name}")
    return needed


def build_terms(recipe: Recipe, networks: Mapping[str, nn.Module], device: torch.device) -> list[Term]:
    """The terms of a stage, those of weight 0 left out.

    Args:
        recipe: of the stage.
        networks: by role; they are moved to the device and otherwise left alone. `critic` stays that of the caller,
            so that a term sees it as it is trained; give it without wrappers for several processes.
        device: where the outputs will be.

    Raises:
        ArgumentsError: a term has no such name.
        WeightsError: the network of a term is not given, or is of another kind.
    """
    terms = []
    for name, weight in _active(recipe.losses).items():
        spec = TERMS[name]
        if spec.role and spec.role not in networks:
            what, remedy = ROLES[spec.role]
            msg = f"The loss {name} needs {what}, which is not given."
            raise WeightsError(msg, remedy)
        network = networks[spec.role].to(device) if spec.role else nn.Identity()
        terms.append(Term(name, weight, spec.make(recipe, network)))
    return terms


def _active(losses: Mapping[str, float]) -> dict[str, float]:
    for name in losses:
        if name not in TERMS:
            msg = f"There is no loss called {name!r}."
            raise ArgumentsError(msg, f"There are: {', '.join(TERMS)}.")
    return {name: float(weight) for name, weight in losses.items() if weight}


def _single(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _single_batch(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch's images in the type of the outputs; labels stay whole numbers."""
    names = ("low", "high", "guide", "middle", "centres")
    given = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: value.to(dtype) for name, value in given.items() if value is not None})


# -- images and maps -----------------------------------------------------------------------------------------


def _images(distance: Distance) -> Callable[[Recipe, nn.Module], Comparison]:
    return lambda recipe, network: lambda outputs, batch: distance(outputs.image, batch.high)


def _middle(outputs: Outputs, batch: Batch) -> Tensor:
    return F.mse_loss(_extra(outputs, "x2", "mse_x2"), _given(batch.middle, "targets at x2", "mse_x2"))


def _gradient(outputs: Outputs, batch: Batch) -> Tensor:
    return cohft_loss(_extra(outputs, "gradient", "cohft_gradient"), gradient_map(batch.high))


def _extra(outputs: Outputs, key: str, name: str) -> Tensor:
    if key not in outputs.extras:
        msg = f"The loss {name} compares what this method does not make ({key})."
        raise ArgumentsError(msg, "Leave it out of the recipe, or train the method whose paper has it.")
    return outputs.extras[key]


def _given(value: Tensor | None, what: str, name: str) -> Tensor:
    if value is None:
        msg = f"The loss {name} needs {what}, which the training data do not have."
        raise ArgumentsError(msg, "Leave it out of the recipe, or give data that have them.")
    return value


def cohft_loss(result: Tensor, target: Tensor) -> Tensor:
    """α · MSE + (1 - α) · (1 - SSIM), α = 0.95 (C. Fang et al., ACM Multimedia 2022, section 3.5)."""
    return COHFT_ALPHA * F.mse_loss(result, target) + (1 - COHFT_ALPHA) * (1 - ssim(result, target))


def ssim(result: Tensor, target: Tensor) -> Tensor:
    """Mean structural similarity of (N, C, H, W), as Cohf-T's training and tests compute it: zeros beyond the border.

    Gaussian of 11 x 11 pixels, σ 1.5; C1 = 1e-4, C2 = 9e-4, for a data range of 1 (Z. Wang et al., 2004).
    """
    positions = torch.arange(SSIM_SIDE, device=result.device, dtype=result.dtype) - SSIM_SIDE // 2
    weights = torch.exp(-(positions**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    channels = result.shape[1]
    down = weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1)

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x, down, padding=(SSIM_SIDE // 2, 0), groups=channels)
        return F.conv2d(x, down.transpose(2, 3), padding=(0, SSIM_SIDE // 2), groups=channels)

    mean_x, mean_y = blurred(result), blurred(target)
    var_x, var_y = blurred(result * result) - mean_x**2, blurred(target * target) - mean_y**2
    covariance = blurred(result * target) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    return (likeness / ((mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2))).mean()


# -- labels and places ---------------------------------------------------------------------------------------


def dice_loss(logits: Tensor, labels: Tensor, first: int = 0) -> Tensor:
    """1 - soft Dice of softmax(logits) and labels, over batch and pixels, mean over the classes from `first` on.

    Class c gives 1 - 2 Σ p·t / max(Σ (p + t), 1e-7), and 0 where the labels do not have it (arXiv 2302.11184,
    section 3.3.2).

    Args:
        logits: (N, classes, H, W).
        labels: (N, H, W), int64, below the number of classes.
        first: 0 with the background, 1 without it.
    """
    shares = logits.softmax(dim=1)
    wanted = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(shares.dtype)  # (N, classes, H, W)
    axes = (0, 2, 3)
    overlap = 2 * (shares * wanted).sum(axes) / (shares + wanted).sum(axes).clamp_min(DICE_FLOOR)
    lost = (1 - overlap) * (wanted.sum(axes) > 0)  # (classes,)
    return lost[first:].mean()


def _dice(outputs: Outputs, batch: Batch) -> Tensor:
    labels, classes = _given(batch.labels, "labels", "dice"), outputs.image.shape[1]
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        msg = f"The labels go from {int(labels.min())} to {int(labels.max())}; the network tells {classes} apart."
        raise ArgumentsError(msg, "Number them from 0, the background, and give the network as many classes.")
    return dice_loss(outputs.image, labels)


def _centre(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean squared distance of (row, column), as shares of the image (J. Zhu's dissertation, chapter 3)."""
    centres = _given(batch.centres, "centres of lesions", "centre")
    return (outputs.image - centres).square().sum(dim=1).mean()


# -- networks that compare -----------------------------------------------------------------------------------


def _segmentation(recipe: Recipe, network: nn.Module) -> SegUnet:
    if not isinstance(network, SegUnet):
        msg = "The network given for segmentation is not a segmentation U-Net."
        raise WeightsError(msg, ROLES["segmentation"][1])
    return with_batch_statistics(network) if recipe.encoder_batch_statistics else frozen(network)


def _refuse_channels(net: SegUnet, image: Tensor) -> None:
    if image.shape[1] != net.config.in_channels:
        msg = f"The segmentation U-Net takes {net.config.in_channels} channels; the images have {image.shape[1]}."
        raise WeightsError(msg, "Train one on images of the same channels.")


def _suiting(net: SegUnet, image: Tensor) -> Tensor:
    """The image in multiples of 32, padded by repetition [ours]."""
    _refuse_channels(net, image)
    return pad_by_repetition(image)


def _encoder(levels: tuple[int, ...], distance: Distance) -> Callable[[Recipe, nn.Module], Comparison]:
    """Σ of the distances of E(i)(result) and E(i)(target), i in `levels` (arXiv 2302.11184, equation 9)."""

    def make(recipe: Recipe, network: nn.Module) -> Comparison:
        net, depth = _segmentation(recipe, network), max(levels)

        def compare(outputs: Outputs, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = net.encode(_suiting(net, batch.high), depth)
            found = net.encode(_suiting(net, outputs.image), depth)
            return torch.stack([distance(found[i - 1], wanted[i - 1]) for i in levels]).sum()

        return compare

    return make


def _decoder(recipe: Recipe, network: nn.Module) -> Comparison:
    """Mean absolute difference of D(result) and D(target)."""
    net = _segmentation(recipe, network)

    def compare(outputs: Outputs, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = net.decode(net.encode(_suiting(net, batch.high)))
        return F.l1_loss(net.decode(net.encode(_suiting(net, outputs.image))), wanted)

    return compare


def _labels(first: int) -> Callable[[Recipe, nn.Module], Comparison]:
    """Soft Dice of U(result) against the labels that U gives the target (L_HRL)."""

    def make(recipe: Recipe, network: nn.Module) -> Comparison:
        net = _segmentation(recipe, network)

        def compare(outputs: Outputs, batch: Batch) -> Tensor:
            _refuse_channels(net, outputs.image)
            with torch.no_grad():
                labels = net(batch.high).argmax(dim=1)
            return dice_loss(net(outputs.image), labels, first)

        return compare

    return make


def _perceptual(spec: PerceptualSpec) -> Callable[[Recipe, nn.Module], Comparison]:
    def make(recipe: Recipe, network: nn.Module) -> Comparison:
        del recipe
        loss = loss_of(network, spec, "The network given for vgg").to(next(network.parameters()).device)

        def compare(outputs: Outputs, batch: Batch) -> Tensor:
            found: Tensor = loss(outputs.image, batch.high)
            return found

        return compare

    return make


def _wgan(recipe: Recipe, critic: nn.Module) -> Comparison:
    """-mean D(result); the critic's own weights take no gradient from it."""
    del recipe

    def compare(outputs: Outputs, batch: Batch) -> Tensor:
        del batch
        fixed = {name: value.detach() for name, value in critic.named_parameters()}  # as they are at this step
        return generator_loss(lambda image: torch.func.functional_call(critic, fixed, (image,)), outputs.image)

    return compare


def _semantic(recipe: Recipe, network: nn.Module) -> Comparison:
    if not isinstance(network, ImageText):
        msg = "The network given for medclip is not MedCLIP with its vocabulary."
        raise WeightsError(msg, ROLES["medclip"][1])
    loss = SemanticLoss(network, recipe.semantic_patches)

    def compare(outputs: Outputs, batch: Batch) -> Tensor:
        if len(batch.captions) != len(outputs.image):
            msg = "The loss semantic needs a caption for each image, which the training data do not have."
            raise ArgumentsError(msg, "Set its weight to 0, or give captions.")
        return loss(outputs.image, batch.high, batch.captions, batch.seed)

    return compare


_RDST = "J. Zhu et al., arXiv 2302.11184"
_EVERY = tuple(range(1, LEVELS + 1))

TERMS: Mapping[str, TermSpec] = {
    "l1": TermSpec("mean absolute error", _images(F.l1_loss)),
    "mse": TermSpec("mean squared error", _images(F.mse_loss)),
    "mse_x2": TermSpec("J. Zhu's dissertation, chapter 3 (MS-GAN)", lambda recipe, network: _middle),
    "wgan": TermSpec("I. Gulrajani et al., 2017, equation 3: the generator's part", _wgan, "critic"),
    "vgg22": TermSpec("J. Zhu et al., arXiv 2105.10738 (MIASSR)", _perceptual(VGG22), "vgg"),
    "vgg54": TermSpec("MIASSR's release, the deep alternative", _perceptual(VGG54), "vgg"),
    "vgg54_activated": TermSpec("J. Zhu's dissertation, chapter 3 (MS-GAN)", _perceptual(VGG54_ACTIVATED), "vgg"),
    **{
        f"encoder{i}": TermSpec(f"{_RDST}, section 3.3.1: L1 on E({i})", _encoder((i,), F.l1_loss), "segmentation")
        for i in _EVERY
    },
    **{
        f"encoder{i}_mse": TermSpec(f"RDST's release: MSE on E({i})", _encoder((i,), F.mse_loss), "segmentation")
        for i in _EVERY
    },
    "encoders": TermSpec(f"{_RDST}: the sum of L1 on E(1) to E(5)", _encoder(_EVERY, F.l1_loss), "segmentation"),
    "decoder": TermSpec(f"{_RDST}: L1 on D", _decoder, "segmentation"),
    "hrl": TermSpec(f"{_RDST}, section 3.3.2: Dice of labels, without background", _labels(1), "segmentation"),
    "hrl_background": TermSpec("RDST's release: the same with background", _labels(0), "segmentation"),
    "semantic": TermSpec("Z. Ni et al., IEEE JBHI 29(5), 2025 (M2Trans)", _semantic, "medclip"),
    "cohft": TermSpec("C. Fang et al., ACM Multimedia 2022 (Cohf-T)", _images(cohft_loss)),
    "cohft_gradient": TermSpec("Cohf-T: the same on gradient maps", lambda recipe, network: _gradient),
    "dice": TermSpec("soft Dice, for segmentation", lambda recipe, network: _dice),
    "centre": TermSpec("J. Zhu's dissertation, chapter 3: the detector", lambda recipe, network: _centre),
}
"""Every term by the name that recipes use."""
