"""Measured slices of several models at several scales, and what they say together, as data, JSON and CSV.

The papers' tables are means and deviations over all slices; those are given, with an interval and a test that go by
subject (`statistics`). Means of volumes and of subjects stand beside.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medsr_cli.errors import mention
from medsr_cli.evaluation import statistics
from medsr_cli.evaluation.statistics import Interval, Test, bootstrap_interval, paired_test, summarise

BASELINE = "bicubic"
LOWER_IS_BETTER = frozenset({"gmsd", "fid"})
"""Metrics of which less is better; of all others more is."""
MEAN_OVER_SCALES = "mean"
"""What a summary over several scales has in the place of its scale."""


@dataclass(frozen=True)
class Row(statistics.Row):
    """One slice, counted from 1, as one model made it at one scale; `volume` is a path inside the folder."""

    model: str
    scale: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What is the same of all rows about one slice."""
        return self.subject, self.volume, self.slice


@dataclass(frozen=True)
class Summary:
    """One metric of one model at one scale."""

    model: str
    scale: float | None
    """None for the mean over all scales."""
    metric: str
    over: statistics.Summary
    gain: float | None
    """Mean difference from the baseline on the same slices; None for the baseline itself."""
    gain_interval: Interval | None
    test: Test | None
    """Against the baseline."""
    best: bool = False
    """Best mean of its metric and scale."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        over = {**vars(self.over), "interval": _interval_json(self.over.interval)}
        return {
            "model": self.model,
            "scale": MEAN_OVER_SCALES if self.scale is None else self.scale,
            "metric": self.metric,
            **over,
            "best": self.best,
            "against_baseline": None
            if self.gain is None
            else {
                "mean_difference": self.gain,
                "interval": _interval_json(self.gain_interval),
                "test": "Wilcoxon signed-rank, two-sided",
                **(vars(self.test) if self.test else {}),
            },
        }


def _interval_json(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))


@dataclass(frozen=True)
class Worse:
    """A volume that a model left worse than the baseline does."""

    model: str
    scale: float
    subject: str
    volume: str
    metric: str
    figure: float
    baseline: float

    def sentence(self) -> str:
        """For a person."""
        return (
            f"{mention(self.volume)} is worse by {self.model} than by {BASELINE} at x{self.scale:g}: "
            f"{self.metric} {self.figure:.4g} instead of {self.baseline:.4g}."
        )


@dataclass
class Results:
    """Everything that was measured; only numbers, a few hundred bytes for each slice and model."""

    metrics: tuple[str, ...]
    """Those of each slice, the chief one first."""
    rows: list[Row] = field(default_factory=list)
    of_subjects: list[Row] = field(default_factory=list)
    """Figures that a subject has and its slices have not: FID. Their volume and slice mean nothing."""

    @property
    def scales(self) -> list[float]:
        """In ascending order."""
        return sorted({row.scale for row in self.rows})

    @property
    def models(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def metrics_of_subjects(self) -> tuple[str, ...]:
        """Those that slices do not have."""
        return tuple(dict.fromkeys(metric for row in self.of_subjects for metric in row.values))

    def summaries(self, seed: int = 0) -> list[Summary]:
        """Every scale, metric and model in this order; with several scales also the means over them.

        Args:
            seed: of the bootstrap; the same seed gives the same intervals.
        """
        scales: list[float | None] = [*self.scales]
        scales += [None] if len(scales) > 1 else []
        found: list[Summary] = []
        for scale in scales:
            for metric in (*self.metrics, *self.metrics_of_subjects):
                baseline = self._rows_of(BASELINE, scale, metric)
                every = [
                    _summary(model, scale, metric, self._rows_of(model, scale, metric), baseline, seed)
                    for model in self.models
                ]
                found += _marked([summary for summary in every if summary.over.slices], metric)
        return found

    def _rows_of(self, model: str, scale: float | None, metric: str) -> list[Row]:
        """Rows of one model at one scale; for all scales together, slices with their mean over the scales."""
        rows = self.rows if metric in self.metrics else self.of_subjects
        own = [row for row in rows if row.model == model and scale in (None, row.scale)]
        if scale is not None:
            return own
        each: dict[tuple[str, str, int], list[Row]] = {}
        for row in own:
            each.setdefault(row.key, []).append(row)
        return [
            replace(same[0], values={metric: float(np.mean([row.value(metric) for row in same]))})
            for same in each.values()
            if len(same) == len(self.scales)
        ]

    def worse_than_baseline(self) -> list[Worse]:
        """Volumes of which a model's mean of the chief metric is worse than the baseline's, the worst first."""
        metric = self.metrics[0]
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        means = {
            (record["volume"], record["subject"], record["scale"], record["model"]): record[metric]
            for record in self.volumes()
            if record[metric] is not None
        }
        found = []
        for (volume, subject, scale, model), figure in means.items():
            baseline = means.get((volume, subject, scale, BASELINE))
            if baseline is not None and sign * figure < sign * baseline:
                found.append(Worse(model, scale, subject, volume, metric, figure, baseline))
        return sorted(found, key=lambda worse: sign * (worse.figure - worse.baseline))

    def volumes(self) -> list[dict[str, Any]]:
        """One record for each volume, scale and model: means over its slices."""
        groups: dict[tuple[str, str, float, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.subject, row.volume, row.scale, row.model), []).append(row)
        return [
            {
                "subject": subject, "volume": volume, "scale": scale, "model": model, "slices": len(rows),
                **self._means(rows),
            }
            for (subject, volume, scale, model), rows in groups.items()
        ]  # fmt: skip

    def subjects(self) -> list[dict[str, Any]]:
        """One record for each subject, scale and model: means over its slices, and what only subjects have."""
        groups: dict[tuple[str, float, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.subject, row.scale, row.model), []).append(row)
        more = {(row.subject, row.scale, row.model): row.values for row in self.of_subjects}
        return [
            {
                "subject": subject, "scale": scale, "model": model,
                "volumes": len({row.volume for row in rows}), "slices": len(rows),
                **self._means(rows), **more.get((subject, scale, model), {}),
            }
            for (subject, scale, model), rows in groups.items()
        ]  # fmt: skip

    def _means(self, rows: Sequence[Row]) -> dict[str, float | None]:
        return {metric: _mean(row.value(metric) for row in rows) for metric in self.metrics}


def _mean(figures: Iterable[float]) -> float | None:
    known = [figure for figure in figures if math.isfinite(figure)]
    return float(np.mean(known)) if known else None


def _summary(
    model: str, scale: float | None, metric: str, rows: Sequence[Row], baseline: Sequence[Row], seed: int
) -> Summary:
    over = summarise(rows, metric, seed=seed)
    if model == BASELINE:
        return Summary(model, scale, metric, over, None, None, None)
    known = {row.key: row.value(metric) for row in baseline}
    pairs = [(row.subject, row.value(metric) - known.get(row.key, math.nan)) for row in rows]
    pairs = [(subject, difference) for subject, difference in pairs if math.isfinite(difference)]
    if not pairs:
        return Summary(model, scale, metric, over, None, None, None)
    differences = np.array([difference for _, difference in pairs])
    interval = bootstrap_interval(differences, [subject for subject, _ in pairs], seed=seed)
    test = paired_test(rows, baseline, metric, higher_is_better=metric not in LOWER_IS_BETTER)
    return Summary(model, scale, metric, over, float(differences.mean()), interval, test)


def _marked(summaries: list[Summary], metric: str) -> list[Summary]:
    """The same with the best of them marked; none where all are equal."""
    means = [summary.over.mean for summary in summaries]
    if len(set(means)) < 2:
        return summaries
    best = min(means) if metric in LOWER_IS_BETTER else max(means)
    return [replace(summary, best=summary.over.mean == best) for summary in summaries]


def csv_text(results: Results) -> str:
    """One line for each slice, scale and model, with a heading; a figure that is not known is an empty field.

    Names of subjects and volumes are marked.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("subject", "volume", "slice", "scale", "model", *results.metrics))
    for row in results.rows:
        figures = [row.value(metric) for metric in results.metrics]
        told = (repr(figure) if math.isfinite(figure) else "" for figure in figures)
        writer.writerow((mention(row.subject), mention(row.volume), row.slice, f"{row.scale:g}", row.model, *told))
    return text.getvalue()


def json_text(facts: Mapping[str, Any]) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    return json.dumps(plain(facts), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings of them, as strict JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
