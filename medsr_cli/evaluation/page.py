"""One self-contained page of results that opens from disk: see `Page` and `page_html`.

The file asks for nothing from anywhere: pictures are data addresses, style and script stand in it and are named
by their hashes in its content security policy, so that a text that slipped through could still not run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources

from medsr_cli.evaluation.page_parts import (
    Cell,
    Comparison,
    HeaderDifference,
    Histogram,
    Map,
    Measure,
    NamedImage,
    Page,
    Row,
    Table,
)
from medsr_cli.evaluation.page_sections import Sections, header_section, histogram_section
from medsr_cli.evaluation.page_text import escaped

__all__ = [
    "Cell",
    "Comparison",
    "HeaderDifference",
    "Histogram",
    "Map",
    "Measure",
    "NamedImage",
    "Page",
    "Row",
    "Table",
    "page_html",
]

LARGEST_BYTES = 8_000_000
NOTICE = "Research use; not a medical device."
MOST_TRIES = 6
FURTHER = 0.95
"""Pictures are cut a little more than their mean size asks for: the middle of a slice is harder to compress."""


def page_html(page: Page, largest_bytes: int = LARGEST_BYTES) -> str:
    """The page as one HTML file: no network, no script but its own, every text escaped.

    Args:
        page: what to show.
        largest_bytes: size that the pictures are kept within: where whole slices do not fit, every comparison is
            cut to its middle, and its caption says so.

    Returns:
        HTML text, to be written as UTF-8.

    Raises:
        ValueError: rows of a table, or images of a comparison, do not fit each other.
    """
    share = 1.0
    for _ in range(MOST_TRIES):
        sections = Sections(share)
        body = _body(page, sections)
        if sections.picture_bytes <= largest_bytes:
            break
        share *= FURTHER * math.sqrt(largest_bytes / sections.picture_bytes)
    return _document(page, body)


def _body(page: Page, sections: Sections) -> str:
    parts = [_heading(page)]
    parts += [sections.table(table) for table in page.tables]
    if page.comparisons:
        shown = "".join(sections.comparison(comparison) for comparison in page.comparisons)
        parts.append(f"<section><h2>Pictures</h2>{_how_to()}{shown}</section>")
    if page.maps:
        shown = "".join(sections.map(item) for item in page.maps)
        parts.append(f'<section><h2>Maps</h2><div class="strip">{shown}</div></section>')
    if page.histograms:
        parts.append(histogram_section(page.histograms))
    if page.header_differences is not None:
        parts.append(header_section(page.header_title, page.header_differences))
    if page.notes:
        parts.append(f"<section><h2>Notes</h2>{_list(page.notes)}</section>")
    return "\n".join(parts)


def _heading(page: Page) -> str:
    facts = "".join(
        f"<div><dt>{escaped(name)}</dt><dd><bdi>{escaped(value)}</bdi></dd></div>" for name, value in page.facts
    )
    warnings = (
        f'<div class="warnings" role="note"><h2>Warnings</h2>{_list(page.warnings)}</div>' if page.warnings else ""
    )
    return (
        f'<header><h1>{escaped(page.title)}</h1><p class="notice" role="note">{NOTICE}</p>'
        f"{f'<dl>{facts}</dl>' if facts else ''}</header>{warnings}"
    )


def _how_to() -> str:
    return (
        '<p class="note only-script">Drag on a picture, or move the slider below it with the arrow keys; Home and End '
        "show one image alone. Blink shows left and right in turn. Pixels are not smoothed.</p>"
    )


def _list(sentences: tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences) + "</ul>"


def _document(page: Page, body: str) -> str:
    style, script = _read("page_style.css"), _read("page_script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="{escaped(page.language)}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        # An icon of its own: without one, browsers look for a file of that name.
        f'<link rel="icon" href="data:,">\n<title>{escaped(page.title)}</title>\n<style>{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n<footer>{NOTICE}</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _read(name: str) -> str:
    return resources.files("medsr_cli.evaluation").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
