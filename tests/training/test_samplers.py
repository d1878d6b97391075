import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from medsr_cli.errors import ArgumentsError, InputRefused
from medsr_cli.training.pack import LEVELS, PackedSlices, PackedVolume, PackWriter, Planes
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.samplers import sampler_for
from medsr_cli.volume.antialias import antialiased_resize
from medsr_cli.volume.fourier import shrink_as_released
from medsr_cli.volume.resample import blur_3x3, resize
from tests.training.anatomy import phantom

SIDES = ((80, 72), (96, 64), (72, 88))
"""Of the volumes of one subject each."""


def volume_planes(seed, side, *, roles, channels=1, scale=2):
    """Slices whose guide is 1 less the image, whose labels are the image's brightest part, exactly."""
    image = phantom(seed, 6, *side)
    image = np.rint(image / image.max() * LEVELS) / LEVELS
    for k, plane in enumerate(image):
        labels = (plane > 0.8).astype(int) * (1 + seed % 2)
        if k == 0:
            labels[:] = 0
        yield Planes(
            np.stack([plane ** (c + 1) for c in range(channels)]),
            guide=1 - plane if "guide" in roles else None,
            labels=labels if "labels" in roles else None,
            low=resize(plane, (side[0] // scale, side[1] // scale)).clip(0, 1) if "low" in roles else None,
        )


def packed(path, roles=(), channels=1, sides=SIDES):
    with (path.parent / "pixels").open("w+b") as pixels, path.open("wb") as target:
        writer = PackWriter(pixels)
        for s, side in enumerate(sides):
            record = PackedVolume(
                f"s{s}", f"s{s}/a.nii", "0" * 64, 0.0, 1.0, channels=channels, label_values=[0, 1, 2],
                caption="told" if s == 0 else None,
            )  # fmt: skip
            writer.add(record, volume_planes(s, side, roles=roles, channels=channels))
        writer.finish(target)
    return PackedSlices(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def everything(folder):
    return packed(folder / "all.safetensors", ("guide", "labels"))


@pytest.fixture(scope="module")
def pairs(folder):
    return packed(folder / "pairs.safetensors", ("low",))


@pytest.fixture(scope="module")
def coloured(folder):
    return packed(folder / "colour.safetensors", channels=3)


def sampler(slices, scale=2, subjects=None, rank=0, processes=1, **fields):
    recipe = Recipe(**{"batch": 6, "patch": 12, **fields})
    return sampler_for(
        recipe, slices, slices.indices_of(subjects or slices.subjects), scale, rank=rank, processes=processes
    )


def everywhere(slices, rows, columns):
    """Every rectangle of every slice: (places, C, rows, columns), and the slice of each."""
    windows, owners = [], []
    for i in range(len(slices)):
        view = np.lib.stride_tricks.sliding_window_view(slices.slice_of("image", i)[0], (rows, columns))
        windows.append(view.reshape(-1, rows * columns))
        owners += [(i, top, left) for top in range(view.shape[0]) for left in range(view.shape[1])]
    return np.concatenate(windows), owners


VARIED = {"augment": True, "gain": 2.0, "noise": 0.05, "blur_draws": (0.3, 0.3), "degradation": "cubic-blur"}
RECIPES = {
    "patches": (2, VARIED | {"reduced_share": 0.5, "minimum_deviation": 0.02}),
    "antialiased": (3, {"degradation": "bicubic-antialiased", "method": "m2trans"}),
    "slices": (2, {"region": "slice", "augment": True}),
    "any scale": (2, VARIED | {"method": "miassr", "scales": (1.3, 2.0, 2.7), "high_patch": 40}),
    "guided": (4, {"method": "cohft", "degradation": "fourier", "region": "slice"}),
    "guided crops": (2, {"method": "cohft", "degradation": "fourier", "augment": True}),
    "lesions": (4, {"method": "msgan", "region": "lesion", "high_patch": 40}),
    "segmentation": (2, {"task": "segmentation", "method": "segmentation", "high_patch": 64, "augment": True}),
    "segmentation of slices": (2, {"task": "segmentation", "region": "slice"}),
    "detection": (2, {"task": "detection", "method": "msgan-detector", "augment": True, "gain": 1.5}),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_are_the_batch_of_one(everything, name, processes):
    scale, fields = RECIPES[name]
    for step in (0, 3):
        whole = sampler(everything, scale, **fields).batch(step)
        shares = [
            sampler(everything, scale, rank=r, processes=processes, **fields).batch(step) for r in range(processes)
        ]
        for item in dataclasses.fields(whole):
            value = getattr(whole, item.name)
            parts = [getattr(share, item.name) for share in shares]
            if isinstance(value, torch.Tensor):
                assert torch.equal(torch.cat(parts), value)
                assert value.dtype in (torch.float32, torch.int64)
            elif item.name == "captions":
                assert sum(parts, ()) == value
            elif item.name == "ratio":
                assert set(parts) == {value}
        assert len({share.seed for share in shares}) == processes
        assert shares[0].seed == whole.seed
        assert 0 <= whole.seed < 2**63


@pytest.mark.parametrize("name", RECIPES)
def test_every_batch_depends_on_seed_and_step_alone(everything, name):
    scale, fields = RECIPES[name]
    one, other = sampler(everything, scale, **fields), sampler(everything, scale, **fields)
    one.batch(1)
    assert torch.equal(one.batch(4).low, other.batch(4).low)
    assert one.batch(4).seed == other.batch(4).seed != one.batch(5).seed
    again = sampler(everything, scale, seed=9, **fields).batch(4)
    assert again.low.shape != one.batch(4).low.shape or not torch.equal(again.low, one.batch(4).low)


def test_more_processes_than_images_are_refused(everything):
    with pytest.raises(ArgumentsError, match="batch of 2 cannot be shared by 3"):
        sampler(everything, batch=2, processes=3)


# -- one scale ---------------------------------------------------------------------------------------------


def test_the_recipes_degradation_makes_the_small_images(everything):
    for name, shrink in (
        ("cubic", resize),
        ("bicubic-antialiased", antialiased_resize),
        ("cubic-blur", lambda image, size: blur_3x3(resize(image, size))),
    ):
        batch = sampler(everything, 3, degradation=name).batch(2)
        assert batch.low.numpy() == pytest.approx(shrink(batch.high.numpy(), (12, 12)), abs=1e-6)
    with pytest.raises(ArgumentsError, match="no degradation 'none'"):
        sampler(everything, degradation="none")


def test_blur_is_drawn_in_the_shares_of_the_recipe(everything):
    """How much each image was blurred is recovered by least squares."""
    fields = {"degradation": "cubic-blur", "blur_share": 0.5, "blur_draws": (0.2, 0.5), "batch": 40}
    amounts = []
    for step in range(10):
        batch = sampler(everything, minimum_deviation=0.02, **fields).batch(step)
        sharp = resize(batch.high.numpy(), (12, 12))
        smooth = blur_3x3(sharp) - sharp
        amounts += list(((batch.low.numpy() - sharp) * smooth).sum((1, 2, 3)) / (smooth**2).sum((1, 2, 3)))
    amounts = np.array(amounts)
    in_full, not_at_all = np.abs(amounts - 0.5) < 1e-3, np.abs(amounts) < 1e-3
    between = ~in_full & ~not_at_all
    assert in_full.mean() == pytest.approx(0.2, abs=0.08)
    assert not_at_all.mean() == pytest.approx(0.5, abs=0.1)
    assert 0 < amounts[between].min() < amounts[between].max() < 0.5
    assert amounts[between].mean() == pytest.approx(0.25, abs=0.06)


def test_noise_is_gaussian_of_drawn_deviations_and_moves_no_patch(everything):
    quiet, noisy = (sampler(everything, noise=noise, batch=60).batch(1) for noise in (0.0, 0.1))
    assert torch.equal(quiet.high, noisy.high)
    difference = (noisy.low - quiet.low).numpy().reshape(60, -1)
    assert abs(difference.mean()) < 0.002
    assert difference.std(axis=1).max() < 0.12
    assert difference.std(axis=1).min() < 0.02
    assert difference.std(axis=1).mean() == pytest.approx(0.05, abs=0.01)


def test_partners_are_cut_at_the_same_place(pairs):
    """Each partner in the file is the shrunken slice, so that inside of a crop it is the shrunken crop."""
    for fields in ({}, {"augment": True, "gain": 2.0}, {"region": "slice"}):
        batch = sampler(pairs, 2, degradation="band-limited", **fields).batch(7)
        assert tuple(2 * n for n in batch.low.shape[-2:]) == tuple(batch.high.shape[-2:])
        made = resize(batch.high.numpy(), tuple(batch.low.shape[-2:])).clip(0)  # as what is packed
        inside = np.s_[..., 2:-2, 2:-2]
        assert batch.low.numpy()[inside] == pytest.approx(made[inside], abs=1e-4)


def test_partners_of_another_scale_are_refused(pairs):
    with pytest.raises(ArgumentsError, match="not 4 times smaller"):
        sampler(pairs, 4)
    with pytest.raises(ArgumentsError, match="for one scale"):
        sampler(pairs, method="miassr", scales=(2.0, 3.0))


def test_every_channel_is_cut_and_turned_alike(coloured):
    batch = sampler(coloured, augment=True).batch(0)
    assert tuple(batch.low.shape) == (6, 3, 12, 12)
    high = batch.high.numpy()
    assert high[:, 1] == pytest.approx(high[:, 0] ** 2, abs=1e-4)
    assert high[:, 2] == pytest.approx(high[:, 0] ** 3, abs=1e-4)


def test_whole_slices_are_cut_to_the_smallest_and_to_whole_pixels(everything):
    batch = sampler(everything, 3, region="slice", batch=12).batch(0)
    smallest = np.array(SIDES).min(axis=0) // 3 * 3
    assert tuple(batch.high.shape[-2:]) == tuple(smallest)
    fixed = sampler(everything, 4, region="slice", high_patch=100).batch(0)
    assert tuple(fixed.high.shape[-2:]) == (100, 100)


def test_captions_are_the_volumes_or_made(everything):
    batch = sampler(everything, method="m2trans", batch=30).batch(0)
    assert len(batch.captions) == 30
    kinds = set(batch.captions)
    assert "told" in kinds
    assert len(kinds) == 3
    assert all("ultrasound" in caption for caption in kinds - {"told"})
    assert sampler(everything).batch(0).captions == ()


# -- any scale ---------------------------------------------------------------------------------------------


def test_sizes_of_any_scale_are_the_papers(everything):
    scales = tuple(n / 10 for n in range(11, 41))
    draw = sampler(everything, method="miassr", scales=scales, high_patch=64, batch=2)
    seen = set()
    for step in range(200):
        batch = draw.batch(step)
        small, large = batch.low.shape[-1], batch.high.shape[-1]
        fitting = [s for s in scales if small == int(64 / s) and large == int(int(64 / s) * s)]
        assert fitting
        assert batch.ratio == (Fraction(large, small), Fraction(large, small))
        seen.update(fitting)
        assert batch.low.shape[-2:] == (small, small)
        assert batch.high.shape[-2:] == (large, large)
    assert len(seen) > 25


def test_targets_of_any_scale_are_the_crop_resized(everything):
    """At scale 2.7 a crop of 64 becomes 23 and 62 pixels; with 2 it stays as it is."""
    crop = sampler(everything, method="miassr", scales=(2.0,), high_patch=64).batch(3)
    assert tuple(crop.high.shape[-2:]) == (64, 64)
    batch = sampler(everything, method="miassr", scales=(2.7,), high_patch=64).batch(3)
    assert batch.high.numpy() == pytest.approx(resize(crop.high.numpy(), (62, 62)), abs=1e-6)
    assert batch.low.numpy() == pytest.approx(resize(crop.high.numpy(), (23, 23)), abs=1e-6)


# -- guides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["slice", "patch"])
@pytest.mark.parametrize("degradation", ["band-limited", "fourier"])
def test_guides_are_cut_and_turned_with_the_image(everything, region, degradation):
    fields = {"method": "cohft", "region": region, "degradation": degradation, "augment": True}
    for step in range(4):
        batch = sampler(everything, 2, **fields).batch(step)
        assert batch.guide.shape == batch.high.shape
        assert batch.guide.numpy() == pytest.approx(1 - batch.high.numpy(), abs=1e-4)


def test_fourier_scales_four_neighbouring_slices_together(everything):
    batch = sampler(everything, 2, method="cohft", region="slice", degradation="fourier", batch=8, high_patch=64).batch(
        2
    )
    high, low = batch.high.numpy(), batch.low.numpy()
    for stack in (slice(0, 4), slice(4, 8)):
        assert low[stack] == pytest.approx(shrink_as_released(high[stack], (32, 32)), abs=1e-5)
        assert (low[stack].min(), low[stack].max()) == (0, 1)
    windows, owners = everywhere(everything, 64, 64)
    places = []
    for image in high[:, 0]:
        same = np.flatnonzero((windows == image.reshape(-1)).all(axis=1))
        places.append(owners[int(same[0])])
    for first in (0, 4):
        index, top, left = places[first]
        assert places[first : first + 4] == [(index + k, top, left) for k in range(4)]


def test_a_guide_is_needed(coloured):
    with pytest.raises(InputRefused, match="without its partner"):
        sampler(coloured, method="cohft")


# -- lesions -----------------------------------------------------------------------------------------------


def test_the_region_is_around_the_lesion_inside_the_slice(everything):
    side, scale = 40, 4
    draw = sampler(everything, scale, method="msgan", region="lesion", high_patch=side, batch=8)
    windows, owners = everywhere(everything, side, side)
    for step in range(4):
        batch = draw.batch(step)
        assert tuple(batch.low.shape[-2:]) == (10, 10)
        assert batch.middle.numpy() == pytest.approx(resize(batch.high.numpy(), (20, 20)), abs=1e-6)
        for image in batch.high.numpy():
            index, top, left = owners[int(np.flatnonzero((windows == image.reshape(-1)).all(axis=1))[0])]
            assert top % scale == left % scale == 0
            labels = everything.labels_of(index)
            for corner, axis in ((top, 0), (left, 1)):
                centre = np.nonzero(labels)[axis].mean() + 0.5
                furthest = (labels.shape[axis] - side) // scale * scale
                # Nearer to the lesion no corner on whole low-resolution pixels can be.
                wanted = min(max(centre - side / 2, 0), furthest)
                assert abs(corner - wanted) <= scale / 2 + 1e-9


def test_lesions_need_labels(coloured):
    with pytest.raises(InputRefused, match="has a mask"):
        sampler(coloured, method="msgan", region="lesion")


def test_empty_masks_are_refused(everything):
    empty = np.array([i for i in range(len(everything)) if not everything.labels_of(i).any()])
    for fields in ({"task": "detection"}, {"region": "lesion"}, {"task": "segmentation"}):
        with pytest.raises(InputRefused, match="are empty"):
            sampler_for(Recipe(**fields), everything, empty, 2)


# -- segmentation and detection ----------------------------------------------------------------------------


def test_labels_are_cut_and_turned_with_the_image(everything):
    draw = sampler(everything, task="segmentation", high_patch=64, augment=True, batch=20)
    labelled = 0
    for step in range(8):
        batch = draw.batch(step)
        assert batch.low is batch.high
        assert tuple(batch.labels.shape) == (20, 64, 64)
        for image, labels in zip(batch.high.numpy(), batch.labels.numpy(), strict=True):
            assert not labels.any() or ((image[0] > 0.8) == (labels > 0)).all()
            assert set(np.unique(labels)) <= {0, 1, 2}
            labelled += labels.any()
    assert labelled >= 0.5 * 160
    assert labelled < 160


@pytest.mark.parametrize(("asked", "side"), [(0, 32), (40, 32), (70, 64), (96, 96)])
def test_sides_of_segmentation_are_multiples_of_32(everything, asked, side):
    batch = sampler(everything, task="segmentation", high_patch=asked).batch(0)
    assert tuple(batch.high.shape[-2:]) == (side, side)
    whole = sampler(everything, task="segmentation", region="slice").batch(0)
    assert tuple(whole.high.shape[-2:]) == (64, 64)


def test_centres_stay_with_the_lesion(everything):
    """The labels' centre, put through the same resizing, is where the batch says."""
    batch = sampler(everything, task="detection", batch=24, augment=True).batch(0)
    assert tuple(batch.high.shape) == (24, 1, 128, 128)
    assert tuple(batch.centres.shape) == (24, 2)
    for image, centre in zip(batch.high.numpy(), batch.centres.numpy(), strict=True):
        rows, columns = np.nonzero(image[0] > 0.8)
        found = (rows.mean() + 0.5) / 128, (columns.mean() + 0.5) / 128
        assert found == pytest.approx(centre, abs=0.015)


def test_small_detectors_get_small_images(everything):
    assert tuple(sampler(everything, task="detection", high_patch=64).batch(0).high.shape[-2:]) == (64, 64)


# -- the shared data ---------------------------------------------------------------------------------------


def test_a_shared_pair_is_sampled(tmp_path):
    pair = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "train" / "brain_mr" / "tcga_FG-6692"
    if not pair.is_dir():
        pytest.skip("the shared data is not there")
    from medsr_cli import formats
    from medsr_cli.training.companions import Rules, attach
    from medsr_cli.training.gather import find_tree, pack_images
    from tests.training.test_gather import Ear

    def read(found):
        return formats.open_image(found.path)

    attached = attach(find_tree(pair, formats.is_image_name), Rules(guided=True), read)
    pack_images(attached.images, read, tmp_path / "p.safetensors", Ear())
    slices = PackedSlices(tmp_path / "p.safetensors")
    batch = sampler(slices, 4, method="cohft", degradation="fourier", region="slice", batch=4).batch(0)
    assert tuple(batch.high.shape) == (4, 1, 248, 196)
    assert tuple(batch.low.shape) == (4, 1, 62, 49)
    # T1 and T2 of one head share edges, not values.
    t2, t1 = (np.hypot(*np.gradient(planes.numpy()[1, 0])).ravel() for planes in (batch.high, batch.guide))
    assert 0.2 < np.corrcoef(t1, t2)[0, 1] < 0.95
