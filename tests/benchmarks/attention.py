"""RDST-E on a 64x64 slice: the fused attention against the plain form that defines it."""

from __future__ import annotations

import statistics
import time

import torch

from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.networks.windows import WindowAttention, all_window_masks, relative_position_index, shift_mask

PAIRS = 7
TARGET = 1.6


def forget_tables() -> None:
    """What the plain form of the released code does on every forward: build masks and indices anew."""
    for cached in (all_window_masks, shift_mask, relative_position_index):
        cached.cache_clear()


class PlainForm:
    """The network with every attention written out and its masks rebuilt by every layer."""

    def __init__(self, net: Rdst) -> None:
        self.net = net
        self.layers = [m for m in net.modules() if isinstance(m, WindowAttention)]

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.plain = True
        self.hooks = [layer.register_forward_pre_hook(lambda *_: forget_tables()) for layer in self.layers]

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            layer.plain = False
        for hook in self.hooks:
            hook.remove()


def main() -> None:
    """Print both medians and their ratio."""
    torch.manual_seed(0)
    net = Rdst(RdstConfig(n_rdstb=4)).eval()
    image = torch.rand(1, 1, 64, 64)
    fused, plain = [], []
    with torch.inference_mode():
        for pair in range(PAIRS + 1):
            started = time.perf_counter()
            net(image)
            middle = time.perf_counter()
            with PlainForm(net):
                net(image)
            if pair:  # the first pair warms up
                fused.append(middle - started)
                plain.append(time.perf_counter() - middle)
    a, b = statistics.median(fused), statistics.median(plain)
    print(f"RDST-E 64x64 to 256x256, {torch.get_num_threads()} threads: fused {a:.3f} s, plain {b:.3f} s")
    print(f"ratio {b / a:.2f} (target {TARGET}), {net.flops(64, 64) / a / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
