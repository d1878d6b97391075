"""One frame of an enhanced multi-frame object as a classic single-frame image.

An enhanced object says once what all frames share and keeps the rest in functional groups (PS3.3 C.7.6.16). A classic
image says everything at its top level, so each group that it has an attribute for is taken out of its sequence; what
the modality itself puts in there is in `dicom_classic_acquisition`. What a classic image has no attribute for is left
out: functional groups, dimensions, concatenation and the enhanced attributes of image level. Scanners keep private
sequences among the groups; the private elements in these move to the top level, where classic images of the same
scanners have them (Philips' scale slope for one, without which dcm2niix finds other values).

| enhanced | classic |
|---|---|
| Enhanced MR, Legacy Converted Enhanced MR (A.36, A.70) | MR Image (A.4) |
| Enhanced CT, Legacy Converted Enhanced CT (A.38, A.69) | CT Image (A.3) |
| Enhanced PET, Legacy Converted Enhanced PET (A.56, A.71) | PET Image (A.21) |
| Enhanced XA, Enhanced XRF (A.47, A.48) | X-Ray Angiographic, X-Ray RF Image (A.14, A.16), of a single shot |

Colour frames, tomosynthesis and X-Ray 3D have no classic class. A CT, MR or PET image must say where it lies (type 1),
so objects whose frames do not say it stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID, CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from pydicom.valuerep import format_number_as_ds

from medsr_cli.formats.dicom_classic_acquisition import Groups, acquisition, copied, taken
from medsr_cli.formats.dicom_headers import GREY, Instance, Plane

_XA, _XRF = UID("1.2.840.10008.5.1.4.1.1.12.1"), UID("1.2.840.10008.5.1.4.1.1.12.2")

CLASSIC_CLASSES: dict[str, UID] = {
    "1.2.840.10008.5.1.4.1.1.4.1": MRImageStorage,
    "1.2.840.10008.5.1.4.1.1.4.4": MRImageStorage,
    "1.2.840.10008.5.1.4.1.1.2.1": CTImageStorage,
    "1.2.840.10008.5.1.4.1.1.2.2": CTImageStorage,
    "1.2.840.10008.5.1.4.1.1.130": PositronEmissionTomographyImageStorage,
    "1.2.840.10008.5.1.4.1.1.128.1": PositronEmissionTomographyImageStorage,
    "1.2.840.10008.5.1.4.1.1.12.1.1": _XA,
    "1.2.840.10008.5.1.4.1.1.12.2.1": _XRF,
}
"""Storage class of a single frame, by that of the enhanced object."""

_PROJECTIONS = frozenset({_XA, _XRF})
"""A loop of these is for watching: it stays one object, with its frame times. A single shot becomes classic."""

_GONE = frozenset({
    "NumberOfFrames", "FrameIncrementPointer", "PixelPresentation", "VolumetricProperties",
    "VolumeBasedCalculationTechnique", "AcquisitionContrast", "ReferencedImageEvidenceSequence",
    "SourceImageEvidenceSequence", "ReferencedRawDataSequence", "ReferencedWaveformSequence", "CreatorVersionUID",
    "PresentationLUTShape", "ConcatenationUID", "FrameTime", "FrameTimeVector",
    "StartTrim", "StopTrim", "RepresentativeFrameNumber", "ContrastBolusAgentSequence",
    "AcquisitionContextSequence",
})  # fmt: skip
"""Of image level in the enhanced modules; the rest of what goes is named by `_enhanced`."""
_STAYS = frozenset({"ComplexImageComponent"})
"""Of the same groups, yet true and told nowhere else."""

_EMPTY = (
    "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientName", "PatientID",
    "PatientBirthDate", "PatientSex", "Manufacturer", "SeriesNumber", "InstanceNumber",
    "PositionReferenceIndicator",
)  # fmt: skip
"""Type 2 in every image."""

_WINDOW = ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction", "VOILUTSequence")


def classic_class(instance: Instance, frames: Iterable[int]) -> UID | None:
    """The storage class that frames of an object get as images of their own; None where there is none.

    Args:
        instance: any object.
        frames: those of its frames, from 0, that are meant.
    """
    found = CLASSIC_CLASSES.get(instance.sop_class)
    if found is None or instance.photometric not in GREY:
        return None
    if found in _PROJECTIONS:
        return found if instance.frames == 1 else None
    return found if all(_placed(instance.planes[frame]) for frame in frames) else None


def classic_header(ds: Dataset, instance: Instance, index: int) -> Dataset:
    """The header that one frame would have as a classic image, on the source's own grid.

    Args:
        ds: all tags of the enhanced object but its pixels; it is left as it is, and nothing of it is shared.
        instance: the object.
        index: the frame, from 0.

    Raises:
        ValueError: `classic_class` knows none for it.
    """
    sop_class = classic_class(instance, (index,))
    if sop_class is None:
        msg = "This object has no classic class."
        raise ValueError(msg)
    groups = Groups.of(ds, index)
    classic = _image_level(ds)
    classic.SOPClassUID = sop_class
    _geometry(classic, groups, instance.planes[index])
    _content(classic, groups, instance, index)
    _values(classic, groups, instance.planes[index], sop_class)
    _anatomy(classic, groups)
    acquisition(classic, ds, groups, index)
    for group in (groups.shared, groups.frame):
        _lift_private(classic, group)
    for keyword in _EMPTY:
        if keyword not in classic:
            setattr(classic, keyword, None)
    if sop_class in (MRImageStorage, CTImageStorage) and "PatientPosition" not in classic:
        classic.PatientPosition = None
    return classic


def _placed(plane: Plane) -> bool:
    return None not in (plane.position_mm, plane.orientation, plane.spacing_mm)


def _image_level(ds: Dataset) -> Dataset:
    """What the enhanced object says of itself and a classic image may say too, copied."""
    kept = Dataset()
    implicit, little_endian = ds.original_encoding
    kept.set_original_encoding(implicit, little_endian, ds.original_character_set)  # most is not decoded yet
    for tag in _kept_tags(ds):
        kept[tag] = copied(ds, tag)
    return kept


def _kept_tags(ds: Dataset) -> Iterator[BaseTag]:
    for tag in list(ds.keys()):
        if tag.group >= 0x7FE0:
            continue
        keyword = keyword_for_tag(tag)
        if keyword in _STAYS or not (keyword in _GONE or _enhanced(tag)):
            yield tag


def _enhanced(tag: BaseTag) -> bool:
    """Whether a tag is in a block that the standard gave to the enhanced modules alone."""
    return (
        tag.group == 0x5200
        or (tag.group in (0x0018, 0x0020, 0x0028) and 0x9000 <= tag.elem < 0xA000)
        or (tag.group == 0x0020 and tag.elem in (0x0242, 0x0032, 0x0037))  # the position comes from the groups
        or (tag.group == 0x0008 and 0x9200 <= tag.elem < 0x9300)
        or (tag.group == 0x0028 and 0x1100 <= tag.elem < 0x1300)  # palettes, which a grey image has none of
    )


def _lift_private(classic: Dataset, group: Dataset) -> None:
    """Private elements of the private sequences of one item, where their block is free or the same creator's."""
    for element in group:
        if not element.tag.is_private or element.VR != "SQ" or len(element.value) != 1:
            continue
        item = element.value[0]
        private = [tag for tag in item.keys() if tag.is_private]  # noqa: SIM118
        creators = {(tag.group, tag.elem): item[tag] for tag in private if 0x10 <= tag.elem <= 0xFF}
        free = {
            block
            for block, creator in creators.items()
            if block not in classic or classic[block].value == creator.value
        }
        for tag in private:
            block = (tag.group, tag.elem if 0x10 <= tag.elem <= 0xFF else tag.elem >> 8)
            if block in free:
                classic[tag] = copied(item, tag)


# -- what every modality has ----------------------------------------------------------------------------------


def _geometry(classic: Dataset, groups: Groups, plane: Plane) -> None:
    """C.7.6.2: where the frame lies, in the source's own digits."""
    taken(classic, groups["PlanePositionSequence"], ("ImagePositionPatient",))
    taken(classic, groups["PlaneOrientationSequence"], ("ImageOrientationPatient",))
    taken(classic, groups["PixelMeasuresSequence"], ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"))
    known: tuple[tuple[str, tuple[float, ...] | None], ...] = (
        ("ImagePositionPatient", plane.position_mm),
        ("ImageOrientationPatient", plane.orientation),
        ("PixelSpacing", plane.spacing_mm if plane.position_mm else None),
    )
    for keyword, values in known:
        if values is not None and keyword not in classic:  # from the top level, as the reader has it
            setattr(classic, keyword, [format_number_as_ds(value) for value in values])
    if plane.position_mm is not None and "SliceThickness" not in classic:
        classic.SliceThickness = None


def _content(classic: Dataset, groups: Groups, instance: Instance, index: int) -> None:
    """C.7.6.16.2.2 and C.7.6.16.2.3: when the frame was acquired, and which one it is."""
    content = groups["FrameContentSequence"]
    moment = str(content.get("FrameAcquisitionDateTime") or classic.get("AcquisitionDateTime") or "")
    date, time = _date_and_time(moment)
    if date:
        classic.AcquisitionDate, classic.AcquisitionDateTime = date, moment
    if time:
        classic.AcquisitionTime = time
    taken(classic, content, ("FrameAcquisitionNumber",), names={"FrameAcquisitionNumber": "AcquisitionNumber"})
    taken(classic, content, ("FrameComments",), names={"FrameComments": "ImageComments"})
    points = len({plane.temporal for plane in instance.planes})
    if points > 1:
        classic.TemporalPositionIdentifier = instance.planes[index].temporal
        classic.NumberOfTemporalPositions = points
    taken(classic, groups["IrradiationEventIdentificationSequence"], ("IrradiationEventUID",))
    references = groups.items("ReferencedImageSequence")
    if references:
        classic.ReferencedImageSequence = Sequence(copy.deepcopy(references))
    derivation = groups["DerivationImageSequence"]
    taken(classic, derivation, ("DerivationDescription", "DerivationCodeSequence", "SourceImageSequence"))
    _cardiac(classic, groups["CardiacSynchronizationSequence"])


def _cardiac(classic: Dataset, group: Dataset) -> None:
    """C.7.6.16.2.7, in the words of C.7.6.18.1: milliseconds after the R wave."""
    delay, interval = group.get("NominalCardiacTriggerDelayTime"), group.get("RRIntervalTimeNominal")
    if delay is not None:
        classic.TriggerTime = format_number_as_ds(float(delay))
    if interval is not None:
        classic.NominalInterval = round(float(interval))


def _values(classic: Dataset, groups: Groups, plane: Plane, sop_class: UID) -> None:
    """C.11.1 and C.11.2: what stored values mean, and how to show them."""
    taken(classic, groups["PixelValueTransformationSequence"], ("RescaleIntercept", "RescaleSlope", "RescaleType"))
    if sop_class == MRImageStorage and (plane.slope, plane.intercept) == (1.0, 0.0):
        for keyword in ("RescaleIntercept", "RescaleSlope", "RescaleType"):  # an MR image has no such module
            classic.pop(keyword, None)
    elif sop_class not in _PROJECTIONS and "RescaleSlope" not in classic:
        classic.RescaleIntercept = format_number_as_ds(plane.intercept)
        classic.RescaleSlope = format_number_as_ds(plane.slope)
    taken(classic, groups["FrameVOILUTSequence"], _WINDOW)
    mappings = groups.items("RealWorldValueMappingSequence")
    if mappings:
        classic.RealWorldValueMappingSequence = Sequence(copy.deepcopy(mappings))


def _anatomy(classic: Dataset, groups: Groups) -> None:
    """C.7.6.16.2.8."""
    anatomy = groups["FrameAnatomySequence"]
    taken(classic, anatomy, ("AnatomicRegionSequence", "PrimaryAnatomicStructureSequence"))
    side = str(anatomy.get("FrameLaterality") or "")
    if side in ("R", "L", "U", "B"):
        classic.ImageLaterality = side


def _date_and_time(moment: str) -> tuple[str, str]:
    """A DT value (PS3.5 6.2) as DA and TM, without its offset from UTC."""
    text = moment.strip().partition("+")[0].partition("-")[0]
    date, time = (text[:8], text[8:]) if len(text) >= 8 and text[:8].isdigit() else ("", "")
    return date, time if time[:1].isdigit() else ""
