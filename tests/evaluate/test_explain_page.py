"""The page of an explanation: whole in one file, nothing in it taken for markup, pictures that hold the weights."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptedge.cli import main
from gptedge.evaluate.explain import Explanation, explain
from gptedge.evaluate.explain_page import page
from tests.browser import assert_readable, chromium, framed, needs_chromium, probe

TEXT = 'The quick </code><script>alert(1)</script> brown\n\x1b[31mfox & "jumps" over'


@pytest.fixture(scope="module")
def found(tiny_bundle: Path) -> Explanation:
    return explain(tiny_bundle, TEXT, threads=1)


def weights_in(html: str) -> np.ndarray:
    """What the pictures say, [layers x heads, T, T], by the PNG specification: grey and alpha, no filters."""
    maps = []
    for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', html):
        png = base64.b64decode(data)
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        side, high = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
        assert side == high
        assert png[24:29] == bytes([8, 4, 0, 0, 0])
        start = png.index(b"IDAT") + 4
        rows = np.frombuffer(zlib.decompress(png[start:-16]), np.uint8).reshape(side, 1 + 2 * side)
        assert not rows[:, 0].any()
        pixels = rows[:, 1:].reshape(side, side, 2).astype(float)
        assert np.array_equal(pixels[..., 1], 255 * np.tri(side))
        maps.append(np.where(pixels[..., 1] > 0, ((255 - pixels[..., 0]) / 255) ** 2, 0))
    return np.array(maps)


def test_pictures_hold_the_weights(found: Explanation) -> None:
    assert found.attention is not None
    maps = weights_in(page(found))
    np.testing.assert_allclose(maps, found.attention.reshape(maps.shape), atol=2 / 255)


def test_every_number_is_there_without_the_script(found: Explanation) -> None:
    html = page(found)
    rows = re.findall(r'<tr id="t(\d+)">(.*?)</tr>', html)
    assert [int(place) for place, _ in rows] == list(range(len(found.tokens)))
    for (_, row), token in list(zip(rows, found.tokens, strict=True))[1:]:
        assert f"<b>{token.surprise_bits:.2f}</b>" in row
        assert f"<td>{token.rank:,}</td>" in row
        assert row.count("<code>") == 1 + len(token.alternatives)


def test_text_is_never_markup(found: Explanation) -> None:
    html = page(found)
    assert html.count("<script>") == 1, "ours"
    assert "\x1b" not in html
    shown = [unescape(t) for t in re.findall(r'<a class="token"[^>]*>([^<]*)<small>', html)]
    assert "".join(shown).replace("␣", " ") == "".join(t.text for t in found.tokens)


def test_the_page_asks_for_nothing(found: Explanation) -> None:
    html = page(found)
    assert "default-src 'none'" in html
    assert re.findall(r'(?:src|href)="(?!data:image/png|#t\d)[^"]*"', html) == []
    assert "http" not in html.replace("http-equiv", "")


def test_without_maps_the_page_says_why(found: Explanation) -> None:
    from dataclasses import replace

    html = page(replace(found, attention=None, attention_note="no maps today"))
    assert "No maps today." in html
    assert "<img" not in html


def test_command_writes_the_page_once(tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "page.html"
    command = ["explain", str(tiny_checkpoint), "The quick", "--html", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    first = out.read_text()
    assert first.startswith("<!doctype html>")
    assert main(command) == 2
    assert "add --force" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(out)
    assert out.read_text() == first
    assert list(out.parent.iterdir()) == [out]


CHOOSE = """<script>addEventListener("load", () => setTimeout(() => {
  document.querySelector('[data-layer="1"][data-head="2"]').click();
  document.querySelectorAll("#looks .token")[5].click();
}, 0));</script></body>"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_in_a_browser(found: Explanation, width: int, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(framed(page(found), width))
    seen = probe(tmp_path, "page.html", scheme)
    assert seen["seen"] > 150
    assert_readable(seen, width, scheme)


@pytest.mark.slow
@needs_chromium
def test_the_script_reads_the_weights_of_the_chosen_head(found: Explanation, tmp_path: Path) -> None:
    """With the page's own policy in force."""
    (tmp_path / "page.html").write_text(page(found).replace("</body>", CHOOSE))
    dom = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=5000", f"file://{tmp_path}/page.html")
    words = re.search(r'id="looks">(.*?)</p>', dom, re.S)
    assert words
    numbers = re.findall(r"<small>([^<]*)</small>", words[1])
    assert found.attention is not None
    for shown, weight in zip(numbers[:6], found.attention[1, 2, 5, :6], strict=True):
        assert shown == "·" if weight < 0.004 else abs(int(shown) - 100 * weight) < 1.5
    assert {n.strip() for n in numbers[6:]} == {""}
    assert "layer 1, head 2:" in dom
