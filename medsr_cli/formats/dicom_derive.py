"""The header of a derived image: what stays, what changes, what goes, and what is said about where it comes from.

What stays is everything that no line below names: patient, study, frame of reference, acquisition (its matrix,
sampling, bandwidth, reconstruction diameter, tilt, dates), patient position, window and VOI tables, modality tables
and rescale slice by slice, padding values, lossy history, flags of burned-in annotation and of de-identification,
references to other images and to procedures, and every text to the byte (`dicom_texts`).

What changes:

| tags | to | by |
|---|---|---|
| UIDs of image, series, concatenation | new ones, fresh or stable | `dicom_identity` |
| StudyInstanceUID | the source's; where it names none, one new study for the series, which is said | `dicom_identity` |
| FrameOfReferenceUID | the source's; where it names none, none: nothing claims to lie in the same place | |
| SeriesNumber | the source's and 1000; and 1000 more for each further result of the same series | here |
| SeriesDescription | the source's, then ` x4 rdst-e`, then ` 2` for a second result: 64 characters in all | here |
| dates and times of creation | now; none with stable UIDs, for one object says one thing | here |
| grid, spacing, position, regions, shutters | the finer grid | `dicom_grid` |
| overlays | the finer grid, nearest neighbour | `dicom_overlays` |
| derivation, equipment, comments | what was done | `dicom_provenance` |
| PhotometricInterpretation, transfer syntax | as the pixels are packed | `dicom_encode` |
| SmallestImagePixelValue, LargestImagePixelValue | the result's, US or SS; none where they are not known | here |
| LossyImageCompression, its ratio and method | set where the source's transfer syntax always loses something | here |

SpatialResolution, DetectorElementSpacing, FieldOfViewOrigin, ReconstructionPixelSpacing and their like describe the
equipment or the first reconstruction, not the pixels stored, and stay.

What goes, and why:

| tags | why |
|---|---|
| overlays in the bits of the pixels, curves drawn in pixels, icon, histogram | of the source's pixels on its grid |
| pixel values of the series or of planes | no longer true; optional |
| palettes | the result has the colours themselves |
| digital signatures, MAC parameters | they sign other bytes |
| pixel offset tables, padding after the pixels, private groups after the pixels | they belong to other bytes |
| of enhanced MR, how it was acquired | a derived image may not say so (type 1C, as dciodvfy reads it) |
| InstanceCreatorUID, PixelDataProviderURL | another creator; another place |
| private elements | those about the grid, and by `--private-tags` more: see `dicom_private` |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.dicom_encode import SYNTAXES, photometric_after
from medsr_cli.formats.dicom_grid import Grid, rewrite_grid
from medsr_cli.formats.dicom_headers import PALETTE, Instance
from medsr_cli.formats.dicom_identity import Frame, FreshIdentities, Identities, StableIdentities
from medsr_cli.formats.dicom_overlays import rewrite_overlays
from medsr_cli.formats.dicom_private import prune_private
from medsr_cli.formats.dicom_provenance import label, plain, tell
from medsr_cli.formats.dicom_sequences import nested
from medsr_cli.formats.dicom_texts import hold_texts, put_behind
from medsr_cli.volume.volume import Volume

IMPLEMENTATION_CLASS = UID("2.25.96133540152216183520968364410716431747")
"""Marks files written by medsr; a random UUID, drawn once."""

LARGEST_INTEGER_STRING = 2**31 - 1
SERIES_STEP = 1000
"""Between the number of a source series and those of its results."""
WIDEST_EXTREMES = 16
"""Bits that SmallestImagePixelValue and its like hold (US or SS)."""
NO_STUDY = "The source names no study, so the result got a study of its own."

_GONE = (
    "IconImageSequence", "HistogramSequence", "SmallestImagePixelValue", "LargestImagePixelValue",
    "SmallestPixelValueInSeries", "LargestPixelValueInSeries", "SmallestImagePixelValueInPlane",
    "LargestImagePixelValueInPlane", "MACParametersSequence", "DigitalSignaturesSequence", "ShutterOverlayGroup",
    "PixelDataProviderURL", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "InstanceCreatorUID",
    "SOPInstanceUIDOfConcatenationSource", "DataSetTrailingPadding",
)  # fmt: skip
_PALETTE_TAGS = (
    "PaletteColorLookupTableUID",
    *(
        f"{kind}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue", "Alpha")
        for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
)

# Only those that always lose something: a JPEG 2000 file may say in LossyImageCompression that it did not.
_LOSSY_METHODS = {
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
}

_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


@dataclass
class Lineage:
    """What all files of one derived series share."""

    derivation: Derivation
    grid: Grid
    result: Volume
    frames: tuple[Frame, ...] = ()
    """All that the series is made of, in order; stable UIDs cannot be had without."""
    ordinal: int = 0
    """Which of several results of one series this is, from 0: stacks, intermediate results."""
    now: datetime = field(default_factory=datetime.now)
    warnings: list[str] = field(default_factory=list)
    """What is lost or added, a sentence each; complete when the last header was derived."""

    @cached_property
    def identities(self) -> Identities:
        """Where UIDs come from.

        Raises:
            ValueError: stable ones are asked for, and nothing is known of the frames.
        """
        derivation, grid = self.derivation, self.grid
        if not derivation.dicom.stable_uids:
            return FreshIdentities()
        if not self.frames:
            msg = "stable UIDs follow from the frames of the source"
            raise ValueError(msg)
        sizes = (grid.rows, grid.columns, grid.new_rows, grid.new_columns, *grid.first)
        return StableIdentities.derived(derivation, sizes, self.frames, self.ordinal)

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID of all files."""
        return self.identities.series()

    def say(self, sentence: str) -> None:
        """Keep a sentence for the user, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def derive_header(
    ds: Dataset,
    instance: Instance,
    lineage: Lineage,
    number: int | None,
    *,
    frame: int | None = None,
    extremes: tuple[int, int] | None = None,
) -> None:
    """Turn the header of a source file into that of its derived file, in place.

    Nothing in `ds` may be shared with another data set that is to be derived, for nested items are changed as well.

    Args:
        ds: all tags of the source but its pixels; for one frame of an enhanced object, those of a classic object that
            stands for it, SOPClassUID included, which then stays.
        instance: the source file. References name its own class and instance.
        lineage: what the whole series shares; its `warnings` grow.
        number: the InstanceNumber to give, or None to keep it.
        frame: the frame of the source file that this single-frame file holds, counted from 0; None for all of them.
        extremes: smallest and largest stored value of the result; None where they are not known.
    """
    hold_texts(ds)
    _swap_words(ds, instance)
    placed = instance if frame is None else replace(instance, planes=(instance.planes[frame],))
    prune_private(ds, lineage.derivation.dicom.private_tags, placed.planes)
    for keyword in _GONE:
        if keyword in ds:
            delattr(ds, keyword)
    for sentence in rewrite_overlays(ds, lineage.grid, frame):
        lineage.say(sentence)
    for tag in [tag for tag in ds.keys() if tag.group >= 0x7FE0]:  # noqa: SIM118
        del ds[tag]
    rewrite_grid(ds, placed, lineage.grid)
    _rewrite_pixel_module(ds, instance, lineage, extremes)
    _identify(ds, instance, lineage, number, frame)
    tell(ds, instance, lineage, frame)
    ds.file_meta = _file_meta(ds, lineage)
    ds.preamble = b"\0" * 128  # a source's preamble may hold anything


def _identify(ds: Dataset, instance: Instance, lineage: Lineage, number: int | None, frame: int | None) -> None:
    identities = lineage.identities
    if frame is None or "SOPClassUID" not in ds:
        ds.SOPClassUID = instance.sop_class or _class_of(instance.modality)
    ds.SOPInstanceUID = identities.image(instance, frame)
    ds.SeriesInstanceUID = identities.series()
    if not instance.study:
        ds.StudyInstanceUID = identities.study()
        lineage.say(NO_STUDY)
    ds.SeriesNumber = _series_number(ds, lineage.ordinal)
    if number is not None:
        ds.InstanceNumber = number
    put_behind(ds, "SeriesDescription", label(lineage))
    if identities.stable:
        for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
            if keyword in ds:
                delattr(ds, keyword)
    else:
        ds.InstanceCreationDate = lineage.now.strftime("%Y%m%d")
        ds.InstanceCreationTime = lineage.now.strftime("%H%M%S")
    concatenation = _text(ds, "ConcatenationUID")
    if concatenation:
        ds.ConcatenationUID = identities.concatenation(concatenation)


def _rewrite_pixel_module(ds: Dataset, instance: Instance, lineage: Lineage, extremes: tuple[int, int] | None) -> None:
    result, syntax = lineage.result, lineage.derivation.dicom.transfer_syntax
    if instance.photometric == PALETTE:
        for keyword in _PALETTE_TAGS:
            if keyword in ds:
                delattr(ds, keyword)
        bits = result.dtype.itemsize * 8
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelRepresentation = 0
    if result.channels == 3:
        ds.SamplesPerPixel, ds.PlanarConfiguration = 3, 0
        ds.PhotometricInterpretation = photometric_after(syntax, "RGB")
    elif "PlanarConfiguration" in ds:
        del ds.PlanarConfiguration
    if extremes is not None and result.channels == 1 and int(ds.BitsAllocated) <= WIDEST_EXTREMES:
        vr = "SS" if ds.get("PixelRepresentation") == 1 else "US"
        for keyword, value in zip(("SmallestImagePixelValue", "LargestImagePixelValue"), extremes, strict=True):
            ds.add_new(keyword, vr, value)
    method = _LOSSY_METHODS.get(UID(instance.transfer_syntax))
    if method is not None and _text(ds, "LossyImageCompression") != "01":
        ratio = instance.frame_bytes * instance.frames / max(instance.member.size, 1)
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionMethod = method
        ds.LossyImageCompressionRatio = format_number_as_ds(round(ratio, 2))


def _file_meta(ds: Dataset, lineage: Lineage) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = SYNTAXES[lineage.derivation.dicom.transfer_syntax]
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS
    meta.ImplementationVersionName = plain(lineage.derivation.software.replace(" ", "_").upper())[:16]
    return meta


def _class_of(modality: str) -> UID:
    """The storage class of a file that does not say: only its modality is known."""
    known = {"CT": CTImageStorage, "MR": MRImageStorage}
    return known.get(modality, SecondaryCaptureImageStorage)


def _series_number(ds: Dataset, ordinal: int) -> int:
    try:
        number = int(ds.get("SeriesNumber") or 0)
    except (TypeError, ValueError):
        number = 0
    added = SERIES_STEP * (1 + ordinal)
    return number + added if number + added <= LARGEST_INTEGER_STRING else number - SERIES_STEP * ordinal


def _swap_words(ds: Dataset, instance: Instance) -> None:
    """Tables stored as bulk words keep their byte order when pydicom reads them; the result is little endian."""
    if UID(instance.transfer_syntax).is_little_endian:
        return
    for element in ds:
        size = _WORD_BYTES.get(str(element.VR))
        if size is not None and isinstance(element.value, bytes) and len(element.value) % size == 0:
            element.value = np.frombuffer(element.value, f">u{size}").astype(f"<u{size}").tobytes()
    for item, _ in nested(ds):
        _swap_words(item, instance)


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    return "" if value is None else str(value)
