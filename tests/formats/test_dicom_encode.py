"""Lossless means lossless, for every depth, and for other people's decoders."""

import importlib.util
import itertools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian

from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.formats import dicom_encode
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_encode import SYNTAXES, encoded, photometric_after, refuse_syntax
from tests.formats.dicom_makers import OPTIONS, header, save

has_jpeg_ls = importlib.util.find_spec("jpeg_ls") is not None
needs_jpeg_ls = pytest.mark.skipif(not has_jpeg_ls, reason="pyjpegls is not installed")
PACKED = ["rle", "jpeg2000-lossless", pytest.param("jpegls-lossless", marks=needs_jpeg_ls)]
GREY = [*itertools.product((8, 9, 10, 12, 15, 16), (False, True))]
DCMTK = {"rle": "dcmdrle", "jpegls-lossless": "dcmdjpls"}


def pixels(bits, signed, shape, seed=1, allocated=None):
    """Noise with both ends of the range."""
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    made = np.random.default_rng(seed).integers(low, high, shape)
    made.flat[:2] = low, high - 1
    return made.astype(f"{'iu'[not signed]}{(allocated or (8 if bits <= 8 else 16)) // 8}")


def wrapped(path, name, stored, bits, *, signed=False, photometric="MONOCHROME2"):
    """A file around one encoded frame."""
    colour = stored.ndim == 3
    ds = header(rows=stored.shape[0], columns=stored.shape[1], sop_class=pydicom.uid.SecondaryCaptureImageStorage)
    ds.Modality = "OT"
    ds.file_meta.TransferSyntaxUID = SYNTAXES[name]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1 + 2 * colour, photometric_after(name, photometric)
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(signed)
    packed = encoded(stored, name, bits_stored=bits, signed=signed, photometric=photometric)
    ds.PixelData = encapsulate([packed])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return save(ds, path)


def values(path):
    return next(iter(open_reader(path, OPTIONS).slices()))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("bits", "signed"), GREY)
def test_grey_of_every_depth_comes_back(tmp_path, name, bits, signed):
    stored = pixels(bits, signed, (33, 47))
    path = wrapped(tmp_path / "a.dcm", name, stored, bits, signed=signed, photometric="MONOCHROME1")
    assert np.array_equal(values(path)[0], stored)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_colours_come_back(tmp_path, name, bits):
    stored = pixels(bits, False, (32, 41, 3))
    path = wrapped(tmp_path / "a.dcm", name, stored, bits, photometric="RGB")
    assert np.array_equal(values(path), np.moveaxis(stored, -1, 0))
    assert pydicom.dcmread(path).PhotometricInterpretation == ("YBR_RCT" if "2000" in name else "RGB")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (31, 40), (40, 31), (32, 32)])
def test_what_is_not_refused_for_its_size_is_packed(tmp_path, name, shape):
    stored = pixels(12, False, (40, 40))[: shape[0], : shape[1]]
    asked = {"bits_allocated": 16, "bits_stored": 12, "rows": shape[0], "columns": shape[1]}
    if name != "rle" and min(shape) < 32:
        with pytest.raises(ArgumentsError, match="narrower than 32"):
            refuse_syntax(name, **asked)
        return
    refuse_syntax(name, **asked)
    assert np.array_equal(values(wrapped(tmp_path / "a.dcm", name, stored, 12))[0], stored)


def test_few_bits_in_wide_words_and_in_bytes(tmp_path):
    stored = pixels(8, False, (16, 16), allocated=16)
    assert np.array_equal(values(wrapped(tmp_path / "a.dcm", "rle", stored, 8))[0], stored)
    few = pixels(2, False, (40, 40))
    refuse_syntax("jpeg2000-lossless", bits_allocated=8, bits_stored=2)
    assert np.array_equal(values(wrapped(tmp_path / "b.dcm", "jpeg2000-lossless", few, 2))[0], few)


def test_an_encoder_that_gives_up_is_told_in_a_sentence():
    tiny = np.zeros((3, 3), np.uint8)
    with pytest.raises(RunError, match="could not be packed"):
        encoded(tiny, "jpeg2000-lossless", bits_stored=8, signed=False, photometric="MONOCHROME2")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (12, True), (16, True), (16, False)])
def test_dcmtk_reads_the_same_values(tmp_path, name, bits, signed):
    tool = DCMTK.get(name)
    if tool is None or shutil.which(tool) is None:
        pytest.skip("no decoder of dcmtk for it")
    stored = pixels(bits, signed, (24, 18))
    path = wrapped(tmp_path / "a.dcm", name, stored, bits, signed=signed)
    subprocess.run([tool, path, tmp_path / "b.dcm"], check=True, capture_output=True)
    plain = pydicom.dcmread(tmp_path / "b.dcm")
    assert plain.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    word = plain.pixel_array.astype(np.int64) & ((1 << bits) - 1)  # dcmdjpls leaves the sign bits of narrow words zero
    assert np.array_equal(word, stored.astype(np.int64) & ((1 << bits) - 1))


def test_both_rle_encoders_make_the_same_bytes():
    stored = pixels(12, True, (40, 50))
    stored[10:20] = 5
    asked = {"bits_stored": 12, "signed": True, "photometric": "MONOCHROME2"}
    with mock.patch.object(dicom_encode, "_has", return_value=False):
        slow = encoded(stored, "rle", **asked)
    assert encoded(stored, "rle", **asked) == slow


@pytest.mark.parametrize("name", PACKED)
def test_many_threads_encode_at_once(name):
    # OpenJPEG's bindings ended the process here before they took turns.
    frames = [pixels(12, False, (90 + at, 120)) for at in range(12)]
    asked = {"bits_stored": 12, "signed": False, "photometric": "MONOCHROME2"}
    alone = [encoded(frame, name, **asked) for frame in frames]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda frame: encoded(frame, name, **asked), frames)) == alone


def test_values_out_of_range_are_not_packed():
    with pytest.raises(ValueError, match="fit"):
        encoded(np.full((4, 4), 4096, np.uint16), "rle", bits_stored=12, signed=False, photometric="MONOCHROME2")
    with pytest.raises(ValueError, match="codestreams"):
        encoded(np.zeros((4, 4), np.uint16), "explicit", bits_stored=12, signed=False, photometric="MONOCHROME2")


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("jpeg2000", (16, 12)),
        ("rle", (32, 32)),
        ("jpeg2000-lossless", (32, 20)),
        ("jpeg2000-lossless", (8, 1)),
        ("jpeg2000-lossless", (16, 8)),
        ("jpegls-lossless", (16, 7)),
        ("jpegls-lossless", (8, 7)),
    ],
)
def test_what_a_codec_cannot_do_is_refused_in_a_sentence(name, depth):
    with pytest.raises(ArgumentsError) as refusal:
        refuse_syntax(name, bits_allocated=depth[0], bits_stored=depth[1])
    assert name in refusal.value.sentence
    assert refusal.value.remedy


def test_refusals_of_numbers_and_of_a_missing_encoder():
    refuse_syntax("explicit", bits_allocated=32, bits_stored=32, floating=True)
    refuse_syntax("rle", bits_allocated=16, bits_stored=12)
    with pytest.raises(ArgumentsError, match="floating"):
        refuse_syntax("rle", bits_allocated=32, bits_stored=32, floating=True)
    with mock.patch.object(dicom_encode, "_has", return_value=False), pytest.raises(ArgumentsError, match="pyjpegls"):
        refuse_syntax("jpegls-lossless", bits_allocated=16, bits_stored=12)
