"""Every shared file through the whole command: it is upscaled, or refused with 6 and a sentence.

The tables of what exactly each file holds are in tests/formats; here each goes through `medsr upscale`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsr_cli import formats
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.tasks.study import series_of
from medsr_cli.volume.geometry import voxel_centres_mm

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
REFUSED = {
    "csa_slice_norm", "dicomdir", "no_file_meta", "no_pixels_rtplan",
    "no_pixels_structured_report", "parametric_map_float", "rtdose_32bit_multiframe", "seg_1bit",
    "siemens_mosaic_big_endian", "siemens_mosaic_explicit_le", "siemens_mosaic_implicit_le", "siemens_mosaic_rle",
    "truncated_pixels", "truncated.nii.gz", "one_bit.png",
    # Two different images under one UID.
    "palette_colour", "secondary_capture_rgb",
}  # fmt: skip
PARTS = {".img", ".raw", ".gz", ".rec"}


def inputs() -> list[Path]:
    if not SHARED.is_dir():
        return []
    found = [p for p in sorted((SHARED / "formats").rglob("*")) if p.is_file()]
    # Data files of two-file formats are read through their headers.
    found = [p for p in found if p.suffix.lower() not in PARTS or p.name.endswith(".nii.gz")]
    return found + sorted(p for p in (SHARED / "dicom").iterdir() if p.is_dir())


@pytest.mark.parametrize("path", inputs(), ids=lambda p: p.name)
def test_upscaled_or_refused(medsr, tmp_path, path):
    name = formats.default_name(path, "_x2").name
    target = tmp_path / name
    ended = medsr("upscale", path, "-m", "bicubic", "-s", 2, "-o", target, "-q")
    if ended.code:
        assert ended.code == 6, ended.err
        assert path.name in REFUSED, ended.err
        sentence = ended.err.strip()
        assert sentence.startswith("medsr: ")
        assert "Something went wrong" not in sentence
        assert not list(tmp_path.iterdir())
        return
    assert path.name not in REFUSED
    for chosen in series_of(path, ReadOptions()).todo:
        before = formats.open_image(path, chosen.options(ReadOptions())).volume
        check_same(before, formats.open_image(target / chosen.folder_name if chosen.folder_name else target).volume)


def check_same(before, after):
    assert (after.rows, after.columns, after.slices) == (2 * before.rows, 2 * before.columns, before.slices)
    assert after.dtype.kind == before.dtype.kind
    if before.affine is not None and after.affine is not None and after.format == before.format:
        corner = np.full((1, 3), -0.5)
        for axis in range(3):
            if axis not in before.plane_axes:
                corner[0, axis] = 0.0
        distance = voxel_centres_mm(before.affine, corner) - voxel_centres_mm(after.affine, corner)
        assert np.abs(distance).max() < 1e-3
