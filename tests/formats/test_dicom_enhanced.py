"""Enhanced multi-frame objects as classic series and as one object again, whole and in parts, plain and packed."""

import shutil
import subprocess
import tracemalloc
from dataclasses import replace
from io import BytesIO

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames, parse_basic_offsets
from pydicom.uid import UID

from medsr_cli.errors import ArgumentsError, RunError
from medsr_cli.formats import dicom_container
from medsr_cli.formats.contract import DicomOutput, ReadOptions
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_container import Header, PackedFile
from medsr_cli.formats.dicom_outputs import files_written
from tests.formats.dicom_makers import (
    DERIVATION,
    OPTIONS,
    SHARED,
    TILTED,
    derive,
    enhanced,
    enhanced_mr,
    enlarge,
    header,
    place,
    save,
    series,
)
from tests.formats.test_dicom_write import conformance_errors

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")

CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)

REAL = [
    "enhanced_mr_siemens_xa10/6_1.dcm", "enhanced_mr_philips/fieldmap.dcm", "hyperfine_multiframe_noise_pixels/001.dcm",
    "philips_slope_multiframe_noise_pixels/IM-0001-9600-0001.dcm",
]  # fmt: skip
UNPLACED = "enhanced_multiframe/emri_small.dcm"


def told(**choices):
    return replace(DERIVATION, dicom=DicomOutput(**choices))


def at_heights(heights, orientation=TILTED):
    normal = np.cross(orientation[:3], orientation[3:])
    return [(tuple(np.array([3.0, -4.0, 5.0]) + normal * height), orientation) for height in heights]


def read_all(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def part_of(source, chosen):
    """The reader of some frames of a stack, given by their places in it."""
    frames = tuple(source.stack.frames[at] for at in chosen)
    source.stack = replace(source.stack, frames=frames, points=1)
    source.volume = replace(
        source.volume, slices=len(frames), array_shape=(*source.volume.array_shape[:2], len(frames))
    )
    return source


# -- classic --------------------------------------------------------------------------------------------------


def groups_of(at):
    return {
        "PixelValueTransformationSequence": {
            "RescaleIntercept": str(-10 * at), "RescaleSlope": str(0.5 + at), "RescaleType": "US",
        },
        "FrameVOILUTSequence": {"WindowCenter": str(100 + at), "WindowWidth": "50"},
        "MREchoSequence": {"EffectiveEchoTime": 2.5 * (at + 1)},
        "MRDiffusionSequence": {"DiffusionBValue": 500.0 * at, "DiffusionDirectionality": "ISOTROPIC"},
        "CardiacSynchronizationSequence": {"NominalCardiacTriggerDelayTime": 30.0 * at, "RRIntervalTimeNominal": 800.4},
        "FrameContentSequence": {
            "FrameAcquisitionDateTime": f"202401021530{at:02d}.25-0500", "FrameAcquisitionNumber": at + 1,
            "TemporalPositionIndex": at + 1,
        },
        "MRImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"],
                                     "ComplexImageComponent": "MAGNITUDE"},
    }  # fmt: skip


TIMING = {
    "MRTimingAndRelatedParametersSequence": {"RepetitionTime": "4000", "FlipAngle": "90", "EchoTrainLength": "7"},
    "MRFOVGeometrySequence": {"InPlanePhaseEncodingDirection": "COLUMN", "MRAcquisitionFrequencyEncodingSteps": 64,
                              "MRAcquisitionPhaseEncodingStepsInPlane": 48, "PercentSampling": "75"},
    "MRImagingModifierSequence": {"TransmitterFrequency": 123.2, "MagnetizationTransfer": "NONE"},
    "MRModifierSequence": {"InversionRecovery": "YES", "InversionTimes": 120.0, "Spoiling": "RF"},
    "MRAveragesSequence": {"NumberOfAverages": "2"},
}  # fmt: skip
SEQUENCE = {"EchoPulseSequence": "SPIN", "EchoPlanarPulseSequence": "YES", "ResonantNucleus": "1H",
            "SegmentedKSpaceTraversal": "SINGLE", "CardiacSynchronizationTechnique": "PROSPECTIVE",
            "SmallestImagePixelValue": 1, "LargestImagePixelValue": 2}  # fmt: skip


def test_every_frame_becomes_a_classic_image_with_what_its_groups_say(tmp_path):
    order = [2, 0, 1]
    heights = at_heights([2.0 * at for at in order])
    pixels = enhanced_mr(tmp_path / "e.dcm", heights, per_frame=groups_of, shared=TIMING, **SEQUENCE)
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    derive(source, tmp_path / "out")
    news = read_all(tmp_path / "out")
    along, down = np.split(np.array(TILTED), 2)
    for number, new in enumerate(news, 1):
        at = order.index(number - 1)  # frame of the source
        assert new.SOPClassUID == new.file_meta.MediaStorageSOPClassUID == UID("1.2.840.10008.5.1.4.1.1.4")
        assert new.InstanceNumber == number
        assert np.array_equal(new.pixel_array, enlarge(pixels[at]))
        before = np.array(at_heights([2.0 * order[at]])[0][0])
        assert np.allclose(np.array(new.ImagePositionPatient, float), before - along * 0.125 - down * 0.175, atol=1e-6)
        assert (new.PixelSpacing, new.SliceThickness) == ([0.35, 0.25], 2)
        assert (new.RescaleSlope, new.RescaleIntercept, new.WindowCenter) == (0.5 + at, -10 * at, 100 + at)
        assert (new.EchoTime, new.DiffusionBValue, new.TriggerTime) == (2.5 * (at + 1), 500 * at, 30 * at)
        assert (new.AcquisitionDate, new.AcquisitionTime) == ("20240102", f"1530{at:02d}.25")
        assert (new.TemporalPositionIdentifier, new.NumberOfTemporalPositions) == (at + 1, 3)
        assert (new.SmallestImagePixelValue, new.LargestImagePixelValue) == (pixels[at].min(), pixels[at].max())
        assert new.SourceImageSequence[0].ReferencedFrameNumber == at + 1
        assert (new.RepetitionTime, new.FlipAngle, new.InversionTime, new.NumberOfAverages) == (4000, 90, 120, 2)
        assert (new.ScanningSequence, new.SequenceVariant, new.ScanOptions) == (["SE", "IR", "EP"], "SP", "CG")
        assert (new.AcquisitionMatrix, new.InPlanePhaseEncodingDirection) == ([64, 0, 0, 48], "COL")
        for gone in ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
                     "DimensionIndexSequence", "EchoPulseSequence", "ResonantNucleus"):  # fmt: skip
            assert gone not in new
        assert new.ImagedNucleus == "1H"
    assert len({new.SOPInstanceUID for new in news}) == 3
    back = open_reader(tmp_path / "out", OPTIONS)
    for old, new in zip(source.slices(), back.slices(), strict=True):
        assert np.allclose(enlarge(old), new, rtol=1e-6)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2"])
def test_other_byte_orders_and_character_sets_say_the_same(tmp_path, syntax):
    """Elements that nobody looks at move from header to header without being decoded."""
    coil = {"MRReceiveCoilSequence": {"ReceiveCoilName": "Schädel"}, **TIMING}
    text = {"SpecificCharacterSet": "ISO_IR 192", "StudyDescription": "Kopfschädel", "PatientName": "Müller^Änne"}
    pixels = enhanced_mr(
        tmp_path / "e.dcm", at_heights([0.0, 2.0]), per_frame=groups_of, shared=coil, **SEQUENCE, **text
    )
    ds = pydicom.dcmread(tmp_path / "e.dcm")
    assert np.array_equal(ds.pixel_array, pixels)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = pixels.astype(">u2" if syntax.endswith(".2.2") else "<u2").tobytes()
    pydicom.dcmwrite(
        tmp_path / "f.dcm", ds, implicit_vr=syntax == "1.2.840.10008.1.2", little_endian=not syntax.endswith(".2.2")
    )
    for name in ("e", "f"):
        derive(open_reader(tmp_path / f"{name}.dcm", OPTIONS), tmp_path / name, 1)
    for one, other in zip(read_all(tmp_path / "e"), read_all(tmp_path / "f"), strict=True):
        assert np.array_equal(one.pixel_array, other.pixel_array)
        assert (other.ReceiveCoilName, other.StudyDescription, str(other.PatientName)) == (
            "Schädel", "Kopfschädel", "Müller^Änne",
        )  # fmt: skip
        changing = ("UID", "InstanceCreation", "ContributingEquipment", "SourceImage")
        for element in one:
            if not any(part in element.keyword for part in changing):
                assert other[element.tag] == element


def test_an_enhanced_ct_becomes_ct_images(tmp_path):
    heights = at_heights([0.0, 5.0], (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    shared = {
        "PixelValueTransformationSequence": {"RescaleIntercept": "-1024", "RescaleSlope": "1", "RescaleType": "HU"},
        "CTExposureSequence": {"ExposureTimeInms": 500.2, "XRayTubeCurrentInmA": 210.0, "ExposureInmAs": 105.04,
                               "CTDIvol": 7.5},
        "CTXRayDetailsSequence": {"KVP": "120", "FilterType": "WEDGE"},
        "CTReconstructionSequence": {"ConvolutionKernel": "B30", "ReconstructionDiameter": "300"},
        "CTAcquisitionDetailsSequence": {"GantryDetectorTilt": "0", "RevolutionTime": 0.5, "RotationDirection": "CW"},
        "CTTableDynamicsSequence": {"SpiralPitchFactor": 0.9},
        "CTImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]},
    }  # fmt: skip
    agent = Dataset()
    agent.CodeValue, agent.CodeMeaning, agent.ContrastBolusAgentNumber = "C-B0322", "Iohexol", 1
    enhanced_mr(tmp_path / "e.dcm", heights, shared=shared, sop_class="1.2.840.10008.5.1.4.1.1.2.1",
                ContrastBolusAgentSequence=[agent])  # fmt: skip
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    derive(source, tmp_path / "out", 1)
    for new in read_all(tmp_path / "out"):
        assert new.SOPClassUID == UID("1.2.840.10008.5.1.4.1.1.2")
        assert list(new.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "VOLUME"]
        assert (new.RescaleIntercept, new.RescaleSlope, new.RescaleType) == (-1024, 1, "HU")
        assert (new.KVP, new.ExposureTime, new.XRayTubeCurrent, new.Exposure, new.CTDIvol) == (120, 500, 210, 105, 7.5)
        assert (new.ConvolutionKernel, new.RevolutionTime, new.SpiralPitchFactor) == ("B30", 0.5, 0.9)
        assert new.ContrastBolusAgent == "Iohexol"


def test_an_enhanced_pet_becomes_pet_images(tmp_path):
    unit = Dataset()
    unit.CodeValue = "Bq/ml"
    shared = {
        "PixelValueTransformationSequence": {"RescaleIntercept": "0", "RescaleSlope": "2.5", "RescaleType": "BQML"},
        "RealWorldValueMappingSequence": {"MeasurementUnitsCodeSequence": [unit]},
        "PETFrameCorrectionFactorsSequence": {"DecayFactor": "1.25", "ScatterFractionFactor": "0.3"},
    }
    enhanced_mr(tmp_path / "e.dcm", at_heights([0.0, 3.0]), shared=shared, sop_class="1.2.840.10008.5.1.4.1.1.130",
                per_frame=lambda at: {"FrameContentSequence": {"FrameAcquisitionDuration": 60_000.0}},
                DecayCorrected="YES", ScatterCorrected="YES", AttenuationCorrected="NO", Modality="PT")  # fmt: skip
    derive(open_reader(tmp_path / "e.dcm", OPTIONS), tmp_path / "out", 1)
    for new in read_all(tmp_path / "out"):
        assert new.SOPClassUID == UID("1.2.840.10008.5.1.4.1.1.128")
        assert (new.Units, new.SeriesType, new.NumberOfSlices) == ("BQML", ["STATIC", "IMAGE"], 2)
        assert (new.CorrectedImage, new.DecayCorrection, new.DecayFactor) == (["DECY", "SCAT"], "START", 1.25)
        assert (new.ActualFrameDuration, new.RescaleSlope) == (60_000, 2.5)
        assert "RadiopharmaceuticalInformationSequence" in new


def angiogram(path, count):
    ds = header(sop_class="1.2.840.10008.5.1.4.1.1.12.1.1", modality="XA")
    ds.NumberOfFrames, ds.ImageType, ds.FrameTime = count, ["ORIGINAL", "PRIMARY", "SINGLE_PLANE"], "40"
    groups = []
    for at in range(count):
        group, angle, shot, pixels = Dataset(), Dataset(), Dataset(), Dataset()
        angle.PositionerPrimaryAngle = str(10 * at)
        shot.KVP, shot.XRayTubeCurrentInmA = "70", 12.0
        pixels.ImagerPixelSpacing, pixels.PixelIntensityRelationship = ["0.4", "0.4"], "LOG"
        group.PositionerPositionSequence, group.FrameAcquisitionSequence = [angle], [shot]
        group.FramePixelDataPropertiesSequence = [pixels]
        groups.append(group)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [Dataset()], groups
    save(ds, path, np.zeros((count, 6, 5), np.uint16))
    return ds


def test_a_single_enhanced_angiogram_becomes_a_shot(tmp_path):
    angiogram(tmp_path / "e.dcm", 1)
    derive(open_reader(tmp_path / "e.dcm", OPTIONS), tmp_path / "out")
    (new,) = read_all(tmp_path / "out")
    assert new.SOPClassUID == UID("1.2.840.10008.5.1.4.1.1.12.1")
    assert (new.PositionerPrimaryAngle, new.KVP, new.XRayTubeCurrent) == (0, 70, 12)
    assert (new.ImagerPixelSpacing, new.PixelIntensityRelationship) == ([0.2, 0.2], "LOG")
    assert new.ImageType[2] == "SINGLE PLANE"


def test_loops_of_angiograms_stay_loops(tmp_path):
    ds = angiogram(tmp_path / "e.dcm", 3)
    derive(open_reader(tmp_path / "e.dcm", OPTIONS), tmp_path / "loop.dcm")
    new = pydicom.dcmread(tmp_path / "loop.dcm")
    assert (new.SOPClassUID, new.NumberOfFrames, new.FrameTime) == (ds.SOPClassUID, 3, 40)
    for group in new.PerFrameFunctionalGroupsSequence:
        assert group.FramePixelDataPropertiesSequence[0].ImagerPixelSpacing == [0.2, 0.2]
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.12.1"
    del ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence
    save(ds, tmp_path / "c.dcm")
    derive(open_reader(tmp_path / "c.dcm", OPTIONS), tmp_path / "cine.dcm")
    new = pydicom.dcmread(tmp_path / "cine.dcm")
    assert (new.NumberOfFrames, new.FrameTime) == (3, 40)


def test_frames_of_many_objects_may_take_turns(tmp_path):
    """More objects than headers are kept: each is read again when its next frame comes."""
    stored = {}
    for number in range(1, 5):
        heights = [float(2 * number + at) for at in (0, 20)]
        stored.update(
            zip(
                heights,
                enhanced_mr(tmp_path / "in" / f"{number}.dcm", at_heights(heights), InstanceNumber=number),
                strict=True,
            )
        )
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out", 1)
    news = read_all(tmp_path / "out")
    assert [new.InstanceNumber for new in news] == list(range(1, 9))
    assert np.array_equal([new.pixel_array for new in news], [stored[height] for height in sorted(stored)])


def test_only_what_says_where_it_lies_becomes_classic(tmp_path):
    ds = header(sop_class="1.2.840.10008.5.1.4.1.1.4.1")
    ds.NumberOfFrames = 3
    pixels = np.arange(90, dtype=np.uint16).reshape(3, 6, 5)
    save(ds, tmp_path / "e.dcm", pixels)
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    assert files_written(source, False) == 1
    derive(source, tmp_path / "out.dcm", 1)
    new = pydicom.dcmread(tmp_path / "out.dcm")
    assert (new.SOPClassUID, new.NumberOfFrames) == (ds.SOPClassUID, 3)
    assert np.array_equal(new.pixel_array, pixels)


def test_private_elements_of_the_groups_move_up_unless_their_block_is_taken(tmp_path):
    enhanced_mr(tmp_path / "e.dcm", at_heights([0.0, 2.0]))
    ds = pydicom.dcmread(tmp_path / "e.dcm")
    ds.add_new(0x20010010, "LO", "ANOTHER")
    for at, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        private = Dataset()
        private.add_new(0x20050010, "LO", "Philips MR Imaging DD 001")
        private.add_new(0x2005100E, "FL", 0.25 + at)
        private.add_new(0x20010010, "LO", "Philips Imaging DD 001")
        private.add_new(0x20011003, "FL", 7.0)
        private.EchoTime = "99"
        group.add_new(0x20050014, "LO", "Philips MR Imaging DD 005")
        group.add_new(0x2005140F, "SQ", [private])
    pydicom.dcmwrite(tmp_path / "e.dcm", ds)
    derive(open_reader(tmp_path / "e.dcm", OPTIONS), tmp_path / "out")
    for at, new in enumerate(read_all(tmp_path / "out")):
        assert new[0x2005100E].value == 0.25 + at
        assert 0x20011003 not in new
        assert not new.EchoTime


def test_one_file_and_one_object_are_refused_where_there_is_none(tmp_path):
    enhanced(tmp_path / "e.dcm", 3)
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    assert (files_written(source, False), files_written(source, True)) == (3, 1)
    with pytest.raises(ArgumentsError, match=r"3 frames, which become a file each.*--multiframe"):
        derive(source, tmp_path / "out.dcm")
    series(tmp_path / "in", 2)
    with pytest.raises(ArgumentsError, match="holds classic images"):
        derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out", derivation=told(multiframe=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.dcm", "in"]


# -- parts ----------------------------------------------------------------------------------------------------


def test_stacks_of_one_object_become_series_of_their_own(tmp_path):
    planes = [plane for pair in zip(at_heights([0, 3, 6], CORONAL), at_heights([0, 4, 8], SAGITTAL)) for plane in pair]  # noqa: B905
    pixels = enhanced_mr(tmp_path / "e.dcm", planes)
    for stack, frames in ((1, [0, 2, 4]), (2, [1, 3, 5])):
        for multiframe in (False, True):
            source = open_reader(tmp_path / "e.dcm", ReadOptions(series=f"1#{stack}"))
            assert sorted(frame.index for frame in source.stack.frames) == frames
            target = tmp_path / f"out{stack}{multiframe}"
            derive(source, target, 1, told(multiframe=multiframe))
            back = open_reader(target, OPTIONS)
            for old, new in zip(source.stack.frames, back.stack.frames, strict=True):
                assert np.allclose(old.plane.position_mm, new.plane.position_mm, atol=1e-6)
                assert np.allclose(old.plane.orientation, new.plane.orientation, atol=1e-6)
            stored = [pixels[frame.index] for frame in source.stack.frames]
            assert np.array_equal(np.concatenate(list(back.slices())), stored)


@given(data=st.data(), syntax=st.sampled_from(["explicit", "rle"]), multiframe=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_frames_in_any_order(tmp_path_factory, data, syntax, multiframe):
    folder = tmp_path_factory.mktemp("part")
    heights = data.draw(st.permutations([0.0, 1.0, 2.0, 4.0, 7.0]))
    pixels = enhanced_mr(folder / "e.dcm", at_heights(heights), per_frame=groups_of)
    source = open_reader(folder / "e.dcm", OPTIONS)
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    source = part_of(source, chosen)
    frames = [frame.index for frame in source.stack.frames]
    derive(source, folder / "out", 2, told(multiframe=multiframe, transfer_syntax=syntax))
    news = read_all(folder / "out")
    old = pydicom.dcmread(folder / "e.dcm")
    if multiframe:
        (new,) = news
        assert new.NumberOfFrames == len(frames) == len(new.PerFrameFunctionalGroupsSequence)
        assert np.array_equal(new.pixel_array.reshape(len(frames), 12, 10), enlarge(pixels[sorted(frames)]))
        groups = new.PerFrameFunctionalGroupsSequence
        for at, group in zip(sorted(frames), groups, strict=True):
            assert group.MREchoSequence == old.PerFrameFunctionalGroupsSequence[at].MREchoSequence
        if len(frames) < 5:
            contents = [group.FrameContentSequence[0] for group in groups]
            counted = [content.InStackPositionNumber for content in contents]
            assert sorted(counted) == list(range(1, len(frames) + 1))
            assert [content.DimensionIndexValues for content in contents] == [[1, number] for number in counted]
        return
    assert [new.InstanceNumber for new in news] == list(range(1, len(frames) + 1))
    for at, new in zip(frames, news, strict=True):
        assert np.array_equal(new.pixel_array, enlarge(pixels[at]))
        assert new.EchoTime == 2.5 * (at + 1)
        assert new.SourceImageSequence[0].ReferencedFrameNumber == at + 1


def test_a_part_of_a_cine_keeps_its_times(tmp_path):
    ds = header(sop_class="1.2.840.10008.5.1.4.1.1.3.1", modality="US")
    ds.NumberOfFrames, ds.FrameTimeVector = 5, ["0", "10", "20", "30", "40"]
    ds.FrameIncrementPointer, ds.RepresentativeFrameNumber = 0x00181065, 4
    ds.PositionerPrimaryAngleIncrement = ["0", "1", "2", "3", "4"]
    ds.FrameNumbersOfInterest, ds.FrameOfInterestDescription = [2, 4], ["early", "late"]
    save(ds, tmp_path / "a.dcm", np.arange(150, dtype=np.uint16).reshape(5, 6, 5))
    derive(part_of(open_reader(tmp_path / "a.dcm", OPTIONS), [0, 3, 4]), tmp_path / "b.dcm", 1)
    new = pydicom.dcmread(tmp_path / "b.dcm")
    assert (new.NumberOfFrames, new.FrameTimeVector) == (3, [0, 60, 40])
    assert new.PositionerPrimaryAngleIncrement == [0, 3, 4]
    assert (new.RepresentativeFrameNumber, new.FrameNumbersOfInterest) == (2, 2)
    assert new.FrameOfInterestDescription == "late"
    assert np.array_equal(new.pixel_array, np.arange(150).reshape(5, 6, 5)[[0, 3, 4]])


@pytest.mark.parametrize(
    ("chosen", "expected"), [([0, 2, 4], ("FrameTime", 66)), ([1, 2, 4], ("FrameTimeVector", [0, 33, 66]))]
)
def test_one_time_for_all_frames_becomes_a_vector_only_where_it_must(tmp_path, chosen, expected):
    ds = header(sop_class="1.2.840.10008.5.1.4.1.1.3.1", modality="US")
    ds.NumberOfFrames, ds.FrameTime, ds.FrameIncrementPointer = 5, "33", 0x00181063
    save(ds, tmp_path / "a.dcm", np.zeros((5, 6, 5), np.uint16))
    derive(part_of(open_reader(tmp_path / "a.dcm", OPTIONS), chosen), tmp_path / "b.dcm", 1)
    new = pydicom.dcmread(tmp_path / "b.dcm")
    keyword, value = expected
    assert new[keyword].value == value
    assert new.FrameIncrementPointer == new[keyword].tag


# -- packed ---------------------------------------------------------------------------------------------------

SYNTAXES = {"rle": "1.2.840.10008.1.2.5", "jpeg2000-lossless": "1.2.840.10008.1.2.4.90"}


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("multiframe", [False, True])
def test_packed_pixels_are_the_same_pixels(tmp_path, syntax, multiframe):
    pixels = enhanced(tmp_path / "e.dcm", 4, order=[2, 0, 3, 1])
    source = open_reader(tmp_path / "e.dcm", OPTIONS)
    derive(source, tmp_path / "out", 8, told(transfer_syntax=syntax, multiframe=multiframe))
    news = read_all(tmp_path / "out")
    assert {new.file_meta.TransferSyntaxUID for new in news} == {SYNTAXES[syntax]}
    if multiframe:
        offsets = parse_basic_offsets(BytesIO(news[0].PixelData))
        assert len(offsets) == 4
        frames = list(generate_frames(news[0].PixelData, number_of_frames=4))
        assert [len(frame) + 8 for frame in frames[:-1]] == list(np.diff(offsets))
        assert np.array_equal(news[0].pixel_array, enlarge(pixels, 8))
    else:
        by_place = [pixels[frame.index] for frame in source.stack.frames]
        assert np.array_equal([new.pixel_array for new in news], enlarge(np.array(by_place), 8))


def test_frames_that_come_early_wait_on_the_disk_and_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_container, "WAITING_BYTES", 1000)
    sizes = [20_001 + 2 * at for at in range(200)]
    with (tmp_path / "a").open("w+b") as file:
        packed = PackedFile(file, Header(b"head" * 4), 200, 100, tmp_path)
        tracemalloc.start()
        for at in [*range(1, 200), 0]:
            assert packed.put(at, bytes([at % 251]) * sizes[at]) == (at == 0)
        assert tracemalloc.get_traced_memory()[1] < 500_000
        tracemalloc.stop()
        file.seek(16)
        assert dicom_container.pixels_end(file, 200) == file.seek(0, 2)
        file.seek(16 + 12)
        frames = list(generate_frames(file.read(), number_of_frames=200))
    assert [(frame[0], len(frame)) for frame in frames] == [(at % 251, size + 1) for at, size in enumerate(sizes)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


MORE_ITEM = b"\xfe\xff\x00\xe0\x02\0\0\0ab"


@pytest.mark.parametrize("damage", [lambda d: d[:-8], lambda d: d + b"\0\0", lambda d: d[:-8] + MORE_ITEM + d[-8:]])
def test_damaged_items_do_not_pass_for_whole(damage):
    file = BytesIO()
    packed = PackedFile(file, Header(b""), 2, 100, None)
    packed.put(0, b"abc")
    packed.put(1, b"defg")
    whole = file.getvalue()
    assert dicom_container.pixels_end(BytesIO(whole), 2) == len(whole)
    data = damage(whole)
    assert dicom_container.pixels_end(BytesIO(data), 2) != len(data)


def test_extremes_of_all_frames_are_filled_in(tmp_path):
    ds = header()
    ds.NumberOfFrames, ds.PixelRepresentation = 3, 1
    ds.SmallestImagePixelValue, ds.LargestImagePixelValue = 0, 0
    icon = Dataset()
    icon.PixelRepresentation, icon.SmallestImagePixelValue, icon.LargestImagePixelValue = 1, 5, 6
    ds.ReferencedImageSequence = [icon]  # the same tags further up, in another data set
    pixels = np.arange(-45, 45, dtype=np.int16).reshape(3, 6, 5)
    save(ds, tmp_path / "a.dcm", pixels)
    for name in ("explicit", "rle"):
        derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / f"{name}.dcm", 1, told(transfer_syntax=name))
        new = pydicom.dcmread(tmp_path / f"{name}.dcm")
        assert (new.SmallestImagePixelValue, new.LargestImagePixelValue) == (-45, 44)
        assert np.array_equal(new.pixel_array, pixels)


def test_an_image_too_small_for_jpeg_2000_and_a_failing_encoder_are_told(tmp_path, monkeypatch):
    series(tmp_path / "in", 2)
    source = open_reader(tmp_path / "in", OPTIONS)
    with pytest.raises(ArgumentsError, match="narrower than 32 pixels"):
        derive(source, tmp_path / "out", derivation=told(transfer_syntax="jpeg2000-lossless"))

    def fail(*_, **__):
        msg = "of a patient"
        raise RuntimeError(msg)

    monkeypatch.setattr("medsr_cli.formats.dicom_write.encoded", fail)
    with pytest.raises(RunError, match=r"could not be packed.*RuntimeError") as caught:
        derive(source, tmp_path / "out", derivation=told(transfer_syntax="rle"))
    assert "patient" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_syntax_that_cannot_hold_the_pixels_is_refused_before_any_work(tmp_path):
    ds = place(header(), (0, 0, 0))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 31
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint32))
    source = open_reader(tmp_path / "a.dcm", OPTIONS)
    with pytest.raises(ArgumentsError, match="rle"):
        derive(source, tmp_path / "b.dcm", derivation=told(transfer_syntax="rle"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcm"]


# -- real objects, other people's tools -----------------------------------------------------------------------


PACKED = [
    (REAL[0], {"transfer_syntax": "rle"}),
    (REAL[0], {"transfer_syntax": "jpeg2000-lossless", "multiframe": True}),
]


@needs_shared
@pytest.mark.parametrize(
    ("name", "choices"), [*((name, {"multiframe": one}) for name in REAL for one in (False, True)), *PACKED]
)
def test_values_of_real_objects_come_back(tmp_path, name, choices):
    source = open_reader(SHARED / name, OPTIONS)
    derive(source, tmp_path / "out", 1, told(**choices))
    back = open_reader(tmp_path / "out", OPTIONS)
    assert len(list((tmp_path / "out").iterdir())) == (1 if choices.get("multiframe") else source.volume.slices)
    for old, new in zip(source.stack.frames, back.stack.frames, strict=True):
        assert np.allclose(old.plane.position_mm, new.plane.position_mm, atol=1e-6)
        assert old.plane.temporal in (new.plane.temporal, 1)
        assert (old.plane.slope, old.plane.intercept) == (new.plane.slope, new.plane.intercept)
    for old, new in zip(source.slices(), back.slices(), strict=True):
        assert np.array_equal(old, new)


@needs_shared
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
@pytest.mark.parametrize("name", [*REAL, UNPLACED])
@pytest.mark.parametrize("multiframe", [False, True])
def test_dciodvfy_finds_no_error_that_the_object_lacks(tmp_path, name, multiframe):
    derive(open_reader(SHARED / name, OPTIONS), tmp_path / "out", derivation=told(multiframe=multiframe))
    paths = sorted((tmp_path / "out").iterdir())
    new = set().union(*(conformance_errors(path) for path in (paths[0], paths[-1])))
    assert not new - conformance_errors(SHARED / name)


@needs_shared
@pytest.mark.parametrize("name", [REAL[0], REAL[2]])
def test_simpleitk_sees_the_classic_series_where_the_volume_says(tmp_path, name):
    derive(open_reader(SHARED / name, OPTIONS), tmp_path / "out")
    volume = open_reader(tmp_path / "out", OPTIONS).volume
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "out")))
    image = reader.Execute()
    assert image.GetSize() == (volume.columns, volume.rows, volume.slices)
    for index in ((0, 0, 0), (volume.columns - 1, 3, 0), (2, volume.rows - 1, volume.slices - 1)):
        ours = volume.affine @ [*index, 1]
        assert np.allclose(image.TransformIndexToPhysicalPoint(index), ours[:3] * [-1, -1, 1], atol=1e-3)


def converted(folder, out):
    out.mkdir()
    subprocess.run(["dcm2niix", "-b", "n", "-z", "n", "-f", "x", "-o", out, folder], capture_output=True, check=True)
    return [nib.load(path) for path in sorted(out.glob("*.nii"))]


@needs_shared
@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
@pytest.mark.parametrize("name", REAL)
def test_dcm2niix_sees_the_same_images_in_the_classic_series(tmp_path, name):
    derive(open_reader(SHARED / name, OPTIONS), tmp_path / "result")
    (tmp_path / "source").mkdir()
    shutil.copy(SHARED / name, tmp_path / "source")
    olds, news = (converted(tmp_path / which, tmp_path / f"nii_{which}") for which in ("source", "result"))
    assert len(olds) == len(news)
    for old, new in zip(olds, news, strict=True):
        assert new.shape == (old.shape[0] * 2, old.shape[1] * 2, *old.shape[2:])
        assert np.allclose(old.affine[:3, :3], new.affine[:3, :3] * [2, 2, 1], atol=1e-3)
        middles = [image.affine @ [(image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2, 0, 1] for image in (old, new)]
        assert np.allclose(*middles, atol=1e-3)
        assert np.allclose(old.get_fdata().repeat(2, 0).repeat(2, 1), new.get_fdata(), rtol=1e-6)
