"""Pictures: no bit is lost, tags that stay true stay, and what cannot be kept is refused."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its usual name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin

from medsr_cli.errors import ArgumentsError, InputRefused, RunError
from medsr_cli.formats import create_image, open_image
from medsr_cli.formats.contract import Derivation, ReadOptions
from medsr_cli.formats.limits import Limits

MADE_BY = Derivation("rdst-e", (2.0, 2.0), "medsr test")


def values(shape, dtype="uint8", seed=0) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, int(info.max) + 1, shape).astype(dtype)


def enlarge(path: Path, target: Path, rows=2, columns=2, **more) -> None:
    source = open_image(path)
    before = source.volume
    with create_image(
        target, source, before.enlarged(rows * before.rows, columns * before.columns), MADE_BY, **more
    ) as writer:
        for page in source.slices():
            writer.write(np.repeat(np.repeat(page, rows, 1), columns, 2))


def pages(path: Path) -> np.ndarray:
    return np.stack(list(open_image(path).slices()))


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [("L", 1, "uint8"), ("LA", 2, "uint8"), ("RGB", 3, "uint8"), ("RGBA", 4, "uint8"), ("I;16", 1, "uint16")],
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 9))
def test_png_identity_is_exact(mode, channels, dtype, rows, columns, seed, tmp_path):
    array = values((rows, columns, channels), dtype, seed)
    Image.frombytes(mode, (columns, rows), array.tobytes()).save(tmp_path / "in.png")
    enlarge(tmp_path / "in.png", tmp_path / "out.png", 1, 1, overwrite=True)
    with Image.open(tmp_path / "out.png") as again:
        assert again.mode == mode
        np.testing.assert_array_equal(np.asarray(again).reshape(array.shape), array)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_png_keeps_16_bits(channels, tmp_path):
    array = values((7, 9, channels), "uint16")
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "in.png"))
    source = open_image(tmp_path / "in.png")
    assert (source.volume.dtype, source.volume.channels, source.volume.alpha) == (np.uint16, channels, channels == 4)
    enlarge(tmp_path / "in.png", tmp_path / "out.png")
    again = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.png")))
    assert again.dtype == np.uint16
    np.testing.assert_array_equal(again, array.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_becomes_colours_and_says_so(transparent, tmp_path):
    image = Image.fromarray(values((5, 6, 3))).quantize(8)
    image.save(tmp_path / "in.png", **({"transparency": bytes(range(0, 80, 10))} if transparent else {}))
    mode = "RGBA" if transparent else "RGB"
    source = open_image(tmp_path / "in.png")
    assert (source.volume.channels, source.volume.alpha) == (len(mode), transparent)
    assert "palette" in source.volume.warnings[0]
    enlarge(tmp_path / "in.png", tmp_path / "out.png", 1, 1)
    with Image.open(tmp_path / "in.png") as before, Image.open(tmp_path / "out.png") as after:
        assert after.mode == mode
        assert after.tobytes() == before.convert(mode).tobytes()


def png_of_depth(depth: int, colour: int, rows: list[bytes], width: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_grey_of_few_bits_is_read_with_a_warning_and_one_bit_is_not(tmp_path):
    (tmp_path / "four.png").write_bytes(png_of_depth(4, 0, [b"\x01\x23", b"\xef\x88"], 4))
    source = open_image(tmp_path / "four.png")
    assert "4 bits become 8" in source.volume.warnings[0]
    np.testing.assert_array_equal(next(source.slices())[0] // 17, [[0, 1, 2, 3], [14, 15, 8, 8]])
    (tmp_path / "one.png").write_bytes(png_of_depth(1, 0, [b"\xa0"], 4))
    with pytest.raises(InputRefused, match="only black and white"):
        open_image(tmp_path / "one.png")
    (tmp_path / "deep.png").write_bytes(png_of_depth(16, 4, [bytes(8)], 2))
    with pytest.raises(InputRefused, match="16 bits with alpha"):
        open_image(tmp_path / "deep.png")


def test_png_keeps_texts_profile_and_the_size_of_a_print(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "CANARY^NAME")
    info.add_itxt("Comment", "größer", lang="de")
    info.add_text("Long", "text " * 500, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(values((6, 8, 3))).save(
        tmp_path / "in.png", pnginfo=info, dpi=(300, 150), icc_profile=profile, exif=exif
    )
    enlarge(tmp_path / "in.png", tmp_path / "out.png", rows=4, columns=2)
    with Image.open(tmp_path / "in.png") as before, Image.open(tmp_path / "out.png") as after:
        before.load()
        after.load()
        assert before.text.items() <= after.text.items()
        assert after.text["medsr_method"] == "rdst-e"
        assert after.info["icc_profile"] == profile
        assert after.getexif()[ExifTags.Base.Orientation] == 6
        # Inches on paper: pixels over dots per inch.
        for axis in (0, 1):
            paper = [image.size[axis] / image.info["dpi"][axis] for image in (before, after)]
            assert paper[1] == pytest.approx(paper[0], rel=1e-4)


def test_dots_per_inch_are_no_spacing_in_the_patient(tmp_path):
    Image.fromarray(values((6, 8))).save(tmp_path / "in.png", dpi=(96, 96))
    volume = open_image(tmp_path / "in.png").volume
    assert volume.spacing_mm is None
    assert volume.affine is None


def test_jpeg_keeps_orientation_and_says_that_detail_is_lost(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 100.0
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 16
    smooth = np.add.outer(np.arange(0, 160, 10), np.arange(0, 96, 4)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "in.jpg", exif=exif, dpi=(100, 100), comment=b"a note", quality=95)
    source = open_image(tmp_path / "in.jpg")
    assert (source.volume.rows, source.volume.columns) == (16, 24), "pixels as stored, not as displayed"
    assert "loses detail" in source.volume.warnings[0]
    enlarge(tmp_path / "in.jpg", tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as after:
        assert after.size == (48, 32)
        assert after.getexif()[ExifTags.Base.Orientation] == 6
        assert after.getexif()[ExifTags.Base.XResolution] == 200
        assert after.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == 48
        assert after.info["dpi"] == (200, 200)
        assert after.info["comment"].startswith(b"a note; medsr_method=rdst-e")
    assert np.abs(pages(tmp_path / "out.jpg")[0, 0] - smooth.repeat(2, 0).repeat(2, 1).astype(float)).mean() < 3


def test_colour_jpeg_is_written_without_subsampling(tmp_path):
    Image.fromarray(values((16, 16, 3))).save(tmp_path / "in.png")
    enlarge(tmp_path / "in.png", tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as after:
        assert [layer[1:3] for layer in after.layer] == [(1, 1)] * 3


@pytest.mark.parametrize(
    ("mode", "dtype"), [("L", "uint8"), ("I;16", "uint16"), ("I;16B", "uint16"), ("I", "int32"), ("F", "float32")]
)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_keeps_type_compression_and_values(mode, dtype, compression, tmp_path):
    array = values((7, 9), "uint16").astype(dtype)
    stored = array.astype(">u2") if mode == "I;16B" else array
    Image.frombytes(mode, (9, 7), stored.tobytes()).save(tmp_path / "in.tif", compression=compression)
    assert open_image(tmp_path / "in.tif").volume.dtype == np.dtype(dtype)
    enlarge(tmp_path / "in.tif", tmp_path / "out.tif")
    with Image.open(tmp_path / "out.tif") as after:
        assert after.info["compression"] == compression
        np.testing.assert_array_equal(np.asarray(after), array.repeat(2, 0).repeat(2, 1))


def test_signed_16_bit_tiff_keeps_its_sign(tmp_path):
    array = values((7, 9), "int16")
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "in.tif"))
    assert open_image(tmp_path / "in.tif").volume.dtype == np.int16
    enlarge(tmp_path / "in.tif", tmp_path / "out.tif", 1, 1)
    again = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.tif")))
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again, array)


def stack(path: Path, arrays, **more) -> None:
    first, *rest = [Image.fromarray(array) for array in arrays]
    first.save(path, save_all=True, append_images=rest, **more)


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate"])
def test_pages_of_a_tiff_are_slices_and_keep_their_tags(compression, orientation, tmp_path):
    arrays = values((5, 7, 9), "uint16")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[305], tags[274] = "CANARY^NAME", "scanner 1", orientation
    tags[282], tags[283], tags[296] = 100.0, 50.0, 3
    stack(tmp_path / "in.tif", arrays, tiffinfo=tags, compression=compression)
    enlarge(tmp_path / "in.tif", tmp_path / "out.tif", rows=3, columns=2)
    np.testing.assert_array_equal(pages(tmp_path / "out.tif")[:, 0], arrays.repeat(3, 1).repeat(2, 2))
    with Image.open(tmp_path / "out.tif") as after:
        assert after.n_frames == 5
        for page in range(5):
            after.seek(page)
            kept = after.tag_v2
            assert (kept[270], kept[305], kept[274], kept[296]) == ("CANARY^NAME", "scanner 1", orientation, 3)
            assert (kept[282], kept[283]) == (200, 150)
    if orientation != 1:
        return  # ITK makes 8-bit colours of what is to be turned for display
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.tif"))), arrays.repeat(3, 1).repeat(2, 2)
    )


def test_a_large_tiff_gets_64_bit_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr("medsr_cli.formats.raster.TIFF_LIMIT_BYTES", 100)
    arrays = values((3, 7, 9), "uint16")
    stack(tmp_path / "in.tif", arrays)
    enlarge(tmp_path / "in.tif", tmp_path / "out.tif", 1, 1)
    assert (tmp_path / "out.tif").read_bytes()[:4] == b"II+\0"
    np.testing.assert_array_equal(pages(tmp_path / "out.tif")[:, 0], arrays)


def test_pages_that_differ_are_refused(tmp_path):
    stack(tmp_path / "in.tif", [values((7, 9)), values((7, 8))])
    with pytest.raises(InputRefused, match="different sizes"):
        open_image(tmp_path / "in.tif")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_bmp_identity_is_exact_and_print_size_stays(mode, tmp_path):
    array = values((6, 8, len(mode)))
    Image.frombytes(mode, (8, 6), array.tobytes()).save(tmp_path / "in.bmp", dpi=(100, 100))
    enlarge(tmp_path / "in.bmp", tmp_path / "out.bmp")
    with Image.open(tmp_path / "out.bmp") as after:
        np.testing.assert_array_equal(np.asarray(after).reshape(12, 16, -1), array.repeat(2, 0).repeat(2, 1))
        assert after.info["dpi"][0] == pytest.approx(200, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "phrase"),
    [
        ("out.png", "float32", "cannot hold grey values of type float32"),
        ("out.png", "int16", "cannot hold grey values of type int16"),
        ("out.jpg", "uint16", "cannot hold grey values of type uint16"),
        ("out.bmp", "uint16", "cannot hold grey values of type uint16"),
        ("out.tif", "float64", "cannot hold grey values of type float64"),
    ],
)
def test_a_type_that_does_not_fit_is_an_argument_error(name, dtype, phrase, tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((1, 5, 6), dtype)), str(tmp_path / "in.nrrd"))
    with pytest.raises(ArgumentsError, match=phrase):
        enlarge(tmp_path / "in.nrrd", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_png_holds_one_slice(tmp_path):
    for slices in (1, 3):
        array = values((slices, 5, 6), "uint16")
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "in.nrrd"))
        if slices == 1:
            enlarge(tmp_path / "in.nrrd", tmp_path / "out.png")
            np.testing.assert_array_equal(pages(tmp_path / "out.png")[:, 0], array.repeat(2, 1).repeat(2, 2))
            continue
        with pytest.raises(ArgumentsError, match="A PNG holds one slice, and this image has 3"):
            enlarge(tmp_path / "in.nrrd", tmp_path / "more.png")


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_colours_for_print_are_refused(mode, tmp_path):
    Image.new(mode, (8, 6)).save(tmp_path / "in.tif")
    with pytest.raises(InputRefused, match="for print"):
        open_image(tmp_path / "in.tif")


def test_16_bit_colour_tiff_is_refused_rather_than_squeezed(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(values((6, 8, 3), "uint16"), isVector=True), str(tmp_path / "in.tif"))
    with pytest.raises(InputRefused, match=r"16 bits|kind of picture"):
        open_image(tmp_path / "in.tif")


def test_an_animation_is_refused(tmp_path):
    first, second = (Image.fromarray(values((6, 8), seed=seed)) for seed in (0, 1))
    first.save(tmp_path / "in.png", save_all=True, append_images=[second])
    with pytest.raises(InputRefused, match="animation"):
        open_image(tmp_path / "in.png")


def test_claims_over_the_limits_are_refused(tmp_path):
    Image.fromarray(values((60, 80))).save(tmp_path / "in.png")
    with pytest.raises(InputRefused, match="more than is allowed"):
        open_image(tmp_path / "in.png", ReadOptions(limits=Limits(slice_pixels=1000)))
    (tmp_path / "bomb.png").write_bytes(png_of_depth(8, 0, [b""] * 60_000, 60_000))
    with pytest.raises(InputRefused, match=r"more pixels|more than is allowed"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp"])
def test_damaged_pictures_never_escape(kind, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(values((40, 50, 3))).save(buffer, kind.upper())
    good, path = buffer.getvalue(), tmp_path / f"bad.{kind}"
    dice = random.Random(1)  # noqa: S311 - damage, not a secret
    refused = 0
    for n in range(150):
        bad = bytearray(good[: dice.randrange(4, len(good))] if n % 2 == 0 else good)
        for _ in range(dice.randrange(0, 6)):
            bad[dice.randrange(min(len(bad), 300))] = dice.randrange(256)
        path.write_bytes(bad)
        try:
            for _ in open_image(path).slices():
                pass
        except InputRefused:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("name", ["out.png", "out.tif"])
def test_missing_or_wrong_slices_leave_nothing_behind(name, tmp_path):
    Image.fromarray(values((6, 8))).save(tmp_path / "in.png")
    source = open_image(tmp_path / "in.png")
    page = next(source.slices())
    for wrong in ([], [page, page], [page[:, 1:]], [page.astype(np.uint16)]):
        with pytest.raises(RunError):
            write_pages(tmp_path / name, source, wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def write_pages(target: Path, source, wrong) -> None:
    with create_image(target, source, source.volume, MADE_BY) as writer:
        for page in wrong:
            writer.write(page)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["noise", "ramp", "constant"])
def test_colours_of_16_bits_are_written_as_itk_reads_them(channels, kind, tmp_path):
    from medsr_cli.formats.png_deep import encoded

    rows, columns = np.mgrid[:37, :53]
    plane = {"noise": None, "ramp": rows * 700 + columns * 300, "constant": rows * 0 + 4711}[kind]
    if plane is None:
        pixels = np.random.default_rng(2).integers(0, 65536, (channels, 37, 53)).astype(np.uint16)
    else:
        pixels = np.stack([plane + 1000 * at for at in range(channels)]).astype(np.uint16)
    png = encoded(pixels)
    (tmp_path / "a.png").write_bytes(png)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.png"), imageIO="PNGImageIO"))
    assert np.array_equal(np.moveaxis(found, -1, 0), pixels)
    # Not larger than what libpng makes of it, by more than a twentieth.
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "itk.png"), useCompression=True, imageIO="PNGImageIO")
    assert len(png) <= (tmp_path / "itk.png").stat().st_size * 1.05 + 100
    one = encoded(pixels[:, :1, :1])
    (tmp_path / "a.png").write_bytes(one)
    assert sitk.ReadImage(str(tmp_path / "a.png")).GetSize() == (1, 1)
