"""RDST 64x64 to 256x256 on the CPU: medsr's form and ONNX Runtime against the released program's, and the machine.

Prints the rate of fp32 matrix products in this run, the medians, their ratios, the share of that rate, and bf16
where the CPU has matrix tiles for it. The forms are timed in turn, so that a busy machine slows all of them alike.

    python tests/benchmarks/rdst.py [--size 64] [--batch 1] [--blocks 8] [--threads 2] [--rounds 7] [--no-onnx]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from medsr_cli.networks.rdst import Rdst, RdstConfig, SwinLayer

# Without these, freed memory goes back to the system and every forward pays for it anew.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
MATRIX_SIDE = 2048
TARGETS = {"medsr": 1.8, "onnx": 1.2, "bf16": 2.5}
TARGET_SHARE = 0.42
NEAR = 1e-4


class PlainForm:
    """The forward as the released program does it, with the weights of a network of medsr.

    Token maps (B, H, W, C) are rolled, cut into windows, merged and rolled back in every layer; q, k and v are
    taken apart, attention is written out, every tensor of the tail is made. At any size but that of the training
    patch, each layer, shifted or not, makes its mask anew on each forward: nine regions are painted into an image,
    cut into windows and compared, and the mask is added; for a layer without shift it is zero everywhere.
    """

    def __init__(self, net: Rdst) -> None:
        self.net, self.window = net, net.config.window_size
        positions = torch.arange(self.window**2)
        rows, columns = positions // self.window, positions % self.window
        self.index = (rows[:, None] - rows + self.window - 1) * (2 * self.window - 1)
        self.index = (self.index + columns[:, None] - columns + self.window - 1).flatten()

    def __call__(self, image: Tensor) -> Tensor:
        """(N, C, H, W), H and W multiples of the window, to (N, C, s·H, s·W)."""
        net = self.net
        shallow = net.head(net.sub_mean(image))
        tokens = net.patch_embed(shallow.flatten(2).transpose(1, 2))  # (N, H·W, d)
        size = (image.shape[-2], image.shape[-1])
        for block in net.body:
            dense = tokens
            for part in block.body:
                grown = dense
                for layer in part.body.blocks:
                    grown = self.layer(layer, grown, size)
                dense = torch.cat((dense, part.tail(grown)), dim=-1)
            tokens = block.conv(self.as_image(dense, size)).flatten(2).transpose(1, 2) + tokens
        features = shallow + net.conv_after_body(self.as_image(net.norm(tokens), size))
        return net.add_mean(net.tail(features))

    @staticmethod
    def as_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], *size)

    def layer(self, layer: SwinLayer, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        b, n, c = tokens.shape
        x = layer.norm1(tokens).view(b, *size, c)
        if layer.shift:
            x = torch.roll(x, (-layer.shift, -layer.shift), dims=(1, 2))
        windows = self.partition(x).view(-1, self.window**2, c)
        mixed = self.attention(layer, windows, self.mask(size, layer.shift))
        x = self.merge(mixed.view(-1, self.window, self.window, c), size)
        if layer.shift:
            x = torch.roll(x, (layer.shift, layer.shift), dims=(1, 2))
        tokens = tokens + x.view(b, n, c)
        mlp = layer.mlp
        return tokens + mlp.fc2(F.gelu(mlp.fc1(layer.norm2(tokens))))

    def attention(self, layer: SwinLayer, windows: Tensor, mask: Tensor) -> Tensor:
        attention = layer.attn
        b, n, c = windows.shape
        qkv = attention.qkv(windows).reshape(b, n, 3, attention.heads, c // attention.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = (q * attention.scale) @ k.transpose(-2, -1)
        bias = attention.relative_position_bias_table[self.index].view(n, n, -1).permute(2, 0, 1).contiguous()
        logits = logits + bias.unsqueeze(0)
        logits = logits.view(b // len(mask), len(mask), attention.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        logits = logits.view(-1, attention.heads, n, n).softmax(dim=-1)
        return attention.proj((logits @ v).transpose(1, 2).reshape(b, n, c))

    def mask(self, size: tuple[int, int], shift: int) -> Tensor:
        m = self.window
        regions = torch.zeros(1, *size, 1)
        cuts = (slice(0, -m), slice(-m, -shift), slice(-shift, None)) if shift else (slice(None),)
        for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            regions[:, rows, columns, :] = number
        windows = self.partition(regions).view(-1, m * m)
        difference = windows.unsqueeze(1) - windows.unsqueeze(2)
        return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)

    def partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        m = self.window
        x = x.view(b, h // m, m, w // m, m, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, m, m, c)

    def merge(self, windows: Tensor, size: tuple[int, int]) -> Tensor:
        m, (h, w) = self.window, size
        x = windows.view(-1, h // m, w // m, m, m, windows.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, windows.shape[-1])


def medians(forms: dict[str, Callable[[], object]], pairs: int) -> dict[str, float]:
    """Seconds of each form, timed in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(pairs + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def onnx_form(net: Rdst, image: Tensor, threads: int) -> Callable[[], Tensor]:
    """The exported network in ONNX Runtime."""
    import onnxruntime

    from medsr_cli.engines.onnx_export import exported
    from medsr_cli.networks.rdst import graph_form

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported(graph_form(net)), options, providers=["CPUExecutionProvider"])
    given = {"image": image.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 64), ("batch", 1), ("blocks", 8), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-onnx", action="store_true")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Print one line for each figure."""
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    net = Rdst(RdstConfig(n_rdstb=given.blocks)).eval()
    image = torch.rand(given.batch, 1, given.size, given.size)
    matrix = torch.rand(MATRIX_SIDE, MATRIX_SIDE)
    plain = PlainForm(net)
    forms: dict[str, Callable[[], Tensor]] = {"plain": lambda: plain(image), "medsr": lambda: net(image)}
    if not given.no_onnx:
        forms["onnx"] = onnx_form(net, image, given.threads)
    if torch.cpu._is_amx_tile_supported():
        half, half_image = Rdst(net.config).eval(), image.bfloat16()
        half.load_state_dict(net.state_dict())
        half.to(torch.bfloat16)
        forms["bf16"] = lambda: half(half_image)
    expected = forms["plain"]()
    farthest = {name: float((form().float() - expected).abs().max()) for name, form in forms.items()}
    seconds = medians({"matrix": lambda: matrix @ matrix, **forms}, given.rounds)
    rate = 2 * MATRIX_SIDE**3 / seconds["matrix"]
    print(f"{given.threads} threads, matrix products fp32 {rate / 1e9:.0f} GFLOP/s")
    print(f"RDST {given.blocks} blocks, {given.batch} of {given.size}x{given.size}: plain {seconds['plain']:.3f} s")
    for name in forms.keys() - {"plain"}:
        ratio = seconds["plain"] / seconds[name]
        print(
            f"{name} {seconds[name]:.3f} s, {ratio:.2f} times as fast as plain (target {TARGETS[name]}), "
            f"farthest difference {farthest[name]:.1e} of {float(expected.abs().max()):.2f}"
        )
    # Of the work that is really done: the tail is one convolution, and not the stages that the paper counts.
    work = given.batch * (net.flops(given.size, given.size) - saved_by_composing(net, given.size))
    share = work / seconds["medsr"] / rate
    print(
        f"medsr: {work / seconds['medsr'] / 1e9:.0f} GFLOP/s, {share:.0%} of the matrix rate "
        f"(target {TARGET_SHARE:.0%}); the tail is counted as the one convolution that is run"
    )
    if "bf16" in forms:
        error = half(half_image).float() - expected
        print(f"bf16 costs {10 * torch.log10(error.square().mean()):.1f} dB re 1 of error on random weights")
    else:
        print("bf16: not measured, this CPU has no matrix tiles")
    far = [name for name in ("medsr", "onnx") if farthest.get(name, 0) > NEAR]
    if far:
        sys.exit(f"too far from the plain form: {far}")


def saved_by_composing(net: Rdst, size: int) -> int:
    """Operations of the tail's stages less those of its one 5x5 convolution, per image, borders left out."""
    d, channels, scale = net.config.embed_dim, net.config.in_channels, net.config.scale
    stages = sum(
        2 * conv.weight.numel() * (size * factor) ** 2
        for conv, factor in zip(
            [m for m in net.tail.modules() if isinstance(m, torch.nn.Conv2d)],
            [1, 2, 4] if scale == 4 else [1, scale],
            strict=True,
        )
    )
    return stages - 2 * 25 * d * channels * scale**2 * size**2


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # The allocator reads them when the process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})  # noqa: S606
    main()
