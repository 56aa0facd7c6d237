"""Generation in three layers, each a short generator: ids -> chunks of text -> one result.

`steps` sees only ids and logits; `chunks` turns them into whole characters and looks for stop strings; `Stream` is what
callers hold: an iterator that can be cancelled from any thread and ends with a `Result`.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import TracebackType
from typing import Literal

from gptedge.config import SamplingParams
from gptedge.errors import GptEdgeError, UsageError
from gptedge.runtime.context import Window
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.sampling import Constraint, Sampler, TokenLogprob, logprob_of
from gptedge.runtime.session import RERUN, Session
from gptedge.runtime.speculate import PromptLookup
from gptedge.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    dropped_tokens: int = 0
    """Oldest tokens that were left out during this reply because the context was full."""


@dataclass(frozen=True)
class Timings:
    ttft_ms: float
    """To the first token, milliseconds; from when a stream's first chunk is asked for: nothing is run before."""
    prefill_tokens_per_s: float
    """Prompt tokens that had to be run (those already in the KV cache do not count) per second."""
    decode_tokens_per_s: float
    cached_tokens: int = 0
    """Prompt tokens found in the KV cache."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply. The last one has a finish_reason, usage and timings."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


Chunks = Generator[Chunk, None, None]


@dataclass(frozen=True)
class Result:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass
class Clock:
    """Times of one generation, from which Timings are made."""

    prompt_tokens: int
    cached_tokens: int
    start: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    generated: int = 0
    waited: float = 0.0
    """Since the first token, while nobody asked for the next."""

    def tick(self) -> None:
        if not self.generated:
            self.first = time.perf_counter()
        self.generated += 1

    def timings(self) -> Timings:
        now = time.perf_counter()
        first = self.first or now
        prefill, decode = first - self.start, now - first - self.waited
        run = self.prompt_tokens - self.cached_tokens
        return Timings(
            ttft_ms=round(prefill * 1000, 2),
            prefill_tokens_per_s=round(run / prefill, 2) if self.generated and prefill else 0.0,
            decode_tokens_per_s=round((self.generated - 1) / decode, 2) if self.generated > 1 and decode else 0.0,
            cached_tokens=self.cached_tokens,
        )


def steps(
    session: Session,
    cache: KVCache,
    prompt: Sequence[int],
    params: SamplingParams,
    cancelled: threading.Event,
    sampler: Sampler | None = None,
) -> Iterator[tuple[int, TokenLogprob | None]]:
    """Token ids, one by one, until `max_tokens` of them, or cancelled, or the caller stops asking.

    `cache` holds a proper prefix of `prompt`, which is not run again; in the end it holds all but the last token given.
    """
    first = None if cancelled.is_set() else session.prefill(prompt[len(cache) :], cache, stop=cancelled)
    if first is None:
        return
    sampler, lookup = sampler or Sampler(params, prompt, session.vocab_size), PromptLookup(prompt)
    rows, guess, kept, left = iter([first]), list[int](), len(cache), params.max_tokens
    while True:
        right = 0
        try:
            for row, guessed in zip_longest(rows, guess):
                token = sampler.choose(row)
                left -= 1
                yield token, None if params.logprobs is None else logprob_of(row, token, params.logprobs)
                lookup.append(token)
                if token != guessed or not left or cancelled.is_set():
                    break
                right += 1
        finally:
            cache.truncate(kept + right)
        if not left or cancelled.is_set():
            return
        if guess:
            lookup.learn(right)
        kept = len(cache) + 1
        guess = lookup.guess(session.room_to_guess(cache, left))
        rows = session.checked([token, *guess], cache)


class _StopStrings:
    """Passes text through, holding back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._sorted = sorted(stop)
        self._longest = max(map(len, stop), default=1) - 1
        self._held = ""
        self._met = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was met."""
        if not self._stop or self._met:
            return ("" if self._met else text), self._met
        self._held += text
        places = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        self._met = bool(places)
        cut = min(places) if places else len(self._held) - self._overlap()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, self._met

    def finish(self, text: str) -> tuple[str, bool]:
        """What may be shown when no more text comes after `text`, and whether a stop string was met."""
        shown, met = self.feed(text)
        return (shown, met) if met else (shown + self._held, False)

    def _overlap(self) -> int:
        """Length of the longest end of the text held that begins a stop string."""
        longest = min(len(self._held), self._longest)
        return next((n for n in range(longest, 0, -1) if self._begins(self._held[-n:])), 0)

    def _begins(self, text: str) -> bool:
        at = bisect_left(self._sorted, text)  # what begins with it sorts right behind it
        return at < len(self._sorted) and self._sorted[at].startswith(text)


def _steps_within(
    session: Session,
    cache: KVCache,
    window: Window,
    params: SamplingParams,
    cancelled: threading.Event,
    sampler: Sampler,
) -> Iterator[tuple[int, TokenLogprob | None]]:
    """`steps` that go on, where the window can be shifted, when the context is full."""
    generated: list[int] = []
    while params.max_tokens:
        part = replace(params, max_tokens=min(params.max_tokens - len(generated), window.room))
        for token, logprob in steps(session, cache, window.ids, part, cancelled, sampler):
            generated.append(token)
            yield token, logprob
        if len(generated) == params.max_tokens or cancelled.is_set() or not window.shift(generated):
            return
        cache.keep_common_prefix(window.ids[:-RERUN])


def chunks(
    session: Session,
    tokenizer: Tokenizer,
    cache: KVCache,
    window: Window,
    params: SamplingParams,
    cancelled: threading.Event,
) -> Chunks:
    """A reply to the prompt in `window` as text in whole characters; the last chunk says how it ended.

    The cache may hold anything: its longest prefix in common with the prompt is used. The prompt must fit the context.
    """
    clock = Clock(len(window.ids), cached_tokens=cache.keep_common_prefix(window.ids[:-RERUN]))
    constraint = constraint_of(params, tokenizer, session.bundle.eos_ids)
    sampler = Sampler(params, window.ids, session.vocab_size, constraint)
    writer = Writer(tokenizer, params, session.bundle.eos_ids, constraint)
    for token, logprob in _steps_within(session, cache, window, params, cancelled, sampler):
        clock.tick()
        chunk, given = writer.write(token, logprob), time.perf_counter()
        yield chunk
        clock.waited += time.perf_counter() - given
        if writer.stopped:
            break
    was_cut = cancelled.is_set() and clock.generated < params.max_tokens
    usage = Usage(clock.prompt_tokens, clock.generated, window.dropped)
    yield writer.end("cancelled" if was_cut else "length", usage, clock.timings())


def constraint_of(params: SamplingParams, tokenizer: Tokenizer, eos_ids: Collection[int]) -> Constraint | None:
    """What keeps a reply within the schema, where there is one. Raises UsageError for a schema that cannot be used."""
    if params.schema is None:
        return None
    from gptedge.grammar.constraint import TokenConstraint, grammar_of

    return TokenConstraint(grammar_of(params.schema, tokenizer), eos_ids)


class Writer:
    """Turns the tokens of one reply into chunks of text, and notices where it ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        eos_ids: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        self._decoder, self._stops, self._eos_ids = tokenizer.decode_stream(), _StopStrings(params.stop), eos_ids
        self._constraint = constraint
        self.stopped = False
        """The last token ended the text, completed a stop string, or made whole what nothing may follow."""

    def write(self, token: int, logprob: TokenLogprob | None) -> Chunk:
        ends = token in self._eos_ids  # and is no text, even where the tokenizer does not call it special
        text, met = self._stops.feed("" if ends else self._decoder.step(token))
        self.stopped = met or ends or (self._constraint is not None and self._constraint.is_whole)
        return Chunk(text, (token,), None if logprob is None else (logprob,))

    def end(self, reason: FinishReason, usage: Usage, timings: Timings) -> Chunk:
        """The last chunk; `reason` is why it ends where it did not stop by itself."""
        rest, met = self._stops.finish(self._decoder.flush())  # which may be all of a stop string's last character
        self.stopped |= met
        return Chunk(rest, finish_reason="stop" if self.stopped else reason, usage=usage, timings=timings)


class Stream:
    """A reply under way. Iterate over its chunks; `cancel()` from any thread ends it with what has come so far.

    As a context manager it is cancelled on leaving, should it still run, and so is one that nobody holds any more.
    `result` is there once iteration has ended.
    """

    def __init__(
        self,
        make_chunks: Callable[[threading.Event], Chunks],
        on_end: Callable[[Result | None], None],
        *,
        prompt_tokens: int = 0,
    ) -> None:
        """`on_end` is called once what `make_chunks` gave has been read, with the result, or None when nothing came.

        `prompt_tokens` is for the result of a reply that an error ended, and so has no last chunk.
        """
        self._cancelled = threading.Event()
        self._ended: list[Result] = []
        # No method of this object: a stream that is dropped must end at once, not when cycles are collected.
        chunks = _read(make_chunks, self._cancelled, on_end, prompt_tokens, self._ended)
        self._chunks: Iterator[Chunk] = chunks
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._reading:  # one thread may iterate while another closes
            return next(self._chunks)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop after the token, or the piece of 256 tokens of the prompt, that is being computed.

        Does not wait for it; safe from any thread, and more than once. Where nobody is reading, the reply ends here,
        and its last chunk can still be read.
        """
        self._cancelled.set()
        if self._reading.acquire(blocking=False):
            try:
                self._chunks = _drained(self._chunks)
            finally:
                self._reading.release()

    def close(self) -> None:
        """Cancel, and take in what is left, so that `result` is there."""
        self.cancel()
        for _ in self:
            pass

    @property
    def result(self) -> Result:
        if not self._ended:
            raise UsageError("this reply has not ended; iterate to its end, or leave the with block, first")
        return self._ended[0]


def _read(
    make_chunks: Callable[[threading.Event], Chunks],
    cancelled: threading.Event,
    on_end: Callable[[Result | None], None],
    prompt_tokens: int,
    ended: list[Result],
) -> Chunks:
    """What `make_chunks` gives; the result goes into `ended`, however it ends, before the last chunk is given."""
    got: list[Chunk] = []
    parts = make_chunks(cancelled)
    try:
        for chunk in parts:
            got.append(chunk)
            if chunk.finish_reason:
                ended.append(join(got))
            yield chunk
    finally:
        parts.close()
        if got and not ended:
            ended.append(join(got, prompt_tokens))
        on_end(ended[0] if ended else None)


def _drained(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks of a reply that was cancelled, all taken in; what it raises, only its reader meets."""
    got: list[Chunk] = []
    try:
        got.extend(chunks)
    except GptEdgeError as e:
        return _raising(got, e)
    return iter(got)


def _raising(got: list[Chunk], error: GptEdgeError) -> Iterator[Chunk]:
    yield from got
    raise error


def join(parts: Sequence[Chunk], prompt_tokens: int = 0) -> Result:
    """One result of all chunks; without a last one, the reply counts as cancelled."""
    last = parts[-1]
    ids = tuple(i for part in parts for i in part.token_ids)
    logprobs = [lp for part in parts for lp in part.logprobs or ()]
    return Result(
        text="".join(part.text for part in parts),
        token_ids=ids,
        finish_reason=last.finish_reason or "cancelled",
        usage=last.usage or Usage(prompt_tokens, len(ids)),
        timings=last.timings or Timings(0.0, 0.0, 0.0),
        logprobs=tuple(logprobs) or None,
    )
