"""How large an input may claim to be; everything over a limit is refused before memory is taken for it.

Whoever reads really larger files than these raises a limit by the environment variable MEDSR_LIMITS, for example
`MEDSR_LIMITS="slices=200000 header_bytes=1G"`; the names are those of the fields of `Limits`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from medsr_cli.errors import ArgumentsError, InputRefused, mention

MIB = 1 << 20
GIB = 1 << 30

VARIABLE = "MEDSR_LIMITS"

DEFLATE_EXPANSION = 1040
"""Bytes that come out of a byte of deflate (gzip, zip, PNG) at most, rounded up: 258 bytes from two bits."""

_SETTING = re.compile(r"(?P<name>[a-z_]+)=(?P<number>\d+)(?P<unit>[KMGT]?)", re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}


@dataclass(frozen=True)
class Limits:
    """Ceilings for one input. The defaults leave room for the largest clinical series."""

    slice_pixels: int = 1 << 26
    """Pixels of one slice (8192 by 8192)."""
    slices: int = 100_000
    voxels: int = 1 << 33
    decoded_bytes: int = 1 << 36
    """Bytes of all pixels, decoded."""
    expansion: int = 400
    """Decoded bytes for each byte of a compressed file, beyond the first `expansion_floor_bytes`."""
    expansion_floor_bytes: int = 256 * MIB
    held_bytes: int = 256 * MIB
    """Bytes of what is held in memory decoded, as a whole: a deflated DICOM file, a MINC-1 volume."""
    header_bytes: int = 256 * MIB
    """Bytes of a DICOM header, that is, of everything but the pixels."""
    private_bytes: int = 128 * MIB
    """Of these, bytes of private elements."""
    elements: int = 200_000
    """Elements of a DICOM header, nested ones too, beyond one for every `element_bytes` of the file."""
    element_bytes: int = 64
    metadata_bytes: int = 64 * MIB
    """Bytes of the extensions of a NIfTI header, of the texts of a picture, of a list of files in an archive."""
    text_bytes: int = 8 * MIB
    """Bytes of a header that is text: NRRD, MetaImage, AFNI, PAR."""
    text_lines: int = 100_000
    """Lines of such a header."""
    sequence_depth: int = 64
    """Nested DICOM sequences."""
    files: int = 100_000
    """Files of one folder or archive."""

    def check_size(self, path: Path, rows: int, columns: int, slices: int, bytes_per_voxel: int) -> None:
        """Refuse an image that claims too much.

        Raises:
            InputRefused: the sentence says what is claimed and what is allowed.
        """
        if min(rows, columns, slices) < 1:
            msg = f"{mention(path.name)} has no pixels."
            raise InputRefused(msg)
        voxels = rows * columns * slices
        too_large = (
            rows * columns > self.slice_pixels
            or slices > self.slices
            or voxels > self.voxels
            or voxels * bytes_per_voxel > self.decoded_bytes
        )
        if too_large:
            msg = f"{mention(path.name)} claims {rows} x {columns} x {slices} voxels, more than is allowed."
            raise InputRefused(msg, "Check the header, or cut the volume into parts.")

    def most_decoded(self, packed_bytes: int) -> int:
        """Bytes that a compressed file of a size may decode to."""
        return min(self.expansion_floor_bytes + self.expansion * packed_bytes, self.decoded_bytes)

    def check_expansion(self, path: Path, claimed: int, packed_bytes: int, most: int | None = None) -> None:
        """Refuse a compressed file that claims more than it can hold, or than anybody would make it hold.

        Args:
            path: the file that makes the claim.
            claimed: bytes that it says it decodes to.
            packed_bytes: bytes of its compressed part.
            most: bytes that its method of compression can make of one byte; None where there is no such number.

        Raises:
            InputRefused: it does.
        """
        if most is not None and claimed > most * (packed_bytes + 1):
            msg = (
                f"{mention(path.name)} claims {claimed} bytes, more than its {packed_bytes} compressed bytes can hold."
            )
            raise InputRefused(msg, "The header is damaged, or the file is cut short.")
        if claimed > self.most_decoded(packed_bytes):
            msg = f"{mention(path.name)} claims to expand to {claimed} bytes, more than is allowed for its size."
            raise InputRefused(msg, "The header is damaged, or the file is a decompression bomb.")

    def most_elements(self, file_bytes: int) -> int:
        """Elements that the header of a DICOM file of a size may have."""
        return self.elements + file_bytes // self.element_bytes


def allowed() -> Limits:
    """The limits that hold here: the defaults, with what the environment variable MEDSR_LIMITS sets.

    Raises:
        ArgumentsError: the variable names a limit that there is not, or gives no whole number.
    """
    return _parsed(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=4)
def _parsed(text: str) -> Limits:
    names = {field.name for field in fields(Limits)}
    set_here: dict[str, int] = {}
    for word in re.split(r"[\s,;]+", text.strip()) if text.strip() else []:
        setting = _SETTING.fullmatch(word)
        if setting is None or setting["name"] not in names or int(setting["number"]) < 1:
            msg = f"{VARIABLE} does not say a limit and a whole number in each of its words."
            raise ArgumentsError(msg, f'Write it like {VARIABLE}="slices=200000 header_bytes=1G".')
        set_here[setting["name"]] = int(setting["number"]) * _UNITS[setting["unit"]]
    return Limits(**set_here)
