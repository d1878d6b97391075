"""Whether the codecs on this machine work: one small image is unpacked by each, as any DICOM file is, and compared."""

from __future__ import annotations

import base64
import io
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from isal import igzip
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import (
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medsr_cli.formats.contract import ReadOptions
from medsr_cli.formats.dicom import open_reader

Pixels = NDArray[Any]
SIDE = 32
NEAR = 3
"""How far the values that baseline JPEG gives back may be from those that were packed."""

# The ramp of `_image`, packed by dcmtk 3.6.7 (no encoder of these two is among medsr's libraries), then by zlib.
_JPEG_LS = (
    "eNr7f+P/dwZuAQYFBgVGRkGG/z8YeBn//2cQYnBmFGFw+H+LgYORkQEIFu8p7/t4rRiE5+R+ux277HzqxhvZv3dXW/3aVWX5c2elxY/FDe4db6"
    "38wrlLN13N2BypE8b79uza3lxfXZ43Z9b05PjocL/4YMH69OrRrUunTm0tLU07G7Ul4+xsNZ8ZG5MONrNxX1+8ef/6uJ1FT1eHrYnYGLU1a6pW"
    "yEovILEiYGGbhF/fn0Ov1+16vW7TaZ1Np1aBgcaiLo1FnSfvhwS6CvuaXI66tnVtVtCUpZpeQEKP7weIMQnMhShftd36FphWAgGVSZ6qG+9N8l"
    "SBoFWrrrzXAsuuf8v34X/9//rN1ruBVN2Jd+eBVLXwrv1AKofvBUjqXrk5SOrxTnsgVTb3KEhswzt+IFWbng9k/8+yLgaJed6OB1JVfDdAnHNl"
    "20GakreCNBXNXQoSm/AWpKkmPR2kKcnaGCTGeROkqYLvBIizrwxkU+2D/zcBL0fqow=="
)
_JPEG_LOSSLESS = (
    "eNr7f+P/AwYBLzdPNwZGRgYGRiBk+H+YgVuAQYFBgZFRkOH/EQYxoBRQGAmwcQv8v8XAwQhWfl7OpuLj4+P9WKjTB3BKHe/XZ8ApJWezhxmnVM"
    "WnD/yjVo5aOWolPis//78JALj0EBI="
)


@dataclass(frozen=True)
class Codec:
    """One way of packing, and what became of the image."""

    name: str
    library: str
    """The distribution that unpacks it."""
    fault: str = ""
    """Why it does not work; empty where it does."""


def codecs() -> list[Codec]:
    """Every codec that medsr relies on, tried."""
    trials: list[tuple[str, str, Callable[[], None]]] = [
        ("gzip", "isal", _try_gzip),
        ("RLE", "pydicom", lambda: _try_dicom(RLELossless, _encoded(RLELossless, "pydicom"))),
        (
            "JPEG 2000",
            "pylibjpeg-openjpeg",
            lambda: _try_dicom(JPEG2000Lossless, _encoded(JPEG2000Lossless, "pylibjpeg")),
        ),
        ("JPEG", "SimpleITK", lambda: _try_dicom(JPEGBaseline8Bit, _jpeg())),
        ("JPEG lossless", "SimpleITK", lambda: _try_dicom(JPEGLosslessSV1, _unzipped(_JPEG_LOSSLESS))),
        ("JPEG-LS", "SimpleITK", lambda: _try_dicom(JPEGLSLossless, _unzipped(_JPEG_LS))),
        ("PNG", "Pillow", _try_png),
    ]
    return [Codec(name, library, _fault(trial)) for name, library, trial in trials]


def _fault(trial: Callable[[], None]) -> str:
    try:
        trial()
    except Exception as error:  # whatever is wrong with a foreign library is what is looked for
        return str(error) or type(error).__name__
    return ""


def _image(bits: int) -> Pixels:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image: Pixels = rows * 4 + columns * 3 + 10 if bits == 8 else (rows * SIDE + columns) * 60
    return image.astype(np.uint8 if bits == 8 else np.uint16)


def _refuse_other(got: Pixels, bits: int) -> None:
    near = NEAR if bits == 8 else 0
    difference = np.abs(got.astype(np.int64).reshape(SIDE, SIDE) - _image(bits)).max()
    if difference > near:
        msg = f"values differ by {difference}"
        raise ValueError(msg)


def _try_gzip() -> None:
    data = _image(16).tobytes()
    if igzip.decompress(igzip.compress(data)) != data:  # type: ignore[no-untyped-call]
        msg = "other bytes come out than went in"
        raise ValueError(msg)


def _try_png() -> None:
    packed = io.BytesIO()
    Image.fromarray(_image(16)).save(packed, format="PNG")
    with Image.open(packed) as image:
        _refuse_other(np.asarray(image), 16)


def _try_dicom(syntax: UID, codestream: bytes) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 16
    with tempfile.TemporaryDirectory(prefix="medsr-") as folder:
        path = Path(folder, "packed.dcm")
        pydicom.dcmwrite(path, _file(syntax, codestream, bits), enforce_file_format=True)
        reader = open_reader(path, ReadOptions())
        _refuse_other(next(iter(reader.slices())), bits)


def _file(syntax: UID, codestream: bytes, bits: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(None)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(None), generate_uid(None)
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "OT", "MONOCHROME2", 1
    ds.Rows = ds.Columns = SIDE
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation = bits - 1, 0
    ds.PixelData = encapsulate([codestream])
    ds["PixelData"].VR = "OB"
    return ds


def _encoded(syntax: UID, plugin: str) -> bytes:
    packed: bytes = get_encoder(syntax).encode(
        _image(16),
        encoding_plugin=plugin,
        rows=SIDE,
        columns=SIDE,
        samples_per_pixel=1,
        bits_allocated=16,
        bits_stored=16,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
        number_of_frames=1,
    )
    return packed


def _jpeg() -> bytes:
    packed = io.BytesIO()
    Image.fromarray(_image(8)).save(packed, format="JPEG", quality=95)
    return packed.getvalue()


def _unzipped(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
