"""`medsr upscale`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsr_cli.cli import options
from medsr_cli.cli.render import Terminal, complain, print_json, print_path
from medsr_cli.errors import ArgumentsError, mention

if TYPE_CHECKING:
    from medsr_cli.tasks.batch_outcome import Tally
    from medsr_cli.tasks.magnification import Magnification
    from medsr_cli.tasks.request import GuideRequest, Item


def upscale(
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="INPUT...", help="Images, DICOM folders, studies or zips.")
    ] = None,
    more_inputs: Annotated[list[Path] | None, typer.Option("-i", "--input", help="The same as INPUT.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File, or folder for several inputs.")] = None,
    model: options.Model = "rdst",
    scale: options.ScaleText = None,
    spacing: Annotated[
        float | None, typer.Option("--spacing", help="Wanted in-plane spacing in mm, instead of --scale.")
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Reach scales without a checkpoint: the next larger one, then shrunken to size."),
    ] = False,
    weights: options.Weights = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="mr, ct, us or xr; else read from the file.")
    ] = None,
    axis: options.Axis = "auto",
    series: Annotated[
        str | None,
        typer.Option("--series", help="One series of a study: its number in medsr inspect, or its SeriesInstanceUID."),
    ] = None,
    roi: Annotated[
        str | None,
        typer.Option("--roi", help="Only x,y,w,h of each slice (pixels), or auto: where a detector sees a lesion."),
    ] = None,
    detector: Annotated[
        str | None, typer.Option("--detector", help="Checkpoint of the lesion detector for --roi auto.")
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option("--channels", help="A,B,...: registered images that the network takes together, for INPUT."),
    ] = None,
    guide: Annotated[
        Path | None, typer.Option("--guide", help="Second image of the same place (T1 for T2), for cohft.")
    ] = None,
    guide_series: Annotated[
        str | None, typer.Option("--guide-series", help="SeriesInstanceUID of the guide, of a folder with several.")
    ] = None,
    register: Annotated[
        str, typer.Option("--register", help="none, or rigid: align the guide where the patient moved between.")
    ] = "none",
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Take a guide of another patient or frame of reference.")
    ] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average eight orientations of each slice; 8 times slower.")
    ] = False,
    spread: Annotated[
        bool, typer.Option("--spread", help="With --tta: also write a map of how far the orientations differ.")
    ] = False,
    back_projection: Annotated[
        int, typer.Option("--back-projection", min=0, max=1000, help="Correct the result N times by its input.")
    ] = 0,
    consistency_map: Annotated[
        Path | None,
        typer.Option(
            "--consistency-map",
            help="Write |shrunken result - input| in the image's units, on the input's grid (.nii.gz, .tiff, ...).",
        ),
    ] = None,
    intermediate: Annotated[
        bool, typer.Option("--intermediate", help="msgan: also write the x2 result of its first stage.")
    ] = False,
    preset: Annotated[str, typer.Option("--preset", help="uscyclegan: released or paper.")] = "released",
    without: Annotated[
        list[str] | None, typer.Option("--without", help="uscyclegan: train without the perceptual term: perceptual.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", min=0.01, help="uscyclegan: stop training after so long.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="uscyclegan: the same seed gives the same result.")] = 0,
    backend: options.Backend = "auto",
    no_probe: options.NoProbe = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    tile: Annotated[str, typer.Option("-t", "--tile", help="auto, or the side of a tile in pixels.")] = "auto",
    max_vram: options.MaxVram = None,
    threads: options.Threads = None,
    deterministic: options.Deterministic = False,
    transfer_syntax: Annotated[
        str,
        typer.Option("--transfer-syntax", help="DICOM results: explicit, rle, jpeg2000-lossless or jpegls-lossless."),
    ] = "explicit",
    stable_uids: Annotated[
        bool,
        typer.Option(
            "--stable-uids", help="DICOM results: the same UIDs for the same source and settings, every time."
        ),
    ] = False,
    multiframe: Annotated[
        bool, typer.Option("--multiframe", help="An enhanced DICOM object stays one, instead of a file for each slice.")
    ] = False,
    private_tags: Annotated[
        str,
        typer.Option("--private-tags", help="DICOM results: safe (what says nothing of the old pixels), all or none."),
    ] = "safe",
    suffix: Annotated[str | None, typer.Option("--suffix", help="Added to a result's name [_x4-rdst].")] = None,
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="Walk folders for images.")] = False,
    files_from: Annotated[
        str | None, typer.Option("--files-from", metavar="FILE|-", help="Read inputs from a list, or standard input.")
    ] = None,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="The list ends each path with a NUL, as find -print0.")
    ] = False,
    batch_record: Annotated[
        Path | None,
        typer.Option("--batch-record", help="Record of the batch [.medsr-batch.jsonl in the folder of results]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the batch that the record tells of.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: try again what was refused, too.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop after the first failure.")] = False,
    max_failures: Annotated[
        int | None, typer.Option("--max-failures", min=1, metavar="N", help="Stop after N failures.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=0, max=64, metavar="N", help="Threads that open and measure the next inputs.")
    ] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            "--dask", metavar="ADDRESS", help="Spread the inputs over a running Dask cluster (tcp://HOST:8786)."
        ),
    ] = None,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Do only what is missing.")] = False,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Write a PNG: bicubic beside the result, three slices.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse what would otherwise be a warning.")] = False,
    offline: options.Offline = False,
    allow_unpinned: options.AllowUnpinned = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    log_paths: options.LogPaths = False,
    log_file: options.LogFile = None,
    debug: options.Debug = False,
) -> None:
    """Upscale images in plane; each result stands beside its input unless -o says where.

    The result keeps type, units, header and place: scan.nii.gz becomes scan_x4-rdst.nii.gz, a DICOM folder
    NAME becomes NAME_x4-rdst/, a new series of the same study. Of a study every series that suits is upscaled, each
    into a folder of its own; the others are listed with the reason. The paths of the results are printed.
    """
    from medsr_cli.tasks.batch_outcome import Tally
    from medsr_cli.tasks.batch_request import BatchRequest
    from medsr_cli.tasks.model import ModelRequest
    from medsr_cli.tasks.request import DicomOutput, UpscaleRequest, known_preset
    from medsr_cli.tasks.self_training import SelfTraining, refuse_unknown_terms
    from medsr_cli.tasks.upscale import upscale as run

    refuse_unknown_terms(without or [])
    request = UpscaleRequest(
        inputs=(*(inputs or ()), *(more_inputs or ())),
        model=ModelRequest(
            model=model,
            weights=weights,
            modality=known_modality(modality),
            backend=known_backend(backend),
            probe=not no_probe,
            device=device,
            precision=precision,
            tile=tile_side(tile),
            max_vram=device_bytes(max_vram),
            threads=threads,
            deterministic=deterministic,
            offline=offline,
            allow_unpinned=allow_unpinned,
            fit=fit,
            ensemble=tta,
            back_projection=back_projection,
        ),
        magnification=asked_magnification(scale, spacing),
        channels=channel_files(channels),
        guide=asked_guide(guide, register, guide_series, allow_mismatch=allow_mismatch),
        region=roi,
        detector=detector,
        training=SelfTraining(known_preset(preset), "perceptual" not in (without or []), max_minutes, seed),
        output=output,
        suffix=suffix,
        intermediate=intermediate,
        spread=spread,
        consistency_map=consistency_map,
        axis=axis,
        series=series,
        dicom=DicomOutput(transfer_syntax, stable_uids, multiframe, private_tags),
        batch=BatchRequest(
            files_from, null, batch_record, resume, retry_failed, fail_fast, max_failures, jobs, log_paths
        ),
        cluster=dask,
        recursive=recursive,
        skip_existing=skip_existing,
        overwrite=overwrite,
        strict=strict,
        report=report,
        preview=preview,
    )
    tally, complaints = Tally(), _Complaints()
    with (
        Terminal(quiet=quiet, bar=not no_progress, verbose=verbose) as terminal,
        closing(run(request, terminal)) as items,
    ):
        for item in items:
            show(item, as_json=as_json, verbose=verbose)
            tally.add(item)
            complaints.see(item)
    complaints.conclude(tally)


def show(item: Item, *, as_json: bool, verbose: bool) -> None:
    """One result on stdout."""
    from medsr_cli.tasks.batch_outcome import item_line
    from medsr_cli.tasks.discretion import id_of, introduce

    introduce(item.source)
    if as_json:
        print_json(item_line(item, id_of(item.source), with_report=verbose))
    elif item.error is None:
        for path in (item.output, *item.more_outputs):
            if path is not None:
                print_path(path)


class _Complaints:
    """Failures on stderr as they happen; that of the only input, or one reason for all, is the process's own."""

    def __init__(self) -> None:
        self._held: Item | None = None
        self._several = False

    def see(self, item: Item) -> None:
        """Tell a failure, unless it may turn out to be the only reason."""
        if item.error is None:
            self._tell_held(item.status != "not begun")
        elif self._several:
            self._tell(item)
        elif self._held is None:
            self._held = item
        elif item.error is not self._held.error:
            self._tell_held(True)
            self._tell(item)

    def conclude(self, tally: Tally) -> None:
        """End with the right exit code."""
        error = tally.error()
        if error is None:
            return
        self._tell_held(self._held is not None and error is not self._held.error)
        raise error

    def _tell_held(self, several: bool) -> None:
        self._several |= several
        if self._several and self._held is not None:
            self._tell(self._held)
            self._held = None

    @staticmethod
    def _tell(item: Item) -> None:
        if item.error is not None:
            complain(f"{mention(item.source.name)}: {item.error.marked}", item.source)


def tile_side(text: str) -> int | None:
    """`auto` or a number of pixels."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        msg = f"--tile {text} is neither auto nor a number of pixels."
        raise ArgumentsError(msg) from error


def known_modality(name: str | None) -> str | None:
    """One of the four, or None."""
    if name is not None and name.lower() not in ("mr", "ct", "us", "xr"):
        msg = f"There is no modality called {name!r}."
        raise ArgumentsError(msg, "Give mr, ct, us or xr.")
    return name.lower() if name else None


def asked_magnification(scale: str | None, spacing_mm: float | None) -> Magnification:
    """From --scale or --spacing; x4 where neither is given."""
    from medsr_cli.tasks.magnification import Magnification

    if scale is not None and spacing_mm is not None:
        msg = "--scale and --spacing both say how much larger."
        raise ArgumentsError(msg, "Give one of them.")
    return Magnification.parse(scale or "4", spacing_mm)


def asked_guide(path: Path | None, register: str, series: str | None, *, allow_mismatch: bool) -> GuideRequest | None:
    """The second image, if there is one."""
    from medsr_cli.tasks.request import GuideRequest, known_registration

    registration = known_registration(register)
    if path is not None:
        return GuideRequest(path, registration, allow_mismatch, series)
    if registration != "none" or series is not None or allow_mismatch:
        msg = "--register, --guide-series and --allow-mismatch are about a guide."
        raise ArgumentsError(msg, "Name it with --guide.")
    return None


def channel_files(text: str | None) -> tuple[Path, ...]:
    """The files that commas separate."""
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        msg = f"--channels {text} has an empty name."
        raise ArgumentsError(msg, "Give one file for each channel, with commas between.")
    return tuple(Path(name) for name in names)


def known_backend(name: str) -> str:
    """`auto`, `torch` or `onnx`.

    Raises:
        ArgumentsError: it is none of them.
    """
    if name not in ("auto", "torch", "onnx"):
        msg = f"There is no backend called {name!r}."
        raise ArgumentsError(msg, "Give auto, torch or onnx.")
    return name


def device_bytes(text: str | None) -> int | None:
    """The value of `--max-vram`, in bytes.

    Raises:
        ArgumentsError: it is not a size.
    """
    from medsr_cli.tasks.sizes import bytes_of

    return None if text is None else bytes_of(text)
