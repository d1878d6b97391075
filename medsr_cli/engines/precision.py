"""Which arithmetic a network runs in: what was asked for, what the device has, and what the checkpoint says it costs.

`auto` is bfloat16 where the device computes in it and the checkpoint's card says that it costs less than
`ACCEPTED_COST_DB`, and float32 everywhere else: float32 is the clinical default. float16 is never chosen by itself: it
is finer than bfloat16, but an image that is unlike those that were measured may go beyond its range.

A network in bfloat16 is cast as a whole, weights and activations. Other ways were measured on the shipped checkpoints.
`torch.autocast` is no better (RDST-E on CT 0.013 dB by either, M2Trans x2 2.85 dB, MIASSR 0.13 to 0.25 dB): its weights
are rounded all the same. Both ends in float32, where the image comes in and goes out, halve what RDST-E loses and take
MIASSR from 0.13 to 0.005 dB (cardiac) and from 0.25 to 0.06 dB (brain), but cannot be done from outside: networks join
layers for inference, and only they know which are their ends. It is left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from medsr_cli.errors import ArgumentsError

ACCEPTED_COST_DB = 0.01
"""`auto` takes bfloat16 where the card's figure is below."""
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""Instructions of a processor that multiply in bfloat16; without one of them it is emulated, slower than float32."""


class Arithmetic(NamedTuple):
    """A choice, and what a user must know about it."""

    dtype: torch.dtype
    warnings: tuple[str, ...] = ()


def arithmetic(wanted: str, device: torch.device, cost_db: Mapping[str, float] | None = None) -> Arithmetic:
    """The arithmetic for a name.

    Args:
        wanted: `auto`, `fp32`, `bf16` or `fp16`.
        device: what the network runs on.
        cost_db: PSNR that the checkpoint's card says is lost, by the names `bfloat16` and `float16`; None or a name
            that is missing: not known.

    Raises:
        ArgumentsError: there is no such name, or the device cannot compute in it.
    """
    known = cost_db or {}
    if wanted == "auto":
        cheap = known.get("bfloat16", float("inf")) < ACCEPTED_COST_DB
        return Arithmetic(torch.bfloat16 if cheap and has_bfloat16(device) else torch.float32)
    if wanted not in NAMES:
        msg = f"There is no precision called {wanted!r}."
        raise ArgumentsError(msg, "Give auto, fp32, bf16 or fp16.")
    dtype = NAMES[wanted]
    if dtype is torch.float16 and device.type == "cpu":
        msg = "fp16 needs a GPU."
        raise ArgumentsError(msg, "Use fp32 or bf16 on the CPU.")
    return Arithmetic(dtype, tuple(_warnings(wanted, device, known)))


def _warnings(wanted: str, device: torch.device, known: Mapping[str, float]) -> list[str]:
    if wanted == "fp32":
        return []
    found = []
    cost = known.get(name_of(NAMES[wanted]))
    if cost is None:
        found.append(f"What {wanted} costs with this checkpoint was not measured.")
    elif cost >= ACCEPTED_COST_DB:
        found.append(f"{wanted} costs {cost:.2g} dB with this checkpoint, as measured on validation images.")
    if wanted == "bf16" and not has_bfloat16(device):
        found.append(f"This {'CPU' if device.type == 'cpu' else 'device'} emulates bf16: fp32 is faster.")
    return found


def name_of(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16` or `float16`."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 by itself: NVIDIA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(_cpu_capabilities().get(name, False) for name in CPU_BFLOAT16)


def _cpu_capabilities() -> Mapping[str, object]:
    """What PyTorch says of the processor; nothing where it does not tell."""
    # Since PyTorch 2.12; the releases before it know, but have no public way of telling.
    tell = getattr(torch.cpu, "get_capabilities", None)
    return tell() if tell is not None else {}
