"""Choosing the next token from its logits, in numpy. Filters apply in the order in which this file lists them.

Vocabularies are large, and a token is cheap: what looks at every token does so in float32 and without sorting. Sums are
by halves (numpy's own way) or in float64, so that draws follow the distribution to about 1e-6 of each probability.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gptedge.config import SamplingParams
from gptedge.errors import UsageError

Logits = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32]
"""Probabilities up to a common factor; the largest is 1."""
Ids = npt.NDArray[np.int64]

_BLOCK = 512  # weights summed at once
_COLDEST = 1e-30  # below, dividing by it overflows float32; only the likeliest weighs anything long before


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities under the model's own distribution, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


class Constraint(Protocol):
    """What keeps a reply within a language (see grammar.constraint)."""

    @property
    def is_whole(self) -> bool: ...

    def allows(self, token: int) -> bool: ...

    def limit(self, logits: Logits) -> Logits: ...

    def take(self, token: int) -> None: ...


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise UsageError where a bias is for a token that there is not."""
    if unknown := next((i for i in params.logit_bias if i >= vocab_size), None):
        raise UsageError(f"logit_bias names the token {unknown}, which is outside the vocabulary of {vocab_size}")


class Sampler:
    """Draws tokens for one generation: remembers its random state and what has been generated."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, constraint: Constraint | None = None
    ) -> None:
        self._params, self._constraint = params, constraint
        self._random = np.random.default_rng(params.seed)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[np.asarray(prompt, np.int64)] = True
        self._counts: Counter[int] = Counter()
        self._scratch = np.empty(vocab_size, np.float32)
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)

    def choose(self, logits: Logits) -> int:
        """The next token's id, from logits [vocab_size]."""
        logits = self._penalise(logits)
        chosen = self._likeliest(logits) if self._params.temperature < _COLDEST else self._draw(self._limit(logits))
        if self._constraint:
            self._constraint.take(chosen)
        self._seen[chosen] = True
        self._counts[chosen] += 1
        return chosen

    def _likeliest(self, logits: Logits) -> int:
        chosen = int(logits.argmax())
        if self._constraint and not self._constraint.allows(chosen):  # as a rule it does, which is soon seen
            return int(self._limit(logits).argmax())
        return chosen

    def _limit(self, logits: Logits) -> Logits:
        return self._constraint.limit(logits) if self._constraint else logits

    def _penalise(self, logits: Logits) -> Logits:
        """Repetition, presence and frequency penalties, then biases; the caller's array is left alone."""
        p = self._params
        if p.repetition_penalty == 1 and not p.presence_penalty and not p.frequency_penalty and not p.logit_bias:
            return logits
        logits = logits.copy()
        if p.repetition_penalty != 1:
            ids = np.flatnonzero(self._seen)
            seen = logits[ids]
            logits[ids] = np.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        if p.presence_penalty or p.frequency_penalty:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[ids] -= p.presence_penalty + p.frequency_penalty * counts
        logits[self._biased] += self._biases
        return logits

    def _draw(self, logits: Logits) -> int:
        """Sample after top-k, top-p and min-p; the latter two are both taken of the distribution that top-k leaves."""
        p, top = self._params, logits.max()
        ids = None
        if 0 < p.top_k < len(logits):
            ids = largest(logits, p.top_k)
        elif p.min_p > 0 and p.top_p == 1:  # what is left out here needs no exponential
            ids = np.flatnonzero(logits >= top + np.float32(p.temperature * np.log(p.min_p)))
        weights = _weights(logits if ids is None else logits[ids], top, p.temperature, self._scratch)
        if p.top_p < 1 or p.min_p > 0:
            kept = _nucleus(weights, p.top_p)
            kept = kept[weights[kept] >= p.min_p]
            weights, ids = weights[kept], kept if ids is None else ids[kept]
        index = pick(weights, self._random.random())
        return index if ids is None else int(ids[index])


def _weights(logits: Logits, top: np.float32, temperature: float, scratch: Logits) -> Weights:
    weights = np.subtract(logits, top, out=scratch[: len(logits)])
    weights /= np.float32(temperature)
    return np.exp(weights, out=weights)


def logprob_of(logits: Logits, token_id: int, n_top: int) -> TokenLogprob:
    """Log-probability of one token and of the `n_top` likeliest."""
    top = logits.max()
    log_sum = float(top) + float(np.log(_weights(logits, top, 1.0, np.empty_like(logits)).sum()))
    best = largest(logits, n_top)
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(
        token_id, float(logits[token_id]) - log_sum, tuple((int(i), float(logits[i]) - log_sum) for i in best)
    )


def largest(logits: Logits, k: int) -> Ids:
    """Ids of the k largest logits, ascending; of all when there are no more."""
    if k >= len(logits):
        return np.arange(len(logits))
    if k < 1:
        return np.empty(0, np.int64)
    # Ever wider below the largest: few are left to choose from, and no sorting sees the whole vocabulary.
    top, near = logits.max(), np.ones(len(logits), bool)
    for width in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        within = logits >= top - np.float32(width)
        if np.count_nonzero(within) >= k:
            near = within
            break
    ids = np.flatnonzero(near)
    return np.sort(ids[np.argpartition(-logits[ids], k - 1)[:k]])


def _nucleus(weights: Weights, p: float) -> Ids:
    """Ids of the fewest largest weights whose sum reaches p of the whole, ascending; always at least one."""
    if p >= 1:
        return np.arange(len(weights))
    goal = p * float(weights.sum())
    falling = np.sort(_reaching(weights, goal))[::-1]
    n = 1 + min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), goal)), len(falling) - 1)
    ids = np.flatnonzero(weights >= falling[n - 1])
    return ids if len(ids) == n else _without_last(ids, weights[ids] == falling[n - 1], len(ids) - n)


def _without_last(ids: Ids, equal: npt.NDArray[np.bool_], n: int) -> Ids:
    """All but the last `n` of those that are equal."""
    return np.delete(ids, np.flatnonzero(equal)[-n:])


def _reaching(weights: Weights, goal: float) -> Weights:
    """So many of the largest weights that their sum reaches `goal`, and as few more as powers of two tell apart."""
    for exponent in range(-4, -40, -4):
        some = weights[weights >= np.float32(2.0**exponent)]
        if float(some.sum()) >= goal:
            return some
    return weights


def pick(weights: Weights, u: float) -> int:
    """An index with a probability in proportion to its weight, when u is uniform in [0, 1)."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    block, u = _locate(np.append(sums, weights[whole:].sum()), u)
    index, _ = _locate(weights[block * _BLOCK : (block + 1) * _BLOCK], u)
    return block * _BLOCK + index


def _locate(weights: Weights, u: float) -> tuple[int, float]:
    """The index whose share of [0, 1) holds u, and how far into that share u lies, in [0, 1)."""
    ends = np.cumsum(weights, dtype=np.float64)
    at = u * ends[-1]
    index = int(np.searchsorted(ends, at, side="right"))
    index = min(index, int(np.searchsorted(ends, ends[-1])))  # rounding must not lead behind the last that weighs
    start = ends[index - 1] if index else 0.0
    return index, min(max((at - start) / (ends[index] - start), 0.0), 1.0)
