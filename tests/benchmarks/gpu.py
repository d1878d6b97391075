"""Every GPU row of the benchmarks in one call, in less than ten minutes on an H200: rates, memory, parity.

    python tests/benchmarks/gpu.py --json FILE       # or to $OUT/gpu.json, or nowhere
    python tests/benchmarks/gpu.py --device cpu --quick     # that the script works, where there is no GPU

Needs PyTorch, numpy and psutil; the rows of ONNX Runtime also onnx, onnxscript and onnxruntime-gpu, and say so where
one is missing. Networks have random weights: rates do not depend on them. Rates are of the network alone, on tensors
that are on the device already, unless a row says `host to host`; medians of blocks of runs. A row that fails says why,
and the others go on; the file is written anew after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medsr_cli.engines.cuda_graphs import EAGER_RUNS, CudaCapture, Graphs
from medsr_cli.engines.devices import device_settings
from medsr_cli.engines.torch_runner import TorchRunner, TorchSettings, engine_for, made_ready
from medsr_cli.networks import catalogue
from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.rdst import Rdst, RdstConfig

DATASHEET = {"bfloat16": 989.0, "float32": 67.0}
"""TFLOP/s of an H200 (SXM): dense matrix units, and float32 outside of them."""
DATASHEET_TB_S = 4.8
BLOCKS, BLOCK_S = 7, 0.05
"""Timed blocks of runs, and how long one lasts at least."""
LIMIT_S = 540.0
"""After so long no new row is begun."""
Row = dict[str, Any]


class Bench:
    """What all rows share: the device, sizes, and the clock."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.cuda = self.device.type == "cuda"
        self.began = time.monotonic()
        self.batches = (1, 2) if quick else (1, 16, 64, 256)
        self.middle = self.batches[1]
        self.side = 16 if quick else 64
        self.peak_tflops: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def rdst(self, blocks: int, **changes: Any) -> Rdst:
        """An RDST of so many blocks; of one small one for a quick try."""
        small = {"n_rdstb": 1, "dstb_per_rdstb": 1} if self.quick else {"n_rdstb": blocks}
        torch.manual_seed(0)
        return Rdst(RdstConfig(**{**small, **changes})).eval()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run: the median of blocks of them, after a warm-up that also captures graphs."""
        for _ in range(EAGER_RUNS + 2):
            run()
        blocks, least = (2, 0.0) if self.quick else (BLOCKS, BLOCK_S)
        times, runs = [], 1
        while len(times) < blocks:
            self.wait()
            started = time.perf_counter()
            for _ in range(runs):
                run()
            self.wait()
            took = time.perf_counter() - started
            if took < least and runs < 1024:  # too short to be told from the noise
                runs *= 2
                continue
            times.append(took / runs)
        return statistics.median(times)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def planes(self, n: int, rows: int, columns: int, channels: int = 1) -> torch.Tensor:
        """Noise on the device."""
        return torch.rand(n, channels, rows, columns, device=self.device)

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Most memory that tensors took during a run."""
        if not self.cuda:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)


def forward_of(bench: Bench, net: nn.Module, dtype: torch.dtype, *, graphs: bool) -> Callable[..., Any]:
    """The network on the device, as `TorchRunner` has it, without the copies from and to the host."""
    ready = made_ready(net.to(bench.device, dtype).eval())
    if bench.cuda and dtype is not torch.float32:
        ready = ready.to(memory_format=torch.channels_last)
    return Graphs(ready, CudaCapture(bench.device)) if graphs and bench.cuda else ready


def peaks(bench: Bench) -> Iterator[Row]:
    """What the device can do: matrix products and a copy, measured now."""
    side = 256 if bench.quick else 8192
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=bench.device, dtype=getattr(torch, name)) for _ in range(2))
        with device_settings(bench.device):
            rate = 2 * side**3 / bench.seconds(lambda a=a, b=b: a @ b) / 1e12
        bench.peak_tflops[name] = rate
        yield {"row": f"matrix product {side}, {name}", "figure": rate, "unit": "TFLOP/s", "datasheet": DATASHEET[name]}
    source = torch.empty(2**20 if bench.quick else 2**32, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / bench.seconds(lambda: target.copy_(source)) / 1e12
    yield {"row": "copy on the device", "figure": rate, "unit": "TB/s", "datasheet": DATASHEET_TB_S}


def rdst_rates(bench: Bench) -> Iterator[Row]:
    """RDST 64x64 to 256x256 by precision, batch and graphs, and the plain form beside."""
    side = bench.side
    for name in ("bfloat16", "float32"):
        best = 0.0
        for graphs in (True, False) if bench.cuda else (False,):
            forward = forward_of(bench, bench.rdst(8), getattr(torch, name), graphs=graphs)
            for batch in bench.batches:
                given = bench.planes(batch, side, side).to(getattr(torch, name))
                row = one_rate(bench, forward, given, f"RDST {side}x{side}, {name}, batch {batch}", name)
                row["graphs"] = graphs and not getattr(forward, "failure", None)
                row["why_no_graphs"] = getattr(forward, "failure", None)
                best = max(best, row["figure"])
                yield row
        bench.rates[f"rdst {name}"] = best
        target = {"target": 1500, "stretch": 3500} if name == "bfloat16" else {}
        share = shares(bench, best * bench.rdst(8).flops(side, side) / 1e12, name)
        yield {"row": f"RDST {side}x{side}, {name}, best", "figure": best, "unit": "slices/s", **target, **share}
    plain = bench.rdst(8).to(bench.device)
    for module in plain.modules():
        if hasattr(module, "plain"):
            module.plain = True
    given = bench.planes(bench.middle, side, side)
    row = one_rate(bench, plain, given, f"RDST {side}x{side}, float32, plain form, batch {bench.middle}", "float32")
    yield {**row, "bfloat16_is_so_many_times_as_fast": bench.rates["rdst bfloat16"] / row["figure"]}


def one_rate(bench: Bench, forward: Callable[..., Any], given: torch.Tensor, name: str, dtype: str) -> Row:
    """Slices a second of a forward, and the memory that it takes."""
    with device_settings(bench.device), torch.inference_mode():
        seconds = bench.seconds(lambda: forward(given))
        peak = bench.peak_bytes(lambda: forward(given))
    return {"row": name, "figure": len(given) / seconds, "unit": "slices/s", "peak_bytes": peak, "precision": dtype}


def shares(bench: Bench, tflops: float, name: str) -> Row:
    """Of the matrix rate measured in this run, and of the datasheet's."""
    measured = bench.peak_tflops.get(name)
    return {
        "tflops": tflops,
        "share_of_measured_peak": None if measured is None else tflops / measured,
        "share_of_datasheet": tflops / DATASHEET[name],
    }


def paper_setting(bench: Bench) -> Iterator[Row]:
    """The paper's 40x32 to 160x128: RDST 13.9 slices a second there, RDST-E 28.5."""
    size = (8, 8) if bench.quick else (40, 32)
    for name, blocks, papers, target in (("RDST", 8, 13.9, 2000), ("RDST-E", 4, 28.5, 4000)):
        forward = forward_of(bench, bench.rdst(blocks), torch.bfloat16, graphs=True)
        found = [
            one_rate(bench, forward, bench.planes(n, *size).bfloat16(), f"{name} 40x32, batch {n}", "bfloat16")
            for n in bench.batches
        ]
        yield from found
        best = max(row["figure"] for row in found)
        yield {
            "row": f"{name} 40x32 to 160x128, bfloat16, best",
            "figure": best,
            "unit": "slices/s",
            "target": target,
            "papers": papers,
            "times_the_papers": best / papers,
        }


def host_to_host(bench: Bench) -> Iterator[Row]:
    """Through `TorchRunner`, from and to arrays of numpy: what a pipeline gets."""
    for precision in ("bf16", "fp32"):
        for graphs in (True, False):
            runner = TorchRunner(
                bench.rdst(8), device=str(bench.device), precision=precision, settings=TorchSettings(graphs=graphs)
            )
            given = np.random.default_rng(0).random((bench.middle, 1, bench.side, bench.side), np.float32)
            rate = len(given) / bench.seconds(lambda runner=runner, given=given: runner.run(given))
            name = f"RDST host to host, {precision}, batch {len(given)}"
            yield {
                "row": name,
                "figure": rate,
                "unit": "slices/s",
                "graphs": graphs and bench.cuda,
                "warnings": runner.warnings,
            }


def kernels(bench: Bench) -> Iterator[Row]:
    """Where the time goes, by kernel: attention must be in an efficient or flash kernel, not in softmax and bmm."""
    kind = torch.profiler.ProfilerActivity.CUDA if bench.cuda else torch.profiler.ProfilerActivity.CPU
    forward = forward_of(bench, bench.rdst(8), torch.bfloat16, graphs=False)
    given = bench.planes(bench.middle, bench.side, bench.side).bfloat16()
    with device_settings(bench.device), torch.inference_mode():
        for _ in range(3):
            forward(given)
        with torch.profiler.profile(activities=[kind]) as profile:
            forward(given)
            bench.wait()
    attribute = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events) or 1.0
    top = [(event.key[:120], event.count, round(getattr(event, attribute) / total, 4)) for event in events[:20]]
    names = " ".join(event.key for event in events).lower()
    fused = any(word in names for word in ("fmha", "flash", "mem_eff", "efficient", "cudnn_generated"))
    count = sum(event.count for event in events)
    yield {
        "row": "kernels of one RDST forward",
        "figure": count,
        "unit": "kernels",
        "attention_fused": fused,
        "top": top,
    }


def networks(bench: Bench) -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], int]]:
    """The methods of the ONNX row and MS-GAN: network, inputs without the batch, side."""
    q = bench.quick
    torch.manual_seed(0)
    guide = torch.rand(1, *(120, 120))
    return {
        "rdst": (bench.rdst(8), (torch.rand(1, bench.side, bench.side),), bench.side),
        "miassr": (Miassr(MiassrConfig(n_blocks=1, n_feats=8, hidden=8) if q else MiassrConfig()),
                   (torch.rand(1, bench.side, bench.side),), bench.side),
        "m2trans": (M2Trans(M2TransConfig(n_feats=8, n_blocks=1) if q else M2TransConfig()),
                    (torch.rand(3, 64, 64),), 64),
        "cohft": (Cohft(CohftConfig(stages=1, feature_dim=8, growth=4, rrdb_per_stage=1, rdbs=1, convs=2)
                        if q else CohftConfig()), (torch.rand(1, 30, 30), guide), 30),
        "msgan": (MsGan(MsGanConfig(n_blocks=1, n_feats=8) if q else MsGanConfig()),
                  (torch.rand(1, bench.side, bench.side),), bench.side),
    }  # fmt: skip


def methods_and_onnx(bench: Bench) -> Iterator[Row]:
    """Each method through PyTorch and through ONNX Runtime on the device, host to host with the same batch."""
    batch = 2 if bench.quick else 16
    for name, (net, inputs, side) in networks(bench).items():
        given = [np.stack([one.numpy()] * batch) for one in inputs]
        form = exported_form(name, net)  # before the runner uses the network up
        runner = TorchRunner(net, device=str(bench.device), precision="fp32")
        if name == "miassr":
            from medsr_cli.engines.runner import Place

            places = (Place(side, 0, 0, 2 * side), Place(side, 0, 0, 2 * side))
            run = lambda: runner.run_scaled(given[0], (2.0, 2.0), places)  # noqa: B023, E731
        else:
            run = lambda: runner.run(*given)[-1]  # noqa: B023, E731
        rate = batch / bench.seconds(run)
        yield {"row": f"{name} {side}x{side}, float32, batch {batch}, host to host", "figure": rate, "unit": "slices/s"}
        row = {"row": f"{name} through ONNX Runtime", "figure": None}
        try:
            yield {**row, **(onnx_row(bench, form, given, (rate, run())) if isinstance(form, bytes) else form)}
        except Exception as error:  # one method that fails is no reason to leave out the others
            yield {**row, "failed": f"{type(error).__name__}: {error}"[:500]}


def exported_form(name: str, net: nn.Module) -> bytes | Row:
    """The graph, or why there is none."""
    import importlib

    try:
        from medsr_cli.engines.onnx_export import exported

        graph_form = importlib.import_module(type(net).__module__).graph_form
        return exported(graph_form(net.eval()))
    except Exception as error:
        return {"skipped": f"{name}: {type(error).__name__}: {error}"[:300]}


def onnx_row(bench: Bench, graph: bytes, given: list[Any], torchs: tuple[float, Any]) -> Row:
    """Rate, provider and difference of one graph."""
    try:
        import onnxruntime
    except ImportError:
        return {"skipped": "onnxruntime is not installed"}
    wanted = "CUDAExecutionProvider" if bench.cuda else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        return {"skipped": "this onnxruntime has no CUDA"}
    if bench.cuda:
        onnxruntime.preload_dlls()
    options = {"use_tf32": 0, "arena_extend_strategy": "kSameAsRequested"} if bench.cuda else {}
    session = onnxruntime.InferenceSession(graph, providers=[(wanted, options)])
    has = session.get_providers()[0]
    feeds = onnx_feeds(session, given)
    seconds = bench.seconds(lambda: session.run(None, feeds))
    rate, expected = len(given[0]) / seconds, torchs[1]
    matching = next((one for one in session.run(None, feeds) if one.shape == expected.shape), None)
    return {
        "figure": rate,
        "unit": "slices/s",
        "provider": has,
        "right_provider": has == wanted,
        "times_pytorch": rate / torchs[0],
        "target_times_pytorch": 0.7,
        "largest_difference": None if matching is None else float(np.abs(matching - expected).max()),
    }


def onnx_feeds(session: Any, given: list[Any]) -> dict[str, Any]:
    """Values for a graph's inputs: images in order; 2 where it asks for a scale; zeros where it asks for a place."""
    images, feeds = list(given), {}
    for one in session.get_inputs():
        if one.name == "scale":
            feeds[one.name] = np.array([2.0, 2.0])
        elif one.type == "tensor(int64)":
            from medsr_cli.networks.miassr import GRAPH_DEFAULTS

            feeds[one.name] = GRAPH_DEFAULTS[one.name].numpy()
        else:
            feeds[one.name] = images.pop(0).astype(np.float32)
    return feeds


def parity(bench: Bench) -> Iterator[Row]:
    """Largest difference from float32 on the CPU, of the ways that a network can run here, by share of the range."""
    for name, (net, inputs, side) in networks(bench).items():
        if name == "miassr":  # of any scale: its whole is in the row of ONNX Runtime
            continue
        given = [np.stack([one.numpy()] * 2) for one in inputs]
        state = net.state_dict()
        settings = [("fp32", True), ("fp32", False), ("bf16", True)]
        cpu = TorchRunner(restored(net, state), device="cpu")
        expected = cpu.run(*given)[-1]
        extent = float(np.ptp(expected)) or 1.0
        for precision, graphs in settings:
            runner = TorchRunner(
                restored(net, state),
                device=str(bench.device),
                precision=precision,
                settings=TorchSettings(graphs=graphs),
            )
            for _ in range(EAGER_RUNS + 2):
                found = runner.run(*given)[-1]
            difference = float(np.abs(found - expected).max()) / extent
            row = f"parity of {name} {side}x{side}, {precision}, {'graphs' if graphs else 'no graphs'}"
            yield {"row": row, "figure": difference, "unit": "of the range", "warnings": runner.warnings}


def restored(net: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """The same network once more, on the CPU."""
    again: nn.Module = type(net)(net.config)  # type: ignore[call-arg, arg-type]
    again.load_state_dict({key: value.cpu() for key, value in state.items()})
    return again.eval()


def deterministic(bench: Bench) -> Iterator[Row]:
    """Whether two runs and two batch sizes give the same bits, and what that costs."""
    given = np.random.default_rng(0).random((bench.middle, 1, bench.side, bench.side), np.float32)
    rates = {}
    for on in (False, True):
        settings = TorchSettings(deterministic=on)
        runner = TorchRunner(bench.rdst(4), device=str(bench.device), precision="fp32", settings=settings)
        results = [runner.run(given)[-1] for _ in range(EAGER_RUNS + 3)]
        alone = np.concatenate([runner.run(given[i : i + 1])[-1] for i in range(len(given))])
        rates[on] = len(given) / bench.seconds(lambda runner=runner: runner.run(given))
        yield {
            "row": f"RDST-E {'deterministic' if on else 'as usual'}, host to host",
            "figure": rates[on],
            "unit": "slices/s",
            "same_bits_again": all(np.array_equal(results[0], one) for one in results),
            "same_bits_alone": bool(np.array_equal(results[0], alone)),
        }


def limited_memory(bench: Bench) -> Iterator[Row]:
    """Slices that do not fit below a limit: smaller tiles, the same result, and memory below the limit."""
    side, limit = (72, 2**30) if bench.quick else (512, 2 * 2**30)
    planes = np.random.default_rng(0).random((2 if bench.quick else 8, 1, side, side), np.float32)
    results = []
    for most in (None, limit):
        if bench.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
        engine = engine_for(
            bench.rdst(4), catalogue.RDST, (4, 4), device=str(bench.device), precision="fp32",
            settings=TorchSettings(max_bytes=most),
        )  # fmt: skip
        started = time.perf_counter()
        results.append(engine.run(planes).planes)
        yield {
            "row": f"{len(planes)} slices of {side}x{side}, {'no limit' if most is None else f'limit {most} bytes'}",
            "figure": time.perf_counter() - started,
            "unit": "s",
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(bench.device) if bench.cuda else None,
            "largest_difference": float(np.abs(results[-1] - results[0]).max()),
            "warnings": engine.warnings,
        }


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "peaks": peaks,
    "rdst": rdst_rates,
    "paper": paper_setting,
    "host": host_to_host,
    "kernels": kernels,
    "parity": parity,
    "deterministic": deterministic,
    "memory": limited_memory,
    "methods": methods_and_onnx,
}


def told(row: Row) -> str:
    """One line; what is a list or long goes into the file alone."""
    figure = row.get("figure")
    head = f"{row['row']}: " + ("-" if figure is None else f"{figure:.4g} {row.get('unit', '')}")
    rest = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("row", "figure", "unit", "top", "precision") and value not in (None, [], "")
    ]
    return head + (f" ({', '.join(rest)})" if rest else "")


def about(bench: Bench) -> Row:
    """The machine and the versions."""
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu",
        "memory_bytes": torch.cuda.get_device_properties(bench.device).total_memory if bench.cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "quick": bench.quick,
    }


def run_all(bench: Bench, chosen: list[str], file: Path | None) -> list[Row]:
    """Every chosen group of rows; what goes wrong is a row of its own."""
    found: list[Row] = []
    for name in chosen:
        try:
            if time.monotonic() - bench.began > LIMIT_S:
                found.append({"row": name, "figure": None, "skipped": "no time left"})
                print(told(found[-1]), flush=True)
                continue
            for row in ROWS[name](bench):
                found.append({"group": name, **row})
                print(told(row), flush=True)
        except Exception as error:  # the other rows are worth having all the same
            traceback.print_exc()
            found.append({"row": name, "figure": None, "failed": f"{type(error).__name__}: {error}"[:500]})
        if bench.cuda:
            torch.cuda.empty_cache()
        if file is not None:
            file.write_text(json.dumps({"about": about(bench), "rows": found}, indent=1))
    return found


def main() -> int:
    """Print every row; 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="Tiny networks: does the script work?")
    parser.add_argument("--json", type=Path, help="$OUT/gpu.json where OUT is set.")
    parser.add_argument("--only", default=",".join(ROWS), help=f"Of {', '.join(ROWS)}.")
    asked = parser.parse_args()
    file = asked.json or (Path(os.environ["OUT"], "gpu.json") if os.environ.get("OUT") else None)
    bench = Bench(asked.device, asked.quick)
    print(json.dumps(about(bench)), flush=True)
    found = run_all(bench, asked.only.split(","), file)
    print(f"took {time.monotonic() - bench.began:.0f} s")
    return int(any("failed" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
