"""How each paper measures: the low-resolution image, the intensities, the border, the metrics and the averages.

A protocol makes the pair that a method is judged by (`pair`), enlarges the low-resolution image by the paper's bicubic
(`enlarge`), and measures (`measure`). Images are (C, rows, columns), float32, in [0, 1] as `intensity` says. Sources
are the papers and the published facts of their test programs; what neither says was decided here and is marked [ours].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medsr_cli.evaluation import structure
from medsr_cli.evaluation.fsim import fsim
from medsr_cli.evaluation.gmsd import gmsd
from medsr_cli.evaluation.ifc import ifc
from medsr_cli.evaluation.metrics import psnr, ssim
from medsr_cli.volume.antialias import antialiased_resize
from medsr_cli.volume.band_limited import band_limited_resize, shifted
from medsr_cli.volume.fourier import fourier_shrink
from medsr_cli.volume.resample import blur_3x3, resize

Image = NDArray[np.floating]
Scale = float | tuple[float, float]
"""Enlargement of rows and columns alike, or of each."""
Size = tuple[int, int]
Pair = tuple[Image, Image]
Intensity = Literal["volume", "full-scale"]
"""`volume`: by the smallest and largest value of the whole volume, per channel; `full-scale`: 8-bit images by 255,
others as `volume`."""
Average = Literal["slice", "chunk"]
"""Over which pieces figures are averaged: each slice, or chunks of `chunk_slices` slices that are measured as one."""


@dataclass(frozen=True)
class Metric:
    """What a figure is."""

    name: str
    title: str
    unit: str
    """`dB`, `bits per pixel`, or nothing."""
    higher_is_better: bool
    function: Callable[[Image, Image, int], float]
    """Result and target, (C, rows, columns) or a chunk (S, C, rows, columns), and the border in pixels."""
    best: float = math.inf
    """Its value for equal images."""


def _by_channel(metric: Callable[[Image, Image, int], float], result: Image, target: Image, margin: int) -> float:
    """Mean over channels, and over slices if there are several, of a metric of (rows, columns)."""
    flat = [image.reshape(-1, *image.shape[-2:]) for image in (result, target)]
    return float(np.mean([metric(x, y, margin) for x, y in zip(*flat, strict=True)]))


def _by_image(metric: Callable[[Image, Image], float], result: Image, target: Image, margin: int) -> float:
    """A metric of grey and RGB images: of one as it is, of each of a chunk, of each channel where there are others."""
    del margin
    if result.ndim == 4:
        return float(np.mean([_by_image(metric, x, y, 0) for x, y in zip(result, target, strict=True)]))
    if len(result) in (1, 3):
        return metric(result, target)
    return float(np.mean([metric(x, y) for x, y in zip(result, target, strict=True)]))


METRICS: Mapping[str, Metric] = {
    item.name: item
    for item in (
        Metric("psnr", "PSNR", "dB", True, partial(_by_channel, psnr), 100.0),
        Metric("ssim", "SSIM (uniform 7x7)", "", True, partial(_by_channel, ssim), 1.0),
        Metric("psnr_rgb", "PSNR of all channels", "dB", True, lambda x, y, _: structure.cohft_psnr(x, y), 100.0),
        Metric("ssim_rgb", "SSIM (uniform 7x7), mean over channels", "", True,
               lambda x, y, _: _by_channel(ssim, x, y, 0), 1.0),
        Metric("psnr_y", "PSNR of the luma", "dB", True, structure.psnr_y, 100.0),
        Metric("ssim_y", "SSIM of the luma, offset as released", "", True, structure.ssim_y, 1.0),
        Metric("ssim_y_conventional", "SSIM of the luma", "", True, structure.ssim_y_conventional, 1.0),
        Metric("psnr_cohft", "PSNR", "dB", True, lambda x, y, _: structure.cohft_psnr(x, y), 100.0),
        Metric("ssim_cohft", "SSIM (Gaussian, zeros beyond the border)", "", True,
               lambda x, y, _: structure.cohft_ssim(x, y), 1.0),
        Metric("fsim", "FSIM", "", True, partial(_by_image, fsim), 1.0),
        Metric("gmsd", "GMSD", "", False, partial(_by_image, gmsd), 0.0),
        Metric("ifc", "IFC", "bits per pixel", True, partial(_by_image, ifc)),
    )
}  # fmt: skip
"""Every figure of a slice by name; FID is one of a subject and is in `fid`."""


@dataclass(frozen=True)
class Protocol:
    """One paper's way of measuring; the texts say it in words, the functions do it."""

    name: str
    title: str
    low: str
    """How the low-resolution image is made."""
    intensity: Intensity
    border: str
    averaging: str
    metrics: tuple[str, ...]
    """Names of `METRICS`, in the order in which they are reported."""
    degrade: Callable[[Image, Size], Image]
    """(..., rows, columns) and a size to the low-resolution image."""
    bicubic: Callable[[Image, Size], Image]
    """Back up to a size, as the paper's bicubic does."""
    whole_scales: bool = True
    margin: Callable[[float], int] = lambda _: 0
    """Pixels removed on every side for a scale; metrics say whether they heed it."""
    average: Average = "slice"
    chunk_slices: int = 1
    first_centres: bool = False
    """The low-resolution image's first pixel lies on the target's first one, not edge on edge: it goes to the network
    as it is, without the move that `upscale` makes for such checkpoints."""
    stack_range: bool = False
    """The low-resolution slices of a volume are scaled together to exactly [0, 1], the targets are not."""
    fid: bool = False
    """Whether the paper measures FID, for each subject on slices without their border."""
    colour: bool = False
    """Grey images are measured as three equal channels would be."""
    notes: tuple[str, ...] = ()

    def sizes(self, rows: int, columns: int, scale: Scale) -> tuple[Size, Size]:
        """Rows and columns of the low-resolution image and of the target for an image of that size.

        Raises:
            ValueError: a scale that the protocol does not have, or an image too small for it.
        """
        both = _both(scale)
        if min(both) <= 1 or (self.whole_scales and any(s != int(s) for s in both)):
            kind = "whole scales above 1" if self.whole_scales else "scales above 1"
            msg = f"The protocol {self.name} has {kind}, not {scale}."
            raise ValueError(msg)
        low = (int(rows // both[0]), int(columns // both[1]))
        if min(low) < 1:
            msg = f"An image of {rows} x {columns} pixels cannot be shrunken by {scale}."
            raise ValueError(msg)
        return low, (int(low[0] * both[0]), int(low[1] * both[1]))

    def pair(self, high: Image, scale: Scale) -> Pair:
        """The low-resolution image and the target of (C, rows, columns) in [0, 1], float32.

        Where `stack_range` is set, use `pairs`: one slice is a stack of one here.

        Raises:
            ValueError: as for `sizes`.
        """
        return self.pairs([high], scale)[0]

    def pairs(self, volume: Sequence[Image], scale: Scale) -> list[Pair]:
        """`pair` for all slices of a volume, which `stack_range` scales together.

        Raises:
            ValueError: as for `sizes`.
        """
        made = [self._made(high, scale) for high in volume]
        if not self.stack_range or not made:
            return made
        low, high = min(float(small.min()) for small, _ in made), max(float(small.max()) for small, _ in made)
        width = np.float32(high - low or 1.0)
        return [((small - np.float32(low)) / width, target) for small, target in made]

    def _made(self, high: Image, scale: Scale) -> Pair:
        rows, columns = high.shape[-2:]
        small, large = self.sizes(rows, columns, scale)
        values = high.astype(np.float32, copy=False)
        if self.whole_scales:
            target = values[..., : large[0], : large[1]]
            return self.degrade(target, small), target
        return self.degrade(values, small), resize(values, large)

    def enlarge(self, low: Image, size: Size) -> Image:
        """The paper's bicubic, what every method stands beside: (C, rows, columns) to `size`, not clipped."""
        if not self.first_centres:
            return self.bicubic(low, size)
        by = [(n / small - 1) / (2 * n / small) for n, small in zip(size, low.shape[-2:], strict=True)]
        return self.bicubic(shifted(low, -by[0], -by[1]), size)

    def border_pixels(self, scale: Scale) -> int:
        """Pixels removed on every side for this scale."""
        return self.margin(max(_both(scale)))

    def inner(self, image: Image, scale: Scale) -> Image:
        """An image without its border, as FID and a segmentation are given it."""
        margin = self.border_pixels(scale)
        rows, columns = image.shape[-2:]
        return image[..., margin : rows - margin, margin : columns - margin]

    def measure(self, result: Image, target: Image, scale: Scale, also: Sequence[str] = ()) -> dict[str, float]:
        """Every metric of the protocol, and of `also`, by name; NaN where the image is too small or too plain.

        Args:
            result: (C, rows, columns) in [0, 1]; with `average` "chunk" also (S, C, rows, columns). Not clipped here.
            target: of the same shape.
            scale: what the border is for.
            also: more names of `METRICS`.

        Raises:
            ValueError: shapes differ, or there is no such metric.
        """
        unknown = [name for name in also if name not in METRICS]
        if unknown or result.shape != target.shape:
            msg = f"There is no metric {unknown[0]}." if unknown else f"{result.shape} is not {target.shape}."
            raise ValueError(msg)
        margin = self.border_pixels(scale)
        if self.colour and result.shape[-3] == 1:
            result, target = (np.repeat(image, 3, axis=-3) for image in (result, target))
        names = dict.fromkeys((*self.metrics, *also))
        return {name: _measured(METRICS[name], result, target, margin) for name in names}

    def chunks(self, slices: int) -> list[slice]:
        """Which slices are measured together: one each, or chunks in order."""
        return structure.chunks(slices, self.chunk_slices)

    def worth_measuring(self, target: Image, scale: Scale) -> bool:
        """Whether a target is not constant and leaves a window of SSIM without its border."""
        inner = self.inner(target, scale)
        return min(inner.shape[-2:]) >= structure.WINDOW and bool(inner.min() < inner.max())


def _measured(metric: Metric, result: Image, target: Image, margin: int) -> float:
    try:
        return metric.function(result, target, margin)
    except ValueError:
        return math.nan


def _both(scale: Scale) -> tuple[float, float]:
    return (float(scale[0]), float(scale[1])) if isinstance(scale, tuple) else (float(scale), float(scale))


def _cubic(image: Image, size: Size) -> Image:
    return resize(image, size)


def _cubic_blur(image: Image, size: Size) -> Image:
    return blur_3x3(resize(image, size))


def _whole(scale: float) -> int:
    return math.ceil(scale)


RDST = Protocol(
    name="rdst",
    title="RDST (arXiv 2302.11184, section 4.3)",
    low="cubic of a = -0.75 at half-pixel centres, nothing smoothed before, no noise; the target is cut to a multiple",
    intensity="volume",
    border="ceil(scale) pixels on every side",
    averaging="mean and deviation over all slices of all subjects; FID per subject, then averaged",
    metrics=("psnr", "ssim"),
    degrade=_cubic,
    bicubic=_cubic,
    margin=_whole,
    fid=True,
    notes=("Channels are measured one by one and averaged; the paper has one table row for each.",),
)
MIASSR = Protocol(
    name="miassr",
    title="MIASSR (arXiv 2105.10738; dissertation, section 4.4)",
    low="cubic of a = -0.75 to (int(H / s), int(W / s)), then a 3x3 blur of (1/4, 1/2, 1/4); the target is the image "
    "resized by the same cubic to (int(H // s · s), int(W // s · s))",
    intensity="volume",
    border="ceil(scale) pixels on every side",
    averaging="mean over slices, then over the scales 1.5, 2, 2.5, 3, 3.5 and 4; FID per subject",
    metrics=("psnr", "ssim"),
    degrade=_cubic_blur,
    bicubic=_cubic,
    whole_scales=False,
    margin=_whole,
    fid=True,
)
M2TRANS = Protocol(
    name="m2trans",
    title="M2Trans (IEEE J-BHI 29(5), 2025, section IV)",
    low="bicubic of a = -0.5, widened by the factor; the target is cut to a multiple",
    intensity="full-scale",
    border="s pixels on every side for PSNR and SSIM, none for FSIM and GMSD",
    averaging="mean over images",
    metrics=("psnr_y", "ssim_y", "ssim_y_conventional", "fsim", "gmsd"),
    degrade=antialiased_resize,
    bicubic=antialiased_resize,
    margin=_whole,
    colour=True,
    notes=(
        "PSNR and SSIM are of the luma, FSIM and GMSD of RGB; the result is not rounded to 8 bits.",
        "ssim_y has the offset of 4080 of the released test and compares with the paper's tables, "
        "ssim_y_conventional with everybody else's.",
        "The paper's tables are rounded after adding half a unit of the last digit: up to 0.005 dB and 0.00005 high.",
    ),
)
COHFT = Protocol(
    name="cohft",
    title="Cohf-T (ACM Multimedia 2022, section 4), edges aligned [ours]",
    low="the centre of k-space of the slice continued by its mirror image, edges aligned; "
    "the target is cut to a multiple",
    intensity="volume",
    border="none",
    averaging="mean over slices [ours]",
    metrics=("psnr_cohft", "ssim_cohft"),
    degrade=band_limited_resize,
    bicubic=_cubic,
    notes=(
        "For checkpoints trained here. The authors' crop keeps the same band, but its pixels share first centres, so "
        "that every input has to be moved by (s - 1) / (2s) of a pixel against its guide first; it wraps around at the "
        "borders; and its magnitude and its own scaling lose the image's units. Edges align everywhere else in medsr, "
        "where an image upscaled is not made by that crop.",
        "Neither clamped nor cropped; the window of SSIM sees zeros beyond the border.",
    ),
)
COHFT_RELEASED = Protocol(
    name="cohft-released",
    title="Cohf-T as its released test measures",
    low="the centre of k-space by the discrete Fourier transform, its magnitude, all slices of a volume scaled "
    "together to [0, 1]; the target is cut to a multiple and keeps its own range",
    intensity="volume",
    border="none",
    averaging="mean over chunks of 20 slices, each measured as one, then over volumes",
    metrics=("psnr_cohft", "ssim_cohft"),
    degrade=fourier_shrink,
    bicubic=_cubic,
    average="chunk",
    chunk_slices=structure.COHFT_CHUNK_SLICES,
    first_centres=True,
    stack_range=True,
    notes=("For the authors' weights. Low and high resolution differ in intensity scale, as they do there.",),
)
USCYCLEGAN = Protocol(
    name="uscyclegan",
    title="Self-supervised CycleGAN for ultrasound (Neural Computing and Applications, 2021, section 4)",
    low="bicubic of a = -0.5, widened by the factor, of RGB; the target is cut to a multiple",
    intensity="full-scale",
    border="none for PSNR and SSIM of RGB and for IFC; s pixels on every side for the luma [ours]",
    averaging="mean over images",
    metrics=("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y_conventional", "ifc"),
    degrade=antialiased_resize,
    bicubic=antialiased_resize,
    margin=_whole,
    colour=True,
    notes=(
        "The paper states neither colour space nor border and published no program for its figures: RGB without a "
        "border and luma with one are both given [ours].",
        "IFC is the scalar one of its paper, with windows of ours; figures of other programs are not comparable.",
    ),
)
MSGAN = Protocol(
    name="msgan",
    title="MS-GAN (arXiv 1901.03419; dissertation, chapter 3)",
    low="cubic of a = -0.75 of the region of interest, nothing smoothed before [ours]; the region is cut to a multiple",
    intensity="volume",
    border="none",
    averaging="mean over regions",
    metrics=("psnr", "ssim"),
    degrade=_cubic,
    bicubic=_cubic,
    fid=True,
    notes=(
        "Measured on the region of interest: give it images cut to the lesion. Window and border are not stated in the "
        "paper [ours].",
        "The paper scales by the largest value of the data set; here by the volume's own range [ours]. FID is ours "
        "too: the paper has opinions of a reader.",
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {
    item.name: item for item in (RDST, MIASSR, M2TRANS, COHFT, COHFT_RELEASED, USCYCLEGAN, MSGAN)
}


def protocol_named(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: there is none; the sentence lists those there are.
    """
    if name not in PROTOCOLS:
        msg = f"There is no protocol {name!r}; there are {', '.join(PROTOCOLS)}."
        raise ValueError(msg)
    return PROTOCOLS[name]
