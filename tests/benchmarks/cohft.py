"""Cohf-T on the CPU: medsr's form and ONNX Runtime against the plain eager form, for S, M, L and the released one.

Plain is the network as its text or its authors' program runs it: attention written out, channels first, gradient
map computed too. What the released program computes and throws away is not counted. Forms are timed in turn, so
that a busy machine slows all of them alike. Run as `python -m tests.benchmarks.cohft [NAME ...] [--onnx]`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch does
from torch import Tensor, nn

from medsr_cli.engines.onnx_export import exported
from medsr_cli.networks import catalogue, cohft, cohft_released

# Without these, freed memory goes back to the system and every forward pays for it anew (engineering, 2.3).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
SIDE = 60
TARGET = 1.3


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.transpose(-2, -1)) * factor).softmax(dim=-1) @ v


@contextmanager
def plain_attention() -> Iterator[None]:
    """Every attention as its definition."""
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = written_out
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def network(name: str) -> nn.Module:
    """An untrained network for x4."""
    torch.manual_seed(0)
    if name == "released":
        return cohft_released.ReleasedCohft().eval()
    return cohft.Cohft(cohft.CohftConfig(**catalogue.COHFT.variants[f"cohft-{name}"])).eval()


def medians(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each form, timed in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def onnx_form(net: nn.Module, inputs: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """ONNX Runtime on as many threads as PyTorch."""
    import onnxruntime

    module = cohft_released if isinstance(net, cohft_released.ReleasedCohft) else cohft
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    started = time.perf_counter()
    model = exported(module.graph_form(net))
    print(f"  export {time.perf_counter() - started:.0f} s, {len(model) / 1e6:.0f} MB")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = {name: x.numpy() for name, x in zip(("image", "guide"), inputs, strict=True)}
    return lambda: session.run(None, given)


def measure(name: str, rounds: int, with_onnx: bool) -> None:
    """Print one row."""
    net = network(name)
    module = cohft_released if name == "released" else cohft
    inputs = torch.rand(1, 1, SIDE, SIDE), torch.rand(1, 1, 4 * SIDE, 4 * SIDE)
    ready = module.made_ready(copy.deepcopy(net))

    def plain() -> Tensor:
        with plain_attention():
            return net.with_gradient(*inputs)[0]

    forms: dict[str, Callable[[], object]] = {"plain": plain, "fast": lambda: ready(*inputs)}
    if with_onnx:
        forms["onnx"] = onnx_form(net, inputs)
    with torch.inference_mode():
        wanted = plain()
        difference = ((ready(*inputs) - wanted).abs().max() / (wanted.max() - wanted.min())).item()
        taken = medians(forms, rounds)
    figures = ", ".join(f"{form} {seconds:.3f} s" for form, seconds in taken.items())
    ratios = ", ".join(f"{form} {taken['plain'] / taken[form]:.2f}" for form in taken if form != "plain")
    threads = torch.get_num_threads()
    print(f"{name}: {SIDE}x{SIDE} to {4 * SIDE}x{4 * SIDE}, {threads} threads: {figures}; ratio {ratios} "
          f"(target {TARGET}); largest difference {difference:.1e} of the range")  # fmt: skip


def main() -> None:
    """Measure the networks that are named, or all."""
    if any(name not in os.environ for name in ALLOCATOR):  # read by the C library when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.cohft", *sys.argv[1:]],  # noqa: S606
                  {**os.environ, **ALLOCATOR})  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["s", "m", "l", "released"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--onnx", action="store_true", help="time ONNX Runtime too; exporting takes a while")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.names:
        measure(name, given.rounds, given.onnx)


if __name__ == "__main__":
    main()
