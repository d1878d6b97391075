"""What is in an image, or in every stack of a DICOM study, without running anything on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli import formats
from medsr_cli.errors import InputRefused, mention, unmarked
from medsr_cli.formats.contract import Reader, ReadOptions
from medsr_cli.formats.sniff import sniff
from medsr_cli.networks.catalogue import find
from medsr_cli.tasks.study import suitable
from medsr_cli.tasks.weights import list_weights
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.formats.dicom_series import StackSummary


@dataclass
class InspectedStack:
    """One stack of a DICOM input."""

    series: int
    stack: int
    selector: str
    """What `--series` takes for it."""
    uid: str
    """SeriesInstanceUID; for standard output only."""
    upscaled: bool
    """Whether `medsr upscale` takes it when no other is named."""
    reason: str | None
    """Why it is not, or only when it is named: the predicate of a sentence."""
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "series": self.series,
            "stack": self.stack,
            "selector": self.selector,
            "series_instance_uid": self.uid or None,
            **self.facts,
            "upscaled": self.upscaled,
            "reason": self.reason,
            "warnings": self.warnings,
        }


@dataclass
class Inspected:
    """Facts of one image or of the stacks of a study, or the reason why it is refused."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)
    stacks: list[InspectedStack] = field(default_factory=list)
    """Of a DICOM input; the facts above are those of the only one that is upscaled, none where several are."""
    error: InputRefused | None = None
    """Set where nothing can be done with it."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        refused = str(self.error) if self.error else None
        return {
            "input": str(self.path),
            **self.facts,
            **({"stacks": [stack.to_json() for stack in self.stacks]} if self.stacks else {}),
            "warnings": self.warnings,
            "usable": self.usable,
            "refused": refused,
        }


def inspect_image(path: Path, axis: str = "auto", series: str | None = None) -> Inspected:
    """Open an image, or each stack of a study, and say what it is.

    A refusal is in the result, so that the next one can follow.
    """
    found = Inspected(path)
    options = ReadOptions(axis, series)
    try:
        opened = _each_stack(found, options) if sniff(path).name == "dicom" else []
        if len(opened) != 1 and not any(stack.upscaled for stack in found.stacks):
            opened = [formats.open_image(path, options)]
        if len(opened) == 1:
            found.facts = facts_of(opened[0].volume) | dict(opened[0].details())
            found.warnings = list(opened[0].volume.warnings)
    except InputRefused as error:
        found.error = error
        return found
    by_modality = {reader.volume.modality: reader.volume for reader in opened}
    lines = [line for volume in by_modality.values() for line in usable_checkpoints(volume)]
    found.usable = list(dict.fromkeys(lines))
    return found


def _each_stack(found: Inspected, options: ReadOptions) -> list[Reader]:
    """List the stacks of a DICOM input; returns those that are upscaled, opened."""
    from medsr_cli.formats.dicom_series import named_stacks, study_of  # it imports pydicom

    study = study_of(found.path, options)
    meant = study.stacks if options.series is None else named_stacks(study, options.series)
    taken = suitable(meant, named=options.series is not None)
    opened: list[Reader] = []
    for summary in meant:
        stack = _described(summary)
        found.stacks.append(stack)
        if study.unreadable:
            stack.reason = stack.reason or "may lack slices, for some files cannot be read"
        if summary.refusal is not None or study.unreadable:
            continue
        try:
            selector = summary.selector if len(study.stacks) > 1 else options.series
            reader = formats.open_image(found.path, replace(options, series=selector))
        except InputRefused as error:
            stack.reason = predicate(error, found.path)
            continue
        stack.upscaled = summary in taken
        stack.facts |= stack_facts(reader)
        stack.warnings = list(reader.volume.warnings)
        if stack.upscaled:
            opened.append(reader)
    return opened


def _described(summary: StackSummary) -> InspectedStack:
    """What the headers say before a stack is opened."""
    facts = {
        "images": summary.images,
        "rows x columns": f"{summary.rows} x {summary.columns}",
        "modality": summary.modality or "not stated",
        "transfer_syntax": summary.transfer_syntax,
    }
    reason = summary.refusal or summary.aside
    return InspectedStack(summary.series, summary.stack, summary.selector, summary.uid, False, reason, facts)


def stack_facts(reader: Reader) -> dict[str, Any]:
    """Spacing and tilt of an opened stack."""
    known, details = facts_of(reader.volume), reader.details()
    facts = {name: known[name] for name in ("pixel spacing", "slice spacing")}
    return facts | ({"gantry_tilt_degrees": tilt} if (tilt := details.get("gantry_tilt_degrees")) else {})


def predicate(error: InputRefused, path: Path) -> str:
    """The sentence of a refusal without the name of the file that it begins with, and without its full stop."""
    return unmarked(error.sentence.removeprefix(mention(path.name))).strip().removesuffix(".")


def facts_of(volume: Volume) -> dict[str, Any]:
    """Geometry and type in the words of a report."""
    spacing = volume.spacing_mm
    return {
        "format": volume.format,
        "slices": volume.slices,
        "rows x columns": f"{volume.rows} x {volume.columns}",
        "slice axis": volume.slice_axis,
        "pixel spacing": f"{spacing[0]:.4g} x {spacing[1]:.4g} mm" if spacing else "not stated",
        "slice spacing": f"{volume.slice_spacing_mm:.4g} mm" if volume.slice_spacing_mm else "not stated",
        "type": str(volume.dtype),
        "channels": volume.channels,
        "modality": volume.modality or "not stated",
    }


def usable_checkpoints(volume: Volume) -> list[str]:
    """Checkpoints on this machine that suit the image's modality."""
    lines = []
    for row in list_weights():
        entry = row.entry
        suits = volume.modality in (None, entry.modality) or entry.modality == "any"
        suits = suits and find(entry.method)[0].kind == "network"
        if suits and row.state not in ("missing", "corrupt"):
            scales = ", ".join(f"x{words}" for words in entry.scale_words)
            lines.append(f"{scales} with {entry.id} ({entry.body_part} {entry.modality.upper()})")
    return lines
