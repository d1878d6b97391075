"""One run of the main job: an image, or registered images together, from its files to its results."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli import __version__, formats
from medsr_cli.errors import (
    ArgumentsError,
    QualityGateFailed,
    mention,
)
from medsr_cli.evaluation.consistency import CORRELATION_LIMIT, CORRELATION_WARNING
from medsr_cli.formats.atomic import atomic_file, refuse_existing
from medsr_cli.formats.contract import Derivation, DicomOutput, Reader, ReadOptions
from medsr_cli.tasks.channels import refuse_channels, refuse_other_grid, refuse_other_patient
from medsr_cli.tasks.enlarge import CONSISTENCY, SPREAD, Enlarger, Measured, Stream
from medsr_cli.tasks.inputs import beside, place_in_study, refuse_same, target_of
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.maps import MapSource, map_volume
from medsr_cli.tasks.model import PERCEPTUAL_WARNING, Model, degradation_of
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.report import remarks, report_of, told_checkpoint
from medsr_cli.tasks.request import Item, UpscaleRequest
from medsr_cli.tasks.self_training import unfinished_training
from medsr_cli.tasks.settings import noted, remarks_of, settings_digest
from medsr_cli.tasks.study import Chosen
from medsr_cli.volume.intensity import IntensityRange, full_scale, measure
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from medsr_cli.formats.guide import Guide

LoadModel = Callable[[Reader, Factors, Path, IntensityRange], Model]
INTERMEDIATE = "intermediate"
REAL_NUMBERS = ("nifti", "nrrd", "metaimage", "tiff")
"""Formats that a map of real numbers can be written in."""


@dataclass(frozen=True)
class Together:
    """What goes through one run: an image, one series of a study, or the registered channels of one patient."""

    paths: tuple[Path, ...]
    several: bool = False
    """Whether it is one of many inputs, so that a folder of results is meant by `-o`."""
    chosen: Chosen = field(default_factory=lambda: Chosen(None))
    """Which series of the input, and the folder that its result has within the study's."""
    left: tuple[str, ...] = ()
    """What of the study is not upscaled, a sentence each."""

    @property
    def one_of_many(self) -> bool:
        """Whether there are other results, so that what is written beside this one needs a name of its own."""
        return self.several or bool(self.chosen.folder_name)


class Job:
    """Opens, loads, enlarges, writes and reports; `items` tells what became of each input."""

    def __init__(
        self,
        request: UpscaleRequest,
        together: Together,
        progress: Progress,
        load: LoadModel,
        taken: dict[Path, Path],
    ) -> None:
        self.request, self.together, self.progress, self.load = request, together, progress, load
        self.chosen = together.chosen
        self.taken = taken
        """Results of this batch so far, and what each came from."""
        self.items = [Item(source, series=self.chosen.selector) for source in together.paths]
        self.facts: dict[str, Any] = {}
        if self.chosen.folder_name:
            self.facts["series"] = {"number": self.chosen.selector, "left": list(together.left)}
        self._readers: list[Reader] = []
        self._intensities: list[IntensityRange] = []
        self._reading_seconds = 0.0
        self._settings = ""
        self._contents: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Open and measure every input; another thread may do so while the engine has an earlier job.

        Raises:
            MedsrError: an input is refused, or its result may not be written.
        """
        clock = time.perf_counter()
        self._readers = self._open()
        if not self._is_done(self._readers):
            # Of whole images, also where a part is enlarged: its values mean the same as beside it.
            digests = [hashlib.sha256() for _ in self._readers]
            self._intensities = [self._measured(*one) for one in zip(self._readers, digests, strict=True)]
            self._contents = tuple(digest.hexdigest() for digest in digests)
        self._reading_seconds = time.perf_counter() - clock

    def _measured(self, reader: Reader, digest: hashlib._Hash) -> IntensityRange:
        """The range of an image; where UIDs follow from its values, these go into a digest, too."""
        slices = noted(reader.slices(), digest) if self.request.dicom.stable_uids else reader.slices()
        return measure(slices, reader.volume.padding, reader.volume.alpha)

    def run(self) -> None:
        """Do it.

        Raises:
            MedsrError: nothing of it was written then.
        """
        if not self._readers:
            self.prepare()
        clock = time.perf_counter() - self._reading_seconds
        readers, intensities = self._readers, self._intensities
        if not intensities:
            return
        scale = self.request.magnification.of(readers[0].volume, readers[0].path.name)
        target = self.items[0].output
        assert target is not None  # noqa: S101 - `_open` has set it
        readers = self._parts(readers, intensities[0], scale)
        model = self.load(readers[0], scale, target, intensities[0])
        refuse_channels(model, readers)
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
            if item.output is not None:
                unfinished_training(item.output).unlink(missing_ok=True)
        for sentence in dict.fromkeys(sentence for item in self.items for sentence in item.warnings):
            self.progress.warn(sentence)

    def _open(self) -> list[Reader]:
        """Readers of every input; where their results go is settled before anything else is done."""
        request = self.request
        options = self.chosen.options(ReadOptions(request.axis, request.series))
        readers = [formats.open_image(item.source, options) for item in self.items]
        for item, reader in zip(self.items, readers, strict=True):
            item.output = target_of(request, request.ending, reader, self.together.several)
            if self.chosen.folder_name:
                # The folder that was named is the study's, whether it is there already or not.
                named = None if self.together.several else request.output
                item.output = place_in_study(named or item.output, self.chosen.folder_name)
            elif request.output is None or self.together.several:
                item.output = formats.series_name(item.output, reader, self.dicom(reader))
            refuse_same(item.source, item.output)
            self._refuse_taken(item)
            self._refuse_map_place(item)
            for path in (item.output, *self._extra_paths(item, reader.volume).values()):
                refuse_existing(path, request.overwrite or request.skip_existing)
        for reader in readers[1:]:
            refuse_other_grid(readers[0], reader)
            refuse_other_patient(readers[0], reader)
        return readers

    def _refuse_taken(self, item: Item) -> None:
        """Two inputs of one name must not be written over each other."""
        assert item.output is not None  # noqa: S101 - the caller has set it
        first = self.taken.setdefault(item.output.resolve(), item.source)
        if first != item.source:
            raise both_become(item.source, first)

    def _refuse_map_place(self, item: Item) -> None:
        """A map has a name of its own, of a format for real numbers."""
        path = self.request.consistency_map
        if path is None or self.together.one_of_many:
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
            paths[INTERMEDIATE] = intermediate_name(item.output, volume.format)
        if self.request.spread:
            paths[SPREAD] = map_name(item.output, SPREAD, placed=volume.affine is not None)
        if self.request.consistency_map:
            # With many inputs each result has its own map, beside it.
            derived = map_name(item.output, CONSISTENCY, placed=volume.affine is not None)
            paths[CONSISTENCY] = derived if self.together.one_of_many else self.request.consistency_map
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

    def _stream(self, readers: list[Reader], intensities: list[IntensityRange], model: Model) -> list[Stream]:
        request = self.request
        first = readers[0].volume
        size = model.engine.size_of(first.rows, first.columns)
        results = [reader.volume.enlarged(*size) for reader in readers]
        guide = self._guide(readers[0], results[0], model)
        self._settings = settings_digest(request, model, self.facts, first, self._contents)
        with ExitStack() as stack:
            streams = []
            for item, reader, intensity, result in zip(self.items, readers, intensities, results, strict=True):
                derivation = self._derivation(model, reader, result)
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
            said = self._derivation(model, reader, grid, second=True)
            extras[INTERMEDIATE] = grid, self._open_extra(stack, item, paths[INTERMEDIATE], reader, grid, said)
        if SPREAD in paths:
            grid = map_volume(result)
            said = replace(derivation, method=f"{derivation.method} {SPREAD}")
            source = MapSource(grid, item.source)
            extras[SPREAD] = grid, self._open_extra(stack, item, paths[SPREAD], source, grid, said)
        if CONSISTENCY in paths:
            grid = map_volume(reader.volume)
            source = MapSource(grid, item.source)
            said = replace(self._derivation(model, source, grid), method=f"{derivation.method} {CONSISTENCY}")
            extras[CONSISTENCY] = grid, self._open_extra(stack, item, paths[CONSISTENCY], source, grid, said)
        return extras

    def _open_extra(
        self, stack: ExitStack, item: Item, path: Path, source: Reader, grid: Volume, derivation: Derivation
    ) -> Any:
        item.more_outputs.append(path)
        overwrite = self.request.overwrite or self.request.skip_existing
        return stack.enter_context(formats.create_image(path, source, grid, derivation, overwrite=overwrite))

    def _derivation(self, model: Model, reader: Reader, result: Volume, *, second: bool = False) -> Derivation:
        """What the result's header says of how it came about; `second` is beside the result proper."""
        volume, dicom = reader.volume, self.dicom(reader)
        if second:
            dicom = replace(dicom, ordinal=dicom.ordinal + 1)
        return Derivation(
            method=model.method,
            scale=(result.rows / volume.rows, result.columns / volume.columns),
            software=f"medsr {__version__}",
            checkpoint_id=told_checkpoint(model.checkpoint_id),
            checkpoint_sha256=model.checkpoint_sha256,
            degradation=model.degradation,
            remarks=remarks_of(self.request, len(self.items)),
            settings=self._settings,
            dicom=dicom,
        )

    def dicom(self, reader: Reader) -> DicomOutput:
        """How a result of this input is written as DICOM."""
        asked = self.request.dicom
        # Among many inputs, --multiframe is meant for those that can be one object again.
        multiframe = asked.multiframe and (not self.together.one_of_many or formats.is_enhanced(reader))
        step = 2 if self.request.intermediate else 1
        return replace(asked, multiframe=multiframe, ordinal=(self.chosen.stack - 1) * step)

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
        if self.together.one_of_many:
            # With many inputs each result has its own report and preview, beside it.
            report = beside(item.output, ".json") if report else None
            preview = beside(item.output, ".png") if preview else None
        if report:
            with atomic_file(report, overwrite=True) as file:
                file.write(json.dumps(item.report, indent=2, default=str).encode() + b"\n")
        if preview:
            with atomic_file(preview, overwrite=True) as file:
                file.write(preview_png(measured.shown, volume, result))


def both_become(source: Path, first: Path) -> ArgumentsError:
    """Two inputs whose results would have one name."""
    msg = f"{mention(first)} and {mention(source)} would both become one result; the first has its name."
    return ArgumentsError(msg, "Give them different names, or upscale them into different folders.")


def intermediate_name(output: Path, format_name: str) -> Path:
    """Where the result of a first stage stands beside the whole one: a folder where that is one, there or not."""
    if formats.format_of_name(output) is None:
        return output.with_name(f"{output.name}_{INTERMEDIATE}")
    return formats.default_name(output, f"_{INTERMEDIATE}", format_name)


def map_name(output: Path, name: str, *, placed: bool) -> Path:
    """Where a map of real numbers stands beside a result: NIfTI if it has a place, else TIFF."""
    # The name of a folder may be a UID: no part of it is a suffix.
    stem = output.name if formats.format_of_name(output) is None else formats.stem_of_name(output)
    return output.with_name(f"{stem}_{name}" + (".nii.gz" if placed else ".tiff"))
