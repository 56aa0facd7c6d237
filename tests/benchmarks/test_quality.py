"""The quality benchmark's own scoring against gptedge's, and what it writes into the documentation."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import chart
import mixed_sweep
import numpy as np
import pytest
import quality
import scoring

from gptedge.bundle import open_bundle
from gptedge.evaluate.divergence import evaluate
from gptedge.quantize.recipes import read_recipe
from gptedge.runtime.session import Session

COUNT, LENGTH = 3, 40
FOUND = [
    quality.Row("gptedge int8", 0, 139.2, 3.2, scoring.Score(4080, 10.34, 0.0110, 0.0082, 0.951)),
    quality.Row("gptedge int4-rtn", 0, 90.9, 7.4, scoring.Score(4080, 12.9, 0.259, 0.237, 0.751)),
    quality.Row("genai int4", 1, 86.0, 61.0, scoring.Score(4080, 14.1, 0.385, 0.387, 0.682)),
    quality.Row("genai int8", 1, 267.0, 52.0, scoring.Score(4080, 10.27, 0.0043, 0.0044, 0.962)),
    quality.Row("llama.cpp Q4_0", 2, 92.0, 1.4, scoring.Score(4080, 13.1, 0.279, 0.301, 0.736)),
]


def test_scoring_agrees_with_gptedge(tiny_bundle: Path, quantized_bundle: Path) -> None:
    vocabulary = Session(open_bundle(tiny_bundle)).vocab_size
    ids = [int(i) for i in np.random.default_rng(0).integers(0, vocabulary, COUNT * LENGTH + 7)]
    windows = scoring.cut(ids, COUNT, LENGTH)
    reference = list(scoring.graph_logits(tiny_bundle, windows, 1))
    assert [array.shape for array in reference] == [(LENGTH // 2 - 1, vocabulary)] * COUNT
    got = scoring.score(windows, scoring.graph_logits(quantized_bundle, windows, 1), reference)
    sessions = [Session(open_bundle(b), threads=1) for b in (quantized_bundle, tiny_bundle)]
    expected = evaluate(sessions[0], ids, reference=sessions[1], context=LENGTH)
    assert got.positions == expected.tokens == COUNT * (LENGTH // 2 - 1)
    assert got.kl > 1e-5
    assert got.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert got.ppl_increase == pytest.approx(expected.ppl_increase, abs=1e-4)
    assert got.kl == pytest.approx(expected.kl_divergence["mean"], rel=1e-3)
    assert got.top1 == pytest.approx(expected.top1_agreement)
    assert scoring.score(windows, iter(reference), reference) == scoring.Score(
        got.positions, pytest.approx(expected.reference_perplexity, rel=1e-4), 0.0, 0.0, 1.0
    )


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="2 windows of 8 take 16 tokens, and the text has 15"):
        scoring.cut(range(15), 2, 8)


def test_calibration_sees_nothing_of_what_is_scored() -> None:
    from pydoc_data.topics import topics

    text = quality.calibration_text()
    assert len(text) > 1_000_000
    assert [name for name, topic in topics.items() if topic.strip()[:200] in text] == []


def test_written_between_the_marks(tmp_path: Path) -> None:
    for name in quality.PAGES:
        (tmp_path / name).write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # the second time replaces what the first one wrote
        quality.write(FOUND, tmp_path)
        page = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert page.startswith("before\n<!-- quality -->\n\nOne model, the same tokens (4,080 positions)")
        assert page.endswith("svg)\n\n<!-- /quality -->\nafter\n")
        assert "old" not in page
        assert page.count("| **gptedge int8** | 139.2 | +1.10% | 0.0082 | 95.1% |") == 1
        order = [page.index(row.name) for row in sorted(FOUND, key=lambda r: r.score.kl)]
        assert order == sorted(order)
    assert "困惑度" in (tmp_path / "README.zh-CN.md").read_text(encoding="utf-8")
    ET.parse(tmp_path / quality.PLOT)
    with pytest.raises(ValueError, match="the page lacks <!-- quality -->"):
        quality.between_marks("no marks", "table")


def test_plot() -> None:
    root = ET.fromstring(quality.plot(FOUND))
    texts = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"int8", "int4-rtn", "int4", "Q4_0", *quality.KINDS} <= texts
    points = [node for node in root if node.get("class") == "k1" and node.tag.endswith("rect")]
    assert len(points) == 3  # two, and the legend's
    assert float(points[1].get("y")) < float(points[2].get("y")), "more divergence is higher up"
    assert float(points[1].get("x")) < float(points[2].get("x")), "larger is further right"


def test_labels_keep_apart() -> None:
    rng = np.random.default_rng(0)
    boxes: list[chart.Box] = []
    for _ in range(12):
        a, b = rng.uniform(200, 500), rng.uniform(100, 400)
        left, top = chart._place(a, b, 60, boxes)
        boxes.append((left, top, left + 60, top + chart._LINE))
    assert sum(chart._overlap(a, b) for a, b in combinations(boxes, 2)) == 0


def test_the_line_between_uniform_recipes() -> None:
    points = [(91.0, 0.05), (71.0, 0.25), (139.0, 0.002)]
    assert mixed_sweep.line_at(81, points) == pytest.approx(0.15)
    assert mixed_sweep.line_at(115, points) == pytest.approx(0.026)
    assert mixed_sweep.line_at(91, points) == pytest.approx(0.05)
    assert mixed_sweep.line_at(60, points) == 0.25
    assert mixed_sweep.line_at(150, points) == 0.002


@pytest.mark.parametrize(("kl", "good"), [(0.02, True), (0.03, False)])
def test_the_sweep_says_whether_mixed_is_below_the_line(
    kl: float, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"int4": (91.0, 0.05), "int8-block": (139.0, 0.002)}

    def rows(bench: quality.Bench, recipes: list[str], tools: tuple[str, ...]) -> Iterator[quality.Row]:
        for recipe in recipes:
            if recipe.endswith(".toml"):
                read_recipe(Path(recipe))
            elif size_kl := made.get(recipe, (115.0, kl) if "115" in recipe else None):
                yield quality.Row(recipe, 0, size_kl[0], 1.0, scoring.Score(100, 10.0, 0.01, size_kl[1], 0.9))

    monkeypatch.setattr(quality, "rows", rows)
    bench = quality.Bench(tmp_path, *[tmp_path] * 3, [], tmp_path, tmp_path, 1)
    assert mixed_sweep.sweep(bench, [115]) is good
    assert ("below" if good else "ABOVE") + " the line's 0.0260" in capsys.readouterr().out
