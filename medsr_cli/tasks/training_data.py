"""The images of a training: found, packed into one file, and split by subject."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.tasks.finetune import FinetuneRequest, FinetuneResult, Watcher, task_of

if TYPE_CHECKING:
    from medsr_cli.formats.contract import Reader
    from medsr_cli.training.companions import Rules
    from medsr_cli.training.gather import Found
    from medsr_cli.training.pack import PackedSlices
    from medsr_cli.training.recipe import Recipe
    from medsr_cli.training.validation import Indices
    from medsr_cli.training.workfolder import WorkFolder

COLOURS = 3
"""Channels of a colour image."""


@dataclass(frozen=True)
class Split:
    """Packed slices, and which of them are trained and validated on."""

    slices: PackedSlices
    path: Path
    train: Indices
    held: Indices
    subjects: Sequence[str]
    held_subjects: Sequence[str]

    @property
    def given(self) -> tuple[float, float]:
        """Shares of the slices to train and to validate on whose low-resolution images came with the data."""
        parts = (self.train, self.held)
        train, held = (len(self.slices.with_role("low", part)) / max(len(part), 1) for part in parts)
        return train, held

    @property
    def in_words(self) -> str:
        """For the log."""
        return (
            f"{len(self.slices.volumes)} volumes, {len(self.slices)} slices: {len(self.train)} of "
            f"{len(self.subjects)} subjects to train on, {len(self.held)} of {len(self.held_subjects)} to validate on."
        )


def pack_only(request: FinetuneRequest, watcher: Watcher) -> FinetuneResult:
    """Write the packed file as the result; masks go along whatever they are for.

    Raises:
        ArgumentsError: the output exists, or the folder is a file.
        InputRefused: no image could be used.
    """
    if request.output.exists() and not request.overwrite:
        msg = f"{mention(request.output)} exists."
        raise ArgumentsError(msg, "Give --overwrite to replace it, or another -o.")
    if request.folder.is_file():
        msg = f"{mention(request.folder.name)} is one file already."
        raise ArgumentsError(msg, "Give a folder of images to pack.")
    notes = pack(request, request.output, watcher, labels=True)
    return FinetuneResult(request.output, notes=notes)


def packed_file(request: FinetuneRequest, recipe: Recipe, work: WorkFolder, watcher: Watcher) -> Path:
    """The packed slices: the file that was given, the one of the run that goes on, or a new one."""
    if request.folder.is_file():
        if request.validation is not None:
            msg = "A packed file holds its validation images already."
            raise ArgumentsError(msg, "Leave --val away; --val-subject chooses among its subjects.")
        return request.folder
    if not work.pack.exists():
        pack(request, work.pack, watcher, labels=wants_labels(request, recipe))
    return work.pack


def split(
    request: FinetuneRequest, recipe: Recipe, path: Path, chosen: Sequence[str], numbers: Sequence[str] = ()
) -> Split:
    """Open a packed file and share its subjects out.

    Args:
        request: for the method.
        recipe: for what it needs of the images.
        path: the packed file.
        chosen: patterns of the subjects to validate on, or none.
        numbers: what a run that goes on wrote down of its own split; it holds unless there are patterns.

    Raises:
        InputRefused: fewer than two subjects, or no guide or label for a method that needs them.
        ArgumentsError: one side of the split is empty.
    """
    from medsr_cli.training.gather import split_subjects
    from medsr_cli.training.pack import PackedSlices
    from medsr_cli.training.workfolder import subjects_of

    slices = PackedSlices(path)
    held_subjects = [] if chosen else subjects_of(slices.subjects, numbers)
    if held_subjects:
        subjects = [subject for subject in slices.subjects if subject not in held_subjects]
    else:
        subjects, held_subjects = split_subjects(slices.subjects, chosen)
    found = Split(slices, path, slices.indices_of(subjects), slices.indices_of(held_subjects), subjects, held_subjects)
    if "guide" in request.arch.needs:
        found = _only_with_guide(found)
    if wants_labels(request, recipe):
        _refuse_unlabelled(request, found)
    return found


def wants_labels(request: FinetuneRequest, recipe: Recipe) -> bool:
    """Whether masks or label maps are needed: to learn them, or to know where lesions are."""
    return task_of(request.arch) != "super-resolution" or any(stage.region == "lesion" for stage in recipe.stages)


def _only_with_guide(found: Split) -> Split:
    train, held = (found.slices.with_role("guide", indices) for indices in (found.train, found.held))
    if not len(train) or not len(held):
        where = "train" if not len(train) else "validate"
        msg = f"No slice of the subjects to {where} on has a guide, only a target or a guide without its partner."
        raise InputRefused(msg, "Register a T1 image to each target; --target and --guide-name take patterns.")
    return dataclasses.replace(found, train=train, held=held)


def _refuse_unlabelled(request: FinetuneRequest, found: Split) -> None:
    for indices, what in ((found.train, "train"), (found.held, "validate")):
        labelled = found.slices.with_role("labels", indices)
        if not any(found.slices.labels_of(int(i)).any() for i in labelled):
            msg = f"No slice of the subjects to {what} on has a labelled pixel, which {request.arch.id} learns from."
            raise InputRefused(msg, "Put a mask (called mask, seg or label) beside each image; --mask takes patterns.")


def pack(request: FinetuneRequest, target: Path, watcher: Watcher, *, labels: bool) -> list[str]:
    """Read the folders into a packed file; returns why images were left out.

    Raises:
        InputRefused: no image could be used, or channels are mixed.
    """
    from medsr_cli.training.companions import in_brief
    from medsr_cli.training.gather import pack_images
    from medsr_cli.training.reading import PackOptions

    low = request.low
    if low is not None and (not low.is_dir() or low.resolve() == request.folder.resolve()):
        msg = f"{mention(low)} is no folder." if not low.is_dir() else "--low is the folder of the images itself."
        raise ArgumentsError(msg, "Give a folder that has the low-resolution images under the same names.")
    rules = _rules(request, labels=labels)
    found, skipped = _search(request, request.folder, rules, watcher)
    if request.validation is not None:
        if not request.validation.is_dir():
            msg = f"{mention(request.validation)} is no folder."
            raise ArgumentsError(msg, "Give a folder of images to validate on.")
        # Captions and low-resolution folder are those of the images to train on.
        own = dataclasses.replace(rules, captions=None, low=None)
        held, more = _search(request, request.validation, own, watcher)
        skipped += more
        if any(image.low for image in found) != any(image.low for image in held):
            told = "validate" if any(image.low for image in found) else "train"
            watcher.note(f"Low-resolution images are made for those to {told} on; the others have their own.")
        _note_shared_names(found, held, watcher)
        found += [dataclasses.replace(image, validation=True) for image in held]
    for sentence in in_brief(skipped):
        watcher.note(sentence)
    options = PackOptions(
        channels=COLOURS if request.arch.channels == (COLOURS,) else 1, full_scale=request.arch.full_scale
    )
    gathered = pack_images(
        found, lambda image: _opened(request, image), target, watcher, overwrite=request.overwrite, options=options
    )
    return [*skipped, *gathered.skipped]


def _rules(request: FinetuneRequest, *, labels: bool) -> Rules:
    from medsr_cli.training.companions import TARGETS, Rules

    return Rules(
        labels=labels,
        label_names=request.masks,
        guided="guide" in request.arch.needs,
        targets=request.targets or TARGETS,
        guides=request.guides,
        low=request.low,
        scale=request.scale or 0,
        contrasts=request.contrasts,
        captions=request.captions,
    )


def _search(request: FinetuneRequest, folder: Path, rules: Rules, watcher: Watcher) -> tuple[list[Found], list[str]]:
    """Images of a folder with what belongs to each, and why others were left out."""
    from medsr_cli import formats
    from medsr_cli.tasks.evaluation_inputs import series_of
    from medsr_cli.training.companions import TOLD, attach
    from medsr_cli.training.gather import find_tree

    tree = find_tree(folder, formats.is_image_name, request.include, request.exclude, series_of)
    if not tree.images:
        others = f" but {len(tree.results)} results of medsr upscale" if tree.results else ""
        msg = f"No image{others} was found in {mention(folder.name)}."
        raise InputRefused(msg, "Give a folder with NIfTI, DICOM, NRRD or PNG images; --include takes patterns.")
    attached = attach(tree, rules, lambda image: _opened(request, image))
    for note in attached.notes[:TOLD]:
        watcher.note(note)
    return attached.images, attached.skipped


def _opened(request: FinetuneRequest, image: Found) -> Reader:
    from medsr_cli import formats
    from medsr_cli.formats.contract import ReadOptions

    return formats.open_image(image.path, ReadOptions(axis=request.axis, series=image.series))


def _note_shared_names(found: Sequence[Found], held: Sequence[Found], watcher: Watcher) -> None:
    from medsr_cli.training.sessions import without_session

    shared = set.intersection(*({without_session(image.subject) for image in images} for images in (found, held)))
    if shared:
        watcher.note(
            f"{len(shared)} subjects have the same name in both folders; make sure that they are different people."
        )
