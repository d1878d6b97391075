"""What became of a routing hub's input, series by series: the content of `result.json`.

A hub keeps the file, shows it and sends parts of it by mail: series are numbers here, names of files are left out, and
nothing is taken from a source's tags but Modality, where it is one of the standard's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsr_cli import __version__
from medsr_cli.errors import MedsrError, replaced_mentions
from medsr_cli.provenance.record import IN_PLANE, NOTICE
from medsr_cli.tasks.request import Item

SOFTWARE = "medsr"


@dataclass
class SeriesFate:
    """What became of one series of the input."""

    number: int
    """Counted from 1; what the series is called wherever somebody may read it."""
    files: list[Path]
    images: int = 0
    modality: str = ""
    status: str = "left alone"
    """`enlarged`, `left alone` or `failed`."""
    reason: str | None = None
    """The predicate of a sentence."""
    folder: Path = Path()
    """Links to its files."""
    items: list[Item] = field(default_factory=list)
    """One for each stack."""
    derived: list[tuple[Path, str]] = field(default_factory=list)
    """Files of the result, and the names that they are delivered under."""

    def to_json(self) -> dict[str, Any]:
        """Without anything that the source's tags say of a person."""
        return {
            "series": self.number,
            "modality": self.modality,
            "images": self.images,
            "status": self.status,
            "reason": self.reason,
            "files_out": len(self.derived),
            "results": [_facts(item) for item in self.items if item.error is None],
            "warnings": self.warnings,
        }

    @property
    def warnings(self) -> list[str]:
        """Sentences, each once."""
        return list(dict.fromkeys(plain(sentence) for item in self.items for sentence in item.warnings))

    @property
    def errors(self) -> list[MedsrError]:
        """Why stacks of it have no result."""
        return [item.error for item in self.items if item.error is not None]


def _facts(item: Item) -> dict[str, Any]:
    """What made a result, and how well it agrees with its source."""
    model = item.report.get("model", {})
    facts = {name: model.get(name) for name in ("method", "scale", "checkpoint", "sha256", "engine", "device")}
    return {**facts, "consistency": item.report.get("consistency")}


@dataclass
class Outcome:
    """What `result.json` says."""

    fates: list[SeriesFate] = field(default_factory=list)
    files_in: int = 0
    files_kept: int = 0
    warnings: list[str] = field(default_factory=list)
    error: MedsrError | None = None

    def of_status(self, status: str) -> list[SeriesFate]:
        """Series that ended so."""
        return [fate for fate in self.fates if fate.status == status]

    @property
    def notification(self) -> str:
        """One line for whoever runs the hub."""
        made = self.of_status("enlarged")
        if self.error is not None:
            return f"medsr delivered nothing: {plain(self.error.marked)}"
        methods = sorted({str(_facts(item)["method"]) for fate in made for item in fate.items if item.error is None})
        parts = [f"{len(made)} of {len(self.fates)} series enlarged" + (f" with {', '.join(methods)}" if made else "")]
        parts += [f"{len(found)} {status}" for status in ("left alone", "failed") if (found := self.of_status(status))]
        warned = sum(bool(fate.warnings) for fate in made)
        parts += [f"{warned} with warnings"] if warned else []
        return f"medsr: {', '.join(parts)}. {NOTICE}"

    def to_json(self) -> dict[str, Any]:
        """The whole file."""
        made, failed = self.of_status("enlarged"), self.of_status("failed")
        warned = any(fate.warnings or fate.errors for fate in self.fates)
        return {
            "software": f"{SOFTWARE} {__version__}",
            "status": "done" if self.error is None else "refused" if self.error.exit_code == 6 else "failed",
            "exit_code": 0 if self.error is None else self.error.exit_code,
            "error": None if self.error is None else plain(self.error.marked),
            "notice": NOTICE,
            "limits": IN_PLANE,
            "counts": {
                "series": len(self.fates),
                "enlarged": len(made),
                "left_alone": len(self.of_status("left alone")),
                "failed": len(failed),
                "files_in": self.files_in,
                "files_out": 0 if self.error else sum(len(fate.derived) for fate in made),
                "files_kept": 0 if self.error else self.files_kept,
            },
            "series": [fate.to_json() for fate in self.fates],
            "warnings": [plain(sentence) for sentence in self.warnings],
            "__mercure_notification": {
                "text": self.notification,
                "requested": bool(warned or failed or self.warnings or self.error),
            },
        }


def plain(sentence: str) -> str:
    """A sentence without names of files: a hub keeps and sends what `result.json` says."""
    return replaced_mentions(sentence, lambda _: "a file")
