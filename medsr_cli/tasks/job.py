"""One run of the main job: an image, or registered images together, from its files to its results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsr_cli import __version__, formats
from medsr_cli.errors import ArgumentsError, InputRefused, QualityGateFailed, mention
from medsr_cli.evaluation.consistency import CORRELATION_LIMIT, CORRELATION_WARNING
from medsr_cli.formats.atomic import atomic_file, refuse_existing
from medsr_cli.formats.contract import Derivation, Reader, ReadOptions
from medsr_cli.tasks.enlarge import CONSISTENCY, SPREAD, Enlarger, Measured, Stream
from medsr_cli.tasks.inputs import beside, refuse_same, target_of
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.maps import MapSource, map_volume
from medsr_cli.tasks.model import PERCEPTUAL_WARNING, Model, degradation_of
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.report import remarks, report_of
from medsr_cli.tasks.request import Item, UpscaleRequest
from medsr_cli.volume.intensity import IntensityRange, full_scale, measure
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.formats.guide import Guide

LoadModel = Callable[[Reader, Factors, Path, IntensityRange], Model]
INTERMEDIATE = "intermediate"
REAL_NUMBERS = ("nifti", "nrrd", "metaimage", "tiff")
"""Formats that a map of real numbers can be written in."""
SAME_PLACE_MM = 0.01
"""How far the corners of registered images may lie apart."""


class Job:
    """Opens, loads, enlarges, writes and reports; `items` tells what became of each input."""

    def __init__(
        self,
        request: UpscaleRequest,
        sources: tuple[Path, ...],
        several: bool,
        progress: Progress,
        load: LoadModel,
        taken: dict[Path, Path],
    ) -> None:
        self.request, self.several, self.progress, self.load = request, several, progress, load
        self.taken = taken
        """Results of this batch so far, and what each came from."""
        self.items = [Item(source) for source in sources]
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        """Do it.

        Raises:
            MedsrError: nothing of it was written then.
        """
        clock = time.perf_counter()
        readers = self._open()
        if self._is_done(readers):
            return
        volume = readers[0].volume
        scale = self.request.magnification.of(volume, readers[0].path.name)
        target = self.items[0].output
        assert target is not None  # noqa: S101 - `_open` has just set it
        # Of whole images, also where a part is enlarged: its values mean the same as beside it.
        intensities = [measure(r.slices(), r.volume.padding, r.volume.alpha) for r in readers]
        readers = self._parts(readers, intensities[0], scale)
        model = self.load(readers[0], scale, target, intensities[0])
        self._refuse_channels(model, readers)
        for item, reader, intensity in zip(self.items, readers, intensities, strict=True):
            item.warnings += [*self._doubts(model, reader.volume), *remarks(intensity)]
        opened = time.perf_counter()
        streams = self._stream(readers, intensities, model)
        for item, stream in zip(self.items, streams, strict=True):
            item.report = report_of(item, stream.reader, stream.result, model, stream.measured, self.facts)
            item.report["timings_s"] = {
                "read_and_measure": round(opened - clock, 3),
                "engine": round(stream.measured.engine_seconds, 3),
                "total": round(time.perf_counter() - clock, 3),
            }
            self._write_extras(item, stream.volume, stream.result, stream.measured)
        for sentence in dict.fromkeys(sentence for item in self.items for sentence in item.warnings):
            self.progress.warn(sentence)

    def _open(self) -> list[Reader]:
        """Readers of every input; where their results go is settled before anything else is done."""
        request = self.request
        readers = [formats.open_image(item.source, ReadOptions(request.axis, request.series)) for item in self.items]
        for item, reader in zip(self.items, readers, strict=True):
            item.output = target_of(request, request.ending, reader, self.several)
            refuse_same(item.source, item.output)
            self._refuse_taken(item)
            self._refuse_map_place(item)
            for path in (item.output, *self._extra_paths(item, reader.volume).values()):
                refuse_existing(path, request.overwrite or request.skip_existing)
        for reader in readers[1:]:
            _refuse_other_grid(readers[0], reader)
        return readers

    def _refuse_taken(self, item: Item) -> None:
        """Two inputs of one name must not be written over each other."""
        assert item.output is not None  # noqa: S101 - the caller has set it
        first = self.taken.setdefault(item.output.resolve(), item.source)
        if first != item.source:
            msg = f"{mention(item.source)} and {first} would both become {mention(item.output.name)}."
            raise ArgumentsError(msg, "Give them different names, or upscale them into different folders.")

    def _refuse_map_place(self, item: Item) -> None:
        """A map has a name of its own, of a format for real numbers."""
        path = self.request.consistency_map
        if path is None or self.several:
            return
        taken = [
            place.resolve() for place in (item.source, item.output, self.request.report, self.request.preview) if place
        ]
        if path.resolve() in taken:
            msg = f"{mention(path.name)} cannot be the consistency map and something else."
            raise ArgumentsError(msg, "Give --consistency-map another name.")
        entry = formats.format_of_name(path)
        if entry is None or entry.name not in REAL_NUMBERS:
            msg = f"A consistency map holds real numbers, which {mention(path.name)} would not."
            raise ArgumentsError(msg, "Name it .nii.gz, .nrrd, .mha or .tiff.")

    def _extra_paths(self, item: Item, volume: Volume) -> dict[str, Path]:
        """Where the maps and intermediate results of an input go, without opening them."""
        assert item.output is not None  # noqa: S101 - the caller has set it
        paths = {}
        if self.request.intermediate:
            paths[INTERMEDIATE] = formats.default_name(item.output, f"_{INTERMEDIATE}", volume.format)
        if self.request.spread:
            paths[SPREAD] = map_name(item.output, SPREAD, placed=volume.affine is not None)
        if self.request.consistency_map:
            # With many inputs each result has its own map, beside it.
            derived = map_name(item.output, CONSISTENCY, placed=volume.affine is not None)
            paths[CONSISTENCY] = derived if self.several else self.request.consistency_map
        return paths

    def _is_done(self, readers: list[Reader]) -> bool:
        """Whether everything that is asked for is there already, and may stay."""
        if not self.request.skip_existing:
            return False
        results = [item.output for item in self.items if item.output is not None]
        extras = [
            path
            for item, reader in zip(self.items, readers, strict=True)
            for path in self._extra_paths(item, reader.volume).values()
        ]
        there = [path.exists() for path in results]
        if not any(there):
            return False
        missing = next((path for path in (*results, *extras) if not path.exists()), None)
        if missing is not None:
            msg = f"{mention(results[there.index(True)].name)} exists, but {mention(missing.name)} does not."
            raise ArgumentsError(msg, "Make both again with --overwrite.")
        for item in self.items:
            item.status = "skipped"
        return True

    def _parts(self, readers: list[Reader], intensity: IntensityRange, scale: Factors) -> list[Reader]:
        """The part of the images that was asked for: one region, which the first image decides."""
        text = self.request.region
        if text is None:
            return readers
        from medsr_cli.formats.region import Region, cropped

        if text.startswith("auto"):
            from medsr_cli.tasks.lesion import find_region

            request = self.request
            region = find_region(readers[0], intensity, text, scale, request.model, request.detector, self.facts)
        else:
            region = Region.parse(text)
        self.facts["region"] = {
            "x": region.left, "y": region.top, "width": region.width, "height": region.height
        }  # fmt: skip
        return [cropped(reader, region) for reader in readers]

    def _doubts(self, model: Model, volume: Volume) -> list[str]:
        modality = self.request.model.modality or volume.modality
        assumed = None if model.card.modality in (None, "any") else model.card.modality
        doubts = model.doubts(modality, volume.spacing_mm)
        if self.request.strict and doubts:
            raise QualityGateFailed(doubts[0], "Leave --strict away to run it all the same.")
        if model.perceptual:
            doubts.append(PERCEPTUAL_WARNING)
        if modality is None and assumed is not None:
            doubts.append(f"The file does not say its modality; {assumed.upper()} was assumed.")
        return [*volume.warnings, *doubts]

    def _refuse_channels(self, model: Model, readers: list[Reader]) -> None:
        """A network of registered channels gets as many, a network of one gets one."""
        wanted, given = model.engine.channels, len(readers)
        if given == 1 and wanted in (0, 1, 3):
            return
        if given != wanted:
            takes = f"{wanted} registered channels" if wanted > 1 else "one image at a time"
            msg = f"{model.checkpoint_id or model.method} takes {takes}; {given} were given."
            raise ArgumentsError(msg, "Name them all with --channels A,B,... in the order it was trained for.")
        if any(reader.volume.channels != 1 for reader in readers):
            msg = "Only grey images can be channels."
            raise InputRefused(msg, "Give one grey image for each channel.")

    def _stream(self, readers: list[Reader], intensities: list[IntensityRange], model: Model) -> list[Stream]:
        request = self.request
        first = readers[0].volume
        size = model.engine.size_of(first.rows, first.columns)
        results = [reader.volume.enlarged(*size) for reader in readers]
        guide = self._guide(readers[0], results[0], model)
        with ExitStack() as stack:
            streams = []
            for item, reader, intensity, result in zip(self.items, readers, intensities, results, strict=True):
                derivation = derivation_of(model, reader.volume, result)
                assert item.output is not None  # noqa: S101 - set by `_open`
                writer = stack.enter_context(
                    formats.create_image(item.output, reader, result, derivation, overwrite=request.overwrite)
                )
                working = full_scale(intensity, reader.volume.dtype) if model.arch.full_scale else intensity
                extras = self._extra_writers(stack, item, reader, result, derivation, model)
                undone, limit = degradation_of(model), model.card.limit
                streams.append(Stream(reader, result, working, writer, undone, extras, limit))
            Enlarger(streams, model.engine, guide).run(self.progress)
            for item, stream in zip(self.items, streams, strict=True):
                item.warnings += [*stream.writer.warnings, *model.engine.warnings]
                self._refuse_inconsistent(item, stream.measured)
        return streams

    def _guide(self, reader: Reader, result: Volume, model: Model) -> Guide | None:
        asked = self.request.guide
        if asked is None:
            if model.engine.guided:
                msg = f"{model.checkpoint_id or model.method} needs a second image of the same patient."
                raise ArgumentsError(msg, "Name it with --guide.")
            return None
        if not model.engine.guided:
            msg = f"{model.checkpoint_id or model.method} takes no guide."
            raise ArgumentsError(msg, "Leave out --guide.")
        from medsr_cli.formats.guide import open_guide

        guide = open_guide(
            asked.path,
            reader,
            result,
            options=ReadOptions(series=asked.series),
            register=asked.register,
            allow_mismatch=asked.allow_mismatch,
        )
        self.items[0].warnings += guide.warnings
        self.facts["guide"] = guide.facts
        return guide

    def _extra_writers(
        self, stack: ExitStack, item: Item, reader: Reader, result: Volume, derivation: Derivation, model: Model
    ) -> dict[str, tuple[Volume, Any]]:
        paths = self._extra_paths(item, reader.volume)
        extras: dict[str, tuple[Volume, Any]] = {}
        if INTERMEDIATE in paths:
            factor = model.arch.first_stage
            if not factor:
                msg = f"{model.method} has no intermediate result."
                raise ArgumentsError(msg, "Leave out --intermediate, or use -m msgan.")
            grid = reader.volume.enlarged(reader.volume.rows * factor, reader.volume.columns * factor)
            said = derivation_of(model, reader.volume, grid)
            extras[INTERMEDIATE] = grid, self._open_extra(stack, item, paths[INTERMEDIATE], reader, grid, said)
        if SPREAD in paths:
            grid = map_volume(result)
            said = replace(derivation, method=f"{derivation.method} {SPREAD}")
            source = MapSource(grid, item.source)
            extras[SPREAD] = grid, self._open_extra(stack, item, paths[SPREAD], source, grid, said)
        if CONSISTENCY in paths:
            grid = map_volume(reader.volume)
            said = replace(derivation_of(model, grid, grid), method=f"{derivation.method} {CONSISTENCY}")
            source = MapSource(grid, item.source)
            extras[CONSISTENCY] = grid, self._open_extra(stack, item, paths[CONSISTENCY], source, grid, said)
        return extras

    def _open_extra(
        self, stack: ExitStack, item: Item, path: Path, source: Reader, grid: Volume, derivation: Derivation
    ) -> Any:
        item.more_outputs.append(path)
        overwrite = self.request.overwrite or self.request.skip_existing
        return stack.enter_context(formats.create_image(path, source, grid, derivation, overwrite=overwrite))

    def _refuse_inconsistent(self, item: Item, measured: Measured) -> None:
        correlation = measured.consistency.correlation
        if correlation < CORRELATION_WARNING:
            sentence = f"The shrunken result agrees poorly with the input (correlation {correlation:.2f})."
            if self.request.strict or correlation < CORRELATION_LIMIT:
                raise QualityGateFailed(sentence, "Nothing was written.")
            item.warnings.append(sentence)
        if sentence := measured.consistency.local.sentence:
            if self.request.strict:
                raise QualityGateFailed(sentence, "Nothing was written.")
            item.warnings.append(sentence)

    def _write_extras(self, item: Item, volume: Volume, result: Volume, measured: Measured) -> None:
        from medsr_cli.tasks.preview import preview_png

        report, preview = self.request.report, self.request.preview
        if self.several:
            # With many inputs each result has its own report and preview, beside it.
            report = beside(item.output, ".json") if report else None
            preview = beside(item.output, ".png") if preview else None
        if report:
            with atomic_file(report, overwrite=True) as file:
                file.write(json.dumps(item.report, indent=2, default=str).encode() + b"\n")
        if preview:
            with atomic_file(preview, overwrite=True) as file:
                file.write(preview_png(measured.shown, volume, result))


def derivation_of(model: Model, volume: Volume, result: Volume) -> Derivation:
    """What the result's header says of how it came about."""
    return Derivation(
        method=model.method,
        scale=(result.rows / volume.rows, result.columns / volume.columns),
        software=f"medsr {__version__}",
        checkpoint_id=model.checkpoint_id,
        checkpoint_sha256=model.checkpoint_sha256,
        degradation=model.degradation,
    )


def map_name(output: Path, name: str, *, placed: bool) -> Path:
    """Where a map of real numbers stands beside a result: NIfTI if it has a place, else TIFF."""
    # The name of a folder may be a UID: no part of it is a suffix.
    stem = output.name if formats.format_of_name(output) is None else formats.stem_of_name(output)
    return output.with_name(f"{stem}_{name}" + (".nii.gz" if placed else ".tiff"))


def _refuse_other_grid(first: Reader, other: Reader) -> None:
    a, b = first.volume, other.volume
    same = (a.rows, a.columns, a.slices, a.plane_axes) == (b.rows, b.columns, b.slices, b.plane_axes)
    if same and a.affine is not None and b.affine is not None:
        same = a.array_shape == b.array_shape and bool(_largest_distance_mm(a, b) < SAME_PLACE_MM)
    if not same or (a.affine is None) != (b.affine is None):
        msg = f"{mention(other.path.name)} is not on the grid of {mention(first.path.name)}."
        raise InputRefused(msg, "Channels must be registered and resampled to one grid first.")


def _largest_distance_mm(a: Volume, b: Volume) -> float:
    """Between the corners of two grids of one shape."""
    assert a.affine is not None and b.affine is not None  # noqa: S101, PT018 - the caller has compared them
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    shape = (*a.array_shape, 1, 1)[:3]
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())
