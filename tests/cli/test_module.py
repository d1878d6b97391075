"""`medsr module` as a routing hub runs it: a process, two folders, environment variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.formats.dicom_makers import series

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"2\.25\.[0-9]+#2\.25\.[0-9]+\.dcm")
SERIES = "1.2.3.4.5"
OTHER = "1.2.3.4.77"


class Hub:
    """What mercure does around a module (its release 0.4): `in` and `out`, and a task file with one step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.input, self.output = folder, folder / "in", folder / "out"
        self.input.mkdir(parents=True)
        self.output.mkdir()

    def receive(self, files: Path, prefix: str) -> None:
        for number, path in enumerate(sorted(files.iterdir())):
            shutil.copy(path, self.input / f"{prefix}#{number}.dcm")
            (self.input / f"{prefix}#{number}.tags").write_text("{}")

    def task(self, **settings: object) -> None:
        step = {"module_name": "medsr", "settings": settings, "retain_input_images": False}
        (self.input / "task.json").write_text(json.dumps({"id": "x", "info": {"mrn": "CANARYID"}, "process": step}))

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        folders = {"MERCURE_IN_DIR": str(self.input), "MERCURE_OUT_DIR": str(self.output)}
        return subprocess.run(
            [sys.executable, "-m", "medsr_cli", "module", *arguments],
            env={**surroundings(), **folders, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def result(self) -> dict:
        return json.loads((self.output / "result.json").read_text())

    def delivered(self) -> list[str]:
        return sorted(path.name for path in self.output.iterdir() if path.name != "result.json")


def surroundings() -> dict[str, str]:
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@pytest.fixture
def hub(tmp_path):
    made = Hub(tmp_path / "hub")
    for uid, count in ((SERIES, 3), (OTHER, 2)):
        series(tmp_path / uid, count=count, series_uid=uid, rows=8, columns=7)
        made.receive(tmp_path / uid, uid)
    made.task(model="bicubic", scale=2)
    return made


def read_only(folder: Path) -> dict[str, bytes]:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    return before


def test_every_suitable_series_becomes_a_derived_one(hub):
    before = read_only(hub.input)
    done = hub.run()
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in hub.input.iterdir()} == before
    names = hub.delivered()
    assert len(names) == 5
    assert all(NAME.fullmatch(name) for name in names)
    for name in names:
        ds = pydicom.dcmread(hub.output / name)
        assert name == f"{ds.SeriesInstanceUID}#{ds.SOPInstanceUID}.dcm"
        assert (ds.Rows, ds.Columns, ds.StudyInstanceUID) == (16, 14, "1.2.3.4")
    assert len({name.partition("#")[0] for name in names}) == 2
    result = hub.result()
    assert result["status"] == "done"
    assert result["counts"] == {
        "series": 2, "enlarged": 2, "left_alone": 0, "failed": 0, "files_in": 5, "files_out": 5, "files_kept": 0,
    }  # fmt: skip
    assert [entry["results"][0]["method"] for entry in result["series"]] == ["bicubic"] * 2
    assert result["__mercure_notification"]["text"].startswith("medsr: 2 of 2 series enlarged with bicubic")
    assert done.stdout.strip() == str(hub.output / "result.json")


def test_nothing_of_a_patient_is_said(hub):
    bad = hub.input / "MUELLER^ANNA#broken.dcm"
    bad.write_bytes(b"\0" * 128 + b"DICM" + b"\1\2\3")
    done = hub.run("-v")
    text = done.stdout + done.stderr + (hub.output / "result.json").read_text() + " ".join(hub.delivered())
    for canary in ("CANARY", "MUELLER", SERIES, OTHER, "1.2.3.4", "t1 axial", "#0", "#1"):
        assert canary not in text.replace(str(hub.folder), "")


def test_a_retry_makes_the_same_series_and_leaves_strange_files(hub):
    (hub.output / "notes.txt").write_text("mine")
    assert hub.run().returncode == 0
    first = hub.delivered()
    assert hub.run().returncode == 0
    assert hub.delivered() == first
    assert (hub.output / "notes.txt").read_text() == "mine"
    hub.task(model="bicubic", scale=2, stable_uids=False)
    assert hub.run().returncode == 0
    assert len(hub.delivered()) == 2 * len(first) - 1


def test_a_broken_file_spoils_its_own_series_alone(hub):
    path = hub.input / f"{OTHER}#1.dcm"
    path.write_bytes(path.read_bytes()[:200])
    done = hub.run()
    assert done.returncode == 0, done.stderr
    assert len(hub.delivered()) == 3
    left = [entry for entry in hub.result()["series"] if entry["status"] == "left alone"]
    assert [entry["reason"] for entry in left] == ["lacks slices: 1 of its files cannot be read"]
    assert hub.result()["warnings"] == ["1 of 5 DICOM files cannot be read."]
    assert hub.result()["__mercure_notification"]["requested"]


def test_a_broken_file_of_nobody_spoils_everything(hub):
    (hub.input / "slice.dcm").write_bytes(b"nothing")
    done = hub.run()
    assert done.returncode == 6
    assert hub.delivered() == []
    assert {entry["status"] for entry in hub.result()["series"]} == {"left alone"}


def test_nothing_suitable_is_refused_and_said(hub, shared):
    for path in hub.input.glob("*#*"):
        path.unlink()
    for path in sorted((shared / "data/dicom/no_pixels_structured_report").iterdir()):
        shutil.copy(path, hub.input / "1.2.3#0.dcm")
    done = hub.run()
    assert done.returncode == 6
    result = hub.result()
    assert (result["status"], result["exit_code"]) == ("refused", 6)
    assert "no DICOM image" in result["error"]
    hub.task(model="bicubic", scale=2, nothing_suitable="accept", keep_source="rest")
    assert hub.run().returncode == 0
    assert hub.delivered() == ["1.2.3#0.dcm"]
    assert hub.result()["counts"]["files_kept"] == 1


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"modell": "bicubic"}, 2, "There is no setting 'modell'. Is model meant?"),
        ({"model": 3}, 2, "The setting model must be a text."),
        ({"scale": "many"}, 2, "is no number"),
        ({"model": "nosuch"}, 2, "nosuch"),
        ({"model": "rdst", "weights": "none.safetensors"}, 5, "There is no checkpoint"),
        ({"model": "bicubic", "only_modalities": ["CT"]}, 6, "is of a modality that is not set"),
        ({"model": "bicubic", "min_images": 4}, 6, "has fewer than 4 images"),
        ({"model": "bicubic", "largest_matrix": 7}, 6, "has more than 7 rows or columns"),
        ({"model": "bicubic", "series": ["9.9"]}, 6, "is not among the series that are set"),
    ],
)
def test_what_goes_wrong_is_in_the_exit_code_and_in_the_result(hub, medsr, settings, code, said):
    hub.task(**settings)
    done = medsr("module", "-i", hub.input, "-o", hub.output)
    assert done.code == code, done.err
    assert said in done.err
    assert hub.delivered() == []
    assert hub.result()["exit_code"] == code
    assert said.split(" ")[0] in hub.result()["error"]


def test_one_series_by_rule_and_the_rest_passed_on(hub):
    hub.task(model="bicubic", scale=2, min_images=3, keep_source="rest")
    before = {path.name: path.read_bytes() for path in hub.input.glob(f"{OTHER}#*.dcm")}
    assert hub.run().returncode == 0
    kept = {name: (hub.output / name).read_bytes() for name in hub.delivered() if not NAME.fullmatch(name)}
    assert kept == before
    assert len(hub.delivered()) == 3 + 2


def test_pixels_that_end_too_early_spoil_their_own_series_alone(hub):
    path = hub.input / f"{OTHER}#1.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    done = hub.run()
    assert done.returncode == 0, done.stderr
    assert len(hub.delivered()) == 3
    assert hub.result()["counts"]["left_alone"] == 1
    assert "pixels" in next(entry["reason"] for entry in hub.result()["series"] if entry["reason"])


def test_own_results_are_left_alone(hub, medsr):
    assert hub.run().returncode == 0
    loop = Hub(hub.folder / "loop")
    for name in hub.delivered():
        shutil.copy(hub.output / name, loop.input)
    loop.task(model="bicubic", scale=2)
    assert medsr("module", "-i", loop.input, "-o", loop.output).code == 6
    assert {entry["reason"] for entry in loop.result()["series"]} == {"was made by medsr"}
    loop.task(model="bicubic", scale=2, again=True)
    assert medsr("module", "-i", loop.input, "-o", loop.output).code == 0


def test_other_hubs_give_folders_by_option_and_settings_too(hub):
    (hub.input / "task.json").unlink()
    out = hub.folder / "elsewhere"
    done = hub.run(
        *("-i", str(hub.input), "--out", str(out), "--set", "model=bicubic", "--set", "scale=2", "--json"),
        MERCURE_IN_DIR="", MERCURE_OUT_DIR="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["files_out"] == 5
    assert len(list(out.iterdir())) == 6
    monai = hub.run(
        *("--set", "model=bicubic", "--set", "scale=2"),
        MERCURE_IN_DIR="", MERCURE_OUT_DIR="",
        MONAI_INPUTPATH=str(hub.input), MONAI_OUTPUTPATH=str(hub.folder / "map"),
    )  # fmt: skip
    assert monai.returncode == 0, monai.stderr
    nowhere = hub.run(MERCURE_IN_DIR="", MERCURE_OUT_DIR="")
    assert nowhere.returncode == 2
    assert "Neither --in nor MERCURE_IN_DIR" in nowhere.stderr


def test_folders_that_cannot_be(hub, medsr):
    assert medsr("module", "-i", hub.folder / "none", "-o", hub.output).code == 6
    assert medsr("module", "-i", hub.input, "-o", hub.input).code == 2
    assert medsr("module", "-i", hub.input, "-o", hub.input / "deeper").code == 2
    assert sorted(path.name for path in hub.folder.iterdir()) == ["in", "out"]
    assert hub.delivered() == []


def test_a_run_that_is_killed_leaves_nothing_that_looks_done(tmp_path):
    hub = Hub(tmp_path / "hub")
    series(tmp_path / SERIES, count=8, series_uid=SERIES, rows=200, columns=200)
    hub.receive(tmp_path / SERIES, SERIES)
    hub.task(model="rdst", scale=4, fit=False)
    (hub.output / "result.json").write_text('{"status": "done"}')
    running = subprocess.Popen(
        [sys.executable, "-m", "medsr_cli", "module", "-i", str(hub.input), "-o", str(hub.output)],
        env=surroundings(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 30
    while not list(hub.output.glob(".medsr-*/in/*")) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert [path.name for path in hub.output.iterdir() if not path.name.startswith(".")] in ([], ["result.json"])
    hub.task(model="bicubic", scale=2)
    assert hub.run().returncode == 0
    assert len(hub.delivered()) == 8
    assert not list(hub.output.glob(".*"))


def test_the_pixels_are_those_of_the_main_command(hub, medsr, tmp_path):
    assert hub.run().returncode == 0
    assert medsr("upscale", tmp_path / SERIES, "-o", tmp_path / "alone", "-m", "bicubic", "-s", 2).code == 0
    alone = {pixels(path) for path in (tmp_path / "alone").iterdir()}
    assert alone <= {pixels(hub.output / name) for name in hub.delivered()}


def pixels(path: Path) -> tuple[tuple[float, ...], bytes]:
    ds = pydicom.dcmread(path)
    return tuple(map(float, ds.ImagePositionPatient)), np.ascontiguousarray(ds.pixel_array).tobytes()


# -- the container --------------------------------------------------------------------------------------------

CONTAINER = ROOT / "examples" / "container"


def entry_point(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The container's script, with a `medsr` on its path and a user without a home."""
    command = hub.folder / "bin" / "medsr"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m medsr_cli "$@"\n')
    command.chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(CONTAINER / "docker-entrypoint.sh"), *arguments],
        env={
            "PATH": f"{command.parent}:/usr/bin:/bin",
            "PYTHONPATH": surroundings()["PYTHONPATH"],
            "HOME": "/nonexistent",
            "MEDSR_HOME": str(hub.folder / "medsr"),
            "MERCURE_IN_DIR": str(hub.input),
            "MERCURE_OUT_DIR": str(hub.output),
            "MEDSR_OFFLINE": "1",
        },
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_entry_point_runs_the_module_as_the_hub_starts_it(hub):
    done = entry_point(hub)
    assert done.returncode == 0, done.stderr
    assert len(hub.delivered()) == 5
    assert entry_point(hub, "--set", "scale=none").returncode == 2
    # What mercure runs to find out whether an image is a MONAI package: it has to fail as the command itself does.
    assert entry_point(hub, "cat", "/etc/monai/app.json").returncode == 1
    assert entry_point(hub, "medsr", "--version").stdout.startswith("medsr ")


def test_the_containerfile_copies_what_is_there_and_runs_without_privileges():
    lines = (CONTAINER / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    copied = [word for name, rest in steps if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied if not word.startswith("--"))
    assert [name for name, _ in steps][-3:] == ["USER", "WORKDIR", "ENTRYPOINT"]
    assert dict(steps)["USER"] == "65534:65534"
    assert "docker-entrypoint.sh" in dict(steps)["ENTRYPOINT"]
    assert (CONTAINER / "docker-entrypoint.sh").stat().st_mode & 0o111


def test_the_readme_lists_every_setting_and_its_example_is_taken():
    from medsr_cli.tasks.module_settings import known_settings, settings_of

    text = (CONTAINER / "README.md").read_text()
    assert [name for name in known_settings() if f"`{name}`" not in text] == []
    example = "{" + text.partition("## mercure")[2].partition("mercure.json`:\n")[2].partition("\nThe rule's")[0] + "}"
    config = json.loads(example)
    settings_of({**config["modules"]["medsr"]["settings"], **config["rules"]["sharper_brains"]["processing_settings"]})
