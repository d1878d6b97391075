"""How often a transfer is tried again, what ends it, and who is told how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Told how far a transfer is; `total_bytes` is None where nobody knows."""

    def __call__(self, done_bytes: int, total_bytes: int | None, /) -> None:
        """Take notice; must not raise."""


def silent(done_bytes: int, total_bytes: int | None) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True)
class Policy:
    """How patient a transfer is."""

    timeout_s: float = 30.0
    attempts: int = 5
    """Attempts in a row that bring no new byte before the other side is given up."""
    max_attempts: int = 50
    backoff_s: float = 1.0
    max_wait_s: float = 60.0
    """Longest wait between attempts, whatever `Retry-After` says."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)


class Retry(Exception):
    """Try the same address again; the tasks never see it."""

    def __init__(self, kind: str, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.wait_s = wait_s


class Failed(Exception):
    """Give this address up; the tasks never see it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def backoff(policy: Policy, fruitless: int, retry: Retry) -> None:
    """Wait as long as the server asks, or twice as long as last time, within the policy's bounds."""
    wait_s = policy.backoff_s * 2 ** max(fruitless - 1, 0) if retry.wait_s is None else retry.wait_s
    policy.sleep(min(max(wait_s, 0.0), policy.max_wait_s))
