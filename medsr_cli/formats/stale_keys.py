"""Free keys that describe the grid an image once had, and so are no longer true of a finer one.

Converters leave the fields of the format they came from in the headers of NRRD and MetaImage files: those of NIfTI
under their own names, those of DICOM as `group|element`. Nothing places an image by them; they are left out rather
than left wrong.
"""

from __future__ import annotations

import re

_STALE = re.compile(
    r"dim\[[123]\]|pixdim\[[123]\]|srow_[xyz]|qoffset_[xyz]|vox_offset"
    r"|ITK_original_(spacing|direction)"
    r"|0028\|0010|0028\|0011|0028\|0030|0018\|1164|0020\|0032"
)


def is_stale(key: str) -> bool:
    """Whether a free key names a size, spacing or position of the coarser grid."""
    return _STALE.fullmatch(key.strip()) is not None
