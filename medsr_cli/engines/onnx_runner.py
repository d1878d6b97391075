"""A network through ONNX Runtime, on the CPU or one CUDA device; PyTorch is not needed for it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from medsr_cli.engines.engine import Planes
from medsr_cli.engines.memory import SHARE, is_out_of_memory, usable_bytes
from medsr_cli.engines.onnx_file import OnnxFile
from medsr_cli.engines.onnx_provider import (
    CUDA,
    Opened,
    first_line,
    gpu_is_here,
    missing_part,
    open_session,
    refuse_absent_cuda,
    refuse_unbuilt_cuda,
    runtime,
)
from medsr_cli.engines.processor import cores
from medsr_cli.engines.runner import Place
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, RunError, mention

WORDS = {"fp32": "float32", "fp16": "float16"}


class OutOfMemory(Exception):
    """ONNX Runtime's allocator had too little left; its own error has no class that says so."""


class OnnxRunner:
    """A network of an ONNX file on one device."""

    name = "onnx"
    out_of_memory: tuple[type[BaseException], ...] = (OutOfMemory, MemoryError)

    def __init__(
        self,
        file: OnnxFile,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        """A session.

        Args:
            file: checked, see `engines.onnx_file`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is CUDA where it really works.
            precision: `auto`, `fp32` or `fp16`; the file is of one of them already.
            threads: of the CPU; all that this process may use where None.
            max_bytes: of a GPU's memory that the session may take.

        Raises:
            ArgumentsError: no such device, or a precision that the file does not have.
            DeviceUnavailable: CUDA was asked for and does not work; the sentence names what is missing.
            WeightsError: ONNX Runtime does not take the model.
        """
        wanted, number = known_device(device)
        refuse_other_precision(file, precision, wanted)
        self.warnings: list[str] = []
        self.precision = file.precision
        self._file_name, self._traits, self._outputs = file.name, file.traits, file.outputs
        self._any_input = {*file.inputs, *file.optional_inputs}
        self._max_bytes = max_bytes
        opened = self._opened(file, wanted, number, threads)
        self._session = opened.session
        double = any(value.name == "scale" and value.type == "tensor(double)" for value in opened.session.get_inputs())
        self._scale_type = np.float64 if double else np.float32
        self._options = runtime().RunOptions()
        self._options.log_severity_level = 4
        self.device = f"cuda:{number}" if opened.provider == CUDA else "cpu"
        if self.precision == "float16" and self.device == "cpu":
            self.warnings.append(
                f"{mention(file.name)} is in half precision, which the CPU computes slowly; use one in fp32."
            )

    def _opened(self, file: OnnxFile, wanted: str, number: int, threads: int | None) -> Opened:
        """The session; `auto` tries CUDA only where there is a GPU, and tells if it does not work."""
        if wanted == "cuda":
            refuse_unbuilt_cuda()
        cuda = None
        if wanted == "cuda" or (wanted == "auto" and gpu_is_here() and CUDA in runtime().get_available_providers()):
            cuda = cuda_options(number, self._max_bytes)
        opened = open_session(file.data, session_options(threads), cuda)
        if wanted == "cuda":
            refuse_absent_cuda(opened)
        elif cuda is not None and opened.provider != CUDA:
            self.warnings.append(
                f"There is a GPU, but ONNX Runtime cannot use it ({missing_part(opened.said)}): it runs on the CPU."
            )
        return opened

    def run(self, planes: Planes, guide: Planes | None = None) -> tuple[Planes, ...]:
        """Every result of the network, the enlarged planes last.

        Raises:
            RunError: ONNX Runtime failed, or what came out has not the size that the file promises.
        """
        given = {"image": _single(planes)}
        if guide is not None:
            given["guide"] = _single(guide)
        results = self._run(given)
        n, channels, rows, columns = planes.shape
        factor = 1 if self._traits.enlarged_first else self._traits.scale
        factors = (self._traits.first_stage, factor)[-len(results) :]
        for result, one in zip(results, factors, strict=True):
            self._refuse_size(result, (n, channels, rows * one, columns * one))
        return results

    def run_scaled(self, planes: Planes, scale: tuple[float, float], places: tuple[Place, Place]) -> Planes:
        """The wanted part of a result at any scale; the graph works out where each pixel looks."""
        axes = [[place.length, place.first, place.start, place.count] for place in places]
        given = {
            "image": _single(planes),
            "scale": np.array(scale, self._scale_type),
            "place": np.array(axes, np.int64),
        }
        (result,) = self._run(given)
        self._refuse_size(result, (*planes.shape[:2], places[0].count, places[1].count))
        return result

    def _run(self, given: dict[str, Any]) -> tuple[Planes, ...]:
        unknown = sorted(set(given) - self._any_input)
        if unknown:
            msg = f"{self._file_name} has no input {unknown[0]!r}"
            raise ValueError(msg)
        try:
            results = self._session.run(list(self._outputs), given, self._options)
        except Exception as error:  # ONNX Runtime's errors have no class in common but this one
            if is_out_of_memory(error):
                raise OutOfMemory(first_line(error)) from error
            msg = f"ONNX Runtime could not run {self._file_name} ({first_line(error)})."
            raise RunError(msg, "Use --backend torch, or export it again.") from error
        return tuple(results)

    def _refuse_size(self, result: Planes, size: tuple[int, ...]) -> None:
        if result.shape != size or result.dtype != np.float32:
            msg = f"{self._file_name} gave a result of {result.shape} where {size} was due."
            raise RunError(msg, "Export it again with medsr export.")

    def usable_bytes(self) -> int:
        """Of the device's free memory, what a run may plan with."""
        if self.device == "cpu":
            return usable_bytes("cpu")
        free = int(_free_of_gpu(self.device) * SHARE)
        return free if self._max_bytes is None else min(free, self._max_bytes)

    def release(self) -> None:
        """Nothing to do: what a run took, it has given back."""


def session_options(threads: int | None) -> Any:
    """For one run at a time in flat memory, however different the sizes of tiles are.

    Without an arena, and without the plan of memory that is kept for each size seen, a session holds nothing between
    runs but its weights.
    """
    options = runtime().SessionOptions()
    ort = runtime()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def cuda_options(number: int, max_bytes: int | None) -> dict[str, str]:
    """Those of the CUDA provider.

    HEURISTIC: the default tries every algorithm for each new size, which tiles of different sizes pay again and
    again. kSameAsRequested: the default doubles what it takes each time. The limit is that of the arena, which is
    nearly everything.
    """
    options = {
        "device_id": str(number),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    return options if max_bytes is None else {**options, "gpu_mem_limit": str(max_bytes)}


def known_device(text: str) -> tuple[str, int]:
    """`auto`, `cpu` or `cuda`, and the number of the GPU.

    Raises:
        ArgumentsError: there is no such name.
        DeviceUnavailable: ONNX Runtime does not run there.
    """
    name, _, number = text.strip().lower().partition(":")
    name = {"gpu": "cuda"}.get(name, name)
    if name == "mps":
        msg = "ONNX Runtime does not run on MPS devices."
        raise DeviceUnavailable(msg, "Use --backend torch, or --device cpu.")
    if name not in ("auto", "cpu", "cuda") or (number and not (name == "cuda" and re.fullmatch(r"\d{1,3}", number))):
        msg = f"There is no device called {text!r}."
        raise ArgumentsError(msg, "Give auto, cpu, cuda or cuda:N.")
    return name, int(number or 0)


def known_precision(text: str) -> str:
    """`float32` or `float16`; `auto` is float32, as everywhere.

    Raises:
        ArgumentsError: there is no such precision, or ONNX Runtime does not have it.
    """
    if text == "bf16":
        msg = "ONNX Runtime does not run these networks in bf16."
        raise ArgumentsError(msg, "Use --backend torch for bf16, or --precision fp32 or fp16.")
    if text not in ("auto", *WORDS):
        msg = f"There is no precision called {text!r}."
        raise ArgumentsError(msg, "Give auto, fp32 or fp16.")
    return WORDS.get(text, "float32")


def refuse_other_precision(file: OnnxFile, precision: str, device: str) -> None:
    """A file computes in what it was exported in.

    Raises:
        ArgumentsError: another one was asked for, or half precision on the CPU.
    """
    asked = known_precision(precision)
    if precision == "fp16" and device == "cpu":
        msg = "fp16 needs a GPU."
        raise ArgumentsError(msg, "Use fp32 on the CPU.")
    if precision != "auto" and asked != file.precision:
        msg = f"{mention(file.name)} computes in {file.precision}."
        raise ArgumentsError(msg, f"Leave out --precision, or export it again with --precision {precision}.")


def _free_of_gpu(device: str) -> int:
    """Bytes, from the driver's own library; ONNX Runtime does not tell."""
    import ctypes  # noqa: PLC0415 - only on a GPU

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for library in ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll"):
        try:
            loaded = ctypes.CDLL(library)
        except OSError:
            continue
        loaded.cudaSetDevice(int(device.partition(":")[2] or 0))
        if loaded.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0:
            return free.value
    return usable_bytes("cpu")


def _single(planes: Planes) -> Planes:
    single: Planes = np.ascontiguousarray(planes, np.float32)
    return single
