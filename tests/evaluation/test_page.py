"""The page as text: everything escaped, nothing asked for, sizes bounded, numbers as papers write them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from medsr_cli.evaluation.page import (
    Comparison,
    HeaderDifference,
    Histogram,
    Map,
    Measure,
    NamedImage,
    Page,
    Row,
    Table,
    page_html,
)
from medsr_cli.evaluation.page_svg import histogram_svg, tick_step
from medsr_cli.evaluation.page_text import escaped, fixed, number, p_value
from medsr_cli.volume.resample import resize

VOID = {"meta", "link", "img", "input"}
HOSTILE = "\"><script>alert(1)</script>'&<b onclick=x>\x00\x1b\u202e\udc80"


class Reader(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags with their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def images(n: int = 32, seed: int = 0) -> tuple[NamedImage, ...]:
    truth = np.random.default_rng(seed).random((n, n)) * 1000
    return NamedImage("bicubic", truth * 0.9), NamedImage("rdst", truth + 5, "33 dB"), NamedImage("truth", truth)


def full(text: str) -> Page:
    """A page with the text at every place that takes one."""
    named = tuple(NamedImage(f"{text}{i}", image.pixels, text) for i, image in enumerate(images()))
    comparison = Comparison(text, named, named[1].name, named[2].name, text)
    return Page(
        text,
        ((text, text),),
        (text,),
        (Table(text, (text, text), (Row((text, text), "worst"), Row((text, Measure(1.0)), "baseline")), text),),
        (comparison,),
        (Map(text, np.ones((4, 4)), (0, 2), text, threshold=1, note=text),),
        (Histogram(text, np.arange(4.0), ((text, np.arange(3)),), text, text),),
        text,
        (HeaderDifference(text, text, text, True, text),),
        (text,),
        "en",
    )


def test_no_text_becomes_markup_anywhere():
    plain, hostile = Reader(page_html(full("plain"))), Reader(page_html(full(HOSTILE)))
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in hostile.tags]
    assert [sorted(a) for _, a in plain.tags] == [sorted(a) for _, a in hostile.tags]
    assert "<script>alert(1)</script>" in hostile.text
    for bad in "\x00\x1b\u202e\udc80":
        assert bad not in page_html(full(HOSTILE))
    page_html(full(HOSTILE)).encode("utf-8")


def test_nothing_is_asked_for():
    html = page_html(full("plain"))
    read = Reader(html)
    for tag, attributes in read.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert not re.search(r"url\((?!#bar)|@import|https?://", html)


def test_the_policy_names_exactly_this_style_and_script():
    html = page_html(full("plain"))
    (policy,) = (a["content"] for a in Reader(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_the_notice_is_there():
    assert Reader(page_html(Page("t"))).text.count("Research use; not a medical device.") == 2


def test_pictures_hold_the_slices_at_one_pixel_for_a_pixel():
    comparison = Comparison("c", images(), reference="truth", window=(0, 1000), error_range=100)
    shown = Reader(page_html(Page("t", comparisons=(comparison,)))).all("img")
    decoded = [Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))) for a in shown]
    assert [(p.width, p.height) for p in decoded] == [(32, 32)] * 5
    truth = images()[2].pixels
    np.testing.assert_array_equal(np.asarray(decoded[2]), np.rint(truth / 1000 * 255))
    # The second error map is +5 everywhere, of a range of 100: one colour, on the red side.
    red, _, blue = np.asarray(decoded[4].convert("RGB")).reshape(-1, 3).T.astype(int)
    assert len(set(red)) == 1
    assert red[0] > blue[0]
    assert all(a["alt"] for a in shown)


def test_window_and_range_are_said():
    text = Reader(page_html(Page("t", comparisons=(
        Comparison("c", images(), reference="truth", units="HU", window=(-160, 240), error_range=25),
    )))).text  # fmt: skip
    assert "Window −160 (black) to 240 HU (white)" in text
    assert "All maps run from −25 to +25 HU" in text
    assert "32 × 32 pixels" in text


def test_all_error_maps_share_a_range():
    near, far = images()[1], NamedImage("far", images()[2].pixels + 400)
    text = Reader(page_html(Page("t", comparisons=(Comparison("c", (near, far, images()[2]), "", "truth"),)))).text
    assert "All maps run from −400 to +400" in text


def test_without_a_reference_there_are_no_error_maps():
    html = page_html(Page("t", comparisons=(Comparison("c", images()),)))
    assert "Error maps" not in html
    assert len(Reader(html).all("img")) == 3


def test_numbers_in_tables():
    table = Table("t", ("m", "a", "b", "c"), (
        Row(("rdst", Measure(33.456, 1.2, (32.1, 34.9), 0.0002, best=True), Measure(None), Measure(float("inf")))),
        Row(("cubic", Measure(-0.001, digits=2), Measure(float("nan")), Measure(0.93216, p=0.0312, digits=4)), "worst"),
    ))  # fmt: skip
    text = Reader(page_html(Page("t", tables=(table,)))).text
    for wanted in ("33.46 best ± 1.20", "32.10 to 34.90, p < 0.001", "∞", "0.9322", "p = 0.031", "cubic worst"):
        assert wanted in text
    assert "−0.00" not in text
    assert 'aria-label="not measured"' in page_html(Page("t", tables=(table,)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (812.0, "812"), (-0.0123, "−0.0123"), (1e-9, "1.000e-09"), (123456.7, "123457"), (0.1 + 0.2, "0.3"),
     (float("nan"), "not a number"), (float("-inf"), "−∞"), (1000.0, "1000"), (99999999.0, "1.000e+08")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_small_texts():
    assert fixed(-1.5, 1) == "−1.5"
    assert p_value(float("nan")) == "p not defined"
    assert p_value(0.00049) == "p < 0.001"
    assert escaped("a" * 5000).endswith("…")
    assert escaped("نامه\u200cای") == "نامه\u200cای"


def test_header_differences():
    rows = (HeaderDifference("dim[1]", "60", "240", True), HeaderDifference("cal_max", "9", ""))
    text = Reader(page_html(Page("t", header_differences=rows))).text
    assert "expected" in text
    assert "unexpected" in text
    assert "not there" in text
    assert "No header field differs" in Reader(page_html(Page("t", header_differences=()))).text
    assert "Header" not in Reader(page_html(Page("t"))).text


@pytest.mark.parametrize(
    "page",
    [
        Page("t", tables=(Table("x", ("a", "b"), (Row(("1",)),)),)),
        Page("t", comparisons=(Comparison("x", images()[:1]),)),
        Page("t", comparisons=(Comparison("x", (*images(), NamedImage("small", np.ones((3, 3))))),)),
        Page("t", comparisons=(Comparison("x", (images()[0], images()[0])),)),
        Page("t", comparisons=(Comparison("x", images(), reference="nobody"),)),
        Page("t", comparisons=(Comparison("x", images(), right="nobody"),)),
        Page("t", histograms=(Histogram("x", np.arange(4.0), (("a", np.arange(9)),)),)),
    ],
)
def test_what_does_not_fit_is_refused(page):
    with pytest.raises(ValueError, match="x"):
        page_html(page)


def test_slices_without_contrast_or_without_numbers_are_shown():
    flat = (
        NamedImage("a", np.zeros((9, 9))),
        NamedImage("b", np.full((9, 9), np.nan)),
        NamedImage("c", np.ones((9, 9))),
    )
    page = Page("t", comparisons=(Comparison("x", flat, reference="a"), Comparison("y", flat[1:], reference="b")))
    assert len(Reader(page_html(page)).all("img")) == 3 + 2 + 2 + 1


def test_noise_that_does_not_compress_is_cut_to_the_size_that_was_asked_for():
    """The worst that can be: noise in every pixel of every picture."""
    comparisons = tuple(Comparison(str(i), images(256, i), reference="truth") for i in range(4))
    assert len(page_html(Page("t", comparisons=comparisons))) > 1_000_000
    small = page_html(Page("t", comparisons=comparisons), largest_bytes=400_000)
    assert 200_000 < len(small) < 400_000 + 150_000
    read = Reader(small)
    assert read.text.count("Only the middle is shown, rows ") == 4
    sides = {(a["width"], a["height"]) for a in read.all("img")}
    assert len(sides) == 1
    assert 64 <= int(sides.pop()[0]) < 256


def test_twelve_smooth_comparisons_stay_whole():
    """As results of upscaling are: the page of twelve slices of 512 x 512 within 8 MB, nothing cut."""
    rng = np.random.default_rng(0)
    shown = []
    for i in range(3):
        truth = resize(rng.random((60, 60)), (512, 512)) * 1000
        other = [NamedImage(name, truth + resize(rng.normal(0, 20, (120, 120)), (512, 512))) for name in "ab"]
        shown.append(Comparison(str(i), (*other, NamedImage("truth", truth)), reference="truth"))
    html = page_html(Page("t", comparisons=tuple(shown)), largest_bytes=8_000_000 * 3 // 12)
    assert len(html) < 8_000_000 * 3 // 12 + 150_000


def test_histograms_show_rare_values():
    edges = np.linspace(0, 4, 5)
    svg = histogram_svg(Histogram("h", edges, (("a", np.array([99_990, 9, 0, 1])),)))
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", svg)]
    assert heights[0] < heights[1] < heights[2]
    assert heights[3] == pytest.approx(heights[2])
    assert "100%" in svg
    assert histogram_svg(Histogram("h", edges, (("a", np.zeros(4, int)),)))


@pytest.mark.parametrize(
    ("width", "step"), [(1.0, 0.2), (387, 100), (6, 1), (0.03, 0.005), (1e-9, 2e-10), (7e5, 200000)]
)
def test_ticks_are_round(width, step):
    assert tick_step(width) == pytest.approx(step)
    assert width / tick_step(width) <= 6 * (1 + 1e-9)
