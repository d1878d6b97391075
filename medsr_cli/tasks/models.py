"""What methods there are, read from the catalogue and the manifest alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from medsr_cli.networks import catalogue
from medsr_cli.tasks.weights import Listed, list_weights

SIZES = {"rdst": "4,464,965 parameters, 8 dense blocks", "rdst-e": "2,379,245 parameters, 4 dense blocks"}
"""As the networks count themselves; a test builds each and compares."""


@dataclass(frozen=True)
class MethodFacts:
    """One method and its checkpoints."""

    id: str
    title: str
    paper: str
    licence: str
    learned: bool
    scales: tuple[float, ...]
    parameters: dict[str, str] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def describe_models(name: str | None = None) -> list[MethodFacts]:
    """Every method, or the one that is named.

    Raises:
        ArgumentsError: there is no such method.
        WeightsError: the manifest is invalid.
    """
    wanted = catalogue.find(name)[0] if name else None
    listed = list_weights()
    return [_facts(arch, listed) for arch in catalogue.CATALOGUE if wanted in (None, arch)]


def _facts(arch: catalogue.Arch, listed: list[Listed]) -> MethodFacts:
    return MethodFacts(
        id=arch.id,
        title=arch.title,
        paper=arch.paper,
        licence=arch.licence,
        learned=arch.kind == "network",
        scales=arch.scales,
        parameters={variant: SIZES[variant] for variant in arch.variants if variant in SIZES},
        checkpoints=[_checkpoint(row) for row in listed if row.entry.method == arch.id],
    )


def _checkpoint(row: Listed) -> dict[str, Any]:
    entry = row.entry
    gains = [v.psnr - v.bicubic_psnr for v in entry.validation]
    return {
        "id": entry.id,
        "variant": entry.variant,
        "scales": list(entry.scales),
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
