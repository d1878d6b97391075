"""No name and no tag in what batches, the hub's module and a cluster write beside their results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pydicom
import pytest

from tests.hostile import test_phi
from tests.hostile.test_phi import Scene, none_leaked, read

scene, fresh = test_phi.scene, test_phi.fresh


def test_lists_and_records_hold_no_names(scene: Scene):
    listed = scene.home / "Qzdf list.txt"
    missing = scene.home / "Qzdi gone.nii.gz"
    listed.write_text(
        "".join(f"{path}\n" for path in (scene.nifti, scene.damaged, missing, scene.series, scene.archive))
    )
    out = scene.plain / "listed"
    common = ("upscale", "--files-from", listed, "-m", "bicubic", "-s", 2, "-o", out, "-v", "--debug")
    record = {"record": out / ".medsr-batch.jsonl"}
    assert scene.run(*common, "--jobs", 2, reports=record) == 3
    assert scene.run(*common, "--resume", "--json", reports=record) == 3
    assert scene.run(*common, "--resume", "--retry-failed", "--fail-fast", reports=record) in (3, 6)
    assert scene.run(*common, "--resume", "-s", 3, reports=record) == 2
    assert len(read(record["record"]).splitlines()) > 8
    none_leaked(scene)


def test_a_study_and_its_reports_hold_no_names(scene: Scene):
    study = scene.home / "Qzdb study"
    shutil.copytree(scene.series, study)
    for at, path in enumerate(sorted(study.iterdir())[:2]):
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.826.77.90003.1", f"1.2.826.77.90004.9{at}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(study / f"Qzdb{at}.dcm")
    out = scene.plain / "study"
    common = (
        "upscale",
        study,
        "-m",
        "bicubic",
        "-s",
        2,
        "-o",
        out,
        "--report",
        "r.json",
        "--stable-uids",
        "-v",
        "--debug",
    )
    assert scene.run(*common, reports={}) == 0
    assert scene.run(*common, "--skip-existing", "--json") == 0
    scene.look("reports", {path.name: read(path) for path in out.glob("*.json")})
    assert list(out.glob("*.json"))
    assert scene.run("inspect", study, "--debug") == 0
    none_leaked(scene)


def test_a_hubs_module_holds_no_names(scene: Scene):
    source, target = scene.home / "Qzdb in", scene.plain / "out"
    shutil.copytree(scene.series, source)
    shutil.copy(scene.damaged, source / "Qzdh broken.dcm")
    right, wrong = '{"model": "bicubic", "scale": 2}', '{"nonsense": "Qzcj"}'
    for settings in (right, wrong):
        (source / "task.json").write_text(f'{{"process": {{"settings": {settings}}}}}')
        shutil.rmtree(target, ignore_errors=True)
        scene.run(
            "module", "--in", source, "--out", target, "-v", "--debug", reports={"result": target / "result.json"}
        )
    none_leaked(scene)


def test_workers_of_a_cluster_say_no_names(scene: Scene):
    pytest.importorskip("distributed")
    where = scene.plain / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])}
    processes = []

    def start(name: str, *words: str) -> None:
        with (scene.plain / f"{name}.txt").open("wb") as said:
            command = [
                sys.executable,
                "-m",
                "distributed.cli.dask_" + words[0],
                *words[1:],
                "--scheduler-file",
                str(where),
            ]
            processes.append(
                subprocess.Popen(
                    [*command, "--no-dashboard"], stdout=said, stderr=said, env=environment, cwd=scene.plain
                )
            )

    start("scheduler", "scheduler", "--port", "0", "--host", "127.0.0.1")
    try:
        until = time.monotonic() + 30
        while not where.exists() and time.monotonic() < until:
            time.sleep(0.1)
        start(
            "worker", "worker", "--nthreads", "1", "--host", "127.0.0.1", "--local-directory", str(scene.plain / "dask")
        )
        missing = scene.home / "Qzdi gone.nii.gz"
        inputs = (scene.nifti, scene.other, scene.damaged, missing, scene.series)
        out = scene.plain / "spread"
        code = scene.run(
            "upscale", *inputs, "-m", "bicubic", "-s", 2, "-o", out, "--dask", where, "-v", "--debug",
            reports={"record": out / ".medsr-batch.jsonl"},
        )  # fmt: skip
        assert code == 3
        assert len(list(out.rglob("*_x2-bicubic*"))) >= 3
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)
    scene.look("cluster", {name: read(scene.plain / f"{name}.txt") for name in ("scheduler", "worker")})
    none_leaked(scene)
