"""Histograms and colour bars as SVG within the page; colours of lines and texts come from its style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.evaluation.page_parts import Histogram
from medsr_cli.evaluation.page_text import escaped, number, with_units
from medsr_cli.evaluation.pictures import DIVERGING, SEQUENTIAL, rounded_up

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
LINE_STYLES = 6
"""Lines of a histogram that the style sheet draws differently, by colour and by dashes."""
MOST_DECADES = 5


def histogram_svg(histogram: Histogram) -> str:
    """Lines of shares per bin over the values, shares on a logarithmic axis: background does not hide the rest.

    Raises:
        ValueError: counts and edges do not fit each other.
    """
    shares = [_shares(counts) for _, counts in histogram.counts]
    if any(len(share) != len(histogram.edges) - 1 for share in shares):
        msg = f"The histogram {histogram.title!r} has counts of another length than its bins."
        raise ValueError(msg)
    shown = np.concatenate([share[share > 0] for share in shares]) if shares else np.array([])
    top = 0
    bottom = -MOST_DECADES
    if shown.size:
        top = math.ceil(math.log10(shown.max()) - 1e-9)
        bottom = max(math.floor(math.log10(shown.min())), top - MOST_DECADES)
    bottom = min(bottom, top - 1)
    parts = [_decades(bottom, top), _value_axis(histogram.edges, histogram.units)]
    parts += [_line(share, i, bottom, top) for i, share in enumerate(shares)]
    names = ", ".join(name for name, _ in histogram.counts)
    label = escaped(f"{histogram.title}: {names}. {histogram.note}".strip())
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{escaped(histogram.title)}</title>{''.join(parts)}</svg>"
    )


def legend_html(names: Sequence[str]) -> str:
    """Which line is which: a short stroke of each line's style before its name."""
    items = (
        f'<li><svg class="stroke" viewBox="0 0 30 8" aria-hidden="true"><path class="line s{i % LINE_STYLES}" '
        f'd="M0 4H30"/></svg><bdi>{escaped(name)}</bdi></li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def colour_bar_svg(
    ends: tuple[float, float], units: str, number_of_bar: int, *, diverging: bool, threshold: float | None = None
) -> str:
    """The colours of a map from one end to the other, with the values at both ends and in the middle.

    Args:
        ends: the values at the ends.
        units: theirs.
        number_of_bar: different for every bar of a page.
        diverging: which colours.
        threshold: a value to mark.
    """
    stops = DIVERGING if diverging else SEQUENTIAL
    gradient = "".join(
        f'<stop offset="{i / (len(stops) - 1):.4f}" stop-color="rgb({r},{g},{b})"/>'
        for i, (r, g, b) in enumerate(stops)
    )
    low, high = ends
    middle = (low + high) / 2
    sign = "+" if diverging and high > 0 else ""
    labels = (
        (10, "start", number(low)),
        (160, "middle", number(middle, 3)),
        (310, "end", with_units(sign + number(high), units)),
    )
    texts = "".join(f'<text x="{x}" y="36" text-anchor="{anchor}">{escaped(t)}</text>' for x, anchor, t in labels)
    mark = ""
    said = f"Colours from {number(low)} to {with_units(number(high), units)}"
    if threshold is not None and low < threshold < high:
        x = 10 + 300 * (threshold - low) / (high - low)
        mark = f'<path class="threshold" d="M{x:.1f} 2V26"/>'
        said += f"; the limit is {with_units(number(threshold), units)}"
    return (
        f'<svg class="bar" viewBox="0 0 320 42" role="img" aria-label="{escaped(said)}">'
        f'<defs><linearGradient id="bar{number_of_bar}">{gradient}</linearGradient></defs>'
        f'<rect x="10" y="6" width="300" height="16" fill="url(#bar{number_of_bar})"/>{mark}{texts}</svg>'
    )


def _shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    total = float(np.sum(counts))
    values: NDArray[np.float64] = np.asarray(counts, np.float64)
    return values / total if total > 0 else values


def _height_of(decade: float, bottom: int, top: int) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (top - decade) / (top - bottom)


def _decades(bottom: int, top: int) -> str:
    """Lines across at 100 %, 10 %, … with their labels."""
    parts = []
    for decade in range(bottom, top + 1):
        y = _height_of(decade, bottom, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * 10.0**decade:g}%</text>')
    return "".join(parts)


def _value_axis(edges: NDArray[np.floating], units: str) -> str:
    """Round values below the axis, and the unit."""
    low, high = float(edges[0]), float(edges[-1])
    step = tick_step(high - low)
    ticks = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    parts = []
    for value in ticks:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (float(value) - low) / (high - low)
        anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{number(float(value))}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    name = f"value ({units})" if units else "value"
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escaped(name)}</text>')
    return "".join(parts)


def tick_step(width: float, most: int = 6) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a width into at most `most` parts."""
    least = rounded_up(width / most)
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def _line(shares: NDArray[np.float64], position: int, bottom: int, top: int) -> str:
    """Steps, one for each bin; empty bins lie on the floor."""
    wide = (WIDTH - LEFT - RIGHT) / len(shares)
    with np.errstate(divide="ignore"):
        decades = np.maximum(np.log10(shares), bottom)
    path = [f"M{LEFT} {_height_of(float(decades[0]), bottom, top):.1f}"]
    for i, decade in enumerate(decades):
        path.append(f"V{_height_of(float(decade), bottom, top):.1f}H{LEFT + (i + 1) * wide:.1f}")
    return f'<path class="line s{position % LINE_STYLES}" d="{"".join(path)}"/>'
