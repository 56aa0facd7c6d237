"""Does the exported graph compute what its source computes? Logits and greedy tokens, through the KV cache.

`compare_stages` is what every export does: both are given one random text, and after each of its tokens the logits and
the likeliest next token are compared. The graph gets it in two chunks and then token by token, in the memory of a
layer. `compare` decodes freely with a loaded session: it reads a prompt and takes the likeliest token each time. The
source is asked once for the logits of the whole text; where its likeliest token is always the one the graph chose, the
two decode alike, by induction.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from gptedge.errors import ParityError
from gptedge.export.stages import run_stages
from gptedge.runtime.session import Session
from gptedge.runtime.threads import default_threads
from gptedge.safetensors import FloatArray

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
"""Largest difference of a logit, relative to the standard deviation of the source's logits."""
PROMPT_TOKENS, GREEDY_TOKENS = 24, 40
STAGE_SIZES = (40, 16, *([1] * 8))
"""Tokens given to each stage at a time; the first of all are left out where the context is shorter."""


@dataclass(frozen=True)
class Parity:
    max_abs_logit_diff: float
    relative_logit_diff: float
    """max_abs_logit_diff / standard deviation of the source's logits."""
    greedy_tokens_compared: int
    greedy_tokens_equal: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


SourceLogits = Callable[[list[int]], FloatArray]
"""ids [T] -> logits [T, vocab_size]"""


def compare(session: Session, source_logits: SourceLogits, *, seed: int = 0) -> Parity:
    """Compare free decoding from a random prompt, drawn with `seed`."""
    room = session.context_length
    prompt_length = min(PROMPT_TOKENS, max(1, room // 2))
    count = min(GREEDY_TOKENS, room - prompt_length)
    ids = _random_ids(seed, session.vocab_size, prompt_length)
    cache = session.new_cache()
    rows = [session.run(ids, cache, every_row=True)]
    for _ in range(count):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(session.run([ids[-1]], cache))
    ours, theirs, first = np.concatenate(rows), source_logits(ids), prompt_length - 1
    return _summary(ours, theirs, np.array(ids[prompt_length:]), rows=slice(first, len(ids) - 1))


def compare_stages(
    graph: Path, source_logits: SourceLogits, *, vocab_size: int, context_length: int, seed: int = 0
) -> Parity:
    """Compare the saved graph on a random text, drawn with `seed`. Raises BundleError where it cannot be loaded."""
    sizes = _fitting(context_length)
    ids = _random_ids(seed, vocab_size, sum(sizes))
    # Both have much to read and little to compute: side by side, each on its own cores. BLAS's threads spin while they
    # wait: on two busy cores, two of them took 1.2 s of processor time where one took 0.4 s.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(1, "gptedge-reference") as pool:
        asked = pool.submit(source_logits, ids)
        ours = run_stages(graph, ids, sizes, threads=max(1, default_threads() - 1))
        theirs = asked.result()
    return _summary(ours, theirs, ours.argmax(-1))


def _fitting(context_length: int) -> list[int]:
    sizes = list(STAGE_SIZES)
    while sum(sizes) > context_length:
        sizes[0] -= 1
        sizes = [n for n in sizes if n]
    return sizes


def _random_ids(seed: int, vocab_size: int, count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab_size, count)]


def check(parity: Parity, dtype: str) -> None:
    """Raise ParityError unless logits agree within TOLERANCE and every greedy token is the same."""
    bound = TOLERANCE[dtype]
    # Written so that a NaN fails.
    if not parity.relative_logit_diff <= bound:
        raise ParityError(
            f"the exported graph's logits differ from the source's by {parity.relative_logit_diff:.2g} "
            f"of their spread; the bound is {bound:g}"
        )
    if dtype == "fp32" and parity.greedy_tokens_equal < parity.greedy_tokens_compared:
        raise ParityError(
            f"greedy decoding of the exported graph agrees with the source on {parity.greedy_tokens_equal} of "
            f"{parity.greedy_tokens_compared} tokens"
        )


def _summary(ours: FloatArray, theirs: FloatArray, chosen: npt.NDArray[np.int64], rows: slice = slice(None)) -> Parity:
    """`chosen` are the graph's greedy tokens after each of `rows`. `ours` is overwritten."""
    spread = float(theirs.std())
    judged = theirs[rows]
    # Equal up to a tie: two tokens closer than the arithmetic can tell apart may come in either order.
    margin = judged.max(-1) - judged[np.arange(len(chosen)), chosen]
    difference = float(np.abs(np.subtract(ours, theirs, out=ours), out=ours).max())
    close = 2 * difference if difference <= TOLERANCE["fp32"] * spread else 0.0
    equal = int((margin <= close).sum())
    relative = difference / spread if spread else 0.0 if not difference else float("inf")
    return Parity(difference, relative, len(chosen), equal)
