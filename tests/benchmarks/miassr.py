"""MIASSR on a 64x64 slice: PyTorch and ONNX Runtime against the paper's program written plainly."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch does
from torch import Tensor

from medsr_cli.engines.onnx_defaults import with_default
from medsr_cli.engines.onnx_export import exported
from medsr_cli.networks.meta_upscale import grid_of, inverse_scale
from medsr_cli.networks.miassr import GRAPH_DEFAULTS, Miassr, graph_form, made_ready
from medsr_cli.volume.geometry import enlarged_length

ROUNDS = 7
SIDE = 64
SCALES = (2.0, 2.7, 4.0)
TARGETS = {"torch": 1.3, "onnx": 1.2}
PAUSE_S = 0.1
"""Before every run: threads of the other library stop waiting for more work by then."""


def plain_features(net: Miassr, image: Tensor) -> Tensor:
    """The extractor in NCHW, layer by layer."""
    extractor = net.feature_extractor
    shallow = extractor.head(net.sub_mean(image))
    out = shallow
    for layer in extractor.body:
        body = getattr(layer, "body", None)
        out = layer(out) if body is None else out + body(out)
    features: Tensor = shallow + out
    return features


def plain(net: Miassr, image: Tensor, scale: float) -> Tensor:
    """A kernel for every output pixel, the features unfolded and repeated, one batched product."""
    features = plain_features(net, image)
    n, k, channels = len(image), net.config.kernel, net.config.in_channels
    step = Fraction(enlarged_length(SIDE, scale), SIDE)
    grid = grid_of(SIDE, step)
    side = len(grid)
    offsets = torch.stack(torch.meshgrid(grid.offset, grid.offset, indexing="ij"), dim=-1).view(-1, 2)
    told = F.pad(offsets, (1, 0), value=inverse_scale(step, step))  # (H'·W', 3)
    kernels = net.meta_upsampler.P2W.meta_block(told).view(side * side, -1, channels)  # (H'·W', F·k·k, C)
    patches = F.unfold(features, k, padding=k // 2).transpose(1, 2)  # (N, H·W, F·k·k)
    source = (grid.source[:, None] * SIDE + grid.source).flatten()
    repeated = patches[:, source]  # (N, H'·W', F·k·k)
    out = torch.matmul(repeated[:, :, None], kernels)[:, :, 0]  # (N, H'·W', C)
    result: Tensor = net.add_mean(out.transpose(1, 2).reshape(n, channels, side, side))
    return result


def session_of(net: Miassr) -> ort.InferenceSession:
    """ONNX Runtime on the CPU with as many threads as PyTorch."""
    model = exported(graph_form(net))
    for name, value in GRAPH_DEFAULTS.items():
        model = with_default(model, name, value.numpy())
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def medians(forms: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, run in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS + 1):
        for name, form in forms.items():
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    """Print the medians and their ratios."""
    torch.manual_seed(0)
    net = Miassr().eval()
    ready, session = made_ready(copy.deepcopy(net)), session_of(net)
    image = torch.rand(1, 1, SIDE, SIDE)
    for scale in SCALES:
        steps: tuple[Fraction, Fraction] = (Fraction(enlarged_length(SIDE, scale), SIDE),) * 2
        given = {"image": image.numpy(), "scale": np.array((scale, scale))}
        forms: dict[str, Callable[[], object]] = {
            "plain": lambda: plain(net, image, scale),  # noqa: B023 - called before the next scale
            "torch": lambda: ready(image, steps),  # noqa: B023
            "onnx": lambda: session.run(None, given)[0],  # noqa: B023
        }
        with torch.inference_mode():
            results = [np.asarray(form()) for form in forms.values()]
            found = medians(forms)
        apart = max(float(np.abs(result - results[0]).max()) for result in results)
        print(
            f"MIASSR {SIDE}x{SIDE} x{scale:g}, {torch.get_num_threads()} threads: plain {found['plain']:.3f} s, "
            + ", ".join(f"{name} {found[name]:.3f} s = {found['plain'] / found[name]:.2f}x" for name in TARGETS)
            + f" (targets {TARGETS['torch']}x, {TARGETS['onnx']}x), largest difference {apart:.0e}"
        )


if __name__ == "__main__":
    main()
