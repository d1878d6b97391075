"""A second image brought onto the grid of a result, slice by slice: the T1 that guides a T2.

Both headers say where their voxels lie in the patient; each voxel of the result takes the guide's value at its own
centre. So a result with thick slices sees the guide in the middle plane of each slice, not its average over the slice.

Values are interpolated linearly: nothing then leaves the guide's range, and no edge rings, which a network that looks
for edges in the guide would copy. Where the guide is so much finer than the result that this would skip voxels, it is
blurred to the result's in-plane step first. Outside the guide's field its value is 0, its minimum.

In memory are the guide and one slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats import open_image
from medsr_cli.formats.contract import Reader, ReadOptions
from medsr_cli.formats.identity import Identity
from medsr_cli.formats.placed_image import PlacedImage, View, load, places_of, slice_affine, smoothed
from medsr_cli.formats.registration import register_rigid
from medsr_cli.volume.geometry import Affine, enlarged_affine, spacings_mm
from medsr_cli.volume.volume import Volume

Register = Literal["none", "rigid"]

LEAST_COVERAGE = 0.5
"""A guide that covers less of the result than this does not show the same place."""
GOOD_COVERAGE = 0.95
"""Below this share a warning says that a part is not guided."""

PATIENT_SPACE = (1, 2)
"""NIfTI's codes for the coordinates of a scan; others are those of a template."""


@runtime_checkable
class Identified(Protocol):
    """A reader of a format that says whose image it is."""

    def identity(self) -> Identity:
        """What identifies the image, hashed."""
        ...


@dataclass
class Guide:
    """An opened guide, ready to be cut along the slices of one result."""

    placed: PlacedImage
    """The guide in memory, scaled to [0, 1]."""
    view: View
    points: int
    """How often the places of the result are repeated: time points."""
    low: float
    """The guide's smallest value, in its own units: 0 in the slices. Padding does not count."""
    high: float
    """The guide's largest value: 1 in the slices."""
    coverage: float
    """Share of the result's voxels that lie inside the guide's field."""
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """For the report; nothing in it names a person."""

    def slices(self) -> Iterator[NDArray[np.float32]]:
        """One slice (rows', columns') in [0, 1] for each slice of the result, in the order of the target's slices."""
        for at in range(self.points * self.view.grid[2]):
            yield self.view.sample(self.placed, at % self.view.grid[2])

    def outside(self, at: int) -> NDArray[np.bool_]:
        """(rows', columns') of the result's slice `at`: True where the guide shows nothing and its value is 0."""
        return self.view.outside(at % self.view.grid[2])


def open_guide(
    path: Path,
    target: Reader,
    result: Volume,
    *,
    options: ReadOptions | None = None,
    register: Register = "none",
    allow_mismatch: bool = False,
) -> Guide:
    """Read a guide into memory and find out how it lies to a result.

    Args:
        path: an image file, a DICOM folder or a zip archive: one grey volume.
        target: the image that is enlarged.
        result: its enlarged grid (`target.volume.enlarged(rows, columns)`).
        options: for reading the guide (its series, limits); the slice axis does not matter.
        register: `rigid` moves the guide to where it matches the target best.
        allow_mismatch: take a guide of another patient, or one whose positions count from another origin.

    Raises:
        InputRefused: it cannot be read, is no grey volume, shows another place, patient or frame of reference, or
            neither header says where the images lie and their sizes differ.
        RunError: it could not be registered.
    """
    reader = open_image(path, replace(options or ReadOptions(), axis="2"))
    _refuse_unsuitable(reader, target)
    match = _compare(reader, target, register=register, allow_mismatch=allow_mismatch)
    guide_affine, target_affine, result_affine = _affines(reader, target, result, register)
    grid = (result.columns, result.rows, places_of(result))
    size = (reader.volume.columns, reader.volume.rows, places_of(reader.volume))
    if register == "none":
        # Before a voxel is read.
        _check_coverage(View(np.linalg.inv(guide_affine) @ result_affine, grid, size).coverage, reader, target)
    placed = load(reader.volume, reader.slices(), guide_affine)
    if placed.low == placed.high:
        msg = f"{mention(path.name)} has the same value everywhere: it cannot guide anything."
        raise InputRefused(msg)
    registered: dict[str, Any] | None = None
    motion = np.eye(4)
    if register == "rigid":
        image = load(target.volume, target.slices(), target_affine)
        found = register_rigid(image, placed, trust_headers=match.trust_headers, guide_name=path.name)
        motion, registered = found.to_guide, found.facts
    view = View(np.linalg.inv(guide_affine) @ motion @ result_affine, grid, size)
    warnings = (*match.warnings, *_check_coverage(view.coverage, reader, target))
    facts = {**_facts(reader, placed, view, registered), **match.facts}
    return Guide(
        placed=smoothed(placed, view.smoothing_voxels()),
        view=view,
        points=max(result.slices // grid[2], 1),
        low=min(placed.low, placed.high),
        high=max(placed.low, placed.high),
        coverage=view.coverage,
        warnings=warnings,
        facts=facts,
    )


# -- what a guide must be -------------------------------------------------------------------------------------


def _refuse_unsuitable(reader: Reader, target: Reader) -> None:
    volume, name = reader.volume, reader.path.name
    if volume.channels != 1:
        msg = f"{mention(name)} is in colour or has an opacity: a guide is a grey image."
        raise InputRefused(msg, "Give one grey volume.")
    if volume.slices != places_of(volume):
        msg = f"{mention(name)} holds several volumes (time points, echoes, directions); which one guides is not said."
        raise InputRefused(msg, "Take one of them out into a file of its own.")
    if _is_target(reader, target):
        msg = f"{mention(name)} is the image itself, not a guide to it."
        raise InputRefused(msg, "Give another contrast of the same patient, for example T1 for a T2.")


def _is_target(reader: Reader, target: Reader) -> bool:
    try:
        same = reader.path.samefile(target.path)
    except OSError:
        return False
    if same and isinstance(reader, Identified) and isinstance(target, Identified):
        return reader.identity().same_series(target.identity()) is not False
    return same


# -- whether both are of the same patient, in the same coordinates --------------------------------------------


@dataclass(frozen=True)
class _Match:
    trust_headers: bool
    """Whether positions of both count from one origin, as far as anyone can tell."""
    warnings: tuple[str, ...]
    facts: dict[str, Any]


def _compare(reader: Reader, target: Reader, *, register: Register, allow_mismatch: bool) -> _Match:
    guide, image = mention(reader.path.name), mention(target.path.name)
    if not (isinstance(reader, Identified) and isinstance(target, Identified)):
        return _compare_spaces(reader, target)
    mine, theirs = reader.identity(), target.identity()
    patient, frame = mine.same_patient(theirs), mine.same_frame(theirs)
    warnings = []
    if patient is False:
        if not allow_mismatch:
            msg = f"{guide} and {image} are of different patients."
            raise InputRefused(msg, "Check the files; --allow-mismatch takes the guide nevertheless.")
        warnings.append(f"{guide} and {image} are of different patients, which was allowed.")
    if frame is False and register == "none":
        if not allow_mismatch:
            msg = f"{guide} and {image} have different frames of reference: their positions count from other origins."
            raise InputRefused(
                msg, "Align them with --register rigid; --allow-mismatch takes the positions as they are."
            )
        warnings.append(f"{guide} and {image} have different frames of reference, which was allowed.")
    facts = {
        "same_patient": _told(patient),
        "same_study": _told(mine.same_study(theirs)),
        "same_frame_of_reference": _told(frame),
    }
    return _Match(frame is not False, tuple(warnings), facts)


def _compare_spaces(reader: Reader, target: Reader) -> _Match:
    """Formats without a patient: all that can be compared is which coordinates NIfTI says that it counts in."""
    warnings = list(reader.volume.warnings) if reader.volume.format == "nifti" else []
    one, other = _space_code(reader), _space_code(target)
    differ = one is not None and other is not None and one != other
    if differ:
        warnings.append(
            f"{mention(reader.path.name)} and {mention(target.path.name)} are in different "
            "spaces (a template and the scanner, perhaps)."
        )
    unknown = "not known: a file names no patient"
    facts = {"same_patient": unknown, "same_study": unknown, "same_frame_of_reference": "no" if differ else unknown}
    return _Match(not differ, tuple(warnings), facts)


def _space_code(reader: Reader) -> int | None:
    """1 for the patient's space, else NIfTI's code of a template; None where nothing is said."""
    if reader.volume.format == "dicom":
        return PATIENT_SPACE[0]
    code = _orientation_code(reader)
    return (PATIENT_SPACE[0] if code in PATIENT_SPACE else code) if code else None


def _orientation_code(reader: Reader) -> int:
    """NIfTI's sform code, else its qform code; 0 where there is none."""
    if reader.volume.format != "nifti":
        return 0
    details = reader.details()
    codes = [details.get("sform_code"), details.get("qform_code")]
    return next((int(code) for code in codes if code is not None and int(code) > 0), 0)


def _told(same: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known: a file does not say"}[same]


# -- where both lie -------------------------------------------------------------------------------------------


def _affines(reader: Reader, target: Reader, result: Volume, register: Register) -> tuple[Affine, Affine, Affine]:
    """(column, row, slice) index to mm of guide, target and result.

    Raises:
        InputRefused: one has no place in space, or neither has and their sizes differ.
    """
    ours, theirs, large = reader.volume.affine, target.volume.affine, result.affine
    placed = _is_placed(reader) and _is_placed(target)
    if ours is None or theirs is None or large is None or not placed:
        ours, theirs, large = _same_field(reader, target, result, register)
    return slice_affine(reader.volume, ours), slice_affine(target.volume, theirs), slice_affine(result, large)


def _is_placed(reader: Reader) -> bool:
    """Whether the header really says where the image lies, and not a reader for want of anything better."""
    volume = reader.volume
    if volume.affine is None:
        return False
    if volume.format == "nifti":
        return _orientation_code(reader) > 0
    return not (volume.format in ("metaimage", "nrrd") and len(volume.array_shape) == 2)


def _same_field(reader: Reader, target: Reader, result: Volume, register: Register) -> tuple[Affine, Affine, Affine]:
    """Two images without a place whose sizes agree are taken to show the same field."""
    guide, image = mention(reader.path.name), mention(target.path.name)
    if _is_placed(reader) != _is_placed(target):
        lost, other = (image, guide) if _is_placed(reader) else (guide, image)
        msg = f"{lost} does not say where it lies, or not for all its slices: it cannot be laid over {other}."
        raise InputRefused(msg, "Give images with a position (DICOM with even slices, NIfTI with sform or qform).")
    if register == "rigid":
        msg = f"Neither {guide} nor {image} says where it lies and how large a voxel is: they cannot be registered."
        raise InputRefused(msg, "Give images with a position (DICOM, NIfTI with sform or qform).")
    volume = target.volume
    result_affine = np.eye(4)
    for axis, old, new in zip(
        volume.plane_axes, (volume.rows, volume.columns), (result.rows, result.columns), strict=True
    ):
        result_affine = enlarged_affine(result_affine, axis, old, new)
    for candidate, affine in ((volume, np.eye(4)), (result, result_affine)):
        if _lengths(candidate) == _lengths(reader.volume):
            return affine, np.eye(4), result_affine
    msg = (
        f"Neither {guide} nor {image} says where it lies, and the guide has neither the image's nor the result's size."
    )
    raise InputRefused(msg, "Give a guide of the same size, or images with a position.")


def _lengths(volume: Volume) -> tuple[int, ...]:
    return (*volume.array_shape, 1, 1, 1)[:3]


def _check_coverage(coverage: float, reader: Reader, target: Reader) -> tuple[str, ...]:
    guide, image = mention(reader.path.name), mention(target.path.name)
    if coverage < LEAST_COVERAGE:
        msg = f"{guide} does not show the same place as {image}: it covers {coverage:.0%} of it."
        raise InputRefused(msg, "Give a guide of the same region, or align them with --register rigid.")
    if coverage < GOOD_COVERAGE:
        return (f"{guide} covers {coverage:.0%} of {image}; the rest is enlarged without a guide.",)
    return ()


def _facts(reader: Reader, placed: PlacedImage, view: View, registered: dict[str, Any] | None) -> dict[str, Any]:
    volume = reader.volume
    unplaced = not _is_placed(reader)
    placed_by = "equal sizes: the same field is assumed" if unplaced else "headers"
    sigmas = [round(s * d, 3) for s, d in zip(view.smoothing_voxels(), spacings_mm(placed.affine), strict=True)]
    return {
        "format": volume.format,
        "size": list(view.size),
        "spacing_mm": None if unplaced else [round(v, 4) for v in spacings_mm(placed.affine)],
        "placed_by": "headers and registration" if registered else placed_by,
        "range": sorted((placed.low, placed.high)),
        "coverage": round(view.coverage, 4),
        "interpolation": "linear, at the middle of each slice",
        "blurred_mm": sigmas if any(sigmas) else None,
        "registration": registered,
    }
