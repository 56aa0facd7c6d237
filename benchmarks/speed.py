"""gptedge and onnxruntime-genai on the very same bundle, in turn: fresh processes, same prompt, same threads.

    python benchmarks/speed.py BUNDLE [--rounds 5] [--prompt-tokens 512] [--new-tokens 128] [--threads 2]

Prints medians, the ratio between the two, and whether their greedy tokens are the same. It compares runners, not
weights: those are one file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import peers

OURS = """
import json, sys, time
start = time.perf_counter()
import gptedge
bundle, ids, new, threads = json.loads(sys.argv[1])
model = gptedge.load(bundle, threads=threads)
loaded = time.perf_counter()
from gptedge.measure import peak_rss_mb
stream = model.stream_ids(ids, max_tokens=new)
out, first = [], None
for chunk in stream:
    first = first or time.perf_counter()
    out += chunk.token_ids
end = time.perf_counter()
print(json.dumps([loaded - start, first - loaded, end - first, out, peak_rss_mb()]))
"""

THEIRS = """
import json, sys, time
start = time.perf_counter()
import numpy as np, onnxruntime_genai as og, resource
bundle, ids, new, threads = json.loads(sys.argv[1])
config = og.Config(bundle)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = og.Model(config)
loaded = time.perf_counter()
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + new, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(np.array([ids], np.int32))
out, first = [], None
while not generator.is_done():
    generator.generate_next_token()
    out.append(int(generator.get_next_tokens()[0]))
    first = first or time.perf_counter()
end = time.perf_counter()
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps([loaded - start, first - loaded, end - first, out, peak_mb]))
"""


def one_run(python: str | Path, program: str, work: list[object]) -> list:
    done = subprocess.run([python, "-c", program, json.dumps(work)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def prompt_of(bundle: Path, n: int) -> list[int]:
    """Token ids of ordinary English, the beginning of Python's own documentation."""
    from pydoc_data.topics import topics

    from gptedge.tokenizer import Tokenizer

    return Tokenizer.from_folder(bundle).encode(" ".join(topics.values())[: 8 * n])[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    work = [str(a.bundle), prompt_of(a.bundle, a.prompt_tokens), a.new_tokens, a.threads]
    runners = {"gptedge": (sys.executable, OURS), "genai": (peers.environment("genai"), THEIRS)}
    runs: dict[str, list[list]] = {name: [] for name in runners}
    for _ in range(a.rounds + 1):
        for name, (python, program) in runners.items():
            runs[name].append(one_run(python, program, work))
    medians = {}
    for name, got in runs.items():
        load, first, rest, _, rss = zip(*got[1:], strict=True)  # the first round warms the disk's cache
        steps = len(got[-1][3]) - 1
        medians[name] = {
            "load s": statistics.median(load),
            "first token s": statistics.median(first),
            "prefill tok/s": a.prompt_tokens / statistics.median(first),
            "decode tok/s": steps / statistics.median(rest),
            "peak MB": statistics.median(rss),
        }
    print(f"{a.bundle}, medians of {a.rounds} rounds")
    print(f"prompt of {a.prompt_tokens} tokens, {a.new_tokens} new ones, {a.threads} threads")
    print(f"{'':15}{'gptedge':>10}{'genai':>10}{'ratio':>8}")
    for key, ours in medians["gptedge"].items():
        theirs = medians["genai"][key]
        print(f"{key:15}{ours:10.2f}{theirs:10.2f}{ours / theirs:8.2f}")
    print("same greedy tokens:", runs["gptedge"][-1][3] == runs["genai"][-1][3])


if __name__ == "__main__":
    main()
