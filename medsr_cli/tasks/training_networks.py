"""What is trained and by which recipe, what it starts from, and the networks that its losses compare with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.errors import ArgumentsError, InputRefused, WeightsError, mention
from medsr_cli.networks import catalogue
from medsr_cli.tasks.finetune import FinetuneRequest, Watcher

if TYPE_CHECKING:
    from torch import nn

    from medsr_cli.training.pack import PackedSlices
    from medsr_cli.training.recipe import Recipe
    from medsr_cli.training.workfolder import RunIdentity

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

DEFAULT_VARIANTS = {"cohft": "cohft-m"}
"""Which sizes a method's name means where none of its variants is called like it."""
RELEASED_SIDE = 240
"""Side of a target of the released Cohf-T, the only one that it runs on."""
ENTRIES = {"vgg": "vgg19", "medclip": "medclip", "segmentation": "segmentation"}
"""Methods of the catalogue whose checkpoints in the store are the networks of a loss, by role."""


@dataclass(frozen=True)
class Begun:
    """A network to train, and what it starts from, in words."""

    net: nn.Module
    start: str


@dataclass(frozen=True)
class LossNetworks:
    """The networks that a recipe's losses need, by role."""

    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Ids of the manifest, or `a file`: a path may name a person."""


# -- the recipe --------------------------------------------------------------------------------------------


def recipe_for(request: FinetuneRequest, saved: Recipe | None) -> Recipe:
    """The preset, the file or the saved recipe, with what the request sets.

    Args:
        request: what was asked for.
        saved: the recipe of the run that goes on.

    Raises:
        ArgumentsError: there is no such preset or field, a value cannot be, the recipe is for another method, or it
            is not that of the run that goes on.
    """
    from medsr_cli.training.recipe import changed, refuse_other_recipe

    if saved is not None and request.preset is None and request.recipe is None:
        wanted = changed(saved, request.settings)
    else:
        wanted = changed(_chosen(request), request.settings)
    wanted = _fitted(request, wanted)
    if saved is not None:
        refuse_other_recipe(saved, wanted)
    return wanted


def settings_from(assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of a recipe from `FIELD=VALUE` texts, values as YAML has them: 1e-4, true, [2, 3], {l1: 1, hrl: 10}.

    The brackets of a list and of a table may be left away.

    Raises:
        ArgumentsError: a text without a name, or a value that is no YAML. What a field can be, the recipe says.
    """
    from medsr_cli.training.recipe import Recipe

    usual = Recipe()
    found: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            msg = f"--set {text} names no field and value."
            raise ArgumentsError(msg, "Give --set FIELD=VALUE, for example --set learning_rate=1e-4.")
        found[name] = _value_of(text, value, getattr(usual, name, None))
    return found


def _value_of(text: str, value: str, usual: object) -> Any:
    import yaml

    value = value.strip()
    if isinstance(usual, tuple) and not value.startswith("["):
        value = f"[{value}]"
    if isinstance(usual, Mapping) and not value.startswith("{"):
        value = "{" + value + "}"
    try:
        return _numbers(yaml.safe_load(value))
    except yaml.YAMLError as error:
        msg = f"--set {text} has a value that cannot be read."
        raise ArgumentsError(msg, "Give a number, true or false, a word, [A, B] or {NAME: NUMBER}.") from error


def _numbers(value: Any) -> Any:
    """With texts such as 1e-4, which YAML 1.1 takes for words, as the numbers that they are."""
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _chosen(request: FinetuneRequest) -> Recipe:
    from medsr_cli.training.recipe import presets_of, recipe_from_file, recipe_named

    method = request.arch.id
    if request.recipe is not None:
        recipe = recipe_from_file(request.recipe)
        if recipe.method != method:
            msg = f"The recipe {mention(request.recipe.name)} is for {recipe.method}, not for {method}."
            raise ArgumentsError(msg, f"Give -m {recipe.method}, or another recipe.")
    else:
        recipe = recipe_named(method, request.preset or next(iter(presets_of(method)), "paper"))
    if request.weights or request.start:
        # A network that can already do more than enlarge linearly would have to unlearn it.
        recipe = dataclasses.replace(recipe, linear_steps=0, start="random")
    return recipe


def _fitted(request: FinetuneRequest, recipe: Recipe) -> Recipe:
    """The recipe for a network of one size: what it calls whole slices are patches of that size."""
    from medsr_cli.training.recipe import changed

    if request.arch.tiling != "fixed" or request.scale is None:
        return recipe
    side = request.network.side if request.network is not None else RELEASED_SIDE // request.scale
    return changed(recipe, {"region": "patch", "patch": side, "high_patch": 0})


# -- the network -------------------------------------------------------------------------------------------


def build(request: FinetuneRequest, recipe: Recipe, slices: PackedSlices) -> Begun:
    """A new network, or one that goes on from a checkpoint.

    Raises:
        ArgumentsError: the checkpoint is of another scale or variant.
        WeightsError: it is not there, or of another method.
        InputRefused: the images have a number of channels that the method does not take.
    """
    import torch

    if request.weights:
        return _continued(request, request.weights, slices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = _network_class(request.arch)(request.network or named_config(request, slices))
        if recipe.start == "interpolation" and not request.start:
            _start_as_interpolation(net)
    if request.start:
        other, digest = checkpoint_of(request.start, request.arch)
        fresh = _take_what_fits(net, other)
        return Begun(net, f"what fits of the checkpoint with SHA-256 {digest} ({fresh} tensors did not)")
    if recipe.linear_steps:
        from medsr_cli.training.rdst_start import start_from_linear

        start_from_linear(net)
    return Begun(net, "interpolation" if recipe.start == "interpolation" else "nothing")


def rebuild(request: FinetuneRequest, recipe: Recipe, slices: PackedSlices, saved: RunIdentity) -> Begun:
    """The network of a run that goes on, whose weights are in its state: what it began with need not be there.

    Raises:
        ArgumentsError: another network was asked for.
    """
    from medsr_cli.networks.checkpoint import config_of

    if request.weights or request.start:
        return build(request, recipe, slices)
    config = _config_class(request.arch)(**saved.config)
    wanted = request.network or named_config(request, slices)
    new = saved.start in ("nothing", "interpolation")
    if saved.method != request.arch.id or (new and config != wanted) or saved.scale != request.scale:
        variant = catalogue.find(saved.method)[0].variant_of(saved.config) or f"another {saved.method}"
        msg = f"The run to go on with is of {variant}{f' x{saved.scale}' if saved.scale else ''}."
        raise ArgumentsError(msg, "Give the same -m and -s, or --overwrite instead of --resume to start anew.")
    net = _network_class(request.arch)(config)
    assert config_of(net) == dict(saved.config)  # noqa: S101  # JSON keeps whole numbers whole
    return Begun(net, saved.start)


def named_config(request: FinetuneRequest, slices: PackedSlices) -> Any:
    """The configuration of the variant that was asked for, for these images.

    Raises:
        InputRefused: the images have a number of channels that the method does not take.
    """
    arch, variant = catalogue.find(request.model)
    name = variant or DEFAULT_VARIANTS.get(arch.id, arch.id)
    config_class = _config_class(arch)
    known = {item.name for item in dataclasses.fields(config_class)}
    given: dict[str, Any] = dict(arch.variants[name])
    if "scale" in known:
        given["scale"] = request.scale
    if "in_channels" in known:
        given["in_channels"] = channels_of(arch, slices)
    elif slices.channels != 1:
        raise _wrong_channels(arch, slices.channels)
    if "classes" in known:
        given["classes"] = max(slices.label_values, default=1) + 1
    if arch.tiling == "fixed" and request.scale:
        given["side"] = RELEASED_SIDE // request.scale
    return config_class(**given)


def channels_of(arch: catalogue.Arch, slices: PackedSlices) -> int:
    """Channels of the network for these images: theirs, or for a colour network its own, grey being repeated.

    Raises:
        InputRefused: the method does not take so many.
    """
    if not arch.channels or slices.channels in arch.channels:
        return slices.channels
    if slices.channels == 1 and len(arch.channels) == 1:
        return arch.channels[0]
    raise _wrong_channels(arch, slices.channels)


def _wrong_channels(arch: catalogue.Arch, found: int) -> InputRefused:
    wanted = " or ".join(str(count) for count in arch.channels or (1,))
    msg = f"{arch.id} takes images of {wanted} channels; these have {found}."
    return InputRefused(msg, "Leave --contrast away, or take as many registered contrasts as the method has channels.")


def _network_class(arch: catalogue.Arch) -> Any:
    return getattr(importlib.import_module(arch.module), arch.network)


def _config_class(arch: catalogue.Arch) -> Any:
    return getattr(importlib.import_module(arch.module), arch.config)


def _start_as_interpolation(net: nn.Module) -> None:
    from medsr_cli.training.starts import begin_as_interpolation

    try:
        begin_as_interpolation(net)
    except ValueError as error:
        msg = f"This network cannot start as interpolation: {error}".rstrip(".") + "."
        raise ArgumentsError(msg, "Give --set start=random.") from error


def _take_what_fits(net: nn.Module, other: nn.Module) -> int:
    """Copy the tensors of the same name and shape; returns how many others there are."""
    from medsr_cli.networks.rdst import Rdst
    from medsr_cli.training.rdst_start import grow

    weights = other.state_dict()
    if isinstance(net, Rdst):
        return len(grow(net, weights))
    own = net.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    net.load_state_dict(fitting, strict=False)
    return len(own) - len(fitting)


def _continued(request: FinetuneRequest, name: str, slices: PackedSlices) -> Begun:
    net, digest = checkpoint_of(name, request.arch)
    config: Any = net.config
    _, variant = catalogue.find(request.model)
    scale = getattr(config, "scale", request.scale)
    if scale != request.scale:
        msg = f"That checkpoint enlarges by {scale}, not by {request.scale}."
        raise ArgumentsError(msg, f"Give -s {scale}, or --start instead of --weights to take what fits.")
    wanted = channels_of(request.arch, slices)
    if getattr(config, "in_channels", wanted) != wanted:
        msg = f"That checkpoint takes {config.in_channels} channels; these images have {slices.channels}."
        raise ArgumentsError(
            msg, "Start from a checkpoint of as many channels, or give --contrast for registered ones."
        )
    found = request.arch.variant_of(dataclasses.asdict(config))
    if variant is not None and found != variant:
        msg = f"That checkpoint is {found or f'a {request.arch.id} of other sizes'}, not {variant}."
        raise ArgumentsError(msg, f"Give -m {request.arch.id}, or --start instead of --weights to take what fits.")
    if getattr(config, "classes", 256) <= max(slices.label_values, default=0):
        msg = f"That checkpoint knows {config.classes} labels with the background; these images have more."
        raise ArgumentsError(msg, "Give --start instead of --weights to take what fits.")
    return Begun(net, f"the checkpoint with SHA-256 {digest}")


def checkpoint_of(name: str, arch: catalogue.Arch) -> tuple[nn.Module, str]:
    """A network of a path or an id, and the SHA-256 of its file.

    Raises:
        WeightsError: it is not there, does not load, or is of another method.
    """
    from medsr_cli.networks import load_network
    from medsr_cli.networks.checkpoint import entry_of

    path = _path_of(name)
    net = load_network(path)
    found = entry_of(net)
    if found is not arch:
        msg = f"{mention(path.name)} is a checkpoint of {found.id}, not of {arch.id}."
        remedy = f"Give -m {found.id}." if found.trainable else f"Give a checkpoint of {arch.id}."
        raise WeightsError(msg, remedy)
    return net, _sha256(path)


def refuse_missing(request: FinetuneRequest) -> None:
    """Before images are read, which can take hours.

    Raises:
        WeightsError: the checkpoint to start from is not there.
    """
    for name in (request.weights, request.start):
        if name:
            _path_of(name)


def _path_of(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        msg = f"There is no checkpoint {mention(name)}."
        raise WeightsError(msg, "Check the path.")
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    return shelf.store.verified_path(shelf.manifest.entry(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- networks of losses ------------------------------------------------------------------------------------


def loss_networks(request: FinetuneRequest, recipe: Recipe, watcher: Watcher) -> LossNetworks:
    """Everything that the losses of all stages compare with; nothing that is missing is left out.

    Raises:
        WeightsError: one of them is not on this machine, with the command that fetches or trains it.
        ArgumentsError: a segmentation network was given that no loss uses.
    """
    from medsr_cli.training.losses import needed_networks

    needed = needed_networks(recipe)
    if request.segmentation is not None and "segmentation" not in needed:
        msg = "A segmentation network was given, but no loss of this recipe uses it."
        raise ArgumentsError(msg, "Give a --preset with one, such as paper-e1, or --set losses={l1: 1, encoder1: 10}.")
    found = {role: _loss_network(role, what, request, watcher) for role, what in needed.items()}
    return LossNetworks(
        {role: net for role, (net, _, _) in found.items()},
        {role: sha256 for role, (_, sha256, _) in found.items()},
        {role: name for role, (_, _, name) in found.items()},
    )


def _loss_network(role: str, what: str, request: FinetuneRequest, watcher: Watcher) -> tuple[nn.Module, str, str]:
    """The network of a role, the SHA-256 of its file, and its id."""
    arch = catalogue.find(ENTRIES[role])[0]
    if role == "segmentation" and request.segmentation is not None:
        net, digest = checkpoint_of(request.segmentation, arch)
        return net, digest, "a file" if Path(request.segmentation).is_file() else request.segmentation
    path, name = _in_store(role, what, arch)
    if role == "segmentation":
        watcher.note(f"The losses compare with {mention(name)}; --segmentation names another network.")
    if role == "medclip":
        from medsr_cli.training.semantic import load_image_text

        return load_image_text(path), _sha256(path), name
    net, digest = checkpoint_of(str(path), arch)
    return net, digest, name


def _in_store(role: str, what: str, arch: catalogue.Arch) -> tuple[Path, str]:
    from medsr_cli.tasks.weights import open_shelf
    from medsr_cli.training.losses import ROLES

    shelf = open_shelf()
    entry = shelf.first_present(arch.id)
    if entry is None:
        msg = f"This recipe needs {what}, which is not on this machine."
        raise WeightsError(msg, ROLES[role][1])
    return shelf.store.verified_path(entry, allow_unpinned=True), entry.id
