"""`python -m medsr_cli` and the `medsr` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; ends the process with the documented exit code."""
    share_cores()
    have_streams()
    if "--log-paths" not in sys.argv:
        from medsr_cli.cli.log import own_stderr

        own_stderr()
    from medsr_cli.cli.app import run

    run()


def have_streams() -> None:
    """Open what a caller has closed (`2>&-`), to nowhere: else the next file, a result, would be the error output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")


def share_cores() -> None:
    """One thread for numpy's matrix products, unless the user has said otherwise; before numpy is imported.

    Slices are finished by numpy while the engine runs the next ones on all cores. Threads of both would wait for
    each other at every step: on two cores a whole run took 1.5 times its engine, and takes 1.02 times with this.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


if __name__ == "__main__":
    main()
