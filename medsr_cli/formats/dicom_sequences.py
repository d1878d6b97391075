"""Walking the nested data sets of a DICOM header, with a limit on how deep they go."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.dataset import Dataset

from medsr_cli.errors import InputRefused, mention


def nested(ds: Dataset) -> Iterator[tuple[Dataset, bool]]:
    """Data sets one level below `ds`, and whether they are inside a private sequence."""
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                yield item, element.tag.is_private


def check_depth(ds: Dataset, limit: int, name: str) -> None:
    """Refuse sequences that are nested deeper than `limit`.

    Raises:
        InputRefused: they are.
    """
    level = [ds]
    for _ in range(limit):
        level = [item for parent in level for item, _ in nested(parent)]
        if not level:
            return
    msg = f"{mention(name)} nests sequences more than {limit} deep."
    raise InputRefused(msg)
