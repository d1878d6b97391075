"""Runs batches in processes of their own, forked from one that has imported everything: see test_batch.py.

Called with a JSON object: `mode` (`together` or `killed`), `tree`, `out`, `runs`, `seed`, `options` of a BatchRequest.
Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path[:0] = [ROOT] if ROOT not in sys.path else []

import nibabel  # noqa: E402, F401 - what runs need is imported before they are forked
import torch  # noqa: E402, F401

import medsr_cli.formats.nifti  # noqa: E402, F401
from medsr_cli.provenance.record import software  # noqa: E402
from medsr_cli.tasks import batch, file_lists, job, preview  # noqa: E402, F401
from medsr_cli.tasks.batch_request import BatchRequest  # noqa: E402
from medsr_cli.tasks.magnification import Magnification  # noqa: E402
from medsr_cli.tasks.model import ModelRequest  # noqa: E402
from medsr_cli.tasks.request import Item, UpscaleRequest  # noqa: E402
from medsr_cli.tasks.upscale import upscale  # noqa: E402


def run_batch(tree: Path, out: Path | None, asked: BatchRequest, **more) -> list[Item]:
    """Bicubic, twice as large, of a tree."""
    given = {"inputs": (tree,), "recursive": True, "magnification": Magnification((2.0, 2.0)), **more}
    return list(upscale(UpscaleRequest(model=ModelRequest(model="bicubic"), output=out, batch=asked, **given)))


def start(tree: Path, out: Path, asked: BatchRequest, told: Path | None) -> int:
    """Fork a process that runs the batch; what it did is written into `told`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        items = run_batch(tree, out, asked)
        if told is not None:
            lines = [[item.source.name, item.status, item.error and item.error.exit_code] for item in items]
            told.write_text(json.dumps(lines))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def together(tree: Path, out: Path, asked: BatchRequest, runs: int) -> list:
    told = [out.parent / f"told-{number}" for number in range(runs)]
    pids = [start(tree, out, asked, path) for path in told]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [
        [code, json.loads(path.read_text()) if path.exists() else None] for code, path in zip(codes, told, strict=True)
    ]


def killed(tree: Path, out: Path, asked: BatchRequest, runs: int, seed: int, longest_s: float) -> list:
    """Kill a run at a random moment, `runs` times; each goes on where the last was."""
    random.seed(seed)
    codes = []
    for _ in range(runs):
        pid = start(tree, out, asked, None)
        time.sleep(random.uniform(0, longest_s))  # noqa: S311
        os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    software()
    asked = BatchRequest(**given["options"])
    places = Path(given["tree"]), Path(given["out"])
    if given["mode"] == "together":
        print(json.dumps(together(*places, asked, given["runs"])))
    else:
        print(json.dumps(killed(*places, asked, given["runs"], given["seed"], given["longest_s"])))
