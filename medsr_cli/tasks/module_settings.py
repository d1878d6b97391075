"""What a routing hub may set for `medsr module`, and where it says so: `process.settings` of a task file.

A hub's task file holds more than settings, a patient's name among it. Nothing but `process` is looked at here, and no
value of it is ever quoted in a sentence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from medsr_cli.errors import ArgumentsError, reason_of
from medsr_cli.formats.dicom_encode import SYNTAXES
from medsr_cli.tasks.magnification import Magnification

LARGEST_TASK_BYTES = 16 << 20
DEFAULT_NAME = "medsr"
CHOICES: dict[str, tuple[str, ...]] = {
    "modality": ("mr", "ct", "us", "xr"),
    "transfer_syntax": tuple(SYNTAXES),
    "keep_source": ("none", "rest", "all"),
    "nothing_suitable": ("refuse", "accept"),
}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
}


@dataclass(frozen=True)
class ModuleSettings:
    """One run's settings; the names of the fields are those of `process.settings`."""

    model: str = "rdst"
    """Method, variant or checkpoint id, as `-m`."""
    scale: str | float = "4"
    """In-plane enlargement: 4, or `2x3` for rows and columns apart."""
    spacing_mm: float | None = None
    """Wanted pixel spacing instead of a scale."""
    weights: str | None = None
    """A checkpoint's id, or the path of a file inside the container."""
    modality: str | None = None
    """What every series is taken for; else each says so itself."""
    fit: bool = False
    tta: bool = False
    back_projection: int = 0
    strict: bool = False
    """Refuse what would otherwise be a warning."""
    device: str = "auto"
    threads: int | None = None
    transfer_syntax: str = "explicit"
    stable_uids: bool = True
    """The same UIDs when the hub tries again, so that no archive gets a series twice."""
    multiframe: bool = False
    series: list[str] | None = None
    """SeriesInstanceUIDs of the only series to enlarge."""
    only_modalities: list[str] | None = None
    """Values of the attribute Modality; series of others are left alone."""
    min_images: int = 1
    """Series of fewer images are left alone: localisers, captures."""
    largest_matrix: int | None = None
    """Series with more rows or columns are left alone: they are fine enough."""
    again: bool = False
    """Also enlarge what medsr made; without it, results that an archive routes back go no further."""
    keep_source: str = "none"
    """What of the input is passed on unchanged beside the results: nothing, what was not enlarged, or everything."""
    nothing_suitable: str = "refuse"
    """What an input without a suitable series is: an error, or a run that is done."""
    partial: bool = False
    """Deliver the series that are done although others failed."""

    @property
    def magnification(self) -> Magnification:
        """How much larger.

        Raises:
            ArgumentsError: it does not enlarge, or both a scale and a spacing are set.
        """
        text = f"{self.scale:g}" if isinstance(self.scale, int | float) else self.scale
        return Magnification.parse(text, self.spacing_mm)


def known_settings() -> list[str]:
    """The names, in order."""
    return [entry.name for entry in fields(ModuleSettings)]


def settings_of(values: Mapping[str, Any]) -> ModuleSettings:
    """Settings by their names.

    Raises:
        ArgumentsError: a name that is not known, a value of another type, or one that cannot be.
    """
    hints = get_type_hints(ModuleSettings)
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            meant = f" Is {near[0]} meant?" if near else ""
            msg = f"There is no setting {name!r}.{meant}"
            raise ArgumentsError(msg, f"The settings are {', '.join(hints)}.")
        _refuse_type(name, value, hints[name])
        if name in CHOICES and value is not None and value not in CHOICES[name]:
            msg = f"The setting {name} takes one of {', '.join(CHOICES[name])}."
            raise ArgumentsError(msg, "Correct it in the settings of the module or of the rule.")
    if values.get("scale") is not None and values.get("spacing_mm") is not None:
        msg = "The settings scale and spacing_mm both say how much larger."
        raise ArgumentsError(msg, "Give one of them.")
    for name, least in (("min_images", 1), ("largest_matrix", 1), ("back_projection", 0), ("threads", 1)):
        if values.get(name) is not None and values[name] < least:
            msg = f"The setting {name} must be at least {least}."
            raise ArgumentsError(msg, "Correct it in the settings of the module or of the rule.")
    settings = ModuleSettings(**values)
    _ = settings.magnification  # refused here, not after the first series
    return settings


def _refuse_type(name: str, value: Any, hint: Any) -> None:
    """JSON's types as they stand: the text "true" is no truth value, and true is no number."""
    kinds = get_args(hint) if not isinstance(hint, type) else (hint,)
    allowed = [getattr(kind, "__origin__", kind) for kind in kinds]
    for kind in allowed:
        if kind is float and type(value) in (int, float):
            return
        if kind is list and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return
        if type(value) is kind and kind is not list:
            return
    words = [KINDS[kind] for kind in allowed if kind in KINDS]
    msg = f"The setting {name} must be {' or '.join(words)}."
    raise ArgumentsError(msg, "Correct it in the settings of the module or of the rule.")


def task_settings(path: Path, module: str = DEFAULT_NAME) -> dict[str, Any]:
    """`process.settings` of a task file.

    mercure hands each container a task file with its own step under `process`. Where `process` is a list of steps all
    the same, the step whose `module_name` is `module` is taken, else the only one. Settings of a rule go to all of its
    modules: where they have an object under the name of `module`, that object is this module's, and all else is not.

    Raises:
        ArgumentsError: the file is not JSON of that shape, or it does not say which step is meant.
    """
    task = _read_json(path)
    steps = task.get("process") or {}
    if isinstance(steps, list):
        steps = _own_step(steps, module)
    if not isinstance(steps, dict):
        raise _no_task('its entry "process" is neither an object nor a list of objects')
    settings = steps.get("settings") or {}
    if not isinstance(settings, dict):
        raise _no_task('its "settings" are no object')
    own = settings.get(module)
    return own if isinstance(own, dict) else settings


def _own_step(steps: list[Any], module: str) -> Any:
    named = [step for step in steps if isinstance(step, dict) and step.get("module_name") == module]
    found = named or steps
    if len(found) != 1:
        what = f"{len(named)} steps" if named else f"none of its {len(steps)} steps"
        msg = f"The task file names {what} of the module {module!r}."
        raise ArgumentsError(msg, "Give the module's name in the hub with --name or MEDSR_MODULE_NAME.")
    return found[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_TASK_BYTES:
            raise _no_task(f"it is larger than {LARGEST_TASK_BYTES >> 20} MiB")
        task = json.loads(path.read_bytes())
    except OSError as error:
        raise _no_task(f"it cannot be read ({reason_of(error)})") from error
    except (ValueError, RecursionError) as error:
        # The parser's own words quote the file.
        raise _no_task("it is not JSON") from error
    if not isinstance(task, dict):
        raise _no_task("it is no JSON object")
    return task


def _no_task(why: str) -> ArgumentsError:
    return ArgumentsError(f"The task file is not one of a routing hub: {why}.", "Look at what the hub writes.")


def setting_of_text(text: str) -> tuple[str, Any]:
    """One `NAME=VALUE` of a command line; a value that is JSON is taken as such, any other as text.

    Raises:
        ArgumentsError: there is no `=`.
    """
    name, sign, value = text.partition("=")
    if not sign:
        msg = "--set takes NAME=VALUE."
        raise ArgumentsError(msg, f"The settings are {', '.join(known_settings())}.")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    kinds = get_type_hints(ModuleSettings).get(name.strip())
    if kinds is str or (parsed is not None and not isinstance(parsed, str) and kinds == str | None):
        parsed = value  # -m takes names that may look like numbers
    return name.strip(), parsed
