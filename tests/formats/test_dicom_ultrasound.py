"""Ultrasound cines through the whole command: times, regions and colours, made up and real."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UltrasoundMultiFrameImageStorage

from medsr_cli.formats.dicom import open_reader
from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.request import UpscaleRequest
from medsr_cli.tasks.upscale import upscale
from medsr_cli.volume.resample import resize

from .dicom_makers import OPTIONS, SHARED, header, save

FRAMES, ROWS, COLUMNS = 10, 60, 80
TISSUE = (slice(4, 40), slice(6, 70))
"""Rows and columns of the picture; the M-mode trace lies below."""
FLOW = {"red": (slice(10, 22), slice(14, 30)), "blue": (slice(10, 22), slice(40, 56))}
COLOURS = {"red": (230, 30, 10), "blue": (20, 60, 240)}


def calibrated(left, right, top, bottom, **values):
    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMaxX1 = left, right
    region.RegionLocationMinY0, region.RegionLocationMaxY1 = top, bottom
    region.RegionFlags = 0
    for keyword, value in values.items():
        setattr(region, keyword, value)
    return region


TIMES = {
    "FrameTimeVector": [0.0, 31.5, 33.0, 34.5, 33.0, 33.0, 33.0, 33.0, 33.0, 36.0],
    "CineRate": 30,
    "RecommendedDisplayFrameRate": 25,
    "StartTrim": 2,
    "StopTrim": 9,
    "HeartRate": 72,
    "EffectiveDuration": 0.3,
    "PreferredPlaybackSequencing": 0,
    "FrameDelay": 5.0,
    "ActualFrameDuration": 33,
}


def frames(count, brightest):
    """Speckle in grey that moves, with a red and a blue flow that do not; (frames, rows, columns, 3)."""
    rng = np.random.default_rng(30)
    speckle = rng.integers(0, brightest, (ROWS, COLUMNS), endpoint=True).astype(np.uint8)
    cine = np.stack([np.roll(speckle, at, axis=1) for at in range(count)])
    rgb = np.repeat(cine[..., None], 3, axis=-1)
    for name, place in FLOW.items():
        rgb[(slice(None), *place)] = COLOURS[name]
    return rgb


def cine(path, photometric="RGB", change=None, count=FRAMES, brightest=160):
    """A multi-frame ultrasound image with two regions: a picture and its M-mode trace. Returns the frames in RGB."""
    ds = header(rows=ROWS, columns=COLUMNS, sop_class=UltrasoundMultiFrameImageStorage, modality="US")
    ds.ImageType = ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0011"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, photometric, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.NumberOfFrames = count
    ds.UltrasoundColorDataPresent = 1
    ds.FrameIncrementPointer = 0x00181065  # FrameTimeVector
    for keyword, value in TIMES.items():
        setattr(ds, keyword, value)
    picture = calibrated(6, 69, 4, 39, RegionSpatialFormat=1, RegionDataType=1)
    picture.PhysicalUnitsXDirection = picture.PhysicalUnitsYDirection = 3
    picture.PhysicalDeltaX, picture.PhysicalDeltaY = 0.03, 0.02
    picture.ReferencePixelX0, picture.ReferencePixelY0 = 32, -2
    picture.ReferencePixelPhysicalValueX = picture.ReferencePixelPhysicalValueY = 0.0
    picture.TMLinePositionX0, picture.TMLinePositionY0 = 0, 2
    picture.TMLinePositionX1, picture.TMLinePositionY1 = 5, 37
    trace = calibrated(6, 69, 42, 57, RegionSpatialFormat=2, RegionDataType=1)
    trace.PhysicalUnitsXDirection, trace.PhysicalUnitsYDirection = 4, 3
    trace.PhysicalDeltaX, trace.PhysicalDeltaY = 0.01, 0.05
    trace.ReferencePixelX0, trace.ReferencePixelY0 = 63, 0
    trace.ReferencePixelPhysicalValueX = trace.ReferencePixelPhysicalValueY = 0.0
    ds.SequenceOfUltrasoundRegions = [picture, trace]
    if change is not None:
        change(ds)
    rgb = frames(count, brightest)
    if photometric == "RGB":
        save(ds, path, rgb)
        return rgb
    ybr = np.stack([convert_color_space(frame, "RGB", "YBR_FULL") for frame in rgb])
    # Two pixels beside each other share their chrominance: Y Y B R (PS3.3, C.7.6.3.1.2).
    shared = ybr.reshape(count, ROWS, COLUMNS // 2, 2, 3)
    mean = shared[..., 1:].astype(float).mean(axis=3).round().astype(np.uint8)
    packed = np.concatenate((shared[..., 0], mean), axis=-1)
    save(ds, path, packed)
    back = np.concatenate((ybr[..., :1], np.repeat(mean, 2, axis=2)), axis=-1)
    return np.stack([convert_color_space(frame, "YBR_FULL", "RGB") for frame in back])


def upscaled(source, target, method="bicubic", scale="2", **how):
    """The main job on one file; its result."""
    request = UpscaleRequest(
        inputs=(source,),
        model=ModelRequest(method, backend="torch", **how),
        magnification=Magnification.parse(scale, None),
        output=target,
    )
    assert [item.status for item in upscale(request)] == ["done"]
    return pydicom.dcmread(target)


def hue_deg(rgb):
    r, g, b = (np.asarray(rgb, float)[..., i] for i in range(3))
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))


def apart_deg(a, b):
    return np.abs((a - b + 180) % 360 - 180)


def middle(place, scale=2, margin=4):
    """The enlarged pixels of a field that are further from its edge than the cubic reaches."""
    return tuple(slice((s.start + margin) * scale, (s.stop - margin) * scale) for s in place)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
def test_a_cine_keeps_times_regions_and_values(tmp_path, photometric):
    rgb = cine(tmp_path / "a.dcm", photometric)
    reader = open_reader(tmp_path / "a.dcm", OPTIONS)
    assert reader.volume.spacing_mm == pytest.approx((0.2, 0.3))  # of the one picture; a trace has no millimetres
    assert (reader.volume.slices, reader.volume.channels, reader.volume.modality) == (FRAMES, 3, "us")
    new = upscaled(tmp_path / "a.dcm", tmp_path / "b.dcm")
    old = pydicom.dcmread(tmp_path / "a.dcm")
    for keyword in (*TIMES, "FrameIncrementPointer", "NumberOfFrames", "UltrasoundColorDataPresent", "Modality"):
        assert new[keyword].value == old[keyword].value, keyword
    assert new.SOPClassUID == UltrasoundMultiFrameImageStorage
    assert (new.Rows, new.Columns, new.PhotometricInterpretation) == (2 * ROWS, 2 * COLUMNS, "RGB")
    assert "PixelSpacing" not in new  # nobody said so before
    large = np.clip(resize(np.moveaxis(rgb, -1, 1).astype(float), (2 * ROWS, 2 * COLUMNS)), 0, 255)
    np.testing.assert_allclose(np.moveaxis(new.pixel_array, -1, 1), large, atol=0.51)
    picture, trace = new.SequenceOfUltrasoundRegions
    assert (picture.RegionLocationMinX0, picture.RegionLocationMaxX1) == (12, 139)
    assert (trace.RegionLocationMinY0, trace.RegionLocationMaxY1) == (84, 115)
    assert (picture.PhysicalDeltaX, picture.PhysicalDeltaY) == (0.015, 0.01)
    assert (trace.PhysicalDeltaX, trace.PhysicalUnitsXDirection) == (0.005, 4)
    assert picture.RegionFlags == 0
    assert open_reader(tmp_path / "b.dcm", OPTIONS).volume.spacing_mm == pytest.approx((0.1, 0.15))


@pytest.mark.parametrize("scale", ["2", "1.7"])
def test_a_measured_distance_is_the_same_before_and_after(tmp_path, scale):
    """The middle of the red flow, found in the pixels, lies at the same depth and the same way across."""
    cine(tmp_path / "a.dcm", count=2, brightest=0)
    new = upscaled(tmp_path / "a.dcm", tmp_path / "b.dcm", scale=scale)

    def place_cm(ds):
        frame = ds.pixel_array[1].astype(float)
        weight = np.clip(frame[..., 0] - frame[..., 1], 0, None)  # 0 in greys
        region = ds.SequenceOfUltrasoundRegions[0]
        found = []
        for axis, index in (("X", np.arange(ds.Columns)), ("Y", np.arange(ds.Rows)[:, None])):
            at = float((weight * index).sum() / weight.sum())
            reference = region[f"RegionLocationMin{axis}0"].value + region[f"ReferencePixel{axis}0"].value
            value = region[f"ReferencePixelPhysicalValue{axis}"].value
            found.append(value + (at - reference) * region[f"PhysicalDelta{axis}"].value)
        return found

    np.testing.assert_allclose(place_cm(new), place_cm(pydicom.dcmread(tmp_path / "a.dcm")), atol=2e-4)


def test_pixels_that_are_not_square(tmp_path):
    """Height to width 3:2; regions say the same in cm, and a spacing that agrees."""

    def change(ds):
        ds.PixelAspectRatio = [2, 3]
        ds.PixelSpacing = ["0.2", "0.3"]
        ds.PixelSpacingCalibrationType = "GEOMETRY"

    cine(tmp_path / "a.dcm", change=change)
    new = upscaled(tmp_path / "a.dcm", tmp_path / "b.dcm")
    assert new.PixelAspectRatio == [2, 3]
    assert new.PixelSpacing == [0.1, 0.15]
    region = new.SequenceOfUltrasoundRegions[0]
    assert (region.PhysicalDeltaY * 10, region.PhysicalDeltaX * 10) == pytest.approx(tuple(new.PixelSpacing))


def test_regions_that_differ_give_no_spacing(tmp_path):
    def change(ds):
        second = ds.SequenceOfUltrasoundRegions[1]
        second.RegionSpatialFormat, second.PhysicalUnitsXDirection = 1, 3

    cine(tmp_path / "a.dcm", change=change)
    assert open_reader(tmp_path / "a.dcm", OPTIONS).volume.spacing_mm is None
    new = upscaled(tmp_path / "a.dcm", tmp_path / "b.dcm")
    assert [region.PhysicalDeltaX for region in new.SequenceOfUltrasoundRegions] == [0.015, 0.005]


@pytest.mark.parametrize(("method", "photometric"), [("m2trans", "RGB"), ("miassr", "YBR_FULL_422")])
def test_networks_do_not_tint_a_doppler(tmp_path, method, photometric):
    """Hues inside the flow are the input's, and speckle stays grey: for a network of three channels and of one."""
    rgb = cine(tmp_path / "a.dcm", photometric, count=2)
    modality = "us" if method == "m2trans" else "mr"
    new = upscaled(tmp_path / "a.dcm", tmp_path / "b.dcm", method, modality=modality)
    pixels = new.pixel_array
    for name, place in FLOW.items():
        before = hue_deg(rgb[(slice(None), *place)].reshape(-1, 3).mean(axis=0))
        assert apart_deg(hue_deg(pixels[(slice(None), *middle(place))]), before).max() < 1.0, name
    speckle = pixels[:, 2 * 46 :, :].astype(int)
    source = rgb[:, 46:].astype(int)
    assert np.ptp(speckle, axis=-1).max() <= np.ptp(source, axis=-1).max()
    assert np.corrcoef(speckle[..., 0].ravel(), source[..., 0].repeat(2, 1).repeat(2, 2).ravel())[0, 1] > 0.7


REAL = {
    "jpeg_baseline_ybr_colour_cine_30frames/examples_ybr_color.dcm": (30, 240, 320),
    "palette_colour/OBXXXX1A_rle.dcm": (1, 600, 800),
    "us_colour_no_pixel_spacing/US1_J2KR.dcm": (1, 480, 640),
    "big_endian/ExplVR_BigEnd.dcm": (1, 60, 80),
}


@pytest.mark.parametrize("name", REAL)
def test_real_ultrasound_keeps_hues_times_and_regions(tmp_path, name):
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data are not here")
    count, rows, columns = REAL[name]
    new = upscaled(path, tmp_path / "b.dcm")
    old = pydicom.dcmread(path, stop_before_pixels=True)
    for keyword in ("FrameTime", "FrameIncrementPointer", "HeartRate", "NumberOfFrames", "CineRate"):
        assert new.get(keyword) == old.get(keyword), keyword
    assert new.pixel_array.shape == ((count,) if count > 1 else ()) + (2 * rows, 2 * columns, 3)
    for before, after in zip(
        old.get("SequenceOfUltrasoundRegions") or [], new.get("SequenceOfUltrasoundRegions") or [], strict=True
    ):
        assert after.PhysicalDeltaX == pytest.approx(before.PhysicalDeltaX / 2)
        assert after.RegionFlags == before.RegionFlags
        assert after.RegionLocationMinX0 == 2 * before.RegionLocationMinX0
    first = next(open_reader(path, OPTIONS).slices())
    again = next(open_reader(tmp_path / "b.dcm", OPTIONS).slices())
    shrunken = again.reshape(3, rows, 2, columns, 2).mean(axis=(2, 4))
    for colour in range(3):
        assert np.corrcoef(shrunken[colour].ravel(), first[colour].ravel())[0, 1] > 0.98
    vivid = np.ptp(first.astype(int), axis=0) > 60
    if vivid.sum() > 100:
        apart = apart_deg(hue_deg(np.moveaxis(shrunken, 0, -1))[vivid], hue_deg(np.moveaxis(first, 0, -1))[vivid])
        assert np.median(apart) < 3
