"""Choosing the next token from its logits, in numpy. Filters apply in the order in which this file lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptedge.config import SamplingParams
from gptedge.errors import UsageError

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities under the model's own distribution, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


class Sampler:
    """Draws tokens for one generation: remembers its random state and what has been generated."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[np.asarray(prompt, np.int64)] = True
        self._counts: Counter[int] = Counter()
        if unknown := next((i for i in params.logit_bias if not 0 <= i < vocab_size), None):
            raise UsageError(f"logit_bias names the token {unknown}, which is outside the vocabulary of {vocab_size}")

    def choose(self, logits: Logits) -> int:
        """The next token's id, from logits [vocab_size]."""
        p = self._params
        logits = self._penalise(logits)
        chosen = int(logits.argmax()) if p.temperature == 0 else self._draw(logits / np.float32(p.temperature))
        self._seen[chosen] = True
        self._counts[chosen] += 1
        return chosen

    def _penalise(self, logits: Logits) -> Logits:
        """Repetition, presence and frequency penalties, then biases; the caller's array is left alone."""
        p = self._params
        if p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty and not p.logit_bias:
            return logits
        logits = logits.copy()
        seen = logits[self._seen]
        logits[self._seen] = np.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        for token, count in self._counts.items():
            logits[token] -= p.presence_penalty + p.frequency_penalty * count
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        return logits

    def _draw(self, logits: Logits) -> int:
        """Sample after top-k, top-p and min-p; the three are all taken of the same distribution, likeliest first."""
        ids = _top_k(logits, self._params.top_k)
        probabilities = softmax(logits[ids].astype(np.float64))
        keep = _top_p(probabilities, self._params.top_p)
        keep &= probabilities >= self._params.min_p * probabilities.max()
        ids, probabilities = ids[keep], probabilities[keep]
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(index, len(ids) - 1)])


def softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e: npt.NDArray[np.float64] = np.exp(x - x.max())
    return np.divide(e, e.sum())


def logprob_of(logits: Logits, token_id: int, n_top: int) -> TokenLogprob:
    """Log-probability of one token and of the `n_top` likeliest."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = _top_k(logits, n_top)[:n_top] if n_top else np.empty(0, np.int64)
    best = best[np.argsort(-x[best], kind="stable")]
    return TokenLogprob(token_id, float(x[token_id]), tuple((int(i), float(x[i])) for i in best))


def _top_k(logits: Logits, k: int) -> npt.NDArray[np.int64]:
    """Ids of the k largest logits in no particular order; of all when k is 0."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    return np.argpartition(-logits, k - 1)[:k]


def _top_p(probabilities: npt.NDArray[np.float64], p: float) -> npt.NDArray[np.bool_]:
    """The fewest likeliest tokens whose probabilities reach p; always at least one."""
    keep = np.ones(len(probabilities), bool)
    if p >= 1:
        return keep
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    keep[order] = before < p
    keep[order[0]] = True
    return keep
