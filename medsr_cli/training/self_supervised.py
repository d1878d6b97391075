"""Training on the image that is to be enlarged: the ultrasound CycleGAN's procedure, from seed to stop.

H. Liu et al. 2021, doi 10.1007/s00521-020-05687-9, section 3, and its release. Fathers and sons come from
`fathers`, one iteration is in `cyclegan`, the end in `stopping`.

Everything random is a function of the seed: initial weights by PyTorch's generator, all draws after that by one
generator of NumPy. A run that was stopped and taken up again computes what an uninterrupted one would have, bit
for bit on one CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsr_cli.errors import ArgumentsError, InputRefused, RunError, WeightsError, mention
from medsr_cli.formats.atomic import atomic_file
from medsr_cli.networks.uscyclegan import Generator
from medsr_cli.training.cyclegan import PAPER, PRESETS, RELEASED, CycleGan, Perceptual, Preset
from medsr_cli.training.fathers import Family, enlarged, shrunk
from medsr_cli.training.interruption import Stopped, StopSwitch
from medsr_cli.training.state import read_record
from medsr_cli.training.stopping import Record, StoppingRule

__all__ = ["PAPER", "PRESETS", "RELEASED", "Preset", "Trained", "Watcher", "train_on_image"]

StopReason = Literal["rate", "iterations", "time"]
"""The learning rate fell below its minimum, the iterations ran out, or the time did."""

SMALLEST_SIDE = 16
SCALES = (2, 3, 4)
RECORDED_IMAGES = 4
"""Of several slices, so many evenly spread ones make the reconstruction error (ours; the release has one image)."""
SAVE_AFTER_SECONDS = 60.0
"""States, 300 MB each, are saved with a record of the error, but not more often than this."""
STATE_FORMAT = "medsr self-supervised training 1"

Floats = NDArray[np.float32]


class Watcher(Protocol):
    """Is told how the training goes, after every iteration."""

    def __call__(self, iteration: int, limit: int, loss: float, error: float | None, eta_s: float | None, /) -> None:
        """So many of at most `limit` iterations are done.

        `error` is the last reconstruction error; `eta_s` the seconds to the limit or to the end of the time,
        an upper bound, since training usually stops before.
        """


@dataclass(frozen=True)
class Trained:
    """A generator and how it came to be."""

    network: Generator
    """In evaluation mode, on the device that it was trained on."""
    iterations: int
    stop_reason: StopReason
    seed: int
    preset: Preset
    history: tuple[Record, ...]
    """The reconstruction error every 60 iterations."""
    reductions: tuple[int, ...]
    """Iterations, from 0, after which the schedule reduced the learning rate."""
    seconds: float
    """Of training, over all of its parts."""
    error: float
    """The reconstruction error of the network as it is returned."""
    bicubic_error: float
    """The reconstruction error that bicubic alone has; a training that ends above it has not paid."""


def train_on_image(  # noqa: PLR0913 - the image, what to do with it, and four things to leave away
    images: Sequence[NDArray[np.floating]] | NDArray[np.floating],
    scale: int,
    preset: Preset = RELEASED,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    perceptual: Perceptual | None = None,
    max_seconds: float | None = None,
    state_path: Path | None = None,
    progress: Watcher | None = None,
    keep_going: Callable[[], bool] | None = None,
) -> Trained:
    """Train the CycleGAN on an image, or on slices of one file, and return its generator.

    Args:
        images: one (3, rows, columns), several of them, or (slices, 3, rows, columns); floats in [0, 1].
        scale: 2, 3 or 4. The authors have 4; the others are the same procedure with that factor.
        preset: `RELEASED` or `PAPER`.
        seed: of everything random, 0 or more.
        device: of the computation.
        perceptual: Φ of the loss, on the same device; None leaves the term out.
        max_seconds: end after so much time, counted over all parts of an interrupted training.
        state_path: where the state is kept. If it exists, training goes on from it; it is left there at the end,
            small then, so that whoever calls can take the network from it again. None keeps nothing.
        progress: is told how it goes.
        keep_going: asked before every iteration; False is a stop like Ctrl-C.

    Raises:
        InputRefused: a side is below 16 pixels, a value is not finite, or there is no image.
        ArgumentsError: a scale or a seed that cannot be, or the state belongs to another training.
        WeightsError: the state is damaged.
        RunError: the loss is not a number, or the state could not be saved.
        KeyboardInterrupt: SIGINT or SIGTERM came, or `keep_going` said no; the state was saved before.
    """
    if scale not in SCALES or seed < 0:
        msg = f"Training for scale {scale} with seed {seed} cannot be."
        raise ArgumentsError(msg, "Scales are 2, 3 and 4, seeds 0 or more.")
    checked = checked_images(images)
    run = _Run(checked, scale, preset, seed, device, perceptual)
    if state_path is not None and state_path.exists():
        run.load(state_path)
    reason = run.finished or run.until_stopped(max_seconds, state_path, progress, keep_going or _always)
    return run.result(reason)


def again_enlarged(image: Floats, scale: int) -> Floats:
    """The image shrunk by the scale and enlarged again by bicubic, which is what the network gets to improve on."""
    small = np.clip(shrunk(image, scale), 0, 1)
    return enlarged(small, scale, image.shape[1:])


def checked_images(images: Sequence[NDArray[np.floating]] | NDArray[np.floating]) -> list[Floats]:
    """As float32, each contiguous.

    Raises:
        InputRefused: a side is below 16 pixels, a value is not finite, or there is no image.
        ValueError: an image is not (3, rows, columns).
    """
    several = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else list(images)
    if not several:
        msg = "There is no image to learn from."
        raise InputRefused(msg, "Give an image with some contrast.")
    for image in several:
        if image.ndim != 3 or image.shape[0] != 3:
            msg = f"An image of shape {image.shape} is not (3, rows, columns)."
            raise ValueError(msg)
        _, rows, columns = image.shape
        if min(rows, columns) < SMALLEST_SIDE:
            msg = f"An image of {columns}x{rows} pixels is too small to learn from."
            raise InputRefused(msg, f"Both sides need at least {SMALLEST_SIDE} pixels; use another method.")
        if not np.isfinite(image).all():
            msg = "The image has values that are not numbers."
            raise InputRefused(msg, "Replace them before.")
    return [np.ascontiguousarray(image, dtype=np.float32) for image in several]


def _always() -> bool:
    return True


class _Run:
    """One training: what it is made of, and how far it got."""

    def __init__(
        self,
        images: list[Floats],
        scale: int,
        preset: Preset,
        seed: int,
        device: torch.device | str,
        perceptual: Perceptual | None,
    ) -> None:
        self.preset, self.seed, self.scale = preset, seed, scale
        self.identity = _identity(images, scale, preset, seed, perceptual is not None)
        self.family = Family(images, scale, preset.noise_deviation)
        self.recorded = images[:: -(-len(images) // RECORDED_IMAGES)]
        self.rng = np.random.default_rng(seed)
        self.gan = CycleGan(scale, preset, seed, device, perceptual)
        self.rule = StoppingRule(preset.rate, preset.minimum_rate)
        self.done = 0
        self.seconds = 0.0
        self.finished: StopReason | None = None

    def until_stopped(
        self,
        max_seconds: float | None,
        state_path: Path | None,
        progress: Watcher | None,
        keep_going: Callable[[], bool],
    ) -> StopReason:
        """Iterate until there is a reason to stop; the state is saved then."""
        clock = _Clock(self.seconds, self.done, math.inf if max_seconds is None else max_seconds)
        with StopSwitch() as switch:
            reason: StopReason | None = None
            # A stop inside a record leaves nothing half-done: the record is made anew on resuming.
            with contextlib.suppress(Stopped):
                reason = self._iterate(clock, switch, state_path, progress, keep_going)
            self.seconds = clock.seconds
            self.finished = reason if reason != "time" else None  # with more time it can go on
            if state_path is not None:
                self.save(state_path)
            if reason is None or switch.pressed:
                raise Stopped
        return reason

    def _iterate(
        self,
        clock: _Clock,
        switch: StopSwitch,
        state_path: Path | None,
        progress: Watcher | None,
        keep_going: Callable[[], bool],
    ) -> StopReason | None:
        saved_at = time.monotonic()
        while True:
            recorded = self._after_iteration(switch)
            reason = self._reason_to_stop(clock)
            if reason or switch.pressed or not keep_going():
                return reason
            if recorded and state_path is not None and time.monotonic() - saved_at >= SAVE_AFTER_SECONDS:
                self.seconds = clock.seconds
                self.save(state_path)
                saved_at = time.monotonic()
            loss = self._step()
            self.done += 1
            if progress is not None:
                error = self.rule.records[-1].error if self.rule.records else None
                progress(self.done, self.preset.iterations, loss, error, clock.left(self.done, self.preset.iterations))

    def _after_iteration(self, switch: StopSwitch) -> bool:
        """Record the error and reduce the rate, if the last iteration is one for that; doing it twice is harmless."""
        if self.done == 0:
            return False
        last = self.done - 1
        recorded = self.rule.record_is_due(last)
        if recorded:
            with switch.at_once():
                error = self._reconstruction_error()
            self.rule.record(last, error)
        if self.rule.check(last) and self.preset.follow_rate:
            self.gan.set_rate(self.rule.rate)
        return recorded

    def _reason_to_stop(self, clock: _Clock) -> StopReason | None:
        if self.rule.finished:
            return "rate"
        if self.done >= self.preset.iterations:
            return "iterations"
        # A network that has learnt nothing is of no use, however little time there was.
        return "time" if self.done and clock.is_over else None

    def _step(self) -> float:
        father = self.family.father(self.rng)
        son = self.family.son(father, self.rng)
        noise = self.rng.standard_normal((1, 1, self.gan.hr_to_lr.config.noise_dim), dtype=np.float32)
        loss = self.gan.iterate(_batch(father), _batch(son), torch.from_numpy(noise), self.rng)
        if not math.isfinite(loss):
            msg = f"The training loss is not a number at iteration {self.done + 1}."
            raise RunError(msg, "Try another seed, or the other preset.")
        return loss

    def _reconstruction_error(self) -> float:
        """The mean squared error of enlarging the shrunk image itself, which is what the network is for."""
        errors = []
        for image in self.recorded:
            low = _batch(again_enlarged(image, self.scale)).to(self.gan.device)
            with torch.no_grad():
                result = self.gan.generator(low)[0]
            errors.append(float(((result - torch.from_numpy(image).to(result.device)) ** 2).mean()))
        return sum(errors) / len(errors)

    def result(self, reason: StopReason) -> Trained:
        return Trained(
            network=self.gan.generator.eval(),
            iterations=self.done,
            stop_reason=reason,
            seed=self.seed,
            preset=self.preset,
            history=tuple(self.rule.records),
            reductions=tuple(self.rule.reductions),
            seconds=self.seconds,
            error=self._reconstruction_error(),
            bicubic_error=float(
                np.mean([np.mean((again_enlarged(image, self.scale) - image) ** 2) for image in self.recorded])
            ),
        )

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, or the generator alone if there is nothing to go on with."""
        record: dict[str, Any] = {
            "format": STATE_FORMAT,
            "identity": self.identity,
            "finished": self.finished or "",
            "done": self.done,
            "seconds": self.seconds,
            "records": [(r.iteration, r.error) for r in self.rule.records],
            "reductions": self.rule.reductions,
        }
        if self.finished:
            record["generator"] = self.gan.generator.state_dict()
        else:
            record["gan"] = self.gan.state()
            record["rng"] = json.dumps(self.rng.bit_generator.state)
        buffer = io.BytesIO()
        torch.save(record, buffer)
        with atomic_file(path, overwrite=True) as file:
            file.write(buffer.getbuffer())

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            ArgumentsError: it is the state of another training.
            WeightsError: it is damaged.
        """
        try:
            record = read_record(path)
        except WeightsError as error:
            raise _damaged(path) from error
        if record.get("format") != STATE_FORMAT:
            raise _damaged(path)
        _refuse_other(path, record.get("identity"), self.identity)
        try:
            finished, self.done, self.seconds = record["finished"], int(record["done"]), float(record["seconds"])
            self.finished = cast(StopReason, finished) if finished else None
            self.rule.records = [Record(int(iteration), float(error)) for iteration, error in record["records"]]
            self.rule.reductions = [int(iteration) for iteration in record["reductions"]]
            if self.finished:
                self.gan.generator.load_state_dict(record["generator"])
            else:
                self.gan.load_state(record["gan"])
                self.rng.bit_generator.state = json.loads(record["rng"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(path) from error


class _Clock:
    """Seconds since the first start of a training, however often it was interrupted."""

    def __init__(self, before: float, done: int, allowed: float) -> None:
        self.started = time.monotonic()
        self.before, self.done, self.allowed = before, done, allowed

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def is_over(self) -> bool:
        return self.seconds >= self.allowed

    def left(self, done: int, limit: int) -> float | None:
        """Seconds to the limit at the speed so far, at most to the end of the time."""
        since = done - self.done
        if since < 1:
            return None
        pace = (time.monotonic() - self.started) / since
        return max(min(pace * (limit - done), self.allowed - self.seconds), 0.0)


def _batch(image: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image))[None]


def _identity(images: list[Floats], scale: int, preset: Preset, seed: int, perceptual: bool) -> dict[str, Any]:
    """What makes a training the same one; anything else must not go on from its state."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    return {
        "image": digest.hexdigest(),
        "scale": scale,
        "preset": asdict(preset),
        "seed": seed,
        "perceptual term": perceptual,
    }


def _refuse_other(path: Path, saved: object, wanted: dict[str, Any]) -> None:
    if not isinstance(saved, dict):
        raise _damaged(path)
    for name, value in wanted.items():
        if saved.get(name) != value:
            msg = f"The training kept in {mention(path.name)} was begun with another {name}."
            raise ArgumentsError(msg, f"Go on with the same {name}, or remove that file to start anew.")


def _damaged(path: Path) -> WeightsError:
    msg = f"{mention(path.name)} is not a whole state of a training on an image."
    return WeightsError(msg, "Remove it to start anew.")
