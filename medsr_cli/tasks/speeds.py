"""How fast each engine is on this machine: measured once, kept in the store, asked before every run with `auto`.

    MEDSR_HOME/speeds.json     {"machine": {"network": {"torch": seconds, "onnx": seconds}}}

A machine is its processor, the cores that this process may use and its GPUs; a network is its method and
configuration, the device, precision, threads, the size that was measured and the versions of everything that ran.
A file that cannot be read counts as empty, one that cannot be written is not kept: a measurement can be repeated.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsr_cli import __version__
from medsr_cli.engines.engine import Engine
from medsr_cli.engines.processor import cores
from medsr_cli.errors import MedsrError
from medsr_cli.formats.atomic import atomic_file

PROBE_SIDE = 64
"""Pixels along a side of the plane that is measured; a network's cost grows with the pixels, not faster."""
RUNS, RUNS_S = 5, 3.0
"""Timed runs after one to warm up, and the time after which no other is begun."""
MOST_S = 1e6
"""No plane takes longer: what says so is damaged."""
LIBRARIES = ("torch", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Workload:
    """What a run has to do: the planes of one volume, in pixels of the input."""

    rows: int
    columns: int
    planes: int

    @property
    def probe_size(self) -> tuple[int, int]:
        """Rows and columns of the plane to measure."""
        return min(self.rows, PROBE_SIDE), min(self.columns, PROBE_SIDE)

    @property
    def probes(self) -> float:
        """How many planes of that size the run has as many pixels as."""
        rows, columns = self.probe_size
        return self.planes * self.rows * self.columns / (rows * columns)


class Speeds:
    """The measurements of this machine in one store."""

    def __init__(self, home: Path) -> None:
        self.path = home / "speeds.json"

    def known(self, network: str) -> dict[str, float]:
        """Seconds for one plane by the name of the engine; empty where nothing was measured."""
        machines = self._read()
        found = machines.get(machine(), {})
        seconds = found.get(network, {}) if isinstance(found, dict) else {}
        if not isinstance(seconds, dict):
            return {}
        return {name: float(s) for name, s in seconds.items() if isinstance(s, int | float) and 0 < s < MOST_S}

    def keep(self, network: str, seconds: Mapping[str, float]) -> None:
        """Remember what was measured, beside what other machines and networks took."""
        machines = self._read()
        found = machines.get(machine())
        machines[machine()] = {**(found if isinstance(found, dict) else {}), network: dict(seconds)}
        with contextlib.suppress(OSError, MedsrError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path, overwrite=True) as file:
                file.write(json.dumps(machines, indent=1, sort_keys=True).encode())

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}


def network_key(method: str, config: Mapping[str, Any], **how: object) -> str:
    """A network and how it runs, as text that any other network or way differs from.

    Args:
        method: of the catalogue.
        config: its sizes.
        how: device, precision, threads, scale and size of the plane.
    """
    versions = {"medsr": __version__, **{name: v for name in LIBRARIES if (v := _version(name))}}
    return json.dumps({"method": method, "config": dict(config), **how, **versions}, sort_keys=True, default=str)


def seconds_per_plane(engine: Engine, rows: int, columns: int, *, warm: bool = True) -> float:
    """The median time for a plane of noise, given as many at once as the engine likes best.

    Args:
        engine: what to measure.
        rows: of the plane.
        columns: of the plane.
        warm: False takes one run, the first; it is never faster than those after it.
    """
    count = max(engine.batch_of(rows, columns), 1)
    rng = np.random.default_rng(0)
    planes = rng.random((count, engine.channels or 1, rows, columns))
    guide = rng.random((count, 1, *engine.size_of(rows, columns))) if engine.guided else None
    if warm:
        engine.run(planes, guide)
    taken: list[float] = []
    while len(taken) < (RUNS if warm else 1) and sum(taken) < RUNS_S:
        started = time.perf_counter()
        engine.run(planes, guide)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) / count


def machine() -> str:
    """Processor, cores of this process and GPUs."""
    return ", ".join((_processor(), f"{cores()} cores", *_gpus()))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Models of NVIDIA's driver, without asking a library that takes seconds to load."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
