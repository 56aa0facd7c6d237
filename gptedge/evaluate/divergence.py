"""Perplexity of a bundle on a text, and how far its predictions lie from a reference bundle's.

The text is cut into windows; each is run from an empty cache, and the positions of its second half count, so that every
counted token has at least half a window of context. Windows stream: memory does not grow with the text.
Kullback-Leibler divergence is of the reference's distribution from the bundle's, in nats, as llama.cpp's perplexity
tool has it. Says nothing of what generated text is worth to a reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.errors import DataError, UsageError
from gptedge.runtime.session import Session

DEFAULT_CONTEXT = 512
"""Tokens of a window."""
_ROWS = 64  # positions whose logits are held at once: two models' rows of a 150k vocabulary take 77 MB

Report = Callable[[int, int, str], None]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    tokens: int
    """Positions scored."""
    perplexity: float
    reference_perplexity: float | None = None
    ppl_increase: float | None = None
    """perplexity / reference_perplexity - 1."""
    ppl_increase_interval: tuple[float, float] | None = None
    """95% confidence interval of `ppl_increase`, from the spread of the positions' differences."""
    kl_divergence: dict[str, float] | None = None
    top1_agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass
class _Scores:
    """Per position, in order: negative log-likelihoods of the bundle and the reference, divergence, same top token."""

    nll: list[Floats]
    reference_nll: list[Floats]
    kl: list[Floats]
    same_top: list[npt.NDArray[np.bool_]]


def evaluate(
    session: Session,
    ids: Sequence[int],
    *,
    reference: Session | None = None,
    context: int = DEFAULT_CONTEXT,
    max_windows: int | None = None,
    report: Report = lambda done, total, note: None,
) -> Evaluation:
    """Score token ids. Raises DataError when they fill no window, UsageError when the two vocabularies differ."""
    context = min(context, session.context_length, reference.context_length if reference else context)
    if context < 4:
        raise UsageError(f"context is {context}; windows need at least 4 tokens")
    if reference and reference.vocab_size != session.vocab_size:
        raise UsageError(
            f"the reference has {reference.vocab_size} tokens in its vocabulary, the bundle {session.vocab_size}"
        )
    n = len(ids) // context if max_windows is None else min(max_windows, len(ids) // context)
    if n == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, and one window takes {context}; give a longer text or a smaller --context"
        )
    scores = _Scores([], [], [], [])
    for w in range(n):
        _score_window(session, reference, ids[w * context : (w + 1) * context], scores)
        report(w + 1, n, "windows")
    return _summary(scores, reference is not None)


def _score_window(session: Session, reference: Session | None, ids: Sequence[int], scores: _Scores) -> None:
    half = len(ids) // 2
    rows = _rows(session, ids, half)
    others = _rows(reference, ids, half) if reference else None
    for start in range(half, len(ids) - 1, _ROWS):
        targets = np.asarray(ids[start + 1 : start + 1 + _ROWS])
        at = np.arange(len(targets))
        q = log_softmax(next(rows)[: len(targets)])
        scores.nll.append(-q[at, targets].astype(np.float64))
        if others is None:
            continue
        p = log_softmax(next(others)[: len(targets)])
        scores.reference_nll.append(-p[at, targets].astype(np.float64))
        scores.kl.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64))
        scores.same_top.append(p.argmax(-1) == q.argmax(-1))


def _rows(session: Session, ids: Sequence[int], start: int) -> Iterator[npt.NDArray[np.float32]]:
    """Logits from position `start` on, a few rows at a time."""
    cache = session.new_cache()
    session.prefill(ids[:start], cache)
    for i in range(start, len(ids) - 1, _ROWS):
        yield session.run(ids[i : min(i + _ROWS, len(ids) - 1)], cache, every_row=True)


def log_softmax(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return x


def _summary(scores: _Scores, has_reference: bool) -> Evaluation:
    nll = np.concatenate(scores.nll)
    perplexity = math.exp(nll.mean())
    if not has_reference:
        return Evaluation(tokens=len(nll), perplexity=perplexity)
    reference_nll, kl = np.concatenate(scores.reference_nll), np.concatenate(scores.kl)
    difference = nll - reference_nll
    margin = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    return Evaluation(
        tokens=len(nll),
        perplexity=perplexity,
        reference_perplexity=math.exp(reference_nll.mean()),
        ppl_increase=math.expm1(difference.mean()),
        ppl_increase_interval=(math.expm1(difference.mean() - margin), math.expm1(difference.mean() + margin)),
        kl_divergence={
            "mean": float(kl.mean()),
            "median": float(np.median(kl)),
            "p99": float(np.quantile(kl, 0.99)),
            "max": float(kl.max()),
        },
        top1_agreement=float(np.concatenate(scores.same_top).mean()),
    )
