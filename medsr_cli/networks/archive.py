"""Checkpoints that their authors publish inside a zip archive, beside settings and other files."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.errors import WeightsError, mention
from medsr_cli.networks import checkpoint

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth")
TORCH_MEMBER = "data.pkl"
"""What PyTorch's own archives hold: those are checkpoints themselves."""


def read_published_checkpoint(path: str | PathLike[str], harmless: Sequence[Any] = ()) -> dict[str, Tensor]:
    """`checkpoint.read_author_checkpoint` of a file, or of the one checkpoint in a zip archive.

    A member is copied to a temporary file first, no more of it than the archive's list of contents says.

    Raises:
        WeightsError: as there; or the archive is damaged, too large, or holds not exactly one checkpoint.
    """
    path = Path(path)
    if not path.is_file() or path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return checkpoint.read_author_checkpoint(path, harmless)
    try:
        with zipfile.ZipFile(path) as archive:
            member = _packed_member(archive, path.name)
            if member is None:
                return checkpoint.read_author_checkpoint(path, harmless)
            with tempfile.TemporaryDirectory(prefix="medsr-") as folder:
                # Ends at the size that was checked, and fails on another checksum.
                return checkpoint.read_author_checkpoint(archive.extract(member, folder), harmless)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        msg = f"{mention(path.name)} is not a readable archive ({str(error)[:120].rstrip('.')})."
        raise WeightsError(msg, "Fetch it again.") from error


def _packed_member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo | None:
    """The checkpoint in an archive; None where the archive is one itself."""
    members = [info for info in archive.infolist() if not info.is_dir()]
    if any(Path(info.filename).name == TORCH_MEMBER for info in members):
        return None
    # macOS archives carry a shadow of each file, whose name begins with a dot and an underscore.
    packed = [info for info in members if info.filename.endswith(SUFFIXES)]
    packed = [info for info in packed if not Path(info.filename).name.startswith("._")]
    if len(packed) != 1:
        msg = f"{mention(name)} is an archive with {len(packed)} checkpoints in it; one is needed."
        raise WeightsError(msg, "Unpack it and name the checkpoint itself.")
    if packed[0].file_size > checkpoint.MAX_FILE_BYTES:
        msg = f"{mention(name)} unpacks to {packed[0].file_size} bytes; no network here has so many."
        raise WeightsError(msg, "Check that it is the right file.")
    return packed[0]
