"""Packing the pixels of a derived series: every transfer syntax offered here gives back each value that went in.

| name | transfer syntax | encoder |
|---|---|---|
| `explicit` | Explicit VR Little Endian, not compressed; the default | |
| `rle` | RLE Lossless | pylibjpeg-rle where it is installed, else pydicom, 15 times slower: the same bytes |
| `jpeg2000-lossless` | JPEG 2000 Image Compression (Lossless Only) | OpenJPEG, through pylibjpeg-openjpeg |
| `jpegls-lossless` | JPEG-LS Lossless | CharLS, through pyjpegls |

Which depths they take is PS3.5 section 8.2 (tables 8.2.2-1, 8.2.3-1 and 8.2.4-1), but for JPEG 2000 no more than 16
bits, which is what other people's decoders read, and none but RLE takes 8 bits or fewer in words of 16. Nothing here
changes LossyImageCompression: what a source says of itself stays true, and a lossless encoder adds nothing to it
(PS3.3 section C.7.6.1.1.5).

OpenJPEG's bindings end the process when two threads encode at once, so they take turns; decoding beside it is safe.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from medsr_cli.errors import ArgumentsError, RunError

Pixels = NDArray[Any]

PLAIN: Final = "explicit"
RLE: Final = "rle"
JPEG_2000: Final = "jpeg2000-lossless"
JPEG_LS: Final = "jpegls-lossless"

SYNTAXES: Final[dict[str, UID]] = {
    PLAIN: ExplicitVRLittleEndian,
    RLE: RLELossless,
    JPEG_2000: JPEG2000Lossless,
    JPEG_LS: JPEGLSLossless,
}
"""What `--transfer-syntax` takes."""

DEEPEST: Final = 16
"""Stored bits that all of the compressed ones hold."""
NARROWEST: Final = 32
"""Pixels across that the encoders of JPEG 2000 (six resolutions) and of JPEG-LS (room for its header) need."""

_JPEG_2000_TURNS = threading.Lock()


def known_syntax(name: str) -> UID:
    """The transfer syntax of a name.

    Raises:
        ArgumentsError: there is none.
    """
    if name not in SYNTAXES:
        msg = f"There is no transfer syntax called {name}."
        raise ArgumentsError(msg, f"Choose one of: {', '.join(SYNTAXES)}.")
    return SYNTAXES[name]


def refuse_syntax(
    name: str,
    *,
    bits_allocated: int,
    bits_stored: int,
    floating: bool = False,
    rows: int | None = None,
    columns: int | None = None,
) -> None:
    """Refuse, before any work, a transfer syntax that cannot hold an image's values or has no encoder here.

    Args:
        name: one of `SYNTAXES`.
        bits_allocated: of the result, as its header will say.
        bits_stored: the same.
        floating: whether the pixels are floating-point numbers.
        rows: of the result; None where the caller does not know them.
        columns: the same.

    Raises:
        ArgumentsError: it cannot.
    """
    known_syntax(name)
    if name == PLAIN:
        return
    if floating:
        msg = f"The pixels are floating-point numbers, which --transfer-syntax {name} does not hold."
        raise ArgumentsError(msg, f"Use --transfer-syntax {PLAIN}.")
    if bits_allocated not in (8, 16) or not _takes(name, bits_allocated, bits_stored):
        msg = f"The pixels have {bits_stored} bits in {bits_allocated}, which --transfer-syntax {name} does not hold."
        raise ArgumentsError(msg, f"Use --transfer-syntax {PLAIN}.")
    if (
        name in (JPEG_2000, JPEG_LS)
        and min(side for side in (rows, columns, NARROWEST) if side is not None) < NARROWEST
    ):
        msg = f"The result is narrower than {NARROWEST} pixels, which is too little for --transfer-syntax {name}."
        raise ArgumentsError(msg, f"Use --transfer-syntax {PLAIN}.")
    if name == JPEG_LS and not _has("jpeg_ls"):
        msg = f"No encoder for --transfer-syntax {name} is installed here."
        raise ArgumentsError(msg, "Install the package pyjpegls.")


def _takes(name: str, allocated: int, stored: int) -> bool:
    """Whether other people's decoders read so many bits: GDCM wants JPEG-LS to fill its bytes."""
    if name == RLE:
        return stored <= allocated
    if allocated == 8:
        return stored == 8 or (name == JPEG_2000 and 2 <= stored < 8)
    return 8 < stored <= DEEPEST


def photometric_after(name: str, photometric: str) -> str:
    """The PhotometricInterpretation to write for pixels handed over as `photometric`.

    JPEG 2000 turns red, green and blue into a luminance and two differences, without loss, and its header must say so.

    Args:
        name: one of `SYNTAXES`.
        photometric: `MONOCHROME1`, `MONOCHROME2` or `RGB`.
    """
    return "YBR_RCT" if name == JPEG_2000 and photometric == "RGB" else photometric


def encoded(pixels: Pixels, name: str, *, bits_stored: int, signed: bool, photometric: str) -> bytes:
    """One frame as one codestream, from any thread.

    Args:
        pixels: stored values, (rows, columns) or (rows, columns, 3), 8 or 16 bits, in the range of `bits_stored`.
        name: one of `SYNTAXES` but `explicit`, which has no codestreams.
        bits_stored: of each sample.
        signed: whether the values are two's complement; the pixels' own type need not say so.
        photometric: of the pixels as they are handed over: `MONOCHROME1`, `MONOCHROME2` or `RGB`.

    Raises:
        RunError: the encoder gives up, as it does on images that `refuse_syntax` refuses.
        ValueError: a value is outside the range of `bits_stored`, or the syntax is not compressed.
    """
    syntax = SYNTAXES[name]
    if not syntax.is_encapsulated:
        msg = f"{name} has no codestreams."
        raise ValueError(msg)
    size = pixels.dtype.itemsize
    values = pixels.astype(f"<{'i' if signed else 'u'}{size}", copy=False)
    low, high = (-(1 << (bits_stored - 1)), (1 << (bits_stored - 1)) - 1) if signed else (0, (1 << bits_stored) - 1)
    if int(values.min()) < low or int(values.max()) > high:
        msg = f"A value does not fit {bits_stored} bits."
        raise ValueError(msg)
    if name == JPEG_LS and signed:  # CharLS takes the bits for a number without a sign
        values = values.view(f"<u{size}") & np.array((1 << bits_stored) - 1, f"<u{size}")
    described: dict[str, Any] = {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "number_of_frames": 1,
        "samples_per_pixel": 1 if values.ndim == 2 else values.shape[2],
        "photometric_interpretation": photometric_after(name, photometric),
        "planar_configuration": 0,
        "bits_allocated": size * 8,
        "bits_stored": size * 8 if name == RLE else bits_stored,  # RLE packs whole bytes, whatever they hold
        "pixel_representation": int(signed),
    }
    # As bytes: pydicom would go through every value of an array once more.
    data = np.ascontiguousarray(values).tobytes()
    try:
        with _JPEG_2000_TURNS if name == JPEG_2000 else contextlib.nullcontext():
            packed = get_encoder(syntax).encode(data, encoding_plugin=_plugin(name), **described)
    except RuntimeError as error:
        msg = f"A frame could not be packed as {name}."
        raise RunError(msg, f"Use --transfer-syntax {PLAIN}.") from error
    return bytes(packed)


def _plugin(name: str) -> str:
    """Which of pydicom's plugins encodes; gdcm, which it may also find, is none of them."""
    if name == JPEG_LS:
        return "pyjpegls"
    return "pydicom" if name == RLE and not _has("rle") else "pylibjpeg"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
