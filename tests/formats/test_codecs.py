"""The codecs' own test: all work here, and a codec that gives other values or nothing is found out."""

from __future__ import annotations

import numpy as np
import pytest

from medsr_cli.formats import codecs as tried
from medsr_cli.formats import dicom_pixels
from medsr_cli.formats.codecs import codecs


def test_every_codec_works_here():
    found = {codec.name: codec.fault for codec in codecs()}
    assert set(found) == {"gzip", "RLE", "JPEG 2000", "JPEG", "JPEG lossless", "JPEG-LS", "PNG"}
    assert not any(found.values()), found


@pytest.mark.parametrize("how", ["wrong", "missing"])
def test_a_broken_codec_is_named(monkeypatch, how):
    decode = dicom_pixels._decoded_by_simpleitk

    def broken(*arguments, **named):
        if how == "missing":
            msg = "No module named 'SimpleITK'"
            raise ImportError(msg)
        return decode(*arguments, **named)[::-1]

    monkeypatch.setattr(dicom_pixels, "_decoded_by_simpleitk", broken)
    faulty = {codec.name: codec.fault for codec in codecs() if codec.fault}
    assert set(faulty) == {"JPEG", "JPEG lossless", "JPEG-LS"}
    assert all(faulty.values())


def test_the_image_is_one_that_a_shift_of_bytes_would_show():
    assert len(np.unique(tried._image(16))) == tried.SIDE**2
