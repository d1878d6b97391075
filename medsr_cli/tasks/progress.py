"""How a task tells what it is doing; the command line draws it, a test counts it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a person would like to see while they wait."""

    def item(self, name: str, number: int, of: int) -> None:
        """Work on an input begins; `name` is the file's name."""
        ...

    def slices(self, done: int, total: int) -> None:
        """So many of its slices are done."""
        ...

    def training(self, done: int, limit: int, loss: float, left_s: float | None) -> None:
        """A network that learns from the image has done so many of at most `limit` iterations."""
        ...

    def say(self, sentence: str) -> None:
        """A remark, such as which checkpoint was taken."""
        ...

    def detail(self, sentence: str) -> None:
        """A remark for those who want to know more, such as which engine was picked."""
        ...

    def warn(self, sentence: str) -> None:
        """Something the user should know before trusting the result."""
        ...


class Silent:
    """Tells nobody."""

    def item(self, name: str, number: int, of: int) -> None:
        """Ignored."""

    def slices(self, done: int, total: int) -> None:
        """Ignored."""

    def training(self, done: int, limit: int, loss: float, left_s: float | None) -> None:
        """Ignored."""

    def say(self, sentence: str) -> None:
        """Ignored."""

    def warn(self, sentence: str) -> None:
        """Ignored."""

    def detail(self, sentence: str) -> None:
        """Ignored."""
