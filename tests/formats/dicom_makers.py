"""Small DICOM series made up for the tests, and the shared fixtures."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medsr_cli.formats.contract import Derivation, ReadOptions

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
OPTIONS = ReadOptions()
DERIVATION = Derivation(
    method="rdst-e",
    scale=(2.0, 2.0),
    software="medsr 0.1.0",
    checkpoint_id="rdst-e-x2-brain",
    checkpoint_sha256="ab" * 32,
    degradation="cubic down-sampling by 2",
)
CANARY = "CANARY^PATIENT"

TILTED = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def header(*, rows=6, columns=5, series=None, number=1, sop_class=MRImageStorage, modality="MR"):
    """A plain data set with everything but pixels."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.4", series or "1.2.3.4.5"
    ds.FrameOfReferenceUID, ds.AccessionNumber, ds.StudyID = "1.2.3.4.6", "A1", "S1"
    ds.PatientName, ds.PatientID, ds.Modality = CANARY, "CANARYID", modality
    ds.SeriesNumber, ds.InstanceNumber, ds.SeriesDescription = 7, number, "t1 axial"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    return ds


def place(ds, position, orientation=TILTED, spacing=(0.7, 0.5), thickness=3.0):
    ds.ImagePositionPatient = [f"{v:.6f}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.9f}" for v in orientation]
    ds.PixelSpacing = [str(v) for v in spacing]
    ds.SliceThickness = str(thickness)
    return ds


def save(ds, path, pixels=None):
    if pixels is not None:
        ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
        ds["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def series(folder, count=4, step=2.5, *, series_uid="1.2.3.4.5", orientation=TILTED, positions=None, change=None, **kw):
    """A folder of `count` slices along their normal; returns the pixels, (slices, rows, columns), by position."""
    along, down = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(along, down)
    rng = np.random.default_rng(5)
    stored = []
    for at in range(count):
        ds = header(series=series_uid, number=count - at, **kw)  # numbered against the direction of the normal
        position = positions[at] if positions is not None else np.array([-20.0, 31.0, 7.0]) + normal * step * at
        place(ds, position, orientation)
        pixels = rng.integers(0, 4096, (ds.Rows, ds.Columns)).astype(np.uint16)
        if change is not None:
            change(ds, at)
        save(ds, folder / f"{(at * 7) % 11:02d}x{at}.dcm", pixels)
        stored.append(pixels)
    return np.array(stored)


def compressed(path, frames, syntax, photometric, shape, *, bits=8, samples=3):
    """A secondary capture around ready-made codestreams."""
    ds = header(rows=shape[0], columns=shape[1], sop_class=SecondaryCaptureImageStorage, modality="OT")
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SamplesPerPixel, ds.PhotometricInterpretation = samples, photometric
    if samples == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 if bits <= 8 else 16, bits, bits - 1
    if len(frames) > 1:
        ds.NumberOfFrames = len(frames)
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return save(ds, path)


def enlarge(pixels, scale=2):
    """Nearest neighbour: every pixel becomes scale x scale of itself."""
    return pixels.repeat(scale, -2).repeat(scale, -1)


def derive(source, target, scale=2, derivation=DERIVATION, change=None, overwrite=False):
    """Write the nearest-neighbour enlargement of a reader; returns the writer."""
    from medsr_cli.formats.dicom import open_writer

    volume = source.volume
    result = volume.enlarged(volume.rows * scale, volume.columns * scale)
    with open_writer(target, source, result, derivation, overwrite=overwrite) as writer:
        for pixels in source.slices():
            large = enlarge(pixels, scale)
            writer.write(large if change is None else change(large))
    return writer


def enhanced(path, frames=4, *, order=None, spacing=(0.7, 0.5), slopes=None, sop_class="1.2.840.10008.5.1.4.1.1.4.1"):
    """An enhanced multi-frame object with per-frame positions, stored in `order` of position."""
    ds = header(sop_class=sop_class)
    ds.NumberOfFrames = frames
    normal = np.cross(TILTED[:3], TILTED[3:])
    groups = []
    for at in order or range(frames):
        group, plane, measure, turn, values = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = [f"{v:.6f}" for v in np.array([3.0, -4.0, 5.0]) + normal * 2.0 * at]
        measure.PixelSpacing, measure.SliceThickness = [str(v) for v in spacing], "2"
        turn.ImageOrientationPatient = [f"{v:.9f}" for v in TILTED]
        values.RescaleIntercept, values.RescaleSlope, values.RescaleType = "0", str((slopes or [1] * frames)[at]), "US"
        group.PlanePositionSequence, group.PixelMeasuresSequence = [plane], [measure]
        group.PlaneOrientationSequence, group.PixelValueTransformationSequence = [turn], [values]
        private = Dataset()
        private.PixelSpacing, private.EchoTime = [str(v) for v in spacing], "12"
        group.add_new(0x20050010, "LO", "Philips MR Imaging DD 005")
        group.add_new(0x2005100F, "SQ", [private])
        groups.append(group)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [Dataset()], groups
    pixels = np.random.default_rng(6).integers(0, 4096, (frames, ds.Rows, ds.Columns)).astype(np.uint16)
    save(ds, path, pixels)
    return pixels


def enhanced_mr(path, planes, *, per_frame=lambda at: {}, shared=None, sop_class="1.2.840.10008.5.1.4.1.1.4.1", **top):
    """An enhanced MR object; frame after frame one (position, orientation) of `planes`.

    `per_frame` and `shared` give functional groups, {sequence: {attribute: value}}; `top` attributes of image level.
    Dimensions are stack (by orientation) and position in it. Returns the pixels.
    """
    ds = header(sop_class=sop_class, modality="CT" if ".2.1" in sop_class else "MR")
    ds.NumberOfFrames = len(planes)
    turns = list(dict.fromkeys(orientation for _, orientation in planes))
    organisation = "1.2.3.9"
    pointers = []
    for pointer in (0x00209056, 0x00209057):
        item = Dataset()
        item.DimensionOrganizationUID, item.DimensionIndexPointer = organisation, pointer
        item.FunctionalGroupPointer = 0x00209111
        pointers.append(item)
    ds.DimensionIndexSequence = pointers
    for keyword, value in top.items():
        setattr(ds, keyword, value)
    groups, counted = [], dict.fromkeys(turns, 0)
    for at, (position, orientation) in enumerate(planes):
        counted[orientation] += 1
        stack = turns.index(orientation) + 1
        frame = {
            "PlanePositionSequence": {"ImagePositionPatient": [f"{v:.6f}" for v in position]},
            "PlaneOrientationSequence": {"ImageOrientationPatient": [f"{v:.9f}" for v in orientation]},
            "FrameContentSequence": {
                "StackID": str(stack), "InStackPositionNumber": counted[orientation],
                "DimensionIndexValues": [stack, counted[orientation]],
            },
        }  # fmt: skip
        for name, content in per_frame(at).items():
            frame[name] = {**frame.get(name, {}), **content}
        groups.append(_groups(frame))
    measures = {"PixelMeasuresSequence": {"PixelSpacing": ["0.7", "0.5"], "SliceThickness": "2"}}
    ds.SharedFunctionalGroupsSequence = [_groups({**measures, **(shared or {})})]
    ds.PerFrameFunctionalGroupsSequence = groups
    pixels = np.random.default_rng(8).integers(0, 4096, (len(planes), ds.Rows, ds.Columns)).astype(np.uint16)
    save(ds, path, pixels)
    return pixels


def _groups(named):
    group = Dataset()
    for name, content in named.items():
        item = Dataset()
        for keyword, value in content.items():
            setattr(item, keyword, value)
        setattr(group, name, [item])
    return group
