"""ONNX Runtime's ways to compute: which of them really work here, and what is missing where one does not.

ONNX Runtime lists a provider as available when it was built with it, and falls back to the CPU with a line on stderr
where its libraries cannot be loaded. Here the line is caught and becomes a sentence, and what counts is the provider
that a session says it has.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from medsr_cli.errors import DeviceUnavailable, WeightsError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SILENT, ERRORS = 4, 3
"""Severities of ONNX Runtime's log."""
TRACES_OF_A_GPU = ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version")
CUDA_REMEDY = 'Install its CUDA libraries (pip install "onnxruntime-gpu[cuda,cudnn]"), or use --device cpu.'
_NOT_LOADED = re.compile(r'(lib[\w.+-]+\.so[.\w]*): cannot open|depends on "([^"\\/]+\.dll)" which is missing')
_CUDA_FAILURE = re.compile(r"CUDA (?:failure|error)[^\n]*?\d+: ([^;\n]+?)\s*;", re.IGNORECASE)


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's ways to compute, tried with a graph of one operator."""

    name: str
    works: bool
    fault: str = ""
    """Why not."""
    remedy: str = ""


@dataclass(frozen=True)
class Opened:
    """A session, and what was said while it was made."""

    session: Any
    said: str

    @property
    def provider(self) -> str:
        """The one that the session really has."""
        return str(self.session.get_providers()[0])


def runtime() -> ModuleType:
    """The module `onnxruntime`, kept from writing on stderr."""
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    with heard():  # it looks for devices on import, and tells what it did not find
        import onnxruntime  # noqa: PLC0415 - not on import of this module, so that the help need not pay for it

    onnxruntime.set_default_logger_severity(SILENT)
    return onnxruntime  # type: ignore[no-any-return]


def providers() -> list[Provider]:
    """The CPU and, where ONNX Runtime was built with it, CUDA: each really tried."""
    model = _smallest_model()
    found = []
    for name in runtime().get_available_providers():
        if name == CPU:
            found.append(Provider(CPU, works=True))
        elif name == CUDA:
            opened = open_session(model, runtime().SessionOptions(), cuda={"device_id": "0"})
            works = opened.provider == CUDA
            fault, remedy = ("", "") if works else (missing_part(opened.said), CUDA_REMEDY)
            found.append(Provider(CUDA, works, fault, remedy))
    return found


def open_session(data: bytes, options: Any, cuda: Mapping[str, str] | None = None) -> Opened:
    """A session on the CPU, or on CUDA with these options where that works.

    Raises:
        WeightsError: ONNX Runtime does not take the model.
    """
    ort = runtime()
    wanted: Sequence[Any] = [CPU] if cuda is None else [(CUDA, dict(cuda)), CPU]
    said = ""
    if cuda is None:
        options.log_severity_level = SILENT
    else:
        said = _preloaded(ort)
        options.log_severity_level = ERRORS
        ort.set_default_logger_severity(ERRORS)
    try:
        with heard(stderr=cuda is not None) as lines:
            session = ort.InferenceSession(data, options, providers=wanted)
    except Exception as error:  # ONNX Runtime's errors have no class in common but this one
        msg = f"ONNX Runtime does not take this model ({first_line(error)})."
        raise WeightsError(msg, "Export it again with medsr export, or use --backend torch.") from error
    finally:
        ort.set_default_logger_severity(SILENT)
    return Opened(session, said + "".join(lines))


def refuse_absent_cuda(opened: Opened) -> None:
    """What to say where CUDA was asked for.

    Raises:
        DeviceUnavailable: the session does not run on CUDA.
    """
    if opened.provider != CUDA:
        msg = f"CUDA was asked for, but ONNX Runtime cannot use it: {missing_part(opened.said)}."
        raise DeviceUnavailable(msg, CUDA_REMEDY)


def refuse_unbuilt_cuda() -> None:
    """Tell at once where no library could help.

    Raises:
        DeviceUnavailable: this ONNX Runtime was built without CUDA.
    """
    if CUDA not in runtime().get_available_providers():
        msg = "CUDA was asked for, but this ONNX Runtime was built without it."
        raise DeviceUnavailable(msg, "Install onnxruntime-gpu instead of onnxruntime, or use --device cpu.")


def missing_part(said: str) -> str:
    """From what ONNX Runtime said, the libraries that it did not find, or the fault of the device."""
    libraries = list(dict.fromkeys(match[1] or match[2] for match in _NOT_LOADED.finditer(said)))
    if libraries:
        return f"{', '.join(libraries)} cannot be loaded"
    failure = _CUDA_FAILURE.search(said)
    if failure:
        return failure[1]
    return "no usable NVIDIA GPU or driver was found"


def gpu_is_here() -> bool:
    """Whether there is an NVIDIA GPU with a driver, as far as can be told without a library."""
    return any(Path(path).exists() for path in TRACES_OF_A_GPU)


@contextlib.contextmanager
def heard(*, stderr: bool = True) -> Iterator[list[str]]:
    """What is written on stdout and stderr meanwhile, by C++ too, goes into the list instead.

    Args:
        stderr: False leaves that one alone, for where C++ has been told to keep silent.
    """
    lines: list[str] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if stderr:
            with _stderr_heard(lines):
                yield lines
        else:
            yield lines
    lines.append(printed.getvalue())


@contextlib.contextmanager
def _stderr_heard(lines: list[str]) -> Iterator[None]:
    """The process's second file, not Python's object of that name: C++ writes there."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.append(file.read().decode(errors="replace"))


def first_line(error: BaseException) -> str:
    """Of an error of ONNX Runtime, without its number and the paths of its build."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    return re.sub(r"/onnxruntime_src/\S+ ", "", text)[:200].rstrip(". ")


def _preloaded(ort: ModuleType) -> str:
    """CUDA's libraries from where pip put them; what could not be found."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    with heard() as lines, contextlib.suppress(Exception):  # it is a help: the session's provider is what counts
        ort.preload_dlls()
    return "".join(lines)


def _smallest_model() -> bytes:
    from onnx import TensorProto, helper  # noqa: PLC0415 - only for this

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
