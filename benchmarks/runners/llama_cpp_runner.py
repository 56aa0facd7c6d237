"""One measurement of llama-cpp-python in a process of its own, run by its Python. In and out: see speed.py."""

import json
import sys
import time
from typing import Any

from memory import peak_mb

work = json.load(sys.stdin)


def load() -> Any:
    """Importing counts as loading."""
    from llama_cpp import Llama

    room = len(work["prompt"]) + work["new"] + len(work["second"]) + 2
    threads = {"n_threads": work["threads"], "n_threads_batch": work["threads"]}
    return Llama(work["model"], n_ctx=room, verbose=False, **threads)


def turn(prompt: list[int], new: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the others; what the prompt shares with the last turn is kept."""
    start, first, out = time.perf_counter(), 0.0, []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        first = first or time.perf_counter()
        out.append(token)
        if len(out) == new or token in work.get("ends", ()):
            return out, first - start, time.perf_counter() - first
    raise AssertionError("llama.cpp generates on and on")


begin = time.perf_counter()
model = load()
loaded = time.perf_counter()
tokens, first_s, rest_s = turn(work["prompt"], work["new"])
first_at = time.time() - rest_s
second_s = turn([*work["prompt"], *tokens, *work["second"]], 1)[1] if work["second"] else None
print(json.dumps([loaded - begin, first_s, rest_s, tokens, first_at, second_s, peak_mb()]))
