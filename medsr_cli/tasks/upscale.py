"""The main job: images in, larger images out, in the right place and in the right units."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsr_cli import __version__, formats
from medsr_cli.errors import (
    ArgumentsError,
    DeviceUnavailable,
    InputRefused,
    MedsrError,
    QualityGateFailed,
    WeightsError,
)
from medsr_cli.evaluation.consistency import CORRELATION_WARNING
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.formats.contract import Derivation, Reader, ReadOptions
from medsr_cli.provenance.record import IN_PLANE, NOTICE, sha256_of, software
from medsr_cli.tasks.enlarge import Enlarger, Measured
from medsr_cli.tasks.model import Model, ModelRequest, load_model
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.volume.geometry import enlarged_length
from medsr_cli.volume.intensity import IntensityRange, measure
from medsr_cli.volume.volume import Volume


@dataclass(frozen=True)
class UpscaleRequest:
    """What to upscale, with what, and where to put it."""

    inputs: tuple[Path, ...]
    model: ModelRequest
    output: Path | None = None
    """File for one input, folder for several; None puts each result beside its input."""
    suffix: str | None = None
    """Added to the name of a result without `output`; None is `_x4-rdst`."""
    axis: str = "auto"
    series: str | None = None
    recursive: bool = False
    skip_existing: bool = False
    overwrite: bool = False
    strict: bool = False
    report: Path | None = None
    preview: Path | None = None


@dataclass
class Item:
    """What became of one input."""

    source: Path
    output: Path | None = None
    status: str = "done"
    """`done`, `skipped` or `failed`."""
    error: MedsrError | None = None
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def upscale(request: UpscaleRequest, progress: Progress | None = None) -> Iterator[Item]:
    """Upscale every input in turn; the model is loaded once.

    Yields one item for each input. One input's failure is in its item and does not stop the rest.

    Raises:
        ArgumentsError: the request itself cannot be.
        WeightsError: the model cannot be loaded; nothing has been done then.
        DeviceUnavailable: the device is not there; nothing has been done then.
    """
    return Upscaler(request, progress or Silent()).run()


class Upscaler:
    """Keeps the models that a batch needs, and the reports it wrote."""

    def __init__(self, request: UpscaleRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self._models: dict[str | None, Model] = {}

    def run(self) -> Iterator[Item]:
        """Every input in turn; see `upscale`."""
        sources = list(found_inputs(self.request))
        if not sources:
            msg = "There is nothing to upscale."
            raise InputRefused(msg, "Name a file, a DICOM folder, or a tree with --recursive.")
        # A folder that stands for the images in it is a batch, also where there is only one.
        several = len(sources) > 1 or sources != list(self.request.inputs)
        if several and (self.request.report or self.request.preview) and self.request.output is None:
            msg = "--report and --preview write one file, but there are several inputs."
            raise ArgumentsError(msg, "Give one input, or a folder with -o: reports are put beside the results.")
        for number, source in enumerate(sources, start=1):
            self.progress.item(source.name, number, len(sources))
            item = Item(source)
            try:
                self._upscale(item, several)
            except (DeviceUnavailable, WeightsError):
                # No other input would fare better: nothing can be run without them.
                raise
            except MedsrError as error:
                item.status, item.error = "failed", error
            yield item

    def _upscale(self, item: Item, several: bool) -> None:
        request = self.request
        clock = time.perf_counter()
        reader = formats.open_image(item.source, ReadOptions(request.axis, request.series))
        volume = reader.volume
        target = target_of(request, reader, several)
        item.output = target
        refuse_same(item.source, target)
        if target.exists() and request.skip_existing:
            item.status = "skipped"
            return
        model = self._model(volume)
        result = volume.enlarged(
            enlarged_length(volume.rows, model.scale), enlarged_length(volume.columns, model.scale)
        )
        item.warnings += self._doubts(model, volume)
        intensity = measure(reader.slices(), volume.padding, volume.alpha)
        item.warnings += remarks(intensity)
        opened = time.perf_counter()
        measured = self._stream(reader, result, model, intensity, target, item)
        item.report = report_of(item, reader, result, model, measured)
        item.report["timings_s"] = {
            "read_and_measure": round(opened - clock, 3),
            "engine": round(measured.engine_seconds, 3),
            "total": round(time.perf_counter() - clock, 3),
        }
        self._write_extras(item, volume, result, measured, several)
        for sentence in item.warnings:
            self.progress.warn(sentence)

    def _model(self, volume: Volume) -> Model:
        modality = self.request.model.modality or volume.modality
        if modality not in self._models:
            self._models[modality] = load_model(self.request.model, modality, self.progress)
        return self._models[modality]

    def _doubts(self, model: Model, volume: Volume) -> list[str]:
        modality = self.request.model.modality or volume.modality
        doubts = model.doubts(modality, volume.spacing_mm)
        if self.request.strict and doubts:
            raise QualityGateFailed(doubts[0], "Leave --strict away to run it all the same.")
        if modality is None and model.card.modality is not None:
            doubts.append(f"The file does not say its modality; {model.card.modality.upper()} was assumed.")
        return [*volume.warnings, *doubts]

    def _stream(
        self, reader: Reader, result: Volume, model: Model, intensity: IntensityRange, target: Path, item: Item
    ) -> Measured:
        scale = (result.rows / reader.volume.rows, result.columns / reader.volume.columns)
        derivation = Derivation(
            method=model.method,
            scale=scale,
            software=f"medsr {__version__}",
            checkpoint_id=model.checkpoint_id,
            checkpoint_sha256=model.checkpoint_sha256,
            degradation=model.degradation,
        )
        enlarger = Enlarger(reader, result, model.engine, intensity)
        with formats.create_image(target, reader, result, derivation, overwrite=self.request.overwrite) as writer:
            measured = enlarger.run(writer, self.progress)
            item.warnings += writer.warnings
            correlation = measured.consistency.correlation
            if correlation < CORRELATION_WARNING:
                sentence = f"The shrunken result agrees poorly with the input (correlation {correlation:.2f})."
                if self.request.strict:
                    raise QualityGateFailed(sentence, "Nothing was written.")
                item.warnings.append(sentence)
        return measured

    def _write_extras(self, item: Item, volume: Volume, result: Volume, measured: Measured, several: bool) -> None:
        from medsr_cli.tasks.preview import preview_png

        report, preview = self.request.report, self.request.preview
        if several:
            # With many inputs each result has its own report and preview, beside it.
            report = beside(item.output, ".json") if report else None
            preview = beside(item.output, ".png") if preview else None
        if report:
            with atomic_file(report, overwrite=True) as file:
                file.write(json.dumps(item.report, indent=2, default=str).encode() + b"\n")
        if preview:
            with atomic_file(preview, overwrite=True) as file:
                file.write(preview_png(measured.shown, volume, result))


def found_inputs(request: UpscaleRequest) -> Iterator[Path]:
    """The inputs as they were named; folders of images, and trees with `recursive`, are walked in order.

    DICOM files of one folder are one input, the folder; all other images are inputs of their own. A folder with
    nothing in it that looks like an image is handed on, to be refused with its reason.
    """
    for path in request.inputs:
        if not path.is_dir():
            yield path
            continue
        folders = [path]
        if request.recursive:
            folders += [p for p in sorted(path.rglob("*")) if p.is_dir()]
        found = [image for folder in folders for image in images_in(folder)]
        yield from found or [path]


def images_in(folder: Path) -> list[Path]:
    """The folder itself if it holds a DICOM series, and every image in it that is not DICOM."""
    series = [folder] if formats.is_image_name(folder) else []
    return series + [p for p in sorted(folder.iterdir()) if is_plain_image(p)]


def is_plain_image(path: Path) -> bool:
    """Whether a path is, by its name, an image file of its own rather than a slice of a DICOM series."""
    entry = formats.format_of_name(path)
    return path.is_file() and formats.is_image_name(path) and entry is not None and entry.name != "dicom"


def target_of(request: UpscaleRequest, reader: Reader, several: bool) -> Path:
    """Where the result of one input goes."""
    scale = f"{request.model.scale:g}"
    suffix = request.suffix if request.suffix is not None else f"_x{scale}-{request.model.model}"
    output = request.output
    beside_input = formats.default_name(reader.path, suffix, reader.volume.format)
    if output is None:
        return beside_input
    if several or (output.is_dir() and not reader.path.is_dir()):
        # A folder of results: each keeps its input's name, and trees keep their folders.
        return output / folder_within(request, reader.path) / beside_input.name
    return output


def folder_within(request: UpscaleRequest, path: Path) -> Path:
    """The folders between a named tree and an image in it."""
    for named in request.inputs:
        if request.recursive and named in path.parents:
            return path.relative_to(named).parent
    return Path()


def refuse_same(source: Path, target: Path) -> None:
    """An input is never changed.

    Raises:
        ArgumentsError: the target is the input, or lies inside an input folder, or the other way round.
    """
    a, b = source.resolve(), target.resolve()
    if a == b:
        msg = f"{target.name} is the input itself."
        raise ArgumentsError(msg, "Give another name with -o; an input is never changed.")
    if source.is_dir() and a in b.parents and b.parent == a and not target.suffix:
        return
    if b in a.parents:
        msg = f"The output folder {target.name} holds the input."
        raise ArgumentsError(msg, "Give another place with -o; an input is never changed.")


def beside(output: Path | None, ending: str) -> Path | None:
    """The name of a side file of a result."""
    return None if output is None else output.with_name(output.name + ending)


def remarks(intensity: IntensityRange) -> list[str]:
    """What is odd about the values of an image."""
    found = []
    if intensity.width == 0:
        found.append("The image is constant; it was enlarged without the network.")
    if intensity.not_finite:
        found.append(f"{intensity.not_finite} voxels are not numbers; they stay so, at their places.")
    return found


def report_of(item: Item, reader: Reader, result: Volume, model: Model, measured: Measured) -> dict[str, Any]:
    """Everything that somebody needs to trust, question or repeat a run."""
    intensity = measured.intensity
    return {
        "notice": NOTICE,
        "limits": IN_PLANE,
        "software": software(),
        "model": {
            "method": model.method,
            "scale": model.scale,
            "checkpoint": model.checkpoint_id,
            "sha256": model.checkpoint_sha256,
            "engine": model.engine.name,
            "device": model.engine.device,
            "precision": model.engine.precision,
        },
        "input": {"name": item.source.name, "sha256": sha256_of(item.source), **geometry(reader.volume)},
        "output": {
            "name": item.output.name if item.output else None,
            "sha256": sha256_of(item.output) if item.output else None,
            **geometry(result),
        },
        "intensity": {
            "minimum": intensity.minimum,
            "maximum": intensity.maximum,
            "not_finite": intensity.not_finite,
            "padded": intensity.padded,
            "clipped": measured.clipped,
            "constant_slices": measured.constant_slices,
        },
        "consistency": measured.consistency.report(intensity.width),
        "warnings": item.warnings,
    }


def geometry(volume: Volume) -> dict[str, Any]:
    """Size, spacing and place of a volume, for the report."""
    return {
        "format": volume.format,
        "shape": list(volume.array_shape),
        "slices": volume.slices,
        "rows": volume.rows,
        "columns": volume.columns,
        "channels": volume.channels,
        "dtype": str(volume.dtype),
        "slice_axis": volume.slice_axis,
        "spacing_mm": volume.spacing_mm,
        "slice_spacing_mm": volume.slice_spacing_mm,
        "affine": None if volume.affine is None else np.asarray(volume.affine).tolist(),
    }
