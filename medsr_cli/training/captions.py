"""Texts about images, for the image-text loss of M2Trans: of a file, or made from the paper's templates.

Source: Z. Ni et al., IEEE J. Biomed. Health Inform. 29(5), 2025, doi 10.1109/JBHI.2024.3454068, section on the
semantic loss, and the released caption file (UTF-16, one line per image).
"""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np

from medsr_cli.errors import InputRefused, mention, reason_of

TEMPLATES = (
    "a picture of a {attr} ultrasound image",
    "a {attr} image of an ultrasound",
    "a {attr} ultrasound image",
)
WORDS = ("nice", "sharp", "fine", "clear", "clean", "cool", "great")
LARGEST_FILE_BYTES = 1 << 26


def read_captions(path: Path) -> list[str]:
    """The lines of a caption file, in order; empty ones at its end are left out.

    UTF-16 with a byte order mark, or without one if every other byte of its beginning is 0; else UTF-8.

    Raises:
        InputRefused: it cannot be read, is too large, or is neither.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            msg = f"{mention(path.name)} is too large for a file of captions."
            raise InputRefused(msg)
        data = path.read_bytes()
        text = data.decode(_encoding(data))
    except OSError as error:
        msg = f"{mention(path.name)} cannot be read ({reason_of(error)})."
        raise InputRefused(msg) from error
    except UnicodeError as error:
        msg = f"{mention(path.name)} is neither UTF-8 nor UTF-16."
        raise InputRefused(msg, "Save the captions as UTF-8 text, one line for each image.") from error
    # Of the characters that end a line, an editor makes these alone.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _encoding(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = data[:64]
    if len(head) >= 2 and len(head) % 2 == 0:
        if not any(head[1::2]):
            return "utf-16-le"
        if not any(head[::2]):
            return "utf-16-be"
    return "utf-8-sig"


def made_caption(seed: int, image: int) -> str:
    """The caption of an image without one: a template with 1 to 7 different words, drawn from both numbers.

    Words are joined by commas [ours]: the paper does not say by what.
    """
    rng = np.random.default_rng((seed, image))
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    chosen = rng.permutation(len(WORDS))[: rng.integers(1, len(WORDS) + 1)]
    return template.format(attr=", ".join(WORDS[i] for i in chosen))
