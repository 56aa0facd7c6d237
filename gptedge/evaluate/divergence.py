"""Perplexity of a bundle on a text, and how far its predictions lie from a reference bundle's.

The text is cut into windows; each is run from an empty cache, and the positions of its second half count, so that every
counted token has at least half a window of context. Windows stream: logits are held for a few positions at a time, and
what stays of a position is a handful of numbers. Kullback-Leibler divergence is of the reference's distribution from
the bundle's, in nats, as llama.cpp's perplexity tool has it. Says nothing of what generated text is worth to a reader
(`text_metrics` does).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gptedge.errors import BundleError, DataError, UsageError
from gptedge.progress import Report, silent
from gptedge.runtime.session import PREFILL_CHUNK, Session

if TYPE_CHECKING:
    from gptedge.model import Model

DEFAULT_CONTEXT = 512
"""Tokens of a window."""
COMPARED = 20_000
"""Characters of a text by which two tokenizers are compared."""
_ROWS = 64  # positions whose logits are held at once: two models' rows of a 150k vocabulary take 77 MB
_LARGEST_EXPONENT = 709.0  # of e, within float64

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    tokens: int
    """Positions scored."""
    ids_sha256: str
    """`hash_of` the windows: equal where two results are of the same text."""
    perplexity: float
    bits_per_byte: float | None = None
    """Bits of surprise for each byte of text scored: comparable where tokenizers differ. None without `byte_length`."""
    reference_perplexity: float | None = None
    ppl_increase: float | None = None
    """perplexity / reference_perplexity - 1."""
    ppl_increase_interval: tuple[float, float] | None = None
    """95% confidence interval of `ppl_increase`; None of a single window (see `ratio_interval`)."""
    kl_divergence: dict[str, float] | None = None
    top1_agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Side:
    """What one model made of each scored position, arrays of [N]."""

    nll: Floats
    """Negative log-likelihood of the token that came, nats."""
    top: npt.NDArray[np.int64]
    """The likeliest token."""
    top_logprob: Floats


@dataclass(frozen=True)
class Scores:
    """Every scored position in the order of the text; N = windows x (context - 1 - context // 2)."""

    ids: npt.NDArray[np.int64]
    """The windows' tokens, [windows, context]."""
    model: Side
    reference: Side | None
    kl: Floats | None
    """[N]; None without a reference."""

    @staticmethod
    def scored(context: int) -> npt.NDArray[np.int64]:
        """Where in a window of `context` tokens those stand that are predicted and scored."""
        return np.arange(context // 2 + 1, context)

    def places(self) -> npt.NDArray[np.int64]:
        """Where each scored position's token, the one predicted, stands in the text, [N]."""
        windows, context = self.ids.shape
        return (np.arange(windows)[:, None] * context + self.scored(context)).ravel()

    def targets(self) -> npt.NDArray[np.int64]:
        """The token that came at each scored position, [N]."""
        return self.ids.ravel()[self.places()]


def check_same_tokens(model: Model, reference: Model, text: str) -> None:
    """Raises UsageError where two models' tokens cannot be compared."""
    pair = f"{model.bundle.path} and the reference {reference.bundle.path}"
    if model.session.vocab_size != reference.session.vocab_size:
        sizes = f"{model.session.vocab_size} and {reference.session.vocab_size} tokens"
        raise UsageError(f"{pair} have vocabularies of {sizes}, and cannot be compared")
    text = text[:COMPARED]
    if model.tokenizer.encode(text) != reference.tokenizer.encode(text):
        raise UsageError(f"{pair} split the text into different tokens, and cannot be compared")


def evaluate(
    session: Session,
    ids: Sequence[int],
    *,
    reference: Session | None = None,
    context: int | None = None,
    max_windows: int | None = None,
    prompts: bool = False,
    byte_length: Callable[[int], int] | None = None,
    report: Report = silent,
) -> Evaluation:
    """`summarize` of `score`."""
    scores = score(
        session, ids, reference=reference, context=context, max_windows=max_windows, prompts=prompts, report=report
    )
    return summarize(scores, byte_length)


def score(
    session: Session,
    ids: Sequence[int],
    *,
    reference: Session | None = None,
    context: int | None = None,
    max_windows: int | None = None,
    prompts: bool = False,
    report: Report = silent,
) -> Scores:
    """Score token ids. With `prompts` the first half of a window is read as prompts are, through the graph for them
    where there is one; else all comes through the bundle's own.

    Raises DataError when they fill no window, UsageError when the two vocabularies differ, BundleError when a model's
    logits are not numbers.
    """
    if reference and reference.vocab_size != session.vocab_size:
        raise UsageError(
            f"the reference has {reference.vocab_size} tokens in its vocabulary, the bundle {session.vocab_size}"
        )
    windows = cut(ids, context, max_windows, *(s.context_length for s in (session, reference) if s))
    parts = []
    for w, window in enumerate(windows):
        parts += list(_score_window(session, reference, window, w * len(window), prompts=prompts))
        report(w + 1, len(windows), "windows")
    models, references, kl = zip(*parts, strict=True)
    if reference is None:
        return Scores(windows, _join(models), None, None)
    return Scores(windows, _join(models), _join(references), np.concatenate(kl))


def cut(ids: Sequence[int], context: int | None, max_windows: int | None, *longest: int) -> npt.NDArray[np.int64]:
    """The first windows of a text, [windows, tokens], each of `context` tokens.

    Without one, of DEFAULT_CONTEXT, or of the shortest of `longest`, the models' contexts. Raises UsageError for sizes
    that cannot be, DataError where the text fills no window.
    """
    most = min(longest)
    context = min(DEFAULT_CONTEXT, most) if context is None else context
    if context < 4:
        raise UsageError(f"context is {context}; windows need at least 4 tokens")
    if context > most:
        raise UsageError(f"context is {context}; windows may have {most} tokens, the model's context; lower --context")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"--max-windows is {max_windows}; it must be at least 1")
    n = min(len(ids) // context, max_windows or len(ids))
    if n < 1:
        raise DataError(
            f"the text has {len(ids)} tokens, and one window takes {context}; give a longer text or a smaller --context"
        )
    return np.asarray(ids[: n * context], np.int64).reshape(n, context)


def hash_of(windows: npt.NDArray[np.int64]) -> str:
    """Of the length and the tokens of windows [n, context], 16 hex digits."""
    return hashlib.sha256(np.append(windows.shape[1], windows).astype("<i8").tobytes()).hexdigest()[:16]


def _join(parts: Sequence[Side]) -> Side:
    return Side(*(np.concatenate([getattr(part, name) for part in parts]) for name in Side.__dataclass_fields__))


def _score_window(
    session: Session, reference: Session | None, ids: npt.NDArray[np.int64], place: int, *, prompts: bool
) -> Iterator[tuple[Side, Side | None, Floats | None]]:
    """A few positions at a time; the window begins at `place` of the text."""
    half = len(ids) // 2
    rows = _log_probabilities(session, ids, half, place, prompts=prompts)
    others = _log_probabilities(reference, ids, half, place, prompts=prompts) if reference else None
    for start in range(half, len(ids) - 1, _ROWS):
        targets = ids[start + 1 : start + 1 + _ROWS]
        q = next(rows)
        if others is None:
            yield _side(q, targets), None, None
            continue
        p = next(others)
        yield _side(q, targets), _side(p, targets), _divergence(p, q)


def _side(logprobs: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> Side:
    rows, top = np.arange(len(targets)), logprobs.argmax(-1)
    return Side(-logprobs[rows, targets].astype(np.float64), top, logprobs[rows, top].astype(np.float64))


def _divergence(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> Floats:
    """Of each row, [N]; overwrites both."""
    np.subtract(p, q, out=q)
    q *= np.exp(p, out=p)
    return q.sum(-1, dtype=np.float64)


def _log_probabilities(
    session: Session, ids: npt.NDArray[np.int64], start: int, place: int, *, prompts: bool
) -> Iterator[npt.NDArray[np.float32]]:
    """Of every next token after the positions from `start` on, a few rows at a time."""
    cache = session.new_cache()
    if prompts:
        session.prefill(ids[: start + 1].tolist(), cache)  # whose last tokens come through the bundle's own graph
        cache.truncate(start)
    for i in range(len(cache), start, PREFILL_CHUNK):
        session.run(ids[i : min(i + PREFILL_CHUNK, start)].tolist(), cache)
    for i in range(start, len(ids) - 1, _ROWS):
        logits = session.run(ids[i : min(i + _ROWS, len(ids) - 1)].tolist(), cache, every_row=True)
        if not _finite_rows(logits).all():
            raise _not_numbers(session, ids, place)
        yield log_softmax(logits)


def _finite_rows(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Infinities and NaN all come through a sum."""
    with np.errstate(invalid="ignore"):  # of infinities of both signs
        return np.isfinite(logits.sum(-1, dtype=np.float64))


def _not_numbers(session: Session, ids: npt.NDArray[np.int64], place: int) -> BundleError:
    """Run the window again to find the token it began with: one bad key or value spoils every later position."""
    cache = session.new_cache()
    for i in range(0, len(ids), _ROWS):
        good = _finite_rows(session.run(ids[i : i + _ROWS].tolist(), cache, every_row=True))
        if not good.all():
            place, ids = place + i + int(good.argmin()), ids[i + int(good.argmin()) :]
            break
    return BundleError(
        f"{session.bundle.path} gives logits that are not finite numbers at token {place} of the text (id {ids[0]}); "
        "run gptedge verify on it, or make it again from fp32 weights"
    )


def log_softmax(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return x


def summarize(scores: Scores, byte_length: Callable[[int], int] | None = None) -> Evaluation:
    """`byte_length` gives the bytes of text that a token stands for."""
    nll = scores.model.nll
    same_text = hash_of(scores.ids)
    perplexity = _exp(nll.mean())
    n_bytes = sum(map(byte_length, scores.targets().tolist())) if byte_length else 0
    bits = float(nll.sum()) / math.log(2) / n_bytes if n_bytes else None
    if scores.reference is None or scores.kl is None:
        return Evaluation(tokens=len(nll), ids_sha256=same_text, perplexity=perplexity, bits_per_byte=bits)
    difference, kl = nll - scores.reference.nll, scores.kl
    return Evaluation(
        tokens=len(nll),
        ids_sha256=same_text,
        perplexity=perplexity,
        bits_per_byte=bits,
        reference_perplexity=_exp(scores.reference.nll.mean()),
        ppl_increase=_exp(difference.mean(), math.expm1),
        ppl_increase_interval=ratio_interval(difference.reshape(len(scores.ids), -1)),
        kl_divergence={
            "mean": float(kl.mean()),
            "median": float(np.median(kl)),
            "p99": float(np.quantile(kl, 0.99)),
            "max": float(kl.max()),
        },
        top1_agreement=float((scores.model.top == scores.reference.top).mean()),
    )


def ratio_interval(difference: Floats) -> tuple[float, float] | None:
    """95% confidence interval of the perplexity increase; None of a single window, which tells nothing of the spread.

    `difference` is that of the log-likelihoods, [windows, positions]. Positions of a window share their text and lean
    the same way, so the spread is that of the windows' means, with Student's t for few windows: taking positions as
    independent gives intervals that are too narrow. Windows of one text are taken as independent.
    """
    means = difference.mean(1)
    if len(means) < 2:
        return None
    margin = _student_t(len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means))
    return _exp(means.mean() - margin, math.expm1), _exp(means.mean() + margin, math.expm1)


def _exp(x: float, function: Callable[[float], float] = math.exp) -> float:
    """What is beyond all numbers, as of a broken model, is a very large one: gates go on, and JSON has no infinity."""
    return function(min(x, _LARGEST_EXPONENT))


def _student_t(freedom: int) -> float:
    """The bound that |t| exceeds in 5% of cases: with t = sqrt(freedom) tan(a), a's density is cos(a)^(freedom-1)."""
    angle = np.linspace(0, np.pi / 2, 1 << 16)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(freedom) * math.tan(np.interp(0.95, mass / mass[-1], angle))
