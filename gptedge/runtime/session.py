"""A loaded bundle: one onnxruntime session whose weights every conversation shares.

`run` takes token ids and a KVCache and gives logits. It knows nothing of text, sampling or chats. Thread-safe: one lock
lets one conversation compute at a time, a step at a time, so that several of them take turns token by token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptedge.bundle import GRAPH, Bundle, verify
from gptedge.errors import BundleError, ContextOverflowError, UsageError
from gptedge.graph_io import (
    ATTENTION_MASK,
    FIRST_LOGIT,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    past_names,
    present_names,
)
from gptedge.runtime.adapter import Adapter, read_adapter
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.onnx_runtime import device_of, import_onnxruntime, open_graph, session_options
from gptedge.runtime.signature import read_signature
from gptedge.runtime.threads import default_threads

PREFILL_CHUNK = 256
"""Tokens run at once while reading a prompt; bounds the memory that attention takes."""
_VERIFY_FIRST = 10_000_000  # bytes; smaller files are checked before onnxruntime reads them, larger ones meanwhile

Logits = npt.NDArray[np.float32]


class Session:
    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, provider: str | None = None, check: bool = True
    ) -> None:
        """Load the graph. `check` compares every file with the manifest's sha256, beside the loading.

        provider: cpu or cuda; None is CUDA where it works, else the CPU. `self.provider` says which it became.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be at least 1")
        self._ort = import_onnxruntime()
        self.bundle = bundle
        self.threads = threads or default_threads()
        self._run_options = self._ort.RunOptions()
        self.lock = threading.Lock()
        """Held while the graph runs."""
        large = _verify_small_files(bundle) if check else []
        with ThreadPoolExecutor(1, "gptedge-verify") as pool:
            checked: Future[None] | None = pool.submit(verify, bundle, names=large) if large else None
            self._session, self.provider = self._open(provider)
            if checked:
                checked.result()
        self._describe()

    def _open(self, provider: str | None) -> tuple[Any, str]:
        options = session_options(self._ort, self.threads)
        return open_graph(self._ort, self.bundle.path / GRAPH, options, provider)

    def _describe(self) -> None:
        """What the graph's inputs say of the model, and where its outputs go: logits to the CPU, the cache stays."""
        kind = device_of(self.provider)
        signature = read_signature(self.bundle, self._session, kind)
        self.signature = signature
        self.n_layer, self.vocab_size = signature.n_layer, signature.vocab_size
        self.n_kv_head, self.head_dim = signature.cache.shapes[0]
        self.context_length = signature.context_length
        self._output_names = [LOGITS, *present_names(self.n_layer)]
        cpu, own = (self._ort.OrtDevice.make(place, 0)._get_c_device() for place in ("cpu", kind))
        self._devices = [cpu, *[own] * (2 * self.n_layer)]

    def new_cache(self) -> KVCache:
        """An empty cache, for one conversation."""
        return KVCache(self._ort, self.signature.cache)

    def load_adapter(self, path: Path) -> Adapter:
        """Read a LoRA adapter for this bundle; `KVCache.use` puts it to use. Raises UsageError or BundleError."""
        device = device_of(self.provider)
        return read_adapter(self._ort, path, self.bundle, self._session.get_overridable_initializers(), device)

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextOverflowError unless `n_tokens` and one more fit the context."""
        if n_tokens >= self.context_length:
            raise ContextOverflowError(
                f"the prompt has {n_tokens} tokens and the model's context holds {self.context_length}, "
                "the reply included; shorten the prompt, or let the oldest go with context_overflow shift"
            )

    def prefill(self, ids: Sequence[int], cache: KVCache, *, stop: threading.Event | None = None) -> Logits | None:
        """Run a prompt in chunks. The last token's logits, float32 [vocab_size]; None when `stop` was set meanwhile."""
        logits = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            if stop is not None and stop.is_set():
                return None
            logits = self.run(ids[start : start + PREFILL_CHUNK], cache)[-1]
        return logits

    def run(self, ids: Sequence[int], cache: KVCache, *, every_row: bool = False) -> Logits:
        """Append `ids` to `cache`. Logits of the last, float32 [1, vocab_size], or of every one, [T, vocab_size]."""
        if not len(ids):
            raise UsageError("there are no tokens to run")
        past, total = len(cache), len(cache) + len(ids)
        if total > self.context_length:
            raise ContextOverflowError(f"{total} tokens do not fit the model's context of {self.context_length}")
        with self.lock:
            cache.reserve(total, self.context_length)
            logits = self._run(np.asarray([ids], np.int64), past, total, cache, every_row)
            cache.ids.extend(int(i) for i in ids)
        return logits

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
            logits = self._call(feeds, (len(ids), 1, self.vocab_size), rows)
        return np.asarray(logits[:, 0], np.float32)

    def _run(self, ids: npt.NDArray[np.int64], past: int, total: int, cache: KVCache, every_row: bool) -> Logits:
        last_row_only = self.signature.picks_rows and not every_row
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: np.ones((1, total), np.int64)}
        if self.signature.takes_positions:
            feeds[POSITION_IDS] = np.arange(past, total, dtype=np.int64)[None]
        if last_row_only:
            feeds[FIRST_LOGIT] = np.array([-1])
        rows = 1 if last_row_only else ids.shape[1]
        logits = self._call(feeds, (1, rows, self.vocab_size), cache)
        return np.asarray(logits[0] if every_row else logits[0, -1:], np.float32)

    def _call(self, feeds: dict[str, npt.NDArray[Any]], shape: tuple[int, ...], cache: KVCache) -> npt.NDArray[Any]:
        """One run: logits of `shape`. A shared cache is bound as input and output, a growing one takes what comes.

        io_binding would do, but refuses optional inputs.
        """
        state, value = self._ort.capi._pybind_state, self._ort.OrtValue.ortvalue_from_numpy
        held = [value(a) for a in feeds.values()]  # these must outlive the call
        inputs, outputs = state.OrtValueVector(), state.OrtValueVector()
        names, given = (cache.adapter.names, cache.adapter.values) if cache.adapter else ((), ())
        for v in (*held, *cache.buffers, *given):
            inputs.push_back(v._ortvalue)
        logits = np.empty(shape, self.signature.logits_dtype)
        shared = self.signature.cache.shared
        bound = [value(logits), *cache.buffers] if shared else []
        for v in bound:
            outputs.push_back(v._ortvalue)  # onnxruntime makes what is not given here
        names = (*feeds, *past_names(self.n_layer), *names)
        self._session._sess.run_with_ortvaluevector(
            self._run_options, names, inputs, self._output_names, outputs, self._devices
        )
        if shared:
            return logits
        rows, *presents = (self._ort.OrtValue(v) for v in outputs)
        cache.take(presents)
        return rows.numpy()

    def close(self) -> None:
        """Give the weights' memory back. Later runs raise BundleError."""
        with self.lock:
            self._session = _Closed()


class _Closed:
    """Stands where a closed session was."""

    def __getattr__(self, name: str) -> Any:
        raise BundleError("this model has been closed; load it again")


def _verify_small_files(bundle: Bundle) -> list[str]:
    """Check what is small now; the names of the rest."""
    if bundle.manifest is None:
        return []
    files = bundle.manifest["files"]
    large = [name for name, entry in files.items() if entry["size"] > _VERIFY_FIRST]
    verify(bundle, names=[name for name in files if name not in large])
    return large
