"""Run by the Python of llama-cpp-python: quantize a GGUF file, and write its logits for windows of token ids.

In: {"source", "model", "type", "windows", "first_row", "threads", "logits"}; `type` is llama.cpp's number of a kind of
file, or null to take `model` as it is. Out: {"seconds"} that quantizing took. The logits go to a float32 .npy file,
[windows, rows, vocabulary], each window's rows from `first_row` up to its last but one.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def quantize(source: str, target: str, kind: int, threads: int) -> float:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, threads
    start = time.perf_counter()
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source} to type {kind}")
    return time.perf_counter() - start


def write_logits(path: str, file: str, windows: list[list[int]], first_row: int, threads: int) -> None:
    length = len(windows[0])
    rows = range(first_row, length - 1)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    shape = (len(windows), len(rows), vocabulary)
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    for i, window in enumerate(windows):
        fill(batch, window, rows)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, batch):
            sys.exit(f"llama.cpp could not run window {i} of {path}")
        out[i] = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=shape[1:])
    out.flush()


def fill(batch: llama_cpp.llama_batch, window: list[int], rows: range) -> None:
    """One sequence from position 0 on, with logits for `rows` alone."""
    batch.n_tokens = len(window)
    for position, token in enumerate(window):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = position in rows


llama_cpp.llama_backend_init()
work = json.load(sys.stdin)
seconds = 0.0
if work["type"] is not None:
    seconds = quantize(work["source"], work["model"], work["type"], work["threads"])
write_logits(work["model"], work["logits"], work["windows"], work["first_row"], work["threads"])
print(json.dumps({"seconds": seconds}))
