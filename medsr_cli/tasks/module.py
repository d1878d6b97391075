"""The processing container of a routing hub: a folder of series in, derived series in another, and what became of it.

The contract is that of mercure, which other hubs can meet with two folders: DICOM files lie flat in the input folder,
named `[series_UID]#[file_UID].dcm`, with a `task.json` that holds the settings; results lie flat in the output folder
under names of the same kind, and `result.json` tells what was done. A run that ends with another exit code than 0 has
failed, whatever lies in the output folder.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError, RunError, SomeInputsFailed
from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.delivery import Delivery, delivery_into
from medsr_cli.formats.dicom_files import FileMember, read_header, refusing
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.tasks.module_input import SEPARATOR, files_of, is_dicom, predicate, sorted_input
from medsr_cli.tasks.module_outcome import Outcome, SeriesFate, plain
from medsr_cli.tasks.module_settings import DEFAULT_NAME, ModuleSettings, settings_of, task_settings
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.request import UpscaleRequest
from medsr_cli.tasks.upscale import upscale

TASK, RESULT = "task.json", "result.json"
LINE_EVERY_S = 15.0
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True)
class ModuleOrder:
    """Where a hub has put things, and what is set beside its task file."""

    input: Path
    output: Path
    task: Path | None = None
    """None is `task.json` in the input folder, if it is there."""
    name: str = DEFAULT_NAME
    """The module's name in the hub, for task files that list several steps."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that count more than those of the task file."""
    offline: bool = False


def run_module(order: ModuleOrder, progress: Progress) -> Outcome:
    """Enlarge what suits of a hub's input folder into its output folder.

    The results, and `result.json` after them, appear when all of them are whole; after a failure `result.json` alone
    does.

    Raises:
        ArgumentsError: folders or settings cannot be.
        InputRefused: nothing in the input suits, and `nothing_suitable` is `refuse`.
        SomeInputsFailed: of several series some failed, and `partial` is not set.
        MedsrError: the only series failed, or no series could have been done.
    """
    _refuse_folders(order)
    outcome = Outcome()
    try:
        settings = _settings(order, outcome)
        for sentence in outcome.warnings:
            progress.warn(sentence)
        with delivery_into(order.output, RESULT) as delivery:
            _fill(delivery, order, settings, outcome, progress)
            delivery.add_text(_json(outcome), RESULT)
    except MedsrError as error:
        outcome.error = error
        with delivery_into(order.output, RESULT) as delivery:
            delivery.add_text(_json(outcome), RESULT)
        raise
    return outcome


def _json(outcome: Outcome) -> str:
    return json.dumps(outcome.to_json(), indent=2, default=str) + "\n"


def _refuse_folders(order: ModuleOrder) -> None:
    if not order.input.is_dir():
        msg = "The input folder is not there." if not order.input.exists() else "The input is no folder."
        raise InputRefused(msg, "Give it with --in, or as the hub does with MERCURE_IN_DIR.")
    if order.output.exists() and not order.output.is_dir():
        msg = "The output is no folder."
        raise ArgumentsError(msg, "Give it with --out, or as the hub does with MERCURE_OUT_DIR.")
    a, b = order.input.resolve(), order.output.resolve()
    if a == b or a in b.parents or b in a.parents:
        msg = "The input folder and the output folder are one, or one holds the other."
        raise ArgumentsError(msg, "Give two folders; an input is never changed.")


def _settings(order: ModuleOrder, outcome: Outcome) -> ModuleSettings:
    path = order.task or order.input / TASK
    values: dict[str, Any] = {}
    if order.task is not None or path.exists():
        values = task_settings(path, order.name)
    elif not order.overrides:
        outcome.warnings.append(f"There is no {TASK}: every setting has its default.")
    return settings_of({**values, **order.overrides})


def _fill(
    delivery: Delivery, order: ModuleOrder, settings: ModuleSettings, outcome: Outcome, progress: Progress
) -> None:
    """Everything that goes into the output folder but `result.json`."""
    suitable = sorted_input(order.input, delivery.temporary / "in", settings, outcome)
    if suitable:
        _enlarge(delivery.temporary, suitable, order, settings, progress)
        _conclude(suitable, settings)
    if not outcome.of_status("enlarged") and settings.nothing_suitable == "refuse":
        reasons = list(dict.fromkeys(fate.reason for fate in outcome.fates if fate.reason))
        why = f" A series {'; another '.join(reasons)}." if reasons else " It holds no DICOM image."
        msg = f"Nothing in the input folder can be enlarged.{why}"
        raise InputRefused(msg, f"{RESULT} lists every series; nothing_suitable: accept makes this no error.")
    for fate in outcome.of_status("enlarged"):
        for path, name in fate.derived:
            delivery.add(path, name)
    _pass_on(delivery, order.input, settings, outcome)


def _enlarge(
    temporary: Path, suitable: Sequence[SeriesFate], order: ModuleOrder, settings: ModuleSettings, progress: Progress
) -> None:
    """Enlarge every series into a folder of its own inside the temporary one."""
    sources = {fate.folder: fate for fate in suitable}
    request = UpscaleRequest(
        inputs=tuple(sources),
        model=ModelRequest(
            model=settings.model,
            weights=settings.weights,
            modality=settings.modality,
            device=settings.device,
            threads=settings.threads,
            offline=order.offline,
            # Which engine is faster may change from run to run, and a hub's container forgets what it measured.
            probe=False,
            fit=settings.fit,
            ensemble=settings.tta,
            back_projection=settings.back_projection,
        ),
        magnification=settings.magnification,
        output=temporary / "out",
        dicom=DicomOutput(settings.transfer_syntax, settings.stable_uids, settings.multiframe),
        strict=settings.strict,
    )
    for item in upscale(request, _Numbered(progress)):
        fate = sources[item.source]
        fate.items.append(item)
        if item.error is None and item.output is not None:
            fate.derived += list(_named(item.output))
    for fate in suitable:
        if not fate.items:
            msg = f"Series {fate.number} came back without a result."
            raise RunError(msg, "Nothing was delivered.")
        broken = [error for error in fate.errors if not isinstance(error, InputRefused)]
        fate.status = "failed" if broken else "enlarged" if fate.derived else "left alone"
        if fate.errors:
            fate.reason = predicate((broken or fate.errors)[0], fate.folder)


class _Numbered:
    """Tells of series by their numbers: there is nothing else to know them by, and no name to hide."""

    def __init__(self, progress: Progress) -> None:
        self.training, self.say, self.detail, self.warn = (
            progress.training,
            progress.say,
            progress.detail,
            progress.warn,
        )
        self._series, self._told = "", 0.0

    def item(self, name: str, number: int, of: int) -> None:
        """A line for each; `name` is that of the folder of links."""
        self._series, self._told = f"Series {int(name.rpartition('-')[2])}", time.monotonic()
        self.say(f"{self._series} ({number} of {of} to do)")

    def slices(self, done: int, total: int) -> None:
        """A line now and then."""
        if time.monotonic() - self._told > LINE_EVERY_S:
            self._told = time.monotonic()
            self.say(f"{self._series}: {done} of {total} slices")


def _named(output: Path) -> Iterator[tuple[Path, str]]:
    """Files of a result, with names made of the UIDs that medsr gave them.

    Raises:
        RunError: a file does not say its UIDs.
    """
    for path in sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]:
        with refusing(path.name, "reading the result back"):
            header = read_header(FileMember(path, path.stat().st_size))
            series, own = (str(header.get(keyword) or "") for keyword in ("SeriesInstanceUID", "SOPInstanceUID"))
        if not (_UID.fullmatch(series) and _UID.fullmatch(own)):
            msg = "A file of the result did not read back as it was written."
            raise RunError(msg, "Nothing was delivered; check the disk.")
        yield path, f"{series}{SEPARATOR}{own}.dcm"


def _conclude(suitable: Sequence[SeriesFate], settings: ModuleSettings) -> None:
    """End a run in which series failed, unless what is done is to be delivered all the same."""
    errors = [error for fate in suitable if fate.status == "failed" for error in fate.errors]
    done = any(fate.status == "enlarged" for fate in suitable)
    if not errors or (settings.partial and done):
        return
    if not done and len({(error.exit_code, error.sentence) for error in errors}) == 1:
        raise errors[0]
    failed = sum(fate.status == "failed" for fate in suitable)
    msg = f"{failed} of {len(suitable)} series failed: {plain(errors[0].sentence)}"
    raise SomeInputsFailed(msg, f"{RESULT} lists all; nothing was delivered, unless partial is set.")


def _pass_on(delivery: Delivery, folder: Path, settings: ModuleSettings, outcome: Outcome) -> None:
    """Source files, unchanged and under their own names, as far as they are wanted beside the results."""
    if settings.keep_source == "none":
        return
    enlarged = {path for fate in outcome.of_status("enlarged") for path in fate.files}
    for path in files_of(folder):
        if is_dicom(path) and path.is_file() and (settings.keep_source == "all" or path not in enlarged):
            delivery.add_copy(path, path.name)
            outcome.files_kept += 1


def module_folders(
    given_input: Path | None, given_output: Path | None, environment: Mapping[str, str]
) -> tuple[Path, Path]:
    """Input and output folder: as given, else as mercure names them, else as MONAI Deploy does.

    Raises:
        ArgumentsError: one of them is not said.
    """
    names = (
        ("MERCURE_IN_DIR", "MERCURE_OUT_DIR"),
        ("MONAI_INPUTPATH", "MONAI_OUTPUTPATH"),
        ("HOLOSCAN_INPUT_PATH", "HOLOSCAN_OUTPUT_PATH"),
    )
    said = [[environment[pair[side]] for pair in names if environment.get(pair[side])] for side in (0, 1)]
    places = [
        given or (Path(texts[0]) if texts else None)
        for given, texts in zip((given_input, given_output), said, strict=True)
    ]
    for place, option, variable in zip(places, ("--in", "--out"), names[0], strict=True):
        if place is None:
            msg = f"Neither {option} nor {variable} names a folder."
            raise ArgumentsError(msg, f"Give {option} DIR.")
    first, second = places
    assert first is not None and second is not None  # noqa: S101, PT018 - compared just above
    return first, second
