"""Which arithmetic is chosen, and that PyTorch's settings are those of a run only during the run."""

from __future__ import annotations

import os

import pytest
import torch

from medsr_cli.engines import precision
from medsr_cli.engines.devices import CUBLAS_CONFIG, device_settings
from medsr_cli.engines.precision import arithmetic, has_bfloat16
from medsr_cli.errors import ArgumentsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def with_amx(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": False})


@pytest.fixture
def without_amx(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: {"avx2": True, "amx_bf16": False})


@pytest.mark.parametrize(
    ("cost", "dtype"),
    [
        ({"bfloat16": 0.0099}, torch.bfloat16),
        ({"bfloat16": -0.002}, torch.bfloat16),
        ({"bfloat16": 0.01}, torch.float32),
        ({"bfloat16": float("nan")}, torch.float32),
        ({"float16": 0.0}, torch.float32),
        ({}, torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_card_says_that_it_is_cheap(with_amx, cost, dtype):
    assert arithmetic("auto", CPU, cost) == (dtype, ())


def test_auto_is_float32_on_a_cpu_that_would_emulate(without_amx):
    assert not has_bfloat16(CPU)
    assert arithmetic("auto", CPU, {"bfloat16": 0.0}).dtype is torch.float32


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_asks_the_gpu(monkeypatch, supported, dtype):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.update(how) or supported)
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda self: None)
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda self, *error: None)
    assert arithmetic("auto", CUDA, {"bfloat16": 0.004}).dtype is dtype
    assert asked == {"including_emulation": False}


def test_this_cpu_is_asked_in_words_that_pytorch_knows():
    assert all(name in torch.cpu.get_capabilities() for name in precision.CPU_BFLOAT16)


def test_bfloat16_by_hand_runs_and_says_what_it_costs(with_amx):
    cheap = arithmetic("bf16", CPU, {"bfloat16": 0.003})
    assert cheap == (torch.bfloat16, ())
    dear = arithmetic("bf16", CPU, {"bfloat16": 2.85})
    assert dear.dtype is torch.bfloat16
    assert len(dear.warnings) == 1
    assert "costs 2.9 dB" in dear.warnings[0]
    assert "not measured" in arithmetic("bf16", CPU).warnings[0]


def test_bfloat16_by_hand_says_that_it_is_emulated(without_amx):
    (sentence,) = arithmetic("bf16", CPU, {"bfloat16": 0.0}).warnings
    assert "emulates" in sentence


def test_float32_by_hand_says_nothing():
    assert arithmetic("fp32", CPU) == (torch.float32, ())


def test_what_cannot_be_is_refused():
    with pytest.raises(ArgumentsError, match="fp16 needs a GPU"):
        arithmetic("fp16", CPU)
    with pytest.raises(ArgumentsError, match="no precision called 'int8'"):
        arithmetic("int8", CPU)


def test_deterministic_is_on_inside_and_as_it_was_after(monkeypatch):
    monkeypatch.setenv(CUBLAS_CONFIG, ":0:0")
    assert not torch.are_deterministic_algorithms_enabled()

    def failing_run() -> None:
        with device_settings(CPU, deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ[CUBLAS_CONFIG] == ":4096:8"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_run()
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ[CUBLAS_CONFIG] == ":0:0"
    monkeypatch.delenv(CUBLAS_CONFIG)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with device_settings(CPU, deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert CUBLAS_CONFIG not in os.environ


@pytest.fixture
def imagined_gpu(monkeypatch):
    """What `device_settings` asks of a GPU, of 100 bytes; the fractions that were set are kept."""
    fractions = [1.0]
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda self: None)
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda self, *error: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 100})
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fractions[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    return fractions


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tf32", ["tf32", "none"])
def test_float32_is_no_tf32_on_a_gpu_and_the_users_settings_return(imagined_gpu, deterministic, tf32):
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = products.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic
    products.fp32_precision = tf32
    users = products.fp32_precision
    try:
        with device_settings(CUDA, deterministic=deterministic):
            assert products.fp32_precision == "ieee"
            assert cudnn.conv.fp32_precision == "ieee"
            assert (cudnn.benchmark, cudnn.deterministic) == (not deterministic, deterministic)
        assert products.fp32_precision == users
        assert cudnn.conv.fp32_precision == before[1]
        assert (cudnn.benchmark, cudnn.deterministic) == before[2:]
    finally:
        products.fp32_precision = before[0]


def test_the_memory_limit_holds_inside_and_never_raises_the_users_own(imagined_gpu):
    with device_settings(CUDA, max_bytes=25):
        assert imagined_gpu[-1] == 0.25
    assert imagined_gpu == [1.0, 0.25, 1.0]
    imagined_gpu[:] = [0.1]
    with device_settings(CUDA, max_bytes=1000):
        assert imagined_gpu[-1] == 0.1
    assert imagined_gpu[-1] == 0.1
