"""Stored pixels of one DICOM frame, whatever they are packed in.

pydicom decodes, with the plugins named here and no others: what is installed beside them must not change a
value. RLE is read by pydicom itself; JPEG, JPEG lossless and JPEG-LS by GDCM; JPEG 2000 and HTJ2K by openjpeg.
What these leave (12-bit JPEG) is read by SimpleITK's own copy of GDCM. Colours come out as RGB.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from medsr_cli.errors import InputRefused
from medsr_cli.formats.dicom_files import read_header, refusing
from medsr_cli.formats.dicom_headers import GREY, PALETTE, Instance

Pixels = NDArray[Any]

PLUGINS: dict[UID, tuple[str, ...]] = {
    RLELossless: ("pydicom",),
    JPEGBaseline8Bit: ("gdcm", "pillow"),
    JPEGExtended12Bit: ("gdcm",),
    JPEGLossless: ("gdcm",),
    JPEGLosslessSV1: ("gdcm",),
    JPEGLSLossless: ("gdcm",),
    JPEGLSNearLossless: ("gdcm",),
    JPEG2000Lossless: ("pylibjpeg", "gdcm", "pillow"),
    JPEG2000: ("pylibjpeg", "gdcm", "pillow"),
    HTJ2KLossless: ("pylibjpeg",),
    HTJ2KLosslessRPCL: ("pylibjpeg",),
    HTJ2K: ("pylibjpeg",),
}
"""Which plugins may decode a compressed transfer syntax, best first. pylibjpeg appears only where openjpeg
serves it: its libjpeg plugin is GPL, and its lossy JPEG differs from the others by a grey level."""

LOSSY = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K})
"""Transfer syntaxes that lose something, or may."""

FALLBACK = frozenset(PLUGINS) - {RLELossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL}
"""What SimpleITK may be asked for: never RLE, which it reads wrongly in colour of 16 bits."""


def can_decode(transfer_syntax: str) -> bool:
    """Whether pixels of a transfer syntax are understood at all."""
    syntax = UID(transfer_syntax)
    if not syntax.is_transfer_syntax:
        return False
    return syntax in PLUGINS or not syntax.is_encapsulated


def decode_frames(instance: Instance, indices: Sequence[int]) -> Iterator[Pixels]:
    """Frames of one file, in the order asked for: (rows, columns) grey or (rows, columns, 3) colour.

    Values are as stored, in `instance.stored_dtype`; colours are RGB, palettes are applied (8 bits, or 16 where
    the palette has more).

    Raises:
        InputRefused: the pixels are cut short, do not fit the header, or no codec can read them.
    """
    name = instance.member.name
    with refusing(name, "opening the pixels"):
        file = instance.member.open()
    with file:
        with refusing(name, "looking for the pixels"):
            palette = read_header(instance.member) if instance.photometric == PALETTE else None
            frames = _raw_frames(file, instance, indices)
        for _ in indices:
            with refusing(name, "decoding the pixels"):
                pixels = _decode(next(frames), instance)
                if palette is not None:
                    pixels = _coloured(pixels, palette)
            yield pixels


# -- frames as they lie in the file ---------------------------------------------------------------------------


def _raw_frames(file: IO[bytes], instance: Instance, indices: Sequence[int]) -> Iterator[bytes]:
    span = instance.pixels
    if span is None:
        raise _refused(instance, "has no pixels")
    if span.offset is None:
        file.seek(0)
        value = pydicom.dcmread(file, specific_tags=["PixelData"]).PixelData
        return _native_frames(io.BytesIO(value), 0, instance, indices)
    if instance.compressed:
        return _packed_frames(file, span.offset, instance, indices)
    return _native_frames(file, span.offset, instance, indices)


def _native_frames(file: IO[bytes], offset: int, instance: Instance, indices: Sequence[int]) -> Iterator[bytes]:
    size = instance.frame_bytes
    for index in indices:
        file.seek(offset + index * size)
        frame = file.read(size)
        if len(frame) != size:
            raise _refused(instance, "is cut short: pixels are missing")
        yield frame + b"\0" * (size % 2)


def _packed_frames(file: IO[bytes], offset: int, instance: Instance, indices: Sequence[int]) -> Iterator[bytes]:
    count = instance.frames
    span = instance.pixels
    table = span.extended_offsets if span is not None else None
    if list(indices) == list(range(count)) and count > 1:
        file.seek(offset)
        yield from generate_frames(file, number_of_frames=count, extended_offsets=table)
        return
    for index in indices:
        file.seek(offset)
        yield get_frame(file, index, number_of_frames=count, extended_offsets=table)


# -- one frame ------------------------------------------------------------------------------------------------


def _decode(raw: bytes, instance: Instance) -> Pixels:
    syntax = UID(instance.transfer_syntax)
    if not instance.compressed:
        native = ExplicitVRLittleEndian if syntax.is_little_endian else syntax
        return _shaped(_decoded_by("", native, raw, instance), instance)
    check_codestream(raw, instance)
    packed = encapsulate([raw], has_bot=False)
    for plugin in PLUGINS[syntax]:
        try:
            return _shaped(_decoded_by(plugin, syntax, packed, instance), instance)
        except InputRefused:
            raise
        except Exception:  # noqa: S112 - the next codec may read what this one cannot
            continue
    if syntax in FALLBACK and instance.photometric in GREY:
        return _shaped(_decoded_by_simpleitk(packed, instance), instance)
    raise _refused(instance, f"cannot be decoded ({syntax.name})")


def _decoded_by(plugin: str, syntax: UID, value: bytes, instance: Instance) -> Pixels:
    described: dict[str, Any] = {
        "rows": instance.rows,
        "columns": instance.columns,
        "number_of_frames": 1,
        "samples_per_pixel": instance.samples,
        "photometric_interpretation": instance.photometric,
        "planar_configuration": instance.planar,
        "bits_allocated": instance.bits_allocated,
        "bits_stored": instance.bits_stored,
        "pixel_representation": int(instance.signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": instance.pixels.vr if instance.pixels else "OW",
    }
    pixels, _ = get_decoder(syntax).as_array(value, index=0, decoding_plugin=plugin, **described)
    return pixels


def _decoded_by_simpleitk(packed: bytes, instance: Instance) -> Pixels:
    """Grey pixels through SimpleITK: a bare file around the frame, without what it would apply to the values."""
    import SimpleITK as sitk  # noqa: PLC0415, N813 - heavy, and rarely needed

    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = UID(instance.transfer_syntax)
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    bare.Rows, bare.Columns, bare.SamplesPerPixel = instance.rows, instance.columns, 1
    bare.PhotometricInterpretation = "MONOCHROME2"  # ITK would turn MONOCHROME1 around
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = instance.bits_allocated, instance.bits_stored, instance.high_bit
    bare.PixelRepresentation = int(instance.signed)
    bare.PixelData = packed
    bare["PixelData"].VR = "OB"
    bare["PixelData"].is_undefined_length = True
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="medsr-") as folder:
        path = Path(folder, "frame.dcm")
        pydicom.dcmwrite(path, bare, enforce_file_format=True)
        with _without_chatter():
            pixels: Pixels = np.squeeze(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    return pixels.reshape(instance.rows, instance.columns)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what GDCM's copies of libjpeg print while they try one depth after the other off the terminal.

    They print to the file descriptor itself, so nothing gentler than turning it away for the moment helps.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _shaped(pixels: Pixels, instance: Instance) -> Pixels:
    """In native byte order, in the stored type, of the size that the header claims; refused if it is not."""
    wanted = (instance.rows, instance.columns) + ((3,) if instance.samples == 3 else ())
    if pixels.shape != wanted:
        raise _refused(instance, "holds pixels of another size than its header says")
    if pixels.dtype == instance.stored_dtype:
        return np.ascontiguousarray(pixels)
    return pixels.astype(instance.stored_dtype)


# -- palettes -------------------------------------------------------------------------------------------------


def _coloured(indices: Pixels, ds: Dataset) -> Pixels:
    coloured = apply_color_lut(indices, ds)[..., :3]
    deep = palette_is_deep(ds)
    if coloured.dtype.itemsize == 1:
        return coloured
    return coloured.astype(np.uint16) if deep else (coloured >> 8).astype(np.uint8)


def palette_is_deep(ds: Dataset) -> bool:
    """Whether a palette has colours that 8 bits do not hold: entries of 16 bits that are not bytes in disguise."""
    if int(ds.RedPaletteColorLookupTableDescriptor[2]) <= 8:
        return False
    entries = np.arange(int(ds.RedPaletteColorLookupTableDescriptor[0]) or 1 << 16)
    first = int(ds.RedPaletteColorLookupTableDescriptor[1])
    colours = apply_color_lut((entries + first).astype(np.int32), ds)[..., :3]
    if colours.dtype.itemsize == 1:
        return False
    low, high = colours & 0xFF, colours >> 8
    return bool((low != 0).any() and (low != high).any())


# -- what a codestream claims ---------------------------------------------------------------------------------


def check_codestream(raw: bytes, instance: Instance) -> None:
    """Refuse a compressed frame whose own header claims another size, before a codec takes memory for it."""
    claimed = codestream_size(raw)
    if claimed is not None and claimed != (instance.rows, instance.columns):
        raise _refused(instance, "holds pixels of another size than its header says")


def codestream_size(raw: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 codestream claims; None if it is none of these."""
    start = raw.find(b"\xff\x4f\xff\x51", 0, 256)
    if start >= 0 and len(raw) >= start + 24:
        x1, y1, x0, y0 = struct.unpack(">4L", raw[start + 8 : start + 24])
        return y1 - y0, x1 - x0
    if raw[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(raw):
        if raw[at] != 0xFF:
            return None
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            rows, columns = struct.unpack(">HH", raw[at + 5 : at + 9])
            return (rows, columns) if rows else None
        if marker == 0xDA:
            return None
        at += 2 + struct.unpack(">H", raw[at + 2 : at + 4])[0]
    return None


def _refused(instance: Instance, why: str) -> InputRefused:
    return InputRefused(f"{instance.member.name} {why}.", "Export it anew from where it came from.")
