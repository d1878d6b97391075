"""Tags that count pixels: the same place in the patient, on the detector or in time, before and after."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.sequence import Sequence

from medsr_cli.formats.dicom_grid import Grid, rewrite_grid
from medsr_cli.formats.dicom_headers import Plane

PLANE = Plane(None, None, None, 1.0, 0.0, 0)


def rewritten(ds, grid, photometric="RGB"):
    """The header on its new grid, through bytes and back: every value has to fit its type."""
    rewrite_grid(ds, SimpleNamespace(planes=(PLANE,), photometric=photometric), grid)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    from pydicom.filereader import read_dataset
    from pydicom.filewriter import write_dataset

    write_dataset(buffer, ds)
    buffer.seek(0)
    return read_dataset(buffer, is_implicit_VR=False, is_little_endian=True)


def item(**values):
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


DOUBLE = Grid(100, 120, 200, 240)


# -- calibrated regions of ultrasound (C.8.5.5) ---------------------------------------------------------------


def physical(region, axis, pixel):
    """The physical value at a pixel of the image, counted from 0, as C.8.5.5.1.16 and .17 define it."""
    reference = region[f"RegionLocationMin{axis}0"].value + region[f"ReferencePixel{axis}0"].value
    value = region.get(f"ReferencePixelPhysicalValue{axis}", 0.0)
    return value + (pixel - reference) * region[f"PhysicalDelta{axis}"].value


sizes = st.integers(16, 900)
grids = st.builds(
    lambda rows, columns, down, across: Grid(rows, columns, round(rows * down), round(columns * across)),
    sizes,
    sizes,
    st.floats(1, 4),
    st.floats(1, 4),
)


@st.composite
def regions(draw, calibrated):
    """Tissue, colour flow, M-mode, spectra and traces, with references far outside of them."""
    far = st.integers(-700, 900)
    region = item(
        RegionSpatialFormat=draw(st.integers(1, 4)),
        RegionDataType=draw(st.integers(1, 10)),
        RegionFlags=draw(st.integers(0, 7)),
        PhysicalUnitsXDirection=draw(st.sampled_from([3, 4])),
        PhysicalUnitsYDirection=draw(st.sampled_from([3, 5, 7])),
    )
    for axis, low, high in (("X", "MinX0", "MaxX1"), ("Y", "MinY0", "MaxY1")):
        start = draw(st.integers(0, 600))
        setattr(region, f"RegionLocation{low}", start)
        setattr(region, f"RegionLocation{high}", start + draw(st.integers(0, 300)))
        setattr(region, f"ReferencePixel{axis}0", draw(far))
        setattr(region, f"PhysicalDelta{axis}", draw(st.floats(1e-4, 9)) * draw(st.sampled_from([1, -1])))
        if calibrated:
            setattr(region, f"ReferencePixelPhysicalValue{axis}", draw(st.floats(-50, 50)))
        for keyword in (f"DopplerSampleVolume{axis}Position", f"TMLinePosition{axis}0", f"TMLinePosition{axis}1"):
            setattr(region, keyword, draw(far))
    return region


@settings(deadline=None, max_examples=100)
@given(regions(calibrated=True), grids, st.floats(-900, 1800))
def test_every_place_keeps_its_physical_position(region, grid, pixel):
    before = copy.deepcopy(region)
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), grid).SequenceOfUltrasoundRegions[0]
    for axis, scale in (("X", grid.new_columns / grid.columns), ("Y", grid.new_rows / grid.rows)):
        new_pixel = (pixel + 0.5) * scale - 0.5
        delta = abs(before[f"PhysicalDelta{axis}"].value)
        assert physical(after, axis, new_pixel) == pytest.approx(physical(before, axis, pixel), abs=delta * 1e-7)
    assert after.RegionFlags == before.RegionFlags
    assert after.PhysicalUnitsYDirection == before.PhysicalUnitsYDirection


@settings(deadline=None, max_examples=100)
@given(regions(calibrated=False), grids, st.floats(-900, 1800))
def test_a_reference_without_a_value_is_within_half_a_new_pixel(region, grid, pixel):
    before = copy.deepcopy(region)
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), grid).SequenceOfUltrasoundRegions[0]
    for axis, scale in (("X", grid.new_columns / grid.columns), ("Y", grid.new_rows / grid.rows)):
        new_pixel = (pixel + 0.5) * scale - 0.5
        half = abs(after[f"PhysicalDelta{axis}"].value) / 2
        off = physical(after, axis, new_pixel) - physical(before, axis, pixel)
        assert abs(off) <= half * (1 + 1e-6)


@settings(deadline=None, max_examples=100)
@given(regions(calibrated=True), grids)
def test_lines_and_sample_volumes_are_counted_from_the_reference_pixel(region, grid):
    """C.8.5.5.1.10: "the displacement, in pixels, from the Reference pixel". Bounds cover the same ground."""
    before = copy.deepcopy(region)
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), grid).SequenceOfUltrasoundRegions[0]
    for axis, low, high, scale in (
        ("X", "MinX0", "MaxX1", grid.new_columns / grid.columns),
        ("Y", "MinY0", "MaxY1", grid.new_rows / grid.rows),
    ):
        for keyword in (f"DopplerSampleVolume{axis}Position", f"TMLinePosition{axis}0", f"TMLinePosition{axis}1"):
            places = [
                r.get(f"ReferencePixelPhysicalValue{axis}") + r[keyword].value * r[f"PhysicalDelta{axis}"].value
                for r in (before, after)
            ]
            half = abs(after[f"PhysicalDelta{axis}"].value) / 2
            assert abs(places[1] - places[0]) <= half * (1 + 1e-6)
        assert after[f"RegionLocation{low}"].value == pytest.approx(
            before[f"RegionLocation{low}"].value * scale, abs=0.5
        )
        edge = (before[f"RegionLocation{high}"].value + 1) * scale
        assert after[f"RegionLocation{high}"].value + 1 == pytest.approx(edge, abs=0.5)


@settings(deadline=None, max_examples=100)
@given(regions(calibrated=True), st.integers(0, 400), st.integers(0, 400), st.floats(1, 3))
def test_a_part_of_the_image_keeps_physical_positions(region, row, column, scale):
    rows, columns = 300, 280
    grid = Grid(rows, columns, round(rows * scale), round(columns * scale), (row, column))
    before = copy.deepcopy(region)
    ds = rewritten(item(SequenceOfUltrasoundRegions=[region]), grid)
    assume("SequenceOfUltrasoundRegions" in ds)
    after = ds.SequenceOfUltrasoundRegions[0]
    for axis, first, factor in (("X", column, grid.new_columns / columns), ("Y", row, grid.new_rows / rows)):
        new_pixel = (70 - first + 0.5) * factor - 0.5
        delta = abs(before[f"PhysicalDelta{axis}"].value)
        assert physical(after, axis, new_pixel) == pytest.approx(physical(before, axis, 70), abs=delta * 1e-7)


def test_a_region_without_a_reference_pixel_or_beyond_the_image():
    """Both are in the shared files: bounds of a 640 x 480 screen over an image of 320 x 240."""
    region = item(RegionLocationMinX0=84, RegionLocationMaxX1=595, RegionLocationMinY0=31, RegionLocationMaxY1=414)
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.05
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), DOUBLE).SequenceOfUltrasoundRegions[0]
    assert (after.RegionLocationMinX0, after.RegionLocationMaxX1) == (168, 1191)
    assert after.PhysicalDeltaX == 0.025
    assert "ReferencePixelX0" not in after
    assert "ReferencePixelPhysicalValueX" not in after


def test_retired_positions_and_overlay_groups_of_regions():
    region = item(ReferencePixelX0=3, PhysicalDeltaX=0.1, ReferencePixelPhysicalValueX=0.0, RegionLocationMinX0=2)
    region.TMLinePositionX0Retired, region.DopplerSampleVolumeXPositionRetired = 7, 0
    region.ActiveImageAreaOverlayGroup = 0x6000
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), DOUBLE).SequenceOfUltrasoundRegions[0]
    assert after.TMLinePositionX0Retired in (13, 14)
    assert after.DopplerSampleVolumeXPositionRetired == 0
    assert "ActiveImageAreaOverlayGroup" not in after


@pytest.mark.parametrize(
    ("photometric", "organization", "kept"),
    [
        ("RGB", 0, True),
        ("YBR_RCT", 1, True),
        ("MONOCHROME2", 1, True),
        ("MONOCHROME2", 2, False),
        ("MONOCHROME2", 3, False),
        ("PALETTE COLOR", 1, False),
        ("YBR_FULL_422", 0, False),
    ],
)
def test_what_pixel_values_mean_in_a_region_stays_only_while_it_is_true(photometric, organization, kept):
    region = item(PixelComponentOrganization=organization, PixelComponentMask=255, PixelComponentPhysicalUnits=5)
    region.PixelComponentDataType, region.TableOfXBreakPoints, region.TableOfYBreakPoints = 1, [0, 255], [0.0, 9.0]
    region.NumberOfTableBreakPoints = 2
    after = rewritten(item(SequenceOfUltrasoundRegions=[region]), DOUBLE, photometric).SequenceOfUltrasoundRegions[0]
    left = [element.keyword for element in after if element.keyword.startswith(("PixelComp", "TableOf", "NumberOf"))]
    assert len(left) == (7 if kept else 0)


# -- marks in pixels ------------------------------------------------------------------------------------------


def test_shutters_and_collimators_of_single_frames():
    """Functional groups of XA (C.7.6.16.2.16, C.8.19.6.6): the same edges as at the top of an object."""
    edges = {"ShutterLeftVerticalEdge": 11, "ShutterLowerHorizontalEdge": 40, "CenterOfCircularShutter": [20, 30]}
    frame = item(FrameDisplayShutterSequence=[item(**edges)])
    frame.CollimatorShapeSequence = [item(CollimatorRightVerticalEdge=50, RadiusOfCircularCollimator=9)]
    ds = item(PerFrameFunctionalGroupsSequence=[frame], SharedFunctionalGroupsSequence=[Dataset()], **edges)
    new = rewritten(ds, DOUBLE)
    group = new.PerFrameFunctionalGroupsSequence[0]
    for shutter in (new, group.FrameDisplayShutterSequence[0]):
        assert (shutter.ShutterLeftVerticalEdge, shutter.ShutterLowerHorizontalEdge) == (22, 80)
        assert shutter.CenterOfCircularShutter == [40, 60]
    assert group.CollimatorShapeSequence[0].CollimatorRightVerticalEdge == 100
    assert group.CollimatorShapeSequence[0].RadiusOfCircularCollimator == 18


def test_sensing_regions_of_the_exposure_control():
    """C.8.19.6.10; 16-bit integers, which a large result may exceed."""
    region = item(
        ExposureControlSensingRegionLeftVerticalEdge=1,
        ExposureControlSensingRegionRightVerticalEdge=120,
        ExposureControlSensingRegionUpperHorizontalEdge=1,
        ExposureControlSensingRegionLowerHorizontalEdge=100,
        CenterOfCircularExposureControlSensingRegion=[50, 60],
        RadiusOfCircularExposureControlSensingRegion=10,
        VerticesOfThePolygonalExposureControlSensingRegion=[1, 1, 100, 120, 1, 120],
    )
    new = rewritten(item(ExposureControlSensingRegionsSequence=[region]), DOUBLE)
    sensed = new.ExposureControlSensingRegionsSequence[0]
    assert sensed.ExposureControlSensingRegionRightVerticalEdge == 240
    assert sensed.ExposureControlSensingRegionLowerHorizontalEdge == 200
    assert list(sensed.VerticesOfThePolygonalExposureControlSensingRegion) == [2, 2, 200, 240, 2, 240]
    assert sensed.RadiusOfCircularExposureControlSensingRegion == 20
    large = item(ExposureControlSensingRegionRightVerticalEdge=30_000)
    held = rewritten(item(ExposureControlSensingRegionsSequence=[large]), DOUBLE)
    assert held.ExposureControlSensingRegionsSequence[0].ExposureControlSensingRegionRightVerticalEdge == 32767


def test_masks_are_shifted_by_as_much_as_before():
    """MaskSubPixelShift is in a sequence in classic objects, too (C.7.6.10), and may have regions of its own."""
    shifted = item(MaskSubPixelShift=[1.5, -0.25])
    region = item(VerticesOfTheRegion=[1, 1, 100, 120], MaskSubPixelShift=[0.5, 0.5])
    ds = item(MaskSubtractionSequence=[shifted], FramePixelShiftSequence=[item(RegionPixelShiftSequence=[region])])
    new = rewritten(ds, Grid(100, 120, 200, 480))
    assert list(new.MaskSubtractionSequence[0].MaskSubPixelShift) == [3.0, -1.0]
    part = new.FramePixelShiftSequence[0].RegionPixelShiftSequence[0]
    assert list(part.MaskSubPixelShift) == [1.0, 2.0]
    assert list(part.VerticesOfTheRegion) == [2, 3, 200, 479]


def test_spacings_that_are_not_of_an_image_plane():
    """In the centre of the beam (C.8.19.6.3), of presentation (C.10.4) and of RT images (C.8.8.2)."""
    properties = item(ObjectPixelSpacingInCenterOfBeam=[0.5, 0.25], ImagerPixelSpacing=["0.4", "0.2"])
    group = item(FramePixelDataPropertiesSequence=[properties])
    ds = item(SharedFunctionalGroupsSequence=[group], PerFrameFunctionalGroupsSequence=[Dataset()])
    ds.DisplayedAreaSelectionSequence = [item(PresentationPixelSpacing=["0.6", "0.3"])]
    new = rewritten(ds, Grid(100, 120, 200, 480))
    after = new.SharedFunctionalGroupsSequence[0].FramePixelDataPropertiesSequence[0]
    assert list(after.ObjectPixelSpacingInCenterOfBeam) == [0.25, 0.0625]
    assert after.ImagerPixelSpacing == [0.2, 0.05]
    assert new.DisplayedAreaSelectionSequence[0].PresentationPixelSpacing == [0.3, 0.075]


@pytest.mark.parametrize("turned", [None, [1, 0, 0, 0, -1, 0], [0, -1, 0, -1, 0, 0]])
def test_rt_images_keep_their_place_on_the_receptor(turned):
    """RTImagePosition is the centre of the first pixel: its corner stays."""
    ds = item(ImagePlanePixelSpacing=["0.8", "0.4"], RTImagePosition=["-40", "39.6"])
    if turned:
        ds.RTImageOrientation = [str(v) for v in turned]
    new = rewritten(ds, Grid(100, 120, 200, 480))
    assert new.ImagePlanePixelSpacing == [0.4, 0.1]
    along, down = np.split(np.array(turned or [1, 0, 0, 0, -1, 0], float), 2)

    def corner(position, spacing):
        return np.array(position, float) - along[:2] * spacing[1] / 2 - down[:2] * spacing[0] / 2

    expected = corner([-40, 39.6], (0.8, 0.4))
    np.testing.assert_allclose(corner(new.RTImagePosition, (0.4, 0.1)), expected, atol=1e-9)


def test_annotations_in_pixels_move_and_others_stay():
    """C.10.5: in PIXEL the corner of the first pixel is 0.0, 0.0; columns come before rows."""
    text = item(
        BoundingBoxAnnotationUnits="PIXEL",
        BoundingBoxTopLeftHandCorner=[0.0, 0.0],
        BoundingBoxBottomRightHandCorner=[120.0, 100.0],
        AnchorPointAnnotationUnits="DISPLAY",
        AnchorPoint=[0.25, 0.5],
    )
    drawn = item(GraphicAnnotationUnits="PIXEL", GraphicData=[3.0, 5.0, 60.5, 50.0])
    shown = item(GraphicAnnotationUnits="DISPLAY", GraphicData=[0.3, 0.5])
    compound = item(CompoundGraphicUnits="PIXEL", GraphicData=[6.0, 7.0], RotationPoint=[1.0, 2.0])
    layer = item(TextObjectSequence=[text], GraphicObjectSequence=[drawn, shown], CompoundGraphicSequence=[compound])
    grid = Grid(100, 120, 200, 480)
    new = rewritten(item(GraphicAnnotationSequence=[layer]), grid).GraphicAnnotationSequence[0]
    assert list(new.TextObjectSequence[0].BoundingBoxBottomRightHandCorner) == [480.0, 200.0]
    assert list(new.TextObjectSequence[0].AnchorPoint) == [0.25, 0.5]
    assert list(new.GraphicObjectSequence[0].GraphicData) == [12.0, 10.0, 242.0, 100.0]
    assert list(new.GraphicObjectSequence[1].GraphicData) == pytest.approx([0.3, 0.5])
    assert list(new.CompoundGraphicSequence[0].GraphicData) == [24.0, 14.0]
    assert list(new.CompoundGraphicSequence[0].RotationPoint) == [4.0, 4.0]


def test_displayed_areas_and_subjects_cover_the_same_ground():
    area = item(DisplayedAreaTopLeftHandCorner=[1, 11], DisplayedAreaBottomRightHandCorner=[120, 60])
    ds = item(DisplayedAreaSelectionSequence=[area], SubjectArea=[60, 50, 20, 10])
    ds.StereoPairsSequence = [item(StereoHorizontalPixelOffset=2.5, StereoVerticalPixelOffset=-1.0)]
    new = rewritten(ds, DOUBLE)
    after = new.DisplayedAreaSelectionSequence[0]
    assert list(after.DisplayedAreaTopLeftHandCorner) == [1, 21]
    assert list(after.DisplayedAreaBottomRightHandCorner) == [240, 120]
    assert new.SubjectArea == [120, 100, 40, 20]
    assert new.StereoPairsSequence[0].StereoHorizontalPixelOffset == 5.0
    assert new.StereoPairsSequence[0].StereoVerticalPixelOffset == -2.0


def test_curves_in_pixels_go_and_those_in_time_stay():
    ds = Dataset()
    for group, kind, units in ((0x5000, "ECG", ["SECS", "MILV"]), (0x5002, "ROI", ["PIXL", "PIXL"])):
        ds.add_new((group, 0x0005), "US", 2)
        ds.add_new((group, 0x0020), "CS", kind)
        ds.add_new((group, 0x0030), "SH", units)
        ds.add_new((group, 0x3000), "OW", b"\0" * 8)
    ds.add_new((0x5004, 0x0020), "CS", "POLY")
    new = rewritten(ds, DOUBLE)
    assert {tag.group for tag in new.keys()} == {0x0028, 0x5000}  # noqa: SIM118


def test_how_it_was_acquired_stays():
    kept = {
        "AcquisitionMatrix": [0, 120, 100, 0],
        "DetectorElementSpacing": ["0.1", "0.1"],
        "DetectorActiveOrigin": ["4", "5"],
        "FieldOfViewOrigin": ["6", "7"],
        "DetectorBinning": ["2", "2"],
        "EstimatedRadiographicMagnificationFactor": "1.3",
        "ReconstructionPixelSpacing": [0.7, 0.7],
        "ZoomFactor": ["1.5", "1.5"],
        "FrameTime": "33.3",
        "PixelSpacingCalibrationType": "FIDUCIAL",
    }
    before = item(ShutterLeftVerticalEdge=3)
    ds = item(**kept, OriginalAttributesSequence=[item(ModifiedAttributesSequence=[before])])
    new = rewritten(ds, DOUBLE)
    for keyword, value in kept.items():
        assert new[keyword].value == item(**{keyword: value})[keyword].value
    assert new.OriginalAttributesSequence[0].ModifiedAttributesSequence[0].ShutterLeftVerticalEdge == 3


def test_a_scanners_own_elements_are_not_touched():
    ds = Dataset()
    ds.add_new((0x0019, 0x0010), "LO", "SOMEBODY")
    ds.add_new((0x0019, 0x1001), "SQ", Sequence([item(ShutterLeftVerticalEdge=3)]))
    assert rewritten(ds, DOUBLE)[0x0019, 0x1001].value[0].ShutterLeftVerticalEdge == 3


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 60), grids)
def test_the_shape_of_the_image_stays_whatever_the_pixels(height, width, grid):
    """PixelAspectRatio is height to width of a pixel (C.7.6.3.1.7); the picture's own ratio does not change."""
    new = rewritten(item(PixelAspectRatio=[height, width]), grid)
    ratio = new.PixelAspectRatio[0] / new.PixelAspectRatio[1]
    before = height / width * grid.rows / grid.columns
    assert math.isclose(ratio * grid.new_rows / grid.new_columns, before, rel_tol=1e-3)
