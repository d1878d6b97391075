"""Every method that medsr has, in one list; standard library only, so that reading it costs nothing.

An entry names its module, classes and functions as strings. `checkpoint` imports them on use. A network
module offers what its entry says: the network class, its configuration dataclass, `config_from_state`
(shapes of tensors to configuration) and `RECOMPUTED_BUFFERS` (endings of keys that are not loaded).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from medsr_cli.errors import ArgumentsError

Kind = Literal["network", "baseline"]
Tiling = Literal["allowed", "refused"]


@dataclass(frozen=True)
class Arch:
    """One method: where it comes from, what it takes, and how its checkpoints are told from others."""

    id: str
    kind: Kind
    title: str
    paper: str
    licence: str
    """Licence of the code in this package; that of a checkpoint is in the manifest."""
    scales: tuple[int, ...]
    """In-plane enlargements that the method can be built for, at least 2."""
    channels: tuple[int, ...]
    """Image channels that the paper's networks take; empty for any number."""
    module: str = ""
    network: str = ""
    """Name of the network class in `module`; it is built from one configuration and keeps it as `.config`."""
    config: str = ""
    """Name of the frozen configuration dataclass in `module`."""
    variants: Mapping[str, Mapping[str, int | float | bool]] = field(default_factory=dict)
    """Variant name to the fields of the configuration that make it that variant."""
    size_multiple: int = 1
    """The network pads to this multiple of pixels by itself; batches of such sizes are not padded."""
    tiling: Tiling = "allowed"
    precision: tuple[str, ...] = ("float32",)
    needs: tuple[str, ...] = ()
    """What it needs beside the image, such as `guide`."""
    keys: tuple[str, ...] = ()
    """Tensor names that all stand in a checkpoint of this method and tell it from the others."""
    repeats: tuple[str, ...] = ()
    """Configuration fields whose product is a number of layers: never more than a file has tensors."""
    loose_fields: tuple[str, ...] = ()
    """Configuration fields that shapes give only up to rounding; the shapes themselves are compared."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether tensors of these names look like a checkpoint of this method."""
        return bool(self.keys) and all(key in names for key in self.keys)

    def variant_of(self, config: Mapping[str, object]) -> str | None:
        """The variant that a configuration is, or None for a size that has no name."""
        for name, fields in self.variants.items():
            if all(config.get(key) == value for key, value in fields.items()):
                return name
        return None


_RDST_WIDTHS: dict[str, int | float | bool] = {
    "embed_dim": 60,
    "growth_rate": 30,
    "num_heads": 6,
    "window_size": 8,
    "dstb_per_rdstb": 3,
    "stl_per_dstb": 2,
}

RDST = Arch(
    id="rdst",
    kind="network",
    title="RDST (residual dense Swin transformer)",
    paper="J. Zhu, G. Yang, P. Liò, arXiv 2302.11184 (2023)",
    licence="as medsr; written from the paper, no code of the authors",
    scales=(2, 3, 4),
    channels=(1, 4),
    module="medsr_cli.networks.rdst",
    network="Rdst",
    config="RdstConfig",
    variants={"rdst-e": {"n_rdstb": 4, **_RDST_WIDTHS}, "rdst": {"n_rdstb": 8, **_RDST_WIDTHS}},
    size_multiple=8,
    tiling="allowed",
    precision=("float32", "bfloat16"),
    keys=("body.0.body.0.body.blocks.0.attn.relative_position_bias_table", "tail.0.0.weight"),
    repeats=("n_rdstb", "dstb_per_rdstb", "stl_per_dstb"),
    loose_fields=("mlp_ratio",),
)

BICUBIC = Arch(
    id="bicubic",
    kind="baseline",
    title="Bicubic interpolation (a = -0.75)",
    paper="R. Keys, IEEE Trans. ASSP 29(6), 1981",
    licence="as medsr",
    scales=tuple(range(2, 9)),
    channels=(),
)

LANCZOS = Arch(
    id="lanczos",
    kind="baseline",
    title="Lanczos interpolation (three lobes)",
    paper="C. Duchon, J. Applied Meteorology 18(8), 1979",
    licence="as medsr",
    scales=tuple(range(2, 9)),
    channels=(),
)

CATALOGUE: tuple[Arch, ...] = (RDST, BICUBIC, LANCZOS)


def find(name: str) -> tuple[Arch, str | None]:
    """The method of a name, and the variant if the name is that of one alone (`rdst` is the method).

    Raises:
        ArgumentsError: there is no such method; the sentence lists those there are.
    """
    wanted = name.strip().lower()
    for arch in CATALOGUE:
        if arch.id == wanted:
            return arch, None
    for arch in CATALOGUE:
        if wanted in arch.variants:
            return arch, wanted
    known = names()
    near = get_close_matches(wanted, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    msg = f"There is no method called {name!r}."
    raise ArgumentsError(msg, f"{hint}There are: {', '.join(known)}.")


def names() -> list[str]:
    """Every name that `find` takes, methods before their variants."""
    listed: dict[str, None] = {}
    for arch in CATALOGUE:
        listed |= dict.fromkeys((arch.id, *arch.variants))
    return list(listed)


def detect(tensor_names: Collection[str]) -> list[Arch]:
    """The methods whose checkpoints have tensors of these names, in the catalogue's order."""
    return [arch for arch in CATALOGUE if arch.fits(tensor_names)]
