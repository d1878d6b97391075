"""Amounts of memory in words."""

from __future__ import annotations

import pytest

from medsr_cli.errors import ArgumentsError
from medsr_cli.tasks.sizes import bytes_of, in_units


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4G", 4 * 2**30), ("4g", 4 * 2**30), ("6GiB", 6 * 2**30), ("512M", 512 * 2**20), ("512 MiB", 512 * 2**20),
        ("4GB", 4 * 10**9), ("1.5G", 3 * 2**29), (".5k", 512), ("1T", 2**40), ("123456789", 123456789), ("7B", 7),
        (" 2 gib ", 2**31), ("0.1MB", 100_000),
    ],
)  # fmt: skip
def test_sizes(text, n_bytes):
    assert bytes_of(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-4G", "4 X", "0", "0G", "4iB", "1e9", "4GG", "nan", "inf", "1,5G", "٤G", "."]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ArgumentsError, match="amount of memory"):
        bytes_of(text)


def test_reading():
    assert in_units(1_536_000_000) == "1.54 GB"
    assert in_units(400e6) == "400 MB"
    assert in_units(12) == "12 B"
