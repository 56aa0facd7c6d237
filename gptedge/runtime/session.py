"""A loaded bundle: one onnxruntime session whose weights every conversation shares.

`run` takes token ids and a KVCache and gives logits. It knows nothing of text, sampling or chats. Thread-safe: one lock
lets one conversation compute at a time, in the order of asking, so that several of them take turns: a token, or a piece
of 256 tokens of a prompt.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.bundle import GRAPH, PREFILL, PREFILL_DATA, Bundle, signed, verify
from gptedge.errors import BundleError, ContextOverflowError, UsageError
from gptedge.graph_io import (
    ATTENTION_MASK,
    END_LOGIT,
    FIRST_LOGIT,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    past_names,
    present_names,
)
from gptedge.measure import give_back_freed
from gptedge.runtime.adapter import Adapter, read_adapter
from gptedge.runtime.fair_lock import FairLock
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.onnx_runtime import (
    PROVIDERS,
    choose_provider,
    device_of,
    import_onnxruntime,
    multiplies_signed_bytes,
    open_graph,
    session_options,
)
from gptedge.runtime.signature import read_signature, shares_buffer
from gptedge.runtime.threads import checked_threads, default_threads

PREFILL_CHUNK = 256
"""Tokens run at once while reading a prompt, or fewer; bounds the memory that attention takes."""
_LEAST_CHUNK = 32
_MOST_SCORES = 1 << 24
"""Of attention's scores, [n_head, tokens run at once, tokens so far] in float32, above `_LEAST_CHUNK`: 67 MB."""
PREFILL_AT_LEAST = 64
"""Tokens before a prompt's last from which on the graph for prompts reads them; fewer would not repay loading it."""
RERUN = 2
"""A prompt's last tokens, which are run each time, by the bundle's own graph: the very last one's logits are not kept,
and kernels give other last bits for one row than for several, so that the same prompt would go on in other words once
it is in the cache."""
_PREFILL_FILES = (PREFILL, PREFILL_DATA)
_VERIFY_FIRST = 10_000_000  # bytes; smaller files are checked before onnxruntime reads them, larger ones meanwhile

Logits = npt.NDArray[np.float32]


class Session:
    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        provider: str | None = None,
        check: bool = True,
        speculate: bool = True,
        long_prompts: bool = False,
    ) -> None:
        """Load the graph. `check` compares every file that is used with the manifest's sha256, beside the loading.

        provider: cpu or cuda; None is CUDA where it works, else the CPU. `self.provider` says which it became.
        speculate: check guessed tokens several at once (see speculate.py); without, the same tokens take longer.
        long_prompts: open the graph for prompts at once, in a thread; otherwise the first long prompt opens it.
        """
        self.threads = default_threads() if threads is None else checked_threads(threads)
        self._ort = import_onnxruntime()
        self.bundle = bundle
        self.speculates = speculate
        """Whether guesses are checked several at once."""
        self._rows_agree = False
        self._run_options = self._ort.RunOptions()
        self.lock = FairLock()
        """Held while the graph runs."""
        _LOCKS.add(self.lock)
        self._unverified = _verify_small_files(bundle) if check else {}
        self._ahead: Future[Any] | None = None
        if long_prompts and choose_provider(provider, self._ort.get_available_providers()) == PROVIDERS["cpu"]:
            self._ahead = self._open_ahead()
        self._session, self.provider = self._open(GRAPH, provider)
        self._describe()

    def _open(self, graph: str, provider: str | None, profile: Path | None = None) -> tuple[Any, str]:
        """Open a graph, and meanwhile verify what it loads."""
        options = session_options(self._ort, self.threads)
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        names = self._unverified.get(graph)
        with ThreadPoolExecutor(1, "gptedge-verify") as pool:
            checked = pool.submit(verify, self.bundle, names=names) if names else None
            opened = open_graph(self._ort, self._fit(graph, provider), options, provider)
            if checked:
                checked.result()
        self._unverified.pop(graph, None)
        return opened

    def _fit(self, graph: str, provider: str | None) -> Path:
        """The file of a graph that suits the processor; both of them compute the same numbers."""
        twin = self.bundle.path / signed(graph)
        on_cpu = choose_provider(provider, self._ort.get_available_providers()) == PROVIDERS["cpu"]
        return twin if on_cpu and twin.exists() and multiplies_signed_bytes() else self.bundle.path / graph

    def _open_ahead(self) -> Future[Any] | None:
        """Begin to open the graph for prompts, where the bundle has one."""
        if not (self.bundle.path / PREFILL).exists() or not shares_buffer(self.bundle):
            return None
        pool = ThreadPoolExecutor(1, "gptedge-prompts")
        ahead = pool.submit(self._open, PREFILL, "cpu")
        pool.shutdown(wait=False)
        return ahead

    @contextmanager
    def profiled(self, prefix: Path) -> Iterator[Callable[[], str]]:
        """Runs are recorded meanwhile; what is given ends that, and gives the path of onnxruntime's JSON profile."""
        plain = self._session
        name = next(name for name, full in PROVIDERS.items() if full == self.provider)
        self._session, _ = self._open(GRAPH, name, prefix)
        try:
            yield self._session.end_profiling
        finally:
            self._session = plain

    @cached_property
    def _prompt_graph(self) -> Any:
        """The session of the bundle's graph for prompts, opened when the first long prompt comes, or before; or None.

        It is written for the CPU's integer products, and its cache must be one that it can append to.
        """
        suits = self.provider == PROVIDERS["cpu"] and self.signature.cache.shared
        if not suits or not (self.bundle.path / PREFILL).exists():
            return None
        return (self._ahead.result() if self._ahead else self._open(PREFILL, "cpu"))[0]

    def _describe(self) -> None:
        """What the graph's inputs say of the model, and where its outputs go: logits to the CPU, the cache stays."""
        kind = device_of(self.provider)
        signature = read_signature(self.bundle, self._session, kind)
        self.signature = signature
        self.n_layer, self.vocab_size = signature.n_layer, signature.vocab_size
        self.context_length = signature.context_length
        self._past_names, self._output_names = past_names(self.n_layer), [LOGITS, *present_names(self.n_layer)]
        cpu, own = (self._ort.OrtDevice.make(place, 0)._get_c_device() for place in ("cpu", kind))
        self._devices = [cpu, *[own] * (2 * self.n_layer)]

    def new_cache(self, adapter: Adapter | None = None) -> KVCache:
        """An empty cache, for one conversation, whose tokens are run with `adapter`."""
        return KVCache(self._ort, self.signature.cache, adapter)

    def load_adapter(self, path: Path) -> Adapter:
        """Read a LoRA adapter for this bundle; `KVCache.use` puts it to use. Raises UsageError or BundleError."""
        device = device_of(self.provider)
        return read_adapter(self._ort, path, self.bundle, self._session.get_overridable_initializers(), device)

    def prefill(self, ids: Sequence[int], cache: KVCache, *, stop: threading.Event | None = None) -> Logits | None:
        """Run a prompt in chunks. The last token's logits, float32 [vocab_size]; None when `stop` was set meanwhile.

        A long one goes through the graph for prompts, where the bundle has it, up to its last tokens. That graph takes
        no adapters.
        """
        with self.lock:
            graph = self._prompt_graph if len(ids) > PREFILL_AT_LEAST and not cache.adapter else None
        read, last = (ids, []) if graph is None else (ids[:-RERUN], [ids[-RERUN:]])
        logits, parts = None, [*_pieces(read, len(cache), self.signature.n_head), *last]
        cache.reserve(min(len(cache) + len(ids), self.context_length), self.context_length)  # once, not for each piece
        for part in parts:
            if stop is not None and stop.is_set():
                return None
            if graph is not None and part is not parts[-1]:
                self._append(graph, part, cache)
            else:
                logits = self.run(part, cache)[-1]
        return logits

    def run(self, ids: Sequence[int], cache: KVCache, *, every_row: bool = False) -> Logits:
        """Append `ids` to `cache`. Logits of the last, float32 [1, vocab_size], or of every one, [T, vocab_size]."""
        return self._rows(ids, cache, 0 if every_row else len(ids) - 1, len(ids))

    def _rows(self, ids: Sequence[int], cache: KVCache, first: int, end: int) -> Logits:
        """Append `ids` to `cache`; logits of those from `first` up to `end`."""
        with self.lock:
            feeds = self._feeds(ids, cache)
            picks = self.signature.picks_rows
            if picks:
                feeds |= {FIRST_LOGIT: np.array([first]), END_LOGIT: np.array([end])}
            shape = (1, end - first if picks else len(ids), self.vocab_size)
            logits = self._call(self._session, feeds, cache, np.empty(shape, self.signature.logits_dtype))[0]
            cache.ids.extend(int(i) for i in ids)
        return np.asarray(logits if picks else logits[first:end], np.float32)

    def run_rows(self, ids: Sequence[int], lengths: Sequence[int], rows: KVCache) -> Logits:
        """Append a token to each of several texts, whose buffers lie side by side in `rows` and hold `lengths` tokens.

        Logits float32 [len(ids), vocab_size]. `rows` must be of the shared kind, with room for a token more.
        """
        feeds = {
            INPUT_IDS: np.asarray(ids, np.int64)[:, None],
            ATTENTION_MASK: (np.arange(max(lengths) + 1) <= np.asarray(lengths)[:, None]).astype(np.int64),
        }
        if self.signature.takes_positions:
            feeds[POSITION_IDS] = np.asarray(lengths, np.int64)[:, None]
        with self.lock:
            made = np.empty((len(ids), 1, self.vocab_size), self.signature.logits_dtype)
            logits = self._call(self._session, feeds, rows, made)
        return np.asarray(logits[:, 0], np.float32)

    def room_to_guess(self, cache: KVCache, left: int) -> int:
        """Tokens that may be guessed behind the next one when `left` more are wanted.

        None where taking wrong ones back would copy the cache. One token's room is kept for a second row.
        """
        return min(left - 1, self.context_length - len(cache) - 2) if self.signature.cache.shared else 0

    def checked(self, ids: Sequence[int], cache: KVCache) -> Iterator[Logits]:
        """Logits [vocab_size] after each of `ids`: the next token, and guesses of what follows it, which may be wrong.

        All at once, or one by one where the session does not speculate. The numbers are the same: kernels give other
        last bits for one row than for several, however many those are, so a token is never run alone where guesses are.
        """
        if len(ids) == 1:
            return iter(self.run(ids, cache))
        if not self.speculates:
            return self._one_by_one(ids, cache)
        return iter(self.run(ids, cache, every_row=True)) if self._rows_agree else self._first_checked(ids, cache)

    def _one_by_one(self, ids: Sequence[int], cache: KVCache) -> Iterator[Logits]:
        for token in ids:
            logits = self._rows([token, token], cache, 0, 2)[0]
            cache.truncate(len(cache) - 1)
            yield logits

    def _first_checked(self, ids: Sequence[int], cache: KVCache) -> Iterator[Logits]:
        """`checked`, and whether the kernels here keep what it promises: by the first two rows, run alone as well."""
        two = self.run(ids[:2], cache, every_row=True)
        cache.truncate(len(cache) - 2)
        rows = self.run(ids, cache, every_row=True)
        self._rows_agree = self.speculates = np.array_equal(rows[:2], two)
        if self._rows_agree:
            return iter(rows)
        cache.truncate(len(cache) - len(ids))
        return self._one_by_one(ids, cache)

    def _append(self, graph: Any, ids: Sequence[int], cache: KVCache) -> None:
        """Append `ids` to `cache` by a graph that gives no logits."""
        with self.lock:
            self._call(graph, self._feeds(ids, cache), cache)
            cache.ids.extend(int(i) for i in ids)

    def _feeds(self, ids: Sequence[int], cache: KVCache) -> dict[str, npt.NDArray[Any]]:
        """Inputs of a run that appends `ids` to `cache`, which is made ready for it."""
        if not len(ids):
            raise UsageError("there are no tokens to run")
        past, total = len(cache), len(cache) + len(ids)
        if total > self.context_length:
            raise ContextOverflowError(f"{total} tokens do not fit the model's context of {self.context_length}")
        cache.reserve(total, self.context_length)
        feeds = {INPUT_IDS: np.asarray([ids], np.int64), ATTENTION_MASK: np.ones((1, total), np.int64)}
        if self.signature.takes_positions:
            feeds[POSITION_IDS] = np.arange(past, total, dtype=np.int64)[None]
        return feeds

    def _call(
        self, graph: Any, feeds: dict[str, npt.NDArray[Any]], cache: KVCache, *logits: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """One run of a session, which fills `logits` where it has that output, and gives them.

        A shared cache is bound as input and output, a growing one takes what comes. io_binding would do, but refuses
        optional inputs.
        """
        state, cpu = self._ort.capi._pybind_state, self._devices[0]
        value = state.OrtValue.ortvalue_from_numpy  # without its wrapper: a tenth off a step of a small model
        # Arrays must outlive the call: these do not hold them.
        held, made = [value(a, cpu) for a in feeds.values()], [value(a, cpu) for a in logits]
        inputs, outputs = state.OrtValueVector(), state.OrtValueVector()
        names, given = (cache.adapter.names, cache.adapter.values) if cache.adapter else ((), ())
        buffers = [b._ortvalue for b in cache.buffers]
        for v in (*held, *buffers, *(g._ortvalue for g in given)):
            inputs.push_back(v)
        shared = self.signature.cache.shared
        for v in (*made, *buffers) if shared else ():
            outputs.push_back(v)  # onnxruntime makes what is not given here
        names = (*feeds, *self._past_names, *names)
        skipped = 1 - len(logits)
        graph._sess.run_with_ortvaluevector(
            self._run_options, names, inputs, self._output_names[skipped:], outputs, self._devices[skipped:]
        )
        if shared:
            return logits[0] if logits else np.empty(0)
        rows, *presents = (self._ort.OrtValue(v) for v in outputs)
        cache.take(presents)
        return rows.numpy()

    def close(self) -> None:
        """Give the weights' memory back. Later runs raise BundleError."""
        with self.lock:
            self._session = _Closed()
            self.__dict__["_prompt_graph"] = self._ahead = None
        give_back_freed()


_LAST_RUN_S = 10
"""Seconds that the end of the process waits for a run; a lock that an interrupt left behind never comes free."""
_LOCKS, _PROCESS = weakref.WeakSet[FairLock](), os.getpid()


@atexit.register
def _let_runs_end() -> None:
    """No session computes from now on. A thread that dies within onnxruntime, as daemons do when the interpreter ends,
    would abort the process."""
    if os.getpid() == _PROCESS:  # in a fork, who held a lock is gone
        for lock in list(_LOCKS):
            lock.acquire(_LAST_RUN_S)


class _Closed:
    """Stands where a closed session was."""

    def __getattr__(self, name: str) -> Any:
        raise BundleError("this model has been closed; load it again")


def _pieces(ids: Sequence[int], past: int, n_head: int) -> list[Sequence[int]]:
    """A prompt behind `past` tokens, cut into what is run at once."""
    pieces, start = [], 0
    while start < len(ids):
        fitting = _MOST_SCORES // (n_head * (past + start + PREFILL_CHUNK))
        size = min(PREFILL_CHUNK, max(_LEAST_CHUNK, fitting // _LEAST_CHUNK * _LEAST_CHUNK))
        if len(ids) - start - size == 1:  # which would be run alone (see RERUN)
            size -= 1
        pieces.append(ids[start : start + size])
        start += size
    return pieces


def _verify_small_files(bundle: Bundle) -> dict[str, list[str]]:
    """Check what is small now; the names of the rest, by the graph whose opening they wait for."""
    if bundle.manifest is None:
        return {}
    files = bundle.manifest["files"]
    large = [name for name, entry in files.items() if entry["size"] > _VERIFY_FIRST]
    verify(bundle, names=[name for name in files if name not in large])
    later = [name for name in large if name in _PREFILL_FILES]
    return {GRAPH: [name for name in large if name not in later], PREFILL: later}
