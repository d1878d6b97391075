"""Who belongs to whom: masks, guides, low-resolution partners, further contrasts and captions of the images found.

Names say who may belong together, headers decide it: a companion has the image's rows, columns and slices, and its
place in the patient where both say one. What does not fit is told and not used.

- A mask of the same folder whose name begins with an image's name belongs to that image (`0059_lv_mask.png`); any
  other mask belongs to every image of its folder on its grid (`lesion_mask.nii.gz`), or, from a folder without
  images (BIDS derivatives), to those of its subject and session.
- A guide is called `T1_in_T2` for the target T2 of its folder, or is a T1 on the grid of a T2 or FLAIR.
- A low-resolution partner has the image's path in a second folder, or its name and `_lr`; its grid is the image's
  at the scale, edges aligned.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np

from medsr_cli.errors import ArgumentsError, InputRefused, mention
from medsr_cli.formats import is_image_name, stem_of_name
from medsr_cli.formats.contract import Reader
from medsr_cli.training.captions import read_captions
from medsr_cli.training.gather import Found, Tree, left_out_by_name
from medsr_cli.training.partners import misplaced
from medsr_cli.volume.volume import Volume

TARGETS = ("T2*", "FLAIR*")
GUIDES = ("T1*",)
WITH_CONTRAST_AGENT = ("*POST*", "T1C*", "T1*GD*", "*CE-*")
"""Images that are no guides unless they are asked for by name: a contrast agent shows what the target does not."""
SAME_PLACE = 0.05
"""How far apart, in voxels, the corners of two equal grids may lie."""
TOLD = 3
"""Pairs that were found, and files left out, that are told one by one."""

_ON_GRID_OF = re.compile(r"(?P<contrast>.+)_in_(?P<target>.+)", re.IGNORECASE)
_LOW = re.compile(r"(?P<stem>.+)_lr", re.IGNORECASE)
_SESSION = re.compile(r"(?:^|[/_])(ses-[A-Za-z0-9]+)")
OpenReader = Callable[[Found], Reader]


@dataclass(frozen=True)
class Rules:
    """What is looked for beside the images."""

    labels: bool = True
    label_names: Sequence[str] = ()
    """Patterns of the masks to use; none takes any."""
    guided: bool = False
    """Whether only pairs of a target and a guide are taken."""
    targets: Sequence[str] = TARGETS
    guides: Sequence[str] = ()
    """Patterns of the guides' names; none takes T1 without contrast agent."""
    low: Path | None = None
    """A folder of low-resolution images with the same relative names."""
    scale: int = 0
    """How much larger than its low-resolution partner an image has to be; 0 takes no partners."""
    contrasts: Sequence[str] = ()
    """Patterns of registered images of one folder that become the channels of one image, in this order."""
    captions: Path | None = None
    """A text file with a line for each image, in the order of their names."""


@dataclass
class Attached:
    """The images to pack, each with what belongs to it."""

    images: list[Found]
    notes: list[str] = field(default_factory=list)
    """Pairs, contrasts and captions that were found; masks and partners are counted when they are read."""
    skipped: list[str] = field(default_factory=list)
    """A sentence for each file that was left out or is not used."""
    unguided: dict[str, str] = field(default_factory=dict)
    """The sentence for each target without a guide, by the target's name; it is among `skipped` too."""


def attach(tree: Tree, rules: Rules, open_reader: OpenReader) -> Attached:
    """Find what belongs to the images of a folder; reads headers alone.

    Raises:
        InputRefused: pairs, contrasts or low-resolution images were asked for and there are none; channels are
            mixed; the captions are not as many as the images.
    """
    grids = _Grids(open_reader)
    attached = Attached(list(tree.images), list(tree.notes), list(tree.results))
    _attach_low(attached, rules, grids)
    if rules.contrasts:
        _join_contrasts(attached, rules, grids)
    if rules.guided:
        _attach_guides(attached, rules, grids)
    if rules.labels:
        _attach_labels(attached, tree, rules, grids)
    else:
        attached.skipped += [left_out_by_name(mask.name) for mask in tree.labels]
    if rules.captions is not None:
        _attach_captions(attached, rules.captions)
    return attached


def in_brief(sentences: Sequence[str]) -> list[str]:
    """The first few sentences about files left out, and how many more there are; masks come by the hundred."""
    more = len(sentences) - TOLD
    return [*sentences[:TOLD], *([f"{more} more were left out or are not used."] if more > 0 else [])]


# -- grids -------------------------------------------------------------------------------------------------


class _Grids:
    """The headers of files, each opened once."""

    def __init__(self, open_reader: OpenReader) -> None:
        self._open = open_reader
        self._known: dict[tuple[Path, str | None], Volume | InputRefused] = {}

    def of(self, image: Found) -> Volume:
        """
        Raises:
            InputRefused: it cannot be opened.
        """
        key = (image.path, image.series)
        if key not in self._known:
            try:
                self._known[key] = self._open(image).volume
            except InputRefused as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, InputRefused):
            raise known
        return known

    def misfit(self, image: Found, companion: Found) -> str | None:
        """Why a companion is not on an image's grid; None if it is, or if the image itself cannot be opened."""
        try:
            theirs = self.of(companion)
        except InputRefused as error:
            return error.sentence
        try:
            return misfit(self.of(image), theirs)
        except InputRefused:
            return None  # told when the image is read

    def placed(self, image: Found) -> bool:
        """Whether the header says where it lies."""
        try:
            return self.of(image).affine is not None
        except InputRefused:
            return False


def misfit(image: Volume, companion: Volume) -> str | None:
    """Why two images are not on one grid, a clause; None if they are."""
    ours, theirs = ((v.rows, v.columns, v.slices) for v in (image, companion))
    if ours != theirs:
        return f"it has {_in_words(theirs)} voxels, the image {_in_words(ours)}"
    if image.affine is None or companion.affine is None:
        one_only = (image.affine is None) != (companion.affine is None)
        return "only one of the two says where it lies" if one_only and image.slices > 1 else None
    if (image.slice_axis, image.plane_axes) != (companion.slice_axis, companion.plane_axes):
        return "its slices run along another axis"
    shape = (*image.array_shape, 1, 1, 1)[:3]
    corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])], float)
    apart = np.linalg.norm((corners @ (image.affine - companion.affine).T)[:, :3], axis=1).max()
    step = np.linalg.norm(image.affine[:3, :3], axis=0).min()
    # A comparison with NaN is false: what is nowhere does not fit.
    return None if apart <= SAME_PLACE * step else "it lies in another place"


def _in_words(size: tuple[int, int, int]) -> str:
    return " x ".join(str(n) for n in size)


def _folder(image: Found) -> PurePosixPath:
    return PurePosixPath(image.name).parent


def _stem(image: Found) -> str:
    return image.path.name if image.path.is_dir() else stem_of_name(image.path)


def is_called(image: Found, patterns: Sequence[str]) -> bool:
    """Whether an image's name, or the last part of a BIDS name, is like one of the patterns; case does not matter.

    A name may have its suffix; a pattern with a slash is held against the whole path.
    """
    stem = _stem(image).upper()
    last = stem.rsplit("_", 1)[-1] if stem.startswith("SUB-") else stem
    names = (stem, last, image.path.name.upper())
    return any(
        fnmatch(word, pattern.upper())
        for pattern in patterns
        for word in ((image.name.upper(),) if "/" in pattern else names)
    )


# -- low-resolution partners -------------------------------------------------------------------------------


def _attach_low(attached: Attached, rules: Rules, grids: _Grids) -> None:
    beside = _take_low_images(attached, rules)
    if rules.low is not None:
        inside = rules.low.resolve()
        attached.images = [image for image in attached.images if inside not in image.path.resolve().parents]
        if not rules.scale:
            msg = "Low-resolution images go with one scale."
            raise ArgumentsError(msg, "Give --scale, or leave --low away.")
        beside = {image.name: low for image in attached.images if (low := _in_second_folder(image, rules.low))}
    if not rules.scale or not (beside or rules.low):
        return
    paired, reasons = [], []
    for image in attached.images:
        low = beside.get(image.name)
        try:
            reason = "it has no low-resolution partner" if low is None else _unlike(image, low, rules.scale, grids)
        except InputRefused as error:
            reason = error.sentence.rstrip(".")
        if reason is None:
            paired.append(replace(image, low=low))
        else:
            reasons.append(f"{mention(image.name)} was left out: {reason}.")
    if not paired:
        msg = f"No image has a low-resolution partner of its size divided by {rules.scale}, and in its place."
        raise InputRefused(msg, reasons[0] if reasons else "")
    attached.images, attached.skipped = paired, attached.skipped + reasons


def _take_low_images(attached: Attached, rules: Rules) -> dict[str, Found]:
    """Take images called X_lr out of the list; the partner of each X by X's name."""
    by_place = {(_folder(image), _stem(image)): image for image in attached.images}
    partners: dict[str, Found] = {}
    rest = []
    for image in attached.images:
        low = _LOW.fullmatch(_stem(image))
        high = by_place.get((_folder(image), low["stem"])) if low else None
        if high is None:
            rest.append(image)
            continue
        partners[high.name] = image
        if not rules.scale or rules.low is not None:
            attached.skipped.append(
                f"{mention(image.name)} was left out: by its name it is {mention(high.name)} at low resolution."
            )
    attached.images = rest
    return partners


def _in_second_folder(image: Found, folder: Path) -> Found | None:
    """The file of the same relative name, whatever its format, with or without `_lr`."""
    same = folder / image.name
    if same.exists():
        return replace(image, path=same)
    wanted = {_stem(image).lower(), f"{_stem(image)}_lr".lower()}
    try:
        candidates = sorted(same.parent.iterdir())
    except OSError:
        return None
    for path in candidates:
        if is_image_name(path) and stem_of_name(path).lower() in wanted:
            return replace(image, path=path, series=None)
    return None


def _unlike(image: Found, low: Found, scale: int, grids: _Grids) -> str | None:
    """Why a file is not its low-resolution partner, a clause; None if it is."""
    reason = misplaced(grids.of(image), grids.of(low), scale)
    return None if reason is None else f"its partner {mention(low.path.name)} does not fit ({reason})"


# -- contrasts ---------------------------------------------------------------------------------------------


def _join_contrasts(attached: Attached, rules: Rules, grids: _Grids) -> None:
    """One image for each folder that has all contrasts."""
    folders: dict[PurePosixPath, list[Found]] = defaultdict(list)
    for image in attached.images:
        folders[_folder(image)].append(image)
    joined = []
    for folder, images in folders.items():
        chosen = [_shortest([image for image in images if is_called(image, [p])]) for p in rules.contrasts]
        if not any(chosen):
            attached.skipped.append(f"{mention(folder)} was left out: it has none of {', '.join(rules.contrasts)}.")
            continue
        missing = [pattern for pattern, image in zip(rules.contrasts, chosen, strict=True) if image is None]
        if missing:
            msg = (
                f"Channels are mixed: {mention(folder)} has no {' and no '.join(missing)}, but others of the contrasts."
            )
            raise InputRefused(msg, f'Leave it out with --exclude "{mention(folder)}/*", or name other contrasts.')
        first, *others = [image for image in chosen if image is not None]
        reasons = [(other, grids.misfit(first, other)) for other in others]
        wrong = next(((other, reason) for other, reason in reasons if reason is not None), None)
        if wrong is not None:
            attached.skipped.append(
                f"{mention(folder)} was left out: {mention(wrong[0].path.name)} is on another grid ({wrong[1]})."
            )
            continue
        joined.append(replace(first, contrasts=tuple(others)))
    if not joined:
        msg = f"No folder has {', '.join(rules.contrasts)} on one grid."
        raise InputRefused(msg, "Register the contrasts first, or name others.")
    attached.images = joined
    attached.notes.append(f"{len(joined)} folders have the contrasts {', '.join(rules.contrasts)} on one grid.")


def _shortest(images: Sequence[Found]) -> Found | None:
    return min(images, key=lambda image: (len(_stem(image)), image.name), default=None)


# -- guides ------------------------------------------------------------------------------------------------


def _attach_guides(attached: Attached, rules: Rules, grids: _Grids) -> None:
    """Keep the targets that have a guide."""
    pairs, others = [], 0
    for image in attached.images:
        if not is_called(image, rules.targets) or _ON_GRID_OF.fullmatch(_stem(image)):
            others += 1
            continue
        guide, reason = _guide_of(image, attached.images, rules, grids)
        if guide is not None:
            pairs.append(replace(image, guide=guide))
            attached.notes.append(f"{mention(guide.name)} guides {mention(image.name)}.")
        else:
            attached.unguided[image.name] = f"{mention(image.name)} was left out: {reason}."
    attached.skipped += attached.unguided.values()
    if not pairs:
        msg = (
            f"Among {len(attached.images)} images there is no pair of a target and a guide on its grid, only a target "
            "or a guide without its partner."
        )
        raise InputRefused(msg, "Register the guide to the target first; --target and --guide-name take patterns.")
    if others:
        attached.notes.append(f"{others} images are no targets.")
    attached.images = pairs


def _guide_of(target: Found, images: Sequence[Found], rules: Rules, grids: _Grids) -> tuple[Found | None, str]:
    """The guide of a target, or why it has none."""
    named, plain = [], []
    for image in images:
        if _folder(image) != _folder(target) or image.name == target.name or not _may_guide(image, rules):
            continue
        on_grid = _ON_GRID_OF.fullmatch(_stem(image))
        if on_grid is None:
            plain.append(image)
        elif on_grid["target"].upper() == _stem(target).upper():
            named.append(image)
    reasons = []
    for image in (*named, *sorted(plain, key=lambda image: (len(_stem(image)), image.name))):
        reason = grids.misfit(target, image)
        if reason is None:
            return image, ""
        reasons.append(f"{mention(image.path.name)} does not fit ({reason})")
    return None, "it has no guide in its folder" + "".join(f"; {reason}" for reason in reasons)


def _may_guide(image: Found, rules: Rules) -> bool:
    if rules.guides:
        return is_called(image, rules.guides)
    return is_called(image, GUIDES) and not is_called(image, WITH_CONTRAST_AGENT)


# -- masks -------------------------------------------------------------------------------------------------


def _attach_labels(attached: Attached, tree: Tree, rules: Rules, grids: _Grids) -> None:
    """Give each image the first mask that belongs to it; those named after it come before those of its folder."""
    wanted = [mask for mask in tree.labels if not rules.label_names or is_called(mask, rules.label_names)]
    others = {image.name for image in tree.others}
    found: dict[str, list[tuple[bool, Found]]] = defaultdict(list)
    for mask in wanted:
        images, own = _owners(mask, [*attached.images, *tree.others], grids)
        if images and all(image.name in others for image in images):
            continue  # that of an image that was not asked for
        reasons = [(image, grids.misfit(image, mask)) for image in images if image.name not in others]
        fitting = [image for image, reason in reasons if reason is None]
        if fitting:
            for image in fitting:
                found[image.name].append((not own, mask))
            continue
        why = f": {reasons[0][1]}" if reasons else ""
        attached.skipped.append(f"{mention(mask.name)} is not used: it fits no image by name and grid{why}.")
    chosen = {name: min(candidates, key=lambda c: (c[0], c[1].name))[1] for name, candidates in found.items()}
    unused = {mask.name for candidates in found.values() for _, mask in candidates}
    for name in sorted(unused - {mask.name for mask in chosen.values()}):
        attached.skipped.append(f"{mention(name)} is not used: its images have another mask already.")
    attached.images = [replace(image, labels=chosen.get(image.name)) for image in attached.images]


def _owners(mask: Found, images: Sequence[Found], grids: _Grids) -> tuple[list[Found], bool]:
    """Images that a mask may belong to, and whether it is named after them."""
    near = [image for image in images if _folder(image) == _folder(mask)]
    if not near and mask.subject.startswith("sub-"):
        near = [i for i in images if i.subject == mask.subject and _session(i) == _session(mask)]
    named = [image for image in near if _is_named_after(mask, image)]
    if named:
        longest = max(len(_stem(image)) for image in named)
        return [image for image in named if len(_stem(image)) == longest], True
    if grids.placed(mask) or len(near) == 1:
        return near, False
    return [], False  # a picture without a place fits every other of its size


def _is_named_after(mask: Found, image: Found) -> bool:
    stem, other = _stem(image).lower(), _stem(mask).lower()
    return other.startswith(stem) and not other[len(stem) : len(stem) + 1].isalnum()


def _session(image: Found) -> str | None:
    found = _SESSION.search(image.name)
    return found[1] if found else None


# -- captions ----------------------------------------------------------------------------------------------


def _attach_captions(attached: Attached, path: Path) -> None:
    captions = read_captions(path)
    if len(captions) != len(attached.images):
        msg = f"{mention(path.name)} has {len(captions)} captions for {len(attached.images)} images."
        raise InputRefused(msg, "Write one line for each image, in the order of their paths.")
    in_order = sorted(range(len(captions)), key=lambda i: attached.images[i].name)
    of_image = dict(zip(in_order, captions, strict=True))
    attached.images = [replace(image, caption=of_image[i] or None) for i, image in enumerate(attached.images)]
    attached.notes.append(f"The captions are from {mention(path.name)}.")
