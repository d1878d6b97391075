"""VGG-19's convolutional part, whose activations perceptual losses compare.

K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015,
configuration E. Names are those of torchvision's checkpoints (`features.0.weight` to `features.34.bias`), so that
one of theirs, or a copy of it, loads as it is; its classifier is dropped.

Layers go by name: `conv2_2` is the second convolution of the second block, before its ReLU; `relu2_2` the same
after it; `pool2` the pooling that ends the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsr_cli.errors import WeightsError

CONVOLUTIONS = (2, 2, 4, 4, 4)
"""Convolutions of each of the five blocks."""
WIDENING = (1, 2, 4, 8, 8)
"""Channels of each block, in widths of the first."""


def layer_names() -> list[str]:
    """All layers in order; the place in this list is the number in torchvision's tensor names."""
    names: list[str] = []
    for block, count in enumerate(CONVOLUTIONS, start=1):
        for i in range(1, count + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    return names


LAYERS = tuple(layer_names())


@dataclass(frozen=True)
class VggConfig:
    """How wide and how deep; the defaults are VGG-19 without its classifier."""

    width: int = 64
    """Channels of the first block."""
    last: str = "conv5_4"
    """The last convolution that is built; its ReLU, and the pooling if one follows, are built too."""

    def __post_init__(self) -> None:
        if self.width < 1:
            msg = f"A width of {self.width} channels cannot be."
            raise ValueError(msg)
        if self.last not in LAYERS or not self.last.startswith("conv"):
            msg = f"VGG-19 has no convolution {self.last!r}; it has conv1_1 to conv5_4."
            raise ValueError(msg)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that are built, in order."""
        end = LAYERS.index(self.last) + 1
        while end < len(LAYERS) and not LAYERS[end].startswith("conv"):
            end += 1
        return LAYERS[:end]


def convolution_of(layer: str) -> str:
    """The last convolution that a layer's activation needs, which is what `VggConfig.last` takes.

    Raises:
        ValueError: VGG-19 has no such layer.
    """
    if layer not in LAYERS:
        msg = f"VGG-19 has no layer {layer!r}; it has conv1_1, relu1_1, ..., pool5."
        raise ValueError(msg)
    return next(name for name in reversed(LAYERS[: LAYERS.index(layer) + 1]) if name.startswith("conv"))


class Vgg19Features(nn.Module):
    """(N, 3, H, W), prepared as the use asks for, to activations.

    3x3 convolutions with zero padding 1, each with a ReLU; 2x2 maximum pooling after every block, so that sides
    halve (rounded down) from block to block.
    """

    def __init__(self, config: VggConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VggConfig()
        channels = 3
        layers: list[nn.Module] = []
        for name in config.layers:
            if name.startswith("conv"):
                width = config.width * WIDENING[int(name[4]) - 1]
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            else:
                layers.append(nn.ReLU() if name.startswith("relu") else nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor, taps: Sequence[str] | None = None) -> Tensor | tuple[Tensor, ...]:
        """The activations of the layers named in `taps`, in their order; of the last layer alone without `taps`.

        Nothing behind the deepest of them is computed.

        Raises:
            ValueError: a layer is not there.
        """
        names = self.config.layers
        wanted = names[-1:] if taps is None else tuple(taps)
        absent = [tap for tap in wanted if tap not in names]
        if absent or not wanted:
            msg = f"This VGG-19 has the layers {names[0]} to {names[-1]}, not {', '.join(absent) or 'none'}."
            raise ValueError(msg)
        found: dict[str, Tensor] = {}
        x = image
        for name, layer in zip(names, self.features, strict=True):
            x = layer(x)
            if name in wanted:
                found[name] = x
                if len(found) == len(set(wanted)):
                    break
        return x if taps is None else tuple(found[tap] for tap in wanted)


def example_inputs(config: VggConfig) -> tuple[Tensor, ...]:
    """Empty inputs that all five poolings leave one pixel of."""
    del config  # every VGG-19 takes them
    return (torch.zeros(1, 3, 32, 32),)


RECOMPUTED_BUFFERS: tuple[str, ...] = ()
"""Nothing in its state is computed."""
DROPPED_PREFIXES = ("classifier.",)
"""Beginnings of the keys that torchvision's checkpoints carry and that no loss uses."""


def config_from_state(state: Mapping[str, Tensor]) -> VggConfig:
    """Recover width and depth from the tensors' names and shapes.

    Raises:
        WeightsError: the tensors are not those of a VGG-19; the sentence names what is missing.
    """
    present = [name for i, name in enumerate(LAYERS) if f"features.{i}.weight" in state and name.startswith("conv")]
    if "features.0.weight" not in state:
        msg = "These tensors are not a VGG-19: features.0.weight is missing."
        raise WeightsError(msg)
    return VggConfig(width=state["features.0.weight"].shape[0], last=present[-1])
