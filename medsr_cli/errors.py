"""Every way in which medsr says no: one sentence, one remedy, one exit code.

An error's text names what is wrong and what to do about it. The command line prints it as it is, so
nothing in it may come from a tag value of an image.
"""

from __future__ import annotations

from typing import ClassVar


class MedsrError(Exception):
    """Base of all errors that a user is meant to read; `exit_code` is what the process returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}".strip()


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
