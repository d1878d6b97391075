"""Where a library's exceptions end: whatever it raises about an input becomes one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from medsr_cli.errors import InputRefused, MedsrError, mention


@contextlib.contextmanager
def refusing(path: Path, says: str = "is damaged or cut short") -> Iterator[None]:
    """Turn any exception of the block into `InputRefused`, naming the file and never what the exception said.

    Libraries put header values into their messages; those stay in the chained cause, which only a debug
    traceback shows.

    Args:
        path: the input that is being read.
        says: the predicate of the sentence, "<file> <says>."
    """
    try:
        yield
    except MedsrError:
        raise
    except FileNotFoundError as error:
        msg = f"{mention(path.name)} does not exist, or a file that it needs does not."
        raise InputRefused(msg) from error
    except PermissionError as error:
        msg = f"{mention(path.name)} cannot be read: permission denied."
        raise InputRefused(msg) from error
    except MemoryError as error:
        msg = f"{mention(path.name)} needs more memory than there is."
        raise InputRefused(msg) from error
    except Exception as error:
        msg = f"{mention(path.name)} {says}."
        raise InputRefused(msg) from error
