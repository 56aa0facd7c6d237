"""Perplexity and divergence against a plain computation of the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gptedge.bundle import open_bundle
from gptedge.errors import DataError, UsageError
from gptedge.evaluate.bench import bench, memory_bandwidth
from gptedge.evaluate.divergence import evaluate
from gptedge.runtime.session import Session


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
    assert set(got.as_json()) == {"tokens", "perplexity"}
    assert got.tokens == 2 * 49


def test_refusals(session: Session, tiny_bundle: Path) -> None:
    with pytest.raises(DataError, match="the text has 99 tokens, and one window takes 100"):
        evaluate(session, IDS[:99], context=100)
    with pytest.raises(UsageError, match="at least 4"):
        evaluate(session, IDS, context=3)
    other = Session(open_bundle(tiny_bundle), threads=1)
    other.vocab_size += 1
    with pytest.raises(UsageError, match="tokens in its vocabulary"):
        evaluate(session, IDS, reference=other)


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
