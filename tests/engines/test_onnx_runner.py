"""ONNX Runtime behind the runner's contract: results, devices that are not there, memory, silence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medsr_cli.engines import onnx_provider, onnx_runner
from medsr_cli.engines.any_scale import AnyScaleEngine
from medsr_cli.engines.onnx_file import OnnxFile, checked_onnx
from medsr_cli.engines.onnx_runner import OnnxRunner, OutOfMemory, cuda_options, known_device
from medsr_cli.engines.runner import Place
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, RunError, WeightsError
from tests.engines.onnx_models import any_scale_model, metadata_of, model_of, nearest, nearest_graph, two_stage_model

CUDA_WORKS = any(provider.name == onnx_provider.CUDA and provider.works for provider in onnx_provider.providers())
BUILT_WITH_CUDA = onnx_provider.CUDA in onnx_provider.runtime().get_available_providers()
without_cuda = pytest.mark.skipif(CUDA_WORKS or not BUILT_WITH_CUDA, reason="CUDA works, or was never built in")


def file_of(model) -> OnnxFile:
    return checked_onnx(model.SerializeToString(), "a.onnx")


@pytest.fixture
def file() -> OnnxFile:
    return file_of(nearest())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 5, 9), (2, 1, 40, 7)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_runs_any_batch_and_size(file, shape, kind):
    planes = np.random.default_rng(0).random(shape).astype(kind)
    (result,) = OnnxRunner(file, device="cpu").run(planes)
    assert result.dtype == np.float32
    assert np.array_equal(result, planes.astype(np.float32).repeat(2, -1).repeat(2, -2))


def test_a_view_is_as_good_as_an_array(file):
    planes = np.random.default_rng(1).random((2, 1, 12, 8), np.float32)
    turned = np.rot90(planes, 1, axes=(-2, -1))
    (result,) = OnnxRunner(file, device="cpu").run(turned)
    assert np.array_equal(result, turned.repeat(2, -1).repeat(2, -2))


def test_the_first_stage_comes_first():
    planes = np.random.default_rng(2).random((2, 1, 5, 6), np.float32)
    small, large = OnnxRunner(file_of(two_stage_model()), device="cpu").run(planes)
    np.testing.assert_allclose(small, 0.5 * planes.repeat(2, -1).repeat(2, -2), rtol=1e-6)
    assert np.array_equal(large, planes.repeat(4, -1).repeat(4, -2))


def test_scale_and_place_reach_the_graph():
    runner = OnnxRunner(file_of(any_scale_model()), device="cpu")
    planes = np.zeros((2, 1, 7, 8), np.float32)
    result = runner.run_scaled(planes, (1.25, 3.5), (Place(9, 2, 4, 5), Place(8, 1, 3, 6)))
    told = 1.25 + 3.5 + (90 + 200 + 4000 + 50_000) + (8 + 2 * 1 + 3 * 3 + 4 * 6)
    assert result.shape == (2, 1, 5, 6)
    assert result == pytest.approx(told)


def test_an_engine_of_any_scale_runs_on_it():
    file = file_of(any_scale_model())
    engine = AnyScaleEngine(OnnxRunner(file, device="cpu"), file.traits, (1.5, 2.0))
    assert engine.run(np.zeros((1, 1, 10, 12))).planes.shape == (1, 1, 15, 24)


def test_a_result_of_another_size_is_an_error():
    file = file_of(model_of(nearest_graph(3), metadata_of()))  # its traits say 2
    with pytest.raises(RunError, match=r"\(1, 1, 12, 15\) where \(1, 1, 8, 10\)"):
        OnnxRunner(file, device="cpu").run(np.zeros((1, 1, 4, 5), np.float32))


def test_says_what_it_runs_on(file):
    runner = OnnxRunner(file, device="cpu")
    assert (runner.name, runner.device, runner.precision, runner.warnings) == ("onnx", "cpu", "float32", [])
    assert runner.usable_bytes() > 1_000_000
    runner.release()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_too_little_memory_is_told_by_an_exception_of_its_own():
    program = (
        "import resource, numpy as np\n"
        "from tests.engines.onnx_models import nearest\n"
        "from medsr_cli.engines.onnx_file import checked_onnx\n"
        "from medsr_cli.engines.onnx_runner import OnnxRunner\n"
        "runner = OnnxRunner(checked_onnx(nearest().SerializeToString(), 'a'), device='cpu', threads=1)\n"
        "planes = np.zeros((1, 1, 9000, 9000), np.float32)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, -1))\n"
        "try:\n    runner.run(planes)\n"
        "except runner.out_of_memory as error:\n    print('caught', type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("caught"), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:360 Failed to allocate memory for a buffer",
            OutOfMemory,
        ),
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", OutOfMemory),
        ("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0", OutOfMemory),
        ("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node.", RunError),
    ],
)
def test_errors_of_a_run_are_told_apart(file, monkeypatch, text, kind):
    def fail(*_):
        raise RuntimeError(text)

    runner = OnnxRunner(file, device="cpu")
    monkeypatch.setattr(runner, "_session", type("Session", (), {"run": fail})())
    with pytest.raises(kind):
        runner.run(np.zeros((1, 1, 4, 4), np.float32))


# -- devices -----------------------------------------------------------------------------------------------------------


@without_cuda
def test_cuda_that_is_not_there_is_named_and_exit_4(file, capfd):
    with pytest.raises(DeviceUnavailable, match="CUDA was asked for") as caught:
        OnnxRunner(file, device="cuda")
    assert caught.value.exit_code == 4
    assert "lib" in caught.value.sentence or "GPU" in caught.value.sentence
    assert "--device cpu" in caught.value.remedy
    assert capfd.readouterr() == ("", "")


@without_cuda
def test_auto_says_once_that_it_fell_back_where_there_is_a_gpu(file, monkeypatch, capfd):
    monkeypatch.setattr(onnx_runner, "gpu_is_here", lambda: True)
    runner = OnnxRunner(file, device="auto")
    assert runner.device == "cpu"
    assert len(runner.warnings) == 1
    assert "There is a GPU, but ONNX Runtime cannot use it" in runner.warnings[0]
    assert runner.run(np.zeros((1, 1, 4, 4)))[0].shape == (1, 1, 8, 8)
    assert capfd.readouterr() == ("", "")


def test_auto_says_nothing_where_there_is_no_gpu(file, monkeypatch):
    monkeypatch.setattr(onnx_runner, "gpu_is_here", lambda: False)
    runner = OnnxRunner(file, device="auto")
    assert (runner.device, runner.warnings) == ("cpu", [])


def test_an_onnxruntime_without_cuda_is_told_to_be_replaced(file, monkeypatch):
    monkeypatch.setattr(onnx_provider.runtime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match=r"built without it.*onnxruntime-gpu"):
        OnnxRunner(file, device="cuda:1")


@pytest.mark.parametrize(
    ("said", "part"),
    [
        (
            "Failed to load library /x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open "
            "shared object file: No such file or directory",
            "libcublasLt.so.12 cannot be loaded",
        ),
        (
            "Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file: No such file\n"
            "Failed to load libcudnn.so.9: libcudnn.so.9: cannot open shared object file: No such file",
            "libcurand.so.10, libcudnn.so.9 cannot be loaded",
        ),
        (
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=secret",
            "CUDA driver version is insufficient for CUDA runtime version",
        ),
        (
            r'Error loading "C:\\x\\providers_cuda.dll" which depends on "cudnn64_9.dll" which is missing.',
            "cudnn64_9.dll cannot be loaded",
        ),
        ("", "no usable NVIDIA GPU or driver was found"),
    ],
)
def test_the_missing_part_is_found_in_what_onnxruntime_says(said, part):
    assert onnx_provider.missing_part(said) == part


@pytest.mark.parametrize(
    ("device", "found"),
    [("auto", ("auto", 0)), ("CPU", ("cpu", 0)), ("gpu", ("cuda", 0)), ("cuda", ("cuda", 0)), ("cuda:3", ("cuda", 3))],
)
def test_names_of_devices(device, found):
    assert known_device(device) == found


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "cpu:1", "cuda:-1", ""])
def test_other_names_are_refused(device):
    with pytest.raises(ArgumentsError, match="no device called"):
        known_device(device)


def test_mps_is_another_engines(file):
    with pytest.raises(DeviceUnavailable, match="MPS"):
        OnnxRunner(file, device="mps")


def test_memory_of_cuda_is_bounded_and_not_doubled():
    assert cuda_options(2, 10**9) == {
        "device_id": "2",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "1000000000",
    }
    assert "gpu_mem_limit" not in cuda_options(0, None)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "words"),
    [("bf16", "--backend torch"), ("fp16", "fp16 needs a GPU"), ("int8", "no precision called 'int8'")],
)
def test_precisions_that_cannot_be(file, precision, words):
    with pytest.raises(ArgumentsError) as caught:
        OnnxRunner(file, device="cpu", precision=precision)
    assert words in str(caught.value)


def test_a_file_computes_in_its_own_precision(file):
    with pytest.raises(ArgumentsError, match="computes in float32"):
        OnnxRunner(file, device="auto", precision="fp16")
    half = file_of(nearest(**{"medsr.precision": "float16"}))
    assert "half precision" in OnnxRunner(half, device="cpu").warnings[0]
    with pytest.raises(ArgumentsError, match="computes in float16"):
        OnnxRunner(half, device="cpu", precision="fp32")


# -- what must not happen on the way -----------------------------------------------------------------------------------


def test_a_model_that_onnxruntime_does_not_take_is_a_sentence(file):
    broken = OnnxFile(**{**vars(file), "data": b"\x08\x0a"})
    with pytest.raises(WeightsError, match="ONNX Runtime does not take this model") as caught:
        OnnxRunner(broken, device="cpu")
    assert "ONNXRuntimeError" not in str(caught.value)


def test_neither_pytorch_nor_a_word_of_cpp():
    program = (
        "import sys, numpy as np\n"
        "from tests.engines.onnx_models import nearest\n"
        "from medsr_cli.engines import onnx_runner\n"
        "from medsr_cli.engines.network_engine import NetworkEngine\n"
        "from medsr_cli.engines.onnx_file import checked_onnx\n"
        "import medsr_cli.engines.any_scale, medsr_cli.engines.build\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "file = checked_onnx(nearest().SerializeToString(), 'a')\n"
        "onnx_runner.gpu_is_here = lambda: True\n"
        "engine = NetworkEngine(onnx_runner.OnnxRunner(file), file.traits)\n"
        "assert engine.run(np.zeros((1, 1, 8, 8))).planes.shape == (1, 1, 16, 16)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
