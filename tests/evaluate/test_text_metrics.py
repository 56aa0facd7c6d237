"""Replies against references: the numbers of the two packages, the prompts that are asked, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gptedge.cli import main
from gptedge.errors import DataError
from gptedge.evaluate.text_metrics import Pair, compare, read_pairs, replies
from gptedge.loading import load
from gptedge.model import Model

PREDICTIONS = ["The cat sat on the mat today.", "A quick brown fox jumps.", "Nothing in common"]
REFERENCES = ["The cat sat on the mat.", "The quick brown fox jumps over it.", "entirely other words"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return load(tiny_bundle, threads=1)


def test_scores_are_those_of_the_packages() -> None:
    got = compare(PREDICTIONS, REFERENCES)
    assert got.pairs == 3
    assert got.bleu == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert got.chrf == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)
    assert 20 < got.bleu < 80
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert got.rougeL == pytest.approx(sum(each) / 3)
    assert got.rouge1 == pytest.approx((2 * 6 / 13 + 2 * 4 / 12 + 0) / 3)
    assert "version:" in got.sacrebleu["bleu"]
    assert "nc:6" in got.sacrebleu["chrf"]


def test_perfect_and_empty_replies() -> None:
    same = compare(REFERENCES, REFERENCES)
    assert (same.bleu, same.chrf, same.rouge1) == (pytest.approx(100), pytest.approx(100), 1.0)
    nothing = compare(["", "", ""], REFERENCES)
    assert (nothing.bleu, nothing.chrf, nothing.rougeL) == (0.0, 0.0, 0.0)


def test_prompts_go_through_the_template_or_are_continued(model: Model) -> None:
    pairs = [Pair("p, line 1", "The quick", "x"), Pair("p, line 2", "The quick", "x", system="Be brief.")]
    asked = replies(model, pairs, chat=True, max_tokens=6)
    chat = model.chat(max_tokens=6), model.chat(system="Be brief.", max_tokens=6)
    assert asked == [c.send("The quick").text.strip() for c in chat]
    continued = replies(model, pairs, chat=False, max_tokens=6)
    assert continued[0] == model.generate("The quick", max_tokens=6).strip()
    assert continued[1] == model.generate("Be brief.\n\nThe quick", max_tokens=6).strip()
    assert asked != continued


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no pairs"),
        ("\n\n", "has no pairs"),
        ('{"prompt": "a", "reference": "b"}\n{"prompt"', "line 2, is not JSON"),
        ("[1]", "line 1, is list"),
        ('{"prompt": "a"}', "line 1: reference is null; it must be text"),
        ('{"prompt": 1, "reference": "b"}', "line 1: prompt is 1"),
        ('{"prompt": "a", "reference": "b", "system": 3}', "line 1: system is 3"),
        ('{"prompt": "a", "reference": " "}', "line 1: the reference is empty"),
        ('{"prompt": "a", "reference": "\\ud800"}', "line 1: reference: text has a lone surrogate"),
    ],
)
def test_files_that_hold_no_pairs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "p.jsonl")


def test_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "p.jsonl"
    rows = [{"prompt": "The quick", "reference": "brown fox"}, {"prompt": "0123", "reference": "漢字", "system": "S"}]
    pairs.write_text("\n\n".join(map(json.dumps, rows)))
    out = tmp_path / "new" / "replies.jsonl"
    command = ["eval", str(tiny_bundle), "--pairs", str(pairs), "--max-tokens", "5", "--out", str(out)]
    assert main([*command, "--max-size-mb", "9", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got) == {
        "pairs", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "sacrebleu", "chat", "size_mb", "gates",
    }  # fmt: skip
    assert (got["pairs"], got["chat"], got["gates"][0]["ok"]) == (2, True, True)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(w["prompt"], w["reference"]) for w in written] == [(r["prompt"], r["reference"]) for r in rows]
    assert got["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf([w["prediction"] for w in written], [["brown fox", "漢字"]]).score
    )
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--no-chat"]) == 0
    page = capsys.readouterr().out
    assert "2 prompts, continued" in page
    assert "ROUGE" in page


def test_a_prompt_too_long_is_named(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "reference": "b"}\n' + json.dumps({"prompt": "word " * 2000, "reference": "b"})
    )
    assert main(["eval", str(tiny_bundle), "--pairs", str(tmp_path / "p.jsonl")]) == 1
    assert f"{tmp_path / 'p.jsonl'}, line 2: the prompt leaves no room" in capsys.readouterr().err


def test_lines_end_where_json_lines_end(tmp_path: Path, model: Model) -> None:
    """Other ends of lines are text; half a character is none."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a\u2028b", "reference": "c"}\n{"prompt": "\\udc00", "reference": "d"}'
    )
    pairs = read_pairs(tmp_path / "p.jsonl")
    assert [p.prompt for p in pairs] == ["a\u2028b", "\udc00"]
    with pytest.raises(DataError, match=r"p.jsonl, line 2: text has a lone surrogate"):
        replies(model, pairs, chat=False, max_tokens=1)


def test_without_the_packages(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "gptedge.evaluate.text_metrics")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    assert main(["eval", str(tiny_bundle), "--pairs", str(tmp_path / "p.jsonl")]) == 1
    assert (
        "rouge_score.rouge_scorer is not installed, which this needs; install gptedge[eval]" in capsys.readouterr().err
    )
