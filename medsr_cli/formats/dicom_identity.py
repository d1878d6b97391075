"""UIDs of derived objects: fresh ones, or ones that follow from the source and from what was done to it.

All are under the root 2.25, whose next part is a UUID as one decimal number (PS3.5 section B.2, ITU-T X.667): at
most 44 characters, without leading zeros, and nobody has to be asked for a root. Fresh ones are random (version 4 of
RFC 9562). Stable ones are version 8: the first bits of a SHA-256, 122 of them free, over

- what was done: method, scale, checkpoint and its SHA-256, degradation, version of medsr, old and new size, region,
  and the digest of the other settings and of the source's values, which may have been changed under its UIDs;
- how the object is put together: the rule for private elements, single frames or one multi-frame object, and which
  of several results of the series it is;
- every image of the stack, in order, by its SOPInstanceUID and frame: values are normalised per volume, so that one
  image more or less changes the pixels of all;
- for one object, its own source image and frame.

The transfer syntax is not in it: all of them store the same values, and an object that is only packed otherwise
keeps its UID (PS3.4 section B.4.1.3 and its notes on lossless conversion). What would differ between two runs is
left out of stable objects: the date and time of their creation and of the contribution.

An image without a SOPInstanceUID is told by the SHA-256 of its file.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.dicom_headers import Instance

ROOT = "2.25"
_CHUNK_BYTES = 1 << 20


class Frame(Protocol):
    """One frame of one file, as stacks hold them."""

    @property
    def instance(self) -> Instance:
        """Its file."""
        ...

    @property
    def index(self) -> int:
        """From 0."""
        ...


class Identities(Protocol):
    """Where UIDs of one derived series come from; what its files share is the same however often it is asked for."""

    stable: bool

    def series(self) -> str:
        """SeriesInstanceUID."""
        ...

    def study(self) -> str:
        """StudyInstanceUID for sources that name none."""
        ...

    def image(self, instance: Instance, frame: int | None) -> str:
        """SOPInstanceUID of what is derived from a file, or from one frame of it, counted from 0."""
        ...

    def concatenation(self, uid: str) -> str:
        """ConcatenationUID in the place of the source's."""
        ...


def fresh_uid() -> str:
    """A UID that nobody had before."""
    return f"{ROOT}.{uuid.uuid4().int}"


def stable_uid(*parts: str) -> str:
    """The UID of a list of texts: another list has another one."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    number = int.from_bytes(digest.digest()[:16], "big")
    number = number & ~(0xF << 76) | 8 << 76  # version 8
    number = number & ~(0x3 << 62) | 2 << 62  # variant of RFC 9562
    return f"{ROOT}.{number}"


@dataclass
class FreshIdentities:
    """Random UIDs."""

    stable: bool = field(default=False, init=False)
    _known: dict[tuple[str, ...], str] = field(default_factory=dict, init=False)

    def series(self) -> str:
        """SeriesInstanceUID."""
        return self._shared("series")

    def study(self) -> str:
        """StudyInstanceUID."""
        return self._shared("study")

    def image(self, instance: Instance, frame: int | None) -> str:
        """SOPInstanceUID."""
        return fresh_uid()

    def concatenation(self, uid: str) -> str:
        """ConcatenationUID."""
        return self._shared("concatenation", uid)

    def _shared(self, *key: str) -> str:
        return self._known.setdefault(key, fresh_uid())


@dataclass
class StableIdentities:
    """UIDs that follow from the sources and from what is done to them."""

    of: str
    """The UID that stands for both, from which the others follow."""
    stable: bool = field(default=True, init=False)

    @classmethod
    def derived(
        cls, derivation: Derivation, grid: tuple[int, ...], frames: Iterable[Frame], ordinal: int
    ) -> StableIdentities:
        """Those of one derived series.

        Args:
            grid: old rows and columns, new rows and columns, first row and column of the part.
            frames: all that the series is made of, in order.
            ordinal: which of several results of one series, from 0.
        """
        d = derivation
        done = [
            d.method, repr(tuple(float(s) for s in d.scale)), d.software, d.checkpoint_id or "",
            d.checkpoint_sha256 or "", d.degradation or "", d.settings, d.dicom.private_tags,
            str(d.dicom.multiframe), repr(tuple(int(n) for n in grid)), str(ordinal),
        ]  # fmt: skip
        sources = [f"{frame.index} {name}" for frame, name in _named(frames)]
        return cls(stable_uid("derived series", *done, *sources))

    def series(self) -> str:
        """SeriesInstanceUID."""
        return stable_uid("series", self.of)

    def study(self) -> str:
        """StudyInstanceUID."""
        return stable_uid("study", self.of)

    def image(self, instance: Instance, frame: int | None) -> str:
        """SOPInstanceUID."""
        return stable_uid("image", self.of, _name(instance), "" if frame is None else str(frame))

    def concatenation(self, uid: str) -> str:
        """ConcatenationUID."""
        return stable_uid("concatenation", self.of, uid)


def _named(frames: Iterable[Frame]) -> Iterable[tuple[Frame, str]]:
    names: dict[int, str] = {}
    for frame in frames:
        key = id(frame.instance)
        if key not in names:
            names[key] = _name(frame.instance)
        yield frame, names[key]


def _name(instance: Instance) -> str:
    """What tells an image from all others."""
    if instance.sop_instance:
        return f"uid {instance.sop_instance}"
    digest = hashlib.sha256()
    with instance.member.open() as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256 {digest.hexdigest()}"
