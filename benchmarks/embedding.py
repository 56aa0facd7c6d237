"""What a program that embeds gptedge feels: chats reopened, lists, schemas, the interpreter's pace, idle cores, memory.

    python benchmarks/embedding.py BUNDLE [--threads 2] [--chats 1000]

The interpreter's pace is how far a Python thread counts while a reply is decoded on one core fewer than there are,
against counting alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import gptedge

TEXT = " ".join(topics.values())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reopening(model: gptedge.Model, tokens: int = 2000) -> str:
    ids = model.tokenizer.encode(TEXT[: 20 * tokens])[: tokens - 40]
    chat = model.chat(max_tokens=1)
    prefill = seconds(lambda: chat.send(model.tokenizer.decode(ids)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.kv"
        save = seconds(lambda: chat.save_cache(path))
        reopen = statistics.median(seconds(lambda: model.chat(cache=path)) for _ in range(3))
        size = path.stat().st_size / 1e6
    return (
        f"chat of {chat.cached_tokens} tokens: prefill {prefill:.2f} s, saved in {save:.2f} s ({size:.0f} MB), "
        f"reopened in {reopen:.3f} s, {reopen / prefill:.1%} of prefill"
    )


def batches(model: gptedge.Model, tokens: int = 64) -> str:
    settings = {"max_tokens": tokens, "logit_bias": dict.fromkeys(model.bundle.eos_ids, -1e4)}
    prompts = [TEXT[i * 3000 :][:120] for i in range(8)]

    def rate(n: int) -> float:
        spent = seconds(lambda: model.run(prompts[:n], **settings))
        first = seconds(lambda: model.run(prompts[:n], **{**settings, "max_tokens": 1}))
        return n * (tokens - 1) / (spent - first)

    rates = {n: statistics.median(rate(n) for _ in range(3)) for n in (1, 2, 4, 8)}
    parts = [f"{n}: {r:.0f} tok/s ({r / rates[1]:.2f}x)" for n, r in rates.items()]
    return f"decoding texts together, {', '.join(parts)}"


class Counter(threading.Thread):
    """Counts until it is stopped; `pace` is per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_counting = threading.Event()
        self.pace = 0.0

    def run(self) -> None:
        start, n = time.perf_counter(), 0
        while not self._stop_counting.is_set():
            for _ in range(10_000):
                n += 1
        self.pace = n / (time.perf_counter() - start)

    def during(self, work: Callable[[], object]) -> float:
        self.start()
        work()
        self._stop_counting.set()
        self.join()
        return self.pace


def interpreter(model: gptedge.Model) -> str:
    def reply() -> None:
        model.run(TEXT[:2000], max_tokens=100, logit_bias=dict.fromkeys(model.bundle.eos_ids, -1e4))

    pairs = [(Counter().during(lambda: time.sleep(1.5)), Counter().during(reply)) for _ in range(5)]
    kept = statistics.median(busy / alone for alone, busy in pairs)
    return f"a Python thread beside a reply on {model.session.threads} thread(s) keeps {kept:.1%} of its pace"


def idling(model: gptedge.Model) -> str:
    cache, used = model.session.new_cache(), 0.0
    for _ in range(10):
        model.session.run([5], cache)
        before = time.process_time()
        time.sleep(0.1)
        used += time.process_time() - before
    return f"processor time between runs: {used:.1%} of a core"


_RECORDS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{3,12}$"}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
    },
    "minItems": 8,
}


def schemas(model: gptedge.Model, tokens: int = 128) -> str:
    """Milliseconds a token of a list of records, with its schema and without; the first reply makes the grammar."""
    prompt = "Eight people as JSON, with name, age and tags:\n"

    def per_token(**settings: object) -> float:
        result = model.run(prompt, max_tokens=tokens, seed=1, **settings)
        return 1000 / result.timings.decode_tokens_per_s

    first = seconds(lambda: model.run(prompt, max_tokens=1, schema=_RECORDS))
    again = seconds(lambda: model.run(prompt, max_tokens=1, schema=_RECORDS))
    parts = []
    for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        plain, kept = (
            [per_token(temperature=temperature, **settings) for settings in 3 * (part,)]
            for part in ({"logit_bias": dict.fromkeys(model.bundle.eos_ids, -1e4)}, {"schema": _RECORDS})
        )
        parts.append(f"{name} {kept[0]:.1f} at first, then {min(kept[1:]):.1f} for {min(plain):.1f}")
    return f"ms a token with a schema: {'; '.join(parts)}; making it {(first - again) * 1000:.0f} ms once"


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def memory(model: gptedge.Model, chats: int) -> str:
    marks = []
    for i in range(chats):
        chat = model.chat(max_tokens=2)
        chat.send(f"Question {i}?")
        if i in (chats // 10, chats // 2, chats - 1):
            marks.append(f"{resident_mb():.1f} MB after {i + 1}")
    return f"resident: {', '.join(marks)} chats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chats", type=int, default=1000)
    parser.add_argument("--only", choices=["reopening", "batches", "interpreter", "idling", "schemas", "memory"])
    a = parser.parse_args()
    with gptedge.load(a.bundle, threads=a.threads) as model:
        model.run("warm", max_tokens=4)
        parts: dict[str, Callable[[], str]] = {
            "reopening": lambda: reopening(model),
            "batches": lambda: batches(model),
            "idling": lambda: idling(model),
            "schemas": lambda: schemas(model),
            "memory": lambda: memory(model, a.chats),
        }
        for name, part in parts.items():
            if a.only in (None, name):
                print(part(), flush=True)
    if a.only in (None, "interpreter"):
        with gptedge.load(a.bundle, threads=max(1, a.threads - 1)) as model:
            print(interpreter(model), flush=True)


if __name__ == "__main__":
    main()
