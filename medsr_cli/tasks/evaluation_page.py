"""The page of an evaluation: tables, slices in every version beside the target, what was measured and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import mention
from medsr_cli.evaluation.page import Comparison, Measure, NamedImage, Page, Row, Table
from medsr_cli.evaluation.page_parts import Mark
from medsr_cli.evaluation.results import BASELINE, LOWER_IS_BETTER, Summary
from medsr_cli.provenance.discretion import discreet_facts
from medsr_cli.provenance.record import IN_PLANE, NOTICE, software

if TYPE_CHECKING:
    from medsr_cli.tasks.evaluate import Evaluation, Shown

REFERENCE = "reference"
MOST_VOLUMES = 200
"""Volumes that the page lists; all are in the JSON report and the CSV table."""


def digits_of(metric: str) -> int:
    """Decimals worth showing: two for decibels, four for shares."""
    return 2 if metric.startswith(("psnr", "fid")) else 4


def heading_of(metric: str) -> str:
    """`psnr_y` as `PSNR Y (dB)`; an arrow tells where less is better."""
    words = metric.replace("_", " ").upper() if len(metric) < 9 else metric.replace("_", " ")
    return words + (" (dB)" if metric.startswith("psnr") else "") + (" ↓" if metric in LOWER_IS_BETTER else "")


def page_of(evaluation: Evaluation) -> Page:
    """Everything that `evaluation.page` draws, with stand-ins for names unless those are shown."""
    results = evaluation.results
    worse = [one.sentence() for one in results.worse_than_baseline()]
    failed = [f"{mention(name)} was not measured: {error.marked}" for name, error in evaluation.failed]
    page = Page(
        title="medsr evaluate: " + ", ".join(c.label for c in evaluation.contenders),
        facts=_facts(evaluation),
        warnings=(*failed, *worse, *evaluation.warnings),
        tables=(*_summary_tables(evaluation), _difference_table(evaluation), _volume_table(evaluation)),
        comparisons=tuple(_comparison(shown) for shown in evaluation.shown),
        notes=(NOTICE, IN_PLANE, *evaluation.facts["protocol"]["notes"], *evaluation.left_out),
    )
    found: Page = discreet_facts(page)
    return found


def _facts(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    facts, request = evaluation.facts, evaluation.request
    rows = evaluation.results.rows
    images = len({row.volume for row in rows})
    slices = len({row.key for row in rows})
    models = [
        (
            str(record["label"]),
            ", ".join(
                str(part)
                for part in (
                    record["checkpoint"] or "no checkpoint",
                    f"SHA-256 {record['sha256']}" if record["sha256"] else "",
                    f"{record['engine']} on {record['device']}, {record['precision']}",
                )
                if part
            ),
        )
        for record in facts["models"]
    ]
    return (
        ("data", f"{facts['data']['folder']}: {facts['data']['subjects']} subjects, {images} images, {slices} slices"),
        ("protocol", facts["protocol"]["title"]),
        ("low-resolution images", facts["protocol"]["low"]),
        ("border left out", facts["protocol"]["border"]),
        ("scales", ", ".join(f"x{scale:g}" for scale in facts["scales"])),
        *models,
        ("command", request.command or "-"),
        ("date", facts["date"]),
        ("seed", str(request.seed)),
        ("medsr", str(software()["medsr"])),
    )


def _grouped(summaries: Sequence[Summary]) -> dict[float | None, dict[str, dict[str, Summary]]]:
    """Scale to model to metric."""
    found: dict[float | None, dict[str, dict[str, Summary]]] = {}
    for summary in summaries:
        found.setdefault(summary.scale, {}).setdefault(summary.model, {})[summary.metric] = summary
    return found


def scale_name(scale: float | None) -> str:
    """`x4`, or what stands for all scales together."""
    return "mean over scales" if scale is None else f"x{scale:g}"


def _summary_tables(evaluation: Evaluation) -> list[Table]:
    summaries = evaluation.results.summaries(evaluation.request.seed)
    metrics = list(dict.fromkeys(summary.metric for summary in summaries))
    tables = []
    for scale, models in _grouped(summaries).items():
        rows = []
        for model, by_metric in models.items():
            cells = [_measure(by_metric[metric]) if metric in by_metric else Measure(None) for metric in metrics]
            rows.append(Row((model, *cells), "baseline" if model == BASELINE else ""))
        note = (
            "Mean over slices, their standard deviation, and the 95 % bootstrap interval of the mean, subjects redrawn "
            f"where there are several; p of the signed-rank test against {BASELINE}. Protocol: {evaluation.protocol}."
        )
        tables.append(Table(scale_name(scale), ("model", *map(heading_of, metrics)), tuple(rows), note))
    return tables


def _measure(summary: Summary) -> Measure:
    over = summary.over
    p = summary.test.p if summary.test else None
    interval = (over.interval.low, over.interval.high) if over.interval else None
    deviation = over.deviation if over.slices > 1 else None
    return Measure(over.mean, deviation, interval, p, digits_of(summary.metric), summary.best)


def _difference_table(evaluation: Evaluation) -> Table:
    """Every model less the baseline: what the paired test is about."""
    rows = []
    for summary in evaluation.results.summaries(evaluation.request.seed):
        test, interval = summary.test, summary.gain_interval
        if summary.gain is None or test is None:
            continue
        ends = (interval.low, interval.high) if interval else None
        figure = Measure(summary.gain, None, ends, test.p, digits_of(summary.metric) + 1)
        better = f"{test.better} of {test.pairs} {test.unit}s"
        name = f"{summary.model}, {scale_name(summary.scale)}"
        rows.append(Row((name, heading_of(summary.metric), figure, better, test.reason)))
    note = "Mean difference on the same slices, its 95 % interval, and p. Below zero is worse, except where ↓ stands."
    columns = ("model", "metric", "difference", "better in", "about the test")
    return Table(f"Difference from {BASELINE}", columns, tuple(rows), note)


def _volume_table(evaluation: Evaluation) -> Table:
    results = evaluation.results
    worse = {(one.volume, one.scale, one.model) for one in results.worse_than_baseline()}
    records = results.volumes()
    rows = []
    for record in records[:MOST_VOLUMES]:
        key = record["volume"], record["scale"], record["model"]
        mark: Mark = "worst" if key in worse else "baseline" if record["model"] == BASELINE else ""
        cells = [Measure(record[metric], digits=digits_of(metric)) for metric in results.metrics]
        name = f"{mention(record['volume'])} ({mention(record['subject'])})"
        rows.append(Row((name, f"x{record['scale']:g}", record["model"], str(record["slices"]), *cells), mark))
    note = f"Means over slices. Marked: volumes that are worse than by {BASELINE}."
    if len(records) > MOST_VOLUMES:
        note += f" The first {MOST_VOLUMES} of {len(records)} lines; all are in the JSON report."
    return Table("Volumes", ("image", "scale", "model", "slices", *map(heading_of, results.metrics)), tuple(rows), note)


def _comparison(shown: Shown) -> Comparison:
    volume = shown.opened.reader.volume
    spacing = volume.spacing_mm
    images = [NamedImage(label, _picture(plane, shown), _caption(shown.figures[label]))
              for label, plane in shown.planes.items()]  # fmt: skip
    images.append(NamedImage(REFERENCE, _picture(shown.target, shown), "the image itself"))
    learned = next((label for label in shown.planes if label != BASELINE), REFERENCE)
    return Comparison(
        title=shown.title,
        images=tuple(images),
        right=learned,
        reference=REFERENCE,
        units="HU" if volume.modality == "ct" else "",
        pixel_height=spacing[0] / spacing[1] if spacing else 1.0,
    )


def _picture(planes: NDArray[np.float64], shown: Shown) -> NDArray[np.floating]:
    """(rows, columns) or (rows, columns, 3) in the file's own units, the first row at the top."""
    volume = shown.opened.reader.volume
    slope, intercept = volume.value_scale
    values = shown.working.denormalise(planes) * slope + intercept
    if volume.format == "nifti":
        values = values[:, ::-1]
    return values[0] if len(values) != 3 else np.moveaxis(values, 0, -1)


def _caption(figures: dict[str, float]) -> str:
    said = []
    for metric, figure in figures.items():
        if math.isfinite(figure):
            unit = " dB" if metric.startswith("psnr") else ""
            said.append(f"{metric.replace('_', ' ')} {figure:.{digits_of(metric)}f}{unit}")
    return ", ".join(said)
