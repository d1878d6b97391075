"""Images like anatomy, small networks and packed files for the tests of training."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.training.pack import PackedVolume, PackWriter


def tiny(scale: int = 2, blocks: int = 1) -> RdstConfig:
    return RdstConfig(n_rdstb=blocks, embed_dim=12, growth_rate=6, num_heads=6, scale=scale)


def tiny_network(scale: int = 2, blocks: int = 1, seed: int = 0) -> Rdst:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Rdst(tiny(scale, blocks))


def phantom(seed: int, slices: int = 3, rows: int = 48, columns: int = 40) -> np.ndarray:
    """Overlapping soft-edged ellipses, (slices, rows, columns), about 0 to 1000."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    volume = np.zeros((slices, rows, columns))
    for _ in range(14):
        centre, radii = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.35, 2)
        height = rng.uniform(-120, 200)
        for k in range(slices):
            grow = 1 + 0.1 * k
            distance = np.hypot((y / rows - centre[0]) / radii[0], (x / columns - centre[1]) / radii[1]) / grow
            volume[k] += height / (1 + np.exp((distance - 1) * radii.min() * rows * 1.6))
    return volume - volume.min()


def packed(path: Path, subjects: int = 3, volumes: int = 1, slices: int = 3, side: tuple[int, int] = (48, 40)) -> Path:
    """A packed file of phantoms; subjects are s0, s1, ..."""
    with tempfile.TemporaryFile() as pixels, path.open("wb") as target:
        writer = PackWriter(pixels)
        for s in range(subjects):
            for v in range(volumes):
                image = phantom(100 * s + v, slices, *side)
                unit = (image - image.min()) / np.ptp(image)
                digest = hashlib.sha256(image.tobytes()).hexdigest()
                record = PackedVolume(
                    f"s{s}", f"s{s}/scan{v}_T1w.nii.gz", digest, float(image.min()), float(image.max())
                )
                writer.add(record, unit)
        writer.finish(target)
    return path
