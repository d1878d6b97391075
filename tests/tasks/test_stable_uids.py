"""UIDs that a second run makes again: the same for the same images however they are kept, others for other pixels."""

import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.engines.traits import Traits
from medsr_cli.errors import InputRefused
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.dicom import open_reader
from medsr_cli.tasks.channels import refuse_other_patient
from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import Model, ModelRequest
from medsr_cli.tasks.request import UpscaleRequest
from medsr_cli.tasks.settings import settings_digest
from medsr_cli.tasks.upscale import upscale
from tests.formats.dicom_makers import OPTIONS, enhanced_mr, header, place, save, series

AXIAL, CORONAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1)


def run(path, out, **kw):
    """Bicubic with stable UIDs; every result's status and the files of all of them."""
    request = UpscaleRequest(
        inputs=(path,),
        model=ModelRequest(model="bicubic"),
        magnification=Magnification((2.0, 2.0)),
        output=out,
        dicom=DicomOutput(stable_uids=True),
        **kw,
    )
    items = list(upscale(request))
    assert [item.error for item in items] == [None] * len(items)
    return items, [pydicom.dcmread(file) for file in sorted(out.rglob("*.dcm"))]


def identities(files):
    """What an archive tells objects by, and what is seen of them in a list."""
    return sorted((ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.SeriesNumber, ds.InstanceNumber) for ds in files)


def two_stacks(folder, names):
    for first, orientation, name in zip((1, 11), (AXIAL, CORONAL), names, strict=True):
        for at in range(3):
            ds = header(number=first + at)
            ds.SOPInstanceUID = f"1.2.3.{first + at}"
            place(ds, np.cross(orientation[:3], orientation[3:]) * 4.0 * at, orientation)
            pixels = np.random.default_rng(first + at).integers(0, 4096, (6, 5)).astype(np.uint16)
            save(ds, folder / f"{name}{at}.dcm", pixels)


def test_names_of_files_do_not_decide_which_stack_is_the_first(tmp_path):
    two_stacks(tmp_path / "a", "ab")
    two_stacks(tmp_path / "b", "zb")
    _, one = run(tmp_path / "a", tmp_path / "one")
    _, other = run(tmp_path / "b", tmp_path / "other")
    assert identities(one) == identities(other)
    assert len({ds.SeriesInstanceUID for ds in one}) == 2


@pytest.mark.parametrize("placed", [True, False])
def test_names_of_files_do_not_decide_the_order_of_images_of_one_number(tmp_path, placed):
    for folder, names in (("a", "012"), ("b", "210")):
        for at, name in enumerate(names):
            ds = header(number=1)
            ds.SOPInstanceUID = f"1.2.3.{at + 9}"  # 9, 10, 11: in numbers, not in letters
            if placed:
                place(ds, (0, 0, 0), AXIAL)
            save(ds, tmp_path / folder / f"{name}.dcm", np.full((6, 5), at + np.eye(6, 5) * 40, np.uint16))
    _, one = run(tmp_path / "a", tmp_path / "one")
    _, other = run(tmp_path / "b", tmp_path / "other")
    assert identities(one) == identities(other)
    assert [ds.SourceImageSequence[0].ReferencedSOPInstanceUID[6:] for ds in one] == ["9", "10", "11"]


def test_an_image_that_was_changed_under_its_uid_becomes_another_object(tmp_path):
    series(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    changed = sorted((tmp_path / "b").iterdir())[0]
    ds = pydicom.dcmread(changed)
    ds.PixelData = ds.pixel_array[::-1].tobytes()
    ds.save_as(changed)
    _, one = run(tmp_path / "a", tmp_path / "one")
    _, other = run(tmp_path / "b", tmp_path / "other")
    assert not {ds.SOPInstanceUID for ds in one} & {ds.SOPInstanceUID for ds in other}


def test_how_the_source_is_packed_does_not_make_other_objects(tmp_path):
    series(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        ds = pydicom.dcmread(file)
        ds.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        ds.save_as(file)
    _, one = run(tmp_path / "a", tmp_path / "one")
    _, other = run(tmp_path / "b", tmp_path / "other")
    assert identities(one) == identities(other)


@pytest.mark.parametrize("kind", ["zip", "file"])
def test_all_results_of_a_study_are_in_the_folder_that_was_named_every_time(tmp_path, kind):
    if kind == "zip":
        source = tmp_path / "study.zip"
        series(tmp_path / "a", 2, series_uid="1.2.3.1")
        series(tmp_path / "b", 2, series_uid="1.2.3.2")
        with zipfile.ZipFile(source, "w") as archive:
            for file in sorted(tmp_path.glob("[ab]/*.dcm")):
                archive.write(file, file.relative_to(tmp_path))
        expected = ["series-01", "series-02"]
    else:
        source = tmp_path / "two.dcm"
        planes = [((0, 0, at), AXIAL) for at in range(2)] + [((0, at, 0), CORONAL) for at in range(2)]
        enhanced_mr(source, planes)
        expected = ["series-01-stack-1", "series-01-stack-2"]
    out = tmp_path / "out"
    first, _ = run(source, out)
    assert [item.output.relative_to(out).as_posix() for item in first] == expected
    again, _ = run(source, out, skip_existing=True)
    assert [(item.status, item.output) for item in again] == [("skipped", item.output) for item in first]


def test_results_put_into_the_study_do_not_change_the_numbers_of_its_series(tmp_path):
    study = tmp_path / "study"
    series(study / "s1", 2, series_uid="1.2.3.1")
    series(study / "s2", 2, series_uid="1.2.3.2")
    out = study / "a"  # before its series, by name
    first, _ = run(study, out)
    again, _ = run(study, out, skip_existing=True)
    assert [(item.status, item.output) for item in again] == [("skipped", item.output) for item in first]


@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID"])
def test_two_patients_under_one_series_uid_never_meet(tmp_path, keyword):
    def change(ds, at):
        if at % 2:
            setattr(ds, keyword, "1.2.99")

    pixels = series(tmp_path / "in", 4, change=change)
    items, files = run(tmp_path / "in", tmp_path / "out")
    assert len(items) == 2
    by_series = {}
    for ds in files:
        by_series.setdefault(ds.SeriesInstanceUID, set()).add(ds[keyword].value)
    assert sorted(map(len, by_series.values())) == [1, 1]
    assert {value for values in by_series.values() for value in values} == {"1.2.99", header()[keyword].value}
    # Each has the range of its own images alone.
    for at, file in enumerate(sorted((tmp_path / "in").glob("*.dcm"), key=lambda file: int(file.stem[-1]))):
        _, alone = run(file, tmp_path / f"alone{at}.dcm") if at == 0 else (None, [])
        assert all(ds.pixel_array.shape == (2 * pixels.shape[1], 2 * pixels.shape[2]) for ds in alone)


def test_channels_of_two_patients_are_refused(tmp_path):
    series(tmp_path / "a", 2)
    series(tmp_path / "b", 2, change=lambda ds, at: setattr(ds, "PatientID", "OTHER"))
    a, b = (open_reader(tmp_path / name, OPTIONS) for name in "ab")
    refuse_other_patient(a, a)
    with pytest.raises(InputRefused, match="another patient"):
        refuse_other_patient(a, b)


class Runner:
    name, device, precision, warnings = "torch", "cpu", "fp32", []
    out_of_memory = ()
    usable = 1 << 33

    def usable_bytes(self):
        return self.usable


def network(usable=1 << 33, **kw):
    runner = Runner()
    runner.usable = usable
    engine = NetworkEngine(runner, Traits(scale=2, tiling="blended", overlap=16), **kw)
    return Model("rdst", engine, None, (2.0, 2.0))


def test_tiles_that_memory_decides_make_other_objects(tmp_path):
    series(tmp_path / "in", 1, rows=300, columns=300)
    volume = open_reader(tmp_path / "in", OPTIONS).volume
    request = UpscaleRequest(inputs=(), model=ModelRequest(model="rdst"))

    def digest(model):
        return settings_digest(request, model, {}, volume)

    assert digest(network()) == digest(network()) != digest(network(usable=200_000_000))
    assert digest(network()) != digest(network(limit_bytes=200_000_000))


def test_a_training_that_the_clock_stopped_makes_other_objects(tmp_path):
    series(tmp_path / "in", 1)
    volume = open_reader(tmp_path / "in", OPTIONS).volume
    request = UpscaleRequest(inputs=(), model=ModelRequest(model="uscyclegan"))

    def digest(iterations, seconds):
        trained = {"iterations": iterations, "stopped_by": "time", "reconstruction_error": 0.1, "seconds": seconds}
        model = network()
        model.facts["trained_on_the_image"] = trained
        return settings_digest(request, model, {}, volume)

    assert digest(7, 1.0) == digest(7, 2.0) != digest(8, 1.0)


def test_a_series_with_an_intermediate_result_becomes_two_series(tmp_path):
    series(tmp_path / "in", 2, rows=16, columns=16)
    request = UpscaleRequest(
        inputs=(tmp_path / "in",),
        model=ModelRequest(model="msgan", modality="mr"),
        output=tmp_path / "out",
        dicom=DicomOutput(stable_uids=True),
        intermediate=True,
    )
    made = []
    for again in (False, True):
        (item,) = upscale(replace(request, overwrite=again))
        assert item.error is None
        assert item.more_outputs == [tmp_path / "out_intermediate"]
        made.append([pydicom.dcmread(file) for file in sorted(tmp_path.glob("out*/*.dcm"))])
    assert identities(made[0]) == identities(made[1])
    assert sorted((ds.Rows, ds.SeriesNumber) for ds in made[0]) == [(32, 2007), (32, 2007), (64, 1007), (64, 1007)]
    assert len({ds.SeriesInstanceUID for ds in made[0]}) == 2
