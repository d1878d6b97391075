import copy
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from medsr_cli.errors import ArgumentsError, InputRefused, RunError, WeightsError
from medsr_cli.networks.uscyclegan import DiscriminatorConfig, GeneratorConfig, HrToLrConfig
from medsr_cli.training import cyclegan, self_supervised, stopping
from medsr_cli.training.cyclegan import PAPER, PRESETS, RELEASED, CycleGan, ImagePool
from medsr_cli.training.fathers import enlarged, shrunk
from medsr_cli.training.self_supervised import train_on_image

SHORT = replace(RELEASED, iterations=4)


@pytest.fixture
def small(monkeypatch):
    """Networks of the same kind, a hundredth of the size; pools that are full at once."""
    monkeypatch.setattr(cyclegan, "GeneratorConfig", partial(GeneratorConfig, width1=4, width2=4, width3=4))
    monkeypatch.setattr(cyclegan, "HR_TO_LR", HrToLrConfig(width1=4, width2=4, width3=8, width4=16))
    monkeypatch.setattr(cyclegan, "DISCRIMINATOR", DiscriminatorConfig(conv_dim=4))
    monkeypatch.setattr(cyclegan, "POOL_SIZE", 3)


def speckle(rows=70, columns=82, seed=0):
    """Bright and dark tissue under speckle three pixels wide, like an ultrasound image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    tissue = 0.3 + 0.25 * (np.hypot(x - columns / 2, y - rows / 2) < rows / 3) + 0.15 * np.sin(x / 11)
    fine = rng.rayleigh(1, (rows + 2, columns + 2))
    grains = sum(fine[i : i + rows, j : j + columns] for i in range(3) for j in range(3)) / 9
    return np.repeat(np.clip(tissue * grains / 1.25, 0, 1)[None], 3, axis=0).astype(np.float32)


class Told:
    """Remembers what it is told, and can do something after an iteration."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.calls = at, act, []

    def __call__(self, iteration, limit, loss, error, eta_s):
        self.calls.append((iteration, limit, loss, error, eta_s))
        if iteration == self.at:
            self.act()

    @property
    def losses(self):
        return [call[2] for call in self.calls]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# One iteration


def difference_of_squares(a, b):
    """Stands for VGG-19."""
    return (a**2 - b**2).pow(2).mean()


class Fixed:
    """A generator of numbers that makes a pool give back its image number 1."""

    def random(self):
        return 0.25

    def integers(self, most):
        return 1


def expected_iteration(gan, preset, phi, y, x, z, pooled):
    """Losses and gradients of one iteration, term by term, from copies of the networks."""
    g, f, d_high, d_low = (copy.deepcopy(n) for n in (gan.generator, gan.hr_to_lr, gan.judge_high, gan.judge_low))
    one = torch.ones(1, 1, 5, 5)

    def adversarial(logits, target):
        if preset.name == "released":
            return ((logits - target) ** 2).mean()
        probability = torch.sigmoid(logits.double())
        return -(target * probability.log() + (1 - target) * (1 - probability).log()).mean().float()

    weights = {"released": (1, 1, 1, 0.15), "paper": (5, 0.1, 0.3, 5)}[preset.name]
    y_hat, x_hat = g(x), f(y, z)
    pixel = (y_hat - y).abs().mean() + (x_hat - x).abs().mean()
    cycle = (g(x_hat) - y).abs().mean() + (f(y_hat, z) - x).abs().mean()
    perception = phi(y_hat, y) + phi(x_hat, x) if phi else torch.zeros(())
    verdict = adversarial(d_high(y_hat), one) + adversarial(d_low(x_hat), one)
    terms = (pixel, perception, cycle, verdict)
    loss = sum(w * term for w, term in zip(weights, terms, strict=True))
    loss.backward()
    d_high.zero_grad()
    d_low.zero_grad()
    for judge, real, fake in ((d_high, y, pooled["high"]), (d_low, x, pooled["low"])):
        (adversarial(judge(real), one) + adversarial(judge(fake), 0 * one)).backward()
    networks = {"generator": g, "hr_to_lr": f, "judge_high": d_high, "judge_low": d_low}
    return loss.item(), networks, [term.item() for term in terms]


def assert_same_gradients(actual, expected):
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-3, atol=2e-3 * b.grad.abs().max().item() + 1e-7, msg=name)


def one_iteration(preset, phi):
    """What came out, beside what should have."""
    gan = CycleGan(4, preset, 5, "cpu", phi)
    rng = np.random.default_rng(0)
    y, x = (torch.from_numpy(rng.random((1, 3, 64, 64), dtype=np.float32)) for _ in range(2))
    z = torch.from_numpy(rng.standard_normal((1, 1, 64), dtype=np.float32))
    for pool in gan.pools.values():
        pool.images = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(pool.size)]
    pooled = {name: pool.images[1] for name, pool in gan.pools.items()}
    loss, networks, terms = expected_iteration(gan, preset, phi, y, x, z, pooled)
    before = {name: copy.deepcopy(network) for name, network in gan._networks().items()}
    assert gan.iterate(y, x, z, Fixed()) == pytest.approx(loss, rel=1e-4)
    assert min(terms) >= 0
    assert all(term > 1e-3 for term in (terms[0], terms[2], terms[3]))
    for name, network in gan._networks().items():
        assert_same_gradients(network, networks[name])
        # Adam's first step is the rate itself wherever there is a gradient: everything was stepped, once.
        steps = [
            ((a - b)[a.grad.abs() > 1e-5]).abs()
            for a, b in zip(network.parameters(), before[name].parameters(), strict=True)
        ]
        moved = torch.cat(steps)
        assert moved.numel() > 100
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.01, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(gan.pools["high"].images[1], before["generator"](x)), "made before the step"
        assert torch.equal(gan.pools["low"].images[1], before["hr_to_lr"](y, z))
    return terms


@pytest.mark.parametrize("preset", [RELEASED, PAPER], ids=lambda p: p.name)
@pytest.mark.parametrize("phi", [difference_of_squares, None], ids=["perceptual", "without"])
def test_one_iteration_is_the_equations(small, preset, phi):
    terms = one_iteration(preset, phi)
    assert (terms[1] > 1e-3) == (phi is not None)


def test_one_iteration_at_full_size():
    one_iteration(RELEASED, None)


def test_sizes_and_slopes_of_the_networks():
    gan = CycleGan(3, RELEASED, 0, "cpu", None)
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in gan._networks().items()}
    assert counts == {"generator": 260729, "hr_to_lr": 12300280, "judge_high": 6962369, "judge_low": 6962369}
    assert gan.generator.config == GeneratorConfig(negative_slope=1.0, scale=3)
    assert PAPER.negative_slope == 0.01
    first, second = gan.judge_high.main[0].weight, gan.judge_low.main[0].weight
    assert not torch.equal(first, second)


def test_presets_are_those_of_the_specification():
    assert list(PRESETS) == ["released", "paper"]
    assert [(p.pixel, p.cycle, p.perceptual, p.adversarial) for p in PRESETS.values()] == [
        (1, 1, 1, 0.15),
        (5, 0.3, 0.1, 5),
    ]
    assert [(p.rate, p.minimum_rate, p.iterations, p.follow_rate) for p in PRESETS.values()] == [
        (1e-3, 9e-6, 3000, False),
        (1e-3, 1e-6, 3000, True),
    ]
    assert cyclegan.POOL_SIZE == 50


# The pool


def test_pool_gives_back_what_it_is_given_until_it_is_full():
    pool, rng = ImagePool(50), np.random.default_rng(0)
    images = [torch.full((1,), float(i), requires_grad=True) for i in range(50)]
    for image in images:
        given = pool.swap(image, rng)
        assert given == image
        assert not given.requires_grad
    assert [image.item() for image in pool.images] == list(range(50))


def test_full_pool_gives_back_an_older_one_half_of_the_time():
    pool, rng = ImagePool(50), np.random.default_rng(0)
    for i in range(50):
        pool.swap(torch.tensor(float(i)), rng)
    kept, old, places = set(range(50)), 0, []
    for i in range(50, 4050):
        before = [image.item() for image in pool.images]
        given = pool.swap(torch.tensor(float(i)), rng).item()
        after = [image.item() for image in pool.images]
        if given == i:
            assert before == after
        else:
            old += 1
            place = before.index(given)
            places.append(place)
            assert after[place] == i
            assert after[:place] + after[place + 1 :] == before[:place] + before[place + 1 :]
            kept.discard(given)
            kept.add(i)
    assert old / 4000 == pytest.approx(0.5, abs=0.03)
    assert {image.item() for image in pool.images} == kept
    assert set(places) == set(range(50))


# The learning rate


class Rates:
    """The rates of all optimisers in every iteration."""

    def __init__(self, monkeypatch):
        self.seen = []
        iterate = CycleGan.iterate

        def watched(gan, *args):
            self.seen.append({group["lr"] for o in gan.optimisers.values() for group in o.param_groups})
            return iterate(gan, *args)

        monkeypatch.setattr(CycleGan, "iterate", watched)


@pytest.fixture
def hasty(monkeypatch):
    """Reduces every fourth iteration, as soon as there are records."""
    monkeypatch.setattr(stopping, "RECORD_EVERY", 2)
    monkeypatch.setattr(stopping, "CHECK_EVERY", 2)
    monkeypatch.setattr(stopping, "AT_LEAST", 3)
    rising = iter(range(1000))
    monkeypatch.setattr(self_supervised._Run, "_reconstruction_error", lambda run: float(next(rising)))


def test_released_never_applies_the_reduced_rate(small, hasty, monkeypatch):
    rates = Rates(monkeypatch)
    trained = train_on_image(speckle(), 4, RELEASED)
    assert trained.stop_reason == "rate"
    assert trained.reductions == (7, 11, 15)
    assert trained.iterations == 16
    assert rates.seen == [{1e-3}] * 16


def test_paper_applies_it(small, hasty, monkeypatch):
    rates = Rates(monkeypatch)
    trained = train_on_image(speckle(), 4, PAPER)
    assert trained.stop_reason == "rate"
    assert trained.reductions == (7, 11, 15, 19)
    assert [rate for seen in rates.seen for rate in seen] == pytest.approx(
        [1e-3] * 8 + [1e-4] * 4 + [1e-5] * 4 + [1e-6] * 4
    )


# The whole procedure


def test_what_comes_back(small):
    told = Told()
    trained = train_on_image(speckle(), 4, SHORT, seed=9, progress=told)
    assert (trained.iterations, trained.stop_reason, trained.seed, trained.preset) == (4, "iterations", 9, SHORT)
    assert not trained.network.training
    assert trained.network.config.scale == 4
    assert [call[:2] for call in told.calls] == [(i, 4) for i in range(1, 5)]
    assert all(np.isfinite(told.losses))
    assert told.calls[0][3] is None
    assert told.calls[1][3] == trained.history[0].error
    assert [call[4] >= 0 for call in told.calls] == [True] * 4
    assert told.calls[-1][4] == 0


def test_recorded_error_is_that_of_enlarging_the_shrunk_image(small):
    image = speckle(45, 51)
    trained = train_on_image(image, 4, replace(SHORT, iterations=1))
    low = enlarged(np.clip(shrunk(image, 4), 0, 1), 4, (45, 51))
    with torch.no_grad():
        result = trained.network(torch.from_numpy(low)[None])[0].numpy()
    (record,) = trained.history
    assert (record.iteration, record.error) == (0, pytest.approx(np.mean((result - image) ** 2), rel=1e-4))


def test_same_seed_same_network(small):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (train_on_image(speckle(), 4, SHORT, seed=seed) for seed in (3, 3, 4))
    assert equal(first.network, again.network)
    assert first.history == again.history
    assert not equal(first.network, other.network)
    assert torch.equal(before[0], torch.get_rng_state()), "the caller's generator is left alone"
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("scale", [2, 3])
def test_other_scales_several_slices_and_small_images(small, scale):
    slices = [speckle(30, 41, seed) for seed in range(6)]
    trained = train_on_image(slices, scale, SHORT)
    assert trained.network.config.scale == scale
    stacked = train_on_image(np.stack(slices).astype(np.float64), scale, SHORT)
    assert equal(trained.network, stacked.network)


def test_learns_to_enlarge(small):
    image = speckle(96, 96)
    trained = train_on_image(image, 4, replace(RELEASED, iterations=121))
    assert [r.iteration for r in trained.history] == [0, 60, 120]
    assert trained.history[-1].error < 0.5 * trained.history[0].error
    flat = np.mean((image - image.mean()) ** 2)
    assert trained.history[-1].error < flat


def test_time_limit_and_more_time_later(small, tmp_path):
    state = tmp_path / "s.training"
    trained = train_on_image(speckle(), 4, SHORT, max_seconds=0.0, state_path=state)
    assert (trained.stop_reason, trained.iterations) == ("time", 1)
    told = Told()
    later = train_on_image(speckle(), 4, SHORT, max_seconds=600.0, state_path=state, progress=told)
    assert (later.stop_reason, later.iterations) == ("iterations", 4)
    assert len(told.calls) == 3
    assert later.seconds > trained.seconds > 0
    assert all(call[4] <= 600 for call in told.calls)
    assert equal(later.network, train_on_image(speckle(), 4, SHORT).network)


def test_perceptual_term_is_trained_with(small):
    seen = []

    def phi(result, target):
        seen.append((result.requires_grad, target.requires_grad, tuple(result.shape)))
        return difference_of_squares(result, target)

    with_it = train_on_image(speckle(), 4, SHORT, perceptual=phi)
    assert seen == [(True, False, (1, 3, 64, 64))] * 8
    assert not equal(with_it.network, train_on_image(speckle(), 4, SHORT).network)


# States


LONG = replace(PAPER, iterations=70)


@pytest.fixture
def quick(small, monkeypatch):
    """A record every 5 iterations, a reduction every 15: a whole schedule within 70 iterations."""
    monkeypatch.setattr(stopping, "RECORD_EVERY", 5)
    monkeypatch.setattr(stopping, "CHECK_EVERY", 5)
    monkeypatch.setattr(stopping, "AT_LEAST", 12)
    monkeypatch.setattr(stopping, "SLOPE_FACTOR", 0.0)


def interrupted_once_within_a_record(monkeypatch, number):
    """Ctrl-C in the middle of computing the error for the `number`th time."""
    compute, calls = self_supervised._Run._reconstruction_error, []

    def error(run):
        calls.append(None)
        if len(calls) == number:
            interrupt()
        return compute(run)

    monkeypatch.setattr(self_supervised._Run, "_reconstruction_error", error)


def test_resumed_is_uninterrupted_to_the_bit(quick, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after iterations with and without a record, within a record, and after reductions."""
    watched = Told()
    whole = train_on_image(speckle(), 4, LONG, progress=watched)
    assert whole.reductions == (19, 34, 49, 64)
    assert (whole.iterations, whole.stop_reason) == (65, "rate")
    state, losses = tmp_path / "s.training", []
    for stop in (1, 4, 20, 41):
        told = Told(stop, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_on_image(speckle(), 4, LONG, state_path=state, progress=told)
        losses += told.losses
        assert len(losses) == stop
    interrupted_once_within_a_record(monkeypatch, 3)  # of iterations 40, 45 and 50
    told = Told()
    with pytest.raises(KeyboardInterrupt):
        train_on_image(speckle(), 4, LONG, state_path=state, progress=told)
    losses += told.losses
    assert len(losses) == 51
    told = Told()
    parts = train_on_image(speckle(), 4, LONG, state_path=state, progress=told)
    assert losses + told.losses == watched.losses
    assert equal(whole.network, parts.network)
    assert (whole.history, whole.reductions, whole.stop_reason) == (parts.history, parts.reductions, parts.stop_reason)
    assert whole.iterations == parts.iterations


def test_a_killed_run_goes_on_from_its_last_record(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(self_supervised, "SAVE_AFTER_SECONDS", 0.0)
    short = replace(LONG, iterations=12)
    whole = train_on_image(speckle(), 4, short)

    def killed():
        raise SystemExit

    with pytest.raises(SystemExit):
        train_on_image(speckle(), 4, short, state_path=tmp_path / "s", progress=Told(8, killed))
    told = Told()
    assert equal(train_on_image(speckle(), 4, short, state_path=tmp_path / "s", progress=told).network, whole.network)
    assert told.calls[0][0] == 7


def test_keep_going_stops_like_ctrl_c(small, tmp_path):
    answers = iter([True, True, False])
    with pytest.raises(KeyboardInterrupt):
        train_on_image(speckle(), 4, SHORT, state_path=tmp_path / "s", keep_going=lambda: next(answers))
    told = Told()
    train_on_image(speckle(), 4, SHORT, state_path=tmp_path / "s", progress=told)
    assert [call[0] for call in told.calls] == [3, 4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_state_is_small_and_gives_the_network_again(small, tmp_path):
    state = tmp_path / "s.training"
    trained = train_on_image(speckle(), 4, SHORT, state_path=state)
    generator = sum(p.numel() for p in trained.network.parameters())
    assert state.stat().st_size < 4 * generator + 40_000
    told = Told()
    again = train_on_image(speckle(), 4, SHORT, state_path=state, progress=told)
    assert told.calls == []
    assert equal(trained.network, again.network)
    assert (again.iterations, again.stop_reason, again.history) == (4, "iterations", trained.history)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"images": speckle(seed=1)}, "image"),
        ({"images": [speckle(), speckle()]}, "image"),
        ({"scale": 2}, "scale"),
        ({"preset": replace(SHORT, adversarial=0.2)}, "preset"),
        ({"seed": 1}, "seed"),
        ({"perceptual": difference_of_squares}, "perceptual term"),
    ],
    ids=["pixels", "slices", "scale", "preset", "seed", "perceptual"],
)
def test_the_state_of_another_training_is_refused(small, tmp_path, change, word):
    state = tmp_path / "s.training"
    arguments = {"images": speckle(), "scale": 4, "preset": SHORT, "seed": 0}
    train_on_image(**arguments, max_seconds=0.0, state_path=state)
    kept = state.read_bytes()
    with pytest.raises(ArgumentsError, match=f"s.training was begun with another {word}"):
        train_on_image(**{**arguments, **change}, state_path=state)
    assert state.read_bytes() == kept


def damages():
    def cut(path):
        path.write_bytes(path.read_bytes()[:-5000])

    def something_else(path):
        torch.save({"weights": torch.zeros(3)}, path)

    def without(key):
        def remove(path):
            record = torch.load(path, weights_only=True)
            del record[key]
            torch.save(record, path)

        return remove

    def misshapen(path):
        record = torch.load(path, weights_only=True)
        record["gan"]["networks"]["generator"]["conv.bias"] = torch.zeros(7)
        torch.save(record, path)

    yield pytest.param(cut, id="cut")
    yield pytest.param(lambda path: path.write_bytes(b"no"), id="no state")
    yield pytest.param(something_else, id="another kind")
    yield pytest.param(misshapen, id="misshapen")
    for key in ("gan", "rng", "records", "identity"):
        yield pytest.param(without(key), id=f"without {key}")


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_state_is_refused(small, tmp_path, damage):
    state = tmp_path / "s.training"
    train_on_image(speckle(), 4, SHORT, max_seconds=0.0, state_path=state)
    damage(state)
    with pytest.raises(WeightsError, match="Remove it to start anew"):
        train_on_image(speckle(), 4, SHORT, state_path=state)


# What is refused


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (np.zeros((3, 15, 80), np.float32), InputRefused),
        (np.zeros((3, 80, 15), np.float32), InputRefused),
        (np.full((3, 40, 40), np.nan, np.float32), InputRefused),
        ([], InputRefused),
        (np.zeros((1, 40, 40), np.float32), ValueError),
        ([speckle(), np.zeros((3, 8, 8), np.float32)], InputRefused),
    ],
    ids=["low", "narrow", "nan", "none", "grey", "one of two"],
)
def test_images_that_cannot_be_learnt_from(images, error):
    with pytest.raises(error):
        train_on_image(images, 4, SHORT)


def test_sixteen_pixels_are_enough(small):
    trained = train_on_image(speckle(16, 16), 4, SHORT)
    assert np.isfinite(trained.history[0].error)


@pytest.mark.parametrize("arguments", [{"scale": 5}, {"scale": 1}, {"scale": 4, "seed": -1}])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(ArgumentsError):
        train_on_image(speckle(), **arguments)


def test_a_loss_that_is_no_number_ends_the_training(small, tmp_path):
    with pytest.raises(RunError, match="iteration 1"):
        train_on_image(speckle(), 4, SHORT, perceptual=lambda a, b: a.mean() * float("nan"), state_path=tmp_path / "s")
    assert not (tmp_path / "s").exists()
