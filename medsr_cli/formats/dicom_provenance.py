"""What a derived image says about where it comes from: in its own tags, in words and in codes.

| where | what |
|---|---|
| ImageType | DERIVED, and SECONDARY (enhanced objects: PRIMARY, as PS3.3 section C.8.13.3.1.1.2 and its like have it) |
| DerivationDescription | one paragraph: AI-derived or interpolated, not for primary diagnosis; scale, method, version, region, checkpoint with its SHA-256, degradation assumed; then what the source says of its own derivation |
| DerivationCodeSequence | what the source has, and 113085 Spatial resampling (PS3.16 CID 7203) |
| SourceImageSequence | the source image, and its frame where it was one of several; 121322 (CID 7202) |
| ContributingEquipmentSequence | what the source has, and medsr with method, version, checkpoint and SHA-256; 109103 Modifying Equipment (CID 7005); no institution, no person, no device serial number |
| ImageComments | the first sentence of the paragraph, before what the source says there: viewers show it beside the picture |
| SeriesDescription | the source's, and ` x4 rdst-e`: viewers show it in the list of series |
| enhanced objects | the words, codes and source of the derivation in DerivationImageSequence, where their definition has a place for them, and not beside it; FrameType, SourceImageEvidenceSequence, ContentQualification RESEARCH |

An image without a UID, or with one that is not valid, cannot be named as the source.

What was made by interpolation alone is called so, and not AI-derived.
"""  # noqa: E501 - a table

from __future__ import annotations

from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medsr_cli.formats.dicom_headers import Instance
from medsr_cli.formats.dicom_sequences import nested
from medsr_cli.formats.dicom_texts import put_before

if TYPE_CHECKING:
    from medsr_cli.formats.dicom_derive import Lineage

MANUFACTURER = "medsr"
RESAMPLED = ("113085", "Spatial resampling")
SOURCE_IMAGE = ("121322", "Source image for image processing operation")
MODIFYING = ("109103", "Modifying Equipment")
INTERPOLATIONS = ("bicubic", "lanczos")

SHORT_TEXT, LONG_TEXT, LONG_STRING = 1024, 10240, 64
"""Characters of ST, LT and LO values (PS3.5 section 6.2)."""
NOT_FOR_DIAGNOSIS = "not for primary diagnosis"

ENHANCED = frozenset({
    "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2", "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.3", "1.2.840.10008.5.1.4.1.1.4.4", "1.2.840.10008.5.1.4.1.1.128.1",
    "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.6.2", "1.2.840.10008.5.1.4.1.1.12.1.1",
    "1.2.840.10008.5.1.4.1.1.12.2.1", "1.2.840.10008.5.1.4.1.1.13.1.1", "1.2.840.10008.5.1.4.1.1.13.1.2",
    "1.2.840.10008.5.1.4.1.1.13.1.3",
})  # fmt: skip
"""Storage classes whose images are PRIMARY by definition, even when they are derived."""

ALWAYS_PRIMARY = ENHANCED | {"1.2.840.10008.5.1.4.1.1.128"}
"""Those and PET, whose ImageType has no other second value (PS3.3 section C.8.9.4.1.3)."""

ENHANCED_MR = frozenset({"1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.3"})
_MR_ACQUIRED = (
    "PulseSequenceName", "MRAcquisitionType", "EchoPulseSequence", "MultiPlanarExcitation", "PhaseContrast",
    "TimeOfFlightContrast", "SteadyStatePulseSequence", "EchoPlanarPulseSequence", "SaturationRecovery",
    "SpectrallySelectedSuppression", "OversamplingPhase", "GeometryOfKSpaceTraversal",
    "RectilinearPhaseEncodeReordering", "SegmentedKSpaceTraversal", "CoverageOfKSpace",
    "NumberOfKSpaceTrajectories", "BulkMotionCompensationTechnique",
)  # fmt: skip
"""How an enhanced MR image was acquired; dciodvfy holds that a derived one must not say so (type 1C)."""


def software(lineage: Lineage) -> str:
    """Name and version of this program."""
    return plain(lineage.derivation.software)[:LONG_STRING]


def label(lineage: Lineage) -> str:
    """For a series description: ` x4 rdst-e`, and which of several results it is from the second on."""
    down, across = (f"{scale:g}" for scale in lineage.derivation.scale)
    scale = down if down == across else f"{down},{across}"
    which = f" {lineage.ordinal + 1}" if lineage.ordinal else ""
    return plain(f" x{scale} {lineage.derivation.method}{which}")


def comment(lineage: Lineage) -> str:
    """One sentence: what the image is, and what it must not be used for."""
    d = lineage.derivation
    kind = "Interpolated" if d.method in INTERPOLATIONS else "AI-derived"
    down, across = (f"{scale:g}" for scale in d.scale)
    scale = down if down == across else f"{down},{across}"
    return plain(f"{kind}, not for primary diagnosis: enlarged in the plane x{scale} {d.method} by {d.software}.")


def description(lineage: Lineage) -> str:
    """One paragraph: what was done, by what, and what it must not be used for."""
    d, grid = lineage.derivation, lineage.grid
    parts = [comment(lineage)]
    if grid.part is not None:
        row, column = grid.part
        parts.append(f"A region of {grid.columns} x {grid.rows} pixels from x {column}, y {row}.")
    if d.checkpoint_id:
        parts.append(f"Checkpoint {d.checkpoint_id}.")
    if d.checkpoint_sha256:
        parts.append(f"SHA-256 {d.checkpoint_sha256}.")
    if d.degradation:
        parts.append(f"Trained to undo {d.degradation}.")
    parts += d.remarks
    return plain(" ".join(parts))


def tell(ds: Dataset, instance: Instance, lineage: Lineage, frame: int | None) -> None:
    """Write all of it into a data set, in place.

    Args:
        ds: the derived data set, SOPClassUID included.
        frame: the frame of the source that it was made from, counted from 0; None for the whole file.
    """
    enhanced = str(ds.SOPClassUID) in ENHANCED
    ds.ImageType = _image_type(ds, primary=str(ds.SOPClassUID) in ALWAYS_PRIMARY)
    put_before(ds, "ImageComments", comment(lineage), LONG_TEXT)
    source = _source(instance, frame)
    if not enhanced or "DerivationDescription" in ds:
        put_before(ds, "DerivationDescription", description(lineage), SHORT_TEXT, between=" ")
    if not enhanced or "DerivationCodeSequence" in ds:
        codes = list(ds.get("DerivationCodeSequence") or [])
        ds.DerivationCodeSequence = Sequence([*codes, _code(*RESAMPLED)])
    if source is not None and (not enhanced or "SourceImageSequence" in ds):
        ds.SourceImageSequence = Sequence([source])  # what that was made from is in its own header
    elif "SourceImageSequence" in ds:  # it would name the source's source as this one's
        del ds.SourceImageSequence
    equipment = list(ds.get("ContributingEquipmentSequence") or [])
    ds.ContributingEquipmentSequence = Sequence([*equipment, _equipment(lineage)])
    if str(ds.SOPClassUID) in ENHANCED_MR:
        for keyword in _MR_ACQUIRED:
            if keyword in ds:
                delattr(ds, keyword)
    if "SharedFunctionalGroupsSequence" in ds or "PerFrameFunctionalGroupsSequence" in ds:
        _tell_in_groups(ds, instance, lineage)


def _tell_in_groups(ds: Dataset, instance: Instance, lineage: Lineage) -> None:
    """Enhanced objects say the same once more, for their frames."""
    frames = list(ds.get("PerFrameFunctionalGroupsSequence") or [])
    if not ds.get("SharedFunctionalGroupsSequence"):
        ds.SharedFunctionalGroupsSequence = Sequence([Dataset()])
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
    item.DerivationDescription = description(lineage)[:SHORT_TEXT]
    item.DerivationCodeSequence = Sequence([_code(*RESAMPLED)])
    source = _source(instance, None)
    item.SourceImageSequence = Sequence([source] if source is not None else [])
    return item


def _image_type(ds: Dataset, *, primary: bool) -> list[str]:
    value = ds.get("ImageType")
    parts = [value] if isinstance(value, str) else [str(part) for part in value or []]
    second = "PRIMARY" if primary else "SECONDARY"
    return ["DERIVED", second, *parts[2:]]


def _equipment(lineage: Lineage) -> Dataset:
    d = lineage.derivation
    what = [f"Super-resolution with {d.method}." if d.method not in INTERPOLATIONS else f"Resampling with {d.method}."]
    what.append(f"{NOT_FOR_DIAGNOSIS if d.method in INTERPOLATIONS else 'AI-derived, ' + NOT_FOR_DIAGNOSIS}.")
    if d.checkpoint_id:
        what.append(f"Checkpoint {d.checkpoint_id}.")
    if d.checkpoint_sha256:
        what.append(f"SHA-256 {d.checkpoint_sha256}.")
    item = Dataset()
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = plain(f"{MANUFACTURER} {d.method}")[:LONG_STRING]
    item.SoftwareVersions = software(lineage)
    if not lineage.identities.stable:  # an object of one UID says one thing, whenever it is made
        item.ContributionDateTime = lineage.now.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = plain(" ".join(what))[:SHORT_TEXT]
    item.PurposeOfReferenceCodeSequence = Sequence([_code(*MODIFYING)])
    return item


def _source(instance: Instance, frame: int | None) -> Dataset | None:
    if not (_is_uid(instance.sop_instance) and _is_uid(instance.sop_class)):
        return None
    item = Dataset()
    item.ReferencedSOPClassUID = instance.sop_class
    item.ReferencedSOPInstanceUID = instance.sop_instance
    if frame is not None:
        item.ReferencedFrameNumber = frame + 1
    item.PurposeOfReferenceCodeSequence = Sequence([_code(*SOURCE_IMAGE)])
    return item


def _evidence(instance: Instance) -> Dataset | None:
    """The source by study, series and image, as enhanced objects list what they refer to."""
    if not all(map(_is_uid, (instance.study, instance.series, instance.sop_class, instance.sop_instance))):
        return None
    image, series, study = Dataset(), Dataset(), Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = instance.sop_class, instance.sop_instance
    series.SeriesInstanceUID, series.ReferencedSOPSequence = instance.series, Sequence([image])
    study.StudyInstanceUID, study.ReferencedSeriesSequence = instance.study, Sequence([series])
    return study


def _is_uid(text: str) -> bool:
    """Whether a text may stand as a UID: a reference to another would be refused with all that refers to it."""
    return UID(text).is_valid


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def plain(text: str) -> str:
    """Text in the characters that every character set of DICOM shares, without the value separator."""
    return text.encode("ascii", "replace").decode("ascii").replace("\\", "/")
