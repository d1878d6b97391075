"""How good models are on a folder's own images: shrunken by a paper's protocol, enlarged, measured, beside bicubic.

Every model gets the same low-resolution slices and is held against the same targets. Slices stream: in memory are a
few of them, the figures of all, and a handful of pictures for the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.errors import ArgumentsError, DeviceUnavailable, InputRefused, MedsrError, WeightsError, mention
from medsr_cli.evaluation.results import BASELINE, LOWER_IS_BETTER, Results, Row, csv_text, json_text, plain
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.provenance.discretion import discreet_facts, discreet_text, id_of, introduce
from medsr_cli.provenance.record import IN_PLANE, NOTICE, software
from medsr_cli.tasks.evaluation_inputs import (
    Choice,
    Opened,
    add_guide,
    images_of,
    open_target,
)
from medsr_cli.tasks.evaluation_models import Contender, Lows, Running, Stable, contenders_of, refuse_size
from medsr_cli.tasks.evaluation_outputs import refuse_outputs
from medsr_cli.tasks.evaluation_pairs import Pair, Pairs
from medsr_cli.tasks.evaluation_protocol import protocol_for, scales_for
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.progress import Progress, Silent
from medsr_cli.tasks.self_training import SelfTraining
from medsr_cli.volume.intensity import IntensityRange

if TYPE_CHECKING:
    from medsr_cli.evaluation.protocols import Protocol
    from medsr_cli.tasks.evaluation_extras import Extra
    from medsr_cli.training.gather import Found

Unit = NDArray[np.float64]

REPORT, TABLE, PAGE = "evaluation.json", "slices.csv", "report.html"
"""Names in a folder of results."""
NAMES = ("subject", "volume")
"""Fields of records that hold names."""
SHOWN_IMAGES = 4
"""Images of which the report shows the middle slice; the worst slice comes beside."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What to measure, on what, and how."""

    choice: Choice
    models: str
    """Methods with commas between; `METHOD=CHECKPOINT` names weights."""
    weights: str | None = None
    scales: tuple[float, ...] = ()
    """None takes the protocol's."""
    protocol: str | None = None
    """None takes that of the first learned model."""
    base: ModelRequest = field(default_factory=ModelRequest)
    training: SelfTraining = field(default_factory=SelfTraining)
    slices: int = 0
    """Of each volume, evenly spread; 0 takes all that show something."""
    shuffle_guides: bool = False
    segmentation: str | None = None
    """Checkpoint of a segmentation network whose labels are compared, an id or a path."""
    fid: bool = False
    seed: int = 0
    command: str = ""


@dataclass(frozen=True)
class Shown:
    """A slice for the report: what each model made of it, in [0, 1] of the image's range."""

    title: str
    planes: dict[str, Unit]
    """Label to (channels, rows, columns)."""
    target: Unit
    figures: dict[str, dict[str, float]]
    opened: Opened
    working: IntensityRange


@dataclass
class Evaluation:
    """What was measured, what was not and why, and a few pictures."""

    request: EvaluateRequest
    protocol: str
    contenders: list[Contender]
    results: Results
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[tuple[str, MedsrError]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Records for a pipe: each volume, then each summary."""
        for record in self.results.volumes():
            yield dict(plain({"kind": "volume", "id": self.id_of(record["volume"]), **record}))
        for summary in self.results.summaries(self.request.seed):
            yield dict(plain({"kind": "summary", **summary.to_json()}))

    def id_of(self, name: str) -> str:
        """The digits that stand for one of the folder's images."""
        return id_of(self.request.choice.folder / name)

    def report(self) -> dict[str, Any]:
        """Everything, as plain data, with stand-ins for names unless those are shown."""
        found: dict[str, Any] = discreet_facts(self._told())
        return found

    def _told(self) -> dict[str, Any]:
        results, request = self.results, self.request
        return {
            "notice": NOTICE,
            "limits": IN_PLANE,
            "software": software(),
            "command": request.command,
            "seed": request.seed,
            **self.facts,
            "metrics": list(results.metrics),
            "lower_is_better": sorted(LOWER_IS_BETTER),
            "baseline": BASELINE,
            "summary": [summary.to_json() for summary in results.summaries(request.seed)],
            "worse_than_baseline": [_marked(vars(worse)) for worse in results.worse_than_baseline()],
            "subjects": [_marked(record) for record in results.subjects()],
            "volumes": [_marked(record) for record in results.volumes()],
            "failed": [{"image": mention(name), "error": error.marked} for name, error in self.failed],
            "left_out": self.left_out,
            "warnings": self.warnings,
            "slices": [
                {**_marked({k: v for k, v in vars(row).items() if k != "values"}), **row.values} for row in results.rows
            ],
        }


def _marked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its names marked."""
    return {key: mention(value) if key in NAMES else value for key, value in record.items()}


def evaluate(request: EvaluateRequest, progress: Progress | None = None) -> Evaluation:
    """Measure every model on every image of a folder.

    An image that cannot be used is told in `failed` and the others go on.

    Raises:
        ArgumentsError: names, scales or options that cannot be.
        WeightsError: a checkpoint, or a network that a metric needs, is not here.
        DeviceUnavailable: the device is not there.
        InputRefused: no image could be measured.
    """
    from medsr_cli.evaluation.protocols import PROTOCOLS

    contenders = contenders_of(
        request.models, request.weights, request.base, shuffle_guides=request.shuffle_guides
    )  # fmt: skip
    name, remark = protocol_for(contenders, request.protocol)
    scales = scales_for(contenders, PROTOCOLS[name], request.scales, fit=request.base.fit)
    if any(contender.guided for contender in contenders) and not request.choice.guides:
        msg = "A guided model needs to know which images are guides."
        raise ArgumentsError(msg, "Name them with --guide-name, such as 'T1*', and the others with --target 'T2*'.")
    evaluator = Evaluator(request, contenders, name, PROTOCOLS[name], scales, progress or Silent())
    if remark:
        evaluator.warn(remark)
    return evaluator.run()


@dataclass
class _Run:
    """One image at one scale."""

    opened: Opened
    pairs: Pairs
    engines: list[Running]


class Evaluator:
    """Carries images through protocol, models and metrics."""

    def __init__(
        self,
        request: EvaluateRequest,
        contenders: list[Contender],
        name: str,
        protocol: Protocol,
        scales: tuple[float, ...],
        progress: Progress,
    ) -> None:
        self.request, self.contenders, self.protocol, self.scales = request, contenders, protocol, scales
        self.progress = progress
        self.stable = Stable(protocol, progress, request.seed, request.training)
        self.extra = self._extras()
        metrics = (*protocol.metrics, *(metric for extra in self.extra for metric in extra.metrics))
        self.outcome = Evaluation(request, name, contenders, Results(metrics))
        self.guided = any(contender.guided for contender in contenders)
        self._unguided: dict[str, str] = {}
        self._worst = np.inf
        self._worst_shown: Shown | None = None

    def _extras(self) -> list[Extra]:
        """What is measured with networks of their own; without their weights nothing is begun."""
        from medsr_cli.tasks.evaluation_extras import (
            InceptionDistance,
            SegmentationOverlap,
            inception_network,
            segmentation_network,
        )

        found: list[Extra] = []
        if self.request.segmentation is not None:
            net = segmentation_network(self.request.segmentation, self.request.base)
            found.append(SegmentationOverlap(net, self.request.choice.axis))
        if self.request.fid:
            found.append(InceptionDistance(inception_network(self.request.base)))
        return found

    def warn(self, sentence: str) -> None:
        """Say something, and keep it for the report."""
        if sentence not in self.outcome.warnings:
            self.outcome.warnings.append(sentence)
            self.progress.warn(sentence)

    def run(self) -> Evaluation:
        """Every image in turn; see `evaluate`."""
        images = self._images()
        shown = set(np.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().astype(int))
        for number, image in enumerate(images):
            introduce(image.path, image.name)
            self.progress.item(image.name, number + 1, len(images))
            before = len(self.outcome.results.rows)
            try:
                self._measure(image, show=number in shown)
                self._end(kept=True)
            except (WeightsError, DeviceUnavailable, ArgumentsError):
                raise  # no other image would fare better
            except MedsrError as error:
                # Half of an image would count as all of it.
                del self.outcome.results.rows[before:]
                self._end(kept=False)
                self.outcome.failed.append((image.name, error))
        results = self.outcome.results
        if not results.rows:
            first = self.outcome.failed[0][1].marked if self.outcome.failed else ""
            msg = f"None of the {len(images)} images could be measured. {first}".strip()
            raise InputRefused(msg)
        for extra in self.extra:
            extra.finish(results)
        for sentence in self.stable.warnings:
            self.warn(sentence)
        if self._worst_shown is not None:
            self.outcome.shown.append(self._worst_shown)
        self.outcome.facts = self._facts(images)
        return self.outcome

    def _images(self) -> list[Found]:
        from medsr_cli.training.companions import TOLD, in_brief

        chosen = images_of(self.request.choice, guided=self.guided, labels=self.request.segmentation is not None)
        self.outcome.left_out, self._unguided = chosen.left_out, chosen.unguided
        for sentence in (*chosen.notes[:TOLD], *in_brief(chosen.left_out)):
            self.progress.say(sentence)
        return chosen.images

    def _end(self, *, kept: bool) -> None:
        for extra in self.extra:
            extra.end(kept=kept)

    def _measure(self, image: Found, *, show: bool) -> None:
        if image.name in self._unguided:
            msg = self._unguided[image.name]
            raise InputRefused(msg, "Register a T1 image to it; --guide-name takes patterns.")
        opened = open_target(image, self.request.choice.axis)
        if image.guide is not None:
            add_guide(opened, image.guide)
            for note in opened.notes:
                self.warn(note)
        mask = image.labels.path if image.labels else None
        for extra in self.extra:
            extra.begin(opened, mask)
        for at, scale in enumerate(self.scales):
            pairs = Pairs(opened, self.protocol, scale, self.request.slices, guided=self.guided)
            total, done = len(pairs.chosen) * len(self.scales), at * len(pairs.chosen)
            run: _Run | None = None
            for batch in pairs.batches():
                run = run or _Run(opened, pairs, self._engines(opened, pairs))
                self._measure_batch(run, batch, show=show and scale == self.scales[-1])
                done += len(batch)
                self.progress.slices(done, total)
            if run is None:
                msg = (
                    f"No slice of {mention(opened.name)} is large enough and not constant "
                    f"without its border at x{scale:g}."
                )
                raise InputRefused(msg)

    def _engines(self, opened: Opened, pairs: Pairs) -> list[Running]:
        """One for each contender; for methods without a checkpoint this is where they learn from the image."""
        lows = Lows(pairs.low_volume, opened.reader.path, pairs.lows())
        found = []
        for contender in self.contenders:
            if contender.shuffled and len(opened.usable) < 2:
                self.warn(f"{mention(opened.name)} has one slice: there is no other guide to shuffle in.")
                continue
            running = self.stable.running(contender, pairs.factors, lows)
            refuse_size(running, pairs.low_size, pairs.size)
            found.append(running)
        return found

    def _measure_batch(self, run: _Run, batch: list[Pair], *, show: bool) -> None:
        low = np.stack([pair.low for pair in batch])
        made: dict[str, Unit] = {}
        for running in run.engines:
            who = running.contender
            guide = np.stack([p.guides[who.shuffled] for p in batch])[:, None] if who.guided else None
            dtype = run.opened.reader.volume.dtype
            made[who.label] = running.enlarge(low, run.pairs.working, dtype, guide)
        pieces = [list(range(len(batch)))] if self.protocol.average == "chunk" else [[at] for at in range(len(batch))]
        for piece in pieces:
            figures = self._measure_piece(run, batch, piece, made)
            for at in piece if run.pairs.scale == self.scales[-1] else ():
                middle = batch[at].number == run.pairs.chosen[len(run.pairs.chosen) // 2]
                planes = {label: result[at] for label, result in made.items()}
                self._keep(run, batch[at], planes, figures, show=show and middle)

    def _measure_piece(
        self, run: _Run, batch: list[Pair], piece: list[int], made: dict[str, Unit]
    ) -> dict[str, dict[str, float]]:
        """One row for each model: of a slice, or of a chunk of slices that the protocol measures as one."""
        scale = run.pairs.scale
        first = batch[piece[0]]
        target = first.target if len(piece) == 1 else np.stack([batch[at].target for at in piece])
        figures: dict[str, dict[str, float]] = {}
        for label, results in made.items():
            result = results[piece[0]] if len(piece) == 1 else results[piece]
            values = dict(self.protocol.measure(result, target, scale))
            for extra in self.extra:
                found = [extra.measure(run.pairs, batch[at], label, results[at]) for at in piece]
                for metric in extra.metrics:
                    known = [one[metric] for one in found if math.isfinite(one[metric])]
                    values[metric] = float(np.mean(known)) if known else math.nan
            row = Row(run.opened.subject, run.opened.name, first.number + 1, values, label, scale)
            self.outcome.results.rows.append(row)
            figures[label] = values
        return figures

    def _keep(
        self, run: _Run, pair: Pair, planes: dict[str, Unit], figures: dict[str, dict[str, float]], *, show: bool
    ) -> None:
        """Pictures for the report: the middle slices of some images, and the slice that came out worst."""
        opened, working = run.opened, run.pairs.working
        rival = next((c.label for c in self.contenders if c.learned and c.label in planes), None)
        title = f"{mention(opened.name)}, slice {pair.number + 1}"
        if show:
            self.outcome.shown.append(Shown(title, planes, pair.target, figures, opened, working))
        if rival is None:
            return
        metric = self.outcome.results.metrics[0]
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        gain = sign * (figures[rival][metric] - figures[BASELINE][metric])
        if gain < self._worst:
            self._worst = gain
            said = f"{title}: least gain of {rival} over {BASELINE}"
            self._worst_shown = Shown(said, dict(planes), pair.target, figures, opened, working)

    def _facts(self, images: Sequence[Found]) -> dict[str, Any]:
        from medsr_cli.training.gather import content_sha256

        protocol = self.protocol
        measured = {row.volume for row in self.outcome.results.rows}
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "protocol": {
                "name": protocol.name,
                "title": protocol.title,
                "low": protocol.low,
                "intensity": protocol.intensity,
                "border": protocol.border,
                "averaging": protocol.averaging,
                "notes": list(protocol.notes),
                "values": "results are measured as the networks give them, not rounded to the type of the file",
                "slices_a_volume": self.request.slices or "all that are not constant",
            },
            "scales": list(self.scales),
            "data": {
                "folder": mention(self.request.choice.folder.name),
                "subjects": len({row.subject for row in self.outcome.results.rows}),
                "images": [
                    {
                        "name": mention(image.name),
                        "id": id_of(image.path),
                        "subject": mention(image.subject),
                        "sha256": content_sha256(image.path),
                    }
                    for image in images
                    if image.name in measured
                ],
            },
            "models": list(self.stable.records.values()),
            "segmentation": next((extra.facts() for extra in self.extra if extra.facts()), None),
        }


def output_files(
    folder: Path | None,
    report: Path | None,
    table: Path | None,
    page: Path | None,
    *,
    data: Path,
    overwrite: bool,
) -> tuple[Path | None, Path | None, Path | None]:
    """Where report, table and page go: as named, else into the folder, else nowhere.

    Raises:
        ArgumentsError: the folder is a file, two results have one name, or something that must not be replaced is
            there, such as any file of the folder `data` that is no former report.
    """
    if folder is not None:
        if folder.is_file():
            msg = f"-o {mention(folder)} is a file."
            raise ArgumentsError(msg, "Name a folder, or use --report, --csv and --html for single files.")
        report, table, page = report or folder / REPORT, table or folder / TABLE, page or folder / PAGE
    refuse_outputs({"--report": report, "--csv": table, "--html": page}, (data,), overwrite=overwrite)
    return report, table, page


def write_outputs(
    evaluation: Evaluation, report: Path | None, table: Path | None, page: Path | None, *, overwrite: bool
) -> None:
    """The JSON report, the CSV table and the HTML page, each whole or not at all.

    Raises:
        ArgumentsError: one exists and may not be replaced.
        RunError: it cannot be written.
    """
    if report is not None:
        with atomic_file(report, overwrite=overwrite) as file:
            file.write(json_text(evaluation.report()).encode())
    if table is not None:
        with atomic_file(table, overwrite=overwrite) as file:
            file.write(discreet_text(csv_text(evaluation.results)).encode())
    if page is not None:
        from medsr_cli.evaluation.page import page_html
        from medsr_cli.tasks.evaluation_page import page_of

        with atomic_file(page, overwrite=overwrite) as file:
            file.write(page_html(page_of(evaluation)).encode())
