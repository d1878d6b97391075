"""How much longer `medsr --help`, `--version` and `models` take than an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9
TARGET_S = 0.25


def seconds(arguments: list[str]) -> float:
    """Median over `RUNS` of a whole process."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Print one line for each command."""
    empty = seconds(["-c", "pass"])
    for command in ("--help", "--version", "models"):
        more = seconds(["-m", "medsr_cli", command]) - empty
        print(f"medsr {command}: {more:.3f} s more than python -c pass (target {TARGET_S} s)")


if __name__ == "__main__":
    main()
