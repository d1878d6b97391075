"""What became of a batch: a line for each input, and what the process ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medsr_cli.errors import MedsrError, SomeInputsFailed
from medsr_cli.tasks.request import Item

NOT_BEGUN = "not begun"
"""Status of an input that a stopped batch did not come to."""


@dataclass(frozen=True)
class Finished:
    """What became of one input, as it is told."""

    item: Item
    id: str | None = None
    seconds: float = 0.0


@dataclass
class Tally:
    """What became of a batch in numbers, however many inputs it has."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    not_begun: int = 0
    first: MedsrError | None = None
    several_reasons: bool = False

    def add(self, item: Item) -> None:
        """Count one input."""
        if item.error is not None:
            self.several_reasons |= self.first is not None and item.error is not self.first
            self.first = self.first or item.error
            self.failed += 1
        elif item.status == NOT_BEGUN:
            self.not_begun += 1
        elif item.status == "skipped":
            self.skipped += 1
        else:
            self.done += 1

    @property
    def total(self) -> int:
        """All inputs."""
        return self.done + self.skipped + self.failed + self.not_begun

    def error(self) -> MedsrError | None:
        """What the process ends with: nothing, the only reason of all, or that some failed.

        Where a batch was stopped and nothing is done, the first failure says why.
        """
        if self.first is None:
            return None
        if not (self.done or self.skipped) and (self.not_begun or not self.several_reasons):
            return self.first
        rest = f"{self.not_begun} were not begun, " if self.not_begun else ""
        others = f"; {rest}the others are done" if self.done or self.skipped else ""
        return SomeInputsFailed(
            f"{self.failed} of {self.total} inputs failed{others}.", "The failures are listed above."
        )


def item_line(item: Item, ident: str | None = None, *, with_report: bool = False) -> dict[str, Any]:
    """The JSON line of one input, for standard output; `ident` is how the batch's record knows it."""
    line: dict[str, Any] = {
        "input": str(item.source),
        "output": str(item.output) if item.output else None,
        "status": item.status,
        "exit_code": item.error.exit_code if item.error else 0,
        "error": item.error.marked if item.error else None,
        "seconds": item.seconds,
        "id": ident,
        "warnings": item.warnings,
    }
    if item.series is not None:
        line["series"] = item.series
    if item.more_outputs and not item.error:
        line["beside"] = [str(path) for path in item.more_outputs]
    if with_report:
        line["report"] = item.report
    return line
