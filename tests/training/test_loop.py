import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from medsr_cli.errors import RunError, WeightsError
from medsr_cli.networks import windows
from medsr_cli.training import loop
from medsr_cli.training.interruption import Stopped, StopSwitch
from medsr_cli.training.loop import Trainer, grow, linear_part, start_from_linear
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.patches import PatchSampler
from medsr_cli.training.prefetch import Prefetcher
from medsr_cli.training.recipe import Recipe
from medsr_cli.training.validation import VolumeScore, validate
from tests.training.anatomy import packed, tiny_network

RECIPE = Recipe(iterations=12, batch=2, patch=8, learning_rate=1e-3, validate_every=5)
RICH = replace(
    RECIPE, schedule="cooldown", warmup=2, linear_steps=3, augment=True, gain=2.0, average=0.9, clip_norm=1.0
)


class Quiet:
    """Remembers what it is told, and can do something at a step."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.losses, self.validations = at, act, [], []

    def step(self, done, total, loss):
        self.losses.append(loss)
        if done == self.at:
            self.act()

    def validated(self, done, scores, best):
        self.validations.append((done, best))


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return PackedSlices(packed(tmp_path_factory.mktemp("pack") / "p.safetensors", subjects=3))


def trainer(slices, path, recipe=RECIPE, score=None):
    sampler = PatchSampler(slices, slices.indices_of(["s0", "s1"]), recipe, 2)
    held = slices.indices_of(["s2"])
    return Trainer(tiny_network(), recipe, sampler, score or (lambda net: validate(net, slices, held, 2, 1)), path)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


@pytest.fixture(scope="module", params=[RECIPE, RICH], ids=["paper", "quick"])
def uninterrupted(request, slices, tmp_path_factory):
    whole = trainer(slices, tmp_path_factory.mktemp("whole") / "s.pt", request.param)
    watched = Quiet()
    whole.run(watched)
    return whole, watched


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resumed_is_uninterrupted_to_the_bit(slices, tmp_path, uninterrupted, stop):
    whole, watched = uninterrupted
    recipe, expected = whole.recipe, whole.state

    first = trainer(slices, tmp_path / "parts.pt", recipe)
    before = Quiet(stop, interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run(before)
    second = trainer(slices, tmp_path / "parts.pt", recipe)
    second.resume()
    assert second.state.step == stop
    after = Quiet()
    state = second.run(after)

    assert before.losses + after.losses == watched.losses
    assert before.validations + after.validations == watched.validations
    assert equal(whole.net.state_dict(), second.net.state_dict())
    assert equal(whole.averaged.state_dict(), second.averaged.state_dict())
    assert equal(expected.best_weights, state.best_weights)
    assert (expected.best_gain_db, expected.best_step) == (state.best_gain_db, state.best_step)
    assert expected.history == state.history


def test_training_changes_the_weights(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt")
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.run(Quiet())
    moved = [k for k, v in run.net.state_dict().items() if not torch.equal(v, start[k])]
    assert "head.weight" in moved
    assert "body.0.conv.weight" in moved
    assert not [k for k in moved if "mean" in k]


def test_validates_before_during_and_after(slices, tmp_path):
    watcher = Quiet()
    state = trainer(slices, tmp_path / "s.pt").run(watcher)
    assert [done for done, _ in watcher.validations] == [0, 5, 10, 12]
    assert state.best_step == max(d for d, best in watcher.validations if best)
    assert state.best_gain_db == max(entry["gain_db"] for entry in state.history)


def test_keeps_the_best_not_the_last(slices, tmp_path):
    gains = iter([-1.0, 3.0, 2.0, 1.0])
    kept = {}

    def score(net):
        gain = next(gains)
        kept[gain] = {k: v.clone() for k, v in net.state_dict().items()}
        return [VolumeScore("s", "n", 1, 30 + gain, 0.9, 30, 0.9)]

    state = trainer(slices, tmp_path / "s.pt", score=score).run(Quiet())
    assert (state.best_step, state.best_gain_db) == (5, 3.0)
    assert equal(state.best_weights, kept[3.0])
    assert not equal(state.best_weights, kept[1.0])


def test_a_stop_inside_a_validation_repeats_it(slices, tmp_path):
    calls = []

    def score(net):
        calls.append(net)
        if len(calls) == 2:
            interrupt()
        return [VolumeScore("s", "n", 1, 31, 0.9, 30, 0.9)]

    run = trainer(slices, tmp_path / "s.pt", score=score)
    with pytest.raises(KeyboardInterrupt):
        run.run(Quiet())
    again = trainer(slices, tmp_path / "s.pt", score=score)
    again.resume()
    assert again.state.step == 5
    assert [entry["step"] for entry in again.state.history] == [0]
    again.run(Quiet())
    assert [entry["step"] for entry in again.state.history] == [0, 5, 10, 12]


def test_stops_when_time_is_over_and_goes_on(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt")
    assert run.run(Quiet(), until_seconds=0.0).step == 0
    again = trainer(slices, tmp_path / "s.pt")
    again.resume()
    assert again.run(Quiet()).step == 12


def test_an_extra_validation_is_not_saved(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt")
    with pytest.raises(KeyboardInterrupt):
        run.run(Quiet(3, interrupt))
    run.validate_now(Quiet())
    assert [entry["step"] for entry in run.state.history] == [0, 3]
    run.validate_now(Quiet())
    assert len(run.state.history) == 2
    again = trainer(slices, tmp_path / "s.pt")
    again.resume()
    assert [entry["step"] for entry in again.state.history] == [0]


def test_trains_after_the_network_was_used_in_inference_mode(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt")
    windows.relative_position_index.cache_clear()
    windows.shift_mask.cache_clear()
    windows.all_window_masks.cache_clear()
    with torch.inference_mode():
        run.net(torch.rand(1, 1, 16, 16))
    assert run.run(Quiet()).step == 12


def test_a_loss_that_is_no_number_keeps_the_last_good_state(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt")

    def spoil():
        with torch.no_grad():
            run.net.head.weight.fill_(math.nan)

    with pytest.raises(RunError, match="step 8"):
        run.run(Quiet(7, spoil))
    again = trainer(slices, tmp_path / "s.pt")
    again.resume()
    assert again.state.step == 5
    assert all(bool(torch.isfinite(v).all()) for v in again.net.state_dict().values())


def test_a_full_disk_keeps_the_last_good_state(slices, tmp_path, monkeypatch):
    run = trainer(slices, tmp_path / "s.pt")
    good = loop.atomic_file

    def full(*args, **kwargs):
        if run.state.step >= 10:
            msg = "The disk is full."
            raise RunError(msg)
        return good(*args, **kwargs)

    monkeypatch.setattr(loop, "atomic_file", full)
    with pytest.raises(RunError, match="full"):
        run.run(Quiet())
    monkeypatch.undo()
    again = trainer(slices, tmp_path / "s.pt")
    again.resume()
    assert again.state.step == 5


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut"])
def test_a_damaged_state_is_refused(slices, tmp_path, content):
    (tmp_path / "s.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="not a training state"):
        trainer(slices, tmp_path / "s.pt").resume()


def test_the_state_of_another_network_is_refused(slices, tmp_path):
    torch.save({"weights": {}, "step": 1}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match="not a training state"):
        trainer(slices, tmp_path / "s.pt").resume()


def test_a_step_with_a_huge_loss_is_skipped(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt", replace(RECIPE, skip_loss=1e-9))
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.run(Quiet())
    assert equal(start, run.net.state_dict())


def test_bfloat16_trains_too(slices, tmp_path):
    plain = trainer(slices, tmp_path / "a.pt").run(watched := Quiet())
    rough = trainer(slices, tmp_path / "b.pt", replace(RECIPE, precision="bf16")).run(other := Quiet())
    assert plain.step == rough.step
    assert other.losses == pytest.approx(watched.losses, rel=0.05)
    assert other.losses != watched.losses
    assert {v.dtype for v in rough.best_weights.values()} == {torch.float32}


def test_a_compiler_that_fails_is_done_without(slices, tmp_path):
    run = trainer(slices, tmp_path / "a.pt")

    def broken(low):
        msg = "no compiler here"
        raise RuntimeError(msg)

    run._forward, run._compiled = broken, True
    watcher = Quiet()
    run.run(watcher)
    trainer(slices, tmp_path / "b.pt").run(plain := Quiet())
    assert watcher.losses == plain.losses


def test_linear_steps_leave_the_body_alone(slices, tmp_path):
    run = trainer(slices, tmp_path / "s.pt", replace(RECIPE, linear_steps=12))
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.run(Quiet())
    moved = {k.split(".")[0] for k, v in run.net.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"head", "tail"}


def test_a_linear_start_is_the_linear_part():
    net = tiny_network()
    start_from_linear(net)
    image = torch.rand(1, 1, 16, 16)
    assert torch.allclose(net(image), linear_part(net, image), atol=1e-6)


def test_a_grown_network_starts_as_the_smaller_one():
    small, large = tiny_network(blocks=1, seed=1), tiny_network(blocks=3, seed=2)
    fresh = grow(large, small.state_dict())
    assert all(key.startswith(("body.1.", "body.2.")) for key in fresh)
    assert fresh
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(small(image), large(image), atol=1e-6)


# -- what it is made of ------------------------------------------------------------------------------------


def test_batches_come_in_order_and_the_thread_ends():
    before = threading.active_count()
    with Prefetcher(lambda step: step * step, 3, 1000) as batches:
        assert [batches.get(step) for step in range(3, 20)] == [step * step for step in range(3, 20)]
    assert threading.active_count() == before


def test_an_error_in_the_background_is_raised_in_front():
    def make(step):
        if step == 2:
            raise RunError("the disk went away")
        return step

    with Prefetcher(make, 0, 10) as batches:
        assert [batches.get(0), batches.get(1)] == [0, 1]
        with pytest.raises(RunError, match="went away"):
            batches.get(2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_the_second_does_not(number):
    before = signal.getsignal(number)
    with StopSwitch() as switch:
        os.kill(os.getpid(), number)
        assert switch.pressed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_what_can_be_dropped_is_dropped_at_once():
    with StopSwitch() as switch:
        with pytest.raises(Stopped), switch.at_once():
            interrupt()
        with pytest.raises(Stopped), switch.at_once():
            pytest.fail("pressed before")
