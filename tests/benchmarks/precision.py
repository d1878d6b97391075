"""What bfloat16 and float16 cost each shipped checkpoint in PSNR, as `medsr evaluate` measures it.

    python tests/benchmarks/precision.py [CHECKPOINT ...]     # prints the manifest's precision_cost_db for each

The data are those of the project's validation (`../shared/data/val`). Every volume gives `SLICES` slices, at the scale
of the checkpoint (a network of any scale: 2). Squared errors are averaged over the slices of a volume, which is what a
volume's PSNR is, and the loss over volumes: in the mean of slices, nearly empty ones at the ends of a volume count
most, where 77 dB become 76.5 dB and nobody could see it.

CPUs without bfloat16 run it ten times slower than float32. Here the products and normalisations are done in float32
on operands that are rounded, and their results are rounded, as GPUs and AMX do it; all else is PyTorch's own
arithmetic. Weights and activations are cast as a whole, as `--precision bf16` does it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from medsr_cli.engines import torch_runner
from medsr_cli.engines.precision import NAMES, Arithmetic, arithmetic
from medsr_cli.tasks.evaluate import EvaluateRequest, evaluate
from medsr_cli.tasks.evaluation_inputs import Choice, images_of
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.weights.manifest import Entry, load_manifest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FOLDERS = {("mr", "brain"): "brain_mr", ("mr", "heart"): "cardiac_mr", ("ct", ""): "ct", ("us", ""): "us"}
SLICES, VOLUMES = 3, 7
"""Of each volume, and of each checkpoint; single images are one slice each."""
ANY_SCALE = 2.0
IN_FLOAT32 = {
    *("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "convolution", "conv2d", "mkldnn_convolution"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "softmax", "_softmax"),
    *("layer_norm", "native_layer_norm", "batch_norm", "native_batch_norm", "instance_norm", "gelu"),
    *("_native_batch_norm_legit_no_training", "baddbmm_"),
}
"""Operators whose kernels compute in float32 and round once, at the end."""


class Rounded(TorchDispatchMode):
    """Half precision with the arithmetic of a matrix unit, on any CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in IN_FLOAT32:
            return func(*args, **kwargs)
        halves: list[torch.dtype] = []

        def widened(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                halves.append(value.dtype)
                return value.float()
            return value

        def narrowed(value: Any) -> Any:
            single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
            return value.to(halves[0]) if single and halves else value

        wide_args, wide_kwargs = tree_map(widened, args), tree_map(widened, kwargs)
        if func.overloadpacket.__name__.endswith("_") and halves:  # in place: into what was given
            return args[0].copy_(func(*wide_args, **wide_kwargs))
        return tree_map(narrowed, func(*wide_args, **wide_kwargs))


class MeasuringRunner(torch_runner.TorchRunner):
    """A runner that rounds as `Rounded` does."""

    def run(self, *given: Any) -> Any:
        with Rounded():
            return super().run(*given)

    def run_scaled(self, *given: Any) -> Any:
        with Rounded():
            return super().run_scaled(*given)


def any_precision(wanted: str, device: torch.device, cost_db: Any = None) -> Arithmetic:
    """float16 on a CPU too, which `--precision` refuses."""
    return Arithmetic(NAMES[wanted]) if wanted in NAMES else arithmetic(wanted, device, cost_db)


def choice_for(entry: Entry, data: Path) -> Choice:
    """Validation images of a checkpoint's kind, evenly spread."""
    folder = next(name for (kind, part), name in FOLDERS.items() if kind == entry.modality and part in entry.body_part)
    found = [image.name for image in images_of(Choice(data / folder), guided=False, labels=False).images]
    spread = np.unique(np.linspace(0, len(found) - 1, min(VOLUMES, len(found))).round().astype(int))
    return Choice(data / folder, include=tuple(found[i] for i in spread))


def squared_errors(entry: Entry, choice: Choice, precision: str) -> dict[str, list[float]]:
    """Of each slice, by volume, from the PSNR that the checkpoint's protocol measures."""
    scale = entry.scales[0] if entry.scales else ANY_SCALE
    request = EvaluateRequest(
        choice,
        entry.id,
        scales=(scale,),
        slices=SLICES,
        base=ModelRequest(device="cpu", precision=precision, **BACKEND),
    )
    outcome = evaluate(request)
    metric = outcome.results.metrics[0]
    found: dict[str, list[float]] = {}
    for row in outcome.results.rows:
        if row.model != "bicubic":
            found.setdefault(row.volume, []).append(10 ** (-row.values[metric] / 10))
    return found


BACKEND = {"backend": "torch"} if "backend" in ModelRequest.__dataclass_fields__ else {}


def costs(entry: Entry, choice: Choice) -> tuple[int, dict[str, float]]:
    """Number of slices, and what each precision costs in dB: the mean over volumes."""
    exact = squared_errors(entry, choice, "fp32")
    found = {}
    for wanted, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        rounded = squared_errors(entry, choice, wanted)
        losses = [10 * math.log10(np.mean(rounded[volume]) / np.mean(exact[volume])) for volume in exact]
        found[name] = round(float(np.mean(losses)), 4)
    return sum(map(len, exact.values())), found


def main() -> None:
    """Print a line of YAML for each checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="*", help="Ids; all that are in the package unless given.")
    asked = parser.parse_args().checkpoints
    torch_runner.TorchRunner = MeasuringRunner  # type: ignore[misc]
    torch_runner.arithmetic = any_precision
    for entry in load_manifest().entries:
        if entry.id in asked or (not asked and entry.bundled_file):
            slices, found = costs(entry, choice_for(entry, SHARED / "data" / "val"))
            figures = ", ".join(f"{name}: {cost}" for name, cost in found.items())
            print(f"{entry.id}:\n    precision_cost_db: {{slices: {slices}, {figures}}}", flush=True)


if __name__ == "__main__":
    main()
