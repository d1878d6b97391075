"""The header of a derived image: what stays, what changes, what goes, and what is said about where it comes from.

What stays is everything that no line below names: patient, study, frame of reference, acquisition, window and
VOI tables, rescale, padding value, private tags. What goes, and why:

| tags | why |
|---|---|
| overlays (60xx), bitmap shutter, icon, histogram | pictures and counts of the source's pixels on the source's grid |
| smallest and largest pixel values | no longer true; optional |
| palettes | the result has the colours themselves |
| digital signatures, MAC parameters | they sign other bytes |
| pixel offset tables, padding after the pixels, private groups after the pixels | they belong to other bytes |
| of enhanced MR, how it was acquired | a derived image may not say so (type 1C, as dciodvfy reads it) |
| InstanceCreatorUID, PixelDataProviderURL | another creator; another place |
| Rows, Columns, spacings and positions inside private sequences | a scanner's own copy of a grid that is gone |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.contract import Derivation
from medsr_cli.formats.dicom_grid import Grid, rewrite_grid
from medsr_cli.formats.dicom_headers import PALETTE, Instance
from medsr_cli.formats.dicom_sequences import nested
from medsr_cli.volume.volume import Volume

IMPLEMENTATION_CLASS = UID("2.25.96133540152216183520968364410716431747")
"""Marks files written by medsr; a random UUID, drawn once."""

MANUFACTURER = "medsr"
LARGEST_INTEGER_STRING = 2**31 - 1
RESAMPLED = ("113085", "Spatial resampling")
SOURCE_IMAGE = ("121322", "Source image for image processing operation")
MODIFYING = ("109103", "Modifying Equipment")
INTERPOLATIONS = ("bicubic", "lanczos")

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

_ENHANCED = frozenset({
    "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.3", "1.2.840.10008.5.1.4.1.1.4.4", "1.2.840.10008.5.1.4.1.1.128.1",
    "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.6.2", "1.2.840.10008.5.1.4.1.1.12.1.1",
    "1.2.840.10008.5.1.4.1.1.12.2.1", "1.2.840.10008.5.1.4.1.1.13.1.1", "1.2.840.10008.5.1.4.1.1.13.1.2",
    "1.2.840.10008.5.1.4.1.1.13.1.3",
})  # fmt: skip
"""Storage classes whose images are PRIMARY by definition, even when they are derived."""

_ENHANCED_MR = frozenset({"1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.3"})
_MR_ACQUIRED = (
    "PulseSequenceName", "MRAcquisitionType", "EchoPulseSequence", "MultiPlanarExcitation", "PhaseContrast",
    "TimeOfFlightContrast", "SteadyStatePulseSequence", "EchoPlanarPulseSequence", "SaturationRecovery",
    "SpectrallySelectedSuppression", "OversamplingPhase", "GeometryOfKSpaceTraversal",
    "RectilinearPhaseEncodeReordering", "SegmentedKSpaceTraversal", "CoverageOfKSpace",
    "NumberOfKSpaceTrajectories", "BulkMotionCompensationTechnique",
)  # fmt: skip
"""How an enhanced MR image was acquired; dciodvfy holds that a derived one must not say so (type 1C)."""

_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


@dataclass
class Lineage:
    """What all files of one derived series share."""

    derivation: Derivation
    grid: Grid
    result: Volume
    series_uid: str = field(default_factory=lambda: str(generate_uid(prefix=None)))
    now: datetime = field(default_factory=datetime.now)
    concatenations: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For a series description: ` x4 rdst-e`."""
        down, across = (f"{scale:g}" for scale in self.derivation.scale)
        return _plain(
            f" x{down} {self.derivation.method}" if down == across else f" x{down},{across} {self.derivation.method}"
        )

    @property
    def description(self) -> str:
        """One paragraph: what was done, by what, and what it must not be used for."""
        d = self.derivation
        kind = "Interpolated" if d.method in INTERPOLATIONS else "AI-derived"
        parts = [f"{kind}, not for primary diagnosis: enlarged in the plane{self.label} by {d.software}."]
        if self.grid.part is not None:
            row, column = self.grid.part
            parts.append(f"A region of {self.grid.columns} x {self.grid.rows} pixels from x {column}, y {row}.")
        if d.checkpoint_id:
            parts.append(f"Checkpoint {d.checkpoint_id}.")
        if d.degradation:
            parts.append(f"Trained to undo {d.degradation}.")
        return _plain(" ".join(parts))


def derive_header(ds: Dataset, instance: Instance, lineage: Lineage, number: int | None) -> None:
    """Turn the header of a source file into that of its derived file, in place.

    Args:
        ds: all tags of the source but its pixels.
        number: the InstanceNumber to give, or None to keep it.
    """
    _swap_words(ds, instance)
    for keyword in _GONE:
        if keyword in ds:
            delattr(ds, keyword)
    for tag in [tag for tag in ds.keys() if 0x6000 <= tag.group <= 0x60FF or tag.group >= 0x7FE0]:  # noqa: SIM118
        del ds[tag]
    rewrite_grid(ds, instance, lineage.grid)
    _rewrite_pixel_module(ds, instance, lineage.result)
    _identify(ds, instance, lineage, number)
    _tell(ds, instance, lineage)
    ds.file_meta = _file_meta(ds, lineage)
    ds.preamble = b"\0" * 128  # a source's preamble may hold anything


def _identify(ds: Dataset, instance: Instance, lineage: Lineage, number: int | None) -> None:
    ds.SOPClassUID = instance.sop_class or _class_of(instance.modality)
    ds.SOPInstanceUID = generate_uid(prefix=None)
    ds.SeriesInstanceUID = lineage.series_uid
    ds.SeriesNumber = _series_number(ds)
    if number is not None:
        ds.InstanceNumber = number
    ds.SeriesDescription = (_text(ds, "SeriesDescription")[: 64 - len(lineage.label)] + lineage.label).strip()
    ds.InstanceCreationDate = lineage.now.strftime("%Y%m%d")
    ds.InstanceCreationTime = lineage.now.strftime("%H%M%S")
    concatenation = _text(ds, "ConcatenationUID")
    if concatenation:
        ds.ConcatenationUID = lineage.concatenations.setdefault(concatenation, str(generate_uid(prefix=None)))


def _tell(ds: Dataset, instance: Instance, lineage: Lineage) -> None:
    groups = ds.get("SharedFunctionalGroupsSequence")
    ds.ImageType = _image_type(ds, enhanced=instance.sop_class in _ENHANCED)
    earlier = _text(ds, "DerivationDescription")
    ds.DerivationDescription = f"{lineage.description} {earlier}".strip()[:1024]
    codes = list(ds.get("DerivationCodeSequence") or [])
    ds.DerivationCodeSequence = Sequence([*codes, _code(*RESAMPLED)])
    source = _source(instance)
    if source is not None:  # what this was made from; what that was made from is in its own header
        ds.SourceImageSequence = Sequence([source])
    equipment = list(ds.get("ContributingEquipmentSequence") or [])
    ds.ContributingEquipmentSequence = Sequence([*equipment, _equipment(lineage)])
    if instance.sop_class in _ENHANCED_MR:
        for keyword in _MR_ACQUIRED:
            if keyword in ds:
                delattr(ds, keyword)
    if groups:
        _tell_in_groups(ds, instance, lineage)


def _tell_in_groups(ds: Dataset, instance: Instance, lineage: Lineage) -> None:
    """Enhanced objects say the same once more, for their frames."""
    frames = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
    shared = ds.SharedFunctionalGroupsSequence[0]
    for group in [shared, *frames]:
        for item, private in nested(group):
            if not private and "FrameType" in item:
                item.FrameType = ["DERIVED", *list(item.FrameType)[1:]]
    per_frame = [group for group in frames if "DerivationImageSequence" in group]
    for group in per_frame or [shared]:
        earlier = list(group.get("DerivationImageSequence") or [])
        group.DerivationImageSequence = Sequence([*earlier, _derivation_item(instance, lineage)])
    evidence = _evidence(instance)
    if evidence is not None:
        ds.SourceImageEvidenceSequence = Sequence([evidence])
    if "ContentQualification" in ds:
        ds.ContentQualification = "RESEARCH"


def _derivation_item(instance: Instance, lineage: Lineage) -> Dataset:
    item = Dataset()
    item.DerivationDescription = lineage.description[:1024]
    item.DerivationCodeSequence = Sequence([_code(*RESAMPLED)])
    source = _source(instance)
    item.SourceImageSequence = Sequence([source] if source is not None else [])
    return item


def _image_type(ds: Dataset, enhanced: bool) -> list[str]:
    value = ds.get("ImageType")
    parts = [value] if isinstance(value, str) else [str(part) for part in value or []]
    second = "PRIMARY" if enhanced else "SECONDARY"
    return ["DERIVED", second, *parts[2:]]


def _rewrite_pixel_module(ds: Dataset, instance: Instance, result: Volume) -> None:
    if instance.photometric == PALETTE:
        for keyword in _PALETTE_TAGS:
            if keyword in ds:
                delattr(ds, keyword)
        bits = result.dtype.itemsize * 8
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelRepresentation = 0
    if result.channels == 3:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    elif "PlanarConfiguration" in ds:
        del ds.PlanarConfiguration
    method = _LOSSY_METHODS.get(UID(instance.transfer_syntax))
    if method is not None and not _text(ds, "LossyImageCompression"):
        ratio = instance.frame_bytes * instance.frames / max(instance.member.size, 1)
        ds.LossyImageCompression = "01"
        ds.LossyImageCompressionMethod = method
        ds.LossyImageCompressionRatio = format_number_as_ds(round(ratio, 2))


def _equipment(lineage: Lineage) -> Dataset:
    d = lineage.derivation
    what = [f"Super-resolution with {d.method}." if d.method not in INTERPOLATIONS else f"Resampling with {d.method}."]
    if d.checkpoint_id:
        what.append(f"Checkpoint {d.checkpoint_id}.")
    if d.checkpoint_sha256:
        what.append(f"SHA-256 {d.checkpoint_sha256}.")
    item = Dataset()
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = _plain(f"{MANUFACTURER} {d.method}")[:64]
    item.SoftwareVersions = _plain(d.software)[:64]
    item.ContributionDateTime = lineage.now.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = _plain(" ".join(what))[:1024]
    item.PurposeOfReferenceCodeSequence = Sequence([_code(*MODIFYING)])
    return item


def _source(instance: Instance) -> Dataset | None:
    if not instance.sop_instance or not instance.sop_class:
        return None
    item = Dataset()
    item.ReferencedSOPClassUID = instance.sop_class
    item.ReferencedSOPInstanceUID = instance.sop_instance
    item.PurposeOfReferenceCodeSequence = Sequence([_code(*SOURCE_IMAGE)])
    return item


def _evidence(instance: Instance) -> Dataset | None:
    """The source by study, series and image, as enhanced objects list what they refer to."""
    if not (instance.study and instance.series and instance.sop_class and instance.sop_instance):
        return None
    image, series, study = Dataset(), Dataset(), Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = instance.sop_class, instance.sop_instance
    series.SeriesInstanceUID, series.ReferencedSOPSequence = instance.series, Sequence([image])
    study.StudyInstanceUID, study.ReferencedSeriesSequence = instance.study, Sequence([series])
    return study


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _file_meta(ds: Dataset, lineage: Lineage) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS
    meta.ImplementationVersionName = _plain(lineage.derivation.software.replace(" ", "_").upper())[:16]
    return meta


def _class_of(modality: str) -> UID:
    """The storage class of a file that does not say: only its modality is known."""
    known = {"CT": CTImageStorage, "MR": MRImageStorage}
    return known.get(modality, SecondaryCaptureImageStorage)


def _series_number(ds: Dataset) -> int:
    try:
        number = int(ds.get("SeriesNumber") or 0)
    except (TypeError, ValueError):
        number = 0
    return number + 1000 if number + 1000 <= LARGEST_INTEGER_STRING else number


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


def _plain(text: str) -> str:
    """Text in the characters that every character set of DICOM shares, without the value separator."""
    return text.encode("ascii", "replace").decode("ascii").replace("\\", "/")
