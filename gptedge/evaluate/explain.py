"""What a model made of a text, token by token: how likely each was, what else could have come, where each head looked.

    text ─▶ tokens ─▶ logits [T, V] ─▶ probability, surprise, rank, alternatives of each token
                   └▶ attention [L, H, T, T]: row t says how token t's head spread its gaze over tokens 0 … t

A checkpoint is computed by PyTorch (`explain_checkpoint`), a bundle by onnxruntime (`explain_bundle`). Surprise is
-log2 of the probability, in bits (Shannon 1948): 0 of a token that was certain, 1 of one in two, 10 of one in 1,024.
Drawing is `explain_terminal`'s and `explain_page`'s job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gptedge.bundle import GRAPH
from gptedge.errors import BundleError, UsageError
from gptedge.evaluate.divergence import log_softmax
from gptedge.text import visible
from gptedge.tokenizer import Tokenizer

DEFAULT_TOKENS = 128
DEFAULT_TOP = 5
MAP_LIMIT = 1 << 28
"""Attention weights that are held at most, 1 GB of float32: layers x heads x tokens x tokens."""

Floats = npt.NDArray[np.float32]


class Look(NamedTuple):
    """What a model computed for one text of T tokens."""

    logits: Floats
    """[T, vocab_size]"""
    attention: Floats | None
    """[n_layer, n_head, T, T], each row a distribution over the tokens up to its own."""
    note: str | None = None
    """Why there is no attention."""


class Subject(Protocol):
    """A loaded checkpoint or bundle."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def kind(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    def look(self, ids: Sequence[int]) -> Look: ...


@dataclass(frozen=True)
class Guess:
    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Token:
    """A token of the text; what was thought of it before it came is None where nothing stands before it."""

    place: int
    id: int
    text: str
    """As it is shown: bytes that are no whole characters in hex, what cannot be printed escaped."""
    bytes: str
    """In hex."""
    probability: float | None = None
    surprise_bits: float | None = None
    rank: int | None = None
    """1 of the likeliest."""
    entropy_bits: float | None = None
    """The surprise that was to be expected here."""
    alternatives: tuple[Guess, ...] = ()
    """The likeliest tokens, this one perhaps among them."""


@dataclass(frozen=True)
class Explanation:
    source: str
    kind: str
    """checkpoint, or a bundle's recipe."""
    tokens: list[Token]
    next: tuple[Guess, ...]
    """What would come after the last token shown."""
    text_tokens: int
    """Of the whole text; more than `tokens` where it was cut."""
    cut_by: str | None
    """What bounded it, when it was cut."""
    attention: Floats | None
    attention_note: str | None

    @property
    def scored(self) -> list[float]:
        """Surprises of the tokens that have one, bits."""
        return [t.surprise_bits for t in self.tokens if t.surprise_bits is not None]

    @property
    def bits_per_token(self) -> float | None:
        """None where no token has anything before it."""
        return float(np.mean(self.scored)) if self.scored else None

    @property
    def perplexity(self) -> float | None:
        return None if self.bits_per_token is None else 2.0**self.bits_per_token

    def left_out(self) -> str | None:
        """A line about what is not shown; None where all is."""
        if self.cut_by is None:
            return None
        return f"the first {len(self.tokens):,} of the text's {self.text_tokens:,} tokens are shown: {self.cut_by}"

    def as_json(self, layer: int | None = None, head: int | None = None) -> dict[str, Any]:
        """With a layer, the weights of its heads, or of one of them; those of all would be millions of numbers."""
        value = {
            name: getattr(self, name) for name in ("source", "kind", "text_tokens", "bits_per_token", "perplexity")
        }
        value |= {"tokens": [asdict(t) for t in self.tokens], "next": [asdict(g) for g in self.next]}
        value |= {"left_out": self.left_out(), "attention": None, "attention_note": self.attention_note}
        if self.attention is not None:
            heads = range(self.attention.shape[1]) if head is None else [head]
            maps = [] if layer is None else [_map(self.attention, layer, h) for h in heads]
            value["attention"] = {"gaze": gaze(self.attention), "maps": maps}
        return value


def _map(attention: Floats, layer: int, head: int) -> dict[str, Any]:
    rows = [[round(float(w), 6) for w in row[: i + 1]] for i, row in enumerate(attention[layer, head])]
    return {"layer": layer, "head": head, "weights": rows}


def explain(
    source: Path, text: str, *, max_tokens: int = DEFAULT_TOKENS, top: int = DEFAULT_TOP, threads: int | None = None
) -> Explanation:
    """Run the text through a checkpoint, or a bundle, and look at what it made of each token.

    Raises UsageError for a text without tokens; what opening the source raises.
    """
    check_number("max-tokens", max_tokens, 1, 1 << 20)
    check_number("top", top, 1, 100)
    subject = _open(Path(source), threads)
    ids = subject.tokenizer.encode(text, add_special_tokens=True)
    if not text or not ids:
        raise UsageError("the text is empty, so there is nothing to explain; give some, or - to read it from stdin")
    shown = ids[: min(max_tokens, subject.context_length)]
    look = subject.look(shown)
    if not np.isfinite(look.logits).all():
        raise BundleError(
            f"{source} gives logits that are not finite numbers; run gptedge verify on it or make it again"
        )
    logprobs = log_softmax(look.logits)
    cut_by = None
    if len(shown) < len(ids):
        is_context = subject.context_length <= max_tokens
        cut_by = f"the model's context holds {len(shown):,}" if is_context else "more with --max-tokens"
    return Explanation(
        source=str(source),
        kind=subject.kind,
        tokens=[_token(subject.tokenizer, i, shown, logprobs, top) for i in range(len(shown))],
        next=_guesses(subject.tokenizer, logprobs[-1], top),
        text_tokens=len(ids),
        cut_by=cut_by,
        attention=look.attention,
        attention_note=look.note,
    )


def _open(source: Path, threads: int | None) -> Subject:
    if (source / GRAPH).is_file():
        from gptedge.evaluate import explain_bundle

        return explain_bundle.open_subject(source, threads)
    from gptedge.evaluate import explain_checkpoint

    return explain_checkpoint.open_subject(source, threads)


def check_number(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"--{option} is {value}; it must be from {low} to {high:,}")


def too_many_weights(n_layer: int, n_head: int, n_tokens: int) -> str | None:
    """A line where the maps of so many tokens would not fit MAP_LIMIT, with how many do."""
    if n_layer * n_head * n_tokens**2 <= MAP_LIMIT:
        return None
    fits = math.isqrt(MAP_LIMIT // (n_layer * n_head))
    return f"attention maps of {n_tokens:,} tokens would take too much memory; up to --max-tokens {fits:,} they fit"


def _token(tokenizer: Tokenizer, i: int, ids: Sequence[int], logprobs: Floats, top: int) -> Token:
    plain = Token(i, ids[i], token_text(tokenizer, ids[i]), _bytes(tokenizer, ids[i]).hex())
    if i == 0:
        return plain
    before = logprobs[i - 1].astype(np.float64)
    own = float(before[ids[i]])
    return Token(
        *(plain.place, plain.id, plain.text, plain.bytes),
        probability=math.exp(own),
        surprise_bits=max(0.0, -own / math.log(2)),
        rank=1 + int((before > own).sum()),
        entropy_bits=float(-(np.exp(before) * before).sum() / math.log(2)),
        alternatives=_guesses(tokenizer, logprobs[i - 1], top),
    )


def _guesses(tokenizer: Tokenizer, logprobs: Floats, top: int) -> tuple[Guess, ...]:
    best = np.argsort(-logprobs, kind="stable")[:top].tolist()
    return tuple(Guess(i, token_text(tokenizer, i), math.exp(logprobs[i])) for i in best)


# ---- tokens as they are shown --------------------------------------------------------------------------------------


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself: its text, or ⟨E6 BC⟩ for bytes that are not whole characters, or [id] for an unknown id."""
    if token_id in tokenizer.special_ids:
        return visible(tokenizer.id_to_token(token_id) or "")
    if tokenizer.id_to_token(token_id) is None:
        return f"[{token_id}]"
    data = _bytes(tokenizer, token_id)
    try:
        return visible(data.decode("utf-8"))
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    return b"" if tokenizer.id_to_token(token_id) is None else tokenizer.token_bytes(token_id)


# ---- attention in a few numbers ------------------------------------------------------------------------------------


def gaze(attention: Floats) -> list[list[dict[str, float]]]:
    """For each layer and head: the mean weight on a token itself, the one before, the first; and the mean distance.

    Rows that have the choice of at least three tokens count; all of them where there are fewer.
    """
    rows = attention[:, :, min(2, attention.shape[2] - 1) :]  # [L, H, R, T]
    places = np.arange(attention.shape[2] - rows.shape[2], attention.shape[2])
    at = np.arange(len(places))
    found = {
        "itself": rows[:, :, at, places],
        "previous": rows[:, :, at, np.maximum(places - 1, 0)],
        "first": rows[:, :, :, 0],
        "distance": (rows * np.abs(places[:, None] - np.arange(rows.shape[3]))).sum(-1),
    }
    means = {name: value.mean(-1) for name, value in found.items()}  # [L, H]
    layers, heads = attention.shape[:2]
    return [[{n: round(float(m[i, h]), 4) for n, m in means.items()} for h in range(heads)] for i in range(layers)]
