"""What of a study is upscaled: every stack that suits, or what `--series` names; the others with their reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import InputRefused
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.sniff import sniff

if TYPE_CHECKING:
    from medsr_cli.formats.dicom_series import StackSummary


@dataclass(frozen=True)
class Chosen:
    """One opening of a path."""

    selector: str | None
    """For `ReadOptions.series`; None opens the path as it is."""
    folder_name: str = ""
    """Folder for its result within the study's, empty where the path has one result; made of numbers alone."""
    stack: int = 1
    """Which stack of its series."""

    def options(self, options: ReadOptions) -> ReadOptions:
        """The same options, for this stack."""
        return options if self.selector is None else replace(options, series=self.selector)


@dataclass(frozen=True)
class Left:
    """A stack that is not upscaled."""

    selector: str
    title: str
    """`Series 2`, or `Series 2, stack 1`."""
    reason: str
    """The predicate of a sentence."""
    refused: bool
    """Whether it cannot be upscaled, also not when it is named."""

    def sentence(self) -> str:
        """For a person; holds no UID and no text that a person wrote."""
        if self.refused:
            return f"{self.title} {self.reason}."
        return f"{self.title} {self.reason}: name it with --series {self.selector} to have it all the same."


@dataclass(frozen=True)
class StudyPlan:
    """What to open, one after the other, and what is left."""

    todo: tuple[Chosen, ...]
    """At least one; where nothing can be upscaled, opening it says why."""
    left: tuple[Left, ...] = ()

    @property
    def several(self) -> bool:
        """Whether the path has more than one result."""
        return len(self.todo) > 1


def series_of(path: Path, options: ReadOptions) -> StudyPlan:
    """What of a path is upscaled.

    Headers of a DICOM path are read, and kept for the openings that follow; of any other path only the first bytes are.
    Whatever is wrong with the path is left to its opening, which refuses it with the reason.

    Args:
        path: an image, a DICOM folder or a zip archive.
        options: `series` names a stack, or a series, all stacks of which are meant then.
    """
    as_it_is = StudyPlan((Chosen(options.series),))
    try:
        if sniff(path).name != "dicom":
            return as_it_is
        from medsr_cli.formats.dicom_series import named_stacks, study_of

        study = study_of(path, options)
        meant = study.stacks if options.series is None else named_stacks(study, options.series)
    except InputRefused:
        return as_it_is
    todo = suitable(meant, named=options.series is not None)
    if study.unreadable or not todo:
        return as_it_is
    left = tuple(
        Left(stack.selector, stack.title, stack.refusal or stack.aside or "", stack.refusal is not None)
        for stack in meant
        if stack not in todo
    )
    if len(study.stacks) == 1:
        return as_it_is
    if len(todo) == 1:
        return StudyPlan((Chosen(todo[0].selector, stack=todo[0].stack),), left)
    return StudyPlan(tuple(Chosen(stack.selector, folder_name(stack), stack.stack) for stack in todo), left)


def suitable(stacks: Sequence[StackSummary], *, named: bool = False) -> tuple[StackSummary, ...]:
    """The stacks that are upscaled: what can be, and is an image for reading unless it was named.

    Localisers, results of medsr and saved screens are left; where such a stack is the only one that can be upscaled, it
    is what was meant.
    """
    usable = tuple(stack for stack in stacks if stack.refusal is None)
    if named:
        return usable
    ordinary = tuple(stack for stack in usable if stack.aside is None)
    return ordinary or (usable if len(usable) == 1 else ())


def folder_name(stack: StackSummary) -> str:
    """`series-01`, or `series-01-stack-2` in a series of several; no part of a tag is in it."""
    name = f"series-{stack.series:02d}"
    return f"{name}-stack-{stack.stack}" if stack.stacks > 1 else name


def selector_of(name: str) -> str | None:
    """What `--series` calls the stack whose results are in a folder of this name; None for other names."""
    found = re.fullmatch(r"series-([0-9]+)(?:-stack-([0-9]+))?", name)
    if found is None:
        return None
    return f"{int(found[1])}#{found[2]}" if found[2] else str(int(found[1]))
