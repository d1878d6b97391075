"""The curve of a training as a picture: its loss, and its validations against the baseline."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE_INCHES = (8.0, 5.0)
DOTS_PER_INCH = 120
LOSS_COLOUR, GAIN_COLOUR, BASE_COLOUR = "#4a6fa5", "#1b7f5c", "#888888"


def curve_png(
    history: Sequence[Mapping[str, float]],
    losses: Sequence[tuple[int, float]] = (),
    *,
    unit: str = "dB",
    baseline: str = "bicubic",
    best_step: int | None = None,
) -> bytes:
    """A PNG of 960 x 600 pixels: the loss above, the gain over the baseline below, both over steps.

    It is drawn by matplotlib's Agg without a display and without any state of the program. Where the history has
    `stage`, the first validation of each later one is marked by a line at the end of the stage before.

    Args:
        history: `step` and `gain_db` of each validation, as in `TrainingState.history`.
        losses: step and the mean loss up to it since the one before.
        unit: of the gains.
        baseline: what they are over.
        best_step: the validation whose weights are kept; marked where it is one of the history.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_losses(above, losses)
    _draw_gains(below, history, best_step)
    below.set_ylabel(f"gain over {baseline} [{unit}]")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for axes in (above, below):
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        for step in _stage_ends(history):
            axes.axvline(step, color=BASE_COLOUR, linewidth=1, linestyle=":")
    buffer = io.BytesIO()
    # The program's version is no part of a picture; equal data give equal files.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _draw_losses(axes: Axes, losses: Sequence[tuple[int, float]]) -> None:
    axes.set_ylabel("loss")
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color=LOSS_COLOUR, linewidth=1.2, marker="." if len(losses) < 50 else "")
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")


def _draw_gains(axes: Axes, history: Sequence[Mapping[str, float]], best_step: int | None) -> None:
    axes.axhline(0, color=BASE_COLOUR, linewidth=1)
    steps = [entry["step"] for entry in history]
    gains = [entry["gain_db"] for entry in history]
    axes.plot(steps, gains, color=GAIN_COLOUR, linewidth=1.2, marker="o", markersize=3)
    if best_step in steps:
        gain = gains[steps.index(best_step)]
        axes.plot([best_step], [gain], color=GAIN_COLOUR, marker="o", markersize=8, fillstyle="none")
        axes.annotate(f"{gain:+.2f}", (best_step, gain), textcoords="offset points", xytext=(6, -12), fontsize=9)


def _stage_ends(history: Sequence[Mapping[str, float]]) -> list[float]:
    return [a["step"] for a, b in pairwise(history) if a.get("stage", 0) != b.get("stage", 0)]
