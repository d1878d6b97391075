"""What is done for one input of a batch: one job, or one for each series of a study that suits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medsr_cli.errors import DeviceUnavailable, MedsrError, WeightsError
from medsr_cli.formats.contract import ReadOptions
from medsr_cli.tasks.inputs import refuse_one_file
from medsr_cli.tasks.job import Job, both_become
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.request import Item
from medsr_cli.tasks.study import Chosen, StudyPlan, series_of


class StudyWork:
    """The jobs of one input: one, or one for each series of a study that suits; what is left of it is told."""

    def __init__(
        self,
        sources: tuple[Path, ...],
        options: ReadOptions,
        make: Callable[[Chosen, tuple[str, ...]], Job],
        progress: Progress,
        rival: Path | None = None,
    ) -> None:
        self.sources, self.options, self.make, self.progress = sources, options, make, progress
        self.rival = rival
        """Another input of the batch that has the name of this one's result."""
        self._jobs: list[Job] = []
        self._unplanned = [Item(source) for source in sources]
        self._left: tuple[str, ...] = ()

    @property
    def items(self) -> list[Item]:
        """What became of each result."""
        return [item for job in self._jobs for item in job.items] or self._unplanned

    def prepare(self) -> None:
        """Look what there is, and open and measure the first of it.

        Raises:
            MedsrError: there is one job, and its input is refused.
        """
        if self.rival is not None:
            raise both_become(self.sources[0], self.rival)
        plan = StudyPlan((Chosen(self.options.series),))
        if len(self.sources) == 1:
            plan = series_of(self.sources[0], self.options)
        self._left = tuple(one.sentence() for one in plan.left)
        jobs = [self.make(chosen, self._left) for chosen in plan.todo]
        if plan.several:
            refuse_one_file(jobs[0].request.output, self.sources[0])
        self._jobs = jobs
        if len(self._jobs) == 1:
            self._jobs[0].prepare()

    def run(self) -> None:
        """Do them all; of several, one that fails does not keep the others.

        Raises:
            MedsrError: the only one failed, or no other would fare better.
        """
        if not self._jobs:
            self.prepare()
        for sentence in self._left:
            self.progress.say(sentence)
        for job in self._jobs:
            if len(self._jobs) == 1:
                job.run()
                continue
            self.progress.say(f"{job.chosen.folder_name}:")
            try:
                job.run()
            except (DeviceUnavailable, WeightsError):
                raise
            except MedsrError as error:
                for item in job.items:
                    item.status, item.error = "failed", error
