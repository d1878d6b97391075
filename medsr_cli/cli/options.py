"""Options that mean the same in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("-m", "--model", help="Method, variant or checkpoint id; see medsr models.")]
Scale = Annotated[float, typer.Option("-s", "--scale", help="In-plane enlargement.")]
ScaleText = Annotated[
    str | None,
    typer.Option("-s", "--scale", metavar="S", help="In-plane enlargement [4]; 2x3 for rows and columns apart."),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="A checkpoint's id or a .safetensors file, instead of the best one.")
]
Device = Annotated[str, typer.Option("-d", "--device", help="auto, cpu, cuda, cuda:N, gpu or mps.")]
Backend = Annotated[str, typer.Option("--backend", help="auto (the faster one here), torch or onnx.")]
NoProbe = Annotated[
    bool,
    typer.Option("--no-probe", help="Do not measure engines: auto is then torch, or what was measured before."),
]
MaxVram = Annotated[
    str | None, typer.Option("--max-vram", metavar="SIZE", help="Most memory of the device to use, such as 4G.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same bits every time, also on a GPU; slower.")
]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores unless given.")]
Axis = Annotated[
    str, typer.Option("--axis", help="Slices: auto (acquired plane), axial, sagittal, coronal, or array axis 0, 1, 2.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Open no socket.")]
AllowUnpinned = Annotated[bool, typer.Option("--allow-unpinned", help="Use weights whose hash is not known.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on standard output.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
LogFile = Annotated[Path | None, typer.Option("--log-file", help="Also write what is said, and every traceback, here.")]
LogPaths = Annotated[
    bool,
    typer.Option(
        "--log-paths",
        help="Name files on stderr, in logs and in reports, and pass on what libraries say. Names often hold a "
        "patient's: without this, eight digits of a salted hash stand there, as beside each path in --json.",
    ),
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write the JSON report to this file.")]
Report = Annotated[
    Path | None, typer.Option("--report", help="Write a JSON report: geometry, intensities, consistency, versions.")
]
