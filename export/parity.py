"""Does the exported graph compute what its source computes? Token for token, through the KV cache, in one pass.

The graph reads a prompt and then decodes greedily, one cached step a token. The source is asked once for the logits of
the whole text. Where its likeliest token is always the one the graph chose, the two decode alike, by induction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gptedge.errors import ParityError
from gptedge.runtime.session import Session
from gptedge.safetensors import FloatArray

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
"""Largest difference of a logit, relative to the standard deviation of the source's logits."""
PROMPT_TOKENS, GREEDY_TOKENS = 24, 40


@dataclass(frozen=True)
class Parity:
    max_abs_logit_diff: float
    relative_logit_diff: float
    """max_abs_logit_diff / standard deviation of the source's logits."""
    greedy_tokens_compared: int
    greedy_tokens_equal: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(session: Session, source_logits: Callable[[list[int]], FloatArray], *, seed: int = 0) -> Parity:
    """Compare from a random prompt, drawn with `seed`. `source_logits`: ids [T] -> logits [T, vocab_size]."""
    room = session.context_length
    prompt_length = min(PROMPT_TOKENS, max(1, room // 2))
    count = min(GREEDY_TOKENS, room - prompt_length)
    ids = [int(i) for i in np.random.default_rng(seed).integers(0, session.vocab_size, prompt_length)]
    cache = session.new_cache()
    rows = [session.run(ids, cache, every_row=True)]
    for _ in range(count):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(session.run([ids[-1]], cache))
    ours, theirs = np.concatenate(rows), source_logits(ids)
    return _summary(ours, theirs, ids, prompt_length)


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


def _summary(ours: FloatArray, theirs: FloatArray, ids: list[int], prompt_length: int) -> Parity:
    spread = float(theirs.std())
    difference = float(np.abs(ours - theirs).max())
    chosen = np.array(ids[prompt_length:])
    judged = theirs[prompt_length - 1 : len(ids) - 1]  # the rows that chose them
    # Equal up to a tie: two tokens closer than the arithmetic can tell apart may come in either order.
    margin = judged.max(-1) - judged[np.arange(len(chosen)), chosen]
    equal = (
        int((margin <= 2 * difference).sum()) if difference <= TOLERANCE["fp32"] * spread else int((margin == 0).sum())
    )
    return Parity(difference, difference / spread if spread else float("nan"), len(chosen), equal)
