"""What a routing hub may set, where it says so, and how results get into its folder."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError, QualityGateFailed, RunError
from medsr_cli.formats.delivery import delivery_into
from medsr_cli.tasks.module import ModuleOrder, module_folders, run_module
from medsr_cli.tasks.module_settings import (
    ModuleSettings,
    known_settings,
    setting_of_text,
    settings_of,
    task_settings,
)
from medsr_cli.tasks.progress import Silent
from medsr_cli.tasks.upscale import upscale
from tests.formats import dicom_makers


def written(folder: Path, task: object) -> Path:
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    return path


def test_settings_of_one_step_of_several_and_of_none(tmp_path):
    one = {"module_name": "SuperRes", "settings": {"model": "bicubic"}}
    assert task_settings(written(tmp_path, {"process": one})) == {"model": "bicubic"}
    assert task_settings(written(tmp_path, {"process": [one]})) == {"model": "bicubic"}
    assert task_settings(written(tmp_path, {"process": {}})) == {}
    assert task_settings(written(tmp_path, {})) == {}
    assert task_settings(written(tmp_path, {"process": {"settings": None}})) == {}
    other = {"module_name": "medsr", "settings": {"scale": 2}}
    assert task_settings(written(tmp_path, {"process": [one, other]})) == {"scale": 2}
    assert task_settings(written(tmp_path, {"process": [one, other]}), "SuperRes") == {"model": "bicubic"}
    shared = {"sigma": 7, "medsr": {"scale": 3}}
    assert task_settings(written(tmp_path, {"process": {"settings": shared}})) == {"scale": 3}
    for steps in ([one, one], [other, other], ["x", 3]):
        with pytest.raises(ArgumentsError, match="MEDSR_MODULE_NAME"):
            task_settings(written(tmp_path, {"process": steps}))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"process": 3}', b'{"process": {"settings": [1]}}', b"[" * 100_000, b"null"],
)
def test_a_task_file_that_is_none(tmp_path, content):
    path = tmp_path / "task.json"
    path.write_bytes(content)
    with pytest.raises(ArgumentsError, match="The task file is not one of a routing hub") as caught:
        task_settings(path)
    assert "patient" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(known_settings()) | st.text(max_size=6), JSON, max_size=4))
def test_any_settings_are_taken_or_refused_with_a_sentence(values):
    try:
        settings = settings_of(values)
    except ArgumentsError:
        return
    assert {entry.name: getattr(settings, entry.name) for entry in fields(settings) if entry.name in values} == values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stable_uids": 1}, "stable_uids must be true or false"),
        ({"stable_uids": "true"}, "stable_uids must be true or false"),
        ({"min_images": True}, "min_images must be a whole number"),
        ({"min_images": 0}, "min_images must be at least 1"),
        ({"scale": [2]}, "scale must be"),
        ({"series": "1.2"}, "series must be a list of texts"),
        ({"series": [1]}, "series must be a list of texts"),
        ({"modality": "mri"}, "modality takes one of mr, ct, us, xr"),
        ({"transfer_syntax": "jpeg"}, "transfer_syntax takes one of explicit"),
        ({"scale": 2, "spacing_mm": 0.5}, "both say"),
        ({"Model": "rdst"}, "Is model meant"),
    ],
)
def test_wrong_settings_are_named(values, said):
    with pytest.raises(ArgumentsError, match=said):
        settings_of(values)


def test_a_refused_setting_lists_all_that_there_are():
    with pytest.raises(ArgumentsError) as caught:
        settings_of({"nonsense": 1})
    assert all(name in caught.value.remedy for name in known_settings())


def test_defaults_are_those_that_a_hub_needs():
    settings = settings_of({})
    assert settings == ModuleSettings()
    assert settings.stable_uids
    assert settings.keep_source == "none"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("scale=2", ("scale", 2)),
        ("scale=2x3", ("scale", "2x3")),
        ("model=2", ("model", "2")),
        ("stable_uids=false", ("stable_uids", False)),
        ('series=["1.2"]', ("series", ["1.2"])),
        ("weights=7", ("weights", "7")),
        ("modality=null", ("modality", None)),
        ("threads=2", ("threads", 2)),
    ],
)
def test_settings_of_a_command_line(text, setting):
    assert setting_of_text(text) == setting
    settings_of(dict([setting]))


def test_folders_as_given_then_as_hubs_name_them():
    monai = {"MONAI_INPUTPATH": "m/in", "MONAI_OUTPUTPATH": "m/out"}
    mercure = {"MERCURE_IN_DIR": "in", "MERCURE_OUT_DIR": "out"}
    assert module_folders(None, None, monai) == (Path("m/in"), Path("m/out"))
    assert module_folders(None, None, {**monai, **mercure}) == (Path("in"), Path("out"))
    assert module_folders(Path("a"), None, mercure) == (Path("a"), Path("out"))
    with pytest.raises(ArgumentsError, match="Neither --out nor MERCURE_OUT_DIR"):
        module_folders(Path("a"), None, {})


# -- delivery -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_delivery_is_whole_and_the_last_file_is_last(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_bytes(b"old")
    (out / "result.json").write_bytes(b"old")
    (out / "mine").write_bytes(b"mine")
    order = []
    import os

    replace = os.replace
    monkeypatch.setattr(
        "os.replace", lambda a, b: (order.append((Path(b).name, sorted(contents_names(out)))), replace(a, b))
    )
    with delivery_into(out, "result.json") as delivery:
        for name in ("result.json", "z", "a"):
            path = delivery.temporary / f"made-{name}"
            path.write_bytes(name.encode())
            delivery.add(path, name)
        delivery.add_copy(out / "mine", "copy")
        assert contents_names(out) == {"a", "result.json", "mine"}
    assert [name for name, _ in order] == ["a", "copy", "z", "result.json"]
    assert all("result.json" not in there for _, there in order)
    assert contents(out) == {
        "a": b"a", "copy": b"mine", "mine": b"mine", "result.json": b"result.json", "z": b"z",
    }  # fmt: skip


def contents_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_failed_delivery_changes_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_bytes(b"old")
    assert not delivered(out, ["result.json"], fail=True)
    assert contents(out) == {"result.json": b"old"}


def delivered(out: Path, names: list[str], *, fail: bool = False) -> bool:
    try:
        with delivery_into(out, "result.json") as delivery:
            for name in names:
                delivery.add_text("new", name)
            if fail:
                msg = "No."
                raise RunError(msg)
    except MedsrError:
        return False
    return True


def test_two_files_of_one_name_are_refused(tmp_path):
    assert not delivered(tmp_path, ["x", "x"])
    assert not delivered(tmp_path, ["../x"])
    assert list(tmp_path.iterdir()) == []


# -- what becomes of a run in which series fail ---------------------------------------------------------------


class Judged:
    """The main job, with series that it is made to fail on."""

    def __init__(self, errors: dict[int, MedsrError]) -> None:
        self.errors = errors

    def __call__(self, request, progress):
        for item in upscale(request, progress):
            item.error = self.errors.get(int(item.source.name[-4:]), item.error)
            item.status = "failed" if item.error else item.status
            yield item


@pytest.fixture
def order(tmp_path):
    for uid in ("1.2.3.4.5", "1.2.3.4.77"):
        dicom_makers.series(tmp_path / "in" / uid, count=2, series_uid=uid, rows=8, columns=7)
    return ModuleOrder(tmp_path / "in", tmp_path / "out", overrides={"model": "bicubic", "scale": 2})


GATE, REFUSED, DISK = QualityGateFailed("It looks wrong."), InputRefused("It is bad."), RunError("The disk is full.")


@pytest.mark.parametrize(
    ("errors", "partial", "code", "files", "statuses"),
    [
        ({}, False, 0, 4, ["enlarged", "enlarged"]),
        ({1: REFUSED}, False, 0, 2, ["left alone", "enlarged"]),
        ({1: REFUSED, 2: REFUSED}, False, 6, 0, ["left alone", "left alone"]),
        ({2: GATE}, False, 3, 0, ["enlarged", "failed"]),
        ({2: GATE}, True, 0, 2, ["enlarged", "failed"]),
        ({1: GATE, 2: GATE}, True, 7, 0, ["failed", "failed"]),
        ({1: GATE, 2: DISK}, True, 3, 0, ["failed", "failed"]),
        ({1: DISK, 2: DISK}, False, 1, 0, ["failed", "failed"]),
    ],
)
def test_all_or_nothing_unless_partial(order, monkeypatch, errors, partial, code, files, statuses):
    monkeypatch.setattr("medsr_cli.tasks.module.upscale", Judged(errors))
    order.overrides["partial"] = partial
    ended = 0
    try:
        run_module(order, Silent())
    except MedsrError as error:
        ended = error.exit_code
    assert ended == code
    result = json.loads((order.output / "result.json").read_text())
    assert result["exit_code"] == code
    assert [entry["status"] for entry in result["series"]] == statuses
    assert len(list(order.output.glob("*.dcm"))) == files == result["counts"]["files_out"]
    assert result["__mercure_notification"]["requested"] == bool(errors)
    assert not list(order.output.glob(".*"))
