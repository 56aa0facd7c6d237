"""Training byte-level BPE: the merges that `tokenizers.trainers.BpeTrainer` learns from the same texts.

Does: the full alphabet of 256 bytes, counts of distinct words, then merges of the most frequent pair; between pairs of
one count, the one with the smaller ids. Counts are updated where a merge changed them; the queue is corrected lazily.
Does not: limit the alphabet, or learn from special tokens' text differently than from any other text.
Unlike that trainer, it takes words longer than 1,024 characters apart, and learns no new words once it knows 32 million
characters of them: a text without spaces, or one of any length, costs bounded memory.

A pair arises only when one of its tokens is made, and a token is made by one merge; so a pair enters the queue once,
with all the words that hold it, and later merges can only lower its count.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

from gptedge.errors import DataError, UsageError
from gptedge.text import check_scalars
from gptedge.tokenizer.patterns import QWEN2_PATTERN
from gptedge.tokenizer.pretokenize import BYTE_TO_CHAR, build_pre_tokenizer
from gptedge.tokenizer.tokenizer import Tokenizer

Pair = tuple[int, int]
Progress = Callable[[int, int], None]
_BYTES = 256
_LONGEST = 1024  # characters of a word
_DISTINCT = 32_000_000  # characters of all distinct words together
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (),
    pattern: str = QWEN2_PATTERN,
    min_frequency: int = 2,
    progress: Progress | None = None,
) -> Tokenizer:
    """Learn a byte-level BPE tokenizer of at most `vocab_size` tokens, special tokens (ids 0, 1, …) and bytes included.

    `texts` are documents: words never span two of them. `pattern` cuts a document into words. Pairs that occur fewer
    than `min_frequency` times are not merged. `progress(done, total)` counts merges. Deterministic.
    Raises UsageError for sizes that cannot hold the alphabet, DataError for a text with a lone surrogate.
    """
    least = _BYTES + len(special_tokens)
    if vocab_size < least:
        raise UsageError(
            f"vocab_size is {vocab_size}, and 256 bytes and {len(special_tokens)} special tokens need {least}"
        )
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise UsageError("special_tokens must be distinct and not empty")
    pre_tokenizer = _pre_tokenizer_block(pattern)
    counts = count_words(texts, pre_tokenizer)
    vocab = {token: i for i, token in enumerate(special_tokens)}
    for character in sorted(BYTE_TO_CHAR.values()):
        vocab.setdefault(character, len(vocab))
    merges = _Merger(counts, vocab, vocab_size, min_frequency).run(progress)
    return Tokenizer.from_dict(_tokenizer_json(vocab, merges, special_tokens, pre_tokenizer))


def count_words(texts: Iterable[str], pre_tokenizer: dict[str, Any]) -> dict[str, int]:
    """How often each word occurs, in order of first occurrence."""
    split = build_pre_tokenizer(pre_tokenizer)
    counts: Counter[str] = Counter()
    room = _DISTINCT
    for i, text in enumerate(texts):
        try:
            check_scalars(text)
        except DataError as e:
            raise DataError(f"text {i}: {e}") from e
        words = _shortened(split(text))
        known = len(counts)
        counts.update(words if room > 0 else filter(counts.__contains__, words))
        room -= sum(map(len, islice(counts, known, None)))
    return counts


def _shortened(words: list[str]) -> list[str]:
    if max(map(len, words), default=0) <= _LONGEST:
        return words
    return [word[i : i + _LONGEST] for word in words for i in range(0, len(word), _LONGEST)]


class _Merger:
    """The state of one training: words as lists of ids, and for each pair its count."""

    def __init__(self, counts: dict[str, int], vocab: dict[str, int], vocab_size: int, min_frequency: int) -> None:
        self._vocab = vocab
        self._tokens = list(vocab)
        self._size = vocab_size
        self._floor = max(min_frequency, 1)
        id_of = [vocab[BYTE_TO_CHAR[b]] for b in range(_BYTES)]
        self._words = [[id_of[b] for b in word.encode()] for word in counts]
        self._counts = list(counts.values())
        self._pair_counts: defaultdict[Pair, int] = defaultdict(int)
        self._queue: list[tuple[int, Pair, list[int]]] = []  # -count, pair, words that hold it

    def run(self, progress: Progress | None = None) -> list[Pair]:
        """Extend the vocabulary; give the merges in order."""
        self._push(self._count_pairs())
        merges: list[Pair] = []
        start = len(self._vocab)
        while len(self._vocab) < self._size and self._queue:
            negative, pair, words = heapq.heappop(self._queue)
            count = self._pair_counts[pair]
            if count != -negative:
                heapq.heappush(self._queue, (-count, pair, words))
                continue
            if count < self._floor:
                break
            merges.append(pair)
            self._push(self._merge(pair, self._token_of(pair), words))
            if progress is not None:
                progress(len(self._vocab) - start, self._size - start)
        return merges

    def _count_pairs(self) -> dict[Pair, list[int]]:
        """Count every pair; give the words that hold it, each once."""
        places: defaultdict[Pair, list[int]] = defaultdict(list)
        for i, (word, count) in enumerate(zip(self._words, self._counts, strict=True)):
            for pair in pairwise(word):
                self._pair_counts[pair] += count
                words = places[pair]
                if not words or words[-1] != i:
                    words.append(i)
        return places

    def _push(self, places: dict[Pair, list[int]]) -> None:
        for pair, words in places.items():
            count = self._pair_counts[pair]
            if count > 0:
                heapq.heappush(self._queue, (-count, pair, words))

    def _token_of(self, pair: Pair) -> int:
        token = self._tokens[pair[0]] + self._tokens[pair[1]]
        token_id = self._vocab.setdefault(token, len(self._vocab))
        if token_id == len(self._tokens):
            self._tokens.append(token)
        return token_id

    def _merge(self, pair: Pair, merged: int, words: list[int]) -> dict[Pair, list[int]]:
        """Merge the pair in `words`; give the words in which each new pair arose."""
        places: defaultdict[Pair, list[int]] = defaultdict(list)
        pair_counts = self._pair_counts
        for i in words:
            count = self._counts[i]
            for changed, sign in _merge_word(self._words[i], pair, merged):
                pair_counts[changed] += sign * count
                if sign > 0:
                    found = places[changed]
                    if not found or found[-1] != i:
                        found.append(i)
        return places


def _merge_word(word: list[int], pair: Pair, merged: int) -> list[tuple[Pair, int]]:
    """Merge every occurrence of the pair in place, from the left; give the neighbours' pairs lost (-1) and won (+1)."""
    left, right = pair
    changes: list[tuple[Pair, int]] = []
    i = 0
    while True:
        try:
            i = word.index(left, i, len(word) - 1)
        except ValueError:
            return changes
        if word[i + 1] != right:
            i += 1
            continue
        word[i : i + 2] = [merged]
        if i:
            changes += [((word[i - 1], left), -1), ((word[i - 1], merged), 1)]
        i += 1
        if i < len(word):
            changes += [((right, word[i]), -1), ((merged, word[i]), 1)]


def _pre_tokenizer_block(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _tokenizer_json(
    vocab: dict[str, int], merges: list[Pair], special_tokens: Sequence[str], pre_tokenizer: dict[str, Any]
) -> dict[str, Any]:
    tokens = list(vocab)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **_FLAGS} for i, token in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _byte_level(use_regex=True) | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[tokens[a], tokens[b]] for a, b in merges],
        },
    }
