"""Decoded pixels against other people's decoders, and colours that are never tinted."""

import io
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from pydicom.uid import JPEG2000, JPEGBaseline8Bit

from medsr_cli.errors import InputRefused
from medsr_cli.formats import dicom_codestream, dicom_pixels
from medsr_cli.formats.dicom import open_reader
from tests.formats.dicom_makers import OPTIONS, SHARED, compressed, header, save

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")

FIXTURES = [
    "big_endian/ExplVR_BigEnd.dcm", "big_endian/MR_small_bigendian.dcm", "big_endian/emri_small_big_endian.dcm",
    "cxr_jpeg_baseline/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm",
    "decimal_rescale/decimal_rescale.dcm", "deflated/image_dfl.dcm", "enhanced_mr_siemens_xa10/6_1.dcm",
    "enhanced_multiframe/emri_small.dcm", "htj2k_lossless_rgb_photo/HTJ2KLossless_08_RGB.dcm",
    "hyperfine_multiframe_noise_pixels/001.dcm", "implicit_vr/MR_small_implicit.dcm",
    "jpeg2000_lossless/MR2_J2KR.dcm", "jpeg2000_lossless/emri_small_jpeg_2k_lossless.dcm",
    "jpeg2000_lossy/MR2_J2KI.dcm", "jpeg_baseline_ybr_colour_cine_30frames/examples_ybr_color.dcm",
    "jpeg_extended_12bit/JPGExtended.dcm", "jpeg_lossless_sv1/JPEG-LL.dcm", "jpeg_ls_lossless/JLSL_16_15_1_1F.dcm",
    "jpeg_ls_lossless/MR_small_jpeg_ls_lossless.dcm", "jpeg_ls_lossless/emri_small_jpeg_ls_lossless.dcm",
    "jpeg_ls_near_lossless/JPEGLSNearLossless_16.dcm", "malformed_sequence_ct/bad_sequence.dcm",
    "monochrome1_no_pixel_spacing/RG3_J2KI.dcm", "palette_colour/OBXXXX1A_rle.dcm",
    "palette_colour/OBXXXX1A_rle_2frame.dcm", "plain_small/CT_small.dcm", "plain_small/MR_small.dcm",
    "rgb_jpeg2000_mr_4slices/IM-0001-0001-0001.dcm", "rle/MR_small_RLE.dcm", "rle/emri_small_RLE.dcm",
    "secondary_capture_rgb/SC_rgb.dcm", "secondary_capture_rgb/SC_rgb_16bit.dcm",
    "secondary_capture_rgb/SC_ybr_full_422_uncompressed.dcm", "trailing_padding/MR_small_padded.dcm",
    "us_colour_no_pixel_spacing/US1_J2KR.dcm", "voi_lut/vlut_04.dcm",
]  # fmt: skip


@needs_shared
@pytest.mark.parametrize("name", FIXTURES)
def test_values_are_those_that_simpleitk_reads(name):
    path = SHARED / name
    ours = np.moveaxis(np.array(list(open_reader(path, OPTIONS).slices())), 1, -1).squeeze().astype(np.float64)
    tags = pydicom.dcmread(path, stop_before_pixels=True)
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).squeeze().astype(np.float64)
    if tags.PhotometricInterpretation == "MONOCHROME1":  # ITK turns it around
        theirs = (1 << tags.BitsStored) - 1 - theirs
    if tags.PhotometricInterpretation == "PALETTE COLOR" and theirs.max() > 255:
        theirs = theirs // 256
    ours = ours * float(tags.get("RescaleSlope", 1)) + float(tags.get("RescaleIntercept", 0))
    # Summation order of the scaling differs in the last digits; nothing else may.
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-4)


TWINS = {
    "plain_small/MR_small.dcm": [
        "big_endian/MR_small_bigendian.dcm", "implicit_vr/MR_small_implicit.dcm", "rle/MR_small_RLE.dcm",
        "jpeg_ls_lossless/MR_small_jpeg_ls_lossless.dcm", "trailing_padding/MR_small_padded.dcm",
    ],
    "enhanced_multiframe/emri_small.dcm": [
        "big_endian/emri_small_big_endian.dcm", "rle/emri_small_RLE.dcm",
        "jpeg_ls_lossless/emri_small_jpeg_ls_lossless.dcm", "jpeg2000_lossless/emri_small_jpeg_2k_lossless.dcm",
    ],
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize(("plain", "packed"), [(a, b) for a, names in TWINS.items() for b in names])
def test_the_same_image_packed_otherwise_has_the_same_values(plain, packed):
    for a, b in zip(*(open_reader(SHARED / name, OPTIONS).slices() for name in (plain, packed)), strict=True):
        assert np.array_equal(a, b)


@needs_shared
def test_a_series_is_what_simpleitk_reads():
    path = SHARED / "series_ct_torso_jpeg2000"
    files = sorted((file for file in path.iterdir()), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))
    wanted = {0: files[0], 19: files[-1]}
    for at, pixels in enumerate(open_reader(path, OPTIONS).slices()):
        if at in wanted:
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(wanted[at])))[0]
            assert np.array_equal(pixels[0].astype(int) - 1024, theirs)


def picture():
    """A colourful, smooth picture that lossy compression hardly harms, (64, 48, 3)."""
    y, x = np.mgrid[0:64, 0:48]
    return np.stack([40 + x * 4, 40 + y * 3, 220 - x * 2 - y], -1).astype(np.uint8)


def jpeg(**options):
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def without_jfif(data):
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def with_adobe(data, transform):
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + data[2:]


def jpeg2000(**options):
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG2000", no_jp2=True, **options)
    return file.getvalue()


COLOURS = [
    ("JFIF, tagged YBR_FULL", lambda: jpeg(subsampling=0), JPEGBaseline8Bit, "YBR_FULL"),
    ("halved colours", lambda: jpeg(subsampling=2), JPEGBaseline8Bit, "YBR_FULL_422"),
    ("JFIF, tagged RGB", lambda: jpeg(subsampling=0), JPEGBaseline8Bit, "RGB"),
    ("no marker, tagged YBR", lambda: without_jfif(jpeg(subsampling=0)), JPEGBaseline8Bit, "YBR_FULL_422"),
    ("no marker, halved, tagged RGB", lambda: without_jfif(jpeg(subsampling=2)), JPEGBaseline8Bit, "RGB"),
    ("Adobe says YCC", lambda: with_adobe(without_jfif(jpeg()), 1), JPEGBaseline8Bit, "YBR_FULL_422"),
    ("Adobe says YCC, tagged RGB", lambda: with_adobe(without_jfif(jpeg()), 1), JPEGBaseline8Bit, "RGB"),
    ("components named RGB", lambda: jpeg(keep_rgb=True), JPEGBaseline8Bit, "RGB"),
    ("components named RGB, tagged YBR", lambda: jpeg(keep_rgb=True), JPEGBaseline8Bit, "YBR_FULL_422"),
    ("reversible transform", lambda: jpeg2000(mct=1), JPEG2000, "YBR_RCT"),
    ("irreversible transform", lambda: jpeg2000(mct=1, irreversible=True), JPEG2000, "YBR_ICT"),
    ("no transform", lambda: jpeg2000(mct=0), JPEG2000, "RGB"),
    ("transform, tagged RGB", lambda: jpeg2000(mct=1), JPEG2000, "RGB"),
    ("transform, tagged YBR_FULL", lambda: jpeg2000(mct=1), JPEG2000, "YBR_FULL"),
]


@pytest.mark.parametrize(("make", "syntax", "tagged"), [case[1:] for case in COLOURS], ids=[c[0] for c in COLOURS])
def test_colours_are_never_tinted(tmp_path, make, syntax, tagged):
    path = compressed(tmp_path / "a.dcm", [make()], syntax, tagged, (64, 48))
    pixels = np.moveaxis(next(open_reader(path, OPTIONS).slices()), 0, -1).astype(int)
    assert np.abs(pixels - picture()).mean() < 1.5


@pytest.mark.parametrize("planar", [0, 1])
def test_uncompressed_colours_of_either_arrangement(tmp_path, planar):
    ds = header(rows=64, columns=48)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", planar
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    stored = np.moveaxis(picture(), -1, 0) if planar else picture()
    save(ds, tmp_path / "a.dcm", np.ascontiguousarray(stored))
    assert np.array_equal(next(open_reader(tmp_path / "a.dcm", OPTIONS).slices()), np.moveaxis(picture(), -1, 0))


def test_a_palette_of_true_sixteen_bits_is_not_squeezed(tmp_path):
    ds = header(rows=4, columns=4)
    ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = "PALETTE COLOR", 8, 8, 7
    tables = {}
    for colour, factor in (("Red", 257), ("Green", 101), ("Blue", 3)):
        tables[colour] = (np.arange(256) * factor).astype("<u2")
        setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{colour}PaletteColorLookupTableData", tables[colour].tobytes())
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15
    save(ds, tmp_path / "a.dcm", indices)
    reader = open_reader(tmp_path / "a.dcm", OPTIONS)
    assert reader.volume.dtype == np.uint16
    assert np.array_equal(next(reader.slices()), np.array([table[indices] for table in tables.values()]))


def test_frames_of_a_cine_are_decoded_in_any_order(tmp_path):
    shades = []
    for level in (10, 90, 200):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(file, "JPEG", quality=100)
        shades.append(file.getvalue())
    path = compressed(tmp_path / "a.dcm", shades, JPEGBaseline8Bit, "MONOCHROME2", (8, 8), samples=1)
    instance = open_reader(path, OPTIONS).instances[0]
    found = [int(pixels.mean()) for pixels in dicom_pixels.decode_frames(instance, [2, 0, 1])]
    assert found == [200, 10, 90]


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    for name in ("_decoded_by", "_decoded_by_simpleitk"):
        monkeypatch.setattr(dicom_pixels, name, lambda *a: pytest.fail("decoded"))
    for make, syntax in ((jpeg, JPEGBaseline8Bit), (jpeg2000, JPEG2000)):
        path = compressed(tmp_path / "a.dcm", [make()], syntax, "RGB", (64, 47))
        with pytest.raises(InputRefused, match="another size"):
            next(open_reader(path, OPTIONS).slices())


def test_codestreams_tell_what_they_claim():
    assert dicom_codestream.claim(jpeg()) == dicom_codestream.claim(jpeg2000()) == (64, 48, 3, 8)
    assert dicom_codestream.claim(b"nothing") is None
    assert dicom_codestream.claim(b"\xff\xd8\xff\xe0") is None


def test_a_codestream_of_an_impossible_depth_is_refused(tmp_path):
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + 4] = 143  # GDCM ends the whole process over this
    path = compressed(tmp_path / "a.dcm", [bytes(data)], JPEGBaseline8Bit, "RGB", (64, 48))
    with pytest.raises(InputRefused, match="another depth"):
        next(open_reader(path, OPTIONS).slices())


@needs_shared
def test_everything_is_read_without_codecs_that_are_gpl_or_may_end_the_process():
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gdcm", "_gdcm", "jpeg_ls"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import pydicom.pixels.decoders.pylibjpeg as plugin
for syntax in list(plugin._DECODERS):
    for name in [name for name in plugin._DECODERS[syntax] if name != "openjpeg"]:
        del plugin._DECODERS[syntax][name]
from pathlib import Path
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom import open_reader
for name in sys.argv[1:]:
    assert sum(1 for _ in open_reader(Path(name), ReadOptions()).slices())
"""
    names = [n for n in FIXTURES if n.split("/")[0].startswith(("jpeg", "cxr", "rle", "htj2k"))]
    done = subprocess.run(
        [sys.executable, "-c", program, *[str(SHARED / n) for n in names]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_heavy_is_imported_by_reading():
    program = "import sys, medsr_cli.formats.dicom; print(sorted({'torch', 'SimpleITK', 'nibabel'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
