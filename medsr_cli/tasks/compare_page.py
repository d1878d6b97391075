"""The page of a comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import mention
from medsr_cli.evaluation.page import Comparison as Pictures
from medsr_cli.evaluation.page import (
    HeaderDifference,
    Histogram,
    Map,
    Measure,
    NamedImage,
    Page,
    Row,
    Table,
)
from medsr_cli.evaluation.sfrc import cut_for
from medsr_cli.provenance.discretion import discreet_facts
from medsr_cli.provenance.record import NOTICE, software

if TYPE_CHECKING:
    from medsr_cli.tasks.compare import Comparison, ShownSlice

MOST_ROWS = 300
"""Slices that the page lists; all are in the JSON report."""
MOST_PATCHES = 40
"""Flagged patches that it lists; more are in the JSON report, and all in the map."""

TITLES = {
    "psnr_db": ("PSNR of all voxels (dB)", 2),
    "psnr_db_mean_of_slices": ("PSNR, mean of slices (dB)", 2),
    "ssim": ("SSIM, 7x7, mean of slices", 4),
    "fsim": ("FSIM, mean of slices", 4),
    "gmsd": ("GMSD, mean of slices ↓", 4),
    "nmi": ("normalised mutual information", 4),
    "mean_absolute": ("mean absolute difference ↓", 4),
    "mean_difference": ("mean difference, A less B", 4),
    "largest": ("largest difference ↓", 4),
    "flagged_share": ("share of flagged patches ↓", 4),
}
"""Figure to its heading and decimals; where less is better an arrow tells so."""


def page_of(comparison: Comparison) -> Page:
    """Everything that `evaluation.page` draws, with stand-ins for names unless those are shown."""
    request = comparison.request
    first, second = mention(request.first.name), mention(request.second.name)
    tables = [_figure_table(comparison), _slice_table(comparison)]
    if request.reference:
        tables.append(_flagged_table(comparison))
    page = Page(
        title=f"medsr compare: {first} and {second}",
        facts=(
            ("A", first),
            ("B", second + (", the reference" if request.reference else "")),
            ("grid", comparison.relation.how),
            ("command", request.command or "-"),
            ("date", comparison.date),
            ("medsr", str(software()["medsr"])),
        ),
        warnings=tuple(comparison.warnings),
        tables=tuple(tables),
        comparisons=tuple(_pictures(comparison, shown) for shown in comparison.shown),
        maps=tuple(_map(comparison, shown) for shown in comparison.shown if shown.heat is not None),
        histograms=(
            Histogram(
                "Values of all voxels",
                comparison.edges,
                (("A", comparison.histograms[0]), ("B", comparison.histograms[1])),
                _units(comparison),
            ),
        ),
        header_title="Header differences: A and B",
        header_differences=tuple(
            HeaderDifference(one.field, one.before, one.after, one.expected) for one in comparison.headers
        ),
        notes=(NOTICE,),
    )
    found: Page = discreet_facts(page)
    return found


def _units(comparison: Comparison) -> str:
    return "HU" if all(volume.modality == "ct" for volume in comparison.volumes) else ""


def _figure_table(comparison: Comparison) -> Table:
    rows = [
        Row((TITLES[name][0], Measure(value, digits=TITLES[name][1])))
        for name, value in comparison.figures().items()
        if value is not None
    ]
    note = "PSNR, SSIM, FSIM and GMSD take the range of B as 0 to 1; differences are in the units of the files."
    return Table("A against B", ("figure", "value"), tuple(rows), note)


def _slice_table(comparison: Comparison) -> Table:
    rows = []
    # A slice without a pixel that is a number in both images has no figures.
    worst = max(comparison.slices, key=lambda one: -1.0 if math.isnan(one.mean_absolute) else one.mean_absolute).slice
    for one in comparison.slices[:MOST_ROWS]:
        known = [one.psnr_db, one.ssim, one.fsim, one.gmsd, one.mean_absolute, one.largest]
        cells = [
            Measure(value if math.isfinite(value) else None, digits=2 if at == 0 else 4)
            for at, value in enumerate(known)
        ]
        if comparison.request.reference:
            cells.append(Measure(one.flagged_share, digits=4))
        rows.append(Row((str(one.slice), *cells), "worst" if one.slice == worst and len(comparison.slices) > 1 else ""))
    columns = ["slice", "PSNR (dB)", "SSIM", "FSIM", "GMSD ↓", "mean absolute difference ↓", "largest difference ↓"]
    columns += ["flagged share ↓"] if comparison.request.reference else []
    left = len(comparison.slices) - len(rows)
    note = f"{left} more slices are in the JSON report." if left > 0 else ""
    return Table("Slices", tuple(columns), tuple(rows), note)


def _flagged_table(comparison: Comparison) -> Table:
    listed = sorted(comparison.flagged, key=lambda box: (box.crossing, box.slice))[:MOST_PATCHES]
    rows = [
        Row(
            (
                f"{box.place}, {box.side} pixels",
                "not stated" if box.centre_mm is None else " ".join(f"{value:.1f}" for value in box.centre_mm),
                Measure(box.crossing, digits=4),
                box.what,
            )
        )
        for box in listed
    ]
    sums = comparison.sums
    note = (
        f"{sums.flagged} of {sums.patches} patches: their Fourier ring correlation falls below 0.5 before "
        f"{cut_for(comparison.request.scale):.4g} cycles per pixel, the reference is constant where A is not, "
        f"or a pixel is a number in one image only. Rows and columns count from 0. "
        f"At most {MOST_PATCHES} are listed, those that differ from the coarsest structures on first."
    )
    columns = ("patch", "centre (mm, RAS+)", "differs from (cycles per pixel)", "A has there")
    return Table("Patches whose structure is not that of the reference", columns, tuple(rows), note)


def _pictures(comparison: Comparison, shown: ShownSlice) -> Pictures:
    spacing = comparison.grid.spacing_mm
    one = next(figures for figures in comparison.slices if figures.slice == shown.number)
    caption = f"PSNR {one.psnr_db:.2f} dB, SSIM {one.ssim:.4f}, mean difference {one.mean_absolute:.4g}"
    return Pictures(
        title=f"Slice {shown.number}",
        images=(
            NamedImage("A", _upright(comparison, shown.first), caption),
            NamedImage("B", _upright(comparison, shown.second)),
        ),
        right="B",
        reference="B",
        units=_units(comparison),
        pixel_height=spacing[0] / spacing[1] if spacing else 1.0,
    )


def _map(comparison: Comparison, shown: ShownSlice) -> Map:
    assert shown.heat is not None  # noqa: S101 - the caller has looked
    return Map(
        title=f"Slice {shown.number}: where structures are not those of the reference",
        pixels=_upright(comparison, shown.heat[None]),
        range=(0.0, 1.0),
        units="share of the patches over a pixel",
        note="Fourier ring correlation of patches; 1 where every patch over a pixel is flagged.",
    )


def _upright(comparison: Comparison, planes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, columns) or (rows, columns, 3), the first row at the top."""
    values = planes[:, ::-1] if comparison.grid.format == "nifti" else planes
    return values[0] if len(values) != 3 else np.moveaxis(values, 0, -1)
