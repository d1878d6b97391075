"""Small images and networks that tests make for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def fit_last(net: torch.nn.Module, last: torch.nn.Conv2d, target: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Set the weights of a network's last convolution so that it gives `target`: an untrained network would fail
    the quality gate, and one whose other layers did nothing would prove nothing.
    """
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(*inputs)  # with gradients, so that no network takes a shorter way past its last layer
    hook.remove()
    seen[0] = seen[0].detach()
    n, channels, rows, columns = seen[0].shape
    mode = {"zeros": "constant"}.get(last.padding_mode, last.padding_mode)
    padded = torch.nn.functional.pad(seen[0], [1, 1, 1, 1], mode=mode)
    taps = torch.nn.functional.unfold(padded, 3).reshape(n, channels * 9, rows, columns)
    # What a network pads by itself is not part of the target.
    inside = taps[..., : target.shape[-2], : target.shape[-1]]
    columns_of = inside.permute(0, 2, 3, 1).reshape(-1, channels * 9)
    wanted = target.permute(0, 2, 3, 1).reshape(-1, last.out_channels)
    design = columns_of if last.bias is None else torch.cat([columns_of, torch.ones(len(columns_of), 1)], dim=1)
    design = design.double()
    ridge = 1e-6 * torch.eye(design.shape[1], dtype=torch.float64) * design.square().mean()
    solved = torch.linalg.solve(design.T @ design + ridge * len(design), design.T @ wanted.double()).float()
    with torch.no_grad():
        last.weight.copy_(solved[: channels * 9].T.reshape(last.weight.shape))
        if last.bias is not None:
            last.bias.copy_(solved[-1])


def torch_engine(net: Any, traits: Any, *, precision: str = "auto", tile: int | None = None) -> Any:
    """An engine on the CPU around a network that is in no catalogue; traits may be its factor alone."""
    from medsr_cli.engines.network_engine import NetworkEngine
    from medsr_cli.engines.torch_runner import TorchRunner
    from medsr_cli.engines.traits import Traits

    facts = traits if isinstance(traits, Traits) else Traits(traits)
    return NetworkEngine(TorchRunner(net, device="cpu", precision=precision), facts, tile=tile)
