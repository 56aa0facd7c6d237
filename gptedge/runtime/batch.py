"""Several texts generated at once: each prompt is read by itself, then all take their next tokens in one run.

    row 0  ▓▓▓▓▓▓▓▓▓░░░   rows have lengths of their own; the mask tells them to the graph, whose attention and
    row 1  ▓▓▓▓░░░░░░░░   rotations follow it. A text that has ended leaves: the next prompt, or else the last row,
    row 2  ▓▓▓▓▓▓░░░░░░   takes its place, so that nothing is computed for nobody.

A row's tokens are those it would have alone, as far as the kernels' sums do not depend on the number of rows. With
float32 weights they hardly do; products with quantized weights may round otherwise for one row than for several.
Caches that grow, or lie on another device, have no rows to share; there the texts are generated one after another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.config import SamplingParams
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.context import Window
from gptedge.runtime.generate import Chunk, Clock, FinishReason, Result, Usage, Writer, chunks, constraint_of, join
from gptedge.runtime.kv_cache import KVCache, room_for
from gptedge.runtime.sampling import Logits, Sampler, logprob_of
from gptedge.runtime.session import RERUN, Session
from gptedge.tokenizer import Tokenizer

BATCH_SIZE = 8
"""Texts at once unless told otherwise: decoding is bound by reading the weights until about here."""


def generate_batch(
    session: Session,
    tokenizer: Tokenizer,
    windows: Sequence[Window],
    params: SamplingParams,
    batch_size: int,
    adapter: Adapter | None = None,
    cancelled: threading.Event | None = None,
) -> list[Result]:
    """Replies to the prompts in `windows`, in their order. A seed is each text's own, as if it were alone.

    Once `cancelled` is set, all that have not ended end as they are.
    """
    cancelled = cancelled or threading.Event()
    layout = session.signature.cache
    if not layout.shared or layout.device != "cpu" or len(windows) == 1:
        return [_alone(session, tokenizer, window, params, adapter, cancelled) for window in windows]
    texts = [_Text(session, tokenizer, window, params, cancelled) for window in windows]
    rows = Rows(session, min(batch_size, len(texts)), adapter)
    waiting, live = deque(texts), list[_Text]()
    while waiting or live:
        while waiting and len(live) < rows.size:
            if (text := waiting.popleft()).begin(rows, len(live)):
                live.append(text)
        if live:
            logits = rows.run([text.generated[-1] for text in live])
            live = _still_live(live, logits, rows)
    return [text.result() for text in texts]


def _alone(
    session: Session,
    tokenizer: Tokenizer,
    window: Window,
    params: SamplingParams,
    adapter: Adapter | None,
    cancelled: threading.Event,
) -> Result:
    return join(list(chunks(session, tokenizer, session.new_cache(adapter), window, params, cancelled)))


def _still_live(live: list[_Text], logits: Logits, rows: Rows) -> list[_Text]:
    """Give each text its row of logits; the last ones take the places of those that end."""
    for text, row in zip(live, logits, strict=True):
        text.take(row)
    place = 0
    while place < len(live):
        if not live[place].reason:
            place += 1
            continue
        last = live.pop()
        if place < len(live):
            live[place] = last
            rows.move(len(live), place)
            last.row = place
    return live


class _Text:
    """One text of a batch."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        window: Window,
        params: SamplingParams,
        cancelled: threading.Event,
    ) -> None:
        self._session, self._window, self._params, self._cancelled = session, window, params, cancelled
        constraint = constraint_of(params, tokenizer, session.bundle.eos_ids)
        self._sampler = Sampler(params, window.ids, session.vocab_size, constraint)
        self._writer = Writer(tokenizer, params, session.bundle.eos_ids, constraint)
        self._chunks: list[Chunk] = []
        self._room = 0
        self._rows: Rows
        self.row = 0
        self.generated: list[int] = []
        self.reason: FinishReason | None = None

    def begin(self, rows: Rows, row: int) -> bool:
        """Read the prompt into a row, and take the first token; whether more are to come."""
        self._rows, self.row = rows, row
        self._clock = Clock(len(self._window.ids), cached_tokens=0)
        rows.caches[row].truncate(0)
        if self._params.max_tokens:
            self._read()
        else:
            self._end("length")
        return self.reason is None

    def _read(self) -> None:
        ids, cache = self._window.ids, self._rows.reserve(self.row, len(self._window.ids))
        left = ids[cache.keep_common_prefix(ids[:-RERUN]) :]
        logits = None if self._cancelled.is_set() else self._session.prefill(left, cache, stop=self._cancelled)
        self._room = self._window.room
        if logits is None:
            self._end("cancelled")
        else:
            self.take(logits)

    def take(self, logits: Logits) -> None:
        """Choose the next token, and end where nothing may follow it."""
        token, n_top = self._sampler.choose(logits), self._params.logprobs
        self._clock.tick()
        self._chunks.append(self._writer.write(token, None if n_top is None else logprob_of(logits, token, n_top)))
        self.generated.append(token)
        self._room -= 1
        if self._writer.stopped:
            self._end("stop")
        elif self._cancelled.is_set():
            self._end("cancelled")
        elif len(self.generated) == self._params.max_tokens:
            self._end("length")
        elif not self._room:
            if self._window.shift(self.generated):
                self._read()
            else:
                self._end("length")

    def _end(self, reason: FinishReason) -> None:
        self.reason = reason
        usage = Usage(self._clock.prompt_tokens, len(self.generated), self._window.dropped)
        self._chunks.append(self._writer.end(reason, usage, self._clock.timings()))

    def result(self) -> Result:
        return join(self._chunks)


class Rows:
    """KV caches that lie side by side: tensors [size, n_kv_head, capacity, head_dim], of which each row is a cache."""

    def __init__(self, session: Session, size: int, adapter: Adapter | None = None) -> None:
        self._session, self.size = session, size
        self.caches = [session.new_cache(adapter) for _ in range(size)]
        self._capacity = 0
        self._arrays: list[npt.NDArray[Any]] = []
        self._first, self._n_first = session.new_cache(adapter), 0

    def reserve(self, row: int, n_tokens: int) -> KVCache:
        """A row's cache, with room for `n_tokens`."""
        if n_tokens > self._capacity:
            self._grow(room_for(n_tokens, self._session.context_length))
        return self.caches[row]

    def _grow(self, capacity: int) -> None:
        layout, old = self._session.signature.cache, self._arrays
        self._arrays = []
        for i, (heads, width) in enumerate(layout.shapes):
            # Zeros are mapped lazily: room that is never used costs no memory.
            fresh = np.zeros((self.size, heads, capacity, width), layout.dtype)
            for row, cache in enumerate(self.caches if old else ()):
                fresh[row, :, : len(cache)] = old[i][row, :, : len(cache)]
            self._arrays.append(fresh)
        self._capacity, self._n_first = capacity, 0
        for row, cache in enumerate(self.caches):
            cache.write_to([array[row : row + 1] for array in self._arrays])

    def move(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`."""
        n = len(self.caches[source])
        for array in self._arrays:
            array[target, :, :n] = array[source, :, :n]
        self.caches[target].ids = self.caches[source].ids
        self.caches[source].ids = []

    def run(self, ids: Sequence[int]) -> Logits:
        """Append a token to each of the first rows. Logits float32 [len(ids), vocab_size]."""
        n = len(ids)
        self.reserve(0, 1 + max(map(len, self.caches[:n])))
        if n != self._n_first:
            self._first.write_to([array[:n] for array in self._arrays])
            self._n_first = n
        logits = self._session.run_rows(ids, [len(cache) for cache in self.caches[:n]], self._first)
        for cache, token in zip(self.caches, ids, strict=False):
            cache.ids.append(token)
        return logits
