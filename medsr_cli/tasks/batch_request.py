"""What was asked of a batch as a whole: where its inputs are listed, what is recorded, when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medsr_cli.errors import ArgumentsError

MOST_JOBS = 64


@dataclass(frozen=True)
class BatchRequest:
    """The options of a batch that do not change any result."""

    files_from: str | None = None
    """A file that lists inputs, or `-` for standard input; beside those that are named."""
    null: bool = False
    """The list's paths end with a NUL byte instead of a line's end."""
    record: Path | None = None
    """The batch's record; None puts it into the folder of results, where there is one."""
    resume: bool = False
    """Go on with the batch of the record: what is done is passed over without being opened."""
    retry_failed: bool = False
    """Try again what was refused, too, although nothing changed."""
    fail_fast: bool = False
    """Stop after the first failure."""
    max_failures: int | None = None
    """Stop after so many failures."""
    jobs: int = 1
    """Threads that open, decode and measure the next inputs while the engine has one; 0 for none."""
    log_paths: bool = False
    """Whether the record may name files and reasons."""

    @property
    def most_failures(self) -> int | None:
        """After how many failures the batch stops; None for never."""
        return 1 if self.fail_fast else self.max_failures

    def refuse_contradictions(self) -> None:
        """Options that cannot both be meant.

        Raises:
            ArgumentsError: the sentence names them.
        """
        if self.null and self.files_from is None:
            msg = "-0 says how the paths of a list end, but there is no list."
            raise ArgumentsError(msg, "Add --files-from FILE, or --files-from - for standard input.")
        if self.fail_fast and self.max_failures not in (None, 1):
            msg = "--fail-fast stops after the first failure, --max-failures after more."
            raise ArgumentsError(msg, "Give one of them.")
        if self.max_failures is not None and self.max_failures < 1:
            msg = "--max-failures counts from 1."
            raise ArgumentsError(msg, "Leave it out to go on whatever fails.")
        if self.retry_failed and not self.resume:
            msg = "--retry-failed is about what --resume would pass over."
            raise ArgumentsError(msg, "Add --resume.")
        if not 0 <= self.jobs <= MOST_JOBS:
            msg = f"--jobs {self.jobs} is not a number of threads."
            raise ArgumentsError(msg, f"Give 0 to {MOST_JOBS}.")
