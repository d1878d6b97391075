"""Two processes started by accelerate on the CPU, beside one that does the same alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsr_cli.errors import DeviceUnavailable
from medsr_cli.training.processes import Processes, accelerator_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("two_processes.py")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
QUIET = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
"""accelerate starts several processes on a machine without a GPU with --multi_gpu too; its --cpu alone starts one."""


def started(folder, launcher):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "RANK", "WORLD_"))},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    processes = [started(folder, launcher) for folder, launcher in zip(folders, ([], LAUNCH + QUIET), strict=True)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    if "Address family not supported" in outputs[1] or "Permission denied" in outputs[1]:
        pytest.skip("processes cannot talk to one another here")
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    names = ("rank0.of1", "rank0.of2", "rank1.of2")
    return [torch.load(folders[name.endswith("of2")] / name, weights_only=True) for name in names]


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


@pytest.mark.parametrize("kind", ["rdst", "critic"])
def test_a_step_of_two_is_that_of_one_with_the_whole_batch(outcomes, kind):
    alone, main, other = (outcome[kind] for outcome in outcomes)
    assert alone["gradients"]
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in alone["gradients"].values())
    assert close(main["gradients"], alone["gradients"])
    assert main["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert main["history"] == [
        {"step": entry["step"], "stage": 0, "gain_db": pytest.approx(entry["gain_db"], abs=1e-5)}
        for entry in alone["history"]
    ]
    assert bool(alone["critic"]) == (kind == "critic")
    for name in ("weights", "averaged", "critic", "gradients"):
        assert all(torch.equal(main[name][k], other[name][k]) for k in main[name])
    # Adam divides by the gradients' size: where they all but vanish, rounding decides on the direction.
    large = [k for k, g in alone["gradients"].items() if float(g.abs().min()) > 1e-5]
    assert large
    assert close({k: main["weights"][k] for k in large}, {k: alone["weights"][k] for k in large}, 1e-5)


def test_only_the_main_process_validates_tells_and_keeps(outcomes):
    _, main, other = (outcome["rdst"] for outcome in outcomes)
    assert (main["is_main"], other["is_main"]) == (True, False)
    assert (main["validated"], other["validated"]) == (3, 0)
    assert (len(main["losses"]), len(other["losses"])) == (2, 0)
    assert main["kept"] > 0
    assert other["kept"] == 0
    assert main["history"] == other["history"]


def test_a_signal_or_a_limit_in_one_stops_both_at_the_same_step(outcomes):
    _, main, other = outcomes
    assert main["signal"] == other["signal"] == 2
    assert main["time"] == other["time"] == 0
    assert main["resumed"] == other["resumed"] == 2


def test_a_batch_that_cannot_be_shared_is_refused(outcomes):
    _, main, _ = outcomes
    assert "batch of 3" in main["refused"]


def test_one_of_several_that_cannot_join_is_refused(monkeypatch):
    accelerator_for("cpu")  # accelerate holds on to it: alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceUnavailable, match="one of several"):
        accelerator_for("cpu")


def test_alone_nothing_is_shared():
    processes = Processes(accelerator_for("cpu"))
    assert (processes.count, processes.rank, processes.is_main) == (1, 0, True)
    values = torch.arange(3.0)
    processes.average([values])
    processes.share_main([values])
    assert torch.equal(values, torch.arange(3.0))
    assert (processes.mean(2.5), processes.from_main(-1.5)) == (2.5, -1.5)
    assert processes.any(True)
    assert not processes.any(False)
    device = torch.device("meta")
    assert processes.device(device) == device
