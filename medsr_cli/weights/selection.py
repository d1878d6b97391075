"""Which checkpoint a name stands for: the first of the manifest that fits scale and modality and is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from medsr_cli.errors import ArgumentsError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.weights.manifest import Entry, Manifest, Scale


def select(
    manifest: Manifest, name: str, scale: Scale, modality: str | None, present: Callable[[Entry], bool]
) -> Entry:
    """The checkpoint to use: an id names one exactly, a method or variant the first that fits and is present.

    Args:
        manifest: the list, in order of preference.
        name: a checkpoint's id, a method, a family of methods or a variant.
        scale: in-plane enlargement asked for; two numbers where rows and columns differ.
        modality: mr, ct, us or xr; None takes the manifest's default.
        present: whether an entry is on this machine.

    Returns:
        An entry of the modality asked for or of `any`. Only where the manifest has none of these at this
        scale, one of another modality: compare `entry.modality` and warn.

    Raises:
        ArgumentsError: no such name, or nothing for this scale; the sentence lists what there is.
        WeightsError: nothing is listed, or what fits is not on this machine; the sentence says how to get one.
    """
    both = scale if isinstance(scale, tuple) else (scale, scale)
    exact = [entry for entry in manifest.entries if entry.id == name]
    candidates = exact or _entries_of(manifest, name)
    fitting = [entry for entry in candidates if entry.covers(*both)]
    if not fitting:
        _refuse_scale(name, both, candidates)
    wanted = modality or manifest.default_modality
    if not exact:
        fitting = [entry for entry in fitting if entry.modality in (wanted, "any")] or fitting
    for entry in fitting:
        if present(entry):
            return entry
    ids = ", ".join(entry.id for entry in fitting)
    what = f"{name} for scale {_in_words(both)} and {wanted}"
    msg = f"No checkpoint of {what} is on this machine; the manifest lists {ids}."
    others = [entry.id for entry in candidates if entry.covers(*both) and entry not in fitting and present(entry)]
    instead = f" Present, of another modality: {', '.join(others)} (--weights ID)." if others else ""
    raise WeightsError(msg, f"{fitting[0].how_to_get}{instead}")


def _entries_of(manifest: Manifest, name: str) -> list[Entry]:
    """The entries of a method, family or variant, at least one.

    Raises:
        ArgumentsError: no such name; an id that is neither is told what ids there are, too.
        WeightsError: none is listed.
    """
    try:
        arch, variant = catalogue.find(name)
    except ArgumentsError as error:
        known = ", ".join(entry.id for entry in manifest.entries) or "none"
        raise ArgumentsError(error.sentence, f"{error.remedy} Checkpoints: {known}.") from error
    if not arch.module:
        msg = f"{arch.id} is computed, not learned: it has no checkpoints."
        raise ArgumentsError(msg, "Leave out --weights.")
    methods = [member.id for member in catalogue.named(name)]
    found = [e for e in manifest.entries if e.method in methods and (variant is None or e.variant == variant)]
    if not found:
        _refuse_unlisted(name, arch)
    return found


def _refuse_unlisted(name: str, arch: catalogue.Arch) -> NoReturn:
    """An untrained network never runs: say where a trained one can come from."""
    convert = f"medsr weights import FILE -m {name} -o OUT.safetensors"
    if "training on the image" in arch.needs:
        msg = f"{name} has no checkpoint by design: it is trained anew on every image, and its authors published none."
    else:
        msg = f"No checkpoint of {name} is listed, and medsr does not run an untrained network."
    train = f", or train one: medsr finetune DIR -m {name} -o OUT" if arch.trainable else ""
    raise WeightsError(msg, f"Convert one that you have: {convert}, then pass --weights OUT.safetensors{train}.")


def _refuse_scale(name: str, scale: tuple[float, float], candidates: list[Entry]) -> NoReturn:
    highest = max((high for e in candidates for high in (*e.scales, *(e.scale_range or ()))), default=0.0)
    words = dict.fromkeys(word for e in candidates for word in e.scale_words)
    if not words:
        msg = f"{name} enlarges nothing: its weights are for other networks to use."
        raise ArgumentsError(msg, "Name a method that enlarges (medsr models lists them).")
    msg = f"{name} has no checkpoint for scale {_in_words(scale)}."
    listed = ", ".join(sorted(words, key=lambda word: float(word.partition("-")[0])))
    fit = (
        " For a scale between, --fit takes the next larger one and shrinks its result." if max(scale) < highest else ""
    )
    raise ArgumentsError(msg, f"There is: {listed}.{fit}")


def _in_words(scale: tuple[float, float]) -> str:
    rows, columns = scale
    return f"{rows:g}" if rows == columns else f"{rows:g} along rows and {columns:g} along columns"
