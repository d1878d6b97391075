"""Small images and networks that tests make for themselves."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.rdst import Rdst, RdstConfig


def anatomy(shape: tuple[int, ...] = (40, 36, 6), seed: int = 0) -> np.ndarray:
    """Something smooth with edges, int16, a dark background and a bright rim."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(g**2 for g in grid[:2]))
    image = 900 * (radius < 0.8) + 700 * ((radius < 0.9) & (radius > 0.75)) + 200 * np.sin(7 * grid[0] + 3 * grid[1])
    return np.clip(image + rng.normal(0, 5, shape), 0, 2000).astype(np.int16)


def save_nifti(path: Path, data: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
    data = anatomy() if data is None else data
    nib.save(nib.Nifti1Image(data, np.diag([0.9, 0.8, 4.0, 1.0]) if affine is None else affine), path)
    return path


def almost_nearest(scale: int = 2, channels: int = 1) -> Rdst:
    """A tiny RDST that nearly repeats every pixel: untrained networks would fail the quality gate."""
    torch.manual_seed(1)
    net = Rdst(RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, scale=scale, in_channels=channels)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.05)
        for convolution in (net.head, net.tail[1], *(m for m in net.tail[0] if isinstance(m, torch.nn.Conv2d))):
            convolution.bias.zero_()
        net.head.weight[0, 0, 1, 1] = 1.0
        for layer in net.tail[0]:
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight[: layer.out_channels // 12, 0, 1, 1] = 1.0
        net.tail[1].weight[0, 0, 1, 1] = 1.0
    return net


def save_checkpoint(path: Path, scale: int = 2, **metadata: str) -> Path:
    path.write_bytes(save_network(almost_nearest(scale), metadata))
    return path
