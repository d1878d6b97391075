"""Every method through the whole command: files in, larger files out, in the right place."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medsr_cli.networks.checkpoint import save_network
from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.networks.msgan import MsGan, MsGanConfig
from medsr_cli.networks.msgan_detector import LesionDetector, LesionDetectorConfig
from medsr_cli.volume.resample import resize
from tests.makers import almost_nearest, anatomy, fit_last, save_checkpoint, save_nifti


def unit(data: np.ndarray) -> np.ndarray:
    """A volume (x, y, z) as the engine sees it: slices (z, 1, y, x) in [0, 1]."""
    planes = np.transpose(data, (2, 1, 0))[:, None].astype(np.float64)
    return (planes - planes.min()) / (planes.max() - planes.min())


def pair(scale: int, data: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    planes = unit(anatomy() if data is None else data)[:2]
    size = (planes.shape[-2] * scale, planes.shape[-1] * scale)
    return torch.from_numpy(planes).float(), torch.from_numpy(resize(planes, size)).float()


def saved(path: Path, net: torch.nn.Module, **metadata: str) -> Path:
    path.write_bytes(save_network(net, metadata))
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "scan.nii.gz")


def edges_align(before: Path, after: Path) -> None:
    a, b = nib.load(before), nib.load(after)
    np.testing.assert_allclose(b.affine @ [-0.5, -0.5, 0, 1], a.affine @ [-0.5, -0.5, 0, 1], atol=1e-4)
    ends = [np.array([*(np.array(i.shape[:2]) - 0.5), 0, 1]) for i in (a, b)]
    np.testing.assert_allclose(b.affine @ ends[1], a.affine @ ends[0], atol=1e-3)
    assert a.get_data_dtype() == b.get_data_dtype()


def looks_like(before: Path, after: Path, least: float = 0.97) -> None:
    """The result is the input, larger: nothing turned, mirrored or moved by a pixel."""
    a, b = (np.asarray(nib.load(path).dataobj, float) for path in (before, after))
    cubic = resize(np.moveaxis(a, 2, 0), b.shape[:2])
    assert np.corrcoef(cubic.ravel(), np.moveaxis(b, 2, 0).ravel())[0, 1] > least


# ------------------------------------------------------------------------------------------------- miassr


def nearest_miassr(rounding: str = "exact") -> Miassr:
    """A MIASSR that repeats the pixel below: features are the image, weights the centre of the neighbourhood."""
    torch.manual_seed(2)
    net = Miassr(MiassrConfig(n_blocks=1, n_feats=4, hidden=6, rounding=rounding)).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and not name.endswith("meta_block.0.weight"):
                parameter.zero_()
        net.feature_extractor.head[0].weight[0, 0, 1, 1] = 1
        net.meta_upsampler.P2W.meta_block[2].bias.view(4, 3, 3, 1)[0, 1, 1, 0] = 1
    return net


@pytest.mark.parametrize(
    ("asked", "shape"),
    [(("-s", "2.7"), (108, 97, 6)), (("-s", "1.5x3"), (120, 54, 6)), (("--spacing", "0.5"), (72, 58, 6)),
     (("-s", "2"), (80, 72, 6))],
)  # fmt: skip
def test_miassr_at_any_scale_also_per_axis_and_by_spacing(medsr, scan, tmp_path, asked, shape):
    checkpoint = saved(tmp_path / "any.safetensors", nearest_miassr())
    target = tmp_path / "out.nii.gz"
    ended = medsr("upscale", scan, "-m", "miassr", *asked, "--weights", checkpoint, "-o", target, "--report",
                  tmp_path / "r.json")  # fmt: skip
    assert ended.code == 0, ended.err
    result = nib.load(target)
    assert result.shape == shape
    edges_align(scan, target)
    given = np.asarray(nib.load(scan).dataobj)
    picked = [[int(Fraction(i * n, m)) for i in range(m)] for n, m in zip((40, 36), shape[:2], strict=True)]
    np.testing.assert_allclose(np.asarray(result.dataobj), given[np.ix_(*picked)], atol=1)


def test_miassr_of_the_authors_keeps_their_rounding(medsr, scan, tmp_path):
    checkpoint = saved(tmp_path / "any.safetensors", nearest_miassr("reference"))
    target = tmp_path / "out.nii.gz"
    assert medsr("upscale", scan, "-m", "miassr", "-s", "2.71", "--weights", checkpoint, "-o", target).code == 0
    assert nib.load(target).shape == (int(2.71 * 40), int(2.71 * 36), 6) == (108, 97, 6)
    assert medsr("upscale", scan, "-m", "miassr", "-s", "5", "--weights", checkpoint).code == 2


@pytest.mark.parametrize("scale", [(2.7, 2.7), (1.3, 3.9)])
@pytest.mark.parametrize("rounding", ["exact", "reference"])
def test_miassr_in_tiles_is_miassr(scale, rounding):
    from medsr_cli.engines.torch_runner import engine_for
    from medsr_cli.networks.catalogue import MIASSR

    torch.manual_seed(3)
    net = Miassr(MiassrConfig(n_blocks=2, n_feats=8, hidden=16, rounding=rounding)).eval()
    planes = np.random.default_rng(0).random((2, 1, 150, 131))
    whole = engine_for(net, MIASSR, scale, device="cpu").run(planes).planes
    tiled = engine_for(net, MIASSR, scale, device="cpu", tile=64).run(planes).planes
    assert whole.shape[-2:] == engine_for(net, MIASSR, scale, device="cpu").size_of(150, 131)
    np.testing.assert_allclose(tiled, whole, atol=2e-6 * np.ptp(whole))
    turned = engine_for(net, MIASSR, scale, device="cpu").turned()
    assert turned.size_of(131, 150) == whole.shape[:-3:-1]


# ------------------------------------------------------------------------------------------------- ms-gan


def fitted_msgan(extractors: int = 2) -> MsGan:
    torch.manual_seed(4)
    net = MsGan(MsGanConfig(extractors=extractors, n_blocks=1, n_feats=8)).eval()
    low, high = pair(4)
    last = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels == 1]
    fit_last(net, last[-1], high, low)
    return net


@pytest.mark.parametrize("extractors", [1, 2])
def test_msgan_with_its_intermediate_result(medsr, scan, tmp_path, extractors):
    checkpoint = saved(tmp_path / "gan.safetensors", fitted_msgan(extractors))
    target = tmp_path / "out.nii.gz"
    ended = medsr("upscale", scan, "-m", "msgan", "-s", 4, "--weights", checkpoint, "-o", target, "--intermediate")
    assert ended.code == 0, ended.err
    between = tmp_path / "out_intermediate.nii.gz"
    assert ended.out.split() == [str(target), str(between)]
    assert nib.load(target).shape == (160, 144, 6)
    assert nib.load(between).shape == (80, 72, 6)
    edges_align(scan, target)
    edges_align(scan, between)
    looks_like(scan, target, 0.9)
    refused = medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--intermediate", "-o", tmp_path / "x.nii.gz")
    assert refused.code == 2
    assert not (tmp_path / "x.nii.gz").exists()


def test_msgan_in_tiles_is_msgan():
    from medsr_cli.engines.torch_runner import engine_for
    from medsr_cli.networks.catalogue import MSGAN

    torch.manual_seed(5)
    net = MsGan(MsGanConfig(n_blocks=2, n_feats=8)).eval()
    planes = np.random.default_rng(1).random((1, 1, 130, 90))
    whole = engine_for(net, MSGAN, (4, 4), device="cpu").run(planes)
    tiled = engine_for(net, MSGAN, (4, 4), device="cpu", tile=64).run(planes)
    np.testing.assert_allclose(tiled.planes, whole.planes, atol=1e-5 * np.ptp(whole.planes))
    scale_of = np.ptp(whole.extras["intermediate"])
    np.testing.assert_allclose(tiled.extras["intermediate"], whole.extras["intermediate"], atol=1e-5 * scale_of)


def test_a_region_is_a_volume_of_its_own_in_its_place(medsr, scan, tmp_path):
    target, whole = tmp_path / "roi.nii.gz", tmp_path / "whole.nii.gz"
    assert medsr("upscale", scan, "-m", "bicubic", "-s", 4, "-o", whole).code == 0
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--roi", "10,4,16,20", "-o", target)
    assert ended.code == 0, ended.err
    part, full = nib.load(target), nib.load(whole)
    # NIfTI slices are rows of y and columns of x: x = 10, 16 wide; y = 4, 20 high.
    assert part.shape == (64, 80, 6)
    np.testing.assert_allclose(part.affine[:3, 3], (full.affine @ [40, 16, 0, 1])[:3], atol=1e-4)
    inside = np.asarray(full.dataobj)[40:104, 16:96].astype(int)
    assert np.abs(np.asarray(part.dataobj)[8:-8, 8:-8].astype(int) - inside[8:-8, 8:-8]).max() <= 1
    for outside in ("30,0,20,5", "0,0,0,5", "a,b,c,d", "-1,0,4,4"):
        assert medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--roi", outside, "-o", tmp_path / "n.nii").code == 2


def test_the_region_is_found_by_the_detector(medsr, scan, tmp_path):
    torch.manual_seed(6)
    detector = LesionDetector(LesionDetectorConfig()).eval()
    with torch.no_grad():
        last = [m for m in detector.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.75, 0.25]))
    weights = saved(tmp_path / "detector.safetensors", detector)
    target, report = tmp_path / "roi.nii.gz", tmp_path / "r.json"
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--roi", "auto:12x8", "--detector", weights, "-o", target,
                  "--report", report)  # fmt: skip
    assert ended.code == 0, ended.err
    facts = json.loads(report.read_text())
    assert facts["region"] == {"x": 24, "y": 5, "width": 12, "height": 8}
    assert facts["lesion_detector"]["centre"] == [0.75, 0.25]
    assert nib.load(target).shape == (48, 32, 6)
    without = medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--roi", "auto", "-o", tmp_path / "n.nii.gz")
    assert without.code == 5
    assert "--detector" in without.err
    wrong = save_checkpoint(tmp_path / "tiny.safetensors")
    ended = medsr("upscale", scan, "-m", "bicubic", "-s", 4, "--roi", "auto", "--detector", wrong)
    assert ended.code == 5
    assert "no lesion detector" in ended.err


# ------------------------------------------------------------------------------------------------- m2trans


def fitted_m2trans(scale: int) -> M2Trans:
    torch.manual_seed(7)
    net = M2Trans(M2TransConfig(n_feats=16, n_blocks=1, scale=scale)).eval()
    low, high = pair(scale)
    fit_last(net, net.tail[-1], high.expand(-1, 3, -1, -1), low.expand(-1, 3, -1, -1))
    return net


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_m2trans_on_grey_volumes(medsr, scan, tmp_path, scale):
    checkpoint = saved(tmp_path / "us.safetensors", fitted_m2trans(scale))
    target = tmp_path / "out.nii.gz"
    ended = medsr("upscale", scan, "-m", "m2trans", "-s", scale, "--weights", checkpoint, "-o", target)
    assert ended.code == 0, ended.err
    edges_align(scan, target)
    looks_like(scan, target, 0.9)


def test_m2trans_on_colours_divides_by_255(medsr, tmp_path, monkeypatch):
    """A dim 8-bit image is not brightened to the full range before the network sees it."""
    from medsr_cli.engines.torch_runner import TorchRunner

    seen = []
    net = fitted_m2trans(2)
    checkpoint = saved(tmp_path / "us.safetensors", net)
    grey = (unit(anatomy())[0, 0] * 120).astype(np.uint8)
    image = np.stack([grey, grey // 2, grey // 3], axis=-1)
    Image.fromarray(image).save(tmp_path / "us.png")
    run = TorchRunner.run
    monkeypatch.setattr(TorchRunner, "run", lambda self, x, guide=None: (seen.append(x), run(self, x, guide))[1])
    ended = medsr("upscale", tmp_path / "us.png", "-m", "m2trans", "-s", 2, "--weights", checkpoint, "--no-probe")
    assert ended.code in (0, 7), ended.err
    assert seen[0].shape == (1, 3, 36, 40)
    np.testing.assert_allclose(seen[0][0], np.moveaxis(image, -1, 0) / 255, atol=1e-6)


def test_m2trans_warns_when_it_has_to_be_tiled(medsr, tmp_path):
    scan = save_nifti(tmp_path / "wide.nii.gz", anatomy((150, 90, 1)))
    checkpoint = saved(tmp_path / "us.safetensors", fitted_m2trans(2))
    run = ("upscale", scan, "-m", "m2trans", "-s", 2, "--weights", checkpoint)
    whole = medsr(*run, "-o", tmp_path / "whole.nii.gz")
    assert "tiles" not in whole.err
    tiled = medsr(*run, "--tile", 64, "-o", tmp_path / "tiled.nii.gz")
    assert tiled.code == 0, tiled.err
    assert "statistics of the whole image" in tiled.err


# ------------------------------------------------------------------------------------------------- uscyclegan


@pytest.fixture
def ultrasound(tmp_path: Path) -> Path:
    """Speckle, 24 x 40 pixels, RGB."""
    grey = resize(np.random.default_rng(3).random((12, 20)), (24, 40)) * 200 + 20
    Image.fromarray(np.stack([grey, grey * 0.9, grey * 0.8], -1).clip(0, 255).astype(np.uint8)).save(
        tmp_path / "us.png"
    )
    return tmp_path / "us.png"


def test_uscyclegan_trains_on_the_image_and_says_so(medsr, ultrasound, tmp_path):
    report = tmp_path / "r.json"
    run = ("upscale", ultrasound, "-m", "uscyclegan", "-s", 2, "--without", "perceptual", "--max-minutes", "0.05")
    ended = medsr(*run, "--seed", 4, "--report", report)
    assert ended.code in (0, 7), ended.err
    assert "without the perceptual term" in ended.err
    if ended.code == 0:
        with Image.open(tmp_path / "us_x2-uscyclegan.png") as image:
            assert image.size == (80, 48)
        facts = json.loads(report.read_text())["model"]
        assert facts["trained_on_the_image"]["seed"] == 4
        assert facts["trained_on_the_image"]["perceptual_term"] is False
        assert facts["trained_on_the_image"]["stopped_by"] == "time"
        assert "before its own rule" in ended.err
        assert facts["ensemble"].startswith("median")
        assert not list(tmp_path.glob("*.training"))


def test_uscyclegan_refuses_to_leave_its_perceptual_term_out_by_itself(medsr, ultrasound):
    ended = medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", 4)
    assert ended.code == 5
    assert "medsr weights pull vgg19" in ended.err
    assert "--without perceptual" in ended.err
    assert medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", 4, "--without", "cycle").code == 2
    assert medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", 4, "--preset", "fast").code == 2
    assert medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", "2.5", "--without", "perceptual").code == 2


def test_an_unfinished_training_is_kept_until_the_result_is_whole(medsr, ultrasound, tmp_path, monkeypatch):
    from medsr_cli.formats import raster

    run = ("upscale", ultrasound, "-m", "uscyclegan", "-s", 2, "--without", "perceptual", "--max-minutes", "0.03")
    with monkeypatch.context() as broken:
        broken.setattr(raster, "open_writer", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        assert medsr(*run).code != 0
    assert (tmp_path / "us_x2-uscyclegan.png.training").exists()
    other = medsr(*run[:-4], "--without", "perceptual", "--seed", 9)
    assert other.code == 2, "a state of another seed is not taken up"
    ended = medsr(*run)
    assert ended.code in (0, 7), ended.err


# ------------------------------------------------------------------------------------------------- cohft


def fitted_cohft(scale: int, guide: torch.Tensor) -> Cohft:
    torch.manual_seed(8)
    config = CohftConfig(**{**TINY_COHFT, "scale": scale})
    net = Cohft(config).eval()
    low, high = pair(scale)
    convolutions: list[torch.nn.Conv2d] = []
    hooks = [
        m.register_forward_hook(
            lambda layer, _, out: (
                convolutions.append(layer) if out.shape[1] == 1 and layer.kernel_size == (3, 3) else None
            )
        )
        for m in net.modules()
        if isinstance(m, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        net(low, guide)
    for hook in hooks:
        hook.remove()
    fit_last(net, convolutions[-1], high, low, guide)
    return net


TINY_COHFT = {"stages": 1, "feature_dim": 8, "growth": 4, "rrdb_per_stage": 1, "rdbs": 1, "convs": 2, "heads": 2}


@pytest.mark.parametrize("scale", [2, 4])
def test_cohft_takes_a_guide_in_its_own_geometry(medsr, scan, tmp_path, scale):
    finer = anatomy((80, 72, 6), seed=3)
    guide = save_nifti(tmp_path / "t1.nii.gz", finer, np.diag([0.45, 0.4, 4.0, 1.0]) + shift(-0.225, -0.2))
    seen = torch.from_numpy(resize(unit(finer)[:2], (36 * scale, 40 * scale))).float()
    checkpoint = saved(tmp_path / "guided.safetensors", fitted_cohft(scale, seen), degradation="band-limited")
    target, report = tmp_path / "out.nii.gz", tmp_path / "r.json"
    run = ("upscale", scan, "-m", "cohft", "-s", scale, "--weights", checkpoint)
    ended = medsr(*run, "--guide", guide, "-o", target, "--report", report)
    assert ended.code == 0, ended.err
    edges_align(scan, target)
    facts = json.loads(report.read_text())
    assert facts["guide"]
    assert "input_moved" not in facts["model"]
    cropped = saved(tmp_path / "kspace.safetensors", fitted_cohft(scale, seen), degradation="fourier")
    ended = medsr(*run[:-1], cropped, "--guide", guide, "-o", target, "--report", report, "--overwrite")
    assert ended.code in (0, 7), ended.err
    if ended.code == 0:
        assert "first centres" in json.loads(report.read_text())["model"]["input_moved"]
    alone = medsr(*run, "-o", tmp_path / "n.nii.gz")
    assert alone.code == 2
    assert "--guide" in alone.err
    refused = medsr("upscale", scan, "-m", "rdst", "-s", 4, "--guide", guide, "-o", tmp_path / "n.nii.gz")
    assert refused.code == 2
    elsewhere = save_nifti(tmp_path / "far.nii.gz", finer, np.diag([0.45, 0.4, 4.0, 1.0]) + shift(500, 0))
    ended = medsr(*run, "--guide", elsewhere, "-o", tmp_path / "n.nii.gz")
    assert ended.code == 6
    assert not (tmp_path / "n.nii.gz").exists()


def shift(x: float, y: float) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[:2, 3] = x, y
    return matrix


# ------------------------------------------------------------------------------------------------- channels


def test_registered_channels_go_through_together(medsr, tmp_path):
    names = [save_nifti(tmp_path / f"{name}.nii.gz", anatomy(seed=n)) for n, name in enumerate(("a", "b", "c", "d"))]
    net = almost_nearest(2, channels=4)
    with torch.no_grad():  # each output channel is its own input's nearest pixel
        net.head.weight.zero_()
        for layer in net.tail[0]:
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.zero_()
        net.tail[1].weight.zero_()
        for channel in range(4):
            net.head.weight[channel, channel, 1, 1] = 1
            for layer in net.tail[0]:
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight[4 * channel : 4 * channel + 4, channel, 1, 1] = 1
            net.tail[1].weight[channel, channel, 1, 1] = 1
    checkpoint = saved(tmp_path / "four.safetensors", net)
    run = ("upscale", "-m", "rdst", "-s", 2, "--weights", checkpoint, "-o", tmp_path / "out")
    ended = medsr(*run, "--channels", ",".join(map(str, names)), "--report", "r.json")
    assert ended.code == 0, ended.err
    results = [tmp_path / "out" / f"{name}_x2-rdst.nii.gz" for name in "abcd"]
    assert ended.out.split() == [str(path) for path in results]
    for before, after in zip(names, results, strict=True):
        edges_align(before, after)
        looks_like(before, after)
        assert after.with_name(after.name + ".json").exists()
    others = [np.corrcoef(*(np.asarray(nib.load(p).dataobj, float).ravel() for p in (results[0], r)))[0, 1]
              for r in results[1:]]  # fmt: skip
    assert max(others) < 0.99999
    assert medsr(*run, "--overwrite", "--channels", ",".join(map(str, names[:3]))).code == 2
    small = save_nifti(tmp_path / "small.nii.gz", anatomy((38, 36, 6)))
    ended = medsr(*run, "--overwrite", "--channels", ",".join(map(str, [*names[:3], small])))
    assert ended.code == 6
    assert "grid" in ended.err
    assert medsr("upscale", names[0], "-m", "rdst", "-s", 2, "--weights", checkpoint).code == 2


# ------------------------------------------------------------------------------------------------- for every method


@pytest.mark.parametrize("scale", ["1.5", "2x3", "2.71"])
def test_fit_reaches_scales_without_a_checkpoint(medsr, scan, tmp_path, scale):
    target, report = tmp_path / "out.nii.gz", tmp_path / "r.json"
    refused = medsr("upscale", scan, "-m", "rdst", "-s", scale, "-o", target)
    assert refused.code == 2
    assert "--fit" in refused.err
    ended = medsr("upscale", scan, "-m", "rdst", "-s", scale, "--fit", "-o", target, "--report", report)
    assert ended.code == 0, ended.err
    edges_align(scan, target)
    looks_like(scan, target)
    assert "shrunken" in json.loads(report.read_text())["model"]["fitted"]
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    ended = medsr("upscale", scan, "-m", "rdst", "-s", 3, "--fit", "--weights", checkpoint, "--overwrite", "-o", target)
    assert ended.code == 2


def test_ensemble_with_its_spread(medsr, scan, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    target, report = tmp_path / "out.nii.gz", tmp_path / "r.json"
    run = ("upscale", scan, "-s", 2, "--weights", checkpoint, "-o", target, "--report", report)
    ended = medsr(*run, "--tta", "--spread")
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(target), str(tmp_path / "out_spread.nii.gz")]
    spread, result = nib.load(tmp_path / "out_spread.nii.gz"), nib.load(target)
    assert spread.shape == result.shape
    assert spread.get_data_dtype() == np.float32
    np.testing.assert_allclose(spread.affine, result.affine, atol=1e-4)
    values = np.asarray(spread.dataobj)
    assert values.min() >= 0
    facts = json.loads(report.read_text())
    assert facts["model"]["ensemble"]
    assert facts["spread"]["largest"] == pytest.approx(values.max(), rel=1e-4)
    assert medsr(*run, "--spread", "--overwrite").code == 2


def test_spread_of_colours_and_of_dicom(medsr, tmp_path, shared):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    colours = np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "us.png")
    ended = medsr("upscale", tmp_path / "us.png", "-s", 2, "--weights", checkpoint, "--tta", "--spread")
    assert ended.code == 0, ended.err
    with Image.open(tmp_path / "us_x2-rdst_spread.tiff") as image:
        assert image.size == (60, 48)
        assert image.mode == "F"
    series = shared / "data" / "dicom" / "series_mr_t1_isotropic_12slices"
    ended = medsr("upscale", series, "-s", 2, "-m", "bicubic", "--tta", "--spread", "-o", tmp_path / "derived")
    assert ended.code == 0, ended.err
    assert nib.load(tmp_path / "derived_spread.nii.gz").shape[2] == 12


def test_back_projection_makes_the_result_agree_with_its_input(medsr, scan, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors")
    agreement = []
    for steps in (0, 5):
        report = tmp_path / f"{steps}.json"
        ended = medsr("upscale", scan, "-s", 2, "--weights", checkpoint, "-o", tmp_path / f"{steps}.nii.gz",
                      "--back-projection", steps, "--report", report)  # fmt: skip
        assert ended.code == 0, ended.err
        facts = json.loads(report.read_text())
        agreement.append(facts["consistency"]["psnr_db"])
        assert facts["model"].get("back_projection", 0) == steps
    assert agreement[1] > agreement[0] + 6


@pytest.mark.parametrize("method", ["miassr", "msgan", "m2trans", "cohft"])
def test_no_untrained_network_runs(medsr, scan, tmp_path, method, monkeypatch):
    """Without a checkpoint: which exist, how to get or train one, and exit 5."""
    from medsr_cli.weights.store import Store

    monkeypatch.setattr(Store, "present", lambda *_: False)
    guide = ("--guide", scan) if method == "cohft" else ()
    ended = medsr("upscale", scan, "-m", method, "-s", 4, *guide, "-o", tmp_path / "n.nii.gz")
    assert ended.code == 5
    assert "medsr weights" in ended.err
    assert not (tmp_path / "n.nii.gz").exists()


# ------------------------------------------------------------------------------------------------- found by use


def test_two_channels_of_one_name_are_not_written_over_each_other(medsr, tmp_path):
    paths = []
    for name in ("p1", "p2"):
        (tmp_path / name).mkdir()
        paths.append(save_nifti(tmp_path / name / "img.nii.gz"))
    checkpoint = saved(tmp_path / "two.safetensors", almost_nearest(2, channels=2))
    run = ("upscale", "-m", "rdst", "-s", 2, "-o", tmp_path / "out", "--overwrite")
    ended = medsr(*run, "--weights", checkpoint, "--channels", ",".join(map(str, paths)))
    assert ended.code == 2
    assert "Give them different names" in ended.err
    assert not (tmp_path / "out").exists()
    ended = medsr("upscale", *paths, "-m", "bicubic", "-s", 2, "-o", tmp_path / "out", "--overwrite")
    assert ended.code == 3
    assert len(ended.out.split()) == 1


def test_maps_of_folders_named_by_uid_do_not_collide():
    from medsr_cli.tasks.job import map_name

    names = {map_name(Path("1.2.840.1001." + end), "spread", placed=True).name for end in "789"}
    assert names == {f"1.2.840.1001.{end}_spread.nii.gz" for end in "789"}
    assert map_name(Path("a.b.nii.gz"), "spread", placed=True).name == "a.b_spread.nii.gz"
    assert map_name(Path("us.png"), "spread", placed=False).name == "us_spread.tiff"


@pytest.mark.parametrize("method", ["msgan", "miassr"])
def test_less_precision_runs_and_says_that_nobody_tried_it(medsr, scan, tmp_path, method):
    net, scale = (fitted_msgan(), "4") if method == "msgan" else (nearest_miassr(), "2x3")
    checkpoint = saved(tmp_path / "net.safetensors", net)
    ended = medsr("upscale", scan, "-m", method, "-s", scale, "--weights", checkpoint, "--precision", "bf16", "--tta",
                  "-o", tmp_path / "out.nii.gz")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "What bf16 costs with this checkpoint was not measured." in ended.err


def test_training_sees_the_values_that_the_network_will_see(tmp_path):
    """A bright voxel outside of the region stretches the range of both."""
    from medsr_cli import formats
    from medsr_cli.formats.region import Region, cropped
    from medsr_cli.tasks.self_training import slices_to_learn_from
    from medsr_cli.volume.intensity import measure

    data = anatomy()
    data[0, 0, 0] = 20_000
    reader = formats.open_image(save_nifti(tmp_path / "a.nii.gz", data))
    part = cropped(reader, Region(8, 8, 20, 20))
    images = slices_to_learn_from(part, measure(reader.slices(), None))
    assert images[0].shape == (3, 20, 20)
    assert max(image.max() for image in images) < 0.11


def test_a_generator_runs_with_the_inference_of_its_paper_and_can_be_told_its_scale(medsr, ultrasound, tmp_path):
    from medsr_cli.networks.uscyclegan import Generator, GeneratorConfig

    torch.manual_seed(0)
    net = Generator(GeneratorConfig(width1=4, width2=4, width3=4))
    torch.save(net.state_dict(), tmp_path / "g.pt")
    out = tmp_path / "g.safetensors"
    ended = medsr("weights", "import", tmp_path / "g.pt", "-m", "uscyclegan", "-o", out)
    assert "assumed" in ended.err
    assert "scale 4" in ended.err
    run = ("weights", "import", tmp_path / "g.pt", "-m", "uscyclegan", "-o", out, "--overwrite")
    ended = medsr(*run, "--set", "scale=2", "--set", "negative_slope=0.01")
    assert ended.code == 0, ended.err
    assert "assumed" not in ended.err
    assert medsr(*run, "--set", "width1=3").code == 2
    assert medsr(*run, "--set", "scale=two").code == 2
    ended = medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", 2, "--weights", out, "--report", tmp_path / "r.json")
    assert ended.code in (0, 7), ended.err
    if ended.code == 0:
        assert json.loads((tmp_path / "r.json").read_text())["model"]["ensemble"].startswith("median")


def test_uscyclegan_fits_scales_below_its_own(medsr, ultrasound, tmp_path):
    run = ("upscale", ultrasound, "-m", "uscyclegan", "--without", "perceptual", "--max-minutes", "0.03")
    ended = medsr(*run, "-s", "1.5", "--fit", "-o", tmp_path / "f.png")
    assert ended.code in (0, 7), ended.err
    if ended.code == 0:
        with Image.open(tmp_path / "f.png") as image:
            assert image.size == (60, 36)
    assert medsr(*run, "-s", "4.5", "--fit").code == 2


def test_what_cannot_be_is_refused_before_the_work(medsr, scan, ultrasound, tmp_path):
    ended = medsr("upscale", ultrasound, "-m", "uscyclegan", "-s", 2, "--without", "perceptual", "--intermediate")
    assert ended.code == 2
    assert not list(tmp_path.glob("*.training"))
    for options in (
        ("--spacing", "0.4", "-s", "3"),
        ("--max-minutes", "1"),
        ("--seed", "3"),
        ("--register", "rigid"),
        ("--register", "foo"),
        ("--allow-mismatch",),
    ):
        ended = medsr("upscale", scan, "-m", "bicubic", *options, "-o", tmp_path / "n.nii.gz")
        assert ended.code == 2, options
    assert medsr("upscale", "-m", "rdst", "--channels", f"{scan},").code == 2
    assert medsr("upscale", scan, "-m", "bicubic", "--roi", "auto", "--detector", "none.safetensors").code == 5


def test_skip_existing_counts_the_maps_too(medsr, scan, tmp_path):
    run = ("upscale", scan, "-m", "bicubic", "-s", 2, "-o", tmp_path / "t.nii.gz")
    assert medsr(*run).code == 0
    ended = medsr(*run, "--tta", "--spread", "--skip-existing", "--log-paths")
    assert ended.code == 2
    assert "t_spread.nii.gz does not" in ended.err
    assert medsr(*run, "--tta", "--spread", "--overwrite").code == 0
    assert medsr(*run, "--tta", "--spread", "--skip-existing", "--json").out.count("skipped") == 1


def test_results_beside_their_inputs_are_no_inputs_of_the_next_run(medsr, tmp_path):
    for name in ("a", "b"):
        save_nifti(tmp_path / f"{name}.nii.gz")
    run = ("upscale", tmp_path, "-m", "bicubic", "-s", 2, "--tta", "--spread")
    assert len(medsr(*run).out.split()) == 4
    again = medsr(*run, "--skip-existing")
    assert again.code == 0
    assert len(list(tmp_path.glob("*.nii.gz"))) == 6


def test_the_authors_rounding_says_how_far_it_is_off(medsr, scan, tmp_path):
    checkpoint = saved(tmp_path / "any.safetensors", nearest_miassr("reference"))
    run = ("upscale", scan, "-m", "miassr", "--weights", checkpoint, "-o", tmp_path / "o.nii.gz", "--overwrite")
    assert "0.6 of a pixel" in medsr(*run, "-s", "2.71").err
    assert "of a pixel" not in medsr(*run, "-s", "2").err


def test_channels_share_one_region(medsr, tmp_path, monkeypatch):
    """The detector once ran on each channel by itself, and cut each at another place."""
    from medsr_cli.formats.region import Region
    from medsr_cli.tasks import lesion

    places = iter((4, 12))
    monkeypatch.setattr(lesion, "find_region", lambda *_: Region(next(places), 6, 16, 16))
    names = [save_nifti(tmp_path / f"{name}.nii.gz", anatomy(seed=n)) for n, name in enumerate("ab")]
    checkpoint = saved(tmp_path / "two.safetensors", almost_nearest(2, channels=2))
    ended = medsr("upscale", "-m", "rdst", "-s", 2, "--weights", checkpoint, "-o", tmp_path / "out", "--roi", "auto",
                  "--channels", ",".join(map(str, names)))  # fmt: skip
    assert ended.code in (0, 7), ended.err
    assert next(places) == 12, "it was looked for once"
