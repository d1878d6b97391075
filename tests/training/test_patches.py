import numpy as np
import pytest

from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.patches import PatchSampler, augmented
from medsr_cli.training.recipe import Recipe
from medsr_cli.volume.resample import shrink
from tests.training.anatomy import packed


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return PackedSlices(packed(tmp_path_factory.mktemp("pack") / "p.safetensors", subjects=3))


def sampler(slices, subjects=("s0", "s1"), scale=2, **fields):
    recipe = Recipe(**{"batch": 4, "patch": 8, **fields})
    return PatchSampler(slices, slices.indices_of(subjects), recipe, scale)


FULL = {"augment": True, "gain": 3.0, "reduced_share": 0.5, "minimum_deviation": 0.01}


@pytest.mark.parametrize("fields", [{}, FULL], ids=["paper", "quick"])
def test_a_batch_depends_on_seed_and_step_alone(slices, fields):
    one, other = sampler(slices, **fields), sampler(slices, **fields)
    one.batch(0)  # what was drawn before does not matter
    for step in (5, 3):
        for a, b in zip(one.batch(step), other.batch(step), strict=True):
            assert a.equal(b)
    assert not one.batch(5)[1].equal(one.batch(6)[1])
    assert not one.batch(5)[1].equal(sampler(slices, seed=1, **fields).batch(5)[1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_is_the_shrunken_high(slices, scale):
    low, high = sampler(slices, scale=scale).batch(0)
    assert tuple(low.shape) == (4, 1, 8, 8)
    assert tuple(high.shape) == (4, 1, 8 * scale, 8 * scale)
    assert low.dtype == high.dtype
    assert low.numpy() == pytest.approx(shrink(high.numpy(), (8, 8)))


def test_patches_come_from_the_named_subjects_alone(slices):
    """Every patch is found again, pixel for pixel, in a slice of the subject that was asked for."""
    draw = sampler(slices, subjects=["s1"])
    allowed = [slices.slice(int(i)) for i in slices.indices_of(["s1"])]
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(s, (16, 16)).reshape(-1, 256) for s in allowed])
    for step in range(5):
        for patch in draw.batch(step)[1].numpy():
            assert (windows == patch.reshape(256)).all(axis=1).any()


def test_a_slice_smaller_than_the_patch_is_extended(slices):
    low, high = sampler(slices, patch=40).batch(0)
    assert tuple(high.shape[-2:]) == (80, 80)
    assert (high[:, :, 47:] == high[:, :, 47:48]).all()
    assert bool(low.isfinite().all())


def test_flat_patches_are_rare_where_they_are_drawn_again(slices):
    plain = np.concatenate([sampler(slices).batch(i)[1].numpy() for i in range(30)])
    picky = np.concatenate([sampler(slices, minimum_deviation=0.08).batch(i)[1].numpy() for i in range(30)])
    flat = [(patches.std(axis=(1, 2, 3)) < 0.08).mean() for patches in (plain, picky)]
    assert flat[1] < flat[0] / 2


def test_the_eight_symmetries_are_eight():
    image = np.arange(9.0).reshape(3, 3)
    images = {augmented(image, which).tobytes() for which in range(8)}
    assert len(images) == 8
    assert all(sorted(augmented(image, which).ravel()) == list(range(9)) for which in range(8))
