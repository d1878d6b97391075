"""The page of results in a real browser: it runs, it moves, it asks for nothing, it fits narrow and wide screens.

Chromium is driven through two pipes (its DevTools protocol, JSON texts that end in a zero byte).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from medsr_cli.volume.resample import resize

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name != "posix", reason="needs Chromium and POSIX pipes")
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
PATIENCE_S = 60
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the browser, which takes its orders from file 3 and answers into file 4."""


class Browser:
    """One tab of a headless Chromium, and everything that it reports."""

    def __init__(self, profile: Path) -> None:
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        assert CHROMIUM
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(to_browser), str(from_browser), *command, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            block = os.read(self.read_end, 1 << 16)
            assert block, "the browser has ended"
            self.buffer += block
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path) -> None:
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()

    def value(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screen(self, width: int, height: int, *, ratio: float = 1, touch: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=touch
        )

    def key(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self, path: Path) -> None:
        metrics = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": metrics["width"], "height": metrics["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def addresses(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        kinds = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        return [json.dumps(event["params"])[:400] for event in self.events if event["method"] in kinds]

    def close(self) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def example() -> Page:
    rng = np.random.default_rng(3)
    truth = np.clip(resize(rng.random((20, 24)), (160, 192)), 0, 1) * 1000
    low = resize(truth, (40, 48))
    cubic = resize(low, (160, 192))
    better = 0.6 * truth + 0.4 * cubic
    images = (
        NamedImage("bicubic", cubic, "30.11 dB"),
        NamedImage(HOSTILE, better, "34.20 dB"),
        NamedImage("reference", truth),
    )
    comparison = Comparison(f"sub-01 {HOSTILE}, slice 7", images, reference="reference", units="HU")
    edges = np.linspace(0, 1000, 33)
    return Page(
        title=f"Evaluation {HOSTILE}",
        facts=(("Command", "medsr evaluate " + "a-very-long-name-without-a-space/" * 6), ("Data", HOSTILE)),
        warnings=(HOSTILE,),
        tables=(
            Table(
                "Table",
                tuple(f"column {i}" for i in range(9)),
                (Row((HOSTILE, *[Measure(31.2, 1.1, (30.0, 32.0), 0.0001, best=True)] * 8), "worst"),),
                HOSTILE,
            ),
        ),
        comparisons=(comparison, comparison),
        maps=(Map(HOSTILE, np.abs(cubic - truth), (0, 400), "HU", threshold=300),),
        histograms=(Histogram(HOSTILE, edges, (("a", np.arange(32)), (HOSTILE, np.arange(32)[::-1])), "HU"),),
        header_differences=(HeaderDifference(HOSTILE, HOSTILE, "", note=HOSTILE),),
        notes=(HOSTILE,),
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driven = Browser(tmp_path_factory.mktemp("profile"))
    yield driven
    driven.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page_html(example()), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, file: Path) -> Browser:
    browser.screen(1600, 1000)
    browser.open(file)
    return browser


def clip(page: Browser) -> str:
    return page.value("getComputedStyle(document.querySelector('.layer.right')).clipPath")


def test_nothing_complains_and_nothing_is_fetched(page: Browser, file: Path):
    decoded = page.value(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth * i.naturalHeight)))"
    )
    assert len(decoded) == 2 * (3 + 2) + 1
    assert set(decoded) == {160 * 192}
    assert not page.complaints()
    assert {address.partition(":")[0] for address in page.addresses()} <= {"file", "data"}
    assert [a for a in page.addresses() if a.startswith("file:")] == [file.as_uri()]


def test_no_text_becomes_markup(page: Browser):
    assert page.value("document.title") == f"Evaluation {HOSTILE}"
    assert page.value("document.querySelectorAll('script').length") == 1
    assert page.value("document.querySelector('h1').textContent") == f"Evaluation {HOSTILE}"


def test_the_policy_stops_a_script_that_slipped_through(page: Browser):
    """Also if a text were not escaped: scripts and handlers without the page's hash do not run."""
    page.value(
        "{ const s = document.createElement('script'); s.textContent = \"document.title = 'broken'\"; "
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend', "
        '\'<img src="https://example.org/a.png" onerror="document.title=`broken`">\'); 0 }'
    )
    page.value("new Promise(done => setTimeout(done, 200))")
    assert page.value("document.title") == f"Evaluation {HOSTILE}"
    assert any("Content Security Policy" in said for said in page.complaints())


def test_keys_move_the_slider(page: Browser):
    assert clip(page) == "inset(0px 0px 0px 50%)"
    page.value("document.querySelector('input.cut').focus()")
    page.key("ArrowRight", 39)
    assert clip(page) == "inset(0px 0px 0px 51%)"
    page.key("Home", 36)
    assert clip(page) == "inset(0px 0px 0px 0%)"
    said = page.value("document.querySelector('input.cut').getAttribute('aria-valuetext')")
    assert said == f"bicubic on the left 0 percent, {HOSTILE} on the right 100 percent"


def stack_box(page: Browser) -> dict[str, float]:
    page.value("document.querySelector('.stack').scrollIntoView()")
    return page.value("document.querySelector('.stack').getBoundingClientRect().toJSON()")


def test_mouse_and_finger_move_the_slider(page: Browser):
    box = stack_box(page)
    y = box["y"] + 50
    page.mouse("mousePressed", box["x"] + 0.5 * box["width"], y)
    page.mouse("mouseMoved", box["x"] + 0.25 * box["width"], y)
    assert clip(page) == "inset(0px 0px 0px 25%)"
    page.mouse("mouseReleased", box["x"] + 0.25 * box["width"], y)
    page.mouse("mouseMoved", box["x"] + 0.9 * box["width"], y)
    assert clip(page) == "inset(0px 0px 0px 25%)"
    point = {"x": box["x"] + 0.8 * box["width"], "y": y}
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert clip(page) == "inset(0px 0px 0px 80%)"


def test_any_two_images_can_be_chosen(page: Browser):
    page.value(
        "{ const s = document.querySelector('select.right'); s.value = '2'; s.dispatchEvent(new Event('change')); 0 }"
    )
    names = "[...document.querySelectorAll('.comparison')[0].querySelectorAll('.layer')].filter(l => " \
            "getComputedStyle(l).display !== 'none').map(l => l.dataset.name + ' ' + l.className)"  # fmt: skip
    assert page.value(names) == ["bicubic layer left", "reference layer right"]
    page.value("document.querySelector('.swap').click()")
    assert page.value(names) == ["bicubic layer right", "reference layer left"]
    page.value("document.querySelector('.blink').click()")
    assert clip(page) in ("inset(0px 0px 0px 0%)", "inset(0px 0px 0px 100%)")
    page.value("document.querySelector('.blink').click()")


def test_pixels_are_whole_and_not_smoothed(page: Browser):
    images = page.value(
        "[...document.querySelectorAll('.layer.left img, .strip img')].map(i => "
        "[i.getBoundingClientRect().width / i.naturalWidth, getComputedStyle(i).imageRendering])"
    )
    assert images
    for factor, rendering in images:
        assert factor == round(factor) >= 1
        assert rendering == "pixelated"
    assert page.value("document.querySelector('.scale').textContent").startswith(", shown at ×")


@pytest.mark.parametrize(("width", "ratio"), [(400, 1), (400, 2.5), (1600, 1)])
def test_nothing_is_wider_than_the_screen(browser: Browser, file: Path, width: int, ratio: float):
    browser.screen(width, 900, ratio=ratio, touch=width < 1000)
    browser.open(file)
    assert browser.value("document.documentElement.scrollWidth") <= width
    if ratio != 1:
        shown = browser.value("document.querySelector('.layer.left img').getBoundingClientRect().width")
        assert shown * ratio / 192 == pytest.approx(round(shown * ratio / 192), abs=1e-3)


def test_everything_is_named_for_those_who_hear_the_page(page: Browser):
    assert page.value("[...document.images].every(i => i.alt.length > 20)")
    nameless = "[...document.querySelectorAll('input, select, button')].filter(c => !c.labels?.length && " \
               "!c.textContent && !c.getAttribute('aria-label')).length"  # fmt: skip
    assert page.value(nameless) == 0
    assert page.value("[...document.querySelectorAll('[id]')].length === new Set([...document.querySelectorAll("
                      "'[id]')].map(e => e.id)).size")  # fmt: skip


CONTRAST = """
(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const paper = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const texts = "h1, h2, h3, h4, p, th, td, dt, dd, li, em, small, figcaption span, button, select, .absent";
  const worst = { ratio: 99, text: "" };
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent || !e.getClientRects().length) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(paper(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) Object.assign(worst, { ratio, text: `${e.tagName} ${e.className}` });
  }
  return worst;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(page: Browser, scheme: str):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    worst = page.value(CONTRAST)
    page.send("Emulation.setEmulatedMedia", features=[])
    assert worst["ratio"] >= 4.5, worst


def test_on_paper_every_image_is_there(page: Browser):
    page.send("Emulation.setEmulatedMedia", media="print")
    shown = page.value("[...document.querySelectorAll('.layer')].filter(l => getComputedStyle(l).display !== 'none' && "
                       "l.getBoundingClientRect().height > 20).length")  # fmt: skip
    clipped = page.value("[...document.querySelectorAll('.layer')].map(l => getComputedStyle(l).clipPath)")
    page.send("Emulation.setEmulatedMedia", media="")
    assert shown == 6
    assert set(clipped) == {"none"}
