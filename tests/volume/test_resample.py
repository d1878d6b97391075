import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.volume.resample import axis_weights, blur_3x3, resize, shrink

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "specs" / "golden"
FIXTURE = GOLDEN / "degradation_cv2.json"
CASES = json.loads(FIXTURE.read_text())["cases"] if FIXTURE.is_file() else []


@pytest.mark.skipif(not CASES, reason="needs the shared fixtures")
def test_the_fixture_has_both_kinds():
    assert {case["gaussian_blur_3x3"] for case in CASES} == {True, False}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_degradation_equals_the_authors(case):
    arrays = load_file(GOLDEN / "degradation_cv2.safetensors")
    high, low = arrays[f"{case['name']}/hr"], arrays[f"{case['name']}/lr"]
    assert list(low.shape) == case["lr"]
    mine = shrink(high, low.shape, blur=case["gaussian_blur_3x3"])
    assert mine == pytest.approx(low, abs=2e-6)


@pytest.mark.parametrize("size", [(16, 10), (64, 48), (96, 100), (23, 17), (45, 31)])
def test_cubic_equals_opencv(size):
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).random((45, 31))
    theirs = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
    # OpenCV keeps the weights of its taps in single precision.
    assert resize(image, size) == pytest.approx(theirs, abs=2e-6)


def test_single_precision_stays_and_agrees():
    image = np.random.default_rng(0).random((4, 1, 48, 40))
    small = shrink(image.astype(np.float32), (12, 10))
    assert small.dtype == np.float32
    assert small.shape == (4, 1, 12, 10)
    assert small == pytest.approx(shrink(image, (12, 10)), abs=1e-6)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos", "nearest"])
@pytest.mark.parametrize(("n_in", "n_out"), [(10, 40), (40, 10), (7, 7), (1, 4), (5, 13)])
def test_weights_add_up_to_one(kernel, n_in, n_out):
    weights = axis_weights(n_in, n_out, kernel)
    assert weights.shape == (n_out, n_in)
    assert weights.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos", "nearest"])
def test_same_size_changes_nothing(kernel):
    image = np.random.default_rng(0).random((9, 11))
    assert resize(image, (9, 11), kernel) == pytest.approx(image, abs=1e-12)


@pytest.mark.parametrize("kernel", ["cubic", "lanczos"])
@pytest.mark.parametrize("n_out", [128, 8, 45])
def test_edges_align(kernel, n_out):
    """A resampling whose edges align commutes with turning the image round."""
    image = np.random.default_rng(0).random((32, 32))
    turned = resize(image[::-1, ::-1], (n_out, n_out), kernel)[::-1, ::-1]
    assert resize(image, (n_out, n_out), kernel) == pytest.approx(turned, abs=1e-12)


def test_blur_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).random((8, 5))
    theirs = cv2.GaussianBlur(image, (3, 3), 0, borderType=cv2.BORDER_REFLECT_101)
    assert blur_3x3(image) == pytest.approx(theirs, abs=1e-9)
