"""Data files that a header names: only ever beside the header, never elsewhere on the machine."""

from __future__ import annotations

from pathlib import Path

from medsr_cli.errors import InputRefused, mention


def beside(header: Path, name: str) -> Path:
    """The file that `header` names, which must lie in the header's folder or below it.

    Raises:
        InputRefused: it lies elsewhere, or is not there.
    """
    folder = header.parent.resolve()
    path = header.parent / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder):
        msg = f"{mention(header.name)} names a data file outside its own folder."
        raise InputRefused(msg, "Put the data file beside it and name it without a folder.")
    if not path.is_file():
        msg = f"The data file that {mention(header.name)} names is not there."
        raise InputRefused(msg, "Copy it beside the header.")
    return path
