"""Where the lesion is: MS-GAN's detector on every slice, one region for the whole volume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from medsr_cli.errors import ArgumentsError, InputRefused, WeightsError, mention
from medsr_cli.formats.contract import Reader
from medsr_cli.formats.region import Region, centred
from medsr_cli.networks.catalogue import MSGAN_DETECTOR
from medsr_cli.tasks.magnification import Factors
from medsr_cli.tasks.model import ModelRequest
from medsr_cli.volume.intensity import IntensityRange

SIDE_OF_RESULT = 120
"""Pixels of an upscaled region along each axis unless asked for otherwise (BraTS, dissertation section 3.4)."""


def find_region(
    reader: Reader,
    intensity: IntensityRange,
    text: str,
    scale: Factors,
    request: ModelRequest,
    detector: str | None,
    facts: dict[str, Any],
) -> Region:
    """The region of interest of an image, whole pixels.

    The detector gives a centre for every slice; the region of the volume lies around their median, so that one
    slice without a lesion does not move it.

    Args:
        reader: the image.
        intensity: its range.
        text: `auto`, or `auto:WxH` with the size of the region in pixels of the input.
        scale: enlargement along rows and columns; the region's usual size is that of its result.
        request: device and threads.
        detector: checkpoint id or file; None takes the manifest's.
        facts: is told the centres' median and spread.

    Raises:
        ArgumentsError: a size that cannot be.
        WeightsError: there is no detector on this machine.
    """
    height, width = region_size(text, scale)
    centres = _centres(reader, intensity, request, _checkpoint(detector, request))
    x, y = (float(value) for value in np.median(centres, axis=0))
    facts["lesion_detector"] = {
        "centre": [round(x, 4), round(y, 4)],
        "spread": [round(float(v), 4) for v in centres.std(axis=0)],
        "slices": len(centres),
    }
    return centred(x, y, height, width, reader.volume)


def region_size(text: str, scale: Factors) -> tuple[int, int]:
    """Rows and columns of the region in pixels of the input.

    Raises:
        ArgumentsError: neither `auto` nor `auto:WxH`.
    """
    if text == "auto":
        return max(round(SIDE_OF_RESULT / scale[0]), 1), max(round(SIDE_OF_RESULT / scale[1]), 1)
    found = re.fullmatch(r"auto:([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        msg = f"--roi {text} is no region."
        raise ArgumentsError(msg, "Give x,y,w,h in pixels of the input, auto, or auto:WxH.")
    return int(found[2]), int(found[1])


def _checkpoint(detector: str | None, request: ModelRequest) -> Path:
    from medsr_cli.tasks.weights import open_shelf

    if detector is not None and (Path(detector).exists() or Path(detector).suffix):
        if not Path(detector).is_file():
            msg = f"There is no checkpoint {detector}."
            raise WeightsError(msg, "Check the path given with --detector.")
        return Path(detector)
    shelf = open_shelf()
    entry = shelf.first_present(MSGAN_DETECTOR.id) if detector is None else shelf.manifest.entry(detector)
    if entry is not None and shelf.store.present(entry):
        return shelf.store.verified_path(entry, request.allow_unpinned)
    msg = "There is no lesion detector on this machine."
    raise WeightsError(msg, "Name a checkpoint of one with --detector, or the region itself with --roi x,y,w,h.")


def _centres(reader: Reader, intensity: IntensityRange, request: ModelRequest, path: Path) -> np.ndarray:
    """The detector's centre (x, y), normalised to [0, 1], for every slice with something in it."""
    import torch

    from medsr_cli.engines.devices import find_device
    from medsr_cli.networks import load_network

    device = find_device(request.device)
    network = load_network(path)
    if type(network).__name__ != MSGAN_DETECTOR.network:
        msg = f"{mention(path.name)} is no lesion detector."
        raise WeightsError(msg, f"Use a checkpoint of {MSGAN_DETECTOR.id}.")
    network = network.to(device)
    volume = reader.volume
    found: list[np.ndarray] = []
    for pixels in reader.slices():
        grey = pixels[: len(pixels) - volume.alpha]
        if grey.min() == grey.max():
            continue
        unit = np.nan_to_num(intensity.normalise(grey)).mean(axis=0, keepdims=True)
        with torch.inference_mode():
            given = torch.from_numpy(unit[None].astype(np.float32)).to(device)
            found.append(network(given)[0].float().cpu().numpy())
    if not found:
        msg = f"{mention(reader.path.name)} is constant: there is no lesion to find in it."
        raise InputRefused(msg, "Use another image.")
    centres: np.ndarray = np.clip(np.stack(found), 0, 1)
    return centres
