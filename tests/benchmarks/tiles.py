"""Tiles against the whole slice in stored units, what they cost, and the working memory of every network.

python -m tests.benchmarks.tiles             tiles of RDST-E as they are planned, on real slices
python -m tests.benchmarks.tiles --sweep     other overlaps and ways to blend, from which the default was chosen
python -m tests.benchmarks.tiles --memory    bytes for each pixel, beside those that the catalogue says
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "val"
CHECKPOINTS = Path(__file__).resolve().parents[2] / "medsr_cli" / "checkpoints"
SIDE, TILE = 184, 112
SLICES = {
    "rdst-e-x4-brain-mr": [("brain_mr/ms_long_p04_s1/FLAIR.nii.gz", 24), ("brain_mr/ms_mni_p19/T1.nii.gz", 66)],
    "rdst-e-x4-cardiac-mr": [("cardiac_mr/SC-N-05/0060.png", 0)],
    "rdst-e-x4-ct": [("ct/sbu_A048383/axial_a.nii.gz", 0)],
}
SWEEP = [(overlap, margin) for overlap in (16, 32, 40, 48, 64) for margin in (0, overlap // 4, overlap // 2)]
NETWORKS = {
    **{f"rdst-e x{s}": (128, 192) for s in (2, 3, 4)},
    "rdst x4": (128, 192),
    **{f"m2trans x{s}": (128, 256) for s in (2, 3, 4)},
    **{f"miassr x{s}": (128, 256) for s in (2, 4)},
    "msgan x4": (96, 160),
    "uscyclegan x4": (48, 96),
    **{f"cohft-{size} x{s}": (60, 90) for size in "sml" for s in (2, 3, 4)},
    "cohft-released x4": (60,),
}


def image(name: str, number: int) -> tuple[np.ndarray, float]:
    """The middle of a slice in [0, 1], and the stored units of the range of its volume."""
    path = SHARED / name
    if path.suffix == ".png":
        values, low, high = np.asarray(Image.open(path), np.float64), 0.0, 255.0
    else:
        volume = np.asarray(nib.load(path).dataobj, np.float64)
        low, high = volume.min(), volume.max()
        values = volume[..., number].squeeze()
    top, left = ((n - min(n, SIDE)) // 2 for n in values.shape)
    return (values[top : top + SIDE, left : left + SIDE] - low) / (high - low), high - low


def tiles(sweep: bool) -> None:
    """Print the difference and the cost for each slice."""
    from medsr_cli.engines.plan import computed_share, tiles_of
    from medsr_cli.engines.tiles import TilePlan, run_tiled
    from medsr_cli.engines.torch_runner import engine_for
    from medsr_cli.networks import load_network
    from medsr_cli.networks.catalogue import RDST

    for checkpoint, slices in SLICES.items():
        engine = engine_for(load_network(CHECKPOINTS / f"{checkpoint}.safetensors"), RDST, (4.0, 4.0), device="cpu")
        for name, number in slices:
            values, units = image(name, number)
            planes = values[None, None]
            whole = engine.runner.run(planes)[-1]
            default = tiles_of(TILE, engine.traits)
            for overlap, margin in SWEEP if sweep else [(default.overlap, default.margin)]:
                plan = TilePlan(TILE, overlap, margin=margin)
                tiled = run_tiled(lambda part, _: engine.runner.run(part)[-1], planes, plan, 4)  # noqa: B023
                off = np.abs(tiled - whole) * units
                stored = np.abs(np.rint(tiled * units) - np.rint(whole * units)).max()
                cost = computed_share(512, 512, 256, replace(engine.traits, overlap=overlap))
                print(
                    f"{checkpoint}, {name}, {units:.0f} units: overlap {overlap}, margin {margin}: stored values "
                    f"differ by {stored:.0f} at most (before rounding {off.max():.4f}, mean {off.mean():.6f}); "
                    f"512 x 512 in tiles of up to 256 computes {cost:.2f} times its pixels",
                    flush=True,
                )


def memory() -> None:
    """Print the bytes for each pixel of every network, each measured in a process of its own."""
    from medsr_cli.engines.plan import FIXED_BYTES

    for name, sides in NETWORKS.items():
        peaks = []
        for side in sides:
            command = [sys.executable, "-m", "tests.benchmarks.tiles", "--peak", *name.split(" x"), str(side)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, pixels, said = map(int, done.stdout.split()[-3:])
            peaks.append((pixels, peak))
        pixels, peak = peaks[-1]
        words = ", ".join(f"{b / 1e6:.0f} MB for {p} pixels" for p, b in peaks)
        needed = max(b - FIXED_BYTES for _, b in peaks) / pixels
        word = "enough" if said >= needed else "TOO LITTLE"
        print(f"{name}: {words}; {needed:.0f} bytes for each beyond {FIXED_BYTES // 10**6} MB, said {said}: {word}")


def peak(method: str, scale: int, side: int) -> None:
    """Print the bytes by which one run raised the peak of this process, its pixels, and what the catalogue says."""
    import torch

    from medsr_cli.engines.runner import Place
    from medsr_cli.engines.torch_runner import engine_for
    from medsr_cli.networks import catalogue

    arch, variant = catalogue.find(method)
    module = importlib.import_module(arch.module)
    config = getattr(module, arch.config)
    fields = dict(arch.variants[variant or method])
    if "scale" in config.__dataclass_fields__:
        fields["scale"] = scale
    torch.manual_seed(0)
    engine = engine_for(getattr(module, arch.network)(config(**fields)), arch, (scale, scale), device="cpu")
    rng = np.random.default_rng(0)

    def run(side: int) -> int:
        given = side * (scale if arch.enlarged_first else 1)
        planes = rng.random((1, engine.traits.channels, given, given), np.float32)
        if engine.traits.any_scale:
            place = Place(side, 0, 0, side * scale)
            engine.runner.run_scaled(planes, (scale, scale), (place, place))
        else:
            guide = rng.random((1, 1, side * scale, side * scale), np.float32) if engine.guided else None
            engine.runner.run(planes, guide)
        return given * given

    if arch.tiling != "fixed":
        run(32)
    # 5 sets the peak of the process back to what it has now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    pixels = run(side)
    print(_status("VmHWM") - before, pixels, engine.traits.bytes_per_pixel)


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024


if __name__ == "__main__":
    if "--peak" in sys.argv:
        peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif "--memory" in sys.argv:
        memory()
    else:
        tiles("--sweep" in sys.argv)
