"""`medsr upscale` on a worker of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from medsr_cli.tasks.cluster_worker import Parcel, Runner, Taken
from medsr_cli.tasks.progress import Silent
from medsr_cli.tasks.request import Item, UpscaleRequest

R = TypeVar("R")


@dataclass(frozen=True)
class Upscaling:
    """What is sent to every worker: the request of the whole batch."""

    request: UpscaleRequest = field(repr=False)
    several: bool = True
    """Whether results go into a folder, as those of a batch do."""

    @classmethod
    def of(cls, request: UpscaleRequest, *, several: bool = True) -> Upscaling:
        """For processes with another working directory."""
        return cls(absolute(request), several)

    def __call__(self, taken: Taken) -> Runner:
        """Load nothing yet; the first item does."""
        return _Worker(self.request, self.several, taken)


class _Worker:
    """Keeps the models that a batch needs."""

    def __init__(self, request: UpscaleRequest, several: bool, taken: Taken) -> None:
        from medsr_cli.tasks.upscale import Upscaler

        self._several, self._progress = several, _Watching()
        self._upscaler = Upscaler(request, self._progress)
        again = replace(request, overwrite=True, skip_existing=False)
        self._again = Upscaler(again, self._progress)
        # One set of models and of names for both.
        self._again._models, self._again._taken = self._upscaler._models, taken
        self._upscaler._taken = taken

    def __call__(self, parcel: Parcel, again: bool, stopped: Callable[[], None]) -> Sequence[Item]:
        """Do one item as one machine does."""
        self._progress.stopped = stopped
        upscaler = self._again if again else self._upscaler
        return list(upscaler._together(parcel.paths, self._several))


class _Watching(Silent):
    """Tells nobody, and looks from slice to slice whether anybody still waits."""

    def __init__(self) -> None:
        self.stopped: Callable[[], None] = lambda: None

    def slices(self, done: int, total: int) -> None:
        """Raise if nobody does."""
        self.stopped()


def absolute(request: R) -> R:
    """A request with every path in it made absolute, whatever it is nested in; `~` and links stay as they are."""
    return cast("R", _absolute(request))


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        return tuple(_absolute(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {entry.name: _absolute(getattr(value, entry.name)) for entry in fields(value) if entry.init}
        if isinstance(changed.get("weights"), str) and Path(changed["weights"]).exists():
            changed["weights"] = str(Path(changed["weights"]).absolute())
        return replace(value, **changed)
    return value
