import numpy as np
import pytest

from medsr_cli.training import fathers
from medsr_cli.training.fathers import SIDE, Family, draw_placement, enlarged, shrunk, warp
from medsr_cli.volume.antialias import antialias_weights

DRAWS = 4000


def noise_image(rows, columns, seed=0):
    return np.random.default_rng(seed).random((3, rows, columns), dtype=np.float32)


def smooth_image(rows, columns):
    y, x = np.mgrid[:rows, :columns]
    waves = [np.sin(x / 7 + k) * np.cos(y / (9 - k)) for k in range(3)]
    return (0.5 + 0.4 * np.stack(waves)).astype(np.float32)


def placements(kind=None, rows=100, columns=150, draws=DRAWS, seed=1):
    rng = np.random.default_rng(seed)
    drawn = [draw_placement(rng, rows, columns) for _ in range(draws)]
    return [p for p in drawn if kind in (None, p.kind)]


def test_shares_of_the_kinds():
    kinds = [p.kind for p in placements()]
    for kind, share in (("plain", 0.05), ("turned", 0.45), ("distorted", 0.50)):
        four_deviations = 4 * np.sqrt(share * (1 - share) / DRAWS)
        assert kinds.count(kind) / DRAWS == pytest.approx(share, abs=four_deviations)


def test_scale_rotation_and_mirror_are_uniform(monkeypatch):
    monkeypatch.setattr(fathers, "ANISOTROPY_DEVIATION", 0.0)
    monkeypatch.setattr(fathers, "SHEAR_DEVIATION", 0.0)
    linear = np.array([p.linear for p in placements("distorted")])
    scale = np.linalg.norm(linear, axis=1)  # of the columns, x and y
    np.testing.assert_allclose(scale[:, 0], scale[:, 1])
    assert 0.6 <= scale.min() < 0.605
    assert 0.995 < scale.max() <= 1.0
    assert scale.mean() == pytest.approx(0.8, abs=0.01)
    angle = np.arctan2(-linear[:, 0, 1], linear[:, 1, 1]) % (2 * np.pi)
    assert np.histogram(angle, 8, (0, 2 * np.pi))[0] / len(angle) == pytest.approx(np.full(8, 1 / 8), abs=0.03)
    assert np.mean(np.linalg.det(linear) < 0) == pytest.approx(0.5, abs=0.05)


def test_anisotropy_is_the_difference_of_the_scales(monkeypatch):
    monkeypatch.setattr(fathers, "SHEAR_DEVIATION", 0.0)
    scale = np.array([np.linalg.norm(p.linear, axis=0) for p in placements("distorted")])
    assert scale.sum(axis=1).min() >= 1.2 - 1e-9
    assert scale.sum(axis=1).max() <= 2.0 + 1e-9
    difference = scale[:, 0] - scale[:, 1]
    assert difference.mean() == pytest.approx(0, abs=0.03)
    assert difference.std() == pytest.approx(0.25, rel=0.08)


def test_shears(monkeypatch):
    monkeypatch.setattr(fathers, "ANISOTROPY_DEVIATION", 0.0)
    monkeypatch.setattr(fathers, "SCALE_RANGE", (1.0, 1.0))
    # (shear · rotation)(shear · rotation)ᵀ = shear · shearᵀ, whose mixed element is the sum of both shears.
    sums = np.array([(p.linear @ p.linear.T)[0, 1] for p in placements("distorted")])
    assert sums.std() == pytest.approx(0.1 * np.sqrt(2), rel=0.08)
    assert sums.mean() == pytest.approx(0, abs=0.02)


def test_crop_of_distorted_fathers_is_uniform_over_what_the_scaled_image_leaves(monkeypatch):
    monkeypatch.setattr(fathers, "ANISOTROPY_DEVIATION", 0.0)
    monkeypatch.setattr(fathers, "SHEAR_DEVIATION", 0.0)
    monkeypatch.setattr(fathers, "SCALE_RANGE", (0.8, 0.8))
    shift = np.array([p.shift for p in placements("distorted", rows=100, columns=150)])
    for axis, most in ((0, (0.8 * 150 - 64) / 2), (1, (0.8 * 100 - 64) / 2)):
        assert np.abs(shift[:, axis]).max() == pytest.approx(most, rel=0.01)
        assert np.histogram(shift[:, axis], 4, (-most, most))[0] / len(shift) == pytest.approx(
            np.full(4, 0.25), abs=0.04
        )


def orientations(image):
    for mirrored in (image, image[:, :, ::-1]):
        for k in range(4):
            yield np.rot90(mirrored, k, axes=(1, 2))


def windows_of(image):
    return np.lib.stride_tricks.sliding_window_view(image[0], (SIDE, SIDE))


@pytest.mark.parametrize("size", [(65, 67), (66, 64)])
def test_plain_and_turned_fathers_are_pieces_of_the_turned_image_pixel_for_pixel(size):
    """Every orientation and every window, the outermost ones too, comes up."""
    image = noise_image(*size)
    views = list(orientations(image))
    seen = set()
    for p in placements(rows=size[0], columns=size[1], draws=1200):
        if p.kind == "distorted":
            continue
        father = warp(image, p.matrix(*size))
        for number, view in enumerate(views):
            match = np.argwhere(windows_of(view)[:, :, 0, 0] == father[0, 0, 0])
            if len(match) and np.array_equal(view[:, match[0][0] :, match[0][1] :][:, :SIDE, :SIDE], father):
                assert p.kind == "turned" or number == 0
                seen.add((number, *match[0]))
                break
        else:
            pytest.fail(f"{p} is no piece of the image")
    every = {(n, i, j) for n, v in enumerate(views) for i, j in np.ndindex(windows_of(v).shape[:2])}
    assert seen == every


def test_identity_and_quarter_turns_of_a_square():
    image = noise_image(SIDE, SIDE)
    seen = {warp(image, p.matrix(SIDE, SIDE)).tobytes() for p in placements("turned", SIDE, SIDE, 300)}
    assert seen == {np.ascontiguousarray(view).tobytes() for view in orientations(image)}
    np.testing.assert_array_equal(warp(image, np.eye(3)), image)


@pytest.mark.parametrize("size", [(16, 90), (31, 17), (64, 40)])
def test_small_images_stand_in_the_middle_of_zeros(size):
    image = noise_image(*size) * 0.5 + 0.5
    plain = placements("plain", *size)[0]
    father = warp(image, plain.matrix(*size))
    rows, columns = (min(n, SIDE) for n in size)
    where = np.argwhere(father[0] > 0)
    low, high = where.min(axis=0), where.max(axis=0)
    assert tuple(high - low + 1) == (rows, columns)
    assert abs(low[0] - (SIDE - 1 - high[0])) <= 1
    assert abs(low[1] - (SIDE - 1 - high[1])) <= 1
    assert (father == 0).sum() == 3 * (SIDE**2 - rows * columns)


@pytest.mark.parametrize(
    "inverse",
    [
        [[1, 0, 5 / 32], [0, 1, -9 / 32]],
        [[0.75, 0.25, 3 + 7 / 32], [-0.25, 0.5, 21 + 1 / 32]],
        [[1.5, -0.5, 10 - 11 / 32], [0.5, -1.25, 60 + 3 / 32]],
    ],
)
def test_warp_is_opencvs_where_opencv_does_not_round(inverse):
    """Places that are multiples of 1/32 pixel, inside, over the border and outside."""
    cv2 = pytest.importorskip("cv2")
    image = noise_image(50, 61)
    matrix = np.linalg.inv(np.vstack((inverse, [0, 0, 1])))
    expected = cv2.warpPerspective(
        image.transpose(1, 2, 0), matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT
    )
    np.testing.assert_allclose(warp(image, matrix), expected.transpose(2, 0, 1), atol=2e-5)


def test_warp_is_opencvs_within_its_rounding():
    cv2 = pytest.importorskip("cv2")
    image = smooth_image(120, 140)
    for p in placements("distorted", 120, 140, 40):
        matrix = p.matrix(120, 140)
        expected = cv2.warpPerspective(image.transpose(1, 2, 0), matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC)
        difference = np.abs(warp(image, matrix) - expected.transpose(2, 0, 1))
        assert np.median(difference) < 2e-3
        # At the image's border a 64th of a pixel is a 64th of the step to zero, and a little for the overshoot.
        assert difference.max() < 0.04


def test_far_places_are_zero_and_nothing_overflows():
    matrix = np.diag([1e-12, 1e-12, 1.0])
    father = warp(noise_image(20, 20), matrix)
    assert np.count_nonzero(father[:, 1:, 1:]) == 0
    assert father[0, 0, 0] > 0


def test_fathers_are_in_range_and_from_all_images():
    images = [np.full((3, 80, 90), level, np.float32) for level in (0.2, 0.6, 1.0)]
    family, rng = Family(images, 4), np.random.default_rng(0)
    levels = []
    for _ in range(300):
        father = family.father(rng)
        assert father.shape == (3, SIDE, SIDE)
        assert father.dtype == np.float32
        assert father.min() >= 0
        assert father.max() <= 1
        levels.append(round(float(np.median(father[father > 0.1])), 1))
    assert [levels.count(level) / 300 for level in (0.2, 0.6, 1.0)] == pytest.approx([1 / 3] * 3, abs=0.11)


@pytest.mark.parametrize(("scale", "small"), [(2, 32), (3, 22), (4, 16)])
def test_son_is_shrunk_clipped_and_enlarged(scale, small):
    father = np.round(noise_image(SIDE, SIDE))  # overshoots when resized
    son = Family([father], scale).son(father, np.random.default_rng(0))
    down, up = antialias_weights(SIDE, small, 1 / scale), antialias_weights(small, SIDE, scale)
    tiny = np.clip(down @ father.astype(np.float64) @ down.T, 0, 1)
    np.testing.assert_allclose(son, up @ tiny @ up.T, atol=1e-6)
    assert son.shape == father.shape


def test_noise_is_added_to_the_small_son():
    father = np.full((3, SIDE, SIDE), 0.5, np.float32)
    rng = np.random.default_rng(0)
    noisy = Family([father], 4, 0.05).son(father, rng)
    small = shrunk(noisy, 4)
    assert small.std() > 0.03
    np.testing.assert_allclose(Family([father], 4).son(father, rng), 0.5, atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_odd_sizes_keep_their_places(scale):
    """A ramp stays the same ramp away from the border: nothing moves, whatever sides are rounded to."""
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 47, dtype=np.float32), (3, 53, 47))
    small = shrunk(ramp, scale)
    assert small.shape == (3, -(-53 // scale), -(-47 // scale))
    back = enlarged(small, scale, (53, 47))
    inner = slice(3 * scale, -3 * scale)
    np.testing.assert_allclose(back[:, inner, inner], ramp[:, inner, inner], atol=1e-5)


def test_same_seed_same_fathers():
    family = Family([noise_image(90, 80)], 4)
    first, again, other = ([family.father(rng) for _ in range(5)] for rng in map(np.random.default_rng, (7, 7, 8)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
