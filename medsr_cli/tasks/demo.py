"""The first picture: real slices that travel inside the package, shrunken and brought back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from medsr_cli import formats
from medsr_cli.evaluation.metrics import psnr
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.tasks.model import ModelRequest, load_model
from medsr_cli.tasks.preview import picture_png
from medsr_cli.tasks.progress import Progress
from medsr_cli.volume.intensity import measure
from medsr_cli.volume.resample import resize, shrink

SCALE = 4
IMAGE = "demo_brain_t2.nii.gz"


@dataclass(frozen=True)
class DemoResult:
    """Where the picture is and how close each method came; PSNR in dB, range of the volume."""

    output: str
    slices: int
    psnr_db: float
    bicubic_psnr_db: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def run_demo(output: Path, progress: Progress, *, overwrite: bool = False, threads: int | None = None) -> DemoResult:
    """Shrink, upscale, compare and draw.

    Raises:
        WeightsError: the package has no checkpoint for it.
        ArgumentsError: the picture exists and may not be replaced.
    """
    path = Path(str(resources.files("medsr_cli").joinpath("checkpoints", IMAGE)))
    reader = formats.open_image(path, ReadOptions())
    intensity = measure(reader.slices(), None)
    model = load_model(ModelRequest("rdst", threads=threads), (SCALE, SCALE), "mr", progress)
    rows, ours, cubics = [], [], []
    for number, pixels in enumerate(reader.slices(), start=1):
        high = intensity.normalise(pixels)[0]
        high = high[: high.shape[0] // SCALE * SCALE, : high.shape[1] // SCALE * SCALE]
        low = shrink(high, (high.shape[0] // SCALE, high.shape[1] // SCALE))
        cubic = resize(low, (high.shape[0], high.shape[1]))
        enlarged = model.engine.run(low[None, None].astype(np.float64)).planes[0, 0]
        ours.append(psnr(enlarged, high, SCALE))
        cubics.append(psnr(cubic, high, SCALE))
        rows.append([image[::-1] for image in (cubic, enlarged, high)])
        progress.slices(number, reader.volume.slices)
    with atomic_file(output, overwrite=overwrite) as file:
        file.write(picture_png([[image[None] for image in row] for row in rows]))
    return DemoResult(str(output), len(rows), float(np.mean(ours)), float(np.mean(cubics)))
