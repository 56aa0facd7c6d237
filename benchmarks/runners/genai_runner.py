"""One measurement of onnxruntime-genai in a process of its own, run by its Python. In and out: see speed.py."""

import json
import sys
import time
from typing import Any

from memory import peak_mb

work = json.load(sys.stdin)


def load() -> Any:
    """Importing counts as loading."""
    import onnxruntime_genai as og

    config = og.Config(work["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": work["threads"]}}}}))
    return og.Model(config)


def new_generator() -> Any:
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    room = len(work["prompt"]) + work["new"] + len(work["second"]) + 2
    params.set_search_options(max_length=room + 32, do_sample=False)
    if work["options"]:
        params.set_speculative_options(**work["options"])
    return og.Generator(model, params)


def turn(prompt: list[int], new: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the others."""
    import numpy as np

    start, first, before = time.perf_counter(), 0.0, len(generator.get_sequence(0)) if generator.token_count() else 0
    generator.append_tokens(np.array([prompt], np.int32))
    while True:
        generator.generate_next_token()
        first = first or time.perf_counter()
        out = generator.get_sequence(0)[before + len(prompt) :].tolist()
        if len(out) >= new or generator.is_done():
            return out[:new], first - start, time.perf_counter() - first


begin = time.perf_counter()
model = load()
loaded = time.perf_counter()
generator = new_generator()
tokens, first_s, rest_s = turn(work["prompt"], work["new"])
first_at = time.time() - rest_s
second_s = turn(work["second"], 1)[1] if work["second"] else None
print(json.dumps([loaded - begin, first_s, rest_s, tokens, first_at, second_s, peak_mb()]))
