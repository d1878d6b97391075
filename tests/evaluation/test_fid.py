"""FID: the formula by three ways, features of grey and of colour, and the refusal without weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from medsr_cli.evaluation import fid as m
from medsr_cli.networks.inception import Inception, InceptionConfig


def drawn(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return shift + scale * rng.standard_normal((n, d)) @ np.diag(np.linspace(0.5, 2, d))


@pytest.mark.parametrize(("n", "k"), [(40, 60), (5, 7), (12, 300)])
def test_is_the_formula(n, k):
    """Sets larger and smaller than the number of features, whose covariances are regular and singular."""
    a, b = drawn(n, 12, 0), drawn(k, 12, 1, shift=0.3, scale=1.4)
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2)
    ca, cb = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(ca @ cb)
    expected = mean + np.trace(ca) + np.trace(cb) - 2 * np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    # Eigenvalues that are zero but for rounding have roots of 1e-8.
    assert m.fid(a, b) == pytest.approx(expected, abs=1e-5)
    assert m.distance_of_moments(m.moments(a), m.moments(b)) == pytest.approx(expected, abs=1e-4)
    assert m.fid(b, a) == pytest.approx(m.fid(a, b))


def test_root_is_that_of_scipy_where_both_are_regular():
    a, b = drawn(200, 6, 0), drawn(300, 6, 1, 0.5)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert m.fid(a, b) == pytest.approx(expected, rel=1e-9)


def test_known_cases():
    a = drawn(50, 8, 0)
    assert m.fid(a, a) == pytest.approx(0, abs=1e-9)
    assert m.fid(a, a + 2) == pytest.approx(8 * 4)
    centre = a.mean(0)
    # Half of the deviation: tr(C + C/4 - C) = tr(C) / 4.
    assert m.fid(a, centre + (a - centre) / 2) == pytest.approx(np.trace(np.cov(a.T)) / 4)
    assert m.fid(np.zeros((3, 4)), np.zeros((2, 4))) == 0


def test_few_images_and_other_features_are_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        m.fid(np.zeros((1, 4)), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="at least 2 images"):
        m.moments(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="4 and 5 values"):
        m.fid(np.zeros((3, 4)), np.zeros((3, 5)))


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    net = Inception(InceptionConfig(16)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net


def test_features_of_grey_colour_and_several_channels(network):
    rng = np.random.default_rng(0)
    grey, rgb, four = rng.random((20, 24)), rng.random((3, 20, 24)), rng.random((4, 30, 18))
    found = m.features(network, [grey, grey[None], np.stack([grey] * 3), rgb, *[four], grey.astype(np.float32)])
    assert found.shape == (9, 128)
    for row in (1, 2, 8):
        np.testing.assert_allclose(found[row], found[0], rtol=1e-3, atol=1e-4)
    assert np.abs(found[3] - found[0]).max() > 0.01
    alone = m.features(network, [four[2]])
    np.testing.assert_allclose(found[6], alone[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        m.features(network, [grey] * 3, batch=2), np.repeat(found[:1], 3, 0), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(m.features(network, [5 * grey - 2]), m.features(network, [np.clip(5 * grey - 2, 0, 1)]))
    assert m.features(network, []).shape == (0, 128)


def test_by_subject(network):
    rng = np.random.default_rng(0)
    first, second = list(rng.random((3, 16, 16))), list(rng.random((2, 16, 16)))
    scores = m.fid_by_subject(network, [(first, first), (second, first), (first[:1], first[:1])])
    assert scores[0] == pytest.approx(0, abs=1e-5)
    assert scores[1] == pytest.approx(m.fid(m.features(network, second), m.features(network, first)))
    assert scores[1] > scores[0]
    assert np.isnan(scores[2])


def test_without_weights_it_is_refused_with_the_command():
    from medsr_cli.weights.manifest import load_manifest

    assert "medsr weights pull inception-fid" in str(m.missing_weights())
    entry = load_manifest().entry(m.WEIGHTS_ID)
    assert entry.pinned
    assert "medsr weights pull inception-fid" in entry.how_to_get
    assert entry.sources[0].file == f"pt_inception-2015-12-05-{entry.sha256[:8]}.pth"
    assert entry.scales == ()
