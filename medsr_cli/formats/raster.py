"""Pictures: PNG, JPEG, TIFF (its pages are slices) and BMP, through Pillow; 16-bit colour PNG is read through ITK.

Pixels are stored as they were: what turns them for display (EXIF orientation) stays a tag. Resolution tags are
rescaled, so that a print keeps its size; they never become a spacing in the patient, because the dots per inch of a
screenshot are none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from medsr_cli.errors import ArgumentsError, InputRefused, RunError, mention
from medsr_cli.formats import png_deep
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.boundary import refusing
from medsr_cli.formats.bounded import open_bounded
from medsr_cli.formats.contract import Derivation, Pixels, Reader, ReadOptions, Writer
from medsr_cli.formats.limits import DEFLATE_EXPANSION, Limits
from medsr_cli.formats.png_chunks import (
    bit_depth_and_colour,
    kept_chunks,
    packed_row_bytes,
    rescaled,
    text_chunk,
    with_chunks,
)
from medsr_cli.formats.tiff_pages import count_pages
from medsr_cli.formats.tiff_tags import kept_tags
from medsr_cli.volume.volume import Volume

# At its debug level Pillow logs the values of tags, and those can be names.
logging.getLogger("PIL").setLevel(logging.WARNING)

JPEG_QUALITY = 95
TIFF_LIMIT_BYTES = 4_000_000_000
"""From here on a TIFF is written with 64-bit offsets (BigTIFF)."""

_PILLOW_NAMES = {"png": "PNG", "jpeg": "JPEG", "tiff": "TIFF", "bmp": "BMP"}
_SUFFIXES = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".jpe": "jpeg", ".tif": "tiff", ".tiff": "tiff", ".bmp": "bmp",
}  # fmt: skip

_MODES: dict[str, tuple[str, int, bool]] = {
    "L": ("u1", 1, False),
    "LA": ("u1", 2, True),
    "RGB": ("u1", 3, False),
    "RGBA": ("u1", 4, True),
    "I;16": ("u2", 1, False),
    "I;16B": ("u2", 1, False),
    "I;16L": ("u2", 1, False),
    "I": ("i4", 1, False),
    "F": ("f4", 1, False),
}
"""Pillow's modes that are read: type, channels, alpha. A palette becomes RGB or RGBA."""

_WRITTEN: dict[str, dict[tuple[str, int], str]] = {
    "png": {
        ("u1", 1): "L", ("u1", 2): "LA", ("u1", 3): "RGB", ("u1", 4): "RGBA", ("u2", 1): "I;16",
        ("u2", 3): "deep", ("u2", 4): "deep",
    },
    "jpeg": {("u1", 1): "L", ("u1", 3): "RGB"},
    "bmp": {("u1", 1): "L", ("u1", 3): "RGB"},
    "tiff": {
        ("u1", 1): "L", ("u1", 2): "LA", ("u1", 3): "RGB", ("u1", 4): "RGBA", ("u2", 1): "I;16", ("i2", 1): "I;16",
        ("i4", 1): "I", ("f4", 1): "F",
    },
}  # fmt: skip
"""What each format can hold, and in which of Pillow's modes; `deep` is colour of 16 bits, which has none."""

_LOSSY = "A JPEG result loses detail again when it is saved; name the output .png to keep it."


@dataclass(frozen=True)
class _Kind:
    """How the pixels of a picture are to be taken."""

    mode: str
    """Pillow's mode, or `itk` for 16-bit colour."""
    dtype: np.dtype[Any]
    channels: int
    alpha: bool
    highest: float | None = None
    warnings: tuple[str, ...] = ()


class RasterReader:
    """An opened picture or stack of pictures."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path = path
        with refusing(path, "is damaged, or of a kind of picture that is not read"), _opened(path) as image:
            # A preview behind a camera's JPEG makes it MPO, which is JPEG for whoever reads one picture.
            name = str(image.format).lower().replace("mpo", "jpeg")
            pages = _pages(image, name, path, options.limits)
            self._kind = _kind(image, name, path)
            columns, rows = image.size
            pixel_bytes = self._kind.channels * self._kind.dtype.itemsize
            options.limits.check_size(path, rows, columns, pages, pixel_bytes)
            options.limits.check_expansion(path, rows * columns * pages * pixel_bytes, path.stat().st_size)
            if name == "png":
                # The pixels as they are packed: a palette's entries, or bits, are fewer than what becomes of them.
                packed = rows * packed_row_bytes(path, columns)
                options.limits.check_expansion(path, packed, path.stat().st_size, DEFLATE_EXPANSION)
            _check_pages(image, pages, path)
            self._compression = str(image.info.get("compression", "")) if name == "tiff" else None
        self.volume = Volume(
            format=name,
            rows=rows,
            columns=columns,
            slices=pages,
            dtype=self._kind.dtype,
            channels=self._kind.channels,
            alpha=self._kind.alpha,
            array_shape=(columns, rows) if pages == 1 else (columns, rows, pages),
            highest=self._kind.highest,
            warnings=self._kind.warnings + ((_LOSSY,) if name == "jpeg" else ()),
        )

    def slices(self) -> Iterator[Pixels]:
        """Every page, forward."""
        if self._kind.mode == "itk":
            with refusing(self.path):
                yield _read_with_itk(self.path)
            return
        with refusing(self.path), _opened(self.path) as image:
            for page in range(self.volume.slices):
                if page:
                    image.seek(page)
                yield _pixels(image, self._kind)

    def details(self) -> Mapping[str, str | int | float | bool | None]:
        """How the pixels are stored."""
        return {"mode": self._kind.mode, "pages": self.volume.slices, "compression": self._compression}

    def page_tags(self, page: int) -> TiffImagePlugin.ImageFileDirectory_v2 | None:
        """The tags of a TIFF's page that stay true; None for other formats."""
        if self.volume.format != "tiff":
            return None
        with refusing(self.path), _opened(self.path) as image:
            image.seek(page)
            assert isinstance(image, TiffImagePlugin.TiffImageFile)  # noqa: S101 - Pillow's own type for the format
            return kept_tags(image.tag_v2)

    @property
    def compression(self) -> str | None:
        """Pillow's name of a TIFF's compression."""
        return self._compression


def open_reader(path: Path, options: ReadOptions) -> Reader:
    """Open a picture.

    Raises:
        InputRefused: it is damaged, too large, animated, or of a kind whose pixels would have to be changed.
    """
    return RasterReader(path, options)


@contextlib.contextmanager
def open_writer(
    target: Path, source: Reader, result: Volume, derivation: Derivation, *, overwrite: bool = False
) -> Iterator[Writer]:
    """Write a picture, or a stack as TIFF; tags of a source of the same family are kept.

    Raises:
        ArgumentsError: the format of the target cannot hold these slices or values, or it exists.
        RunError: writing failed.
    """
    name = _SUFFIXES[target.suffix.lower()]
    mode = _mode_to_write(target, name, result)

    def verify(temporary: Path) -> None:
        _check_copy(temporary, name, result, target)

    with atomic_file(target, overwrite=overwrite, verify=verify) as file:
        writer = (
            _StackWriter(file, source, result, derivation, mode)
            if name == "tiff"
            else _PictureWriter(file, source, result, derivation, name, mode)
        )
        yield writer
        writer.finish()


def _mode_to_write(target: Path, name: str, result: Volume) -> str:
    title = _PILLOW_NAMES[name]
    if result.slices != 1 and name != "tiff":
        msg = f"A {title} holds one slice, and this image has {result.slices}."
        raise ArgumentsError(msg, "Name the output .nii.gz, or .tif for a stack of pictures.")
    mode = _WRITTEN[name].get((result.dtype.str[1:], result.channels))
    if mode is None:
        kind = {1: "grey", 2: "grey with alpha", 3: "colour", 4: "colour with alpha"}.get(result.channels, "vector")
        msg = f"{mention(target.name)} cannot hold {kind} values of type {result.dtype}."
        raise ArgumentsError(msg, "Name the output .nii.gz, .png or .tif, whichever keeps the type.")
    return mode


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # Too large is refused here, not warned about; what Pillow says about odd tags is nobody's concern.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with open_bounded(path) as file, Image.open(file, formats=list(_PILLOW_NAMES.values())) as image:
                yield image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            msg = f"{mention(path.name)} claims more pixels than a picture may have."
            raise InputRefused(msg, "Cut it into parts.") from error


def _pages(image: Image.Image, name: str, path: Path, limits: Limits) -> int:
    if name == "tiff" and count_pages(path, limits.slices) > limits.slices:
        # Pillow would take each of them apart to count them.
        msg = f"{mention(path.name)} has more than {limits.slices} pages, or one that leads back to another."
        raise InputRefused(msg, "Cut it into parts.")
    pages = int(getattr(image, "n_frames", 1))
    if pages > 1 and name == "png":
        msg = f"{mention(path.name)} is an animation, whose frames are differences rather than pictures."
        raise InputRefused(msg, "Save its frames as separate files.")
    return pages if name == "tiff" else 1


def _check_pages(image: Image.Image, pages: int, path: Path) -> None:
    """All pages of a stack are alike; only their headers are read for it."""
    first = (image.size, image.mode, _sample_layout(image))
    for page in range(1, pages):
        image.seek(page)
        if (image.size, image.mode, _sample_layout(image)) != first:
            msg = f"{mention(path.name)} has pages of different sizes or types."
            raise InputRefused(msg, "Save the pages that belong together as a file of their own.")
    image.seek(0)


def _sample_layout(image: Image.Image) -> tuple[Any, Any, Any]:
    """Bits per sample, sample format (1 unsigned, 2 signed, 3 float) and photometric meaning of a TIFF's page."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None, None, None
    tags = image.tag_v2
    return tags.get(258, (1,)), tags.get(339, (1,)), tags.get(262)


def _kind(image: Image.Image, name: str, path: Path) -> _Kind:
    mode = image.mode
    if mode == "1":
        msg = f"{mention(path.name)} has only black and white, so that there are no grey levels to enlarge."
        raise InputRefused(msg, "Convert it to grey first, if it is to be enlarged all the same.")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA"):
        msg = f"{mention(path.name)} holds {mode} values, made for print rather than measured."
        raise InputRefused(msg, "Convert it to RGB first.")
    if name == "png":
        return _png_kind(image, path)
    if name == "tiff":
        return _tiff_kind(image, path)
    return _plain_kind(image, path)


def _plain_kind(image: Image.Image, path: Path, *notes: str) -> _Kind:
    transparent = "transparency" in image.info
    if image.mode == "P":
        channels = 4 if transparent else 3
        note = "Colours from a palette become RGB values in the result."
        return _Kind(("RGB", "RGBA")[channels - 3], np.dtype("u1"), channels, transparent, warnings=(*notes, note))
    if image.mode not in _MODES:
        msg = f"{mention(path.name)} holds {image.mode} values, which are not read."
        raise InputRefused(msg, "Convert it to grey or RGB first.")
    if transparent:
        notes = (*notes, "A value marked as transparent is an ordinary value in the result.")
    code, channels, alpha = _MODES[image.mode]
    return _Kind(image.mode, np.dtype(code), channels, alpha, warnings=notes)


def _png_kind(image: Image.Image, path: Path) -> _Kind:
    depth, colour = bit_depth_and_colour(path)
    if depth == 16 and colour in (2, 6):
        # Pillow would halve the bits without a word.
        channels = 3 if colour == 2 else 4
        return _Kind("itk", np.dtype("u2"), channels, colour == 6)
    if depth == 16 and colour == 4:
        msg = f"{mention(path.name)} holds grey values of 16 bits with alpha, which cannot be read without loss."
        raise InputRefused(msg, "Save it as 16-bit grey without alpha.")
    if depth < 8 and colour == 0:
        return _plain_kind(image, path, f"Grey values of {depth} bits become 8 bits in the result.")
    return _plain_kind(image, path)


def _tiff_kind(image: Image.Image, path: Path) -> _Kind:
    bits, sample_format, photometric = _sample_layout(image)
    depth = max(bits)
    if image.mode in ("RGB", "RGBA", "LA", "P") and depth > 8:
        msg = f"{mention(path.name)} holds colours of {depth} bits, which cannot be read without loss."
        raise InputRefused(msg, "Save it as 16-bit PNG.")
    if depth > 8 and photometric == 0:
        msg = f"{mention(path.name)} stores white as 0 in {depth} bits, which cannot be kept."
        raise InputRefused(msg, "Save it with black as 0.")
    if image.mode == "I" and depth == 32 and sample_format[0] != 2:
        msg = f"{mention(path.name)} holds unsigned values of 32 bits, which are not read."
        raise InputRefused(msg, "Save it as float32.")
    if image.mode == "I" and depth == 16:
        return _Kind("I", np.dtype("i2"), 1, False)
    kind = _plain_kind(image, path)
    if depth in (9, 10, 11, 12, 14) and kind.dtype == np.dtype("u2"):
        note = f"Values of {depth} bits are stored in 16 bits in the result."
        return _Kind(kind.mode, kind.dtype, 1, False, float((1 << depth) - 1), (note,))
    return kind


def _pixels(image: Image.Image, kind: _Kind) -> Pixels:
    """The current page, (channels, rows, columns)."""
    image.load()
    if image.mode != kind.mode:
        if kind.mode not in ("RGB", "RGBA"):
            msg = "the mode changed while loading"
            raise ValueError(msg)
        image = image.convert(kind.mode)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    return np.array(np.moveaxis(array, -1, 0), kind.dtype, order="C")


def _itk() -> Any:
    import SimpleITK  # noqa: PLC0415 - a quarter of a second that only 16-bit colour needs

    itk: Any = SimpleITK
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk


def _read_with_itk(path: Path) -> Pixels:
    itk = _itk()
    array = itk.GetArrayFromImage(itk.ReadImage(str(path), imageIO="PNGImageIO"))
    return np.array(np.moveaxis(array, -1, 0), np.uint16, order="C")


def _to_pillow(pixels: Pixels, mode: str) -> Image.Image:
    array: NDArray[Any] = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    if mode == "I;16":
        array = array.view(np.uint16).astype("<u2")
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), np.ascontiguousarray(array).tobytes())


class _PictureWriter:
    """Takes the one slice of a PNG, JPEG or BMP."""

    clipped = 0

    def __init__(
        self, file: BinaryIO, source: Reader, result: Volume, derivation: Derivation, name: str, mode: str
    ) -> None:
        self.warnings: tuple[str, ...] = (_LOSSY,) if name == "jpeg" and source.volume.format != "jpeg" else ()
        self._file, self._source, self._result = file, source, result
        self._derivation, self._name, self._mode = derivation, name, mode
        self._taken = 0

    def write(self, pixels: Pixels) -> None:
        """Take the slice, (channels, rows, columns)."""
        _check_slice(pixels, self._result, self._taken)
        self._taken += 1
        if self._name == "png":
            self._write_png(pixels)
        else:
            image = _to_pillow(pixels, self._mode)
            image.save(self._file, _PILLOW_NAMES[self._name], **self._options())

    def finish(self) -> None:
        """Check that the slice came."""
        _check_all(self._taken, self._result)

    def _write_png(self, pixels: Pixels) -> None:
        if self._mode == "deep":
            png = png_deep.encoded(pixels)
        else:
            buffer = io.BytesIO()
            _to_pillow(pixels, self._mode).save(buffer, "PNG", **self._options())
            png = buffer.getvalue()
        for part in with_chunks(png, self._chunks()):
            self._file.write(part)

    def _chunks(self) -> list[tuple[bytes, bytes]]:
        before, after = self._source.volume, self._result
        chunks = [text_chunk(key, text) for key, text in self._derivation.fields().items()]
        if before.format == "png":
            factors = after.rows / before.rows, after.columns / before.columns
            for chunk in kept_chunks(self._source.path):
                # Profiles and depths of a palette or of another type do not fit any more.
                if chunk[0] == b"sBIT" and (before.dtype != after.dtype or self._is_from_palette()):
                    continue
                chunks.append(rescaled(chunk, *factors))
        return chunks

    def _is_from_palette(self) -> bool:
        return bit_depth_and_colour(self._source.path)[1] == 3

    def _options(self) -> dict[str, Any]:
        """What Pillow's writers take: resolution, profile, EXIF and comment of a source picture."""
        options: dict[str, Any] = {}
        if self._name == "jpeg":
            options = {"quality": JPEG_QUALITY, "subsampling": 0, "comment": _as_comment(self._derivation)}
        before, after = self._source.volume, self._result
        if before.format not in _PILLOW_NAMES or (self._name == "png" and before.format == "png"):
            return options
        with refusing(self._source.path), _opened(self._source.path) as image:
            if "dpi" in image.info:
                across, down = (float(value) for value in image.info["dpi"])
                options["dpi"] = (across * after.columns / before.columns, down * after.rows / before.rows)
            if image.info.get("icc_profile") and _same_colours(image, after):
                options["icc_profile"] = image.info["icc_profile"]
            if before.format == "jpeg":
                options |= _jpeg_texts(image, before, after, _as_comment(self._derivation))
        return options


def _same_colours(image: Image.Image, result: Volume) -> bool:
    """Whether a colour profile of the source is for as many colours as the result has."""
    return (len(image.getbands()) >= 3) == (result.channels >= 3) or image.mode == "P"


def _as_comment(derivation: Derivation) -> bytes:
    return "; ".join(f"{key}={text}" for key, text in derivation.fields().items()).encode("ascii", "replace")


def _jpeg_texts(image: Image.Image, before: Volume, after: Volume, made_by: bytes) -> dict[str, Any]:
    """Comment, EXIF and XMP; EXIF's own sizes and resolution follow the pixels, a preview in it is dropped."""
    texts: dict[str, Any] = {}
    if image.info.get("comment"):
        texts["comment"] = bytes(image.info["comment"])[:60_000] + b"; " + made_by
    if image.info.get("xmp"):
        texts["xmp"] = image.info["xmp"]
    if image.info.get("exif"):
        exif = image.getexif()
        sizes = exif.get_ifd(ExifTags.IFD.Exif)
        for tag, value in ((ExifTags.Base.ExifImageWidth, after.columns), (ExifTags.Base.ExifImageHeight, after.rows)):
            if tag in sizes:
                sizes[tag] = value
        for tag, factor in (
            (ExifTags.Base.XResolution, after.columns / before.columns),
            (ExifTags.Base.YResolution, after.rows / before.rows),
        ):
            if tag in exif:
                exif[tag] = float(exif[tag]) * factor
        texts["exif"] = exif.tobytes()
    return texts


class _StackWriter:
    """Takes the slices of a TIFF, page by page."""

    clipped = 0
    warnings: tuple[str, ...] = ()

    def __init__(self, file: BinaryIO, source: Reader, result: Volume, derivation: Derivation, mode: str) -> None:
        self._source = source if isinstance(source, RasterReader) else None
        self._result, self._mode = result, mode
        self._description = _as_comment(derivation).decode("ascii")
        voxels = result.slices * result.rows * result.columns * result.channels
        self._big = voxels * result.dtype.itemsize > TIFF_LIMIT_BYTES
        self._file = TiffImagePlugin.AppendingTiffWriter(file)
        self._taken = 0

    def write(self, pixels: Pixels) -> None:
        """Take the next page, (channels, rows, columns)."""
        _check_slice(pixels, self._result, self._taken)
        tags = self._tags(self._taken)
        self._taken += 1
        # Pillow's appending writer stands in for a file whose first byte is that of the page.
        _to_pillow(pixels, self._mode).save(
            self._file, "TIFF", tiffinfo=tags, compression=self._compression(), big_tiff=self._big
        )
        self._file.newFrame()

    def finish(self) -> None:
        """Check that all pages came."""
        _check_all(self._taken, self._result)

    def _compression(self) -> str:
        # JPEG inside TIFF would lose detail, fax codes are for one bit; both become deflate.
        compression = self._source.compression if self._source else None
        kept = ("raw", "tiff_lzw", "packbits", "tiff_adobe_deflate")
        return compression if compression in kept else "tiff_adobe_deflate"

    def _tags(self, page: int) -> TiffImagePlugin.ImageFileDirectory_v2:
        before = self._source.volume if self._source else None
        tags = (self._source.page_tags(page) if self._source else None) or TiffImagePlugin.ImageFileDirectory_v2()
        if before is not None:
            for tag, factor in ((282, self._result.columns / before.columns), (283, self._result.rows / before.rows)):
                if tag in tags:
                    tags[tag] = float(tags[tag]) * factor
        if 270 not in tags:
            tags[270] = self._description
        if self._result.dtype == np.dtype("i2"):
            tags[339] = 2  # signed; Pillow knows 16 bits only without a sign
        return tags


def _check_slice(pixels: Pixels, result: Volume, taken: int) -> None:
    expected = (result.channels, result.rows, result.columns)
    if pixels.shape != expected or pixels.dtype != result.dtype or taken == result.slices:
        msg = f"A slice of {pixels.shape} {pixels.dtype} does not belong into this image of {expected} {result.dtype}."
        raise RunError(msg)


def _check_all(taken: int, result: Volume) -> None:
    if taken != result.slices:
        msg = f"Only {taken} of {result.slices} slices were written."
        raise RunError(msg)


def _check_copy(temporary: Path, name: str, result: Volume, target: Path) -> None:
    """Read a written picture from end to end."""
    try:
        copy = RasterReader(temporary, ReadOptions())
        ok = sum(1 for _ in copy.slices()) == result.slices
        found = copy.volume
    except InputRefused:
        ok = False
    wanted = (name, result.rows, result.columns, result.channels, result.dtype)
    if not ok or (found.format, found.rows, found.columns, found.channels, found.dtype) != wanted:
        msg = f"{mention(target.name)} could not be read back as it was written, and was discarded."
        raise RunError(msg, "Check the disk, and run it again.")
