"""The text that calibrated recipes learn from: windows of a file, or of what the model itself writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptedge.bundle import GRAPH, Bundle
from gptedge.errors import DataError
from gptedge.graph_io import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST_PREFIX, POSITION_IDS, present_names
from gptedge.progress import Report
from gptedge.runtime.onnx_runtime import import_onnxruntime
from gptedge.text import read_text
from gptedge.tokenizer import Tokenizer

WINDOW = 512
"""Tokens of a window, or the model's context where that is shorter."""
OWN_WINDOWS = 64
"""Windows that the model writes itself, at most: all are written side by side, and each takes memory."""

Windows = npt.NDArray[np.int64]


def text_windows(path: Path, bundle: Bundle, count: int, window: int, *, seed: int) -> Windows:
    """Up to `count` windows of a file, spread over all of it, [n, window]. Raises DataError when it fills none."""
    text = read_text(path)
    if "\0" in text:
        raise DataError(f"{path} is not text: it holds zero bytes")
    ids = _tokenizer(bundle).encode(text)
    n = len(ids) // window
    if n == 0:
        raise DataError(f"{path} has {len(ids)} tokens, and calibration needs at least one window of {window}")
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:count])
    return np.asarray(ids[: n * window], np.int64).reshape(n, window)[chosen]


def own_windows(bundle: Bundle, count: int, window: int, *, threads: int, seed: int, report: Report) -> Windows:
    """`count` windows that the float model writes itself, from random first tokens, at a temperature of 1.

    What a model writes shows it the activations that it will meet when it is used, without any data (compare Liu et
    al. 2023, arXiv:2305.17888). All windows are written side by side, one token of each at a time.
    """
    vocab_size = _tokenizer(bundle).vocab_size
    writer = _Writer(bundle, count, window, threads)
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, window), np.int64)
    ids[:, 0] = rng.integers(0, vocab_size, count)
    for t in range(1, window):
        logits = writer.step(ids[:, t - 1 : t], t)[:, :vocab_size]  # rows of padding have no token
        noise = rng.gumbel(size=logits.shape).astype(np.float32)
        ids[:, t] = (logits + noise).argmax(-1)  # a sample of softmax(logits)
        report(t, window - 1, "writing calibration text")
    return ids


def _tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_folder(bundle.path)


class _Writer:
    """Decodes a fixed number of texts of one length together, over one KV cache."""

    def __init__(self, bundle: Bundle, n: int, length: int, threads: int) -> None:
        self._ort = import_onnxruntime()
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = self._ort.InferenceSession(
            str(bundle.path / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        inputs = {i.name: i for i in self._session.get_inputs()}
        past = [i for name, i in inputs.items() if name.startswith(PAST_PREFIX)]
        self._takes_positions = POSITION_IDS in inputs
        self._names = [i.name for i in past]
        shape = (n, past[0].shape[1], length, past[0].shape[3])
        self._cache = [self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in past]
        self._outputs = [LOGITS, *present_names(len(past) // 2)]
        self._rows = (n, 1, int(self._session.get_outputs()[0].shape[2]))

    def step(self, ids: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.float32]:
        """Logits [n, vocab_size] after the tokens [n, 1], the text being `total` long with them."""
        binding = self._session.io_binding()
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: np.ones((len(ids), total), np.int64)}
        if self._takes_positions:
            feeds[POSITION_IDS] = np.full_like(ids, total - 1)
        logits = np.empty(self._rows, np.float32)
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, output, value in zip(self._names, self._outputs[1:], self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(output, value)
        binding.bind_ortvalue_output(LOGITS, self._ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(binding)
        return logits[:, 0]
