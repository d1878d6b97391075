"""What methods there are, read from the catalogue and the manifest; costs are counted only when asked for."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from medsr_cli.errors import ArgumentsError
from medsr_cli.networks import catalogue
from medsr_cli.tasks.weights import Listed, list_weights

TILING = {
    "exact": "large slices go by tiles, with the same result",
    "blended": "large slices go by overlapping tiles on the window grid, blended",
    "inexact": "whole slices; tiles only where memory is short, with a warning, since statistics of the whole "
    "image change",
    "fixed": "one size only: every slice goes by tiles of it, blended",
}


@dataclass(frozen=True)
class MethodFacts:
    """One method and its checkpoints."""

    id: str
    title: str
    paper: str
    licence: str
    kind: str
    scales: tuple[float, ...]
    scale_range: tuple[float, float] | None
    channels: tuple[int, ...]
    needs: tuple[str, ...]
    smallest: int
    size_multiple: int
    tiling: str
    precision: tuple[str, ...]
    degradation: str
    summary: str
    authors: str
    claims: tuple[str, ...]
    warning: str
    parameters: dict[str, int] = field(default_factory=dict)
    cost: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def describe_models(name: str | None = None, size: tuple[int, int] | None = None) -> list[MethodFacts]:
    """Every method, or those that a name stands for.

    Args:
        name: a method, a variant or a family; None for all.
        size: rows and columns of a slice to count the cost of; needs a name.

    Raises:
        ArgumentsError: there is no such method.
        WeightsError: the manifest is invalid.
    """
    wanted = catalogue.named(name) if name else list(catalogue.CATALOGUE)
    listed = list_weights()
    return [_facts(arch, listed, size if name else None) for arch in wanted]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`RxC`, rows before columns.

    Raises:
        ArgumentsError: it is not of this form.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        msg = f"--size {text} is no size."
        raise ArgumentsError(msg, "Give rows and columns of a slice, such as 64x64.")
    return int(found[1]), int(found[2])


def _facts(arch: catalogue.Arch, listed: list[Listed], size: tuple[int, int] | None) -> MethodFacts:
    return MethodFacts(
        id=arch.id,
        title=arch.title,
        paper=arch.paper,
        licence=arch.licence,
        kind=arch.kind,
        scales=arch.scales,
        scale_range=arch.scale_range,
        channels=arch.channels,
        needs=arch.needs,
        smallest=arch.smallest,
        size_multiple=arch.size_multiple,
        tiling=TILING[arch.tiling],
        precision=arch.precision,
        degradation=arch.degradation,
        summary=arch.summary,
        authors=arch.authors,
        claims=arch.claims,
        warning=arch.warning,
        parameters=dict(arch.parameters),
        cost=_costs(arch, size) if size and arch.kind == "network" else [],
        checkpoints=[_checkpoint(row) for row in listed if row.entry.method == arch.id],
    )


def _costs(arch: catalogue.Arch, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Parameters and operations of every variant at every scale, for one slice."""
    from medsr_cli.networks.cost import cost_of

    rows: list[dict[str, Any]] = []
    for variant in arch.variants or [None]:
        for scale in arch.scales:
            cost = cost_of(arch, variant, scale, *size)
            rows.append(
                {
                    "variant": variant or arch.id,
                    "scale": scale,
                    "rows": cost.rows,
                    "columns": cost.columns,
                    "parameters": cost.parameters,
                    "gmacs": cost.macs / 1e9,
                    "gflops": 2 * cost.macs / 1e9,
                }
            )
    return rows


def _checkpoint(row: Listed) -> dict[str, Any]:
    entry = row.entry
    gains = [v.psnr - v.bicubic_psnr for v in entry.validation]
    return {
        "id": entry.id,
        "variant": entry.variant,
        "scales": list(entry.scales),
        "scale_range": list(entry.scale_range) if entry.scale_range else None,
        "for": f"{entry.body_part} {entry.modality.upper()}",
        "state": row.state,
        "gain_db": sum(gains) / len(gains) if gains else None,
        "degradation": entry.degradation,
        "trained_on": entry.trained_on,
        "licence": asdict(entry.licence),
        "validation": [asdict(v) for v in entry.validation],
        "date": entry.date,
        "notes": entry.notes,
    }
