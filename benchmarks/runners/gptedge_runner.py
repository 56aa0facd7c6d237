"""One measurement of gptedge in a process of its own; run by the Python that has it. In and out: see speed.py."""

import json
import sys
import time
from threading import Event
from typing import Any

from memory import peak_mb

work = json.load(sys.stdin)


def load() -> Any:
    """Importing counts as loading. The prompt is known by then, as to the command that generates."""
    import gptedge

    return gptedge.load(work["model"], threads=work["threads"], long_prompts=len(work["prompt"]) > 64)


def turn(prompt: list[int], new: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the others."""
    from gptedge.config import SamplingParams
    from gptedge.runtime.generate import steps

    start, first, out = time.perf_counter(), 0.0, []
    for token, _ in steps(model.session, cache, prompt, SamplingParams(max_tokens=new, temperature=0), Event()):
        first = first or time.perf_counter()
        out.append(token)
        if token in work.get("ends", ()):
            break
    return out, first - start, time.perf_counter() - first


begin = time.perf_counter()
model = load()
loaded = time.perf_counter()
cache = model.session.new_cache()
tokens, first_s, rest_s = turn(work["prompt"], work["new"])
first_at = time.time() - rest_s
second_s = turn([*work["prompt"], *tokens, *work["second"]], 1)[1] if work["second"] else None
print(json.dumps([loaded - begin, first_s, rest_s, tokens, first_at, second_s, peak_mb()]))
