"""Rigid registration of a guide to the image that it is to guide: six numbers, found by mutual information.

Mattes mutual information (IEEE TMI 22:120, 2003) compares images of different contrast; versor-free Euler angles
about the middle of the image are enough below 45 degrees. Samples come from a grid of about a million points over
the image's field, whatever the resolution of either image, so that the time is the same for all of them. Points are
drawn with a fixed seed and added up by one thread: two runs agree to the last bit.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from medsr_cli.errors import InputRefused, RunError
from medsr_cli.formats.placed_image import PlacedImage, View, itk_affine, smoothed
from medsr_cli.volume.geometry import Affine, spacings_mm

sitk: Any = SimpleITK  # without types

SEED = 20030108
FIELD_POINTS = 1_000_000
"""Points of the grid that samples are drawn from."""
SHRINK = (4, 2, 1)
"""Steps of that grid at each level."""
SHARES = (1.0, 0.4, 0.1)
"""Part of the points that is used at each level: about 16,000, 50,000 and 100,000."""
BINS = 50
ITERATIONS = 200
"""Most steps at each level."""
SMALLEST_STEP = 0.001
"""Part of a step of the grid at which a level ends."""
RELAXATION = 0.8
"""What a step is shortened by where the direction turns."""

FEWEST_SAMPLES = 8
"""Voxels that an image needs along each axis: a single slice does not say how it is tilted."""
POOR_COVERAGE = 0.5
"""Where the headers let less of the two images overlap than this, their centres of mass are tried as well."""
LEAST_INFORMATION = 0.05
"""Nats: what images that have nothing to do with each other stay below (so few samples alone make 0.01), and T1 and T2
of one head are far above, even before they are registered (0.3 to 0.9)."""
LARGEST_SHIFT_MM = 60.0
LARGEST_ANGLE_DEGREES = 45.0
BRIGHTEST = 0.995
"""Values above this quantile count as this bright: a few hot voxels must not use up the histogram."""

_REMEDY = "Check that both images show the same part of the same patient, or register them with a tool of your trust."


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads add up in an order of their own; the registration method's own setting does not reach them."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


@dataclass(frozen=True)
class Registration:
    """Where the guide really lies."""

    to_guide: Affine
    """Patient position in the image to the position of the same tissue in the guide, both in mm, RAS+."""
    facts: dict[str, Any]
    """For the report: six parameters, mutual information before and after, how it was begun."""


@_one_thread()
def register_rigid(image: PlacedImage, guide: PlacedImage, *, trust_headers: bool, guide_name: str) -> Registration:
    """Find the rigid motion that brings the guide's tissue to the image's.

    It begins where the headers put the guide. Where they put it far from the image, or count from different
    origins, it may begin with the centres of mass on each other instead, if that matches better.

    Args:
        image: what is to be guided, at its own resolution.
        guide: what is to be moved.
        trust_headers: whether both positions count from the same origin, as far as known.
        guide_name: of the file, for sentences.

    Raises:
        InputRefused: an image has too few slices to be registered.
        RunError: no plausible motion was found.
    """
    if min(*image.size, *guide.size) < FEWEST_SAMPLES:
        msg = f"{guide_name} cannot be registered: an image has fewer than {FEWEST_SAMPLES} slices, rows or columns."
        raise InputRefused(msg, "Leave --register away; the headers then place the guide.")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    search = _Search(_windowed(image), _windowed(guide))
    shift = _between_centres_of_mass(image, guide)
    before = search.information(np.zeros(6))
    begun, start, begun_at = "headers", np.zeros(6), before
    overlap = View(np.linalg.inv(guide.affine) @ image.affine, image.size, guide.size).coverage
    if overlap < POOR_COVERAGE or not trust_headers:
        moved = np.array([0.0, 0.0, 0.0, *shift])
        information = search.information(moved)
        if information > begun_at:
            begun, start, begun_at = "centres of mass", moved, information
    found, iterations = search.run(start, guide_name)
    after = search.information(found) if np.isfinite(found).all() else -math.inf
    if not after > begun_at and search.moved_mm(found, start) < search.step_mm:
        found, after = start, begun_at  # already as good as it gets
    elif not after > begun_at:
        raise _failed(guide_name, "no motion matches the images better than none")
    if after < LEAST_INFORMATION:
        raise _failed(guide_name, "the two images have hardly anything in common")
    _check_plausible(found, start, guide_name)
    to_guide = search.motion(found)
    facts = {
        "method": "rigid, Mattes mutual information",
        "maps": "a position in the image to the one in the guide, mm, RAS+",
        "begun_at": begun,
        "rotation_degrees": [round(math.degrees(v), 4) for v in found[:3]],
        "translation_mm": [round(float(v), 4) for v in found[3:]],
        "centre_mm": [round(float(v), 3) for v in search.centre],
        "matrix": [[float(v) for v in row] for row in to_guide],
        "moved_mm": round(search.moved_mm(found, np.zeros(6)), 3),
        "information_before": _rounded(before),
        "information_after": _rounded(after),
        "iterations": iterations,
    }
    return Registration(to_guide, facts)


class _Search:
    """The field that the image is compared over, the guide, and the measure."""

    def __init__(self, image: PlacedImage, guide: PlacedImage) -> None:
        self.field, self.guide = _field(image), guide
        self.centre = _centre_mm(image)
        """The middle of the image, which rotations are about, RAS+."""
        self.step_mm = float(np.cbrt(np.prod(self.field.GetSpacing())))

    def run(self, start: NDArray[np.float64], guide_name: str) -> tuple[NDArray[np.float64], int]:
        """The six parameters that match best, and how many steps it took."""
        found, iterations = start, 0
        for shrink, share in zip(SHRINK, SHARES, strict=True):
            method = self._method(found)
            method.SetMetricSamplingPercentage(share, SEED)
            method.SetShrinkFactorsPerLevel([shrink])
            method.SetSmoothingSigmasPerLevel([self.step_mm * shrink / 2 if shrink > 1 else 0.0])
            method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
            # A level begins with steps of a point of its own grid: longer ones would leave what was found before.
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=shrink * self.step_mm, minStep=SMALLEST_STEP * self.step_mm,
                numberOfIterations=ITERATIONS, relaxationFactor=RELAXATION, gradientMagnitudeTolerance=1e-8,
            )  # fmt: skip
            method.SetOptimizerScalesFromPhysicalShift()
            try:
                moved = method.Execute(self.field, self.guide.image)
            except RuntimeError as error:  # the only exception of SimpleITK: no overlap, or not a number
                raise _failed(guide_name, "the images hardly overlap") from error
            found = np.array(_euler(moved).GetParameters())
            iterations += method.GetOptimizerIteration()
        return found, iterations

    def information(self, parameters: NDArray[np.float64]) -> float:
        """Mutual information in nats, higher is better; minus infinity where the images do not overlap."""
        method = self._method(parameters)
        method.SetMetricSamplingPercentage(SHARES[-1], SEED)
        try:
            return -float(method.MetricEvaluate(self.field, self.guide.image))
        except RuntimeError:
            return -math.inf

    def motion(self, parameters: NDArray[np.float64]) -> Affine:
        """The 4 x 4 matrix of six parameters."""
        motion: Affine = _shifted(self.centre) @ _matrix(parameters) @ _shifted(-self.centre)
        return motion

    def moved_mm(self, parameters: NDArray[np.float64], others: NDArray[np.float64]) -> float:
        """How far apart two motions take the corners of the field, on average."""
        half = np.array(self.field.GetSize()) * self.field.GetSpacing() / 2
        corners = half * np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
        points = np.c_[corners, np.ones(len(corners))].T
        apart = (_matrix(parameters) - _matrix(others)) @ points
        return float(np.linalg.norm(apart[:3], axis=0).mean())

    def _method(self, parameters: NDArray[np.float64]) -> Any:
        """Everything but the optimiser."""
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(BINS)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetInterpolator(sitk.sitkLinear)
        # Gradient images would take 24 bytes a voxel; those of the sampled points are enough.
        method.MetricUseFixedImageGradientFilterOff()
        method.MetricUseMovingImageGradientFilterOff()
        # The motion acts in mm; from there to the guide's own axes the way is fixed. The image needs no such way (ITK
        # would lose it when it draws samples): it is brought to a field that SimpleITK can place.
        to_guide = self.guide.from_mm @ _shifted(self.centre)
        method.SetMovingInitialTransform(itk_affine(to_guide))
        method.SetInitialTransform(_transform(parameters), inPlace=False)
        return method


def _transform(parameters: NDArray[np.float64]) -> Any:
    """Three angles and a shift, about the origin."""
    transform = sitk.Euler3DTransform()
    transform.SetParameters([float(v) for v in parameters])
    return transform


def _matrix(parameters: NDArray[np.float64]) -> Affine:
    transform = _transform(parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = transform.GetTranslation()
    return matrix


def _shifted(by_mm: NDArray[np.float64]) -> Affine:
    matrix = np.eye(4)
    matrix[:3, 3] = by_mm
    return matrix


def _field(image: PlacedImage) -> Any:
    """The image on an even grid of `FIELD_POINTS` in mm about its own middle, along its own axes made perpendicular."""
    affine, steps = image.affine, np.array(spacings_mm(image.affine))
    lengths = steps * image.size
    step_mm = float(np.cbrt(np.prod(lengths) / FIELD_POINTS))
    left, _, right = np.linalg.svd(affine[:3, :3] / steps)
    directions = left @ right  # the nearest ones at right angles, mirrored if the header is
    counts = np.maximum(np.rint(lengths / step_mm), FEWEST_SAMPLES).astype(int)
    grid = np.eye(4)
    grid[:3, :3] = directions * (lengths / counts)
    grid[:3, 3] = -grid[:3, :3] @ (counts - 1) / 2
    to_image = np.linalg.inv(affine) @ _shifted(_centre_mm(image)) @ grid
    view = View(to_image, (int(counts[0]), int(counts[1]), int(counts[2])), image.size)
    calm = smoothed(image, view.smoothing_voxels(through_plane=True))
    field = sitk.GetImageFromArray(np.stack([view.sample(calm, at) for at in range(counts[2])]))
    field.SetSpacing((lengths / counts).tolist())
    field.SetOrigin(grid[:3, 3].tolist())
    field.SetDirection(directions.ravel().tolist())
    return field


def _centre_mm(image: PlacedImage) -> NDArray[np.float64]:
    centre: NDArray[np.float64] = (image.affine @ [*(np.array(image.size) - 1) / 2, 1.0])[:3]
    return centre


def _euler(moved: Any) -> Any:
    """The transform that was optimised, whatever it comes wrapped in."""
    while moved.GetTransformEnum() == sitk.sitkComposite:
        composite = sitk.CompositeTransform(moved)
        moved = composite.GetNthTransform(composite.GetNumberOfTransforms() - 1)
    return sitk.Euler3DTransform(moved)


def _windowed(placed: PlacedImage) -> PlacedImage:
    """The image with its few brightest values cut down."""
    values = placed.values
    every = max(int(np.cbrt(values.size / FIELD_POINTS)), 1)
    top = float(np.quantile(values[::every, ::every, ::every], BRIGHTEST)) or 1.0
    return PlacedImage(sitk.Clamp(placed.image, sitk.sitkFloat32, 0.0, top), placed.affine, placed.low, placed.high)


def _between_centres_of_mass(image: PlacedImage, guide: PlacedImage) -> NDArray[np.float64]:
    """From the image's centre of mass to the guide's, mm."""
    return _centre_of_mass_mm(guide) - _centre_of_mass_mm(image)


def _centre_of_mass_mm(placed: PlacedImage) -> NDArray[np.float64]:
    values = placed.values
    by_slice = values.sum(axis=(1, 2), dtype=np.float64)
    plane = values.sum(axis=0, dtype=np.float64)
    profiles = (plane.sum(axis=0), plane.sum(axis=1), by_slice)  # along columns, rows, slices
    index = [float(np.average(np.arange(len(p)), weights=p)) if p.sum() > 0 else (len(p) - 1) / 2 for p in profiles]
    position: NDArray[np.float64] = (placed.affine @ [*index, 1.0])[:3]
    return position


def _check_plausible(found: NDArray[np.float64], start: NDArray[np.float64], guide_name: str) -> None:
    """Refuse a motion that no patient makes between two series."""
    cosine = (np.trace(_matrix(found)[:3, :3]) - 1) / 2
    angle = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
    if angle > LARGEST_ANGLE_DEGREES or np.linalg.norm(found[3:] - start[3:]) > LARGEST_SHIFT_MM:
        raise _failed(guide_name, "the motion that was found is too large to be true")


def _failed(guide_name: str, why: str) -> RunError:
    return RunError(f"The registration of {guide_name} failed: {why}.", _REMEDY)


def _rounded(information: float) -> float | None:
    return round(information, 6) if math.isfinite(information) else None
