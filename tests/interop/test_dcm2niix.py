"""dcm2niix on source and result: the same orientation, position and field of view within 1e-3 mm, the same values.

The result is the nearest-neighbour enlargement, so that every value of the source stands in it four times, through
the real writer.
"""

import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest

from medsr_cli.errors import InputRefused
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_headers import PALETTE
from tests.formats.dicom_makers import OPTIONS, derive
from tests.interop.sources import FOLDERS, SHARED

pytestmark = [
    pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed"),
    pytest.mark.skipif(not FOLDERS, reason="the shared data are not here"),
]

GUESSED = {
    "hyperfine_multiframe_noise_pixels": "its first pixel lies at 0, 0, which dcm2niix takes for a missing position",
    "series_ct_gantry_tilt_phantom": "dcm2niix shears the rows of tilted slices by an amount of its own",
}
"""Where dcm2niix gives source and result a place that the header does not say; others look at these."""


ROUNDED = {"philips_slope_multiframe_noise_pixels": "3.313 mm between slices, where their positions say 3.3125"}
"""Where dcm2niix takes a rounded length from the source's header, and from the result's positions the right one."""


def converted(source, folder):
    """Images that dcm2niix makes of a folder, in the order of their names; none where it cannot."""
    folder.mkdir()
    command = ["dcm2niix", "-b", "n", "-z", "n", "-m", "n", "-f", "x", "-o", folder, source]
    subprocess.run(command, capture_output=True, check=False, timeout=120)
    found = sorted(path for path in folder.glob("*.nii") if "_Tilt" not in path.stem and "_Eq" not in path.stem)
    return [nib.load(path) for path in found]


def pieces(name):
    """What can be derived of a folder of the shared data: the folder, or each file in it."""
    folder = SHARED / name
    for paths in ([folder], sorted(folder.iterdir())):
        readers = []
        for path in paths:
            try:
                readers.append(open_reader(path, OPTIONS))
            except InputRefused:
                continue
        if readers:
            return readers
    return []


@pytest.mark.parametrize("name", FOLDERS)
def test_dcm2niix_sees_the_same_place_and_values(tmp_path, name):
    compared = 0
    for at, reader in enumerate(pieces(name)):
        source, result = tmp_path / f"source{at}", tmp_path / f"result{at}"
        source.mkdir()
        for instance in reader.instances:
            shutil.copy(instance.member.path, source)
        derive(reader, result)
        before, after = converted(source, tmp_path / f"a{at}"), converted(result, tmp_path / f"b{at}")
        if not before:
            continue
        assert len(after) == len(before)
        placed = reader.stack.frames[0].plane.position_mm is not None and name not in GUESSED
        for old, new in zip(before, after, strict=True):
            assert new.shape == (2 * old.shape[0], 2 * old.shape[1], *old.shape[2:])
            if placed:
                same_place(old, new, last_slice=name not in ROUNDED)
            if readable(reader):
                same_values(old, new, turned=not placed)
        compared += 1
    if not compared:
        pytest.skip("dcm2niix makes nothing of it, or it is refused")


def readable(reader):
    """Whether dcm2niix reads the same values from the source as medsr does.

    Two decoders of lossy JPEG differ by some units; a palette becomes the colours that it stands for; of compressed
    frames in one file dcm2niix reads the first.
    """
    first = reader.instances[0]
    packed = first.compressed and first.frames > 1
    return not (reader.details()["lossy_compression"] or first.photometric == PALETTE or packed)


def same_place(old, new, *, last_slice):
    # Corners of the field of view: half a voxel outside of the first and the last centre.
    depth = old.shape[2] - 1 if len(old.shape) > 2 and last_slice else 0
    for i, j, k in np.ndindex(2, 2, 2):
        places = []
        for image in (old, new):
            rows, columns = image.shape[:2]
            places.append(image.affine @ [i * rows - 0.5, j * columns - 0.5, k * depth, 1])
        assert np.linalg.norm(places[0] - places[1]) < 1e-3
    along = [image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0) for image in (old, new)]
    assert np.abs(along[0] - along[1]).max() < 1e-5


def same_values(old, new, *, turned):
    """Every value twice along rows and columns; dcm2niix turns images without a position around as it likes."""
    wanted, got = np.asanyarray(old.dataobj).repeat(2, 0).repeat(2, 1), np.asanyarray(new.dataobj)
    turns = [(), (0,), (1,), (0, 1)] if turned else [()]
    assert any(np.array_equal(wanted, np.flip(got, axes)) for axes in turns)
