"""Folders of one person's sessions, by their names: p01_s1 and p01_s2 are of p01, and on one side of a split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from medsr_cli.errors import mention

_SESSION = re.compile(r"(?:(.*\d)[_-]s|(.+)[_-](?:ses|session|visit|tp|timepoint)[_-]?)\d{1,2}", re.IGNORECASE)
"""A folder of one session of a person. A lone `s` may stand for subject, and counts after a number alone."""


def without_session(folder: str) -> str:
    """The name of a folder less a session at its end, such as `_s1`, `_ses-1`, `-session2`, `_visit1` or `_tp1`."""
    match = _SESSION.fullmatch(folder)
    return (match[1] or match[2]) if match else folder


def persons_of(folders: Iterable[str]) -> dict[str, str]:
    """Of those folders that are sessions of one person, that person's name: p01_s1 and p01_s2 are p01.

    At least two have to share a name, and none that begins with it may be without a session.
    """
    sessions: dict[str, list[str]] = defaultdict(list)
    plain = set()
    for folder in set(folders):
        name = without_session(folder)
        if name == folder:
            plain.add(folder)
        else:
            sessions[name].append(folder)
    return {
        folder: name
        for name, of_one in sessions.items()
        if len(of_one) > 1 and not any(re.match(rf"{re.escape(name)}([_-]|$)", other) for other in plain)
        for folder in of_one
    }


def in_words(persons: Mapping[str, str]) -> list[str]:
    """What `persons_of` found as one sentence, the first person's folders by name; none where it found nothing."""
    sessions: dict[str, list[str]] = defaultdict(list)
    for folder, name in sorted(persons.items()):
        sessions[name].append(folder)
    if not sessions:
        return []
    *first, last = map(mention, next(iter(sessions.values())))
    more = f", and so are the sessions of {len(sessions) - 1} others" if len(sessions) > 1 else ""
    return [f"{', '.join(first)} and {last} are taken as one subject{more}."]
