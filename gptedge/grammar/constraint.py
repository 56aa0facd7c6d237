"""Which tokens may come next, so that a reply stays a text of a language.

Tokens are walked through all at once, byte after byte, from the state that the reply is in: a state is a term, and a
table says which state each byte leads to. Rows of the table are found when they are first needed.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.errors import SchemaError
from gptedge.grammar.json_schema import schema_term
from gptedge.grammar.terms import END, NOTHING, Term, Terms
from gptedge.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
State = int
_DEAD: State = 0
_UNKNOWN = -1
_KEPT_MASKS, _KEPT_GRAMMARS = 512, 8


class Vocabulary:
    """The bytes of a tokenizer's tokens, the longest first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        hidden = tokenizer.special_ids | {tokenizer.unk_id}
        known = (i for i in range(tokenizer.vocab_size) if i not in hidden and tokenizer.id_to_token(i) is not None)
        texts = {i: text for i in known if (text := tokenizer.token_bytes(i))}
        order = sorted(texts, key=lambda i: -len(texts[i]))
        self.ids = np.array(order, np.int64)
        self.bytes_of = texts
        lengths = np.array([len(texts[i]) for i in order], np.int64)
        data, starts = np.frombuffer(b"".join(texts[i] for i in order), np.uint8), np.cumsum(lengths) - lengths
        longer = (int((lengths > at).sum()) for at in range(lengths.max(initial=0)))
        self.columns = [data[starts[:n] + at] for at, n in enumerate(longer)]
        """Of each place in a token, the bytes of those that reach so far."""


class Grammar:
    """A schema's language over one vocabulary. May be shared by threads."""

    def __init__(self, terms: Terms, texts: Term, vocabulary: Vocabulary) -> None:
        """`texts` is the language, one of `terms`."""
        self._terms, self._vocabulary, self._lock = terms, vocabulary, threading.Lock()
        self._states: dict[int, State] = {}
        self._term_of: list[int] = []
        self._table = np.zeros((64, 256), np.int32)
        self._masks: OrderedDict[State, npt.NDArray[np.int64]] = OrderedDict()
        self._state(NOTHING)
        self.start = self._state(texts)

    def _state(self, term: int) -> State:
        if term not in self._states:
            state = self._states[term] = len(self._term_of)
            self._term_of.append(term)
            if state == len(self._table):
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._table[state] = _DEAD if term == NOTHING else _UNKNOWN
        return self._states[term]

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """One thread at a time. A language that became too large for this reply is not kept for another."""
        try:
            with self._lock:
                yield
        except SchemaError:
            _forget(self)
            raise

    def may_end(self, state: State) -> bool:
        return self._terms.may_end(self._term_of[state])

    def is_whole(self, state: State) -> bool:
        """Whether nothing can follow."""
        return self._term_of[state] == END

    def after(self, state: State, token: int) -> State:
        """The state that a token leads to, `_DEAD` where it may not come."""
        text = self._vocabulary.bytes_of.get(token)
        if text is None:
            return _DEAD
        with self._growing():
            for byte in text:
                state = self._step(state, byte)
        return state

    def _step(self, state: State, byte: int) -> State:
        if self._table[state, byte] == _UNKNOWN:
            found = self._state(self._terms.after(self._term_of[state], byte))
            self._table[state, byte] = found  # only now: the table may have grown
        return int(self._table[state, byte])

    def allowed(self, state: State) -> npt.NDArray[np.int64]:
        """Ids of the tokens that may come next, those that end a text aside."""
        with self._growing():
            if state not in self._masks:
                self._masks[state] = self._walk(state)
                if len(self._masks) > _KEPT_MASKS:
                    self._masks.popitem(last=False)
            self._masks.move_to_end(state)
            return self._masks[state]

    def _walk(self, state: State) -> npt.NDArray[np.int64]:
        rows, states = np.arange(len(self._vocabulary.ids)), np.full(len(self._vocabulary.ids), state, np.int32)
        whole = []
        for column in self._vocabulary.columns:
            longer = int(np.searchsorted(rows, len(column)))
            whole.append(rows[longer:])
            rows, states = rows[:longer], self._steps(states[:longer], column[rows[:longer]])
            rows, states = rows[states != _DEAD], states[states != _DEAD]
        return np.sort(self._vocabulary.ids[np.concatenate([*whole, rows])])

    def _steps(self, states: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """The states that bytes lead to, each from its own."""
        following = self._table[states, data]
        unknown = following == _UNKNOWN
        if not unknown.any():
            return following
        for pair in np.unique(states[unknown].astype(np.int64) * 256 + data[unknown]).tolist():
            self._step(*divmod(pair, 256))
        return self._table[states, data]


class TokenConstraint:
    """Keeps one reply within a grammar: `limit` before a token is chosen, `take` after."""

    def __init__(self, grammar: Grammar, eos_ids: Collection[int]) -> None:
        self._grammar, self._eos_ids = grammar, sorted(eos_ids)
        self._state = grammar.start

    @property
    def is_whole(self) -> bool:
        """The text is whole, and nothing may follow."""
        return self._grammar.is_whole(self._state)

    def allows(self, token: int) -> bool:
        if token in self._eos_ids:
            return self._grammar.may_end(self._state)
        return self._grammar.after(self._state, token) != _DEAD

    def limit(self, logits: Logits) -> Logits:
        """Logits [vocab_size] with those of tokens that may not come at minus infinity. Raises SchemaError when the
        vocabulary has none that may."""
        limited = np.full_like(logits, -np.inf)
        allowed = self._grammar.allowed(self._state)
        limited[allowed] = logits[allowed]
        if self._grammar.may_end(self._state):
            limited[self._eos_ids] = logits[self._eos_ids]
        elif not len(allowed):
            raise SchemaError("no token of this model's vocabulary can go on with the reply as the schema asks")
        return limited

    def take(self, token: int) -> None:
        """Go on behind a token that was allowed; one that ends the text leads nowhere."""
        if token not in self._eos_ids:
            self._state = self._grammar.after(self._state, token)


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_grammars: weakref.WeakKeyDictionary[Tokenizer, OrderedDict[str, Grammar]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def grammar_of(schema: Mapping[str, Any] | bool, tokenizer: Tokenizer) -> Grammar:
    """The schema's grammar, of which the last few are kept. Raises SchemaError as `schema_term` does."""
    try:
        key = json.dumps(schema, sort_keys=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise SchemaError(f"schema is not JSON: {e}") from None
    with _making:
        kept = _grammars.setdefault(tokenizer, OrderedDict())
        if key not in kept:
            terms = Terms()
            texts = schema_term(terms, schema)
            if tokenizer not in _vocabularies:
                _vocabularies[tokenizer] = Vocabulary(tokenizer)
            kept[key] = Grammar(terms, texts, _vocabularies[tokenizer])
            if len(kept) > _KEPT_GRAMMARS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def _forget(grammar: Grammar) -> None:
    with _making:
        for kept in _grammars.values():
            for key in [key for key, value in kept.items() if value is grammar]:
                del kept[key]
