"""One measurement of transformers, or of optimum with onnxruntime, in a process of its own. In and out: see speed.py.

Neither keeps a KV cache between calls of `generate`, so a second turn prefills again.
"""

import json
import sys
import time
from typing import Any

from memory import peak_mb

work = json.load(sys.stdin)


def load() -> Any:
    """Importing counts as loading."""
    import torch

    torch.set_num_threads(work["threads"])
    if work["options"].get("optimum"):
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = work["threads"]
        return ORTModelForCausalLM.from_pretrained(work["model"], session_options=options)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)


class Clock:
    """A streamer: called with the prompt first, then with each token."""

    def __init__(self) -> None:
        self.calls = 0
        self.first = 0.0

    def put(self, _value: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def turn(prompt: list[int], new: int) -> tuple[list[int], float, float]:
    """Tokens, seconds to the first, seconds of the others."""
    import torch

    start, clock = time.perf_counter(), Clock()
    ids = torch.tensor([prompt])
    lengths = {"max_new_tokens": new, "min_new_tokens": 1 if work.get("ends") else new}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **lengths)
    return out[0, len(prompt) :].tolist(), clock.first - start, time.perf_counter() - clock.first


begin = time.perf_counter()
model = load()
loaded = time.perf_counter()
tokens, first_s, rest_s = turn(work["prompt"], work["new"])
first_at = time.time() - rest_s
second_s = turn([*work["prompt"], *tokens, *work["second"]], 1)[1] if work["second"] else None
print(json.dumps([loaded - begin, first_s, rest_s, tokens, first_at, second_s, peak_mb()]))
