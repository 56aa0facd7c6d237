"""Where a step's time goes, by operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptedge.bundle import open_bundle
from gptedge.evaluate.profile import decode_profile
from gptedge.runtime.session import Session
from tests.cli.run import run
from tests.conftest import gptedge_json


def test_products_are_in_it_and_the_session_goes_on(quantized_bundle: Path, tmp_path: Path) -> None:
    session = Session(open_bundle(quantized_bundle), threads=1)
    cache = session.new_cache()
    session.prefill([1, 2, 3], cache)
    before = session.run([4], cache)
    spent = decode_profile(session, prompt_tokens=40)
    assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"} < spent.keys()
    assert {"MatMulNBits", "FusedMatMul", "MatMul"} & spent.keys()
    assert list(spent.values()) == sorted(spent.values(), reverse=True)
    assert min(spent.values()) >= 0
    cache.truncate(3)
    assert (session.run([4], cache) == before).all()
    assert not list(Path.cwd().glob("*profile*.json"))


def test_flag(tiny_bundle: Path) -> None:
    got = gptedge_json("bench", tiny_bundle, "--prompt-tokens", 8, "--new-tokens", 4, "--repeat", 1, "--roofline")
    assert got["roofline"]["decode_profile_ms"]["GroupQueryAttention"] >= 0


def test_a_context_too_small_for_the_profile_is_said_before_measuring(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptedge.evaluate.bench.bench", None)
    code, _, err = run(capsys, "bench", tiny_bundle, "--prompt-tokens", 290, "--new-tokens", 4, "--roofline")
    assert (code, "290 tokens and 16 steps" in err) == (2, True)
