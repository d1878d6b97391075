import tempfile
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from medsr_cli.evaluation.metrics import psnr, ssim
from medsr_cli.networks.cohft import Cohft, CohftConfig
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.miassr import Miassr, MiassrConfig
from medsr_cli.training.labelled import CentreScorer, OverlapScorer, Threshold, best_thresholds, centre_of
from medsr_cli.training.pack import PackedSlices, PackedVolume, PackWriter, Planes
from medsr_cli.training.recipe import recipe_named
from medsr_cli.training.validation import (
    Condition,
    any_scales,
    conditions_of,
    mean_gain,
    planes,
    spread,
    validate,
)
from medsr_cli.training.whole_slices import WholeSlices
from medsr_cli.volume.band_limited import band_limited_resize, shifted
from medsr_cli.volume.degradation import BAND_LIMITED, BICUBIC_ANTIALIASED, CUBIC, CUBIC_BLUR, FOURIER
from medsr_cli.volume.resample import resize, shrink
from tests.training.anatomy import packed, phantom


class Cubic(nn.Module):
    """Bicubic as a network, a little brighter if told so."""

    def __init__(self, scale, add=0.0):
        super().__init__()
        self.scale, self.add, self.calls = scale, nn.Parameter(torch.tensor(add)), 0

    def forward(self, low):
        self.calls += 1
        h, w = low.shape[-2:]
        big = resize(low.numpy(), (h * self.scale, w * self.scale))
        return torch.from_numpy(big) + self.add


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    path = packed(tmp_path_factory.mktemp("pack") / "p.safetensors", subjects=2, volumes=2, side=(46, 41))
    return PackedSlices(path)


def test_bicubic_as_a_network_gains_nothing(slices):
    scores = validate(Cubic(4), slices, slices.indices_of(["s0", "s1"]), 4)
    assert len(scores) == 4
    assert all(abs(score.gain_db) < 1e-6 for score in scores)
    assert [score.slices for score in scores] == [3] * 4


def test_figures_are_the_protocols(slices):
    (score,) = validate(Cubic(2, 0.01), slices, slices.indices_of(["s1"])[:1], 2)
    high = slices.slice(int(slices.indices_of(["s1"])[0]))[:46, :40]
    low = shrink(high, (23, 20))
    result = resize(low, (46, 40)) + np.float32(0.01)
    assert score.psnr == pytest.approx(psnr(result[2:-2, 2:-2], high[2:-2, 2:-2]), abs=1e-6)
    assert score.bicubic_ssim == pytest.approx(ssim(resize(low, (46, 40)), high, 2), abs=1e-9)
    assert mean_gain([score]) == score.psnr - score.bicubic_psnr


def test_bicubic_is_measured_once(slices, monkeypatch):
    known = {}
    held = slices.indices_of(["s0"])
    first = validate(Cubic(2), slices, held, 2, 2, known)
    assert len(known) == 4
    monkeypatch.setattr("medsr_cli.training.validation.resize", None)
    net = Cubic(2)
    assert [s.bicubic_psnr for s in validate(net, slices, held, 2, 2, known)] == [s.bicubic_psnr for s in first]
    assert net.calls == 4


def test_training_mode_comes_back(slices):
    net = Cubic(2).train()
    validate(net, slices, slices.indices_of(["s0"])[:1], 2)
    assert net.training


def test_volumes_without_a_slice_that_can_be_measured_are_left_out(tmp_path):
    small = PackedSlices(packed(tmp_path / "p.safetensors", subjects=2, side=(16, 14)))
    assert validate(Cubic(4), small, small.indices_of(["s0", "s1"]), 4) == []


@pytest.mark.parametrize(("n", "most", "expected"), [(10, 0, 10), (3, 5, 3), (10, 4, 4), (10, 1, 1)])
def test_spread(n, most, expected):
    chosen = spread(np.arange(100, 100 + n), most)
    assert len(set(chosen)) == expected
    assert chosen[0] == 100


# -- methods -----------------------------------------------------------------------------------------------


def with_companions(path, side=(48, 40), low_scale=0):
    """Two subjects with a guide, labels of two bright discs and, if asked for, low-resolution partners."""
    with tempfile.TemporaryFile() as pixels, path.open("wb") as target:
        writer = PackWriter(pixels)
        for s in range(2):
            image = phantom(s, 3, *side)
            y, x = np.mgrid[: side[0], : side[1]]
            labels = (np.hypot(y - 14 - 5 * s, x - 12) < 5) + 2 * (np.hypot(y - 33, x - 26 + 3 * s) < 6)
            unit = 0.8 * (image - image.min()) / np.ptp(image) * (labels == 0) + (labels == 1) + 0.9 * (labels == 2)
            record = PackedVolume(f"s{s}", f"s{s}/a_T2w.nii", "0" * 64, 0, 1, label_values=(0, 1, 2))
            small = (side[0] // low_scale, side[1] // low_scale) if low_scale else None
            writer.add(
                record,
                (
                    Planes(p, guide=1 - p, labels=labels, low=None if small is None else resize(p, small) * 0.5)
                    for p in unit
                ),
            )
        writer.finish(target)
    return PackedSlices(path)


def test_each_method_is_validated_by_its_own_degradation():
    assert [c.degradation for c in conditions_of(recipe_named("m2trans", "paper"), 4)] == [BICUBIC_ANTIALIASED]
    assert [c.degradation for c in conditions_of(recipe_named("cohft", "quick"), 4)] == [BAND_LIMITED]
    assert [(c.scale, c.degradation) for c in conditions_of(recipe_named("rdst", "paper"), 3)] == [(3.0, CUBIC)]
    blurred = conditions_of(recipe_named("miassr", "paper"), None)
    assert [c.scale for c in blurred] == [1.5, 2.0, 3.0, 4.0]
    assert {(c.degradation.name, c.blur) for c in blurred} == {("cubic-blur", 1.0)}
    mixed = conditions_of(recipe_named("miassr", "quick"), None)
    assert {c.blur for c in mixed} == {0.0, 1.0}


def test_scales_that_are_validated_are_among_those_that_are_trained():
    recipe = recipe_named("miassr", "paper")
    assert any_scales(replace(recipe, scales=())) == (1.5, 2.0, 3.0, 4.0)
    assert any_scales(replace(recipe, scales=(3.0, 2.0))) == (2.0, 3.0)
    assert any_scales(replace(recipe, scales=tuple(np.arange(1.1, 3.05, 0.1)))) == pytest.approx((1.5, 2.0, 3.0))


def test_a_blend_of_blur_lies_between_both():
    high = phantom(3, 1)[0].astype(np.float32)
    size = (24, 20)
    full, none, half = (Condition(2.0, CUBIC_BLUR, blur).down(high, size) for blur in (1.0, 0.0, 0.5))
    assert np.allclose(none, shrink(high, size), atol=1e-2)
    assert np.allclose(full, shrink(high, size, blur=True), atol=1e-2)
    assert np.allclose(half, (full + none) / 2, atol=1e-2)


def test_any_scale_is_measured_at_each_and_averaged(slices):
    torch.manual_seed(0)
    net = Miassr(MiassrConfig(n_feats=4, n_blocks=1, hidden=4))
    conditions = [Condition(1.5), Condition(2.0)]
    known = {}
    (score,) = validate(net, slices, slices.indices_of(["s0"])[:1], conditions, 1, known)
    assert [row.condition for row in score.conditions] == ["x1.5", "x2"]
    high = slices.slice(int(slices.indices_of(["s0"])[0]))
    low = shrink(high, (round(46 / 1.5), round(41 / 1.5)))
    assert score.conditions[0].bicubic_psnr == pytest.approx(psnr(resize(low, high.shape), high, 2), abs=1e-5)
    with torch.no_grad():
        out = net(torch.from_numpy(low)[None, None], (Fraction(46, len(low)), Fraction(41, low.shape[1])))[0, 0].numpy()
    assert score.conditions[0].psnr == pytest.approx(psnr(out, high, 2), abs=1e-4)
    assert score.psnr == pytest.approx(np.mean([row.psnr for row in score.conditions]))
    assert len(known) == 2


def test_grey_goes_three_times_through_a_colour_network_and_the_mean_is_measured(slices):
    torch.manual_seed(0)
    net = M2Trans(M2TransConfig(n_feats=8, n_blocks=1, scale=2)).eval()
    low = np.random.default_rng(0).random((1, 20, 24), np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(low).repeat(3, 1, 1)[None])[0].mean(dim=0).numpy()
    assert np.allclose(WholeSlices(net, torch.device("cpu"))(low, (40, 48)), expected[None], atol=1e-6)


class Shifted(nn.Module):
    """Enlarges what shares its first pixel's centre with the target, as Cohf-T's pairs do, exactly."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, low):
        h, w = low.shape[-2:]
        # Pixel 2j is low pixel j: the band-limited image moved back by half a pixel of the result.
        big = band_limited_resize(low.double().numpy(), (2 * h, 2 * w))
        return torch.from_numpy(shifted(big, -0.5, -0.5)).float()


def test_pairs_of_shared_first_centres_are_measured_where_upscale_puts_them(slices):
    held = slices.indices_of(["s0"])[:1]
    (aligned,) = validate(Shifted(), slices, held, [Condition(2.0, FOURIER)])
    (crooked,) = validate(Shifted(), slices, held, [Condition(2.0, BAND_LIMITED)])
    assert aligned.psnr > crooked.psnr + 3
    assert aligned.bicubic_psnr == crooked.bicubic_psnr


def test_a_guided_network_gets_its_guide_and_slices_without_one_are_left_out(tmp_path, slices):
    tiny = CohftConfig(
        2, stages=1, feature_dim=4, growth=3, rrdb_per_stage=1, rdbs=1, convs=2, heads=2, window=2, patch=3
    )
    torch.manual_seed(0)
    net = Cohft(tiny)
    found = with_companions(tmp_path / "g.safetensors")
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(given))
    scores = validate(net, found, found.indices_of(["s0"]), [Condition(2.0, BAND_LIMITED)], 1)
    assert len(scores) == 1
    low, guide = seen[0]
    assert low.shape == (1, 1, 24, 20)
    assert torch.equal(guide[0, 0], torch.from_numpy(found.slice_of("guide", 0)[0]))
    assert validate(net, slices, slices.indices_of(["s0"]), [Condition(2.0, BAND_LIMITED)]) == []


def test_low_resolution_partners_are_taken_instead_of_making_some(tmp_path):
    found = with_companions(tmp_path / "l.safetensors", low_scale=2)
    (score,) = validate(Cubic(2), found, found.indices_of(["s1"])[:1], 2)
    index = int(found.indices_of(["s1"])[0])
    high, low = found.slice(index), found.slice_of("low", index)[0]
    assert score.bicubic_psnr == pytest.approx(psnr(resize(low, high.shape), high, 2), abs=1e-5)
    assert score.bicubic_psnr < 15  # they are half as bright here
    assert abs(score.gain_db) < 1e-5


def test_large_slices_are_measured_in_their_middle(monkeypatch, slices):
    torch.manual_seed(0)
    net = M2Trans(M2TransConfig(n_feats=8, n_blocks=1, scale=2))
    monkeypatch.setattr("medsr_cli.training.whole_slices.WORKING_BYTES", 4_000 * 17 * 17)
    whole = WholeSlices(net, torch.device("cpu"))
    rows, columns = whole.measured(46, 41, 2.0)
    assert rows % 2 == columns % 2 == 0
    assert rows * columns <= 4 * 17 * 17
    assert len(validate(net, slices, slices.indices_of(["s0"])[:1], 2)) == 1


# -- labels ------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers the labels or the centre that it is told."""

    def __init__(self, answer):
        super().__init__()
        self.one, self.answer = nn.Parameter(torch.ones(1)), answer

    def forward(self, image):
        return self.answer(image)


def test_dice_and_thresholds_by_brute_force(tmp_path):
    found = with_companions(tmp_path / "s.safetensors")
    train, held = found.indices_of(["s0"]), found.indices_of(["s1"])
    thresholds = best_thresholds(found, train)
    assert set(thresholds) == {1, 2}
    pixels = np.concatenate([planes(found.slice(int(i))).ravel() for i in train])
    labels = np.concatenate([found.labels_of(int(i)).ravel() for i in train])
    for label, threshold in thresholds.items():
        best = max(
            2 * np.sum(mask & (labels == label)) / (np.sum(mask) + np.sum(labels == label))
            for level in np.arange(256) / 256
            for mask in (pixels >= level, pixels < level)
        )
        mask = threshold.of(pixels.reshape(1, 1, -1))[0]
        assert 2 * np.sum(mask & (labels == label)) / (np.sum(mask) + np.sum(labels == label)) == pytest.approx(best)
    zeros = Fixed(
        lambda image: nn.functional.one_hot(torch.zeros(image.shape[0], *image.shape[2:]).long(), 3).movedim(-1, 1)
    )
    ones = Fixed(lambda image: zeros.answer(image)[:, [1, 0, 2]])
    scorer = OverlapScorer(found, train, held)
    (nothing,) = scorer(zeros)
    assert nothing.dice == pytest.approx(0, abs=1e-6)
    (all_one,) = scorer(ones)
    of_one = sum(int((found.labels_of(int(i)) == 1).sum()) for i in held)
    of_two = sum(int((found.labels_of(int(i)) == 2).sum()) for i in held)
    assert all_one.dice == pytest.approx(2 * of_one / (3 * 48 * 40 + of_one + of_two), abs=1e-6)
    assert all_one.gain == all_one.dice - all_one.threshold_dice
    assert mean_gain([nothing]) < 0


def test_the_labels_themselves_have_dice_one(tmp_path):
    found = with_companions(tmp_path / "s.safetensors")
    held = found.indices_of(["s1"])
    one_hot = nn.functional.one_hot(torch.from_numpy(found.labels_of(int(held[0]))), 3).movedim(-1, 0)[None].float()
    (score,) = OverlapScorer(found, found.indices_of(["s0"]), held)(Fixed(lambda image: one_hot))
    assert score.dice == pytest.approx(1)
    assert score.slices == 3
    assert Threshold(0.5, above=False).of(np.array([[[0.4, 0.6]]]))[0].tolist() == [True, False]


def test_centres_are_columns_first_and_beside_the_mean_of_the_training(tmp_path):
    found = with_companions(tmp_path / "c.safetensors")
    train, held = found.indices_of(["s0"]), found.indices_of(["s1"])
    labels = found.labels_of(int(held[0])) > 0
    rows, columns = np.nonzero(labels)
    centre = np.array([(rows.mean() + 0.5) / 48, (columns.mean() + 0.5) / 40])
    assert np.allclose(centre_of(found, int(held[0])), centre)
    (exact,) = CentreScorer(found, train, held)(Fixed(lambda image: torch.tensor([[centre[1], centre[0]]])))
    assert exact.distance == pytest.approx(0, abs=1e-6)
    expected = np.linalg.norm(centre_of(found, int(train[0])) - centre)
    assert exact.mean_distance == pytest.approx(expected, abs=1e-9)
    assert exact.gain == pytest.approx(expected, abs=1e-6)
