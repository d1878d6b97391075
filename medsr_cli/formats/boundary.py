"""Where a library's exceptions end: whatever it raises about an input becomes one sentence and exit code 6."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from medsr_cli.errors import InputRefused, MedsrError, mention, reason_of


@contextlib.contextmanager
def refusing(file: Path | str, says: str = "is damaged or cut short", remedy: str = "") -> Iterator[None]:
    """Turn any exception of the block into `InputRefused`, naming the file and never what the exception said.

    Libraries put header values into their messages; those stay in the chained cause, which only a debug
    traceback shows. Interrupts and exits pass, and so does what is a sentence already.

    Args:
        file: the input that is being read, or its name.
        says: the predicate of the sentence, "<file> <says>."; `{error}` in it becomes the exception's type.
        remedy: what to do about it.

    Raises:
        InputRefused: the block raised.
    """
    try:
        yield
    except MedsrError:
        raise
    except Exception as error:
        name = file.name if isinstance(file, Path) else file
        raise _refusal(mention(name), error, says, remedy) from error


def _refusal(name: str, error: Exception, says: str, remedy: str) -> InputRefused:
    match error:
        case FileNotFoundError():
            return InputRefused(f"{name} does not exist, or a file that it needs does not.", "Check the path.")
        case PermissionError():
            return InputRefused(f"{name} cannot be read: permission denied.", "Check its permissions.")
        case MemoryError():
            return InputRefused(f"{name} needs more memory than there is.", "Give it in parts.")
        case RecursionError():
            return InputRefused(f"{name} is nested too deeply to be an image.", remedy)
        case OSError(errno=int()):  # the system's own words; those of libraries come without a number
            return InputRefused(f"{name} cannot be read: {reason_of(error)}.", "Check the disk.")
    return InputRefused(f"{name} {says.replace('{error}', type(error).__name__)}.", remedy)
