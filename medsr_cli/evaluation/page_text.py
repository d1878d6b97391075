"""Text and numbers as they stand in HTML: escaped, and short without losing what matters."""

from __future__ import annotations

import html
import math
import unicodedata

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST = 2_000
"""Characters of one text; file names and tag values can be as long as somebody wants."""
_HARMLESS = {"\n", "\t", "\N{ZERO WIDTH NON-JOINER}", "\N{ZERO WIDTH JOINER}"}


def escaped(text: str) -> str:
    """Text for HTML, between tags or within a quoted attribute.

    Control characters, halves of surrogates (undecodable bytes of file names) and marks that turn the direction
    of writing are shown as U+FFFD: they could hide what the text says, or are not allowed in UTF-8.
    """
    if len(text) > LONGEST:
        text = text[:LONGEST] + " …"
    shown = "".join(
        c if c in _HARMLESS or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else REPLACEMENT for c in text
    )
    return html.escape(shown, quote=True)


def number(value: float, digits: int = 4) -> str:
    """A value with that many significant digits, without an exponent where it can be read without: 0.0123, 812."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    text = f"{value:.{digits - 1}e}" if not -4 <= size < 7 else f"{value:.{max(digits - 1 - size, 0)}f}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−") if "e" not in text else text


def fixed(value: float | None, digits: int) -> str:
    """A value with that many decimals; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def p_value(p: float) -> str:
    """As papers write it: two significant digits, and a bound for very small ones."""
    if math.isnan(p):
        return "p not defined"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def with_units(value: str, units: str) -> str:
    """A number's text with its unit behind it, if there is one."""
    return f"{value} {units}" if units else value
