"""Inception-v3 in the form that the Fréchet inception distance is measured with: images to 2048 features.

C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, arXiv 1512.00567; the
distance: M. Heusel et al., NeurIPS 2017, arXiv 1706.08500. The weights are those of TensorFlow's
inception-2015-12-05, as pytorch-fid converted them. Names are that file's (`Conv2d_1a_3x3.conv.weight` to
`Mixed_7c.branch_pool.bn.running_var`); its classifier `fc` is dropped. The network differs from torchvision's in its
pooling branches: means there leave out what lies beyond the border, and the last block takes a maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError
from medsr_cli.networks.batch_norm import RECOMPUTED_BUFFERS as BATCH_NORM_COUNTERS
from medsr_cli.networks.batch_norm import BatchNorm, refuse_negative_variance

EPS = 1e-3
"""ε of every batch norm, TensorFlow's default."""
SIDE = 299
"""Rows and columns that images are resized to."""
SMALLEST_SIDE = 75
"""Below this the last blocks have no pixel left."""
FEATURES = 2048
FIRST_WIDTH = 32
Shape = tuple[int, int]


@dataclass(frozen=True)
class InceptionConfig:
    """How wide; the default is Inception-v3."""

    divisor: int = 1
    """All numbers of channels are divided by this: 1, 2, 4, 8 or 16."""

    def __post_init__(self) -> None:
        if self.divisor not in (1, 2, 4, 8, 16):
            msg = f"Channels cannot be divided by {self.divisor}, only by 1, 2, 4, 8 or 16."
            raise ValueError(msg)

    @property
    def features(self) -> int:
        """Length of a feature vector."""
        return FEATURES // self.divisor


class RunningNorm(BatchNorm):
    """Batch norm with running statistics, also in training: this network is for measuring and is not trained."""

    def forward(self, features: Tensor) -> Tensor:
        return F.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | Shape, stride: int = 1) -> None:
        super().__init__()
        shape = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.conv = nn.Conv2d(inputs, outputs, shape, stride=stride, bias=False)
        self.bn = RunningNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def same(inputs: int, outputs: int, kernel: int | Shape) -> ConvUnit:
    """A unit of odd kernel that keeps the size, with zeros beyond the border."""
    unit = ConvUnit(inputs, outputs, kernel)
    unit.conv.padding = tuple(n // 2 for n in unit.conv.kernel_size)
    return unit


def mean_3x3(x: Tensor) -> Tensor:
    """Mean over 3x3 pixels, of those inside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """Figure 5 of the paper at 35x35: 1x1; 5x5; two 3x3; mean and 1x1."""

    def __init__(self, inputs: int, pool: int, d: int) -> None:
        super().__init__()
        self.branch1x1 = same(inputs, 64 // d, 1)
        self.branch5x5_1 = same(inputs, 48 // d, 1)
        self.branch5x5_2 = same(48 // d, 64 // d, 5)
        self.branch3x3dbl_1 = same(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = same(64 // d, 96 // d, 3)
        self.branch3x3dbl_3 = same(96 // d, 96 // d, 3)
        self.branch_pool = same(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(mean_3x3(x))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, pooled], 1)


class InceptionB(nn.Module):
    """From 35x35 to 17x17: 3x3 of stride 2; two 3x3, the second of stride 2; maximum."""

    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(inputs, 384 // d, 3, stride=2)
        self.branch3x3dbl_1 = same(inputs, 64 // d, 1)
        self.branch3x3dbl_2 = same(64 // d, 96 // d, 3)
        self.branch3x3dbl_3 = ConvUnit(96 // d, 96 // d, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """Figure 6 at 17x17: 1x1; 1x7 and 7x1; these twice; mean and 1x1."""

    def __init__(self, inputs: int, narrow: int, d: int) -> None:
        super().__init__()
        wide = 192 // d
        self.branch1x1 = same(inputs, wide, 1)
        self.branch7x7_1 = same(inputs, narrow, 1)
        self.branch7x7_2 = same(narrow, narrow, (1, 7))
        self.branch7x7_3 = same(narrow, wide, (7, 1))
        self.branch7x7dbl_1 = same(inputs, narrow, 1)
        self.branch7x7dbl_2 = same(narrow, narrow, (7, 1))
        self.branch7x7dbl_3 = same(narrow, narrow, (1, 7))
        self.branch7x7dbl_4 = same(narrow, narrow, (7, 1))
        self.branch7x7dbl_5 = same(narrow, wide, (1, 7))
        self.branch_pool = same(inputs, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_3x3(x))], 1)


class InceptionD(nn.Module):
    """From 17x17 to 8x8: 3x3 of stride 2; 1x7, 7x1 and 3x3 of stride 2; maximum."""

    def __init__(self, inputs: int, d: int) -> None:
        super().__init__()
        wide = 192 // d
        self.branch3x3_1 = same(inputs, wide, 1)
        self.branch3x3_2 = ConvUnit(wide, 320 // d, 3, stride=2)
        self.branch7x7x3_1 = same(inputs, wide, 1)
        self.branch7x7x3_2 = same(wide, wide, (1, 7))
        self.branch7x7x3_3 = same(wide, wide, (7, 1))
        self.branch7x7x3_4 = ConvUnit(wide, wide, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    """Figure 7 at 8x8: 1x1; 1x3 beside 3x1; a 3x3 before these; pooling and 1x1.

    The first of the two pools by the mean, the second by the maximum.
    """

    def __init__(self, inputs: int, d: int, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        wide = 384 // d
        self.branch1x1 = same(inputs, 320 // d, 1)
        self.branch3x3_1 = same(inputs, wide, 1)
        self.branch3x3_2a = same(wide, wide, (1, 3))
        self.branch3x3_2b = same(wide, wide, (3, 1))
        self.branch3x3dbl_1 = same(inputs, 448 // d, 1)
        self.branch3x3dbl_2 = same(448 // d, wide, 3)
        self.branch3x3dbl_3a = same(wide, wide, (1, 3))
        self.branch3x3dbl_3b = same(wide, wide, (3, 1))
        self.branch_pool = same(inputs, 192 // d, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else mean_3x3(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """(N, 3, H, W) in [0, 1] to features (N, 2048): resized to 299 x 299, 2x - 1, and the mean of the last 8x8.

    Shapes in comments are those of 299 x 299 and divisor 1.
    """

    def __init__(self, config: InceptionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or InceptionConfig()
        d = config.divisor
        self.Conv2d_1a_3x3 = ConvUnit(3, 32 // d, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32 // d, 32 // d, 3)
        self.Conv2d_2b_3x3 = same(32 // d, 64 // d, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64 // d, 80 // d, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80 // d, 192 // d, 3)
        self.Mixed_5b = InceptionA(192 // d, 32 // d, d)
        self.Mixed_5c = InceptionA(256 // d, 64 // d, d)
        self.Mixed_5d = InceptionA(288 // d, 64 // d, d)
        self.Mixed_6a = InceptionB(288 // d, d)
        self.Mixed_6b = InceptionC(768 // d, 128 // d, d)
        self.Mixed_6c = InceptionC(768 // d, 160 // d, d)
        self.Mixed_6d = InceptionC(768 // d, 160 // d, d)
        self.Mixed_6e = InceptionC(768 // d, 192 // d, d)
        self.Mixed_7a = InceptionD(768 // d, d)
        self.Mixed_7b = InceptionE(1280 // d, d, maximum=False)
        self.Mixed_7c = InceptionE(2048 // d, d, maximum=True)

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(image, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.features(2 * x - 1)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1], at least 75 pixels a side and not resized, to (N, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))  # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def example_inputs(config: InceptionConfig) -> tuple[Tensor, ...]:
    """An empty image; every size is resized to the same one."""
    del config  # every Inception takes it
    return (torch.zeros(1, 3, 8, 8),)


RECOMPUTED_BUFFERS: tuple[str, ...] = BATCH_NORM_COUNTERS
"""Counters of batches, which nothing reads."""
DROPPED_PREFIXES = ("fc.", "AuxLogits.")
"""Beginnings of the keys of classifiers, which no distance uses."""


def config_from_state(state: Mapping[str, Tensor]) -> InceptionConfig:
    """Recover the divisor from the first convolution.

    Raises:
        WeightsError: the tensors are not those of an Inception-v3; the sentence names what is missing.
    """
    key = "Conv2d_1a_3x3.conv.weight"
    if key not in state:
        msg = f"These tensors are not an Inception-v3: {key} is missing."
        raise WeightsError(msg)
    refuse_negative_variance(state)
    width = state[key].shape[0]
    if width < 1 or FIRST_WIDTH % width:
        msg = f"No Inception-v3 has {width} channels in its first convolution."
        raise WeightsError(msg)
    return InceptionConfig(FIRST_WIDTH // width)
