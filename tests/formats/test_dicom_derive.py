"""The header of a derived series: what it keeps, what it says, and what other people's tools hold against it."""

import shutil
import time
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from medsr_cli.errors import MedsrError
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.dicom import open_reader
from medsr_cli.formats.dicom_derive import Lineage, derive_header
from medsr_cli.formats.dicom_files import read_header
from medsr_cli.formats.dicom_grid import Grid
from medsr_cli.formats.dicom_identity import StableIdentities
from medsr_cli.formats.dicom_overlays import CUT
from tests.formats.conformance import new_complaints, new_entity_complaints
from tests.formats.dicom_makers import (
    DERIVATION,
    OPTIONS,
    SHARED,
    TILTED,
    derive,
    enhanced,
    enlarge,
    header,
    place,
    save,
    series,
)

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared fixtures are not here")
STABLE = replace(DERIVATION, dicom=DicomOutput(stable_uids=True))


def one(tmp_path, change=None, *, derivation=DERIVATION, scale=2, pixels=None, **kw):
    """Source and result of a single made-up file, as data sets."""
    ds = place(header(**kw), (1.5, 2.5, 3.5))
    if change is not None:
        change(ds)
    save(ds, tmp_path / "a.dcm", np.zeros((ds.Rows, ds.Columns), np.uint16) if pixels is None else pixels)
    derive(open_reader(tmp_path / "a.dcm", OPTIONS), tmp_path / "b.dcm", scale, derivation)
    return pydicom.dcmread(tmp_path / "a.dcm"), pydicom.dcmread(tmp_path / "b.dcm")


def lineage_of(reader, derivation=DERIVATION, scale=2, **kw):
    volume = reader.volume
    result = volume.enlarged(volume.rows * scale, volume.columns * scale)
    grid = Grid(volume.rows, volume.columns, result.rows, result.columns, reader.part)
    return Lineage(derivation, grid, result, reader.stack.frames, **kw)


def derived(path, derivation=DERIVATION, number=None, frame=None, extremes=None, change=None, **kw):
    """The derived header of the first file, made without a writer, and what is said."""
    reader = open_reader(path, OPTIONS)
    lineage = lineage_of(reader, derivation, **kw)
    instance = reader.instances[0]
    ds = read_header(instance.member)
    if change is not None:
        change(ds)
    derive_header(ds, instance, lineage, number, frame=frame, extremes=extremes)
    return ds, lineage.warnings


# -- identity -------------------------------------------------------------------------------------------------


def test_a_stable_run_is_the_same_to_the_byte(tmp_path):
    series(tmp_path / "in", 3, change=lambda ds, at: setattr(ds, "InstanceCreationDate", "20200101"))
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "a", derivation=STABLE)
    time.sleep(1.1)  # another second, for any time that were written
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "b", derivation=STABLE)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    new = pydicom.dcmread(files[0][0])
    assert "InstanceCreationDate" not in new
    assert "ContributionDateTime" not in new.ContributingEquipmentSequence[0]


@pytest.mark.parametrize("syntax", ["rle", "explicit"])
def test_packed_otherwise_it_is_the_same_object(tmp_path, syntax):
    series(tmp_path / "in", 2, rows=32, columns=32)
    derivation = replace(DERIVATION, dicom=DicomOutput(stable_uids=True, transfer_syntax=syntax))
    plain, _ = derived(tmp_path / "in", STABLE)
    packed, _ = derived(tmp_path / "in", derivation)
    assert plain.SOPInstanceUID == packed.SOPInstanceUID
    assert plain == packed


def test_two_results_of_one_series_have_other_numbers_and_uids(tmp_path):
    series(tmp_path / "in", 2)
    made = [derived(tmp_path / "in", STABLE, ordinal=ordinal)[0] for ordinal in (0, 1, 2)]
    assert [ds.SeriesNumber for ds in made] == [1007, 2007, 3007]
    assert [ds.SeriesDescription for ds in made] == [b"t1 axial x2 rdst-e" + end for end in (b"", b" 2", b" 3")]
    assert len({ds.SeriesInstanceUID for ds in made}) == len({ds.SOPInstanceUID for ds in made}) == 3


def test_large_series_numbers_stay_integers_and_different(tmp_path):
    series(tmp_path / "in", 1, change=lambda ds, _: setattr(ds, "SeriesNumber", 2**31 - 1500))
    made = [int(derived(tmp_path / "in", ordinal=ordinal)[0].SeriesNumber) for ordinal in (0, 1, 2)]
    assert len(set(made)) == 3
    assert max(made) < 2**31


def test_stable_uids_need_the_frames(tmp_path):
    series(tmp_path / "in", 1)
    reader = open_reader(tmp_path / "in", OPTIONS)
    lineage = replace(lineage_of(reader, STABLE), frames=())
    with pytest.raises(ValueError, match="frames"):
        _ = lineage.identities
    assert isinstance(lineage_of(reader, STABLE).identities, StableIdentities)


def test_a_source_without_identity_gets_a_study_and_no_frame_of_reference(tmp_path):
    def change(ds):
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SeriesNumber"):
            delattr(ds, keyword)

    _, new = one(tmp_path, change)
    assert pydicom.uid.UID(new.StudyInstanceUID).is_valid
    assert new.StudyInstanceUID.startswith("2.25.")
    assert "FrameOfReferenceUID" not in new
    assert new.SeriesNumber == 1000
    _, said = derived(tmp_path / "a.dcm")
    assert any("study" in sentence for sentence in said)


def test_all_files_without_a_study_share_the_new_one(tmp_path):
    series(tmp_path / "in", 3, change=lambda ds, _: setattr(ds, "StudyInstanceUID", ""))
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out")
    assert len({pydicom.dcmread(path).StudyInstanceUID for path in (tmp_path / "out").iterdir()}) == 1


def test_what_cannot_be_named_is_not_referred_to(tmp_path):
    def change(ds):
        ds.SOPInstanceUID = "1.2.abc"
        older = Dataset()
        older.ReferencedSOPClassUID, older.ReferencedSOPInstanceUID = ds.SOPClassUID, "1.2.3"
        ds.SourceImageSequence = [older]

    _, new = one(tmp_path, change)
    assert "SourceImageSequence" not in new  # the older one is not what this was made from
    assert pydicom.uid.UID(new.SOPInstanceUID).is_valid


# -- what it says ---------------------------------------------------------------------------------------------


def test_codes_are_those_of_the_standard():
    assert (codes.cid7203.SpatialResampling.value, codes.cid7203.SpatialResampling.meaning) == (
        "113085", "Spatial resampling",
    )  # fmt: skip
    source = codes.cid7202.SourceImageForImageProcessingOperation
    assert (source.value, source.meaning) == ("121322", "Source image for image processing operation")
    assert (codes.cid7005.ModifyingEquipment.value, codes.cid7005.ModifyingEquipment.meaning) == (
        "109103", "Modifying Equipment",
    )  # fmt: skip


def test_model_version_checksum_scale_and_warning_are_in_the_tags(tmp_path):
    def change(ds):
        ds.ImageComments, ds.DerivationDescription = "technologist's words", "earlier"

    _, new = one(tmp_path, change)
    said = new.DerivationDescription
    for part in ("AI-derived, not for primary diagnosis", "x2 rdst-e", "medsr 0.1.0", "rdst-e-x2-brain", "ab" * 32,
                 "cubic down-sampling by 2"):  # fmt: skip
        assert part in said
    assert said.endswith(" earlier")
    assert new.ImageComments.startswith("AI-derived, not for primary diagnosis: enlarged in the plane x2 rdst-e")
    assert new.ImageComments.endswith("\r\ntechnologist's words")
    item = new.ContributingEquipmentSequence[0]
    assert (item.Manufacturer, item.ManufacturerModelName, item.SoftwareVersions) == (
        "medsr", "medsr rdst-e", "medsr 0.1.0",
    )  # fmt: skip
    assert "AI-derived, not for primary diagnosis" in item.ContributionDescription
    assert not {"InstitutionName", "StationName", "OperatorsName", "DeviceSerialNumber"} & set(item.dir())


def test_interpolation_is_not_called_ai(tmp_path):
    plain = replace(DERIVATION, method="lanczos", checkpoint_id=None, checkpoint_sha256=None, degradation=None)
    _, new = one(tmp_path, derivation=plain)
    text = " ".join((new.DerivationDescription, new.ImageComments, new.SeriesDescription,
                     new.ContributingEquipmentSequence[0].ContributionDescription))  # fmt: skip
    assert "AI" not in text
    assert "Super-resolution" not in text
    assert text.count("not for primary diagnosis") == 3


def test_a_frame_of_an_enhanced_object_names_itself(tmp_path):
    enhanced(tmp_path / "e.dcm", 4)
    reader = open_reader(tmp_path / "e.dcm", OPTIONS)

    def classic(ds):
        ds.SOPClassUID = pydicom.uid.MRImageStorage
        del ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames
        place(ds, reader.instances[0].planes[2].position_mm)

    ds, _ = derived(tmp_path / "e.dcm", frame=2, number=3, change=classic)
    (source,) = ds.SourceImageSequence
    assert source.ReferencedSOPClassUID == pydicom.uid.EnhancedMRImageStorage
    assert source.ReferencedSOPInstanceUID == reader.instances[0].sop_instance
    assert source.ReferencedFrameNumber == 3
    assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == pydicom.uid.MRImageStorage
    assert list(ds.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert ds.InstanceNumber == 3
    old = np.array(reader.instances[0].planes[2].position_mm)
    along, down = np.split(np.array(TILTED), 2)
    assert np.allclose([float(v) for v in ds.ImagePositionPatient], old - along * 0.5 / 4 - down * 0.7 / 4, atol=1e-6)


# -- what it keeps --------------------------------------------------------------------------------------------

KEPT = {
    "WindowCenter": ["40", "300"], "WindowWidth": ["400", "1500"], "WindowCenterWidthExplanation": ["soft", "bone"],
    "VOILUTFunction": "LINEAR", "RescaleIntercept": "-1024", "RescaleSlope": "1.5", "RescaleType": "HU",
    "PixelPaddingValue": 63536, "PixelPaddingRangeLimit": 63540, "LossyImageCompression": "01",
    "LossyImageCompressionRatio": "12.5", "LossyImageCompressionMethod": "ISO_10918_1", "BurnedInAnnotation": "YES",
    "RecognizableVisualFeatures": "NO", "PatientIdentityRemoved": "YES", "DeidentificationMethod": "by hand",
    "LongitudinalTemporalInformationModified": "MODIFIED", "GantryDetectorTilt": "-12", "PatientPosition": "FFDR",
    "AcquisitionMatrix": [0, 256, 192, 0], "PercentSampling": "80", "PercentPhaseFieldOfView": "75",
    "PixelBandwidth": "180", "ReconstructionDiameter": "240", "SpatialResolution": "0.4", "FieldOfViewOrigin": [3, 4],
    "DetectorElementSpacing": [0.1, 0.1], "SliceThickness": "3.0", "SpacingBetweenSlices": "3.3",
    "AcquisitionNumber": 4, "AcquisitionDate": "20200102", "ContentDate": "20200103", "SeriesDate": "20200104",
    "Laterality": "L", "BodyPartExamined": "KNEE", "PatientOrientation": ["P", "F"], "KVP": "120",
    "PresentationLUTShape": "IDENTITY", "TableHeight": "12.5", "ConvolutionKernel": "B30f",
}  # fmt: skip
KEPT_SEQUENCES = (
    "ReferencedImageSequence", "VOILUTSequence", "ModalityLUTSequence", "RequestAttributesSequence",
    "DeidentificationMethodCodeSequence", "RelatedSeriesSequence", "RealWorldValueMappingSequence",
    "AnatomicRegionSequence", "ReferencedPerformedProcedureStepSequence", "OriginalAttributesSequence",
)  # fmt: skip


@pytest.mark.parametrize("keyword", KEPT)
def test_what_is_still_true_stays(tmp_path, keyword):
    old, new = one(tmp_path, lambda ds: setattr(ds, keyword, KEPT[keyword]))
    assert new[keyword].value == old[keyword].value
    assert new[keyword].VR == old[keyword].VR


def test_sequences_that_are_still_true_stay(tmp_path):
    def change(ds):
        for keyword in KEPT_SEQUENCES:
            item = Dataset()
            item.ReferencedSOPInstanceUID, item.CodeMeaning = "1.2.3", "words"
            setattr(ds, keyword, [item])

    old, new = one(tmp_path, change)
    for keyword in KEPT_SEQUENCES:
        assert new[keyword] == old[keyword]


def test_scales_and_windows_of_each_slice_stay_its_own(tmp_path):
    def change(ds, at):
        ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = str(1 + at), str(-at), str(at), "5"

    series(tmp_path / "in", 3, change=change)
    derive(open_reader(tmp_path / "in", OPTIONS), tmp_path / "out")
    olds = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, (tmp_path / "in").iterdir())}
    for path in (tmp_path / "out").iterdir():
        new = pydicom.dcmread(path)
        old = olds[new.SourceImageSequence[0].ReferencedSOPInstanceUID]
        for keyword in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
            assert new[keyword] == old[keyword]


@pytest.mark.parametrize(("signed", "vr", "extremes"), [(0, "US", (3, 40_000)), (1, "SS", (-1000, 2000))])
def test_extremes_have_the_type_of_the_pixels(tmp_path, signed, vr, extremes):
    series(tmp_path / "in", 1, change=lambda ds, _: setattr(ds, "PixelRepresentation", signed))
    ds, _ = derived(tmp_path / "in", extremes=extremes)
    assert {ds[f"{which}ImagePixelValue"].VR for which in ("Smallest", "Largest")} == {vr}
    assert (ds.SmallestImagePixelValue, ds.LargestImagePixelValue) == extremes
    ds, _ = derived(tmp_path / "in")
    assert "SmallestImagePixelValue" not in ds


def test_a_lossy_source_that_denies_it_is_corrected(tmp_path):
    name = "cxr_jpeg_baseline"
    if not (SHARED / name).is_dir():
        pytest.skip("the shared fixtures are not here")
    path = next((SHARED / name).iterdir())
    ds, _ = derived(path, change=lambda ds: setattr(ds, "LossyImageCompression", "00"))
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    assert float(ds.LossyImageCompressionRatio) > 1


def test_jpeg_2000_colours_say_what_they_are(tmp_path):
    ds = header(rows=40, columns=40, sop_class=pydicom.uid.SecondaryCaptureImageStorage, modality="OT")
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    save(ds, tmp_path / "a.dcm", np.zeros((40, 40, 3), np.uint8))
    asked = replace(DERIVATION, dicom=DicomOutput(transfer_syntax="jpeg2000-lossless"))
    new, _ = derived(tmp_path / "a.dcm", asked, extremes=(0, 255))
    assert new.PhotometricInterpretation == "YBR_RCT"
    assert new.file_meta.TransferSyntaxUID == pydicom.uid.JPEG2000Lossless
    assert "SmallestImagePixelValue" not in new
    assert "LossyImageCompression" not in new


# -- overlays -------------------------------------------------------------------------------------------------


def overlay(ds, bits, *, group=0x6000, origin=(1, 1), frames=None):
    rows, columns = bits.shape[-2:]
    packed = np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little").tobytes()
    for element, vr, value in (
        (0x10, "US", rows), (0x11, "US", columns), (0x40, "CS", "G"), (0x50, "SS", list(origin)), (0x100, "US", 1),
        (0x102, "US", 0), (0x1500, "LO", "label"), (0x1301, "IS", "9"),
        (0x3000, "OW", packed + b"\0" * (len(packed) % 2)),
    ):  # fmt: skip
        ds.add_new((group << 16) | element, vr, value)
    if frames is not None:
        ds.add_new((group << 16) | 0x15, "IS", str(frames))


def drawn(ds, rows, columns, group=0x6000):
    """The overlay on the image's grid, through pydicom's own reading."""
    bits = ds.overlay_array(group)
    top, left = (int(v) - 1 for v in ds[group, 0x50].value)
    whole = np.zeros((rows, columns), np.uint8)
    whole[top : top + bits.shape[-2], left : left + bits.shape[-1]] = bits
    return whole


@pytest.mark.parametrize(("origin", "shape"), [((1, 1), (6, 5)), ((3, 2), (3, 3)), ((-1, 0), (5, 7)), ((2, 2), (9, 9))])
@pytest.mark.parametrize("scale", [2, 3])
def test_overlays_are_enlarged_in_their_place(tmp_path, origin, shape, scale):
    bits = np.random.default_rng(3).integers(0, 2, shape)
    _, new = one(tmp_path, lambda ds: overlay(ds, bits, origin=origin), scale=scale)
    before = np.zeros((40, 40), np.uint8)  # the image begins at (10, 10)
    before[origin[0] + 9 : origin[0] + 9 + shape[0], origin[1] + 9 : origin[1] + 9 + shape[1]] = bits
    assert np.array_equal(drawn(new, 6 * scale, 5 * scale), enlarge(before[10:16, 10:15], scale))
    assert new[0x6000, 0x1500].value == "label"
    assert 0x60001301 not in new
    _, said = derived(tmp_path / "a.dcm")
    inside = before[10:16, 10:15].sum() == before.sum()
    assert said == ([] if inside else [CUT])


def test_overlays_between_whole_scales_are_where_pixel_centres_are(tmp_path):
    bits = np.random.default_rng(4).integers(0, 2, (6, 5))
    ds = place(header(), (0, 0, 0))
    overlay(ds, bits)
    save(ds, tmp_path / "a.dcm", np.zeros((6, 5), np.uint16))
    reader = open_reader(tmp_path / "a.dcm", OPTIONS)
    result = reader.volume.enlarged(15, 11)
    new = read_header(reader.instances[0].member)
    derive_header(new, reader.instances[0], Lineage(DERIVATION, Grid(6, 5, 15, 11, None), result), None)
    made = drawn(new, 15, 11)
    for row in range(15):
        for column in range(11):
            old = int((row + 0.5) * 6 / 15 + 1e-9), int((column + 0.5) * 5 / 11 + 1e-9)
            assert made[row, column] == bits[old]


def test_overlays_of_frames_and_of_the_old_kind(tmp_path):
    bits = np.random.default_rng(3).integers(0, 2, (3, 6, 5))

    def change(ds):
        overlay(ds, bits, frames=3)
        overlay(ds, bits[0], group=0x6002)
        overlay(ds, bits[0], group=0x6004)
        del ds[0x60043000]  # in the upper bits
        overlay(ds, bits[0], group=0x6006)
        ds[0x60063000].value = b"\0\0"  # shorter than it says
        ds[0x60020015] = pydicom.DataElement(0x60020015, "IS", "1")
        ds[0x60020051] = pydicom.DataElement(0x60020051, "US", 2)

    enhanced(tmp_path / "e.dcm", 3)
    for frame in range(3):
        new, said = derived(tmp_path / "e.dcm", frame=frame, change=change)
        assert np.array_equal(drawn(new, 12, 10), enlarge(bits[frame]))
        assert (0x60023000 in new) == (frame == 1)
        assert 0x60040010 not in new
        assert 0x60060010 not in new
        assert len(said) == 2


def test_curves_in_pixels_go_and_others_stay(tmp_path):
    def change(ds):
        ds.add_new(0x50000020, "CS", "ROI")
        ds.add_new(0x50003000, "OW", b"\0\0")
        ds.add_new(0x50020020, "CS", "ECG")
        ds.add_new(0x50020030, "SH", ["SECS", "MVLT"])

    _, new = one(tmp_path, change)
    assert 0x50000020 not in new
    assert 0x50020020 in new
    assert any("Curves" in sentence for sentence in derived(tmp_path / "a.dcm")[1])


# -- other people's tools -------------------------------------------------------------------------------------

FOLDERS = sorted(path.name for path in SHARED.iterdir() if path.is_dir()) if SHARED.is_dir() else []


def inputs(folder):
    """A series of several files is one input; files beside one another that are no series are one each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [folder] if len(files) > 3 else files


@needs_shared
@pytest.mark.skipif(
    shutil.which("dciodvfy") is None or shutil.which("dcentvfy") is None, reason="dicom3tools are not installed"
)
@pytest.mark.parametrize("name", FOLDERS)
def test_dicom3tools_hold_nothing_against_the_result_that_they_hold_not_against_the_source(tmp_path, name):
    for at, path in enumerate(inputs(SHARED / name)):
        try:
            reader = open_reader(path, OPTIONS)
            derive(reader, tmp_path / f"{at}")
        except MedsrError:
            continue
        used = tmp_path / f"used{at}"
        used.mkdir()
        for number, instance in enumerate(reader.instances[:4]):
            with instance.member.open() as file:
                (used / f"{number}.dcm").write_bytes(file.read())
        for extra in sorted((tmp_path / f"{at}").iterdir())[4:]:
            extra.unlink()
        expected = set() if same_class(used, tmp_path / f"{at}") else OF_THE_CLASSIC_CLASS
        found = [*new_complaints(used, tmp_path / f"{at}"), *new_entity_complaints(used, tmp_path / f"{at}")]
        assert not [line for line in found if not any(part in line for part in expected)]


OF_THE_CLASSIC_CLASS = {
    # Values of Philips mean something only with their rescale, which classic MR has no module for.
    "RescaleIntercept(", "RescaleSlope(", "RescaleType(",
    # Terms that the enhanced class allows elsewhere, and a computed image's echo time.
    "ImageType(0008,0008)> - Unrecognized defined term", "ScanOptions(0018,0022)> - Unrecognized defined term",
    "EchoTime(0018,0081)> - Value is zero", "ComplexImageComponent(",
    # Empty elements of type 2, which the source should have had and classic images get.
    "Attribute present in one instance but not the other",
}  # fmt: skip
"""What a classic object that stands for a frame of an enhanced one is told, and cannot help."""


def same_class(source, result):
    classes = [
        {pydicom.dcmread(path, stop_before_pixels=True).get("SOPClassUID") for path in folder.iterdir()}
        for folder in (source, result)
    ]
    return classes[0] == classes[1] or not all(classes[0])


def test_frames_of_one_object_get_stable_uids_of_their_own(tmp_path):
    enhanced(tmp_path / "e.dcm", 4)
    for name in ("a", "b"):
        derive(open_reader(tmp_path / "e.dcm", OPTIONS), tmp_path / name, derivation=STABLE)
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("a", "b"))
    assert one == two
    made = [pydicom.dcmread(path) for path in (tmp_path / "a").iterdir()]
    assert len({ds.SOPInstanceUID for ds in made}) == 4
    assert len({ds.SeriesInstanceUID for ds in made}) == 1
    assert {ds.SourceImageSequence[0].ReferencedFrameNumber for ds in made} == {1, 2, 3, 4}
