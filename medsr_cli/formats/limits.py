"""How large an input may claim to be; everything over a limit is refused before memory is taken for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medsr_cli.errors import InputRefused, mention

MIB = 1 << 20


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
