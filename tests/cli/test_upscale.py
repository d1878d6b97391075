"""`medsr upscale` as a user meets it: results, streams, exit codes, and every bad input."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from tests.makers import anatomy, save_checkpoint, save_nifti


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith(".medsr")]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "scan.nii.gz")


def test_result_stands_beside_its_input_with_type_units_and_place(medsr, scan):
    checkpoint = save_checkpoint(scan.with_name("tiny.safetensors"))
    ended = medsr("upscale", scan, "-s", 2, "--weights", checkpoint)
    assert ended.code == 0, ended.err
    target = scan.with_name("scan_x2-rdst.nii.gz")
    assert ended.out == f"{target}\n"
    before, after = nib.load(scan), nib.load(target)
    assert after.shape == (80, 72, 6)
    assert after.get_data_dtype() == before.get_data_dtype()
    np.testing.assert_allclose(after.header.get_zooms(), (0.45, 0.4, 4.0), rtol=1e-6)
    np.testing.assert_allclose(after.affine @ [-0.5, -0.5, 0, 1], before.affine @ [-0.5, -0.5, 0, 1], atol=1e-5)
    shrunk = np.asarray(after.dataobj).reshape(40, 2, 36, 2, 6).mean(axis=(1, 3))
    assert np.corrcoef(shrunk.ravel(), np.asarray(before.dataobj).ravel())[0, 1] > 0.99
    assert not leftovers(scan.parent)


def test_report_tells_what_was_done(medsr, scan, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    report, preview = tmp_path / "r.json", tmp_path / "p.png"
    ended = medsr("upscale", scan, "-s", 2, "--weights", checkpoint, "--report", report, "--preview", preview)
    assert ended.code == 0, ended.err
    facts = json.loads(report.read_text())
    assert facts["model"]["scale"] == 2
    assert len(facts["model"]["sha256"]) == 64
    assert facts["input"]["shape"] == [40, 36, 6]
    assert facts["output"]["shape"] == [80, 72, 6]
    assert facts["intensity"]["minimum"] == 0
    assert facts["consistency"]["correlation"] > 0.98
    assert facts["timings_s"]["total"] > 0
    assert Image.open(preview).size == (2 * 80 + 8, 3 * 72 + 2 * 8) or Image.open(preview).width > 0


def test_json_lines_and_nothing_else_on_stdout(medsr, scan):
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--json")
    (line,) = ended.out.splitlines()
    facts = json.loads(line)
    assert facts["status"] == "done"
    assert facts["output"].endswith("scan_x2-bicubic.nii.gz")


def test_a_batch_goes_on_after_a_bad_file_and_ends_with_3(medsr, tmp_path):
    good, other = save_nifti(tmp_path / "a.nii.gz"), save_nifti(tmp_path / "c.nii.gz")
    bad = tmp_path / "b.nii.gz"
    bad.write_text("not an image")
    out = tmp_path / "out"
    ended = medsr("upscale", good, bad, other, "-o", out, "-m", "bicubic", "-s", 2, "--log-paths")
    assert ended.code == 3
    assert sorted(p.name for p in out.glob("[!.]*")) == ["a_x2-bicubic.nii.gz", "c_x2-bicubic.nii.gz"]
    assert "b.nii.gz" in ended.err
    assert len(ended.out.splitlines()) == 2


def test_a_batch_without_its_weights_or_device_ends_with_their_code(medsr, tmp_path):
    """Each input once failed by itself, and the batch ended with 3."""
    scans = [save_nifti(tmp_path / name) for name in ("a.nii.gz", "b.nii.gz")]
    out = tmp_path / "out"
    assert medsr("upscale", *scans, "-o", out, "-s", 2, "--weights", tmp_path / "none.safetensors").code == 5
    import torch

    if not torch.cuda.is_available():
        checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
        assert medsr("upscale", *scans, "-o", out, "-s", 2, "--weights", checkpoint, "-d", "cuda").code == 4


def test_skip_existing_does_what_is_missing(medsr, tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        save_nifti(tmp_path / name)
    first = tmp_path / "a_x2-bicubic.nii.gz"
    first.write_bytes(b"kept")
    ended = medsr("upscale", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", "-m", "bicubic", "-s", 2, "--skip-existing")
    assert ended.code == 0, ended.err
    assert first.read_bytes() == b"kept"
    assert (tmp_path / "b_x2-bicubic.nii.gz").exists()


def test_two_runs_give_equal_bytes(medsr, scan, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    for name in ("one", "two"):
        assert medsr("upscale", scan, "-s", 2, "--weights", checkpoint, "-o", tmp_path / f"{name}.nii.gz").code == 0
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_a_constant_slice_stays_constant_and_nan_stays_where_it_was(medsr, tmp_path):
    data = anatomy().astype(np.float32)
    data[..., 2] = 7
    data[:3, :, 4] = np.nan
    scan = save_nifti(tmp_path / "odd.nii.gz", data)
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2)
    assert ended.code == 0, ended.err
    assert "not numbers" in ended.err
    result = np.asarray(nib.load(tmp_path / "odd_x2-bicubic.nii.gz").dataobj)
    assert (result[..., 2] == 7).all()
    assert np.isnan(result[:6, :, 4]).all()
    assert np.isfinite(result[6:]).all()


def test_a_constant_volume_is_enlarged_without_the_network(medsr, tmp_path):
    scan = save_nifti(tmp_path / "flat.nii.gz", np.full((8, 8, 3), 5, np.int16))
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2)
    assert ended.code == 0, ended.err
    assert (np.asarray(nib.load(tmp_path / "flat_x2-bicubic.nii.gz").dataobj) == 5).all()


def test_one_pixel_is_an_image(medsr, tmp_path):
    Image.fromarray(np.array([[9]], np.uint8)).save(tmp_path / "dot.png")
    ended = medsr("upscale", tmp_path / "dot.png", "-m", "bicubic", "-s", 4)
    assert ended.code == 0, ended.err
    assert np.asarray(Image.open(tmp_path / "dot_x4-bicubic.png")).tolist() == [[9] * 4] * 4


def header_bytes(path: Path, **fields: object) -> Path:
    image = nib.Nifti1Image(anatomy(), np.diag([1.0, 1.0, 4.0, 1.0]))
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    offsets = {
        "pixdim1": (80, "<f"),
        "scl_slope": (112, "<f"),
        "dim1": (42, "<h"),
        "dim2": (44, "<h"),
        "srow_x": (280, "<4f"),
    }
    for name, value in fields.items():
        offset, kind = offsets[name]
        values = value if isinstance(value, tuple) else (value,)
        struct.pack_into(kind, raw, offset, *values)
    path.write_bytes(raw)
    return path


def bad_inputs(tmp_path: Path) -> dict[str, Path]:
    whole = gzip.compress(save_nifti(tmp_path / "whole.nii").read_bytes())
    files = {name: tmp_path / f"{name}.nii.gz" for name in ("missing", "empty", "text", "truncated")}
    files["empty"].write_bytes(b"")
    files["text"].write_text("I am not an image. " * 40)
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["nan-spacing"] = header_bytes(tmp_path / "nan_spacing.nii", pixdim1=float("nan"))
    files["zero-spacing"] = header_bytes(tmp_path / "zero_spacing.nii", pixdim1=0.0)
    files["nan-slope"] = header_bytes(tmp_path / "nan_slope.nii", scl_slope=float("nan"))
    files["singular"] = header_bytes(tmp_path / "singular.nii", srow_x=(0.0, 0.0, 0.0, 0.0))
    files["huge"] = header_bytes(tmp_path / "huge.nii", dim1=30000, dim2=30000)
    files["huge"].write_bytes(files["huge"].read_bytes()[:352])
    files["no-image"] = tmp_path / "folder"
    files["no-image"].mkdir()
    (files["no-image"] / "notes.txt").write_text("nothing here")
    return files


KINDS = [
    "missing", "empty", "text", "truncated", "nan-spacing", "zero-spacing",
    "nan-slope", "singular", "huge", "no-image",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_sentence_and_6(medsr, tmp_path, kind):
    path = bad_inputs(tmp_path)[kind]
    before = sorted(p.name for p in tmp_path.iterdir())
    started = time.monotonic()
    ended = medsr("upscale", path, "-m", "bicubic", "-s", 2)
    assert ended.code == 6, ended.err
    assert time.monotonic() - started < 5
    assert ended.out == ""
    (line,) = [text for text in ended.err.splitlines() if text.startswith("medsr:")]
    assert "Traceback" not in ended.err
    assert line.endswith((".", "?"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_dicom_folder_is_one_series_and_not_a_batch(medsr, tmp_path):
    """Found by looking: each file was once upscaled by itself, by its name."""
    examples = Path(__file__).resolve().parents[2] / "examples" / "dicom"
    ended = medsr("upscale", examples, "-m", "bicubic", "-s", 2, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path / 'out'}\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0001.dcm", "0002.dcm", "0003.dcm"]


def test_trees_are_mirrored_under_the_output(medsr, tmp_path):
    for name in ("a/scan.nii.gz", "b/scan.nii.gz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        save_nifti(tmp_path / "in" / name)
    ended = medsr("upscale", tmp_path / "in", "-r", "-m", "bicubic", "-s", 2, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.nii.gz"))
    assert found == ["a/scan_x2-bicubic.nii.gz", "b/scan_x2-bicubic.nii.gz"]


def test_every_series_of_a_study_that_suits_is_upscaled(medsr, shared, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(shared / "data" / "dicom" / "plain_small", study)
    shutil.copy(shared / "data" / "dicom" / "siemens_mosaic_rle" / "mosaic.dcm", study)
    ended = medsr("upscale", study, "-m", "bicubic", "-s", 2, "--report", "r.json", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(tmp_path / "out" / f"series-0{number}") for number in (1, 2)]
    # The third is listed with its reason, and its series is named by its number alone.
    assert "Series 3 is a Siemens mosaic" in ended.err
    assert "1.3.12" not in ended.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "series-01", "series-01.json", "series-02", "series-02.json"
    ]  # fmt: skip
    told = json.loads((tmp_path / "out" / "series-01.json").read_text())
    assert any("Siemens mosaic" in sentence for sentence in told["series"]["left"])


def test_one_series_of_a_study_that_fails_does_not_keep_the_others(medsr, shared, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(shared / "data" / "dicom" / "plain_small", study)
    first = tmp_path / "out" / "series-01"
    first.mkdir(parents=True)  # in the way
    ended = medsr("upscale", study, "-m", "bicubic", "-s", 2, "-o", tmp_path / "out")
    assert ended.code == 3
    assert ended.out.split() == [str(tmp_path / "out" / "series-02")]


def test_several_series_do_not_become_one_file(medsr, shared, tmp_path):
    folder = shared / "data" / "dicom" / "plain_small"
    ended = medsr("upscale", folder, "-m", "bicubic", "-s", 2, "-o", tmp_path / "out.nii.gz")
    assert ended.code == 2
    assert "--series" in ended.err
    assert not list(tmp_path.iterdir())


def test_one_of_two_series_is_chosen(medsr, shared, tmp_path):
    folder = shared / "data" / "dicom" / "plain_small"
    (listed,) = (json.loads(line) for line in medsr("inspect", folder, "--json").out.splitlines())
    uid = listed["stacks"][1]["series_instance_uid"]
    for number, series in enumerate((uid, "2", uid[-12:])):
        target = tmp_path / str(number)
        ended = medsr("upscale", folder, "-m", "bicubic", "-s", 2, "--series", series, "-o", target)
        assert ended.code == 0, ended.err
        assert [p.name for p in target.iterdir()] == ["0001.dcm"]


def test_existing_target_is_kept_unless_told(medsr, scan):
    target = scan.with_name("scan_x2-bicubic.nii.gz")
    target.write_bytes(b"mine")
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 2).code == 2
    assert target.read_bytes() == b"mine"
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 2, "--overwrite").code == 0
    assert nib.load(target).shape == (80, 72, 6)


def test_target_equal_to_source(medsr, scan):
    before = scan.read_bytes()
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2, "-o", scan, "--overwrite")
    assert ended.code == 2
    assert "never changed" in ended.err
    assert scan.read_bytes() == before


def test_a_scale_the_checkpoint_lacks(medsr, scan, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", scale=2)
    ended = medsr("upscale", scan, "-s", 3, "--weights", checkpoint)
    assert ended.code == 2
    assert "enlarges by 2" in ended.err


def test_a_device_that_is_not_there(medsr, scan, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    for name in ("cuda", "cuda:3", "gpu"):
        ended = medsr("upscale", scan, "-s", 2, "--weights", checkpoint, "-d", name)
        assert ended.code == 4, ended.err


def test_missing_weights_are_5(medsr, scan, tmp_path):
    assert medsr("upscale", scan, "-s", 2, "--weights", tmp_path / "none.safetensors").code == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_nothing(medsr, scan, monkeypatch, code):
    before = scan.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 2)
    assert ended.code == 1, ended.err
    assert [p.name for p in scan.parent.iterdir()] == [scan.name]
    assert scan.read_bytes() == before


def test_bad_arguments_are_2(medsr, scan):
    assert medsr("upscale", scan, "-m", "nonsense").code == 2
    assert medsr("upscale", scan, "--no-such-flag").code == 2
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 1).code == 2
    assert medsr("upscale", scan, "-m", "bicubic", "--tile", "small").code == 2
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 2, "-o", scan.with_name("x.xyz")).code == 2
    assert medsr("upscale").code in (2, 6)


def test_offline_opens_no_socket(medsr, scan, tmp_path, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    assert medsr("upscale", scan, "-s", 2, "--weights", checkpoint, "--offline").code == 0


def slow_run(scan: Path) -> subprocess.Popen[bytes]:
    """A run whose every slice takes a while, so that it can be stopped in the middle."""
    program = (
        "import sys, time\n"
        "from medsr_cli.engines.engine import Interpolation\n"
        "run = Interpolation.run\n"
        "def slow(self, planes, guide=None):\n"
        "    print('working', file=sys.stderr, flush=True); time.sleep(0.2); return run(self, planes)\n"
        "Interpolation.run = slow\n"
        "from medsr_cli.__main__ import main\n"
        f"sys.argv = ['medsr', 'upscale', {str(scan)!r}, '-m', 'bicubic', '-s', '2']\n"
        "main()\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_runs_leave_nothing_under_a_final_name(medsr, tmp_path, how, code):
    scan = save_nifti(tmp_path / "scan.nii.gz", anatomy((40, 36, 40)))
    process = slow_run(scan)
    assert process.stderr is not None
    process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(how)
    assert process.wait(timeout=20) == code
    target = tmp_path / "scan_x2-bicubic.nii.gz"
    assert not target.exists()
    if how is not signal.SIGKILL:
        assert not leftovers(tmp_path)
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 2).code == 0
    assert target.exists()
    assert not leftovers(tmp_path), "a later run sweeps what a killed one left"


def test_the_log_file_holds_the_traceback_and_the_terminal_does_not(medsr, tmp_path):
    bad = tmp_path / "text.nii.gz"
    bad.write_text("nothing")
    log = tmp_path / "run.log"
    ended = medsr("upscale", bad, "-m", "bicubic", "-s", 2, "--log-file", log)
    assert ended.code == 6
    assert "Traceback" not in ended.err
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(("modality", "told"), [("mr", "MR was assumed"), ("any", None)])
def test_a_checkpoint_for_any_modality_assumes_none(medsr, tmp_path, modality, told):
    checkpoint = save_checkpoint(tmp_path / "ours.safetensors", modality=modality)
    picture = tmp_path / "slice.png"
    Image.fromarray(np.add.outer(np.arange(24) * 5, np.arange(20) * 6).astype(np.uint8)).save(picture)
    done = medsr("upscale", picture, "-s", 2, "--weights", checkpoint, "-o", tmp_path / "out.png")
    assert done.code == 0, done.err
    assert ("was assumed" in done.err) is (told is not None)
    assert (told or "") in done.err


def tree_of(folder: Path, *names: str) -> Path:
    """Tiny volumes; each has values of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_nifti(folder / name, anatomy((8, 8, 2), seed=number))
    return folder


def results(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.nii.gz"))


BICUBIC = ("-m", "bicubic", "-s", 2)


def test_results_within_the_tree_are_not_inputs_of_the_next_run(medsr, tmp_path):
    tree = tree_of(tmp_path / "tree", "a.nii.gz", "sub/b.nii.gz")
    for _ in range(2):
        ended = medsr("upscale", tree, "--recursive", "-o", tree / "out", "--resume", *BICUBIC)
        assert ended.code == 0, ended.err
        assert results(tree / "out") == ["a_x2-bicubic.nii.gz", "sub/b_x2-bicubic.nii.gz"]
    save_nifti(tree / "a_x2-bicubic.nii.gz")
    assert medsr("upscale", tree, "-o", tmp_path / "elsewhere", *BICUBIC).code == 0
    assert results(tmp_path / "elsewhere") == ["a_x2-bicubic.nii.gz"], "nor are those that stand beside their inputs"


def test_a_list_of_find_holds_results_the_second_time(medsr, tmp_path, monkeypatch):
    tree = tree_of(tmp_path / "tree", "a.nii.gz", "sub/b.nii.gz")
    monkeypatch.chdir(tree)
    for where in ((), ("-o", "RESULTS")):
        for _ in range(2):
            listed = tmp_path / "list"
            listed.write_text("\n".join(str(p) for p in sorted(Path().rglob("*.nii.gz"))))
            ended = medsr("upscale", "--files-from", listed, "--skip-existing", *where, *BICUBIC)
            assert ended.code == 0, ended.err
    assert results(tree / "RESULTS") == ["a_x2-bicubic.nii.gz", "sub/b_x2-bicubic.nii.gz"]
    assert not list(tree.rglob("*bicubic_x2*"))


def test_a_list_leads_no_result_out_of_its_folder_and_takes_each_file_once(medsr, tmp_path, monkeypatch):
    tree_of(tmp_path, "here/a.nii.gz", "other/c.nii.gz")
    monkeypatch.chdir(tmp_path / "here")
    listed = tmp_path / "list"
    listed.write_text(f"../other/c.nii.gz\na.nii.gz\n../here/a.nii.gz\n{tmp_path}/here/a.nii.gz\n")
    ended = medsr("upscale", "--files-from", listed, "-o", "out/deep", *BICUBIC)
    assert ended.code == 0, ended.err
    assert results(tmp_path) == [
        "here/a.nii.gz",
        "here/out/deep/a_x2-bicubic.nii.gz",
        "here/out/deep/c_x2-bicubic.nii.gz",
        "other/c.nii.gz",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_a_tree_are_followed_but_nothing_is_done_twice(medsr, tmp_path):
    tree = tree_of(tmp_path / "tree", "a.nii.gz", "sub/b.nii.gz")
    tree_of(tmp_path / "far", "deep/c.nii.gz")
    (tree / "sub" / "loop").symlink_to("..")
    (tree / "alias").symlink_to("sub")
    (tree / "up").symlink_to(tmp_path)
    (tree / "far").symlink_to(tmp_path / "far")
    assert medsr("upscale", tree, "--recursive", "-o", tmp_path / "out", *BICUBIC).code == 0
    assert results(tmp_path / "out") == [
        "a_x2-bicubic.nii.gz",
        "far/deep/c_x2-bicubic.nii.gz",
        "sub/b_x2-bicubic.nii.gz",
    ]


def test_a_folder_that_cannot_be_looked_into_is_told(medsr, tmp_path, monkeypatch):
    tree = tree_of(tmp_path / "tree", "a.nii.gz", "locked/b.nii.gz")
    scandir = os.scandir

    def refusing(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    ended = medsr("upscale", tree, "--recursive", "-o", tmp_path / "out", "--json", *BICUBIC)
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert ended.code == 3
    assert [(Path(line["input"]).name, line["exit_code"]) for line in lines] == [("a.nii.gz", 0), ("locked", 6)]


@pytest.mark.parametrize("jobs", [0, 4])
def test_of_two_inputs_of_one_name_the_first_has_the_result_also_when_resumed(medsr, tmp_path, jobs):
    tree_of(tmp_path, "a/x.nii.gz", "b/x.nii.gz")
    save_nifti(tmp_path / "a" / "x.nii.gz", anatomy((64, 64, 8)))  # the slower one to open and measure
    for more in ((), ("--resume", "--overwrite")):
        ended = medsr(
            *("upscale", tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "x.nii.gz", "-o", tmp_path / "out", "--json"),
            *(*BICUBIC, "--jobs", jobs, *more),
        )
        assert ended.code == 3
        assert [json.loads(line)["exit_code"] for line in ended.out.splitlines()] == [0, 2]
        assert nib.load(tmp_path / "out" / "x_x2-bicubic.nii.gz").shape == (128, 128, 8)


def test_complaints_have_the_digits_of_the_line_of_their_own_input(medsr, tmp_path):
    """Files of many folders often have one name: a failure once was told with the digits of the next file."""
    odd = "odd\nname.nii.gz" if sys.platform != "win32" else "odd.nii.gz"
    tree = tree_of(tmp_path / "tree", "a/x.nii.gz", "b/x.nii.gz", "c/x.nii.gz", odd)
    (tree / "a" / "x.nii.gz").write_text("bad")
    (tree / "b" / "x.nii.gz").write_text("worse")
    for more in ((), ("--resume",)):
        ended = medsr("upscale", tree, "--recursive", "-o", tmp_path / "out", "--json", *BICUBIC, *more)
        lines = [json.loads(line) for line in ended.out.splitlines()]
        failed = [line["id"] for line in lines if line["exit_code"]]
        assert len(failed) == 2
        told = [line.split()[1].partition(".")[0] for line in ended.err.splitlines() if line.startswith("medsr: ")]
        assert told[:2] == failed
        assert all(line["id"] in line["error"] for line in lines if line["error"])
        if not more:
            begun = {line.split()[-1].partition(".")[0] for line in ended.err.splitlines() if line.startswith("[")}
            assert begun == {line["id"] for line in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_the_terminal_cannot_show_stops_no_batch(tmp_path):
    names = [tmp_path / os.fsdecode(b"bad\xff.nii.gz"), tmp_path / "ok.nii.gz"]
    for name in names:
        save_nifti(tmp_path / "made.nii.gz", anatomy((8, 8, 2))).rename(name)
    call = [sys.executable, "-m", "medsr_cli", "upscale", *map(str, names), "-o", str(tmp_path / "out"), "-q"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*call, "-m", "bicubic", "-s", "2"],
            stdout=subprocess.PIPE,
            stderr=full,  # nor does a full disk under the job's log
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            check=False,
        )
    assert ended.returncode == 0
    assert [line.rpartition(b"/")[2] for line in ended.stdout.splitlines()] == [
        b"bad\xff_x2-bicubic.nii.gz",
        b"ok_x2-bicubic.nii.gz",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of POSIX")
def test_closed_streams_stop_no_run_and_are_nobody_elses(tmp_path):
    scan = save_nifti(tmp_path / "scan.nii.gz", anatomy((8, 8, 2)))
    call = f'exec "{sys.executable}" -m medsr_cli upscale "{scan}" -m bicubic -s 2 >&- 2>&-'
    assert subprocess.run(["sh", "-c", call], check=False).returncode == 0
    assert nib.load(tmp_path / "scan_x2-bicubic.nii.gz").shape == (16, 16, 2)


@pytest.mark.parametrize(
    "wrong",
    [("--axis", "q"), ("--precision", "fp99"), ("-d", "toaster"), ("--suffix", "a/b"), ("-o", "out.nii.gz"), ()],
)
def test_what_every_input_would_fail_by_is_told_once(medsr, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tree_of(tmp_path, "tree/a.nii.gz", "tree/b.nii.gz"))
    ended = medsr("upscale", *(["tree"] if wrong else []), *wrong, "-m", "bicubic")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""


def test_a_study_that_lost_files_is_made_again_and_has_a_line_for_each_series(medsr, tmp_path):
    from tests.formats.dicom_makers import header, place
    from tests.formats.dicom_makers import save as save_dicom

    pixels = anatomy((16, 16, 3)).astype(np.uint16)
    for number in (1, 2, 3):
        for at in range(3):
            ds = header(rows=16, columns=16, series=f"1.2.{number}", number=at + 1)
            ds.SeriesNumber = number
            place(ds, (0.0, 0.0, 3.0 * at), (1, 0, 0, 0, 1, 0))
            save_dicom(ds, tmp_path / "tree" / "study" / f"{number}-{at}.dcm", pixels[..., at])
    out = tmp_path / "out"

    def run() -> list[tuple[str, str, str]]:
        ended = medsr("upscale", tmp_path / "tree", "--recursive", "-o", out, "--resume", "--json", *BICUBIC)
        assert ended.code == 0, ended.err
        lines = [json.loads(line) for line in ended.out.splitlines()]
        return [(line["status"], line["series"], Path(line["output"]).name) for line in lines]

    each = [("1", "series-01"), ("2", "series-02"), ("3", "series-03")]
    assert run() == [("done", *one) for one in each]
    assert run() == [("skipped", *one) for one in each]
    next((out / "study_x2-bicubic" / "series-02").iterdir()).unlink()
    assert run() == [("done", *one) for one in each]
    shutil.rmtree(out / "study_x2-bicubic" / "series-03")
    assert run() == [("done", *one) for one in each]


def test_a_dicom_header_tells_what_was_done_beside_the_network(medsr, tmp_path):
    from tests.formats.dicom_makers import series

    series(tmp_path / "in", 2)
    ended = medsr("upscale", tmp_path / "in", "-m", "bicubic", "-s", 2, "--tta", "--back-projection", 3, "--log-paths")
    assert ended.code == 0, ended.err
    said = pydicom.dcmread(sorted(Path(ended.out.strip()).iterdir())[0]).DerivationDescription
    assert "Mean of eight orientations." in said
    assert "Corrected 3 times by its own difference from the source." in said
