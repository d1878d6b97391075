"""The page's sections as HTML: tables, comparisons, maps, header differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from medsr_cli.evaluation import pictures
from medsr_cli.evaluation.page_parts import (
    Cell,
    Comparison,
    HeaderDifference,
    Histogram,
    Map,
    Measure,
    NamedImage,
    Pixels,
    Row,
    Table,
)
from medsr_cli.evaluation.page_svg import colour_bar_svg, histogram_svg, legend_html
from medsr_cli.evaluation.page_text import escaped, fixed, number, p_value, with_units

ZOOMS = (1, 2, 3, 4, 6, 8)
HISTOGRAM_BINS = 64
LEAST_SIDE = 64
"""Comparisons are never cut to fewer pixels than this."""


@dataclass
class Sections:
    """Makes sections; counts the bytes of the pictures in them, and numbers what needs an id."""

    share: float = 1.0
    """Part of the rows and of the columns of comparisons that is shown, around the middle."""
    picture_bytes: int = 0
    _numbers: count[int] = field(default_factory=count)

    def table(self, table: Table) -> str:
        """A table that scrolls within itself on small screens.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        if any(len(row.cells) != len(table.columns) for row in table.rows):
            msg = f"The table {table.title!r} has rows of other lengths than its {len(table.columns)} columns."
            raise ValueError(msg)
        heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in table.columns)
        rows = "".join(_row(row) for row in table.rows)
        note = f'<p class="note">{escaped(table.note)}</p>' if table.note else ""
        return (
            f"<section><h2>{escaped(table.title)}</h2>{_scroller(table.title)}<table><thead><tr>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>{note}</section>"
        )

    def comparison(self, comparison: Comparison) -> str:
        """The slider with its pictures, the error maps and the histograms of one slice.

        Raises:
            ValueError: images of different sizes or equal names, fewer than two, or an unknown reference.
        """
        check_comparison(comparison)
        shown, cut = self._shown(comparison.images)
        truth = next((image for image in shown if image.name == comparison.reference), None)
        window = comparison.window or pictures.window_of([(truth or shown[0]).pixels])
        errors = [] if truth is None else [
            (image.name, pictures.difference(image.pixels, truth.pixels)) for image in shown if image is not truth
        ]  # fmt: skip
        maps, error_histogram = self._error_maps(comparison, errors)
        values = _value_histogram(shown, window, comparison.units)
        side = "".join(_plot(h) for h in (values, error_histogram) if h is not None)
        return (
            f'<article class="comparison" data-height="{comparison.pixel_height:.6g}">'
            f"<h3>{escaped(comparison.title)}</h3>"
            f'<div class="wide"><div class="viewer">{self._viewer(comparison, shown, window, cut)}</div>'
            f'<div class="side">{side}</div></div>{maps}</article>'
        )

    def _shown(self, images: Sequence[NamedImage]) -> tuple[list[NamedImage], str]:
        """The images, cut where the page would be too large, and the words for what is left."""
        rows, columns = images[0].pixels.shape[:2]
        height, width = (min(n, max(LEAST_SIDE, round(n * self.share))) for n in (rows, columns))
        if (height, width) == (rows, columns):
            return list(images), ""
        top, left = (rows - height) // 2, (columns - width) // 2
        said = (
            f"Only the middle is shown, rows {top + 1} to {top + height} of {rows} and columns {left + 1} to "
            f"{left + width} of {columns}, to keep this file small."
        )
        part = [
            NamedImage(i.name, i.pixels[top : top + height, left : left + width], i.caption) for i in images
        ]  # fmt: skip
        return part, said

    def _viewer(
        self, comparison: Comparison, shown: Sequence[NamedImage], window: tuple[float, float], cut: str
    ) -> str:
        own = next(self._numbers)
        rows, columns = shown[0].pixels.shape[:2]
        range_words = f"{number(window[0])} (black) to {with_units(number(window[1]), comparison.units)} (white)"
        layers = "".join(self._layer(comparison, image, window, range_words) for image in shown)
        names = [image.name for image in shown]
        right = names.index(comparison.right) if comparison.right else 1
        high = comparison.pixel_height
        shape = "" if high == 1 else f" Pixels are {number(high, 3)} times as high as wide."
        return (
            f'<div class="controls">{_choice("Left", names, 0, own)}{_choice("Right", names, right, own)}'
            f'<label>Zoom <select class="zoom"><option value="0">fit</option>{_zooms()}</select></label>'
            f'<button type="button" class="swap">Swap</button>'
            f'<button type="button" class="blink" aria-pressed="false">Blink</button></div>'
            f'<div class="board"><p class="names" aria-live="polite"><span class="left-name"></span>'
            f'<span class="right-name"></span></p>'
            f'<div class="scroller picture"><div class="stack">{layers}<div class="handle" aria-hidden="true"></div>'
            f'</div></div><input class="cut" type="range" min="0" max="100" step="1" value="50" '
            f'aria-label="{escaped(comparison.title)}: where the left image ends and the right one begins"></div>'
            f'<p class="note">Window {escaped(range_words)}. {columns} × {rows} pixels'
            f'<span class="scale"></span>.{shape} {escaped(cut)}</p>'
        )

    def _layer(self, comparison: Comparison, image: NamedImage, window: tuple[float, float], words: str) -> str:
        alt = f"{comparison.title}, {image.name}: the slice from {words}. {image.caption}"
        png = pictures.image_png(image.pixels, window)
        return (
            f'<figure class="layer" data-name="{escaped(image.name)}">{self._img(png, image.pixels, alt)}'
            f"<figcaption><strong>{escaped(image.name)}</strong> <span>{escaped(image.caption)}</span></figcaption>"
            f"</figure>"
        )

    def _error_maps(self, comparison: Comparison, errors: Sequence[tuple[str, Pixels]]) -> tuple[str, Histogram | None]:
        """The maps of all images with one range and one colour bar, and the histogram of their values."""
        if not errors:
            return "", None
        units = comparison.units
        most = comparison.error_range or pictures.error_range_of(error for _, error in errors)
        ends = (-most, most)
        range_words = f"{number(-most)} to +{with_units(number(most), units)}"
        figures = "".join(self._error_map(comparison, name, error, ends, range_words) for name, error in errors)
        bar = colour_bar_svg(ends, units, next(self._numbers), diverging=True)
        html = (
            f'<div class="errors"><h4>Error maps: image − <bdi>{escaped(comparison.reference)}</bdi></h4>'
            f'<div class="strip">{figures}</div>{bar}<p class="note">Black: no error. Blue: too dark. Red: too bright. '
            f"All maps run from {escaped(range_words)}; larger errors have the colours of the ends.</p></div>"
        )
        edges = pictures.bin_edges(ends, HISTOGRAM_BINS - 1)  # an odd number: one bin around zero
        counts = tuple((name, pictures.counts_of(error, edges)) for name, error in errors)
        note = "Pixels of this slice; errors beyond the ends count in the outermost bins."
        return html, Histogram("Errors", edges, counts, units, note)

    def _error_map(
        self, comparison: Comparison, name: str, error: Pixels, ends: tuple[float, float], words: str
    ) -> str:
        finite = pictures.finite(error)
        mean = number(float(abs(finite).mean()), 3) if finite.size else "–"
        said = f"mean absolute error {with_units(mean, comparison.units)}"
        alt = f"{comparison.title}: error map of {name} against {comparison.reference}, {words}; {said}"
        img = self._img(pictures.map_png(error, ends, diverging=True), error, alt)
        return (
            f'<figure class="map"><div class="scroller">{img}</div><figcaption><strong>{escaped(name)}</strong> '
            f"<span>{escaped(said)}</span></figcaption></figure>"
        )

    def map(self, shown: Map) -> str:
        """A map with its colour bar."""
        low, high = shown.range
        words = f"{number(low)} to {with_units(number(high), shown.units)}"
        alt = f"{shown.title}: map from {words}. {shown.note}"
        img = self._img(pictures.map_png(shown.pixels, shown.range, diverging=shown.diverging), shown.pixels, alt)
        bar = colour_bar_svg(
            shown.range, shown.units, next(self._numbers), diverging=shown.diverging, threshold=shown.threshold
        )
        limit = "" if shown.threshold is None else f" Limit: {with_units(number(shown.threshold), shown.units)}."
        return (
            f'<figure class="map single"><div class="scroller">{img}</div>{bar}<figcaption>'
            f"<strong>{escaped(shown.title)}</strong> <span>{escaped(shown.note + limit)}</span></figcaption></figure>"
        )

    def _img(self, png: bytes, pixels: Pixels, alt: str) -> str:
        uri = pictures.data_uri(png)
        self.picture_bytes += len(uri)
        rows, columns = pixels.shape[:2]
        return f'<img src="{uri}" width="{columns}" height="{rows}" alt="{escaped(alt)}" draggable="false">'


def check_comparison(comparison: Comparison) -> None:
    """Whether the images can be laid over each other; see `Sections.comparison` for what is raised."""
    names = [image.name for image in comparison.images]
    if len(names) < 2 or len(set(names)) != len(names):
        msg = f"The comparison {comparison.title!r} needs two or more images of different names."
        raise ValueError(msg)
    if len({image.pixels.shape[:2] for image in comparison.images}) != 1:
        msg = f"The images of the comparison {comparison.title!r} differ in size."
        raise ValueError(msg)
    for wanted in (comparison.reference, comparison.right):
        if wanted and wanted not in names:
            msg = f"The comparison {comparison.title!r} has no image called {wanted!r}."
            raise ValueError(msg)


def header_section(title: str, differences: Sequence[HeaderDifference]) -> str:
    """The fields that differ; those that upscaling need not change stand out by a word."""
    if not differences:
        return f"<section><h2>{escaped(title)}</h2><p>No header field differs.</p></section>"
    rows = "".join(
        f'<tr><th scope="row"><bdi>{escaped(d.field)}</bdi></th><td>{_value(d.before)}</td><td>{_value(d.after)}</td>'
        f"<td>{_expected(d)} {escaped(d.note)}</td></tr>"
        for d in differences
    )
    return (
        f'<section><h2>{escaped(title)}</h2>{_scroller(title)}<table class="header"><thead><tr>'
        f'<th scope="col">Field</th><th scope="col">Before</th><th scope="col">After</th><th scope="col"></th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def histogram_section(histograms: Sequence[Histogram]) -> str:
    """Histograms of whole volumes."""
    return f'<section><h2>Histograms</h2><div class="plots">{"".join(_plot(h) for h in histograms)}</div></section>'


def _plot(histogram: Histogram) -> str:
    legend = legend_html([name for name, _ in histogram.counts])
    note = f'<p class="note">{escaped(histogram.note)}</p>' if histogram.note else ""
    drawn = f"{histogram_svg(histogram)}{legend}{note}"
    return f'<figure class="plot"><figcaption>{escaped(histogram.title)}</figcaption>{drawn}</figure>'


def _value_histogram(shown: Sequence[NamedImage], window: tuple[float, float], units: str) -> Histogram:
    edges = pictures.bin_edges(window, HISTOGRAM_BINS)
    counts = tuple((image.name, pictures.counts_of(image.pixels, edges)) for image in shown)
    note = "Pixels of this slice; values beyond the window count in the outermost bins."
    return Histogram("Values", edges, counts, units, note)


def _row(row: Row) -> str:
    badge = {"": "", "baseline": '<em class="badge">baseline</em>', "worst": '<em class="badge worst">worst</em>'}
    first, *others = (_cell(cell) for cell in row.cells)
    kind = f' class="{row.mark}"' if row.mark else ""
    cells = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr{kind}><th scope="row">{first} {badge[row.mark]}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    if not isinstance(cell, Measure):
        return f"<bdi>{escaped(cell)}</bdi>"
    mean = fixed(cell.mean, cell.digits)
    if mean == "–":
        return '<span aria-label="not measured">–</span>'
    parts = [f'<strong>{mean}<span class="heard"> best</span></strong>' if cell.best else mean]
    if cell.deviation is not None:
        parts.append(f'<span class="deviation"> ± {fixed(cell.deviation, cell.digits)}</span>')
    more = []
    if cell.interval is not None:
        more.append(" to ".join(fixed(end, cell.digits) for end in cell.interval))
    if cell.p is not None:
        more.append(p_value(cell.p))
    if more:
        parts.append(f"<small>{escaped(', '.join(more))}</small>")
    return "".join(parts)


def _scroller(name: str) -> str:
    """The opening tag of a part that scrolls sideways by itself, also by keyboard."""
    return f'<div class="scroller" tabindex="0" role="region" aria-label="{escaped(name)}">'


def _value(text: str) -> str:
    return f"<code><bdi>{escaped(text)}</bdi></code>" if text else '<span class="absent">not there</span>'


def _expected(difference: HeaderDifference) -> str:
    word = "expected" if difference.expected else "unexpected"
    return f'<em class="badge {"" if difference.expected else "worst"}">{word}</em>'


def _choice(label: str, names: Sequence[str], chosen: int, number_of_viewer: int) -> str:
    options = "".join(
        f'<option value="{i}"{" selected" if i == chosen else ""}>{escaped(name)}</option>'
        for i, name in enumerate(names)
    )
    own = f"{label.lower()}{number_of_viewer}"
    return f'<label for="{own}">{label} <select id="{own}" class="{label.lower()}">{options}</select></label>'


def _zooms() -> str:
    return "".join(f'<option value="{zoom}">×{zoom}</option>' for zoom in ZOOMS)
