"""Pages in a real browser: headless Chromium, light and dark, at a desk and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
PAPER = {"light": (251, 250, 248), "dark": (18, 21, 24)}

# What a reader would stumble over: text that cannot be read, and a page that must be scrolled sideways.
PROBE = """
<script>
function channels(colour) {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(colour) {
  const [r, g, b] = colour.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (; element; element = element.parentElement) {
    const c = channels(getComputedStyle(element).backgroundColor);
    if (c[3] == 255) return c;
  }
  return [255, 255, 255, 255];
}
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
let seen = 0;
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, style = getComputedStyle(element);
  if (!texts.currentNode.data.trim() || !element.getClientRects().length) continue;
  if (["SCRIPT", "STYLE", "title", "desc"].includes(element.tagName)) continue;
  seen += 1;
  const isSvg = element.namespaceURI.endsWith("svg");
  const a = luminance(channels(isSvg ? style.fill : style.color)), b = luminance(background(element));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(element.className + ": " + texts.currentNode.data + " " + ratio.toFixed(2));
}
const outside = [...document.querySelectorAll("svg.chart text")].filter(t => {
  const box = t.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > innerWidth);
}).map(t => t.textContent);
document.documentElement.setAttribute("data-probe", JSON.stringify(
  {seen, low, outside, width: innerWidth, needed: document.documentElement.scrollWidth,
   paper: background(document.body).slice(0, 3)}));
</script>
"""
# Chromium's windows are 500 wide and more; a frame may be as narrow as a phone.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe style="width: {width}px; height: 2000px; border: 0" srcdoc="{page}"
  onload="document.documentElement.setAttribute('data-probe', this.contentDocument.documentElement.dataset.probe)">
</iframe>
"""


def framed(html: str, width: int) -> str:
    """A page that measures itself in a frame of this width."""
    probed = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", PROBE + "</body>")
    return FRAME.format(width=width, page=escape(probed.replace("<details>", "<details open>")))


def probe(folder: Path, name: str, scheme: str) -> dict[str, Any]:
    """What a framed page found of itself."""
    dom = chromium(folder, "--dump-dom", *flags(scheme), f"file://{folder}/{name}")
    found = re.search(r'^<html[^>]* data-probe="([^"]*)"', dom, re.M)
    assert found
    return json.loads(unescape(found[1]))


def assert_readable(seen: dict[str, Any], width: int, scheme: str) -> None:
    assert tuple(seen["paper"]) == PAPER[scheme]
    assert seen["width"] == width
    assert seen["needed"] <= width
    assert seen["outside"] == []
    assert seen["low"] == []


def chromium(folder: Path, *flags: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def flags(scheme: str) -> list[str]:
    return ["--window-size=1280,2400", *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else [])]


def read_png(path: Path) -> tuple[int, int, tuple[int, ...], int]:
    """Width, height, the first pixel, and how many different filtered pixels there are (PNG specification, 8-bit)."""
    data, at, packed, header = path.read_bytes(), 8, b"", (0, 0, 0, 0)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBB", body[:10])
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height, depth, colour = header
    assert depth == 8
    size = {2: 3, 6: 4}[colour]
    rows = zlib.decompress(packed)
    pixels = {rows[i : i + 3] for i in range(1, len(rows) - size, size * 7)}
    return width, height, tuple(rows[1:4]), len(pixels)  # of the first pixel, every filter leaves the bytes as they are
