"""The real DICOM series of the shared data, and their results by the whole main job."""

from pathlib import Path

from medsr_cli.tasks.magnification import Magnification
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.request import Item, UpscaleRequest
from medsr_cli.tasks.upscale import upscale

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
FOLDERS = sorted(path.name for path in SHARED.iterdir() if path.is_dir()) if SHARED.is_dir() else []


def upscaled(source: Path, output: Path, scale: str = "2", **more: object) -> list[Item]:
    """By bicubic, into `output`; the items that are done."""
    request = UpscaleRequest(
        inputs=(source,),
        model=ModelRequest("bicubic"),
        magnification=Magnification.parse(scale, None),
        output=output,
        **more,
    )
    return [item for item in upscale(request) if item.status == "done"]
