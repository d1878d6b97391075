"use strict";
(() => {
  const GAP = 12; // beside the pictures of a strip, in CSS pixels
  const BLINK_MS = 900;

  /** The largest whole multiple, in pixels of the screen, at which a picture fits; 0 where it has to be shrunken. */
  function fitting(columns, room) {
    return Math.floor((room * window.devicePixelRatio) / columns);
  }

  /** Give a picture its size: `zoom` screen pixels for each of its own; shrunken to `room` where zoom is 0. */
  function setSize(image, zoom, room, pixelHeight) {
    const columns = Number(image.getAttribute("width"));
    const rows = Number(image.getAttribute("height"));
    const unit = zoom > 0 ? zoom / window.devicePixelRatio : room / columns;
    image.style.width = `${columns * unit}px`;
    image.style.height = `${rows * unit * pixelHeight}px`;
    image.classList.toggle("shrunken", zoom === 0);
    return unit * window.devicePixelRatio;
  }

  /** Change a text, only if it is another one: those who hear the page are not told the same twice. */
  function write(place, text) {
    if (place.textContent !== text) place.textContent = text;
  }

  function comparison(article) {
    const stack = article.querySelector(".stack");
    const layers = [...stack.querySelectorAll(".layer")];
    const range = article.querySelector("input.cut");
    const [left, right, zoom] = ["left", "right", "zoom"].map((name) => article.querySelector(`select.${name}`));
    const blink = article.querySelector(".blink");
    const pixelHeight = Number(article.dataset.height) || 1;
    let timer = 0;

    function place() {
      const percent = Number(range.value);
      const [a, b] = [layers[left.value], layers[right.value]];
      for (const layer of layers) {
        layer.classList.toggle("left", layer === a);
        // One image on both sides is not cut.
        layer.classList.toggle("right", layer === b && a !== b);
      }
      stack.style.setProperty("--cut", `${percent}%`);
      const say = (layer) => `${layer.dataset.name}${caption(layer)}`;
      range.setAttribute(
        "aria-valuetext",
        `${a.dataset.name} on the left ${percent} percent, ${b.dataset.name} on the right ${100 - percent} percent`,
      );
      write(article.querySelector(".left-name"), `◀ ${say(a)}`);
      write(article.querySelector(".right-name"), `${say(b)} ▶`);
    }

    function caption(layer) {
      const text = layer.querySelector("figcaption span").textContent;
      return text ? ` (${text})` : "";
    }

    function resize() {
      const viewer = article.querySelector(".viewer");
      const room = viewer.clientWidth;
      const columns = Number(layers[0].querySelector("img").getAttribute("width"));
      const asked = Number(zoom.value);
      // Of tall pictures the height counts too: the slider below should stay on the screen.
      const rows = Number(layers[0].querySelector("img").getAttribute("height")) * pixelHeight;
      const tall = Math.max(240, window.innerHeight * 0.72) * (columns / rows);
      const most = asked || Math.max(fitting(columns, Math.min(room, tall)), Math.min(1, fitting(columns, room)));
      let unit = 1;
      for (const layer of layers) unit = setSize(layer.querySelector("img"), most, room, pixelHeight);
      const text =
        most > 0
          ? `, shown at ×${most}, not smoothed`
          : `, shrunken to ${Math.round(unit * 100)}% of the screen's pixels to fit; zoom to see them all`;
      article.querySelector(".scale").textContent = text;
      const strip = article.querySelector(".strip");
      if (!strip) return;
      const maps = [...strip.querySelectorAll("img")];
      const narrow = Math.max(Math.min((strip.clientWidth - GAP * 3) / Math.min(maps.length, 3), 700), 240);
      const each = Math.min(strip.clientWidth, narrow);
      for (const map of maps) setSize(map, asked || fitting(columns, each), each, pixelHeight);
    }

    function drag(event) {
      const box = stack.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      range.value = String(Math.round(100 * Math.min(1, Math.max(0, share))));
      place();
    }

    function stopBlinking() {
      if (!timer) return;
      window.clearInterval(timer);
      timer = 0;
      blink.setAttribute("aria-pressed", "false");
    }

    stack.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stopBlinking();
      stack.setPointerCapture(event.pointerId);
      drag(event);
      range.focus({ preventScroll: true });
      event.preventDefault();
    });
    stack.addEventListener("pointermove", (event) => {
      if (stack.hasPointerCapture(event.pointerId)) drag(event);
    });
    range.addEventListener("input", () => {
      stopBlinking();
      place();
    });
    for (const select of [left, right]) select.addEventListener("change", place);
    zoom.addEventListener("change", resize);
    article.querySelector(".swap").addEventListener("click", () => {
      [left.value, right.value] = [right.value, left.value];
      place();
    });
    blink.addEventListener("click", () => {
      if (timer) {
        stopBlinking();
        return;
      }
      blink.setAttribute("aria-pressed", "true");
      const turn = () => {
        range.value = Number(range.value) > 0 ? "0" : "100";
        place();
      };
      turn();
      timer = window.setInterval(turn, BLINK_MS);
    });
    // All pictures of one slice are scrolled together, so that one place can be compared.
    const scrollers = [...article.querySelectorAll(".scroller")];
    for (const one of scrollers) {
      one.addEventListener("scroll", () => {
        const width = one.scrollWidth - one.clientWidth;
        const height = one.scrollHeight - one.clientHeight;
        for (const other of scrollers) {
          if (other === one) continue;
          const x = width > 0 ? (one.scrollLeft / width) * (other.scrollWidth - other.clientWidth) : other.scrollLeft;
          const y = height > 0 ? (one.scrollTop / height) * (other.scrollHeight - other.clientHeight) : other.scrollTop;
          if (Math.abs(other.scrollLeft - x) > 1) other.scrollLeft = x;
          if (Math.abs(other.scrollTop - y) > 1) other.scrollTop = y;
        }
      });
    }
    place();
    return resize;
  }

  function single(figure) {
    const image = figure.querySelector("img");
    return () => {
      const room = Math.min(figure.closest(".strip").clientWidth, 460);
      setSize(image, fitting(Number(image.getAttribute("width")), room), room, 1);
    };
  }

  document.documentElement.classList.add("js");
  const resizers = [
    ...[...document.querySelectorAll(".comparison")].map(comparison),
    ...[...document.querySelectorAll(".map.single")].map(single),
  ];
  const all = () => resizers.forEach((resize) => resize());
  window.addEventListener("resize", all);
  all();
})();
