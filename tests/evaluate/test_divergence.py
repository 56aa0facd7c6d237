"""Perplexity and divergence against a plain computation of the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptedge.bundle import open_bundle
from gptedge.errors import BundleError, DataError, UsageError
from gptedge.evaluate.bench import bench, lengths, memory_bandwidth, step_bytes
from gptedge.evaluate.divergence import (
    Scores,
    Side,
    check_same_tokens,
    evaluate,
    ratio_interval,
    score,
    summarize,
)
from gptedge.loading import load
from gptedge.quantize.quantizer import quantize
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.session import Session
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return Session(open_bundle(tiny_bundle), threads=1)


IDS = [int(i) for i in np.random.default_rng(0).integers(0, 300, 750)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_against_a_plain_computation(session: Session, quantized_bundle: Path) -> None:
    small = Session(open_bundle(quantized_bundle), threads=1)
    nll, reference_nll, kl, same = [], [], [], []
    for w in range(3):
        ids = IDS[w * 250 : (w + 1) * 250]
        q = log_softmax(small.run(ids, small.new_cache(), every_row=True))[125:-1]
        p = log_softmax(session.run(ids, session.new_cache(), every_row=True))[125:-1]
        rows, targets = np.arange(124), np.array(ids[126:])
        nll.append(-q[rows, targets])
        reference_nll.append(-p[rows, targets])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    got = evaluate(small, IDS, reference=session, context=250)
    assert got.tokens == 3 * 124
    assert got.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=2e-3)
    assert got.reference_perplexity == pytest.approx(np.exp(np.mean(reference_nll)), rel=1e-4)
    assert got.ppl_increase == pytest.approx(got.perplexity / got.reference_perplexity - 1, rel=1e-6)
    assert got.kl_divergence is not None
    assert got.kl_divergence["mean"] == pytest.approx(np.mean(kl), rel=2e-2)
    assert got.kl_divergence["max"] == pytest.approx(np.max(kl), rel=5e-2)
    assert got.top1_agreement == pytest.approx(np.mean(same), abs=0.02)
    low, high = got.ppl_increase_interval or (0.0, 0.0)
    assert low < got.ppl_increase < high


def test_a_bundle_does_not_diverge_from_itself(session: Session) -> None:
    got = evaluate(session, IDS, reference=session, context=100)
    assert (got.ppl_increase, got.top1_agreement) == (0.0, 1.0)
    assert got.kl_divergence == {"mean": 0.0, "median": 0.0, "p99": 0.0, "max": 0.0}


def test_without_a_reference(session: Session) -> None:
    got = evaluate(session, IDS, context=100, max_windows=2)
    assert set(got.as_json()) == {"tokens", "ids_sha256", "perplexity"}
    assert got.tokens == 2 * 49
    assert got.ids_sha256 == evaluate(session, IDS[:200], context=100).ids_sha256
    assert got.ids_sha256 != evaluate(session, IDS[:200], context=50).ids_sha256


def test_tokens_must_be_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    """Vocabularies of one size are not enough: numbers of other tokens say nothing of a loss."""
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "manifest.json").unlink()  # it holds the file's hash
    with load(tiny_bundle, threads=1) as model, load(other, threads=1) as reference:
        check_same_tokens(model, model, TEXT)
        with pytest.raises(UsageError, match="split the text into different tokens"):
            check_same_tokens(model, reference, TEXT)


def test_bits_per_byte(session: Session) -> None:
    got = evaluate(session, IDS, context=100, max_windows=2, byte_length=lambda i: i % 5)
    scored = sum(i % 5 for i in IDS[51:100] + IDS[151:200])
    assert got.bits_per_byte == pytest.approx(got.tokens * np.log2(got.perplexity) / scored)
    assert evaluate(session, IDS, context=100, max_windows=2, byte_length=lambda _: 0).bits_per_byte is None


def test_scores_say_which_tokens_they_are_of(session: Session) -> None:
    got = score(session, IDS, context=101, max_windows=3)
    assert got.places().tolist() == [w * 101 + i for w in range(3) for i in range(51, 101)]
    logits = session.run(IDS[101:202], session.new_cache(), every_row=True)
    assert got.model.top[50:100].tolist() == logits[50:-1].argmax(-1).tolist()
    assert got.places()[50] == 101 + 51


# ---- the interval --------------------------------------------------------------------------------------------------


def windows_that_lean(rng: np.random.Generator, n: int) -> np.ndarray:
    """Differences of mean 0.02 whose windows lean one way or the other."""
    return 0.02 + 0.1 * rng.standard_normal((n, 1)) + 0.5 * rng.standard_normal((n, 100))


@pytest.mark.parametrize("n", [3, 16])
def test_interval_holds_the_truth_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(0)
    inside = inside_naive = 0
    for _ in range(1000):
        difference = windows_that_lean(rng, n)
        low, high = ratio_interval(difference) or (0, 0)
        inside += low <= np.expm1(0.02) <= high
        inside_naive += abs(difference.mean() - 0.02) <= 1.96 * difference.std() / np.sqrt(difference.size)
    assert 930 <= inside <= 970
    assert inside_naive < 750


def test_one_window_gives_no_interval(session: Session) -> None:
    got = evaluate(session, IDS, reference=session, context=100, max_windows=1)
    assert "ppl_increase_interval" not in got.as_json()
    assert got.ppl_increase == 0.0


# ---- what is refused -----------------------------------------------------------------------------------------------


class Spoilt:
    """A session whose logits are not numbers once it has run a certain place of a window."""

    def __init__(self, session: Session, at: int, value: float) -> None:
        self._session, self._at, self._value = session, at, value

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run(self, ids: list[int], cache: KVCache, *, every_row: bool = False) -> np.ndarray:
        before = len(cache)
        logits = self._session.run(ids, cache, every_row=every_row)
        if len(cache) > self._at:
            logits = logits.copy()
            logits[max(0, self._at - before) if every_row else 0 :, 7] = self._value
        return logits

    def prefill(self, ids: list[int], cache: KVCache) -> None:
        self.run(ids, cache)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [3, 49, 50, 98])
def test_logits_that_are_not_numbers(session: Session, at: int, value: float) -> None:
    spoilt: Any = Spoilt(session, at, value)
    for model, reference in ((spoilt, session), (session, spoilt)):
        with pytest.raises(BundleError, match=rf"not finite numbers at token {at} of the text \(id {IDS[at]}\)") as e:
            evaluate(model, IDS, reference=reference, context=100)
        assert str(session.bundle.path) in str(e.value)


def test_refusals(session: Session, tiny_bundle: Path) -> None:
    with pytest.raises(DataError, match="the text has 99 tokens, and one window takes 100"):
        evaluate(session, IDS[:99], context=100)
    with pytest.raises(UsageError, match="at least 4"):
        evaluate(session, IDS, context=3)
    with pytest.raises(UsageError, match="context is 301; windows may have 300 tokens, the model's context"):
        evaluate(session, IDS, context=301)
    for none in (0, -1):
        with pytest.raises(UsageError, match=f"--max-windows is {none}; it must be at least 1"):
            evaluate(session, IDS, context=100, max_windows=none)
    other = Session(open_bundle(tiny_bundle), threads=1)
    other.vocab_size += 1
    with pytest.raises(UsageError, match="tokens in its vocabulary"):
        evaluate(session, IDS, reference=other)


MEASURED = """
import sys
from gptedge.cli import main
from gptedge.measure import peak_rss_mb
code = main(sys.argv[1:])
print(peak_rss_mb(), file=sys.stderr)
sys.exit(code)
"""


def test_a_large_vocabulary_fits_in_two_gigabytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As many tokens as Qwen has, the bundle and its reference together; and more text takes no more memory."""
    from gptedge.checkpoint import write_checkpoint
    from gptedge.export.exporter import export
    from gptedge.quantize.quantizer import quantize
    from tests.conftest import TEXT, random_weights, tiny_config

    config = tiny_config(151_936, n_layer=1, n_embd=64, n_head=4, context_length=512)
    files = {name: (tiny_checkpoint / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_checkpoint(tmp_path, config, random_weights(config), files, token_ids={"eos_token_id": 0})
    whole = export(tmp_path, tmp_path / "fp32", verify=False).bundle
    small = quantize(whole, tmp_path / "int8", recipe="int8").bundle
    (tmp_path / "text").write_text(TEXT)

    def peak(windows: int) -> float:
        command = ["eval", small, "--reference", whole, "--text", tmp_path / "text", "--max-windows", windows, "--json"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout)["tokens"] == windows * 255
        return float(done.stderr.split()[-1])

    once = peak(1)
    assert 100 < once < 600  # 410 as a rule
    assert peak(3) < once + 100


def test_what_is_beyond_all_numbers_is_very_large() -> None:
    """A model so broken that e to its surprise overflows: gates judge on."""
    side = Side(np.array([800.0, 900.0]), np.array([0, 0]), np.array([-1.0, -1.0]))
    other = Side(np.array([1.0, 2.0]), np.array([1, 0]), np.array([-1.0, -1.0]))
    ids = np.arange(4).reshape(2, 2)
    for model, reference in ((side, other), (other, side)):
        got = summarize(Scores(ids, model, reference, np.array([700.0, 800.0])))
        assert got.kl_divergence is not None
        assert got.kl_divergence["mean"] == 750
        json.dumps(got.as_json(), allow_nan=False)
    assert summarize(Scores(ids, side, other, np.zeros(2))).perplexity > 1e300


def test_bench_takes_what_the_context_has_room_for() -> None:
    assert lengths(8192, None, None) == (512, 128)
    assert lengths(300, None, None) == (172, 128)
    assert lengths(100, None, None, least_steps=60) == (40, 50)
    assert lengths(300, None, 299) == (1, 299)
    assert lengths(300, 172, 128) == (172, 128)
    for given in ((173, 128), (None, 300), (300, None)):
        with pytest.raises(UsageError, match="do not fit the model's context of 300"):
            lengths(300, *given)


def test_what_is_widened_is_read_as_floats(tiny_bundle: Path, tmp_path: Path) -> None:
    """A width of 64, so that no block is filled up."""
    quantize(tiny_bundle, tmp_path / "small", recipe="int8-weight")
    whole, small = open_bundle(tiny_bundle), open_bundle(tmp_path / "small")
    assert step_bytes(whole) == whole.size_bytes > 2 * small.size_bytes
    assert step_bytes(small) > 0.9 * whole.size_bytes


def test_bench_reports_every_key(session: Session) -> None:
    got = bench(session, load_ms=1.0, prompt_tokens=20, new_tokens=10, repeat=1).as_json()
    assert got["prefill_tokens_per_s"] > 0
    assert got["decode_tokens_per_s"] > 0
    assert 0 < got["roofline"]["decode_fraction"] < 2
    assert 0.5 < got["roofline"]["memory_gb_per_s"] < 2000
    with pytest.raises(UsageError, match="at least 1"):
        bench(session, load_ms=1.0, prompt_tokens=0, new_tokens=10, repeat=1)


def test_memory_bandwidth_is_plausible() -> None:
    assert 5e8 < memory_bandwidth(1) < 2e12
