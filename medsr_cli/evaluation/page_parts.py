"""What a page of results is made of; `page.page_html` turns it into one HTML file.

Whoever fills these classes hands over plain text and numbers in the image's own units: everything is escaped,
windowed, coloured and encoded by the page. Text may hold anything, also HTML or bytes that are no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.floating] | NDArray[np.integer[Any]]
Mark = Literal["", "baseline", "worst"]


@dataclass(frozen=True)
class Measure:
    """A measured number in a table: mean ± deviation, interval and p below it."""

    mean: float | None
    """None and NaN are shown as a dash with the words "not measured"; infinity as ∞."""
    deviation: float | None = None
    """Standard deviation, of what the table's note says (slices, subjects)."""
    interval: tuple[float, float] | None = None
    """Lower and upper end, shown as "32.9 to 33.9"; the table's note says which interval it is."""
    p: float | None = None
    """Of the paired test that the table's note names; shown as "p = 0.013" or "p < 0.001"."""
    digits: int = 2
    """Decimals of mean, deviation and interval."""
    best: bool = False
    """Best of its column; shown in bold with the word "best" for those who hear the page."""


Cell = str | Measure


@dataclass(frozen=True)
class Row:
    """One line of a table; the first cell is its heading."""

    cells: tuple[Cell, ...]
    mark: Mark = ""
    """`baseline` and `worst` rows carry that word beside their heading, not a colour alone."""


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column. Rows of another length are refused by `page_html`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    """What the numbers are: protocol, border, interval, test."""


@dataclass(frozen=True)
class NamedImage:
    """One picture of a comparison."""

    name: str
    """Short and different from the others': `bicubic`, `rdst-e`, `reference`."""
    pixels: Pixels
    """(rows, columns) grey or (rows, columns, 3) colour, in the image's own units; NaN is drawn black."""
    caption: str = ""
    """Figures of this picture, such as "33.41 dB, SSIM 0.931"."""


@dataclass(frozen=True)
class Comparison:
    """One slice in several versions of equal size, for the slider and the error maps.

    Pictures are drawn with pixel (0, 0) at the top left, as they are given: whoever fills this turns slices of
    NIfTI files over (`pixels[::-1]`).
    """

    title: str
    """Such as "sub-01, T1w, slice 88"."""
    images: tuple[NamedImage, ...]
    """Two or more. The first one (the input, enlarged by bicubic) is on the slider's left to begin with."""
    right: str = ""
    """Name of the image on the slider's right to begin with; empty takes the second one."""
    reference: str = ""
    """Name of the image that is the truth; empty draws no error maps. Every other image has a map of
    (image - reference), all with one range."""
    units: str = ""
    """Of the values: "HU", "share of the range"; empty for values without a unit."""
    window: tuple[float, float] | None = None
    """Values drawn black and white, one window for all images; None takes the percentiles 0.5 and 99.5 of the
    reference, or of the first image where there is none."""
    error_range: float | None = None
    """Error maps run from minus to plus this value; None takes the 99.5th percentile of all errors, rounded up."""
    pixel_height: float = 1.0
    """Height of a pixel as a share of its width, for pixels that are not square."""


@dataclass(frozen=True)
class Map:
    """A map of one quantity: consistency with the input, ring correlation, deviation of an ensemble."""

    title: str
    pixels: Pixels
    """(rows, columns); NaN, where nothing was measured, is drawn grey."""
    range: tuple[float, float]
    """Values at the two ends of the colour bar."""
    units: str = ""
    diverging: bool = False
    """Whether values lie on both sides of the middle of the range: blue below, red above. Else dark to bright."""
    threshold: float | None = None
    """A value to mark on the colour bar, such as the limit of what validation images show."""
    note: str = ""
    """What is shown, for the caption and for those who hear the page."""


@dataclass(frozen=True)
class Histogram:
    """How often values occur in several images or error maps; drawn as lines, counts as shares of their sum."""

    title: str
    edges: NDArray[np.floating]
    """(bins + 1,) ascending, in units."""
    counts: tuple[tuple[str, NDArray[np.integer[Any] | np.floating]], ...]
    """Name and counts (bins,) of each line."""
    units: str = ""
    note: str = ""


@dataclass(frozen=True)
class HeaderDifference:
    """One header field that differs between two files. No value of a tag that tells who the patient is goes here."""

    field: str
    before: str
    """Empty where the field is not there."""
    after: str
    expected: bool = False
    """Whether upscaling has to change it (rows, spacing); the others carry the word "unexpected"."""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on the page, from top to bottom in this order."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    """Name and value: command, models with checksums, protocol, data, date, version."""
    warnings: tuple[str, ...] = ()
    """Sentences shown at the top: what was left out, why a result is not to be trusted."""
    tables: tuple[Table, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    maps: tuple[Map, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    """Of whole volumes; each comparison draws those of its own slice by itself."""
    header_title: str = "Header differences"
    """Such as "Header differences: A to B"."""
    header_differences: tuple[HeaderDifference, ...] | None = None
    """None leaves the section away; () says that there is none."""
    notes: tuple[str, ...] = ()
    """Sentences at the bottom: method, sources, licences."""
    language: str = "en"
