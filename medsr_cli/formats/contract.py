"""What every format offers: a reader that streams slices, and a writer that takes them in the same order.

The contract, checked for every format by one parametrised suite:

- A reader opens without reading pixels; `volume` is complete then, or opening raised.
- `slices()` yields every slice once, forward, (channels, rows, columns) in `volume.dtype` and native byte
  order; each call starts anew. Memory does not grow with the number of slices.
- Whatever is wrong with a file is an `InputRefused` whose sentence names the reason and the file, never a
  tag's value; nothing else escapes, neither on opening nor while slices are read.
- A writer made for a reader keeps every header field that is still true, changes what a finer grid changes,
  and takes exactly `volume.slices` slices (channels, rows', columns') in `volume.dtype`. The result appears
  under its name only when it is whole and was read back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from medsr_cli.formats.limits import Limits, allowed
from medsr_cli.volume.volume import Volume

Pixels = NDArray[Any]


@dataclass(frozen=True)
class ReadOptions:
    """How an input is to be read."""

    axis: str = "auto"
    """Slice axis: `auto`, an anatomical plane, or `0`, `1`, `2`."""
    series: str | None = None
    """SeriesInstanceUID (or an unambiguous part of it) in a DICOM folder that holds several."""
    limits: Limits = field(default_factory=allowed)


@dataclass(frozen=True)
class DicomOutput:
    """How a derived DICOM series is written; other formats leave no choice."""

    transfer_syntax: str = "explicit"
    """A name of `dicom_encode.SYNTAXES`; pixels are stored losslessly in all of them."""
    stable_uids: bool = False
    """UIDs that depend on the source's and on what was done alone, so that a second run makes the same ones."""
    multiframe: bool = False
    """Write an enhanced multi-frame source as such an object again, instead of classic single frames."""
    private_tags: str = "safe"
    """Which private elements are kept: a name of `dicom_private.RULES`."""
    ordinal: int = 0
    """Which of several results that one source series has, from 0."""


@dataclass(frozen=True)
class Derivation:
    """What was done to an image, in the words that go into its header."""

    method: str
    """For example `rdst-e`."""
    scale: tuple[float, float]
    """Enlargement along rows and columns."""
    software: str
    """Name and version of this program."""
    checkpoint_id: str | None = None
    checkpoint_sha256: str | None = None
    degradation: str | None = None
    """The degradation that the checkpoint was trained to undo."""
    remarks: tuple[str, ...] = ()
    """What else was done, a sentence each."""
    settings: str = ""
    """Digest of everything else that decides the pixels: region, guide, ensemble, fit, precision."""
    dicom: DicomOutput = field(default_factory=DicomOutput)

    def fields(self) -> dict[str, str]:
        """The same as texts of one line each, for headers that take named texts; what is not known is left out."""
        known = {
            "method": self.method,
            "scale": " ".join(f"{factor:g}" for factor in self.scale),
            "software": self.software,
            "checkpoint": self.checkpoint_id,
            "checkpoint_sha256": self.checkpoint_sha256,
            "degradation": self.degradation,
        }
        return {f"medsr_{name}": " ".join(text.split()) for name, text in known.items() if text}


class Reader(Protocol):
    """An opened image."""

    volume: Volume
    path: Path

    def slices(self) -> Iterator[Pixels]:
        """Every slice, forward."""
        ...

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """Facts for `medsr inspect` beside the volume: transfer syntax, codes, compression; no identity."""
        ...


class Writer(Protocol):
    """A result being written."""

    clipped: int
    """Values that the writer itself had to saturate; 0 where it takes the stored type."""
    warnings: tuple[str, ...]
    """What is lost in this format, a sentence each."""

    def write(self, pixels: Pixels) -> None:
        """Take the next slice."""
        ...


class Format(Protocol):
    """A module of this room that reads, and perhaps writes, one family of files."""

    def open_reader(self, path: Path, options: ReadOptions) -> Reader:
        """Open for reading."""
        ...

    def open_writer(
        self, target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool
    ) -> AbstractContextManager[Writer]:
        """Open `target` for the slices of `result`; its header comes from `source` where formats agree."""
        ...
