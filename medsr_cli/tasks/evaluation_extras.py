"""What an evaluation measures with networks of their own: overlap of segmentations, distance of Inception features.

Both look at the results as they come and give their figures slice by slice or, for FID, subject by subject.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medsr_cli import formats
from medsr_cli.errors import InputRefused, WeightsError, mention
from medsr_cli.evaluation.results import Results, Row
from medsr_cli.formats.contract import Reader, ReadOptions
from medsr_cli.tasks.evaluation_inputs import Opened
from medsr_cli.tasks.evaluation_pairs import Pair, Pairs

if TYPE_CHECKING:
    from medsr_cli.networks.inception import Inception
    from medsr_cli.networks.seg_unet import SegUnet
    from medsr_cli.tasks.model import ModelRequest

Unit = NDArray[np.float64]

MOST = 0.5
"""Share of a pixel that a label has to cover."""
MOST_LABELS = 15
"""A mask with larger numbers is a picture, black and another value."""


class Extra(Protocol):
    """A measure beside those of the protocol."""

    metrics: tuple[str, ...]
    """What it gives for each slice."""

    def begin(self, opened: Opened, mask: Path | None) -> None:
        """Another image follows."""
        ...

    def measure(self, pairs: Pairs, pair: Pair, label: str, result: Unit) -> dict[str, float]:
        """Look at one slice (channels, rows, columns) of one model."""
        ...

    def end(self, *, kept: bool) -> None:
        """The image is done; `kept` is false where it failed and nothing of it counts."""
        ...

    def finish(self, results: Results) -> None:
        """All images are done."""
        ...

    def facts(self) -> dict[str, Any]:
        """For the report."""
        ...


class SegmentationOverlap:
    """Dice of a segmentation network's labels on a result: against the mask beside the image, else against its
    labels on the image itself.

    Slices in whose reference no label occurs are left out: there the overlap says nothing about the model.
    """

    def __init__(self, net: SegUnet, axis: str) -> None:
        self.net, self.axis = net, axis
        labels = range(1, net.config.classes)
        self.metrics: tuple[str, ...] = ("dice", *(f"dice_{label}" for label in labels if net.config.classes > 2))
        self._masks: _Masks | None = None
        self._known: tuple[tuple[int, float], NDArray[Any]] | None = None
        self.against: dict[str, int] = {}
        """`mask` or `segmentation of the image` to how many images it was so."""

    def begin(self, opened: Opened, mask: Path | None) -> None:
        """Open the mask, if there is one."""
        self._masks, self._known = (_Masks(mask, opened, self.axis) if mask else None), None
        what = "mask" if mask else "segmentation of the image"
        self.against[what] = self.against.get(what, 0) + 1

    def measure(self, pairs: Pairs, pair: Pair, label: str, result: Unit) -> dict[str, float]:
        """`dice` of all labels together (Dice-T), and of each."""
        from medsr_cli.evaluation.segmentation import segment, segmentation_score

        key = pair.number, pairs.scale
        if self._known is None or self._known[0] != key:
            wanted = self._mask(pairs, pair) if self._masks else segment(self.net, _inner(pairs, pair.target)[None])[0]
            self._known = key, wanted
        wanted = self._known[1]
        score = segmentation_score(segment(self.net, _inner(pairs, result)[None])[0], wanted, self.net.config.classes)
        found = {"dice": score.total if score.present else math.nan}
        for name in self.metrics[1:]:
            own = int(name.removeprefix("dice_"))
            found[name] = score.per_label[own] if own in score.present else math.nan
        return found

    def _mask(self, pairs: Pairs, pair: Pair) -> NDArray[Any]:
        assert self._masks is not None  # noqa: S101 - the caller has looked
        mask = self._masks.at(pair.number)
        # Each label goes the way of the image, onto the grid of the target; a pixel is its where most of it is.
        wanted = np.zeros(pair.target.shape[-2:], np.int64)
        for label in np.unique(mask[mask > 0]):
            wanted[pairs.on_target((mask == label)[None].astype(np.float64))[0] > MOST] = label
        return _inner(pairs, wanted)

    def end(self, *, kept: bool) -> None:
        """Nothing is kept over an image."""

    def finish(self, results: Results) -> None:
        """Everything is in the rows."""

    def facts(self) -> dict[str, Any]:
        """What the labels were held against, and in how many images."""
        return {"classes": self.net.config.classes, "against": dict(self.against)}


class _Masks:
    """Label numbers slice by slice; slices are asked for in ascending order, several times over."""

    def __init__(self, path: Path, opened: Opened, axis: str) -> None:
        volume = opened.reader.volume
        name = path.name
        placed = volume.array_shape and len(volume.array_shape) > 2
        self.reader: Reader = formats.open_image(path, ReadOptions(str(volume.slice_axis) if placed else axis))
        mask = self.reader.volume
        if (mask.rows, mask.columns, mask.slices) != (volume.rows, volume.columns, volume.slices):
            msg = (
                f"The mask {mention(name)} has {mask.slices} slices of {mask.rows} x {mask.columns}, the image "
                f"{volume.slices} of {volume.rows} x {volume.columns}."
            )
            raise InputRefused(msg, "Resample the mask to the image, or leave it out with --exclude.")
        self._slices: Iterator[Any] = iter(())
        self._next = math.inf
        self._last: tuple[int, NDArray[Any]] | None = None

    def at(self, number: int) -> NDArray[Any]:
        """(rows, columns) of labels; a mask of 0 and one other value is one label."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        if number < self._next:
            self._slices, self._next = self.reader.slices(), 0
        while self._next <= number:
            pixels = next(self._slices)
            self._next += 1
        labels: NDArray[Any] = np.rint(pixels[0]).astype(np.int64)
        if labels.max() > MOST_LABELS:
            labels = (labels > 0).astype(np.int64)
        self._last = number, labels
        return labels


class InceptionDistance:
    """FID of each subject: Inception features of its results against those of its images, border removed."""

    metrics: tuple[str, ...] = ()

    def __init__(self, network: Inception) -> None:
        self.network = network
        self._subject = ""
        self._found: dict[tuple[str, float, str], list[NDArray[Any]]] = {}
        """(Subject, scale, model) to features of its slices."""
        self._pending: list[tuple[tuple[str, float, str], NDArray[Any]]] = []
        self._seen: set[tuple[int, float]] = set()

    def begin(self, opened: Opened, mask: Path | None) -> None:
        """Slices of this subject follow."""
        self._subject, self._pending, self._seen = opened.subject, [], set()

    def measure(self, pairs: Pairs, pair: Pair, label: str, result: Unit) -> dict[str, float]:
        """Features are kept, single precision; there are no figures of a slice."""
        scale = pairs.scale
        if (pair.number, scale) not in self._seen:
            self._seen.add((pair.number, scale))
            self._pending.append(((self._subject, scale, ""), self._features(_inner(pairs, pair.target))))
        self._pending.append(((self._subject, scale, label), self._features(_inner(pairs, result))))
        return {}

    def _features(self, image: Unit) -> NDArray[Any]:
        from medsr_cli.evaluation.fid import features

        found: NDArray[Any] = features(self.network, [image]).astype(np.float32)
        return found

    def end(self, *, kept: bool) -> None:
        """Take the image's features, or forget them."""
        for key, found in self._pending if kept else ():
            self._found.setdefault(key, []).append(found)
        self._pending = []

    def finish(self, results: Results) -> None:
        """FID for each subject with at least two slices."""
        from medsr_cli.evaluation.fid import LEAST_IMAGES, fid

        for (subject, scale, label), found in self._found.items():
            made = np.concatenate(found).astype(np.float64)
            real = np.concatenate(self._found[subject, scale, ""]).astype(np.float64)
            if label and min(len(made), len(real)) >= LEAST_IMAGES:
                results.of_subjects.append(Row(subject, "", 0, {"fid": fid(made, real)}, label, scale))

    def facts(self) -> dict[str, Any]:
        """None beside its figures."""
        return {}


def _inner(pairs: Pairs, image: NDArray[Any]) -> NDArray[Any]:
    """Without the protocol's border."""
    return pairs.protocol.inner(image, pairs.scale)


def segmentation_network(name: str, request: ModelRequest) -> SegUnet:
    """The network of a checkpoint, an id or a path.

    Raises:
        WeightsError: it is not here, or is a checkpoint of something else.
    """
    from medsr_cli.engines.devices import find_device
    from medsr_cli.networks import load_network
    from medsr_cli.networks.seg_unet import SegUnet
    from medsr_cli.tasks.weights import open_shelf

    path = Path(name)
    if not path.is_file():
        if path.suffix:
            msg = f"There is no checkpoint {mention(name)}."
            raise WeightsError(msg, "Check the path given with --segmentation.")
        shelf = open_shelf()
        path = shelf.store.verified_path(shelf.manifest.entry(name), request.allow_unpinned)
    net = load_network(path)
    if not isinstance(net, SegUnet):
        msg = f"{mention(name)} is no checkpoint of a segmentation network."
        raise WeightsError(msg, "Train one: medsr finetune DIR --task segmentation -o OUT.safetensors.")
    return net.to(find_device(request.device)).eval()


def inception_network(request: ModelRequest) -> Inception:
    """The network of FID.

    Raises:
        WeightsError: it is not on this machine; the sentence has the command that fetches it.
    """
    from medsr_cli.engines.devices import find_device
    from medsr_cli.evaluation.fid import WEIGHTS_ID, missing_weights
    from medsr_cli.networks import load_network
    from medsr_cli.networks.inception import Inception
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    entry = next((entry for entry in shelf.manifest.entries if entry.id == WEIGHTS_ID), None)
    if entry is None or not shelf.store.present(entry):
        raise missing_weights()
    net = load_network(shelf.store.verified_path(entry, request.allow_unpinned))
    if not isinstance(net, Inception):
        msg = f"{WEIGHTS_ID} is no checkpoint of Inception."
        raise WeightsError(msg, f"Fetch it again: medsr weights pull {WEIGHTS_ID}.")
    return net.to(find_device(request.device)).eval()
