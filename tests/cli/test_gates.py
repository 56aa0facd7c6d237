"""Gates: which way they compare, what a baseline must say, and what GitHub is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gptedge.cli import main
from gptedge.cli.gates import Gates, Verdicts, judge, requested
from gptedge.errors import GateFailed, UsageError
from tests.conftest import TEXT

EARLIER: dict[str, Any] = {
    "ppl_increase": 0.02,
    "kl_divergence": {"mean": 0.01},
    "top1_agreement": 0.95,
    "size_mb": 90.0,
    "tokens": 4080,
    "ids_sha256": "0123456789abcdef",
}


def judged(gates: Gates, facts: dict[str, Any]) -> Verdicts:
    return judge(gates, facts, subject="bundle", as_json=False)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "b.json"
    path.write_text(json.dumps(EARLIER))
    return path


def test_gates_compare_in_the_right_direction() -> None:
    judged(requested("2%", 0.01, "95%", 90.0), EARLIER).raise_if_failed()
    for bad in (
        ("1.9%", None, None, None),
        (None, 0.009, None, None),
        (None, None, "0.96", None),
        (None, None, None, 89.0),
    ):
        with pytest.raises(GateFailed, match="misses the bound"):
            judged(requested(*bad), EARLIER).raise_if_failed()
    with pytest.raises(GateFailed):
        judged(requested(None, 1.0, None, None), {"kl_divergence": {"mean": math.nan}}).raise_if_failed()


@pytest.mark.parametrize("bad", [("2 percent", None, None, None), (None, math.nan, None, None), ("nan%", *[None] * 3)])
def test_bounds_that_are_not_numbers(bad: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="give a"):
        requested(*bad)


@pytest.mark.parametrize(
    "worse",
    [{"ppl_increase": 0.0211}, {"kl_divergence": {"mean": 0.011}}, {"top1_agreement": 0.9}, {"size_mb": 99}],
)
def test_baseline_is_the_bound(baseline: Path, worse: dict[str, Any]) -> None:
    gates = requested(None, None, None, None, baseline)
    assert len(judged(gates, EARLIER).all) == 4
    judged(gates, EARLIER).raise_if_failed()
    with pytest.raises(GateFailed, match=f"gate baseline {next(iter(worse))}"):
        judged(gates, {**EARLIER, **worse}).raise_if_failed()


def test_a_baseline_near_zero_leaves_the_room_of_its_interval(tmp_path: Path) -> None:
    """A share of a value near zero is no room, and one that was below zero by luck must not bind what is no worse."""
    earlier = {**EARLIER, "ppl_increase": -7.4e-5, "ppl_increase_interval": [-1.4e-4, -8e-6]}
    (tmp_path / "b.json").write_text(json.dumps(earlier))
    gates = requested(None, None, None, None, tmp_path / "b.json")
    judged(gates, {**EARLIER, "ppl_increase": -1e-5}).raise_if_failed()
    with pytest.raises(GateFailed, match="gate baseline ppl_increase"):
        judged(gates, {**EARLIER, "ppl_increase": 1e-3}).raise_if_failed()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds list, not an object"),
        ("{}", "has no ppl_increase; make it with gptedge eval"),
        (json.dumps({**EARLIER, "top1_agreement": None}), "has no top1_agreement"),
        (json.dumps({**EARLIER, "size_mb": "90"}), "has '90' as size_mb"),
        (json.dumps({**EARLIER, "size_mb": True}), "has True as size_mb"),
        (json.dumps({**EARLIER, "kl_divergence": {"mean": math.nan}}), "has nan as kl_divergence.mean"),
    ],
)
def test_baselines_that_say_too_little(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        requested(None, None, None, None, tmp_path / "b.json")


def test_baseline_of_another_text(baseline: Path) -> None:
    gates = requested(None, None, None, None, baseline)
    with pytest.raises(UsageError, match="measured on other tokens \\(ids_sha256 was 0123456789abcdef, and is f\\)"):
        judged(gates, {**EARLIER, "ids_sha256": "f"})
    with pytest.raises(UsageError, match="tokens was 4080, and is 10"):
        judged(gates, {**EARLIER, "tokens": 10})


def test_verdicts_name_value_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    judged(requested("2%", None, "99%", 80.0), EARLIER)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "gate max-ppl-increase: 2%, at most 2%: ok",
        "gate min-top1: 95%, at least 99%: FAILED",
        "gate max-size-mb: 90, at most 80: FAILED",
    ]


# ---- GitHub ----


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_marked_for_github(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    judge(requested("1%", None, None, 80.0), EARLIER, subject="a\r\nb: 5%,", as_json=as_json)
    streams = capsys.readouterr()
    marks, other = (streams.err, streams.out) if as_json else (streams.out, streams.err)
    assert [line for line in marks.splitlines() if line.startswith("::")] == [
        "::error title=gptedge gate max-ppl-increase::a%0D%0Ab: 5%25,: perplexity increase is 2%25, "
        "and misses the bound of at most 1%25",
        "::error title=gptedge gate max-size-mb::a%0D%0Ab: 5%25,: size in MB is 90, "
        "and misses the bound of at most 80",
    ]  # fmt: skip
    assert "::error" not in other


def test_titles_of_marks_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gptedge.cli.github import mark_error

    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    mark_error("a:b,c%", "m", as_json=False)
    assert capsys.readouterr().out == "::error title=a%3Ab%2Cc%25::m\n"


def test_nothing_is_marked_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    judged(requested("1%", None, None, None), EARLIER)
    assert "::error" not in "".join(capsys.readouterr())


def test_summary_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    facts = {**EARLIER, "ppl_increase_interval": (0.01, 0.03)}
    judge(requested("2%", None, "99%", None), facts, subject="a|b_c", as_json=True)
    assert path.read_text().splitlines() == [
        "before",
        "### a\\|b\\_c",
        "",
        "| gate | value | bound | verdict |",
        "| --- | --- | --- | --- |",
        "| max-ppl-increase | 2% | at most 2% | ✅ ok |",
        "| min-top1 | 95% | at least 99% | ❌ FAILED |",
        "",
        "| fact | value |",
        "| --- | --- |",
        "| ppl\\_increase | 0.02 |",
        "| kl\\_divergence.mean | 0.01 |",
        "| top1\\_agreement | 0.95 |",
        "| size\\_mb | 90 |",
        "| tokens | 4080 |",
        "| ids\\_sha256 | 0123456789abcdef |",
        "| ppl\\_increase\\_interval | 0.01 to 0.03 |",
        "",
    ]


def test_no_gate_no_summary_and_an_unwritable_one_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    judged(requested(None, None, None, None), EARLIER)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    judged(requested("2%", None, None, None), EARLIER).raise_if_failed()
    assert "the summary could not be written" in capsys.readouterr().err


# ---- the two commands ----


def test_quantize_and_eval_judge_alike(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of one command is a baseline for the other; a failing gate leaves stdout with one object."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    quantize = ["quantize", str(tiny_bundle), str(tmp_path / "q"), "--recipe", "int8", "--text", str(text)]
    assert main([*quantize, "--max-kl", "1e9", "--json"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "b.json").write_text(first)
    command = ["eval", str(tmp_path / "q"), "--text", str(text), "--reference", str(tiny_bundle), "--json"]
    assert main([*command, "--baseline", str(tmp_path / "b.json")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(again["gates"]) == 4
    assert again["kl_divergence"] == json.loads(first)["kl_divergence"]
    for failing in ([*command, "--max-size-mb", "0"], [*quantize, "--force", "--max-size-mb", "0", "--json"]):
        assert main(failing) == 4
        out, err = capsys.readouterr()
        assert json.loads(out)["gates"][0]["ok"] is False
        assert "::error title=gptedge gate max-size-mb::" in err
    (tmp_path / "b.json").write_text(json.dumps({**json.loads(first), "tokens": 1}))
    assert main([*command, "--baseline", str(tmp_path / "b.json")]) == 2
    assert "measured on other tokens" in capsys.readouterr().err


def test_quantize_checks_its_text_first(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline of another --context, or a text that cannot be read, costs no quantization."""
    text, out = tmp_path / "text.txt", tmp_path / "q"
    text.write_text(TEXT)
    judge_at = ["--text", str(text), "--context", "64", "--max-windows", "2"]
    assert main(["eval", str(tiny_bundle), *judge_at, "--reference", str(tiny_bundle), "--json"]) == 0
    (tmp_path / "b.json").write_text(capsys.readouterr().out)
    command = ["quantize", str(tiny_bundle), str(out), "--baseline", str(tmp_path / "b.json"), "--max-kl", "1e9"]
    for wrong in (["--text", str(text)], [*judge_at[:4], "--max-windows", "3"]):
        assert main([*command, *wrong]) == 2
        assert "measured on other tokens" in capsys.readouterr().err
    assert main([*command, "--text", str(tmp_path / "none.txt")]) == 1
    assert not out.exists()
    assert main([*command, *judge_at]) == 4  # a rounded bundle is worse than the float one
    assert out.is_dir()
    assert "bits per byte" in capsys.readouterr().out
