"""Weights in, network out: every tensor is accounted for before the first one is used.

A file that medsr writes is a safetensors file with this metadata (all values are strings):

    medsr.format   "1"
    medsr.method   id of the method in the catalogue, such as "rdst"
    medsr.config   JSON object of every field of the method's configuration dataclass
    anything else  free: id, scales, modality, trained_on, ...

The configuration is taken from the metadata and checked against the shapes of the tensors; a file without
metadata is recognised by its tensor names and its sizes are read from the shapes. Missing, extra and
mis-shaped tensors, NaN and infinity are refused by name. The network is first laid out without memory, so
that a file cannot ask for more memory than its own tensors take.

Checkpoints of authors are pickles. They pass through `read_author_checkpoint`, which unpickles tensors and
nothing else and has no second, laxer way.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch

from medsr_cli.errors import WeightsError, mention, reason_of
from medsr_cli.networks import catalogue

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor, nn

    from medsr_cli.networks.catalogue import Arch

FORMAT = "1"
MAX_FILE_BYTES = 4_000_000_000
"""Larger than any published network for this task; refused before anything is read."""
MAX_TENSORS = 100_000
MAX_BLOCK_INDEX = 1_000
"""Largest number in a tensor's name: the names give the number of blocks to build."""
WRAPPERS = ("model_g", "model_state_dict", "params", "state_dict")
"""Keys under which training programs put the network's tensors, in the order in which they are tried."""
PARALLEL_PREFIX = "module."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_network(path: str | PathLike[str]) -> nn.Module:
    """The network of a safetensors file: float32, on the CPU, in evaluation mode.

    Call it with float32 (N, C, H, W); `network.config` is its configuration.

    Raises:
        WeightsError: unreadable, not a network of the catalogue, or a tensor is missing, extra, mis-shaped,
            NaN or infinite; metadata and tensors disagree.
    """
    state, metadata = read_safetensors(path)
    name = Path(path).name
    if "medsr.method" not in metadata:
        return network_from_state(state, detect_method(state, name), name=name)
    if metadata.get("medsr.format") != FORMAT:
        msg = (
            f"{mention(name)} is of checkpoint format {metadata.get('medsr.format')!r}; this "
            f"medsr reads format {FORMAT}."
        )
        raise WeightsError(msg, "Install the medsr that wrote it, or convert it again with medsr weights import.")
    arch = network_entry(metadata["medsr.method"], name)
    config = _config_from_json(arch, metadata.get("medsr.config", ""), name)
    return network_from_state(state, arch, config, name=name)


def read_safetensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        WeightsError: the file is not there, too large, or not safetensors.
    """
    path = Path(path)
    _refuse_size(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict, not iterable
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"{mention(path.name)} is not a readable safetensors file ({_first_line(error)})."
        remedy = "Fetch it again, or convert a .pt checkpoint with medsr weights import."
        raise WeightsError(msg, remedy) from error
    return state, metadata


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; empty where there is none.

    Raises:
        WeightsError: the file is not there, too large, or not safetensors.
    """
    path = Path(path)
    _refuse_size(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        msg = f"{mention(path.name)} is not a readable safetensors file ({_first_line(error)})."
        raise WeightsError(msg, "Fetch it again.") from error


def read_author_checkpoint(path: str | PathLike[str], harmless: Sequence[Any] = ()) -> dict[str, Tensor]:
    """The network's tensors of a `torch.save` file or a safetensors file, under their bare names.

    Takes a bare state_dict, one under any of `WRAPPERS`, and names that all begin with `module.`. Nothing in
    a pickle is run: it is read with `weights_only`, and what that refuses stays refused.

    Args:
        path: the file.
        harmless: types beside tensors and plain Python that may stand in it, as `torch.serialization.safe_globals`
            takes them; they are thrown away with everything else that is not the network.

    Raises:
        WeightsError: not readable, code in the pickle, something beside tensors, or larger than 4 GB.
    """
    path = Path(path)
    _refuse_size(path)
    if path.suffix == ".safetensors":
        state: object = read_safetensors(path)[0]
    else:
        state = _unpickle(path, harmless)
    return _bare_names(_find_tensors(state, path.name), path.name)


def detect_method(state: Mapping[str, Tensor], name: str = "the file") -> Arch:
    """The one method of the catalogue whose tensors these are.

    Raises:
        WeightsError: none fits.
    """
    fitting = catalogue.detect(state)
    if not fitting:
        networks = ", ".join(arch.id for arch in catalogue.CATALOGUE if arch.keys)
        msg = f"{mention(name)} holds no network that medsr knows."
        raise WeightsError(msg, f"It knows checkpoints of: {networks}.")
    return fitting[0]


def network_entry(method: str, name: str = "the file") -> Arch:
    """The catalogue's entry of a method that has a network.

    Raises:
        WeightsError: this medsr has no such network.
    """
    for arch in catalogue.CATALOGUE:
        if arch.id == method and arch.module:
            return arch
    networks = ", ".join(arch.id for arch in catalogue.CATALOGUE if arch.module)
    msg = f"{mention(name)} is for the method {method!r}, which this medsr has no network for."
    raise WeightsError(msg, f"It has: {networks}.")


def network_from_state(
    state: Mapping[str, Tensor], arch: Arch, config: object | None = None, *, name: str = "the file"
) -> nn.Module:
    """Build the network whose tensors these are, upcast to float32, and put it in evaluation mode.

    Args:
        state: all tensors of the network; what the module says published checkpoints have beside it is dropped
            (`RECOMPUTED_BUFFERS` by the endings of names, `DROPPED_PREFIXES`, if it has any, by their beginnings).
        arch: the method.
        config: what the sizes are meant to be; None takes them from the shapes.
        name: what to call the file in an error.

    Raises:
        WeightsError: `config` and shapes disagree; a tensor is missing, extra, mis-shaped, NaN or infinite.
    """
    module = importlib.import_module(arch.module)
    dropped: tuple[str, ...] = getattr(module, "DROPPED_PREFIXES", ())
    state = {
        key: value
        for key, value in state.items()
        if not key.endswith(module.RECOMPUTED_BUFFERS) and not key.startswith(dropped)
    }
    _refuse_names(state, name)
    inferred = _infer_config(module, arch, state, name)
    if config is None:
        config = inferred
    else:
        _refuse_other_config(arch, config, inferred, name)
    network = _lay_out(module, arch, config, len(state), name)
    _refuse_misfits(state, network.state_dict(), arch, name)
    tensors = {key: _finite(key, value, name) for key, value in state.items()}
    network.load_state_dict(tensors, assign=True)
    if any(buffer.is_meta for buffer in network.buffers()):  # buffers that are computed, not loaded
        network = getattr(module, arch.network)(config)
        network.load_state_dict(tensors)
    return network.eval()


def save_network(network: nn.Module, metadata: Mapping[str, str] | None = None, *, half: bool = False) -> bytes:
    """The bytes of a safetensors file that `load_network` reads back; equal networks give equal bytes.

    Args:
        network: one of the catalogue's networks.
        metadata: free entries; keys that begin with `medsr.` are this module's.
        half: store trained tensors as float16. Frozen ones (mean and deviation) and those of one dimension stay
            float32: biases take next to no room, and their rounding moves the brightness of the whole image.

    Raises:
        WeightsError: not a network of the catalogue, a value is NaN, infinite or beyond float16, or a
            metadata key is reserved.
    """
    arch = entry_of(network)
    reserved = [key for key in metadata or {} if key.startswith("medsr.")]
    if reserved:
        msg = f"The metadata key {reserved[0]} is written by medsr itself."
        raise WeightsError(msg, "Choose another name.")
    config: Any = network.config
    own = {
        "medsr.format": FORMAT,
        "medsr.method": arch.id,
        "medsr.config": json.dumps(dataclasses.asdict(config), sort_keys=True),
    }
    frozen = {key for key, value in network.named_parameters() if not value.requires_grad}
    tensors = {}
    for key, value in network.state_dict().items():
        stored = _finite(key, value.detach().cpu(), "the network")
        if half and key not in frozen and stored.ndim > 1:
            stored = _halved(key, stored)
        # A copy, since safetensors refuses tensors that share memory: Cohf-T has a convolution of two names.
        tensors[key] = stored.clone(memory_format=torch.contiguous_format)
    return _with_sorted_header(safetensors_torch.save(tensors, {**(metadata or {}), **own}))


def config_of(network: nn.Module) -> dict[str, catalogue.Field]:
    """Every field of a network's configuration, as JSON takes it."""
    config: Any = network.config
    return dataclasses.asdict(config)


def rehearse(network: nn.Module, name: str = "the file") -> None:
    """Run the network once on its smallest inputs, for what shapes alone cannot tell (heads that do not divide).

    Raises:
        WeightsError: it does not run, or what comes out is not an image of finite values.
    """
    module = importlib.import_module(entry_of(network).module)
    try:
        with torch.inference_mode():
            out = network(*module.example_inputs(network.config))
    except (RuntimeError, ValueError) as error:
        msg = f"{mention(name)} fits no working network ({_first_line(error)})."
        raise WeightsError(msg, "Check that it is a finished checkpoint of this method.") from error
    if not bool(torch.isfinite(out).all()):
        msg = f"{mention(name)} makes a network that returns NaN or infinity for an empty image."
        raise WeightsError(msg, "Use another checkpoint; this one did not train.")


def _refuse_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        msg = f"{mention(path)} cannot be read ({reason_of(error)})."
        raise WeightsError(msg, "Check the path.") from error
    if size > MAX_FILE_BYTES:
        msg = f"{mention(path.name)} has {size} bytes; no network here has more than {MAX_FILE_BYTES}."
        raise WeightsError(msg, "Check that it is the right file.")


def _unpickle(path: Path, harmless: Sequence[Any]) -> object:
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # neither an archive nor a pickle: a web page, say
        msg = f"{mention(path.name)} is not a readable PyTorch checkpoint (it begins with {start!r})."
        raise WeightsError(msg, "Fetch it again.")
    _refuse_inflation(path)
    try:
        # PyTorch's advice is not for the reader of our sentence.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(harmless)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{mention(path.name)} holds Python objects or code beside tensors and was not opened."
        remedy = "Ask its author for the state_dict alone (torch.save(model.state_dict(), FILE)) or safetensors."
        raise WeightsError(msg, remedy) from error
    except Exception as error:  # whatever a damaged pickle or archive makes PyTorch raise
        msg = f"{mention(path.name)} is not a readable PyTorch checkpoint ({_first_line(error)})."
        raise WeightsError(msg, "Fetch it again.") from error


def _refuse_inflation(path: Path) -> None:
    """A PyTorch archive is not compressed; one that is could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        msg = f"{mention(path.name)} is not a readable PyTorch checkpoint ({_first_line(error)})."
        raise WeightsError(msg, "Fetch it again.") from error
    if total > MAX_FILE_BYTES:
        msg = f"{mention(path.name)} unpacks to {total} bytes; no network here has more than {MAX_FILE_BYTES}."
        raise WeightsError(msg, "Check that it is the right file.")


def _find_tensors(loaded: object, name: str) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        msg = f"{mention(name)} holds a {type(loaded).__name__}, not a dictionary of tensors."
        raise WeightsError(msg, "Save the network's state_dict.")
    found: Mapping[Any, Any] = loaded
    if found and not any(isinstance(value, torch.Tensor) for value in found.values()):
        wrapped = [found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not wrapped:
            msg = f"{mention(name)} holds no tensors under {', '.join(WRAPPERS)}, nor directly."
            raise WeightsError(msg, "Save the network's state_dict.")
        found = wrapped[0]
    total = 0
    for key, value in found.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor)):
            msg = f"{mention(name)} holds a {type(value).__name__} under {str(key)[:80]!r} where a tensor was expected."
            raise WeightsError(msg, "Save the network's state_dict.")
        # By elements, not by storage: a tensor of stride 0 claims any size for a few bytes.
        total += value.numel() * value.element_size()
    if total > MAX_FILE_BYTES:
        msg = f"{mention(name)} claims {total} bytes of tensors; no network here has more than {MAX_FILE_BYTES}."
        raise WeightsError(msg, "Check that it is the right file.")
    return dict(found)


def _bare_names(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    if not state:
        msg = f"{mention(name)} holds no tensors."
        raise WeightsError(msg, "Save the network's state_dict.")
    if all(key.startswith(PARALLEL_PREFIX) for key in state):
        return {key.removeprefix(PARALLEL_PREFIX): value for key, value in state.items()}
    return state


def _refuse_names(state: Mapping[str, Tensor], name: str) -> None:
    """Bound what the names can ask for, before they say how many blocks to build."""
    if len(state) > MAX_TENSORS:
        msg = f"{mention(name)} holds {len(state)} tensors; no network here has more than {MAX_TENSORS}."
        raise WeightsError(msg, "Check that it is the right file.")
    for key in state:
        for part in key.split("."):
            if part.isdigit() and (len(part) > len(str(MAX_BLOCK_INDEX)) or int(part) > MAX_BLOCK_INDEX):
                msg = f"{mention(name)} names a tensor {key[:120]!r}, of a block beyond {MAX_BLOCK_INDEX}."
                raise WeightsError(msg, "Check that it is the right file.")


def _infer_config(module: ModuleType, arch: Arch, state: Mapping[str, Tensor], name: str) -> object:
    try:
        return module.config_from_state(state)
    except WeightsError as error:
        others = [other.id for other in catalogue.detect(state) if other.id != arch.id]
        looks = f"It looks like {others[0]}." if others else "Check that it is a checkpoint of this method."
        msg = f"{mention(name)} is not {arch.id}: {error.sentence}"
        raise WeightsError(msg, looks) from error
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        msg = f"{mention(name)} has tensors of the names of {arch.id} but not of its shapes ({_first_line(error)})."
        raise WeightsError(msg, "Check that it is a checkpoint of this method.") from error


def _config_from_json(arch: Arch, text: str, name: str) -> object:
    """The configuration that a file declares; every field given, none unknown, each of its type."""
    config_class: Any = getattr(importlib.import_module(arch.module), arch.config)
    try:
        given = json.loads(text)
    except ValueError as error:
        msg = f"{mention(name)} carries a configuration that is not JSON."
        raise WeightsError(msg, "Convert the checkpoint again with medsr weights import.") from error
    kinds = {item.name: type(getattr(config_class(), item.name)) for item in dataclasses.fields(config_class)}
    wrong = set(kinds) ^ set(given) if isinstance(given, dict) else set(kinds)
    if wrong:
        msg = f"{mention(name)} carries a configuration whose fields are not those of {arch.id}: {min(wrong)[:80]}."
        raise WeightsError(msg, "Convert the checkpoint again with medsr weights import.")
    for key, kind in kinds.items():
        value = given[key]
        exact = type(value) is kind or (kind is float and type(value) is int)
        if not exact:
            msg = (
                f"{mention(name)} carries {key} = {str(value)[:40]!r} in its configuration, "
                f"which must be a {kind.__name__}."
            )
            raise WeightsError(msg, "Convert the checkpoint again with medsr weights import.")
    try:
        return config_class(**given)
    except (ArithmeticError, ValueError) as error:
        msg = f"{mention(name)} carries a configuration that {arch.id} cannot have ({_first_line(error)})."
        raise WeightsError(msg, "Convert the checkpoint again with medsr weights import.") from error


def _refuse_other_config(arch: Arch, config: object, inferred: object, name: str) -> None:
    for item in dataclasses.fields(config):  # type: ignore[arg-type] # every configuration is a dataclass
        declared, found = getattr(config, item.name), getattr(inferred, item.name)
        if item.name not in arch.loose_fields and declared != found:
            msg = (
                f"{mention(name)} declares {item.name} = {declared}, but its tensors are those "
                f"of {item.name} = {found}."
            )
            raise WeightsError(msg, "The file is damaged or mislabelled: fetch or convert it again.")


def _lay_out(module: ModuleType, arch: Arch, config: object, n_tensors: int, name: str) -> nn.Module:
    """The network without memory: names and shapes only."""
    layers = 1
    for repeat in arch.repeats:
        layers *= getattr(config, repeat)
    if not 0 < layers <= n_tensors:
        msg = f"{mention(name)} has {n_tensors} tensors, too few for the {layers} layers that their names ask for."
        raise WeightsError(msg, "The file is incomplete: fetch it again.")
    try:
        with torch.device("meta"):
            network: nn.Module = getattr(module, arch.network)(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        msg = f"{mention(name)} asks for a network that {arch.id} cannot be ({_first_line(error)})."
        raise WeightsError(msg, "Check that it is a checkpoint of this method.") from error
    return network


def _refuse_misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], arch: Arch, name: str) -> None:
    for key, tensor in wanted.items():
        if key not in state:
            msg = f"{mention(name)} lacks the tensor {key} of {arch.id}."
            raise WeightsError(msg, "The file is incomplete, or of another network.")
        if state[key].shape != tensor.shape:
            expected, found = tuple(tensor.shape), tuple(state[key].shape)
            msg = f"{mention(name)} has the tensor {key} in shape {found}, where {arch.id} needs {expected}."
            raise WeightsError(msg, "The file is damaged, or of another network.")
    for key in state:
        if key not in wanted:
            msg = f"{mention(name)} has a tensor {key[:120]!r} that {arch.id} does not have."
            raise WeightsError(msg, "It is of another network, or holds more than the network.")


def _finite(key: str, value: Tensor, name: str) -> Tensor:
    if value.dtype not in FLOATS or value.is_sparse or value.is_quantized:
        msg = f"{mention(name)} has the tensor {key} as {value.dtype}, which is not a plain floating-point type."
        raise WeightsError(msg, "Use the unquantised checkpoint.")
    value = value.to(torch.float32)
    if not bool(torch.isfinite(value).all()):
        msg = f"{mention(name)} has NaN or infinity in the tensor {key}."
        raise WeightsError(msg, "The file is damaged or its training diverged; use another checkpoint.")
    return value


def _halved(key: str, value: Tensor) -> Tensor:
    half = value.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        msg = f"The tensor {key} has values beyond the range of half precision."
        raise WeightsError(msg, "Save it in single precision.")
    return half


def entry_of(network: nn.Module) -> Arch:
    """The catalogue's entry of a network.

    Raises:
        WeightsError: it is none of the catalogue's.
    """
    kind = type(network)
    for arch in catalogue.CATALOGUE:
        if (arch.module, arch.network) == (kind.__module__, kind.__name__):
            return arch
    msg = f"{kind.__name__} is not a network of the catalogue."
    raise WeightsError(msg, "Add it to medsr_cli/networks/catalogue.py.")


def _with_sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in order: the library writes it in a different order each time."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".") if lines else type(error).__name__
