"""Small good files of many kinds, from which bad ones are made: real ones where the shared data is, and made-up."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from medsr_cli.formats import codecs

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

SMALL_BYTES = 60_000
"""Larger files of the shared data are left out: what breaks a reader breaks it in a small file too."""


@dataclass(frozen=True)
class Seed:
    """A good file, with what belongs beside it."""

    name: str
    suffix: str
    data: bytes
    beside: dict[str, bytes] = field(default_factory=dict)
    """Suffix to bytes of the other half of a pair."""


def seeds(kind: str) -> list[Seed]:
    """The seeds of `dicom`, `nifti`, `png` or `others`, in an order that does not change."""
    return {"dicom": _dicom, "nifti": _nifti, "png": _png, "others": _others}[kind]()


def _real(folder: str, *suffixes: str, but: tuple[str, ...] = ()) -> list[Path]:
    found = (path for path in sorted((SHARED / folder).rglob("*")) if path.is_file() and path.name not in but)
    return [path for path in found if path.name.endswith(suffixes) and path.stat().st_size <= SMALL_BYTES]


# -- DICOM ----------------------------------------------------------------------------------------------------

_NOT_DICOM_SEEDS = ("DICOMDIR", "no_meta.dcm", "JPGExtended.dcm", "OBXXXX1A_rle.dcm")
"""The first two are no images; the others are large, and small ones of their kinds are made below."""


def _dicom() -> list[Seed]:
    real = [
        Seed(path.name, ".dcm", path.read_bytes())
        for path in _real("dicom", ".dcm", but=_NOT_DICOM_SEEDS)
        if path.parent.name not in ("rgb_jpeg2000_mr_4slices", "nonsquare_pixels_pmod") or path.name.endswith("1.dcm")
    ]
    made = [Seed(f"made {name}", ".dcm", _saved(ds)) for name, ds in _made_dicom()]
    return [*real, *_cut_cine(), *made]


def _cut_cine() -> list[Seed]:
    path = SHARED / "dicom" / "jpeg_baseline_ybr_colour_cine_30frames" / "examples_ybr_color.dcm"
    if not path.is_file():
        return []
    ds = pydicom.dcmread(path)
    frames = list(generate_frames(ds.PixelData, number_of_frames=30))[:2]
    ds.PixelData, ds.NumberOfFrames = encapsulate(frames), 2
    return [Seed("two frames of a cine", ".dcm", _saved(ds))]


def _saved(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def _header(syntax: UID = ExplicitVRLittleEndian, rows: int = 12, columns: int = 10, bits: int = 16) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.4", "1.2.3.4.5", "MR"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    ds.PatientName, ds.InstanceNumber = "CANARY^SEED", 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = ["1", "2", "3"], ["1", "0", "0", "0", "1", "0"]
    ds.PixelSpacing, ds.SliceThickness = ["0.5", "0.7"], "2"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation = bits - 1, 0
    return ds


def _filled(ds: Dataset, frames: int = 1) -> Dataset:
    dtype = f"u{ds.BitsAllocated // 8}"
    shape = (frames, ds.Rows, ds.Columns, ds.SamplesPerPixel)
    pixels = np.random.default_rng(7).integers(0, 1 << ds.BitsStored, shape).astype(dtype)
    if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
        pixels = pixels.byteswap()
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    return ds


def _packed(ds: Dataset, frames: list[bytes], syntax: UID) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    if len(frames) > 1:
        ds.NumberOfFrames = len(frames)
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    return ds


def _encoded(ds: Dataset, syntax: UID, plugin: str) -> bytes:
    named = {
        "rows": ds.Rows,
        "columns": ds.Columns,
        "samples_per_pixel": ds.SamplesPerPixel,
        "bits_allocated": ds.BitsAllocated,
        "bits_stored": ds.BitsStored,
        "pixel_representation": ds.PixelRepresentation,
        "photometric_interpretation": ds.PhotometricInterpretation,
        "number_of_frames": 1,
    }
    if ds.SamplesPerPixel == 3:
        named["planar_configuration"] = 0
    return bytes(get_encoder(syntax).encode(ds.PixelData, encoding_plugin=plugin, **named))


def _made_dicom() -> list[tuple[str, Dataset]]:
    made = [
        ("plain", _filled(_header())),
        ("implicit", _filled(_header(ImplicitVRLittleEndian))),
        ("big endian", _filled(_header(ExplicitVRBigEndian))),
        ("deflated", _filled(_header(DeflatedExplicitVRLittleEndian))),
        ("palette", _palette()),
        ("colour", _colour()),
        ("enhanced", _enhanced()),
        ("overlay", _overlay()),
    ]
    for name, syntax, plugin in (("RLE", RLELossless, "pydicom"), ("JPEG 2000", JPEG2000Lossless, "pylibjpeg")):
        # openjpeg makes no picture that is smaller than the block in which it thinks.
        sides = {"rows": 40, "columns": 36} if syntax == JPEG2000Lossless else {}
        frame = _encoded(_filled(_header(**sides)), syntax, plugin)
        made.append((name, _packed(_header(**sides), [frame, frame, frame], syntax)))
        frame = _encoded(_colour(**sides), syntax, plugin)
        made.append((f"{name} in colour", _packed(_colour(**sides), [frame], syntax)))
    jpeg = io.BytesIO()
    Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10)).save(jpeg, "JPEG")
    made.append(("JPEG", _packed(_header(bits=8), [jpeg.getvalue()] * 2, JPEGBaseline8Bit)))
    made.append(("JPEG lossless", codecs._file(UID("1.2.840.10008.1.2.4.70"), _unzipped(codecs._JPEG_LOSSLESS), 16)))
    made.append(("JPEG-LS", codecs._file(UID("1.2.840.10008.1.2.4.80"), _unzipped(codecs._JPEG_LS), 16)))
    return made


def _unzipped(text: str) -> bytes:
    return codecs._unzipped(text)


def _palette() -> Dataset:
    ds = _filled(_header(bits=8))
    ds.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        table = np.arange(256, dtype="<u2") * 257
        setattr(ds, f"{colour}PaletteColorLookupTableData", table.tobytes())
    return ds


def _colour(rows: int = 12, columns: int = 10) -> Dataset:
    ds = _header(rows=rows, columns=columns, bits=8)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    return _filled(ds)


def _overlay() -> Dataset:
    ds = _filled(_header())
    ds.add_new(0x60000010, "US", ds.Rows)
    ds.add_new(0x60000011, "US", ds.Columns)
    ds.add_new(0x60003000, "OB", bytes(16))
    ds.add_new(0x00090010, "LO", "MAKER")
    ds.add_new(0x00091001, "UN", bytes(200))
    return ds


def _enhanced() -> Dataset:
    ds = _header()
    ds.SOPClassUID, ds.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.4.1", 4
    groups = []
    for at in range(4):
        group, plane, measure, turn = Dataset(), Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient, measure.PixelSpacing = ["0", "0", str(at)], ["1", "1"]
        turn.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        group.PlanePositionSequence, group.PixelMeasuresSequence = [plane], [measure]
        group.PlaneOrientationSequence = [turn]
        groups.append(group)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [Dataset()], groups
    return _filled(ds, 4)


# -- NIfTI ----------------------------------------------------------------------------------------------------


def _nifti() -> list[Seed]:
    made = [*_made_nifti()]
    real = [
        Seed(path.name, ".nii", _headers_kept(path))
        for path in _real("formats/nifti", ".nii", ".nii.gz", but=("truncated.nii.gz",))
    ]
    return [*real, *made]


def _headers_kept(path: Path) -> bytes:
    """The header of a real file, extensions included, before 6 x 5 x 4 voxels instead of its own."""
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    image = nib.load(path)
    order, second = image.header.endianness, isinstance(image.header, nib.Nifti2Header)
    start = int(image.dataobj.offset)
    head = bytearray(data[:start])
    lengths = [6, 5, 4]
    for axis, length in enumerate(lengths[: len(image.shape)]):
        struct.pack_into(order + ("q" if second else "h"), head, (24 + 8 * axis) if second else (42 + 2 * axis), length)
    for axis in range(3, len(image.shape)):
        struct.pack_into(order + ("q" if second else "h"), head, (24 + 8 * axis) if second else (42 + 2 * axis), 2)
    voxels = 6 * 5 * 4 * 2 ** max(len(image.shape) - 3, 0)
    return bytes(head) + data[start : start + voxels * image.header["bitpix"].item() // 8]


def _made_nifti() -> list[Seed]:
    rng = np.random.default_rng(3)
    affine = np.array([[0.9, 0.1, 0, -4], [-0.1, 0.9, 0, 3], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    short = rng.integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
    made = []
    for name, cls in (("NIfTI-1", nib.Nifti1Image), ("NIfTI-2", nib.Nifti2Image)):
        image = cls(short, affine)
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"CANARY of an extension"))
        made.append(Seed(name, ".nii", image.to_bytes()))
        made.append(Seed(f"{name}, compressed", ".nii.gz", gzip.compress(image.to_bytes(), 6, mtime=0)))
    colour = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    made.append(Seed("RGB", ".nii", nib.Nifti1Image(colour, affine).to_bytes()))
    made.append(
        Seed("RGB, compressed", ".nii.gz", gzip.compress(nib.Nifti1Image(colour, affine).to_bytes(), 6, mtime=0))
    )
    four = rng.normal(size=(6, 5, 4, 3)).astype(np.float32)
    made.append(Seed("4D", ".nii", nib.Nifti1Image(four, affine).to_bytes()))
    pair = nib.Nifti1Pair(short, affine)
    halves = nib.Nifti1Pair.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
    pair.to_file_map(halves)
    head, voxels = (halves[half].fileobj.getvalue() for half in ("header", "image"))
    made.append(Seed("pair, header", ".hdr", head, {".img": voxels}))
    made.append(Seed("pair, voxels", ".img", voxels, {".hdr": head}))
    plain = nib.Spm99AnalyzeImage(short, np.diag([-2, 2, 2, 1]))
    halves = nib.Spm99AnalyzeImage.make_file_map({"header": io.BytesIO(), "image": io.BytesIO(), "mat": io.BytesIO()})
    plain.to_file_map(halves)
    head, voxels = (halves[half].fileobj.getvalue() for half in ("header", "image"))
    made.append(Seed("Analyze", ".hdr", head, {".img": voxels}))
    return made


# -- pictures -------------------------------------------------------------------------------------------------


def _png() -> list[Seed]:
    real = [Seed(path.name, ".png", path.read_bytes()) for path in _real("formats/png", ".png")]
    rng = np.random.default_rng(4)
    made = []
    for mode, shape in (("L", (9, 7)), ("RGB", (9, 7, 3)), ("RGBA", (9, 7, 4)), ("LA", (9, 7, 2))):
        made.append((mode, Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8), mode)))
    made.append(("I;16", Image.fromarray(rng.integers(0, 65536, (9, 7)).astype(np.uint16))))
    made.append(("P", made[1][1].quantize(32)))
    found = []
    for name, image in made:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", dpi=(300, 300))
        found.append(Seed(f"made {name}", ".png", buffer.getvalue()))
    for colour, depth in ((0, 8), (2, 8), (2, 16), (3, 4), (6, 16), (0, 16), (0, 2)):
        for interlaced in (False, True):
            found.append(Seed(f"made of colour {colour}, {depth} bits", ".png", png(7, 9, depth, colour, interlaced)))
    return [*real, *found]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(columns: int, rows: int, depth: int, colour: int, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """A PNG from its specification alone, since Pillow writes none that is interlaced or has colours of 16 bits."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    lines = b""
    for x0, y0, dx, dy in passes if interlaced else ((0, 0, 1, 1),):
        width, height = -(-(columns - x0) // dx), -(-(rows - y0) // dy)
        if width > 0 and height > 0:
            line = bytes(range(1, 1 + (width * channels * depth + 7) // 8))
            lines += (b"\0" + line) * height
    head = struct.pack(">2I5B", columns, rows, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(range(3 << depth))) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + palette
        + extra
        + chunk(b"tEXt", b"Comment\0CANARY")
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


# -- all other formats ----------------------------------------------------------------------------------------


def _others() -> list[Seed]:
    found = [
        Seed(path.name, "".join(path.suffixes[-1:]), path.read_bytes())
        for path in _real("formats", ".mgz", ".mnc", ".nrrd", ".mha", ".bmp", ".jpg", ".tif")
    ]
    other = SHARED / "formats" / "other"
    if other.is_dir():
        rec = (other / "phantom_EPI.REC").read_bytes()
        found.append(Seed("phantom_EPI.PAR", ".PAR", (other / "phantom_EPI.PAR").read_bytes(), {".REC": rec}))
        brik = (other / "example4d+orig.BRIK.gz").read_bytes()
        head = (other / "example4d+orig.HEAD").read_bytes()
        found.append(Seed("example4d+orig.HEAD", "+orig.HEAD", head, {"+orig.BRIK.gz": brik}))
    return [*found, *_made_others()]


def _made_others() -> list[Seed]:
    voxels = np.arange(6 * 5 * 4, dtype="<i2").tobytes()
    meta = b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    place = b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 1 1 2\n"
    shape = b"DimSize = 6 5 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    packed = meta + b"CompressedData = True\n" + place + shape + zlib.compress(voxels)
    nrrd = b"NRRD0004\ntype: int16\ndimension: 3\nsizes: 6 5 4\nendian: little\nspace: left-posterior-superior\n"
    nrrd += b"space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (1,2,3)\nkey:=value\n"
    found = [
        Seed("made .mha", ".mha", meta + place + shape + voxels),
        Seed("made .mha, compressed", ".mha", packed),
        Seed("made .nrrd", ".nrrd", nrrd + b"encoding: raw\n\n" + voxels),
        Seed("made .nrrd, compressed", ".nrrd", nrrd + b"encoding: gzip\n\n" + gzip.compress(voxels, mtime=0)),
    ]
    mgh = nib.MGHImage(np.zeros((6, 5, 4), np.int16), np.eye(4)).to_bytes()
    found += [Seed("made .mgh", ".mgh", mgh), Seed("made .mgz", ".mgz", gzip.compress(mgh, 6, mtime=0))]
    grey = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7))
    for suffix, name in ((".jpg", "JPEG"), (".bmp", "BMP"), (".tif", "TIFF")):
        buffer = io.BytesIO()
        pages = {"save_all": True, "append_images": [grey, grey]} if name == "TIFF" else {}
        grey.save(buffer, name, **pages)
        found.append(Seed(f"made {suffix}", suffix, buffer.getvalue()))
    return found
