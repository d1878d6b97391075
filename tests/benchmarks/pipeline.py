"""A whole `upscale` against the longest of its stages alone: how well reading, running, finishing and writing overlap.

Each stage is measured by itself on the same slices, in one thread of Python's, between runs of the whole; the start of
the process, its imports and the loading of weights are in none of them (the first, unmeasured round has paid for them).
Ideally the whole takes as long as the longest stage. It cannot where the stages need more cores together than there
are: what all of them would take if they shared the cores without loss is printed beside it.

    python tests/benchmarks/pipeline.py [-m METHOD] [-s SCALE] [--side N] [--slices N] [--rounds N] [--dicom]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medsr_cli.__main__ import share_cores

share_cores()  # as the command does, before numpy is imported

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402

from medsr_cli import formats  # noqa: E402
from medsr_cli.engines.pipeline import Queue  # noqa: E402
from medsr_cli.formats.contract import Derivation, ReadOptions  # noqa: E402
from medsr_cli.tasks.enlarge import Enlarger, Stream, _Batch, _Outlet  # noqa: E402
from medsr_cli.tasks.magnification import Magnification  # noqa: E402
from medsr_cli.tasks.model import Model, ModelRequest, degradation_of, load_model  # noqa: E402
from medsr_cli.tasks.progress import Silent  # noqa: E402
from medsr_cli.tasks.request import UpscaleRequest  # noqa: E402
from medsr_cli.tasks.upscale import Upscaler  # noqa: E402
from medsr_cli.volume.intensity import measure  # noqa: E402

TARGET = 1.15
KEPT_BYTES = 1 << 30
"""Results kept for the stages behind the engine; where there are more, the first are used again."""
STAGES = ("read and prepare", "engine", "finish", "write")


class Collector:
    """Stands for the threads behind the one that finishes slices."""

    def __init__(self) -> None:
        self.taken: list[np.ndarray] = []

    def behind(self, name: str, take: object, queue: Queue[Any]) -> Collector:
        """A place to put slices into."""
        return self

    def put(self, item: np.ndarray, n_bytes: int) -> None:
        """Keep it."""
        self.taken.append(item)


def make_input(folder: Path, side: int, slices: int, dicom: bool) -> Path:
    """A smooth phantom with noise, as int16 NIfTI or as a DICOM series."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(slices, side, side)), (1, side / 32, side / 32))
    image = 900 * (smooth - smooth.min()) / np.ptp(smooth) + rng.normal(0, 8, smooth.shape)
    image = np.clip(image, 0, 1000).astype(np.uint16)
    if not dicom:
        path = folder / "in.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.int16).T, np.diag([0.9, 0.9, 3, 1])), path)
        return path
    from tests.formats.dicom_makers import header, place, save

    for at, plane in enumerate(image):
        ds = place(header(rows=side, columns=side, number=at + 1), (0, 0, 3.0 * at), (1, 0, 0, 0, 1, 0), (0.9, 0.9))
        save(ds, folder / "in" / f"{at:04d}.dcm", plane)
    return folder / "in"


class Bench:
    """One input and one model; each stage, and the whole, as something to call."""

    def __init__(self, folder: Path, source: Path, model_request: ModelRequest, scale: float) -> None:
        self.target = folder / ("out" if source.is_dir() else "out.nii.gz")
        self.request = UpscaleRequest(
            (source,), model_request, Magnification.parse(str(scale)), output=self.target, overwrite=True
        )
        self.upscaler = Upscaler(self.request, Silent())
        self.reader = formats.open_image(source, ReadOptions())
        self.model: Model = load_model(model_request, (scale, scale), model_request.modality, Silent())
        volume = self.reader.volume
        self.result = volume.enlarged(*self.model.engine.size_of(volume.rows, volume.columns))
        self.intensity = measure(self.reader.slices(), volume.padding, volume.alpha)
        self.batches = list(self.enlarger()._batches())
        bytes_of_batch = 0
        for batch in self.batches:
            self.enlarger()._enlarge(batch)
            bytes_of_batch = bytes_of_batch or batch.held_bytes()
            if batch is not self.batches[0] and bytes_of_batch * self.batches.index(batch) > KEPT_BYTES:
                break
        self.finished = [batch for batch in self.batches if batch.results]
        self.stored: list[np.ndarray] = []

    def enlarger(self) -> Enlarger:
        """A fresh one, which writes nowhere."""
        limit = self.model.card.limit
        stream = Stream(
            self.reader, self.result, self.intensity, None, degradation_of(self.model), {}, limit  # type: ignore[arg-type]
        )  # fmt: skip
        return Enlarger([stream], self.model.engine)

    def read(self) -> None:
        """Decode and prepare every slice."""
        for _ in self.enlarger()._batches():
            pass

    def run(self) -> None:
        """The engine on prepared planes."""
        enlarger = self.enlarger()
        for batch in self.batches:
            results = batch.results
            enlarger._enlarge(batch)
            batch.results = results  # kept, or not, as before

    def finish(self) -> None:
        """Consistency, values of the file, masks."""
        enlarger = self.enlarger()
        collector = Collector()
        outlet = _Outlet(enlarger.streams[0], collector)  # type: ignore[arg-type]
        for number in range(len(self.batches)):
            batch: _Batch = self.finished[number % len(self.finished)]
            enlarger._finish(batch, [outlet])
            if number >= len(self.finished):
                collector.taken.pop()
        self.stored = collector.taken

    def write(self) -> None:
        """Encode, compress and write every slice, onto the disk, and read it back."""
        derivation = Derivation(self.model.method, self.model.scale, "medsr")
        with formats.create_image(self.target, self.reader, self.result, derivation, overwrite=True) as writer:
            for number in range(self.result.slices):
                writer.write(self.stored[number % len(self.stored)])

    def whole(self) -> None:
        """All of it, as the command does it."""
        for item in self.upscaler.run():
            if item.error is not None:
                raise item.error
        self.upscaler._taken.clear()


def seconds(work: Callable[[], None]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print every stage, the whole, and the ratio."""
    ask = argparse.ArgumentParser()
    ask.add_argument("-m", "--method", default="bicubic")
    ask.add_argument("-s", "--scale", type=float, default=4)
    ask.add_argument("--modality", default="mr")
    ask.add_argument("--side", type=int, default=64)
    ask.add_argument("--slices", type=int, default=180)
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--dicom", action="store_true")
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_input(folder, asked.side, asked.slices, asked.dicom)
        bench = Bench(folder, source, ModelRequest(asked.method, modality=asked.modality), asked.scale)
        works = (bench.read, bench.run, bench.finish, bench.write, bench.whole)
        for work in works:
            work()
        taken = np.array([[seconds(work) for work in works] for _ in range(asked.rounds)])
        report(asked, bench, taken)


def report(asked: argparse.Namespace, bench: Bench, taken: np.ndarray) -> None:
    """Medians of (rounds, stages and the whole)."""
    *stages, whole = np.median(taken, axis=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = "DICOM" if asked.dicom else ".nii.gz"
    size = f"{asked.side} x {asked.side} x {asked.slices} to {bench.result.rows} x {bench.result.columns}"
    sys.stdout.write(f"{asked.method}, {size}, {kind}, {cores} cores: ")
    sys.stdout.write(", ".join(f"{name} {t:.2f} s" for name, t in zip(STAGES, stages, strict=True)))
    longest = statistics.median(taken[:, -1] / taken[:, :-1].max(axis=1))
    shared = statistics.median(taken[:, -1] / np.maximum(taken[:, :-1].max(axis=1), taken[:, :-1].sum(axis=1) / cores))
    print(f"; whole {whole:.2f} s (target {TARGET} of the longest)")
    print(f"whole / longest stage {longest:.2f}; whole / what {cores} cores could do at best {shared:.2f}")


if __name__ == "__main__":
    main()
