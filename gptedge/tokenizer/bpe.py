"""The BPE model: a word in, token ids out.

Does: merges in rank order (leftmost first among equals), unknown tokens with fusing, byte fallback, prefix and suffix
of subwords, `ignore_merges`, and a bounded cache of words.
Does not: dropout, which is for training models; a file that asks for it is refused.

A word of up to 100 symbols is merged by scanning for its lowest rank, a longer one with a heap over a linked list, so
that a megabyte without a space costs n log n.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import pairwise
from operator import add
from typing import Any

from gptedge.errors import TokenizerError
from gptedge.tokenizer.fields import Block, field, unsupported
from gptedge.tokenizer.pretokenize import bytes_as_characters

_WHERE = "model BPE"
_SCAN_SYMBOLS = 100  # a scan and a heap cost the same at about this length
_CACHE_WORDS = 100_000
_CACHE_CHARACTERS = 128
_NEVER = 1 << 62  # the rank of a pair that is never merged
_GONE = -1  # the id of a symbol that was merged into the one before it

Vocab = dict[str, int]
Ranks = dict[tuple[int, int], int]


class BPE(dict[str, Sequence[int]]):
    """A mapping from words to ids that computes what it lacks: `ids += bpe[word]` is one lookup for a known word.

    `banned` ids are never produced, except the unknown token's and those of byte fallback.
    """

    def __init__(self, block: Block, *, byte_level: bool, banned: Collection[int] = ()) -> None:
        self._block = block
        self.vocab = read_vocab(block)
        self._byte_level = byte_level
        self._banned = frozenset(banned)
        self._ignore_merges = field(block, "ignore_merges", bool, _WHERE, False)
        self._byte_fallback = field(block, "byte_fallback", bool, _WHERE, False)
        self._fuse_unk = field(block, "fuse_unk", bool, _WHERE, False)
        self._unk_token = field(block, "unk_token", str, _WHERE, None)
        self._prefix = field(block, "continuing_subword_prefix", str, _WHERE, "")
        self._suffix = field(block, "end_of_word_suffix", str, _WHERE, "")
        if block.get("dropout"):
            raise TokenizerError(f"{_WHERE}: 'dropout' is {block['dropout']!r}, and only null is supported")
        self._lefts, self._rights, self._merged = read_merges(block, self.vocab, len(self._prefix))

    def __missing__(self, word: str) -> Sequence[int]:
        ids = self._encode(bytes_as_characters(word) if self._byte_level else word)
        if len(word) <= _CACHE_CHARACTERS:
            if len(self) >= _CACHE_WORDS:
                self.clear()
            self[word] = ids
        return ids

    @cached_property
    def _ranks(self) -> Ranks:
        """Pair of ids → rank, the last one for a pair listed twice. Made at the first word: a third of loading time."""
        ranks = dict(zip(zip(self._lefts, self._rights, strict=True), range(len(self._merged)), strict=True))
        if not self._banned:
            return ranks
        return {pair: rank for pair, rank in ranks.items() if self._merged[rank] not in self._banned}

    def avoiding(self, ids: Collection[int]) -> BPE:
        """A model that produces none of `ids` from text: this one, where it cannot produce them anyway."""
        reachable = set(self._merged)
        whole_words = self._ignore_merges or self._prefix or self._suffix
        reachable |= {i for token, i in self.vocab.items() if len(token) == 1 or whole_words}
        if reachable.isdisjoint(ids):
            return self
        return BPE(self._block, byte_level=self._byte_level, banned=ids)

    def _encode(self, text: str) -> Sequence[int]:
        if self._ignore_merges and (whole := self._id(text)) is not None:
            return (whole,)
        ids = self._symbols(text)
        merge = _merge_by_scan if len(ids) <= _SCAN_SYMBOLS else _merge_by_heap
        return tuple(merge(ids, self._ranks, self._merged))

    def _id(self, token: str) -> int | None:
        found = self.vocab.get(token)
        return None if found in self._banned else found

    def _symbols(self, text: str) -> list[int]:
        """One id per character, or per byte where the vocabulary lacks the character."""
        if not (self._prefix or self._suffix or self._banned):
            try:
                return list(map(self.vocab.__getitem__, text))
            except KeyError:
                pass
        return self._symbols_with_unknown(text)

    def _symbols_with_unknown(self, text: str) -> list[int]:
        """As Hugging Face does it, down to an unknown token that waits while byte fallback goes past it."""
        ids: list[int] = []
        unknown: int | None = None
        for symbol in self._decorated(text):
            if (found := self._id(symbol)) is not None:
                ids += [found] if unknown is None else [unknown, found]
                unknown = None
            elif (fallback := self._fallback(symbol)) is not None:
                ids += fallback
            elif self._unk_token is not None:
                if unknown is not None and not self._fuse_unk:
                    ids.append(unknown)
                unknown = self._unknown_id()
        return ids if unknown is None else [*ids, unknown]

    def _decorated(self, text: str) -> list[str]:
        symbols = [text[:1], *(self._prefix + c for c in text[1:])]
        symbols[-1] += self._suffix
        return symbols

    def _fallback(self, symbol: str) -> list[int] | None:
        if not self._byte_fallback:
            return None
        ids = [self.vocab.get(f"<0x{b:02X}>") for b in symbol.encode()]
        return None if None in ids else [i for i in ids if i is not None]

    def _unknown_id(self) -> int:
        if self._unk_token not in self.vocab:
            raise TokenizerError(f"{_WHERE}: unk_token {self._unk_token!r} is not in the vocabulary")
        return self.vocab[self._unk_token]


def _merge_by_scan(ids: list[int], ranks: Ranks, merged: list[int]) -> list[int]:
    """Merge the leftmost pair of lowest rank until no pair is left to merge."""
    rank_of = ranks.get
    order = [rank_of(pair, _NEVER) for pair in pairwise(ids)]
    while order and (best := min(order)) != _NEVER:
        i = order.index(best)
        ids[i : i + 2] = [merged[best]]
        del order[i]
        if i:
            order[i - 1] = rank_of((ids[i - 1], ids[i]), _NEVER)
        if i < len(order):
            order[i] = rank_of((ids[i], ids[i + 1]), _NEVER)
    return ids


def _merge_by_heap(ids: list[int], ranks: Ranks, merged: list[int]) -> list[int]:
    """The same for long words. A heap entry is rank * n + position, so that integers order it."""
    n = len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [ranks[pair] * n + i for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)

    def push(left: int, right: int) -> None:
        if left >= 0 and right < n and (rank := ranks.get((ids[left], ids[right]))) is not None:
            heapq.heappush(heap, rank * n + left)

    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        j = after[i]
        if ids[i] == _GONE or j == n or not _still_merges(ranks.get((ids[i], ids[j])), rank, merged):
            continue
        ids[i], ids[j] = merged[rank], _GONE
        after[i] = after[j]
        if after[j] < n:
            before[after[j]] = i
        push(before[i], i)
        push(i, after[i])
    return [i for i in ids if i != _GONE]


def _still_merges(now: int | None, then: int, merged: list[int]) -> bool:
    """Whether the pair found at a heap entry's place makes the token that the entry was for."""
    return now is not None and merged[now] == merged[then]


def read_vocab(block: Block) -> Vocab:
    """Token → id. Raises TokenizerError unless every id is a whole number from 0 on."""
    vocab: Vocab = field(block, "vocab", dict, _WHERE)
    if set(map(type, vocab.values())) - {int} or min(vocab.values(), default=0) < 0:
        token, value = next((t, v) for t, v in vocab.items() if type(v) is not int or v < 0)
        raise TokenizerError(f"{_WHERE}: token {token!r} has the id {value!r}, and a whole number from 0 on is needed")
    return vocab


def read_merges(block: Block, vocab: Vocab, skip: int) -> tuple[list[int], list[int], list[int]]:
    """By rank: the ids of the left parts, of the right parts, and of what each merge makes.

    `skip` characters of a right part, the prefix of inner subwords, are left out of what the merge makes.
    """
    merges = field(block, "merges", list, _WHERE)
    if merges and isinstance(merges[0], str):
        merges = _split_merges(merges)
    if set(map(type, merges)) - {list} or set(map(len, merges)) - {2}:
        raise _first_wrong_merge(merges, vocab, skip)
    lefts, rights = zip(*merges, strict=True) if merges else ((), ())
    id_of = vocab.__getitem__
    try:
        tails = [right[skip:] for right in rights] if skip else rights
        return list(map(id_of, lefts)), list(map(id_of, rights)), list(map(id_of, map(add, lefts, tails)))
    except (KeyError, TypeError):
        raise _first_wrong_merge(merges, vocab, skip) from None


def _split_merges(merges: list[Any]) -> list[Any]:
    """Merges as older files hold them, "a b", after a version line that may come first."""
    lines = [m for m in merges if not (isinstance(m, str) and m.startswith("#version"))]
    return [m.split(" ") if isinstance(m, str) else m for m in lines]


def _first_wrong_merge(merges: list[Any], vocab: Vocab, skip: int) -> TokenizerError:
    for i, merge in enumerate(merges):
        if not (isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)):
            return TokenizerError(f"{_WHERE}: merge {i} is {merge!r}, and two tokens are needed")
        unknown = [t for t in (*merge, merge[0] + merge[1][skip:]) if t not in vocab]
        if unknown:
            return TokenizerError(f"{_WHERE}: merge {i} needs {unknown[0]!r}, which is not in the vocabulary")
    return TokenizerError(f"{_WHERE}: 'merges' cannot be read")


def build_model(block: Any, *, byte_level: bool) -> BPE:
    """The model of a tokenizer.json. Raises TokenizerError naming what is not supported."""
    if not isinstance(block, dict):
        raise TokenizerError("'model' is missing or not an object")
    name = field(block, "type", str, "model", "BPE" if "merges" in block else ...)
    if name != "BPE":
        raise unsupported("model", name)
    return BPE(block, byte_level=byte_level)
