"""Two images of one place side by side: figures, differences, headers, and where structures disagree."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli import __version__, formats
from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.evaluation.fsim import SMALLEST_SIDE as FSIM_SIDE
from medsr_cli.evaluation.fsim import fsim
from medsr_cli.evaluation.gmsd import gmsd
from medsr_cli.evaluation.metrics import IDENTICAL_DB, SSIM_WINDOW, psnr, ssim
from medsr_cli.evaluation.results import plain
from medsr_cli.evaluation.sfrc import SMALLEST_PATCH, cut_for
from medsr_cli.formats.contract import Derivation, Reader, ReadOptions, Writer
from medsr_cli.provenance.discretion import discreet_facts, id_of, introduce
from medsr_cli.provenance.record import NOTICE, sha256_of, software
from medsr_cli.tasks.compare_grids import (
    Holes,
    Relation,
    Seen,
    grid_of,
    position_mm,
    relation_of,
    seen_of,
    slices_on_one_grid,
)
from medsr_cli.tasks.compare_headers import Difference, header_differences, patient_remark
from medsr_cli.tasks.compare_structure import Flagged, Structure, structure_of
from medsr_cli.tasks.evaluation_outputs import refuse_outputs
from medsr_cli.tasks.maps import MapSource, map_volume
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.report import geometry
from medsr_cli.volume.degradation import DEGRADATIONS
from medsr_cli.volume.volume import Volume

Unit = NDArray[np.float64]

HISTOGRAM_BINS = 128
JOINT_BINS = 100
"""Of mutual information, along each image."""
MOST_BOXES = 500
"""Flagged patches that are listed, the lowest crossing first; all are counted."""
SHOWN_SLICES = 3
MOST_NAMED = 10
"""Slices that a warning names."""
FLAGGED_LIMIT = 0.01
"""Share of flagged patches above which `--strict` fails."""


@dataclass(frozen=True)
class CompareRequest:
    """What to compare, and where maps go."""

    first: Path
    second: Path
    reference: bool = False
    """Whether the second image is the truth: where the first departs from it in structure is looked for then."""
    scale: float | None = None
    """Enlargement that made the first image; structures that its input had should agree with the reference."""
    resample: bool = False
    degradation: str | None = None
    """How the finer image is shrunken where one is finer by a whole factor; None for `cubic`."""
    axis: str = "auto"
    series: tuple[str | None, str | None] = (None, None)
    flagged_map: Path | None = None
    difference_map: Path | None = None
    overwrite: bool = False
    command: str = ""

    @property
    def kernel(self) -> str:
        """Name of the degradation that shrinks."""
        return self.degradation or "cubic"


@dataclass(frozen=True)
class SliceFigures:
    """One slice of A against the same of B; PSNR and SSIM take B's range as the peak.

    Pixels that are no number in either image are left out of PSNR and differences; the metrics of windows see the
    least value of their slice there. A figure of a slice without any other pixel is not a number.
    """

    slice: int
    """Counted from 1."""
    psnr_db: float
    ssim: float
    fsim: float
    gmsd: float
    mean_absolute: float
    """In the file's units."""
    largest: float
    flagged_share: float | None = None
    """Of the slice's patches; None without a reference."""
    left_out: int = 0
    """Pixels that are no number in A or B."""
    in_one_alone: int = 0
    """Of these, those that are a number in the other image: a difference that has no size."""


@dataclass
class Sums:
    """What is added up over all slices."""

    pixels: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    signed: float = 0.0
    largest: float = 0.0
    patches: int = 0
    flagged: int = 0
    in_one_alone: int = 0
    joint: NDArray[np.int64] = field(default_factory=lambda: np.zeros((JOINT_BINS, JOINT_BINS), np.int64))


@dataclass(frozen=True)
class ShownSlice:
    """A slice for the page, in the file's units."""

    number: int
    first: Unit
    second: Unit
    heat: Unit | None
    """Share of the patches over each pixel that are flagged."""


@dataclass
class Comparison:
    """Everything that was found."""

    request: CompareRequest
    relation: Relation
    grid: Volume
    volumes: tuple[Volume, Volume]
    seen: tuple[Seen, Seen]
    slices: list[SliceFigures] = field(default_factory=list)
    flagged: list[Flagged] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    headers: list[Difference] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shown: list[ShownSlice] = field(default_factory=list)
    edges: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    histograms: tuple[NDArray[np.int64], NDArray[np.int64]] = field(
        default_factory=lambda: (np.zeros(HISTOGRAM_BINS, np.int64), np.zeros(HISTOGRAM_BINS, np.int64))
    )
    date: str = ""

    @property
    def flagged_share(self) -> float | None:
        """Of all patches; None without a reference."""
        return self.sums.flagged / self.sums.patches if self.sums.patches else None

    def figures(self) -> dict[str, float | None]:
        """Of the whole volumes: sums over all voxels, and means over slices."""
        sums, peak = self.sums, self.seen[1].width
        pixels = sums.pixels or math.nan
        mean_squared = sums.squared / pixels
        by_slice = {
            name: float(np.mean(known)) if (known := self._known(name)) else None for name in ("ssim", "fsim", "gmsd")
        }
        psnr_db = IDENTICAL_DB if mean_squared == 0 else min(10 * math.log10(peak**2 / mean_squared), IDENTICAL_DB)
        known = self._known("psnr_db")
        found = {
            "psnr_db": psnr_db,
            "psnr_db_mean_of_slices": float(np.mean(known)) if known else None,
            **by_slice,
            "nmi": normalised_mutual_information(sums.joint),
            "mean_absolute": sums.absolute / pixels,
            "mean_difference": sums.signed / pixels,
            "largest": sums.largest if sums.pixels else None,
            "flagged_share": self.flagged_share,
        }
        return {name: None if value is None or math.isnan(value) else value for name, value in found.items()}

    def _known(self, name: str) -> list[float]:
        return [value for one in self.slices if math.isfinite(value := getattr(one, name))]

    def report(self, *, names: bool = False) -> dict[str, Any]:
        """Everything, as plain data; the two files by their names with `names`, else by what stands for them."""
        first, second = self.request.first, self.request.second
        listed = sorted(self.flagged, key=lambda box: (box.crossing, box.slice, box.row, box.column))
        facts = {
            "notice": NOTICE,
            "software": software(),
            "command": self.request.command,
            "date": self.date,
            "a": {**_told(first, names), **geometry(self.volumes[0]), **self._range(0)},
            "b": {**_told(second, names), **geometry(self.volumes[1]), **self._range(1)},
            "b_is_reference": self.request.reference,
            "grid": {
                "how": self.relation.how,
                "factors": list(self.relation.factors),
                "degradation": self.request.kernel if "shrunken" in self.relation.how else None,
                "sentence": self.relation.sentence(mention(first.name), mention(second.name)),
            },
            "peak": "range of B, in units of the files",
            "not_numbers": {
                "a": self.seen[0].not_numbers,
                "b": self.seen[1].not_numbers,
                "in_one_alone": self.sums.in_one_alone,
                "in_figures": "left out; the windows of SSIM, FSIM and GMSD see the least value of the slice there",
            },
            "figures": self.figures(),
            "slices": [vars(one) for one in self.slices],
            "structure": None
            if not self.request.reference
            else {
                "method": "Fourier ring correlation of patches (arXiv 2603.04673)",
                "cut_cycles_per_pixel": cut_for(self.request.scale),
                "patches": self.sums.patches,
                "flagged": self.sums.flagged,
                "flagged_share": self.flagged_share,
                "listed": [vars(box) for box in listed[:MOST_BOXES]],
            },
            "header_differences": [vars(one) for one in self.headers],
            "warnings": self.warnings,
        }
        found: dict[str, Any] = plain(discreet_facts(facts))
        return found

    def _range(self, which: int) -> dict[str, float]:
        return {"minimum": self.seen[which].low, "maximum": self.seen[which].high}


def _told(path: Path, names: bool) -> dict[str, Any]:
    return {"name": path.name if names else mention(path.name), "id": id_of(path), "sha256": sha256_of(path)}


def compare(request: CompareRequest, progress: Progress | None = None) -> Comparison:
    """Hold image A against image B, slice by slice.

    Raises:
        ArgumentsError: options that cannot be or have no use, or a map that exists or would replace an input.
        InputRefused: one cannot be read, is constant, or their grids differ.
    """
    introduce(request.first)
    introduce(request.second)
    _refuse_contradictions(request)
    first, second = _open(request)
    relation = relation_of(first, second, resample=request.resample)
    if request.degradation is not None and "shrunken" not in relation.how:
        msg = "--degradation shrinks the finer of two images; here neither is shrunken."
        raise ArgumentsError(msg, "Leave it out.")
    seen = seen_of(first), seen_of(second)
    grid = grid_of(first, second, relation)
    found = Comparison(request, relation, grid, (first.volume, second.volume), seen)
    found.date = datetime.now(UTC).isoformat(timespec="seconds")
    found.edges = np.linspace(min(s.low for s in seen), max(s.high for s in seen), HISTOGRAM_BINS + 1)
    found.headers = header_differences(first, second, relation)
    found.warnings = [*first.volume.warnings, *second.volume.warnings, *patient_remark(first, second)]
    sentence = relation.sentence(mention(request.first.name), mention(request.second.name))
    found.warnings += [sentence] if sentence else []
    progress = progress or Silent()
    with ExitStack() as stack:
        writers = _map_writers(stack, request, first if grid is first.volume else second, grid)
        _walk(found, first, second, writers, progress)
    found.warnings += _remarks(found)
    for warning in found.warnings:
        progress.warn(warning)
    return found


def _remarks(found: Comparison) -> list[str]:
    """What the walk through the slices brought up that figures do not tell."""
    request, sums = found.request, found.sums
    remarks = [
        f"{mention(path.name)} has {seen.not_numbers} pixels that are no numbers; the figures are of the others."
        for path, seen in zip((request.first, request.second), found.seen, strict=True)
        if seen.not_numbers
    ]
    if sums.in_one_alone:
        slices = [str(one.slice) for one in found.slices if one.in_one_alone]
        more = f" and {len(slices) - MOST_NAMED} more" if len(slices) > MOST_NAMED else ""
        remarks.append(
            f"The images differ in {sums.in_one_alone} pixels that are numbers in one of them alone, "
            f"in slices {', '.join(slices[:MOST_NAMED])}{more}."
        )
    if request.reference and not sums.patches:
        remarks.append(
            f"No patch could be checked against the reference: slices are shorter than {SMALLEST_PATCH} pixels, "
            "or the same everywhere in both images."
        )
    return remarks


def _refuse_contradictions(request: CompareRequest) -> None:
    if request.flagged_map is not None and not request.reference:
        msg = "--map shows where structures depart from a reference."
        raise ArgumentsError(msg, "Add --reference if the second image is one, or use --difference.")
    if request.scale is not None and not request.scale > 1:
        msg = f"--scale {request.scale:g} does not enlarge."
        raise ArgumentsError(msg, "Give the enlargement that made the first image, such as 4.")
    if request.scale is not None and not request.reference:
        msg = "--scale says which structures should agree with a reference."
        raise ArgumentsError(msg, "Add --reference if the second image is one, or leave it out.")
    if request.kernel not in DEGRADATIONS:
        msg = f"There is no degradation called {mention(request.kernel)}."
        raise ArgumentsError(msg, f"Give one of {', '.join(DEGRADATIONS)}.")
    maps = {"--map": request.flagged_map, "--difference": request.difference_map}
    refuse_outputs({}, (request.first, request.second), maps=maps, overwrite=request.overwrite)
    for path in maps.values():
        if path is None:
            continue
        entry = formats.format_of_name(path)
        if entry is None or entry.name != "nifti":
            msg = f"The map {mention(path.name)} is to be NIfTI."
            raise ArgumentsError(msg, "Give it the ending .nii.gz.")


def _open(request: CompareRequest) -> tuple[Reader, Reader]:
    first = formats.open_image(request.first, ReadOptions(request.axis, request.series[0]))
    second = formats.open_image(request.second, ReadOptions(request.axis, request.series[1]))
    axis = first.volume.slice_axis
    if second.volume.slice_axis != axis and first.volume.format == second.volume.format:
        # Which axis is across is told by spacings, which an enlargement changes: both are cut like the first.
        second = formats.open_image(request.second, ReadOptions(str(axis), request.series[1]))
    return first, second


def _map_writers(stack: ExitStack, request: CompareRequest, source: Reader, grid: Volume) -> dict[str, Writer]:
    result = map_volume(grid)
    found = {}
    for name, path in (("flagged", request.flagged_map), ("difference", request.difference_map)):
        if path is not None:
            said = Derivation(method=f"compare {name}", scale=(1.0, 1.0), software=f"medsr {__version__}")
            found[name] = stack.enter_context(
                formats.create_image(path, MapSource(result, source.path), result, said, overwrite=request.overwrite)
            )
    return found


def _walk(found: Comparison, first: Reader, second: Reader, writers: dict[str, Writer], progress: Progress) -> None:
    """Every slice once: figures, sums, maps, pictures."""
    request, grid = found.request, found.grid
    shown = {int(n) for n in np.linspace(0, grid.slices - 1, SHOWN_SLICES + 2).round()[1:-1]}
    worst, worst_slice = -1.0, None
    width, scale = found.seen[1].width, request.scale
    pairs = slices_on_one_grid(first, second, found.relation, DEGRADATIONS[request.kernel])
    for number, (one, other, holes) in enumerate(pairs):
        structure = structure_of(one, other, holes, width, scale) if request.reference else None
        found.slices.append(_figures(number, one, other, holes, found.seen[1], structure))
        _add(found, one, other, holes)
        heat = None if structure is None else structure.correlations.heat(one.shape[-2:])
        if structure is not None:
            _add_flagged(found, structure, number)
        if "flagged" in writers:
            writers["flagged"].write((np.zeros(one.shape[-2:]) if heat is None else heat)[None].astype(np.float32))
        if "difference" in writers:
            difference = np.where(holes.either, math.nan, (one - other).mean(axis=0))
            writers["difference"].write(difference[None].astype(np.float32))
        picture = ShownSlice(number + 1, one, other, heat)
        if number in shown:
            found.shown.append(picture)
        elif found.slices[-1].mean_absolute > worst:
            worst, worst_slice = found.slices[-1].mean_absolute, picture
        progress.slices(number + 1, grid.slices)
    found.shown += [worst_slice] if worst_slice is not None else []


def _figures(
    number: int, one: Unit, other: Unit, holes: Holes, seen: Seen, structure: Structure | None
) -> SliceFigures:
    a, b = ((image - seen.low) / seen.width for image in (one, other))
    known = ~holes.either
    difference = np.abs(one - other)[:, known]
    large_enough = min(one.shape[-2:]) >= max(SSIM_WINDOW, FSIM_SIDE) and difference.size > 0
    colours = a if len(a) in (1, 3) else a.mean(axis=0, keepdims=True)
    theirs = b if len(b) in (1, 3) else b.mean(axis=0, keepdims=True)
    return SliceFigures(
        slice=number + 1,
        psnr_db=psnr(a[:, known], b[:, known]) if difference.size else math.nan,
        ssim=float(np.mean([ssim(x, y) for x, y in zip(a, b, strict=True)])) if large_enough else math.nan,
        fsim=fsim(np.clip(colours, 0, 1), np.clip(theirs, 0, 1)) if large_enough else math.nan,
        gmsd=gmsd(np.clip(colours, 0, 1), np.clip(theirs, 0, 1)) if large_enough else math.nan,
        mean_absolute=float(difference.mean()) if difference.size else math.nan,
        largest=float(difference.max()) if difference.size else math.nan,
        flagged_share=None if structure is None else structure.correlations.share,
        left_out=int(holes.either.sum()),
        in_one_alone=int(holes.alone.sum()),
    )


def _add(found: Comparison, one: Unit, other: Unit, holes: Holes) -> None:
    sums = found.sums
    sums.in_one_alone += int(holes.alone.sum())
    for counted, image, odd in zip(found.histograms, (one, other), (holes.first, holes.second), strict=True):
        values = np.clip(image[:, ~odd], found.edges[0], found.edges[-1])
        np.add(counted, np.histogram(values, bins=found.edges)[0], out=counted)
    one, other = (image[:, ~holes.either] for image in (one, other))
    difference = one - other
    sums.pixels += difference.size
    sums.absolute += float(np.abs(difference).sum())
    sums.squared += float(np.square(difference).sum())
    sums.signed += float(difference.sum())
    sums.largest = max(sums.largest, float(np.abs(difference).max(initial=0.0)))
    rows, columns = (_bins(image, seen) for image, seen in zip((one, other), found.seen, strict=True))
    sums.joint += np.bincount(rows * JOINT_BINS + columns, minlength=JOINT_BINS**2).reshape(JOINT_BINS, JOINT_BINS)


def _bins(image: Unit, seen: Seen) -> NDArray[np.int64]:
    """Number of each pixel's bin; values that shrinking took beyond the range count with the outermost one."""
    share = (image.ravel() - seen.low) / seen.width
    return np.clip((share * JOINT_BINS).astype(np.int64), 0, JOINT_BINS - 1)


def _add_flagged(found: Comparison, structure: Structure, number: int) -> None:
    found.sums.patches += structure.correlations.flagged.size
    found.sums.flagged += int(structure.correlations.flagged.sum())
    for box, why in structure.boxes:
        middle = (box.side - 1) / 2
        centre = position_mm(found.grid, box.row + middle, box.column + middle, number)
        found.flagged.append(
            Flagged(number + 1, box.row, box.column, box.side, round(box.crossing, 4), box.added, centre, why)
        )
    if len(found.flagged) > 4 * MOST_BOXES:
        found.flagged = sorted(found.flagged, key=lambda box: box.crossing)[:MOST_BOXES]


def normalised_mutual_information(joint: NDArray[np.int64]) -> float | None:
    """(H(A) + H(B)) / H(A, B) of a joint histogram: 1 for independent images, 2 for equal ones (Studholme 1999)."""
    if not joint.any():
        return None
    share = joint / joint.sum()
    both = _entropy(share.ravel())
    return None if both == 0 else (_entropy(share.sum(axis=0)) + _entropy(share.sum(axis=1))) / both


def _entropy(share: NDArray[np.float64]) -> float:
    known = share[share > 0]
    return float(-(known * np.log(known)).sum())
