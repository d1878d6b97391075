"""The main job: images in, larger images out, in the right place and in the right units."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from medsr_cli.errors import ArgumentsError, DeviceUnavailable, InputRefused, MedsrError, WeightsError
from medsr_cli.formats.contract import Reader, ReadOptions
from medsr_cli.tasks.batch import Batch, Claim, Work, spread_over
from medsr_cli.tasks.batch_outcome import Finished
from medsr_cli.tasks.batch_settings import open_record
from medsr_cli.tasks.file_lists import paths_from
from medsr_cli.tasks.inputs import clashing, distinct, found_inputs, refuse_file_for_several, without_results
from medsr_cli.tasks.job import Job, Together
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.model import Model, finished, load_model
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.request import Item, UpscaleRequest, learns_from_the_image, refuse_contradictions
from medsr_cli.tasks.speeds import Workload
from medsr_cli.tasks.study import Chosen
from medsr_cli.tasks.study_work import StudyWork
from medsr_cli.volume.intensity import IntensityRange


def upscale(request: UpscaleRequest, progress: Progress | None = None) -> Generator[Item, None, None]:
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
        if request.dicom.stable_uids and request.model.backend == "auto":
            # What was measured to be faster may differ from run to run, and by a unit in its pixels.
            request = replace(request, model=replace(request.model, backend="torch"))
        self.request, self.progress = request, progress
        self._taken: dict[Path, Path] = {}
        self._clashing: dict[Path, Path] = {}
        self._models: dict[tuple[str | None, Factors], Model] = {}
        self._inputs = 1

    def run(self) -> Generator[Item, None, None]:
        """What became of every input, mostly in their order; see `upscale`."""
        units, several = self._units()
        self._inputs = len(units)
        # Registered channels are one unit: they have a record only where one is named.
        recorded = several and not self.request.channels
        with open_record(self.request, self.request.batch, self.progress, several=recorded) as record:
            batch = Batch(self.request.batch, self.request, record, progress=self.progress, total=len(units))
            if self.request.cluster is not None:
                finished = self._spread(batch, units, several)
            else:
                finished = batch.run(units, lambda claim: self._work(claim.sources, several, repeat=claim.repeat))
            # Whoever asks for no more, for whatever reason, ends the threads before the record is closed.
            with closing(finished):
                for one in finished:
                    one.item.seconds = one.seconds
                    yield one.item

    def _units(self) -> tuple[list[tuple[Path, ...]], bool]:
        """What goes through together, and whether it is a batch, whose results go into a folder."""
        request = self.request
        if request.channels:
            return [request.channels], True
        if request.batch.files_from is not None:
            request = self.request = self._with_list(request, request.batch.files_from)
        found = list(found_inputs(request))
        sources = list(distinct(found))
        if len(sources) < len(found):
            self.progress.say(
                f"{len(found) - len(sources)} of {len(found)} inputs were named twice; each is taken once."
            )
        if not sources and request.batch.files_from is None:
            msg = "There is nothing to upscale."
            raise ArgumentsError(msg, "Name a file, a DICOM folder, or a tree with --recursive.")
        if not sources:
            msg = "There is nothing to upscale: the list of inputs has none."
            raise InputRefused(msg, "Check what --files-from names.")
        # A folder that stands for the images in it is a batch, also where there is only one; so is a list.
        several = len(sources) > 1 or sources != list(request.inputs) or request.tree is not None
        if several and (request.report or request.preview) and request.output is None:
            msg = "--report and --preview write one file, but there are several inputs."
            raise ArgumentsError(msg, "Give one input, or a folder with -o: reports are put beside the results.")
        if several and request.guide is not None:
            msg = "--guide names one image, but there are several inputs."
            raise ArgumentsError(msg, "Give one input at a time.")
        if several:
            refuse_file_for_several(request.output)
            self._clashing = clashing(request, sources)
        return [(source,) for source in sources], several

    def _with_list(self, request: UpscaleRequest, name: str) -> UpscaleRequest:
        """A request with the inputs that a list holds, less what earlier runs have made of them."""
        tree = request.tree or Path.cwd()
        listed = list(paths_from(name, nul=request.batch.null, say=self.progress.say))
        kept = without_results(listed, request, tree)
        if len(kept) < len(listed):
            self.progress.say(
                f"{len(listed) - len(kept)} of {len(listed)} paths of the list are results; they are left."
            )
        return replace(request, inputs=(*request.inputs, *kept), tree=tree)

    def _spread(self, batch: Batch, units: list[tuple[Path, ...]], several: bool) -> Generator[Finished, None, None]:
        from medsr_cli.tasks.cluster import spread
        from medsr_cli.tasks.cluster_upscale import Upscaling
        from medsr_cli.tasks.cluster_worker import Parcel

        request = self.request
        folder = request.output or units[0][0].parent
        if request.output is not None and not several:
            folder = request.output.parent
        roots = tuple(path for path in (request.output, *request.inputs) if path is not None)

        def by_cluster(claims: Iterator[Claim]) -> Iterator[tuple[Claim, list[Item]]]:
            parcels = (Parcel(claim.sources, claim, roots, claim.repeat) for claim in claims)
            work = Upscaling.of(request, several=several)
            for parcel, items in spread(str(request.cluster), parcels, work, folder, self.progress, len(units)):
                yield parcel.what, items

        return spread_over(batch, units, by_cluster)

    def _together(self, sources: tuple[Path, ...], several: bool) -> Iterator[Item]:
        """One image, a study's series in turn, or the registered channels of one patient, without a batch around."""
        work = self._work(sources, several)
        try:
            work.run()
        except (DeviceUnavailable, WeightsError):
            raise
        except MedsrError as error:
            for item in work.items:
                item.status, item.error = "failed", error
        yield from work.items

    def _work(self, sources: tuple[Path, ...], several: bool, *, repeat: bool = False) -> Work:
        request = replace(self.request, overwrite=True, skip_existing=False) if repeat else self.request

        def make(chosen: Chosen, left: tuple[str, ...]) -> Job:
            return Job(request, Together(sources, several, chosen, left), self.progress, self._model, self._taken)

        rival = self._clashing.get(sources[0]) if len(sources) == 1 else None
        return StudyWork(sources, ReadOptions(request.axis, request.series), make, self.progress, rival)

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
            planes = reader.volume.slices * self._inputs  # of colours the luminance alone
            workload = Workload(reader.volume.rows, reader.volume.columns, planes)
            self._models[key] = load_model(self.request.model, scale, modality, self.progress, workload)
        return self._models[key]
