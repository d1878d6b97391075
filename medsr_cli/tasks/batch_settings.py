"""Where a batch is recorded, and what decides its results: by that another run can tell that it is the same batch."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medsr_cli.errors import ArgumentsError, MedsrError, mention
from medsr_cli.tasks.batch_record import NAME, BatchRecord
from medsr_cli.tasks.batch_request import BatchRequest
from medsr_cli.tasks.model import is_path
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.request import UpscaleRequest


def record_place(request: UpscaleRequest, batch: BatchRequest, *, several: bool) -> Path | None:
    """Where the record of a batch is; None where there is none.

    Beside the results: in the folder that `-o` names, or in the one tree whose results stand in it. A single input has
    a record only where one is named.

    Raises:
        ArgumentsError: `--resume` without a record.
    """
    if batch.record is not None:
        return batch.record
    if several and request.output is not None:
        return request.output / NAME
    if several and len(request.inputs) == 1 and request.inputs[0].is_dir():
        return request.inputs[0] / NAME
    if batch.resume:
        msg = "--resume needs the record of the batch, and there is no folder of results that it would be in."
        raise ArgumentsError(msg, "Give -o FOLDER, or name it with --batch-record.")
    return None


def open_record(
    request: UpscaleRequest, batch: BatchRequest, progress: Progress, *, several: bool
) -> AbstractContextManager[BatchRecord | None]:
    """The record of a batch, to be used as a context; None inside where there is none.

    Raises:
        ArgumentsError: `--resume` with other settings or without a record, or a file that is no record.
        RunError: it cannot be written.
    """
    place = record_place(request, batch, several=several)
    if place is None:
        return nullcontext(None)
    record = BatchRecord(place, settings_of(request), resume=batch.resume)
    progress.detail(f"The batch is recorded in {mention(place)}.")
    if batch.resume and record.versions:
        progress.warn(f"Parts of this batch were done by medsr {', '.join(sorted(record.versions))}.")
    return record


def settings_of(request: UpscaleRequest) -> dict[str, str]:
    """Options and files that decide the results, each as a text; never to be shown, for they name files.

    What only decides how fast a result comes is not among them (device, threads, tile, memory), nor what is done
    with results that are there, nor the version of medsr, which the record keeps beside.
    """
    asked = request.model
    found: dict[str, Any] = {
        "model": asked.model,
        "weights": asked.weights,
        "checkpoints": _checkpoints(request),
        "scale": [[float(factor) for factor in request.magnification.factors], request.magnification.spacing_mm],
        "fit": asked.fit,
        "modality": asked.modality,
        "precision": asked.precision,
        "backend": asked.backend,
        "tta": asked.ensemble,
        "back-projection": asked.back_projection,
        "axis": request.axis,
        "series": request.series,
        "roi": [request.region, request.detector],
        "guide": None if request.guide is None else [asdict(request.guide), _digest(request.guide.path)],
        "channels": len(request.channels),
        "training": asdict(request.training),
        "suffix": request.ending,
        "dicom": asdict(request.dicom),
        "strict": request.strict,
        "maps": [request.intermediate, request.spread, request.consistency_map is not None],
        "reports": [request.report is not None, request.preview is not None],
    }
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in found.items()}


def _checkpoints(request: UpscaleRequest) -> list[str | None]:
    """Checksums of what may be used: of the file that is named, or of all on this machine that have the name."""
    asked = request.model
    if asked.weights is not None and is_path(asked.weights):
        return [_digest(Path(asked.weights))]
    from medsr_cli.networks import catalogue
    from medsr_cli.tasks.weights import open_shelf

    name = asked.weights or asked.model
    try:
        methods = {arch.id for arch in catalogue.named(name) if arch.module}
        if not methods:
            return []  # computed, not learned
    except MedsrError:
        methods = set()  # the id of a checkpoint
    shelf = open_shelf()
    entries = [e for e in shelf.manifest.entries if e.id == name or e.method in methods]
    return [entry.sha256 or entry.git_blob for entry in entries if shelf.store.present(entry)]


def _digest(path: Path) -> str | None:
    from medsr_cli.provenance.record import sha256_of

    return sha256_of(path)
