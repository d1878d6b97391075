"""Stored pixels of one DICOM frame, whatever they are packed in.

pydicom reads what is not compressed, deflated or RLE; openjpeg (through pylibjpeg) JPEG 2000 and HTJ2K; and
SimpleITK's copy of GDCM the JPEG, JPEG lossless and JPEG-LS family. python-gdcm has the same codecs, but lets C++
exceptions through: a damaged file ends the whole process, and one in a hundred did. Colours come out as RGB.
"""

from __future__ import annotations

import contextlib
import os
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
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
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

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats import dicom_codestream as codestream
from medsr_cli.formats.dicom_files import inflated, read_header, refusing
from medsr_cli.formats.dicom_headers import PALETTE, Instance, PixelSpan
from medsr_cli.formats.limits import allowed

Pixels = NDArray[Any]

PLUGINS: dict[UID, str] = {
    RLELossless: "pydicom",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
    HTJ2KLossless: "pylibjpeg",
    HTJ2KLosslessRPCL: "pylibjpeg",
    HTJ2K: "pylibjpeg",
}
"""Which of pydicom's plugins decodes a compressed transfer syntax. pylibjpeg stands only where openjpeg serves it:
its libjpeg plugin is GPL, and what happens to be installed must not change a value."""

SIMPLEITK = frozenset({
    JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless
})  # fmt: skip
"""What SimpleITK decodes: never RLE, which it reads wrongly in colour of 16 bits."""

LOSSY = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K})
"""Transfer syntaxes that lose something, or may."""


def can_decode(transfer_syntax: str) -> bool:
    """Whether pixels of a transfer syntax are understood at all."""
    syntax = UID(transfer_syntax)
    if not syntax.is_transfer_syntax:
        return False
    return syntax in PLUGINS or syntax in SIMPLEITK or not syntax.is_encapsulated


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
        if instance.transfer_syntax == DeflatedExplicitVRLittleEndian:
            file, _ = inflated(file, name, allowed())
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
    if instance.compressed:
        return _packed_frames(file, span, instance, indices)
    return _native_frames(file, span.offset, instance, indices)


def _native_frames(file: IO[bytes], offset: int, instance: Instance, indices: Sequence[int]) -> Iterator[bytes]:
    size = instance.frame_bytes
    for index in indices:
        file.seek(offset + index * size)
        frame = file.read(size)
        if len(frame) != size:
            raise _refused(instance, "is cut short: pixels are missing")
        yield frame + b"\0" * (size % 2)


def _packed_frames(file: IO[bytes], span: PixelSpan, instance: Instance, indices: Sequence[int]) -> Iterator[bytes]:
    count = instance.frames
    _check_offsets(file, span, instance)
    buffer: Any = file  # what pydicom calls a readable buffer
    file.seek(span.offset)
    if list(indices) == list(range(count)) and count > 1:
        yield from generate_frames(buffer, number_of_frames=count, extended_offsets=span.extended_offsets)
        return
    for index in indices:
        file.seek(span.offset)
        yield get_frame(buffer, index, number_of_frames=count, extended_offsets=span.extended_offsets)


def _check_offsets(file: IO[bytes], span: PixelSpan, instance: Instance) -> None:
    """Refuse tables of offsets (PS3.5, section A.4; PS3.3, section C.7.6.3.1.8) whose frames overlap or lie outside.

    From a few bytes that all frames share, such a table makes as many pixels as somebody likes.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(span.offset)
    head = file.read(8)
    if len(head) < 8 or head[:4] != b"\xfe\xff\x00\xe0":
        raise _refused(instance, "has compressed pixels that do not begin as they should")
    length = int.from_bytes(head[4:], "little")
    room = size - span.offset - 8 - length
    starts = np.frombuffer(file.read(length // 4 * 4), "<u4").astype(np.int64)
    ends = np.append(starts[1:], room)[: len(starts)]
    if span.extended_offsets is not None:
        table = [np.frombuffer(part[: len(part) // 8 * 8], "<u8") for part in span.extended_offsets]
        in_file = len(table[0]) == len(table[1]) and all(bool((part < size).all()) for part in table)
        starts, sizes = ((part if in_file else part[:0]).astype(np.int64) for part in table)
        ends = starts + sizes
        if not in_file:
            raise _refused(instance, "has a table of frames that lie outside the file")
    if (starts[1:] < ends[:-1]).any() or (ends <= starts).any() or (ends > room).any():
        raise _refused(instance, "has a table of frames that overlap or lie outside the file")


# -- one frame ------------------------------------------------------------------------------------------------


def _decode(raw: bytes, instance: Instance) -> Pixels:
    syntax = UID(instance.transfer_syntax)
    if not instance.compressed:
        native = ExplicitVRLittleEndian if syntax.is_little_endian else syntax
        return _shaped(_decoded_by("", native, raw, instance, instance.photometric), instance)
    _check_claim(raw, syntax, instance)
    colours = codestream.photometric(raw, instance.photometric) if instance.samples == 3 else instance.photometric
    packed = encapsulate([raw], has_bot=False)
    if syntax in SIMPLEITK:
        return _shaped(_decoded_by_simpleitk(packed, instance, colours), instance)
    return _shaped(_decoded_by(PLUGINS[syntax], syntax, packed, instance, colours), instance)


def _check_claim(raw: bytes, syntax: UID, instance: Instance) -> None:
    """Refuse a frame that claims to be something else, before a codec takes memory for it or runs over its own."""
    claim = codestream.claim(raw)
    if claim is None:
        if syntax == RLELossless:
            return
        raise _refused(instance, f"holds something else than {syntax.name}")
    if (claim.rows, claim.columns) != (instance.rows, instance.columns):
        raise _refused(instance, "holds pixels of another size than its header says")
    if claim.components != instance.samples or not 2 <= claim.bits <= instance.bits_allocated:
        raise _refused(instance, "holds pixels of another depth than its header says")


def _decoded_by(plugin: str, syntax: UID, value: bytes, instance: Instance, colours: str) -> Pixels:
    described: dict[str, Any] = {
        "rows": instance.rows,
        "columns": instance.columns,
        "number_of_frames": 1,
        "samples_per_pixel": instance.samples,
        "photometric_interpretation": colours,
        "planar_configuration": instance.planar,
        "bits_allocated": instance.bits_allocated,
        "bits_stored": instance.bits_stored,
        "pixel_representation": int(instance.signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": instance.pixels.vr if instance.pixels else "OW",
    }
    pixels, _ = get_decoder(syntax).as_array(value, index=0, decoding_plugin=plugin, **described)
    return pixels


def _decoded_by_simpleitk(packed: bytes, instance: Instance, colours: str) -> Pixels:
    """Components as they are stored, through a bare file around the frame: nothing in it asks ITK to scale them.

    YCbCr is turned to RGB by pydicom afterwards.
    """
    import SimpleITK as sitk  # noqa: PLC0415, N813 - heavy, and only some files need it

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # type: ignore[no-untyped-call]
    chatter = _without_chatter() if instance.transfer_syntax == JPEGExtended12Bit else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="medsr-") as folder:
        path = Path(folder, "frame.dcm")
        pydicom.dcmwrite(path, _bare_file(packed, instance), enforce_file_format=True)
        with chatter:
            pixels: Pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    shape = (instance.rows, instance.columns) + ((3,) if instance.samples == 3 else ())
    pixels = pixels.reshape(shape)
    return convert_color_space(pixels, "YBR_FULL", "RGB") if colours.startswith("YBR_FULL") else pixels


def _bare_file(packed: bytes, instance: Instance) -> Dataset:
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = UID(instance.transfer_syntax)
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    bare.Rows, bare.Columns, bare.SamplesPerPixel = instance.rows, instance.columns, instance.samples
    # ITK would turn MONOCHROME1 around, and YBR to RGB in its own way.
    bare.PhotometricInterpretation = "MONOCHROME2" if instance.samples == 1 else "RGB"
    if instance.samples == 3:
        bare.PlanarConfiguration = 0
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = instance.bits_allocated, instance.bits_stored, instance.high_bit
    bare.PixelRepresentation = int(instance.signed)
    bare.PixelData = packed
    bare["PixelData"].VR = "OB"
    bare["PixelData"].is_undefined_length = True
    return bare


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


def _refused(instance: Instance, why: str) -> InputRefused:
    return InputRefused(f"{mention(instance.member.name)} {why}.", "Export it anew from where it came from.")
