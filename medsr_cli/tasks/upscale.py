"""The main job: images in, larger images out, in the right place and in the right units."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medsr_cli.errors import ArgumentsError, DeviceUnavailable, InputRefused, MedsrError, WeightsError
from medsr_cli.formats.contract import Reader
from medsr_cli.tasks.inputs import found_inputs
from medsr_cli.tasks.job import Job
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.model import Model, finished, load_model
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.request import Item, UpscaleRequest, learns_from_the_image, refuse_contradictions
from medsr_cli.tasks.self_training import unfinished_training
from medsr_cli.tasks.speeds import Workload
from medsr_cli.volume.intensity import IntensityRange


def upscale(request: UpscaleRequest, progress: Progress | None = None) -> Iterator[Item]:
    """Upscale every input in turn; the model is loaded once.

    Yields one item for each input. One input's failure is in its item and does not stop the rest.

    Raises:
        ArgumentsError: the request itself cannot be.
        WeightsError: the model cannot be loaded; nothing has been done then.
        DeviceUnavailable: the device is not there; nothing has been done then.
    """
    refuse_contradictions(request)
    return Upscaler(request, progress or Silent()).run()


class Upscaler:
    """Keeps the models that a batch needs."""

    def __init__(self, request: UpscaleRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self._taken: dict[Path, Path] = {}
        self._models: dict[tuple[str | None, Factors], Model] = {}
        self._inputs = 1

    def run(self) -> Iterator[Item]:
        """Every input in turn; see `upscale`."""
        if self.request.channels:
            yield from self._together(self.request.channels, several=True)
            return
        sources = list(found_inputs(self.request))
        if not sources:
            msg = "There is nothing to upscale."
            raise InputRefused(msg, "Name a file, a DICOM folder, or a tree with --recursive.")
        # A folder that stands for the images in it is a batch, also where there is only one.
        several = len(sources) > 1 or sources != list(self.request.inputs)
        if several and (self.request.report or self.request.preview) and self.request.output is None:
            msg = "--report and --preview write one file, but there are several inputs."
            raise ArgumentsError(msg, "Give one input, or a folder with -o: reports are put beside the results.")
        if several and self.request.guide is not None:
            msg = "--guide names one image, but there are several inputs."
            raise ArgumentsError(msg, "Give one input at a time.")
        self._inputs = len(sources)
        for number, source in enumerate(sources, start=1):
            self.progress.item(source.name, number, len(sources))
            yield from self._together((source,), several)

    def _together(self, sources: tuple[Path, ...], several: bool) -> Iterator[Item]:
        """Images that go through one run: one, or the registered channels of one patient."""
        job = Job(self.request, sources, several, self.progress, self._model, self._taken)
        try:
            job.run()
            for item in job.items:
                if item.output is not None and item.status == "done":
                    unfinished_training(item.output).unlink(missing_ok=True)
        except (DeviceUnavailable, WeightsError):
            # No other input would fare better: nothing can be run without them.
            raise
        except MedsrError as error:
            for item in job.items:
                item.status, item.error = "failed", error
        yield from job.items

    def _model(self, reader: Reader, scale: Factors, target: Path, intensity: IntensityRange) -> Model:
        """The model for an image; those that learn from the image itself are made anew for each."""
        modality = self.request.model.modality or reader.volume.modality
        if learns_from_the_image(self.request.model):
            from medsr_cli.tasks.self_training import train_on

            how = self.request.training
            model = train_on(reader, intensity, scale, self.request.model, how, target, self.progress)
            return finished(model, self.request.model)
        key = (modality, scale)
        if key not in self._models:
            planes = reader.volume.slices * reader.volume.channels * self._inputs
            workload = Workload(reader.volume.rows, reader.volume.columns, planes)
            self._models[key] = load_model(self.request.model, scale, modality, self.progress, workload)
        return self._models[key]
