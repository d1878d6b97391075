import math
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medsr_cli.errors import ArgumentsError, RunError, WeightsError
from medsr_cli.networks import windows
from medsr_cli.training import loop
from medsr_cli.training import state as state_file
from medsr_cli.training.compiling import compiled
from medsr_cli.training.forward import forward
from medsr_cli.training.interruption import Stopped, StopSwitch
from medsr_cli.training.prefetch import Prefetcher
from medsr_cli.training.rdst_start import grow, linear_part, start_from_linear
from medsr_cli.training.recipe import Recipe, changed
from tests.training.anatomy import tiny_network
from tests.training.small_runs import (
    HALF,
    KINDS,
    MIASSR,
    MSGAN,
    PATIENT,
    PLAIN,
    STAGES,
    Gain,
    Quiet,
    Waves,
    network_of,
    trainer,
)

ROOT = Path(__file__).resolve().parents[2]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_run(whole, other):
    """Equal to the bit: weights, averages, critics, optimisers, what is kept, and the history."""
    assert equal(whole.net.state_dict(), other.net.state_dict())
    assert equal(whole.averaged.state_dict(), other.averaged.state_dict())
    assert equal(whole.state.best_weights, other.state.best_weights)
    for name in ("step", "stage", "best_gain_db", "best_step", "history", "ended_early"):
        assert getattr(whole.state, name) == getattr(other.state, name), name
    assert str(whole.optimiser.state_dict()) == str(other.optimiser.state_dict())
    assert whole.scaler.state_dict() == other.scaler.state_dict()
    assert (whole.critic is None) == (other.critic is None)
    if whole.critic is not None:
        assert equal(whole.critic.net.state_dict(), other.critic.net.state_dict())
        assert str(whole.critic.optimiser.state_dict()) == str(other.critic.optimiser.state_dict())


@pytest.fixture(scope="module", params=list(KINDS))
def uninterrupted(request, tmp_path_factory):
    whole = trainer(tmp_path_factory.mktemp("whole") / "s.pt", KINDS[request.param])
    watched = Quiet()
    whole.run(watched)
    return request.param, whole, watched


# -- going on exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, uninterrupted, stop):
    kind, whole, watched = uninterrupted
    first = trainer(tmp_path / "parts.pt", KINDS[kind])
    before = Quiet(stop, interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run(before)
    second = trainer(tmp_path / "parts.pt", KINDS[kind])
    second.resume()
    assert second.state.step == stop
    after = Quiet()
    second.run(after)
    assert second.state.ended_early == (kind == "patience")
    assert before.losses + after.losses == watched.losses
    assert before.validations + after.validations == watched.validations
    same_run(whole, second)


def test_killed_without_warning_it_goes_on_from_the_last_state(tmp_path):
    kind = "miassr, critic in the second stage"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.small_runs", kind, str(tmp_path / "s.pt"), "start"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 8:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, again = trainer(tmp_path / "whole.pt", KINDS[kind]), trainer(tmp_path / "s.pt", KINDS[kind])
        again.resume()
        assert 0 < again.state.step < whole.recipe.total
        again.run(Quiet())
        whole.run(Quiet())
    finally:
        torch.set_num_threads(threads)
    same_run(whole, again)


def test_a_stop_inside_a_validation_repeats_it(tmp_path):
    calls = []

    def score(net):
        calls.append(net)
        if len(calls) == 2:
            interrupt()
        return [Gain(1.0)]

    run = trainer(tmp_path / "s.pt", PLAIN, score)
    with pytest.raises(KeyboardInterrupt):
        run.run(Quiet())
    again = trainer(tmp_path / "s.pt", PLAIN, score)
    again.resume()
    assert again.state.step == 5
    assert [entry["step"] for entry in again.state.history] == [0]
    again.run(Quiet())
    assert [entry["step"] for entry in again.state.history] == [0, 5, 10, 12]


def test_stops_when_time_is_over_and_goes_on(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)
    assert run.run(Quiet(), until_seconds=0.0).step == 0
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert not again.finished
    assert again.run(Quiet()).step == 12
    assert again.finished


def test_a_longer_recipe_goes_on_with_the_same_optimiser(tmp_path):
    trainer(tmp_path / "s.pt", PLAIN).run(Quiet())
    longer = trainer(tmp_path / "s.pt", replace(PLAIN, iterations=15))
    longer.resume()
    assert longer.optimiser.state_dict()["state"]
    assert longer.run(Quiet()).step == 15


def test_an_extra_validation_is_not_saved(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)
    with pytest.raises(KeyboardInterrupt):
        run.run(Quiet(3, interrupt))
    run.validate_now(Quiet())
    assert [entry["step"] for entry in run.state.history] == [0, 3]
    run.validate_now(Quiet())
    assert len(run.state.history) == 2
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert [entry["step"] for entry in again.state.history] == [0]


# -- states ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)

    def spoil():
        with torch.no_grad():
            run.net.head.weight.fill_(math.nan)

    with pytest.raises(RunError, match="step 8"):
        run.run(Quiet(7, spoil))
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert again.state.step == 5
    assert all(bool(torch.isfinite(v).all()) for v in again.net.state_dict().values())


def test_weights_that_are_no_numbers_do_not_replace_a_good_state(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)

    def spoil():
        with torch.no_grad():
            run.net.head.weight.fill_(math.nan)

    with pytest.raises(RunError, match="After step 10 a weight"):
        run.run(Quiet(10, spoil))
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert again.state.step == 5


def test_a_full_disk_keeps_the_last_good_state(tmp_path, monkeypatch):
    run = trainer(tmp_path / "s.pt", PLAIN)
    good = state_file.atomic_file

    def full(*args, **kwargs):
        if run.state.step >= 10:
            msg = "The disk is full."
            raise RunError(msg)
        return good(*args, **kwargs)

    monkeypatch.setattr(state_file, "atomic_file", full)
    with pytest.raises(RunError, match="full"):
        run.run(Quiet())
    monkeypatch.undo()
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert again.state.step == 5


def test_a_write_that_the_system_cuts_off_keeps_the_last_good_state(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def cut():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(RunError, match="Writing"):
            run.run(Quiet(6, cut))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]
    again = trainer(tmp_path / "s.pt", PLAIN)
    again.resume()
    assert again.state.step == 5


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut"])
def test_a_damaged_state_is_refused(tmp_path, content):
    (tmp_path / "s.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="not a training state"):
        trainer(tmp_path / "s.pt", PLAIN).resume()


def test_the_state_of_another_network_is_refused(tmp_path):
    trainer(tmp_path / "s.pt", MSGAN).run(Quiet(), until_seconds=0.0)
    with pytest.raises(WeightsError, match="not a training state"):
        trainer(tmp_path / "s.pt", PLAIN).resume()


@pytest.mark.parametrize("record", [{}, {"format": 1}, {"format": 3}])
def test_the_state_of_another_version_is_refused(tmp_path, record):
    torch.save({"weights": {}, "step": 1, **record}, tmp_path / "s.pt")
    with pytest.raises(WeightsError, match="another version"):
        trainer(tmp_path / "s.pt", PLAIN).resume()


def test_a_stage_that_is_over_keeps_its_length(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "s.pt", STAGES).run(Quiet(9, interrupt))
    for iterations in (6, 20):
        other = trainer(tmp_path / "s.pt", changed(STAGES, {"iterations": iterations}))
        with pytest.raises(ArgumentsError, match="stage 2"):
            other.resume()


# -- what is kept ------------------------------------------------------------------------------------------


def kept_by(recipe, gains, tmp_path):
    """The state after a run whose validations give these gains, and the weights at each."""
    remaining, weights = iter(gains), []

    def score(net):
        weights.append({k: v.clone() for k, v in net.state_dict().items()})
        return [Gain(next(remaining))]

    run = trainer(tmp_path / "s.pt", recipe, score)
    return run.run(Quiet()), weights


def test_keeps_the_best_not_the_last(tmp_path):
    state, weights = kept_by(PLAIN, [-1.0, 3.0, 2.0, 1.0], tmp_path)
    assert (state.best_step, state.best_gain_db) == (5, 3.0)
    assert equal(state.best_weights, weights[1])
    assert not equal(state.best_weights, weights[3])


@pytest.mark.parametrize(
    ("gains", "step"),
    [([-1, 3, 2, 1], 12), ([-1, 3, 2, -0.5], 10), ([-3, -2, -1, -2], 10)],
    ids=["newest", "not below the baseline", "else the best"],
)
def test_a_stage_that_is_judged_by_its_end_keeps_the_newest(tmp_path, gains, step):
    state, weights = kept_by(replace(PLAIN, judge="last"), [float(gain) for gain in gains], tmp_path)
    assert state.best_step == step
    assert equal(state.best_weights, weights[[0, 5, 10, 12].index(step)])


def test_the_best_is_kept_over_the_stages(tmp_path):
    # Validations at 0, 5 and 7, then at 12 and 13.
    for judge, best in (("gain", 7), ("last", 13)):
        recipe = changed(STAGES, {"then": [{**STAGES.then[0], "judge": judge}]})
        state, _ = kept_by(recipe, [0.0, 1.0, 4.0, 2.0, 3.0], tmp_path)
        assert [entry["step"] for entry in state.history] == [0, 5, 7, 12, 13]
        assert [entry["stage"] for entry in state.history] == [0, 0, 0, 1, 1]
        assert state.best_step == best


def test_patience_ends_the_training(tmp_path):
    state, _ = kept_by(PATIENT, [0.0, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 9.0], tmp_path)
    assert (state.step, state.best_step, state.ended_early) == (14, 6, True)
    again = trainer(tmp_path / "s.pt", PATIENT)
    again.resume()
    assert again.finished
    assert again.run(Quiet()).step == 14


# -- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "patience"])
def test_training_changes_the_weights_and_lowers_the_loss(tmp_path, kind):
    recipe = changed(KINDS[kind], {"iterations": 30, "validate_every": 100, "patience": 0})
    run = trainer(tmp_path / "s.pt", recipe)
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    watched = Quiet()
    run.run(watched)
    moved = [k for k, v in run.net.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) > len(start) / 2
    assert sum(watched.losses[25:30]) < sum(watched.losses[:5])


def test_a_plain_step_is_adams(tmp_path):
    run = trainer(tmp_path / "s.pt", replace(PLAIN, iterations=3, weight_decay=0.01, losses={"l1": 0.5, "mse": 2.0}))
    by_hand = network_of(PLAIN)
    adam = torch.optim.Adam(by_hand.parameters(), 1e-3, (0.9, 0.999), weight_decay=0.01)
    for step in range(3):
        batch = Waves(PLAIN).batch(step)
        difference = by_hand(batch.low) - batch.high
        adam.zero_grad()
        (0.5 * difference.abs().mean() + 2 * difference.square().mean()).backward()
        adam.step()
    run.run(Quiet())
    for (name, value), expected in zip(run.net.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-6), name


def test_a_critics_steps_are_those_of_the_paper(tmp_path):
    """Two steps of a critic on batches of their own, then the network against it, by the equations."""
    recipe = replace(MSGAN, iterations=1, average=0.0)
    run = trainer(tmp_path / "s.pt", recipe)
    net, judge = network_of(recipe).train(), run.critic.net
    by_hand = type(judge)(judge.config)
    by_hand.load_state_dict(judge.state_dict())
    critic_adam = torch.optim.Adam(by_hand.parameters(), recipe.critic_rate, recipe.critic_betas)
    adam = torch.optim.Adam(net.parameters(), recipe.learning_rate, recipe.betas)
    for draw in (0, 1):
        batch = Waves(recipe).batch(draw)
        middle, result = net.stages(batch.low)
        a = run.critic._shares(draw, 2)
        mixed = (a * batch.high + (1 - a) * result.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(by_hand(mixed).sum(), mixed, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        critic_adam.zero_grad()
        (by_hand(result.detach()).mean() - by_hand(batch.high).mean() + recipe.penalty * penalty).backward()
        critic_adam.step()
    adam.zero_grad()
    loss = (result - batch.high).square().mean() + 0.5 * (middle - batch.middle).square().mean()
    (loss - 0.01 * by_hand(result).mean()).backward()
    adam.step()
    run.run(watched := Quiet())
    assert watched.losses == [pytest.approx(float(loss.detach() - 0.01 * by_hand(result).mean().detach()), rel=1e-4)]
    for (name, value), expected in zip(judge.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-6), name
    for (name, value), expected in zip(run.net.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-6), name


def test_shares_differ_from_step_to_step(tmp_path):
    judge = trainer(tmp_path / "s.pt", MSGAN).critic
    assert torch.equal(judge._shares(3, 2), judge._shares(3, 2))
    assert not torch.equal(judge._shares(3, 2), judge._shares(4, 2))


def test_a_step_with_a_huge_loss_is_skipped(tmp_path):
    run = trainer(tmp_path / "s.pt", replace(PLAIN, skip_loss=1e-9))
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.run(Quiet())
    assert equal(start, run.net.state_dict())


def test_gradients_are_clipped(tmp_path):
    norms = []
    run = trainer(tmp_path / "s.pt", replace(PLAIN, clip_norm=1e-3))
    step = run.scaler.step

    def measured(optimiser):
        norms.append(
            float(
                torch.linalg.vector_norm(
                    torch.stack([p.grad.norm() for p in run.net.parameters() if p.grad is not None])
                )
            )
        )
        step(optimiser)

    run.scaler.step = measured
    run.run(Quiet())
    assert norms == pytest.approx([1e-3] * 12, rel=1e-3)


def test_the_average_follows_batch_norms_too(tmp_path):
    run = trainer(tmp_path / "s.pt", replace(MSGAN, average=0.5))
    run.run(Quiet())
    mean = "f1.blocks.0.norm1.running_mean"
    averaged, own = run.averaged.state_dict()[mean], run.net.state_dict()[mean]
    assert not torch.equal(averaged, torch.zeros_like(averaged))
    assert torch.allclose(averaged, own, atol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_too(tmp_path, precision):
    plain = trainer(tmp_path / "a.pt", replace(HALF, precision="fp32"))
    rough = trainer(tmp_path / "b.pt", replace(HALF, precision=precision))
    plain.run(watched := Quiet())
    rough.run(other := Quiet())
    # The scaler of fp16 finds its scale by leaving out the first steps.
    assert other.losses == pytest.approx(watched.losses, rel=0.2 if precision == "fp16" else 0.05)
    assert other.losses != watched.losses
    assert {v.dtype for v in rough.state.best_weights.values()} == {torch.float32}
    assert bool(rough.scaler.state_dict()) == (precision == "fp16")


def test_a_compiler_that_fails_is_done_without(tmp_path):
    run = trainer(tmp_path / "a.pt", PLAIN)

    class Broken(torch.nn.Module):
        def forward(self, low):
            msg = "no compiler here"
            raise RuntimeError(msg)

    run._runner = Broken()
    run.run(watcher := Quiet())
    assert run._runner is run.net
    trainer(tmp_path / "b.pt", PLAIN).run(plain := Quiet())
    assert watcher.losses == plain.losses


@pytest.mark.parametrize("recipe", [PLAIN, MSGAN], ids=["rdst", "msgan"])
def test_a_compiled_network_is_the_network(recipe, monkeypatch):
    calls = []

    def eager(function, *_, **__):
        def called(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(torch, "compile", eager)
    net, batch = network_of(recipe).eval(), Waves(recipe).batch(0)
    runner = compiled(net)
    assert torch.equal(forward(runner, batch).image, forward(net, batch).image)
    assert len(calls) == 1
    assert all(a is b for a, b in zip(runner.parameters(), net.parameters(), strict=True))
    assert net.state_dict().keys() == runner.state_dict().keys()


def test_trains_after_the_network_was_used_in_inference_mode(tmp_path):
    run = trainer(tmp_path / "s.pt", PLAIN)
    windows.relative_position_index.cache_clear()
    windows.shift_mask.cache_clear()
    windows.all_window_masks.cache_clear()
    with torch.inference_mode():
        run.net(torch.rand(1, 1, 16, 16))
    assert run.run(Quiet()).step == 12


# -- stages ------------------------------------------------------------------------------------------------


def test_a_new_stage_has_new_optimisers_and_goes_on_with_the_weights(tmp_path):
    run = trainer(tmp_path / "s.pt", MIASSR)
    assert run.critic is None
    at_the_boundary = {}

    def remember():
        at_the_boundary.update({k: v.clone() for k, v in run.net.state_dict().items()})
        at_the_boundary["optimiser"] = run.optimiser

    begin = run._begin_stage
    seen = []

    def watched_begin(index):
        begin(index)
        seen.append(
            (
                index,
                run.state.step,
                equal(run.net.state_dict(), {k: v for k, v in at_the_boundary.items() if k != "optimiser"}),
            )
        )
        assert run.optimiser is not at_the_boundary["optimiser"]
        assert not run.optimiser.state_dict()["state"]

    run._begin_stage = watched_begin
    run.run(Quiet(6, remember))
    assert seen == [(1, 6, True)]
    assert run.critic is not None
    assert [stage.iterations for stage in run.stages] == [6, 7]


def test_stages_draw_other_batches_and_the_rate_begins_anew(tmp_path):
    asked, rates = [], []
    run = trainer(tmp_path / "s.pt", STAGES)
    make = run.make_sampler

    class Counted:
        def __init__(self, stage):
            self.own = make(stage)

        def batch(self, step):
            asked.append(step)
            return self.own.batch(step)

    run.make_sampler = Counted
    run._begin_stage(0)
    step = run._step
    run._step = lambda within, batches: (step(within, batches), rates.append(run.optimiser.param_groups[0]["lr"]))[0]
    run.run(Quiet())
    assert asked == list(range(13))
    first, second = STAGES.stages
    assert rates == [first.learning_rate_at(k) for k in range(7)] + [second.learning_rate_at(k) for k in range(6)]


def test_the_average_goes_on_over_the_stages(tmp_path):
    run = trainer(tmp_path / "s.pt", STAGES)
    before = run.averaged
    run.run(Quiet())
    assert run.averaged is before
    assert not equal(run.averaged.state_dict(), run.net.state_dict())


def test_what_a_later_stage_lacks_is_told_at_once(tmp_path):
    lacking = changed(PLAIN, {"then": [{"losses": {"l1": 1.0, "encoder1": 10.0}}]})
    with pytest.raises(WeightsError, match="segmentation"):
        trainer(tmp_path / "s.pt", lacking)
    unknown = changed(PLAIN, {"then": [{"losses": {"l7": 1.0}}]})
    with pytest.raises(ArgumentsError, match="l7"):
        trainer(tmp_path / "s.pt", unknown)
    with pytest.raises(ArgumentsError, match="linear_steps"):
        trainer(tmp_path / "s.pt", replace(MSGAN, linear_steps=3))


# -- RDST's start ------------------------------------------------------------------------------------------


def test_linear_steps_leave_the_body_alone(tmp_path):
    run = trainer(tmp_path / "s.pt", replace(PLAIN, linear_steps=12))
    start = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.run(Quiet())
    moved = {k.split(".")[0] for k, v in run.net.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"head", "tail"}


def test_what_surrounds_the_blocks_has_its_own_rate(tmp_path):
    groups = loop.parameter_groups(network_of(PLAIN), replace(PLAIN, outer_rate=0.25))
    assert [group["factor"] for group in groups] == [1.0, 0.25]
    net = network_of(PLAIN)
    names = {id(p): name for name, p in net.named_parameters()}
    inner, outer = ([names[id(p)] for p in group["params"]] for group in loop.parameter_groups(net, PLAIN))
    assert all(name.startswith("body.") for name in inner)
    assert {"head.weight", "conv_after_body.weight"} <= set(outer)


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


def test_a_launcher_that_passes_on_an_interruption_is_no_second_wish():
    with StopSwitch() as switch:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert switch.pressed


def test_what_can_be_dropped_is_dropped_at_once():
    with StopSwitch() as switch:
        with pytest.raises(Stopped), switch.at_once():
            interrupt()
        with pytest.raises(Stopped), switch.at_once():
            pytest.fail("pressed before")


def test_recipes_of_the_tests_are_possible():
    for recipe in KINDS.values():
        assert changed(Recipe(), {}) is not None
        assert Recipe.from_json(recipe.to_json()) == recipe
