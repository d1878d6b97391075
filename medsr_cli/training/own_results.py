"""Results of `medsr upscale` among images, known by the names that `upscale` gives where no other is asked for."""

from __future__ import annotations

import re
from functools import cache

from medsr_cli.networks import catalogue


def is_own_result(stem: str) -> bool:
    """Whether a name without suffix is that of a result of `medsr upscale`, or of a map beside one.

    Such a name ends in `_x4-rdst`, with any scale or spacing and any method, and perhaps in `_spread`,
    `_intermediate` or `_consistency` after that.
    """
    return _pattern().search(stem) is not None


@cache
def _pattern() -> re.Pattern[str]:
    number = r"\d+(?:\.\d+)?"
    methods = "|".join(re.escape(name) for name in sorted(catalogue.names(), key=len, reverse=True))
    enlarged = rf"_(?:x{number}(?:x{number})?|{number}mm)-(?:{methods})(?:-roi)?"
    return re.compile(rf"{enlarged}(?:_spread|_intermediate|_consistency)?$", re.IGNORECASE)
