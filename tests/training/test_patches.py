from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.training.pack import LEVELS, PackedSlices, PackedVolume, PackWriter
from medsr_cli.training.patches import augmented
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.samplers import sampler_for
from medsr_cli.volume.resample import shrink
from tests.training.anatomy import packed

GOLDEN = load_file(Path(__file__).resolve().parents[1] / "golden" / "patch_batches.safetensors")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return PackedSlices(packed(tmp_path_factory.mktemp("pack") / "p.safetensors", subjects=3))


def sampler(slices, subjects=("s0", "s1"), scale=2, **fields):
    recipe = Recipe(**{"batch": 4, "patch": 8, **fields})
    return sampler_for(recipe, slices, slices.indices_of(subjects), scale)


FULL = {"augment": True, "gain": 3.0, "reduced_share": 0.5, "minimum_deviation": 0.01}


@pytest.fixture(scope="module")
def random_pixels(tmp_path_factory):
    """What the golden batches were drawn from."""
    path = tmp_path_factory.mktemp("pack") / "r.safetensors"
    rng = np.random.default_rng(2023)
    with (path.parent / "pixels").open("w+b") as pixels, path.open("wb") as target:
        writer = PackWriter(pixels)
        for s in range(3):
            for v, side in enumerate(((80, 70), (64, 90))):
                image = rng.integers(0, LEVELS + 1, (2, *side)) / LEVELS
                image[:, : side[0] // 2] *= 0
                image[:, 0, 0] = 1
                writer.add(PackedVolume(f"s{s}", f"s{s}/v{v}.nii", "0" * 64, 0.0, 1.0), image)
        writer.finish(target)
    return PackedSlices(path)


@pytest.mark.parametrize(
    ("name", "scale", "fields"),
    [
        ("paper", 4, {}),
        ("quick", 2, {"augment": True, "gain": 3.0, "reduced_share": 0.5, "minimum_deviation": 0.1}),
    ],
)
@pytest.mark.parametrize("step", [0, 5])
def test_batches_are_those_of_the_first_sampler(random_pixels, name, scale, fields, step):
    recipe = Recipe(batch=3, patch=8, seed=7, **fields)
    batch = sampler_for(recipe, random_pixels, random_pixels.indices_of(["s0", "s2"]), scale).batch(step)
    assert (batch.high.numpy() == GOLDEN[f"{name}/{step}/high"]).all()
    # Products of matrices differ in their last bits from library to library.
    assert batch.low.numpy() == pytest.approx(GOLDEN[f"{name}/{step}/low"], abs=2e-6)


@pytest.mark.parametrize("fields", [{}, FULL], ids=["paper", "quick"])
def test_a_batch_depends_on_seed_and_step_alone(slices, fields):
    one, other = sampler(slices, **fields), sampler(slices, **fields)
    one.batch(0)  # what was drawn before does not matter
    for step in (5, 3):
        a, b = one.batch(step), other.batch(step)
        assert a.low.equal(b.low)
        assert a.high.equal(b.high)
        assert a.seed == b.seed
    assert not one.batch(5).high.equal(one.batch(6).high)
    assert not one.batch(5).high.equal(sampler(slices, seed=1, **fields).batch(5).high)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_is_the_shrunken_high(slices, scale):
    batch = sampler(slices, scale=scale).batch(0)
    assert tuple(batch.low.shape) == (4, 1, 8, 8)
    assert tuple(batch.high.shape) == (4, 1, 8 * scale, 8 * scale)
    assert batch.low.dtype == batch.high.dtype
    assert batch.low.numpy() == pytest.approx(shrink(batch.high.numpy(), (8, 8)))


def test_patches_come_from_the_named_subjects_alone(slices):
    """Every patch is found again, pixel for pixel, in a slice of the subject that was asked for."""
    draw = sampler(slices, subjects=["s1"])
    allowed = [slices.slice(int(i)) for i in slices.indices_of(["s1"])]
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(s, (16, 16)).reshape(-1, 256) for s in allowed])
    for step in range(5):
        for patch in draw.batch(step).high.numpy():
            assert (windows == patch.reshape(256)).all(axis=1).any()


def test_a_slice_smaller_than_the_patch_is_extended(slices):
    batch = sampler(slices, patch=40).batch(0)
    assert tuple(batch.high.shape[-2:]) == (80, 80)
    assert (batch.high[:, :, 47:] == batch.high[:, :, 47:48]).all()
    assert bool(batch.low.isfinite().all())


def test_flat_patches_are_rare_where_they_are_drawn_again(slices):
    plain = np.concatenate([sampler(slices).batch(i).high.numpy() for i in range(30)])
    picky = np.concatenate([sampler(slices, minimum_deviation=0.08).batch(i).high.numpy() for i in range(30)])
    flat = [(patches.std(axis=(1, 2, 3)) < 0.08).mean() for patches in (plain, picky)]
    assert flat[1] < flat[0] / 2


def test_the_eight_symmetries_are_eight():
    image = np.arange(9.0).reshape(3, 3)
    images = {augmented(image, which).tobytes() for which in range(8)}
    assert len(images) == 8
    assert all(sorted(augmented(image, which).ravel()) == list(range(9)) for which in range(8))
    for which in range(8):
        planes = np.stack([image, 10 + image])
        assert (augmented(planes, which)[1] == 10 + augmented(image, which)).all()
