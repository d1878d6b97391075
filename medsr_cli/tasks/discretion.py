"""What the command line needs to be discreet: see `provenance.discretion`, which has the rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from medsr_cli.provenance import discretion
from medsr_cli.provenance.discretion import (
    discreet,
    discreet_command,
    discreet_facts,
    discreet_traceback,
    discreet_usage,
    id_of,
    introduce,
    names_shown,
)

__all__ = [
    "begin",
    "discreet",
    "discreet_command",
    "discreet_facts",
    "discreet_traceback",
    "discreet_usage",
    "id_of",
    "introduce",
    "names_shown",
]

VALUES = (
    *("auto", "torch", "onnx", "cpu", "cuda", "gpu", "mps", "fp32", "bf16", "fp16", "mr", "ct", "us", "xr"),
    *("axial", "sagittal", "coronal", "none", "rigid", "released", "paper", "quick", "perceptual"),
    *("cubic", "cubic-blur", "bicubic-antialiased", "band-limited", "super-resolution", "segmentation", "detection"),
    *("constant", "cooldown", "milestones", "cosine", "explicit", "jpeg2000-lossless", "rle"),
)
"""Values of options."""


def begin(arguments: Sequence[str], *, shown: bool, words: Callable[[], Collection[str]] = frozenset) -> None:
    """Speak of files as `--log-paths` says; `words` gives the names of commands and options."""
    discretion.begin(shown=shown, arguments=arguments, home=_home, words=lambda: _own_words() | frozenset(words()))


def _home() -> Path:
    from medsr_cli.weights.store import default_home

    return default_home()


def _own_words() -> frozenset[str]:
    """Methods, variants, checkpoints, protocols and values of options."""
    from medsr_cli.networks import catalogue
    from medsr_cli.weights.manifest import load_manifest

    found = {*VALUES}
    for arch in catalogue.CATALOGUE:
        found |= {arch.id, arch.family, *arch.variants}
    found |= {entry.id for entry in load_manifest().entries}
    return frozenset(found)
