"""How a frame was acquired, in the words of the classic MR, CT, PET and X-ray modules.

Enhanced modules name what was done (an echo pulse sequence, an effective echo time); classic ones have fewer and older
words for it. Sources: PS3.3 C.8.13 to C.8.3.1 for MR, C.8.15 to C.8.2.1 for CT, C.8.22 to C.8.9 for PET, C.8.19 to
C.8.7 for X-ray. What classic attributes a scanner has written at the top level itself are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage
from pydicom.valuerep import format_number_as_ds

_LARGEST_IS = 2**31 - 1


@dataclass(frozen=True)
class Groups:
    """The functional groups that hold for one frame: its own, else those that all frames share."""

    frame: Dataset
    shared: Dataset

    @classmethod
    def of(cls, ds: Dataset, index: int) -> Groups:
        """Those of frame `index`, from 0; none where the object has none."""
        frames = ds.get("PerFrameFunctionalGroupsSequence") or []
        shared = ds.get("SharedFunctionalGroupsSequence") or []
        return cls(frames[index] if index < len(frames) else Dataset(), shared[0] if shared else Dataset())

    def items(self, keyword: str) -> list[Dataset]:
        """All items of one functional group."""
        return list(self.frame.get(keyword) or self.shared.get(keyword) or [])

    def __getitem__(self, keyword: str) -> Dataset:
        """The item of a functional group that has one; empty where the group is missing."""
        items = self.items(keyword)
        return items[0] if items else Dataset()


def copied(ds: Dataset, tag: int) -> DataElement | RawDataElement:
    """An element of its own, not decoded where nobody has looked at it yet: its bytes stay as they are."""
    element: Any = ds.get_item(tag)
    if isinstance(element, RawDataElement):
        return element  # which nobody can change
    if element.VR == "SQ":
        return DataElement(element.tag, "SQ", copy.deepcopy(element.value))
    twin: DataElement = copy.copy(element)
    if isinstance(element.value, MultiValue):
        twin.value = list(element.value)
    return twin


def taken(classic: Dataset, item: Dataset, keywords: tuple[str, ...], names: Mapping[str, str] | None = None) -> None:
    """Copy the attributes of an item that have a value, under their classic `names` where these differ."""
    for keyword in keywords:
        if keyword not in item or item[keyword].is_empty:
            continue
        if names and keyword in names:
            setattr(classic, names[keyword], item[keyword].value)
        else:
            classic[keyword] = copied(item, Tag(keyword))


def acquisition(classic: Dataset, ds: Dataset, groups: Groups, index: int) -> None:
    """Add what the modality's classic module says of an acquisition.

    Args:
        classic: the header being made; it has the storage class already.
        ds: the whole enhanced header.
        groups: of the frame.
        index: the frame, from 0.
    """
    sop_class = classic.SOPClassUID
    _contrast(classic, ds, groups)
    if sop_class == MRImageStorage:
        _mr(classic, ds, groups)
    elif sop_class == CTImageStorage:
        _ct(classic, ds, groups)
    elif sop_class == PositronEmissionTomographyImageStorage:
        _pet(classic, ds, groups, index)
    else:
        _x_ray(classic, ds, groups)


def _decimal(classic: Dataset, keyword: str, item: Dataset, source: str) -> None:
    """A floating-point attribute as a decimal string."""
    number = _number(item, source)
    if number is not None:
        setattr(classic, keyword, format_number_as_ds(number))


def _integer(classic: Dataset, keyword: str, item: Dataset, source: str) -> None:
    number = _number(item, source)
    if number is not None and abs(number) <= _LARGEST_IS:
        setattr(classic, keyword, round(number))


def _number(item: Dataset, keyword: str) -> float | None:
    value = item.get(keyword)
    try:
        number = float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _word(item: Dataset, keyword: str) -> str:
    value = item.get(keyword)
    return "" if value is None else str(value).strip()


def _active(item: Dataset, keyword: str) -> bool:
    """Whether an enumerated attribute says that something was done."""
    return _word(item, keyword) not in ("", "NO", "NONE", "UNKNOWN")


def _empty(classic: Dataset, *keywords: str) -> None:
    """Type 2: present, without a value where it is not known."""
    for keyword in keywords:
        if keyword not in classic:
            setattr(classic, keyword, [] if keyword.endswith("Sequence") else None)


def _frame_type(ds: Dataset, item: Dataset) -> list[str]:
    value = item.get("FrameType") or ds.get("ImageType") or ["ORIGINAL", "PRIMARY"]
    return [value] if isinstance(value, str) else [str(part) for part in value]


def _contrast(classic: Dataset, ds: Dataset, groups: Groups) -> None:
    """C.7.6.4b and C.7.6.16.2.12 to C.7.6.4, unless the frame is said to be without it."""
    agents = list(ds.get("ContrastBolusAgentSequence") or [])
    usage = {
        item.get("ContrastBolusAgentNumber"): _word(item, "ContrastBolusAgentAdministered")
        for item in groups.items("ContrastBolusUsageSequence")
    }
    agents = [agent for agent in agents if usage.get(agent.get("ContrastBolusAgentNumber")) != "NO"]
    if not agents:
        return
    if not _word(classic, "ContrastBolusAgent"):
        names = [_word(agent, "CodeMeaning") for agent in agents]
        classic.ContrastBolusAgent = ", ".join(name for name in names if name)[:64]
    first = agents[0]
    taken(classic, first, ("ContrastBolusVolume", "ContrastBolusIngredientConcentration"))
    routes = first.get("ContrastBolusAdministrationRouteSequence") or []
    if routes and _word(routes[0], "CodeMeaning"):
        classic.ContrastBolusRoute = _word(routes[0], "CodeMeaning")[:64]
    ingredients = first.get("ContrastBolusIngredientCodeSequence") or []
    ingredient = _word(ingredients[0], "CodeMeaning").upper() if ingredients else ""
    if ingredient in ("IODINE", "GADOLINIUM", "CARBON DIOXIDE", "BARIUM"):
        classic.ContrastBolusIngredient = ingredient


# -- MR -------------------------------------------------------------------------------------------------------


def _mr(classic: Dataset, ds: Dataset, groups: Groups) -> None:
    frame_type = groups["MRImageFrameTypeSequence"]
    classic.ImageType = _frame_type(ds, frame_type)
    taken(classic, frame_type, ("ComplexImageComponent",))
    if _word(classic, "ComplexImageComponent") not in ("PHASE", "REAL", "IMAGINARY"):
        classic.pop("ComplexImageComponent", None)  # magnitude is what is meant without, MIXED is of the whole object
    said = _Acquired(ds, groups)
    for keyword, values in (("ScanningSequence", said.sequence()), ("SequenceVariant", said.variant())):
        if not classic.get(keyword):
            setattr(classic, keyword, values)
    if not classic.get("ScanOptions"):
        classic.ScanOptions = said.options() or None
    taken(classic, ds, ("PulseSequenceName", "ResonantNucleus"),
          {"PulseSequenceName": "SequenceName", "ResonantNucleus": "ImagedNucleus"})  # fmt: skip
    _mr_timing(classic, groups)
    _mr_coils_and_matrix(classic, groups)
    if "IR" not in (classic.ScanningSequence or ""):
        classic.pop("InversionTime", None)  # type 2C: not without an inversion
    _mr_diffusion(classic, groups["MRDiffusionSequence"])
    _empty(classic, "MRAcquisitionType", "EchoTime", "EchoTrainLength", "RepetitionTime")


def _mr_timing(classic: Dataset, groups: Groups) -> None:
    timing = groups["MRTimingAndRelatedParametersSequence"]
    taken(classic, timing, ("RepetitionTime", "FlipAngle", "EchoTrainLength"))
    if "EchoTrainLength" not in classic:
        trains = [_number(timing, keyword) or 0 for keyword in ("RFEchoTrainLength", "GradientEchoTrainLength")]
        if max(trains):
            classic.EchoTrainLength = round(max(trains))
    for rate in timing.get("SpecificAbsorptionRateSequence") or []:
        if _word(rate, "SpecificAbsorptionRateDefinition") == "IEC_WHOLE_BODY":
            _decimal(classic, "SAR", rate, "SpecificAbsorptionRateValue")
    if _word(timing, "GradientOutputType") == "DB_DT":
        _decimal(classic, "dBdt", timing, "GradientOutput")
    _decimal(classic, "EchoTime", groups["MREchoSequence"], "EffectiveEchoTime")
    modifier = groups["MRModifierSequence"]
    taken(classic, modifier, ("InversionTime",))
    _decimal(classic, "InversionTime", modifier, "InversionTimes")
    taken(classic, groups["MRAveragesSequence"], ("NumberOfAverages",))


def _mr_coils_and_matrix(classic: Dataset, groups: Groups) -> None:
    imaging = groups["MRImagingModifierSequence"]
    taken(classic, imaging, ("PixelBandwidth",))
    _decimal(classic, "ImagingFrequency", imaging, "TransmitterFrequency")
    taken(classic, groups["MRReceiveCoilSequence"], ("ReceiveCoilName",))
    taken(classic, groups["MRTransmitCoilSequence"], ("TransmitCoilName",))
    field = groups["MRFOVGeometrySequence"]
    taken(classic, field, ("PercentSampling", "PercentPhaseFieldOfView"))
    direction = {"COLUMN": "COL", "ROW": "ROW"}.get(_word(field, "InPlanePhaseEncodingDirection"))
    frequency = _number(field, "MRAcquisitionFrequencyEncodingSteps")
    phase = _number(field, "MRAcquisitionPhaseEncodingStepsInPlane")
    if phase is not None:
        classic.NumberOfPhaseEncodingSteps = round(phase)
    if direction is None:
        classic.pop("InPlanePhaseEncodingDirection", None)
        return
    classic.InPlanePhaseEncodingDirection = direction
    if frequency is not None and phase is not None:
        # Frequency rows, frequency columns, phase rows, phase columns (C.8.3.1.1.2), as scanners write it.
        steps = [round(frequency), round(phase)]
        classic.AcquisitionMatrix = [steps[0], 0, 0, steps[1]] if direction == "COL" else [0, *steps, 0]


def _mr_diffusion(classic: Dataset, diffusion: Dataset) -> None:
    taken(classic, diffusion, ("DiffusionBValue", "DiffusionDirectionality", "DiffusionBMatrixSequence"))
    for direction in diffusion.get("DiffusionGradientDirectionSequence") or []:
        taken(classic, direction, ("DiffusionGradientOrientation",))


@dataclass(frozen=True)
class _Acquired:
    """An MR acquisition in the terms of C.8.3.1.1: what enhanced attributes say, and scanners' copies of them."""

    ds: Dataset
    groups: Groups

    def sequence(self) -> list[str]:
        """ScanningSequence; RM, research mode, where nothing is known, for there is no word for that."""
        modifier = self.groups["MRModifierSequence"]
        pulse = {"SPIN": ["SE"], "GRADIENT": ["GR"], "BOTH": ["SE", "GR"]}
        said = list(pulse.get(_word(self.ds, "EchoPulseSequence"), []))
        said += ["IR"] if _active(modifier, "InversionRecovery") else []
        said += ["EP"] if _active(self.ds, "EchoPlanarPulseSequence") else []
        return said or ["RM"]

    def variant(self) -> list[str]:
        """SequenceVariant; NONE where nothing of it was said."""
        modifier, imaging = self.groups["MRModifierSequence"], self.groups["MRImagingModifierSequence"]
        steady = _word(self.ds, "SteadyStatePulseSequence")
        said = {
            "SK": _word(self.ds, "SegmentedKSpaceTraversal") not in ("", "SINGLE"),
            "MTC": _active(imaging, "MagnetizationTransfer"),
            "SS": steady in ("FREE_PRECESSION", "TRANSVERSE", "LONGITUDINAL"),
            "TRSS": steady == "TIME_REVERSED",
            "SP": _active(modifier, "Spoiling"),
            "MP": _active(modifier, "T2Preparation") or _active(self.ds, "SaturationRecovery"),
            "OSP": _active(self.ds, "OversamplingPhase"),
        }
        return [word for word, is_so in said.items() if is_so] or ["NONE"]

    def options(self) -> list[str]:
        """ScanOptions; may be empty."""
        modifier = self.groups["MRModifierSequence"]
        partial = _word(modifier, "PartialFourierDirection") if _active(modifier, "PartialFourier") else ""
        breathing = _word(self.ds, "RespiratoryMotionCompensationTechnique")
        said = {
            "PER": breathing == "PHASE_ORDERING",
            "RG": breathing == "GATING",
            "CG": _active(self.ds, "CardiacSynchronizationTechnique"),
            "FC": _active(modifier, "FlowCompensation"),
            "PFF": partial in ("FREQUENCY", "COMBINATION"),
            "PFP": partial in ("PHASE", "COMBINATION"),
            "SP": _active(modifier, "SpatialPresaturation"),
            "FS": _word(self.ds, "SpectrallySelectedSuppression") in ("FAT", "FAT_AND_WATER"),
        }
        return [word for word, is_so in said.items() if is_so]


# -- CT, PET, X-ray -------------------------------------------------------------------------------------------


def _ct(classic: Dataset, ds: Dataset, groups: Groups) -> None:
    kinds = _frame_type(ds, groups["CTImageFrameTypeSequence"])
    axial = "LOCALIZER" if "LOCALIZER" in kinds[2:3] else "AXIAL"
    extra = [kind for kind in kinds[2:] if kind not in ("LOCALIZER", "AXIAL", "NONE")]
    classic.ImageType = [*(kinds[:2] if len(kinds) > 1 else [*kinds, "PRIMARY"]), axial, *extra]
    details = groups["CTAcquisitionDetailsSequence"]
    taken(classic, details, ("RotationDirection", "RevolutionTime", "SingleCollimationWidth", "TotalCollimationWidth",
                             "TableHeight", "GantryDetectorTilt", "DataCollectionDiameter"))  # fmt: skip
    taken(classic, groups["CTTableDynamicsSequence"], ("TableSpeed", "TableFeedPerRotation", "SpiralPitchFactor"))
    taken(classic, groups["CTGeometrySequence"], ("DistanceSourceToDetector",))
    taken(classic, groups["CTPositionSequence"], ("DataCollectionCenterPatient", "ReconstructionTargetCenterPatient"))
    kernel = groups["CTReconstructionSequence"]
    taken(classic, kernel, ("ConvolutionKernel", "ReconstructionDiameter"))
    exposure = groups["CTExposureSequence"]
    taken(classic, exposure, ("ExposureModulationType", "EstimatedDoseSaving", "CTDIvol",
                              "CTDIPhantomTypeCodeSequence"))  # fmt: skip
    _exposure(classic, exposure)
    tube = groups["CTXRayDetailsSequence"]
    taken(classic, tube, ("KVP", "FocalSpots", "FilterType"))
    _empty(classic, "KVP", "AcquisitionNumber")


def _exposure(classic: Dataset, exposure: Dataset) -> None:
    _integer(classic, "ExposureTime", exposure, "ExposureTimeInms")
    _integer(classic, "XRayTubeCurrent", exposure, "XRayTubeCurrentInmA")
    _integer(classic, "Exposure", exposure, "ExposureInmAs")


_CORRECTIONS = {
    "DecayCorrected": "DECY", "AttenuationCorrected": "ATTN", "ScatterCorrected": "SCAT",
    "DeadTimeCorrected": "DTIM", "GantryMotionCorrected": "MOTN", "PatientMotionCorrected": "PMOT",
    "CountLossNormalizationCorrected": "CLN", "RandomsCorrected": "RAN",
    "NonUniformRadialSamplingCorrected": "RADL", "SensitivityCalibrated": "DCAL",
    "DetectorNormalizationCorrection": "NORM",
}  # fmt: skip
_UNITS = {"Bq/ml": "BQML", "{counts}": "CNTS", "{counts}/s": "CPS", "{propcounts}": "PROPCNTS",
          "{propcounts}/s": "PROPCPS", "g/ml{SUVbw}": "GML", "g/ml": "GML", "1": "NONE", "cm2/ml": "CM2ML",
          "umol/min/ml": "UMOLML", "ml/min/g": "MLMING", "ml/min/ml": "MLMINML", "ml/g": "MLG"}  # fmt: skip


def _pet(classic: Dataset, ds: Dataset, groups: Groups, index: int) -> None:
    """What only a scanner knows, such as the units of values without a real-world mapping, is left out."""
    classic.ImageType = _frame_type(ds, groups["PETFrameTypeSequence"])[:2]
    points = int(classic.get("NumberOfTemporalPositions") or 1)
    frames = int(ds.get("NumberOfFrames") or 1)
    classic.SeriesType = ["DYNAMIC" if points > 1 else "STATIC", "IMAGE"]
    classic.NumberOfSlices = max(frames // points, 1)
    if points > 1:
        classic.NumberOfTimeSlices = points
    classic.CountsSource, classic.ImageIndex = "EMISSION", index + 1
    classic.CorrectedImage = [word for flag, word in _CORRECTIONS.items() if _word(ds, flag) == "YES"] or None
    classic.DecayCorrection = "START" if _active(ds, "DecayCorrected") else "NONE"
    for mapping in groups.items("RealWorldValueMappingSequence"):
        unit = mapping.get("MeasurementUnitsCodeSequence") or [Dataset()]
        known = _UNITS.get(_word(unit[0], "CodeValue"))
        if known:
            classic.Units = known
    taken(classic, groups["PETFrameCorrectionFactorsSequence"],
          ("PrimaryPromptsCountsAccumulated", "SliceSensitivityFactor", "DeadTimeFactor", "ScatterFractionFactor",
           "DecayFactor"))  # fmt: skip
    _integer(classic, "ActualFrameDuration", groups["FrameContentSequence"], "FrameAcquisitionDuration")
    _decimal(classic, "FrameReferenceTime", groups["PETFrameAcquisitionSequence"], "FrameReferenceTime")
    taken(classic, groups["PETReconstructionSequence"], ("ReconstructionDiameter",))
    _empty(classic, "CollimatorType", "RadiopharmaceuticalInformationSequence", "AcquisitionDate", "AcquisitionTime",
           "PatientGantryRelationshipCodeSequence")  # fmt: skip
    if "PatientPosition" not in classic:  # it says the same, and both may not be there
        _empty(classic, "PatientOrientationCodeSequence")


def _x_ray(classic: Dataset, ds: Dataset, groups: Groups) -> None:
    properties = groups["FramePixelDataPropertiesSequence"]
    kinds = _frame_type(ds, properties)
    plane = {"SINGLE_PLANE": "SINGLE PLANE", "BIPLANE_A": "BIPLANE A", "BIPLANE_B": "BIPLANE B"}
    classic.ImageType = [*kinds[:2], plane.get(kinds[2] if len(kinds) > 2 else "", "SINGLE PLANE")]
    taken(classic, properties, ("ImagerPixelSpacing", "PixelIntensityRelationship", "PixelIntensityRelationshipSign"))
    shot = groups["FrameAcquisitionSequence"]
    taken(classic, shot, ("KVP",))
    _integer(classic, "ExposureTime", shot, "FrameAcquisitionDuration")
    _integer(classic, "XRayTubeCurrent", shot, "XRayTubeCurrentInmA")
    angles = groups["PositionerPositionSequence"]
    taken(classic, angles, ("PositionerPrimaryAngle", "PositionerSecondaryAngle"))
    geometry = groups["XRayGeometrySequence"]
    taken(classic, geometry, ("DistanceSourceToDetector", "DistanceSourceToPatient",
                              "EstimatedRadiographicMagnificationFactor"))  # fmt: skip
    _empty(classic, "KVP", "PatientOrientation", "PositionerPrimaryAngle", "PositionerSecondaryAngle")
    if "Exposure" not in classic:
        _empty(classic, "ExposureTime", "XRayTubeCurrent")
