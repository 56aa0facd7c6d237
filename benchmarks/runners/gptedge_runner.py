"""One measurement of gptedge in a process of its own; run by the Python that has it. In and out: see speed.py."""

import json
import sys
import time

work = json.load(sys.stdin)
begin = time.perf_counter()
import gptedge  # noqa: E402  (importing is timed, or must not be)

# As the command that generates does, which knows its prompt before it loads.
model = gptedge.load(work["model"], threads=work["threads"], long_prompts=len(work["prompt"]) > 64)
loaded = time.perf_counter()
from threading import Event  # noqa: E402  (importing is timed, or must not be)

from gptedge.config import SamplingParams  # noqa: E402  (importing is timed, or must not be)
from gptedge.runtime.generate import steps  # noqa: E402  (importing is timed, or must not be)

cache = model.session.new_cache()


def turn(prompt: list[int], new: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the others."""
    start, first, out = time.perf_counter(), 0.0, []
    for token, _ in steps(model.session, cache, prompt, SamplingParams(max_tokens=new, temperature=0), Event()):
        first = first or time.perf_counter()
        out.append(token)
    return out, first - start, time.perf_counter() - first


tokens, first_s, rest_s = turn(work["prompt"], work["new"])
first_at = time.time() - rest_s
second_s = turn([*work["prompt"], *tokens, *work["second"]], 1)[1] if work["second"] else None
from gptedge.measure import peak_rss_mb  # noqa: E402  (importing is timed, or must not be)

print(json.dumps([loaded - begin, first_s, rest_s, tokens, first_at, second_s, peak_rss_mb()]))
