"""Where the time of a decode step goes, by operator: onnxruntime's own profile of a few steps.

Profiling itself costs time at each node, so the sum is more than a step takes; the parts tell, not the whole.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gptedge.runtime.adapter import Adapter
from gptedge.runtime.session import Session

PROFILED_STEPS = 16
"""Steps that are recorded, after the prompt."""


def decode_profile(session: Session, *, prompt_tokens: int, adapter: Adapter | None = None) -> dict[str, float]:
    """Milliseconds of a decode step after `prompt_tokens` tokens by operator, the costliest first."""
    with tempfile.TemporaryDirectory() as folder, session.profiled(Path(folder) / "profile") as end:
        cache = session.new_cache(adapter)
        session.prefill([i % session.vocab_size for i in range(prompt_tokens)], cache)
        for _ in range(PROFILED_STEPS):
            session.run([0], cache)
        events = json.loads(Path(end()).read_text())
    return _by_operator(events)


def _by_operator(events: list[dict[str, Any]]) -> dict[str, float]:
    runs = [e for e in events if e.get("cat") == "Session" and e["name"] == "model_run"]
    begin, spent = runs[-PROFILED_STEPS]["ts"], Counter[str]()
    for e in events:
        if e.get("cat") == "Node" and e["ts"] >= begin and e["name"].endswith("_kernel_time"):
            spent[e["args"]["op_name"]] += e["dur"]
    return {name: round(us / 1000 / PROFILED_STEPS, 3) for name, us in spent.most_common()}
