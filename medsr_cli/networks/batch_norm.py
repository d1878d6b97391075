"""Batch normalisation whose whole state is floating-point, so that it travels in a checkpoint like any tensor.

PyTorch's own layer also counts the batches it has seen, in an integer that it reads only when no momentum is
given. Checkpoints here hold floating-point tensors and nothing else; the count of others is dropped on loading.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsr_cli.errors import WeightsError

RECOMPUTED_BUFFERS = (".num_batches_tracked",)
"""Endings of the keys that PyTorch's own layer has beside those of this one."""

EPS = 1e-5
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Ioffe and Szegedy 2015: y = γ·(x - µ)/√(σ² + ε) + β for each channel of (N, C, H, W).

    In training µ and σ² are those of the batch, and the running ones follow with momentum 0.1; in evaluation
    they are the running ones, so that a result depends neither on its batch nor on the size of the image.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        return F.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, self.training, MOMENTUM, EPS
        )


@torch.no_grad()
def fold_into(conv: nn.Conv2d, norm: BatchNorm) -> None:
    """Change a convolution so that its results are those of itself and a normalisation by running statistics.

    γ·(W∗x + b - µ)/√(σ² + ε) + β = (g·W)∗x + g·(b - µ) + β with g = γ/√(σ² + ε), worked out in double precision.

    Args:
        conv: with a bias; changed.
        norm: what follows it, in evaluation mode; not changed.
    """
    if conv.bias is None:
        msg = "a convolution without a bias has nowhere to put the shift"
        raise ValueError(msg)
    mean, variance, gamma, beta, weight, bias = (
        value.detach().to("cpu", torch.float64)
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.weight, conv.bias)
    )
    gain = gamma / torch.sqrt(variance + EPS)
    conv.weight.copy_(weight * gain[:, None, None, None])
    conv.bias.copy_((bias - mean) * gain + beta)


def refuse_negative_variance(state: Mapping[str, Tensor]) -> None:
    """Refuse running variances that are none: their square root would make every result NaN.

    Raises:
        WeightsError: one is below zero; the sentence names it.
    """
    for key, value in state.items():
        if key.endswith(".running_var") and bool((value < 0).any()):
            msg = f"The tensor {key} has variances below zero."
            raise WeightsError(msg, "The file is damaged.")
