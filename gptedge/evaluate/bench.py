"""How fast a bundle runs on this machine, and how near decoding comes to what its memory allows."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptedge.bundle import Bundle
from gptedge.errors import UsageError
from gptedge.measure import peak_rss_mb
from gptedge.runtime.adapter import Adapter
from gptedge.runtime.session import PREFILL_AT_LEAST, Session

PROMPT_TOKENS, NEW_TOKENS = 512, 128
_PROBE_BYTES = 1 << 28  # far more than any cache holds
_WIDENED = {"fp16": 2.0, "int8-weight": 4 / (1 + 2 / 64)}
"""Recipes whose weights become float32 when they are loaded: how many times the file's bytes a step reads."""


@dataclass(frozen=True)
class Bench:
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: float
    load_ms: float
    peak_rss_mb: float
    roofline: dict[str, float]
    """memory_gb_per_s: measured read bandwidth; decode_fraction: of the tokens/s that it allows."""
    threads: int
    provider: str

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def step_bytes(bundle: Bundle) -> float:
    """Of weights that a step reads, all of a table counted."""
    return bundle.size_bytes * _WIDENED.get(bundle.recipe, 1.0)


def bench(
    session: Session,
    *,
    load_ms: float,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    adapter: Adapter | None = None,
) -> Bench:
    """Medians of `repeat` runs of a random prompt and greedy decoding that does not stop early, token by token."""
    if min(prompt_tokens, new_tokens, repeat) < 1:
        raise UsageError("prompt tokens, new tokens and repeats must be at least 1")
    lengths(session.context_length, prompt_tokens, new_tokens)
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, session.vocab_size, prompt_tokens)]
    session.prefill(prompt[: PREFILL_AT_LEAST + 1], session.new_cache(adapter))  # the first run also sets buffers up
    runs = [_run(session, prompt, new_tokens, adapter) for _ in range(repeat)]
    prefill_s, decode_s = (statistics.median(run[i] for run in runs) for i in (0, 1))
    decode = new_tokens / decode_s
    peak = peak_rss_mb()  # before the probe of the memory, which takes some itself
    bandwidth = memory_bandwidth(session.threads)
    kv_bytes = session.new_cache().bytes_per_token * (prompt_tokens + new_tokens / 2)
    return Bench(
        prefill_tokens_per_s=round(prompt_tokens / prefill_s, 2),
        decode_tokens_per_s=round(decode, 2),
        ttft_ms=round(prefill_s * 1000, 2),
        load_ms=load_ms,
        peak_rss_mb=peak,
        roofline={
            "memory_gb_per_s": round(bandwidth / 1e9, 2),
            "decode_fraction": round(decode * (step_bytes(session.bundle) + kv_bytes) / bandwidth, 4),
        },
        threads=session.threads,
        provider=session.provider,
    )


def lengths(
    context: int, prompt_tokens: int | None, new_tokens: int | None, *, least_steps: int = 0
) -> tuple[int, int]:
    """Tokens of the prompt and after it: those given, or else the usual ones, fewer where the context is short.

    Raises UsageError where those given, and at least `least_steps`, do not fit the context.
    """
    new = min(NEW_TOKENS, context // 2) if new_tokens is None else new_tokens
    steps = max(new, least_steps)
    prompt = max(1, min(PROMPT_TOKENS, context - steps)) if prompt_tokens is None else prompt_tokens
    if prompt + steps > context:
        raise UsageError(
            f"a prompt of {prompt} tokens and {steps} steps after it do not fit the model's context of {context}; "
            "lower --prompt-tokens or --new-tokens"
        )
    return prompt, new


def decode_speed(session: Session, *, prompt_tokens: int = 32, new_tokens: int = 48) -> float:
    """Greedy tokens per second after a short prompt, the better of two runs."""
    room = session.context_length - 1
    prompt = [i % session.vocab_size for i in range(min(prompt_tokens, room // 2))]
    count = min(new_tokens, room - len(prompt))
    return round(count / min(_run(session, prompt, count)[1] for _ in range(2)), 2)


def _run(session: Session, prompt: list[int], new_tokens: int, adapter: Adapter | None = None) -> tuple[float, float]:
    """Seconds to the first token, and for `new_tokens` steps after it."""
    cache = session.new_cache(adapter)
    start = time.perf_counter()
    logits = session.prefill(prompt, cache, stop=threading.Event())
    assert logits is not None
    first = time.perf_counter()
    for _ in range(new_tokens):
        logits = session.run([int(logits.argmax())], cache)[0]
    return first - start, time.perf_counter() - first


def memory_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` cores read together, best of five passes over a buffer larger than any cache."""
    buffer = np.ones(_PROBE_BYTES // 4, np.float32)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            return time.perf_counter() - start

        return _PROBE_BYTES / min(once() for _ in range(5))
