"""From a checkpoint file to an engine, through the library that was asked for or the one that is faster here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsr_cli.engines.build import engine_of
from medsr_cli.engines.network_engine import NetworkEngine
from medsr_cli.errors import ArgumentsError, DeviceUnavailable, MedsrError, WeightsError, mention
from medsr_cli.networks import catalogue
from medsr_cli.tasks.magnification import Factors, in_words
from medsr_cli.tasks.progress import Progress
from medsr_cli.tasks.speeds import Speeds, Workload, network_key, seconds_per_plane
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.store import default_home

if TYPE_CHECKING:
    from medsr_cli.engines.onnx_file import OnnxFile
    from medsr_cli.tasks.model import ModelRequest

LARGEST_SCALE = 16
WORTH_S = 30.0
"""A run that PyTorch does in less is over before an export and a probe would have paid for themselves."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file that has been verified, and what a run needs to know of it."""

    path: Path
    id: str
    sha256: str
    precision_cost_db: Mapping[str, float] = field(default_factory=dict)
    """What arithmetic narrower than float32 costs, by its name."""


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to enlarge."""

    engine: NetworkEngine
    arch: catalogue.Arch
    variant: str
    scale: Factors


@dataclass(frozen=True)
class Sketch:
    """What a file's header says of the network in it, so that it need not be built to know."""

    arch: catalogue.Arch
    config: Mapping[str, Any]

    @property
    def variant(self) -> str:
        """The variant's name, or that of the method for a size that has none."""
        return self.arch.variant_of(self.config) or self.arch.id

    def scale(self, asked: Factors) -> Factors:
        """The network's own enlargement, or for networks of any scale the one that is asked for."""
        if self.arch.scale_range is not None:
            return asked
        own = float(self.config.get("scale", max(self.arch.scales)))
        return own, own


def load_checkpoint(
    request: ModelRequest,
    checkpoint: Checkpoint,
    scale: Factors,
    wanted: catalogue.Arch | None,
    workload: Workload | None,
    progress: Progress,
) -> Loaded:
    """The engine for a checkpoint, through the backend of the request.

    Args:
        request: backend, device, precision and limits.
        checkpoint: a `.safetensors` file, or an `.onnx` file that `medsr export` wrote.
        scale: the enlargement that is asked for.
        wanted: the method that it has to be of, if that was said.
        workload: what is to be enlarged, if known; `auto` measures nothing for a short run.
        progress: is told which backend was picked, and why.

    Raises:
        ArgumentsError: the scale is not the network's, or the options exclude each other.
        WeightsError: not a checkpoint of a method that enlarges, or damaged.
        DeviceUnavailable: the device or its provider is not there.
    """
    return _Loading(request, checkpoint, scale, wanted, workload, progress).load()


@dataclass(frozen=True)
class _Loading:
    """The arguments of `load_checkpoint`."""

    request: ModelRequest
    checkpoint: Checkpoint
    scale: Factors
    wanted: catalogue.Arch | None
    workload: Workload | None
    progress: Progress

    def load(self) -> Loaded:
        request = self.request
        if self.checkpoint.path.suffix == ".onnx":
            if request.backend == "torch":
                msg = f"{self.checkpoint.id} is an ONNX file, which PyTorch does not run."
                raise ArgumentsError(msg, "Use --backend onnx, or the checkpoint that it was exported from.")
            from medsr_cli.engines.onnx_file import read_onnx

            return self._through_onnx(read_onnx(self.checkpoint.path))
        if request.backend == "onnx":
            self._refuse_absent_cuda()
            return self._through_onnx(self._stored_export())
        sketch = self._sketch()
        # ONNX Runtime has no bfloat16 here, and no promise of the same bits.
        if request.backend == "torch" or request.deterministic or request.precision == "bf16" or sketch is None:
            return self._through_torch()
        return self._faster(sketch)

    # -- the two libraries -------------------------------------------------------------------------------------

    def _through_torch(self) -> Loaded:
        import torch

        from medsr_cli.engines.torch_runner import TorchSettings, engine_for
        from medsr_cli.networks import load_network
        from medsr_cli.networks.checkpoint import config_of, entry_of

        request = self.request
        if request.threads:
            torch.set_num_threads(request.threads)
        net = load_network(self.checkpoint.path)
        sketch = Sketch(entry_of(net), config_of(net))
        own = self._own_scale(sketch)
        engine = engine_for(
            net,
            sketch.arch,
            own,
            device=request.device,
            precision=request.precision,
            tile=request.tile,
            settings=TorchSettings(self.checkpoint.precision_cost_db, request.deterministic, request.max_vram),
        )
        return Loaded(engine, sketch.arch, sketch.variant, own)

    def _through_onnx(self, file: OnnxFile) -> Loaded:
        from medsr_cli.engines.onnx_runner import OnnxRunner

        request = self.request
        sketch = Sketch(file.arch, file.config)
        own = self._own_scale(sketch)
        runner = OnnxRunner(
            file,
            device=request.device,
            precision=request.precision,
            threads=request.threads,
            max_bytes=request.max_vram,
        )
        engine = engine_of(runner, sketch.arch, file.traits, own, tile=request.tile, limit_bytes=request.max_vram)
        return Loaded(engine, sketch.arch, sketch.variant, own)

    def _stored_export(self) -> OnnxFile:
        from medsr_cli.tasks.export import stored_export

        return stored_export(self.checkpoint.path, self.checkpoint.sha256, self.request.precision, self.progress)

    def _refuse_absent_cuda(self) -> None:
        """Before the export, which takes a minute."""
        from medsr_cli.engines.onnx_provider import CUDA, CUDA_REMEDY, providers, refuse_unbuilt_cuda
        from medsr_cli.engines.onnx_runner import known_device

        request = self.request
        device, _ = known_device(request.device)
        on_cuda = device == "cuda"
        if on_cuda:
            refuse_unbuilt_cuda()
        cuda = (
            next((p for p in providers() if p.name == CUDA), None) if on_cuda or request.precision == "fp16" else None
        )
        if on_cuda and cuda is not None and not cuda.works:
            msg = f"CUDA was asked for, but ONNX Runtime cannot use it: {cuda.fault}."
            raise DeviceUnavailable(msg, CUDA_REMEDY)
        if request.precision == "fp16" and (cuda is None or not cuda.works or device == "cpu"):
            msg = "fp16 needs a GPU."
            raise ArgumentsError(msg, "Use fp32 on the CPU.")

    def _own_scale(self, sketch: Sketch) -> Factors:
        """The network's enlargement, if it is of the right method and can serve the one that is asked for."""
        name, scale = self.checkpoint.id, self.scale
        _refuse_other_method(sketch.arch, self.wanted, name)
        own = sketch.scale(scale)
        if own != scale and not self.request.fit:
            msg = f"{mention(name)} enlarges by {in_words(own)}, not by {in_words(scale)}."
            raise ArgumentsError(msg, f"Use --scale {own[0]:g}, other weights, or --fit.")
        if max(own) < max(scale):
            msg = f"{mention(name)} enlarges by {in_words(own)} at most, not by {in_words(scale)}."
            raise ArgumentsError(msg, "--fit shrinks the result of a larger scale; use weights of one.")
        return own

    def _sketch(self) -> Sketch | None:
        """What the header says; None for files that do not say what they hold."""
        metadata = read_header(self.checkpoint.path).metadata
        return sketch_of(metadata, self.checkpoint.id) if "medsr.method" in metadata else None

    # -- whichever is faster -----------------------------------------------------------------------------------

    def _faster(self, sketch: Sketch) -> Loaded:
        try:
            own = self._own_scale(sketch)
        except MedsrError:
            return self._through_torch()  # a header may be wrong: the tensors say what is the matter
        size = self.workload.probe_size if self.workload else (0, 0)
        request = self.request
        key = network_key(
            sketch.arch.id,
            sketch.config,
            scale=own if sketch.arch.scale_range else None,
            device=request.device,
            precision=request.precision,
            threads=request.threads,
            size=size,
        )
        speeds = Speeds(default_home())
        known = speeds.known(key)
        if {"torch", "onnx"} <= set(known):
            return self._as_known(known)
        if self.workload is None or not request.probe:
            self.progress.detail("Backend: torch (onnx was not measured).")
            return self._through_torch()
        return self._probed(self.workload, known.get("torch"), lambda seconds: speeds.keep(key, seconds))

    def _as_known(self, known: Mapping[str, float]) -> Loaded:
        """By what was measured before; an export that is still to be made has to pay for itself."""
        from medsr_cli.tasks.export import has_stored_export

        if known["onnx"] >= known["torch"]:
            self._tell("torch", known, "measured before")
            return self._through_torch()
        whole_s = known["torch"] * self.workload.probes if self.workload else 0.0
        if whole_s < WORTH_S and not has_stored_export(self.checkpoint.sha256, self.request.precision):
            self.progress.detail("Backend: torch (onnx is faster here, but the job is too short for its export).")
            return self._through_torch()
        loaded = self._through_onnx_if_it_can()
        if loaded is None:
            return self._through_torch()
        self._tell("onnx", known, "measured before")
        return loaded

    def _probed(self, workload: Workload, known_s: float | None, keep: Callable[[Mapping[str, float]], None]) -> Loaded:
        """Measures PyTorch, then ONNX Runtime if the run is long enough for the export to pay."""
        size = workload.probe_size
        torch_run = self._through_torch()
        # One run, warming up included, is dear enough for a short job and says enough about it.
        rough_s = known_s or seconds_per_plane(torch_run.engine, *size, warm=False)
        whole_s = rough_s * workload.probes
        if whole_s < WORTH_S:
            keep({"torch": rough_s})
            self.progress.detail(f"Backend: torch (about {whole_s:.1f} s of work: too short to probe onnx).")
            return torch_run
        self.progress.say("Measuring which engine is faster here, once for this network (--no-probe skips it).")
        onnx_run = self._through_onnx_if_it_can()
        if onnx_run is None:
            return torch_run
        seconds = {
            "torch": seconds_per_plane(torch_run.engine, *size),
            "onnx": seconds_per_plane(onnx_run.engine, *size),
        }
        keep(seconds)
        picked = "onnx" if seconds["onnx"] < seconds["torch"] else "torch"
        self._tell(picked, seconds, "measured now")
        return onnx_run if picked == "onnx" else torch_run

    def _through_onnx_if_it_can(self) -> Loaded | None:
        """With `auto`, what ONNX Runtime cannot run is PyTorch's."""
        try:
            return self._through_onnx(self._stored_export())
        except MedsrError as error:
            self.progress.detail(f"Backend: torch (onnx cannot run it: {error})")
            return None

    def _tell(self, picked: str, seconds: Mapping[str, float], when: str) -> None:
        figures = ", ".join(f"{name} {1000 * s:.3g} ms a plane" for name, s in sorted(seconds.items()))
        self.progress.detail(f"Backend: {picked} ({figures}, {when}).")


def sketch_of(metadata: Mapping[str, str], name: str) -> Sketch:
    """The method and configuration that a file's metadata name.

    Raises:
        WeightsError: there is no such method, or the configuration is not readable.
    """
    method = metadata.get("medsr.method")
    arch = next((arch for arch in catalogue.CATALOGUE if arch.id == method and arch.module), None)
    try:
        config = json.loads(metadata.get("medsr.config", ""))
    except ValueError:
        config = None
    if arch is None or not isinstance(config, dict):
        msg = f"{mention(name)} does not say which network it holds."
        raise WeightsError(msg, "Export or import it again with this version of medsr.")
    scale = config.get("scale", 1)
    if type(scale) is not int or not 1 <= scale <= LARGEST_SCALE:
        msg = f"{mention(name)} says that it enlarges by {str(scale)[:40]!r}."
        raise WeightsError(msg, "Export or import it again with this version of medsr.")
    return Sketch(arch, config)


def _refuse_other_method(arch: catalogue.Arch, wanted: catalogue.Arch | None, checkpoint_id: str) -> None:
    if arch.kind != "network":
        msg = f"{checkpoint_id} is a checkpoint of {arch.id}, which does not enlarge images."
        raise WeightsError(msg, "Use a checkpoint of a method that medsr models lists with scales.")
    if wanted is not None and arch not in catalogue.named(wanted.id):
        msg = f"{checkpoint_id} is a checkpoint of {arch.id}, not of {wanted.id}."
        raise WeightsError(msg, f"Run it with -m {arch.id}.")
