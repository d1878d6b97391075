"""Ratios of run times: both sides in turn in the same run, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

    from medsr_cli.networks.graph import GraphForm

PAUSE_S = 0.1
"""Before every run: threads of the other library stop waiting for more work by then."""


def ratio(plain: Callable[[], object], fast: Callable[[], object], pairs: int = 7) -> tuple[float, float, float]:
    """Median seconds of both, and how many times as fast the second is; a pair before the first warms up."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(pairs + 1):
        for form, found in zip((plain, fast), seconds, strict=True):
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            form()
            found.append(time.perf_counter() - started)
    slow, quick = (statistics.median(found[1:]) for found in seconds)
    return slow, quick, slow / quick


def onnx_session(form: GraphForm) -> ort.InferenceSession:
    """An exported network in ONNX Runtime on the CPU, with as many threads as PyTorch."""
    import onnxruntime as ort
    import torch

    from medsr_cli.engines.onnx_export import exported

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(exported(form), options, providers=["CPUExecutionProvider"])


def figures(name: str, plain: Callable[[], object], engines: dict[str, Callable[[], object]], target: float) -> str:
    """One line: what each engine takes beside the plain form."""
    parts = []
    for engine, fast in engines.items():
        slow, quick, times = ratio(plain, fast)
        parts.append(f"{engine} {quick:.3f} s against {slow:.3f} s = {times:.2f}x")
    return f"{name}: {'; '.join(parts)} (target {target}x for the better one)"
