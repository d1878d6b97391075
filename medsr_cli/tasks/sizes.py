"""Amounts of memory as people write them: `4G`, `512M`, `6GiB`, plain bytes."""

from __future__ import annotations

import re

from medsr_cli.errors import ArgumentsError

POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE | re.ASCII)


def bytes_of(text: str) -> int:
    """A number of bytes: powers of 1024 for `4G` and `4GiB`, which mean the same here, of 1000 for `4GB`.

    `nvidia-smi` and Docker count in 1024s, so that `--max-vram 4G` is a quarter of a card of 16 GiB.

    Raises:
        ArgumentsError: it is no size, or nothing.
    """
    found = _SIZE.fullmatch(text.strip())
    value = 0
    if found is not None:
        number, power, binary, b = found.groups()
        if not (binary and not power):
            step = 1000 if b and power and not binary else 1024
            whole, _, fraction = number.partition(".")
            digits = int(f"{whole}{fraction}" or "0")
            value = digits * step ** POWERS[power.lower()] // 10 ** len(fraction)
    if value <= 0:
        msg = f"{text!r} is not an amount of memory."
        raise ArgumentsError(msg, "Give a number with a unit, such as 4G, 512M or 6GiB.")
    return value


def in_units(n_bytes: float) -> str:
    """For reading: `1.5 GB`, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"
