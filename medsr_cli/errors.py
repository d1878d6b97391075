"""Every way in which medsr says no: one sentence, one remedy, one exit code.

An error's text names what is wrong and what to do about it; nothing in it may come from a tag value of an image.
Names of files often hold a patient's: a sentence mentions them by `mention`, which marks them, so that whoever shows
or keeps the sentence can put something else in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import ClassVar

_OPEN, _CLOSE = "\u2068", "\u2069"
"""Unicode's own marks around foreign words in a sentence (first strong isolate, pop directional isolate)."""
_MENTIONED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def mention(file: PurePath | str) -> str:
    """The name of a file, or its path, for a sentence that a user reads: marked as such, and on one line."""
    text = "".join(" " if character in f"{_OPEN}{_CLOSE}" or character < " " else character for character in str(file))
    return f"{_OPEN}{text}{_CLOSE}"


def unmarked(sentence: str) -> str:
    """The sentence with every mentioned name in it, without the marks."""
    return _MENTIONED.sub(r"\1", sentence)


def replaced_mentions(sentence: str, stand_in: Callable[[str], str]) -> str:
    """The sentence with what `stand_in` returns in the place of every mentioned name."""
    return _MENTIONED.sub(lambda found: stand_in(found.group(1)), sentence)


def reason_of(error: OSError) -> str:
    """Why the system refused, in its own words for the error's number; what a library says there may name a file."""
    return os.strerror(error.errno) if error.errno else type(error).__name__


class MedsrError(Exception):
    """Base of all errors that a user is meant to read; `exit_code` is what the process returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.remedy = remedy

    @property
    def marked(self) -> str:
        """Sentence and remedy, with mentioned names marked."""
        return f"{self.sentence} {self.remedy}".strip()

    def __str__(self) -> str:
        return unmarked(self.marked)


class RunError(MedsrError):
    """The work itself failed: a write that did not go through, a network that returned NaN."""

    exit_code = 1


class ArgumentsError(MedsrError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class SomeInputsFailed(MedsrError):
    """Some inputs of a batch failed; the rest is done."""

    exit_code = 3


class DeviceUnavailable(MedsrError):
    """The device or provider that was asked for is not on this machine."""

    exit_code = 4


class WeightsError(MedsrError):
    """Weights are missing, offline, of another network, or fail their checksum."""

    exit_code = 5


class InputRefused(MedsrError):
    """An input is unreadable, unsafe or not something that can be upscaled."""

    exit_code = 6


class QualityGateFailed(MedsrError):
    """The result was computed but must not be trusted."""

    exit_code = 7
