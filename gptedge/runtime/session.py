"""A loaded bundle: one onnxruntime session whose weights every conversation shares.

`run` takes token ids and a KVCache and gives logits. It knows nothing of text, sampling or chats. Thread-safe: one lock
lets one conversation compute at a time, a step at a time, so that several of them take turns token by token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    PAST_PREFIX,
    POSITION_IDS,
    past_key,
    past_names,
    present_names,
)
from gptedge.runtime.kv_cache import KVCache
from gptedge.runtime.onnx_runtime import choose_provider, default_threads, import_onnxruntime

PREFILL_CHUNK = 256
"""Tokens run at once while reading a prompt; bounds the memory that attention takes."""
_VERIFY_FIRST = 10_000_000  # bytes; smaller files are checked before onnxruntime reads them, larger ones meanwhile

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Logits = npt.NDArray[np.float32]


class Session:
    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, provider: str | None = None, check: bool = True
    ) -> None:
        """Load the graph. `check` compares every file with the manifest's sha256, beside the loading."""
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be at least 1")
        self._ort = import_onnxruntime()
        self.bundle = bundle
        self.threads = threads or default_threads()
        self.provider = choose_provider(provider, self._ort.get_available_providers())
        self._run_options = self._ort.RunOptions()
        self.lock = threading.Lock()
        """Held while the graph runs."""
        large = _verify_small_files(bundle) if check else []
        with ThreadPoolExecutor(1, "gptedge-verify") as pool:
            checked: Future[None] | None = pool.submit(verify, bundle, names=large) if large else None
            self._session = self._open()
            if checked:
                checked.result()
        self._describe()

    def _open(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        try:
            return self._ort.InferenceSession(str(self.bundle.path / GRAPH), options, providers=[self.provider])
        except Exception as e:  # onnxruntime's exceptions share no public base
            raise BundleError(f"{self.bundle.path / GRAPH} cannot be loaded: {str(e).splitlines()[0]}") from None

    def _describe(self) -> None:
        """What the graph's inputs say of the model."""
        inputs = {i.name: i for i in self._session.get_inputs()}
        optional = {i.name for i in self._session.get_overridable_initializers()}
        self.n_layer = sum(name.startswith(PAST_PREFIX) for name in inputs) // 2
        outputs = {o.name: o for o in self._session.get_outputs()}
        missing = [n for n in (INPUT_IDS, ATTENTION_MASK, *past_names(self.n_layer)) if n not in inputs]
        missing += [n for n in (LOGITS, *present_names(self.n_layer)) if n not in outputs]
        if missing or not self.n_layer:
            raise BundleError(
                f"{self.bundle.path / GRAPH} is not a decoder with a KV cache: "
                f"it lacks {missing[0] if missing else past_key(0)}"
            )
        past = inputs[past_key(0)]
        self.n_kv_head, self.head_dim = int(past.shape[1]), int(past.shape[3])
        self.vocab_size = int(outputs[LOGITS].shape[2])
        self.cache_dtype = _DTYPES[past.type]
        self.logits_dtype = _DTYPES[outputs[LOGITS].type]
        self.context_length = _context_length(self.bundle)
        self._takes_positions = POSITION_IDS in inputs
        self._picks_rows = FIRST_LOGIT in optional
        device = self._ort.capi._pybind_state.OrtDevice
        cpu = device(device.cpu(), device.default_memory(), 0)
        self._output_names = [LOGITS, *present_names(self.n_layer)]
        self._devices = [cpu] * len(self._output_names)

    def new_cache(self) -> KVCache:
        """An empty cache, for one conversation."""
        return KVCache(
            self._ort, n_layer=self.n_layer, n_kv_head=self.n_kv_head, head_dim=self.head_dim, dtype=self.cache_dtype
        )

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextOverflowError unless `n_tokens` and one more fit the context."""
        if n_tokens >= self.context_length:
            raise ContextOverflowError(
                f"the prompt has {n_tokens} tokens and the model's context holds {self.context_length}, "
                "the reply included; shorten the prompt"
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

    def _run(self, ids: npt.NDArray[np.int64], past: int, total: int, cache: KVCache, every_row: bool) -> Logits:
        last_row_only = self._picks_rows and not every_row
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: np.ones((1, total), np.int64)}
        if self._takes_positions:
            feeds[POSITION_IDS] = np.arange(past, total, dtype=np.int64)[None]
        if last_row_only:
            feeds[FIRST_LOGIT] = np.array([-1])
        rows = 1 if last_row_only else ids.shape[1]
        logits = np.empty((1, rows, self.vocab_size), self.logits_dtype)
        self._call(feeds, logits, cache)
        return np.asarray(logits[0] if every_row else logits[0, -1:], np.float32)

    def _call(self, feeds: dict[str, npt.NDArray[Any]], logits: npt.NDArray[Any], cache: KVCache) -> None:
        """One run with the cache bound as input and output. io_binding would do, but refuses optional inputs."""
        state, value = self._ort.capi._pybind_state, self._ort.OrtValue.ortvalue_from_numpy
        held = [value(a) for a in feeds.values()]  # these must outlive the call
        out = value(logits)
        inputs, outputs = state.OrtValueVector(), state.OrtValueVector()
        outputs.push_back(out._ortvalue)
        for v in held:
            inputs.push_back(v._ortvalue)
        for v in cache.buffers:
            inputs.push_back(v._ortvalue)
            outputs.push_back(v._ortvalue)
        names = [*feeds, *past_names(self.n_layer)]
        self._session._sess.run_with_ortvaluevector(
            self._run_options, names, inputs, self._output_names, outputs, self._devices
        )

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


def _context_length(bundle: Bundle) -> int:
    c = bundle.config
    for value in (
        bundle.genai_config.get("model", {}).get("context_length"),
        c.get("max_position_embeddings"),
        c.get("n_positions"),
    ):
        if value:
            return int(value)
    raise BundleError(f"{bundle.path} does not say how long its context is")
