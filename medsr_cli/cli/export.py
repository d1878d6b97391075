"""`medsr export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, print_json

if TYPE_CHECKING:
    from medsr_cli.tasks.export import Exported


def export(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.onnx", help="The file to write.")],
    model: options.Model = "rdst",
    scale: Annotated[
        float | None,
        typer.Option("-s", "--scale", help="In-plane enlargement [4]; one file of miassr serves every scale."),
    ] = None,
    weights: options.Weights = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="mr, ct, us or xr: chooses among checkpoints.")
    ] = None,
    opset: Annotated[int, typer.Option("--opset", help="Version of ONNX's standard operators, 17 to 23.")] = 20,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, or fp16 for GPUs; inputs and outputs are float32 in both.")
    ] = "fp32",
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare the file with PyTorch.")] = False,
    overwrite: options.Overwrite = False,
    allow_unpinned: options.AllowUnpinned = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    log_paths: options.LogPaths = False,
    debug: options.Debug = False,
) -> None:
    """Write a network as one ONNX file, for ONNX Runtime and other programs; needs no image.

    The file takes any number of images of any size: "image" is float32 (batch, channels, rows, columns), values
    in [0, 1]; "enlarged" is what comes out. It has standard operators only, all weights inside, and in its
    metadata what the checkpoint says of itself (method, configuration, modality, degradation, licence).

    \b
    Other inputs and outputs:
      miassr       "scale", float64 (2,): enlargement s of rows and columns; N pixels become round(s N), the edges
                   stay where they are; "place" need not be given
      cohft        "guide", (batch, 1, rows x scale, columns x scale): the second image
      msgan        "intermediate" comes out too: the x2 result of the first stage
      uscyclegan   "image" is the image enlarged by bicubic already

    Before it is written it is looked at by ONNX's checker and compared with PyTorch on random images of several
    sizes: the largest difference may be 1e-4 of the range (5e-3 in fp16). The path is printed; what is in the
    file goes to stderr. medsr runs it with --weights FILE.onnx.

    \b
    Examples:
      medsr export -m rdst-e -s 4 -o rdst-e-x4.onnx
      medsr export -m miassr --modality ct -o miassr-ct.onnx
      medsr export -m cohft --weights mine.safetensors -o mine.onnx
    """
    from medsr_cli.cli.upscale import known_modality
    from medsr_cli.tasks.export import ExportRequest
    from medsr_cli.tasks.export import export as run

    request = ExportRequest(
        output=output,
        model=model,
        scale=scale,
        weights=weights,
        modality=known_modality(modality),
        opset=opset,
        precision=precision,
        overwrite=overwrite,
        check=not no_check,
        allow_unpinned=allow_unpinned,
    )
    with Terminal(quiet=quiet, bar=False) as terminal:
        done = run(request, terminal)
        for sentence in facts_of(done):
            terminal.say(sentence)
    if as_json:
        facts = {name: getattr(done, name) for name in done.__dataclass_fields__}
        print_json({**facts, "path": str(done.path)})
    else:
        print(done.path)


def facts_of(done: Exported) -> list[str]:
    """What a person wants to know of the file."""
    scale = "any scale" if done.scale is None else f"x{done.scale:g}"
    names = f"{', '.join(done.inputs)} to {', '.join(done.outputs)}"
    first = (
        f"{done.method}, {scale}, from {done.checkpoint}: opset {done.opset}, {done.precision}, "
        f"{done.bytes / 1e6:.1f} MB, {names}."
    )
    if done.largest_difference is None:
        return [first, "It was not compared with PyTorch."]
    tried = ", ".join(f"{n}x{rows}x{columns}" for n, rows, columns in done.sizes)
    return [first, f"Largest difference from PyTorch: {done.largest_difference:.1e} of the range ({tried})."]
