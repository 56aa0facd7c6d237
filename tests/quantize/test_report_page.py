"""The report's page and its charts: everything is on it, and it needs nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from gptedge.cli import main
from gptedge.quantize.report import ReportData
from gptedge.quantize.report_charts import Point, curve, log_ticks, scatter, ticks
from gptedge.quantize.report_page import page
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def html(measured: ReportData) -> str:
    return page(measured, version="1.2.3")


# ---- the page ------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, and the text of table cells; fails on tags that are not closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.row = ""
        self.text: list[str] | None = None
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()
        if tag in ("th", "td") and self.text is not None:
            content = "".join(self.text)
            if tag == "th":
                self.row = content
                self.cells.setdefault(content, [])
            else:
                self.cells[self.row].append(content)
            self.text = None

    def handle_data(self, data: str) -> None:
        if self.text is not None:
            self.text.append(data)


def test_page_stands_alone(html: str) -> None:
    elements = Elements(html)
    for tag, attributes in elements.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        for name, value in attributes.items():
            assert name not in ("src", "href", "srcset", "action"), tag
            assert not name.startswith("on"), tag
            assert not re.search("https?:", value or ""), (tag, name)
    assert "url(" not in html
    assert "@import" not in html
    assert any(a.get("http-equiv") == "Content-Security-Policy" for _, a in elements.tags)


def test_page_shows_every_number(html: str, measured: ReportData) -> None:
    cells = Elements(html).cells
    for b in measured.bundles:
        shown = cells[b.name]
        assert shown[:3] == [b.recipe, f"{b.size_mb:.1f}", f"{b.perplexity:.3f}"]
        assert shown[7] == f"{b.decode_tokens_per_s:.1f}"
        if b.kl_divergence:
            assert float(shown[4]) == pytest.approx(b.kl_divergence["mean"], rel=5e-3)
            assert shown[6] == f"{b.top1_agreement:.1%}"
        for weight in b.weights:
            assert weight.error is not None
            assert f"{weight.name}: {weight.error:.3%}" in html or weight.layer is None
        for d in b.differences:
            assert f"<strong>{d.kl:.2f}</strong>" in html
    assert "a &amp; &lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<polyline") == 4
    assert "900 steps, loss 3.200, 4.500 held out" in html


def test_page_is_readable_without_seeing_it(html: str) -> None:
    elements = Elements(html)
    charts = [a for tag, a in elements.tags if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 4, "bundles, loss, learning rate, gradient norm"
    assert html.count("<desc>") == 4
    named = {a["aria-labelledby"] for tag, a in elements.tags if tag == "section"}
    assert named == {a["id"] for tag, a in elements.tags if tag == "h2"}
    assert all(a.get("aria-label") for _, a in elements.tags if a.get("role") == "region")
    assert ("html", {"lang": "en"}) in elements.tags


def test_page_of_one_bundle_or_of_runs_alone(measured: ReportData) -> None:
    alone = page(replace(measured, bundles=measured.bundles[:1], runs=[]), version="1")
    assert "<h1>a &amp; &lt;b&gt;</h1>" in alone
    runs = page(ReportData(None, None, 0, None, None, None, [], measured.runs), version="1")
    assert Elements(runs).tags
    assert "held out" in runs


def test_what_a_run_measured_is_drawn_and_what_it_did_not_is_not(html: str) -> None:
    axes = re.findall(r'<p class="axis">([^<]*)</p>', html)
    assert axes[1:] == ["loss, nats per token", "learning rate", "gradient norm, before clipping"]
    rate, norm = html.split('<p class="axis">')[3:5]
    assert ">0.001</text>" in rate, "a constant's axis is of its own size"
    assert "from 0.222 to 99.9, 99.9 in the end" in norm
    assert "nan" not in rate + norm


# ---- charts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 581.3), (0, 3.1), (2.5, 2.51), (0, 90_000), (-1, 1)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    got = ticks(high, low)
    assert 3 <= len(got) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in got)
    assert len({round(b - a, 9) for a, b in pairwise(got)}) == 1


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.4), (0.0077, 0.22), (1e-6, 1.0), (0.1, 0.3)])
def test_logarithmic_ticks(low: float, high: float) -> None:
    got = log_ticks(low, high)
    assert 1 <= len(got) <= 8
    assert all(low <= t <= high for t in got)


def test_names_of_curves_that_end_together_stand_apart() -> None:
    ends = [("loss", "s0", [(1, 4.0), (9, 2.0)]), ("held out", "s1", [(1, 4.1), (9, 2.01)])]
    made = curve(ends, title="", description="", y_label="")
    first, second = (float(y) for y in re.findall(r'class="name" x="[^"]*" y="([^"]*)"', made))
    assert abs(first - second) >= 16, "letters are 16 pixels high"


def test_charts_of_little_or_equal_data() -> None:
    same = [Point(n, "note", 5.0, y, 0.0, "s0") for n, y in (("a", None), ("b", 0.1), ("c", 0.1))]
    labels = re.findall(r'<text x="[\d.]+%" y="([\d.]+)" [^>]*class="name"', scatter(same, **dict.fromkeys(
        ("title", "description", "x_label", "y_label"), "")))  # fmt: skip
    assert len(set(labels)) == 3
    assert "nan" not in scatter(same[:1], title="", description="", x_label="", y_label="")
    assert "nan" not in curve([("loss", "s0", [(1, 2.0)])], title="", description="", y_label="")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_command(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    out = tmp_path / "new" / "r.html"
    command = ["report", str(bundles / "a & <b>"), str(bundles / "int8-weight"), "--out", str(out), "--context", "64"]
    command += ["--text", str(tmp_path / "t.txt"), "--max-windows", "2", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["page"], got["text"], got["reference"], got["tokens"]) == (str(out), "t.txt", "a & <b>", 62)
    cells = Elements(out.read_text()).cells
    for bundle in got["bundles"]:
        assert cells[bundle["name"]][1:3] == [f"{bundle['size_mb']:.1f}", f"{bundle['perplexity']:.3f}"]
    before = out.read_bytes()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--text", str(tmp_path / "none")]) == 1
    assert main(["report", str(bundles), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert sorted(p.name for p in out.parent.iterdir()) == ["r.html"]
