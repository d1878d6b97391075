"""What decides the pixels of a result beside its source and its checkpoint, as one digest.

Derived objects with stable UIDs carry it: the same digest means the same pixels, another one another object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsr_cli.provenance.record import sha256_of
from medsr_cli.tasks.model import Model
from medsr_cli.tasks.request import UpscaleRequest, learns_from_the_image
from medsr_cli.volume.volume import Volume

if TYPE_CHECKING:
    from hashlib import _Hash

Pixels = NDArray[Any]


def noted(slices: Iterable[Pixels], digest: _Hash) -> Iterator[Pixels]:
    """The same slices; their values go into a digest on the way."""
    for pixels in slices:
        digest.update(f"{pixels.dtype.str} {pixels.shape} ".encode())
        digest.update(np.ascontiguousarray(pixels).data)
        yield pixels


def settings_digest(
    request: UpscaleRequest, model: Model, facts: dict[str, Any], volume: Volume, contents: tuple[str, ...] = ()
) -> str:
    """Digest of one run's settings, as they turned out: not `auto`, but what it came to.

    Args:
        facts: of the run: the region that was found.
        volume: what is enlarged, on which the tiles depend.
        contents: digests of the values of all images that went through side by side, in order: an image may have been
            changed under its SOPInstanceUID, by a repair or by another program.
    """
    asked, engine = request.model, model.engine
    decided: dict[str, Any] = {
        "engine": engine.name,
        "device": engine.device.partition(":")[0],
        "precision": engine.precision,
        "tile": asked.tile,
        "tiles": _side_of_tiles(engine, volume.rows, volume.columns),
        "fit": asked.fit,
        "ensemble": asked.ensemble,
        "back_projection": asked.back_projection,
        "region": facts.get("region"),
        "contents": contents,
        "training": asdict(request.training) if learns_from_the_image(asked) else None,
        "trained": _how_it_was_trained(model),
    }
    if request.guide is not None:
        guide = request.guide
        decided["guide"] = [sha256_of(guide.path), guide.series, guide.register]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def _side_of_tiles(engine: Any, rows: int, columns: int) -> int | None:
    """Most pixels along a side of what is run at once, where memory decides it: tiles may change a value by a unit."""
    from medsr_cli.engines.network_engine import EnlargedFirst, NetworkEngine

    while hasattr(engine, "inner"):
        engine = engine.inner
    if not isinstance(engine, NetworkEngine):
        return None
    size = engine.size_of(rows, columns) if isinstance(engine, EnlargedFirst) else (rows, columns)
    return min(engine.planned(*size).side, max(size))


def _how_it_was_trained(model: Model) -> list[Any] | None:
    """What a training on the image itself came to: one that the clock has stopped comes to something else each time."""
    facts = model.facts.get("trained_on_the_image")
    return [facts[key] for key in ("iterations", "stopped_by", "reconstruction_error")] if facts else None


def remarks_of(request: UpscaleRequest, channels: int) -> tuple[str, ...]:
    """What a run does beside running a network once, for headers: a sentence each, naming no file."""
    asked = request.model
    known = (
        (asked.ensemble, "Mean of eight orientations."),
        (asked.fit, "By a larger scale where there is no checkpoint for this one, shrunken to size."),
        (asked.back_projection, f"Corrected {asked.back_projection} times by its own difference from the source."),
        (request.guide, "Guided by a second image."),
        (channels > 1, f"Made of {channels} registered images together."),
        (learns_from_the_image(asked), "Trained on the image itself."),
    )
    return tuple(sentence for applies, sentence in known if applies)
