"""Evaluation against figures that are computed here by other libraries, not by the product's own path."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medsr_cli import formats
from medsr_cli.engines.engine import Interpolation
from medsr_cli.engines.wrapped import Colours, Realigned
from medsr_cli.errors import ArgumentsError, InputRefused, WeightsError, unmarked
from medsr_cli.evaluation.page import page_html
from medsr_cli.evaluation.protocols import PROTOCOLS
from medsr_cli.evaluation.results import Results, Row, csv_text, json_text
from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.seg_unet import SegUnet, SegUnetConfig
from medsr_cli.provenance.discretion import begin, discreet_text, id_of
from medsr_cli.tasks.evaluate import EvaluateRequest, evaluate
from medsr_cli.tasks.evaluation_inputs import Choice, Opened, images_of, other_slices
from medsr_cli.tasks.evaluation_models import contenders_of, for_first_centres
from medsr_cli.tasks.evaluation_page import page_of
from medsr_cli.tasks.evaluation_protocol import protocol_for, scales_for
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.training.companions import Rules, attach
from medsr_cli.training.gather import find_tree
from medsr_cli.volume.intensity import IntensityRange
from tests.makers import almost_nearest, anatomy, save_checkpoint, save_nifti

SHAPE = (60, 52, 3)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two subjects with an image each."""
    for at, subject in enumerate(("one", "two")):
        (tmp_path / "data" / subject).mkdir(parents=True)
        save_nifti(tmp_path / "data" / subject / "T2.nii.gz", anatomy(SHAPE, seed=at))
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "tiny.safetensors", scale=2)


def request(tree: Path, models: str, scale: float | None = 2.0, **more: object) -> EvaluateRequest:
    choice = more.pop("choice", Choice(tree))
    return EvaluateRequest(choice, models, scales=() if scale is None else (scale,), **more)


def by_torch(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The cubic of a = -0.75 at half-pixel centres, edges repeated, by PyTorch."""
    given = torch.from_numpy(image)[None, None]
    return torch.nn.functional.interpolate(given, size=size, mode="bicubic", align_corners=False)[0, 0].numpy()


def expected(path: Path, scale: int, network: torch.nn.Module) -> list[dict[str, tuple[float, float]]]:
    """PSNR and SSIM of bicubic and of a network, for each slice, from nothing but torch, numpy and scikit-image."""
    data = np.asarray(nib.load(path).dataobj, np.float64)
    unit = (data - data.min()) / (data.max() - data.min())
    found = []
    for z in range(data.shape[2]):
        high = unit[..., z].T  # rows along y
        rows, columns = (n // scale * scale for n in high.shape)
        high = high[:rows, :columns]
        low = by_torch(high, (rows // scale, columns // scale))
        with torch.no_grad():
            made = network(torch.from_numpy(low).float()[None, None])[0, 0].double().numpy()
        scores = {}
        for name, image in (("bicubic", by_torch(low, (rows, columns))), ("tiny", made)):
            pair = [i[scale:-scale, scale:-scale] for i in (high, image)]
            scores[name] = (
                peak_signal_noise_ratio(*pair, data_range=1),
                structural_similarity(*pair, win_size=7, data_range=1),
            )
        found.append(scores)
    return found


def test_figures_are_those_that_other_libraries_compute(tree, checkpoint):
    done = evaluate(request(tree, f"rdst={checkpoint}"))
    net = almost_nearest(2)
    assert done.results.models == ["bicubic", "rdst"]
    rows = {(row.volume, row.slice, row.model): row for row in done.results.rows}
    assert len(rows) == 2 * 3 * 2
    for volume in ("one/T2.nii.gz", "two/T2.nii.gz"):
        for number, scores in enumerate(expected(tree / volume, 2, net), start=1):
            for model, own in (("bicubic", "bicubic"), ("rdst", "tiny")):
                row = rows[volume, number, model]
                assert row.values["psnr"] == pytest.approx(scores[own][0], abs=2e-3)
                assert row.values["ssim"] == pytest.approx(scores[own][1], abs=2e-5)


def test_summaries_volumes_and_subjects_are_means_of_the_rows(tree, checkpoint):
    done = evaluate(request(tree, f"rdst={checkpoint}"))
    own = [row for row in done.results.rows if row.model == "rdst"]
    psnr = [row.values["psnr"] for row in own]
    summary = next(s for s in done.results.summaries() if (s.model, s.metric) == ("rdst", "psnr"))
    assert summary.over.mean == pytest.approx(np.mean(psnr))
    assert summary.over.deviation == pytest.approx(np.std(psnr, ddof=1))
    assert (summary.over.slices, summary.over.subjects) == (6, 2)
    assert summary.over.interval.low <= summary.over.mean <= summary.over.interval.high
    bicubic = [row.values["psnr"] for row in done.results.rows if row.model == "bicubic"]
    assert summary.gain == pytest.approx(np.mean(psnr) - np.mean(bicubic))
    volume = next(r for r in done.results.volumes() if r["model"] == "rdst" and r["subject"] == "two")
    assert volume["psnr"] == pytest.approx(np.mean([r.values["psnr"] for r in own if r.subject == "two"]))
    assert {r["subject"] for r in done.results.subjects()} == {"one", "two"}


def test_a_volume_that_is_worse_than_by_bicubic_is_named(tree, checkpoint):
    done = evaluate(request(tree, f"rdst={checkpoint}"))
    gains = {r["volume"]: r["psnr"] for r in done.results.volumes() if r["model"] == "rdst"}
    for record in done.results.volumes():
        if record["model"] == "bicubic":
            gains[record["volume"]] -= record["psnr"]
    worse = done.results.worse_than_baseline()
    assert sorted(one.volume for one in worse) == sorted(name for name, gain in gains.items() if gain < 0)
    assert worse, "a network that repeats pixels is worse than bicubic here"
    assert all(one.volume in one.sentence() and "bicubic" in one.sentence() for one in worse)


def test_the_same_seed_gives_the_same_report(tree, checkpoint):
    first, again = (evaluate(request(tree, f"rdst={checkpoint}", seed=3)).report() for _ in range(2))
    for report in (first, again):
        report.pop("date")
    assert json_text(first) == json_text(again)
    other = evaluate(request(tree, f"rdst={checkpoint}", seed=4)).report()
    assert other["slices"] == first["slices"]
    assert first["models"][1]["sha256"]


def test_csv_and_json_say_the_same(tree, checkpoint):
    done = evaluate(request(tree, f"rdst={checkpoint},lanczos"))
    lines = list(csv.DictReader(io.StringIO(discreet_text(csv_text(done.results)))))
    slices = json.loads(json_text(done.report()))["slices"]
    assert len(lines) == len(slices) == 2 * 3 * 3
    for line, record in zip(lines, slices, strict=True):
        assert (line["volume"], int(line["slice"]), line["model"]) == (
            record["volume"], record["slice"], record["model"],
        )  # fmt: skip
        assert float(line["psnr"]) == record["psnr"]


def test_what_is_not_a_number_is_null_in_json_and_empty_in_csv():
    results = Results(("psnr",), [Row("a", "a/1", 1, {"psnr": math.nan}, "bicubic", 2.0)])
    assert csv_text(results).splitlines()[1].endswith(",bicubic,")
    assert json.loads(json_text({"x": [math.inf, np.float64(2), np.int64(3)]})) == {"x": [None, 2.0, 3]}


def test_several_scales_have_a_mean_over_them(tree):
    done = evaluate(EvaluateRequest(Choice(tree), "bicubic,lanczos", scales=(2.0, 1.5), protocol="miassr"))
    assert done.results.scales == [1.5, 2.0]
    every = {(s.scale, s.model, s.metric): s.over.mean for s in done.results.summaries()}
    for model in ("bicubic", "lanczos"):
        mean = (every[1.5, model, "psnr"] + every[2.0, model, "psnr"]) / 2
        assert every[None, model, "psnr"] == pytest.approx(mean)


def test_protocol_and_scales_follow_the_method(tree):
    def named(text: str) -> list:
        return contenders_of(text, None, ModelRequest(), shuffle_guides=False)

    assert protocol_for(named("miassr"), None) == ("miassr", "")
    assert protocol_for(named("bicubic"), None) == ("rdst", "")
    assert protocol_for(named("rdst-e-x4-brain-mr"), None)[0] == "rdst"
    name, remark = protocol_for(named("m2trans,rdst"), None)
    assert name == "m2trans"
    assert "rdst" in remark
    assert protocol_for(named("m2trans,rdst"), "cohft") == ("cohft", "")
    assert scales_for(named("miassr"), PROTOCOLS["miassr"], ()) == (1.5, 2, 2.5, 3, 3.5, 4)
    assert scales_for(named("miassr,rdst"), PROTOCOLS["miassr"], ()) == (4,)
    assert scales_for(named("rdst"), PROTOCOLS["rdst"], (4.0, 2.0)) == (2, 4)
    with pytest.raises(ArgumentsError, match="whole"):
        scales_for(named("rdst"), PROTOCOLS["rdst"], (2.5,))
    with pytest.raises(ArgumentsError, match="protocol"):
        protocol_for(named("rdst"), "nobody")


def test_models_are_told_apart(tmp_path):
    a, b = (save_checkpoint(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    found = contenders_of(f"rdst={a},rdst={b}", None, ModelRequest(), shuffle_guides=False)
    assert [unmarked(one.label) for one in found] == ["bicubic", "a", "b"]
    for text, weights in (("rdst,rdst", None), ("rdst,miassr", "x"), (",", None), ("rdst=", None), ("bicubic", "x")):
        with pytest.raises(ArgumentsError):
            contenders_of(text, weights, ModelRequest(), shuffle_guides=False)
    with pytest.raises(ArgumentsError, match="guide"):
        contenders_of("rdst", None, ModelRequest(), shuffle_guides=True)


def test_a_checkpoint_called_bicubic_is_not_replaced_by_bicubic(tree, tmp_path):
    a, b = (save_checkpoint(tmp_path / name) for name in ("bicubic.safetensors", "b.safetensors"))
    text = f"rdst={a},rdst={b}"
    found = contenders_of(text, None, ModelRequest(), shuffle_guides=False)
    assert [(unmarked(one.label), one.is_baseline) for one in found] == [
        ("bicubic", True),
        ("bicubic (rdst)", False),
        ("b", False),
    ]
    done = evaluate(request(tree, text, slices=1))
    assert list(map(unmarked, done.results.models)) == ["bicubic", "bicubic (rdst)", "b"]
    psnr = {unmarked(row.model): row.values["psnr"] for row in done.results.rows if row.subject == "one"}
    assert psnr["bicubic (rdst)"] == psnr["b"] != psnr["bicubic"]
    for wrong in (f"bicubic={a}", f"lanczos={a}"):
        with pytest.raises(ArgumentsError, match="no weights"):
            contenders_of(wrong, None, ModelRequest(), shuffle_guides=False)


def test_one_bad_file_does_not_stop_the_others(tree):
    (tree / "two" / "broken.nii.gz").write_bytes(b"nothing")
    done = evaluate(request(tree, "bicubic"))
    assert [name for name, _ in done.failed] == ["two/broken.nii.gz"]
    assert {row.subject for row in done.results.rows} == {"one", "two"}
    assert done.report()["failed"][0]["image"] == f"{id_of(tree / 'two' / 'broken.nii.gz')}.nii.gz"
    begin(shown=True)
    assert done.report()["failed"][0]["image"] == "two/broken.nii.gz"
    begin()


def test_nothing_usable_is_refused(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"nothing")
    save_nifti(tmp_path / "flat.nii.gz", np.full((40, 40, 2), 7, np.int16))
    save_nifti(tmp_path / "small.nii.gz", anatomy((12, 12, 2)))
    with pytest.raises(InputRefused, match="None of the 3"):
        evaluate(request(tmp_path, "bicubic"))
    with pytest.raises(InputRefused, match="no folder"):
        evaluate(request(tmp_path / "nowhere", "bicubic"))
    with pytest.raises(InputRefused, match="No image"):
        evaluate(request(tmp_path, "bicubic", choice=Choice(tmp_path, include=("nothing*",))))


def test_what_a_person_would_leave_out_is_left_out(tree):
    save_nifti(tree / "one" / "T2_mask.nii.gz", (anatomy(SHAPE) > 900).astype(np.int16))
    empty = anatomy(SHAPE)
    empty[..., 1] = 0
    save_nifti(tree / "one" / "T1.nii.gz", empty)
    done = evaluate(request(tree, "bicubic", choice=Choice(tree, subjects=("one",))))
    assert any("mask" in sentence for sentence in done.left_out)
    assert {row.volume for row in done.results.rows} == {"one/T1.nii.gz", "one/T2.nii.gz"}
    assert {row.slice for row in done.results.rows if row.volume == "one/T1.nii.gz"} == {1, 3}
    few = evaluate(request(tree, "bicubic", choice=Choice(tree, subjects=("two",)), slices=2))
    assert [row.slice for row in few.results.rows] == [1, 3]


def test_missing_weights_stop_everything(tree):
    with pytest.raises(WeightsError):
        evaluate(request(tree, "rdst", 4.0, weights="rdst-x4-oasis-e1"))
    with pytest.raises(WeightsError, match="weights pull"):
        evaluate(request(tree, "bicubic", fid=True))
    with pytest.raises(ArgumentsError, match="--guide-name"):
        evaluate(request(tree, "cohft"))


def test_eight_bit_colour_by_the_ultrasound_protocol(tmp_path):
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:66, :70] / 10
    data = 120 + 80 * np.sin(rows[..., None] + columns[..., None] * [1, 0.5, 2]) + rng.normal(0, 3, (66, 70, 3))
    pixels = np.clip(data, 20, 230).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "us.png")
    done = evaluate(EvaluateRequest(Choice(tmp_path), "bicubic", scales=(2.0,), protocol="m2trans"))
    row = done.results.rows[0]
    # The luma's PSNR by hand, of slices that are divided by 255 and not by their own range.
    high = np.moveaxis(pixels / 255.0, -1, 0)
    protocol = PROTOCOLS["m2trans"]
    cubic = protocol.bicubic(protocol.degrade(high, (33, 35)), (66, 70))
    weights = np.array([65.481, 128.553, 24.966])
    error = np.tensordot(weights, cubic - high, 1)[2:-2, 2:-2]
    assert row.values["psnr_y"] == pytest.approx(10 * np.log10(255**2 / np.mean(error**2)), abs=1e-3)
    assert set(row.values) == set(protocol.metrics)


def test_chunks_are_measured_as_one(tree):
    done = evaluate(EvaluateRequest(Choice(tree), "bicubic", scales=(2.0,), protocol="cohft-released"))
    # Three slices of each volume are one chunk, and a row.
    assert [(row.subject, row.slice) for row in done.results.rows] == [("one", 1), ("two", 1)]
    data = np.moveaxis(np.asarray(nib.load(tree / "one" / "T2.nii.gz").dataobj, np.float64), 2, 0).swapaxes(1, 2)
    volume = [image[None] for image in (data - data.min()) / np.ptp(data)]
    protocol = PROTOCOLS["cohft-released"]
    pairs = protocol.pairs(volume, 2)
    made = np.stack([protocol.enlarge(low.astype(np.float64), target.shape[-2:]) for low, target in pairs])
    error = np.mean((made - np.stack([target for _, target in pairs])) ** 2)
    assert done.results.rows[0].values["psnr_cohft"] == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_engines_for_pairs_that_share_first_centres():
    plane = anatomy((24, 20, 1))[None, None, ..., 0] / 2000
    cubic = Interpolation("cubic", (2.0, 2.0))
    protocol = PROTOCOLS["cohft-released"]
    moved = for_first_centres(Colours(cubic)).run(plane).planes
    np.testing.assert_allclose(moved, protocol.enlarge(plane, (48, 40)), atol=1e-9)
    # Where `upscale` moves the input of such a checkpoint by itself, that move goes.
    stripped = for_first_centres(Colours(Realigned(cubic))).run(plane).planes
    np.testing.assert_allclose(stripped, cubic.run(plane).planes, atol=1e-12)


def test_dice_of_a_segmentation_against_the_mask(tree, tmp_path, checkpoint):
    torch.manual_seed(0)
    net = SegUnet(SegUnetConfig(in_channels=1, classes=2, width=4, decoder="8,8,8,4,4")).eval()
    path = tmp_path / "seg.safetensors"
    path.write_bytes(save_network(net, {}))
    mask = (anatomy(SHAPE, seed=0) > 900).astype(np.int16)
    save_nifti(tree / "one" / "T2_mask.nii.gz", mask)
    done = evaluate(request(tree, f"rdst={checkpoint}", segmentation=str(path), choice=Choice(tree, subjects=("one",))))
    data = np.asarray(nib.load(tree / "one" / "T2.nii.gz").dataobj, np.float64)
    unit = (data - data.min()) / np.ptp(data)
    for row in done.results.rows:
        if row.model != "bicubic":
            continue
        high = unit[..., row.slice - 1].T
        result = by_torch(by_torch(high, (26, 30)), (52, 60))[2:-2, 2:-2]
        with torch.no_grad():
            found = net(torch.from_numpy(result).float()[None, None])[0].argmax(0).numpy()
        truth = mask[..., row.slice - 1].T[2:-2, 2:-2]
        overlap = 2 * np.sum((found == 1) & (truth == 1)) / (np.sum(found == 1) + np.sum(truth == 1))
        assert row.values["dice"] == pytest.approx(overlap, abs=2e-3)
    assert done.results.metrics == ("psnr", "ssim", "dice")


class Brightness(torch.nn.Module):
    """Stands for Inception: five figures of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(features=5)
        self.weight = torch.nn.Parameter(torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images, self.weight).square().mean(dim=(2, 3))


def test_fid_is_of_each_subject_without_the_border(tree, monkeypatch):
    net = Brightness()
    monkeypatch.setattr("medsr_cli.tasks.evaluation_extras.inception_network", lambda request: net)
    (tree / "two" / "broken.nii.gz").write_bytes(b"nothing")
    done = evaluate(request(tree, "bicubic", fid=True))
    found = {row.subject: row.values["fid"] for row in done.results.of_subjects}
    assert set(found) == {"one", "two"}
    data = np.asarray(nib.load(tree / "one" / "T2.nii.gz").dataobj, np.float64)
    high = np.moveaxis((data - data.min()) / np.ptp(data), 2, 0).swapaxes(1, 2)
    made = [by_torch(by_torch(image, (26, 30)), (52, 60)) for image in high]
    sets = []
    for images in (made, high):
        inner = torch.from_numpy(np.stack([np.clip(image[2:-2, 2:-2], 0, 1) for image in images])).float()
        sets.append(net(inner[:, None].expand(-1, 3, -1, -1)).detach().double().numpy())
    means = np.sum((sets[0].mean(0) - sets[1].mean(0)) ** 2)
    a, b = (np.cov(s, rowvar=False) for s in sets)
    distance = means + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real)
    assert found["one"] == pytest.approx(distance, rel=1e-2)
    summary = next(s for s in done.results.summaries() if s.metric == "fid")
    assert summary.over.mean == pytest.approx(np.mean(list(found.values())))


def test_guides_and_masks_are_those_that_finetune_finds(tree):
    for name in ("T1_in_T2", "T1", "T1_in_T2_b", "PD"):
        save_nifti(tree / "one" / f"{name}.nii.gz", anatomy(SHAPE, seed=5))
    save_nifti(tree / "two" / "T1.nii.gz", anatomy(SHAPE, seed=6))
    save_nifti(tree / "two" / "lesion_mask.nii.gz", (anatomy(SHAPE) > 900).astype(np.int16))
    asked = Choice(tree, guides=("T1*",))
    chosen = images_of(asked, guided=True, labels=True)
    assert {image.name: image.guide.name for image in chosen.images} == {
        "one/T2.nii.gz": "one/T1_in_T2.nii.gz",
        "two/T2.nii.gz": "two/T1.nii.gz",
    }
    assert [image.labels and image.labels.path.name for image in chosen.images] == [None, "lesion_mask.nii.gz"]
    assert "one/T1_in_T2.nii.gz guides one/T2.nii.gz." in map(unmarked, chosen.notes)
    tree_found = find_tree(tree, formats.is_image_name)
    attached = attach(tree_found, Rules(guided=True, guides=("T1*",)), lambda image: formats.open_image(image.path))
    assert (chosen.images, chosen.notes, chosen.left_out) == (attached.images, attached.notes, attached.skipped)
    # Guides need not be included; a target on another grid than every guide says so, and nothing is left out twice.
    (tree / "one" / "T1_in_T2.nii.gz").unlink()
    save_nifti(tree / "one" / "T1.nii.gz", anatomy((58, 52, 3), seed=5))
    some = images_of(Choice(tree, include=("T2*",), guides=("T1*",)), guided=True)
    assert [image.name for image in some.images] == ["one/T2.nii.gz", "two/T2.nii.gz"]
    assert list(some.unguided) == ["one/T2.nii.gz"]
    assert "52 x 58 x 3 voxels" in some.unguided["one/T2.nii.gz"]
    assert list(map(unmarked, some.left_out)) == [
        "two/lesion_mask.nii.gz was left out: by its name it is a mask or a label map."
    ]


def test_a_mask_belongs_to_its_own_image_though_another_is_measured(tmp_path):
    for name in ("0059.png", "0060.png", "0060_lv_mask.png"):
        Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(tmp_path / name)
    for name, mask in (("0059", None), ("0060", "0060_lv_mask.png")):
        (image,) = images_of(Choice(tmp_path, include=(f"{name}.png",)), labels=True).images
        assert (image.labels.path.name if image.labels else None) == mask


def test_sessions_of_one_person_are_one_subject_and_can_be_chosen(tree):
    for session in (1, 2):
        (tree / f"p3_s{session}").mkdir()
        save_nifti(tree / f"p3_s{session}" / "T2.nii.gz", anatomy(SHAPE, seed=session))
    chosen = images_of(Choice(tree))
    assert [image.subject for image in chosen.images] == ["one", "p3", "p3", "two"]
    assert list(map(unmarked, chosen.notes)) == ["p3_s1 and p3_s2 are taken as one subject."]
    for pattern, count in (("p3", 2), ("p3_s2", 1), ("*", 4)):
        assert len(images_of(Choice(tree, subjects=(pattern,))).images) == count


def test_shuffled_guides_are_of_other_slices():
    opened = Opened("x", "x", None, IntensityRange(0, 1), [0, 2, 3, 7, 8])
    others = other_slices(opened, [0, 3, 8])
    assert all(own != other and other in opened.usable for own, other in others.items())
    assert others == {0: 3, 3: 8, 8: 2}
    assert other_slices(Opened("x", "x", None, IntensityRange(0, 1), [4]), [4]) == {}


def test_the_page_shows_the_table_and_a_few_slices(tree, checkpoint):
    done = evaluate(request(tree, f"rdst={checkpoint}"))
    page = page_of(done)
    assert len(page.comparisons) <= 5
    assert page.comparisons[0].images[-1].pixels.shape == (52, 60)
    # In the file's own units, and the first row of a NIfTI at the bottom.
    data = np.asarray(nib.load(tree / "one" / "T2.nii.gz").dataobj, np.float64)
    np.testing.assert_allclose(page.comparisons[0].images[-1].pixels, data[..., 1].T[::-1], atol=1e-3)
    html = page_html(page)
    assert "worse by rdst than by bicubic" in html
    assert "one/T2.nii.gz" not in html
    assert f"{id_of(tree / 'one' / 'T2.nii.gz')}.nii.gz" in html
    begin(shown=True)
    assert "one/T2.nii.gz" in page_html(page_of(done))
    begin()


def test_pairs_and_masks_of_the_shared_data():
    shared = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "val"
    if not shared.is_dir():
        pytest.skip("the shared data is not there")
    brains = images_of(Choice(shared / "brain_mr", guides=("T1*",)), guided=True, labels=True)
    assert {image.name: image.guide.name for image in brains.images if image.name not in brains.unguided} == {
        "ms_long_p04_s1/T2W.nii.gz": "ms_long_p04_s1/T1W_in_T2W.nii.gz",
        "ms_mni_p19/FLAIR.nii.gz": "ms_mni_p19/T1.nii.gz",
        "ms_mni_p19/T2.nii.gz": "ms_mni_p19/T1.nii.gz",
    }
    assert list(brains.unguided) == ["ms_long_p04_s1/FLAIR.nii.gz"]
    assert {image.name for image in brains.images if image.labels} == {
        "ms_mni_p19/FLAIR.nii.gz",
        "ms_mni_p19/T2.nii.gz",
    }
    hearts = images_of(Choice(shared / "cardiac_mr", subjects=("SC-HYP-10",)), labels=True)
    assert hearts.left_out == []
    assert len(hearts.images) == 12
    assert all(image.labels.name == image.name.replace(".png", "_lv_mask.png") for image in hearts.images)
