"""Which tags of a TIFF page stay true when its pixels are enlarged and stored anew."""

from __future__ import annotations

from PIL import TiffImagePlugin

_ABOUT_STORAGE = {
    *range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320,
    *range(322, 326), 330, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532,
}  # fmt: skip
"""Size, type, compression and where pixels lie: written anew."""

_POINTERS = {34665, 34853, 40965}
"""Offsets of EXIF, GPS and interoperability tables, which Pillow does not carry over from page to page."""


def kept_tags(tags: TiffImagePlugin.ImageFileDirectory_v2) -> TiffImagePlugin.ImageFileDirectory_v2:
    """A copy of a page's tags without those that describe how its pixels were stored."""
    kept = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in tags:
        if tag in _ABOUT_STORAGE or tag in _POINTERS:
            continue
        kept.tagtype[tag] = tags.tagtype[tag]
        kept[tag] = tags[tag]
    return kept
