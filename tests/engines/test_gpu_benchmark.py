"""The benchmark for GPUs runs from its first row to its last, here on the CPU with tiny networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
ROWS = "peaks,rdst,paper,kernels,deterministic,memory"
"""All but those that build every method; `--only` is tried with it."""


def test_the_benchmark_runs_and_writes_what_it_prints(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--only", ROWS, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    rows = {row["row"]: row for row in written["rows"]}
    assert written["about"]["quick"]
    assert all(name in done.stdout for name in rows)
    assert all(row["figure"] > 0 for row in rows.values())
    best = rows["RDST 16x16, bfloat16, best"]
    assert (best["target"], best["stretch"]) == (1500, 3500)
    rate, product = best["tflops"], rows["matrix product 256, bfloat16"]["figure"]
    assert abs(best["share_of_measured_peak"] - rate / product) < 1e-9
    assert rows["RDST-E 40x32 to 160x128, bfloat16, best"]["target"] == 4000
    assert rows["RDST-E deterministic, host to host"]["same_bits_alone"]
    assert rows["2 slices of 72x72, limit 1073741824 bytes"]["largest_difference"] < 1e-4


def test_a_row_that_fails_is_told_and_the_others_go_on(tmp_path):
    file = tmp_path / "gpu.json"
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['gpu.py', '--device', 'cpu', '--quick', '--only', 'kernels,peaks', '--json', {str(file)!r}]\n"
        "import torch\n"
        "torch.profiler.profile = None\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    rows = json.loads(file.read_text())["rows"]
    assert "TypeError" in rows[0]["failed"]
    assert rows[-1]["row"] == "copy on the device"
